"""cp_linear's forward by tensor descriptors, persistent: one program a processor takes tile after tile, and x, W and U come by
the copy engine (TMA), which needs no address arithmetic, no masks and no registers of the warps that multiply.

The same two forms as cp_linear.py, "tma_fused" and "tma_started", for one weight, Hopper and later, half precision. What is
described must begin on 16 bytes, and so must its rows. Descriptors are made on the host for each launch: those made on the
device need an allocator. Results are stored by ordinary masked stores: a descriptor's can overrun the last column to the next
16 bytes, and would run into the next fold's columns. No warp specialisation (it crashes Triton's compiler on Hopper) and no
flattened loop (Blackwell's).

It has not run on a card, and one trap there is known: with three stages and more some builds of Triton misaligned such loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, device_arch, dot, launch, launch_config
from fastgist_kernels.cp_linear_forms import described
from fastgist_kernels.cp_linear_parts import Group, column_tiles, dropout_args, dropped, gain_strides
from fastgist_kernels.cp_linear_plan import TILE_NAMES, matmul_config, product_precision, rank_tile, shape_class
from fastgist_kernels.outer import argument_types, low_dot, narrow, processors

__all__ = ["SPECS", "matmul_by_descriptors"]


@triton.jit
def _cp_linear_tma_kernel(
    x_desc,
    w_desc,
    u_desc,
    bias_ptr,
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
    stride_bias,
    stride_vn,
    stride_vr,
    stride_gg,
    stride_gr,
    stride_ym,
    scale,
    threshold,
    inv_keep,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    STORE_H: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """FUSED: h is computed here (R <= BLOCK_R; stored with the first column of tiles). Else it is read, in rank blocks."""
    fold_tiles = tl.cdiv(fold_n, BLOCK_N)
    tiles_n = (N // fold_n) * fold_tiles
    tiles_m = tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        group = tile // (GROUP_M * tiles_n)
        group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        in_group = tile % (GROUP_M * tiles_n)
        tile_m = group * GROUP_M + in_group % group_rows
        tile_n = in_group // group_rows
        fold = tile_n // fold_tiles
        first_m = tile_m * BLOCK_M
        first_j = (tile_n % fold_tiles) * BLOCK_N
        first_n = fold * fold_n + first_j
        offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_j = first_j.to(tl.int64) + tl.arange(0, BLOCK_N)
        offs_n = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
        mask_m = offs_m < M
        mask_n = offs_j < fold_n
        mask_r = offs_r < R
        gain_row = fold.to(tl.int64) * stride_gg

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc_h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        if not FUSED:
            for first_r in tl.range(0, R, BLOCK_R, num_stages=1):
                offs_q = first_r + offs_r
                mask_q = offs_q < R
                h_ptrs = h_ptr + offs_m[:, None] * R + offs_q[None, :]
                h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_q[None, :], other=0.0).to(tl.float32) * scale
                if HAS_GAIN:
                    gain = tl.load(gain_ptr + gain_row + offs_q * stride_gr, mask=mask_q, other=0.0)
                    h = h * gain.to(tl.float32)[None, :]
                v_ptrs = v_ptr + offs_q[:, None] * stride_vr + offs_j[None, :] * stride_vn
                v = tl.load(v_ptrs, mask=mask_q[:, None] & mask_n[None, :], other=0.0)
                acc = low_dot(h, v, acc, WIDE, PRECISION)
        for first_k in range(0, K, BLOCK_K):  # what lies past an end comes as zero
            x = x_desc.load([first_m, first_k])
            w = w_desc.load([first_n, first_k])
            acc = dot(x, w.T, acc, PRECISION)
            if FUSED:
                u = u_desc.load([first_k, 0])
                acc_h = dot(x, u, acc_h, PRECISION)
        if FUSED:
            h = acc_h
            if HAS_DROPOUT:
                h = dropped(h, seed_ptr, offs_m, 0, R, threshold, inv_keep, BLOCK_M, BLOCK_R)
            if STORE_H:
                if tile_n == 0:
                    h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
                    tl.store(h_ptrs, narrow(h, h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
            h = h * scale
            if HAS_GAIN:
                gain = tl.load(gain_ptr + gain_row + offs_r * stride_gr, mask=mask_r, other=0.0)
                h = h * gain.to(tl.float32)[None, :]
            v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_j[None, :] * stride_vn
            v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            acc = low_dot(h, v, acc, WIDE, PRECISION)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
        tl.store(y_ptrs, narrow(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


# -- launching -------------------------------------------------------------------------------------------------------


def _described(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])


def matmul_by_descriptors(x, group: Group, u, seed, scale, dropout_p, tf32, y, h, *, fused: bool) -> None:
    """What cp_linear's own matmul writes, for a group of one weight that can be described (cp_linear_forms.can)."""
    (weight,) = group.weights
    rows, inner = x.shape
    rank = group.v.shape[1]
    arch = device_arch(x.device)
    tile = matmul_config([x], group.weights, group.fold_n, rank, tf32)
    tile |= launch_config("cp_linear_tma", arch, shape_class(rows, weight.shape[0], inner, rank))
    if (
        arch.startswith("sm_1") and fused
    ):  # Triton 3.6 doubles the accumulator: 256 columns and h exceed Blackwell's tensor memory
        tile["BLOCK_N"] = min(tile["BLOCK_N"], 128)
    block_m, block_n, block_k = (tile[name] for name in TILE_NAMES[:3])
    block_r = rank_tile(x, rank, tf32, fused)
    tiles = cdiv(rows, block_m) * column_tiles(group, block_n)
    launch(
        _cp_linear_tma_kernel,
        (min(processors(x.device), tiles),),
        tile,
        _described(x, block_m, block_k),
        _described(weight, block_n, block_k),
        _described(u if described(u) else u.clone(memory_format=torch.contiguous_format), block_k, block_r)
        if fused
        else None,
        group.biases[0] if group.biases else None,
        group.v,
        group.gain,
        seed,
        h,
        y,
        rows,
        weight.shape[0],
        inner,
        rank,
        group.fold_n,
        group.biases[0].stride(0) if group.biases else 0,
        *group.v.stride(),
        *gain_strides(group.gain),
        y.stride(0),
        scale,
        *dropout_args(seed, dropout_p),
        FUSED=fused,
        HAS_BIAS=bool(group.biases),
        HAS_GAIN=group.gain is not None,
        HAS_DROPOUT=seed is not None,
        STORE_H=fused and h is not None,
        WIDE=x.dtype == torch.float16,
        PRECISION=product_precision(x.dtype, tf32),
        BLOCK_R=block_r,
    )


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    out = []
    unit = {"stride_bias": 1, "stride_vr": 1, "stride_gr": 1}
    # (dtype, precision, tile as TILE_NAMES, rank tile, fused)
    for dtype, precision, tile, rank, fused in (
        ("bf16", "ieee", (128, 256, 64, 8, 3), 16, True),
        ("bf16", "ieee", (128, 256, 64, 8, 3), 64, True),
        ("bf16", "ieee", (128, 256, 64, 8, 3), 64, False),
        ("bf16", "ieee", (128, 128, 64, 8, 3), 64, True),
        ("fp16", "tf32", (128, 128, 64, 8, 3), 64, True),
        ("fp16", "tf32", (128, 128, 64, 8, 3), 64, False),
    ):
        block_m, block_n, block_k, warps, stages = tile
        constexprs: dict[str, object] = {**unit, "FUSED": fused, "HAS_BIAS": True, "HAS_GAIN": True}
        constexprs |= {"HAS_DROPOUT": fused, "STORE_H": fused, "WIDE": dtype == "fp16", "PRECISION": precision}
        constexprs |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": rank, "GROUP_M": 8}
        if not fused:
            constexprs["u_desc"] = None
        types = argument_types(_cp_linear_tma_kernel, constexprs, dtype)
        blocks = {"x_desc": (block_m, block_k), "w_desc": (block_n, block_k), "u_desc": (block_k, rank)}
        types |= {name: f"tensordesc<{dtype}[{a},{b}]>" for name, (a, b) in blocks.items() if name in types}
        out.append(
            Spec(
                _cp_linear_tma_kernel,
                f"{dtype}_n{block_n}_{'fused' if fused else 'started'}_r{rank}",
                types,
                constexprs,
                num_warps=warps,
                num_stages=stages,
                matrix=True,
                aligned=("M", "N", "K", "R", "fold_n"),
                archs=(90,) if fused and block_n > 128 else (90, 100),
            )
        )
    return out


SPECS = _specs()
