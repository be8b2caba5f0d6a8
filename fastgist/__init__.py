"""fastgist: fused kernels and drop-in layers for parameter-efficient fine-tuning with GIST and PETAL."""

import importlib
from types import ModuleType

from fastgist import backends, functional, nn, petal
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

#: Modules that ``fastgist.<name>`` imports when it is first asked for: who does not use them does not wait for them.
_LATER = ("distributed", "integrations", "recipes", "testing", "train")

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


def __getattr__(name: str) -> ModuleType:
    if name in _LATER:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
