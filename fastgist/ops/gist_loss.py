"""gist_loss: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/gist_loss.py."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from fastgist.ops import _common, _finished, _moving, _transforms
from fastgist.ops.bidirectional_kl import STATS as _KL_STATS
from fastgist.ops.bidirectional_kl import leaves
from fastgist.reference import gist_loss as reference
from fastgist.reference._numerics import accumulate_dtype
from fastgist.reference.bidirectional_kl import finished_dtype, finished_empty

__all__ = ["gist_loss"]

_OP = "gist_loss"
#: Rows of the ``stats`` tensor (len(STATS), M) that a forward kernel leaves for its backward: those of the divergence,
#: then the sums of exp(z - max) at temperature 1 and the sum of the class weights.
STATS = (*_KL_STATS, "sum_z", "sum_gist", "weight")
DEBUG = os.environ.get("FASTGIST_DEBUG", "0") == "1"


def _launchers(impl: str):
    """The module that holds ``gist_loss_fwd`` and ``gist_loss_bwd`` of a kernel implementation."""
    if impl == "triton":
        from fastgist_kernels import gist_loss as kernels

        return kernels
    return torch.ops.fastgist_native


# -- raw ops: forward returns (loss, stats, grad_logits, grad_gist) by bidirectional_kl's rules; finished gradients that
# -- still wait for their row's scale are the row gradients themselves -------------------------------------------------

_OPTIONS = (
    "float alpha, float beta, float beta_logits, float beta_gist, float temperature, float label_smoothing, "
    "int ignore_index"
)


def _fwd(logits: Tensor, gist_logits: Tensor, target: Tensor, divisor: Tensor | None, *rest) -> tuple[Tensor, ...]:
    options = rest[:-5]
    results = _run(logits, gist_logits, target, divisor, *rest)
    # A target that is no class made its row NaN: only then is there something to look for.
    loss = results[0]
    if target.device.type != "cpu" or math.isnan(float(loss if loss.dim() == 0 else loss.sum())):
        check_targets_in_range(_OP, target, logits.shape[1], options[-1])
    return results


def _run(logits: Tensor, gist_logits: Tensor, target: Tensor, divisor: Tensor | None, *rest) -> tuple[Tensor, ...]:
    *options, scale, reduce, need_logits, need_gist, impl = rest
    impl = _common.resolve_loss(_OP, impl, logits)
    dtype, empty = accumulate_dtype(logits.dtype), logits.new_empty(0)
    if impl == "reference" or logits.numel() == 0:
        whole = scale if divisor is None else scale / divisor
        wanted = need_logits, need_gist, whole if reduce else None
        row_loss, *grads = reference.forward(logits, gist_logits, target, *options, *wanted)  # type: ignore[call-arg]
        return (row_loss.sum() if reduce else row_loss) * whole, empty, *_common.filled(grads, logits)
    finishes, leaves_stats = leaves(impl, logits, reduce, need_logits or need_gist)
    row_loss = logits.new_empty(logits.shape[0], dtype=dtype)
    if finishes:
        loss = row_loss.new_empty(())
        grads = _finished.places(logits, need_logits, need_gist)
        arguments = logits, gist_logits, target, divisor, *options, scale, row_loss, loss, *grads
        _launchers(impl).gist_loss_fwd_bwd(*arguments)
        return loss, empty, *_common.filled(grads, logits)
    stats = logits.new_empty(len(STATS), logits.shape[0], dtype=dtype)
    _launchers(impl).gist_loss_fwd(logits, gist_logits, target, *options, row_loss, stats)
    if scale != 1.0 or divisor is not None:
        row_loss = row_loss * (scale if divisor is None else scale / divisor)
    loss = row_loss.sum() if reduce else row_loss
    return loss, stats if leaves_stats else empty, logits.new_empty(0), logits.new_empty(0)


def _fwd_fake(logits, gist_logits, target, divisor, *rest):
    *_, reduce, need_logits, need_gist, impl = rest
    impl = _common.resolve_loss(_OP, impl, logits)
    finishes, leaves_stats = leaves(impl, logits, reduce, need_logits or need_gist)
    dtype = accumulate_dtype(logits.dtype)
    loss = logits.new_empty(() if reduce else logits.shape[0], dtype=dtype)
    stats = logits.new_empty((len(STATS), logits.shape[0]), dtype=dtype) if leaves_stats else logits.new_empty(0)
    kept = finished_dtype(logits.dtype)
    return loss, stats, *finished_empty(logits, kept, finishes and need_logits, finishes and need_gist)


def _bwd(
    logits: Tensor, gist_logits: Tensor, target: Tensor, stats: Tensor, row_grad: Tensor, *rest
) -> tuple[Tensor, ...]:
    *options, need_logits, need_gist, impl = rest
    impl = _common.resolve_loss(_OP, impl, logits)
    if impl == "reference":
        raise RuntimeError(f"{_OP}: the reference returns its gradients from the forward; there is no backward to call")
    grads = _finished.places(logits, need_logits, need_gist)
    if logits.numel() and (need_logits or need_gist):
        _launchers(impl).gist_loss_bwd(logits, gist_logits, target, stats, row_grad, *options, *grads)
    return _common.filled(grads, logits)


def _bwd_fake(logits, gist_logits, target, stats, row_grad, *rest):
    *_, need_logits, need_gist, _impl = rest
    shape = tuple(logits.shape)
    return logits.new_empty(shape if need_logits else 0), logits.new_empty(shape if need_gist else 0)


_fwd_op, _fwd_moving = _moving.define(
    f"gist_loss_fwd(Tensor logits, Tensor gist_logits, Tensor target, Tensor? divisor, {_OPTIONS}, float scale, "
    "bool reduce, bool need_logits, bool need_gist, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    _OP,
)
_bwd_op, _bwd_moving = _moving.define(
    f"gist_loss_bwd(Tensor logits, Tensor gist_logits, Tensor target, Tensor stats, Tensor row_grad, {_OPTIONS}, "
    "bool need_logits, bool need_gist, str impl) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    _OP,
)


class _GistLoss(torch.autograd.Function):
    """(M, V) x 2 and targets -> the loss (), or row losses (M,). Saves the finished gradients, or the logits and nine
    scalars a row. ``settings``: the options, scale, reduce, impl, and whether gradients are recorded. ``moving``: None, or
    the options but ignore_index in their place, which compiled code does not have as constants."""

    @staticmethod
    def forward(ctx, logits, gist_logits, target, divisor, moving, settings):
        options, scale, reduce, impl, record = settings
        run = _fwd_op
        if moving is not None:
            run, options, scale = _fwd_moving, (*moving.unbind(), options[-1]), moving.new_full((), scale)
        ctx.needs = needs = _common.needs(ctx, 2, record)
        loss, stats, *grads = run(logits, gist_logits, target, divisor, *options, scale, reduce, *needs, impl)
        ctx.finished = grads[0].dim() == 2 or grads[1].dim() == 2
        ctx.settings, ctx.dtype = settings, logits.dtype
        if ctx.finished:
            ctx.save_for_backward(*grads)
        elif any(needs):
            ctx.save_for_backward(logits, gist_logits, target, divisor, stats, moving)
        return loss

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, grad):
        options, scale, reduce, impl, _ = ctx.settings
        if ctx.finished and reduce:
            grads = _finished.scaled(ctx.saved_tensors, grad, ctx.dtype)
        elif ctx.finished:
            grads = _common.scale_rows(ctx.saved_tensors, (grad * scale,) * 2, ctx.dtype)
        else:
            logits, gist_logits, target, divisor, stats, moving = ctx.saved_tensors
            run = _bwd_op
            if moving is not None:
                run, options = _bwd_moving, (*moving.unbind(), options[-1])
            row_grad = grad * scale
            if reduce:
                row_grad = (row_grad if divisor is None else row_grad / divisor).expand(len(logits))
            grads = run(logits, gist_logits, target, stats, row_grad, *options, *ctx.needs, impl)
        need_logits, need_gist = ctx.needs
        return grads[0] if need_logits else None, grads[1] if need_gist else None, *(None,) * 4


def _counted(target: Tensor, ignore_index: int) -> Tensor | None:
    """bool (M,), True where a row counts; None for all. On a CPU one look tells that all do, as is the rule."""
    if target.is_floating_point():
        return None
    if target.device.type == "cpu" and target.numel() and _finished.is_plain(target):
        least, most = target.aminmax()
        if not int(least) <= ignore_index <= int(most):
            return None
    return reference.kept_rows(target, ignore_index)


# -- checks, shared with gist_linear_loss ------------------------------------------------------------------------------


def check_targets_in_range(op: str, target: Tensor, classes: int, ignore_index: int, first_row: int = 0) -> None:
    """IndexError naming the first target that is no class. On a CPU; on a device only under FASTGIST_DEBUG=1, since
    the look would synchronise: there such a row's loss and gradient are NaN."""
    if target.is_floating_point() or target.numel() == 0 or not (target.device.type == "cpu" or DEBUG):
        return
    if target.device.type == "cpu":  # one look tells that all are in range, as they nearly always are
        least, most = target.aminmax()
        if int(least) >= 0 and int(most) < classes:
            return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise IndexError(
            f"{op}: target[{first_row + row}] is {int(target[row])}, and there are {classes} classes "
            f"(ignore_index={ignore_index})"
        )


