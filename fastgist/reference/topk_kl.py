r"""Divergence from a sparse teacher: the probabilities of k classes are known, all others are one class, "the rest".

With :math:`p` the student's softmax(z / T) and :math:`q` the teacher's, both over k + 1 classes, and
:math:`d_c = \log p_c - \log q_c`:

.. math::
    KL(p\|q) = \sum_c p_c d_c, \qquad KL(q\|p) = -\sum_c q_c d_c

The student's rest is a sum over the other classes, never 1 - sum:
:math:`\log p_r = \mathrm{lse}_{j \notin K}(z_j / T) - \mathrm{lse}(z / T)`. In the k + 1 logits :math:`a`, of which the
rest's is that first lse, the gradients are

.. math::
    \partial KL(p\|q) / \partial a_c = p_c (d_c - E_p[d]), \qquad
    \partial KL(q\|p) / \partial a_c = p_c \textstyle\sum q - q_c

A known class takes its own, and the rest's is shared out by softmax among the others, each over T. So two numbers a row and
k more are all that is needed beside z.

Absent classes, -inf in either side: on both they contribute 0. KL(p||q) is +inf where p has a class that q has not, KL(q||p)
the reverse, exactly, and the gradient of that row is NaN. A NaN, a +inf or a row of nothing but -inf gives NaN in its own row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgist.reference._numerics import accumulate, accumulate_dtype, row_blocks
from fastgist.reference.bidirectional_kl import finished_dtype, reduce_rows

__all__ = ["DIRECTIONS", "forward", "repeated", "sparse_teacher", "topk_kl"]

DIRECTIONS = ("both", "forward", "reverse")


def repeated(indices: Tensor) -> Tensor:
    """bool (..., k - 1): where ascending ``indices`` name a class again."""
    return (indices[..., 1:] == indices[..., :-1]) & (indices[..., 1:] >= 0)


def sparse_teacher(log_probs: Tensor, indices: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and classes (..., k) in ascending order of the class, and the rest's log-probability (...).

    The rest is 1 - sum in float64, the largest probability through expm1. It is absent (-inf) where all classes are named,
    and where it is no larger than what rounding log-probabilities of that dtype can hide, eps * sum q |log q|. It is NaN where
    a class is repeated or impossible, which makes the row NaN.
    """
    indices, order = indices.sort(-1)
    log_probs = log_probs.gather(-1, order)
    wide = log_probs.to(torch.float32 if log_probs.device.type == "mps" else torch.float64)
    probs = wide.exp()
    largest, at = wide.max(-1, keepdim=True)
    rest = -torch.expm1(largest.squeeze(-1)) - probs.scatter(-1, at, 0.0).sum(-1)
    hidden = torch.finfo(log_probs.dtype).eps * (-probs * wide).masked_fill(probs == 0, 0.0).sum(-1)
    none_left = (rest <= hidden) | ((indices >= 0).sum(-1) >= classes)
    impossible = (indices >= classes) | (indices < 0) & ((indices < -1) | (log_probs != -torch.inf))
    wrong = impossible.any(-1) | repeated(indices).any(-1)
    log_rest = rest.log().masked_fill(none_left, -torch.inf).masked_fill(wrong, torch.nan)
    return log_probs, indices, log_rest


