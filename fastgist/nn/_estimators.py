r"""Estimators of mutual information and its gradient, which keep and fit themselves: see :mod:`fastgist.nn.bottleneck`.

CLUB (Cheng et al., ICML 2020, arXiv 2006.12013) bounds I from above, MINE (Belghazi et al., ICML 2018, arXiv 1801.04062)
from below; the spectral Stein gradient estimator (Shi, Sun, Zhu, ICML 2018, arXiv 1806.02925) gives a score, no value.
What an estimator learns are buffers, not parameters: a user's optimiser does not see it, a state_dict holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Club", "Mine", "Tokens", "as_tokens", "dense", "orthonormal", "stein_score"]

Weights = dict[str, Tensor]

BETAS, EPS = (0.9, 0.999), 1e-8  # Adam's
LOG_VARIANCE = 4.0  # CLUB's variances stay within e^-4 and e^4
RATE = 0.05  # of MINE's moving average of its normaliser


class Tokens(NamedTuple):
    """Answers as token ids: the mean of their one-hot rows, never formed.

    ``ids`` (B, L) int64 in [0, V); ``weights`` (B, L), 1 / (number of tokens) each, 0 at padding.
    """

    ids: Tensor
    weights: Tensor


def as_tokens(ids: Tensor, width: int, ignore_index: int, dtype: torch.dtype) -> Tokens:
    """:class:`Tokens` of ids (B, L), those equal to ignore_index being padding.

    Raises:
        ValueError: on a CPU, an id outside [0, width). On a GPU, where that would need a host sync, and in a compiled
            graph the row is NaN.
    """
    kept = ids != ignore_index
    stray = kept & ((ids < 0) | (ids >= width))
    checked = ids.device.type == "cpu" and type(ids) is Tensor and not torch.compiler.is_compiling()
    if checked and bool(stray.any()):
        raise ValueError(
            f"InformationBottleneckLoss: y holds token {int(ids[stray][0])}, expected [0, {width}) or {ignore_index}"
        )
    weights = kept.to(dtype) / kept.sum(-1, keepdim=True).clamp(min=1)
    weights = torch.where(stray, torch.full_like(weights, math.nan), weights)
    return Tokens(torch.where(kept & ~stray, ids, 0), weights)


def dense(target: Tensor | Tokens, width: int) -> Tensor:
    """(B, V) of either form."""
    if isinstance(target, Tensor):
        return target
    rows = target.weights.new_zeros(target.ids.shape[0], width)
    return rows.scatter_add(1, target.ids, target.weights)


def project(target: Tensor | Tokens, table: Tensor) -> Tensor:
    """(B, V) times a table (V, n): (B, n); of tokens, the weighted mean of their rows."""
    if isinstance(target, Tensor):
        return target @ table
    return (target.weights[..., None] * table[target.ids]).sum(-2)


class _Fitted(nn.Module):
    """Weights in buffers, with an Adam step of their own whose moments are buffers too. No host sync."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], lr: float, steps: int, device: Any) -> None:
        super().__init__()
        self.names, self.lr, self.steps = tuple(shapes), lr, steps
        for name, shape in shapes.items():
            for suffix in ("", "_mean", "_square"):
                buffer = torch.zeros(shape, device=device, dtype=torch.float32)
                self.register_buffer(name + suffix, buffer)
        self.register_buffer("step", torch.zeros((), device=device, dtype=torch.float32))

    def _uniform(self, name: str, fan_in: int) -> None:
        nn.init.uniform_(self.get_buffer(name), -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def _forget(self) -> None:
        for name, buffer in self.named_buffers():
            if name == "step" or name.endswith(("_mean", "_square")):
                buffer.zero_()

    def weights(self, *names: str) -> Weights:
        """Copies, because a step in place may come before the backward that needs them."""
        return {name: self.get_buffer(name).clone() for name in names or self.names}

    def minimise(self, objective: Callable[[Weights], Tensor]) -> None:
        """``steps`` Adam steps on a function of the weights. A step whose gradient is not finite is not taken."""
        for _ in range(self.steps):
            held = {name: self.get_buffer(name) for name in self.names}
            grads = torch.func.grad(objective)(held)  # autograd.grad would break a compiled graph
            with torch.no_grad():
                self._adam(grads)

    def _adam(self, grads: Weights) -> None:
        sound = torch.stack([grad.isfinite().all() for grad in grads.values()]).all()
        step = self.get_buffer("step")
        step.add_(sound)
        for name, grad in grads.items():
            weight, mean, square = (self.get_buffer(name + suffix) for suffix in ("", "_mean", "_square"))
            new_mean = torch.lerp(mean, grad, 1 - BETAS[0])
            new_square = torch.lerp(square, grad * grad, 1 - BETAS[1])
            size = (new_square / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
            new_weight = weight - self.lr * (new_mean / (1 - BETAS[0] ** step)) / size
            for old, new in ((weight, new_weight), (mean, new_mean), (square, new_square)):
                old.copy_(torch.where(sound, new, old))


class Club(_Fitted):
    r"""CLUB's upper bound, :math:`E_{p(s,t)} \log q(t|s) - E_{p(s)p(t)} \log q(t|s)`, with q a Gaussian of diagonal
    covariance whose mean and log variance are two networks of one hidden layer (ReLU), fitted by likelihood.

    The second expectation is over targets of other rows, a cyclic shift of the batch (by chance, 1 to B - 1).
    The log variance is limited to +-4 by a tanh; both heads start at zero: q is a standard normal and the bound's
    gradient zero.

    Args:
        source, target: widths S and T. hidden: of each network. lr, steps: of its own Adam.
    """

    def __init__(self, source: int, target: int, hidden: int, lr: float, steps: int, device: Any = None) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for part in ("mu", "var"):
            shapes |= {f"{part}_in": (hidden, source), f"{part}_in_bias": (hidden,)}
            shapes |= {f"{part}_out": (target, hidden), f"{part}_out_bias": (target,)}
        super().__init__(shapes, lr, steps, device)
        self.source, self.width = source, target
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._forget()
        for part in ("mu", "var"):
            self._uniform(f"{part}_in", self.source)
            self._uniform(f"{part}_in_bias", self.source)
            for name in ("out", "out_bias"):
                nn.init.zeros_(self.get_buffer(f"{part}_{name}"))

    def fit(self, source: Tensor, target: Tensor | Tokens) -> None:
        """One inner step; the likelihood is of every column, since q must learn that most are zero."""
        source, rows = source.detach(), dense(target, self.width).detach()

        def unlikelihood(weights: Weights) -> Tensor:
            mean, log_variance = _gaussian(weights, source)
            return ((rows - mean) ** 2 * (-log_variance).exp() + log_variance).sum(-1).mean() / 2

        self.minimise(unlikelihood)

    def forward(self, source: Tensor, target: Tensor | Tokens, shift: Tensor) -> Tensor:
        """The bound, in nats. source (B, S); target (B, T) or tokens; shift (1,) int64: row i's other target is i + shift."""
        count = source.shape[0]
        others = (torch.arange(count, device=source.device) + shift) % count
        if isinstance(target, Tokens):
            return self._gathered(source, target, others)
        mean, log_variance = _gaussian(self.weights(), source)
        return _difference(target, target[others], mean, log_variance).sum(-1).mean()

    def _gathered(self, source: Tensor, target: Tokens, others: Tensor) -> Tensor:
        """The same of tokens: only columns where a row's answer or its other's is not zero differ, at most 2 L."""
        ids, weights = target
        columns = torch.cat([ids, ids[others]], -1)  # (B, 2L)
        first = torch.ones_like(columns, dtype=torch.bool)  # of each column's places in the row
        same = columns[:, :, None] == columns[:, None, :]
        first &= ~same.tril(-1).any(-1)
        own, other = (
            ((columns[:, :, None] == i[:, None, :]) * w[:, None, :]).sum(-1)
            for i, w in ((ids, weights), (ids[others], weights[others]))
        )
        parts = []
        for part in ("mu", "var"):
            inner = self.weights(f"{part}_in", f"{part}_in_bias")
            hidden = torch.relu(nn.functional.linear(source, *inner.values()))
            rows = self.get_buffer(f"{part}_out")[columns]  # (B, 2L, H)
            parts.append((rows @ hidden[..., None]).squeeze(-1) + self.get_buffer(f"{part}_out_bias")[columns])
        terms = _difference(own, other, parts[0], _limit(parts[1]))
        return torch.where(first, terms, 0.0).sum(-1).mean()


def _limit(raw: Tensor) -> Tensor:
    return LOG_VARIANCE * torch.tanh(raw / LOG_VARIANCE)


def _gaussian(weights: Weights, source: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of q(. | source), (B, T) each."""
    parts = []
    for part in ("mu", "var"):
        hidden = torch.relu(nn.functional.linear(source, weights[f"{part}_in"], weights[f"{part}_in_bias"]))
        parts.append(nn.functional.linear(hidden, weights[f"{part}_out"], weights[f"{part}_out_bias"]))
    return parts[0], _limit(parts[1])


def _difference(own: Tensor, other: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log q(own) - log q(other), by column: 0 where the two agree."""
    return (other - own) * (other + own - 2 * mean) * (-log_variance).exp() / 2


class Mine(_Fitted):
    r"""MINE's lower bound, :math:`E_{p(l,r)} T - \log E_{p(l)p(r)} e^T`, T a network of one hidden layer (ReLU) on both.

    The layer is linear in each side, so all B (B - 1) pairs of different rows cost one sum. The normaliser is a moving
    average over steps, in the value and, as the paper corrects its gradient's bias, under the gradient too: two pairs
    (B = 2) would be no estimate of it. T starts at 0, and so does the gradient.

    Args:
        left, right: widths. hidden: of the network. lr, steps: of its own Adam.
    """

    def __init__(self, left: int, right: int, hidden: int, lr: float, steps: int, device: Any = None) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            "left": (left, hidden),
            "right": (right, hidden),
            "bias": (hidden,),
            "out": (hidden,),
        }
        super().__init__(shapes, lr, steps, device)
        self.fan_in = left + right
        self.register_buffer("log_normaliser", torch.zeros((), device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._forget()
        for name in ("left", "right", "bias"):
            self._uniform(name, self.fan_in)
        nn.init.zeros_(self.get_buffer("out"))
        self.get_buffer("log_normaliser").zero_()

    def fit(self, left: Tensor, right: Tensor | Tokens) -> None:
        """One inner step, after the moving average has taken in this batch."""
        left = left.detach()
        right = right.detach() if isinstance(right, Tensor) else right
        with torch.no_grad():
            _, batch = _critic(self.weights(), left, right)
            average = self.get_buffer("log_normaliser")
            new = torch.logaddexp(average + math.log(1 - RATE), batch + math.log(RATE))
            average.copy_(torch.where(new.isfinite(), new, average))
        self.minimise(lambda weights: -self._bound(weights, left, right))

    def forward(self, left: Tensor, right: Tensor | Tokens) -> Tensor:
        """The bound, in nats; left (B, l), right (B, r) or tokens, B >= 2."""
        return self._bound(self.weights(), left, right)

    def _bound(self, weights: Weights, left: Tensor, right: Tensor | Tokens) -> Tensor:
        joint, batch = _critic(weights, left, right)
        average = self.get_buffer("log_normaliser").clone()
        ratio = (batch - average).clamp(max=10.0).exp()  # its gradient is E[e^T grad T] / average
        return joint - average - (ratio - ratio.detach())


def _critic(weights: Weights, left: Tensor, right: Tensor | Tokens) -> tuple[Tensor, Tensor]:
    """mean of T over rows, log of the mean of e^T over pairs of different rows."""
    a = left @ weights["left"] + weights["bias"]
    hidden = torch.relu(a[:, None] + project(right, weights["right"])[None])  # (B, B, H)
    scores = hidden @ weights["out"]
    count = scores.shape[0]
    same = torch.eye(count, dtype=torch.bool, device=scores.device)
    pairs = torch.where(same, -math.inf, scores)
    return scores.diagonal().mean(), pairs.flatten().logsumexp(0) - math.log(count * (count - 1))


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns of (n, k), by Cholesky twice: torch's QR and eigh may wait for a GPU."""
    for _ in range(2):
        columns = columns / columns.norm(dim=0).clamp(min=1e-30)
        columns = torch.linalg.solve_triangular(_cholesky(columns.mT @ columns).mT, columns, upper=True, left=False)
    return columns


def _cholesky(square: Tensor) -> Tensor:
    """Of a positive semi-definite matrix, with a millionth of a millionth (float32: millionth) of its trace added."""
    size = square.shape[-1]
    small = 1e-12 if square.dtype == torch.float64 else 1e-6
    ridge = (small * square.trace() / size).clamp(min=1e-30)
    return torch.linalg.cholesky_ex(square + ridge * torch.eye(size, dtype=square.dtype, device=square.device))[0]


@torch.no_grad()
def stein_score(samples: Tensor, at: Tensor, degree: int = 1, iterations: int = 3) -> Tensor:
    r"""The score, grad log p, of the distribution that ``samples`` (M, d) came from, at points ``at`` (N, d): (N, d).

    The spectral Stein gradient estimator with an RBF kernel K over the samples,
    :math:`\hat g(x) = -k(x)^T U \Lambda^{-2} U^T G,\; G = \sum_m \nabla_{x_m} k(x_m, \cdot)`, U and Lambda the leading
    eigenpairs of K. Samples are whitened first (which makes the estimate equivariant under affine maps). The squared
    bandwidth is 4 d, twice their mean squared distance: ours, where the paper has the median, which would need a sort.

    Only the span of U matters: with any basis Q of it, U Lambda^-2 U^T is Q (Q^T K Q)^-2 Q^T. Orthogonal iteration finds
    it from the polynomials of ``degree`` 1 (1 + d functions) or 2 (1 + d + d (d + 1) / 2), which are nearly the leading
    eigenfunctions of such a kernel. That needs matrix products and a Cholesky factor, where ``eigh`` would make the
    host wait. In float64, except on devices without it.
    """
    work = torch.float32 if samples.device.type == "mps" else torch.float64
    result, samples, at = at.dtype, samples.to(work), at.to(work)
    count, d = samples.shape
    mean = samples.mean(0)
    centred = samples - mean
    covariance = centred.mT @ centred / (count - 1)
    spread = (1e-8 * covariance.trace() / d).clamp(min=1e-20)  # a direction without spread has no score
    factor = _cholesky(covariance + spread * torch.eye(d, dtype=work, device=samples.device))
    white = torch.linalg.solve_triangular(factor.mT, centred, upper=True, left=False)
    points = torch.linalg.solve_triangular(factor.mT, at - mean, upper=True, left=False)

    width = 4.0 * d  # the squared bandwidth
    gram, cross = _rbf(white, white, width), _rbf(points, white, width)
    gradients = (white * gram.sum(1, keepdim=True) - gram @ white) / width
    functions = [torch.ones_like(white[:, :1]), white]
    if degree == 2:
        i, j = torch.triu_indices(d, d, device=samples.device)
        functions.append(white[:, i] * white[:, j])
    basis = orthonormal(torch.cat(functions, 1))
    for _ in range(iterations):
        basis = orthonormal(gram @ basis)
    inner = _cholesky(basis.mT @ gram @ basis)
    twice = torch.cholesky_solve(torch.cholesky_solve(basis.mT @ gradients, inner), inner)
    score = -(cross @ (basis @ twice))
    return torch.linalg.solve_triangular(factor, score, upper=False, left=False).to(result)


def _rbf(a: Tensor, b: Tensor, width: float) -> Tensor:
    squares = (a * a).sum(-1)[:, None] + (b * b).sum(-1) - 2 * a @ b.mT
    return torch.exp(squares.clamp_(min=0) / (-2 * width))
