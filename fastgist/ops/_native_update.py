"""A low-rank update in C++ on CPUs, as cp_update and cp_linear add it: the adapter's kernels without an activation, whose
residual is y. 2-D throughout, as the raw ops of cp_update: y, out, grad (M, N), x (M, K), u (K, R), v (n, R), gain (1 or G,
R), h = drop(x U) (M, R)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgist import backends
from fastgist.reference._numerics import accumulate, accumulate_dtype
from fastgist.reference.cp_linear import _folded_v, low_rank_dtype

__all__ = ["add_to_dx", "backward", "forward", "pays"]


def pays(x: Tensor, rank: int, widest: int) -> bool:
    """Whether C++ is faster than PyTorch for x (M, ..) and factors of (<= widest, rank) (DESIGN.md, "cp_update in C++").
    It packs the factors at every call, and reads them again and again."""
    rows, factor = x.shape[0], rank * widest
    if x.dtype != torch.float32 or x.device.type != "cpu" or rows < 64:
        return False
    wide = backends.vector_bytes() == 64 or (backends.vector_bytes() == 32 and rank <= 8)
    return wide and factor <= min(2**20, 2**12 * rows)


def _wide(v: Tensor, gain: Tensor | None, folds: int) -> Tensor:
    """V' (N, R), V times each fold's gain, in the accumulation dtype."""
    return _folded_v(accumulate(v), None if gain is None else accumulate(gain), folds)


def _factor(v: Tensor, gain: Tensor | None, folds: int, scale: float, x_dtype: torch.dtype) -> tuple[Tensor, float]:
    """V' (N, R) and the scale. The kernels round V' to x's dtype; what of it passes float16's range goes into the scale."""
    folded = _wide(v, gain, folds)
    if x_dtype == torch.float16 and folded.numel():
        excess = math.frexp(float(folded.abs().max()))[1] - 15
        if excess > 0:
            return folded * 2.0**-excess, scale * 2.0**excess
    return folded, scale


def forward(
    y: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    out: Tensor,
    h: Tensor | None,
) -> None:
    """Write y + scale * (drop(x U) * gain) V^T into ``out``, which may be y, and drop(x U) into h, if it is given."""
    to = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    factor, factor_scale = _factor(v, gain, y.shape[1] // v.shape[0], scale, x.dtype)
    torch.ops.fastgist_native.adapter_fwd(
        x, accumulate(u).transpose(0, 1), None, factor, None, y, None, None, None, None, seed,
        "identity", factor_scale, 1.0, None, dropout_p, to, h, None,
    )  # fmt: skip
    if h is not None and seed is not None:
        torch.ops.fastgist_native.dropout(h, seed, dropout_p, h)
    if to is not out:
        out.copy_(to)


def backward(
    grad: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
    gain: Tensor | None,
    seed: Tensor | None,
    h: Tensor | None,
    folds: int,
    scale: float,
    dropout_p: float,
    need_x: bool,
    need_u: bool,
    need_outer: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dL/dx in ``grad``'s dtype, dL/dU and scale * grad^T h (N, R) in the accumulation dtype; None where not wanted.
    ``grad`` and x are each read once for all of it but dL/dU, for which x is read from cache again."""
    through_h = need_x or need_u
    rank = (h if v is None else v).shape[1]
    dtype = accumulate_dtype(grad.dtype)
    grad_x = grad.new_empty(grad.shape[0], u.shape[0]) if need_x else None
    grad_down = grad.new_empty(rank, x.shape[1], dtype=dtype) if need_u else None
    outer = grad.new_empty(grad.shape[1], rank, dtype=dtype) if need_outer else None
    if h is None:  # asked for, and of an identity's gradient not used
        h = grad.new_empty(grad.shape[0], rank, dtype=low_rank_dtype(grad.dtype))
    factor, factor_scale = _factor(v, gain, folds, scale, grad.dtype) if through_h else (None, scale)
    torch.ops.fastgist_native.adapter_bwd(
        grad, x if need_u else None, accumulate(u).transpose(0, 1) if need_x else None, None, factor, None, None, h,
        None, None, None, seed if through_h else None, "identity", factor_scale, 0.0, False, dropout_p,
        grad_x, grad_down, None, outer, None, None, None, None,
    )  # fmt: skip
    if outer is not None:
        again = (1.0 - dropout_p) if through_h and seed is not None else 1.0  # h, which has been dropped out, was again
        if again * scale != factor_scale:
            outer.mul_(again * (scale / factor_scale))
    return grad_x, None if grad_down is None else grad_down.transpose(0, 1).contiguous(), outer


def add_to_dx(
    grad_x: Tensor,
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> None:
    """grad_x += drop(scale * grad V') U^T, in place: the update of :func:`forward` by other factors."""
    folded = _wide(v, gain, grad.shape[1] // v.shape[0])
    forward(grad_x, grad, folded, u, None, seed, scale, dropout_p, grad_x, None)
