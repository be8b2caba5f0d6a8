"""gist_linear_loss in Triton: what happens to one chunk of logits between its two matrix products.

The chunk holds both heads' logits, [2 m, V]: rows i and m + i are a pair. One launch reads them, writes the row losses,
reads them again (from L2 where the pair fits) and leaves the gradients in their place. With the statistics that it may leave
of its rows, another one turns a block of some classes' logits into their gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import LOG2E, cdiv, launch
from fastgist_kernels.gist_rows import (
    SCALAR_TYPES,
    gist_finish_columns,
    gist_row_loss,
    gist_row_state,
    gist_stats,
    gradient_flags,
    loss_arguments,
    target_rows,
)
from fastgist_kernels.pair_rows import SIZES, rows_config, vector_width

__all__ = ["SPECS", "gist_linear_loss_chunk"]


@triton.jit(do_not_specialize=SIZES)
def _gist_linear_loss_chunk_kernel(
    logits_ptr,
    target_ptr,
    scale_ptr,
    loss_ptr,
    stats_ptr,
    M,
    V,
    stride_lm,
    stride_tm,
    stride_tv,
    stride_scale,
    ignore_index,
    alpha,
    beta,
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
    NEED_GRAD: tl.constexpr,
    STATS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    gist_ptr = logits_ptr + M.to(tl.int64) * stride_lm
    counts, invalid, label = target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT)
    m_z, m_g, s_p, s_q, w_p, w_q, lone, sum_z, sum_g, dot_z, dot_g, weight = gist_row_state(
        logits_ptr,
        gist_ptr,
        target_ptr,
        offs_m,
        counts,
        label,
        V,
        stride_lm,
        1,
        stride_lm,
        1,
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
    loss = tl.where(invalid, float("nan"), loss)
    tl.store(loss_ptr + offs_m, tl.where(counts, loss, 0.0), mask=mask_m)
    if STATS:
        gist_stats(stats_ptr, offs_m, M, mask_m, counts, m_z, m_g, s_p, s_q, e_p, e_q, sum_z, sum_g, weight)
    if NEED_GRAD:
        tl.debug_barrier()  # the label's logits have been read by every thread before one of them overwrites them
        scale = tl.load(scale_ptr + offs_m * stride_scale, mask=mask_m, other=0.0)
        gist_finish_columns(
            logits_ptr,
            gist_ptr,
            target_ptr,
            logits_ptr,
            gist_ptr,
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
            tl.where(invalid, float("nan"), scale),
            offs_m,
            mask_m,
            counts,
            0,
            V,
            stride_lm,
            1,
            stride_lm,
            1,
            stride_tm,
            stride_tv,
            stride_lm,
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
            True,
            True,
            VEC,
            BLOCK_V,
        )


@triton.jit(do_not_specialize=(*SIZES, "N", "first"))
def _gist_linear_loss_classes_kernel(
    logits_ptr,
    target_ptr,
    scale_ptr,
    stats_ptr,
    M,
    N,
    V,
    first,
    stride_lm,
    stride_tm,
    stride_tv,
    stride_scale,
    ignore_index,
    alpha,
    beta,
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
    NEED_G: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Classes ``first`` to ``first + N`` of V. Soft targets are those of the block."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = M.to(tl.int64)
    counts, invalid, label = target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT)
    m_z = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
    m_g = tl.load(stats_ptr + rows + offs_m, mask=mask_m, other=0.0)
    s_p = tl.load(stats_ptr + 2 * rows + offs_m, mask=mask_m, other=1.0)
    s_q = tl.load(stats_ptr + 3 * rows + offs_m, mask=mask_m, other=1.0)
    e_p = tl.load(stats_ptr + 4 * rows + offs_m, mask=mask_m, other=0.0)
    e_q = tl.load(stats_ptr + 5 * rows + offs_m, mask=mask_m, other=0.0)
    sum_z = tl.load(stats_ptr + 6 * rows + offs_m, mask=mask_m, other=1.0)
    sum_g = tl.load(stats_ptr + 7 * rows + offs_m, mask=mask_m, other=1.0)
    weight = tl.load(stats_ptr + 8 * rows + offs_m, mask=mask_m, other=0.0)
    scale = tl.load(scale_ptr + offs_m * stride_scale, mask=mask_m, other=0.0)
    gist_ptr = logits_ptr + rows * stride_lm
    start = tl.program_id(1) * BLOCK_V
    gist_finish_columns(
        logits_ptr,
        gist_ptr,
        target_ptr,
        logits_ptr,
        gist_ptr,
        m_z,
        m_g,
        s_p,
        s_q,
        e_p,
        e_q,
        sum_z,
        sum_g,
        weight,
        label - first,
        tl.where(invalid, float("nan"), scale),
        offs_m,
        mask_m,
        counts,
        start,
        tl.minimum(start + BLOCK_V, N),
        stride_lm,
        1,
        stride_lm,
        1,
        stride_tm,
        stride_tv,
        stride_lm,
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
        True,
        NEED_G,
        VEC,
        BLOCK_V,
    )


def gist_linear_loss_chunk(
    logits,
    target,
    scale,
    alpha,
    beta,
    beta_logits,
    beta_gist,
    temperature,
    label_smoothing,
    ignore_index,
    row_loss,
    need_grad,
    stats=None,
) -> None:
    """Write row_loss (m,) float32 and, if ``need_grad``, put the gradients, times scale (m,), in place of the logits
    (2 m, V), whose rows may be padded but whose columns are adjacent. ``stats`` (9, m) float32, contiguous: the place of
    the rows' statistics, if somebody wants them."""
    pairs, classes = row_loss.shape[0], logits.shape[1]
    vec = vector_width(logits, target) if target.dim() == 2 else vector_width(logits)
    # Two passes over packed rows keep much alive: with eight elements a thread some tiles spill.
    config = rows_config("gist_linear_loss_chunk", logits.device, classes, vec, packed=4)
    scalars, flags = loss_arguments(
        target, classes, alpha, beta, beta_logits, beta_gist, temperature, label_smoothing, ignore_index
    )
    launch(
        _gist_linear_loss_chunk_kernel,
        lambda c: (cdiv(pairs, c["BLOCK_M"]),),
        config,
        logits,
        target,
        scale,
        row_loss,
        row_loss if stats is None else stats,
        pairs,
        classes,
        logits.stride(0),
        target.stride(0),
        target.stride(1) if target.dim() == 2 else 0,
        scale.stride(0),
        *scalars,
        **flags,
        **gradient_flags(alpha, beta, beta_logits, beta_gist),
        NEED_GRAD=need_grad,
        STATS=stats is not None,
        VEC=vec,
    )


