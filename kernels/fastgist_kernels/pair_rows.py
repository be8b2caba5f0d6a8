"""Rows of two logits tensors in Triton, for the losses on them: how a tile lies on the threads, and the row state.

A tile is BLOCK_M rows of BLOCK_V columns, laid out so that what one thread holds of a row lies along one axis. Where rows
begin and end on whole accesses of VEC elements it is [BLOCK_M, lanes, VEC]; else [DEEP, BLOCK_M, lanes], and neighbouring
threads take neighbouring columns. Sums and maxima along that axis are a thread's own, so a row state is kept for each thread
("lane", [BLOCK_M, lanes]) without a word to its neighbours until the row has ended.

Inside a kernel its arguments and what is known of a row travel as named tuples, which cost nothing: the compiler takes
them apart.

The state of bidirectional_kl: the maxima m, the sums S of the exponentials about them, and the weighted sums
W = sum exp((z - m) / T) d with d = (z - m_z) - (o - m_o). Where the maxima rise by (a, b), d shrinks by a - b, so
(S, W) -> (alpha S, alpha (W - (a - b) S)): so a lane takes its next columns, and so lanes, and parts of a row, are merged.
The state is exact about its maxima, and an offset between the heads never enters the arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastgist_kernels.gelu import exponential
from fastgist_kernels.outer import narrow

__all__ = [
    "Out",
    "Pair",
    "Risen",
    "Rows",
    "Seen",
    "State",
    "apart",
    "finished_factor",
    "gradient_factor",
    "lane_sum",
    "load_pair",
    "merge_pair",
    "nearness",
    "no_lanes",
    "no_state",
    "online_pair",
    "over_row",
    "pair_means",
    "part_of",
    "row_sum",
    "seen_again",
    "stat",
    "state_of_parts",
    "store_gradients",
    "store_part",
    "store_row_loss",
    "store_stat",
    "tile_columns",
    "tile_mask",
    "tile_offsets",
    "whole_pair",
]

# -- what kernels hand on --------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two logits tensors (M, V) of any strides: z and the other one."""

    z_ptr: Any
    stride_zm: Any
    stride_zv: Any
    o_ptr: Any
    stride_om: Any
    stride_ov: Any


class Out(NamedTuple):
    """What a launch writes of M rows of V classes, None where that is not wanted: row losses (M,), statistics (n, M), states
    of parts (parts, n, M), gradients (M, V) whose rows are stride_m apart. Row losses and gradients are times scale, over the
    number at divisor_ptr if there is one; or gradients are times the numbers at row_grad_ptr."""

    row_loss_ptr: Any
    stats_ptr: Any
    part_ptr: Any
    grad_z_ptr: Any
    grad_o_ptr: Any
    stride_m: Any
    M: Any
    V: Any
    scale: Any
    divisor_ptr: Any
    row_grad_ptr: Any
    stride_row_grad: Any


class Rows(NamedTuple):
    """A program's rows [BLOCK_M]: which (int64), which of them there are, and which of those count."""

    at: Any
    there: Any
    count: Any


class State(NamedTuple):
    """The state of the divergence, of lanes [BLOCK_M, lanes] or of rows [BLOCK_M]. ``lone`` counts the classes that are -inf
    on one side only."""

    m_z: Any
    m_o: Any
    s_p: Any
    s_q: Any
    w_p: Any
    w_q: Any
    lone: Any


class Risen(NamedTuple):
    """How far the maxima of a state rose (old - new, <= 0) and the factors for its sums, for a caller that keeps more."""

    z: Any
    o: Any
    alpha_p: Any
    alpha_q: Any


class Seen(NamedTuple):
    """A tile of both sides about the maxima, their difference and their exponentials."""

    zc: Any
    oc: Any
    d: Any
    p: Any
    q: Any


