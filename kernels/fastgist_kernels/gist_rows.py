"""Rows of gist_loss in Triton: their state from one read of both sides, their loss, and the gradients at a tile.

The state is that of the divergence (pair_rows.py) plus, per side, the sum of exp(x - max) at temperature 1 and the weighted
sum of the centred logits: CE = W log S - sum w (x - max). The label's part of that sum is one logit, read by itself; only
label smoothing and soft targets weigh every class. At T = 1, 2, 3 or 4 the exponentials at temperature 1 are powers of those
at temperature T: no second exp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgist_kernels.common import LOG2E
from fastgist_kernels.pair_rows import (
    centred_pair,
    exponential,
    lane_sum,
    load_tile,
    merge_pair,
    no_lanes,
    online_pair,
    over_row,
    pair_means,
    store_tile,
    tile_columns,
    tile_mask,
    tile_offsets,
)

__all__ = [
    "SCALAR_TYPES",
    "class_weights",
    "exp_unit",
    "gist_finish_columns",
    "gist_gradients",
    "gist_part_state",
    "gist_row_loss",
    "gist_row_state",
    "gist_stats",
    "gradient_flags",
    "label_logit",
    "loss_arguments",
    "merge_gist",
    "pair_and_target",
    "sizes_of",
    "spread_weights",
    "target_rows",
    "with_label",
]


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


# -- targets ---------------------------------------------------------------------------------------------------------


@triton.jit
def target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT: tl.constexpr):
    """Which rows count, which of them hold an impossible class, and the class (-1 where there is none)."""
    if SOFT:
        counts = mask_m
        invalid = mask_m & False
        label = tl.full(offs_m.shape, -1, tl.int64)
    else:
        label = tl.load(target_ptr + offs_m * stride_tm, mask=mask_m, other=0)
        counts = mask_m & (label != ignore_index)
        possible = (label >= 0) & (label < V)
        invalid = counts & (possible == 0)
        label = tl.where(counts & possible, label, -1)
    return counts, invalid, label


@triton.jit
def label_logit(x_ptr, offs_m, label, stride_xm, stride_xv):
    """The label's logit, float32 [BLOCK_M]; 0 where there is no label."""
    x = tl.load(x_ptr + offs_m * stride_xm + label * stride_xv, mask=label >= 0, other=0.0)
    return x.to(tl.float32)


