"""What is done to a model: configurations, injection, merging, saving and loading."""

from fastgist.peft.config import (
    AdapterConfig,
    BitFitConfig,
    CPConfig,
    FacTConfig,
    FullConfig,
    LinearProbeConfig,
    LoraConfig,
    PeftConfig,
    PrefixConfig,
    PromptConfig,
    SSFConfig,
    ThresholdConfig,
)
from fastgist.peft.family import Family, LinearSite, register_family
from fastgist.peft.files import load_adapter, save_adapter
from fastgist.peft.inspect import Report, assert_training, print_trainable_parameters, report
from fastgist.peft.method import Method, register_method
from fastgist.peft.surgery import disable_adapter, get_peft_model, merge, merge_and_unload, set_adapter, unload, unmerge

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "CPConfig",
    "FacTConfig",
    "FullConfig",
    "Family",
    "LinearProbeConfig",
    "LinearSite",
    "LoraConfig",
    "Method",
    "PeftConfig",
    "PrefixConfig",
    "PromptConfig",
    "Report",
    "SSFConfig",
    "ThresholdConfig",
    "assert_training",
    "disable_adapter",
    "get_peft_model",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "print_trainable_parameters",
    "register_family",
    "register_method",
    "report",
    "save_adapter",
    "set_adapter",
    "unload",
    "unmerge",
]
