"""cp_linear's forward for up to 64 rows, as in decoding: the price is one read of W, so the programs are made for that.

Two launches, no atomics, one order of every sum:

1. A grid of column tiles by ranges of K writes float32 partial products, (splits, M, N). The columns of U stand behind those
   of W as more tiles of the same grid and give partial sums of h = x U, (splits, M, R): U is read once, and no program waits.
2. Each program adds the splits' parts of its tile of y and of its rows of h, which come by asynchronous copies, three at a
   time; it applies dropout, gain and scale to h, and adds h V^T and the bias.

How many programs. Memory of 4.3 TB/s that answers after some 0.8 us needs 3.4 MB under way, 26 KB on each of 132
processors. A program has three tiles of W under way (four stages, BLOCK_K = 128 bytes of a row, each fetched 16 bytes at a
time): 12 KB a program for 32 columns, 24 for 64, 48 for 128. Two programs a processor are thus enough, 264 in all:
splits = 264 BLOCK_N / N. One program a column tile, as the ordinary form has them, is 12 programs at N = 768 and 64 at 4096.

How wide a tile. x is read from L2 by every column tile, 2 M N K / BLOCK_N bytes in all, and the partial sums are written and
read there, 8 M N splits = 8 * 264 M BLOCK_N. Together they are least at BLOCK_N = sqrt(N K / 1056), for any M: 24 at 768, 63
at 2048, 126 at 4096, hence 32, 64 and 128 with 6, 8 and 8 splits. At 64 rows and 4096 columns that is 17 + 17 MB in L2
beside the 34 of W from memory; at one row nothing of note.

Where h comes from. Were each program to form its own part of h, U would be read R / BLOCK_N times W's bytes: a quarter of W
at rank 16 and 64 columns. As tiles of their own the columns of U cost R / N. h is complete when the first launch ends, so the
second cannot be saved; it moves L2's bytes.

Operands that cannot be fetched 16 bytes at a time would go through registers, and spill: they take another form.
None of this has been measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, device_arch, dot, launch, launch_config
from fastgist_kernels.cp_linear_forms import aligned
from fastgist_kernels.cp_linear_parts import (
    Group,
    column_tiles,
    dropout_args,
    dropped,
    gain_strides,
    groups,
    place_of_tile,
    tiles_of_all,
)
from fastgist_kernels.cp_linear_plan import product_precision, shape_class
from fastgist_kernels.outer import argument_types, low_dot, narrow, processors, rank_block
from fastgist_kernels.pieces import padded, sizes

__all__ = ["SPECS", "few"]


@triton.jit
def _cp_linear_few_kernel(
    x_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    u_ptr,
    part_ptr,
    low_ptr,
    M,
    N,
    n0,
    n1,
    n2,
    K,
    R,
    k_per_split,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_uk,
    stride_ur,
    PIECES: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partial sums of x W^T, and in the column tiles behind W's of x U, over one range of K. M <= BLOCK_M."""
    tile = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    tiles_w = tiles_of_all(n0, n1, n2, 0, PIECES, True, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    begin = split * k_per_split
    end = tl.minimum(begin + k_per_split, K)
    if tile < tiles_w:
        weights = (w0_ptr, w1_ptr, w2_ptr)
        place = place_of_tile(tile, weights, weights, n0, n1, n2, 0, PIECES, True, False, BLOCK_N)
        w_ptr, _, start, first_row, _, width, _, _ = place
        offs_n = first_row + tl.arange(0, BLOCK_N)
        mask_n = offs_n < width
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first_k in range(begin, end, BLOCK_K):
            offs_c = first_k + offs_k
            mask_x = mask_m[:, None]
            mask_w = mask_n[None, :]
            if not EVEN_K:
                mask_k = offs_c < K
                mask_x = mask_x & mask_k[None, :]
                mask_w = mask_w & mask_k[:, None]
            x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :] * stride_xk, mask=mask_x, other=0.0)
            w = tl.load(w_ptr + offs_n[None, :] * stride_wn + offs_c[:, None] * stride_wk, mask=mask_w, other=0.0)
            acc = dot(x, w, acc, PRECISION)
        part_ptrs = part_ptr + (split * M + offs_m)[:, None] * N + (start + offs_n)[None, :]
        tl.store(part_ptrs, acc, mask=mask_m[:, None] & mask_n[None, :])
    else:
        offs_r = (tile - tiles_w).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        acc_h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for first_k in range(begin, end, BLOCK_K):
            offs_c = first_k + offs_k
            mask_x = mask_m[:, None]
            mask_u = mask_r[None, :]
            if not EVEN_K:
                mask_k = offs_c < K
                mask_x = mask_x & mask_k[None, :]
                mask_u = mask_u & mask_k[:, None]
            x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :] * stride_xk, mask=mask_x, other=0.0)
            u = tl.load(u_ptr + offs_c[:, None] * stride_uk + offs_r[None, :] * stride_ur, mask=mask_u, other=0.0)
            acc_h = dot(x, u, acc_h, PRECISION)
        low_ptrs = low_ptr + (split * M + offs_m)[:, None] * R + offs_r[None, :]
        tl.store(low_ptrs, acc_h, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit
def _cp_linear_few_finish_kernel(
    part_ptr,
    low_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    v_ptr,
    gain_ptr,
    seed_ptr,
    h_ptr,
    y_ptr,
    splits,
    low_splits,
    M,
    N,
    n0,
    n1,
    n2,
    R,
    fold_n,
    stride_bias,
    stride_vn,
    stride_vr,
    stride_gg,
    stride_gr,
    stride_ym,
    scale,
    threshold,
    inv_keep,
    PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    STORE_H: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = the sum of part (splits, M, N) + bias + scale * (h * gain) V^T, h the sum of low (low_splits, M, R), dropped."""
    pid_n = tl.program_id(0)
    biases = (bias0_ptr, bias1_ptr, bias2_ptr)
    no_weights = (part_ptr, part_ptr, part_ptr)
    place = place_of_tile(pid_n, no_weights, biases, n0, n1, n2, fold_n, PIECES, WHOLE, HAS_BIAS, BLOCK_N)
    _, bias_ptr, start, first_row, first_j, width, fold, first_v = place
    offs_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_n = first_row + offs_t
    offs_v = first_v + offs_t
    mask_m = offs_m < M
    mask_n = first_j + offs_t < width
    mask_y = mask_m[:, None] & mask_n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    part_ptrs = part_ptr + offs_m[:, None] * N + (start + offs_n)[None, :]
    step_y = tl.cast(M, tl.int64) * N
    for _ in tl.range(0, splits, num_stages=4):
        acc += tl.load(part_ptrs, mask=mask_y, other=0.0)
        part_ptrs += step_y
    step_h = tl.cast(M, tl.int64) * R
    for first_r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = first_r + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        mask_h = mask_m[:, None] & mask_r[None, :]
        h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        low_ptrs = low_ptr + offs_m[:, None] * R + offs_r[None, :]
        for _ in tl.range(0, low_splits, num_stages=4):
            h += tl.load(low_ptrs, mask=mask_h, other=0.0)
            low_ptrs += step_h
        if HAS_DROPOUT:
            h = dropped(h, seed_ptr, offs_m, first_r, R, threshold, inv_keep, BLOCK_M, BLOCK_R)
        if STORE_H:
            if pid_n == 0:
                h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
                tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty), mask=mask_h)
        h = h * scale
        if HAS_GAIN:
            gain = tl.load(gain_ptr + fold * stride_gg + offs_r * stride_gr, mask=mask_r, other=0.0)
            h = h * gain.to(tl.float32)[None, :]
        v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_v[None, :] * stride_vn
        v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = low_dot(h, v, acc, WIDE, PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + (start + offs_n)[None, :]
    tl.store(y_ptrs, narrow(acc, y_ptr.dtype.element_ty), mask=mask_y)


# -- launching -------------------------------------------------------------------------------------------------------


def few(x, weights, biases, u, v, gain, seed, scale, dropout_p, tf32, y, h) -> None:
    """Write y (M, N) and, where it is not None, h (M, R); M <= 64. Arguments as cp_linear_fwd's."""
    low = None
    for group in groups(weights, biases, v, gain):
        columns = y[:, group.columns]
        part, made = _partial(x, group, u if low is None else None, tf32)
        first = low is None
        low = made if first else low
        _finish(part, low, group, seed, scale, dropout_p, tf32, columns, h if first else None)


def few_config(x: torch.Tensor, out: int, rank: int) -> dict[str, int]:
    """Tile and K of a split of the first launch; see the top of this file."""
    rows, inner = x.shape
    arch = device_arch(x.device)
    sms = processors(x.device)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if arch == "interpret":
        config = {"BLOCK_M": block_m, "BLOCK_N": 32, "BLOCK_K": 16}
    else:
        best = (out * inner / (8 * sms)) ** 0.5
        block_n = 32 if best < 45 else 64 if best < 90 else 128
        config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 128 // x.element_size()}
        config |= {"num_warps": 8 if block_m == 16 and block_n == 128 else 4, "num_stages": 4}
        config |= launch_config("cp_linear_few", arch, shape_class(rows, out, inner, rank))
    splits = min(cdiv(2 * sms, cdiv(out, config["BLOCK_N"])), cdiv(inner, config["BLOCK_K"]))
    return config | {"k_per_split": cdiv(cdiv(inner, splits), config["BLOCK_K"]) * config["BLOCK_K"]}


def _partial(
    x: torch.Tensor, group: Group, u: torch.Tensor | None, tf32: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """part (splits, M, N) and, where u is not None, low (splits, M, R)."""
    rows, inner = x.shape
    out = group.columns.stop - group.columns.start
    rank = group.v.shape[1]
    config = few_config(x, out, rank)
    k_per_split = config.pop("k_per_split")
    splits = cdiv(inner, k_per_split)
    few_ranks = device_arch(x.device) == "interpret" or (
        u is not None and not aligned(u)
    )  # through registers: they spill
    block_r = rank_block(rank, 16 if few_ranks else 64)
    part = torch.empty(splits, rows, out, dtype=torch.float32, device=x.device)
    low = None if u is None else torch.empty(splits, rows, rank, dtype=torch.float32, device=x.device)
    rank_tiles = 0 if u is None else cdiv(rank, block_r)
    launch(
        _cp_linear_few_kernel,
        lambda c: (sum(cdiv(w.shape[0], c["BLOCK_N"]) for w in group.weights) + rank_tiles, splits),
        config,
        x,
        *padded(group.weights),
        u,
        part,
        low,
        rows,
        out,
        *sizes(group.weights, 0),
        inner,
        rank,
        k_per_split,
        *x.stride(),
        *group.weights[0].stride(),
        *((0, 0) if u is None else u.stride()),
        PIECES=len(group.weights),
        EVEN_K=inner % config["BLOCK_K"] == 0,
        PRECISION=product_precision(x.dtype, tf32),
        BLOCK_R=block_r,
    )
    return part, low


def _finish(part, low, group: Group, seed, scale, dropout_p, tf32, y, h) -> None:
    splits, rows, out = part.shape
    rank = group.v.shape[1]
    launch(
        _cp_linear_few_finish_kernel,
        lambda c: (column_tiles(group, c["BLOCK_N"]), cdiv(rows, c["BLOCK_M"])),
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_R": 16, "num_warps": 4 if y.dtype == torch.float32 else 2},
        part,
        low,
        *padded(group.biases),
        group.v,
        group.gain,
        seed,
        h,
        y,
        splits,
        low.shape[0],
        rows,
        out,
        *sizes(group.weights, 0),
        rank,
        group.fold_n,
        group.biases[0].stride(0) if group.biases else 0,
        *group.v.stride(),
        *gain_strides(group.gain),
        y.stride(0),
        scale,
        *dropout_args(seed, dropout_p),
        PIECES=len(group.weights),
        WHOLE=group.whole,
        HAS_BIAS=bool(group.biases),
        HAS_GAIN=group.gain is not None,
        HAS_DROPOUT=seed is not None,
        STORE_H=h is not None,
        WIDE=y.dtype == torch.float16,
        PRECISION=product_precision(y.dtype, tf32),
    )


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------

_ALIGNED = ("N", "n0", "n1", "n2", "K", "R", "fold_n", "k_per_split")


def _specs() -> list[Spec]:
    out = []
    unit = {"stride_xk": 1, "stride_wk": 1, "stride_ur": 1}
    # (dtype, precision, rows, columns, K of a tile, rank tile, weights, K a multiple of the tile, u of rows that 16 divides)
    for dtype, precision, block_m, block_n, block_k, rank, pieces, even, whole in (
        ("bf16", "ieee", 16, 32, 64, 16, 1, True, True),
        ("bf16", "ieee", 16, 128, 64, 16, 1, True, True),
        ("bf16", "ieee", 16, 64, 64, 64, 3, True, True),
        ("bf16", "ieee", 16, 64, 64, 16, 3, True, False),
        ("bf16", "ieee", 64, 128, 64, 64, 3, True, True),
        ("bf16", "ieee", 32, 128, 64, 64, 1, False, True),
        ("fp16", "tf32", 32, 64, 64, 16, 1, True, True),
        ("fp32", "tf32", 64, 128, 32, 64, 3, True, True),
        ("fp32", "ieee", 16, 128, 32, 16, 1, True, True),
        ("fp32", "ieee", 16, 32, 32, 16, 1, True, True),
    ):
        constexprs: dict[str, object] = unit | {"PIECES": pieces, "EVEN_K": even, "PRECISION": precision}
        constexprs |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": rank}
        if pieces == 1:
            constexprs |= dict.fromkeys(("w1_ptr", "w2_ptr"))
        types = argument_types(_cp_linear_few_kernel, constexprs, dtype)
        out.append(
            Spec(
                _cp_linear_few_kernel,
                f"{dtype}_{precision}_m{block_m}_n{block_n}_r{rank}{f'_{pieces}_weights' if pieces > 1 else ''}"
                + ("" if even else "_ragged")
                + ("" if whole else "_ragged_u"),
                types,
                constexprs,
                num_warps=8 if block_m == 16 and block_n == 128 else 4,
                num_stages=4,
                matrix=block_m == 64 and (dtype == "bf16" or precision == "tf32"),
                aligned=_ALIGNED,
                unaligned=() if whole else ("u_ptr", "stride_uk"),
            )
        )
    unit = {"stride_bias": 1, "stride_vr": 1, "stride_gr": 1}
    for dtype, precision, warps, pieces in (
        ("bf16", "ieee", 2, 1),
        ("bf16", "ieee", 2, 3),
        ("fp16", "tf32", 2, 3),
        ("fp32", "ieee", 4, 3),
    ):
        constexprs = {**unit, "PIECES": pieces, "WHOLE": False, "HAS_BIAS": True, "HAS_GAIN": True, "HAS_DROPOUT": True}
        constexprs |= {"STORE_H": True, "WIDE": dtype == "fp16", "PRECISION": precision}
        constexprs |= {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_R": 16}
        if pieces == 1:
            constexprs |= dict.fromkeys(("bias1_ptr", "bias2_ptr"))
        types = argument_types(_cp_linear_few_finish_kernel, constexprs, dtype)
        label = f"{dtype}_{precision}{f'_{pieces}_weights' if pieces > 1 else ''}"
        out.append(
            Spec(
                _cp_linear_few_finish_kernel, label, types, constexprs, num_warps=warps, num_stages=2, aligned=_ALIGNED
            )
        )
    return out


SPECS = _specs()
