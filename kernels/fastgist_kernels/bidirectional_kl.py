"""bidirectional_kl in Triton: one online pass for the loss, one pass for both gradients.

Forward reads each logit once (2 M V b bytes) and keeps, per row, the maxima m, the sums S of the exponentials and the
weighted sums W = sum exp((z - m) / T) d with d = (z - m_z) - (o - m_o). When a block raises the maxima by (a, b), d
shrinks by a - b, so (S, W) -> (alpha S, alpha (W - (a - b) S)): the state stays exact about the current maxima and an
offset between the heads never enters the arithmetic. Backward reads and writes each element once (4 M V b).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import LOG2E, cdiv, device_arch, launch, launch_config, next_power_of_2

__all__ = [
    "SPECS",
    "bidirectional_kl_bwd",
    "bidirectional_kl_fwd",
    "centred_pair",
    "finite_max",
    "online_pair",
    "rows_config",
]


@triton.jit
def centred_pair(z, o, m_z, m_o):
    """z - m_z, o - m_o and their difference d; d is 0 where a class is absent (-inf) on either side."""
    zc = z - m_z[:, None]
    oc = o - m_o[:, None]
    absent = (z == float("-inf")) | (o == float("-inf"))
    d = tl.where(absent, 0.0, zc - oc)
    return zc, oc, d


@triton.jit
def finite_max(m):
    """The maximum to centre on: 0 while a row has shown nothing but -inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def online_pair(z, o, m_z, m_o, s_p, s_q, w_p, w_q, lone, to_exp2):
    """Take one block [BLOCK_M, BLOCK_V] of both sides into the row state. Padding comes in as -inf on both sides.

    ``lone`` counts the classes that are -inf on one side only. The centred blocks, their exponentials and how far the
    maxima rose (old - new, <= 0) are returned too, for a caller that keeps more sums.
    """
    old_z = finite_max(m_z)
    old_o = finite_max(m_o)
    m_z = tl.maximum(m_z, tl.max(z, 1))
    m_o = tl.maximum(m_o, tl.max(o, 1))
    new_z = finite_max(m_z)
    new_o = finite_max(m_o)
    zc, oc, d = centred_pair(z, o, new_z, new_o)
    p = tl.exp2(zc * to_exp2)
    q = tl.exp2(oc * to_exp2)
    rise_z = old_z - new_z
    rise_o = old_o - new_o
    # Before the first finite logit the sums are 0 and old = 0 stands for -inf: cap the factor so that 0 stays 0.
    alpha_p = tl.exp2(tl.minimum(rise_z, 0.0) * to_exp2)
    alpha_q = tl.exp2(tl.minimum(rise_o, 0.0) * to_exp2)
    shift = rise_z - rise_o
    w_p = alpha_p * (w_p + shift * s_p) + tl.sum(p * d, 1)
    w_q = alpha_q * (w_q + shift * s_q) + tl.sum(q * d, 1)
    s_p = alpha_p * s_p + tl.sum(p, 1)
    s_q = alpha_q * s_q + tl.sum(q, 1)
    lone += tl.sum(((z == float("-inf")) != (o == float("-inf"))).to(tl.int32), 1)
    return m_z, m_o, s_p, s_q, w_p, w_q, lone, zc, oc, p, q, rise_z, rise_o


@triton.jit(do_not_specialize=["M"])
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
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    counts = mask_m
    if HAS_MASK:
        counts = mask_m & (tl.load(mask_ptr + offs_m * stride_mask, mask=mask_m, other=0) != 0)
    to_exp2 = inv_t * LOG2E
    m_z = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m_o = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s_p = tl.zeros([BLOCK_M], tl.float32)
    s_q = tl.zeros([BLOCK_M], tl.float32)
    w_p = tl.zeros([BLOCK_M], tl.float32)
    w_q = tl.zeros([BLOCK_M], tl.float32)
    lone = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V).to(tl.int64)
        mask_mv = counts[:, None] & (offs_v < V)[None, :]
        z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_v[None, :] * stride_zv
        o_ptrs = o_ptr + offs_m[:, None] * stride_om + offs_v[None, :] * stride_ov
        z = tl.load(z_ptrs, mask=mask_mv, other=float("-inf")).to(tl.float32)
        o = tl.load(o_ptrs, mask=mask_mv, other=float("-inf")).to(tl.float32)
        m_z, m_o, s_p, s_q, w_p, w_q, lone, _, _, _, _, _, _ = online_pair(
            z, o, m_z, m_o, s_p, s_q, w_p, w_q, lone, to_exp2
        )
    e_p = w_p / s_p
    e_q = w_q / s_q
    loss = (e_p - e_q) * inv_t
    infinite = (lone > 0) & (loss == loss)
    loss = tl.where(infinite, float("inf"), loss)
    e_p = tl.where(infinite, float("nan"), e_p)
    e_q = tl.where(infinite, float("nan"), e_q)
    tl.store(loss_ptr + offs_m, tl.where(counts, loss, 0.0), mask=mask_m)
    rows = M.to(tl.int64)
    tl.store(stats_ptr + offs_m, tl.where(counts, finite_max(m_z), 0.0), mask=mask_m)
    tl.store(stats_ptr + rows + offs_m, tl.where(counts, finite_max(m_o), 0.0), mask=mask_m)
    tl.store(stats_ptr + 2 * rows + offs_m, tl.where(counts, s_p, 0.0), mask=mask_m)
    tl.store(stats_ptr + 3 * rows + offs_m, tl.where(counts, s_q, 0.0), mask=mask_m)
    tl.store(stats_ptr + 4 * rows + offs_m, tl.where(counts, e_p, 0.0), mask=mask_m)
    tl.store(stats_ptr + 5 * rows + offs_m, tl.where(counts, e_q, 0.0), mask=mask_m)


