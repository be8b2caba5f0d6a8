r"""The losses of GIST (arXiv 2312.07255) as modules, and the divergence from a sparse teacher.

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
from fastgist.nn._checks import check_bool, check_integer, check_number, check_one_of
from fastgist.nn.interactions import INTERACTIONS, Interaction, bernoulli_kl, interact
from fastgist.nn.schedule import Schedule, value_at

__all__ = ["BidirectionalKLLoss", "GistLoss", "TopKKLLoss"]

#: What the outputs are, by Hugging Face's names.
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


class BidirectionalKLLoss(nn.Module):
    """KL(p||q) + KL(q||p) of two logits tensors, p = softmax(logits / T): :func:`fastgist.functional.bidirectional_kl`.

    Args: as the function's.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "batchmean", t_squared: bool = False) -> None:
        super().__init__()
        _check_common("BidirectionalKLLoss", temperature, reduction, t_squared)
        self.temperature, self.reduction, self.t_squared = _temperature(self, temperature), reduction, t_squared

    def forward(
        self,
        logits: Tensor,
        other_logits: Tensor,
        mask: Tensor | None = None,
        *,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        """logits, other_logits: (..., V); mask (...) bool; divisor: what a mean divides by. Returns a scalar, or (...) for
        reduction "none"."""
        return functional.bidirectional_kl(
            logits,
            other_logits,
            temperature=self.temperature,
            reduction=self.reduction,
            mask=mask,
            t_squared=self.t_squared,
            divisor=divisor,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, t_squared={self.t_squared}"


class TopKKLLoss(nn.Module):
    """Divergence from a teacher of whom k classes a row are known: :func:`fastgist.functional.topk_kl`.

    Args: as the function's.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        direction: str = "both",
        reduction: str = "batchmean",
        t_squared: bool = False,
    ) -> None:
        super().__init__()
        _check_common("TopKKLLoss", temperature, reduction, t_squared)
        _one_of("direction", direction, ("both", "forward", "reverse"), "TopKKLLoss")
        self.temperature, self.direction = _temperature(self, temperature), direction
        self.reduction, self.t_squared = reduction, t_squared

    def forward(
        self,
        logits: Tensor,
        teacher_log_probs: Tensor,
        teacher_indices: Tensor,
        mask: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        """logits (..., V); teacher (..., k) twice; mask (...) bool. Returns a scalar, or (...) for reduction "none"."""
        return functional.topk_kl(
            logits,
            teacher_log_probs,
            teacher_indices,
            temperature=self.temperature,
            direction=self.direction,
            reduction=self.reduction,
            mask=mask,
            t_squared=self.t_squared,
            divisor=divisor,
        )

    def extra_repr(self) -> str:
        names = ("temperature", "direction", "reduction", "t_squared")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class GistLoss(nn.Module):
    """The GIST objective, called as ``loss(output, target)`` or ``loss(logits, gist_logits, target)``.

    ``output`` is whatever a gist model returns (a mapping with "logits" and, in training, "gist_logits"), or a logits
    tensor. Without gist logits (evaluation) the loss is the task's loss of the logits alone.

    Args:
        alpha: weight of the gist logits' task loss.
        beta: weight of the interaction.
        temperature: T > 0 of the interaction (3 in the paper; a wider script of the same author has 10). beta and
            temperature may be schedules, functions of the training progress in [0, 1] such as
            :class:`fastgist.nn.Linear`; whoever trains sets :attr:`progress`. torch.compile takes two graphs for them.
        interaction: "bkld" (the paper's, fused with both cross-entropies), "kl_forward" KL(p||q), "kl_reverse"
            KL(q||p), "jsd" (Jensen-Shannon), "mse" (mean over classes of (u - v)^2), "cosine" (1 - cos(u, v)), or a
            function (logits, gist_logits, temperature) -> a number a row. u = z / T, v = z_g / T.
        t_squared: multiply the interaction by T^2.
        halve: half of the interaction, as R-Drop has it.
        detach: None (both sides receive the interaction's gradient, the paper's), "logits" (the prediction teaches and
            does not learn from it) or "gist_logits" (the reverse).
        problem_type: "single_label_classification"; "multi_label_classification" (targets (..., V) in [0, 1]; binary
            cross-entropy, and "bkld" is that of independent labels), or "regression" (targets (..., V); squared
            error, and "bkld", which regression has not, stands for "mse"). Means over labels within a row.
        label_smoothing, ignore_index, reduction: as torch's cross_entropy; ignored rows leave all terms, and a mean
            over no rows is 0. reduction: "mean", "sum" or "none".

    Raises:
        ValueError: an option out of range.
        TypeError: a call with something else than above.
    """

    #: How far the training is, in [0, 1]: what schedules are asked for.
    progress: float = 0.0

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float | Schedule = 0.75,
        temperature: float | Schedule = 3.0,
        interaction: str | Interaction = "bkld",
        *,
        t_squared: bool = False,
        halve: bool = False,
        detach: str | None = None,
        problem_type: str = "single_label_classification",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _one_of("interaction", interaction, INTERACTIONS) if not callable(interaction) else None
        _one_of("reduction", reduction, ("mean", "sum", "none"))
        check_bool("GistLoss", "halve", halve)
        check_number("GistLoss", "label_smoothing", label_smoothing, least=0.0, most=1.0)
        check_integer("GistLoss", "ignore_index", ignore_index)
        _check_common("GistLoss", 1.0 if callable(temperature) else temperature, reduction, t_squared)
        _one_of("problem_type", problem_type, PROBLEMS)
        _one_of("detach", detach, (None, "logits", "gist_logits"))
        if problem_type == "regression" and interaction in ("kl_forward", "kl_reverse", "jsd"):
            raise ValueError(
                f"GistLoss: regression has no distribution for interaction={interaction!r}; take mse or cosine"
            )
        if problem_type == "multi_label_classification" and interaction in ("kl_forward", "kl_reverse", "jsd"):
            raise ValueError(
                f"GistLoss: interaction={interaction!r} is one label's; for several take bkld, mse or cosine"
            )
        if label_smoothing and problem_type != PROBLEMS[0]:
            raise ValueError(f"GistLoss: label_smoothing is for {PROBLEMS[0]}, got problem_type={problem_type!r}")
        check_number("GistLoss", "alpha", alpha)
        if not callable(beta):
            check_number("GistLoss", "beta", beta)
        self.alpha, self.beta = float(alpha), beta if callable(beta) else float(beta)
        self.temperature = temperature if callable(temperature) else _temperature(self, temperature)
        self.interaction, self.t_squared, self.halve, self.detach = interaction, t_squared, halve, detach
        self.problem_type = problem_type
        self.label_smoothing, self.ignore_index, self.reduction = label_smoothing, ignore_index, reduction

    def forward(self, *args: Any, divisor: float | Tensor | None = None) -> Tensor:
        """(output, target) or (logits, gist_logits, target); logits (..., V), target (...) int64 or (..., V) soft.

        ``divisor``: what a mean divides by in place of this batch's rows that count, such as the tokens of all batches of a
        step (:func:`fastgist.distributed.mean_divisor` where several processes share it).
        """
        if divisor is not None and self.reduction != "mean":
            raise ValueError(f"GistLoss: divisor is what a mean divides by, and reduction is {self.reduction!r}")
        divisor = _divisor(divisor)
        logits, gist_logits, target = self._unpack(args)
        if gist_logits is None:
            return self._task(logits, target, divisor)
        beta, temperature = (
            value_at(self.beta, self.progress),
            _temperature(self, value_at(self.temperature, self.progress)),
        )
        weight = beta * (0.5 if self.halve else 1.0)
        if self.problem_type != PROBLEMS[0]:
            return self._task(logits, target, divisor) + self._rest(
                logits, gist_logits, target, weight, temperature, divisor
            )
        common: dict[str, Any] = {"alpha": self.alpha, "label_smoothing": self.label_smoothing, "divisor": divisor}
        common |= {"ignore_index": self.ignore_index, "reduction": self.reduction}
        if self.interaction == "bkld":
            common |= {"temperature": temperature, "t_squared": self.t_squared, "detach": self.detach}
            return functional.gist_loss(logits, gist_logits, target, beta=weight, **common)
        entropies = functional.gist_loss(logits, gist_logits, target, beta=0.0, **common)
        kept = self._kept(logits, target)
        return entropies + weight * self._interaction(logits, gist_logits, kept, temperature, divisor)

    @property
    def has_linear(self) -> bool:
        """Whether :meth:`of_linear` computes this loss: single labels, "bkld"."""
        return self.problem_type == PROBLEMS[0] and self.interaction == "bkld"

    def of_linear(
        self,
        hidden: Tensor,
        gist_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        *,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of the logits that a linear head makes of hidden states (..., H), without the logits: see
        :func:`fastgist.functional.gist_linear_loss`.

        Raises:
            ValueError: a kind of loss that only has logits (:attr:`has_linear`).
        """
        if not self.has_linear:
            raise ValueError(f"GistLoss: of_linear is for single labels and bkld, got {self.extra_repr()}")
        return functional.gist_linear_loss(
            hidden,
            gist_hidden,
            weight,
            bias,
            target,
            alpha=self.alpha,
            beta=value_at(self.beta, self.progress) * (0.5 if self.halve else 1.0),
            temperature=_temperature(self, value_at(self.temperature, self.progress)),
            t_squared=self.t_squared,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            detach=self.detach,
            divisor=divisor,
        )

    def _rest(
        self,
        logits: Tensor,
        gist_logits: Tensor,
        target: Tensor,
        weight: float,
        temperature: float,
        divisor: float | Tensor | None,
    ) -> Tensor:
        """What a gist token adds to the task's loss, where that is not a cross-entropy of classes."""
        added = weight * self._interaction(logits, gist_logits, None, temperature, divisor)
        return added + self.alpha * self._task(gist_logits, target, divisor) if self.alpha else added

    def _interaction(
        self,
        logits: Tensor,
        gist_logits: Tensor,
        kept: Tensor | None,
        temperature: float,
        divisor: float | Tensor | None,
    ) -> Tensor:
        if self.detach == "logits":
            logits = logits.detach()
        elif self.detach == "gist_logits":
            gist_logits = gist_logits.detach()
        factor = temperature**2 if self.t_squared else 1.0
        if kept is not None:  # before any arithmetic, so that an ignored row may hold anything
            logits, gist_logits = (torch.where(kept[..., None], z, 0.0) for z in (logits, gist_logits))
        name = self.interaction
        if callable(name):
            rows = name(logits, gist_logits, temperature)
            if not isinstance(rows, Tensor) or rows.shape != logits.shape[:-1]:
                got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise ValueError(
                    f"GistLoss: the interaction must return a number a row, {tuple(logits.shape[:-1])}, got {got}"
                )
        elif name == "bkld" and self.problem_type == "multi_label_classification":
            rows = bernoulli_kl(logits, gist_logits, temperature)
        else:
            rows = interact("mse" if name == "bkld" else name, logits, gist_logits, temperature)
        return self._reduce(rows * factor, kept, divisor)

    def _unpack(self, args: tuple) -> tuple[Tensor, Tensor | None, Tensor]:
        if args and not isinstance(args[-1], Tensor):
            raise TypeError(
                f"GistLoss: target must be a Tensor, got {type(args[-1]).__name__}; "
                "called as (output, target) or (logits, gist_logits, target)"
            )
        if len(args) == 3:
            return args
        if len(args) != 2:
            raise TypeError(
                f"GistLoss: called as (output, target) or (logits, gist_logits, target), got {len(args)} arguments"
            )
        output, target = args
        if isinstance(output, Tensor):
            if not output.is_floating_point():
                raise TypeError(
                    f"GistLoss: called as (output, target), got {output.dtype} of shape {tuple(output.shape)} as the output"
                )
            if target.requires_grad:
                raise TypeError(
                    f"GistLoss: called as (output, target), got logits of shape {tuple(target.shape)}, which require grad, as "
                    "the target; of two logits: (logits, gist_logits, target)"
                )
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

    def _reduce(self, rows: Tensor, kept: Tensor | None, divisor: float | Tensor | None) -> Tensor:
        if kept is not None:
            rows = torch.where(kept, rows, 0.0)
        if self.reduction == "none":
            return rows
        total = rows.sum()
        if self.reduction == "sum":
            return total
        if divisor is not None:
            return total / divisor
        return total / max(rows.numel(), 1) if kept is None else total / kept.sum().clamp(min=1)

    def _task(self, logits: Tensor, target: Tensor, divisor: float | Tensor | None) -> Tensor:
        """The task's loss of one output."""
        if self.problem_type == PROBLEMS[0]:
            return self._cross_entropy(logits, target, divisor)
        if target.shape != logits.shape:
            raise ValueError(
                f"GistLoss: {self.problem_type} expects target.shape == {tuple(logits.shape)}, got {tuple(target.shape)}"
            )
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = target.to(wide.dtype)
        if self.problem_type == "multi_label_classification":
            losses = nn.functional.binary_cross_entropy_with_logits(wide, target, reduction="none")
        else:
            losses = nn.functional.mse_loss(wide, target, reduction="none")
        return self._reduce(losses.mean(-1), None, divisor)

    def _cross_entropy(self, logits: Tensor, target: Tensor, divisor: float | Tensor | None) -> Tensor:
        kept = self._kept(logits, target)
        if kept is None:  # soft targets: torch's cross_entropy takes 0 times -inf at an absent class for NaN
            options: dict[str, Any] = {"alpha": 0.0, "beta": 0.0, "label_smoothing": self.label_smoothing}
            options |= {"reduction": self.reduction, "divisor": divisor}
            return functional.gist_loss(logits, logits.detach(), target, **options)
        logits = torch.where(kept[..., None], logits, 0.0)  # 0 times NaN, in the gradient of an ignored row, is not 0
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = nn.functional.cross_entropy(
            wide.reshape(-1, wide.shape[-1]),
            target.reshape(-1),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        ).reshape(logits.shape[:-1])
        return self._reduce(rows, kept, divisor)

    def extra_repr(self) -> str:
        interaction = getattr(self.interaction, "__name__", self.interaction)
        parts = [f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, interaction={interaction!r}"]
        parts += [f"{name}={getattr(self, name)!r}" for name in ("t_squared", "halve", "detach", "problem_type")]
        parts += [f"{name}={getattr(self, name)!r}" for name in ("label_smoothing", "ignore_index", "reduction")]
        return ", ".join(parts)


def _check_common(owner: str, temperature: object, reduction: object, t_squared: object) -> None:
    """What all of the losses take."""
    check_number(owner, "temperature", temperature, above=0.0)
    check_one_of(owner, "reduction", reduction, ("mean", "batchmean", "sum", "none"))
    check_bool(owner, "t_squared", t_squared)


def _one_of(name: str, value: object, allowed: tuple, owner: str = "GistLoss") -> None:
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _divisor(divisor: float | Tensor | None) -> float | Tensor | None:
    """Checked as the functions do, for the losses that are not theirs."""
    if isinstance(divisor, Tensor):
        if divisor.numel() != 1 or divisor.requires_grad:
            raise ValueError(
                "GistLoss: divisor must be one number without a gradient, got a tensor of several or with one"
            )
        return divisor.reshape(()).clamp(
            min=torch.finfo(torch.float32).tiny
        )  # of a count of no rows: their loss stays 0
    if divisor is not None and not 0.0 < divisor < math.inf:
        raise ValueError(f"GistLoss: divisor must be finite and > 0, got {divisor}")
    return divisor


def _temperature(owner: nn.Module, temperature: float) -> float:
    if not 0.0 < temperature < math.inf:  # torch.compile cannot ask math.isfinite of a number that moves
        raise ValueError(f"{type(owner).__name__}: temperature must be finite and > 0, got {temperature}")
    return float(temperature)
