"""The tall products of cp_linear: h = drop(x U), and dL/dh = drop'(scale * sum_g (dy_g V) * gain_g) from one read of dy.

Sizes M rows, N columns in G folds of width n, R rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, device_arch, dot, launch, launch_config
from fastgist_kernels.cp_linear_parts import dropout_args, dropped, folded_v, gain_strides
from fastgist_kernels.cp_linear_plan import narrow_by_library, product_precision, shape_class
from fastgist_kernels.outer import argument_types, narrow, rank_block

__all__ = ["SPECS", "project"]


@triton.jit
def _cp_linear_project_kernel(
    a_ptr,
    b_ptr,
    gain_ptr,
    seed_ptr,
    h_ptr,
    M,
    N,
    R,
    fold_n,
    stride_am,
    stride_an,
    stride_bn,
    stride_br,
    stride_gg,
    stride_gr,
    stride_hm,
    scale,
    threshold,
    inv_keep,
    HAS_GAIN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h (M, R) = drop(scale * sum_g (a_g b) * gain_g) over the folds a_g (M, fold_n) of a (M, N): x U, and dL/dh."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_r = tl.program_id(1) * BLOCK_R
    offs_r = first_r.to(tl.int64) + tl.arange(0, BLOCK_R)
    offs_j = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = offs_m < M
    mask_r = offs_r < R
    h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for fold in range(0, N // fold_n):
        first_n = tl.cast(fold, tl.int64) * fold_n
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for first_j in range(0, fold_n, BLOCK_N):
            offs_c = first_j + offs_j
            mask_c = offs_c < fold_n
            a_ptrs = a_ptr + offs_m[:, None] * stride_am + (first_n + offs_c)[None, :] * stride_an
            b_ptrs = b_ptr + offs_c[:, None] * stride_bn + offs_r[None, :] * stride_br
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
            acc = dot(a, b, acc, PRECISION)
        if HAS_GAIN:
            gain_ptrs = gain_ptr + tl.cast(fold, tl.int64) * stride_gg + offs_r * stride_gr
            acc = acc * tl.load(gain_ptrs, mask=mask_r, other=0.0).to(tl.float32)[None, :]
        h += acc
    h = h * scale
    if HAS_DROPOUT:
        h = dropped(h, seed_ptr, offs_m, first_r, R, threshold, inv_keep, BLOCK_M, BLOCK_R)
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_r[None, :]
    tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


# -- launching -------------------------------------------------------------------------------------------------------


def project(a, b, gain, seed, scale, dropout_p, tf32, h) -> None:
    """h (M, R), its rows contiguous, = drop(scale * sum_g (a_g b) * gain_g), a (M, G n), b (n, R). Of few rows there are few
    programs, each as long as a row: there the library, which splits the columns too, may be faster."""
    rows, columns = a.shape
    fold_n, rank = b.shape
    if seed is None and h.dtype == a.dtype and narrow_by_library(a, rank, tf32):
        torch.mm(a, folded_v(b, gain, columns // fold_n), out=h)
        if scale != 1.0:
            h.mul_(scale)
        return
    arch = device_arch(a.device)
    block_r = rank_block(rank, 64)
    wide = a.dtype == torch.float32
    if arch == "interpret":
        config = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_R": rank_block(rank, 32)}
    else:
        config = {"BLOCK_M": 64, "BLOCK_N": 32 if wide else 64, "BLOCK_R": block_r}
        config |= {"num_warps": 8 if wide or block_r > 16 else 4, "num_stages": 3 if wide else 4}
        config |= launch_config("cp_linear_project", arch, shape_class(rows, columns, fold_n, rank))
    launch(
        _cp_linear_project_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(rank, c["BLOCK_R"])),
        config,
        a,
        b,
        gain,
        seed,
        h,
        rows,
        columns,
        rank,
        fold_n,
        *a.stride(),
        *b.stride(),
        *gain_strides(gain),
        h.stride(0),
        scale,
        *dropout_args(seed, dropout_p),
        HAS_GAIN=gain is not None,
        HAS_DROPOUT=seed is not None,
        PRECISION=product_precision(a.dtype, tf32),
    )


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    out = []
    unit = {"stride_an": 1, "stride_br": 1, "stride_gr": 1}
    for dtype, precision, block_n, rank, warps, stages in (
        ("bf16", "ieee", 64, 16, 4, 4),
        ("bf16", "ieee", 64, 64, 8, 4),
        ("fp16", "tf32", 64, 64, 8, 4),
        ("fp32", "ieee", 32, 64, 8, 3),
    ):
        constexprs = {**unit, "HAS_GAIN": True, "HAS_DROPOUT": True, "PRECISION": precision}
        constexprs |= {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_R": rank}
        out.append(
            Spec(
                _cp_linear_project_kernel,
                f"{dtype}_{precision}_r{rank}",
                argument_types(_cp_linear_project_kernel, constexprs, dtype),
                constexprs,
                num_warps=warps,
                num_stages=stages,
                matrix=dtype != "fp32",
                aligned=("M", "N", "R", "fold_n"),
            )
        )
    return out


SPECS = _specs()
