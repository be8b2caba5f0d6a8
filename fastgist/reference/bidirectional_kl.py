r"""Bidirectional Kullback-Leibler divergence with temperature (GIST, arXiv 2312.07255, the BKLD term).

With :math:`u = z / T`, :math:`v = z_g / T`, :math:`p = \mathrm{softmax}(u)`, :math:`q = \mathrm{softmax}(v)` the two
log-sum-exps cancel:

.. math::
    J = KL(p\|q) + KL(q\|p) = \sum_c (p_c - q_c)(u_c - v_c) = E_p[d] - E_q[d], \qquad d = u - v + k

for any constant ``k`` of the row. We take k so that ``d = ((z - max z) - (z_g - max z_g)) / T``: an offset between the
two heads then costs no accuracy. The gradients follow from four scalars a row:

.. math::
    \partial J / \partial z   &= \tfrac{1}{T} [\; p (d - E_p[d]) + p - q \;] \\
    \partial J / \partial z_g &= \tfrac{1}{T} [  - q (d - E_q[d]) + q - p \;]

Classes at -inf: on both sides they contribute 0 and get gradient 0; on one side only the divergence is +inf, exactly,
and the gradient of that row is NaN. A NaN, a +inf or a row of nothing but -inf gives NaN in its own row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgist.reference._numerics import accumulate

__all__ = ["STATS", "bidirectional_kl", "centre", "forward", "narrow", "pair", "reduce_rows"]

#: Rows of the ``stats`` tensor (len(STATS), M) that a forward kernel leaves for its backward.
#: mean_p_d and mean_q_d are of the undivided d, (z - max z) - (z_g - max z_g).
STATS = ("max_z", "max_other", "sum_p", "sum_q", "mean_p_d", "mean_q_d")


def reduce_rows(row_loss: Tensor, reduction: str, mask: Tensor | None) -> Tensor:
    """Reduce per-row losses. ``mask`` (bool, same shape): rows that count. "mean" of no rows is 0."""
    if reduction == "none":
        return row_loss
    if reduction == "sum":
        return row_loss.sum()
    if mask is None:
        return row_loss.sum() / max(row_loss.numel(), 1)
    return row_loss.sum() / mask.sum().clamp(min=1)


def bidirectional_kl(
    logits: Tensor,
    other_logits: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    t_squared: bool = False,
) -> Tensor:
    """The formula, by autograd: KL(p||q) + KL(q||p). Shapes and arguments as :func:`fastgist.functional.bidirectional_kl`."""
    z, other = accumulate(logits), accumulate(other_logits)
    if mask is not None:  # a masked row's values may be NaN: take them out before any arithmetic
        z = z.masked_fill(~mask[..., None], 0.0)
        other = other.masked_fill(~mask[..., None], 0.0)
    absent = (z == -torch.inf) & (other == -torch.inf)
    all_absent = absent.all(-1)
    log_p = torch.log_softmax((z - z.amax(-1, keepdim=True).detach()) / temperature, -1)
    log_q = torch.log_softmax((other - other.amax(-1, keepdim=True).detach()) / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    difference = log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)
    lone = difference.isinf()  # p > 0 where q = 0, or the reverse: the divergence is +inf
    terms = torch.where(lone, torch.inf, (p - q) * difference)
    row_loss = terms.sum(-1)
    row_loss = torch.where(all_absent | (z == -torch.inf).all(-1) | (other == -torch.inf).all(-1), torch.nan, row_loss)
    if t_squared:
        row_loss = row_loss * temperature**2
    return reduce_rows(row_loss, reduction, mask)


def centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """x - max in a fresh tensor, and the row maxima."""
    x_max = x.amax(-1, keepdim=True)
    return x - x_max, x_max.squeeze(-1)


def pair(
    zc: Tensor, oc: Tensor, temperature: float, need_z: bool, need_other: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """From centred logits (M, V): row divergences (M,), (sum_p, sum_q, mean_p_d, mean_q_d), and T times the gradients
    asked for. The factor 1 / T of the gradients is left to the caller, who has another scale to apply anyway."""
    inv_t = 1.0 / temperature
    # d stays undivided: d - mean must vanish exactly where p = 1, and d / T would round apart from mean / T.
    d = zc - oc
    p, q = (zc * inv_t).exp_(), (oc * inv_t).exp_()
    sum_p, sum_q = p.sum(-1), q.sum(-1)
    p.div_(sum_p[:, None])
    q.div_(sum_q[:, None])
    mean_p, mean_q = torch.linalg.vecdot(p, d), torch.linalg.vecdot(q, d)
    row_loss = (mean_p - mean_q).mul_(inv_t)
    # Screening for -inf costs passes over the tensor. On a CPU one look at the row losses says whether a row needs it;
    # elsewhere a look would be a synchronisation, so it always runs.
    if zc.device.type != "cpu" or not bool(row_loss.isfinite().all()):
        z_absent, other_absent = zc == -torch.inf, oc == -torch.inf
        d = d.masked_fill_(z_absent | other_absent, 0.0)
        mean_p, mean_q = torch.linalg.vecdot(p, d), torch.linalg.vecdot(q, d)
        row_loss = (mean_p - mean_q).mul_(inv_t)
        infinite = (z_absent ^ other_absent).any(-1) & ~row_loss.isnan()
        row_loss = row_loss.masked_fill(infinite, torch.inf)
        mean_p = mean_p.masked_fill(infinite, torch.nan)
        mean_q = mean_q.masked_fill(infinite, torch.nan)
    grad_z = grad_other = None
    if need_z:
        grad_z = torch.addcmul(p - q, p, d - mean_p[:, None], value=inv_t)
    if need_other:
        grad_other = torch.addcmul(q - p, q, mean_q[:, None] - d, value=inv_t)
    return row_loss, torch.stack((sum_p, sum_q, mean_p, mean_q)), grad_z, grad_other


def forward(
    logits: Tensor, other_logits: Tensor, mask: Tensor | None, temperature: float, need_z: bool, need_other: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Row losses (M,), stats (6, M), and T times the gradients of the row losses where asked for, from logits (M, V).

    The gradients come with the forward because eager PyTorch has p and q in hand here; to form them again later would
    cost two more exponentials an element. A masked row gets loss 0 and gradient 0, whatever it holds.
    """
    z, other = accumulate(logits), accumulate(other_logits)
    if z.numel() == 0:
        return z.new_zeros(z.shape[0]), z.new_zeros(len(STATS), z.shape[0]), torch.zeros_like(z), torch.zeros_like(z)
    if mask is not None:
        z, other = z.masked_fill(~mask[:, None], 0.0), other.masked_fill(~mask[:, None], 0.0)
    (zc, max_z), (oc, max_other) = centre(z), centre(other)
    row_loss, sums, grad_z, grad_other = pair(zc, oc, temperature, need_z, need_other)
    stats = torch.cat((torch.stack((max_z, max_other)), sums))
    if mask is not None:  # two equal rows of zeros stand in a masked row: its divergence and gradients are 0
        stats = stats * mask
    return row_loss, stats, narrow(grad_z, logits.dtype), narrow(grad_other, logits.dtype)


def narrow(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``grad`` in the dtype of the input it belongs to."""
    return None if grad is None else grad.to(dtype)
