r"""The GIST objective (arXiv 2312.07255): two cross-entropies and the bidirectional KL between the two heads' logits.

.. math::
    L = CE(z, y) + \alpha\, CE(z_g, y) + \beta\, [KL(p\|q) + KL(q\|p)],
    \qquad p = \mathrm{softmax}(z / T),\; q = \mathrm{softmax}(z_g / T)

The cross-entropies are at temperature 1. A class distribution t (one-hot, smoothed, or given as soft targets) makes
:math:`CE(z, t) = \sum_c t_c (\mathrm{lse}(z) - z_c)`, where a class with t = 0 contributes 0 even if z is -inf there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgist.reference import bidirectional_kl as _kl
from fastgist.reference._numerics import accumulate, accumulate_dtype, row_blocks

__all__ = ["cross_entropy_rows", "forward", "gist_loss", "kept_rows"]


def kept_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """bool, True where a row counts; None where soft targets leave none out."""
    return None if target.is_floating_point() else target != ignore_index


def cross_entropy_rows(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """CE per row at temperature 1, (..., V) -> (...). ``target`` holds class indices in range, or (..., V) floats."""
    classes = logits.shape[-1]
    log_p = torch.log_softmax(logits, -1)
    if target.is_floating_point():
        weights = target.to(logits.dtype)
    else:
        weights = torch.nn.functional.one_hot(target, classes).to(logits.dtype)
    if label_smoothing:
        weights = weights * (1.0 - label_smoothing) + label_smoothing / classes
    return torch.where(weights == 0, 0.0, -weights * log_p).sum(-1)


def gist_loss(
    logits: Tensor,
    gist_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.75,
    temperature: float = 3.0,
    t_squared: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    detach: str | None = None,
) -> Tensor:
    """The formula, by autograd. Arguments as :func:`fastgist.functional.gist_loss`; targets must be in range."""
    z, gist = accumulate(logits), accumulate(gist_logits)
    kept = kept_rows(target, ignore_index)
    if kept is not None:
        target = target.masked_fill(~kept, 0)
        z, gist = z.masked_fill(~kept[..., None], 0.0), gist.masked_fill(~kept[..., None], 0.0)
    row_loss = cross_entropy_rows(z, target, label_smoothing)
    if alpha:  # a weight of 0 means the term is absent, also where it would be inf or NaN
        row_loss = row_loss + alpha * cross_entropy_rows(gist, target, label_smoothing)
    if beta:
        z, gist = z.detach() if detach == "logits" else z, gist.detach() if detach == "gist_logits" else gist
        divergence = _kl.bidirectional_kl(z, gist, temperature=temperature, reduction="none", t_squared=t_squared)
        row_loss = row_loss + beta * divergence
    if kept is not None:
        row_loss = torch.where(kept, row_loss, 0.0)
    return _kl.reduce_rows(row_loss, reduction, kept)


def _cross_entropy(x: Tensor, weights: Tensor | None, target: Tensor, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Row CE and its gradient, from logits (M, V). ``weights`` (M, V): dense class weights, or None for one-hot
    ``target`` (M,)."""
    if weights is None and need_grad and x.device.type == "cpu":
        # log(softmax) is as exact as log_softmax but near 0, where rows are few: that spares an exponential of all.
        p = torch.softmax(x, -1)
        likelihood = p.gather(-1, target[:, None])
        row_loss = likelihood.log().neg_().squeeze(-1)
        rare = (~(likelihood > 1e-30)).squeeze(-1).nonzero().squeeze(-1)
        if len(rare):
            row_loss[rare] = -torch.log_softmax(x[rare], -1).gather(-1, target[rare, None]).squeeze(-1)
        return row_loss, p.scatter_add_(-1, target[:, None], p.new_full((len(p), 1), -1.0))
    log_p = torch.log_softmax(x, -1)
    if weights is None:
        row_loss = -log_p.gather(-1, target[:, None]).squeeze(-1)
        if not need_grad:
            return row_loss, None
        return row_loss, log_p.exp_().scatter_add_(-1, target[:, None], log_p.new_full((len(log_p), 1), -1.0))
    row_loss = torch.where(weights == 0, 0.0, -weights * log_p).sum(-1)
    if not need_grad:
        return row_loss, None
    return row_loss, log_p.exp_().mul_(weights.sum(-1, keepdim=True)).sub_(weights)


