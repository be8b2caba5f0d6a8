"""What is done to logits of a part of the classes, in plain PyTorch: parts of the vocabulary on several ranks, and blocks of
classes of one head.

Of a part's logits come twelve numbers a row about its own maxima. Merged in one order they are the same bits of the whole
head's statistics for everyone, and from there on each part's gradients are finished alone. The numbers of a row, with z and g
the two logits, zc = z - max z, gc = g - max g, d = zc - gc, p^ = exp(zc / T), q^ = exp(gc / T) and class weights w:

    max z, max g, sum p^, sum q^, sum p^ d, sum q^ d, sum exp zc, sum exp gc, sum w zc, sum w gc, sum w, and whether a class
    is -inf on one side only

They add up across parts once they are about the same maxima: where those rise by (a, b), p^ shrinks by exp(-a / T) and d
falls by a - b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgist.reference._numerics import accumulate, row_blocks

__all__ = ["PartWork", "Rows", "State", "gradients", "means", "merge", "row_loss", "state"]

_INF, _NAN = torch.inf, torch.nan


class State(NamedTuple):
    """Twelve numbers a row, each (m,): see above. ``lone`` is 0 or 1."""

    m_z: Tensor
    m_g: Tensor
    s_p: Tensor
    s_q: Tensor
    w_p: Tensor
    w_q: Tensor
    sum_z: Tensor
    sum_g: Tensor
    dot_z: Tensor
    dot_g: Tensor
    weight: Tensor
    lone: Tensor


class PartWork:
    """The :class:`fastgist.ops._linear_chunks.RowWork` of a head's classes from ``first`` on, of ``classes`` in all.

    ``gather``: every part's numbers (parts, 12, m) from this one's (12, m) and the targets that they are of. Without it this
    part is the whole head.
    """

    statistics = len(State._fields)

    def __init__(
        self,
        options: tuple,
        first: int,
        classes: int,
        gather: Callable[[Tensor, Tensor], Tensor] = lambda own, target: own[None],
    ) -> None:
        self.options, self.first, self.classes_in_all, self.gather = options, first, classes, gather

    def rows(
        self,
        logits: Tensor,
        target: Tensor,
        scale: Tensor,
        row_losses: Tensor,
        need_z: bool,
        need_gist: bool,
        stats: Tensor | None = None,
    ) -> None:
        alpha, beta, _, _, temperature, *_ = self.options
        z, gist = logits[: len(row_losses)], logits[len(row_losses) :]
        blocks = row_blocks(z)
        about = [self._about(target[rows], self.first, z.shape[1]) for rows in blocks]
        own = torch.cat([state(z[r], gist[r], a, temperature) for r, a in zip(blocks, about, strict=True)], dim=1)
        whole = merge(self.gather(own, target), temperature)
        if stats is not None:
            torch.stack(whole, out=stats)
        for rows, rest in zip(blocks, about, strict=True):
            here = State(*(x[rows] for x in whole))
            row_losses[rows], e_p, e_q = row_loss(here, rest, alpha, beta, temperature)
            if need_z or need_gist:
                self._finish(z[rows], gist[rows], here, e_p, e_q, rest, scale[rows], need_z, need_gist)

    def classes(
        self, logits: Tensor, target: Tensor, scale: Tensor, stats: Tensor, start: int, need_gist: bool
    ) -> None:
        z, gist = logits[: len(scale)], logits[len(scale) :]
        width = z.shape[1]
        for rows in row_blocks(z):
            here = State(*stats[:, rows])
            aim = target[rows, start : start + width] if target.is_floating_point() else target[rows]
            rest = self._about(aim, self.first + start, width)
            _, e_p, e_q = means(here)
            self._finish(z[rows], gist[rows], here, e_p, e_q, rest, scale[rows], True, need_gist)

    def _about(self, target: Tensor, first: int, width: int) -> Rows:
        *_, label_smoothing, ignore_index = self.options
        return Rows(target, first, self.classes_in_all, width, label_smoothing, ignore_index)

    def _finish(
        self,
        z: Tensor,
        gist: Tensor,
        whole: State,
        e_p: Tensor,
        e_q: Tensor,
        rows: Rows,
        scale: Tensor,
        need_z: bool,
        need_gist: bool,
    ) -> None:
        alpha, _, beta_z, beta_g, temperature, *_ = self.options
        grads = gradients(z, gist, whole, e_p, e_q, rows, alpha, beta_z, beta_g, temperature)
        for half, grad, need in zip((z, gist), grads, (need_z, need_gist), strict=True):
            if need:
                half.copy_(rows.cleared(grad.mul_(scale[:, None])))


class Rows:
    """The targets of some rows, seen from the part that has ``mine`` classes from ``first`` on."""

    def __init__(
        self, target: Tensor, first: int, classes: int, mine: int, label_smoothing: float, ignore_index: int
    ) -> None:
        self.keep, self.smooth = 1.0 - label_smoothing, label_smoothing / max(classes, 1)
        self.soft = target if target.is_floating_point() else None
        self.ignored = self.invalid = self.label = self.has_label = None
        if self.soft is None:
            self.ignored = target == ignore_index
            self.invalid = ~self.ignored & ((target < 0) | (target >= classes))
            here = target - first
            self.has_label = ~self.ignored & (here >= 0) & (here < mine) & ~self.invalid
            self.label = here.clamp(0, max(mine - 1, 0))[:, None]

    def weights(self, like: Tensor) -> Tensor:
        """Class weights (m, V_local) of ``like``'s dtype."""
        if self.soft is not None:
            weights = self.soft.to(like.dtype)
            return weights * self.keep + self.smooth if self.smooth else weights
        weights = torch.full_like(like, self.smooth)
        if weights.shape[1]:
            weights.scatter_add_(-1, self.label, self.has_label.to(like.dtype).mul_(self.keep)[:, None])
        return weights

    def centred(self, x: Tensor, centre: Tensor) -> Tensor:
        """``x`` in its accumulation dtype less ``centre`` (m,); an ignored row, which may hold anything, as zeros."""
        x = accumulate(x) - centre[:, None]
        return x if self.ignored is None else x.masked_fill(self.ignored[:, None], 0.0)

    def cleared(self, grad: Tensor) -> Tensor:
        """Gradients (m, V_local), or row losses (m,), of ignored rows 0 and of impossible targets NaN."""
        for rows, value in ((self.invalid, _NAN), (self.ignored, 0.0)):
            if rows is not None:
                grad = grad.masked_fill_(rows if grad.dim() == 1 else rows[:, None], value)
        return grad


