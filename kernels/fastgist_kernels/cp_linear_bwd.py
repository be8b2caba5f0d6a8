"""The backward of cp_linear in Triton: dL/dh and dV from dy, dx (cp_linear_dx.py), and dU.

    dL/dh = drop'(scale * sum_g (dy_g V) * gain_g)      P_g = scale * dy_g^T h      dV = sum_g P_g * gain_g
    dx = dy W + dL/dh U^T      dU = x^T dL/dh           dgain_g = colsum(P_g * V): no reduction over M

Where dx is fused, dL/dh comes out of its loop and outer.py takes P from another read of dy. Else one kernel takes dL/dh and P
from a single read of dy at small ranks, a projection and outer.py at larger ones, and dx starts from dL/dh U^T.
Every sum over rows is made of partial sums in float32, added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, device_arch, dot, launch
from fastgist_kernels.cp_linear_cost import dy_programs
from fastgist_kernels.cp_linear_dx import dx_by_blas, dx_fused, dx_started
from fastgist_kernels.cp_linear_parts import (
    dropout_args,
    dropped,
    folded_v,
    gain_strides,
    groups,
    low_rank_empty,
    own_folds,
)
from fastgist_kernels.cp_linear_plan import cp_linear_form, grad_u_by_library, one_pass, product_precision
from fastgist_kernels.cp_linear_project import project
from fastgist_kernels.outer import argument_types, low_dot, narrow, outer, outer_partials, rank_block, reduce_partials
from fastgist_kernels.pieces import PIECES, padded, pick, sizes, strides, sum_of

__all__ = ["SPECS", "cp_linear_bwd", "low_rank_grads"]


@triton.jit
def _cp_linear_bwd_dy_kernel(
    dy0_ptr,
    dy1_ptr,
    dy2_ptr,
    v_ptr,
    gain_ptr,
    seed_ptr,
    h_ptr,
    grad_h_ptr,
    part_ptr,
    M,
    n0,
    n1,
    n2,
    R,
    fold_n,
    blocks,
    stride_dym0,
    stride_dym1,
    stride_dym2,
    stride_dyn0,
    stride_dyn1,
    stride_dyn2,
    stride_vn,
    stride_vr,
    stride_gg,
    stride_gr,
    scale,
    threshold,
    inv_keep,
    PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One read of dy for grad_h (M, R) = drop'(scale * sum_g (dy_g V) * gain_g) and the part of dy^T h that these ``blocks``
    blocks of rows have in it. Each adds to what this program wrote for the ones before."""
    pid = tl.program_id(0).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    offs_j = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_r = offs_r < R
    part_ptr += pid * sum_of(n0, n1, n2, PIECES) * R
    for block in range(0, blocks):
        offs_m = (pid * blocks + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask_h = mask_m[:, None] & mask_r[None, :]
        h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_h, other=0.0)
        grad_h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for piece in range(0, PIECES):
            dy_ptr = pick(piece, (dy0_ptr, dy1_ptr, dy2_ptr), PIECES)
            stride_m = pick(piece, (stride_dym0, stride_dym1, stride_dym2), PIECES)
            stride_n = pick(piece, (stride_dyn0, stride_dyn1, stride_dyn2), PIECES)
            columns = pick(piece, (n0, n1, n2), PIECES)
            start = pick(piece, (0, n0, n0 + n1), PIECES)
            first_v, first_fold, width = own_folds(piece, n0, n1, n2, fold_n, PIECES, WHOLE)
            for own in range(0, columns // width):
                first_n = tl.cast(own, tl.int64) * width
                acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
                for first_j in range(0, width, BLOCK_N):
                    offs_c = first_j + offs_j
                    offs_n = first_n + offs_c
                    mask_c = offs_c < width
                    dy_ptrs = dy_ptr + offs_m[:, None] * stride_m + offs_n[None, :] * stride_n
                    v_ptrs = v_ptr + (first_v + offs_c)[:, None] * stride_vn + offs_r[None, :] * stride_vr
                    mask_p = mask_c[:, None] & mask_r[None, :]
                    dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
                    v = tl.load(v_ptrs, mask=mask_p, other=0.0)
                    acc = dot(dy, v, acc, PRECISION)
                    part_ptrs = part_ptr + (start + offs_n)[:, None] * R + offs_r[None, :]
                    part = low_dot(tl.trans(dy), h, tl.zeros([BLOCK_N, BLOCK_R], tl.float32), WIDE, PRECISION)
                    part += tl.load(part_ptrs, mask=mask_p & (block > 0), other=0.0)
                    tl.store(part_ptrs, part, mask=mask_p)
                if HAS_GAIN:
                    gain_ptrs = gain_ptr + tl.cast(first_fold + own, tl.int64) * stride_gg + offs_r * stride_gr
                    acc = acc * tl.load(gain_ptrs, mask=mask_r, other=0.0).to(tl.float32)[None, :]
                grad_h += acc
        grad_h = grad_h * scale
        if HAS_DROPOUT:
            grad_h = dropped(grad_h, seed_ptr, offs_m, 0, R, threshold, inv_keep, BLOCK_M, BLOCK_R)
        grad_h_ptrs = grad_h_ptr + offs_m[:, None] * R + offs_r[None, :]
        tl.store(grad_h_ptrs, narrow(grad_h, grad_h_ptr.dtype.element_ty), mask=mask_h)
        tl.debug_barrier()  # a thread may load what another of this program has stored


@triton.jit
def _cp_linear_bwd_reduce_kernel(
    part_ptr,
    v_ptr,
    gain_ptr,
    grad_v_ptr,
    grad_gain_ptr,
    splits,
    N,
    R,
    fold_n,
    stride_vn,
    stride_vr,
    stride_gg,
    stride_gr,
    scale,
    HAS_GAIN: tl.constexpr,
    NEED_V: tl.constexpr,
    NEED_GAIN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """P_g = scale * sum over part (splits, N, R) of fold g. grad_v = sum_g P_g * gain_g, in a fixed order, and this block's
    part of grad_gain_g = colsum(P_g * V), (blocks, G, R) float32."""
    pid_j = tl.program_id(0).to(tl.int64)
    folds = N // fold_n
    offs_j = pid_j * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    mask_jr = (offs_j < fold_n)[:, None] & mask_r[None, :]
    v = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    if NEED_GAIN:
        v_ptrs = v_ptr + offs_j[:, None] * stride_vn + offs_r[None, :] * stride_vr
        v = tl.load(v_ptrs, mask=mask_jr, other=0.0).to(tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for g in range(0, folds):
        fold = tl.cast(g, tl.int64)
        offs_nr = (fold * fold_n + offs_j)[:, None] * R + offs_r[None, :]
        outer = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for first_s in range(0, splits, BLOCK_S):
            offs_s = first_s + tl.arange(0, BLOCK_S).to(tl.int64)
            mask_s = offs_s < splits
            part_ptrs = part_ptr + offs_s[:, None, None] * (tl.cast(N, tl.int64) * R) + offs_nr[None, :, :]
            part = tl.load(part_ptrs, mask=mask_s[:, None, None] & mask_jr[None, :, :], other=0.0)
            outer += tl.sum(part, 0)
        outer = outer * scale
        if NEED_GAIN:
            grad_gain = tl.sum(outer * v, 0)
            tl.store(grad_gain_ptr + (pid_j * folds + fold) * R + offs_r, grad_gain, mask=mask_r)
        if HAS_GAIN:
            gain = tl.load(gain_ptr + fold * stride_gg + offs_r * stride_gr, mask=mask_r, other=0.0)
            outer = outer * gain.to(tl.float32)[None, :]
        grad_v += outer
    if NEED_V:
        grad_v_ptrs = grad_v_ptr + offs_j[:, None] * R + offs_r[None, :]
        tl.store(grad_v_ptrs, narrow(grad_v, grad_v_ptr.dtype.element_ty), mask=mask_jr)


# -- launching -------------------------------------------------------------------------------------------------------


def cp_linear_bwd(
    grads,
    x,
    weights,
    u,
    v,
    gain,
    seed,
    h,
    folds,
    scale,
    dropout_p,
    tf32,
    grad_x,
    grad_u,
    grad_v,
    grad_gain,
    form: str | None = None,
) -> None:
    """Write the gradients that are not None: grad_x (M, K), grad_u (K, R), grad_v (n, R), grad_gain (1 or G, R), contiguous,
    from dy, a piece (M, N_i) of any strides for each weight (N_i, K), each read where it is. Inputs that none of
    the gradients needs may be None, or no weights. ``form``: how dx is computed, one that can run here; None takes what the
    plan says."""
    grads = [g for g in grads if g.shape[1]]
    weights = [w for w in weights if w.shape[0]]
    rank = h.shape[1] if v is None else v.shape[1]
    need_grad_h = grad_x is not None or grad_u is not None
    grad_h = low_rank_empty(grads[0], rank) if need_grad_h else None
    if grad_x is not None and form is None:
        form = cp_linear_form(grads[0], weights, grad_x.shape[1], rank, tf32, forward=False)
    fused = grad_x is not None and form == "fused" and len(list(groups(weights, ()))) == 1
    if fused:
        dx_fused(grads, weights, folded_v(v, gain, folds), u, seed, scale, dropout_p, tf32, grad_x, grad_h)
    of_factors = (grad_u, grad_v, grad_gain)
    low_rank_grads(grads, x, v, gain, seed, h, folds, scale, dropout_p, tf32, grad_h, *of_factors, known=fused)
    if grad_x is None or fused:
        return
    if form == "blas":
        dx_by_blas(grads, weights, u, grad_x, grad_h)
    else:
        dx_started(grads, weights, u, tf32, grad_x, grad_h)


def low_rank_grads(
    dy, x, v, gain, seed, h, folds, scale, dropout_p, tf32, grad_h, grad_u, grad_v, grad_gain, *, known: bool = False
) -> None:
    """Write dL/dh into grad_h (M, R) and the factors' gradients, of each what is not None, from dy (M, N) in pieces.
    ``known``: grad_h holds it already. grad_u is made of grad_h."""
    columns = sum(piece.shape[1] for piece in dy)
    need_grad_h = grad_h is not None and not known
    need_outer = grad_v is not None or grad_gain is not None
    rank = h.shape[1] if v is None else v.shape[1]
    part = None
    if need_grad_h and need_outer and len(dy) <= PIECES and one_pass(dy[0], columns, rank):
        part = _dy_pass(dy, v, gain, seed, h, scale, dropout_p, tf32, grad_h)
    elif need_grad_h:
        project(dy, v, gain, seed, scale, dropout_p, tf32, grad_h)
    if need_outer:
        part = outer_partials(dy, h, tf32=tf32) if part is None else part
        _reduce(part, v, gain, columns, rank, folds, scale, grad_v, grad_gain)
        del part  # before dU's are made
    if grad_u is None:
        return
    if grad_u.dtype == grad_h.dtype == x.dtype and grad_u_by_library(x, rank, tf32):
        torch.mm(x.t(), grad_h, out=grad_u)
    else:
        outer(x, grad_h, grad_u, tf32=tf32)


def _dy_pass(dy, v, gain, seed, h, scale, dropout_p, tf32, grad_h) -> torch.Tensor:
    """Write grad_h and return the partial dy^T h, (programs, N R) float32, from dy in at most three pieces."""
    rows, columns = grad_h.shape[0], sum(piece.shape[1] for piece in dy)
    fold_n, rank = v.shape
    dtype, device = dy[0].dtype, dy[0].device
    if device_arch(device) == "interpret":
        block_m, config = 16, {"BLOCK_N": 16}
    else:
        block_m, config = 128, {"BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    programs, blocks = dy_programs(rows, rank, dtype.itemsize, block_m)
    part = torch.empty(programs, columns * rank, dtype=torch.float32, device=device)
    launch(
        _cp_linear_bwd_dy_kernel,
        lambda c: (programs,),
        config,
        *padded(dy),
        v,
        gain,
        seed,
        h,
        grad_h,
        part,
        rows,
        *sizes(dy, 1),
        rank,
        fold_n,
        blocks,
        *strides(dy),
        *v.stride(),
        *gain_strides(gain),
        scale,
        *dropout_args(seed, dropout_p),
        PIECES=len(dy),
        WHOLE=len(dy) > 1 and fold_n == columns,
        HAS_GAIN=gain is not None,
        HAS_DROPOUT=seed is not None,
        WIDE=dtype == torch.float16,
        PRECISION=product_precision(dtype, tf32),
        BLOCK_M=block_m,
        BLOCK_R=rank_block(rank),
    )
    return part


def _reduce(part, v, gain, columns, rank, folds, scale, grad_v, grad_gain) -> None:
    fold_n = columns // folds
    block_n = 16
    blocks = cdiv(fold_n, block_n)
    gains = None
    if grad_gain is not None:
        gains = torch.empty(blocks, folds, rank, dtype=torch.float32, device=part.device)
    launch(
        _cp_linear_bwd_reduce_kernel,
        lambda c: (blocks, cdiv(rank, c["BLOCK_R"])),
        {"BLOCK_S": 2 if device_arch(part.device) == "interpret" else 8, "BLOCK_R": 16},
        part,
        v,
        gain,
        grad_v,
        gains,
        part.shape[0],
        columns,
        rank,
        fold_n,
        *((0, 0) if v is None else v.stride()),
        *gain_strides(gain),
        scale,
        HAS_GAIN=gain is not None,
        NEED_V=grad_v is not None,
        NEED_GAIN=grad_gain is not None,
        BLOCK_N=block_n,
    )
    if grad_gain is not None:
        reduce_partials(gains.view(-1, grad_gain.numel()), grad_gain)  # one gain of many folds: their sum too


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------


def _specs() -> list[Spec]:
    out = []
    unit = dict.fromkeys(("stride_dyn0", "stride_dyn1", "stride_dyn2", "stride_vr", "stride_gr"), 1)
    for dtype, precision, rank, pieces, whole in (
        ("bf16", "ieee", 16, 1, False),
        ("bf16", "ieee", 32, 1, False),
        ("bf16", "ieee", 32, 3, False),
        ("bf16", "ieee", 32, 3, True),
        ("fp16", "tf32", 32, 1, False),
        ("fp16", "tf32", 32, 3, False),
    ):
        constexprs: dict[str, object] = {**unit, "PIECES": pieces, "WHOLE": whole, "HAS_GAIN": True}
        constexprs |= {"HAS_DROPOUT": True, "WIDE": dtype == "fp16", "PRECISION": precision}
        constexprs |= {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_R": rank}
        if pieces == 1:
            constexprs |= dict.fromkeys(("dy1_ptr", "dy2_ptr"))
        out.append(
            Spec(
                _cp_linear_bwd_dy_kernel,
                f"{dtype}_r{rank}" + (f"_{pieces}_pieces" if pieces > 1 else "") + "_whole" * whole,
                argument_types(_cp_linear_bwd_dy_kernel, constexprs, dtype),
                constexprs,
                num_warps=8,
                num_stages=3,
                matrix=True,
                aligned=("M", "n0", "n1", "n2", "R", "fold_n"),
                archs=(90, 100),
            )
        )
    constexprs = {"stride_vr": 1, "stride_gr": 1, "HAS_GAIN": True, "NEED_V": True, "NEED_GAIN": True}
    constexprs |= {"BLOCK_S": 8, "BLOCK_N": 16, "BLOCK_R": 16}
    types = argument_types(_cp_linear_bwd_reduce_kernel, constexprs, "bf16")
    out.append(Spec(_cp_linear_bwd_reduce_kernel, "bf16_r16", types, constexprs, aligned=("N", "R", "fold_n")))
    return out


SPECS = _specs()
