"""Rows of gist_loss in Triton: which count, their state from one read of both sides, their gradients, and each form of a
launch made of these.

The state is that of the divergence (pair_rows.py) plus, per side, the sum of exp(x - max) at temperature 1 and the weighted
sum of the centred logits: CE = W log S - sum w (x - max). The label's part of that sum is one logit, read by itself; only
label smoothing and soft targets weigh every class. At T = 1, 2, 3 or 4 the exponentials at temperature 1 are powers of those
at temperature T: no second exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastgist_kernels.common import LOG2E
from fastgist_kernels.gelu import exponential
from fastgist_kernels.pair_rows import (
    Rows,
    apart,
    finished_factor,
    gradient_factor,
    lane_sum,
    load_pair,
    merge_pair,
    nearness,
    no_lanes,
    no_state,
    online_pair,
    over_row,
    pair_means,
    part_of,
    row_sum,
    seen_again,
    stat,
    state_of_parts,
    store_gradients,
    store_part,
    store_row_loss,
    store_stat,
    tile_columns,
    tile_mask,
    tile_offsets,
    whole_pair,
)

__all__ = [
    "PARTIAL",
    "Kind",
    "Target",
    "Terms",
    "gist_backward",
    "gist_merge",
    "gist_rows",
    "gist_split",
    "gist_twice",
    "gist_whole",
]

#: Numbers that a part of a row leaves for the merge: its state and its sums.
PARTIAL: tl.constexpr = tl.constexpr(12)


# -- what kernels hand on --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What is computed, a constexpr: soft targets or one-hot ones, with or without label smoothing, T where exp(x) is that
    power of exp(x / T) (else 0), which terms are in the gradients, and whether those take the logits' place."""

    soft: bool
    smooth: bool
    power: int
    alpha: bool
    kl_z: bool
    kl_g: bool
    in_place: bool = False


class Terms(NamedTuple):
    """Weights of the gist token's cross-entropy, and of the divergence in the loss and in each side's gradient; 1 / T."""

    alpha: Any
    beta: Any
    beta_z: Any
    beta_g: Any
    inv_t: Any


class Target(NamedTuple):
    """Classes (M,) of ``classes`` in all, where the columns are those from ``first`` on, or soft targets (M, V). A class
    weighs keep * (one-hot or soft target) + smooth."""

    ptr: Any
    stride_m: Any
    stride_v: Any
    ignore_index: Any
    classes: Any
    first: Any
    keep: Any
    smooth: Any


class Aim(NamedTuple):
    """Of rows: the column of their class (< 0: none here), and whether it is no class at all."""

    label: Any
    invalid: Any


class Sums(NamedTuple):
    """What the cross-entropies need beside the state: sums of exponentials at temperature 1, weighted sums of the centred
    logits, and the sum of those weights."""

    unit_z: Any
    unit_g: Any
    dot_z: Any
    dot_g: Any
    weight: Any


class GistAbout(NamedTuple):
    """What gradients need of a row: share_p, share_q are 1 / S; unit_z, unit_g the weight over the sum at temperature 1."""

    m_z: Any
    m_g: Any
    share_p: Any
    share_q: Any
    e_p: Any
    e_q: Any
    near_p: Any
    near_q: Any
    unit_z: Any
    unit_g: Any
    factor: Any


# -- targets ---------------------------------------------------------------------------------------------------------


@triton.jit
def gist_rows(first, target, M, BLOCK_M: tl.constexpr, KIND: tl.constexpr):
    """BLOCK_M rows from ``first`` (int64) on, and their classes."""
    at = first + tl.arange(0, BLOCK_M)
    there = at < M
    if KIND.soft:
        return Rows(at, there, there), Aim(tl.full(at.shape, -1, tl.int64), there & False)
    else:
        label = tl.load(target.ptr + at * target.stride_m, mask=there, other=0)
        count = there & (label != target.ignore_index)
        possible = (label >= 0) & (label < target.classes)
        label = tl.where(count & possible, label - target.first, -1)
        return Rows(at, there, count), Aim(label, count & (possible == 0))


