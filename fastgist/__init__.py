"""fastgist: fused kernels and drop-in layers for parameter-efficient fine-tuning with GIST and PETAL."""

from fastgist import backends, functional, nn
from fastgist.gist import GistConfig, GistModel, GistOutput, add_gist
from fastgist.peft import (
    AdapterConfig,
    BitFitConfig,
    CPConfig,
    FacTConfig,
    FullConfig,
    LinearProbeConfig,
    LoraConfig,
    PromptConfig,
    SSFConfig,
    assert_training,
    disable_adapter,
    get_peft_model,
    load_adapter,
    merge,
    print_trainable_parameters,
    report,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "CPConfig",
    "FacTConfig",
    "FullConfig",
    "GistConfig",
    "GistModel",
    "GistOutput",
    "LinearProbeConfig",
    "LoraConfig",
    "PromptConfig",
    "SSFConfig",
    "add_gist",
    "assert_training",
    "backends",
    "disable_adapter",
    "functional",
    "get_peft_model",
    "load_adapter",
    "merge",
    "nn",
    "print_trainable_parameters",
    "report",
    "save_adapter",
    "set_adapter",
    "unload",
    "unmerge",
]
