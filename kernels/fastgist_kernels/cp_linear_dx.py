"""dx = dy W + dL/dh U^T, the gradient of cp_linear's input. Sizes M rows, N summed, K columns, R rank.

    dL/dh = drop'(scale * dy V'),   V' (N, R) = V times each fold's gain

The forward's two forms again. Fused, dL/dh accumulates beside dy W as R more columns of the loop over N, is stored for dU by
the first column of programs, and multiplies U^T in the epilogue: one launch reads dy once. V' is made beforehand, N R
numbers. Started, dL/dh comes from a kernel of its own and the accumulator starts from dL/dh U^T.
W may be several weights one above the other (cp_linear_parts.py): the loop over N walks them, none is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, dot, launch
from fastgist_kernels.cp_linear_forms import most_fused_rank
from fastgist_kernels.cp_linear_parts import dropout_args, dropped, groups, padded, sizes
from fastgist_kernels.cp_linear_plan import TILE_NAMES, TILES, matmul_config, product_precision, rank_tile
from fastgist_kernels.outer import argument_types, low_dot, narrow

__all__ = ["SPECS", "dx_by_blas", "dx_fused", "dx_started"]


@triton.jit
def _cp_linear_dx_kernel(
    dy_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    v_ptr,
    u_ptr,
    seed_ptr,
    grad_h_ptr,
    dx_ptr,
    M,
    n0,
    n1,
    n2,
    K,
    R,
    stride_dym,
    stride_dyn,
    stride_wn,
    stride_wk,
    stride_uk,
    stride_ur,
    scale,
    threshold,
    inv_keep,
    PIECES: tl.constexpr,
    FUSED: tl.constexpr,
    ADD: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    EVEN_N: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Tiles as the forward names them: BLOCK_N columns of the result, BLOCK_K of what is summed.

    FUSED: grad_h (R <= BLOCK_R) is computed from v (N, R), contiguous, and written. ADD: dx holds the sums of other weights,
    to which these are added. Neither: grad_h is read, in rank blocks."""
    tiles_k = tl.cdiv(K, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_k)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = pid % (GROUP_M * tiles_k)
    pid_m = group * GROUP_M + in_group % group_rows
    pid_k = in_group // group_rows

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    mask_k = offs_k < K
    mask_r = offs_r < R
    dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
    mask_dx = mask_m[:, None] & mask_k[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if ADD:
        acc = tl.load(dx_ptrs, mask=mask_dx, other=0.0).to(tl.float32)
    elif not FUSED:
        for first_r in tl.range(0, R, BLOCK_R, num_stages=1):
            offs_q = first_r + offs_r
            mask_q = offs_q < R
            grad_h_ptrs = grad_h_ptr + offs_m[:, None] * R + offs_q[None, :]
            grad_h = tl.load(grad_h_ptrs, mask=mask_m[:, None] & mask_q[None, :], other=0.0)
            u_ptrs = u_ptr + offs_k[None, :] * stride_uk + offs_q[:, None] * stride_ur
            u = tl.load(u_ptrs, mask=mask_q[:, None] & mask_k[None, :], other=0.0)
            acc = low_dot(grad_h.to(tl.float32), u, acc, WIDE, PRECISION)

    steps0 = tl.cdiv(n0, BLOCK_K)
    steps1 = steps0
    steps = steps0
    if PIECES > 1:
        steps1 += tl.cdiv(n1, BLOCK_K)
        steps = steps1
    if PIECES > 2:
        steps += tl.cdiv(n2, BLOCK_K)
    for step in range(0, steps):
        w_ptr = w0_ptr
        rows = n0
        start = 0
        first_step = 0
        if PIECES > 1:
            behind = step >= steps0
            w_ptr = tl.where(behind, w1_ptr, w_ptr)
            rows = tl.where(behind, n1, rows)
            start = tl.where(behind, n0, start)
            first_step = tl.where(behind, steps0, first_step)
        if PIECES > 2:
            behind = step >= steps1
            w_ptr = tl.where(behind, w2_ptr, w_ptr)
            rows = tl.where(behind, n2, rows)
            start = tl.where(behind, n0 + n1, start)
            first_step = tl.where(behind, steps1, first_step)
        first_n = (step - first_step) * BLOCK_K
        offs_w = first_n + offs_n
        offs_y = start + offs_w
        mask_dy = mask_m[:, None]
        mask_w = mask_k[None, :]
        mask_v = mask_r[None, :]
        if not EVEN_N:
            mask_n = offs_w < rows
            mask_dy = mask_dy & mask_n[None, :]
            mask_w = mask_w & mask_n[:, None]
            mask_v = mask_v & mask_n[:, None]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_y[None, :] * stride_dyn, mask=mask_dy, other=0.0)
        w = tl.load(w_ptr + offs_w[:, None] * stride_wn + offs_k[None, :] * stride_wk, mask=mask_w, other=0.0)
        acc = dot(dy, w, acc, PRECISION)
        if FUSED:
            v = tl.load(v_ptr + offs_y[:, None] * R + offs_r[None, :], mask=mask_v, other=0.0)
            acc_h = dot(dy, v, acc_h, PRECISION)

    if FUSED:
        grad_h = acc_h * scale
        if HAS_DROPOUT:
            grad_h = dropped(grad_h, seed_ptr, offs_m, 0, R, threshold, inv_keep, BLOCK_M, BLOCK_R)
        if pid_k == 0:
            grad_h_ptrs = grad_h_ptr + offs_m[:, None] * R + offs_r[None, :]
            mask_h = mask_m[:, None] & mask_r[None, :]
            tl.store(grad_h_ptrs, narrow(grad_h, grad_h_ptr.dtype.element_ty), mask=mask_h)
        u_ptrs = u_ptr + offs_k[None, :] * stride_uk + offs_r[:, None] * stride_ur
        u = tl.load(u_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        acc = low_dot(grad_h, u, acc, WIDE, PRECISION)
    tl.store(dx_ptrs, narrow(acc, dx_ptr.dtype.element_ty), mask=mask_dx)


# -- launching -------------------------------------------------------------------------------------------------------


def dx_fused(grad, weights, folded, u, seed, scale, dropout_p, tf32, grad_x, grad_h) -> None:
    """Write dx and grad_h from dy (M, N), weights (N_i, K) that one launch takes, folded V' (N, R) and u (K, R)."""
    (group,) = groups(weights, ())
    _dx(grad, group.weights, folded.contiguous(), u, seed, scale, dropout_p, tf32, grad_x, grad_h, fused=True)


def dx_started(grad, weights, u, tf32, grad_x, grad_h) -> None:
    """Write dx from dy (M, N), weights (N_i, K), u (K, R), of any strides, and grad_h (M, R), contiguous. More weights than a
    launch takes are added to what the ones before wrote."""
    for i, group in enumerate(groups(weights, ())):
        columns = grad[:, group.columns]
        _dx(columns, group.weights, None, u, None, 1.0, 0.0, tf32, grad_x, grad_h, fused=False, add=i > 0)


def dx_by_blas(grad, weights, u, grad_x, grad_h) -> None:
    """As :func:`dx_started`, by the library: a product for each weight, added to those before, and the update's."""
    first = 0
    for weight in weights:
        columns = grad[:, first : first + weight.shape[0]]
        if first == 0:
            torch.mm(columns, weight, out=grad_x)
        else:
            grad_x.addmm_(columns, weight)
        first += weight.shape[0]
    grad_x.addmm_(grad_h, u.t())


def _dx(grad, weights, v, u, seed, scale, dropout_p, tf32, grad_x, grad_h, *, fused: bool, add: bool = False) -> None:
    rows, columns = grad_x.shape
    rank = u.shape[1]
    config = matmul_config(grad, weights, columns, rank, tf32, forward=False)
    if grad.dtype == torch.float32 and not (tf32 or fused) and grad.is_cuda:
        config["num_warps"] = 4  # for eight, ptxas keeps values on the stack to fit three programs on a processor
    launch(
        _cp_linear_dx_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]) * cdiv(columns, c["BLOCK_N"]),),
        config,
        grad,
        *padded(weights),
        v,
        u,
        seed,
        grad_h,
        grad_x,
        rows,
        *sizes(weights),
        columns,
        rank,
        *grad.stride(),
        *weights[0].stride(),
        *u.stride(),
        scale,
        *dropout_args(seed, dropout_p),
        PIECES=len(weights),
        FUSED=fused,
        ADD=add,
        HAS_DROPOUT=seed is not None,
        EVEN_N=all(w.shape[0] % config["BLOCK_K"] == 0 for w in weights),
        WIDE=grad.dtype == torch.float16,
        PRECISION=product_precision(grad.dtype, tf32),
        BLOCK_R=rank_tile(grad, rank, tf32, fused),
    )


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    out = []
    unit = {"stride_dyn": 1, "stride_wk": 1, "stride_ur": 1}
    # (dtype, precision, kind of tile, rank tile, fused, N_i multiples of the tile, weights)
    cases = [
        ("bf16", "ieee", "large", 16, True, True, 1),
        ("bf16", "ieee", "large", 64, True, True, 3),
        ("bf16", "ieee", "large", 64, False, True, 1),
        ("bf16", "ieee", "large", 64, False, True, 3),
        ("bf16", "ieee", "medium", 64, True, True, 3),
        ("bf16", "ieee", "medium", 16, False, False, 1),
        ("bf16", "ieee", "small", 16, True, True, 1),
        ("bf16", "ieee", "ragged", 64, True, False, 3),
        ("bf16", "ieee", "ragged", 64, False, False, 1),
        ("fp16", "tf32", "ragged", 64, False, False, 3),
        ("fp16", "tf32", "medium", 64, False, True, 3),
        ("fp32", "tf32", "tf32", 64, True, True, 3),
        ("fp32", "ieee", "ieee", most_fused_rank(torch.float32, False), True, True, 3),
        ("fp32", "ieee", "ieee", 32, False, True, 1),
    ]
    seen = set()
    for family_name, archs in (("sm_90", (90, 100)), ("sm_80", (80,))):
        for dtype, precision, kind, rank, fused, even, pieces in cases:
            tile = dict(zip(TILE_NAMES, TILES[family_name][kind], strict=True))
            shared = TILES["sm_80"][kind] == TILES["sm_90"][kind]
            if shared and (dtype, kind, rank, fused, pieces) in seen:
                continue
            seen.add((dtype, kind, rank, fused, pieces))
            warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
            warps = 4 if kind == "ieee" and not fused else warps
            flags: dict[str, object] = {"PIECES": pieces, "FUSED": fused, "ADD": False, "HAS_DROPOUT": fused}
            flags |= {"EVEN_N": even, "WIDE": dtype == "fp16", "PRECISION": precision, "BLOCK_R": rank, "GROUP_M": 8}
            if pieces == 1:
                flags |= dict.fromkeys(("w1_ptr", "w2_ptr"))
            constexprs: dict[str, object] = {**unit, **flags, **tile}
            label = f"{dtype}_{kind}_{'fused' if fused else 'started'}_r{rank}"
            label += ("" if even else "_ragged") + (f"_{pieces}_weights" if pieces > 1 else "")
            types = argument_types(_cp_linear_dx_kernel, constexprs, dtype)
            out.append(
                Spec(
                    _cp_linear_dx_kernel,
                    label if shared else f"{family_name}_{label}",
                    types,
                    constexprs,
                    num_warps=warps,
                    num_stages=stages,
                    matrix=tile["BLOCK_M"] >= 64 and kind != "ieee",
                    aligned=("M", "n0", "n1", "n2", "K", "R") if kind != "ragged" else (),
                    unaligned=tuple(n for n in types if n.startswith("stride_")) if kind == "ragged" else (),
                    archs=(80, 90, 100) if shared else archs,
                )
            )
    return out


SPECS = _specs()