def _centre(maximum: Tensor) -> Tensor:
    """The point to centre on: 0 where a side has shown nothing but -inf."""
    return maximum.masked_fill(maximum == -_INF, 0.0)


def state(z: Tensor, gist: Tensor, rows: Rows, temperature: float) -> Tensor:
    """The :class:`State` of this rank's logits (m, V_local), stacked: (12, m)."""
    zero = accumulate(z).new_zeros(len(z))
    zs, gs = rows.centred(z, zero), rows.centred(gist, zero)
    if z.shape[1] == 0:
        absent = torch.full_like(zero, -_INF)
        return torch.stack((absent, absent, *[zero] * 10))
    m_z, m_g = zs.amax(-1), gs.amax(-1)
    no_z, no_g = zs == -_INF, gs == -_INF
    zc, gc = zs - _centre(m_z)[:, None], gs - _centre(m_g)[:, None]
    d = (zc - gc).masked_fill_(no_z | no_g, 0.0)
    lone = (no_z ^ no_g).any(-1).to(zc.dtype)
    p, q = torch.exp(zc / temperature), torch.exp(gc / temperature)
    weights = rows.weights(zc)
    dots = (torch.where(weights == 0, 0.0, weights * x).sum(-1) for x in (zc, gc))
    sums = p.sum(-1), q.sum(-1), (p * d).sum(-1), (q * d).sum(-1), zc.exp().sum(-1), gc.exp().sum(-1)
    return torch.stack((m_z, m_g, *sums, *dots, weights.sum(-1), lone))


