r"""A threshold on mode approximation's updates: how far trained factors may take the pre-trained weights along.

A reconstruction. PETAL (arXiv 2312.12458) names a dynamic threshold :math:`\Gamma` that regulates what passes from
pre-trained weights to efficient parameters; neither its code nor the text that we could read defines it. These are our two
readings, each with a fixed and a moving :math:`\Gamma`, and off unless asked for:

.. math::
    \text{modes:}\; g_{mr} \to g_{mr}\, \sigma\!\Big(\frac{e_{mr} - \Gamma}{s\, \Gamma}\Big),\;
    e_{mr} = |g_{mr}|\, |u_r|\, |v_r| \qquad
    \text{trust:}\; \Delta W_m \to \min\!\Big(1, \frac{\Gamma |W_m|}{|\Delta W_m|}\Big)\, \Delta W_m
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn._checks import check_bool, check_number, check_one_of
from fastgist.nn._quantised import can_train
from fastgist.nn._tuner import autocast_enabled
from fastgist.nn.schedule import Schedule, value_at

__all__ = ["CPThreshold", "delta_norms", "full_precision", "mode_energies"]

POLICIES = ("modes", "trust")
#: Beside a norm in a denominator.
EPS = 1e-12


def mode_energies(u: Tensor, v: Tensor, core: Tensor) -> Tensor:
    """(G, R), the Frobenius norm of what each mode r adds: ``|u_r| |v_r| |gain_r|``, or ``|u_r| |V S_r|`` for a matrix core.

    Args:
        u: (K, R). v: (n, R').
        core: gains (G, R), or S (G, R, R').
    """
    inner = torch.linalg.vector_norm(u, dim=0)
    if core.dim() == 2:
        return core.abs() * (inner * torch.linalg.vector_norm(v, dim=0))
    with full_precision(u):
        return inner * torch.linalg.vector_norm(torch.matmul(v, core.transpose(1, 2)), dim=1)


def delta_norms(u: Tensor, v: Tensor, core: Tensor) -> Tensor:
    """(G,), ``|dW|`` of each fold in float32 (float64), from Gram matrices: ``g^T (U^T U * V^T V) g``, or
    ``tr(S^T U^T U S V^T V)`` for a matrix core. No dense update is formed. Arguments as :func:`mode_energies`'s."""
    wide = torch.promote_types(u.dtype, torch.float32)
    u, v, core = u.to(wide), v.to(wide), core.to(wide)
    with full_precision(u):
        inner, outer = u.transpose(0, 1) @ u, v.transpose(0, 1) @ v
        if core.dim() == 2:
            squares = ((core @ (inner * outer)) * core).sum(-1)
        else:
            squares = (torch.matmul(torch.matmul(inner, core), outer) * core).sum((-2, -1))
    return squares.clamp(min=0.0).sqrt()  # rounding can take a sum that cancels below zero


def full_precision(like: Tensor) -> contextlib.AbstractContextManager:
    """Products outside autocast."""
    if autocast_enabled(like.device):
        return torch.autocast(like.device.type, enabled=False)
    return contextlib.nullcontext()


class CPThreshold(nn.Module):
    """A threshold for one :class:`fastgist.nn.CPFactors`, given to it as ``threshold=``. Our reconstruction of PETAL's.

    Args:
        policy: "modes": mode r of matrix m counts while its energy is at least Gamma; below, a soft gate damps it, to no
            less than sigmoid(-1 / softness), so that a mode at zero still gets a gradient. "trust": an update's norm is
            held to Gamma times its weight's; the factor is a constant to the backward.
        gamma: static: Gamma itself. dynamic: its factor on the running mean of the energies ("modes") or of
            ``|dW_m| / |W_m|`` ("trust"). A number > 0, or a schedule over the training progress.
        dynamic: let Gamma follow the factors, by :meth:`fastgist.nn.CPFactors.update_threshold` once an optimiser step.
        decay: of the running mean.
        softness: s, the gate's width as a share of Gamma ("modes").
        floor: the least that a dynamic "trust" makes of Gamma. Without one no update could ever leave zero.

    State, in buffers: ``gamma_now``, ``average`` (the running mean), ``updates`` (how many) and ``weight_norms`` (M,), which
    :class:`fastgist.nn.CPLinear` writes for "trust" (inf, no limit, for modes of which no weight is known). Gamma moves
    in the update alone, so training, evaluation, a recomputed forward and merging see the same. A dynamic "modes" threshold
    passes everything before its first update.

    Raises:
        ValueError: an unknown policy, numbers out of range.
    """

    gamma_now: Tensor
    average: Tensor
    updates: Tensor
    weight_norms: Tensor

    def __init__(
        self,
        policy: str = "modes",
        gamma: float | Schedule = 0.5,
        dynamic: bool = False,
        *,
        decay: float = 0.9,
        softness: float = 0.25,
        floor: float = 0.05,
    ) -> None:
        super().__init__()
        check_one_of("CPThreshold", "policy", policy, POLICIES)
        if not callable(gamma):
            _positive("gamma", gamma)
        self.policy, self.gamma, self.dynamic = policy, gamma, check_bool("CPThreshold", "dynamic", dynamic)
        self.decay = check_number("CPThreshold", "decay", decay, least=0.0, below=1.0)
        self.softness = _positive("softness", softness)
        self.floor = _positive("floor", floor)
        self._gamma_at(0.0)
        self.modes: int | None = None

    def bind(self, modes: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make the state for factors of ``modes`` modes.

        Raises:
            ValueError: it belongs to factors already (their energies and weights are others).
        """
        if self.modes is not None:
            raise ValueError("CPThreshold: belongs to a CPFactors already; give each one its own")
        self.modes = modes
        kwargs: dict[str, Any] = {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}
        self.register_buffer("gamma_now", torch.empty((), **kwargs))
        self.register_buffer("average", torch.empty((), **kwargs))
        self.register_buffer("updates", torch.empty((), dtype=torch.int64, device=device))
        self.register_buffer("weight_norms", torch.full((modes,), math.inf, **kwargs))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the running mean; the weights' norms stay."""
        self.average.zero_()
        self.updates.zero_()
        if not self.dynamic:
            self.gamma_now.fill_(self._gamma_at(0.0))
        else:
            self.gamma_now.fill_(0.0 if self.policy == "modes" else self.floor)

    def _gamma_at(self, progress: float) -> float:
        return _positive("gamma", value_at(self.gamma, progress))

    @torch.no_grad()
    def observe(
        self, base_layer: Any, folds: Sequence[int | None], sizes: tuple[int, int], inward: bool, scale: float
    ) -> None:
        """Note the norms of a layer's weight, fold by fold ("trust"; "modes" needs none).

        Args:
            base_layer: of the weight, (out, in) or, as transformers' Conv1D has it, (in, out).
            folds: the mode of each fold.
            sizes: (in, out) of the layer.
            inward: the folds are of the input.
            scale: the layer's factor on the update.

        Raises:
            TypeError: the weight cannot be read (it is quantised).
        """
        if self.policy != "trust":
            return
        weight = getattr(base_layer, "weight", None)
        stored = sizes if hasattr(base_layer, "nx") else sizes[::-1]
        if not (isinstance(weight, Tensor) and can_train(weight) and tuple(weight.shape) == stored):
            raise TypeError(
                "CPThreshold: policy 'trust' reads the weight's norm, and expected a dense floating-point weight of shape "
                f"{stored}, got {type(base_layer).__name__} with a {type(weight).__name__}; policy 'modes' reads none"
            )
        across = int(inward) if stored == sizes[::-1] else int(not inward)
        for fold, mode in zip(weight.chunk(len(folds), dim=across), folds, strict=True):
            if mode is not None and scale != 0.0:
                norm = torch.linalg.vector_norm(fold, dtype=self.weight_norms.dtype)
                self.weight_norms[mode] = (norm / abs(scale)).to(self.weight_norms.device)

    def forward(self, u: Tensor, v: Tensor, core: Tensor, norms: Tensor) -> Tensor:
        """``core`` (gains (G, R) or S (G, R, R')) with the threshold applied; u (K, R), v (n, R'), norms (G,) of W's folds."""
        if self.policy == "trust":
            with torch.no_grad():  # at V = 0 the norm has no gradient, and the radius is no way for one
                room = self.gamma_now * norms / (delta_norms(u, v, core) + EPS)
                factor = room.clamp(max=1.0).to(core.dtype)
            return core * factor.view(-1, *[1] * (core.dim() - 1))
        gamma = self.gamma_now.to(core.dtype)
        known = gamma > 0
        distance = (mode_energies(u, v, core) - gamma) / torch.where(known, self.softness * gamma, 1.0)
        gate = torch.where(known, torch.sigmoid(distance), 1.0)
        return core * (gate if core.dim() == 2 else gate[..., None])

    @torch.no_grad()
    def update(self, u: Tensor, v: Tensor, core: Tensor, progress: float = 0.0) -> None:
        """Bring Gamma up to date with the factors, ``core`` being that of all M modes, without a word to the host.

        Args:
            progress: of the training, in [0, 1], for a schedule.
        """
        gamma = self._gamma_at(progress)
        if not self.dynamic:
            self.gamma_now.fill_(gamma)
            self.updates.add_(1)
            return
        if self.policy == "modes":
            level = mode_energies(u, v, core).mean()
        else:
            known = self.weight_norms.isfinite()
            ratios = torch.where(known, delta_norms(u, v, core) / (self.weight_norms + EPS), 0.0)
            level = ratios.sum() / known.sum().clamp(min=1)
        level = level.to(self.average.dtype)
        moved = self.average + (1.0 - self.decay) * (level - self.average)
        self.average.copy_(torch.where(self.updates == 0, level, moved))  # the first one is the mean so far
        self.updates.add_(1)
        self.gamma_now.copy_(gamma * self.average)
        if self.policy == "trust":
            self.gamma_now.clamp_(min=self.floor)

    def extra_repr(self) -> str:
        return f"policy={self.policy!r}, gamma={self.gamma}, dynamic={self.dynamic}"


def _positive(name: str, value: float) -> float:
    return check_number("CPThreshold", name, value, above=0.0)
