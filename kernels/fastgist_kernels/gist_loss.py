"""gist_loss in Triton: both cross-entropies and the bidirectional KL from one read of the two logits tensors.

Forward reads each logit once and leaves nine numbers a row; backward reads and writes each element once. Gradients that are
finished with the loss: gist_loss_once.py. What a row keeps: gist_rows.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import LOG2E, cdiv, launch
from fastgist_kernels.gist_loss_once import gist_loss_fwd_bwd
from fastgist_kernels.gist_loss_parts import gist_loss_by_parts
from fastgist_kernels.gist_rows import (
    SCALAR_TYPES,
    gist_finish_columns,
    gist_row_loss,
    gist_row_state,
    gist_stats,
    gradient_flags,
    loss_arguments,
    pair_and_target,
    target_rows,
)
from fastgist_kernels.pair_rows import SIZES, few_rows, rows_config, vector_width

__all__ = ["SPECS", "gist_loss_bwd", "gist_loss_fwd", "gist_loss_fwd_bwd"]


@triton.jit(do_not_specialize=SIZES)
def _gist_loss_fwd_kernel(
    z_ptr,
    g_ptr,
    target_ptr,
    loss_ptr,
    stats_ptr,
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
        "",
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
    gist_stats(stats_ptr, offs_m, M, mask_m, counts, m_z, m_g, s_p, s_q, e_p, e_q, sum_z, sum_g, weight)


@triton.jit(do_not_specialize=SIZES)
def _gist_loss_bwd_kernel(
    z_ptr,
    g_ptr,
    target_ptr,
    stats_ptr,
    row_grad_ptr,
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
    stride_grad,
    ignore_index,
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
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    counts, invalid, label = target_rows(target_ptr, offs_m, mask_m, stride_tm, V, ignore_index, SOFT)
    rows = M.to(tl.int64)
    m_z = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
    m_g = tl.load(stats_ptr + rows + offs_m, mask=mask_m, other=0.0)
    s_p = tl.load(stats_ptr + 2 * rows + offs_m, mask=mask_m, other=1.0)
    s_q = tl.load(stats_ptr + 3 * rows + offs_m, mask=mask_m, other=1.0)
    e_p = tl.load(stats_ptr + 4 * rows + offs_m, mask=mask_m, other=0.0)
    e_q = tl.load(stats_ptr + 5 * rows + offs_m, mask=mask_m, other=0.0)
    sum_z = tl.load(stats_ptr + 6 * rows + offs_m, mask=mask_m, other=1.0)
    sum_g = tl.load(stats_ptr + 7 * rows + offs_m, mask=mask_m, other=1.0)
    weight = tl.load(stats_ptr + 8 * rows + offs_m, mask=mask_m, other=0.0)
    scale = tl.load(row_grad_ptr + offs_m * stride_grad, mask=mask_m, other=0.0)
    start = tl.program_id(1) * BLOCK_V
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
        tl.where(invalid, float("nan"), scale),
        offs_m,
        mask_m,
        counts,
        start,
        tl.minimum(start + BLOCK_V, V),
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


def gist_loss_fwd(
    logits,
    gist_logits,
    target,
    alpha,
    beta,
    beta_logits,
    beta_gist,
    temperature,
    label_smoothing,
    ignore_index,
    row_loss,
    stats,
) -> None:
    """Write row_loss (M,) and stats (9, M), float32. logits (M, V) of any strides; target (M,) int64 or (M, V) float.
    ``beta`` includes any T^2."""
    options = alpha, beta, beta_logits, beta_gist, temperature, label_smoothing, ignore_index
    if few_rows(logits):
        gist_loss_by_parts(logits, gist_logits, target, None, *options, 1.0, row_loss, stats, None, None)
        return
    rows, classes = logits.shape
    vec = vector_width(*pair_and_target(logits, gist_logits, target))
    config = rows_config("gist_loss_fwd", logits.device, classes, vec)
    (ignore_index, alpha, beta, _, _, *rest), flags = loss_arguments(target, classes, *options)
    launch(
        _gist_loss_fwd_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]),),
        config,
        logits,
        gist_logits,
        target,
        row_loss,
        stats,
        rows,
        classes,
        *logits.stride(),
        *gist_logits.stride(),
        target.stride(0),
        target.stride(1) if target.dim() == 2 else 0,
        ignore_index,
        alpha,
        beta,
        *rest,
        **flags,
        VEC=vec,
    )


def gist_loss_bwd(
    logits,
    gist_logits,
    target,
    stats,
    row_grad,
    alpha,
    beta,
    beta_logits,
    beta_gist,
    temperature,
    label_smoothing,
    ignore_index,
    grad_logits,
    grad_gist,
) -> None:
    """Write the gradients (M, V), contiguous, that are not None; row_grad (M,) float32 of any stride."""
    rows, classes = logits.shape
    vec = vector_width(*pair_and_target(logits, gist_logits, target))
    config = rows_config("gist_loss_bwd", logits.device, classes, vec)
    (ignore_index, alpha, _, *rest), flags = loss_arguments(
        target, classes, alpha, beta, beta_logits, beta_gist, temperature, label_smoothing, ignore_index
    )
    launch(
        _gist_loss_bwd_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(classes, c["BLOCK_V"])),
        config,
        logits,
        gist_logits,
        target,
        stats,
        row_grad,
        grad_logits,
        grad_gist,
        rows,
        classes,
        *logits.stride(),
        *gist_logits.stride(),
        target.stride(0),
        target.stride(1) if target.dim() == 2 else 0,
        row_grad.stride(0),
        ignore_index,
        alpha,
        *rest,
        **flags,
        **gradient_flags(alpha, beta, beta_logits, beta_gist),
        NEED_Z=grad_logits is not None,
        NEED_G=grad_gist is not None,
        VEC=vec,
    )


def _specs() -> list[Spec]:
    common = {"M": "i32", "V": "i32", "stride_zm": "i64", "stride_gm": "i64", "stride_tm": "i64"} | SCALAR_TYPES
    unit = {"stride_zv": 1, "stride_gv": 1, "POWER": 3}
    wanted = {"ALPHA": True, "KL_Z": True, "KL_G": True, "NEED_Z": True, "NEED_G": True}
    out = []
    for label, dtype, soft, vec, block_m, block_v in (
        ("bf16_small_v", "bf16", False, 8, 8, 128),
        ("bf16_long_v", "bf16", False, 8, 1, 1024),
        ("bf16_ragged", "bf16", False, 1, 1, 1024),
        ("fp32_long_v", "fp32", False, 4, 1, 512),
        ("bf16_soft_smooth", "bf16", True, 8, 1, 1024),
    ):
        pair = {"z_ptr": f"*{dtype}", "g_ptr": f"*{dtype}", "target_ptr": "*fp32" if soft else "*i64"}
        flags = unit | {"SOFT": soft, "SMOOTH": soft, "stride_tv": 1 if soft else 0}
        tile = {"VEC": vec, "BLOCK_M": block_m, "BLOCK_V": block_v}
        out.append(
            Spec(
                _gist_loss_fwd_kernel,
                label,
                pair | {"loss_ptr": "*fp32", "stats_ptr": "*fp32"} | common,
                flags | tile,
                num_stages=1,
                unaligned=SIZES,
            )
        )
        grads = {"grad_z_ptr": f"*{dtype}", "grad_g_ptr": f"*{dtype}", "stride_grad": "i64"}
        out.append(
            Spec(
                _gist_loss_bwd_kernel,
                label,
                pair | {"stats_ptr": "*fp32", "row_grad_ptr": "*fp32"} | grads | common,
                flags | wanted | tile,
                num_stages=1,
                unaligned=SIZES,
            )
        )
    return out


SPECS = _specs()
