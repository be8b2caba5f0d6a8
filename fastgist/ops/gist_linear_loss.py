"""gist_linear_loss: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/gist_linear_loss.py.

The rows are taken in chunks (fastgist/ops/_linear_chunks.py). A chunk's hidden states of both heads, stacked, make its logits
in one matrix product; the row work puts the gradients in their place; a second product carries them back. No more than one
chunk of logits ever exists. For "sum" and "mean" the gradients are finished in the forward, where the logits are; for
"none", whose row gradients are not known yet, the backward runs the chunks again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common, _finished, _linear_chunks, _vocab_parallel
from fastgist.ops.gist_loss import betas, check_options, check_target, check_targets_in_range
from fastgist.reference import gist_loss as reference
from fastgist.reference._numerics import accumulate_dtype, row_blocks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["gist_linear_loss"]

_OP = "gist_linear_loss"

#: Elements of the head's gradient that a chunk adds at a time where the sum is wider than the product: what lies between
#: them is this large, not as large as the head. (On a CPU that is the product and a wider copy of it.)
_HEAD_BLOCK, _HEAD_BLOCK_ON_CPU = 2**24, 2**22


class _HeadGradient:
    """The gradient (V, H) of the head, summed over chunks in float32: in bfloat16 the later ones would be rounded away.

    ``narrow``: it comes in the head's dtype. The gradient of one chunk alone is written in it at once.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, narrow: bool, chunks: int) -> None:
        self.narrow_to = weight.dtype if narrow else dtype
        kept = self.narrow_to if chunks == 1 else dtype
        make = torch.empty if chunks else torch.zeros
        self.sum, self.begun = make(weight.shape, dtype=kept, device=weight.device), False

    def add(self, grad_logits: Tensor, states: Tensor) -> None:
        """(n, V) gradients of logits and the (n, H) states that made them."""
        total, beta = self.sum, 1.0 if self.begun else 0.0
        if total.dtype == states.dtype:
            total.addmm_(grad_logits.t(), states, beta=beta)
        else:
            elements = _HEAD_BLOCK_ON_CPU if total.device.type == "cpu" else _HEAD_BLOCK
            step = max(1, elements // max(states.shape[1], 1))
            for start in range(0, len(total), step):
                classes = slice(start, start + step)
                part = torch.mm(grad_logits[:, classes].t(), states)
                if self.begun:
                    total[classes] += part
                else:
                    total[classes] = part
        self.begun = True

    def result(self) -> Tensor:
        return self.sum.to(self.narrow_to)


def _run(
    hidden: Tensor,
    gist_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_scale: Tensor,
    *rest,
) -> tuple[Tensor, ...]:
    """Row losses (M,) and the gradients asked for, each row's scaled by row_scale (M,); empty where not asked for.

    The head's gradients come in its dtype if ``narrow``, else in row_scale's.
    """
    numbers, wanted, shard, impl = rest[:9], rest[9:14], rest[14:18], rest[18]
    *options, chunk_rows, budget = numbers
    need_hidden, need_gist, need_weight, need_bias, narrow = wanted
    group_name, first_class, every_class, reduce = shard
    alpha, _, _, beta_gist, *_, ignore_index = options
    rows, (classes, width) = hidden.shape[0], weight.shape
    group = _vocab_parallel.group_named(group_name)
    check_targets_in_range(_OP, target, every_class, ignore_index)
    if group is None:
        work = _linear_chunks.row_work(backends.resolve(_OP, impl, hidden), tuple(options))
        share = classes
    else:
        work = _vocab_parallel.row_work(group, tuple(options), first_class, every_class)
        share = -(-every_class // group.size())  # as many chunks on every rank, whatever each one's share
    chunk_rows = chunk_rows or _linear_chunks.rows_of_chunk(rows, width, share, hidden.element_size(), budget or None)
    silent = alpha == 0.0 and beta_gist == 0.0  # nothing of the loss reaches the gist token: products of zeros
    need_head = need_weight or need_bias
    need_z, need_g = need_hidden or need_head, (need_gist or need_head) and not silent
    row_loss = torch.empty(rows, dtype=row_scale.dtype, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
    make = torch.zeros if silent else torch.empty
    grad_gist = make(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_gist else None
    head = _HeadGradient(weight, row_scale.dtype, narrow, -(-rows // chunk_rows)) if need_weight else None
    grad_bias = torch.zeros(classes, dtype=row_scale.dtype, device=weight.device) if need_bias else None
    most = 2 * min(chunk_rows, rows)
    buffer = torch.empty(most, _linear_chunks.padded(classes), dtype=hidden.dtype, device=hidden.device)
    logits = both = buffer
    for first in range(0, rows, chunk_rows):
        part = slice(first, min(first + chunk_rows, rows))
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
        work(logits, target[part], row_scale[part], row_loss[part], need_z, need_g)
        used = pairs if silent else 2 * pairs  # from here on the logits are their gradients
        if head is not None:
            head.add(logits[:used], both[:used])
        if grad_bias is not None:
            for block in row_blocks(logits[:used]):  # a CPU widens what it sums
                grad_bias.add_(logits[block].sum(0, dtype=grad_bias.dtype))
        if grad_hidden is not None and grad_gist is not None and not silent:
            torch.mm(logits, weight, out=both)  # the stacked hidden states have served: their place takes the gradients
            grad_hidden[part], grad_gist[part] = both[:pairs], both[pairs:]
        elif grad_hidden is not None:
            torch.mm(logits[:pairs], weight, out=grad_hidden[part])
        elif grad_gist is not None and not silent:
            torch.mm(logits[pairs:], weight, out=grad_gist[part])
    if group is not None and reduce:
        _vocab_parallel.sum_over_ranks(group, grad_hidden, None if silent else grad_gist)
    del buffer, logits, both  # before the head's gradient is there twice
    grad_weight = None if head is None else head.result()
    grad_bias = grad_bias.to(weight.dtype) if narrow and grad_bias is not None else grad_bias
    return row_loss, *_common.filled((grad_hidden, grad_gist, grad_weight, grad_bias), hidden)


def _run_fake(hidden, gist_hidden, weight, bias, target, row_scale, *rest):
    need_hidden, need_gist, need_weight, need_bias, narrow = rest[9:14]
    backends.resolve(_OP, rest[18], hidden)
    shape, of_head = tuple(hidden.shape), weight if narrow else row_scale
    return (
        row_scale.new_empty(shape[0]),
        hidden.new_empty(shape if need_hidden else 0),
        hidden.new_empty(shape if need_gist else 0),
        of_head.new_empty(tuple(weight.shape)) if need_weight else hidden.new_empty(0),
        of_head.new_empty(weight.shape[0]) if need_bias else hidden.new_empty(0),
    )


_op = _common.define(
    "gist_linear_loss_run(Tensor hidden, Tensor gist_hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor row_scale, float alpha, float beta, float beta_logits, float beta_gist, float temperature, "
    "float label_smoothing, int ignore_index, int chunk_rows, int memory_budget, bool need_hidden, bool need_gist, "
    "bool need_weight, bool need_bias, bool narrow, str group, int first_class, int every_class, bool reduce, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _run_fake,
    _OP,
)


class _GistLinearLoss(torch.autograd.Function):
    """hidden (M, H) x 2, head and targets -> row losses (M,) for "none", else the scalar loss. Saves the gradients,
    finished; those of float16, and of row losses, still wait for what arrives."""

    @staticmethod
    def forward(ctx, hidden, gist_hidden, weight, bias, target, divisor, options, scale, reduce, record, impl):
        ctx.needs = needs = _common.needs(ctx, 4, record)
        ctx.options, ctx.impl, ctx.reduce = options, impl, reduce
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, gist_hidden, weight, bias))
        # Under autocast the head is narrowed here, not by autograd: its gradient stays as wide as its sum.
        narrow_weight, narrow_bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        tensors = hidden, gist_hidden, narrow_weight, narrow_bias, target
        dtype = accumulate_dtype(hidden.dtype)
        whole = torch.full((), scale, dtype=dtype, device=hidden.device)
        whole = whole if divisor is None else whole / divisor
        # A mean's 1 / rows in a float16 gradient would underflow before any loss scale could lift it: it waits.
        lifted = hidden.dtype == torch.float16
        row_scale = (torch.ones_like(whole) if lifted else whole).expand(hidden.shape[0])
        wanted = needs if reduce else (False,) * 4
        narrow = weight.dtype == hidden.dtype and not lifted
        row_loss, *grads = _op(*tensors, row_scale, *options[:-1], *wanted, narrow, *options[-1], impl)
        if not reduce:
            if any(needs):
                ctx.save_for_backward(hidden, gist_hidden, weight, bias, target)
            return row_loss
        ctx.save_for_backward(whole if lifted else None, *grads)
        return row_loss.sum() * whole

    @staticmethod
    @_common.single_backward(_OP)
    def backward(ctx, grad):
        needs, dtypes = ctx.needs, ctx.dtypes
        if ctx.reduce:
            whole, *grads = ctx.saved_tensors
            grads = _finished.scaled(grads, grad if whole is None else grad * whole, dtypes)
        else:
            hidden, gist_hidden, weight, bias, target = ctx.saved_tensors
            narrow_bias = None if bias is None else bias.to(hidden.dtype)
            tensors = hidden, gist_hidden, weight.to(hidden.dtype), narrow_bias, target
            narrow = weight.dtype == hidden.dtype
            _, *grads = _op(*tensors, grad, *ctx.options[:-1], *needs, narrow, *ctx.options[-1], ctx.impl)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 7


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
    detach: str | None = None,
    divisor: float | Tensor | None = None,
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_hidden: bool = True,
    impl: str = "auto",
) -> Tensor:
    r"""The GIST objective on hidden states: ``gist_loss(hidden W^T + b, gist_hidden W^T + b, target)`` without the logits.

    Args:
        hidden: (..., H), the class token's final hidden states.
        gist_hidden: (..., H), the gist token's, the same dtype.
        weight: (V, H), the shared head, as nn.Linear stores it. Frozen: no dW is computed.
        bias: (V,) or None.
        target: (...) int64 classes, or (..., V) floating-point soft targets.
        alpha, beta, temperature, t_squared, label_smoothing, ignore_index, reduction, detach, divisor: as in
            :func:`fastgist.functional.gist_loss`, with the same objective and the same divisor.
        chunk_rows: rows whose logits exist at a time; default: as many as ``memory_budget`` holds.
        memory_budget: bytes for a chunk's logits and stacked hidden states. Default: a sixteenth of what whole logits and
            their gradients would take, at least 32 MiB and at most 1 GiB. The head's gradient, and for a half-precision
            head of more than one chunk its float32 sum, come on top.
        group: a torch.distributed group whose ranks share the head: weight (V_local, H) and bias are this rank's
            consecutive rows of it, in the ranks' order. Hidden states, class targets (of the whole vocabulary, not less
            vocab_start) and options must be the same on all ranks: only shapes and options are compared, not values, and
            what one rank alone raises leaves the others waiting. Soft targets are this rank's columns (..., V_local). The
            loss is that of the whole head, the same bits on every rank. One all-gather a chunk, of twelve numbers a row.
        vocab_start, vocab_size: this rank's first row in the whole head, and the whole head's rows. Without them the ranks
            first tell each other, and hold what they were given against each other (ValueError on all of them, where
            they differ); a GPU synchronises for that. With them nothing is checked: other shapes on another rank hang.
        reduce_hidden: True sums the hidden states' gradients over the ranks, in their dtype, so that each rank has the whole
            one. False leaves each rank's share, for a caller who reduces or scatters it anyway.
        impl: "auto", "triton", "native" or "reference"; see :mod:`fastgist.backends`. With a group: "auto" or "reference".

    Returns:
        float32 (float64 for float64 inputs); gradients for hidden, gist_hidden, weight and bias as they require them.
        Under autocast hidden states and head are cast as nn.Linear casts them.

    Raises:
        ValueError, TypeError, IndexError: as gist_loss, with the sizes of the head named.
    """
    for name, x in (("hidden", hidden), ("gist_hidden", gist_hidden), ("weight", weight)):
        _common.check_floating(_OP, name, x)
    if bias is not None:
        _common.check_floating(_OP, "bias", bias)
    cast = _common.autocast_dtype(hidden.device.type)
    if cast is not None and hidden.dtype != torch.float64:
        hidden, gist_hidden = hidden.to(cast), gist_hidden.to(cast)
    else:
        _common.check_same_dtype(_OP, hidden=hidden, gist_hidden=gist_hidden, weight=weight, bias=bias)
    _check_shapes(hidden, gist_hidden, weight, bias)
    leading, (classes, width) = hidden.shape[:-1], weight.shape
    check_target(_OP, target, leading, classes)
    _common.check_same_device(_OP, hidden=hidden, gist_hidden=gist_hidden, weight=weight, bias=bias, target=target)
    temperature = _common.check_temperature(_OP, temperature)
    check_options(_OP, alpha, beta, label_smoothing, ignore_index, reduction, detach)
    _check_chunks(chunk_rows, memory_budget)
    rows = math.prod(leading)
    target = target.reshape(rows, classes) if target.is_floating_point() else target.reshape(rows)
    dtype = accumulate_dtype(hidden.dtype)
    divisor = _finished.divisor_of(_OP, divisor, reduction, hidden, dtype)
    counted = (
        reference.kept_rows(target, ignore_index) if divisor is None and reduction in ("mean", "batchmean") else None
    )
    scale, divisor = _finished.loss_scale(reduction, 1.0, rows, counted, divisor, hidden, dtype)
    options = (
        float(alpha),
        *betas(beta, temperature, t_squared, detach),
        temperature,
        float(label_smoothing),
        int(ignore_index),
        chunk_rows or 0,
        memory_budget or 0,
    )
    shard = _vocab_parallel.shard(
        _OP,
        group,
        vocab_start,
        vocab_size,
        reduce_hidden,
        impl,
        (hidden, gist_hidden, weight, target),
        (*options, reduction, scale),
    )
    loss = _GistLinearLoss.apply(
        hidden.reshape(rows, width),
        gist_hidden.reshape(rows, width),
        weight,
        bias,
        target,
        divisor,
        (*options, shard),
        scale,
        reduction != "none",
        torch.is_grad_enabled(),
        impl,
    )
    return loss.reshape(leading) if reduction == "none" else loss


def _check_shapes(hidden: Tensor, gist_hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
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


def _check_chunks(chunk_rows: int | None, memory_budget: int | None) -> None:
    if chunk_rows is not None and memory_budget is not None:
        raise ValueError(f"{_OP}: chunk_rows and memory_budget both say how large a chunk is; give one of them")
    for name, value in (("chunk_rows", chunk_rows), ("memory_budget", memory_budget)):
        if value is None:
            continue
        _common.check_integer(_OP, name, value)
        if value < 1:
            raise ValueError(f"{_OP}: {name} must be at least 1, got {value}")