@triton.jit
def spread_weights(
    target_ptr,
    offs_m,
    start,
    mask,
    stride_tm,
    stride_tv,
    keep,
    smooth,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The weights of a tile's classes but for the label's share ``keep``; 0 outside ``mask``."""
    if SOFT:
        offsets = tile_offsets(offs_m, start, stride_tm, stride_tv, BLOCK_V, VEC)
        weights = tl.load(target_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * keep
        if SMOOTH:
            weights += smooth
        return tl.where(mask, weights, 0.0)
    else:
        return tl.where(mask & (tile_columns(BLOCK_V, VEC) >= 0), smooth, 0.0)


@triton.jit
def class_weights(
    target_ptr,
    offs_m,
    start,
    mask,
    label,
    stride_tm,
    stride_tv,
    keep,
    smooth,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The weights of a tile's classes, [BLOCK_M, D1, D2]; arguments as :func:`spread_weights`."""
    if SOFT:
        return spread_weights(
            target_ptr, offs_m, start, mask, stride_tm, stride_tv, keep, smooth, SOFT, SMOOTH, VEC, BLOCK_V
        )
    else:
        place = tl.maximum(tl.minimum(label - start, BLOCK_V), -1).to(tl.int32)
        weights = tl.where(tile_columns(BLOCK_V, VEC) == over_row(place, VEC), keep, 0.0)
        if SMOOTH:
            weights += smooth
        return weights


@triton.jit
def with_label(dot_z, dot_g, weight, z_label, g_label, m_z, m_g, label, keep, SOFT: tl.constexpr):
    """The weighted sums with the label's own part, which soft targets do not have."""
    if not SOFT:
        has = (label >= 0) & (keep != 0.0)
        dot_z += tl.where(has, keep * (z_label - m_z), 0.0)
        dot_g += tl.where(has, keep * (g_label - m_g), 0.0)
        weight += tl.where(has, keep, 0.0)
    return dot_z, dot_g, weight


# -- the row state ---------------------------------------------------------------------------------------------------


@triton.jit
def merge_gist(
    m_z,
    m_g,
    s_p,
    s_q,
    w_p,
    w_q,
    lone,
    sum_z,
    sum_g,
    dot_z,
    dot_g,
    weight,
    to_exp2,
    WEIGHED: tl.constexpr,
    POWER: tl.constexpr,
):
    """Lanes, or parts of a row, [BLOCK_M, lanes] -> the state of rows [BLOCK_M] about finite maxima. Unless
    WEIGHED the weighted sums hold nothing."""
    m_z, m_g, s_p, s_q, w_p, w_q, lone, rise_z, rise_g, alpha_p, alpha_q = merge_pair(
        m_z, m_g, s_p, s_q, w_p, w_q, lone, to_exp2
    )
    sum_z = tl.sum(exp_unit(tl.minimum(rise_z, 0.0), alpha_p, POWER) * sum_z, 1)
    sum_g = tl.sum(exp_unit(tl.minimum(rise_g, 0.0), alpha_q, POWER) * sum_g, 1)
    if WEIGHED:
        dot_z = tl.sum(weight * rise_z + dot_z, 1)
        dot_g = tl.sum(weight * rise_g + dot_g, 1)
        weight = tl.sum(weight, 1)
    else:
        dot_z = tl.zeros_like(m_z)
        dot_g, weight = dot_z, dot_z
    return m_z, m_g, s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight


@triton.jit
def gist_part_state(
    z_ptr,
    g_ptr,
    target_ptr,
    offs_m,
    counts,
    start,
    stop,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    to_exp2,
    keep,
    smooth,
    POLICY: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The merged state of columns ``start`` to ``stop``, each read once, without the label's part."""
    m_z = no_lanes(float("-inf"), BLOCK_M, BLOCK_V, VEC)
    m_g = m_z
    s_p = no_lanes(0.0, BLOCK_M, BLOCK_V, VEC)
    s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight = s_p, s_p, s_p, s_p, s_p, s_p, s_p, s_p, s_p
    mask = tile_mask(counts, start, stop, BLOCK_V, VEC)
    z_next = load_tile(z_ptr, offs_m, start, stride_zm, stride_zv, mask, BLOCK_V, VEC, POLICY)
    g_next = load_tile(g_ptr, offs_m, start, stride_gm, stride_gv, mask, BLOCK_V, VEC, POLICY)
    for at in range(start, stop, BLOCK_V):
        z = z_next.to(tl.float32)
        g = g_next.to(tl.float32)
        here = mask
        mask = tile_mask(counts, at + BLOCK_V, stop, BLOCK_V, VEC)
        z_next = load_tile(z_ptr, offs_m, at + BLOCK_V, stride_zm, stride_zv, mask, BLOCK_V, VEC, POLICY)
        g_next = load_tile(g_ptr, offs_m, at + BLOCK_V, stride_gm, stride_gv, mask, BLOCK_V, VEC, POLICY)
        m_z, m_g, s_p, s_q, w_p, w_q, lone, zc, gc, p, q, rise_z, rise_g, alpha_p, alpha_q = online_pair(
            z, g, m_z, m_g, s_p, s_q, w_p, w_q, lone, to_exp2, VEC
        )
        sum_z = exp_unit(tl.minimum(rise_z, 0.0), alpha_p, POWER) * sum_z + lane_sum(exp_unit(zc, p, POWER), VEC)
        sum_g = exp_unit(tl.minimum(rise_g, 0.0), alpha_q, POWER) * sum_g + lane_sum(exp_unit(gc, q, POWER), VEC)
        if SOFT or SMOOTH:
            weights = spread_weights(
                target_ptr, offs_m, at, here, stride_tm, stride_tv, keep, smooth, SOFT, SMOOTH, VEC, BLOCK_V
            )
            dot_z += weight * rise_z + lane_sum(tl.where(weights == 0.0, 0.0, weights * zc), VEC)
            dot_g += weight * rise_g + lane_sum(tl.where(weights == 0.0, 0.0, weights * gc), VEC)
            weight += lane_sum(weights, VEC)
    return merge_gist(
        m_z, m_g, s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight, to_exp2, SOFT or SMOOTH, POWER
    )


@triton.jit
def gist_row_state(
    z_ptr,
    g_ptr,
    target_ptr,
    offs_m,
    counts,
    label,
    V,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    to_exp2,
    keep,
    smooth,
    POLICY: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Everything the loss and its gradients need of a row, from one read of both sides; the maxima are finite."""
    m_z, m_g, s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight = gist_part_state(
        z_ptr,
        g_ptr,
        target_ptr,
        offs_m,
        counts,
        0,
        V,
        stride_zm,
        stride_zv,
        stride_gm,
        stride_gv,
        stride_tm,
        stride_tv,
        to_exp2,
        keep,
        smooth,
        POLICY,
        SOFT,
        SMOOTH,
        POWER,
        VEC,
        BLOCK_M,
        BLOCK_V,
    )
    z_label = label_logit(z_ptr, offs_m, label, stride_zm, stride_zv)
    g_label = label_logit(g_ptr, offs_m, label, stride_gm, stride_gv)
    dot_z, dot_g, weight = with_label(dot_z, dot_g, weight, z_label, g_label, m_z, m_g, label, keep, SOFT)
    return m_z, m_g, s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight


@triton.jit
def gist_row_loss(s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight, alpha, beta, inv_t):
    """The loss of each row and the means of d under p and q. A term whose factor is 0 is absent, even if not finite."""
    divergence, e_p, e_q = pair_means(s_p, s_q, w_p, w_q, lone, inv_t)
    ce_z = tl.where(weight == 0.0, 0.0, weight * tl.log(sum_z)) - dot_z
    ce_g = tl.where(weight == 0.0, 0.0, weight * tl.log(sum_g)) - dot_g
    loss = ce_z + tl.where(alpha == 0.0, 0.0, alpha * ce_g) + tl.where(beta == 0.0, 0.0, beta * divergence)
    return loss, e_p, e_q


@triton.jit
def gist_gradients(
    zc,
    gc,
    d,
    p,
    q,
    s_p,
    s_q,
    e_p,
    e_q,
    sum_z,
    sum_g,
    weight,
    weights,
    scale,
    alpha,
    beta_z,
    beta_g,
    inv_t,
    POWER: tl.constexpr,
    ALPHA: tl.constexpr,
    KL_Z: tl.constexpr,
    KL_G: tl.constexpr,
    VEC: tl.constexpr,
):
    """Gradients at a tile of ``scale`` [BLOCK_M] times the row losses, from d, the exponentials p and q, and the row state.

    ALPHA, KL_Z, KL_G: whether alpha, beta_z and beta_g, the divergence's weight in each
    side's gradient, are not 0; a side takes nothing of a term of weight 0, not even NaN.
    """
    # The difference first, then what it is times: where a probability is near 1 that keeps a digit.
    grad_z = (exp_unit(zc, p, POWER) * over_row(weight / sum_z, VEC) - weights) * over_row(scale, VEC)
    grad_g = (exp_unit(gc, q, POWER) * over_row(weight / sum_g, VEC) - weights) * over_row(scale * alpha, VEC)
    if not ALPHA:
        grad_g = tl.zeros_like(grad_g)
    # exp / S, not exp(. - log S): the argument's rounding grows with log S, the quotient's does not.
    p = p * over_row(1.0 / s_p, VEC)
    q = q * over_row(1.0 / s_q, VEC)
    # (d - e) / T, not d / T - e / T: a fused multiply-add would round the two apart where they must cancel.
    if KL_Z:
        grad_z += over_row(scale * (beta_z * inv_t), VEC) * (p * ((d - over_row(e_p, VEC)) * inv_t) + (p - q))
    if KL_G:
        grad_g += over_row(scale * (beta_g * inv_t), VEC) * (q * ((over_row(e_q, VEC) - d) * inv_t) + (q - p))
    return grad_z, grad_g


@triton.jit
def gist_stats(stats_ptr, offs_m, M, mask_m, counts, m_z, m_g, s_p, s_q, e_p, e_q, sum_z, sum_g, weight):
    """Leave a row's statistics for a backward, (9, M); 0 in a row that does not count."""
    rows = M.to(tl.int64)
    tl.store(stats_ptr + offs_m, tl.where(counts, m_z, 0.0), mask=mask_m)
    tl.store(stats_ptr + rows + offs_m, tl.where(counts, m_g, 0.0), mask=mask_m)
    tl.store(stats_ptr + 2 * rows + offs_m, tl.where(counts, s_p, 0.0), mask=mask_m)
    tl.store(stats_ptr + 3 * rows + offs_m, tl.where(counts, s_q, 0.0), mask=mask_m)
    tl.store(stats_ptr + 4 * rows + offs_m, tl.where(counts, e_p, 0.0), mask=mask_m)
    tl.store(stats_ptr + 5 * rows + offs_m, tl.where(counts, e_q, 0.0), mask=mask_m)
    tl.store(stats_ptr + 6 * rows + offs_m, tl.where(counts, sum_z, 0.0), mask=mask_m)
    tl.store(stats_ptr + 7 * rows + offs_m, tl.where(counts, sum_g, 0.0), mask=mask_m)
    tl.store(stats_ptr + 8 * rows + offs_m, tl.where(counts, weight, 0.0), mask=mask_m)


@triton.jit
def gist_finish_columns(
    z_ptr,
    g_ptr,
    target_ptr,
    grad_z_ptr,
    grad_g_ptr,
    m_z,
    m_g,
    s_p,
    s_q,
    e_p,
    e_q,
    sum_z,
    sum_g,
    weight,
    label,
    scale,
    offs_m,
    mask_m,
    counts,
    start,
    stop,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    stride_grad_m,
    alpha,
    beta_z,
    beta_g,
    inv_t,
    keep,
    smooth,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    ALPHA: tl.constexpr,
    KL_Z: tl.constexpr,
    KL_G: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_G: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Read columns ``start`` to ``stop`` (once more) and write the gradients of scale [BLOCK_M] times the row losses, into
    rows stride_grad_m apart."""
    to_exp2 = inv_t * LOG2E
    for at in range(start, stop, BLOCK_V):
        mask = tile_mask(counts, at, stop, BLOCK_V, VEC)
        z = load_tile(z_ptr, offs_m, at, stride_zm, stride_zv, mask, BLOCK_V, VEC, "evict_first").to(tl.float32)
        g = load_tile(g_ptr, offs_m, at, stride_gm, stride_gv, mask, BLOCK_V, VEC, "evict_first").to(tl.float32)
        weights = class_weights(
            target_ptr,
            offs_m,
            at,
            mask,
            label,
            stride_tm,
            stride_tv,
            keep,
            smooth,
            SOFT,
            SMOOTH,
            VEC,
            BLOCK_V,
        )
        zc, gc, d = centred_pair(z, g, over_row(m_z, VEC), over_row(m_g, VEC))
        grad_z, grad_g = gist_gradients(
            zc,
            gc,
            d,
            exponential(zc * to_exp2),
            exponential(gc * to_exp2),
            s_p,
            s_q,
            e_p,
            e_q,
            sum_z,
            sum_g,
            weight,
            weights,
            scale,
            alpha,
            beta_z,
            beta_g,
            inv_t,
            POWER,
            ALPHA,
            KL_Z,
            KL_G,
            VEC,
        )
        mask = tile_mask(mask_m, at, stop, BLOCK_V, VEC)
        if NEED_Z:
            grad_z = tl.where(over_row(counts, VEC), grad_z, 0.0)
            store_tile(grad_z_ptr, offs_m, at, stride_grad_m, grad_z, mask, BLOCK_V, VEC)
        if NEED_G:
            grad_g = tl.where(over_row(counts, VEC), grad_g, 0.0)
            store_tile(grad_g_ptr, offs_m, at, stride_grad_m, grad_g, mask, BLOCK_V, VEC)


# -- host ------------------------------------------------------------------------------------------------------------


def loss_arguments(
    target, classes, alpha, beta, beta_logits, beta_gist, temperature, label_smoothing, ignore_index
) -> tuple[tuple, dict]:
    """The scalars (in kernel order) and the constexprs that every kernel of this loss takes."""
    smoothing = 1.0 - label_smoothing, label_smoothing / classes
    scalars = (ignore_index, alpha, beta, beta_logits, beta_gist, 1.0 / temperature, *smoothing)
    power = int(temperature) if temperature in (1.0, 2.0, 3.0, 4.0) else 0
    return scalars, {"SOFT": target.dim() == 2, "SMOOTH": label_smoothing != 0.0, "POWER": power}


def gradient_flags(alpha: float, beta: float, beta_logits: float, beta_gist: float, *_) -> dict[str, bool]:
    """Which terms there are in the gradients, from the first of the loss's options."""
    return {"ALPHA": alpha != 0.0, "KL_Z": beta_logits != 0.0, "KL_G": beta_gist != 0.0}


def pair_and_target(logits, gist_logits, target) -> tuple:
    """The tensors that a tile is read from: what :func:`vector_width` asks about."""
    return (logits, gist_logits, target) if target.dim() == 2 else (logits, gist_logits)


def sizes_of(logits, gist_logits, target) -> tuple:
    """M, V and the strides, in kernel order."""
    columns = target.stride(1) if target.dim() == 2 else 0
    return *logits.shape, *logits.stride(), *gist_logits.stride(), target.stride(0), columns


SCALAR_TYPES = {"ignore_index": "i32"} | dict.fromkeys(
    ("alpha", "beta", "beta_z", "beta_g", "inv_t", "keep", "smooth"), "fp32"
)
