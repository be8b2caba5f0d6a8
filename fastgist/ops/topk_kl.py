"""topk_kl: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/topk_kl.py."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common, _finished, _moving, _transforms
from fastgist.reference import topk_kl as reference
from fastgist.reference._numerics import accumulate_dtype
from fastgist.reference.bidirectional_kl import finished_dtype, reduce_rows

__all__ = ["topk_kl"]

_OP = "topk_kl"
#: Rows of the ``stats`` tensor (len(STATS), M) that the forward kernel leaves for its backward: the maximum of the logits
#: outside the k classes, and T dJ/d(their lse) over the sum of exponentials about it.
STATS = ("max_rest", "pull_rest")
#: Classes a row that the kernel holds in one tile; more are the reference's.
MOST_CLASSES = 1024
_DEBUG = os.environ.get("FASTGIST_DEBUG", "0") == "1"


def _chosen(impl: str, logits: Tensor, indices: Tensor) -> str:
    """The implementation that runs: one that finishes the gradient ("reference") or leaves it to the backward."""
    chosen = backends.resolve(_OP, impl, logits)
    if chosen != "reference" and indices.shape[1] > MOST_CLASSES:
        if impl != "auto":
            raise RuntimeError(
                f"{_OP}: impl={impl!r} takes up to {MOST_CLASSES} classes a row, got {indices.shape[1]}; impl='auto' takes "
                "the reference there"
            )
        return "reference"
    return "reference" if logits.shape[0] == 0 or logits.shape[1] == 0 else chosen


# -- raw ops: forward returns (row_loss, stats, pull, grad_logits): the gradient dJ/dz finished, or the stats and T dJ/dz at
# the k classes (M, k). Their entries come as reference.sparse_teacher leaves them. ----------------------------------------


def _fwd(
    logits: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    log_rest: Tensor,
    mask: Tensor | None,
    temperature: float,
    direction: str,
    need_logits: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    if logits.device.type == "cpu" or _DEBUG:
        _check_entries(log_probs, indices, mask, logits.shape[1])
    impl = _chosen(impl, logits, indices)
    if impl == "reference":
        row_loss, grad = reference.forward(
            logits, log_probs, indices, log_rest, mask, temperature, direction, need_logits
        )
        return row_loss, *_common.filled((None, None, grad if need_logits else None), logits)
    from fastgist_kernels.topk_kl import topk_kl_fwd

    dtype, rows = accumulate_dtype(logits.dtype), logits.shape[0]
    row_loss = torch.empty(rows, dtype=dtype, device=logits.device)
    stats = torch.empty(len(STATS), rows, dtype=dtype, device=logits.device)
    pull = torch.empty(indices.shape, dtype=dtype, device=logits.device)
    topk_kl_fwd(logits, log_probs, indices, log_rest, mask, temperature, direction, row_loss, stats, pull)
    return row_loss, stats, pull, logits.new_empty(0)


def _fwd_fake(logits, log_probs, indices, log_rest, mask, temperature, direction, need_logits, impl):
    dtype, rows = accumulate_dtype(logits.dtype), logits.shape[0]
    row_loss = logits.new_empty(rows, dtype=dtype)
    if _chosen(impl, logits, indices) == "reference":
        grad = logits.new_empty(logits.shape, dtype=finished_dtype(logits.dtype)) if need_logits else None
        return row_loss, *_common.filled((None, None, grad), logits)
    stats, pull = logits.new_empty((len(STATS), rows), dtype=dtype), logits.new_empty(indices.shape, dtype=dtype)
    return row_loss, stats, pull, logits.new_empty(0)


def _bwd(
    logits: Tensor, indices: Tensor, stats: Tensor, pull: Tensor, row_grad: Tensor, temperature: float, impl: str
) -> Tensor:
    if _chosen(impl, logits, indices) == "reference":
        raise RuntimeError(f"{_OP}: the reference returns its gradient from the forward; there is no backward to call")
    from fastgist_kernels.topk_kl import topk_kl_bwd

    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    topk_kl_bwd(logits, indices, stats, pull, row_grad, temperature, grad)
    return grad


def _bwd_fake(logits, indices, stats, pull, row_grad, temperature, impl):
    return logits.new_empty(tuple(logits.shape))


_fwd_op, _fwd_moving = _moving.define(
    "topk_kl_fwd(Tensor logits, Tensor log_probs, Tensor indices, Tensor log_rest, Tensor? mask, float temperature, "
    "str direction, bool need_logits, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    _OP,
)
_bwd_op, _bwd_moving = _moving.define(
    "topk_kl_bwd(Tensor logits, Tensor indices, Tensor stats, Tensor pull, Tensor row_grad, float temperature, str impl) "
    "-> Tensor",
    _bwd,
    _bwd_fake,
    _OP,
)


class _TopkKL(torch.autograd.Function):
    """(M, V) and the teacher's (M, k) -> row losses (M,). Saves the logits and 2 k + 2 numbers a row, or the gradient."""

    @staticmethod
    def forward(ctx, logits, log_probs, indices, log_rest, mask, moving, temperature, direction, record, impl):
        run = _fwd_op
        if moving is not None:  # the temperature, which compiled code does not have as a constant
            run, (temperature,) = _fwd_moving, moving.unbind()
        (ctx.need,) = _common.needs(ctx, 1, record)
        row_loss, stats, pull, grad = run(
            logits, log_probs, indices, log_rest, mask, temperature, direction, ctx.need, impl
        )
        ctx.impl, ctx.dtype, ctx.finished = impl, logits.dtype, grad.dim() == 2
        ctx.temperature = temperature if moving is None else None
        if ctx.finished:
            ctx.save_for_backward(grad)
        elif ctx.need:
            ctx.save_for_backward(logits, indices, stats, pull, moving)
        return row_loss

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, row_grad):
        grad = None
        if ctx.finished:
            (grad,) = _common.scale_rows(ctx.saved_tensors, (row_grad,), ctx.dtype)
        elif ctx.need:
            *saved, moving = ctx.saved_tensors
            if moving is None:
                grad = _bwd_op(*saved, row_grad, ctx.temperature, ctx.impl)
            else:
                grad = _bwd_moving(*saved, row_grad, *moving.unbind(), ctx.impl)
        return grad, *(None,) * 9


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_entries(log_probs: Tensor, indices: Tensor, mask: Tensor | None, classes: int) -> None:
    """IndexError or ValueError naming the first entry of a row that counts which is no class, a class again, or no
    log-probability. On a CPU; on a device only under FASTGIST_DEBUG=1, since the look would synchronise."""
    if indices.numel() == 0:
        return
    counts = True if mask is None else mask[:, None]
    impossible = (indices >= classes) | (indices < 0) & ((indices < -1) | (log_probs != -torch.inf))
    for wrong, values, error, what in (
        (
            impossible,
            indices,
            IndexError,
            f"and there are {classes} classes (-1 is padding where its log-prob is -inf)",
        ),
        (reference.repeated(indices), indices[:, 1:], ValueError, "more than once"),
    ):
        wrong = wrong & counts
        if bool(wrong.any()):
            row, entry = wrong.nonzero()[0].tolist()
            raise error(f"{_OP}: teacher_indices[{row}] holds {int(values[row, entry])}, {what}")
    wrong = (log_probs > torch.finfo(log_probs.dtype).eps) & counts
    if bool(wrong.any()):
        row, entry = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{_OP}: teacher_log_probs[{row}] holds {float(log_probs[row, entry])}, which is no log-probability: take "
            "log_softmax first"
        )
    total = log_probs.to(torch.float64).exp().sum(-1)
    wrong = (total > 1.0 + 2.0**-5) & (counts if mask is None else mask)  # bfloat16 rounds a sum of 1 by less than that
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"{_OP}: the probabilities of teacher_log_probs[{row}] sum to {float(total[row]):.4g}, more than 1: take "
            "log_softmax over all classes first"
        )