def gist_linear_loss_classes(
    logits,
    target,
    scale,
    stats,
    first,
    classes,
    alpha,
    beta,
    beta_logits,
    beta_gist,
    temperature,
    label_smoothing,
    ignore_index,
    need_gist,
) -> None:
    """Put the gradients, times scale (m,), in place of the logits (2 m, n) of the classes from ``first`` on, of ``classes`` in
    all, from the statistics (9, m) of whole rows; the gist token's half is left as it is unless ``need_gist``. Soft
    targets (m, n) are those of the block."""
    pairs, width = scale.shape[0], logits.shape[1]
    vec = vector_width(logits, target) if target.dim() == 2 else vector_width(logits)
    config = rows_config("gist_linear_loss_classes", logits.device, width, vec)
    scalars, flags = loss_arguments(
        target, classes, alpha, beta, beta_logits, beta_gist, temperature, label_smoothing, ignore_index
    )
    launch(
        _gist_linear_loss_classes_kernel,
        lambda c: (cdiv(pairs, c["BLOCK_M"]), cdiv(width, c["BLOCK_V"])),
        config,
        logits,
        target,
        scale,
        stats,
        pairs,
        width,
        classes,
        first,
        logits.stride(0),
        target.stride(0),
        target.stride(1) if target.dim() == 2 else 0,
        scale.stride(0),
        *scalars,
        **flags,
        **gradient_flags(alpha, beta, beta_logits, beta_gist),
        NEED_G=need_gist,
        VEC=vec,
    )


SPECS = [
    Spec(
        _gist_linear_loss_chunk_kernel,
        f"{dtype}_{label}{'_stats' if stats else ''}",
        {
            "logits_ptr": f"*{dtype}",
            "target_ptr": "*i64",
            "scale_ptr": "*fp32",
            "loss_ptr": "*fp32",
            "stats_ptr": "*fp32",
        }
        | {"M": "i32", "V": "i32", "stride_lm": "i64", "stride_tm": "i64"}
        | SCALAR_TYPES,
        {"stride_tv": 0, "stride_scale": 0, "SOFT": False, "SMOOTH": False, "POWER": 3}
        | {"ALPHA": True, "KL_Z": True, "KL_G": True, "NEED_GRAD": True, "STATS": stats}
        | {"VEC": vec, "BLOCK_M": block_m, "BLOCK_V": block_v},
        num_stages=1,
        unaligned=SIZES,
    )
    for dtype, width, stats in (("bf16", 8, False), ("fp32", 4, False), ("bf16", 8, True))
    for label, vec, block_m, block_v in (
        ("small_v", width, 4, 128),
        ("small_v_ragged", 1, 4, 128),
        ("long_v", width, 1, 128 * width),
        ("long_v_ragged", 1, 1, 1024),
    )
]
#: Only a half-precision head takes a second pass.
SPECS += [
    Spec(
        _gist_linear_loss_classes_kernel,
        f"bf16_{label}",
        {"logits_ptr": "*bf16", "target_ptr": "*i64", "scale_ptr": "*fp32", "stats_ptr": "*fp32"}
        | {"M": "i32", "N": "i32", "V": "i32", "first": "i32", "stride_lm": "i64", "stride_tm": "i64"}
        | SCALAR_TYPES,
        {"stride_tv": 0, "stride_scale": 0, "SOFT": False, "SMOOTH": False, "POWER": 3}
        | {"ALPHA": True, "KL_Z": True, "KL_G": True, "NEED_G": True}
        | {"VEC": vec, "BLOCK_M": 1, "BLOCK_V": 1024},
        num_stages=1,
        unaligned=(*SIZES, "N", "first"),
    )
    for label, vec in (("long_v", 8), ("long_v_ragged", 1))
]