def topk_kl(
    logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "both",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    t_squared: bool = False,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """The formula, by autograd. Shapes and arguments as :func:`fastgist.functional.topk_kl`."""
    z, classes = accumulate(logits), logits.shape[-1]
    log_q, indices, log_rest = sparse_teacher(teacher_log_probs, teacher_indices, classes)
    log_q = torch.cat((log_q, log_rest[..., None]), -1).to(z.dtype)
    if mask is not None:  # a masked row's values may be NaN: take them out before any arithmetic
        z, log_q = z.masked_fill(~mask[..., None], 0.0), log_q.masked_fill(~mask[..., None], 0.0)
    present = (indices >= 0) & (indices < classes)
    taken = torch.zeros((*z.shape[:-1], classes + 1), dtype=torch.bool, device=z.device)
    taken = taken.scatter(-1, indices.where(present, classes), True)[..., :classes]
    u = (z - z.amax(-1, keepdim=True).detach()) / temperature
    others = u.masked_fill(taken, -torch.inf)
    empty = (others == -torch.inf).all(-1, keepdim=True)  # whose lse has no gradient but NaN
    rest = others.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
    known = u.gather(-1, indices.clamp(0, classes - 1)).masked_fill(~present, -torch.inf)
    log_p = torch.log_softmax(torch.cat((known, rest), -1), -1)
    no_p, no_q = log_p == -torch.inf, log_q == -torch.inf
    d = log_p.masked_fill(no_p | no_q, 0.0) - log_q.masked_fill(no_p | no_q, 0.0)
    p, q = log_p.exp(), log_q.exp()
    terms = torch.zeros_like(d)
    if direction != "forward":
        terms = torch.where(no_q & ~no_p, torch.inf, terms + p * d)
    if direction != "reverse":
        terms = torch.where(no_p & ~no_q, torch.inf, terms - q * d)
    row_loss = torch.where(log_rest.isnan() | log_p.isnan().any(-1), torch.nan, terms.sum(-1))
    if mask is not None:
        row_loss = torch.where(mask, row_loss, 0.0)
    if t_squared:
        row_loss = row_loss * temperature**2
    return reduce_rows(row_loss, reduction, mask) if divisor is None else row_loss.sum() / divisor


def _pooled(
    top: Tensor, largest: Tensor, total: Tensor, log_q: Tensor, temperature: float, direction: str
) -> tuple[Tensor, Tensor]:
    """Row losses (M, 1) and T dJ/da (M, k + 1), the rest last. ``largest``, ``total`` (M, 1): maximum of the other logits, and
    the sum of their exponentials about it."""
    logits = torch.cat((top, largest), -1)
    peak = logits.amax(-1, keepdim=True)
    about = (logits - peak.masked_fill(peak == -torch.inf, 0.0)) * (1.0 / temperature)
    # exp(.) / sum, not exp(log_p): the quotient does not carry the rounding of the logarithm.
    weights = about.exp()
    weights[:, -1:] *= total
    about[:, -1:] += total.log()
    whole = weights.sum(-1, keepdim=True)
    p, q = weights / whole, log_q.exp()
    no_p, no_q = logits == -torch.inf, log_q == -torch.inf
    d = (about - whole.log() - log_q).masked_fill_(no_p | no_q, 0.0)
    sum_q = q.sum(-1, keepdim=True)
    factor, grad, infinite = torch.zeros_like(d), torch.zeros_like(d), torch.zeros_like(no_p)
    if direction != "forward":
        mean = (p * d).sum(-1, keepdim=True).div_(p.sum(-1, keepdim=True))
        factor, grad, infinite = factor + p, grad + p * (d - mean), infinite | (no_q & ~no_p)
    if direction != "reverse":
        factor, grad, infinite = factor - q, grad + (sum_q * p - q), infinite | (no_p & ~no_q)
    row_loss = (factor * d).sum(-1, keepdim=True)
    row_loss = row_loss.masked_fill(infinite.any(-1, keepdim=True) & ~row_loss.isnan(), torch.inf)
    row_loss = row_loss.masked_fill(~(whole > 0) | sum_q.isnan(), torch.nan)
    return row_loss, grad.masked_fill(~row_loss.isfinite(), torch.nan)


def forward(
    logits: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    log_rest: Tensor,
    mask: Tensor | None,
    temperature: float,
    direction: str,
    need_logits: bool,
) -> tuple[Tensor, Tensor | None]:
    """Row losses J (M,) and dJ/dz where asked for, from logits (M, V) and what :func:`sparse_teacher` gave."""
    width, finished = accumulate_dtype(logits.dtype), finished_dtype(logits.dtype)
    if logits.numel() == 0:
        return logits.new_zeros(len(logits), dtype=width), logits.new_zeros(logits.shape, dtype=finished)
    row_loss = logits.new_empty(len(logits), dtype=width)
    grad = logits.new_empty(logits.shape, dtype=finished) if need_logits else None
    last = logits.shape[1] - 1
    for rows in row_blocks(logits):
        z, masked = accumulate(logits[rows]), None if mask is None else ~mask[rows, None]
        if masked is not None:
            z = z.masked_fill(masked, 0.0)
        at = indices[rows].clamp(0, last)
        absent = indices[rows] != at  # padding: its place is another class's, which is to change by 0
        top = z.gather(-1, at).masked_fill_(absent, -torch.inf)
        others = z.scatter_add(-1, at, torch.full_like(top, -torch.inf).masked_fill_(absent, 0.0))
        largest = others.amax(-1, keepdim=True)
        shares = others.sub_(largest.masked_fill(largest == -torch.inf, 0.0)).mul_(1.0 / temperature).exp_()
        total = shares.sum(-1, keepdim=True)
        log_q = torch.cat((log_probs[rows], log_rest[rows, None]), -1)
        loss, pull = _pooled(top, largest, total, log_q, temperature, direction)
        if masked is not None:
            loss, pull = loss.masked_fill(masked, 0.0), pull.masked_fill(masked, 0.0)
        row_loss[rows] = loss.squeeze(-1)
        if grad is not None:
            pull = pull * (1.0 / temperature)
            shares.mul_(pull[:, -1:] / total.masked_fill(total == 0, 1.0))
            grad[rows] = shares.scatter_add_(-1, at, pull[:, :-1].masked_fill(absent, 0.0))
    return row_loss, grad
