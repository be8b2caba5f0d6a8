"""fastgist: fused kernels and drop-in layers for parameter-efficient fine-tuning with GIST and PETAL."""

import sys

from fastgist import backends, functional, nn, petal
from fastgist._later import modules_of
from fastgist.gist import GistConfig, GistModel, GistOutput, add_gist
from fastgist.peft import (
    AdapterConfig,
    BitFitConfig,
    CPConfig,
    FacTConfig,
    FullConfig,
    LinearProbeConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    SSFConfig,
    assert_training,
    disable_adapter,
    get_peft_model,
    load_adapter,
    merge,
    merge_and_unload,
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
    "PrefixConfig",
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
    "merge_and_unload",
    "nn",
    "petal",
    "print_trainable_parameters",
    "report",
    "save_adapter",
    "set_adapter",
    "unload",
    "unmerge",
]

__getattr__, __dir__ = modules_of(
    sys.modules[__name__], ("distributed", "integrations", "recipes", "reference", "testing", "train")
)
