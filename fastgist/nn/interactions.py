"""What may couple a model's two outputs in the place of the bidirectional KL divergence, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["INTERACTIONS", "Interaction", "bernoulli_kl", "interact"]

#: (outputs (..., V), the gist's outputs (..., V), temperature) -> a number a row, (...).
Interaction = Callable[[Tensor, Tensor, float], Tensor]

#: All but "bkld" are here, on u = z / T and v = z_g / T; "bkld" is the fused operation's.
INTERACTIONS = ("bkld", "kl_forward", "kl_reverse", "jsd", "mse", "cosine")


def interact(name: str, logits: Tensor, gist_logits: Tensor, temperature: float) -> Tensor:
    """A number a row, (..., V) x 2 -> (...), in float32 or wider."""
    u, v = _divided(logits, gist_logits, temperature)
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


def bernoulli_kl(logits: Tensor, gist_logits: Tensor, temperature: float) -> Tensor:
    """KL(p||q) + KL(q||p) of independent labels, p = sigmoid(z / T): the mean over labels of (p - q)(u - v)."""
    u, v = _divided(logits, gist_logits, temperature)
    return ((u.sigmoid() - v.sigmoid()) * (u - v)).mean(-1)


def _divided(logits: Tensor, gist_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(logits.dtype, gist_logits.dtype), torch.float32)
    return logits.to(wide) / temperature, gist_logits.to(wide) / temperature


def _divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a||b) of log-probabilities, a number a row; classes that a does not have contribute 0."""
    without = log_a == -torch.inf
    return (log_a.exp() * (log_a.masked_fill(without, 0.0) - log_b.masked_fill(without, 0.0))).sum(-1)