def _check(logits: Tensor, log_probs: Tensor, indices: Tensor, mask: Tensor | None, direction: str) -> None:
    _common.check_floating(_OP, "logits", logits)
    _common.check_floating(_OP, "teacher_log_probs", log_probs)
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(
            f"{_OP}: teacher_indices must be an int64 Tensor, got {getattr(indices, 'dtype', type(indices).__name__)}"
        )
    if log_probs.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: the teacher gets no gradient; detach teacher_log_probs")
    if logits.dim() == 0:
        raise ValueError(f"{_OP}: logits must have a class dimension, (..., V), got a 0-dimensional tensor")
    leading = tuple(logits.shape[:-1])
    if log_probs.dim() == 0 or tuple(log_probs.shape[:-1]) != leading or log_probs.shape[-1] == 0:
        raise ValueError(
            f"{_OP}: expected teacher_log_probs.shape == {(*leading, 'k')} with k >= 1, got {tuple(log_probs.shape)}"
        )
    if indices.shape != log_probs.shape:
        raise ValueError(
            f"{_OP}: expected teacher_indices.shape == {tuple(log_probs.shape)} (the shape of teacher_log_probs), "
            f"got {tuple(indices.shape)}"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"{_OP}: mask must be a bool Tensor (of 0, 1: mask.bool()), got {getattr(mask, 'dtype', type(mask).__name__)}"
            )
        if tuple(mask.shape) != leading:
            raise ValueError(
                f"{_OP}: expected mask.shape == {leading} (logits without the class dimension), got {tuple(mask.shape)}"
            )
    if direction not in reference.DIRECTIONS:
        raise ValueError(f"{_OP}: direction must be one of {', '.join(reference.DIRECTIONS)}, got {direction!r}")
    _common.check_same_device(_OP, logits=logits, teacher_log_probs=log_probs, teacher_indices=indices, mask=mask)


