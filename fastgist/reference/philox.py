"""The counter-based random bits behind every dropout mask: Philox4x32-10 (Salmon et al., SC 2011) in plain PyTorch.

The rule that all implementations follow. A mask (M, R) is drawn four columns at a time: columns 4q .. 4q + 3 of row m
take the four output words of Philox with the 64-bit counter c = m ceil(R / 4) + q, as (c low, c high, 0, 0), and the
64-bit seed as its key (seed low, seed high). An element is kept if the upper 31 bits of its word, as a number, are
>= floor(p 2^31). The mask depends on nothing else, so forward, backward and a recomputation agree, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_mask", "philox4x32", "threshold"]

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _pair(first: int, second: int, like: Tensor) -> Tensor:
    """Two numbers as rows that multiply ``like`` (2, ...), without a copy from the host."""
    pair = torch.full((2, *[1] * (like.dim() - 1)), second, dtype=torch.int64, device=like.device)
    pair[0] = first
    return pair


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four words for each counter (four words) under a key (two words); all int64 holding unsigned 32-bit numbers.

    The two halves of a round stand one above the other: few rows cost as much as there are calls."""
    even, odd = torch.stack((counter[0], counter[2])), torch.stack((counter[1], counter[3]))
    keys = torch.stack((key[0], key[1])).reshape(2, *[1] * (even.dim() - 1))
    multipliers, steps = _pair(_M1, _M0, even), _pair(_W0, _W1, even)
    for _ in range(_ROUNDS):
        wide = even.flip(0) * multipliers  # int64 wraps at 2^64, which leaves the bits right
        even = (wide >> 32).bitwise_and_(_LOW).bitwise_xor_(odd).bitwise_xor_(keys)
        odd = wide.bitwise_and_(_LOW)
        keys = (keys + steps).bitwise_and_(_LOW)
    return even[0], odd[0], even[1], odd[1]


def threshold(p: float) -> int:
    """Draws of 31 bits below this are dropped: floor(p 2^31), at most 2^31 - 1."""
    return min(int(p * 2**31), 2**31 - 1)


def keep_mask(seed: Tensor, shape: tuple[int, int], p: float) -> Tensor:
    """bool (M, R), True where kept: each element is dropped with probability p. ``seed``: int64, one element."""
    rows, columns = shape
    quads = -(-columns // 4)
    counter = torch.arange(rows * quads, device=seed.device, dtype=torch.int64)
    zero = torch.zeros_like(counter)
    seed = seed.reshape(())
    words = philox4x32((counter & _LOW, counter >> 32, zero, zero), (seed & _LOW, (seed >> 32) & _LOW))
    draws = torch.stack(words, dim=1).bitwise_right_shift_(1).view(rows, 4 * quads)
    return draws[:, :columns] >= threshold(p)