# -- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def tile_columns(BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """int32 [1, lanes, VEC] or [DEEP, 1, lanes]: the columns of a tile, from 0."""
    if VEC > 1:
        return tl.arange(0, BLOCK_V // VEC)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    else:
        DEEP: tl.constexpr = 8 if BLOCK_V >= 256 else (BLOCK_V + 31) // 32
        return tl.arange(0, DEEP)[:, None, None] * (BLOCK_V // DEEP) + tl.arange(0, BLOCK_V // DEEP)[None, None, :]


@triton.jit
def over_row(x, VEC: tl.constexpr):
    """[BLOCK_M] beside a tile."""
    if VEC > 1:
        return x[:, None, None]
    else:
        return x[None, :, None]


@triton.jit
def tile_mask(rows, start, stop, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """Which elements of the tile at ``start`` are before column ``stop`` in rows [BLOCK_M] that count; whole vectors are or
    are not, which [BLOCK_M, lanes, 1] says."""
    left = tl.minimum(stop - start, BLOCK_V).to(tl.int32)
    if VEC > 1:
        columns = tl.arange(0, BLOCK_V // VEC)[None, :, None] * VEC
    else:
        columns = tile_columns(BLOCK_V, VEC)
    return over_row(rows, VEC) & (columns < left)


@triton.jit
def tile_offsets(offs_m, start, stride_m, stride_v, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """int64 offsets of the tile at column ``start`` of rows ``offs_m`` (int64)."""
    rows = offs_m * stride_m
    if VEC > 1:
        rows = tl.multiple_of(rows, VEC)
    return over_row(rows, VEC) + (start + tile_columns(BLOCK_V, VEC).to(tl.int64)) * stride_v


@triton.jit
def load_tile(
    ptr, offs_m, start, stride_m, stride_v, mask, BLOCK_V: tl.constexpr, VEC: tl.constexpr, POLICY: tl.constexpr
):
    """A tile as it is stored; -inf outside ``mask``, where nothing is read."""
    offsets = tile_offsets(offs_m, start, stride_m, stride_v, BLOCK_V, VEC)
    return tl.load(ptr + offsets, mask=mask, other=float("-inf"), eviction_policy=POLICY)


@triton.jit
def load_pair(pair, rows, start, mask, BLOCK_V: tl.constexpr, VEC: tl.constexpr, POLICY: tl.constexpr):
    """A tile of both sides."""
    z = load_tile(pair.z_ptr, rows.at, start, pair.stride_zm, pair.stride_zv, mask, BLOCK_V, VEC, POLICY)
    o = load_tile(pair.o_ptr, rows.at, start, pair.stride_om, pair.stride_ov, mask, BLOCK_V, VEC, POLICY)
    return z, o


@triton.jit
def store_tile(ptr, offs_m, start, stride_m, values, mask, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """``values`` into rows of adjacent columns; nobody reads them soon."""
    offsets = tile_offsets(offs_m, start, stride_m, 1, BLOCK_V, VEC)
    tl.store(ptr + offsets, narrow(values, ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def lane_sum(x, VEC: tl.constexpr):
    """Tile -> [BLOCK_M, lanes]: each thread's own."""
    if VEC > 1:
        return tl.sum(x, 2)
    else:
        return tl.sum(x, 0)


@triton.jit
def lane_max(x, VEC: tl.constexpr):
    if VEC > 1:
        return tl.max(x, 2)
    else:
        return tl.max(x, 0)


@triton.jit
def over_lanes(x, VEC: tl.constexpr):
    """[BLOCK_M, lanes] beside a tile."""
    if VEC > 1:
        return x[:, :, None]
    else:
        return x[None, :, :]


@triton.jit
def row_sum(x, VEC: tl.constexpr):
    """Tile -> [BLOCK_M]."""
    return tl.sum(lane_sum(x, VEC), 1)


@triton.jit
def row_max(x, VEC: tl.constexpr):
    return tl.max(lane_max(x, VEC), 1)


@triton.jit
def no_lanes(fill, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """float32 [BLOCK_M, lanes] of ``fill``."""
    if VEC > 1:
        return tl.full([BLOCK_M, BLOCK_V // VEC], fill, tl.float32)
    else:
        DEEP: tl.constexpr = 8 if BLOCK_V >= 256 else (BLOCK_V + 31) // 32
        return tl.full([BLOCK_M, BLOCK_V // DEEP], fill, tl.float32)


# -- the state of the divergence -------------------------------------------------------------------------------------


@triton.jit
def finite_max(m):
    """The maximum to centre on: 0 while a row has shown nothing but -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def centred_pair(z, o, m_z, m_o):
    """z - m_z, o - m_o and their difference d; d is 0 where a class is absent (-inf) on either side."""
    zc = z - m_z
    oc = o - m_o
    absent = (z == float("-inf")) | (o == float("-inf"))
    d = tl.where(absent, 0.0, zc - oc)
    return zc, oc, d


@triton.jit
def lone_classes(z, o):
    """1.0 where a class is -inf on one side only."""
    return tl.where((z == float("-inf")) != (o == float("-inf")), 1.0, 0.0)


@triton.jit
def no_state(BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """Lanes that have seen nothing."""
    least = no_lanes(float("-inf"), BLOCK_M, BLOCK_V, VEC)
    zero = no_lanes(0.0, BLOCK_M, BLOCK_V, VEC)
    return State(least, least, zero, zero, zero, zero, zero)


@triton.jit
def risen(state, m_z, m_o, old_z, old_o, to_exp2):
    """The state about maxima that lie higher, and by how much: old and new ones are finite."""
    rise_z = old_z - finite_max(m_z)
    rise_o = old_o - finite_max(m_o)
    # Before the first finite logit the sums are 0 and old = 0 stands for -inf: cap the factor so that 0 stays 0.
    alpha_p = exponential(tl.minimum(rise_z, 0.0) * to_exp2)
    alpha_q = exponential(tl.minimum(rise_o, 0.0) * to_exp2)
    # The factor first: shift may be as large as a float32, where a lane has shown nothing but masked classes.
    shift = rise_z - rise_o
    w_p = alpha_p * state.w_p + (alpha_p * shift) * state.s_p
    w_q = alpha_q * state.w_q + (alpha_q * shift) * state.s_q
    state = State(m_z, m_o, alpha_p * state.s_p, alpha_q * state.s_q, w_p, w_q, state.lone)
    return state, Risen(rise_z, rise_o, alpha_p, alpha_q)


@triton.jit
def online_pair(state, z, o, to_exp2, VEC: tl.constexpr):
    """Take a tile of both sides (float32) into the lanes' state. Padding comes in as -inf on both sides."""
    old_z = finite_max(state.m_z)
    old_o = finite_max(state.m_o)
    m_z = tl.maximum(state.m_z, lane_max(z, VEC))
    m_o = tl.maximum(state.m_o, lane_max(o, VEC))
    zc, oc, d = centred_pair(z, o, over_lanes(finite_max(m_z), VEC), over_lanes(finite_max(m_o), VEC))
    p = exponential(zc * to_exp2)
    q = exponential(oc * to_exp2)
    state, rise = risen(state, m_z, m_o, old_z, old_o, to_exp2)
    w_p = state.w_p + lane_sum(p * d, VEC)
    w_q = state.w_q + lane_sum(q * d, VEC)
    s_p = state.s_p + lane_sum(p, VEC)
    s_q = state.s_q + lane_sum(q, VEC)
    lone = state.lone + lane_sum(lone_classes(z, o), VEC)
    return State(m_z, m_o, s_p, s_q, w_p, w_q, lone), Seen(zc, oc, d, p, q), rise


@triton.jit
def merge_pair(lanes, to_exp2):
    """Lanes, or parts of a row, [BLOCK_M, lanes] -> the state of rows [BLOCK_M] about finite maxima; and how far each
    lane's maxima rose."""
    m_z = finite_max(tl.max(lanes.m_z, 1))
    m_o = finite_max(tl.max(lanes.m_o, 1))
    old_z = finite_max(lanes.m_z)
    old_o = finite_max(lanes.m_o)
    lanes, rise = risen(lanes, m_z[:, None], m_o[:, None], old_z, old_o, to_exp2)
    s_p, s_q = tl.sum(lanes.s_p, 1), tl.sum(lanes.s_q, 1)
    w_p, w_q = tl.sum(lanes.w_p, 1), tl.sum(lanes.w_q, 1)
    return State(m_z, m_o, s_p, s_q, w_p, w_q, tl.sum(lanes.lone, 1)), rise


@triton.jit
def whole_pair(z, o, to_exp2, VEC: tl.constexpr):
    """The state of rows that one tile (float32) holds, about finite maxima, and the tile about them."""
    m_z = finite_max(row_max(z, VEC))
    m_o = finite_max(row_max(o, VEC))
    zc, oc, d = centred_pair(z, o, over_row(m_z, VEC), over_row(m_o, VEC))
    p = exponential(zc * to_exp2)
    q = exponential(oc * to_exp2)
    s_p = row_sum(p, VEC)
    s_q = row_sum(q, VEC)
    lone = row_sum(lone_classes(z, o), VEC)
    return State(m_z, m_o, s_p, s_q, row_sum(p * d, VEC), row_sum(q * d, VEC), lone), Seen(zc, oc, d, p, q)


@triton.jit
def seen_again(z, o, m_z, m_o, to_exp2, VEC: tl.constexpr):
    """A tile (float32) for its gradients. d is screened on one side only: where a class is -inf on one side alone the means
    of d are NaN and take the row's gradients with them, whatever d is."""
    zc = z - over_row(m_z, VEC)
    oc = o - over_row(m_o, VEC)
    d = tl.where(z == float("-inf"), 0.0, zc - oc)
    return Seen(zc, oc, d, exponential(zc * to_exp2), exponential(oc * to_exp2))


@triton.jit
def pair_means(state, inv_t):
    """The divergence of each row and the means of d under p and q, NaN where a class is -inf on one side alone: there the
    divergence is +inf."""
    e_p = state.w_p / state.s_p
    e_q = state.w_q / state.s_q
    divergence = (e_p - e_q) * inv_t
    lone = state.lone > 0
    divergence = tl.where(lone & (divergence == divergence), float("inf"), divergence)
    return divergence, tl.where(lone, float("nan"), e_p), tl.where(lone, float("nan"), e_q)


@triton.jit
def nearness(s, e):
    """How near a mean of d [BLOCK_M] a d is taken for the mean itself: within the rounding of a state that was moved to other
    maxima, where one class has all of its row's mass (S = 1); nowhere else.

    That class's d less the mean is 0, but the mean comes out rounded otherwise than d, by as much as d is large. (Not 0
    wherever p = 1: classes too small to show in S may have a d that shows in the mean.) Others so near have p < 2^-24.
    """
    return tl.where(s == 1.0, tl.abs(e) * 2.0**-21, 0.0)


@triton.jit
def apart(x, y, near, MERGED: tl.constexpr, VEC: tl.constexpr):
    """x - y of a tile's d and the means of its rows. ``near``: :func:`nearness`. Not MERGED: each row's state was formed about
    its own maxima, and the difference is 0 where it should be."""
    difference = x - y
    if MERGED:
        # A factor, not a choice: with that, Triton 3.6 spills a register where sixteen warps share a row on sm_80.
        difference *= tl.where(tl.abs(difference) <= over_row(near, VEC), 0.0, 1.0)
    return difference


@triton.jit
def finished_factor(out):
    """What row losses, and gradients finished with them, are times."""
    if out.divisor_ptr is not None:
        return tl.div_rn(out.scale, tl.load(out.divisor_ptr))
    else:
        return out.scale


@triton.jit
def gradient_factor(out, rows):
    """What gradients are times."""
    if out.row_grad_ptr is not None:
        return tl.load(out.row_grad_ptr + rows.at * out.stride_row_grad, mask=rows.there, other=0.0)
    else:
        return finished_factor(out)


@triton.jit
def store_row_loss(out, rows, loss):
    """0 in a row that does not count."""
    tl.store(out.row_loss_ptr + rows.at, tl.where(rows.count, loss, 0.0), mask=rows.there)


@triton.jit
def store_gradients(out, rows, start, stop, grad_z, grad_o, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """A tile of the gradients that are wanted, before column ``stop``."""
    mask = tile_mask(rows.there, start, stop, BLOCK_V, VEC)
    if out.grad_z_ptr is not None:
        store_tile(out.grad_z_ptr, rows.at, start, out.stride_m, grad_z, mask, BLOCK_V, VEC)
    if out.grad_o_ptr is not None:
        store_tile(out.grad_o_ptr, rows.at, start, out.stride_m, grad_o, mask, BLOCK_V, VEC)


# -- numbers of rows in memory ---------------------------------------------------------------------------------------


@triton.jit
def stat(out, i: tl.constexpr, rows, empty):
    """Statistic ``i`` of rows; ``empty`` past the last."""
    return tl.load(out.stats_ptr + i * out.M.to(tl.int64) + rows.at, mask=rows.there, other=empty)


@triton.jit
def store_stat(out, i: tl.constexpr, rows, x):
    """Leave statistic ``i`` for a backward; 0 in a row that does not count."""
    place = out.stats_ptr + i * out.M.to(tl.int64) + rows.at
    tl.store(place, tl.where(rows.count, x, 0.0), mask=rows.there)


@triton.jit
def store_part(out, i: tl.constexpr, rows, x, NUMBERS: tl.constexpr):
    """Leave number ``i`` of NUMBERS of this program's part of its rows."""
    place = out.part_ptr + (tl.program_id(1).to(tl.int64) * NUMBERS + i) * out.M + rows.at
    tl.store(place, x, mask=rows.there)


@triton.jit
def part_of(out, i: tl.constexpr, empty, rows, parts, NUMBERS: tl.constexpr, PARTS: tl.constexpr):
    """Number ``i`` of every part of the rows, [BLOCK_M, PARTS]; ``empty`` where there is no part."""
    part = tl.arange(0, PARTS).to(tl.int64)[None, :]
    place = out.part_ptr + (part * NUMBERS + i) * out.M + rows.at[:, None]
    return tl.load(place, mask=rows.there[:, None] & (part < parts), other=empty)


@triton.jit
def state_of_parts(out, rows, parts, NUMBERS: tl.constexpr, PARTS: tl.constexpr):
    """The first numbers of every part, which are its state of the divergence."""
    return State(
        part_of(out, 0, float("-inf"), rows, parts, NUMBERS, PARTS),
        part_of(out, 1, float("-inf"), rows, parts, NUMBERS, PARTS),
        part_of(out, 2, 0.0, rows, parts, NUMBERS, PARTS),
        part_of(out, 3, 0.0, rows, parts, NUMBERS, PARTS),
        part_of(out, 4, 0.0, rows, parts, NUMBERS, PARTS),
        part_of(out, 5, 0.0, rows, parts, NUMBERS, PARTS),
        part_of(out, 6, 0.0, rows, parts, NUMBERS, PARTS),
    )
