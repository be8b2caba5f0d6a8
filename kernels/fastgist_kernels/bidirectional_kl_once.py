"""bidirectional_kl with its gradients finished at once, of scale / divisor times the sum of the row losses.

Four forms (pair_rows.choose_form). A row that fits in registers is read once (4 M V b bytes with both gradients). A longer
one is read twice, the second time from L2: by one program, or, where rows are few, by several, whose partial states a second
launch merges in the order of the columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.bidirectional_kl_parts import bidirectional_kl_by_parts
from fastgist_kernels.common import LOG2E, cdiv, launch
from fastgist_kernels.kl_rows import counted, counted_rows, kl_finish_columns, kl_row_state, kl_store_gradients
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
    pair_means,
    row_max,
    row_sum,
    tile_mask,
    twice_config,
    vector_width,
    whole_config,
)

__all__ = ["SPECS", "bidirectional_kl_fwd_bwd"]


@triton.jit
def kl_whole_rows(
    z_ptr,
    o_ptr,
    mask_ptr,
    divisor_ptr,
    row_loss_ptr,
    grad_z_ptr,
    grad_o_ptr,
    offs_m,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_om,
    stride_ov,
    stride_mask,
    inv_t,
    scale,
    HAS_MASK: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_O: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Finish rows ``offs_m``, each in one tile (BLOCK_V >= V), and return their losses as they are summed."""
    mask_m, counts = counted(mask_ptr, offs_m, stride_mask, M, HAS_MASK)
    mask = tile_mask(counts, 0, V, BLOCK_V, VEC)
    z = load_tile(z_ptr, offs_m, 0, stride_zm, stride_zv, mask, BLOCK_V, VEC, "evict_first").to(tl.float32)
    o = load_tile(o_ptr, offs_m, 0, stride_om, stride_ov, mask, BLOCK_V, VEC, "evict_first").to(tl.float32)
    m_z = finite_max(row_max(z, VEC))
    m_o = finite_max(row_max(o, VEC))
    zc, oc, d = centred_pair(z, o, over_row(m_z, VEC), over_row(m_o, VEC))
    to_exp2 = inv_t * LOG2E
    p = exponential(zc * to_exp2)
    q = exponential(oc * to_exp2)
    s_p = row_sum(p, VEC)
    s_q = row_sum(q, VEC)
    lone = row_sum(lone_classes(z, o), VEC)
    loss, e_p, e_q = pair_means(s_p, s_q, row_sum(p * d, VEC), row_sum(q * d, VEC), lone, inv_t)
    factor = finished_factor(scale, divisor_ptr, HAS_DIVISOR)
    loss = tl.where(counts, loss * factor, 0.0)
    tl.store(row_loss_ptr + offs_m, loss, mask=mask_m)
    kl_store_gradients(
        grad_z_ptr,
        grad_o_ptr,
        d,
        p,
        q,
        factor * inv_t / s_p,
        factor * inv_t / s_q,
        e_p,
        e_q,
        inv_t,
        offs_m,
        mask_m,
        counts,
        0,
        V,
        V,
        NEED_Z,
        NEED_O,
        VEC,
        BLOCK_V,
    )
    return loss


