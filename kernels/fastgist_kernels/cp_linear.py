"""cp_linear in Triton: y = x W^T + b + scale * (drop(x U) * gain) V^T. Sizes M rows, N out, K in, R rank, n = N / G.

One matmul kernel in two forms. Fused, it accumulates h = x U beside x W^T, as R more columns of the same loop over K, and
adds the update in the epilogue. Started, h comes from a kernel of its own and the accumulator starts from the update.
Fused costs R / BLOCK_N more products, started a second read of x: equal near N R = 47,000 at BLOCK_N = 256.
W may be several weights one above the other (cp_linear_parts.py); the first of the launches that share h forms it.
The other forms are in cp_linear_few.py and cp_linear_tma.py, the backward in cp_linear_bwd.py and cp_linear_dx.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastgist_kernels.aot import Spec
from fastgist_kernels.common import cdiv, dot, launch
from fastgist_kernels.cp_linear_few import few
from fastgist_kernels.cp_linear_parts import (
    Group,
    column_tiles,
    dropout_args,
    dropped,
    folded_v,
    gain_strides,
    groups,
    low_rank_empty,
    place_of_tile,
    tiles_of_all,
)
from fastgist_kernels.cp_linear_plan import (
    TILE_NAMES,
    TILES,
    cp_linear_form,
    matmul_config,
    product_precision,
    rank_tile,
)
from fastgist_kernels.cp_linear_project import project
from fastgist_kernels.cp_linear_tma import matmul_by_descriptors
from fastgist_kernels.outer import argument_types, low_dot, narrow
from fastgist_kernels.pieces import padded, sizes

__all__ = ["SPECS", "cp_linear_fwd"]


@triton.jit
def _cp_linear_fwd_kernel(
    x_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    u_ptr,
    v_ptr,
    gain_ptr,
    seed_ptr,
    h_ptr,
    y_ptr,
    M,
    n0,
    n1,
    n2,
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
    stride_ym,
    scale,
    threshold,
    inv_keep,
    PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
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
    tiles_n = tiles_of_all(n0, n1, n2, fold_n, PIECES, WHOLE, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    in_group = pid % (GROUP_M * tiles_n)
    pid_m = group * GROUP_M + in_group % group_rows
    pid_n = in_group // group_rows
    weights = (w0_ptr, w1_ptr, w2_ptr)
    biases = (bias0_ptr, bias1_ptr, bias2_ptr)
    place = place_of_tile(pid_n, weights, biases, n0, n1, n2, fold_n, PIECES, WHOLE, HAS_BIAS, BLOCK_N)
    w_ptr, bias_ptr, start, first_row, first_j, width, fold, first_v = place

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_n = first_row + offs_t
    offs_v = first_v + offs_t
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m = offs_m < M
    mask_n = first_j + offs_t < width

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
            v_ptrs = v_ptr + offs_q[:, None] * stride_vr + offs_v[None, :] * stride_vn
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
        v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_v[None, :] * stride_vn
        v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = low_dot(h, v, acc, WIDE, PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + (start + offs_n)[None, :]
    tl.store(y_ptrs, narrow(acc, y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


# -- launching ------------------------------------------------------------------------------------------


def _matmul(x, group: Group, u, seed, scale, dropout_p, tf32, y, h, *, fused: bool) -> None:
    """y (M, N), its rows contiguous, = x W^T + bias + scale * (h * gain) V^T, h being computed (fused; stored where not None)
    or read."""
    rows, inner = x.shape
    rank = group.v.shape[1]
    config = matmul_config([x], group.weights, group.fold_n, rank, tf32)
    launch(
        _cp_linear_fwd_kernel,
        lambda c: (cdiv(rows, c["BLOCK_M"]) * column_tiles(group, c["BLOCK_N"]),),
        config,
        x,
        *padded(group.weights),
        *padded(group.biases),
        u,
        group.v,
        group.gain,
        seed,
        h,
        y,
        rows,
        *sizes(group.weights, 0),
        inner,
        rank,
        group.fold_n,
        *x.stride(),
        *group.weights[0].stride(),
        group.biases[0].stride(0) if group.biases else 0,
        *((0, 0) if u is None else u.stride()),
        *group.v.stride(),
        *gain_strides(group.gain),
        y.stride(0),
        scale,
        *dropout_args(seed, dropout_p),
        PIECES=len(group.weights),
        WHOLE=group.whole,
        FUSED=fused,
        HAS_BIAS=bool(group.biases),
        HAS_GAIN=group.gain is not None,
        HAS_DROPOUT=seed is not None,
        STORE_H=fused and h is not None,
        EVEN_K=inner % config["BLOCK_K"] == 0,
        WIDE=x.dtype == torch.float16,
        PRECISION=product_precision(x.dtype, tf32),
        BLOCK_R=rank_tile(x, rank, tf32, fused),
    )


def cp_linear_fwd(x, weights, biases, u, v, gain, seed, scale, dropout_p, tf32, y, h, form: str | None = None) -> None:
    """Write y (M, N) and, where h is not None, h = drop(x U) (M, R), both contiguous. Inputs of any strides: x (M, K),
    weights (N_i, K) one above the other, as many biases (N_i,) or none, u (K, R), v (n, R), gain (1 or G, R) or None, seed
    (1,) int64 where dropout acts. ``form``: one that can run here; None takes what the plan says."""
    rank = u.shape[1]
    if form is None:
        form = cp_linear_form(x, weights, v.shape[0], rank, tf32)
    if form == "blas":
        _by_blas(x, weights, biases, u, v, gain, seed, scale, dropout_p, tf32, y, h)
        return
    if form == "few":
        few(x, weights, biases, u, v, gain, seed, scale, dropout_p, tf32, y, h)
        return
    runs = list(groups(weights, biases, v, gain))
    if h is None and (form.endswith("started") or len(runs) > 1):
        h = low_rank_empty(x, rank)
    if form.endswith("started"):
        project([x], u, None, seed, 1.0, dropout_p, tf32, h)
    for i, group in enumerate(runs):
        fused = form.endswith("fused") and i == 0
        own_u, own_seed = (u, seed) if fused else (None, None)
        matmul = matmul_by_descriptors if form.startswith("tma") else _matmul
        matmul(x, group, own_u, own_seed, scale, dropout_p, tf32, y[:, group.columns], h, fused=fused)


def _by_blas(x, weights, biases, u, v, gain, seed, scale, dropout_p, tf32, y, h) -> None:
    """The library's products, each into its own columns of y, then the update added to all of them.

    One weight's bias is added by its product. Into a slice of y the library would have to spread the bias first and read it
    back, a pass over y: there the biases are one more rank of the update, which passes over y anyway.
    """
    folds, rank = y.shape[1] // v.shape[0], u.shape[1]
    several = len(weights) > 1 and bool(biases)
    if several:  # [h | 1 ...] times [scale V' | b | 0 ...], rows of whole 16 bytes
        more = 8 - rank % 8
        low = x.new_ones(x.shape[0], rank + more)
        folded = x.new_zeros(y.shape[1], rank + more)
        update = folded[:, :rank].unflatten(0, (folds, -1))
        if gain is None:
            update.copy_(v)
        else:
            torch.mul(v, gain.expand(folds, -1)[:, None], out=update)
        if scale != 1.0:
            update.mul_(scale)
        torch.cat(list(biases), out=folded[:, rank])
        scale = 1.0
    else:
        folded = folded_v(v, gain, folds)
        low = low_rank_empty(x, rank) if h is None else h
    project([x], u, None, seed, 1.0, dropout_p, tf32, low[:, :rank])
    if several and h is not None:
        h.copy_(low[:, :rank])
    first = 0
    for i, weight in enumerate(weights):
        out = y[:, first : first + weight.shape[0]]
        first += weight.shape[0]
        if biases and not several:
            torch.addmm(biases[i], x, weight.t(), out=out)
        else:
            torch.mm(x, weight.t(), out=out)
    y.addmm_(low, folded.t(), alpha=scale)


# -- ahead-of-time specs ---------------------------------------------------------------------------------------------

_ALIGNED = ("M", "n0", "n1", "n2", "K", "R", "fold_n")


def _specs() -> list[Spec]:
    out = []
    unit = {"stride_xk": 1, "stride_wk": 1, "stride_bias": 1, "stride_ur": 1, "stride_vr": 1, "stride_gr": 1}
    # (dtype, precision, kind of tile, rank tile, fused, K a multiple of the tile, weights)
    cases = [
        ("bf16", "ieee", "large", 16, True, True, 1),
        ("bf16", "ieee", "large", 64, True, True, 1),
        ("bf16", "ieee", "large", 64, True, True, 3),
        ("bf16", "ieee", "large", 64, False, True, 1),
        ("bf16", "ieee", "large", 64, False, True, 3),
        ("bf16", "ieee", "medium", 16, True, False, 1),
        ("bf16", "ieee", "medium", 64, True, True, 3),
        ("bf16", "ieee", "small", 16, True, True, 1),
        ("bf16", "ieee", "ragged", 16, True, False, 1),
        ("bf16", "ieee", "ragged", 64, True, False, 1),
        ("bf16", "ieee", "ragged", 64, True, False, 3),
        ("bf16", "ieee", "ragged", 64, False, False, 1),
        ("fp16", "tf32", "ragged", 64, True, False, 1),
        ("fp16", "tf32", "medium", 64, True, True, 1),
        ("fp16", "tf32", "medium", 64, True, True, 3),
        ("fp16", "tf32", "medium", 64, False, True, 1),
        ("fp32", "tf32", "tf32", 64, True, True, 1),
        ("fp32", "ieee", "ieee", 32, True, True, 1),
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
            flags: dict[str, object] = {"PIECES": pieces, "WHOLE": False, "FUSED": fused, "HAS_BIAS": True}
            flags |= {"HAS_GAIN": True, "HAS_DROPOUT": fused, "STORE_H": fused, "EVEN_K": even, "WIDE": dtype == "fp16"}
            flags |= {"PRECISION": precision, "BLOCK_R": rank, "GROUP_M": 8}
            if pieces == 1:
                flags |= dict.fromkeys(("w1_ptr", "w2_ptr", "bias1_ptr", "bias2_ptr"))
            constexprs: dict[str, object] = {**unit, **flags, **tile}
            label = f"{dtype}_{kind}_{'fused' if fused else 'started'}_r{rank}"
            label += ("" if even else "_ragged") + (f"_{pieces}_weights" if pieces > 1 else "")
            types = argument_types(_cp_linear_fwd_kernel, constexprs, dtype)
            out.append(
                Spec(
                    _cp_linear_fwd_kernel,
                    label if shared else f"{family_name}_{label}",
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
    return out


SPECS = _specs()
