"""gist_linear_loss: schema, fake, checks, dispatch and autograd. The formula is in fastgist/reference/gist_linear_loss.py.

The rows are taken in chunks (fastgist/ops/_linear_chunks.py). A chunk's hidden states of both heads, stacked, make its logits
in one matrix product; the row work puts the gradients in their place; a second product carries them back. No more than one
chunk of logits ever exists. For "sum" and "mean" the gradients are finished in the forward, where the logits are; for
"none", whose row gradients are not known yet, the backward runs the chunks again. Where the float32 sum of a half-precision
head's gradient would take more memory than there is to be, that gradient is formed by blocks of classes in a second pass
(fastgist/ops/_linear_head.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgist import backends
from fastgist.ops import _common, _finished, _linear_chunks, _linear_head, _moving, _transforms, _vocab_parallel
from fastgist.ops.gist_loss import DEBUG, betas, check_options, check_target, check_targets_in_range
from fastgist.reference import gist_loss as reference
from fastgist.reference._numerics import accumulate_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["gist_linear_loss"]

_OP = "gist_linear_loss"


def planned(hidden: Tensor, weight: Tensor, row_scale: Tensor, *rest) -> tuple[_linear_chunks.RowWork, int, int, int]:
    """The row work of a call of the raw operator, the rows of its chunks, the classes of a second pass's blocks or 0, and the
    elements that are added to a sum of the head's gradient at a time. ``rest``: its arguments from alpha on."""
    *options, chunk_rows, budget = rest[:9]
    _need_hidden, _need_gist, need_weight, _need_bias, narrow = rest[9:14]
    group_name, first_class, every_class, _reduce = rest[14:18]
    group = _vocab_parallel.group_named(group_name)
    rows, (classes, width) = hidden.shape[0], weight.shape
    share = classes
    if group is None:
        work: _linear_chunks.RowWork = _linear_chunks.row_work(
            backends.resolve(_OP, rest[18], hidden), tuple(options), classes
        )
    else:
        share = -(-every_class // group.size())  # as many chunks on every rank, whatever each one's share
        work = _vocab_parallel.row_work(_OP, group, tuple(options), first_class, every_class)
    wider = need_weight and narrow and weight.dtype != row_scale.dtype
    sum_bytes = share * width * row_scale.element_size() if wider else 0
    itemsize = hidden.element_size()
    elements, added = _linear_head.added_at_a_time(budget, hidden.device, itemsize)
    if not (budget and need_weight and row_scale.dtype != hidden.dtype):
        added = 0
    return work, *_linear_chunks.plan(rows, width, share, itemsize, chunk_rows, budget, sum_bytes, added), elements


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
    *options, _chunk_rows, _budget = rest[:9]
    need_hidden, need_gist, need_weight, need_bias, narrow = rest[9:14]
    group_name, _first_class, every_class, reduce = rest[14:18]
    alpha, _, _, beta_gist, *_, ignore_index = options
    rows, classes = hidden.shape[0], weight.shape[0]
    group = _vocab_parallel.group_named(group_name)
    if group is None:
        check_targets_in_range(_OP, target, every_class, ignore_index)
    elif DEBUG:
        _vocab_parallel.check_same_states(_OP, group, hidden, gist_hidden)
    work, chunk_rows, block, elements = planned(hidden, weight, row_scale, *rest)
    dtype, kept = row_scale.dtype, weight.dtype if narrow else row_scale.dtype
    silent = alpha == 0.0 and beta_gist == 0.0  # nothing of the loss reaches the gist token: products of zeros
    here = (need_weight or need_bias) and not block  # the head's gradients come of the chunks, not of a second pass
    need_z, need_g = need_hidden or here, (need_gist or here) and not silent
    row_loss = torch.empty(rows, dtype=dtype, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
    make = torch.zeros if silent else torch.empty
    grad_gist = make(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_gist else None
    chunks = -(-rows // chunk_rows)
    head = _linear_head.Sum(weight, dtype, kept, chunks, elements) if need_weight and not block else None
    grad_bias = torch.zeros(classes, dtype=dtype, device=weight.device) if need_bias else None
    states = _linear_head.States(hidden, gist_hidden, target, ignore_index, need_weight)
    stats = torch.empty(work.statistics, rows, dtype=dtype, device=hidden.device) if block else None
    most = 2 * min(chunk_rows, rows)
    buffer = torch.empty(most, _linear_chunks.padded(classes), dtype=hidden.dtype, device=hidden.device)
    logits = both = buffer
    for first in range(0, rows, chunk_rows):
        part = slice(first, min(first + chunk_rows, rows))
        pairs = part.stop - part.start
        both = states.stacked(part)
        logits = _linear_head.logits(both, weight, bias, buffer[: 2 * pairs, :classes])
        of_rows = None if stats is None else stats[:, part]
        work.rows(logits, target[part], row_scale[part], row_loss[part], need_z, need_g, of_rows)
        used = pairs if silent else 2 * pairs  # from here on the logits are their gradients
        if head is not None:
            head.add(logits[:used], both[:used])
        if grad_bias is not None and not block:
            _linear_head.add_rows(grad_bias, logits[:used])
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
    if stats is not None:
        grad_weight = _linear_head.by_classes(
            work, states, weight, bias, target, row_scale, stats, block, silent, grad_bias
        )
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


_op, _op_moving = _moving.define(
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
    finished; those of float16, and of row losses, still wait for what arrives. ``moving``: None, or the options before
    ignore_index in their place, which compiled code does not have as constants."""

    @staticmethod
    def forward(ctx, hidden, gist_hidden, weight, bias, target, divisor, moving, options, scale, reduce, record, impl):
        ctx.needs = needs = _common.needs(ctx, 4, record)
        ctx.options, ctx.impl, ctx.reduce = options, impl, reduce
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, gist_hidden, weight, bias))
        # Under autocast the head is narrowed here, not by autograd: its gradient stays as wide as its sum.
        narrow_weight, narrow_bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        tensors = hidden, gist_hidden, narrow_weight, narrow_bias, target
        dtype = accumulate_dtype(hidden.dtype)
        whole = hidden.new_full((), scale, dtype=dtype)
        whole = whole if divisor is None else whole / divisor
        # A mean's 1 / rows in a float16 gradient would underflow before any loss scale could lift it: it waits.
        lifted = hidden.dtype == torch.float16
        row_scale = (torch.ones_like(whole) if lifted else whole).expand(hidden.shape[0])
        wanted = needs if reduce else (False,) * 4
        narrow = weight.dtype == hidden.dtype and not lifted
        run, options = _runner(moving, options)
        row_loss, *grads = run(*tensors, row_scale, *options[:-1], *wanted, narrow, *options[-1], impl)
        if not reduce:
            if any(needs):
                ctx.save_for_backward(hidden, gist_hidden, weight, bias, target, moving)
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
            hidden, gist_hidden, weight, bias, target, moving = ctx.saved_tensors
            narrow_bias = None if bias is None else bias.to(hidden.dtype)
            tensors = hidden, gist_hidden, weight.to(hidden.dtype), narrow_bias, target
            narrow = weight.dtype == hidden.dtype
            run, options = _runner(moving, ctx.options)
            _, *grads = run(*tensors, grad, *options[:-1], *needs, narrow, *options[-1], ctx.impl)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 8


def _runner(moving: Tensor | None, options: tuple):
    """The raw operator, and the options as it takes them."""
    return (_op, options) if moving is None else (_op_moving, (*moving.unbind(), *options[len(moving) :]))


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
        memory_budget: bytes for a chunk's logits and stacked hidden states, and for the float32 sum of a half-precision
            head's gradient over several chunks with the part of a product that is added to it at a time. Where that has no
            room, the gradient is formed by blocks of classes in a second pass, with no sum: logits are computed twice, eight
            products in place of six. Default: a sixteenth of what whole logits and their gradients would take, at least 32 MiB
            (or 64 rows, if they take more) and at most 1 GiB, for a chunk or a block; an eighth of what gist_loss on whole
            logits holds at its peak for all of it but the part that is added (up to 24 MiB on a CPU, 32 on a GPU). The head's
            gradient itself comes on top, as does the float32 one of a float16 head, which waits in it for a loss scale.
        group: a torch.distributed group whose ranks share the head: weight (V_local, H) and bias are this rank's
            consecutive rows of it, in the ranks' order. Hidden states, class targets (of the whole vocabulary, not less
            vocab_start) and options must be the same on all ranks. Class targets travel with the rows' numbers: where they
            differ or are no class all ranks raise on a CPU, and the row is NaN on a GPU. Hidden states are compared under
            FASTGIST_DEBUG=1 alone, on all ranks or none; what one rank alone raises for another reason, before they first
            talk, leaves the others waiting. Soft targets are this rank's columns (..., V_local). The loss is that of the
            whole head, the same bits on every rank. One all-gather a chunk, of thirteen numbers a row.
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
    dtype = accumulate_dtype(hidden.dtype)
    temperature = _common.check_temperature(_OP, temperature, dtype)
    _transforms.refuse(_OP)
    check_options(_OP, alpha, beta, label_smoothing, ignore_index, reduction, detach)
    _check_chunks(chunk_rows, memory_budget)
    rows = math.prod(leading)
    target = target.reshape(rows, classes) if target.is_floating_point() else target.reshape(rows)
    divisor = _finished.divisor_of(_OP, divisor, reduction, hidden, dtype)
    counted = (
        reference.kept_rows(target, ignore_index) if divisor is None and reduction in ("mean", "batchmean") else None
    )
    scale, divisor = _finished.loss_scale(reduction, 1.0, rows, counted, divisor, hidden, dtype)
    numbers: tuple[float, ...] = (
        float(alpha),
        *betas(beta, temperature, t_squared, detach),
        temperature,
        float(label_smoothing),
    )
    moving = _moving.packed(*numbers)
    if moving is not None:
        numbers = (1.0,) * len(numbers)  # no part of the graph
    options = *numbers, int(ignore_index), chunk_rows or 0, memory_budget or 0
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
    hidden, gist_hidden = hidden.reshape(rows, width), gist_hidden.reshape(rows, width)
    loss = _GistLinearLoss.apply(
        hidden,
        _common.distinct(hidden, gist_hidden),
        weight,
        bias,
        target,
        divisor,
        moving,
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