def topk_kl(
    logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "both",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    t_squared: bool = False,
    divisor: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Divergence between a student and a teacher of whom k classes are known; all other classes are one, "the rest".

    p = softmax(logits / T) with the others' probabilities added up; q = the teacher over the same k + 1 classes, the rest's
    being 1 - sum. The student's rest is summed over the others, so it is exact however small.

    Args:
        logits: (..., V), the student's, float32, bfloat16, float16 or float64, any strides. -inf marks a class as absent.
        teacher_log_probs: (..., k), floating point: log-probabilities at temperature T, over all V classes, of k distinct
            classes (:func:`fastgist.recipes.mutual.topk_of` makes them). -inf is a class that the teacher excludes.
        teacher_indices: (..., k) int64, the classes, in any order. -1 with a log-probability of -inf is padding.
        temperature: T > 0, a Python number, which may change from call to call under torch.compile too.
        direction: "forward" = KL(q||p), from teacher to student: the usual distillation, which covers what the teacher
            thinks possible. "reverse" = KL(p||q), which avoids what it thinks impossible. "both" = their sum.
        reduction: "none" (shape ..., 0 where masked), "sum", or "mean" = "batchmean": the sum over the rows that count,
            divided by their number (0 if there are none).
        mask: bool (...): False rows count nowhere, whatever they hold, teacher included.
        t_squared: multiply by T^2, as in knowledge distillation.
        divisor: a number or a tensor of one number by which "mean" divides instead of that number, for a mean over the
            tokens of several processes or steps: :func:`fastgist.distributed.mean_divisor`.
        impl: "auto", "triton" (k <= 1024) or "reference"; see :mod:`fastgist.backends`.

    Returns:
        float32 (float64 for float64 logits). The gradient comes in the dtype of the logits; double backward raises. A class
        that q has and p has not (-inf) makes KL(q||p) +inf, and the reverse for KL(p||q); the row's gradient is NaN. Where
        the k probabilities reach 1 within the rounding of their dtype the teacher has no rest, so "reverse" and "both" are
        +inf for a student that has one: there "forward" is the direction to take.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit, named; a teacher that requires grad; on a CPU
            a class that is named twice in a row, or a log-probability above 0.
        IndexError: on a CPU, an index that is neither a class nor padding. On a GPU, where nothing may synchronise, that
            row's loss and gradient are NaN, as for a repeated class; FASTGIST_DEBUG=1 checks there too.
        RuntimeError: an explicit ``impl`` that cannot run here.
    """
    _check(logits, teacher_log_probs, teacher_indices, mask, direction)
    width = accumulate_dtype(logits.dtype)
    temperature = _common.check_temperature(_OP, temperature, width)
    _transforms.refuse(_OP)
    _common.check_reduction(_OP, reduction)
    divisor = _finished.divisor_of(_OP, divisor, reduction, logits, width)
    leading, classes = logits.shape[:-1], logits.shape[-1]
    rows, known = math.prod(leading), teacher_indices.shape[-1]
    moving = _moving.packed(temperature)
    with torch.no_grad():
        log_probs, indices, log_rest = reference.sparse_teacher(
            teacher_log_probs.reshape(rows, known), teacher_indices.reshape(rows, known), classes
        )
    row_loss = _TopkKL.apply(
        logits.reshape(rows, classes),
        log_probs.to(width),
        indices,
        log_rest.to(width),
        None if mask is None else mask.reshape(rows),
        moving,
        temperature if moving is None else 1.0,
        direction,
        torch.is_grad_enabled(),
        impl,
    ).reshape(leading)
    if t_squared:
        row_loss = row_loss * temperature**2
    return reduce_rows(row_loss, reduction, mask) if divisor is None else row_loss.sum() / divisor
