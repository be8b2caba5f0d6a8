"""gist_linear_loss: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/gist_linear_loss.py.

The rows are taken in chunks. A chunk's hidden states of both heads, stacked, make its logits in one matrix product; the
row kernel puts the gradients in their place; a second product carries them back. No more than one chunk of logits ever
exists. For "sum" and "mean" the gradients are finished in the forward, where the logits are; for "none", whose row
gradients are not known yet, the backward runs the chunks again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common
from fastgist.ops.gist_loss import check_options, check_target, check_targets_in_range
from fastgist.reference import gist_loss as reference
from fastgist.reference._numerics import accumulate_dtype

__all__ = ["default_chunk_rows", "gist_linear_loss"]

_OP = "gist_linear_loss"


def default_chunk_rows(rows: int, hidden: int, classes: int) -> int:
    """Rows a chunk: as many as make its logits about as large as the hidden states, in whole tiles of 128."""
    return min(rows, max(128, rows * hidden // max(classes, 1) // 128 * 128))


def _reference_chunk(logits: Tensor, target: Tensor, scale: Tensor, options: tuple, row_loss: Tensor, need_grad: bool):
    """What the kernel does to a chunk, in plain PyTorch: see fastgist_kernels.gist_linear_loss."""
    pairs, (alpha, beta, *others) = row_loss.shape[0], options
    betas = beta, beta, beta
    wanted = need_grad, need_grad
    loss, *grads = reference.forward(logits[:pairs], logits[pairs:], target, alpha, *betas, *others, *wanted)  # type: ignore[call-arg]
    row_loss.copy_(loss)
    if need_grad:
        for half, grad in zip((logits[:pairs], logits[pairs:]), grads, strict=True):
            half.copy_(grad * scale[:, None])


def _run(
    hidden: Tensor,
    gist_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_scale: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    chunk_rows: int,
    need_hidden: bool,
    need_gist: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    """Row losses (M,) and the gradients asked for, each row's scaled by row_scale (M,); empty where not asked for.

    The head's gradients come in row_scale's dtype: sums over the rows, which the caller scales before it narrows them.
    """
    rows, classes = hidden.shape[0], weight.shape[0]
    check_targets_in_range(_OP, target, classes, ignore_index)
    impl = backends.resolve(_OP, impl, hidden)
    options = (alpha, beta, temperature, label_smoothing, ignore_index)
    need_grad = need_hidden or need_gist or need_weight or need_bias
    row_loss = torch.empty(rows, dtype=row_scale.dtype, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
    grad_gist = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_gist else None
    # Chunks add up in float32: in bfloat16 the later ones would be rounded away.
    grad_weight = torch.zeros(weight.shape, dtype=row_scale.dtype, device=weight.device) if need_weight else None
    grad_bias = torch.zeros(classes, dtype=row_scale.dtype, device=weight.device) if need_bias else None
    padded = -(-classes // 16) * 16  # rows start at multiples of 16 elements: wide loads at any class count
    buffer = torch.empty(2 * min(chunk_rows, rows), padded, dtype=hidden.dtype, device=hidden.device)
    for start in range(0, rows, chunk_rows):
        part = slice(start, min(start + chunk_rows, rows))
        pairs = part.stop - part.start
        both = torch.cat((hidden[part], gist_hidden[part]))
        if need_weight and not target.is_floating_point():  # 0 times what an ignored row holds is not 0 if it is NaN
            ignored = target[part] == ignore_index
            both.masked_fill_(torch.cat((ignored, ignored))[:, None], 0.0)
        logits = buffer[: 2 * pairs, :classes]
        if bias is None:
            torch.mm(both, weight.t(), out=logits)
        else:
            torch.addmm(bias, both, weight.t(), out=logits)
        if impl == "reference":
            _reference_chunk(logits, target[part], row_scale[part], options, row_loss[part], need_grad)
        else:
            from fastgist_kernels.gist_linear_loss import gist_linear_loss_chunk

            gist_linear_loss_chunk(logits, target[part], row_scale[part], *options, row_loss[part], need_grad)
        if grad_weight is not None:
            if grad_weight.dtype == logits.dtype:
                grad_weight.addmm_(logits.t(), both)
            else:
                grad_weight.add_(torch.mm(logits.t(), both))
        if grad_hidden is not None and grad_gist is not None:
            torch.mm(logits, weight, out=both)  # the stacked hidden states have served: their place takes the gradients
            grad_hidden[part], grad_gist[part] = both[:pairs], both[pairs:]
        elif grad_hidden is not None:
            torch.mm(logits[:pairs], weight, out=grad_hidden[part])
        elif grad_gist is not None:
            torch.mm(logits[pairs:], weight, out=grad_gist[part])
        if grad_bias is not None:
            grad_bias.add_(logits.sum(0, dtype=grad_bias.dtype))
    return row_loss, *_common.filled((grad_hidden, grad_gist, grad_weight, grad_bias), hidden)


def _run_fake(hidden, gist_hidden, weight, bias, target, row_scale, a, b, t, s, i, c, nh, ng, nw, nb, impl):
    backends.resolve(_OP, impl, hidden)
    shape = tuple(hidden.shape)
    return (
        row_scale.new_empty(shape[0]),
        hidden.new_empty(shape if nh else 0),
        hidden.new_empty(shape if ng else 0),
        row_scale.new_empty(tuple(weight.shape)) if nw else hidden.new_empty(0),
        row_scale.new_empty(weight.shape[0]) if nb else hidden.new_empty(0),
    )


_op = _common.define(
    "gist_linear_loss_run(Tensor hidden, Tensor gist_hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor row_scale, float alpha, float beta, float temperature, float label_smoothing, int ignore_index, "
    "int chunk_rows, bool need_hidden, bool need_gist, bool need_weight, bool need_bias, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _run_fake,
    _OP,
)


class _GistLinearLoss(torch.autograd.Function):
    """hidden (M, H) x 2, head and targets -> row losses (M,) for "none", else the scalar loss."""

    @staticmethod
    def forward(ctx, hidden, gist_hidden, weight, bias, target, inv_count, options, chunk_rows, record, impl):
        ctx.needs = needs = _common.needs(ctx, 4, record)
        ctx.options, ctx.chunk_rows, ctx.impl, ctx.per_row = options, chunk_rows, impl, inv_count is None
        ctx.dtypes = (hidden.dtype, hidden.dtype, weight.dtype, weight.dtype)
        # Rows enter unscaled: 1 / count in a float16 gradient would underflow before any loss scale could lift it.
        ones = torch.ones((), dtype=accumulate_dtype(hidden.dtype), device=hidden.device).expand(hidden.shape[0])
        wanted = [False] * 4 if ctx.per_row else needs
        row_loss, *grads = _op(hidden, gist_hidden, weight, bias, target, ones, *options, chunk_rows, *wanted, impl)
        if ctx.per_row:
            if any(needs):
                ctx.save_for_backward(hidden, gist_hidden, weight, bias, target)
            return row_loss
        ctx.save_for_backward(inv_count, *grads)
        return row_loss.sum() * inv_count

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, grad):
        needs = ctx.needs
        if ctx.per_row:
            _, *grads = _op(*ctx.saved_tensors, grad, *ctx.options, ctx.chunk_rows, *needs, ctx.impl)
        else:
            inv_count, *grads = ctx.saved_tensors
            scale = grad * inv_count
            grads = [g * scale for g in grads]
        narrowed = (g.to(d) if need else None for g, need, d in zip(grads, needs, ctx.dtypes, strict=True))
        return *narrowed, None, None, None, None, None, None


def gist_linear_loss(
    hidden: Tensor,
    gist_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.75,
    temperature: float = 3.0,
    t_squared: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""The GIST objective on hidden states: ``gist_loss(hidden W^T + b, gist_hidden W^T + b, target)`` without the logits.

    Args:
        hidden: (..., H), the class token's final hidden states.
        gist_hidden: (..., H), the gist token's, the same dtype.
        weight: (V, H), the shared head, as nn.Linear stores it. Frozen: no dW is computed.
        bias: (V,) or None.
        target: (...) int64 classes, or (..., V) floating-point soft targets.
        alpha, beta, temperature, t_squared, label_smoothing, ignore_index, reduction: as in
            :func:`fastgist.functional.gist_loss`, with the same objective and the same divisor.
        chunk_rows: rows of logits that exist at a time; default: as many as make a chunk of logits about as large as
            the hidden states.
        impl: "auto", "triton" or "reference"; see :mod:`fastgist.backends`.

    Returns:
        float32 (float64 for float64 inputs); gradients for hidden, gist_hidden, weight and bias as they require them.
        Under autocast hidden states and head are cast as nn.Linear casts them.

    Raises:
        ValueError, TypeError, IndexError: as gist_loss, with the sizes of the head named.
    """
    for name, x in (("hidden", hidden), ("gist_hidden", gist_hidden), ("weight", weight)):
        _common.check_floating(_OP, name, x)
    cast = _common.autocast_dtype(hidden.device.type)
    if cast is not None and hidden.dtype != torch.float64:
        hidden, gist_hidden, weight = hidden.to(cast), gist_hidden.to(cast), weight.to(cast)
        bias = None if bias is None else bias.to(cast)
    _common.check_same_dtype(_OP, hidden=hidden, gist_hidden=gist_hidden, weight=weight, bias=bias)
    _common.check_same_device(_OP, hidden=hidden, gist_hidden=gist_hidden, weight=weight, bias=bias, target=target)
    if weight.dim() != 2:
        raise ValueError(f"{_OP}: weight must be (V, H), got {weight.dim()} dimensions")
    classes, width = weight.shape
    for name, x in (("hidden", hidden), ("gist_hidden", gist_hidden)):
        if x.dim() == 0 or x.shape[-1] != width:
            raise ValueError(
                f"{_OP}: expected {name}.shape[-1] == {width} (weight is {classes} x {width}), got {tuple(x.shape)}"
            )
    if hidden.shape != gist_hidden.shape:
        raise ValueError(f"{_OP}: expected gist_hidden.shape == {tuple(hidden.shape)}, got {tuple(gist_hidden.shape)}")
    if bias is not None and tuple(bias.shape) != (classes,):
        raise ValueError(f"{_OP}: expected bias.shape == ({classes},), got {tuple(bias.shape)}")
    leading = hidden.shape[:-1]
    check_target(_OP, target, leading, classes)
    temperature = _common.check_temperature(_OP, temperature)
    check_options(_OP, alpha, beta, label_smoothing, reduction)
    rows = math.prod(leading)
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(rows, width, classes)
    elif chunk_rows < 1:
        raise ValueError(f"{_OP}: chunk_rows must be at least 1, got {chunk_rows}")
    target = target.reshape(rows, classes) if target.is_floating_point() else target.reshape(rows)
    inv_count = None
    if reduction != "none":
        ones = torch.ones((), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        kept = reference.kept_rows(target, ignore_index)
        if reduction == "sum":
            inv_count = ones
        elif kept is None:
            inv_count = ones / max(rows, 1)
        else:
            inv_count = ones / kept.sum().clamp(min=1)
    loss = _GistLinearLoss.apply(
        hidden.reshape(rows, width),
        gist_hidden.reshape(rows, width),
        weight,
        bias,
        target,
        inv_count,
        (
            float(alpha),
            float(beta) * (temperature**2 if t_squared else 1.0),
            temperature,
            float(label_smoothing),
            int(ignore_index),
        ),
        max(chunk_rows, 1),
        torch.is_grad_enabled(),
        impl,
    )
    return loss.reshape(leading) if reduction == "none" else loss
