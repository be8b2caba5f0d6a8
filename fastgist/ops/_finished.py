"""Gradients that a forward finished: of the scalar loss itself, waiting for the gradient that arrives (1, mostly)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from fastgist.ops import _common

__all__ = ["divisor_of", "is_plain", "loss_scale", "places", "scaled"]

#: Whether the backward that runs is one of several over a retained graph; torch does not say so everywhere.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled(grads: Sequence[Tensor], factor: Tensor, dtype: torch.dtype | Sequence[torch.dtype | None]) -> list[Tensor]:
    """Finished gradients times the incoming gradient () of their loss, as ``dtype``, one for all or one each. Those not asked
    for (1-D, empty) pass.

    A factor of 1 costs no traffic: on a CPU it is looked at, on a GPU a kernel reads it on the device and returns at once.
    Another one is applied in place. Over a retained graph both make a copy: what one backward hands out must neither change
    in the next one nor be what the next one finds.
    """
    dtypes = [dtype] * len(grads) if isinstance(dtype, torch.dtype) else list(dtype)
    if is_plain(factor) and not _keeps_graph():
        if factor.is_cpu and factor.item() == 1.0:
            return [g if d is None or g.dtype == d else g.to(d) for g, d in zip(grads, dtypes, strict=True)]
        wanted = [(g, d) for g, d in zip(grads, dtypes, strict=True) if d is not None and (g.dim() == 2 or g.numel())]
        if wanted and all(g.dtype == d and _common.is_ordinary(g) for g, d in wanted):
            if factor.is_cpu:
                value = float(factor)
                for g, _ in wanted:
                    g.mul_(value)
                return list(grads)
            if factor.is_cuda and _scale_on_device([g for g, _ in wanted], factor):
                return list(grads)
    return [_as(g * factor, d) if g.dim() == 2 or g.numel() else g for g, d in zip(grads, dtypes, strict=True)]


def _as(grad: Tensor, dtype: torch.dtype | None) -> Tensor:
    return grad if dtype is None or grad.dtype == dtype else grad.to(dtype)


def places(logits: Tensor, *wanted: bool) -> list[Tensor | None]:
    """Contiguous memory for gradients of ``logits`` where wanted, not yet written."""
    return [torch.empty_like(logits, memory_format=torch.contiguous_format) if want else None for want in wanted]


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are numbers in memory that Python may look at: nobody traces, compiles or transforms."""
    if torch.compiler.is_compiling() or _common.transforms_active():
        return False
    for t in tensors:
        if not _common.is_ordinary(t):
            return False
    return True


def _scale_on_device(grads: list[Tensor], factor: Tensor) -> bool:
    from fastgist import backends

    if "triton" not in backends.available():
        return False
    from fastgist_kernels.scale import scale_unless_one

    alike: dict[tuple, list[Tensor]] = {}  # the kernel takes two of one shape and dtype, as both sides' gradients are
    for grad in grads:
        alike.setdefault((grad.dtype, grad.shape), []).append(grad)
    for some in alike.values():
        for first in range(0, len(some), 2):
            scale_unless_one(some[first : first + 2], factor)
    return True


def divisor_of(op: str, divisor: object, reduction: str, like: Tensor, dtype: torch.dtype) -> Tensor | float | None:
    """A caller's ``divisor``: a positive number, as a float, or a tensor of one, as () ``dtype`` where ``like`` is.

    Compiled code has a tensor of either: a Python number would be a constant of the graph, and another count of tokens another
    graph.

    Raises:
        TypeError, ValueError: something else, or a reduction that divides by nothing.
    """
    if divisor is None:
        return None
    if reduction not in ("mean", "batchmean"):
        raise ValueError(f"{op}: divisor is what a mean divides by, and reduction is {reduction!r}")
    if isinstance(divisor, Tensor):
        if divisor.numel() != 1:
            raise ValueError(f"{op}: divisor must be one number, got a tensor of shape {tuple(divisor.shape)}")
        if divisor.requires_grad:
            raise ValueError(f"{op}: divisor gets no gradient; detach it")
        if divisor.is_complex() or divisor.dtype == torch.bool:
            raise TypeError(f"{op}: divisor must be a real number, got {_common.dtype_name(divisor.dtype)}")
        if divisor.is_cpu and is_plain(divisor) and not 0.0 <= float(divisor) < float("inf"):
            raise ValueError(f"{op}: divisor must be finite and > 0 (or 0, a count of no rows), got {float(divisor)}")
        given = divisor.reshape(()).to(device=like.device, dtype=dtype, non_blocking=True)
        # Of a count of no rows the loss of 0 stays 0. What nobody could look at and is no count makes the loss NaN.
        return given.clamp(min=torch.finfo(dtype).tiny).masked_fill_(given < 0, float("nan"))
    if isinstance(divisor, bool) or not isinstance(divisor, (int, float, Real)):
        raise TypeError(f"{op}: divisor must be a number or a Tensor, got {type(divisor).__name__}")
    number: float = divisor  # type: ignore[assignment]
    if not 0.0 < number < float("inf"):
        raise ValueError(f"{op}: divisor must be finite and > 0, got {divisor}")
    if torch.compiler.is_compiling():
        return torch.mul(like.new_ones((), dtype=dtype), number)  # new_full would keep a float as a constant
    return float(number)


def loss_scale(
    reduction: str,
    factor: float,
    rows: int,
    counted: Tensor | None,
    divisor: Tensor | float | None,
    like: Tensor,
    dtype: torch.dtype,
) -> tuple[float, Tensor | None]:
    """(scale, divisor ()) of a loss that is scale / divisor times the row losses or their sum: ``factor``, and for a mean
    the number of rows, those that ``counted`` (bool) names or all, or what the caller divides by in its place."""
    if reduction in ("none", "sum"):
        return factor, None
    if isinstance(divisor, Tensor):
        return factor, divisor
    if divisor is not None:
        return factor / divisor, None
    if counted is not None:
        return factor, counted.sum(dtype=dtype).clamp_(min=1)
    if torch.compiler.is_compiling():  # a Python number would make the number of rows a constant of the graph
        return factor, like.new_full((), max(rows, 1), dtype=dtype)
    return factor / max(rows, 1), None
