"""dx = dy W + dL/dh U^T, the gradient of cp_linear's input. Sizes M rows, N summed, K columns, R rank.

    dL/dh = drop'(scale * dy V'),   V' (N, R) = V times each fold's gain

The forward's two forms again. Fused, dL/dh accumulates beside dy W as R more columns of the loop over N, is stored for dU by
the first column of programs, and multiplies U^T in the epilogue: one launch reads dy once. V' is made beforehand, N R
numbers. Started, dL/dh comes from a kernel of its own and the accumulator starts from dL/dh U^T.
W may be several weights one above the other, and dy a piece for each (pieces.py): the loop over N walks them, none is copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, dot, launch
from fastgist_kernels.cp_linear_forms import most_fused_rank
from fastgist_kernels.cp_linear_parts import dropout_args, dropped, groups
from fastgist_kernels.cp_linear_plan import TILE_NAMES, TILES, matmul_config, product_precision, rank_tile
from fastgist_kernels.outer import argument_types, low_dot, narrow
from fastgist_kernels.pieces import find, padded, pick, sizes, strides, sum_of

__all__ = ["SPECS", "dx_by_blas", "dx_fused", "dx_started"]


@triton.jit
def _cp_linear_dx_kernel(
    dy0_ptr,
    dy1_ptr,
    dy2_ptr,
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
    stride_dym0,
    stride_dym1,
    stride_dym2,
    stride_dyn0,
    stride_dyn1,
    stride_dyn2,
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
    steps1 = tl.cdiv(n1, BLOCK_K)
    for step in range(0, sum_of(steps0, steps1, tl.cdiv(n2, BLOCK_K), PIECES)):
        piece, own_step = find(step, steps0, steps1, PIECES)
        dy_ptr = pick(piece, (dy0_ptr, dy1_ptr, dy2_ptr), PIECES)
        stride_m = pick(piece, (stride_dym0, stride_dym1, stride_dym2), PIECES)
        stride_n = pick(piece, (stride_dyn0, stride_dyn1, stride_dyn2), PIECES)
        w_ptr = pick(piece, (w0_ptr, w1_ptr, w2_ptr), PIECES)
        first_n = own_step * BLOCK_K
        offs_w = first_n + offs_n
        mask_dy = mask_m[:, None]
        mask_w = mask_k[None, :]
        mask_v = mask_r[None, :]
        if not EVEN_N:
            mask_n = offs_w < pick(piece, (n0, n1, n2), PIECES)
            mask_dy = mask_dy & mask_n[None, :]
            mask_w = mask_w & mask_n[:, None]
            mask_v = mask_v & mask_n[:, None]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_m + offs_w[None, :] * stride_n, mask=mask_dy, other=0.0)
        w = tl.load(w_ptr + offs_w[:, None] * stride_wn + offs_k[None, :] * stride_wk, mask=mask_w, other=0.0)
        acc = dot(dy, w, acc, PRECISION)
        if FUSED:
            offs_v = pick(piece, (0, n0, n0 + n1), PIECES) + offs_w
            v = tl.load(v_ptr + offs_v[:, None] * R + offs_r[None, :], mask=mask_v, other=0.0)
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

#: (fused, several weights) -> what the tile of full float32 products takes instead.
_FULL_FLOAT32: dict[tuple[bool, bool], dict[str, int]] = {
    (True, True): {"BLOCK_M": 32},
    (True, False): {},
    (False, True): {"num_warps": 4},
    (False, False): {"num_warps": 4},
}


def dx_fused(grads, weights, folded, u, seed, scale, dropout_p, tf32, grad_x, grad_h) -> None:
    """Write dx and grad_h from dy, a piece (M, N_i) for each of the weights (N_i, K), which one launch takes, folded V' (N, R)
    and u (K, R)."""
    _dx(grads, weights, folded.contiguous(), u, seed, scale, dropout_p, tf32, grad_x, grad_h, fused=True)


def dx_started(grads, weights, u, tf32, grad_x, grad_h) -> None:
    """Write dx from dy, a piece (M, N_i) for each of the weights (N_i, K), u (K, R), of any strides, and grad_h (M, R),
    contiguous. More weights than a launch takes are added to what the ones before wrote."""
    first = 0
    for group in groups(weights, ()):
        last = first + len(group.weights)
        _dx(grads[first:last], group.weights, None, u, None, 1.0, 0.0, tf32, grad_x, grad_h, fused=False, add=first > 0)
        first = last


def dx_by_blas(grads, weights, u, grad_x, grad_h) -> None:
    """As :func:`dx_started`, by the library: a product for each weight, added to those before, and the update's."""
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        if i == 0:
            torch.mm(grad, weight, out=grad_x)
        else:
            grad_x.addmm_(grad, weight)
    grad_x.addmm_(grad_h, u.t())


def _dx(grads, weights, v, u, seed, scale, dropout_p, tf32, grad_x, grad_h, *, fused: bool, add: bool = False) -> None:
    dtype = grads[0].dtype
    rows, columns = grad_x.shape
    rank = u.shape[1]
    config = matmul_config(grads, weights, columns, rank, tf32, forward=False)
    if dtype == torch.float32 and not tf32 and grad_x.is_cuda:  # else ptxas keeps values on the stack
        config |= _FULL_FLOAT32[fused, len(weights) > 1]
    launch(
        _cp_linear_dx_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]) * cdiv(columns, c["BLOCK_N"]),),
        config,
        *padded(grads),
        *padded(weights),
        v,
        u,
        seed,
        grad_h,
        grad_x,
        rows,
        *sizes(weights, 0),
        columns,
        rank,
        *strides(grads),
        *weights[0].stride(),
        *u.stride(),
        scale,
        *dropout_args(seed, dropout_p),
        PIECES=len(weights),
        FUSED=fused,
        ADD=add,
        HAS_DROPOUT=seed is not None,
        EVEN_N=all(w.shape[0] % config["BLOCK_K"] == 0 for w in weights),
        WIDE=dtype == torch.float16,
        PRECISION=product_precision(dtype, tf32),
        BLOCK_R=rank_tile(grads[0], rank, tf32, fused),
    )


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    out = []
    unit = {"stride_dyn0": 1, "stride_dyn1": 1, "stride_dyn2": 1, "stride_wk": 1, "stride_ur": 1}
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
            tile |= _FULL_FLOAT32[fused, pieces > 1] if kind == "ieee" else {}
            warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
            flags: dict[str, object] = {"PIECES": pieces, "FUSED": fused, "ADD": False, "HAS_DROPOUT": fused}
            flags |= {"EVEN_N": even, "WIDE": dtype == "fp16", "PRECISION": precision, "BLOCK_R": rank, "GROUP_M": 8}
            if pieces == 1:
                flags |= dict.fromkeys(("dy1_ptr", "dy2_ptr", "w1_ptr", "w2_ptr"))
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
