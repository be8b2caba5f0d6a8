"""cp_linear in Triton: y = x W^T + b + scale * (drop(x U) * gain) V^T. Sizes M rows, N out, K in, R rank, n = N / G.

One matmul kernel in two forms. Fused, it accumulates h = x U beside x W^T, as R more columns of the same loop over K, and
adds the update in the epilogue. Started, h comes from a kernel of its own and the accumulator starts from the update.
Fused costs R / BLOCK_N more products, started a second read of x: equal near N R = 47,000 at BLOCK_N = 256.
dx = dy W + dL/dh U^T is the started form again; the rest of the backward is in cp_linear_bwd.py.
A column tile never straddles folds: tiles are counted fold by fold and masked at each fold's end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, device_arch, dot, launch, launch_config
from fastgist_kernels.cp_linear_plan import (
    TILE_NAMES,
    TILES,
    cp_linear_form,
    matmul_config,
    product_precision,
    rank_tile,
    shape_class,
)
from fastgist_kernels.outer import argument_types, low_dot, narrow, rank_block
from fastgist_kernels.philox import keep_mask

__all__ = [
    "SPECS",
    "cp_linear_fwd",
    "dropout_args",
    "dropped",
    "gain_strides",
    "low_rank_empty",
    "matmul",
    "project",
]


@triton.jit
def dropped(h, seed_ptr, offs_m, first_r, R, threshold, inv_keep, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Inverted dropout on a tile [BLOCK_M, BLOCK_R] of an (M, R) matrix."""
    keep = keep_mask(tl.load(seed_ptr), offs_m, first_r, R, threshold, BLOCK_M, BLOCK_R)
    return tl.where(keep, h * inv_keep, 0.0)


