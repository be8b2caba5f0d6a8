"""What the forms of cp_linear share: dropout of a tile, the place of a tile among several weights, and small host helpers.

Several weights (N_i, K) with one input, such as q, k and v, stand one above the other without being copied: a launch takes
up to three pointers and counts its column tiles weight by weight, and in each fold by fold, so no tile straddles an end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastgist_kernels.common import cdiv
from fastgist_kernels.philox import keep_mask
from fastgist_kernels.pieces import PIECES, find, pick, sum_of

__all__ = [
    "Group",
    "column_tiles",
    "dropout_args",
    "dropped",
    "folded_v",
    "gain_strides",
    "groups",
    "low_rank_empty",
    "own_folds",
    "place_of_tile",
    "runs",
    "tiles_of_all",
]


@triton.jit
def dropped(h, seed_ptr, offs_m, first_r, R, threshold, inv_keep, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Inverted dropout on a tile [BLOCK_M, BLOCK_R] of an (M, R) matrix."""
    keep = keep_mask(tl.load(seed_ptr), offs_m, first_r, R, threshold, BLOCK_M, BLOCK_R)
    return tl.where(keep, h * inv_keep, 0.0)


@triton.jit
def _tiles_of(rows, fold_n, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr):
    if WHOLE:
        return tl.cdiv(rows, BLOCK_N)
    return (rows // fold_n) * tl.cdiv(fold_n, BLOCK_N)


@triton.jit
def tiles_of_all(n0, n1, n2, fold_n, PIECES: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column tiles of up to three weights of n0, n1 and n2 rows."""
    tiles0 = _tiles_of(n0, fold_n, WHOLE, BLOCK_N)
    tiles1 = _tiles_of(n1, fold_n, WHOLE, BLOCK_N)
    tiles2 = _tiles_of(n2, fold_n, WHOLE, BLOCK_N)
    return sum_of(tiles0, tiles1, tiles2, PIECES)


@triton.jit
def place_of_tile(
    tile,
    weights,
    biases,
    n0,
    n1,
    n2,
    fold_n,
    PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where column tile ``tile`` lies: its weight, that weight's bias, the first of all rows that are this weight's, its first
    row in this weight, its first row in the fold, the fold's width, the fold among all folds, the first row of v.

    WHOLE: v has a row for each row of all weights, which are one fold then. Else each weight is folds of width fold_n."""
    tiles0 = _tiles_of(n0, fold_n, WHOLE, BLOCK_N)
    tiles1 = _tiles_of(n1, fold_n, WHOLE, BLOCK_N)
    piece, tile = find(tile, tiles0, tiles1, PIECES)
    start = pick(piece, (0, n0, n0 + n1), PIECES)
    width = fold_n
    if WHOLE:
        width = pick(piece, (n0, n1, n2), PIECES)
    bias_ptr = biases[0]
    if HAS_BIAS:
        bias_ptr = pick(piece, biases, PIECES)
    fold_tiles = tl.cdiv(width, BLOCK_N)
    fold = (tile // fold_tiles).to(tl.int64)
    first = (tile % fold_tiles).to(tl.int64) * BLOCK_N
    first_row = fold * width + first
    first_v = first
    if PIECES > 1:
        if WHOLE:
            first_v += start
        else:
            fold += start // fold_n
    return pick(piece, weights, PIECES), bias_ptr, start, first_row, first, width, fold, first_v


@triton.jit
def own_folds(piece, n0, n1, n2, fold_n, PIECES: tl.constexpr, WHOLE: tl.constexpr):
    """Of one of up to three pieces of n0, n1 and n2 columns: its first row of v, its first fold, its folds' width.

    WHOLE: v has a row for each of all columns, which are one fold, and of it a piece has as much as it is wide."""
    start = pick(piece, (0, n0, n0 + n1), PIECES)
    if WHOLE:
        return start, 0, pick(piece, (n0, n1, n2), PIECES)
    else:
        return 0, start // fold_n, fold_n


# -- on the host -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Weights that one launch takes, with the part of v, gain and the columns (of y or dy) that are theirs."""

    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]
    v: torch.Tensor | None
    gain: torch.Tensor | None
    columns: slice
    whole: bool  # v has a row for each row of all these weights; else it is a fold's

    @property
    def fold_n(self) -> int:
        return self.v.shape[0]


def groups(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    v: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
) -> Iterator[Group]:
    """The weights (N_i, K) that have rows, in runs of at most three with equal strides."""
    biases = [b for w, b in zip(weights, biases, strict=False) if w.shape[0]]
    weights = [w for w in weights if w.shape[0]]
    whole = v is not None and len(weights) > 1 and v.shape[0] == sum(w.shape[0] for w in weights)
    first, start, fold = 0, 0, 0
    while first < len(weights):
        last = first + 1
        while last < min(first + PIECES, len(weights)) and _alike(weights, biases, first, last):
            last += 1
        rows = sum(w.shape[0] for w in weights[first:last])
        own_v, own_gain = v, gain
        if v is not None and whole:
            own_v = v[start : start + rows]
        elif v is not None:
            folds = rows // v.shape[0]
            own_gain = gain if gain is None or gain.shape[0] == 1 else gain[fold : fold + folds]
            fold += folds
        columns = slice(start, start + rows)
        yield Group(weights[first:last], biases[first:last], own_v, own_gain, columns, whole and last - first > 1)
        first, start = last, start + rows


def _alike(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], a: int, b: int) -> bool:
    return weights[a].stride() == weights[b].stride() and (not biases or biases[a].stride() == biases[b].stride())


def runs(
    pieces: Sequence[torch.Tensor], v: torch.Tensor, gain: torch.Tensor | None
) -> Iterator[tuple[Sequence[torch.Tensor], torch.Tensor, torch.Tensor | None, bool]]:
    """Pieces (M, N_i) of dy, at most three at a time, with their part of v and gain, and whether that has a row for each of
    their columns."""
    whole = len(pieces) > 1 and v.shape[0] == sum(t.shape[1] for t in pieces)
    start, fold = 0, 0
    for first in range(0, len(pieces), PIECES):
        some = pieces[first : first + PIECES]
        columns = sum(t.shape[1] for t in some)
        if whole:
            yield some, v[start : start + columns], gain, len(some) > 1
        else:
            folds = columns // v.shape[0]
            own_gain = gain if gain is None or gain.shape[0] == 1 else gain[fold : fold + folds]
            yield some, v, own_gain, False
            fold += folds
        start += columns


def column_tiles(group: Group, block_n: int) -> int:
    """Column tiles of a launch: of each weight, fold by fold."""
    if group.whole:
        return sum(cdiv(w.shape[0], block_n) for w in group.weights)
    return (group.columns.stop - group.columns.start) // group.fold_n * cdiv(group.fold_n, block_n)


def dropout_args(seed: torch.Tensor | None, dropout_p: float) -> tuple[int, float]:
    """threshold (as in fastgist/reference/philox.py) and 1 / (1 - p)."""
    return (0, 1.0) if seed is None else (min(int(dropout_p * 2**31), 2**31 - 1), 1.0 / (1.0 - dropout_p))


def gain_strides(gain: torch.Tensor | None) -> tuple[int, int]:
    """Of gain (1 or G, R), a single row serving every fold."""
    return (0, 0) if gain is None else (gain.stride(0) if gain.shape[0] > 1 else 0, gain.stride(1))


def low_rank_empty(x: torch.Tensor, rank: int) -> torch.Tensor:
    """(M, R) for x U or its gradient: float32 for float16, whose range it may pass."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.empty(x.shape[0], rank, dtype=dtype, device=x.device)


def folded_v(v: torch.Tensor, gain: torch.Tensor | None, folds: int) -> torch.Tensor:
    """V' (N, R): V times each fold's gain, the folds one above the other. V itself where that is all."""
    if gain is None:
        return v if folds == 1 else v.repeat(folds, 1)
    return (v * gain.expand(folds, -1)[:, None]).flatten(0, 1)
