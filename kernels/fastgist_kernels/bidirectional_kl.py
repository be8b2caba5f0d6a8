"""bidirectional_kl in Triton: one online pass for the loss, one pass for both gradients.

Forward reads each logit once (2 M V b bytes) and keeps the row state of pair_rows.py; backward reads and writes each element
once (4 M V b). Gradients that are finished with the loss: bidirectional_kl_once.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.bidirectional_kl_once import bidirectional_kl_fwd_bwd
from fastgist_kernels.bidirectional_kl_parts import bidirectional_kl_by_parts
from fastgist_kernels.common import LOG2E, cdiv, launch
from fastgist_kernels.kl_rows import counted_rows, kl_row_state, kl_stats, kl_store_gradients
from fastgist_kernels.pair_rows import (
    SIZES,
    centred_pair,
    exponential,
    few_rows,
    load_tile,
    over_row,
    pair_means,
    rows_config,
    tile_mask,
    vector_width,
)

__all__ = ["SPECS", "bidirectional_kl_bwd", "bidirectional_kl_fwd", "bidirectional_kl_fwd_bwd"]


@triton.jit(do_not_specialize=SIZES)
def _bidirectional_kl_fwd_kernel(
    z_ptr,
    o_ptr,
    mask_ptr,
    loss_ptr,
    stats_ptr,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_om,
    stride_ov,
    stride_mask,
    inv_t,
    HAS_MASK: tl.constexpr,
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
        "",
        VEC,
        BLOCK_M,
        BLOCK_V,
    )
    loss, e_p, e_q = pair_means(s_p, s_q, w_p, w_q, lone, inv_t)
    tl.store(loss_ptr + offs_m, tl.where(counts, loss, 0.0), mask=mask_m)
    kl_stats(stats_ptr, offs_m, M, mask_m, counts, m_z, m_o, s_p, s_q, e_p, e_q)


@triton.jit(do_not_specialize=SIZES)
def _bidirectional_kl_bwd_kernel(
    z_ptr,
    o_ptr,
    mask_ptr,
    stats_ptr,
    row_grad_ptr,
    grad_z_ptr,
    grad_o_ptr,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_om,
    stride_ov,
    stride_mask,
    stride_grad,
    inv_t,
    HAS_MASK: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_O: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_m, mask_m, counts = counted_rows(mask_ptr, stride_mask, M, BLOCK_M, HAS_MASK)
    start = tl.program_id(1).to(tl.int64) * BLOCK_V
    rows = M.to(tl.int64)
    m_z = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
    m_o = tl.load(stats_ptr + rows + offs_m, mask=mask_m, other=0.0)
    s_p = tl.load(stats_ptr + 2 * rows + offs_m, mask=mask_m, other=1.0)
    s_q = tl.load(stats_ptr + 3 * rows + offs_m, mask=mask_m, other=1.0)
    e_p = tl.load(stats_ptr + 4 * rows + offs_m, mask=mask_m, other=0.0)
    e_q = tl.load(stats_ptr + 5 * rows + offs_m, mask=mask_m, other=0.0)
    factor = tl.load(row_grad_ptr + offs_m * stride_grad, mask=mask_m, other=0.0) * inv_t
    mask = tile_mask(counts, start, V, BLOCK_V, VEC)
    z = load_tile(z_ptr, offs_m, start, stride_zm, stride_zv, mask, BLOCK_V, VEC, "evict_first").to(tl.float32)
    o = load_tile(o_ptr, offs_m, start, stride_om, stride_ov, mask, BLOCK_V, VEC, "evict_first").to(tl.float32)
    zc, oc, d = centred_pair(z, o, over_row(m_z, VEC), over_row(m_o, VEC))
    to_exp2 = inv_t * LOG2E
    # exp / S, not exp(. - log S): the argument's rounding grows with log S, the quotient's does not.
    kl_store_gradients(
        grad_z_ptr,
        grad_o_ptr,
        d,
        exponential(zc * to_exp2),
        exponential(oc * to_exp2),
        factor / s_p,
        factor / s_q,
        e_p,
        e_q,
        inv_t,
        offs_m,
        mask_m,
        counts,
        start,
        V,
        V,
        NEED_Z,
        NEED_O,
        VEC,
        BLOCK_V,
    )


def bidirectional_kl_fwd(logits, other_logits, mask, temperature, row_loss, stats) -> None:
    """Write row_loss (M,) and stats (6, M), float32, from logits (M, V) of any strides and mask (M,) or None."""
    if few_rows(logits):
        bidirectional_kl_by_parts(logits, other_logits, mask, None, temperature, 1.0, row_loss, stats, None, None)
        return
    rows, classes = logits.shape
    vec = vector_width(logits, other_logits)
    config = rows_config("bidirectional_kl_fwd", logits.device, classes, vec)
    launch(
        _bidirectional_kl_fwd_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]),),
        config,
        logits,
        other_logits,
        mask,
        row_loss,
        stats,
        rows,
        classes,
        *logits.stride(),
        *other_logits.stride(),
        0 if mask is None else mask.stride(0),
        1.0 / temperature,
        HAS_MASK=mask is not None,
        VEC=vec,
    )


def bidirectional_kl_bwd(logits, other_logits, mask, stats, row_grad, temperature, grad_logits, grad_other) -> None:
    """Write the gradients (M, V), contiguous, that are not None; row_grad (M,) float32 of any stride."""
    rows, classes = logits.shape
    vec = vector_width(logits, other_logits)
    config = rows_config("bidirectional_kl_bwd", logits.device, classes, vec)
    launch(
        _bidirectional_kl_bwd_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(classes, c["BLOCK_V"])),
        config,
        logits,
        other_logits,
        mask,
        stats,
        row_grad,
        grad_logits,
        grad_other,
        rows,
        classes,
        *logits.stride(),
        *other_logits.stride(),
        0 if mask is None else mask.stride(0),
        row_grad.stride(0),
        1.0 / temperature,
        HAS_MASK=mask is not None,
        NEED_Z=grad_logits is not None,
        NEED_O=grad_other is not None,
        VEC=vec,
    )


def _specs() -> list[Spec]:
    strides = dict.fromkeys(("stride_zm", "stride_om", "stride_mask"), "i64")
    unit = {"stride_zv": 1, "stride_ov": 1}
    sizes = {"M": "i32", "V": "i32"}
    out = []
    for dtype, width in (("bf16", 8), ("fp32", 4)):
        pair = {"z_ptr": f"*{dtype}", "o_ptr": f"*{dtype}", "mask_ptr": "*i1"}
        for label, vec, block_v in (("small_v", width, 128), ("long_v", width, 128 * width), ("ragged", 1, 1024)):
            elements = 128 * (vec if vec > 1 else 8)
            tile = {"VEC": vec, "BLOCK_M": elements // block_v, "BLOCK_V": block_v}
            out.append(
                Spec(
                    _bidirectional_kl_fwd_kernel,
                    f"{dtype}_{label}",
                    pair | {"loss_ptr": "*fp32", "stats_ptr": "*fp32"} | sizes | strides | {"inv_t": "fp32"},
                    unit | {"HAS_MASK": True} | tile,
                    num_stages=1,
                    unaligned=SIZES,
                )
            )
            out.append(
                Spec(
                    _bidirectional_kl_bwd_kernel,
                    f"{dtype}_{label}",
                    pair
                    | {"stats_ptr": "*fp32", "row_grad_ptr": "*fp32"}
                    | {"grad_z_ptr": f"*{dtype}", "grad_o_ptr": f"*{dtype}"}
                    | sizes
                    | strides
                    | {"stride_grad": "i64", "inv_t": "fp32"},
                    unit | {"HAS_MASK": True, "NEED_Z": True, "NEED_O": True} | tile,
                    num_stages=1,
                    unaligned=SIZES,
                )
            )
    return out


SPECS = _specs()