def merge(every: Tensor, temperature: float) -> State:
    """Every rank's state, (ranks, 12, m), as that of the whole head: the same bits wherever it is computed."""
    s = State(*every.unbind(1))
    m_z, m_g = s.m_z.amax(0), s.m_g.amax(0)
    rise_z, rise_g = _centre(s.m_z) - _centre(m_z), _centre(s.m_g) - _centre(m_g)
    # Where 0 stood for a rank's maximum of -inf the rise may be positive; its sums are 0 and stay 0.
    down_z, down_g = rise_z.clamp(max=0.0), rise_g.clamp(max=0.0)
    over_p, over_q = torch.exp(down_z / temperature), torch.exp(down_g / temperature)
    shift = rise_z - rise_g
    parts = (
        over_p * s.s_p,
        over_q * s.s_q,
        over_p * (s.w_p + shift * s.s_p),
        over_q * (s.w_q + shift * s.s_q),
        down_z.exp() * s.sum_z,
        down_g.exp() * s.sum_g,
        torch.where(s.weight == 0, s.dot_z, s.dot_z + s.weight * rise_z),
        torch.where(s.weight == 0, s.dot_g, s.dot_g + s.weight * rise_g),
        s.weight,
    )
    return State._make((m_z, m_g, *(_in_order(x) for x in parts), s.lone.amax(0)))


def _in_order(parts: Tensor) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def means(s: State) -> tuple[Tensor, Tensor, Tensor]:
    """T times the divergence (m,), and the means of d under p and q; these are NaN where the divergence is infinite."""
    e_p, e_q = s.w_p / s.s_p, s.w_q / s.s_q
    divergence = e_p - e_q
    infinite = (s.lone > 0) & ~divergence.isnan()
    return divergence.masked_fill(infinite, _INF), e_p.masked_fill(infinite, _NAN), e_q.masked_fill(infinite, _NAN)


def row_loss(s: State, rows: Rows, alpha: float, beta: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (m,), and the means of d under p and q. A term whose factor is 0 is absent, even if not finite."""
    divergence, e_p, e_q = means(s)
    loss = torch.where(s.weight == 0, 0.0, s.weight * s.sum_z.log()) - s.dot_z
    if alpha:
        loss = loss + alpha * (torch.where(s.weight == 0, 0.0, s.weight * s.sum_g.log()) - s.dot_g)
    if beta:
        loss = loss + beta * (divergence / temperature)
    return rows.cleared(loss), e_p, e_q


def _about_mean(d: Tensor, mean: Tensor, mass: Tensor) -> Tensor:
    """d (m, V_local) less its mean (m,): 0 where one class has all of the row's mass (m,) and d is that class's. A mean that
    was merged is rounded otherwise than d about the whole head's maxima, by as much as d is large; so there, what differs
    by rounding alone is no difference."""
    x = d - mean[:, None]
    near = torch.where(mass == 1, mean.abs() * (4 * torch.finfo(d.dtype).eps), 0.0)
    if x.device.type == "cpu" and not bool(near.any()):
        return x
    return x.masked_fill_(x.abs() <= near[:, None], 0.0)


def gradients(
    z: Tensor,
    gist: Tensor,
    s: State,
    e_p: Tensor,
    e_q: Tensor,
    rows: Rows,
    alpha: float,
    beta_z: float,
    beta_g: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients (m, V_local) of the row losses at this rank's logits, from the whole head's state."""
    zc, gc = rows.centred(z, _centre(s.m_z)), rows.centred(gist, _centre(s.m_g))
    weights = rows.weights(zc)
    grad_z = zc.exp().mul_((s.weight / s.sum_z)[:, None]).sub_(weights)
    grad_g = torch.zeros_like(gc)
    if alpha:
        grad_g = gc.exp().mul_((s.weight / s.sum_g)[:, None]).sub_(weights).mul_(alpha)
    if beta_z or beta_g:
        d = (zc - gc).masked_fill_((zc == -_INF) & (gc == -_INF), 0.0)
        p = torch.exp(zc / temperature).div_(s.s_p[:, None])
        q = torch.exp(gc / temperature).div_(s.s_q[:, None])
        gap = p - q
        if beta_z:
            kl = torch.addcmul(gap, p, _about_mean(d, e_p, s.s_p), value=1.0 / temperature)
            grad_z.add_(kl, alpha=beta_z / temperature)
        if beta_g:
            kl = torch.addcmul(gap, q, _about_mean(d, e_q, s.s_q), value=1.0 / temperature)
            grad_g.sub_(kl, alpha=beta_g / temperature)
    return grad_z, grad_g
