"""The norm's part of adapter's backward, in what has the size of the weights (the rows' part is in adapter_bwd.py).

With xhat = (x - mean) rstd, the norm's weight w and bias b, and dz (M, H) from that kernel:

    G = dz^T xhat       s = colsum(dz)      dD = G * w + s b^T      dw = colsum(D * G)      db = D^T s

so no gradient of the norm sums over rows (M, D). G comes in pieces as in outer.py, xhat being formed from x on its way into
the product; :func:`finish` adds the pieces in a fixed order and writes all that hangs on them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.adapter_parts import normalised
from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, device_arch, launch
from fastgist_kernels.outer import argument_types, low_dot, narrow, processors, rank_block

__all__ = ["SPECS", "constant_sums", "every_tile", "finish", "normalised_partials"]


@triton.jit
def _adapter_norm_sums_kernel(
    down_ptr,
    down_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    D,
    H,
    stride_dh,
    stride_dd,
    stride_db,
    stride_nw,
    stride_nb,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (2, H) float32: D w, and b_d + D b. DTYPE: what D and b_d are rounded to where they meet x."""
    offs_h = tl.program_id(0).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_h = offs_h < H
    of_weight = tl.zeros([BLOCK_H], tl.float32)
    of_bias = tl.zeros([BLOCK_H], tl.float32)
    for first_d in range(0, D, BLOCK_D):
        offs_c = first_d + offs_d
        mask_c = offs_c < D
        down_ptrs = down_ptr + offs_h[:, None] * stride_dh + offs_c[None, :] * stride_dd
        down = narrow(tl.load(down_ptrs, mask=mask_h[:, None] & mask_c[None, :], other=0.0), DTYPE).to(tl.float32)
        if HAS_NORM_WEIGHT:
            weight = tl.load(norm_weight_ptr + offs_c * stride_nw, mask=mask_c, other=0.0)
            of_weight += tl.sum(down * weight.to(tl.float32)[None, :], 1)
        else:
            of_weight += tl.sum(down, 1)
        if HAS_NORM_BIAS:
            bias = tl.load(norm_bias_ptr + offs_c * stride_nb, mask=mask_c, other=0.0)
            of_bias += tl.sum(down * bias.to(tl.float32)[None, :], 1)
    if HAS_DOWN_BIAS:
        bias = tl.load(down_bias_ptr + offs_h * stride_db, mask=mask_h, other=0.0)
        of_bias += narrow(bias, DTYPE).to(tl.float32)
    tl.store(out_ptr + offs_h, of_weight, mask=mask_h)
    tl.store(out_ptr + (H + offs_h), of_bias, mask=mask_h)


