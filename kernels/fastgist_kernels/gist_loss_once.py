"""gist_loss with its gradients finished at once, of scale / divisor times the sum of the row losses.

The forms are those of bidirectional_kl_once.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import LOG2E, cdiv, launch
from fastgist_kernels.gist_loss_parts import gist_loss_by_parts
from fastgist_kernels.gist_rows import (
    SCALAR_TYPES,
    class_weights,
    exp_unit,
    gist_finish_columns,
    gist_gradients,
    gist_row_loss,
    gist_row_state,
    gradient_flags,
    label_logit,
    loss_arguments,
    pair_and_target,
    sizes_of,
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
    store_tile,
    tile_mask,
    twice_config,
    vector_width,
    whole_config,
)

__all__ = ["SPECS", "gist_loss_fwd_bwd"]


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
        keep,
        smooth,
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


# -- launching -------------------------------------------------------------------------------------------------------


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
        gist_loss_by_parts(logits, gist_logits, target, divisor, *options, scale, *gradients)
        torch.sum(row_loss, 0, out=loss)
        return
    vec = vector_width(*pair_and_target(logits, gist_logits, target))
    scalars, flags = loss_arguments(target, classes, *options)
    flags |= gradient_flags(*options) | {"HAS_DIVISOR": divisor is not None, "VEC": vec}
    flags |= {"NEED_Z": grad_logits is not None, "NEED_G": grad_gist is not None}
    inputs = logits, gist_logits, target, divisor, row_loss
    rest = grad_logits, grad_gist, *sizes_of(logits, gist_logits, target), *scalars, scale
    grid = lambda c: (1 if form == "alone" else cdiv(rows, c["BLOCK_M"]),)  # noqa: E731
    if form == "rows":
        launch(_gist_loss_rows_kernel, grid, twice_config("gist_loss_rows", logits, vec), *inputs, *rest, **flags)
    else:
        alone = form == "alone"
        whole = (
            alone_config(rows, classes, vec)
            if alone
            else whole_config("gist_loss_whole", logits.device, rows, classes, vec)
        )
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
    out = []
    for dtype, width, soft in (("bf16", 8, False), ("fp32", 4, False), ("bf16_soft", 8, True)):
        element = dtype.removesuffix("_soft")
        inputs = {"z_ptr": f"*{element}", "g_ptr": f"*{element}", "target_ptr": "*fp32" if soft else "*i64"}
        flags = unit | {"SOFT": soft, "SMOOTH": soft, "stride_tv": 1 if soft else 0}
        grads = {"grad_z_ptr": f"*{element}", "grad_g_ptr": f"*{element}"}
        for label, vec, block_m, block_v, warps, alone in (
            ("alone", 4, 32, 128, 16, True),
            ("alone_ragged", 1, 16, 128, 8, True),
            ("v128", width, 16, 128, 4, False),
            ("v128_ragged", 1, 8, 128, 4, False),
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
    return out


SPECS = _specs()
