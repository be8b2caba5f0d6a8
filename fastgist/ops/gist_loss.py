"""gist_loss: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/gist_loss.py."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common
from fastgist.ops.bidirectional_kl import STATS as _KL_STATS
from fastgist.reference import gist_loss as reference
from fastgist.reference._numerics import accumulate_dtype
from fastgist.reference.bidirectional_kl import finished_empty, reduce_rows

__all__ = ["gist_loss"]

_OP = "gist_loss"
#: Rows of the ``stats`` tensor (len(STATS), M) that a forward kernel leaves for its backward: those of the divergence,
#: then the sums of exp(z - max) at temperature 1 and the sum of the class weights.
STATS = (*_KL_STATS, "sum_z", "sum_gist", "weight")
_DEBUG = os.environ.get("FASTGIST_DEBUG", "0") == "1"


def _launchers(impl: str):
    """The module that holds ``gist_loss_fwd`` and ``gist_loss_bwd`` of a kernel implementation."""
    if impl == "triton":
        from fastgist_kernels import gist_loss as kernels

        return kernels
    return torch.ops.fastgist_native


# -- raw ops: forward returns (row_loss, stats, grad_logits, grad_gist), the gradients as in bidirectional_kl -----------


def _fwd(
    logits: Tensor,
    gist_logits: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    need_logits: bool,
    need_gist: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    check_targets_in_range(_OP, target, logits.shape[1], ignore_index)
    impl = backends.resolve(_OP, impl, logits)
    options = (alpha, beta, temperature, label_smoothing, ignore_index)
    if impl == "reference" or logits.numel() == 0:
        row_loss, *grads = reference.forward(logits, gist_logits, target, *options, need_logits, need_gist)
        return row_loss, logits.new_empty(0), *_common.filled(grads, logits)
    dtype = accumulate_dtype(logits.dtype)
    row_loss = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    stats = torch.empty(len(STATS), logits.shape[0], dtype=dtype, device=logits.device)
    _launchers(impl).gist_loss_fwd(logits, gist_logits, target, *options, row_loss, stats)
    return row_loss, stats, logits.new_empty(0), logits.new_empty(0)


def _fwd_fake(
    logits,
    gist_logits,
    target,
    alpha,
    beta,
    temperature,
    label_smoothing,
    ignore_index,
    need_logits,
    need_gist,
    impl,
):
    rows, classes = logits.shape
    with_gradients = backends.resolve(_OP, impl, logits) == "reference" or rows == 0 or classes == 0
    dtype = accumulate_dtype(logits.dtype)
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(0 if with_gradients else (len(STATS), rows), dtype=logits.dtype if with_gradients else dtype),
        *finished_empty(logits, with_gradients and need_logits, with_gradients and need_gist),
    )


def _bwd(
    logits: Tensor,
    gist_logits: Tensor,
    target: Tensor,
    stats: Tensor,
    row_grad: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    need_logits: bool,
    need_gist: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    impl = backends.resolve(_OP, impl, logits)
    if impl == "reference":
        raise RuntimeError(f"{_OP}: the reference returns its gradients from the forward; there is no backward to call")
    shape = logits.shape
    grads = [
        torch.empty(shape, dtype=logits.dtype, device=logits.device) if n else None for n in (need_logits, need_gist)
    ]
    if logits.numel() and (need_logits or need_gist):
        options = (alpha, beta, temperature, label_smoothing, ignore_index)
        _launchers(impl).gist_loss_bwd(logits, gist_logits, target, stats, row_grad, *options, *grads)
    return _common.filled(grads, logits)


def _bwd_fake(logits, gist_logits, target, stats, row_grad, a, b, t, s, i, need_logits, need_gist, impl):
    shape = tuple(logits.shape)
    return logits.new_empty(shape if need_logits else 0), logits.new_empty(shape if need_gist else 0)


_OPTIONS = "float alpha, float beta, float temperature, float label_smoothing, int ignore_index"
_fwd_op = _common.define(
    f"gist_loss_fwd(Tensor logits, Tensor gist_logits, Tensor target, {_OPTIONS}, bool need_logits, bool need_gist, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    _OP,
)
_bwd_op = _common.define(
    f"gist_loss_bwd(Tensor logits, Tensor gist_logits, Tensor target, Tensor stats, Tensor row_grad, {_OPTIONS}, "
    "bool need_logits, bool need_gist, str impl) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    _OP,
)


class _GistLoss(torch.autograd.Function):
    """(M, V) x 2 and targets -> row losses (M,). Saves the logits and nine scalars a row, or the finished gradients."""

    @staticmethod
    def forward(ctx, logits, gist_logits, target, options, record, impl):
        ctx.needs = need_logits, need_gist = _common.needs(ctx, 2, record)
        row_loss, stats, grad_logits, grad_gist = _fwd_op(
            logits, gist_logits, target, *options, need_logits, need_gist, impl
        )
        ctx.options, ctx.impl, ctx.dtype = options, impl, logits.dtype
        ctx.finished = grad_logits.dim() == 2 or grad_gist.dim() == 2
        if ctx.finished:
            ctx.save_for_backward(grad_logits, grad_gist)
        elif need_logits or need_gist:
            ctx.save_for_backward(logits, gist_logits, target, stats)
        return row_loss

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, row_grad):
        need_logits, need_gist = ctx.needs
        if ctx.finished:
            grads = _common.scale_rows(ctx.saved_tensors, (row_grad, row_grad), ctx.dtype)
        else:
            logits, gist_logits, target, stats = ctx.saved_tensors
            grads = _bwd_op(
                logits, gist_logits, target, stats, row_grad, *ctx.options, need_logits, need_gist, ctx.impl
            )
        return grads[0] if need_logits else None, grads[1] if need_gist else None, None, None, None, None


# -- checks, shared with gist_linear_loss ------------------------------------------------------------------------------


def check_targets_in_range(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError naming the first target that is no class. On a CPU; on a device only under FASTGIST_DEBUG=1, since
    the look would synchronise: there such a row's loss and gradient are NaN."""
    if target.is_floating_point() or target.numel() == 0 or not (target.device.type == "cpu" or _DEBUG):
        return
    if target.device.type == "cpu":  # one look tells that all are in range, as they nearly always are
        least, most = target.aminmax()
        if int(least) >= 0 and int(most) < classes:
            return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise IndexError(
            f"{op}: target[{row}] is {int(target[row])}, and there are {classes} classes (ignore_index={ignore_index})"
        )


