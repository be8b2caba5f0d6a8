"""Relatives of GIST's loss: R-Drop, deep mutual learning and self-distillation on the same fused operation, and
distillation from a teacher of whom the likeliest classes are stored."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgist import functional
from fastgist.nn import GistLoss

__all__ = ["mutual_learning", "r_drop", "self_distillation", "sparse_distillation", "topk_of", "two_passes"]


#: Models that :func:`two_passes` has warned of.
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def two_passes(model: nn.Module, *inputs: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The logits of two forwards of ``model`` that differ in their dropout, as one batch of twice the size.

        first, second = two_passes(model, images)
        first, second = two_passes(model, **tokenizer(texts, return_tensors="pt", padding=True))

    Args:
        model: gives logits (B, ..., V), or an output with ``logits`` (a gist model's, one of transformers').
        inputs, keywords: what ``model`` takes: tensors (B, ...), and dicts, lists and tuples of them, nested. Tensors of
            another first size than the first one's, and what is no tensor, go in as they are. One mapping alone whose keys
            are all names of ``model.forward``'s parameters, such as a tokenizer's batch, goes in by name.

    Returns:
        Two tensors (B, ..., V). A RuntimeWarning, one a model, says that they are equal where no dropout is active: the
        divergence of the two is then zero, and trains nothing.

    Raises:
        TypeError: no tensor goes in, or the output has no logits. ValueError: logits of another number of rows than 2 B.
    """
    alone = inputs[0] if len(inputs) == 1 and not keywords else None
    if isinstance(alone, Mapping) and alone.keys() <= inspect.signature(model.forward).parameters.keys():
        inputs, keywords = (), dict(alone)
    batch = _batch_of((inputs, keywords))
    if batch is None:
        raise TypeError("two_passes: expected tensors (B, ...) for the model, positional or by name, got none")
    output = model(*_twice(inputs, batch), **_twice(keywords, batch))
    both = output
    if not isinstance(output, Tensor):
        both = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if not isinstance(both, Tensor):
            raise TypeError(
                f"two_passes: the model must return logits or an output that holds 'logits', got {type(output).__name__}"
            )
    if both.dim() == 0 or both.shape[0] != 2 * batch:
        raise ValueError(
            f"two_passes: expected logits of {2 * batch} rows, two for each that came, got {tuple(both.shape)}"
        )
    first, second = both.chunk(2)
    _warn_of_equal_passes(model, first, second)
    return first, second


def _batch_of(given: Any) -> int | None:
    """The first size of the first tensor in nested containers."""
    if isinstance(given, Tensor):
        return given.shape[0] if given.dim() else None
    items = given.values() if isinstance(given, Mapping) else given if isinstance(given, tuple | list) else ()
    return next((size for item in items if (size := _batch_of(item)) is not None), None)


def _twice(given: Any, batch: int) -> Any:
    """``given`` with every tensor of ``batch`` rows in it twice, one below the other."""
    if isinstance(given, Tensor):
        return torch.cat((given, given)) if given.dim() and given.shape[0] == batch else given
    if isinstance(given, Mapping):
        return {key: _twice(value, batch) for key, value in given.items()}
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return type(given)(*(_twice(value, batch) for value in given))
    return type(given)(_twice(value, batch) for value in given) if type(given) in (tuple, list) else given


def _warn_of_equal_passes(model: nn.Module, first: Tensor, second: Tensor) -> None:
    """Where no layer says that it drops something the results are looked at, since a model may draw in other ways."""
    if torch.compiler.is_compiling() or model in _WARNED or any(map(_drops, model.modules())):
        return
    if not torch.allclose(first.detach(), second.detach()):
        return
    _WARNED.add(model)
    found = "no dropout in it is active" if model.training else "it is in evaluation mode (call model.train())"
    warnings.warn(
        f"two_passes: both passes of this {type(model).__name__} give the same logits: {found}. Their divergence is then 0",
        RuntimeWarning,
        stacklevel=3,
    )


