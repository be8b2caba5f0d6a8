"""What adapter's kernels do to a tile: activation, slope, the norm in front, the projection down, gate, dropout."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgist_kernels.common import dot
from fastgist_kernels.outer import low_dot, narrow
from fastgist_kernels.philox import keep_mask

__all__ = [
    "activate",
    "activation_slope",
    "kept",
    "normalised",
    "project_down",
    "row_statistics",
    "spread_gate",
]


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "silu":
        return z * sigmoid(z)
    else:
        return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """act'(z)."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    else:
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def kept(seed_ptr, offs_m, first_h, width, threshold, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    """The dropout mask [BLOCK_M, BLOCK_H] of hidden units from ``first_h``, a multiple of 4, of ``width`` in all."""
    return keep_mask(tl.load(seed_ptr), offs_m, first_h, width, threshold, BLOCK_M, BLOCK_H)


@triton.jit
def row_statistics(
    x_ptr,
    offs_m,
    mask_m,
    D,
    stride_xm,
    stride_xd,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of each row [BLOCK_M], float32, in one pass over its D columns.

    Columns count from the mean of the first BLOCK_D, which takes a row's distance from zero away before anything is
    squared, or lost in a sum; chunks of columns are merged by their own means and deviations (Chan et al. 1979), so that
    a first chunk unlike the rest does no harm.
    """
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    rows = x_ptr + offs_m[:, None] * stride_xm
    first = tl.load(rows + offs_d[None, :] * stride_xd, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)
    shift = tl.sum(first.to(tl.float32), 1) / tl.minimum(D, BLOCK_D).to(tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first_d in range(0, D, BLOCK_D):
        offs_c = first_d + offs_d
        mask_d = (offs_c < D)[None, :]
        x = tl.load(rows + offs_c[None, :] * stride_xd, mask=mask_m[:, None] & mask_d, other=0.0).to(tl.float32)
        x = tl.where(mask_d, x - shift[:, None], 0.0)
        count = tl.minimum(D - first_d, BLOCK_D).to(tl.float32)
        here = tl.sum(x, 1) / count
        x = tl.where(mask_d, x - here[:, None], 0.0)
        share = count / tl.minimum(D, first_d + BLOCK_D).to(tl.float32)
        step = here - mean
        mean += step * share
        squares += tl.sum(x * x, 1) + step * step * (share * first_d)
    return mean + shift, tl.rsqrt(squares / D + eps)


@triton.jit
def normalised(x, mean, rstd):
    """(x - mean) * rstd of a tile [BLOCK_M, ...] in float32."""
    return (x.to(tl.float32) - mean[:, None]) * rstd[:, None]


@triton.jit
def project_down(
    x_ptr,
    down_ptr,
    down_bias_ptr,
    offs_m,
    offs_h,
    mask_m,
    mask_h,
    D,
    stride_xm,
    stride_xd,
    stride_dh,
    stride_dd,
    stride_db,
    norm_weight_ptr,
    norm_bias_ptr,
    mean,
    rstd,
    stride_nw,
    stride_nb,
    HAS_NORM: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """z [BLOCK_M, BLOCK_H] = a D^T + b_d in float32; 0 in padded hidden units. a is x, or (HAS_NORM) x normalised by mean and
    rstd [BLOCK_M] and rounded to x's dtype, as a LayerNorm's output would be; float16's stays float32 (WIDE)."""
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    z = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for first_d in range(0, D, BLOCK_D):
        offs_c = first_d + offs_d
        mask_x = mask_m[:, None]
        mask_w = mask_h[None, :]
        if not EVEN_D:
            mask_d = offs_c < D
            mask_x = mask_x & mask_d[None, :]
            mask_w = mask_w & mask_d[:, None]
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_c[None, :] * stride_xd
        w_ptrs = down_ptr + offs_c[:, None] * stride_dd + offs_h[None, :] * stride_dh
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        if HAS_NORM:
            a = normalised(x, mean, rstd)
            mask_c = offs_c < D
            if HAS_NORM_WEIGHT:
                a *= tl.load(norm_weight_ptr + offs_c * stride_nw, mask=mask_c, other=0.0).to(tl.float32)[None, :]
            if HAS_NORM_BIAS:
                a += tl.load(norm_bias_ptr + offs_c * stride_nb, mask=mask_c, other=0.0).to(tl.float32)[None, :]
            if not EVEN_D:  # what lies past D is no longer 0, and may not fit x's dtype
                a = tl.where(mask_c[None, :], a, 0.0)
            z = low_dot(a, narrow(w, x.dtype), z, WIDE, PRECISION)
        else:
            z = dot(x, narrow(w, x.dtype), z, PRECISION)
    if HAS_DOWN_BIAS:
        bias = tl.load(down_bias_ptr + offs_h * stride_db, mask=mask_h, other=0.0)
        z += narrow(bias, x_ptr.dtype.element_ty).to(tl.float32)[None, :]
    return z


@triton.jit
def spread_gate(
    gate_ptr, offs_m, mask_m, expert, E, stride_gm, stride_ge, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):
    """The gate of each row's hidden units, [BLOCK_M, BLOCK_H] float32; unit h belongs to expert[h]. A loop over experts,
    since a gather would hold a 64-bit pointer an element."""
    gate = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for e in range(0, E):
        column = tl.load(gate_ptr + offs_m * stride_gm + tl.cast(e, tl.int64) * stride_ge, mask=mask_m, other=0.0)
        gate = tl.where((expert == e)[None, :], column.to(tl.float32)[:, None], gate)
    return gate
