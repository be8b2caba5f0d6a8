r"""The losses of GIST (arXiv 2312.07255) as modules.

.. math::
    L = CE(z, y) + \alpha\, CE(z_g, y) + \beta\, J(z / T, z_g / T)

with J = KL(p||q) + KL(q||p) by default. Both logits receive gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgist import functional

__all__ = ["INTERACTIONS", "BidirectionalKLLoss", "GistLoss"]

#: What may couple the two logits; all but "bkld" are plain PyTorch on u = z / T and v = z_g / T, a number a row.
INTERACTIONS = ("bkld", "kl_forward", "kl_reverse", "jsd", "mse", "cosine")


class BidirectionalKLLoss(nn.Module):
    """KL(p||q) + KL(q||p) of two logits tensors, p = softmax(logits / T): :func:`fastgist.functional.bidirectional_kl`.

    Args: as the function's.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "batchmean", t_squared: bool = False) -> None:
        super().__init__()
        self.temperature, self.reduction, self.t_squared = _temperature(self, temperature), reduction, t_squared

    def forward(self, logits: Tensor, other_logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """logits, other_logits: (..., V); mask (...) bool. Returns a scalar, or (...) for reduction "none"."""
        return functional.bidirectional_kl(
            logits,
            other_logits,
            temperature=self.temperature,
            reduction=self.reduction,
            mask=mask,
            t_squared=self.t_squared,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, t_squared={self.t_squared}"


class GistLoss(nn.Module):
    """The GIST objective, called as ``loss(output, target)`` or ``loss(logits, gist_logits, target)``.

    ``output`` is whatever a gist model returns (a mapping with "logits" and, in training, "gist_logits"), or a logits
    tensor. Without gist logits (evaluation) the loss is the cross-entropy of the logits alone.

    Args:
        alpha: weight of the gist logits' cross-entropy.
        beta: weight of the interaction.
        temperature: T > 0 of the interaction (3 in the paper; a wider script of the same author has 10).
        interaction: "bkld" (the paper's, fused with both cross-entropies), "kl_forward" KL(p||q), "kl_reverse"
            KL(q||p), "jsd" (Jensen-Shannon), "mse" (mean over classes of (u - v)^2), "cosine" (1 - cos(u, v)).
        t_squared: multiply the interaction by T^2.
        label_smoothing, ignore_index, reduction: as torch's cross_entropy; ignored rows leave all terms, and a mean
            over no rows is 0. reduction: "mean", "sum" or "none".

    Raises:
        ValueError: an option out of range.
        TypeError: a call with something else than above.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.75,
        temperature: float = 3.0,
        interaction: str = "bkld",
        *,
        t_squared: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if interaction not in INTERACTIONS:
            raise ValueError(f"GistLoss: interaction must be one of {', '.join(INTERACTIONS)}, got {interaction!r}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"GistLoss: reduction must be one of mean, sum, none, got {reduction!r}")
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            raise ValueError(f"GistLoss: alpha and beta must be finite, got {alpha} and {beta}")
        self.alpha, self.beta, self.temperature = float(alpha), float(beta), _temperature(self, temperature)
        self.interaction, self.t_squared = interaction, t_squared
        self.label_smoothing, self.ignore_index, self.reduction = label_smoothing, ignore_index, reduction

    def forward(self, *args: Any) -> Tensor:
        """(output, target) or (logits, gist_logits, target); logits (..., V), target (...) int64 or (..., V) soft."""
        logits, gist_logits, target = self._unpack(args)
        if gist_logits is None:
            return self._cross_entropy(logits, target)
        common: dict[str, Any] = {"label_smoothing": self.label_smoothing, "ignore_index": self.ignore_index}
        if self.interaction == "bkld":
            return functional.gist_loss(
                logits,
                gist_logits,
                target,
                alpha=self.alpha,
                beta=self.beta,
                temperature=self.temperature,
                t_squared=self.t_squared,
                reduction=self.reduction,
                **common,
            )
        entropies = functional.gist_loss(
            logits, gist_logits, target, alpha=self.alpha, beta=0.0, reduction=self.reduction, **common
        )
        kept = self._kept(logits, target)
        if kept is not None:  # before any arithmetic, so that an ignored row may hold anything
            logits, gist_logits = (torch.where(kept[..., None], z, 0.0) for z in (logits, gist_logits))
        rows = _interaction(self.interaction, logits, gist_logits, self.temperature)
        if self.t_squared:
            rows = rows * self.temperature**2
        return entropies + self.beta * self._reduce(rows, kept)

    def _unpack(self, args: tuple) -> tuple[Tensor, Tensor | None, Tensor]:
        if len(args) == 3:
            return args
        if len(args) != 2:
            raise TypeError(
                f"GistLoss: called as (output, target) or (logits, gist_logits, target), got {len(args)} arguments"
            )
        output, target = args
        if isinstance(output, Tensor):
            return output, None, target
        if isinstance(output, Mapping):
            if "logits" not in output:
                raise TypeError(
                    f"GistLoss: output must hold 'logits', it holds {', '.join(map(str, output)) or 'nothing'}"
                )
            return output["logits"], output.get("gist_logits"), target
        raise TypeError(
            "GistLoss: output must be a gist model's output (a mapping with 'logits') or a tensor, "
            f"got {type(output).__name__}"
        )

    def _kept(self, logits: Tensor, target: Tensor) -> Tensor | None:
        """(...) bool, the rows that count; None for all."""
        return None if target.shape == logits.shape else target != self.ignore_index

    def _reduce(self, rows: Tensor, kept: Tensor | None) -> Tensor:
        if kept is not None:
            rows = torch.where(kept, rows, 0.0)
        if self.reduction == "none":
            return rows
        total = rows.sum()
        if self.reduction == "sum":
            return total
        return total / max(rows.numel(), 1) if kept is None else total / kept.sum().clamp(min=1)

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        kept = self._kept(logits, target)
        if kept is None:  # soft targets: torch's cross_entropy takes 0 times -inf at an absent class for NaN
            options: dict[str, Any] = {"alpha": 0.0, "beta": 0.0, "label_smoothing": self.label_smoothing}
            return functional.gist_loss(logits, logits.detach(), target, reduction=self.reduction, **options)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = nn.functional.cross_entropy(
            wide.reshape(-1, wide.shape[-1]),
            target.reshape(-1),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        ).reshape(logits.shape[:-1])
        return self._reduce(rows, kept)

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, interaction={self.interaction!r}, "
            f"t_squared={self.t_squared}, label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )


def _temperature(owner: nn.Module, temperature: float) -> float:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{type(owner).__name__}: temperature must be finite and > 0, got {temperature}")
    return float(temperature)


def _interaction(name: str, logits: Tensor, gist_logits: Tensor, temperature: float) -> Tensor:
    """A number a row, (..., V) x 2 -> (...), in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(logits.dtype, gist_logits.dtype), torch.float32)
    u, v = logits.to(wide) / temperature, gist_logits.to(wide) / temperature
    absent = (u == -torch.inf) & (v == -torch.inf)  # classes that are in neither distribution: no part of any term
    if name in ("mse", "cosine"):
        u, v = u.masked_fill(absent, 0.0), v.masked_fill(absent, 0.0)
        if name == "cosine":
            return 1.0 - nn.functional.cosine_similarity(u, v, dim=-1)
        return (u - v).square().sum(-1) / (~absent).sum(-1)
    log_p, log_q = u.log_softmax(-1), v.log_softmax(-1)
    if name == "kl_forward":
        return _divergence(log_p, log_q)
    if name == "kl_reverse":
        return _divergence(log_q, log_p)
    log_m = torch.logaddexp(log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)) - math.log(2.0)
    return 0.5 * (_divergence(log_p, log_m) + _divergence(log_q, log_m))


def _divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a||b) of log-probabilities, a number a row; classes that a does not have contribute 0."""
    without = log_a == -torch.inf
    return (log_a.exp() * (log_a.masked_fill(without, 0.0) - log_b.masked_fill(without, 0.0))).sum(-1)
