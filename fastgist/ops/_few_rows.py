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
    """y of :func:`fastgist.functional.cp_linear` without a seed; None where it is not for here, or wrong: the way of all
    others then says what. Of shapes and dtypes only that is looked at here which PyTorch would take otherwise."""
    if not isinstance(x, Tensor) or x.dtype is not torch.float32 or not x.is_cpu or torch.compiler.is_compiling():
        return None
    shape = x.shape
    inner = shape[-1] if shape else 0
    if not 0 < x.numel() <= MOST * inner or (training and dropout_p) or not isinstance(v, Tensor) or v.dim() != 2:
        return None
    out, rank = v.shape
    if getattr(weight, "shape", None) != (out, inner) or (bias is not None and bias.shape != (out,)):
        return None
    if gain is not None and (gain.shape != (rank,) or gain.dtype is not torch.float32):
        return None
    if type(dropout_p) not in _NUMBERS or not 0.0 <= dropout_p < 1.0 or type(scale) not in _NUMBERS:
        return None
    if not -math.inf < scale < math.inf or rank == 0 or _common.any_autocast() or backends.interpreting():
        return None
    try:
        rows = x if len(shape) == 2 else x.reshape(-1, inner)
        h = torch.mm(rows, u)
        if gain is not None:
            h = h * gain
        y = F.linear(rows, weight, bias).addmm_(h, v.t(), alpha=scale)
    except (RuntimeError, TypeError):
        return None
    return y if len(shape) == 2 else y.view(*shape[:-1], out)
