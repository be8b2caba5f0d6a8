"""bidirectional_kl: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/bidirectional_kl.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgist.ops import _common, _finished, _moving, _transforms
from fastgist.reference import bidirectional_kl as reference
from fastgist.reference._numerics import accumulate_dtype

__all__ = ["bidirectional_kl", "leaves"]

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
# Forward returns (loss, stats, grad_logits, grad_other).
#   reduce False: loss (M,), scale times the row losses. A kernel leaves the stats for its backward; the reference leaves
#       finished gradients in the last two: T times and -T times the row gradients.
#   reduce True: loss (), scale / divisor times their sum. Where gradients are asked for they are this loss's, finished;
#       but a float16 kernel leaves the stats: 1 / rows times a probability would be zero there before any loss scale
#       arrives.


def leaves(impl: str, logits: Tensor, reduce: bool, wanted: bool) -> tuple[bool, bool]:
    """(whether the forward finishes what is asked for, whether it leaves statistics), if any gradient is ``wanted`` or none:
    a loss is the same bits with and without gradients."""
    if impl == "reference" or logits.numel() == 0:
        return wanted, False
    finishes = reduce and logits.dtype != torch.float16
    return finishes, wanted and not finishes


def _fwd(
    logits: Tensor,
    other_logits: Tensor,
    mask: Tensor | None,
    divisor: Tensor | None,
    temperature: float,
    scale: float,
    reduce: bool,
    need_logits: bool,
    need_other: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    impl = _common.resolve_loss(_OP, impl, logits)
    rows = logits.shape[0]
    dtype = accumulate_dtype(logits.dtype)
    if impl == "reference" or logits.numel() == 0:
        whole = scale if divisor is None else scale / divisor
        row_loss, *grads = reference.forward(
            logits, other_logits, mask, temperature, need_logits, need_other, whole if reduce else None
        )
        loss = (row_loss.sum() if reduce else row_loss) * whole
        return loss, logits.new_empty(0), *_common.filled(grads, logits)
    finishes, leaves_stats = leaves(impl, logits, reduce, need_logits or need_other)
    launchers = _launchers(impl)
    row_loss = logits.new_empty(rows, dtype=dtype)
    if finishes:
        loss = row_loss.new_empty(())
        grads = _finished.places(logits, need_logits, need_other)
        arguments = logits, other_logits, mask, divisor, temperature, scale, row_loss, loss, *grads
        launchers.bidirectional_kl_fwd_bwd(*arguments)
        return loss, logits.new_empty(0), *_common.filled(grads, logits)
    stats = logits.new_empty(len(STATS), rows, dtype=dtype)
    launchers.bidirectional_kl_fwd(logits, other_logits, mask, temperature, row_loss, stats)
    if scale != 1.0 or divisor is not None:
        row_loss = row_loss * (scale if divisor is None else scale / divisor)
    loss = row_loss.sum() if reduce else row_loss
    return loss, stats if leaves_stats else logits.new_empty(0), logits.new_empty(0), logits.new_empty(0)


def _fwd_fake(logits, other_logits, mask, divisor, temperature, scale, reduce, need_logits, need_other, impl):
    impl = _common.resolve_loss(_OP, impl, logits)
    finishes, leaves_stats = leaves(impl, logits, reduce, need_logits or need_other)
    dtype = accumulate_dtype(logits.dtype)
    loss = logits.new_empty(() if reduce else logits.shape[0], dtype=dtype)
    stats = logits.new_empty((len(STATS), logits.shape[0]), dtype=dtype) if leaves_stats else logits.new_empty(0)
    kept = reference.finished_dtype(logits.dtype)
    return loss, stats, *reference.finished_empty(logits, kept, finishes and need_logits, finishes and need_other)


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
    impl = _common.resolve_loss(_OP, impl, logits)
    if impl == "reference":
        raise RuntimeError(f"{_OP}: the reference returns its gradients from the forward; there is no backward to call")
    grads = _finished.places(logits, need_logits, need_other)
    if logits.numel() and (need_logits or need_other):
        _launchers(impl).bidirectional_kl_bwd(logits, other_logits, mask, stats, row_grad, temperature, *grads)
    return _common.filled(grads, logits)


def _bwd_fake(logits, other_logits, mask, stats, row_grad, temperature, need_logits, need_other, impl):
    shape = tuple(logits.shape)
    return logits.new_empty(shape if need_logits else 0), logits.new_empty(shape if need_other else 0)


_fwd_op, _fwd_moving = _moving.define(
    "bidirectional_kl_fwd(Tensor logits, Tensor other_logits, Tensor? mask, Tensor? divisor, float temperature, "
    "float scale, bool reduce, bool need_logits, bool need_other, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    _OP,
)
_bwd_op, _bwd_moving = _moving.define(
    "bidirectional_kl_bwd(Tensor logits, Tensor other_logits, Tensor? mask, Tensor stats, Tensor row_grad, "
    "float temperature, bool need_logits, bool need_other, str impl) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    _OP,
)


class _BidirectionalKL(torch.autograd.Function):
    """(M, V) x 2 -> the loss (), or row losses (M,). Saves the finished gradients, or the logits and six scalars a row.

    ``settings``: temperature, scale, reduce, impl, and whether gradients are recorded. ``moving``: None, or the first two in
    their place, which compiled code does not have as constants.
    """

    @staticmethod
    def forward(ctx, logits, other_logits, mask, divisor, moving, settings):
        temperature, scale, reduce, impl, record = settings
        run = _fwd_op
        if moving is not None:
            run, (temperature, scale) = _fwd_moving, moving.unbind()
        ctx.needs = needs = _common.needs(ctx, 2, record)
        loss, stats, *grads = run(logits, other_logits, mask, divisor, temperature, scale, reduce, *needs, impl)
        ctx.finished = grads[0].dim() == 2 or grads[1].dim() == 2
        ctx.settings, ctx.dtype = settings, logits.dtype
        if ctx.finished and reduce:
            ctx.save_for_backward(*grads)
        elif ctx.finished:
            ctx.save_for_backward(*grads, moving)
        elif any(needs):
            ctx.save_for_backward(logits, other_logits, mask, divisor, stats, moving)
        return loss

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, grad):
        temperature, scale, reduce, impl, _ = ctx.settings
        if ctx.finished and reduce:
            grads = _finished.scaled(ctx.saved_tensors, grad, ctx.dtype)
        elif ctx.finished:
            *grads, moving = ctx.saved_tensors
            if moving is not None:
                temperature, scale = moving.unbind()
            factor = grad * (scale / temperature)
            grads = _common.scale_rows(grads, (factor, -factor), ctx.dtype)
        else:
            logits, other_logits, mask, divisor, stats, moving = ctx.saved_tensors
            run = _bwd_op
            if moving is not None:
                run, (temperature, scale) = _bwd_moving, moving.unbind()
            row_grad = grad * scale
            if reduce:
                row_grad = (row_grad if divisor is None else row_grad / divisor).expand(len(logits))
            grads = run(logits, other_logits, mask, stats, row_grad, temperature, *ctx.needs, impl)
        need_logits, need_other = ctx.needs
        return grads[0] if need_logits else None, grads[1] if need_other else None, *(None,) * 4


def _check(logits: Tensor, other_logits: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    if mask is None and _common.alike(logits, other_logits):
        return logits, other_logits
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
            raise TypeError(
                f"{_OP}: mask must be a bool Tensor (of 0, 1: mask.bool()), got {getattr(mask, 'dtype', type(mask).__name__)}"
            )
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
    divisor: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""KL(p||q) + KL(q||p) with p = softmax(logits / T), q = softmax(other_logits / T), both sides receiving gradient.

    The interaction term of GIST (arXiv 2312.07255). One online pass over the two tensors; no softmax is stored. A side
    that only teaches is given detached, and costs nothing.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, any strides. -inf marks a class as absent.
        other_logits: the same shape and dtype.
        temperature: T > 0, a Python number. One that changes from call to call makes torch.compile compile once more, not at
            every value.
        reduction: "none" (shape ..., 0 where masked), "sum", or "mean" = "batchmean": the sum over the rows that count,
            divided by their number (0 if there are none).
        mask: bool (...): False rows count nowhere, whatever they hold.
        t_squared: multiply by T^2, as in knowledge distillation.
        divisor: what "mean" divides by in place of the number of rows that count: a number > 0 or a tensor of one number, such
            as the tokens of all accumulated batches (:func:`fastgist.distributed.mean_divisor` for several processes).
            A tensor may be 0, a count of no rows; below 0 it raises on a CPU and makes the loss NaN elsewhere.
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
    dtype = accumulate_dtype(logits.dtype)
    temperature = _common.check_temperature(_OP, temperature, dtype)
    _transforms.refuse(_OP)
    _common.check_reduction(_OP, reduction)
    leading = logits.shape[:-1]
    rows = leading[0] if len(leading) == 1 else math.prod(leading)
    divisor = _finished.divisor_of(_OP, divisor, reduction, logits, dtype)
    mask = None if mask is None else mask.reshape(rows)
    scale, divisor = _finished.loss_scale(
        reduction, temperature**2 if t_squared else 1.0, rows, mask, divisor, logits, dtype
    )
    if logits.dim() != 2:
        logits, other_logits = (t.reshape(rows, logits.shape[-1]) for t in (logits, other_logits))
    moving = _moving.packed(temperature, scale)
    if moving is not None:
        temperature = scale = 1.0  # no part of the graph
    settings = temperature, scale, reduction != "none", impl, torch.is_grad_enabled()
    other_logits = _common.distinct(logits, other_logits)
    loss = _BidirectionalKL.apply(logits, other_logits, mask, divisor, moving, settings)
    return loss.reshape(leading) if reduction == "none" else loss