@triton.jit
def _cp_linear_fwd_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    u_ptr,
    v_ptr,
    gain_ptr,
    seed_ptr,
    h_ptr,
    y_ptr,
    M,
    N,
    K,
    R,
    fold_n,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_uk,
    stride_ur,
    stride_vn,
    stride_vr,
    stride_gg,
    stride_gr,
    scale,
    threshold,
    inv_keep,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    STORE_H: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """FUSED: h is computed here (R <= BLOCK_R; stored by the first column of programs). Else it is read, in rank blocks."""
    fold_tiles = tl.cdiv(fold_n, BLOCK_N)
    tiles_n = (N // fold_n) * fold_tiles
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = pid % (GROUP_M * tiles_n)
    pid_m = group * GROUP_M + in_group % group_rows
    pid_n = in_group // group_rows
    fold = (pid_n // fold_tiles).to(tl.int64)

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_j = (pid_n % fold_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = fold * fold_n + offs_j
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_j < fold_n

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if not FUSED:
        for first_r in tl.range(0, R, BLOCK_R, num_stages=1):
            offs_q = first_r + offs_r
            mask_q = offs_q < R
            h_ptrs = h_ptr + offs_m[:, None] * R + offs_q[None, :]
            h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_q[None, :], other=0.0).to(tl.float32) * scale
            if HAS_GAIN:
                gain = tl.load(gain_ptr + fold * stride_gg + offs_q * stride_gr, mask=mask_q, other=0.0)
                h = h * gain.to(tl.float32)[None, :]
            v_ptrs = v_ptr + offs_q[:, None] * stride_vr + offs_j[None, :] * stride_vn
            v = tl.load(v_ptrs, mask=mask_q[:, None] & mask_n[None, :], other=0.0)
            acc = low_dot(h, v, acc, WIDE, PRECISION)

    mask_r = offs_r < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    if FUSED:
        u_ptrs = u_ptr + offs_r[None, :] * stride_ur + offs_k[:, None] * stride_uk
    step_k = tl.full([], BLOCK_K, tl.int64)
    for first_k in range(0, K, BLOCK_K):
        mask_x = mask_m[:, None]
        mask_w = mask_n[None, :]
        mask_u = mask_r[None, :]
        if not EVEN_K:
            mask_k = offs_k < K - first_k
            mask_x = mask_x & mask_k[None, :]
            mask_w = mask_w & mask_k[:, None]
            mask_u = mask_u & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        acc = dot(x, w, acc, PRECISION)
        if FUSED:
            u = tl.load(u_ptrs, mask=mask_u, other=0.0)
            acc_h = dot(x, u, acc_h, PRECISION)
            u_ptrs += step_k * stride_uk
        x_ptrs += step_k * stride_xk
        w_ptrs += step_k * stride_wk

    if FUSED:
        h = acc_h
        if HAS_DROPOUT:
            h = dropped(h, seed_ptr, offs_m, 0, R, threshold, inv_keep, BLOCK_M, BLOCK_R)
        if STORE_H:
            if pid_n == 0:
                h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
                tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
        h = h * scale
        if HAS_GAIN:
            gain = tl.load(gain_ptr + fold * stride_gg + offs_r * stride_gr, mask=mask_r, other=0.0)
            h = h * gain.to(tl.float32)[None, :]
        v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_j[None, :] * stride_vn
        v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = low_dot(h, v, acc, WIDE, PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, narrow(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


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
    h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
    tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


# -- launching ------------------------------------------------------------------------------------------


def dropout_args(seed: torch.Tensor | None, dropout_p: float) -> tuple[int, float]:
    """threshold (as in fastgist/reference/philox.py) and 1 / (1 - p)."""
    return (0, 1.0) if seed is None else (min(int(dropout_p * 2**31), 2**31 - 1), 1.0 / (1.0 - dropout_p))


def gain_strides(gain: torch.Tensor | None) -> tuple[int, int]:
    """Of gain (1 or G, R), a single row serving every fold."""
    return (0, 0) if gain is None else (gain.stride(0) if gain.shape[0] > 1 else 0, gain.stride(1))


def matmul(x, weight, bias, u, v, gain, seed, scale, dropout_p, tf32, y, h, *, fused: bool) -> None:
    """y = x W^T + bias + scale * (h * gain) V^T, h being computed (fused; stored where not None) or read."""
    out, inner = weight.shape
    fold_n, rank = v.shape
    config = matmul_config(x, weight, fold_n, rank, tf32)
    launch(
        _cp_linear_fwd_kernel,
        lambda c: (cdiv(x.shape[0], c["BLOCK_M"]) * (out // fold_n) * cdiv(fold_n, c["BLOCK_N"]),),
        config,
        x,
        weight,
        bias,
        u,
        v,
        gain,
        seed,
        h,
        y,
        x.shape[0],
        out,
        inner,
        rank,
        fold_n,
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        *((0, 0) if u is None else u.stride()),
        *v.stride(),
        *gain_strides(gain),
        scale,
        *dropout_args(seed, dropout_p),
        FUSED=fused,
        HAS_BIAS=bias is not None,
        HAS_GAIN=gain is not None,
        HAS_DROPOUT=seed is not None,
        STORE_H=fused and h is not None,
        EVEN_K=inner % config["BLOCK_K"] == 0,
        WIDE=x.dtype == torch.float16,
        PRECISION=product_precision(x.dtype, tf32),
        BLOCK_R=rank_tile(x, rank, tf32, fused),
    )


def project(a, b, gain, seed, scale, dropout_p, tf32, h) -> None:
    """h (M, R) = drop(scale * sum_g (a_g b) * gain_g), a (M, G n), b (n, R)."""
    rows, columns = a.shape
    fold_n, rank = b.shape
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
        scale,
        *dropout_args(seed, dropout_p),
        HAS_GAIN=gain is not None,
        HAS_DROPOUT=seed is not None,
        PRECISION=product_precision(a.dtype, tf32),
    )


def low_rank_empty(x: torch.Tensor, rank: int) -> torch.Tensor:
    """(M, R) for x U or its gradient: float32 for float16, whose range it may pass."""
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return torch.empty(x.shape[0], rank, dtype=dtype, device=x.device)


def cp_linear_fwd(x, weight, bias, u, v, gain, seed, scale, dropout_p, tf32, y, h) -> None:
    """Write y (M, N) and, where h is not None, h = drop(x U) (M, R), both contiguous. Inputs of any strides: x (M, K), weight
    (N, K), bias (N,) or None, u (K, R), v (n, R), gain (1 or G, R) or None, seed (1,) int64 where dropout acts."""
    form = cp_linear_form(x, weight, v.shape[0], u.shape[1], tf32)
    if form == "fused":
        matmul(x, weight, bias, u, v, gain, seed, scale, dropout_p, tf32, y, h, fused=True)
        return
    h = low_rank_empty(x, u.shape[1]) if h is None else h
    project(x, u, None, seed, 1.0, dropout_p, tf32, h)
    if form == "started":
        matmul(x, weight, bias, None, v, gain, None, scale, 0.0, tf32, y, h, fused=False)
        return
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)
    folds = weight.shape[0] // v.shape[0]
    folded = v.repeat(folds, 1) if gain is None else (v * gain.expand(folds, -1)[:, None]).flatten(0, 1)
    y.addmm_(h, folded.t(), alpha=scale)


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------

_ALIGNED = ("M", "N", "K", "R", "fold_n")


def _specs() -> list[Spec]:
    out = []
    unit = {"stride_xk": 1, "stride_wk": 1, "stride_bias": 1, "stride_ur": 1, "stride_vr": 1, "stride_gr": 1}
    # (dtype, precision, kind of tile, rank tile, fused, K a multiple of the tile)
    cases = [
        ("bf16", "ieee", "large", 16, True, True),
        ("bf16", "ieee", "large", 64, True, True),
        ("bf16", "ieee", "large", 64, False, True),
        ("bf16", "ieee", "medium", 16, True, False),
        ("bf16", "ieee", "small", 16, True, True),
        ("bf16", "ieee", "ragged", 16, True, False),
        ("bf16", "ieee", "ragged", 64, True, False),
        ("bf16", "ieee", "ragged", 64, False, False),
        ("fp16", "tf32", "ragged", 64, True, False),
        ("fp16", "tf32", "medium", 64, True, True),
        ("fp16", "tf32", "medium", 64, False, True),
        ("fp32", "tf32", "tf32", 64, True, True),
        ("fp32", "ieee", "ieee", 32, True, True),
        ("fp32", "ieee", "ieee", 32, False, True),
    ]
    seen = set()
    for family_name, archs in (("sm_90", (90, 100)), ("sm_80", (80,))):
        for dtype, precision, kind, rank, fused, even in cases:
            tile = dict(zip(TILE_NAMES, TILES[family_name][kind], strict=True))
            shared = TILES["sm_80"][kind] == TILES["sm_90"][kind]
            if shared and (dtype, kind, rank, fused) in seen:
                continue
            seen.add((dtype, kind, rank, fused))
            warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
            flags: dict[str, object] = {
                "FUSED": fused,
                "HAS_BIAS": True,
                "HAS_GAIN": True,
                "HAS_DROPOUT": fused,
                "STORE_H": fused,
            }
            flags |= {"EVEN_K": even, "WIDE": dtype == "fp16", "PRECISION": precision, "BLOCK_R": rank, "GROUP_M": 8}
            constexprs: dict[str, object] = {**unit, **flags, **tile}
            form = "fused" if fused else "started"
            types = argument_types(_cp_linear_fwd_kernel, constexprs, dtype)
            out.append(
                Spec(
                    _cp_linear_fwd_kernel,
                    f"{'' if shared else family_name + '_'}{dtype}_{kind}_{form}_r{rank}{'' if even else '_ragged'}",
                    types,
                    constexprs,
                    num_warps=warps,
                    num_stages=stages,
                    matrix=tile["BLOCK_M"] >= 64 and kind != "ieee",
                    aligned=_ALIGNED if kind != "ragged" else (),
                    unaligned=tuple(n for n in types if n.startswith("stride_")) if kind == "ragged" else (),
                    archs=(80, 90, 100) if shared else archs,
                )
            )
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
                aligned=_ALIGNED,
            )
        )
    return out


SPECS = _specs()
