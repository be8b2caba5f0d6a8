"""Relatives of GIST's loss: R-Drop, deep mutual learning and self-distillation on the same fused operation, and
distillation from a teacher of whom the likeliest classes are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgist import functional
from fastgist.nn import GistLoss

__all__ = ["mutual_learning", "r_drop", "self_distillation", "sparse_distillation", "topk_of", "two_passes"]


def two_passes(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of two forwards of ``model`` that differ in their dropout, as one batch of twice the size."""
    both = model(*(torch.cat((x, x)) for x in inputs))
    first, second = both.chunk(2)
    return first, second


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
        ValueError: fewer than two networks.
    """
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
