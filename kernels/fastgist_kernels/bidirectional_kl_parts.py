"""bidirectional_kl for few long rows: each by several programs, whose partial states a second launch merges in the order of
the columns. It writes the statistics, or reads its stretch again and finishes the gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import LOG2E, cdiv, launch, next_power_of_2
from fastgist_kernels.kl_rows import counted_rows, kl_finish_columns, kl_row_state, kl_stats
from fastgist_kernels.pair_rows import (
    SIZES,
    finished_factor,
    merge_pair,
    pair_means,
    rows_config,
    split_classes,
    vector_width,
)

__all__ = ["SPECS", "bidirectional_kl_by_parts", "part_of"]

#: Numbers that a part of a row leaves for the merge: maxima, sums, weighted sums, lone classes.
PARTIAL = 7


@triton.jit(do_not_specialize=SIZES)
def _bidirectional_kl_split_kernel(
    z_ptr,
    o_ptr,
    mask_ptr,
    part_ptr,
    M,
    V,
    stretch,
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
    """Program (m, s) leaves the state of stretch s of its rows in part (S, PARTIAL, M)."""
    offs_m, mask_m, counts = counted_rows(mask_ptr, stride_mask, M, BLOCK_M, HAS_MASK)
    start = tl.program_id(1) * stretch
    state = kl_row_state(
        z_ptr,
        o_ptr,
        offs_m,
        counts,
        start,
        tl.minimum(start + stretch, V),
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
    place = part_ptr + tl.program_id(1).to(tl.int64) * 7 * M + offs_m
    for i in tl.static_range(7):
        tl.store(place + i * M.to(tl.int64), state[i], mask=mask_m)


@triton.jit
def part_of(part_ptr, i: tl.constexpr, empty, offs_m, M, parts, NUMBERS: tl.constexpr, PARTS: tl.constexpr):
    """Number ``i`` of every part of the rows, [BLOCK_M, PARTS]; ``empty`` where there is no part."""
    part = tl.arange(0, PARTS).to(tl.int64)[None, :]
    here = (offs_m[:, None] < M) & (part < parts)
    return tl.load(part_ptr + (part * NUMBERS + i) * M + offs_m[:, None], mask=here, other=empty)


@triton.jit(do_not_specialize=SIZES)
def _bidirectional_kl_merge_kernel(
    z_ptr,
    o_ptr,
    mask_ptr,
    part_ptr,
    divisor_ptr,
    row_loss_ptr,
    stats_ptr,
    grad_z_ptr,
    grad_o_ptr,
    M,
    V,
    parts,
    stretch,
    stride_zm,
    stride_zv,
    stride_om,
    stride_ov,
    stride_mask,
    inv_t,
    scale,
    HAS_MASK: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    STATS: tl.constexpr,
    NEED_Z: tl.constexpr,
    NEED_O: tl.constexpr,
    PARTS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (m, s) merges the parts of its rows and finishes stretch s; the first one writes the loss and, for STATS, the
    statistics in place of gradients."""
    offs_m, mask_m, counts = counted_rows(mask_ptr, stride_mask, M, BLOCK_M, HAS_MASK)
    m_z, m_o, s_p, s_q, w_p, w_q, lone, _, _, _, _ = merge_pair(
        part_of(part_ptr, 0, float("-inf"), offs_m, M, parts, 7, PARTS),
        part_of(part_ptr, 1, float("-inf"), offs_m, M, parts, 7, PARTS),
        part_of(part_ptr, 2, 0.0, offs_m, M, parts, 7, PARTS),
        part_of(part_ptr, 3, 0.0, offs_m, M, parts, 7, PARTS),
        part_of(part_ptr, 4, 0.0, offs_m, M, parts, 7, PARTS),
        part_of(part_ptr, 5, 0.0, offs_m, M, parts, 7, PARTS),
        part_of(part_ptr, 6, 0.0, offs_m, M, parts, 7, PARTS),
        inv_t * LOG2E,
    )
    loss, e_p, e_q = pair_means(s_p, s_q, w_p, w_q, lone, inv_t)
    factor = finished_factor(scale, divisor_ptr, HAS_DIVISOR)
    start = tl.program_id(1) * stretch
    if tl.program_id(1) == 0:
        tl.store(row_loss_ptr + offs_m, tl.where(counts, loss * factor, 0.0), mask=mask_m)
    if STATS:
        kl_stats(stats_ptr, offs_m, M, mask_m, counts, m_z, m_o, s_p, s_q, e_p, e_q)
    else:
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
            start,
            tl.minimum(start + stretch, V),
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


