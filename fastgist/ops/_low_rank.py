"""What cp_linear and adapter share on the way in: numbers, autocast, and the gradient of a frozen layer's weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgist.ops import _common

__all__ = ["cast_for_autocast", "check_number", "empty_unless"]


def check_number(op: str, name: str, value: object) -> float:
    """A finite Python number as float."""
    if isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Python number (reading a tensor would synchronise), got a Tensor")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # torch.compile, which may make the number symbolic, cannot trace isfinite
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def cast_for_autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """All tensors in autocast's dtype where it is on, as nn.Linear's are (float64 stays). The casts are differentiable, so
    that a float32 parameter gets a float32 gradient."""
    dtype = _common.autocast_dtype(x.device.type)
    tensors = [x, *others]
    if dtype is None:
        return tensors
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def empty_unless(tensor: Tensor | None, like: Tensor) -> Tensor:
    """What a raw op of fixed arity returns for a result: itself, or an empty tensor where it was not computed."""
    return like.new_empty(0) if tensor is None else tensor
