r"""The low-rank update by itself, added to what a base layer of any kind has given: a quantised, sharded or wrapped one.

.. math::
    y' = y + s\; (\mathrm{drop}(x U) \odot g)\, V^T

The same update as in :mod:`fastgist.reference.cp_linear`, folds and gains too, without the base layer's product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgist.reference._numerics import accumulate, accumulate_dtype, row_blocks
from fastgist.reference.cp_linear import Dropout, _dropped, _folded_v, _of_factors, _outer, _scaled, low_rank_dtype

__all__ = ["backward", "cp_update", "forward"]


def cp_update(
    y: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """The formula, by autograd, float32 (float64) inside; shapes as :func:`fastgist.functional.cp_update`."""
    folds = y.shape[-1] // v.shape[0]
    h = accumulate(x).reshape(-1, x.shape[-1]) @ accumulate(u)
    if training and dropout_p > 0.0:
        h = _dropped(h, dropout_p, seed)
    gain = None if gain is None else accumulate(gain)
    update = h @ _folded_v(accumulate(v), gain, folds).transpose(0, 1)
    return (accumulate(y) + scale * update.reshape(y.shape)).to(y.dtype)


def _product_dtype(x: torch.dtype, factors: torch.dtype) -> torch.dtype:
    """What products run in: x's dtype, of which PyTorch rounds the results alone. But float32 for float16, whose range x U may
    pass, and for bfloat16 beside float32 factors, so that none of them is rounded."""
    return torch.bfloat16 if x == factors == torch.bfloat16 else accumulate_dtype(x)


def _project(a: Tensor, b: Tensor) -> Tensor:
    """a b (M, R), in b's dtype. Half precision is widened a block of rows at a time: no (M, N) float32 tensor exists."""
    if a.dtype == b.dtype:
        return torch.mm(a, b)
    h = a.new_empty(a.shape[0], b.shape[1], dtype=b.dtype)
    for rows in row_blocks(a):
        torch.mm(a[rows].to(b.dtype), b, out=h[rows])
    return h


def _add(y: Tensor, h: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """out = y + scale * h v^T, rounded once; ``y`` may be ``out``. h and v have one dtype."""
    v = v.transpose(0, 1)
    if out.dtype == h.dtype:
        torch.addmm(y, h, v, alpha=scale, out=out)
        return
    for rows in row_blocks(out):
        out[rows].copy_(torch.mm(h[rows], v).mul_(scale).add_(y[rows]))


def _in_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


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
    drop: Dropout | None = None,
) -> Tensor:
    """Write y + update into ``out`` (M, N), which may be y, and return h = drop(x U) (M, R) in low_rank_dtype. gain: (1, R) or
    (G, R). ``drop``: what drops out h in place of :mod:`fastgist.reference.cp_linear`'s own, to the same result."""
    u, v, gain = _in_dtype(_product_dtype(x.dtype, u.dtype), u, v, gain)
    h = (drop or _dropped)(_project(x, u), dropout_p, seed)
    folded = _folded_v(v, gain, y.shape[1] // v.shape[0])
    _add(y, h, folded, scale, out)
    return h.to(low_rank_dtype(x.dtype))


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
    factors: torch.dtype,
    need_x: bool,
    need_u: bool,
    need_v: bool,
    need_gain: bool,
    *,
    drop: Dropout | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from grad = dL/dy' (M, N), which is y's own: of x in its dtype, of u, v and gain, whose dtype is
    ``factors``, in whatever they were summed in. With P_g = s dy_g^T h, dV = sum_g P_g * g_g and dgain_g = colsum(P_g * V).
    What no wanted gradient asks is None."""
    grad_x = grad_u = grad_v = grad_gain = grad_h = None
    u, v, gain, h = _in_dtype(_product_dtype(grad.dtype, factors), u, v, gain, h)
    if need_x or need_u:
        grad_h = _scaled(_project(grad, _folded_v(v, gain, folds)), scale)
        grad_h = (drop or _dropped)(grad_h, dropout_p, seed)
    if need_x:
        if grad.dtype == grad_h.dtype:
            grad_x = torch.mm(grad_h, u.transpose(0, 1))
        else:
            grad_x = grad.new_empty(grad.shape[0], u.shape[0])
            for rows in row_blocks(grad_x):
                grad_x[rows] = torch.mm(grad_h[rows], u.transpose(0, 1))
    if need_u:
        grad_u = _product(grad_h, x)
    if need_v or need_gain:
        outer = _product(h, grad)
        if scale != 1.0 or gain is not None or folds > 1:  # more is to be done to it: without rounding on the way
            outer = _scaled(accumulate(outer), scale)
        grad_v, grad_gain = _of_factors(outer, v, gain, folds, need_v, need_gain)
    return grad_x, grad_u, grad_v, grad_gain


def _product(narrow: Tensor, wide: Tensor) -> Tensor:
    """wide^T narrow, (C, R), contiguous, in ``narrow``'s dtype. Blocks of rows are summed as its transpose."""
    if wide.dtype == narrow.dtype:
        return _outer(wide, narrow)
    total = None
    for rows in row_blocks(wide):
        a, b = narrow[rows].transpose(0, 1), wide[rows].to(narrow.dtype)
        total = torch.mm(a, b) if total is None else total.addmm_(a, b)
    return total.transpose(0, 1).contiguous()
