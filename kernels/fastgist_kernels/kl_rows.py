"""Rows of bidirectional_kl in Triton: which count, their state from one read of both sides, their gradients, and each form of
a launch made of these."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastgist_kernels.common import LOG2E
from fastgist_kernels.pair_rows import (
    Rows,
    apart,
    finished_factor,
    gradient_factor,
    load_pair,
    merge_pair,
    nearness,
    no_state,
    online_pair,
    over_row,
    pair_means,
    seen_again,
    stat,
    state_of_parts,
    store_gradients,
    store_part,
    store_row_loss,
    store_stat,
    tile_mask,
    whole_pair,
)

__all__ = ["PARTIAL", "kl_backward", "kl_merge", "kl_rows", "kl_split", "kl_twice", "kl_whole"]

#: Numbers that a part of a row leaves for the merge: its state.
PARTIAL: tl.constexpr = tl.constexpr(7)


class KlAbout(NamedTuple):
    """What gradients need of a row; over_p, over_q: what the row is times / (T S)."""

    m_z: Any
    m_o: Any
    over_p: Any
    over_q: Any
    e_p: Any
    e_q: Any
    near_p: Any
    near_q: Any


@triton.jit
def kl_rows(first, mask_ptr, stride_mask, M, BLOCK_M: tl.constexpr):
    """BLOCK_M rows from ``first`` (int64) on."""
    at = first + tl.arange(0, BLOCK_M)
    there = at < M
    count = there
    if mask_ptr is not None:
        count = there & (tl.load(mask_ptr + at * stride_mask, mask=there, other=0) != 0)
    return Rows(at, there, count)


@triton.jit
def kl_about(rows, m_z, m_o, s_p, s_q, e_p, e_q, factor):
    """Rows that do not count were read as -inf, so p = q = d = 0: with these numbers 0 their gradients are 0, and no element
    asks whether its row counts."""
    # exp / S, not exp(. - log S): the argument's rounding grows with log S, the quotient's does not.
    over_p = tl.where(rows.count, factor / s_p, 0.0)
    over_q = tl.where(rows.count, factor / s_q, 0.0)
    e_p, e_q = tl.where(rows.count, e_p, 0.0), tl.where(rows.count, e_q, 0.0)
    return KlAbout(m_z, m_o, over_p, over_q, e_p, e_q, nearness(s_p, e_p), nearness(s_q, e_q))


@triton.jit
def kl_lanes(pair, rows, start, stop, to_exp2, BLOCK_V: tl.constexpr, VEC: tl.constexpr, POLICY: tl.constexpr):
    """The merged state of columns ``start`` to ``stop`` of both sides, each read once; the next tile is on its way while one
    is worked on."""
    state = no_state(rows.at.shape[0], BLOCK_V, VEC)
    mask = tile_mask(rows.count, start, stop, BLOCK_V, VEC)
    z_next, o_next = load_pair(pair, rows, start, mask, BLOCK_V, VEC, POLICY)
    for at in range(start, stop, BLOCK_V):
        z = z_next.to(tl.float32)
        o = o_next.to(tl.float32)
        mask = tile_mask(rows.count, at + BLOCK_V, stop, BLOCK_V, VEC)
        z_next, o_next = load_pair(pair, rows, at + BLOCK_V, mask, BLOCK_V, VEC, POLICY)
        state, _, _ = online_pair(state, z, o, to_exp2, VEC)
    state, _ = merge_pair(state, to_exp2)
    return state


@triton.jit
def kl_gradients(
    out, rows, seen, about, inv_t, start, stop, MERGED: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr
):
    """Write a tile of the gradients asked for."""
    p = seen.p * over_row(about.over_p, VEC)
    q = seen.q * over_row(about.over_q, VEC)
    # d - e, not d / T - e / T: a fused multiply-add would round the two apart where they must cancel. And over T goes p: where
    # a class is masked by the least float, p is 0 and d / T may be infinite.
    grad_z = (p * inv_t) * apart(seen.d, over_row(about.e_p, VEC), about.near_p, MERGED, VEC) + (p - q)
    grad_o = (q * inv_t) * apart(over_row(about.e_q, VEC), seen.d, about.near_q, MERGED, VEC) + (q - p)
    store_gradients(out, rows, start, stop, grad_z, grad_o, BLOCK_V, VEC)


@triton.jit
def kl_finish_tile(pair, out, rows, about, inv_t, start, stop, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """Read a tile once more and write its gradients."""
    mask = tile_mask(rows.count, start, stop, BLOCK_V, VEC)
    z, o = load_pair(pair, rows, start, mask, BLOCK_V, VEC, "evict_first")
    seen = seen_again(z.to(tl.float32), o.to(tl.float32), about.m_z, about.m_o, inv_t * LOG2E, VEC)
    kl_gradients(out, rows, seen, about, inv_t, start, stop, True, BLOCK_V, VEC)


@triton.jit
def kl_finish(pair, out, rows, state, start, stop, inv_t, BLOCK_V: tl.constexpr, VEC: tl.constexpr, LOSS):
    """Of rows whose state is known: the loss, if this program is to write it, and the statistics, or the gradients of columns
    ``start`` to ``stop``."""
    loss, e_p, e_q = pair_means(state, inv_t)
    factor = finished_factor(out)
    if LOSS:
        store_row_loss(out, rows, loss * factor)
    if out.stats_ptr is not None:
        store_stat(out, 0, rows, state.m_z)
        store_stat(out, 1, rows, state.m_o)
        store_stat(out, 2, rows, state.s_p)
        store_stat(out, 3, rows, state.s_q)
        store_stat(out, 4, rows, e_p)
        store_stat(out, 5, rows, e_q)
    else:
        about = kl_about(rows, state.m_z, state.m_o, state.s_p, state.s_q, e_p, e_q, factor * inv_t)
        for at in range(start, stop, BLOCK_V):
            kl_finish_tile(pair, out, rows, about, inv_t, at, stop, BLOCK_V, VEC)


# -- forms -----------------------------------------------------------------------------------------------------------


@triton.jit
def kl_whole(pair, out, rows, inv_t, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """Finish rows, each in one tile (BLOCK_V >= V), and return their losses as they are summed."""
    mask = tile_mask(rows.count, 0, out.V, BLOCK_V, VEC)
    z, o = load_pair(pair, rows, 0, mask, BLOCK_V, VEC, "evict_first")
    state, seen = whole_pair(z.to(tl.float32), o.to(tl.float32), inv_t * LOG2E, VEC)
    loss, e_p, e_q = pair_means(state, inv_t)
    factor = finished_factor(out)
    store_row_loss(out, rows, loss * factor)
    about = kl_about(rows, state.m_z, state.m_o, state.s_p, state.s_q, e_p, e_q, factor * inv_t)
    kl_gradients(out, rows, seen, about, inv_t, 0, out.V, False, BLOCK_V, VEC)
    return tl.where(rows.count, loss * factor, 0.0)


@triton.jit
def kl_twice(pair, out, rows, inv_t, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """Rows of any length: their losses, and their statistics or, from a second read, their gradients."""
    policy: tl.constexpr = "evict_last" if out.stats_ptr is None else ""
    state = kl_lanes(pair, rows, 0, out.V, inv_t * LOG2E, BLOCK_V, VEC, policy)
    kl_finish(pair, out, rows, state, 0, out.V, inv_t, BLOCK_V, VEC, True)


@triton.jit
def kl_split(pair, out, rows, start, stop, inv_t, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """Leave the state of columns ``start`` to ``stop`` as this program's part of the rows."""
    state = kl_lanes(pair, rows, start, stop, inv_t * LOG2E, BLOCK_V, VEC, "evict_last")
    for i in tl.static_range(PARTIAL):
        store_part(out, i, rows, state[i], PARTIAL)


@triton.jit
def kl_merge(pair, out, rows, parts, start, stop, inv_t, BLOCK_V: tl.constexpr, VEC: tl.constexpr, PARTS: tl.constexpr):
    """Merge the parts of rows, in the order of the columns, and finish columns ``start`` to ``stop``; one program of a row
    writes its loss."""
    state, _ = merge_pair(state_of_parts(out, rows, parts, PARTIAL, PARTS), inv_t * LOG2E)
    kl_finish(pair, out, rows, state, start, stop, inv_t, BLOCK_V, VEC, start == 0)


@triton.jit
def kl_backward(pair, out, rows, start, inv_t, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """Write the gradients of the tile at column ``start`` from the statistics of rows."""
    about = kl_about(
        rows,
        stat(out, 0, rows, 0.0),
        stat(out, 1, rows, 0.0),
        stat(out, 2, rows, 1.0),
        stat(out, 3, rows, 1.0),
        stat(out, 4, rows, 0.0),
        stat(out, 5, rows, 0.0),
        gradient_factor(out, rows) * inv_t,
    )
    kl_finish_tile(pair, out, rows, about, inv_t, start, out.V, BLOCK_V, VEC)