@triton.jit(do_not_specialize=["M"])
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
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_m = offs_m < M
    counts = mask_m
    if HAS_MASK:
        counts = mask_m & (tl.load(mask_ptr + offs_m * stride_mask, mask=mask_m, other=0) != 0)
    rows = M.to(tl.int64)
    m_z = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
    m_o = tl.load(stats_ptr + rows + offs_m, mask=mask_m, other=0.0)
    s_p = tl.load(stats_ptr + 2 * rows + offs_m, mask=mask_m, other=1.0)
    s_q = tl.load(stats_ptr + 3 * rows + offs_m, mask=mask_m, other=1.0)
    e_p = tl.load(stats_ptr + 4 * rows + offs_m, mask=mask_m, other=0.0)
    e_q = tl.load(stats_ptr + 5 * rows + offs_m, mask=mask_m, other=0.0)
    scale = tl.load(row_grad_ptr + offs_m * stride_grad, mask=mask_m, other=0.0) * inv_t

    mask_v = offs_v < V
    mask_load = counts[:, None] & mask_v[None, :]
    z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_v[None, :] * stride_zv
    o_ptrs = o_ptr + offs_m[:, None] * stride_om + offs_v[None, :] * stride_ov
    z = tl.load(z_ptrs, mask=mask_load, other=float("-inf")).to(tl.float32)
    o = tl.load(o_ptrs, mask=mask_load, other=float("-inf")).to(tl.float32)
    zc, oc, d = centred_pair(z, o, m_z, m_o)
    to_exp2 = inv_t * LOG2E
    # exp / S, not exp(. - log S): the argument's rounding grows with log S, the quotient's does not.
    p = tl.exp2(zc * to_exp2) * (1.0 / s_p)[:, None]
    q = tl.exp2(oc * to_exp2) * (1.0 / s_q)[:, None]
    mask_store = mask_m[:, None] & mask_v[None, :]
    offs_out = offs_m[:, None] * V + offs_v[None, :]
    if NEED_Z:
        # (d - e) / T, not d / T - e / T: a fused multiply-add would round the two apart where they must cancel.
        grad_z = scale[:, None] * (p * ((d - e_p[:, None]) * inv_t) + (p - q))
        grad_z = tl.where(counts[:, None], grad_z, 0.0)
        tl.store(grad_z_ptr + offs_out, grad_z.to(grad_z_ptr.dtype.element_ty), mask=mask_store)
    if NEED_O:
        grad_o = scale[:, None] * (q * ((e_q[:, None] - d) * inv_t) + (q - p))
        grad_o = tl.where(counts[:, None], grad_o, 0.0)
        tl.store(grad_o_ptr + offs_out, grad_o.to(grad_o_ptr.dtype.element_ty), mask=mask_store)


def rows_config(kernel: str, device: torch.device, classes: int, elements: int) -> dict[str, int]:
    """Tile for a kernel that walks rows: ``elements`` a tensor and tile at most, rows packed while V is small."""
    block_v = min(next_power_of_2(classes), elements)
    default = {
        "BLOCK_V": block_v,
        "BLOCK_M": max(1, min(8, elements // (4 * block_v))),
        "num_warps": 8 if block_v >= 2048 else 4,
        "num_stages": 1,
    }
    return default | launch_config(kernel, device_arch(device), f"v{next_power_of_2(classes)}")


def bidirectional_kl_fwd(logits, other_logits, mask, temperature, row_loss, stats) -> None:
    """Write row_loss (M,) and stats (6, M), float32, from logits (M, V) of any strides and mask (M,) or None."""
    rows, classes = logits.shape
    config = rows_config("bidirectional_kl_fwd", logits.device, classes, elements=4096)
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
    )


def bidirectional_kl_bwd(logits, other_logits, mask, stats, row_grad, temperature, grad_logits, grad_other) -> None:
    """Write the gradients (M, V), contiguous, that are not None; row_grad (M,) float32 of any stride."""
    rows, classes = logits.shape
    config = rows_config("bidirectional_kl_bwd", logits.device, classes, elements=2048)
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
    )


def _specs() -> list[Spec]:
    strides = dict.fromkeys(("stride_zm", "stride_om", "stride_mask"), "i64")
    unit = {"stride_zv": 1, "stride_ov": 1}
    sizes = {"M": "i32", "V": "i32"}
    out = []
    for dtype in ("bf16", "fp32"):
        for label, block_m, block_v in (("small_v", 8, 128), ("long_v", 1, 4096)):
            tile = {"BLOCK_M": block_m, "BLOCK_V": block_v}
            tile_bwd = {"BLOCK_M": -(-block_m // 2), "BLOCK_V": min(block_v, 2048)}
            warps = 8 if block_v >= 2048 else 4
            pair = {"z_ptr": f"*{dtype}", "o_ptr": f"*{dtype}", "mask_ptr": "*i1"}
            out.append(
                Spec(
                    _bidirectional_kl_fwd_kernel,
                    f"{dtype}_{label}",
                    pair | {"loss_ptr": "*fp32", "stats_ptr": "*fp32"} | sizes | strides | {"inv_t": "fp32"},
                    unit | {"HAS_MASK": True} | tile,
                    num_warps=warps,
                    num_stages=1,
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
                    unit | {"HAS_MASK": True, "NEED_Z": True, "NEED_O": True} | tile_bwd,
                    num_warps=warps,
                    num_stages=1,
                )
            )
    return out


SPECS = _specs()