def bidirectional_kl_by_parts(
    logits, other_logits, mask, divisor, temperature, scale, row_loss, stats, grad_logits, grad_other
) -> None:
    """Each row by several programs: row_loss (M,) times scale / divisor, and statistics (6, M) or else gradients."""
    rows, classes = logits.shape
    vec = vector_width(logits, other_logits)
    config = rows_config("bidirectional_kl_split", logits.device, classes, vec)
    parts, stretch = split_classes(logits, config["BLOCK_V"])
    part = torch.empty(parts, PARTIAL, rows, dtype=torch.float32, device=logits.device)
    strides = *logits.stride(), *other_logits.stride(), 0 if mask is None else mask.stride(0)
    flags = {"HAS_MASK": mask is not None, "VEC": vec}
    launch(
        _bidirectional_kl_split_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]), parts),
        config,
        logits,
        other_logits,
        mask,
        part,
        rows,
        classes,
        stretch,
        *strides,
        1.0 / temperature,
        **flags,
    )
    launch(
        _bidirectional_kl_merge_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]), parts if stats is None else 1),
        config,
        logits,
        other_logits,
        mask,
        part,
        divisor,
        row_loss,
        stats,
        grad_logits,
        grad_other,
        rows,
        classes,
        parts,
        stretch,
        *strides,
        1.0 / temperature,
        scale,
        HAS_DIVISOR=divisor is not None,
        STATS=stats is not None,
        NEED_Z=grad_logits is not None,
        NEED_O=grad_other is not None,
        PARTS=next_power_of_2(parts),
        **flags,
    )


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    sizes = {"M": "i32", "V": "i32"} | dict.fromkeys(("stride_zm", "stride_om", "stride_mask"), "i64")
    unit = {"stride_zv": 1, "stride_ov": 1}
    wanted = {"HAS_MASK": True, "HAS_DIVISOR": True, "NEED_Z": True, "NEED_O": True}
    outputs = {"divisor_ptr": "*fp32", "row_loss_ptr": "*fp32"}
    scalars = {"inv_t": "fp32", "scale": "fp32"}
    split = {"part_ptr": "*fp32", "stretch": "i32", "parts": "i32"}
    out = []
    for dtype, width in (("bf16", 8), ("fp32", 4)):
        pair = {"z_ptr": f"*{dtype}", "o_ptr": f"*{dtype}", "mask_ptr": "*i1"}
        grads = {"grad_z_ptr": f"*{dtype}", "grad_o_ptr": f"*{dtype}"}
        tile = {"VEC": width, "BLOCK_M": 1, "BLOCK_V": 128 * width}
        out.append(
            Spec(
                _bidirectional_kl_split_kernel,
                dtype,
                pair | split | sizes | scalars,
                unit | {"HAS_MASK": True} | tile,
                num_stages=1,
                unaligned=SIZES,
                aligned=("stretch",),
            )
        )
        out.append(
            Spec(
                _bidirectional_kl_merge_kernel,
                dtype,
                pair | split | outputs | {"stats_ptr": "*fp32"} | grads | sizes | scalars,
                unit | wanted | {"STATS": False, "PARTS": 8} | tile,
                num_stages=1,
                unaligned=SIZES,
                aligned=("stretch",),
            )
        )
    return out


SPECS = _specs()
