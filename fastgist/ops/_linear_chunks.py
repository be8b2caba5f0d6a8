"""Chunks of rows for gist_linear_loss: how many at a time, and what is done to a chunk of logits between its products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgist.reference import gist_loss as reference
from fastgist.reference._numerics import BLOCK_ELEMENTS, row_blocks

__all__ = ["RowWork", "chunk_bytes", "default_budget", "padded", "row_work", "rows_of_chunk"]

#: (logits (2 m, V), target (m,) or (m, V), scale (m,), row_loss (m,), need_z, need_gist) -> None. Writes the row losses and,
#: where a side's gradients are needed, puts them, times scale, in place of its logits; the other side's are left undefined.
#: Rows i and m + i are a pair.
RowWork = Callable[[Tensor, Tensor, Tensor, Tensor, bool, bool], None]

#: Pairs of rows: the stacked product has twice as many, whole tiles of 128.
TILE = 64
#: Between these the default budget is a sixteenth of what whole logits and their gradients take. Less saves nothing to speak
#: of; more makes no product faster.
LEAST_BUDGET, MOST_BUDGET = 2**25, 2**30


def padded(classes: int) -> int:
    """Elements between rows of logits: a multiple of 16, so that wide loads are aligned at any class count."""
    return -(-classes // 16) * 16


def chunk_bytes(rows: int, hidden: int, classes: int, itemsize: int) -> int:
    """Bytes of ``rows`` pairs in a chunk: their logits and their stacked hidden states."""
    return 2 * rows * (padded(classes) + hidden) * itemsize


def default_budget(rows: int, hidden: int, classes: int, itemsize: int) -> int:
    """Bytes for a chunk where none are given: those of an eighth of the rows, a sixteenth of what whole logits of both
    heads and their gradients would take; or as many as all hidden states, which exist anyway."""
    eighth = chunk_bytes(rows, hidden, classes, itemsize) // 8
    return max(min(max(eighth, LEAST_BUDGET), MOST_BUDGET), 2 * rows * hidden * itemsize)


def rows_of_chunk(rows: int, hidden: int, classes: int, itemsize: int, budget: int | None = None) -> int:
    """Pairs of rows in a chunk of at most ``budget`` bytes, in whole tiles where one fits.

    A budget that is given is kept unless one pair exceeds it; the default one is exceeded for a whole tile.
    """
    given = budget is not None
    if budget is None:
        budget = default_budget(rows, hidden, classes, itemsize)
    fit = budget // max(chunk_bytes(1, hidden, classes, itemsize), 1)
    fit = fit // TILE * TILE if fit >= TILE else max(fit, 1) if given else TILE
    return max(min(rows, fit), 1)


def row_work(impl: str, options: tuple) -> RowWork:
    """What implementation ``impl`` does to a chunk; ``options`` are gist_loss's, alpha to ignore_index."""
    work = {"reference": _reference, "native": _native}.get(impl, _triton)

    def run(logits: Tensor, target: Tensor, scale: Tensor, row_loss: Tensor, need_z: bool, need_gist: bool) -> None:
        work(logits, target, scale, options, row_loss, need_z, need_gist)

    return run


def _reference(logits, target, scale, options, row_loss, need_z, need_gist) -> None:
    z, gist = logits[: len(row_loss)], logits[len(row_loss) :]
    for rows in row_blocks(z):  # so that what lies between logits and gradients is a block large, not a chunk
        wanted = need_z, need_gist, scale[rows, None]
        loss, *grads = reference.forward(z[rows], gist[rows], target[rows], *options, *wanted)  # type: ignore[call-arg]
        row_loss[rows] = loss
        for half, grad in zip((z, gist), grads, strict=True):
            if grad is not None:
                half[rows] = grad


def _native(logits, target, scale, options, row_loss, need_z, need_gist) -> None:
    """The compiled backward wants gradients apart from the logits, contiguous: a block of rows at a time, which stays in cache
    on its way through a buffer."""
    ops = torch.ops.fastgist_native
    pairs, classes = len(row_loss), logits.shape[1]
    z, gist = logits[:pairs], logits[pairs:]
    step = max(BLOCK_ELEMENTS // max(classes, 1), torch.get_num_threads())
    buffer = torch.empty(need_z + need_gist, min(step, pairs), classes, dtype=logits.dtype, device=logits.device)
    for start in range(0, pairs, step):
        rows = slice(start, min(start + step, pairs))
        stats = torch.empty(9, rows.stop - start, dtype=row_loss.dtype, device=logits.device)
        ops.gist_loss_fwd(z[rows], gist[rows], target[rows], *options, row_loss[rows], stats)
        places = list(buffer[:, : rows.stop - start])
        grads = [places.pop() if need else None for need in (need_z, need_gist)]
        if need_z or need_gist:
            ops.gist_loss_bwd(z[rows], gist[rows], target[rows], stats, scale[rows], *options, *grads)
        for half, grad in zip((z, gist), grads, strict=True):
            if grad is not None:
                half[rows] = grad


def _triton(logits, target, scale, options, row_loss, need_z, need_gist) -> None:
    from fastgist_kernels.gist_linear_loss import gist_linear_loss_chunk

    gist_linear_loss_chunk(logits, target, scale, *options, row_loss, need_z or need_gist)  # type: ignore[call-arg]
