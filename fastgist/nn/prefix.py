"""Prefix tuning (arXiv 2101.00190): trained keys and values that every query of an attention layer also sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn._checks import check_callable, check_module, check_place, check_positive

__all__ = ["AttentionForward", "PrefixedAttention"]

#: run(attention, extend, *args, **kwargs): an attention layer's forward in which keys and values (B, heads, N, d), ready
#: for the softmax (normed, rotated), pass through ``extend(k, v)``.
AttentionForward = Callable[..., Any]


class PrefixedAttention(nn.Module):
    """An attention layer with ``length`` trained rows before its keys and values. The queries stay as they are.

    Args:
        base_layer: the frozen attention layer; further arguments of a call go to it.
        run: its forward with the keys and values left open; see ``AttentionForward``. A function of a module (for pickle).
        heads: how many heads the keys have.
        head_dim: the width of one.
        length: how many rows.
        device, dtype: of ``key`` and ``value`` (heads, length, head_dim). Keys are drawn from N(0, 1 / head_dim), values
            are zero: at the start a prefix only takes some of the attention's weight.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        run: AttentionForward,
        heads: int,
        head_dim: int,
        length: int = 10,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_module("PrefixedAttention", "base_layer", base_layer)
        if isinstance(base_layer, PrefixedAttention):
            raise ValueError("PrefixedAttention: base_layer has a prefix already")
        self.base_layer = base_layer
        self.run = run
        self.length = check_positive("PrefixedAttention", "length", length)
        heads, head_dim = (
            check_positive("PrefixedAttention", n, w) for n, w in (("heads", heads), ("head_dim", head_dim))
        )
        shape = heads, length, head_dim
        check_callable("PrefixedAttention", "run", run)
        place = check_place("PrefixedAttention", device, dtype)
        self.key = nn.Parameter(torch.empty(shape, **place))
        self.value = nn.Parameter(torch.empty(shape, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.key, std=self.key.shape[-1] ** -0.5)
        nn.init.zeros_(self.value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``base_layer``'s arguments; what ``run`` returns."""
        return self.run(self.base_layer, self.extend, *args, **kwargs)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, heads, N, d) -> (B, heads, length + N, d)."""
        key, value = (p.to(k.dtype).expand(k.shape[0], -1, -1, -1) for p in (self.key, self.value))
        return torch.cat((key, k), dim=2), torch.cat((value, v), dim=2)

    def extra_repr(self) -> str:
        return f"heads={self.key.shape[0]}, length={self.length}"
