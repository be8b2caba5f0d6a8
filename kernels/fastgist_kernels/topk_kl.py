"""topk_kl in Triton: one pass over a row for what lies outside the k known classes, one that writes the gradient.

Forward reads each logit once (M V b bytes). The known classes come in ascending order, so a block of the row holds a run of
them, and only those are taken out of it: k comparisons of a block a row, whatever V is. What remains is the rest's maximum and
sum of exponentials; everything else happens on the k + 1 classes, in one tile. Backward reads and writes each element once:
a softmax over the rest times one number of the row, and then the k known classes are written over it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import LOG2E, cdiv, device_arch, launch, launch_config, next_power_of_2
from fastgist_kernels.pair_rows import finite_max

__all__ = ["SPECS", "topk_kl_bwd", "topk_kl_fwd"]


@triton.jit
def rest_of_row(z_ptr, i_ptr, at, V, stride_zv, indices, to_exp2, BLOCK_V: tl.constexpr):
    """Maximum of the logits outside the known classes, and the sum of their exponentials about it. ``at``: the first of the
    row's indices that is no padding."""
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V).to(tl.int64)
        z = tl.load(z_ptr + offs_v * stride_zv, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        end = tl.sum((indices < start + BLOCK_V).to(tl.int64), 0)
        for j in range(at, end):
            z = tl.where(offs_v == tl.load(i_ptr + j), float("-inf"), z)
        at = end
        old = finite_max(largest)
        largest = tl.maximum(largest, tl.max(z, 0))
        new = finite_max(largest)
        # Before the first finite logit the sum is 0 and old = 0 stands for -inf: cap the factor so that 0 stays 0.
        total = tl.exp2(tl.minimum(old - new, 0.0) * to_exp2) * total + tl.sum(tl.exp2((z - new) * to_exp2), 0)
    return largest, total


@triton.jit(do_not_specialize=["M"])
def _topk_kl_fwd_kernel(
    z_ptr,
    t_ptr,
    i_ptr,
    rest_ptr,
    mask_ptr,
    loss_ptr,
    stats_ptr,
    pull_ptr,
    M,
    V,
    K,
    stride_zm,
    stride_zv,
    stride_mask,
    inv_t,
    HAS_MASK: tl.constexpr,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    classes = V  # of a masked row none is looked at
    if HAS_MASK:
        classes = tl.where(tl.load(mask_ptr + row * stride_mask) != 0, V, 0)
    counts = classes > 0
    z_row = z_ptr + row * stride_zm
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_k = offs_k < K
    indices = tl.load(i_ptr + row * K + offs_k, mask=mask_k, other=0x7FFFFFFFFFFFFFFF)
    log_q = tl.load(t_ptr + row * K + offs_k, mask=mask_k, other=float("-inf"))
    log_q_rest = tl.load(rest_ptr + row)
    known = (indices >= 0) & (indices < classes)
    z = tl.load(z_row + indices * stride_zv, mask=known, other=float("-inf")).to(tl.float32)
    to_exp2 = inv_t * LOG2E
    first = tl.sum((indices < 0).to(tl.int64), 0)
    largest, total = rest_of_row(z_row, i_ptr + row * K, first, classes, stride_zv, indices, to_exp2, BLOCK_V)

    peak = finite_max(tl.maximum(largest, tl.max(z, 0)))
    weights = tl.exp2((z - peak) * to_exp2)
    weight_rest = tl.exp2((largest - peak) * to_exp2) * total
    whole = tl.sum(weights, 0) + weight_rest
    log_whole = tl.log(whole)
    p = weights / whole
    p_rest = weight_rest / whole
    q = tl.exp2(log_q * LOG2E)
    q_rest = tl.exp2(log_q_rest * LOG2E)
    sum_q = tl.sum(q, 0) + q_rest
    no_p = z == float("-inf")
    no_q = log_q == float("-inf")
    no_p_rest = largest == float("-inf")
    no_q_rest = log_q_rest == float("-inf")
    d = tl.where(no_p | no_q, 0.0, (z - peak) * inv_t - log_whole - log_q)
    d_rest = (largest - peak) * inv_t + tl.log(total) - log_whole - log_q_rest
    d_rest = tl.where(no_p_rest | no_q_rest, 0.0, d_rest)
    factor = tl.zeros([BLOCK_K], tl.float32)
    factor_rest = 0.0
    pull = tl.zeros([BLOCK_K], tl.float32)
    pull_rest = 0.0
    lone = tl.zeros([BLOCK_K], tl.int32)
    lone_rest = (no_p_rest & no_q_rest & False).to(tl.int32)
    if REVERSE:
        mean = (tl.sum(p * d, 0) + p_rest * d_rest) / (tl.sum(p, 0) + p_rest)
        factor += p
        factor_rest += p_rest
        pull += p * (d - mean)
        pull_rest += p_rest * (d_rest - mean)
        lone += (no_q & (no_p == 0)).to(tl.int32)
        lone_rest += (no_q_rest & (no_p_rest == 0)).to(tl.int32)
    if FORWARD:
        factor -= q
        factor_rest -= q_rest
        pull += sum_q * p - q
        pull_rest += sum_q * p_rest - q_rest
        lone += (no_p & (no_q == 0)).to(tl.int32)
        lone_rest += (no_p_rest & (no_q_rest == 0)).to(tl.int32)
    loss = tl.sum(factor * d, 0) + factor_rest * d_rest
    loss = tl.where((tl.sum(lone, 0) + lone_rest > 0) & (loss == loss), float("inf"), loss)
    loss = tl.where((whole > 0) & (sum_q == sum_q), loss, float("nan"))
    bad = (loss == float("inf")) | (loss != loss)
    pull = tl.where(bad, float("nan"), pull)
    pull_rest = tl.where(bad, float("nan"), pull_rest) / tl.where(total == 0.0, 1.0, total)
    rows = M.to(tl.int64)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    tl.store(stats_ptr + row, tl.where(counts, finite_max(largest), 0.0))
    tl.store(stats_ptr + rows + row, tl.where(counts, pull_rest, 0.0))
    tl.store(pull_ptr + row * K + offs_k, tl.where(counts, pull, 0.0), mask=mask_k)


@triton.jit(do_not_specialize=["M"])
def _topk_kl_bwd_rest_kernel(
    z_ptr,
    stats_ptr,
    row_grad_ptr,
    grad_ptr,
    M,
    V,
    stride_zm,
    stride_zv,
    stride_grad,
    inv_t,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_m = offs_m < M
    mask_mv = mask_m[:, None] & (offs_v < V)[None, :]
    rows = M.to(tl.int64)
    largest = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
    pull = tl.load(stats_ptr + rows + offs_m, mask=mask_m, other=0.0)
    scale = tl.load(row_grad_ptr + offs_m * stride_grad, mask=mask_m, other=0.0) * inv_t
    # A row whose rest is not pulled (a masked one, say) may hold anything.
    pulled = mask_mv & (pull != 0.0)[:, None]
    z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_v[None, :] * stride_zv
    z = tl.load(z_ptrs, mask=pulled, other=float("-inf")).to(tl.float32)
    grad = (scale * pull)[:, None] * tl.exp2((z - largest[:, None]) * (inv_t * LOG2E))
    tl.store(grad_ptr + offs_m[:, None] * V + offs_v[None, :], grad.to(grad_ptr.dtype.element_ty), mask=mask_mv)


@triton.jit
def _topk_kl_bwd_known_kernel(
    i_ptr,
    pull_ptr,
    row_grad_ptr,
    grad_ptr,
    V,
    K,
    stride_grad,
    inv_t,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_k = offs_k < K
    indices = tl.load(i_ptr + row * K + offs_k, mask=mask_k, other=-1)
    pull = tl.load(pull_ptr + row * K + offs_k, mask=mask_k, other=0.0)
    grad = pull * (tl.load(row_grad_ptr + row * stride_grad) * inv_t)
    known = (indices >= 0) & (indices < V)
    tl.store(grad_ptr + row * V + indices, grad.to(grad_ptr.dtype.element_ty), mask=known)


def topk_kl_fwd(logits, log_probs, indices, log_rest, mask, temperature, direction, row_loss, stats, pull) -> None:
    """Write row_loss (M,), stats (2, M) and pull (M, k), float32, from logits (M, V) of any strides, mask (M,) or None,
    and what fastgist.reference.topk_kl.sparse_teacher gives: log_probs, indices (M, k) ascending, log_rest (M,)."""
    rows, classes = logits.shape
    known = indices.shape[1]
    block_v = min(next_power_of_2(classes), 2048)
    config = {"BLOCK_V": block_v, "num_warps": 8 if block_v >= 2048 else 4, "num_stages": 1}
    config |= launch_config("topk_kl_fwd", device_arch(logits.device), f"v{next_power_of_2(classes)}")
    launch(
        _topk_kl_fwd_kernel,
        (rows,),
        config,
        logits,
        log_probs.contiguous(),
        indices.contiguous(),
        log_rest,
        mask,
        row_loss,
        stats,
        pull,
        rows,
        classes,
        known,
        *logits.stride(),
        0 if mask is None else mask.stride(0),
        1.0 / temperature,
        HAS_MASK=mask is not None,
        FORWARD=direction != "reverse",
        REVERSE=direction != "forward",
        BLOCK_K=next_power_of_2(known),
    )


def topk_kl_bwd(logits, indices, stats, pull, row_grad, temperature, grad) -> None:
    """Write the gradient (M, V), contiguous; row_grad (M,) float32 of any stride."""
    rows, classes = logits.shape
    known = indices.shape[1]
    block_v = min(next_power_of_2(classes), 2048)
    config = {"BLOCK_V": block_v, "BLOCK_M": max(1, min(8, 512 // block_v)), "num_stages": 1}
    config |= {"num_warps": 8 if block_v >= 2048 else 4}
    config |= launch_config("topk_kl_bwd_rest", device_arch(logits.device), f"v{next_power_of_2(classes)}")
    launch(
        _topk_kl_bwd_rest_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(classes, c["BLOCK_V"])),
        config,
        logits,
        stats,
        row_grad,
        grad,
        rows,
        classes,
        *logits.stride(),
        row_grad.stride(0),
        1.0 / temperature,
    )
    launch(
        _topk_kl_bwd_known_kernel,
        (rows,),
        {"num_warps": 4, "num_stages": 1},
        indices.contiguous(),
        pull,
        row_grad,
        grad,
        classes,
        known,
        row_grad.stride(0),
        1.0 / temperature,
        BLOCK_K=next_power_of_2(known),
    )


def _specs() -> list[Spec]:
    sizes = {"M": "i32", "V": "i32", "K": "i32", "inv_t": "fp32"}
    out = []
    for label, dtype, block_k, block_v, kind in (
        ("bf16_small_v", "bf16", 16, 128, ""),
        ("bf16_long_v", "bf16", 64, 2048, ""),
        ("fp32_long_v", "fp32", 64, 2048, ""),
        ("bf16_many_k", "bf16", 1024, 2048, ""),
        *((f"{dtype}_long_v_wide", dtype, 64, 2048, "wide") for dtype in ("bf16", "fp16", "fp32")),
        ("bf16_long_v_strided", "bf16", 64, 2048, "strided"),
    ):
        warps = 8 if block_v >= 2048 else 4
        pointers = {"z_ptr": f"*{dtype}", "t_ptr": "*fp32", "i_ptr": "*i64", "rest_ptr": "*fp32", "mask_ptr": "*i1"}
        pointers |= {"loss_ptr": "*fp32", "stats_ptr": "*fp32", "pull_ptr": "*fp32"}
        pointers |= {"row_grad_ptr": "*fp32", "grad_ptr": f"*{dtype}"}
        strides = dict.fromkeys(("stride_zm", "stride_zv", "stride_mask", "stride_grad"), "i64")
        flags: dict[str, object] = {"HAS_MASK": True, "FORWARD": True, "REVERSE": True, "BLOCK_K": block_k}
        flags |= {"BLOCK_M": max(1, min(8, 2048 // (4 * block_v))), "BLOCK_V": block_v}
        flags |= {} if kind == "strided" else {"stride_zv": 1}
        # Where V is a multiple of 16 (the launcher looks), rows are read and written 16 bytes at a time.
        each = block_v * (4 if dtype == "fp32" else 2) // (32 * warps * 16)
        for kernel in (_topk_kl_fwd_kernel, _topk_kl_bwd_rest_kernel, _topk_kl_bwd_known_kernel):
            rest, known = kernel is _topk_kl_bwd_rest_kernel, kernel is _topk_kl_bwd_known_kernel
            if (rest and "many" in label) or (known and kind):
                continue
            held: dict[str, Any] = {}
            if kind == "wide":  # the backward's rows have three numbers each; the forward takes the k one by one
                held = {"aligned": ("V",), "accesses": (1 + rest) * each} | (
                    {"wide": True, "numbers": 3} if rest else {}
                )
                if dtype == "bf16" and kernel is _topk_kl_fwd_kernel:
                    held["archs"] = (90, 100)  # on sm_80 Triton 3.6, not 3.9, spills two registers
            elif kind == "strided":
                held = {"unaligned": ("stride_zv",)}
            mine = {n: v for n, v in flags.items() if n in kernel.arg_names}
            signature = {n: v for n, v in (pointers | sizes | strides).items() if n in kernel.arg_names}
            out.append(Spec(kernel, label, signature, mine, num_warps=4 if known else warps, num_stages=1, **held))
    return out


SPECS = _specs()
