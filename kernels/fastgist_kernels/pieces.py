"""Up to three matrices side by side that nobody copies: the weights of q, k and v, the gradients of their outputs.

A kernel takes three of each (pointer, size, strides), of which the first PIECES count, and asks here which of them a tile
lies in. With one piece nothing of this is left in what is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = ["PIECES", "find", "padded", "pick", "sizes", "strides", "sum_of"]

#: Pieces that one launch takes: q, k and v.
PIECES = 3


@triton.jit
def find(i, count0, count1, PIECES: tl.constexpr):
    """Which piece item ``i`` (a tile, a fold, a step) is in, and which of that piece's own it is; pieces have count0, count1
    and any number of them."""
    piece = 0
    if PIECES > 1:
        behind = i >= count0
        piece = behind.to(tl.int32)
        before = tl.where(behind, count0, 0)
        if PIECES > 2:
            behind = i >= count0 + count1
            piece += behind.to(tl.int32)
            before = tl.where(behind, count0 + count1, before)
        i -= before
    return piece, i


@triton.jit
def pick(piece, given, PIECES: tl.constexpr):
    """Item ``piece`` of a tuple with one for each of three pieces."""
    value = given[0]
    if PIECES > 1:
        value = tl.where(piece > 0, given[1], value)
    if PIECES > 2:
        value = tl.where(piece > 1, given[2], value)
    return value


@triton.jit
def sum_of(n0, n1, n2, PIECES: tl.constexpr):
    """Of the sizes that count."""
    total = n0
    if PIECES > 1:
        total += n1
    if PIECES > 2:
        total += n2
    return total


# -- on the host -----------------------------------------------------------------------------------------------------


def padded(given: Sequence) -> tuple:
    """``given`` and None up to three: what a launch takes."""
    return (*given, *(None,) * (PIECES - len(given)))


def sizes(pieces: Sequence[torch.Tensor], dim: int) -> tuple[int, ...]:
    """Of each piece along ``dim``, 0 where there is none."""
    return tuple(0 if t is None else t.shape[dim] for t in padded(pieces))


def strides(pieces: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Of rows, then of columns, three each. A piece that is not there has the first one's: a unit stride stays a constant."""
    every = [t.stride() for t in pieces] + [pieces[0].stride()] * (PIECES - len(pieces))
    return tuple(s[0] for s in every) + tuple(s[1] for s in every)