@triton.jit(do_not_specialize=SIZES)
def _bidirectional_kl_whole_kernel(
    z_ptr,
    o_ptr,
    mask_ptr,
    divisor_ptr,
    row_loss_ptr,
    loss_ptr,
    grad_z_ptr,
    grad_o_ptr,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_om,
    stride_ov,
    stride_mask,
    inv_t,
    scale,
    HAS_MASK: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_O: tl.constexpr,
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
            total += kl_whole_rows(
                z_ptr,
                o_ptr,
                mask_ptr,
                divisor_ptr,
                row_loss_ptr,
                grad_z_ptr,
                grad_o_ptr,
                here + first,
                M,
                V,
                stride_zm,
                stride_zv,
                stride_om,
                stride_ov,
                stride_mask,
                inv_t,
                scale,
                HAS_MASK,
                HAS_DIVISOR,
                NEED_Z,
                NEED_O,
                VEC,
                BLOCK_M,
                BLOCK_V,
            )
        tl.store(loss_ptr, tl.sum(total, 0))
    else:
        kl_whole_rows(
            z_ptr,
            o_ptr,
            mask_ptr,
            divisor_ptr,
            row_loss_ptr,
            grad_z_ptr,
            grad_o_ptr,
            here + tl.program_id(0).to(tl.int64) * BLOCK_M,
            M,
            V,
            stride_zm,
            stride_zv,
            stride_om,
            stride_ov,
            stride_mask,
            inv_t,
            scale,
            HAS_MASK,
            HAS_DIVISOR,
            NEED_Z,
            NEED_O,
            VEC,
            BLOCK_M,
            BLOCK_V,
        )


@triton.jit(do_not_specialize=SIZES)
def _bidirectional_kl_rows_kernel(
    z_ptr,
    o_ptr,
    mask_ptr,
    divisor_ptr,
    row_loss_ptr,
    grad_z_ptr,
    grad_o_ptr,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_om,
    stride_ov,
    stride_mask,
    inv_t,
    scale,
    HAS_MASK: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_O: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_m, mask_m, counts = counted_rows(mask_ptr, stride_mask, M, BLOCK_M, HAS_MASK)
    m_z, m_o, s_p, s_q, w_p, w_q, lone = kl_row_state(
        z_ptr,
        o_ptr,
        offs_m,
        counts,
        0,
        V,
        stride_zm,
        stride_zv,
        stride_om,
        stride_ov,
        inv_t * LOG2E,
        "evict_last",
        VEC,
        BLOCK_M,
        BLOCK_V,
    )
    loss, e_p, e_q = pair_means(s_p, s_q, w_p, w_q, lone, inv_t)
    factor = finished_factor(scale, divisor_ptr, HAS_DIVISOR)
    tl.store(row_loss_ptr + offs_m, tl.where(counts, loss * factor, 0.0), mask=mask_m)
    kl_finish_columns(
        z_ptr,
        o_ptr,
        grad_z_ptr,
        grad_o_ptr,
        m_z,
        m_o,
        factor * inv_t / s_p,
        factor * inv_t / s_q,
        e_p,
        e_q,
        offs_m,
        mask_m,
        counts,
        0,
        V,
        V,
        stride_zm,
        stride_zv,
        stride_om,
        stride_ov,
        inv_t,
        NEED_Z,
        NEED_O,
        VEC,
        BLOCK_V,
    )


# -- launching -------------------------------------------------------------------------------------------------------


def bidirectional_kl_fwd_bwd(
    logits, other_logits, mask, divisor, temperature, scale, row_loss, loss, grad_logits, grad_other, form=None
) -> None:
    """Write row_loss (M,), times scale / divisor, its sum loss (), both float32, and the gradients (M, V) of it, contiguous,
    that are not None. logits (M, V) of any strides, mask (M,) or None, divisor () float32 or None. ``form``: of
    :func:`choose_form`."""
    rows, classes = logits.shape
    form = form or choose_form(logits)
    if form == "split":
        bidirectional_kl_by_parts(
            logits, other_logits, mask, divisor, temperature, scale, row_loss, None, grad_logits, grad_other
        )
        torch.sum(row_loss, 0, out=loss)
        return
    vec = vector_width(logits, other_logits)
    inputs = logits, other_logits, mask, divisor, row_loss
    sizes = rows, classes, *logits.stride(), *other_logits.stride(), 0 if mask is None else mask.stride(0)
    scalars = 1.0 / temperature, scale
    flags = {"HAS_MASK": mask is not None, "HAS_DIVISOR": divisor is not None, "VEC": vec}
    flags |= {"NEED_Z": grad_logits is not None, "NEED_O": grad_other is not None}
    grid = lambda c: (1 if form == "alone" else cdiv(rows, c["BLOCK_M"]),)  # noqa: E731
    if form == "rows":
        config = twice_config("bidirectional_kl_rows", logits, vec)
        launch(_bidirectional_kl_rows_kernel, grid, config, *inputs, grad_logits, grad_other, *sizes, *scalars, **flags)
    else:
        alone = form == "alone"
        config = (
            alone_config(rows, classes, vec)
            if alone
            else whole_config("bidirectional_kl_whole", logits.device, rows, classes, vec)
        )
        arguments = *inputs, loss, grad_logits, grad_other, *sizes, *scalars
        launch(_bidirectional_kl_whole_kernel, grid, config, *arguments, **flags, ALONE=alone)
    if form != "alone":
        torch.sum(row_loss, 0, out=loss)


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    sizes = {"M": "i32", "V": "i32"} | dict.fromkeys(("stride_zm", "stride_om", "stride_mask"), "i64")
    unit = {"stride_zv": 1, "stride_ov": 1}
    wanted = {"HAS_MASK": True, "HAS_DIVISOR": True, "NEED_Z": True, "NEED_O": True}
    outputs = {"divisor_ptr": "*fp32", "row_loss_ptr": "*fp32"}
    scalars = {"inv_t": "fp32", "scale": "fp32"}
    out = []
    for dtype, width in (("bf16", 8), ("fp32", 4)):
        pair = {"z_ptr": f"*{dtype}", "o_ptr": f"*{dtype}", "mask_ptr": "*i1"}
        grads = {"grad_z_ptr": f"*{dtype}", "grad_o_ptr": f"*{dtype}"}
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
            signature = pair | outputs | {"loss_ptr": "*fp32"} | grads | sizes | scalars
            out.append(
                Spec(
                    _bidirectional_kl_whole_kernel,
                    f"{dtype}_{label}",
                    signature,
                    unit | wanted | tile,
                    num_warps=warps,
                    num_stages=1,
                    unaligned=SIZES,
                )
            )
        for label, vec, warps in (("few_warps", width, 4), ("many_warps", width, 16), ("ragged", 1, 16)):
            tile = {"VEC": vec, "BLOCK_M": 1, "BLOCK_V": 32 * warps * (vec if vec > 1 else 8)}
            out.append(
                Spec(
                    _bidirectional_kl_rows_kernel,
                    f"{dtype}_{label}",
                    pair | outputs | grads | sizes | scalars,
                    unit | wanted | tile,
                    num_warps=warps,
                    num_stages=1,
                    unaligned=SIZES,
                )
            )
    return out


SPECS = _specs()
