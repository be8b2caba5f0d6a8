"""cp_update in Triton: out = y + scale * (drop(x U) * gain) V^T. Sizes M rows, N out, K in, R rank, n = N / G.

A program takes a block of rows: h = x U over K first, then column tiles of y, each loaded, updated and stored. So x is read
once and y read and written once. Where there are too few row blocks for the device's processors the column tiles of one are
shared by several programs, each of which forms h again (x is in L2 by then); the first stores it. Above rank 64, 32 for
full float32 products, h does not stay in registers: it comes from cp_linear's projection and is read in rank blocks.
dx = dL/dh U^T is that second form without a y; the rest of the backward is cp_linear's.
A column tile never straddles folds: tiles are counted fold by fold and masked at each fold's end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, device_arch, dot, launch, launch_config, next_power_of_2
from fastgist_kernels.cp_linear_bwd import low_rank_grads
from fastgist_kernels.cp_linear_forms import aligned, most_fused_rank
from fastgist_kernels.cp_linear_parts import dropout_args, dropped, gain_strides, low_rank_empty
from fastgist_kernels.cp_linear_plan import product_precision
from fastgist_kernels.cp_linear_project import project
from fastgist_kernels.outer import argument_types, low_dot, narrow, processors, rank_block

__all__ = ["SPECS", "cp_update_bwd", "cp_update_fwd"]


@triton.jit
def _cp_update_fwd_kernel(
    y_ptr,
    x_ptr,
    u_ptr,
    v_ptr,
    gain_ptr,
    seed_ptr,
    h_ptr,
    out_ptr,
    M,
    N,
    K,
    R,
    fold_n,
    parts,
    stride_ym,
    stride_yn,
    stride_xm,
    stride_xk,
    stride_uk,
    stride_ur,
    stride_vn,
    stride_vr,
    stride_gg,
    stride_gr,
    stride_om,
    stride_on,
    scale,
    threshold,
    inv_keep,
    FUSED: tl.constexpr,
    HAS_Y: tl.constexpr,
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
):
    """FUSED: h is computed here (R <= BLOCK_R; stored by the first part). Else it is read, in rank blocks. y may be out."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    offs_j = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = offs_m < M
    mask_r = offs_r < R

    h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if FUSED:
        offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        u_ptrs = u_ptr + offs_r[None, :] * stride_ur + offs_k[:, None] * stride_uk
        step_k = tl.full([], BLOCK_K, tl.int64)
        for first_k in range(0, K, BLOCK_K):
            mask_x = mask_m[:, None]
            mask_u = mask_r[None, :]
            if not EVEN_K:
                mask_k = offs_k < K - first_k
                mask_x = mask_x & mask_k[None, :]
                mask_u = mask_u & mask_k[:, None]
            x = tl.load(x_ptrs, mask=mask_x, other=0.0)
            u = tl.load(u_ptrs, mask=mask_u, other=0.0)
            h = dot(x, narrow(u, x.dtype), h, PRECISION)
            x_ptrs += step_k * stride_xk
            u_ptrs += step_k * stride_uk
        if HAS_DROPOUT:
            h = dropped(h, seed_ptr, offs_m, 0, R, threshold, inv_keep, BLOCK_M, BLOCK_R)
        if STORE_H:
            if tl.program_id(1) == 0:
                h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
                tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
        h = h * scale

    fold_tiles = tl.cdiv(fold_n, BLOCK_N)
    tiles = (N // fold_n) * fold_tiles
    each = tl.cdiv(tiles, parts)
    first_tile = tl.program_id(1) * each
    for tile in range(first_tile, tl.minimum(first_tile + each, tiles)):
        fold = (tile // fold_tiles).to(tl.int64)
        offs_c = (tile % fold_tiles).to(tl.int64) * BLOCK_N + offs_j
        offs_n = fold * fold_n + offs_c
        mask_n = offs_c < fold_n
        mask_y = mask_m[:, None] & mask_n[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if HAS_Y:
            y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
            acc = tl.load(y_ptrs, mask=mask_y, other=0.0).to(tl.float32)
        if FUSED:
            low = h
            if HAS_GAIN:
                gain = tl.load(gain_ptr + fold * stride_gg + offs_r * stride_gr, mask=mask_r, other=0.0)
                low = h * gain.to(tl.float32)[None, :]
            v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_c[None, :] * stride_vn
            v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            if not WIDE:
                v = narrow(v, out_ptr.dtype.element_ty)
            acc = low_dot(low, v, acc, WIDE, PRECISION)
        else:
            for first_r in tl.range(0, R, BLOCK_R, num_stages=1):
                offs_q = first_r + offs_r
                mask_q = offs_q < R
                h_ptrs = h_ptr + offs_m[:, None] * R + offs_q[None, :]
                low = tl.load(h_ptrs, mask=mask_m[:, None] & mask_q[None, :], other=0.0).to(tl.float32) * scale
                if HAS_GAIN:
                    gain = tl.load(gain_ptr + fold * stride_gg + offs_q * stride_gr, mask=mask_q, other=0.0)
                    low = low * gain.to(tl.float32)[None, :]
                v_ptrs = v_ptr + offs_q[:, None] * stride_vr + offs_c[None, :] * stride_vn
                v = tl.load(v_ptrs, mask=mask_q[:, None] & mask_n[None, :], other=0.0)
                if not WIDE:
                    v = narrow(v, out_ptr.dtype.element_ty)
                acc = low_dot(low, v, acc, WIDE, PRECISION)
        out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
        tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=mask_y)


# -- launching -------------------------------------------------------------------------------------------------------

#: Read off the compiler (registers, shared memory, no spill), not off a clock.
_TILE_NAMES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
_TILES = {
    "half": (64, 64, 64, 4, 3),
    "few": (16, 64, 64, 4, 4),
    "ragged": (64, 64, 32, 8, 3),
    "tf32": (64, 64, 32, 8, 3),
    "ieee": (32, 32, 32, 8, 2),
}


def _config(out: torch.Tensor, others: tuple[torch.Tensor | None, ...], rank: int, tf32: bool) -> dict[str, int]:
    """``others``: y, x, u and v. Loads that are not of 16 bytes take registers for their addresses and masks."""
    arch = device_arch(out.device)
    if arch == "interpret":
        return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16}
    rows, columns = out.shape
    if out.dtype == torch.float32:
        kind = "tf32" if tf32 else "ieee"
    elif rows <= 32:
        kind = "few"
    else:
        kind = "half" if all(t is None or aligned(t) for t in (out, *others)) else "ragged"
    default = dict(zip(_TILE_NAMES, _TILES[kind], strict=True))
    shape = f"m{next_power_of_2(rows)}_n{next_power_of_2(columns)}_r{next_power_of_2(rank)}"
    return default | launch_config("cp_update_fwd", arch, shape)


def _update(y, x, u, v, gain, seed, h, scale, dropout_p, tf32, out) -> None:
    """out (M, N) = y (0 where None) + scale * (h * gain) v^T. Where x is None h is read, else it is computed from x and u, and
    stored where it is not None."""
    rows, columns = out.shape
    fold_n, rank = v.shape
    fused = x is not None
    config = _config(out, (y, x, u, v), rank, tf32)
    most = most_fused_rank(out.dtype, tf32)
    if not fused and (out.dtype == torch.float32 or device_arch(out.device) == "interpret"):
        most = (
            16  # full float32 products spill beyond it; interpreted, so that small tests walk over several rank blocks
        )
    tiles = (columns // fold_n) * cdiv(fold_n, config["BLOCK_N"])
    wanted = processors(out.device) * (1 if fused else 4)
    parts = max(1, min(tiles, wanted // cdiv(rows, config["BLOCK_M"])))
    launch(
        _cp_update_fwd_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]), parts),
        config,
        y,
        x,
        u,
        v,
        gain,
        seed,
        h,
        out,
        rows,
        columns,
        x.shape[1] if fused else 1,
        rank,
        fold_n,
        parts,
        *((0, 0) if y is None else y.stride()),
        *(x.stride() if fused else (0, 0)),
        *(u.stride() if fused else (0, 0)),
        *v.stride(),
        *gain_strides(gain),
        *out.stride(),
        scale,
        *dropout_args(seed, dropout_p),
        FUSED=fused,
        HAS_Y=y is not None,
        HAS_GAIN=gain is not None,
        HAS_DROPOUT=seed is not None,
        STORE_H=fused and h is not None,
        EVEN_K=not fused or x.shape[1] % config["BLOCK_K"] == 0,
        WIDE=out.dtype == torch.float16,
        PRECISION=product_precision(out.dtype, tf32),
        BLOCK_R=rank_block(rank, most),
    )


def cp_update_fwd(y, x, u, v, gain, seed, scale, dropout_p, tf32, out, h) -> None:
    """Write out (M, N), which may be y, and, where h is not None, h = drop(x U) (M, R), contiguous. Inputs of any strides: y
    (M, N), x (M, K), u (K, R), v (n, R), gain (1 or G, R) or None, seed (1,) int64 where dropout acts. u, v and gain may be
    float32 beside half-precision y and x."""
    if u.shape[1] <= most_fused_rank(x.dtype, tf32):
        _update(y, x, u, v, gain, seed, h, scale, dropout_p, tf32, out)
        return
    h = low_rank_empty(x, u.shape[1]) if h is None else h
    project([x], u.to(x.dtype), None, seed, 1.0, dropout_p, tf32, h)
    _update(y, None, None, v, gain, None, h, scale, 0.0, tf32, out)


def cp_update_bwd(
    grad, x, u, v, gain, seed, h, folds, scale, dropout_p, tf32, grad_x, grad_u, grad_v, grad_gain
) -> None:
    """Write the gradients that are not None: grad_x (M, K), grad_u (K, R), grad_v (n, R), grad_gain (1 or G, R), contiguous,
    from grad (M, N) of any strides. Inputs that none of them needs may be None."""
    v = None if v is None else v.to(grad.dtype)
    gain = None if gain is None else gain.to(grad.dtype)
    grad_h = None if grad_x is None and grad_u is None else low_rank_empty(grad, v.shape[1])
    low_rank_grads([grad], x, v, gain, seed, h, folds, scale, dropout_p, tf32, grad_h, grad_u, grad_v, grad_gain)
    if grad_x is not None:
        _update(None, None, None, u, None, None, grad_h, 1.0, 0.0, tf32, grad_x)


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    out = []
    unit = {"stride_yn": 1, "stride_xk": 1, "stride_ur": 1, "stride_vr": 1, "stride_gr": 1, "stride_on": 1}
    # (dtype, dtype of the factors, precision, kind of tile, rank tile, fused, K a multiple of the tile)
    cases = [
        ("bf16", "bf16", "ieee", "half", 16, True, True),
        ("bf16", "bf16", "ieee", "half", 64, True, True),
        ("bf16", "fp32", "ieee", "half", 16, True, True),
        ("bf16", "fp32", "ieee", "half", 64, True, True),
        ("bf16", "bf16", "ieee", "half", 64, False, True),
        ("bf16", "fp32", "ieee", "few", 16, True, True),
        ("bf16", "fp32", "ieee", "ragged", 16, True, False),
        ("bf16", "fp32", "ieee", "ragged", 64, True, False),
        ("bf16", "fp32", "ieee", "ragged", 64, False, True),
        ("fp16", "fp32", "tf32", "half", 64, True, True),
        ("fp16", "fp32", "tf32", "half", 64, False, True),
        ("fp16", "fp16", "tf32", "ragged", 64, True, False),
        ("fp32", "fp32", "tf32", "tf32", 64, True, True),
        ("fp32", "fp32", "ieee", "ieee", 32, True, True),
        ("fp32", "fp32", "ieee", "ieee", 16, False, True),
    ]
    for dtype, factors, precision, kind, rank, fused, even in cases:
        tile = dict(zip(_TILE_NAMES, _TILES[kind], strict=True))
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        flags: dict[str, object] = {"FUSED": fused, "HAS_Y": True, "HAS_GAIN": True, "HAS_DROPOUT": fused}
        flags |= {"STORE_H": fused, "EVEN_K": even, "WIDE": dtype == "fp16", "PRECISION": precision, "BLOCK_R": rank}
        constexprs: dict[str, object] = {**unit, **flags, **tile}
        types = argument_types(_cp_update_fwd_kernel, constexprs, dtype)
        types |= dict.fromkeys(("u_ptr", "v_ptr", "gain_ptr"), f"*{factors}")
        form = "fused" if fused else "read"
        out.append(
            Spec(
                _cp_update_fwd_kernel,
                f"{dtype}_{factors}_{kind}_{form}_r{rank}{'' if even else '_ragged'}",
                types,
                constexprs,
                num_warps=warps,
                num_stages=stages,
                matrix=tile["BLOCK_M"] >= 64 and kind != "ieee",
                aligned=("M", "N", "K", "R", "fold_n") if kind != "ragged" else (),
                unaligned=tuple(n for n in types if n.startswith("stride_")) if kind == "ragged" else (),
            )
        )
    return out


SPECS = _specs()
