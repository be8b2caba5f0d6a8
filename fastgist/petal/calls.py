"""How PETAL's hooks read a call of transformers' models."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["IGNORED", "arguments"]

#: transformers' label of a word that no loss counts.
IGNORED = -100


def arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``module`` by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs
