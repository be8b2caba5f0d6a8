"""Numerics that more than one formula uses unchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["BLOCK_ELEMENTS", "accumulate", "accumulate_dtype", "half_in_float32", "row_blocks"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

#: Elements of each (rows, V) operand that a CPU works on at a time: the half dozen of them that a loss has in hand fit a
#: core's cache. Found by trying 2**16 to 2**20 on V = 1,000 and 32,000 (DESIGN.md).
BLOCK_ELEMENTS = 2**18


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums run in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulate(x: Tensor) -> Tensor:
    """``x`` in its accumulation dtype (no copy if it already is)."""
    return x.to(accumulate_dtype(x.dtype))


def row_blocks(x: Tensor) -> list[slice]:
    """Blocks of the rows of ``x`` (M, V) to compute one after the other, writing each into its place.

    On a CPU a block passes through all of an expression's operations while it is in cache, and what lies between them is
    a block large, not (M, V). Other devices want few large operations: one block there.
    """
    rows, columns = x.shape
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    if x.device.type != "cpu" or rows < 2 * step:
        return [slice(0, rows)]
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def half_in_float32(narrowed: slice) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A function of tensors that computes in float32 where its first argument (of a list, the list's first) is float16: every
    float16 argument is widened, and of its tuple of results (tensors and lists of them) those in ``narrowed`` come back as
    float16. PyTorch's CPU
    products round float16 sums that should not be, and what lies between two products may pass its range."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def wide(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            if not (isinstance(first, Tensor) and first.dtype == torch.float16):
                return function(*args, **kwargs)
            widened = [_widened(a) for a in args]
            results = list(cast(tuple, cast(Callable, function)(*widened, **kwargs)))
            results[narrowed] = [_narrow(r) for r in results[narrowed]]
            return cast(_R, tuple(results))

        return wide

    return decorate


def _widened(value: Any) -> Any:
    if isinstance(value, list):
        return [_widened(v) for v in value]
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def _narrow(value: Any) -> Any:
    if isinstance(value, list):
        return [_narrow(v) for v in value]
    return None if value is None else value.half()
