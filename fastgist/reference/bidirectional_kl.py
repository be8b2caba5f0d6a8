r"""Bidirectional Kullback-Leibler divergence with temperature (GIST, arXiv 2312.07255, the BKLD term).

With :math:`u = z / T`, :math:`v = z_g / T`, :math:`p = \mathrm{softmax}(u)`, :math:`q = \mathrm{softmax}(v)` the two
log-sum-exps cancel:

.. math::
    J = KL(p\|q) + KL(q\|p) = \sum_c (p_c - q_c)(u_c - v_c) = E_p[d] - E_q[d], \qquad d = u - v + k

for any constant ``k`` of the row. The kernels take k so that ``d = ((z - max z) - (z_g - max z_g)) / T``, the eager path
so that E_p[d] = 0: an offset between the two heads then costs no accuracy. The gradients follow from four scalars a row:

.. math::
    \partial J / \partial z   &= \tfrac{1}{T} [\; p (d - E_p[d]) + p - q \;] \\
    \partial J / \partial z_g &= \tfrac{1}{T} [  - q (d - E_q[d]) + q - p \;]

Classes at -inf: on both sides they contribute 0 and get gradient 0; on one side only the divergence is +inf, exactly,
and the gradient of that row is NaN. A NaN, a +inf or a row of nothing but -inf gives NaN in its own row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgist.reference._numerics import accumulate, accumulate_dtype, row_blocks

__all__ = ["bidirectional_kl", "finished_dtype", "finished_empty", "forward", "narrow", "pair", "reduce_rows"]


#: Classes above which softmax's own sum, which is no pairwise one, is wrong by so much that its result is divided again.
LONG_ROW = 2**17


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


def centred(z: Tensor, other: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both less the maxima of their rows. What is subtracted first is nearly exact; divided by T and subtracted later, an
    offset of 100 would drown a divergence of 1e-5, and logits about 1e4 would round to 1e-3. (Not a mean over classes:
    one class that a caller masked with -1e9 here and -1e4 there would move it out of float32's resolution.)

    On a CPU one look spares both passes where there is nothing to subtract: neither offset nor size among some 32 classes,
    and nowhere a logit so large that its quotient by T, which is rounded unless T is a power of two, makes p wrong.
    """
    if z.device.type == "cpu":
        some = slice(None, None, max(1, z.shape[1] // 32))
        near, other_near = z[:, some], other[:, some]
        offset = (near.amax(-1) - other_near.amax(-1)).nan_to_num_(0.0, 0.0, 0.0).abs().max()
        size = max(float(x.abs().nan_to_num_(0.0, 0.0, 0.0).max()) for x in (near, other_near))
        if float(offset) <= 4.0 and size <= 64.0:
            if math.frexp(temperature)[0] == 0.5:
                return z, other
            tops = _finite_max(z), _finite_max(other)
            if max(float(top.max()) for top in tops) <= 16.0 * temperature:
                return z, other
            return z - tops[0], other - tops[1]
    return z - _finite_max(z), other - _finite_max(other)


def _finite_max(x: Tensor) -> Tensor:
    """The maximum of each row, (M, 1); 0 where it is not finite."""
    return x.amax(-1, keepdim=True).nan_to_num_(0.0, 0.0, 0.0)


def _mean(p: Tensor, d: Tensor) -> Tensor:
    """E_p[d], (M, 1). Divided by the sum that softmax left (1 to a few ulp): d may be large where p is, and p (d - mean)
    small. Not vecdot: a long float32 dot loses digits that a pairwise sum keeps."""
    return (p * d).sum(-1, keepdim=True).div_(p.sum(-1, keepdim=True))


def pair(
    z: Tensor,
    other: Tensor,
    temperature: float,
    need_z: bool,
    need_other: bool,
    out: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Row divergences (M,), T dJ/dz and -T dJ/dother where asked for, from logits (M, V). Sign and 1 / T are left to the
    caller, who has another scale to apply anyway. ``out``: where to write the gradients."""
    inv_t = 1.0 / temperature
    z, other = centred(z, other, temperature)
    p, q = torch.softmax(z * inv_t, -1), torch.softmax(other * inv_t, -1)
    if z.shape[1] > LONG_ROW:
        for probabilities in (p, q):
            probabilities.div_(probabilities.sum(-1, keepdim=True))
    # d stays undivided by T and is taken about its mean under p: what must vanish where p is 1 or p = q then does.
    d = z - other
    mean_p = _mean(p, d)
    # Screening for -inf costs passes over the tensor. On a CPU one look at the means, which it makes NaN or infinite, says
    # whether it is needed; elsewhere a look would be a synchronisation, so it always runs.
    infinite = None
    if z.device.type != "cpu" or not bool(mean_p.isfinite().all()):
        z_absent, other_absent = z == -torch.inf, other == -torch.inf
        d = d.masked_fill_(z_absent | other_absent, 0.0)
        infinite = (z_absent ^ other_absent).any(-1)
        mean_p = _mean(p, d)
    about_p = d - mean_p
    gap = p - q
    spread = (gap * about_p).sum(-1)  # T J
    if infinite is not None:
        infinite &= ~spread.isnan()
        d.masked_fill_(infinite[:, None], torch.nan)
        about_p.masked_fill_(infinite[:, None], torch.nan)
    grad_z = torch.addcmul(gap, p, about_p, value=inv_t, out=out[0]) if need_z else None
    grad_other = None
    if need_other:
        grad_other = torch.addcmul(gap, q, d.sub_(_mean(q, d)), value=inv_t, out=out[1])
    row_loss = spread * inv_t
    return row_loss if infinite is None else row_loss.masked_fill(infinite, torch.inf), grad_z, grad_other


def forward(
    logits: Tensor,
    other_logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    need_z: bool,
    need_other: bool,
    scale: float | Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Row losses J (M,) and gradients where asked for, from logits (M, V): scale dJ/dz and scale dJ/dother, or, where no
    scale () is known yet, T dJ/dz and -T dJ/dother.

    The gradients come with the forward because eager PyTorch has p and q in hand here; to form them again later would
    cost two more exponentials an element. A masked row gets loss 0 and gradient 0, whatever it holds.
    """
    if logits.numel() == 0:
        wanted = (need_z, need_other)
        grads = [torch.zeros_like(logits, dtype=finished_dtype(logits.dtype)) if need else None for need in wanted]
        return accumulate(logits).new_zeros(logits.shape[0]), grads[0], grads[1]

    width = accumulate_dtype(logits.dtype)
    row_loss = logits.new_empty(logits.shape[0], dtype=width)
    grad_z, grad_other = (
        logits.new_empty(logits.shape, dtype=finished_dtype(logits.dtype)) if need else None
        for need in (need_z, need_other)
    )
    for rows in row_blocks(logits):
        z, other = accumulate(logits[rows]), accumulate(other_logits[rows])
        if mask is not None:  # two equal rows of zeros stand in a masked row: its divergence and gradients are 0
            masked = ~mask[rows, None]
            z, other = z.masked_fill(masked, 0.0), other.masked_fill(masked, 0.0)
        places = tuple(None if g is None else g[rows] for g in (grad_z, grad_other))
        direct = finished_dtype(logits.dtype) == width
        loss, *grads = pair(z, other, temperature, need_z, need_other, places if direct else (None, None))  # type: ignore[arg-type]
        row_loss[rows] = loss
        if scale is not None:
            for grad, sign in zip(grads, (1.0, -1.0), strict=True):
                if grad is not None:
                    grad.mul_(sign * scale / temperature)
        if not direct:
            for place, grad in zip(places, grads, strict=True):
                if place is not None and grad is not None:
                    place.copy_(grad)
    return row_loss, grad_z, grad_other


def finished_empty(logits: Tensor, dtype: torch.dtype, *wanted: bool) -> list[Tensor]:
    """Uninitialised gradients of ``logits``' shape where wanted, else empty."""
    return [logits.new_empty(logits.shape, dtype=dtype) if want else logits.new_empty(0) for want in wanted]


def narrow(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``grad`` in the dtype it waits in for the scale of its row."""
    return None if grad is None else grad.to(finished_dtype(dtype))


def finished_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that finished gradients wait for their scale in: float32 for float16, where 1 / rows times a probability
    would be zero before any loss scale arrives."""
    return torch.float32 if dtype == torch.float16 else dtype