def _drops(module: nn.Module) -> bool:
    """Whether ``module`` is in training and has a dropout > 0, its own (nn.Dropout's p) or as a number that it keeps."""
    if not module.training:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def r_drop(
    logits: Tensor,
    other_logits: Tensor,
    target: Tensor,
    weight: float = 1.0,
    *,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """R-Drop (arXiv 2106.14448): CE(z_1) + CE(z_2) + weight * [KL(p_1||p_2) + KL(p_2||p_1)] / 2 at T = 1, one fused pass.

    Args:
        logits, other_logits: (..., V), of two dropout passes (:func:`two_passes`).
        target: (...) int64; rows with -100 leave all terms.
        weight: the paper's alpha.
        divisor: what the mean divides by instead of the rows that count, such as those of all accumulated batches.
    """
    loss = GistLoss(alpha=1.0, beta=weight, temperature=1.0, halve=True)
    return loss(logits, other_logits, target, divisor=divisor)


def mutual_learning(
    peers: Sequence[Tensor],
    target: Tensor,
    weight: float = 1.0,
    temperature: float = 1.0,
    *,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """Deep mutual learning (arXiv 1706.00384) of K networks: the sum over k of CE(z_k) + weight * mean over j of J(z_k, z_j).

    Each network is taught by the others as they are: z_j takes no gradient from k's term. J is the divergence in both
    directions, where the paper has KL(p_j||p_k) alone.

    Args:
        peers: K >= 2 tensors (..., V).
        target: (...) int64; rows with -100 leave all terms.
        divisor: as in :func:`r_drop`.

    Raises:
        ValueError: fewer than two networks. TypeError: something else than a sequence of tensors.
    """
    if isinstance(peers, Tensor) or not isinstance(peers, Sequence):
        got = f"one tensor of shape {tuple(peers.shape)}" if isinstance(peers, Tensor) else type(peers).__name__
        raise TypeError(
            f"mutual_learning: expected a list of the networks' logits, [z_1, z_2], and the target, got {got}"
        )
    for k, z in enumerate(peers):
        if not isinstance(z, Tensor):
            raise TypeError(f"mutual_learning: expected tensors of logits, network {k} gave {type(z).__name__}")
    if not isinstance(target, Tensor):
        raise TypeError(f"mutual_learning: target must be a tensor of classes, got {type(target).__name__}")
    if len(peers) < 2:
        raise ValueError(f"mutual_learning: expected the logits of at least 2 networks, got {len(peers)}")
    total = peers[0].new_zeros((), dtype=torch.promote_types(peers[0].dtype, torch.float32))
    kept = target != -100
    for k, own in enumerate(peers):
        total = total + GistLoss()(own, target, divisor=divisor)  # one output: its cross-entropy
        for other in (z for j, z in enumerate(peers) if j != k):
            options: dict[str, Any] = {"temperature": temperature, "mask": kept, "divisor": divisor}
            divergence = functional.bidirectional_kl(own, other.detach(), **options)
            total = total + weight / (len(peers) - 1) * divergence
    return total


def self_distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    weight: float = 1.0,
    temperature: float = 3.0,
    *,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """CE(z) + weight * T^2 * J(z / T, teacher / T), the teacher (an earlier or averaged copy) without gradient. Rows with
    target -100 leave both terms; divisor as in :func:`r_drop`."""
    loss = GistLoss(alpha=0.0, beta=weight, temperature=temperature, t_squared=True)
    return loss(logits, teacher_logits.detach(), target, divisor=divisor)


@torch.no_grad()
def topk_of(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The sparse teacher that ``functional.topk_kl`` takes: of softmax(logits / T), the k likeliest classes.

    The likeliest class is left out of the sum that it is compared with, so that of a teacher who is all but certain something
    is left for the rest: a float32 log_softmax would say 0, which is all, from a probability of 1 - 6e-8 on.

    Args:
        logits: (..., V), a teacher's, floating point.
        k: how many classes to keep, 1 to V.
        temperature: T > 0, the one that the loss will have.

    Returns:
        log_probs (..., k), float32 (float64 for float64 logits), likeliest first, and indices (..., k) int64.

    Raises:
        ValueError: k or the temperature out of range.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"topk_of: k must be 1 to {logits.shape[-1]}, the number of classes, got {k}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"topk_of: temperature must be finite and > 0, got {temperature}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, indices = wide.topk(k, dim=-1)
    peak = top[..., :1]
    weights = ((wide - peak) / temperature).exp_().scatter_(-1, indices[..., :1], 0.0)
    log_sum = weights.sum(-1, keepdim=True).log1p_()
    return (top - peak) / temperature - log_sum, indices


def sparse_distillation(
    logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_indices: Tensor,
    target: Tensor,
    weight: float = 1.0,
    temperature: float = 1.0,
    *,
    direction: str = "forward",
    ignore_index: int = -100,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """CE(z) + weight * T^2 * KL(teacher||softmax(z / T)), the teacher known by k classes a row (:func:`topk_of`).

    Args:
        logits: (..., V).
        teacher_log_probs, teacher_indices: (..., k), at temperature T.
        target: (...) int64. Rows of ``ignore_index`` leave both terms, whatever the teacher holds there.
        direction: of ``functional.topk_kl``.
        divisor: what both means divide by instead of this call's number of rows, as
            :func:`fastgist.distributed.mean_divisor` gives it.
    """
    mask = target != ignore_index
    if divisor is None:
        task = GistLoss(ignore_index=ignore_index)(logits, target)  # one output: its cross-entropy
    else:
        task = GistLoss(ignore_index=ignore_index, reduction="sum")(logits, target) / divisor
    divergence = functional.topk_kl(
        logits,
        teacher_log_probs.detach(),
        teacher_indices,
        temperature=temperature,
        direction=direction,
        mask=mask,
        t_squared=True,
        divisor=divisor,
    )
    return task + weight * divergence