def check_target(op: str, target: Tensor, leading: torch.Size, classes: int) -> None:
    """Class indices (...) int64 or soft targets (..., V) floating point that need no gradient."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a Tensor, got {type(target).__name__}")
    if target.is_floating_point():
        _common.check_floating(op, "target", target)
        wanted = (*leading, classes)
        if target.requires_grad:
            raise ValueError(f"{op}: soft targets get no gradient; detach target")
    elif target.dtype == torch.int64:
        wanted = tuple(leading)
    else:
        raise TypeError(f"{op}: target must be int64 (classes) or floating point (soft targets), got {target.dtype}")
    if tuple(target.shape) != wanted:
        raise ValueError(
            f"{op}: expected target.shape == {wanted} for {target.dtype} targets, got {tuple(target.shape)}"
        )


def betas(beta: float, temperature: float, t_squared: bool, detach: str | None) -> tuple[float, float, float]:
    """The divergence's weight in the loss, in the gradient of logits and in that of gist_logits."""
    beta = float(beta) * (temperature**2 if t_squared else 1.0)
    return beta, 0.0 if detach == "logits" else beta, 0.0 if detach == "gist_logits" else beta


def check_options(
    op: str,
    alpha: float,
    beta: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    detach: str | None = None,
) -> None:
    _common.check_number(op, "alpha", alpha)
    _common.check_number(op, "beta", beta)
    _common.check_number(op, "label_smoothing", label_smoothing, 0, 1)
    _common.check_integer(op, "ignore_index", ignore_index)
    if detach not in (None, "logits", "gist_logits"):
        raise ValueError(f"{op}: detach must be None, 'logits' or 'gist_logits', got {detach!r}")
    _common.check_reduction(op, reduction)