def check_target(op: str, target: Tensor, leading: torch.Size, classes: int) -> None:
    """Class indices (...) int64 or soft targets (..., V) floating point that need no gradient."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a Tensor, got {type(target).__name__}")
    if target.is_floating_point():
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


def check_options(op: str, alpha: float, beta: float, label_smoothing: float, reduction: str) -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        if isinstance(value, Tensor) or not float("-inf") < float(value) < float("inf"):
            raise ValueError(f"{op}: {name} must be a finite number, got {value!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    _common.check_reduction(op, reduction)


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
    impl: str = "auto",
) -> Tensor:
    r"""CE(z, y) + alpha CE(z_g, y) + beta [KL(p||q) + KL(q||p)]: the GIST objective (arXiv 2312.07255) in one pass.

    Args:
        logits: (..., V), the class token's, float32, bfloat16, float16 or float64, any strides.
        gist_logits: (..., V), the gist token's, the same dtype. Both receive gradient (no stop-gradient).
        target: (...) int64 classes, or (..., V) floating-point soft targets (which get no gradient).
        alpha, beta, temperature: the paper's 0.5, 0.75 and T = 3; the cross-entropies are at temperature 1. A factor
            of 0 leaves its term out altogether.
        t_squared: multiply the KL term by T^2.
        label_smoothing: as in torch.nn.functional.cross_entropy, on both cross-entropies.
        ignore_index: rows with this target leave all three terms, whatever their logits hold.
        reduction: "none", "sum", or "mean" (= "batchmean"): over the rows that are not ignored; 0 if none is left.
        impl: "auto", "triton", "native" or "reference"; see :mod:`fastgist.backends`.

    Returns:
        float32 (float64 for float64 inputs). Gradients in the dtype of the inputs; double backward raises.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit, named.
        IndexError: on a CPU, a target that is neither a class nor ignore_index. On a GPU, where nothing may
            synchronise, that row's loss and gradient are NaN; FASTGIST_DEBUG=1 checks there too.
    """
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
    leading, classes = logits.shape[:-1], logits.shape[-1]
    check_target(_OP, target, leading, classes)
    _common.check_same_device(_OP, logits=logits, gist_logits=gist_logits, target=target)
    temperature = _common.check_temperature(_OP, temperature)
    check_options(_OP, alpha, beta, label_smoothing, reduction)
    rows = math.prod(leading)
    flat_target = target.reshape(rows, classes) if target.is_floating_point() else target.reshape(rows)
    beta_t = float(beta) * (temperature**2 if t_squared else 1.0)
    row_loss = _GistLoss.apply(
        logits.reshape(rows, classes),
        gist_logits.reshape(rows, classes),
        flat_target,
        (float(alpha), beta_t, temperature, float(label_smoothing), int(ignore_index)),
        torch.is_grad_enabled(),
        impl,
    ).reshape(leading)
    return reduce_rows(row_loss, reduction, reference.kept_rows(target, ignore_index))
