"""The tall products of cp_linear: h = drop(x U), and dL/dh = drop'(scale * sum_g (dy_g V) * gain_g) from one read of dy.

Sizes M rows, N columns in G folds of width n, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, device_arch, dot, launch, launch_config
from fastgist_kernels.cp_linear_parts import (
    dropout_args,
    dropped,
    folded_v,
    gain_strides,
    own_folds,
    runs,
)
from fastgist_kernels.cp_linear_plan import narrow_by_library, product_precision, shape_class
from fastgist_kernels.outer import argument_types, narrow, rank_block
from fastgist_kernels.pieces import padded, pick, sizes, strides

__all__ = ["SPECS", "project"]


@triton.jit
def _cp_linear_project_kernel(
    a0_ptr,
    a1_ptr,
    a2_ptr,
    b_ptr,
    gain_ptr,
    seed_ptr,
    h_ptr,
    M,
    n0,
    n1,
    n2,
    R,
    fold_n,
    stride_am0,
    stride_am1,
    stride_am2,
    stride_an0,
    stride_an1,
    stride_an2,
    stride_bn,
    stride_br,
    stride_gg,
    stride_gr,
    stride_hm,
    scale,
    threshold,
    inv_keep,
    PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    ADD: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h (M, R) = drop(scale * sum_g (a_g b) * gain_g) over the folds a_g (M, fold_n) of a, in pieces: x U, and dL/dh.
    ADD: added to what h holds of other pieces."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_r = tl.program_id(1) * BLOCK_R
    offs_r = first_r.to(tl.int64) + tl.arange(0, BLOCK_R)
    offs_j = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = offs_m < M
    mask_r = offs_r < R
    h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for piece in range(0, PIECES):
        a_ptr = pick(piece, (a0_ptr, a1_ptr, a2_ptr), PIECES)
        stride_am = pick(piece, (stride_am0, stride_am1, stride_am2), PIECES)
        stride_an = pick(piece, (stride_an0, stride_an1, stride_an2), PIECES)
        columns = pick(piece, (n0, n1, n2), PIECES)
        first_b, first_fold, width = own_folds(piece, n0, n1, n2, fold_n, PIECES, WHOLE)
        for own in range(0, columns // width):
            first_n = tl.cast(own, tl.int64) * width
            acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for first_j in range(0, width, BLOCK_N):
                offs_c = first_j + offs_j
                mask_c = offs_c < width
                a_ptrs = a_ptr + offs_m[:, None] * stride_am + (first_n + offs_c)[None, :] * stride_an
                b_ptrs = b_ptr + (first_b + offs_c)[:, None] * stride_bn + offs_r[None, :] * stride_br
                a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
                b = tl.load(b_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
                acc = dot(a, b, acc, PRECISION)
            if HAS_GAIN:
                gain_ptrs = gain_ptr + tl.cast(first_fold + own, tl.int64) * stride_gg + offs_r * stride_gr
                acc = acc * tl.load(gain_ptrs, mask=mask_r, other=0.0).to(tl.float32)[None, :]
            h += acc
    h = h * scale
    if HAS_DROPOUT:
        h = dropped(h, seed_ptr, offs_m, first_r, R, threshold, inv_keep, BLOCK_M, BLOCK_R)
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_r[None, :]
    mask_h = mask_m[:, None] & mask_r[None, :]
    if ADD:
        h += tl.load(h_ptrs, mask=mask_h, other=0.0).to(tl.float32)
    tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty), mask=mask_h)


# -- launching -------------------------------------------------------------------------------------------------------


def project(pieces: Sequence[torch.Tensor], b, gain, seed, scale, dropout_p, tf32, h) -> None:
    """h (M, R), its rows contiguous, = drop(scale * sum_g (a_g b) * gain_g), a (M, G n) in pieces, each of whole folds or
    b (n, R) with a row for each column of all. More pieces than a launch takes are added to what the ones before wrote.
    Of few rows there are few programs, each as long as a row: there the library, which splits the columns too, may be faster.
    """
    a = pieces[0]
    rows, columns = a.shape[0], sum(t.shape[1] for t in pieces)
    fold_n, rank = b.shape
    if seed is None and h.dtype == a.dtype and narrow_by_library(a, columns, rank, tf32):
        _by_library(pieces, folded_v(b, gain, columns // fold_n), scale, h)
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
    for i, (some, own_b, own_gain, whole) in enumerate(runs(pieces, b, gain)):
        launch(
            _cp_linear_project_kernel,
            lambda c: (cdiv(rows, c["BLOCK_M"]), cdiv(rank, c["BLOCK_R"])),
            config,
            *padded(some),
            own_b,
            own_gain,
            seed,
            h,
            rows,
            *sizes(some, 1),
            rank,
            own_b.shape[0],
            *strides(some),
            *own_b.stride(),
            *gain_strides(own_gain),
            h.stride(0),
            scale,
            *dropout_args(seed, dropout_p),
            PIECES=len(some),
            WHOLE=whole,
            ADD=i > 0,
            HAS_GAIN=gain is not None,
            HAS_DROPOUT=seed is not None,
            PRECISION=product_precision(a.dtype, tf32),
        )


def _by_library(pieces, folded, scale, h) -> None:
    first = 0
    for a in pieces:
        rows = folded[first : first + a.shape[1]]
        if first == 0:
            torch.mm(a, rows, out=h)
        else:
            h.addmm_(a, rows)
        first += a.shape[1]
    if scale != 1.0:
        h.mul_(scale)


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    out = []
    unit = {"stride_an0": 1, "stride_an1": 1, "stride_an2": 1, "stride_br": 1, "stride_gr": 1}
    for dtype, precision, block_n, rank, warps, stages, pieces, whole in (
        ("bf16", "ieee", 64, 16, 4, 4, 1, False),
        ("bf16", "ieee", 64, 64, 8, 4, 1, False),
        ("bf16", "ieee", 64, 64, 8, 4, 3, False),
        ("bf16", "ieee", 64, 64, 8, 4, 3, True),
        ("fp16", "tf32", 64, 64, 8, 4, 1, False),
        ("fp16", "tf32", 64, 64, 8, 4, 3, False),
        ("fp32", "ieee", 32, 64, 8, 3, 1, False),
        ("fp32", "ieee", 32, 64, 8, 3, 3, False),
    ):
        constexprs: dict[str, object] = {**unit, "PIECES": pieces, "WHOLE": whole, "ADD": False, "HAS_GAIN": True}
        constexprs |= {"HAS_DROPOUT": True, "PRECISION": precision}
        constexprs |= {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_R": rank}
        if pieces == 1:
            constexprs |= dict.fromkeys(("a1_ptr", "a2_ptr"))
        label = f"{dtype}_{precision}_r{rank}" + (f"_{pieces}_pieces" if pieces > 1 else "") + "_whole" * whole
        out.append(
            Spec(
                _cp_linear_project_kernel,
                label,
                argument_types(_cp_linear_project_kernel, constexprs, dtype),
                constexprs,
                num_warps=warps,
                num_stages=stages,
                matrix=dtype != "fp32",
                aligned=("M", "n0", "n1", "n2", "R", "fold_n"),
            )
        )
    return out


SPECS = _specs()