def _check(logits: Tensor, gist_logits: Tensor) -> tuple[Tensor, Tensor]:
    if _common.alike(logits, gist_logits):
        return logits, gist_logits
    for name, x in (("logits", logits), ("gist_logits", gist_logits)):
        _common.check_floating(_OP, name, x)
    if logits.dtype != gist_logits.dtype and _common.autocast_dtype(logits.device.type) is not None:
        logits, gist_logits = logits.float(), gist_logits.float()
    _common.check_same_dtype(_OP, logits=logits, gist_logits=gist_logits)
    if logits.dim() == 0 or logits.shape != gist_logits.shape:
        raise ValueError(
            f"{_OP}: expected gist_logits.shape == logits.shape == (..., V), "
            f"got {tuple(gist_logits.shape)} and {tuple(logits.shape)}"
        )
    _common.check_same_device(_OP, logits=logits, gist_logits=gist_logits)
    return logits, gist_logits


def gist_loss(
    logits: Tensor,
    gist_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.75,
    temperature: float = 3.0,
    t_squared: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    detach: str | None = None,
    divisor: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""CE(z, y) + alpha CE(z_g, y) + beta [KL(p||q) + KL(q||p)]: the GIST objective (arXiv 2312.07255) in one pass.

    Args:
        logits: (..., V), the class token's, float32, bfloat16, float16 or float64, any strides.
        gist_logits: (..., V), the gist token's, the same dtype. Both receive gradient (no stop-gradient).
        target: (...) int64 classes, or (..., V) floating-point soft targets (which get no gradient).
        alpha, beta, temperature: the paper's 0.5, 0.75 and T = 3; the cross-entropies are at temperature 1. A factor
            of 0 leaves its term out altogether. Python numbers, which may change from call to call under torch.compile too:
            a second graph serves all further values, outside CUDA graphs.
        t_squared: multiply the KL term by T^2.
        label_smoothing: as in torch.nn.functional.cross_entropy, on both cross-entropies.
        ignore_index: rows with this target leave all three terms, whatever their logits hold.
        reduction: "none", "sum", or "mean" (= "batchmean"): over the rows that are not ignored; 0 if none is left.
        detach: "logits" or "gist_logits": that side gets no gradient of the divergence, only of its cross-entropy. Costs
            nothing.
        divisor: what "mean" divides by in place of the number of rows that count: a number > 0 or a tensor of one number, such
            as the tokens of all accumulated batches (:func:`fastgist.distributed.mean_divisor` for several processes).
            A tensor may be 0, a count of no rows; below 0 it raises on a CPU and makes the loss NaN elsewhere.
        impl: "auto", "triton", "cuda", "native" or "reference"; see :mod:`fastgist.backends`.

    Returns:
        float32 (float64 for float64 inputs). Gradients in the dtype of the inputs; double backward raises.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit, named.
        IndexError: on a CPU, a target that is neither a class nor ignore_index. On a GPU, where nothing may
            synchronise, that row's loss and gradient are NaN; FASTGIST_DEBUG=1 checks there too.
    """
    logits, gist_logits = _check(logits, gist_logits)
    leading, classes = logits.shape[:-1], logits.shape[-1]
    check_target(_OP, target, leading, classes)
    _common.check_same_device(_OP, logits=logits, target=target)
    dtype = accumulate_dtype(logits.dtype)
    temperature = _common.check_temperature(_OP, temperature, dtype)
    _transforms.refuse(_OP)
    check_options(_OP, alpha, beta, label_smoothing, ignore_index, reduction, detach)
    rows = math.prod(leading)
    if logits.dim() != 2:
        logits, gist_logits = logits.reshape(rows, classes), gist_logits.reshape(rows, classes)
        target = target.reshape(rows, classes) if target.is_floating_point() else target.reshape(rows)
    divisor = _finished.divisor_of(_OP, divisor, reduction, logits, dtype)
    counted = None
    if divisor is None and reduction in ("mean", "batchmean"):
        counted = _counted(target, int(ignore_index))
    scale, divisor = _finished.loss_scale(reduction, 1.0, rows, counted, divisor, logits, dtype)
    numbers: tuple[float, ...] = (
        float(alpha),
        *betas(beta, temperature, t_squared, detach),
        temperature,
        float(label_smoothing),
    )
    moving = _moving.packed(*numbers)
    if moving is not None:
        numbers = (1.0,) * len(numbers)  # no part of the graph
    settings = (*numbers, int(ignore_index)), scale, reduction != "none", impl, torch.is_grad_enabled()
    gist_logits = _common.distinct(logits, gist_logits)
    loss = _GistLoss.apply(logits, gist_logits, target, divisor, moving, settings)
    return loss.reshape(leading) if reduction == "none" else loss
