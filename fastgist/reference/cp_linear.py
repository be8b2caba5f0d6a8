r"""A frozen linear layer plus a CP low-rank update (PETAL, arXiv 2312.12458; Aurora's mode approximation, 2305.08381).

With the stacked weight update as a CP tensor, matrix m gets :math:`\Delta W = U\, \mathrm{diag}(g_m)\, V^T`, [in, out]:

.. math::
    y = x W^T + b + s\; (\mathrm{drop}(x U) \odot g)\, V^T

``N = G n``: the output may be G folds of width n that share U and V and differ in their gain, one row of ``gain`` each
(the three thirds of a fused qkv, or a 3072-wide layer as four of 768). LoRA, AdaLoRA and the Tucker form are this
expression with other names for its factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastgist.reference import philox
from fastgist.reference._numerics import accumulate, half_in_float32

__all__ = [
    "backward",
    "cp_linear",
    "delta_weight",
    "dx_merges",
    "forward",
    "low_rank_dtype",
    "merge_pays",
]


def low_rank_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that x U and its gradient are kept in: x's own, but float32 for float16, whose range ends at 65504:
    a rank unit may pass it where the output, after gain and V, does not."""
    return torch.float32 if dtype == torch.float16 else dtype


def delta_weight(u: Tensor, v: Tensor, gain: Tensor | None, scale: float, folds: int) -> Tensor:
    """The dense update as nn.Linear stores weights, (N, K): rows g n + j are scale * (v_j * gain_g) u^T."""
    return scale * (_folded_v(v, gain, folds) @ u.transpose(0, 1))


def _folded_v(v: Tensor, gain: Tensor | None, folds: int) -> Tensor:
    """V' (N, R): V times each fold's gain, the folds stacked."""
    if gain is None:
        return v if folds == 1 else v.repeat(folds, 1)
    if folds == 1:
        return v * gain.reshape(1, -1)
    gain = gain.reshape(-1, 1, v.shape[1]).expand(folds, 1, v.shape[1])
    return (v[None] * gain).reshape(folds * v.shape[0], v.shape[1])


def _folds(rows: int, v: Tensor) -> int:
    """How many folds of v's width a piece of so many rows has; one where it has none, and so no part of v."""
    return rows // v.shape[0] if len(v) else 1


#: (h (M, R), p, seed or None) -> h dropped out, in h's own memory or not.
Dropout = Callable[[Tensor, float, "Tensor | None"], Tensor]


