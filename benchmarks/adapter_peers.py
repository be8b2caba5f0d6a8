"""The bottleneck adapter in plain PyTorch, with the options that a case has: what it is timed against (peers.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problems import DROPOUT, EPSILON

_PLAIN = {"x", "down", "down_bias", "up", "up_bias"}


def _as_in_a_model(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    a = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPSILON)
    hidden = F.gelu(F.linear(a, down, down_bias))
    if gate is not None:
        hidden = hidden * gate.repeat_interleave(hidden.shape[-1] // gate.shape[-1], -1)
    if seed is not None:
        hidden = F.dropout(hidden, DROPOUT)
    out = F.linear(hidden, up) + gate @ up_bias if gate is not None else F.linear(hidden, up, up_bias)
    return (x if residual is None else residual) + out


def _expert_by_expert(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, *, gate: Tensor
) -> Tensor:
    """Each expert an adapter of its own, their results weighed: how mixtures of adapters are written."""
    experts, out = gate.shape[-1], x
    parts = zip(down.chunk(experts), down_bias.chunk(experts), up.chunk(experts, 1), up_bias, strict=True)
    for i, (d, d_bias, u, u_bias) in enumerate(parts):
        out = out + gate[:, i, None] * F.linear(F.gelu(F.linear(x, d, d_bias)), u, u_bias)
    return out


class _Chain(torch.autograd.Function):
    """Forward and backward by formula; the bottleneck is formed again, nothing beside inputs is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, down, down_bias, up)
        return torch.addmm(up_bias, F.gelu(torch.addmm(down_bias, x, down.t())), up.t()).add_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, down, down_bias, up = ctx.saved_tensors
        z = torch.addmm(down_bias, x, down.t())
        grad_z = torch.ops.aten.gelu_backward(grad @ up, z)
        return (
            torch.addmm(grad, grad_z, down), grad_z.t() @ x, grad_z.sum(0), grad.t() @ F.gelu(z), grad.sum(0),
        )  # fmt: skip


def _named(function: Callable[..., Tensor], names: list[str]) -> Callable[..., Tensor]:
    """``function`` called with a case's tensors in their order."""
    return lambda *values: function(*values[:5], **dict(zip(names[5:], values[5:], strict=True)))


def eager(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    return _named(_as_in_a_model, list(tensors))


def expert_by_expert(tensors: dict[str, Tensor]) -> Callable[..., Tensor] | None:
    """None where there are no experts."""
    return _named(_expert_by_expert, list(tensors)) if set(tensors) == _PLAIN | {"gate"} else None


def chain(tensors: dict[str, Tensor]) -> Callable[..., Tensor] | None:
    """None where there are options: what was derived by hand is the plain adapter."""
    return _Chain.apply if set(tensors) == _PLAIN else None
