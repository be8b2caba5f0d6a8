r"""The score-based information bottleneck of PETAL (arXiv 2312.12458).

.. math:: L = \eta\, [\, I(z; x) - b\, I(z; y)\, ]

z the pooled Q-Former output, x the pooled image features, y the answer. The paper names it; how it estimates the two
is our reconstruction, except where ``preset="released"`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn._checks import check_integer, check_number, check_one_of, check_place, check_positive
from fastgist.nn._estimators import Club, Mine, Tokens, as_tokens, orthonormal, project, stein_score

__all__ = ["InformationBottleneckLoss"]

COMPRESSION, RELEVANCE = ("score", "club", None), ("score", "mine", None)
PRESETS = ("released", None)
MAX_DIMS, MIN_BANK = 8, 512
#: The released code's constants; of its widths, x is 1408, z 768 and y 32,100.
RELEASED: dict[str, Any] = {"compression": "club", "relevance": "mine", "b": 0.1, "sigma": 0.0}
RELEASED |= {"club_hidden": 32, "mine_hidden": 64}


class InformationBottleneckLoss(nn.Module):
    r"""eta [I(z; x) - b I(z; y)], to be added to a task's loss, called as ``loss(z, x, y)``.

    z is made stochastic, z = mu + sigma eps with mu the model's output (a deterministic z has infinite I(z; x));
    :meth:`sample` gives such a z to a model that wants to go on with it.

    **"score"** gives the *gradient* of the mutual information (MIGE, Wen et al., ICLR 2020), and no value: the term's
    value is 0, its gradient is not. With W a projection of z to ``dims`` dimensions and u = W^T z,

    .. math:: \nabla I(u; x) = E[(\nabla_u \log p(u|x) - \nabla_u \log p(u))\, du/d\phi].

    log p(u|x) is exact: W is orthonormal, so u is N(W^T mu, sigma^2). Noise comes in pairs +-eps, over which that score,
    -+eps / sigma, sums to exactly zero. The marginal's is estimated from a bank of past u
    (:func:`~fastgist.nn._estimators.stein_score`). For I(z; y) the conditional score is that of the joint distribution of
    ``dims - dims // 2`` coordinates of u and ``dims // 2`` of a fixed random projection of y, estimated alike. Until the
    bank is full, ceil(bank / B) steps, these terms are 0. What is estimated is I(W^T z; .), which is at most I(z; .).

    **"club"** is an upper bound by q(z|x), **"mine"** a lower bound by a critic of (z, y). Both are fitted by one
    Adam step of their own in each training forward, *after* they were used: a batch is never judged by what has just
    learned it. A batch of one row has no pairs and gives 0.

    Measured by scripts/bottleneck_study.py (docs/bottleneck.md) on correlated Gaussians, z 768 wide, B = 16, three seeds, on a
    CPU. Cosine of the gradient with the analytic one of I(W^T z; x), x 1408 wide: 0.966 to 0.984 at bank 512 (degree 2:
    0.93 to 0.94), 0.986 to 0.994 at 1024 (degree 2: 0.968 to 0.981); at B = 2 and bank 512, 0.959 to 0.989. With the gradient
    of the unprojected I(z; x): 0.994 to 0.995 for a learned projection where x moves 8 directions of z and no more; where it
    also moves all others a little, 0.01 to 0.04 for a fixed and 0.03 for a learned one: a gradient about 8 dimensions is no
    estimate of the whole. (Of the published estimator on z itself, from one batch of 16, 0.02 to 0.03.) I(W^T z; y), y 1000
    wide, bank 1024: 0.97 to 0.99 at 1.40 to 1.61 nats, 0.95 to 0.97 at 0.30 to 0.34 nats, 0.90 to 0.94 at 0.10 to 0.11 nats;
    for independent y the norm is 0.7 to 0.8, where the 0.30 to 0.34 nats have 3.2 to 3.6. So **a weak dependence is near
    noise**. **Clusters are not resolved**: of two in one dimension, at +-2 with standard deviation 0.3, the cosine is
    0.03 to 0.12 (degree 2: 0.02 to 0.15): what is estimated is the cloud's spread.

    The bounds of I(z; x) at these sizes are **noise**: MINE read 2.4 to 2.7 nats of 23.8 to 23.9 after 800 steps, cosine of
    its gradient -0.05 to -0.04; CLUB, after 400, 997 to 1103 of the 3103 to 3107 that an exact q has, standard deviation
    238 to 289, cosine 0.55 to 0.56. At widths of 2 and B = 64 they read 0.97 to 0.99 of 1.02 nats, and 0.61 to 0.67 of the
    0.67 of an exact q (a bound of 0.29 nats); at B = 2 they are finite, and read 0.61 to 1.01 and 0.53 to 0.70.

    State: banks, projections, estimators and their Adam moments are buffers. The module has no parameters; a state_dict
    holds all of it and resumes it, given the random state. They stay float32 through ``half()`` and ``bfloat16()``, and
    the loss is computed outside autocast. Banks and estimators change in training mode with gradients enabled only.
    Nothing waits for a GPU. A row or an inner gradient that is not finite is not learned from.

    DDP: nothing is exchanged. Each process has its own bank and estimators, of its own samples, and the gradients that
    DDP averages are those of as many independent estimates. Inside a DDP-wrapped model, ``broadcast_buffers=True`` (DDP's
    default) gives all processes rank 0's before each forward, so only its samples are learned from: keep the loss
    outside, or switch that off. Processes need different seeds for different noise.

    torch.compile takes all of it as one graph, the estimators' Adam steps too; a compiled graph may draw its noise in another
    order than eager code, and makes the row of a token out of range NaN.

    Args:
        z_dim, x_dim, y_dim: widths. x_dim is needed for "club", y_dim for any relevance.
        compression: "score", "club" or None, the estimator of I(z; x).
        relevance: "score", "mine" or None, that of I(z; y).
        eta, b: the weights above, >= 0 (defaults ours).
        sigma: the noise's standard deviation, in z's units; > 0 for "score" (default ours, for the unit spread that a
            LayerNorm leaves).
        dims: to which z is projected for "score", 1 to 8; with relevance="score", 2 to 8 for z and y together.
        bank: past z that are kept for "score", >= 512.
        projection: "fixed" (random orthonormal) or "learned" (the bank's leading principal components, followed by one
            power iteration a step; the bank then holds whole z).
        degree: 1 (1 + dims eigenfunctions: a score as of one cloud) or 2 (1 + dims + dims (dims + 1) / 2: a cloud's skew
            and tails too, at the price of more noise). Neither resolves clusters.
        noise_pairs: pairs +-eps a row.
        club_hidden, mine_hidden: hidden units. estimator_lr, estimator_steps: of the inner Adam.
        ignore_index: padding among answer tokens.
        preset: "released": CLUB(z -> y) - 0.1 MINE(x, z), sigma 0, hidden 32 and 64, as the released code has it. **Its
            signs are the opposite of the bottleneck's**: it compresses what z says of the answer and keeps what it says
            of the image. For comparison only. That code never fits CLUB's likelihood; here it is fitted. Sets
            compression, relevance, b, sigma and both hidden widths.

    Raises:
        ValueError: an option out of range or unknown, a missing width.
    """

    def __init__(
        self,
        z_dim: int,
        x_dim: int | None = None,
        y_dim: int | None = None,
        *,
        compression: str | None = "score",
        relevance: str | None = "score",
        eta: float = 0.01,
        b: float = 1.0,
        sigma: float = 0.5,
        dims: int = 8,
        bank: int = 1024,
        projection: str = "fixed",
        degree: int = 1,
        noise_pairs: int = 4,
        club_hidden: int = 32,
        mine_hidden: int = 64,
        estimator_lr: float = 1e-3,
        estimator_steps: int = 1,
        ignore_index: int = -100,
        preset: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_one_of(owner, "preset", preset, PRESETS)
        if preset:
            compression, relevance, b, sigma, club_hidden, mine_hidden = RELEASED.values()
        check_options(owner, compression, relevance, eta, b, sigma, dims, bank, projection)
        check_one_of(owner, "degree", degree, (1, 2))
        sizes = {"z_dim": z_dim, "noise_pairs": noise_pairs, "club_hidden": club_hidden, "mine_hidden": mine_hidden}
        for name, size in (sizes | {"estimator_steps": estimator_steps}).items():
            check_positive(owner, name, size)
        check_integer(owner, "ignore_index", ignore_index)
        check_place(owner, device, None)
        check_number(owner, "estimator_lr", estimator_lr, above=0.0)
        self.released = preset == "released"
        needs_x = compression == "club" or self.released
        for name, width, why in (("x_dim", x_dim, needs_x), ("y_dim", y_dim, relevance is not None or self.released)):
            if width is not None:
                check_positive(owner, name, width)
            elif why:
                raise ValueError(f"InformationBottleneckLoss: {self._what(compression, relevance)} needs {name}")
        if "score" in (compression, relevance):
            _check_widths(z_dim, y_dim, relevance, dims)
        self.z_dim, self.x_dim, self.y_dim = z_dim, x_dim, y_dim
        self.compression, self.relevance, self.eta, self.b = compression, relevance, float(eta), float(b)
        self.sigma, self.dims, self.bank, self.projection, self.degree = float(sigma), dims, bank, projection, degree
        self.noise_pairs, self.ignore_index = noise_pairs, ignore_index
        #: The last training or evaluation forward's values in nats, where an estimator has one: detached scalars.
        self.values: dict[str, Tensor] = {}

        inner: dict[str, Any] = {"lr": estimator_lr, "steps": estimator_steps, "device": device}
        if compression == "club":
            source, target = (z_dim, y_dim) if self.released else (x_dim, z_dim)
            self.club = Club(source or 0, target or 0, club_hidden, **inner)
        if relevance == "mine":
            self.mine = Mine(z_dim, (x_dim if self.released else y_dim) or 0, mine_hidden, **inner)
        if "score" in (compression, relevance):
            kept = z_dim if projection == "learned" else dims
            self.register_buffer("z_projection", torch.empty(z_dim, dims, device=device, dtype=torch.float32))
            self.register_buffer("z_bank", torch.empty(bank, kept, device=device, dtype=torch.float32))
            self.register_buffer("seen", torch.zeros((), device=device, dtype=torch.int64))
        if relevance == "score":
            shape = (y_dim or 0, dims // 2)
            self.register_buffer("y_projection", torch.empty(shape, device=device, dtype=torch.float32))
            self.register_buffer("y_bank", torch.empty(bank, dims // 2, device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw projections and estimators anew and forget the banks."""
        for name, buffer in self.named_buffers(recurse=False):
            if name.endswith("projection"):
                buffer.copy_(orthonormal(torch.randn(buffer.shape, device=buffer.device, dtype=buffer.dtype)))
            else:
                buffer.zero_()
        for estimator in self.children():
            estimator.reset_parameters()

    def sample(self, z: Tensor) -> Tensor:
        """z + sigma eps in training, z in evaluation; z (..., z_dim)."""
        return z + self.sigma * torch.randn_like(z) if self.training and self.sigma else z

    def forward(self, z: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            z: (B, z_dim), what the noise is added to.
            x: (B, x_dim); not needed for compression="score", whose conditional is known.
            y: (B, y_dim), or int64 token ids (B, L) in [0, y_dim) with ``ignore_index`` as padding, which stand for the
                mean of their one-hot rows without forming it.

        Raises:
            ValueError: a missing input or a shape that does not fit. TypeError: a dtype that does not.
        """
        self._check("z", z, self.z_dim)
        rows = z.shape[0]
        with torch.autocast(z.device.type, enabled=False):
            z = self._wide(z)
            features = self._given("x", x, self.x_dim, rows, self.compression == "club" or self.released)
            answers = self._answers(y, rows)
            self.values = {}
            total = z.sum() * 0.0 if rows else z.new_zeros(()) + z.sum()
            if rows == 0:
                return total
            learning = self.training and torch.is_grad_enabled()
            if rows > 1:
                total = total + self.eta * self._bounds(z, features, answers, learning)
            if "score" in (self.compression, self.relevance) and learning:
                total = total + self.eta * self._scores(z, answers)
            return total

    def _bounds(self, z: Tensor, x: Tensor | None, y: Tensor | Tokens | None, learning: bool) -> Tensor:
        """CLUB - b MINE, those of the two that are on, each judged first and fitted then."""
        total, noisy = z.new_zeros(()), self.sample(z)
        left, right = (y, x) if self.released else (x, y)
        if self.compression == "club":
            source, target = (noisy, left) if self.released else (left, noisy)
            shift = torch.randint(1, z.shape[0], (1,), device=z.device)
            value = self.club(source, target, shift)
            total = total + value
            self.values["compression"] = value.detach()
            if learning:
                self.club.fit(source, target)  # type: ignore[arg-type]
        if self.relevance == "mine":
            value = self.mine(noisy, right)
            total = total - self.b * value
            self.values["relevance"] = value.detach()
            if learning:
                self.mine.fit(noisy, right)  # type: ignore[arg-type]
        return total

    def _scores(self, z: Tensor, y: Tensor | Tokens | None) -> Tensor:
        """A zero whose gradient in z is that of the score terms; then the banks take this batch in."""
        with torch.no_grad():
            answers = (
                project(y, self.get_buffer("y_projection")) if self.relevance == "score" and y is not None else None
            )
            gradient = self._gradient(z.detach(), answers)
            full = self.get_buffer("seen") >= self.bank
            gradient = torch.where(full, gradient, 0.0)
            self._remember(z.detach(), answers)
        zero = (gradient * z).sum() / z.shape[0]
        return zero - zero.detach()

    def _gradient(self, z: Tensor, answers: Tensor | None) -> Tensor:
        """d[I(z; x) - b I(z; y)] / dmu of each row times B, (B, z_dim), of the terms that are estimated so."""
        basis, bank = self.get_buffer("z_projection"), self.get_buffer("z_bank")
        if self.projection == "learned":
            bank = bank @ basis
        noise = self.sigma * torch.randn(self.noise_pairs, *z.shape[:1], self.dims, device=z.device, dtype=z.dtype)
        points = (z @ basis) + torch.cat([noise, -noise])  # (2P, B, dims)
        result = torch.zeros_like(points)
        if self.compression == "score":  # the conditional's score, -noise / sigma^2, sums to zero over a pair
            result -= self._score(bank, points)
        if answers is not None:
            k = self.dims - self.dims // 2
            joint = torch.cat([bank[:, :k], self.get_buffer("y_bank")], 1)
            there = torch.cat([points[..., :k], answers.expand(len(points), -1, -1)], -1)
            conditional = self._score(joint, there)[..., :k]
            result[..., :k] -= self.b * (conditional - self._score(bank[:, :k], points[..., :k]))
        return result.mean(0) @ basis.mT

    def _score(self, samples: Tensor, points: Tensor) -> Tensor:
        return stein_score(samples, points.flatten(0, 1), self.degree).view_as(points)

    def _remember(self, z: Tensor, answers: Tensor | None) -> None:
        """Puts the batch, noise and all, over the oldest of the bank; a row that is not finite is left out."""
        z = z + self.sigma * torch.randn_like(z)
        basis, bank, seen = self.get_buffer("z_projection"), self.get_buffer("z_bank"), self.get_buffer("seen")
        new = z if self.projection == "learned" else z @ basis
        entries = [(bank, new)] if answers is None else [(bank, new), (self.get_buffer("y_bank"), answers)]
        sound = torch.cat([rows for _, rows in entries], 1).isfinite().all(1)[-self.bank :]
        order = (~sound).to(torch.int64).argsort(stable=True)  # the finite ones first
        where = (seen + torch.arange(len(order), device=z.device)) % self.bank
        for stored, rows in entries:
            stored.index_copy_(0, where, torch.where(sound[order, None], rows[-self.bank :][order], stored[where]))
        seen += sound.sum()
        if self.projection == "learned":
            centred = bank - bank.mean(0)
            turned = orthonormal(centred.mT @ (centred @ basis))
            basis.copy_(torch.where(seen >= self.bank, turned, basis))

    def _answers(self, y: Tensor | None, rows: int) -> Tensor | Tokens | None:
        needed = self.relevance is not None or self.released
        if y is None or not needed or y.is_floating_point():
            return self._given("y", y, self.y_dim, rows, needed)
        if y.dtype != torch.int64 or y.dim() != 2 or y.shape[0] != rows:
            raise ValueError(
                f"InformationBottleneckLoss: expected y as floats ({rows}, {self.y_dim}) or int64 ids ({rows}, L), "
                f"got {y.dtype} {tuple(y.shape)}"
            )
        return as_tokens(y, self.y_dim or 0, self.ignore_index, torch.float32)

    def _given(self, name: str, value: Tensor | None, width: int | None, rows: int, needed: bool) -> Tensor | None:
        """An input in the estimators' dtype, None where nothing reads it."""
        if not needed:
            return None
        if value is None:
            raise ValueError(
                f"InformationBottleneckLoss: {self._what(self.compression, self.relevance)} needs {name}, got None"
            )
        self._check(name, value, width)
        if value.shape[0] != rows:
            raise ValueError(
                f"InformationBottleneckLoss: expected {rows} rows of {name}, as of z, got {value.shape[0]}"
            )
        return self._wide(value)

    def _check(self, name: str, value: Tensor, width: int | None) -> None:
        if value.dim() != 2 or value.shape[1] != width:
            raise ValueError(
                f"InformationBottleneckLoss: expected {name} of shape (B, {width}), got {tuple(value.shape)}"
            )
        if not value.is_floating_point():
            raise TypeError(f"InformationBottleneckLoss: expected {name} of a floating dtype, got {value.dtype}")

    def _wide(self, value: Tensor) -> Tensor:
        return value.float()

    def _what(self, compression: str | None, relevance: str | None) -> str:
        if self.released:
            return "preset='released'"
        return f"compression={compression!r}, relevance={relevance!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """``half()`` and its like move the state, but leave it float32."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.values = {}
        return super()._apply(keep, recurse)

    def extra_repr(self) -> str:
        parts = [f"z_dim={self.z_dim}, x_dim={self.x_dim}, y_dim={self.y_dim}"]
        parts += [f"{name}={getattr(self, name)!r}" for name in ("compression", "relevance", "eta", "b", "sigma")]
        if "score" in (self.compression, self.relevance):
            parts += [f"{name}={getattr(self, name)!r}" for name in ("dims", "bank", "projection", "degree")]
        return ", ".join(parts + ["preset='released'"] * self.released)


def check_options(
    owner: str,
    compression: object,
    relevance: object,
    eta: object,
    b: object,
    sigma: object,
    dims: int,
    bank: int,
    projection: object,
    preset: object = None,
) -> None:
    """What can be said of the options without the widths.

    Raises:
        ValueError: one that is out of range or unknown. TypeError: one of another type.
    """
    check_one_of(owner, "preset", preset, PRESETS)
    check_one_of(owner, "compression", compression, COMPRESSION)
    check_one_of(owner, "relevance", relevance, RELEVANCE)
    check_one_of(owner, "projection", projection, ("fixed", "learned"))
    for name, value in (("eta", eta), ("b", b), ("sigma", sigma)):
        check_number(owner, name, value, least=0.0)
    for name, size in (("dims", dims), ("bank", bank)):
        check_positive(owner, name, size)
    if preset is not None or "score" not in (compression, relevance):
        return
    least = 2 if relevance == "score" else 1
    if not least <= dims <= MAX_DIMS:
        raise ValueError(f"{owner}: a score takes dims from {least} to {MAX_DIMS} (more is noise), got {dims}")
    if bank < MIN_BANK:
        raise ValueError(f"{owner}: a score needs a bank of at least {MIN_BANK} past z, got {bank}")
    if sigma == 0:
        raise ValueError(f"{owner}: a score needs sigma > 0: without noise I(z; x) is infinite")


def _check_widths(z_dim: int, y_dim: int | None, relevance: str | None, dims: int) -> None:
    if dims > z_dim or (relevance == "score" and dims // 2 > (y_dim or 0)):
        raise ValueError(
            f"InformationBottleneckLoss: dims={dims} is more than the widths allow: z_dim={z_dim}, y_dim={y_dim}"
        )
