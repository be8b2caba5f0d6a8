"""Chunks of rows and blocks of classes for gist_linear_loss: how large, and what is done to logits between their products."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastgist.ops._row_state import PartWork
from fastgist.reference import gist_loss as reference
from fastgist.reference._numerics import BLOCK_ELEMENTS, row_blocks

__all__ = ["RowWork", "chunk_bytes", "default_budget", "padded", "plan", "row_work", "rows_of_chunk"]

#: Pairs of rows: the stacked product has twice as many, whole tiles of 128.
TILE = 64
#: Between these the default budget is a sixteenth of what whole logits and their gradients take. Less saves nothing to speak
#: of; more makes no product faster.
LEAST_BUDGET, MOST_BUDGET = 2**25, 2**30
#: With fewer pairs than these in a chunk the sum of the head's gradient, which every chunk passes over, costs more than logits
#: that are formed twice (DESIGN.md).
LEAST_ROWS = 64
#: Classes that a block has at least, whatever the budget.
LEAST_CLASSES = 256


class RowWork(Protocol):
    """What is done to logits (2 m, n) between their products. Rows i and m + i are a pair; ``target`` is (m,) or (m, V), of
    all classes; gradients, times ``scale`` (m,), take the logits' place where they are needed, and what is left in the
    place of the others is undefined."""

    statistics: int  #: Numbers a row that :meth:`rows` leaves for :meth:`classes`.

    def rows(
        self,
        logits: Tensor,
        target: Tensor,
        scale: Tensor,
        row_losses: Tensor,
        need_z: bool,
        need_gist: bool,
        stats: Tensor | None = None,
    ) -> None:
        """Whole rows: writes the row losses (m,), and the statistics (statistics, m) where there is a place for them."""

    def classes(
        self, logits: Tensor, target: Tensor, scale: Tensor, stats: Tensor, start: int, need_gist: bool
    ) -> None:
        """The classes from ``start`` on, of rows whose statistics are known."""


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


def plan(
    rows: int,
    hidden: int,
    classes: int,
    itemsize: int,
    chunk_rows: int,
    budget: int,
    sum_bytes: int,
    added_bytes: int = 0,
) -> tuple[int, int]:
    """(pairs of rows in a chunk, classes in a block of the second pass that forms the head's gradient, or 0: one pass does).

    ``chunk_rows``, ``budget``: as they were given, or 0. ``sum_bytes``: of the sum that a head's gradient is formed in where
    that is wider than the gradient, else 0. It stands beside a chunk, and then beside what it is narrowed to, which exists
    either way. ``added_bytes``: of what several chunks add to a sum at a time.
    """
    size = chunk_rows or rows_of_chunk(rows, hidden, classes, itemsize, budget or None)
    if size < rows and not chunk_rows and budget:
        size = rows_of_chunk(rows, hidden, classes, itemsize, budget - added_bytes)
    if size >= rows or not sum_bytes:
        return size, 0
    room = budget or max(_eighth_of_whole(rows, classes, itemsize), LEAST_BUDGET)
    if sum_bytes <= room:
        beside = min(room - sum_bytes // 2 - added_bytes, chunk_bytes(size, hidden, classes, itemsize))
        fewer = chunk_rows or rows_of_chunk(rows, hidden, classes, itemsize, beside)
        if fewer >= LEAST_ROWS:
            return fewer, 0
    fit = (chunk_bytes(size, hidden, classes, itemsize) // (2 * rows * itemsize) - hidden) // LEAST_CLASSES
    return size, min(max(fit, 1) * LEAST_CLASSES, classes)


def _eighth_of_whole(rows: int, classes: int, itemsize: int) -> int:
    """An eighth of what two products and gist_loss hold at their peak, 3.5 times the logits of one head."""
    return 7 * rows * padded(classes) * itemsize // 16


def row_work(impl: str, options: tuple, classes: int) -> RowWork:
    """What implementation ``impl`` does to logits of ``classes``; ``options`` are gist_loss's, alpha to ignore_index."""
    if impl == "reference":
        return _Reference(options, classes)
    if impl == "native":
        return _Native(options, classes)
    return _Triton(options, classes)


class _Reference(PartWork):
    """Plain PyTorch. Where no statistics are left behind, by the expressions of fewest passes."""

    def __init__(self, options: tuple, classes: int) -> None:
        super().__init__(options, 0, classes)

    def rows(self, logits, target, scale, row_losses, need_z, need_gist, stats=None) -> None:
        if stats is not None:
            return super().rows(logits, target, scale, row_losses, need_z, need_gist, stats)
        z, gist = logits[: len(row_losses)], logits[len(row_losses) :]
        for rows in row_blocks(z):  # so that what lies between logits and gradients is a block large, not a chunk
            wanted = need_z, need_gist, scale[rows, None]
            loss, *grads = reference.forward(z[rows], gist[rows], target[rows], *self.options, *wanted)  # type: ignore[call-arg]
            row_losses[rows] = loss
            for half, grad in zip((z, gist), grads, strict=True):
                if grad is not None:
                    half[rows] = grad


class _Native:
    """The compiled passes. They want gradients apart from the logits, contiguous: a block of rows at a time, which stays in
    cache on its way through a buffer."""

    statistics = 9

    def __init__(self, options: tuple, classes: int) -> None:
        self.options, self.all_classes, self.ops = options, classes, torch.ops.fastgist_native

    def rows(self, logits, target, scale, row_losses, need_z, need_gist, stats=None) -> None:
        pairs = len(row_losses)
        z, gist = logits[:pairs], logits[pairs:]
        step, places = _row_buffers(z, need_z + need_gist)
        for start in range(0, pairs, step):
            rows = slice(start, min(start + step, pairs))
            own = torch.empty(9, rows.stop - start, dtype=row_losses.dtype, device=logits.device)
            self.ops.gist_loss_fwd(z[rows], gist[rows], target[rows], *self.options, row_losses[rows], own)
            if stats is not None:
                stats[:, rows] = own
            grads = _places(places[:, : rows.stop - start], need_z, need_gist)
            if need_z or need_gist:
                self.ops.gist_loss_bwd(z[rows], gist[rows], target[rows], own, scale[rows], *self.options, *grads)
            _put(grads, z[rows], gist[rows])

    def classes(self, logits, target, scale, stats, start, need_gist) -> None:
        pairs, width = len(scale), logits.shape[1]
        z, gist = logits[:pairs], logits[pairs:]
        soft = target.is_floating_point()
        step, places = _row_buffers(z, 1 + need_gist)
        for first in range(0, pairs, step):
            rows = slice(first, min(first + step, pairs))
            grads = _places(places[:, : rows.stop - first], True, need_gist)
            aim = target[rows, start : start + width] if soft else target[rows]
            own = stats[:, rows].contiguous()
            part = start, self.all_classes
            self.ops.gist_loss_bwd_classes(z[rows], gist[rows], aim, own, scale[rows], *self.options, *part, *grads)
            _put(grads, z[rows], gist[rows])


def _row_buffers(z: Tensor, sides: int) -> tuple[int, Tensor]:
    """Rows that go through a buffer at a time, and one (sides, rows, n)."""
    pairs, classes = z.shape
    step = max(BLOCK_ELEMENTS // max(classes, 1), torch.get_num_threads())
    return step, torch.empty(sides, min(step, pairs), classes, dtype=z.dtype, device=z.device)


def _places(buffer: Tensor, *wanted: bool) -> list[Tensor | None]:
    free = list(buffer)
    return [free.pop() if want else None for want in wanted]


def _put(grads: list[Tensor | None], *halves: Tensor) -> None:
    for half, grad in zip(halves, grads, strict=True):
        if grad is not None:
            half.copy_(grad)


class _Triton:
    """One launch a chunk or block, in place."""

    statistics = 9

    def __init__(self, options: tuple, classes: int) -> None:
        self.options, self.all_classes = options, classes

    def rows(self, logits, target, scale, row_losses, need_z, need_gist, stats=None) -> None:
        from fastgist_kernels.gist_linear_loss import gist_linear_loss_chunk

        own = None if stats is None else row_losses.new_empty(9, len(row_losses))
        gist_linear_loss_chunk(logits, target, scale, *self.options, row_losses, need_z or need_gist, own)
        if stats is not None:
            stats.copy_(own)

    def classes(self, logits, target, scale, stats, start, need_gist) -> None:
        from fastgist_kernels.gist_linear_loss import gist_linear_loss_classes

        aim = target[:, start : start + logits.shape[1]] if target.is_floating_point() else target
        part = start, self.all_classes
        gist_linear_loss_classes(logits, aim, scale, stats, *part, *self.options, need_gist)
