"""bidirectional_kl: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/bidirectional_kl.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common
from fastgist.reference import bidirectional_kl as reference
from fastgist.reference._numerics import accumulate_dtype

__all__ = ["bidirectional_kl"]

_OP = "bidirectional_kl"

#: Rows of the ``stats`` tensor (len(STATS), M) that a forward kernel leaves for its backward: maxima, sums of the
#: exponentials about them, and the means under p and q of d = (z - max z) - (z_g - max z_g).
STATS = ("max_z", "max_other", "sum_p", "sum_q", "mean_p_d", "mean_q_d")


def _launchers(impl: str):
    """The module that holds ``bidirectional_kl_fwd`` and ``bidirectional_kl_bwd`` of a kernel implementation."""
    if impl == "triton":
        from fastgist_kernels import bidirectional_kl as kernels

        return kernels
    return torch.ops.fastgist_native


# -- raw ops ---------------------------------------------------------------------------------------------------------
# Forward returns (row_loss, stats, grad_logits, grad_other). An implementation that has the gradients in hand fills
# the last two with T times and -T times the row gradients; one that recomputes leaves them empty and backward takes the stats.


def _fwd(
    logits: Tensor,
    other_logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    need_logits: bool,
    need_other: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    impl = backends.resolve(_OP, impl, logits)
    rows, classes = logits.shape
    empty = logits.new_empty(0)
    if impl == "reference" or rows == 0 or classes == 0:
        row_loss, *grads = reference.forward(logits, other_logits, mask, temperature, need_logits, need_other)
        return row_loss, empty, *_common.filled(grads, logits)
    dtype = accumulate_dtype(logits.dtype)
    row_loss = torch.empty(rows, dtype=dtype, device=logits.device)
    stats = torch.empty(len(STATS), rows, dtype=dtype, device=logits.device)
    _launchers(impl).bidirectional_kl_fwd(logits, other_logits, mask, temperature, row_loss, stats)
    return row_loss, stats, empty, logits.new_empty(0)


def _fwd_fake(logits, other_logits, mask, temperature, need_logits, need_other, impl):
    impl = backends.resolve(_OP, impl, logits)
    rows, classes = logits.shape
    dtype = accumulate_dtype(logits.dtype)
    row_loss = logits.new_empty(rows, dtype=dtype)
    with_gradients = impl == "reference" or rows == 0 or classes == 0
    stats = logits.new_empty(
        0 if with_gradients else (len(STATS), rows), dtype=logits.dtype if with_gradients else dtype
    )
    return (
        row_loss,
        stats,
        *reference.finished_empty(logits, with_gradients and need_logits, with_gradients and need_other),
    )


def _bwd(
    logits: Tensor,
    other_logits: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    row_grad: Tensor,
    temperature: float,
    need_logits: bool,
    need_other: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    impl = backends.resolve(_OP, impl, logits)
    if impl == "reference":
        raise RuntimeError(f"{_OP}: the reference returns its gradients from the forward; there is no backward to call")
    shape = logits.shape
    grad_logits = torch.empty(shape, dtype=logits.dtype, device=logits.device) if need_logits else None
    grad_other = torch.empty(shape, dtype=logits.dtype, device=logits.device) if need_other else None
    if logits.numel() and (need_logits or need_other):
        _launchers(impl).bidirectional_kl_bwd(
            logits, other_logits, mask, stats, row_grad, temperature, grad_logits, grad_other
        )
    return _common.filled((grad_logits, grad_other), logits)


def _bwd_fake(logits, other_logits, mask, stats, row_grad, temperature, need_logits, need_other, impl):
    shape = tuple(logits.shape)
    return logits.new_empty(shape if need_logits else 0), logits.new_empty(shape if need_other else 0)


_fwd_op = _common.define(
    "bidirectional_kl_fwd(Tensor logits, Tensor other_logits, Tensor? mask, float temperature, bool need_logits, "
    "bool need_other, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    _OP,
)
_bwd_op = _common.define(
    "bidirectional_kl_bwd(Tensor logits, Tensor other_logits, Tensor? mask, Tensor stats, Tensor row_grad, "
    "float temperature, bool need_logits, bool need_other, str impl) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    _OP,
)


class _BidirectionalKL(torch.autograd.Function):
    """(M, V) x 2 -> row losses (M,). Saves the logits and six scalars a row, or the finished gradients."""

    @staticmethod
    def forward(ctx, logits, other_logits, mask, temperature, record, impl):
        ctx.needs = need_logits, need_other = _common.needs(ctx, 2, record)
        row_loss, stats, grad_logits, grad_other = _fwd_op(
            logits, other_logits, mask, temperature, need_logits, need_other, impl
        )
        ctx.temperature, ctx.impl, ctx.dtype = temperature, impl, logits.dtype
        ctx.finished = grad_logits.dim() == 2 or grad_other.dim() == 2
        if ctx.finished:
            ctx.save_for_backward(grad_logits, grad_other)
        elif need_logits or need_other:
            ctx.save_for_backward(logits, other_logits, mask, stats)
        return row_loss

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, row_grad):
        need_logits, need_other = ctx.needs
        if ctx.finished:
            scale = row_grad / ctx.temperature
            grad_logits, grad_other = _common.scale_rows(ctx.saved_tensors, (scale, -scale), ctx.dtype)
        else:
            logits, other_logits, mask, stats = ctx.saved_tensors
            grad_logits, grad_other = _bwd_op(
                logits, other_logits, mask, stats, row_grad, ctx.temperature, need_logits, need_other, ctx.impl
            )
        return grad_logits if need_logits else None, grad_other if need_other else None, None, None, None, None


def _check(logits: Tensor, other_logits: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    _common.check_floating(_OP, "logits", logits)
    _common.check_floating(_OP, "other_logits", other_logits)
    if logits.dtype != other_logits.dtype and _common.autocast_dtype(logits.device.type) is not None:
        logits, other_logits = logits.float(), other_logits.float()  # as autocast does for torch's own losses
    _common.check_same_dtype(_OP, logits=logits, other_logits=other_logits)
    if logits.dim() == 0:
        raise ValueError(f"{_OP}: logits must have a class dimension, (..., V), got a 0-dimensional tensor")
    if logits.shape != other_logits.shape:
        raise ValueError(
            f"{_OP}: expected other_logits.shape == {tuple(logits.shape)} (the shape of logits), "
            f"got {tuple(other_logits.shape)}"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{_OP}: mask must be a bool Tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != logits.shape[:-1]:
            raise ValueError(
                f"{_OP}: expected mask.shape == {tuple(logits.shape[:-1])} (logits without the class dimension), "
                f"got {tuple(mask.shape)}"
            )
    _common.check_same_device(_OP, logits=logits, other_logits=other_logits, mask=mask)
    return logits, other_logits


def bidirectional_kl(
    logits: Tensor,
    other_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    t_squared: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""KL(p||q) + KL(q||p) with p = softmax(logits / T), q = softmax(other_logits / T), both sides receiving gradient.

    The interaction term of GIST (arXiv 2312.07255). One online pass over the two tensors; no softmax is stored.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, any strides. -inf marks a class as absent.
        other_logits: the same shape and dtype.
        temperature: T > 0, a Python number.
        reduction: "none" (shape ..., 0 where masked), "sum", or "mean" = "batchmean": the sum over the rows that count,
            divided by their number (0 if there are none).
        mask: bool (...): False rows count nowhere, whatever they hold.
        t_squared: multiply by T^2, as in knowledge distillation.
        impl: "auto", "triton", "cuda", "native" or "reference"; see :mod:`fastgist.backends`.

    Returns:
        float32 (float64 for float64 inputs). Gradients come in the dtype of the inputs; double backward raises.
        A class at -inf on one side only makes the row +inf (its gradient NaN); at -inf on both sides it contributes 0.

    Raises:
        ValueError: mismatched shapes, a temperature that is not finite and positive, an unknown reduction.
        TypeError: dtypes that differ outside autocast, or are not floating point.
        RuntimeError: an explicit ``impl`` that cannot run here.
    """
    logits, other_logits = _check(logits, other_logits, mask)
    temperature = _common.check_temperature(_OP, temperature)
    _common.check_reduction(_OP, reduction)
    leading, classes = logits.shape[:-1], logits.shape[-1]
    rows = math.prod(leading)
    row_loss = _BidirectionalKL.apply(
        logits.reshape(rows, classes),
        other_logits.reshape(rows, classes),
        None if mask is None else mask.reshape(rows),
        temperature,
        torch.is_grad_enabled(),
        impl,
    ).reshape(leading)
    if t_squared:
        row_loss = row_loss * temperature**2
    return reference.reduce_rows(row_loss, reduction, mask)