@triton.jit
def _adapter_norm_outer_kernel(
    x_ptr,
    dz_ptr,
    stats_ptr,
    part_ptr,
    M,
    D,
    H,
    rows_per_split,
    stride_xm,
    stride_xd,
    stride_zm,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part (splits, D, H): a range of rows' share of xhat^T dz. dz (M, H) has unit inner stride."""
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    mask_c = offs_c < D
    mask_r = offs_r < H
    acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for start in range(0, rows_per_split, BLOCK_M):
        offs_m = split * rows_per_split + start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :] * stride_xd
        z_ptrs = dz_ptr + offs_m[:, None] * stride_zm + offs_r[None, :]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        dz = tl.load(z_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        mean = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(stats_ptr + (M + offs_m), mask=mask_m, other=0.0)
        acc = low_dot(tl.trans(normalised(x, mean, rstd)), dz, acc, WIDE, PRECISION)
    part_ptrs = part_ptr + split * (tl.cast(D, tl.int64) * H) + offs_c[:, None] * H + offs_r[None, :]
    tl.store(part_ptrs, acc, mask=mask_c[:, None] & mask_r[None, :])


@triton.jit
def _adapter_norm_finish_kernel(
    part_ptr,
    total_ptr,
    down_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    grad_down_ptr,
    grad_down_bias_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    splits,
    D,
    H,
    stride_dh,
    stride_dd,
    stride_nw,
    stride_nb,
    HAS_PARTS: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    NEED_DOWN: tl.constexpr,
    NEED_DOWN_BIAS: tl.constexpr,
    NEED_NORM_WEIGHT: tl.constexpr,
    NEED_NORM_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """From part (splits, D, H) and total = s (H): grad_down (H, D), grad_down_bias (H), grad_norm_weight, grad_norm_bias (D),
    contiguous; each program has BLOCK_C columns. DTYPE: what D is rounded to where it meets x."""
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < D
    products = tl.cast(D, tl.int64) * H
    grad_weight = tl.zeros([BLOCK_C], tl.float32)
    grad_bias = tl.zeros([BLOCK_C], tl.float32)
    for first_r in range(0, H, BLOCK_R):
        offs_r = first_r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < H
        mask = mask_c[:, None] & mask_r[None, :]
        if NEED_NORM_WEIGHT or NEED_NORM_BIAS:
            down_ptrs = down_ptr + offs_c[:, None] * stride_dd + offs_r[None, :] * stride_dh
            down = narrow(tl.load(down_ptrs, mask=mask, other=0.0), DTYPE).to(tl.float32)
        if HAS_PARTS:
            outer = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
            offs_p = offs_c[:, None] * H + offs_r[None, :]
            for start in range(0, splits, BLOCK_S):
                offs_s = start + tl.arange(0, BLOCK_S).to(tl.int64)
                mask_s = (offs_s < splits)[:, None, None] & mask[None, :, :]
                part_ptrs = part_ptr + offs_s[:, None, None] * products + offs_p[None, :, :]
                outer += tl.sum(tl.load(part_ptrs, mask=mask_s, other=0.0), 0)
        if NEED_NORM_BIAS or NEED_DOWN_BIAS or (NEED_DOWN and HAS_NORM_BIAS):
            total = tl.load(total_ptr + offs_r, mask=mask_r, other=0.0)
        if NEED_NORM_WEIGHT:
            grad_weight += tl.sum(down * outer, 1)
        if NEED_NORM_BIAS:
            grad_bias += tl.sum(down * total[None, :], 1)
        if NEED_DOWN:
            if HAS_NORM_WEIGHT:
                weight = tl.load(norm_weight_ptr + offs_c * stride_nw, mask=mask_c, other=0.0)
                outer = outer * weight.to(tl.float32)[:, None]
            if HAS_NORM_BIAS:
                bias = tl.load(norm_bias_ptr + offs_c * stride_nb, mask=mask_c, other=0.0)
                outer += bias.to(tl.float32)[:, None] * total[None, :]
            grad_ptrs = grad_down_ptr + offs_r[None, :] * D + offs_c[:, None]
            tl.store(grad_ptrs, narrow(outer, grad_down_ptr.dtype.element_ty), mask=mask)
        if NEED_DOWN_BIAS:
            if tl.program_id(0) == 0:
                rounded = narrow(total, grad_down_bias_ptr.dtype.element_ty)
                tl.store(grad_down_bias_ptr + offs_r, rounded, mask=mask_r)
    if NEED_NORM_WEIGHT:
        tl.store(grad_norm_weight_ptr + offs_c, narrow(grad_weight, grad_norm_weight_ptr.dtype.element_ty), mask=mask_c)
    if NEED_NORM_BIAS:
        tl.store(grad_norm_bias_ptr + offs_c, narrow(grad_bias, grad_norm_bias_ptr.dtype.element_ty), mask=mask_c)


# -- launching -------------------------------------------------------------------------------------------------------

#: Few units a program: a bottleneck of 64 makes 32 programs.
_SUMS_TILE = {"BLOCK_H": 2, "BLOCK_D": 512}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def constant_sums(down_weight, down_bias, norm_weight, norm_bias, dtype: torch.dtype) -> torch.Tensor:
    """(2, H) float32: D w and b_d + D b, which c1 and c2 take from every row. ``dtype``: x's."""
    hidden, inner = down_weight.shape
    out = torch.empty(2, hidden, dtype=torch.float32, device=down_weight.device)
    interpreted = device_arch(out.device) == "interpret"
    launch(
        _adapter_norm_sums_kernel,
        lambda c: (cdiv(hidden, c["BLOCK_H"]),),
        {"BLOCK_H": 4, "BLOCK_D": 32} if interpreted else _SUMS_TILE,
        down_weight,
        down_bias,
        norm_weight,
        norm_bias,
        out,
        inner,
        hidden,
        *down_weight.stride(),
        0 if down_bias is None else down_bias.stride(0),
        0 if norm_weight is None else norm_weight.stride(0),
        0 if norm_bias is None else norm_bias.stride(0),
        HAS_DOWN_BIAS=down_bias is not None,
        HAS_NORM_WEIGHT=norm_weight is not None,
        HAS_NORM_BIAS=norm_bias is not None,
        DTYPE=_TYPES[dtype],
    )
    return out


def _outer_tile(float32: bool, wide: bool, hidden: int) -> dict[str, int]:
    """Read off the compiler, not off a clock."""
    block_r = rank_block(hidden, 64 if float32 or wide else 128)
    return {
        "BLOCK_M": 32 if float32 or wide else 64,
        "BLOCK_C": 64,
        "BLOCK_R": block_r,
        "num_warps": 8 if block_r > 64 or wide else 4,
        "num_stages": 3,
    }


def normalised_partials(x, dz, stats, *, tf32: bool) -> torch.Tensor:
    """xhat^T dz in pieces, (splits, D H) float32, from x (M, D) of any strides, dz (M, H) contiguous and stats (2, M)."""
    rows, inner = x.shape
    hidden = dz.shape[1]
    config = _outer_tile(x.dtype == torch.float32, x.dtype == torch.float16, hidden)
    if device_arch(x.device) == "interpret":
        config = {"BLOCK_M": 16, "BLOCK_C": 32, "BLOCK_R": rank_block(hidden, 32)}
    tiles = cdiv(inner, config["BLOCK_C"]) * cdiv(hidden, config["BLOCK_R"])
    sms = processors(x.device)
    # Four programs a processor, as long as the pieces stay an eighth of what is read.
    most = max(sms // tiles, rows * x.element_size() // (32 * hidden))
    splits = max(1, min(4 * sms // tiles, most, cdiv(rows, config["BLOCK_M"])))
    rows_per_split = cdiv(cdiv(rows, splits), config["BLOCK_M"]) * config["BLOCK_M"]
    splits = cdiv(rows, rows_per_split)
    part = torch.empty(splits, inner * hidden, dtype=torch.float32, device=x.device)
    launch(
        _adapter_norm_outer_kernel,
        lambda c: (cdiv(inner, c["BLOCK_C"]), cdiv(hidden, c["BLOCK_R"]), splits),
        config,
        x,
        dz,
        stats,
        part,
        rows,
        inner,
        hidden,
        rows_per_split,
        *x.stride(),
        dz.stride(0),
        WIDE=x.dtype == torch.float16,
        PRECISION="tf32" if tf32 or x.dtype == torch.float16 else "ieee",
    )
    return part


def _finish_tile(hidden: int) -> dict[str, int]:
    """4,096 numbers of the pieces at a time, 16 pieces deep."""
    block_r = rank_block(hidden, 64)
    return {"BLOCK_S": 16, "BLOCK_C": 256 // block_r, "BLOCK_R": block_r, "num_warps": 4}


def finish(
    part, total, down_weight, norm_weight, norm_bias, dtype: torch.dtype,
    grad_down, grad_down_bias, grad_norm_weight, grad_norm_bias,
) -> None:  # fmt: skip
    """Write the gradients that are not None: grad_down (H, D), grad_down_bias (H,), grad_norm_weight and grad_norm_bias (D,),
    all contiguous. part: :func:`normalised_partials`, or None where only ``total``, s (H,) in float32, is needed; None in
    its turn where the former is all. ``dtype``: x's."""
    hidden, inner = down_weight.shape if down_weight is not None else grad_down.shape
    block = _finish_tile(hidden)
    if device_arch(part.device if part is not None else total.device) == "interpret":
        block = {"BLOCK_S": 4, "BLOCK_C": 32, "BLOCK_R": rank_block(hidden, 32)}
    launch(
        _adapter_norm_finish_kernel,
        lambda c: (cdiv(inner, c["BLOCK_C"]),),
        block,
        part,
        total,
        down_weight,
        norm_weight,
        norm_bias,
        grad_down,
        grad_down_bias,
        grad_norm_weight,
        grad_norm_bias,
        0 if part is None else part.shape[0],
        inner,
        hidden,
        *((0, 0) if down_weight is None else down_weight.stride()),
        0 if norm_weight is None else norm_weight.stride(0),
        0 if norm_bias is None else norm_bias.stride(0),
        HAS_PARTS=part is not None,
        HAS_NORM_WEIGHT=norm_weight is not None,
        HAS_NORM_BIAS=norm_bias is not None,
        NEED_DOWN=grad_down is not None,
        NEED_DOWN_BIAS=grad_down_bias is not None,
        NEED_NORM_WEIGHT=grad_norm_weight is not None,
        NEED_NORM_BIAS=grad_norm_bias is not None,
        DTYPE=_TYPES[dtype],
    )


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------

_TL = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def _outer_spec(dtype: str, precision: str, hidden: int, aligned: bool = True) -> Spec:
    tile = _outer_tile(dtype == "fp32", dtype == "fp16", hidden)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    constexprs = {"stride_xd": 1, "WIDE": dtype == "fp16", "PRECISION": precision} | tile
    return Spec(
        _adapter_norm_outer_kernel,
        f"{dtype}_{precision}_h{hidden}{'' if aligned else '_ragged'}",
        argument_types(_adapter_norm_outer_kernel, constexprs, dtype) | {"stats_ptr": "*fp32"},
        constexprs,
        num_warps=warps,
        num_stages=stages,
        matrix=tile["BLOCK_C"] >= 64 and (dtype, precision) != ("fp32", "ieee"),
        aligned=("D", "H") if aligned else (),
        unaligned=() if aligned else ("stride_xm", "stride_zm"),
    )


def _finish_spec(dtype: str, hidden: int) -> Spec:
    tile = _finish_tile(hidden)
    warps = tile.pop("num_warps")
    flags = dict.fromkeys(("HAS_PARTS", "HAS_NORM_WEIGHT", "HAS_NORM_BIAS", "NEED_DOWN", "NEED_DOWN_BIAS"), True)
    flags |= {"NEED_NORM_WEIGHT": True, "NEED_NORM_BIAS": True, "DTYPE": _TL[dtype]}
    constexprs = {"stride_dd": 1, "stride_nw": 1, "stride_nb": 1} | flags | tile
    types = argument_types(_adapter_norm_finish_kernel, constexprs, dtype) | {"total_ptr": "*fp32", "splits": "i32"}
    return Spec(
        _adapter_norm_finish_kernel, f"{dtype}_h{hidden}", types, constexprs, num_warps=warps, aligned=("D", "H")
    )


def _sums_spec(dtype: str) -> Spec:
    flags = dict.fromkeys(("HAS_DOWN_BIAS", "HAS_NORM_WEIGHT", "HAS_NORM_BIAS"), True) | {"DTYPE": _TL[dtype]}
    constexprs = {"stride_dd": 1, "stride_db": 1, "stride_nw": 1, "stride_nb": 1} | flags | _SUMS_TILE
    types = argument_types(_adapter_norm_sums_kernel, constexprs, dtype) | {"out_ptr": "*fp32"}
    return Spec(_adapter_norm_sums_kernel, dtype, types, constexprs, aligned=("D", "H"))


#: (dtype, precision of its products, most hidden units a tile)
_KINDS = (("bf16", "ieee", 128), ("fp16", "tf32", 64), ("fp32", "tf32", 64), ("fp32", "ieee", 64))


def every_tile() -> list[Spec]:
    """Every combination that a launch can take."""
    widths = [(dtype, precision, h) for dtype, precision, most in _KINDS for h in (16, 32, 64, 128) if h <= most]
    outers = [_outer_spec(d, precision, h, aligned) for d, precision, h in widths for aligned in (True, False)]
    return outers + [_finish_spec(dtype, h) for dtype in _TL for h in (16, 32, 64)]


SPECS = [
    *(_outer_spec(dtype, precision, most) for dtype, precision, most in _KINDS),
    _outer_spec("bf16", "ieee", 16),
    _outer_spec("bf16", "ieee", 64),
    _finish_spec("bf16", 16),
    _finish_spec("bf16", 64),
    _finish_spec("fp32", 16),
    _sums_spec("bf16"),
    _sums_spec("fp32"),
]
