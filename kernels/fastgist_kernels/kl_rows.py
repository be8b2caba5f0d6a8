"""Rows of bidirectional_kl in Triton: which count, their state from one read of both sides, and the gradients at a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgist_kernels.common import LOG2E
from fastgist_kernels.pair_rows import (
    centred_pair,
    exponential,
    load_tile,
    merge_pair,
    no_lanes,
    online_pair,
    over_row,
    store_tile,
    tile_mask,
)

__all__ = ["counted", "counted_rows", "kl_finish_columns", "kl_row_state", "kl_stats", "kl_store_gradients"]


@triton.jit
def counted(mask_ptr, offs_m, stride_mask, M, HAS_MASK: tl.constexpr):
    """Which of the rows there are, and which of those count."""
    mask_m = offs_m < M
    counts = mask_m
    if HAS_MASK:
        counts = mask_m & (tl.load(mask_ptr + offs_m * stride_mask, mask=mask_m, other=0) != 0)
    return mask_m, counts


@triton.jit
def counted_rows(mask_ptr, stride_mask, M, BLOCK_M: tl.constexpr, HAS_MASK: tl.constexpr):
    """A program's rows (int64), which of them there are, and which of those count."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, counts = counted(mask_ptr, offs_m, stride_mask, M, HAS_MASK)
    return offs_m, mask_m, counts


@triton.jit
def kl_row_state(
    z_ptr,
    o_ptr,
    offs_m,
    counts,
    start,
    stop,
    stride_zm,
    stride_zv,
    stride_om,
    stride_ov,
    to_exp2,
    POLICY: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The merged state of columns ``start`` to ``stop`` of both sides, each read once; the next tile is on its way while one
    is worked on."""
    m_z = no_lanes(float("-inf"), BLOCK_M, BLOCK_V, VEC)
    m_o = m_z
    s_p = no_lanes(0.0, BLOCK_M, BLOCK_V, VEC)
    s_q, w_p, w_q, lone = s_p, s_p, s_p, s_p
    mask = tile_mask(counts, start, stop, BLOCK_V, VEC)
    z_next = load_tile(z_ptr, offs_m, start, stride_zm, stride_zv, mask, BLOCK_V, VEC, POLICY)
    o_next = load_tile(o_ptr, offs_m, start, stride_om, stride_ov, mask, BLOCK_V, VEC, POLICY)
    for at in range(start, stop, BLOCK_V):
        z = z_next.to(tl.float32)
        o = o_next.to(tl.float32)
        mask = tile_mask(counts, at + BLOCK_V, stop, BLOCK_V, VEC)
        z_next = load_tile(z_ptr, offs_m, at + BLOCK_V, stride_zm, stride_zv, mask, BLOCK_V, VEC, POLICY)
        o_next = load_tile(o_ptr, offs_m, at + BLOCK_V, stride_om, stride_ov, mask, BLOCK_V, VEC, POLICY)
        m_z, m_o, s_p, s_q, w_p, w_q, lone, _, _, _, _, _, _, _, _ = online_pair(
            z, o, m_z, m_o, s_p, s_q, w_p, w_q, lone, to_exp2, VEC
        )
    m_z, m_o, s_p, s_q, w_p, w_q, lone, _, _, _, _ = merge_pair(m_z, m_o, s_p, s_q, w_p, w_q, lone, to_exp2)
    return m_z, m_o, s_p, s_q, w_p, w_q, lone


@triton.jit
def kl_stats(stats_ptr, offs_m, M, mask_m, counts, m_z, m_o, s_p, s_q, e_p, e_q):
    """Leave a row's statistics for a backward, (6, M); 0 in a row that does not count."""
    rows = M.to(tl.int64)
    tl.store(stats_ptr + offs_m, tl.where(counts, m_z, 0.0), mask=mask_m)
    tl.store(stats_ptr + rows + offs_m, tl.where(counts, m_o, 0.0), mask=mask_m)
    tl.store(stats_ptr + 2 * rows + offs_m, tl.where(counts, s_p, 0.0), mask=mask_m)
    tl.store(stats_ptr + 3 * rows + offs_m, tl.where(counts, s_q, 0.0), mask=mask_m)
    tl.store(stats_ptr + 4 * rows + offs_m, tl.where(counts, e_p, 0.0), mask=mask_m)
    tl.store(stats_ptr + 5 * rows + offs_m, tl.where(counts, e_q, 0.0), mask=mask_m)


@triton.jit
def kl_store_gradients(
    grad_z_ptr,
    grad_o_ptr,
    d,
    p,
    q,
    over_p,
    over_q,
    e_p,
    e_q,
    inv_t,
    offs_m,
    mask_m,
    counts,
    start,
    stop,
    V,
    NEED_Z: tl.constexpr,
    NEED_O: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write a tile of the gradients asked for from d and the exponentials; over_p, over_q: what the row is times / (T S)."""
    p = p * over_row(over_p, VEC)
    q = q * over_row(over_q, VEC)
    mask = tile_mask(mask_m, start, stop, BLOCK_V, VEC)
    if NEED_Z:
        # (d - e) / T, not d / T - e / T: a fused multiply-add would round the two apart where they must cancel.
        grad_z = p * ((d - over_row(e_p, VEC)) * inv_t) + (p - q)
        grad_z = tl.where(over_row(counts, VEC), grad_z, 0.0)
        store_tile(grad_z_ptr, offs_m, start, V, grad_z, mask, BLOCK_V, VEC)
    if NEED_O:
        grad_o = q * ((over_row(e_q, VEC) - d) * inv_t) + (q - p)
        grad_o = tl.where(over_row(counts, VEC), grad_o, 0.0)
        store_tile(grad_o_ptr, offs_m, start, V, grad_o, mask, BLOCK_V, VEC)


@triton.jit
def kl_finish_columns(
    z_ptr,
    o_ptr,
    grad_z_ptr,
    grad_o_ptr,
    m_z,
    m_o,
    over_p,
    over_q,
    e_p,
    e_q,
    offs_m,
    mask_m,
    counts,
    start,
    stop,
    V,
    stride_zm,
    stride_zv,
    stride_om,
    stride_ov,
    inv_t,
    NEED_Z: tl.constexpr,
    NEED_O: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Read columns ``start`` to ``stop`` once more and write their gradients."""
    to_exp2 = inv_t * LOG2E
    for at in range(start, stop, BLOCK_V):
        mask = tile_mask(counts, at, stop, BLOCK_V, VEC)
        z = load_tile(z_ptr, offs_m, at, stride_zm, stride_zv, mask, BLOCK_V, VEC, "evict_first").to(tl.float32)
        o = load_tile(o_ptr, offs_m, at, stride_om, stride_ov, mask, BLOCK_V, VEC, "evict_first").to(tl.float32)
        zc, oc, d = centred_pair(z, o, over_row(m_z, VEC), over_row(m_o, VEC))
        kl_store_gradients(
            grad_z_ptr,
            grad_o_ptr,
            d,
            exponential(zc * to_exp2),
            exponential(oc * to_exp2),
            over_p,
            over_q,
            e_p,
            e_q,
            inv_t,
            offs_m,
            mask_m,
            counts,
            at,
            stop,
            V,
            NEED_Z,
            NEED_O,
            VEC,
            BLOCK_V,
        )
