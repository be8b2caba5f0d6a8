"""Relatives of GIST's loss on the same fused operation: R-Drop, deep mutual learning, self-distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgist import functional
from fastgist.nn import GistLoss

__all__ = ["mutual_learning", "r_drop", "self_distillation", "two_passes"]


def two_passes(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of two forwards of ``model`` that differ in their dropout, as one batch of twice the size."""
    both = model(*(torch.cat((x, x)) for x in inputs))
    first, second = both.chunk(2)
    return first, second


def r_drop(logits: Tensor, other_logits: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
    """R-Drop (arXiv 2106.14448): CE(z_1) + CE(z_2) + weight * [KL(p_1||p_2) + KL(p_2||p_1)] / 2 at T = 1, one fused pass.

    Args:
        logits, other_logits: (..., V), of two dropout passes (:func:`two_passes`).
        target: (...) int64.
        weight: the paper's alpha.
    """
    return GistLoss(alpha=1.0, beta=weight, temperature=1.0, halve=True)(logits, other_logits, target)


def mutual_learning(peers: Sequence[Tensor], target: Tensor, weight: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Deep mutual learning (arXiv 1706.00384) of K networks: the sum over k of CE(z_k) + weight * mean over j of J(z_k, z_j).

    Each network is taught by the others as they are: z_j takes no gradient from k's term. J is the divergence in both
    directions, where the paper has KL(p_j||p_k) alone.

    Args:
        peers: K >= 2 tensors (..., V).
        target: (...) int64.

    Raises:
        ValueError: fewer than two networks.
    """
    if len(peers) < 2:
        raise ValueError(f"mutual_learning: expected the logits of at least 2 networks, got {len(peers)}")
    total = peers[0].new_zeros((), dtype=torch.promote_types(peers[0].dtype, torch.float32))
    for k, own in enumerate(peers):
        total = total + GistLoss()(own, target)  # one output: its cross-entropy
        for other in (z for j, z in enumerate(peers) if j != k):
            divergence = functional.bidirectional_kl(own, other.detach(), temperature=temperature)
            total = total + weight / (len(peers) - 1) * divergence
    return total


def self_distillation(
    logits: Tensor, teacher_logits: Tensor, target: Tensor, weight: float = 1.0, temperature: float = 3.0
) -> Tensor:
    """CE(z) + weight * T^2 * J(z / T, teacher / T), the teacher (an earlier or averaged copy) without gradient."""
    loss = GistLoss(alpha=0.0, beta=weight, temperature=temperature, t_squared=True)
    return loss(logits, teacher_logits.detach(), target)