def _dropped(h: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Inverted dropout on h (M, R) by the counter-based rule of :mod:`fastgist.reference.philox`."""
    if seed is None:
        return h
    keep = philox.keep_mask(seed, (h.shape[0], h.shape[1]), dropout_p)
    return torch.where(keep, h / (1.0 - dropout_p), 0.0)


def cp_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """The formula, by autograd, float32 (float64) inside; shapes as :func:`fastgist.functional.cp_linear`."""
    folds = weight.shape[0] // v.shape[0]
    x2 = accumulate(x).reshape(-1, x.shape[-1])
    y = x2 @ accumulate(weight).transpose(0, 1)
    if bias is not None:
        y = y + accumulate(bias)
    h = x2 @ accumulate(u)
    if training and dropout_p > 0.0:
        h = _dropped(h, dropout_p, seed)
    gain = None if gain is None else accumulate(gain)
    y = y + scale * (h @ _folded_v(accumulate(v), gain, folds).transpose(0, 1))
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def merge_pays(rows: int, inner: int, out: int, rank: int, factor_needed: bool) -> bool:
    """Whether (M, inner) times W + dW is faster than times W and then a low-rank update of the (M, out) result.

    The sum costs R products and two passes for each of inner * out elements, the update as much for each of M * out. Where
    nobody else asks for x U, that is spared as well: R products for each of M * inner, and a read of x that takes as long as
    eight more. Measured (docs/crossovers.md) the two break even near the point where both sides are equal, at every rank and
    width; three tenths are for the memory that W + dW takes and for the caches that it leaves cold.
    """
    alone = 0.0 if factor_needed else inner * (1.0 + 8.0 / rank)
    return rows * (out + alone) >= 1.3 * inner * out


def _merged_weight(
    a: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    gain: Tensor | None,
    seed: Tensor | None,
    scale: float,
    factor_needed: bool,
) -> Tensor | None:
    """W + dW where multiplying ``a`` (M, inner) by the sum is cheaper than by W and a factor, else None.

    In float32 and wider the sum rounds as the base product itself does; in half precision small updates would vanish.
    Dropout acts between the factors and rules it out. ``factor_needed``: whether x U (dL/dh) is computed in any case.
    """
    inner = a.shape[1]
    if not _may_merge(a, seed) or not merge_pays(
        a.shape[0], inner, sum(weight.shape) - inner, u.shape[1], factor_needed
    ):
        return None
    return _merge(weight, u, v, gain, scale)


def _may_merge(a: Tensor, seed: Tensor | None) -> bool:
    return seed is None and a.dtype in (torch.float32, torch.float64)


def dx_merges(grads: list[Tensor], weight: Tensor, u: Tensor, seed: Tensor | None, factor_needed: bool) -> bool:
    """Whether dL/dx is of each weight with its update. Of several weights all are merged or none: the update of dx is one for
    all. ``weight``: one of them; the rest as for :func:`merge_pays`."""
    rows, out = grads[0].shape[0], sum(g.shape[1] for g in grads)
    return _may_merge(grads[0], seed) and merge_pays(rows, out, weight.shape[1], u.shape[1], factor_needed)


def _merge(weight: Tensor, u: Tensor, v: Tensor, gain: Tensor | None, scale: float) -> Tensor:
    folded = _folded_v(v, gain, _folds(weight.shape[0], v))
    return torch.addmm(weight, folded, u.transpose(0, 1), alpha=scale)


def _pieces(sizes: list[int], v: Tensor, gain: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Of v and gain what belongs to each piece of a weight, pieces of ``sizes`` rows."""
    start, fold, total = 0, 0, sum(sizes)
    for size in sizes:
        if v.shape[0] == total:
            yield v[start : start + size], gain
            start += size
        else:
            folds = size // v.shape[0]
            yield v, gain if gain is None or gain.shape[0] == 1 else gain[fold : fold + folds]
            fold += folds


def _on_rows(gain: Tensor | None, folds: int, rows: int, out: int) -> bool:
    """Whether the gain is put on x U (M, R) rather than on V (n, R): of few rows, for decoding and small batches, passes over
    V are what is seen of the operation. More folds have a gain each."""
    return gain is not None and folds == 1 and rows < out


def _scaled(t: Tensor, scale: float) -> Tensor:
    """scale * t, in place."""
    return t if scale == 1.0 else t.mul_(scale)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T b (C, R), contiguous, from a (M, C) and the narrow b (M, R). Over many rows as its transpose: with M = 1576 and
    C = 768, at R = 8, 0.4 ms instead of 1.1. Not in float32 where R is a multiple of 16 (at 16 0.48 ms instead of 0.38), and
    of a few rows the copy that turns it back would be most of it."""
    if a.shape[0] <= b.shape[1] or (a.dtype == torch.float32 and b.shape[1] % 16 == 0):
        return torch.mm(a.transpose(0, 1), b)
    return torch.mm(b.transpose(0, 1), a).transpose(0, 1).contiguous()


def _of_factors(
    outer: Tensor | None, v: Tensor | None, gain: Tensor | None, folds: int, need_v: bool, need_gain: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dV = sum_g P_g * g_g and dgain_g = colsum(P_g * V) from ``outer`` (N, R), the P_g one above the other, in its dtype."""
    grad_v = grad_gain = None
    if need_v:
        grad_v = outer
        if gain is not None or folds > 1:
            by_fold = outer.view(folds, -1, outer.shape[1])
            weighted = by_fold if gain is None else by_fold * accumulate(gain)[:, None]
            grad_v = weighted[0] if folds == 1 else weighted.sum(0)
    if need_gain:
        grad_gain = (outer.view(folds, -1, outer.shape[1]) * accumulate(v)).sum(1)
        if gain.shape[0] == 1:
            grad_gain = grad_gain.sum(0, keepdim=True)
    return grad_v, grad_gain


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in total's memory where there is one."""
    return torch.mm(a, b) if total is None else total.addmm_(a, b)


@half_in_float32(narrowed=slice(0, 1))
def forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    u: Tensor,
    v: Tensor,
    gain: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
    need_h: bool,
    drop: Dropout | None = None,
    update: Callable[..., None] | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """y (M, N) in a piece (M, N_i) for each weight, and h = drop(x U) (M, R) in low_rank_dtype where needed. The weights
    (N_i, K) are as if one above the other, and none is copied; ``biases`` is empty or as long. gain: (1, R) or (G, R).
    ``drop``: what drops out h in place of the function here, to the same result. ``update``: what adds to each weight's y, of
    at least a row, with the arguments of :func:`fastgist.ops._native_update.forward`."""
    ys = []
    h = (drop or _dropped)(x @ u, dropout_p, seed) if need_h and update is None else None
    for i, (own_v, own_gain) in enumerate(_pieces([w.shape[0] for w in weights], v, gain)):
        weight = weights[i]
        # The first ``update`` forms h on its way, for no more than x U costs alone.
        forms_h = update is not None and need_h and h is None and weight.shape[0] > 0
        merged = None if forms_h else _merged_weight(x, weight, u, own_v, own_gain, seed, scale, need_h)
        used = (weight if merged is None else merged).transpose(0, 1)
        y = torch.addmm(biases[i], x, used) if biases else torch.mm(x, used)
        if merged is None and update is not None:
            h = x.new_empty(x.shape[0], u.shape[1]) if forms_h else h
            if y.shape[1]:
                update(y, x, u, own_v, own_gain, seed, scale, dropout_p, y, h if forms_h else None)
        elif merged is None:
            h = (drop or _dropped)(x @ u, dropout_p, seed) if h is None else h
            folds = _folds(weight.shape[0], own_v)
            if _on_rows(own_gain, folds, x.shape[0], weight.shape[0]):
                y.addmm_(h * own_gain, own_v.transpose(0, 1), alpha=scale)
            else:
                y.addmm_(h, _folded_v(own_v, own_gain, folds).transpose(0, 1), alpha=scale)
        ys.append(y)
    return ys, h


@half_in_float32(narrowed=slice(0, None))
def backward(
    grads: list[Tensor],
    x: Tensor | None,
    weights: list[Tensor],
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
    need_v: bool,
    need_gain: bool,
    drop: Dropout | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, u, v and gain from dL/dy (M, N) in pieces, one for each of the weight's, as :func:`forward` takes those
    (none where need_x is False). With P_g = s dy_g^T h for each fold, dV = sum_g P_g * g_g and dgain_g = colsum(P_g * V): the
    gain's gradient costs no reduction over M. What no wanted gradient asks is None."""
    grad_x = grad_u = grad_v = grad_gain = low = None
    sizes = [g.shape[1] for g in grads]
    rows, dtype = grads[0].shape[0], grads[0].dtype
    whole = need_x and dx_merges(grads, weights[0], u, seed, need_u)
    through_h = need_u or (need_x and not whole)
    on_rows = _on_rows(gain, folds, rows, sum(sizes)) and (through_h or not need_gain)
    # What stands beside each dy in dV: the gain, where it is on the rows, with it.
    beside = _scaled(h * gain, scale) if on_rows and need_v else h
    outers = []
    pieces = [(v, gain)] * len(grads) if v is None else _pieces(sizes, v, gain)
    for i, (grad, (own, its)) in enumerate(zip(grads, pieces, strict=True)):  # all of one while it is in cache
        if through_h:
            low = _plus_product(low, grad, own if on_rows else _folded_v(own, its, _folds(sizes[i], own)))
        if need_v or (need_gain and not on_rows):
            outers.append(_outer(grad, beside))
        if need_x:
            grad_x = _plus_product(grad_x, grad, _merge(weights[i], u, own, its, scale) if whole else weights[i])
    if through_h:
        grad_h = (drop or _dropped)(_scaled(low * gain if on_rows else low, scale), dropout_p, seed)
        if need_x and not whole:
            grad_x.addmm_(grad_h, u.transpose(0, 1))
        if need_u:
            grad_u = _outer(x, grad_h)
    outer = (outers[0] if len(outers) == 1 else torch.cat(outers)) if outers else None
    if on_rows:
        grad_v = outer
        grad_gain = _scaled((low * h).sum(0, keepdim=True), scale) if need_gain else None
    elif need_v or need_gain:
        outer = _scaled(accumulate(outer), scale)
        grad_v, grad_gain = (
            None if g is None else g.to(dtype) for g in _of_factors(outer, v, gain, folds, need_v, need_gain)
        )
    return grad_x, grad_u, grad_v, grad_gain
