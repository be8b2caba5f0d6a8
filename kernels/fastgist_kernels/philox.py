"""Dropout masks inside kernels, by the counter-based rule of fastgist/reference/philox.py."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keep_mask"]


@triton.jit
def keep_mask(seed, offs_m, first_r, R, threshold, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Tile [BLOCK_M, BLOCK_R] of the mask (M, R): rows ``offs_m`` (int64), columns from ``first_r``, a multiple of 4."""
    quads = (R + 3) // 4
    offs_q = first_r // 4 + tl.arange(0, BLOCK_R // 4)
    counter = offs_m[:, None] * quads + offs_q[None, :]
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    keep0 = ((w0 >> 1).to(tl.int32) >= threshold).to(tl.int8)
    keep1 = ((w1 >> 1).to(tl.int32) >= threshold).to(tl.int8)
    keep2 = ((w2 >> 1).to(tl.int32) >= threshold).to(tl.int8)
    keep3 = ((w3 >> 1).to(tl.int32) >= threshold).to(tl.int8)
    # join puts its operands on a new last dimension: [.., a, b] holds word 2a + b.
    keep = tl.join(tl.join(keep0, keep2), tl.join(keep1, keep3))
    return tl.reshape(keep, (BLOCK_M, BLOCK_R)) != 0