def forward(
    logits: Tensor,
    gist_logits: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    beta_z: float,
    beta_gist: float,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    need_z: bool,
    need_gist: bool,
    scale: float | Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Row losses (M,) and the gradients asked for, times ``scale`` (), from logits (M, V).

    ``beta`` includes any T^2; ``beta_z`` and ``beta_gist`` are the divergence's weight in each side's gradient: beta, or
    0 for a side that is detached from it.

    A target that is neither a class nor ``ignore_index`` makes its row NaN (a caller on a CPU has raised before).
    """
    if logits.numel() == 0:
        wanted = (need_z, need_gist)
        grads = [torch.zeros_like(logits, dtype=_kl.finished_dtype(logits.dtype)) if need else None for need in wanted]
        return accumulate(logits).new_zeros(logits.shape[0]), grads[0], grads[1]
    settings = (alpha, beta, beta_z, beta_gist, temperature, label_smoothing, ignore_index)

    blocks = row_blocks(logits)
    if len(blocks) == 1:
        return _rows(logits, gist_logits, target, *settings, need_z, need_gist, scale)
    row_loss = logits.new_empty(logits.shape[0], dtype=accumulate_dtype(logits.dtype))
    grads = [
        logits.new_empty(logits.shape, dtype=_kl.finished_dtype(logits.dtype)) if need else None
        for need in (need_z, need_gist)
    ]
    for rows in blocks:
        loss, *parts = _rows(logits[rows], gist_logits[rows], target[rows], *settings, need_z, need_gist, scale)
        row_loss[rows] = loss
        for grad, part in zip(grads, parts, strict=True):
            if grad is not None and part is not None:
                grad[rows] = part
    return row_loss, grads[0], grads[1]


def _rows(
    logits: Tensor,
    gist_logits: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    beta_z: float,
    beta_gist: float,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    need_z: bool,
    need_gist: bool,
    scale: float | Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    z, gist = accumulate(logits), accumulate(gist_logits)
    rows, classes = z.shape
    kept, invalid, weights = kept_rows(target, ignore_index), None, None
    if kept is not None:
        invalid = kept & ((target < 0) | (target >= classes))
        target = target.clamp(0, classes - 1)
        if z.device.type == "cpu":  # where a look costs nothing, it spares the passes that ignored rows would need
            kept = None if bool(kept.all()) else kept
            invalid = invalid if bool(invalid.any()) else None
    if kept is not None:
        z, gist = z.masked_fill(~kept[:, None], 0.0), gist.masked_fill(~kept[:, None], 0.0)
    if target.is_floating_point():
        weights = target.to(z.dtype)
        if label_smoothing:
            weights = weights * (1.0 - label_smoothing) + label_smoothing / classes
    elif label_smoothing:
        weights = torch.full_like(z, label_smoothing / classes)
        weights.scatter_add_(-1, target[:, None], z.new_full((rows, 1), 1.0 - label_smoothing))
    row_loss, grad_z = _cross_entropy(z, weights, target, need_z)
    grad_gist = torch.zeros_like(z) if need_gist else None
    if alpha:
        gist_rows, grad_gist = _cross_entropy(gist, weights, target, need_gist)
        row_loss = row_loss + alpha * gist_rows
        grad_gist = None if grad_gist is None else grad_gist.mul_(alpha)
    if beta:
        learns, gist_learns = need_z and beta_z != 0, need_gist and beta_gist != 0
        divergence, kl_z, kl_gist = _kl.pair(z, gist, temperature, learns, gist_learns)
        row_loss = row_loss + beta * divergence
        if grad_z is not None and kl_z is not None:
            grad_z.add_(kl_z, alpha=beta_z / temperature)
        if grad_gist is not None and kl_gist is not None:
            grad_gist.sub_(kl_gist, alpha=beta_gist / temperature)
    for rows_out, value in ((invalid, torch.nan), (None if kept is None else ~kept, 0.0)):
        if rows_out is not None:
            row_loss = row_loss.masked_fill(rows_out, value)
            for grad in (grad_z, grad_gist):
                if grad is not None:
                    grad.masked_fill_(rows_out[:, None], value)
    if scale is not None:
        for grad in (grad_z, grad_gist):
            if grad is not None:
                grad.mul_(scale)
    return row_loss, _kl.narrow(grad_z, logits.dtype), _kl.narrow(grad_gist, logits.dtype)
