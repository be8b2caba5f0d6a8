"""gist_loss for few long rows: each by several programs, whose partial states a second launch merges in the order of the
columns. It writes the statistics, or reads its stretch again and finishes the gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.bidirectional_kl_parts import part_of
from fastgist_kernels.common import LOG2E, cdiv, launch, next_power_of_2
from fastgist_kernels.gist_rows import (
    SCALAR_TYPES,
    gist_finish_columns,
    gist_part_state,
    gist_row_loss,
    gist_stats,
    gradient_flags,
    label_logit,
    loss_arguments,
    merge_gist,
    pair_and_target,
    sizes_of,
    target_rows,
    with_label,
)
from fastgist_kernels.pair_rows import SIZES, finished_factor, rows_config, split_classes, vector_width

__all__ = ["SPECS", "gist_loss_by_parts"]

#: Numbers that a part of a row leaves for the merge.
PARTIAL = 12


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


def gist_loss_by_parts(logits, gist_logits, target, divisor, *rest) -> None:
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
    _, _, *strides = sizes_of(logits, gist_logits, target)
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
