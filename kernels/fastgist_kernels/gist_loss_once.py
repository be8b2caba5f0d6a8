"""gist_loss with its gradients finished at once, of scale / divisor times the sum of the row losses.

The forms are those of bidirectional_kl_once.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.bidirectional_kl_once import part_of
from fastgist_kernels.common import LOG2E, cdiv, launch, next_power_of_2
from fastgist_kernels.gist_rows import (
    SCALAR_TYPES,
    class_weights,
    exp_unit,
    gist_gradients,
    gist_part_state,
    gist_row_loss,
    gist_row_state,
    gradient_flags,
    label_logit,
    loss_arguments,
    merge_gist,
    pair_and_target,
    spread_weights,
    target_rows,
    with_label,
)
from fastgist_kernels.pair_rows import (
    SIZES,
    alone_config,
    centred_pair,
    choose_form,
    exponential,
    finished_factor,
    finite_max,
    load_tile,
    lone_classes,
    over_row,
    row_max,
    row_sum,
    rows_config,
    split_classes,
    store_tile,
    tile_mask,
    twice_config,
    vector_width,
    whole_config,
)

__all__ = ["SPECS", "forward_by_parts", "gist_finish_columns", "gist_loss_fwd_bwd", "gist_stats"]

#: Numbers that a part of a row leaves for the merge.
PARTIAL = 12


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
            over_row(scale * keep, VEC),
            over_row(scale * smooth, VEC),
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


@triton.jit
def gist_whole_rows(
    z_ptr,
    g_ptr,
    target_ptr,
    divisor_ptr,
    row_loss_ptr,
    grad_z_ptr,
    grad_g_ptr,
    offs_m,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    ignore_index,
    alpha,
    beta,
    beta_z,
    beta_g,
    inv_t,
    keep,
    smooth,
    scale,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    ALPHA: tl.constexpr,
    KL_Z: tl.constexpr,
    KL_G: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_G: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Finish rows ``offs_m``, each in one tile (BLOCK_V >= V), and return their losses as they are summed."""
    mask_m = offs_m < M
    counts, invalid, label = target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT)
    z_label = label_logit(z_ptr, offs_m, label, stride_zm, stride_zv)
    g_label = label_logit(g_ptr, offs_m, label, stride_gm, stride_gv)
    mask = tile_mask(counts, 0, V, BLOCK_V, VEC)
    z = load_tile(z_ptr, offs_m, 0, stride_zm, stride_zv, mask, BLOCK_V, VEC, "evict_first").to(tl.float32)
    g = load_tile(g_ptr, offs_m, 0, stride_gm, stride_gv, mask, BLOCK_V, VEC, "evict_first").to(tl.float32)
    m_z = finite_max(row_max(z, VEC))
    m_g = finite_max(row_max(g, VEC))
    zc, gc, d = centred_pair(z, g, over_row(m_z, VEC), over_row(m_g, VEC))
    to_exp2 = inv_t * LOG2E
    p = exponential(zc * to_exp2)
    q = exponential(gc * to_exp2)
    s_p = row_sum(p, VEC)
    s_q = row_sum(q, VEC)
    sum_z = row_sum(exp_unit(zc, p, POWER), VEC)
    sum_g = row_sum(exp_unit(gc, q, POWER), VEC)
    dot_z = tl.zeros([BLOCK_M], tl.float32)
    dot_g, weight = dot_z, dot_z
    if SOFT or SMOOTH:
        weights = spread_weights(
            target_ptr, offs_m, 0, mask, stride_tm, stride_tv, keep, smooth, SOFT, SMOOTH, VEC, BLOCK_V
        )
        dot_z = row_sum(tl.where(weights == 0.0, 0.0, weights * zc), VEC)
        dot_g = row_sum(tl.where(weights == 0.0, 0.0, weights * gc), VEC)
        weight = row_sum(weights, VEC)
    dot_z, dot_g, weight = with_label(dot_z, dot_g, weight, z_label, g_label, m_z, m_g, label, keep, SOFT)
    loss, e_p, e_q = gist_row_loss(
        s_p,
        s_q,
        row_sum(p * d, VEC),
        row_sum(q * d, VEC),
        row_sum(lone_classes(z, g), VEC),
        sum_z,
        sum_g,
        dot_z,
        dot_g,
        weight,
        alpha,
        beta,
        inv_t,
    )
    factor = tl.where(invalid, float("nan"), finished_factor(scale, divisor_ptr, HAS_DIVISOR))
    loss = tl.where(counts, loss * factor, 0.0)
    tl.store(row_loss_ptr + offs_m, loss, mask=mask_m)
    weights = class_weights(
        target_ptr,
        offs_m,
        0,
        mask,
        label,
        stride_tm,
        stride_tv,
        over_row(factor * keep, VEC),
        over_row(factor * smooth, VEC),
        SOFT,
        SMOOTH,
        VEC,
        BLOCK_V,
    )
    grad_z, grad_g = gist_gradients(
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
        factor,
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
    mask = tile_mask(mask_m, 0, V, BLOCK_V, VEC)
    if NEED_Z:
        grad_z = tl.where(over_row(counts, VEC), grad_z, 0.0)
        store_tile(grad_z_ptr, offs_m, 0, V, grad_z, mask, BLOCK_V, VEC)
    if NEED_G:
        grad_g = tl.where(over_row(counts, VEC), grad_g, 0.0)
        store_tile(grad_g_ptr, offs_m, 0, V, grad_g, mask, BLOCK_V, VEC)
    return loss


@triton.jit(do_not_specialize=SIZES)
def _gist_loss_whole_kernel(
    z_ptr,
    g_ptr,
    target_ptr,
    divisor_ptr,
    row_loss_ptr,
    loss_ptr,
    grad_z_ptr,
    grad_g_ptr,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    ignore_index,
    alpha,
    beta,
    beta_z,
    beta_g,
    inv_t,
    keep,
    smooth,
    scale,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    ALPHA: tl.constexpr,
    KL_Z: tl.constexpr,
    KL_G: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_G: tl.constexpr,
    ALONE: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_V >= V. ALONE: the one program takes all rows, and the loss is its own."""
    here = tl.arange(0, BLOCK_M).to(tl.int64)
    if ALONE:
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, M, BLOCK_M):
            total += gist_whole_rows(
                z_ptr,
                g_ptr,
                target_ptr,
                divisor_ptr,
                row_loss_ptr,
                grad_z_ptr,
                grad_g_ptr,
                here + first,
                M,
                V,
                stride_zm,
                stride_zv,
                stride_gm,
                stride_gv,
                stride_tm,
                stride_tv,
                ignore_index,
                alpha,
                beta,
                beta_z,
                beta_g,
                inv_t,
                keep,
                smooth,
                scale,
                SOFT,
                SMOOTH,
                POWER,
                ALPHA,
                KL_Z,
                KL_G,
                HAS_DIVISOR,
                NEED_Z,
                NEED_G,
                VEC,
                BLOCK_M,
                BLOCK_V,
            )
        tl.store(loss_ptr, tl.sum(total, 0))
    else:
        gist_whole_rows(
            z_ptr,
            g_ptr,
            target_ptr,
            divisor_ptr,
            row_loss_ptr,
            grad_z_ptr,
            grad_g_ptr,
            here + tl.program_id(0).to(tl.int64) * BLOCK_M,
            M,
            V,
            stride_zm,
            stride_zv,
            stride_gm,
            stride_gv,
            stride_tm,
            stride_tv,
            ignore_index,
            alpha,
            beta,
            beta_z,
            beta_g,
            inv_t,
            keep,
            smooth,
            scale,
            SOFT,
            SMOOTH,
            POWER,
            ALPHA,
            KL_Z,
            KL_G,
            HAS_DIVISOR,
            NEED_Z,
            NEED_G,
            VEC,
            BLOCK_M,
            BLOCK_V,
        )


@triton.jit(do_not_specialize=SIZES)
def _gist_loss_rows_kernel(
    z_ptr,
    g_ptr,
    target_ptr,
    divisor_ptr,
    row_loss_ptr,
    grad_z_ptr,
    grad_g_ptr,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    ignore_index,
    alpha,
    beta,
    beta_z,
    beta_g,
    inv_t,
    keep,
    smooth,
    scale,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    ALPHA: tl.constexpr,
    KL_Z: tl.constexpr,
    KL_G: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_G: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    counts, invalid, label = target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT)
    m_z, m_g, s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight = gist_row_state(
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
        inv_t * LOG2E,
        keep,
        smooth,
        "evict_last",
        SOFT,
        SMOOTH,
        POWER,
        VEC,
        BLOCK_M,
        BLOCK_V,
    )
    loss, e_p, e_q = gist_row_loss(s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight, alpha, beta, inv_t)
    factor = tl.where(invalid, float("nan"), finished_factor(scale, divisor_ptr, HAS_DIVISOR))
    tl.store(row_loss_ptr + offs_m, tl.where(counts, loss * factor, 0.0), mask=mask_m)
    gist_finish_columns(
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
        factor,
        offs_m,
        mask_m,
        counts,
        0,
        V,
        stride_zm,
        stride_zv,
        stride_gm,
        stride_gv,
        stride_tm,
        stride_tv,
        V,
        alpha,
        beta_z,
        beta_g,
        inv_t,
        keep,
        smooth,
        SOFT,
        SMOOTH,
        POWER,
        ALPHA,
        KL_Z,
        KL_G,
        NEED_Z,
        NEED_G,
        VEC,
        BLOCK_V,
    )


@triton.jit(do_not_specialize=SIZES)
def _gist_loss_split_kernel(
    z_ptr,
    g_ptr,
    target_ptr,
    part_ptr,
    M,
    V,
    stretch,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    ignore_index,
    inv_t,
    keep,
    smooth,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (m, s) leaves the state of stretch s of its rows in part (S, PARTIAL, M)."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    counts, _, _ = target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT)
    start = tl.program_id(1) * stretch
    state = gist_part_state(
        z_ptr,
        g_ptr,
        target_ptr,
        offs_m,
        counts,
        start,
        tl.minimum(start + stretch, V),
        stride_zm,
        stride_zv,
        stride_gm,
        stride_gv,
        stride_tm,
        stride_tv,
        inv_t * LOG2E,
        keep,
        smooth,
        "evict_last",
        SOFT,
        SMOOTH,
        POWER,
        VEC,
        BLOCK_M,
        BLOCK_V,
    )
    place = part_ptr + tl.program_id(1).to(tl.int64) * 12 * M + offs_m
    for i in tl.static_range(12):
        tl.store(place + i * M.to(tl.int64), state[i], mask=mask_m)


@triton.jit(do_not_specialize=SIZES)
def _gist_loss_merge_kernel(
    z_ptr,
    g_ptr,
    target_ptr,
    part_ptr,
    divisor_ptr,
    row_loss_ptr,
    stats_ptr,
    grad_z_ptr,
    grad_g_ptr,
    M,
    V,
    parts,
    stretch,
    stride_zm,
    stride_zv,
    stride_gm,
    stride_gv,
    stride_tm,
    stride_tv,
    ignore_index,
    alpha,
    beta,
    beta_z,
    beta_g,
    inv_t,
    keep,
    smooth,
    scale,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    ALPHA: tl.constexpr,
    KL_Z: tl.constexpr,
    KL_G: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    STATS: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_G: tl.constexpr,
    PARTS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (m, s) merges the parts of its rows and finishes stretch s; the first one writes the loss and, for STATS, the
    statistics in place of gradients."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    counts, invalid, label = target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT)
    z_label = label_logit(z_ptr, offs_m, label, stride_zm, stride_zv)
    g_label = label_logit(g_ptr, offs_m, label, stride_gm, stride_gv)
    m_z, m_g, s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight = merge_gist(
        part_of(part_ptr, 0, float("-inf"), offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 1, float("-inf"), offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 2, 0.0, offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 3, 0.0, offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 4, 0.0, offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 5, 0.0, offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 6, 0.0, offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 7, 0.0, offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 8, 0.0, offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 9, 0.0, offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 10, 0.0, offs_m, M, parts, 12, PARTS),
        part_of(part_ptr, 11, 0.0, offs_m, M, parts, 12, PARTS),
        inv_t * LOG2E,
        SOFT or SMOOTH,
        POWER,
    )
    dot_z, dot_g, weight = with_label(dot_z, dot_g, weight, z_label, g_label, m_z, m_g, label, keep, SOFT)
    loss, e_p, e_q = gist_row_loss(s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight, alpha, beta, inv_t)
    factor = tl.where(invalid, float("nan"), finished_factor(scale, divisor_ptr, HAS_DIVISOR))
    if tl.program_id(1) == 0:
        tl.store(row_loss_ptr + offs_m, tl.where(counts, loss * factor, 0.0), mask=mask_m)
    if STATS:
        gist_stats(stats_ptr, offs_m, M, mask_m, counts, m_z, m_g, s_p, s_q, e_p, e_q, sum_z, sum_g, weight)
    else:
        start = tl.program_id(1) * stretch
        gist_finish_columns(
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
            factor,
            offs_m,
            mask_m,
            counts,
            start,
            tl.minimum(start + stretch, V),
            stride_zm,
            stride_zv,
            stride_gm,
            stride_gv,
            stride_tm,
            stride_tv,
            V,
            alpha,
            beta_z,
            beta_g,
            inv_t,
            keep,
            smooth,
            SOFT,
            SMOOTH,
            POWER,
            ALPHA,
            KL_Z,
            KL_G,
            NEED_Z,
            NEED_G,
            VEC,
            BLOCK_V,
        )


# -- launching -------------------------------------------------------------------------------------------------------


def _sizes(logits, gist_logits, target) -> tuple:
    columns = target.stride(1) if target.dim() == 2 else 0
    return *logits.shape, *logits.stride(), *gist_logits.stride(), target.stride(0), columns


def forward_by_parts(logits, gist_logits, target, divisor, *rest) -> None:
    """Each row by several programs: row_loss (M,) times scale / divisor, and statistics (9, M) or else gradients. ``rest``:
    the options of the loss, scale, row_loss, stats, grad_logits, grad_gist."""
    *options, scale, row_loss, stats, grad_logits, grad_gist = rest
    (rows, classes), device = logits.shape, logits.device
    vec = vector_width(*pair_and_target(logits, gist_logits, target))
    config = rows_config("gist_loss_split", device, classes, vec)
    parts, stretch = split_classes(logits, config["BLOCK_V"])
    part = torch.empty(parts, PARTIAL, rows, dtype=torch.float32, device=device)
    scalars, flags = loss_arguments(target, classes, *options)
    ignore_index, *_, inv_t, keep, smooth = scalars
    _, _, *strides = _sizes(logits, gist_logits, target)
    launch(
        _gist_loss_split_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]), parts),
        config,
        logits,
        gist_logits,
        target,
        part,
        rows,
        classes,
        stretch,
        *strides,
        ignore_index,
        inv_t,
        keep,
        smooth,
        **flags,
        VEC=vec,
    )
    launch(
        _gist_loss_merge_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]), parts if stats is None else 1),
        config,
        logits,
        gist_logits,
        target,
        part,
        divisor,
        row_loss,
        stats,
        grad_logits,
        grad_gist,
        rows,
        classes,
        parts,
        stretch,
        *strides,
        *scalars,
        scale,
        **flags,
        **gradient_flags(*options),
        HAS_DIVISOR=divisor is not None,
        STATS=stats is not None,
        NEED_Z=grad_logits is not None,
        NEED_G=grad_gist is not None,
        PARTS=next_power_of_2(parts),
        VEC=vec,
    )


def gist_loss_fwd_bwd(logits, gist_logits, target, divisor, *rest, form=None) -> None:
    """Write row_loss (M,), times scale / divisor, its sum loss (), both float32, and the gradients (M, V) of it, contiguous,
    that are not None.

    logits (M, V) of any strides; target (M,) int64 or (M, V) float; divisor () float32 or None. ``rest``: alpha, beta,
    beta_logits, beta_gist, temperature, label_smoothing, ignore_index, scale, row_loss, loss, grad_logits, grad_gist.
    ``form``: of :func:`choose_form`.
    """
    *options, scale, row_loss, loss, grad_logits, grad_gist = rest
    rows, classes = logits.shape
    form = form or choose_form(logits)
    if form == "split":
        gradients = row_loss, None, grad_logits, grad_gist
        forward_by_parts(logits, gist_logits, target, divisor, *options, scale, *gradients)
        torch.sum(row_loss, 0, out=loss)
        return
    vec = vector_width(*pair_and_target(logits, gist_logits, target))
    scalars, flags = loss_arguments(target, classes, *options)
    flags |= gradient_flags(*options) | {"HAS_DIVISOR": divisor is not None, "VEC": vec}
    flags |= {"NEED_Z": grad_logits is not None, "NEED_G": grad_gist is not None}
    inputs = logits, gist_logits, target, divisor, row_loss
    rest = grad_logits, grad_gist, *_sizes(logits, gist_logits, target), *scalars, scale
    grid = lambda c: (1 if form == "alone" else cdiv(rows, c["BLOCK_M"]),)  # noqa: E731
    if form == "rows":
        launch(_gist_loss_rows_kernel, grid, twice_config("gist_loss_rows", logits, vec), *inputs, *rest, **flags)
    else:
        alone = form == "alone"
        whole = alone_config(rows, classes) if alone else whole_config("gist_loss_whole", logits.device, rows, classes)
        launch(_gist_loss_whole_kernel, grid, whole, *inputs, loss, *rest, **flags, ALONE=alone)
    if form != "alone":
        torch.sum(row_loss, 0, out=loss)


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    sizes = {"M": "i32", "V": "i32", "stride_zm": "i64", "stride_gm": "i64", "stride_tm": "i64"}
    scalars = SCALAR_TYPES | {"scale": "fp32"}
    unit = {"stride_zv": 1, "stride_gv": 1, "POWER": 3}
    wanted = {"ALPHA": True, "KL_Z": True, "KL_G": True, "HAS_DIVISOR": True, "NEED_Z": True, "NEED_G": True}
    outputs = {"divisor_ptr": "*fp32", "row_loss_ptr": "*fp32"}
    split = {"part_ptr": "*fp32", "stretch": "i32", "parts": "i32"}
    out = []
    for dtype, width, soft in (("bf16", 8, False), ("fp32", 4, False), ("bf16_soft", 8, True)):
        element = dtype.removesuffix("_soft")
        inputs = {"z_ptr": f"*{element}", "g_ptr": f"*{element}", "target_ptr": "*fp32" if soft else "*i64"}
        flags = unit | {"SOFT": soft, "SMOOTH": soft, "stride_tv": 1 if soft else 0}
        grads = {"grad_z_ptr": f"*{element}", "grad_g_ptr": f"*{element}"}
        for label, vec, block_m, block_v, warps, alone in (
            ("alone", 4, 32, 128, 16, True),
            ("alone_ragged", 1, 32, 128, 16, True),
            ("v128", width, 16, 128, 4, False),
            ("v1024", width, 2, 1024, 4, False),
            ("v4096", width, 1, 4096, 8, False),
            ("v4096_ragged", 1, 1, 4096, 8, False),
        ):
            tile = {"ALONE": alone, "VEC": vec, "BLOCK_M": block_m, "BLOCK_V": block_v}
            signature = inputs | outputs | {"loss_ptr": "*fp32"} | grads | sizes | scalars
            out.append(
                Spec(
                    _gist_loss_whole_kernel,
                    f"{dtype}_{label}",
                    signature,
                    flags | wanted | tile,
                    num_warps=warps,
                    num_stages=1,
                    unaligned=SIZES,
                )
            )
        for label, vec, warps in (("few_warps", width, 4), ("many_warps", width, 16), ("ragged", 1, 16)):
            tile = {"VEC": vec, "BLOCK_M": 1, "BLOCK_V": 32 * warps * (vec if vec > 1 else 8)}
            out.append(
                Spec(
                    _gist_loss_rows_kernel,
                    f"{dtype}_{label}",
                    inputs | outputs | grads | sizes | scalars,
                    flags | wanted | tile,
                    num_warps=warps,
                    num_stages=1,
                    unaligned=SIZES,
                )
            )
        tile = {"VEC": width, "BLOCK_M": 1, "BLOCK_V": 128 * width}
        out.append(
            Spec(
                _gist_loss_split_kernel,
                dtype,
                inputs | split | sizes | scalars,
                flags | tile,
                num_stages=1,
                unaligned=SIZES,
                aligned=("stretch",),
            )
        )
        out.append(
            Spec(
                _gist_loss_merge_kernel,
                dtype,
                inputs | split | outputs | {"stats_ptr": "*fp32"} | grads | sizes | scalars,
                flags | wanted | {"STATS": False, "PARTS": 8} | tile,
                num_stages=1,
                unaligned=SIZES,
                aligned=("stretch",),
            )
        )
    return out


SPECS = _specs()