@triton.jit
def spread_weights(target, rows, start, mask, KIND: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """The weights of a tile's classes but for the label's share; 0 outside ``mask``."""
    if KIND.soft:
        offsets = tile_offsets(rows.at, start, target.stride_m, target.stride_v, BLOCK_V, VEC)
        weights = tl.load(target.ptr + offsets, mask=mask, other=0.0).to(tl.float32) * target.keep
        if KIND.smooth:
            weights += target.smooth
        return tl.where(mask, weights, 0.0)
    else:
        return tl.where(mask & (tile_columns(BLOCK_V, VEC) >= 0), target.smooth, 0.0)


@triton.jit
def class_weights(target, aim, rows, start, mask, KIND: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr):
    """The weights of a tile's classes."""
    if KIND.soft:
        return spread_weights(target, rows, start, mask, KIND, BLOCK_V, VEC)
    else:
        place = tl.maximum(tl.minimum(aim.label - start, BLOCK_V), -1).to(tl.int32)
        weights = tl.where(tile_columns(BLOCK_V, VEC) == over_row(place, VEC), target.keep, 0.0)
        if KIND.smooth:
            weights += target.smooth
        return weights


@triton.jit
def label_logits(pair, aim, rows):
    """Both sides' logits of the rows' classes, float32 [BLOCK_M]; 0 where there is no class."""
    z = pair.z_ptr + rows.at * pair.stride_zm + aim.label * pair.stride_zv
    g = pair.o_ptr + rows.at * pair.stride_om + aim.label * pair.stride_ov
    there = aim.label >= 0
    return tl.load(z, mask=there, other=0.0).to(tl.float32), tl.load(g, mask=there, other=0.0).to(tl.float32)


@triton.jit
def with_label(sums, state, z_label, g_label, aim, keep, KIND: tl.constexpr):
    """The weighted sums with the label's own part, which soft targets do not have."""
    if KIND.soft:
        return sums
    else:
        has = (aim.label >= 0) & (keep != 0.0)
        dot_z = sums.dot_z + tl.where(has, keep * (z_label - state.m_z), 0.0)
        dot_g = sums.dot_g + tl.where(has, keep * (g_label - state.m_o), 0.0)
        return Sums(sums.unit_z, sums.unit_g, dot_z, dot_g, sums.weight + tl.where(has, keep, 0.0))


# -- the row state ---------------------------------------------------------------------------------------------------


@triton.jit
def exp_unit(xc, exp_t, POWER: tl.constexpr):
    """exp(xc) from exp_t = exp(xc / T) where T = POWER; POWER = 0: T is no small integer."""
    if POWER == 1:
        return exp_t
    elif POWER == 2:
        return exp_t * exp_t
    elif POWER == 3:
        return exp_t * exp_t * exp_t
    elif POWER == 4:
        return (exp_t * exp_t) * (exp_t * exp_t)
    else:
        return exponential(xc * LOG2E)


@triton.jit
def risen_sums(sums, rise, KIND: tl.constexpr):
    """The sums about maxima that lie higher."""
    unit_z = exp_unit(tl.minimum(rise.z, 0.0), rise.alpha_p, KIND.power) * sums.unit_z
    unit_g = exp_unit(tl.minimum(rise.o, 0.0), rise.alpha_q, KIND.power) * sums.unit_g
    if KIND.soft or KIND.smooth:
        dot_z = sums.weight * rise.z + sums.dot_z
        dot_g = sums.weight * rise.o + sums.dot_g
        return Sums(unit_z, unit_g, dot_z, dot_g, sums.weight)
    else:
        return Sums(unit_z, unit_g, sums.dot_z, sums.dot_g, sums.weight)


@triton.jit
def merge_gist(state, sums, to_exp2, KIND: tl.constexpr):
    """Lanes, or parts of a row, [BLOCK_M, lanes] -> the state and sums of rows [BLOCK_M] about finite maxima."""
    state, rise = merge_pair(state, to_exp2)
    sums = risen_sums(sums, rise, KIND)
    unit_z, unit_g = tl.sum(sums.unit_z, 1), tl.sum(sums.unit_g, 1)
    if KIND.soft or KIND.smooth:
        return state, Sums(unit_z, unit_g, tl.sum(sums.dot_z, 1), tl.sum(sums.dot_g, 1), tl.sum(sums.weight, 1))
    else:
        zero = tl.zeros_like(unit_z)
        return state, Sums(unit_z, unit_g, zero, zero, zero)


@triton.jit
def gist_lanes(
    pair, rows, target, start, stop, to_exp2, POLICY: tl.constexpr, KIND: tl.constexpr, BLOCK_V: tl.constexpr,
    VEC: tl.constexpr
):  # fmt: skip
    """The merged state and sums of columns ``start`` to ``stop``, each read once, without the label's part; the next tile is
    on its way while one is worked on."""
    state = no_state(rows.at.shape[0], BLOCK_V, VEC)
    zero = no_lanes(0.0, rows.at.shape[0], BLOCK_V, VEC)
    sums = Sums(zero, zero, zero, zero, zero)
    mask = tile_mask(rows.count, start, stop, BLOCK_V, VEC)
    z_next, g_next = load_pair(pair, rows, start, mask, BLOCK_V, VEC, POLICY)
    for at in range(start, stop, BLOCK_V):
        z = z_next.to(tl.float32)
        g = g_next.to(tl.float32)
        here = mask
        mask = tile_mask(rows.count, at + BLOCK_V, stop, BLOCK_V, VEC)
        z_next, g_next = load_pair(pair, rows, at + BLOCK_V, mask, BLOCK_V, VEC, POLICY)
        state, seen, rise = online_pair(state, z, g, to_exp2, VEC)
        sums = risen_sums(sums, rise, KIND)
        unit_z = sums.unit_z + lane_sum(exp_unit(seen.zc, seen.p, KIND.power), VEC)
        unit_g = sums.unit_g + lane_sum(exp_unit(seen.oc, seen.q, KIND.power), VEC)
        if KIND.soft or KIND.smooth:
            weights = spread_weights(target, rows, at, here, KIND, BLOCK_V, VEC)
            dot_z = sums.dot_z + lane_sum(tl.where(weights == 0.0, 0.0, weights * seen.zc), VEC)
            dot_g = sums.dot_g + lane_sum(tl.where(weights == 0.0, 0.0, weights * seen.oc), VEC)
            sums = Sums(unit_z, unit_g, dot_z, dot_g, sums.weight + lane_sum(weights, VEC))
        else:
            sums = Sums(unit_z, unit_g, sums.dot_z, sums.dot_g, sums.weight)
    return merge_gist(state, sums, to_exp2, KIND)


@triton.jit
def gist_row_loss(state, sums, terms):
    """The loss of each row and the means of d under p and q. A term whose factor is 0 is absent, even if not finite."""
    divergence, e_p, e_q = pair_means(state, terms.inv_t)
    ce_z = tl.where(sums.weight == 0.0, 0.0, sums.weight * tl.log(sums.unit_z)) - sums.dot_z
    ce_g = tl.where(sums.weight == 0.0, 0.0, sums.weight * tl.log(sums.unit_g)) - sums.dot_g
    loss = ce_z + tl.where(terms.alpha == 0.0, 0.0, terms.alpha * ce_g)
    return loss + tl.where(terms.beta == 0.0, 0.0, terms.beta * divergence), e_p, e_q


# -- gradients -------------------------------------------------------------------------------------------------------


@triton.jit
def gist_about(rows, m_z, m_g, s_p, s_q, e_p, e_q, unit_z, unit_g, weight, factor):
    """Rows that do not count were read as -inf, so p = q = d = 0: with these numbers 0 their gradients are 0, and no element
    asks whether its row counts."""
    # exp / S, not exp(. - log S): the argument's rounding grows with log S, the quotient's does not.
    return GistAbout(
        m_z,
        m_g,
        tl.where(rows.count, 1.0 / s_p, 0.0),
        tl.where(rows.count, 1.0 / s_q, 0.0),
        tl.where(rows.count, e_p, 0.0),
        tl.where(rows.count, e_q, 0.0),
        nearness(s_p, e_p),
        nearness(s_q, e_q),
        tl.where(rows.count, weight / unit_z, 0.0),
        tl.where(rows.count, weight / unit_g, 0.0),
        tl.where(rows.count, factor, 0.0),
    )


@triton.jit
def gist_gradients(
    out,
    rows,
    seen,
    weights,
    about,
    terms,
    start,
    stop,
    MERGED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
):
    """Write a tile of the gradients asked for. A side takes nothing of a term of weight 0, not even NaN."""
    factor = about.factor
    # The difference first, then what it is times: where a probability is near 1 that keeps a digit.
    grad_z = exp_unit(seen.zc, seen.p, KIND.power) * over_row(about.unit_z, VEC) - weights
    grad_z = grad_z * over_row(factor, VEC)
    grad_g = exp_unit(seen.oc, seen.q, KIND.power) * over_row(about.unit_g, VEC) - weights
    grad_g = grad_g * over_row(factor * terms.alpha, VEC)
    if not KIND.alpha:
        grad_g = tl.zeros_like(grad_g)
    p = seen.p * over_row(about.share_p, VEC)
    q = seen.q * over_row(about.share_q, VEC)
    # As in kl_rows.py: d - e, as the two must cancel, and over T goes p, which may be 0 where d / T is infinite.
    if KIND.kl_z:
        kl_z = (p * terms.inv_t) * apart(seen.d, over_row(about.e_p, VEC), about.near_p, MERGED, VEC) + (p - q)
        grad_z += over_row(factor * (terms.beta_z * terms.inv_t), VEC) * kl_z
    if KIND.kl_g:
        kl_g = (q * terms.inv_t) * apart(over_row(about.e_q, VEC), seen.d, about.near_q, MERGED, VEC) + (q - p)
        grad_g += over_row(factor * (terms.beta_g * terms.inv_t), VEC) * kl_g
    store_gradients(out, rows, start, stop, grad_z, grad_g, BLOCK_V, VEC)


@triton.jit
def gist_finish_tile(
    pair, out, rows, target, aim, about, terms, start, stop, KIND: tl.constexpr, BLOCK_V: tl.constexpr,
    VEC: tl.constexpr
):  # fmt: skip
    """Read a tile once more and write its gradients."""
    mask = tile_mask(rows.count, start, stop, BLOCK_V, VEC)
    z, g = load_pair(pair, rows, start, mask, BLOCK_V, VEC, "evict_first")
    weights = class_weights(target, aim, rows, start, mask, KIND, BLOCK_V, VEC)
    seen = seen_again(z.to(tl.float32), g.to(tl.float32), about.m_z, about.m_g, terms.inv_t * LOG2E, VEC)
    gist_gradients(out, rows, seen, weights, about, terms, start, stop, True, KIND, BLOCK_V, VEC)


@triton.jit
def gist_finish(
    pair, out, rows, target, aim, state, sums, terms, start, stop, LOSS, KIND: tl.constexpr, BLOCK_V: tl.constexpr,
    VEC: tl.constexpr
):  # fmt: skip
    """Of rows whose state is known: the loss, if this program is to write it, the statistics, and the gradients of columns
    ``start`` to ``stop``."""
    loss, e_p, e_q = gist_row_loss(state, sums, terms)
    if LOSS:
        store_row_loss(out, rows, tl.where(aim.invalid, float("nan"), loss * finished_factor(out)))
    if out.stats_ptr is not None:
        store_stat(out, 0, rows, state.m_z)
        store_stat(out, 1, rows, state.m_o)
        store_stat(out, 2, rows, state.s_p)
        store_stat(out, 3, rows, state.s_q)
        store_stat(out, 4, rows, e_p)
        store_stat(out, 5, rows, e_q)
        store_stat(out, 6, rows, sums.unit_z)
        store_stat(out, 7, rows, sums.unit_g)
        store_stat(out, 8, rows, sums.weight)
    if (out.grad_z_ptr is not None) or (out.grad_o_ptr is not None):
        factor = tl.where(aim.invalid, float("nan"), gradient_factor(out, rows))
        if KIND.in_place:
            tl.debug_barrier()  # the label's logits have been read by every thread before one of them overwrites them
        about = gist_about(
            rows, state.m_z, state.m_o, state.s_p, state.s_q, e_p, e_q, sums.unit_z, sums.unit_g, sums.weight, factor
        )
        for at in range(start, stop, BLOCK_V):
            gist_finish_tile(pair, out, rows, target, aim, about, terms, at, stop, KIND, BLOCK_V, VEC)


# -- forms -----------------------------------------------------------------------------------------------------------


@triton.jit
def gist_whole(
    pair, out, rows, target, aim, terms, KIND: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Finish rows, each in one tile (BLOCK_V >= V), and return their losses as they are summed."""
    z_label, g_label = label_logits(pair, aim, rows)
    mask = tile_mask(rows.count, 0, out.V, BLOCK_V, VEC)
    z, g = load_pair(pair, rows, 0, mask, BLOCK_V, VEC, "evict_first")
    state, seen = whole_pair(z.to(tl.float32), g.to(tl.float32), terms.inv_t * LOG2E, VEC)
    unit_z = row_sum(exp_unit(seen.zc, seen.p, KIND.power), VEC)
    unit_g = row_sum(exp_unit(seen.oc, seen.q, KIND.power), VEC)
    zero = tl.zeros_like(unit_z)
    sums = Sums(unit_z, unit_g, zero, zero, zero)
    if KIND.soft or KIND.smooth:
        weights = spread_weights(target, rows, 0, mask, KIND, BLOCK_V, VEC)
        dot_z = row_sum(tl.where(weights == 0.0, 0.0, weights * seen.zc), VEC)
        dot_g = row_sum(tl.where(weights == 0.0, 0.0, weights * seen.oc), VEC)
        sums = Sums(unit_z, unit_g, dot_z, dot_g, row_sum(weights, VEC))
    sums = with_label(sums, state, z_label, g_label, aim, target.keep, KIND)
    loss, e_p, e_q = gist_row_loss(state, sums, terms)
    factor = tl.where(aim.invalid, float("nan"), finished_factor(out))
    store_row_loss(out, rows, loss * factor)
    about = gist_about(
        rows, state.m_z, state.m_o, state.s_p, state.s_q, e_p, e_q, sums.unit_z, sums.unit_g, sums.weight, factor
    )
    weights = class_weights(target, aim, rows, 0, mask, KIND, BLOCK_V, VEC)
    gist_gradients(out, rows, seen, weights, about, terms, 0, out.V, False, KIND, BLOCK_V, VEC)
    return tl.where(rows.count, loss * factor, 0.0)


@triton.jit
def gist_twice(
    pair, out, rows, target, aim, terms, KIND: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Rows of any length: their losses, statistics and, from a second read, gradients."""
    no_gradients: tl.constexpr = (out.grad_z_ptr is None) and (out.grad_o_ptr is None)
    policy: tl.constexpr = "" if no_gradients else "evict_last"
    state, sums = gist_lanes(pair, rows, target, 0, out.V, terms.inv_t * LOG2E, policy, KIND, BLOCK_V, VEC)
    z_label, g_label = label_logits(pair, aim, rows)
    sums = with_label(sums, state, z_label, g_label, aim, target.keep, KIND)
    gist_finish(pair, out, rows, target, aim, state, sums, terms, 0, out.V, True, KIND, BLOCK_V, VEC)


@triton.jit
def gist_split(
    pair, out, rows, target, terms, start, stop, KIND: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Leave the state and sums of columns ``start`` to ``stop`` as this program's part of the rows."""
    to_exp2 = terms.inv_t * LOG2E
    state, sums = gist_lanes(pair, rows, target, start, stop, to_exp2, "evict_last", KIND, BLOCK_V, VEC)
    for i in tl.static_range(7):
        store_part(out, i, rows, state[i], PARTIAL)
    for i in tl.static_range(5):
        store_part(out, 7 + i, rows, sums[i], PARTIAL)


@triton.jit
def gist_merge(
    pair, out, rows, target, aim, terms, parts, start, stop, PARTS: tl.constexpr, KIND: tl.constexpr,
    BLOCK_V: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Merge the parts of rows, in the order of the columns, and finish columns ``start`` to ``stop``; one program of a row
    writes its loss."""
    z_label, g_label = label_logits(pair, aim, rows)
    sums = Sums(
        part_of(out, 7, 0.0, rows, parts, PARTIAL, PARTS),
        part_of(out, 8, 0.0, rows, parts, PARTIAL, PARTS),
        part_of(out, 9, 0.0, rows, parts, PARTIAL, PARTS),
        part_of(out, 10, 0.0, rows, parts, PARTIAL, PARTS),
        part_of(out, 11, 0.0, rows, parts, PARTIAL, PARTS),
    )
    state, sums = merge_gist(state_of_parts(out, rows, parts, PARTIAL, PARTS), sums, terms.inv_t * LOG2E, KIND)
    sums = with_label(sums, state, z_label, g_label, aim, target.keep, KIND)
    gist_finish(pair, out, rows, target, aim, state, sums, terms, start, stop, start == 0, KIND, BLOCK_V, VEC)


@triton.jit
def gist_backward(
    pair, out, rows, target, aim, terms, start, KIND: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    """Write the gradients of the tile at column ``start`` from the statistics of rows."""
    about = gist_about(
        rows,
        stat(out, 0, rows, 0.0),
        stat(out, 1, rows, 0.0),
        stat(out, 2, rows, 1.0),
        stat(out, 3, rows, 1.0),
        stat(out, 4, rows, 0.0),
        stat(out, 5, rows, 0.0),
        stat(out, 6, rows, 1.0),
        stat(out, 7, rows, 1.0),
        stat(out, 8, rows, 0.0),
        tl.where(aim.invalid, float("nan"), gradient_factor(out, rows)),
    )
    gist_finish_tile(pair, out, rows, target, aim, about, terms, start, out.V, KIND, BLOCK_V, VEC)
