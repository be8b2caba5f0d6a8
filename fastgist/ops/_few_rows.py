"""cp_linear of a few rows on a CPU: the formula by PyTorch's own autograd. There the host is what is seen of the operation,
and a Python Function costs twice the host time of the nodes that PyTorch makes in C++ (DESIGN.md, "Few rows on a CPU")."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgist import backends
from fastgist.ops import _common

__all__ = ["MOST", "cp_linear"]

#: Rows up to which this is what "auto" takes.
MOST = 128
_NUMBERS = (float, int)


def cp_linear(
    x: Any, weight: Any, bias: Any, u: Any, v: Any, gain: Any, scale: Any, dropout_p: Any, training: bool
) -> Tensor | None:
    """y of :func:`fastgist.functional.cp_linear` without a seed; None where an argument is not the plainest, or wrong: the way
    of all others then says what."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not isinstance(v, Tensor) or v.dim() != 2:
        return None
    shape = x.shape
    inner = shape[-1] if shape else 0
    out, rank = v.shape
    if not 0 < x.numel() <= MOST * inner or out == 0 or rank == 0 or not _is(x, shape):
        return None
    if not (_is(weight, (out, inner)) and _is(u, (inner, rank)) and _is(v, (out, rank))):
        return None
    if not (bias is None or _is(bias, (out,))) or not (gain is None or _is(gain, (rank,)) or _is(gain, (1, rank))):
        return None
    if type(dropout_p) not in _NUMBERS or not 0.0 <= dropout_p < 1.0 or (training and dropout_p > 0.0):
        return None
    if type(scale) not in _NUMBERS or not -math.inf < scale < math.inf:
        return None
    if _common.any_autocast() or backends.interpreting():
        return None
    rows = x if len(shape) == 2 else x.reshape(-1, inner)
    h = torch.mm(rows, u)
    if gain is not None:
        h = h * gain
    y = torch.addmm(F.linear(rows, weight, bias), h, v.t(), alpha=float(scale))
    return y if len(shape) == 2 else y.view(*shape[:-1], out)


def _is(t: Any, shape: tuple[int, ...]) -> bool:
    """Whether ``t`` is a float32 matrix or vector of this shape in a CPU's memory. (Beside others PyTorch's products give
    anything for one on "meta", and no error.)"""
    if not isinstance(t, Tensor) or t.shape != shape or not t.is_cpu:
        return False
    return t.dtype is torch.float32 and t.layout is torch.strided
