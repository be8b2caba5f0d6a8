"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021): norm, down, activation, up, residual in one operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgist import functional
from fastgist.nn._checks import (
    check_bool,
    check_callable,
    check_dropout,
    check_module,
    check_number,
    check_one_of,
    check_place,
    check_positive,
)
from fastgist.nn._tuner import autocast_enabled, uniform_fan_in_

__all__ = ["AdaptedBlock", "AdaptedLayer", "Adapter", "BlockForward"]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "identity")
INITS = ("identity", "paper")
PLACEMENTS = ("sequential", "parallel")
BRANCHES = ("attention", "mlp")
#: run(block, add, x, *args, **kwargs): a residual block's forward in which every ``x + branch`` is ``add(kind, x, branch)``,
#: kind being one of BRANCHES.
BlockForward = Callable[..., Tensor]


class Adapter(nn.Module):
    """``y = residual + scale * (drop(act(a D^T + b_d)) U^T + b_u)``, with D: dim -> bottleneck_dim and a = x or LayerNorm(x).

    Args:
        dim: width of x.
        bottleneck_dim: width inside.
        activation: "gelu", "gelu_tanh", "relu", "silu" or "identity".
        scale: factor on the bottleneck's output.
        init: "identity": D as nn.Linear draws it, U and both biases zero: a fresh adapter returns its residual.
            "paper" (GIST, arXiv 2312.07255): both weights truncated normal with deviation 0.02, zero biases.
        norm: whether a LayerNorm of the adapter's own (``norm_weight``, ``norm_bias``: ones and zeros at the start) stands in
            front of D, as in AdaptFormer (its "layernorm option" "in"). The residual is x itself.
        norm_eps: added to the variance there.
        dropout: share of hidden units that is zeroed in training, AdaptFormer's place for it (0.1 there).
        device, dtype: of the parameters.

    Raises:
        ValueError: a size that is not positive, an unknown activation or init, a dropout outside [0, 1).
        TypeError: a norm that is not True or False.
    """

    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        bottleneck_dim: int,
        activation: str = "gelu",
        scale: float = 1.0,
        *,
        init: str = "identity",
        norm: bool = False,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_positive("Adapter", "dim", dim)
        self.bottleneck_dim = check_positive("Adapter", "bottleneck_dim", bottleneck_dim)
        check_one_of("Adapter", "activation", activation, ACTIVATIONS)
        check_one_of("Adapter", "init", init, INITS)
        check_bool("Adapter", "norm", norm)
        self.activation, self.scale, self.init = activation, check_number("Adapter", "scale", scale), init
        self.norm_eps = check_number("Adapter", "norm_eps", norm_eps, above=0.0)
        self.dropout = check_dropout("Adapter", dropout)
        kwargs = check_place("Adapter", device, dtype)
        self.down_weight = nn.Parameter(torch.empty(bottleneck_dim, dim, **kwargs))
        self.down_bias = nn.Parameter(torch.empty(bottleneck_dim, **kwargs))
        self.up_weight = nn.Parameter(torch.empty(dim, bottleneck_dim, **kwargs))
        self.up_bias = nn.Parameter(torch.empty(dim, **kwargs))
        for name in ("norm_weight", "norm_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(dim, **kwargs)) if norm else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "identity":
            uniform_fan_in_(self.down_weight, self.dim)
            nn.init.zeros_(self.up_weight)
        else:
            nn.init.trunc_normal_(self.down_weight, std=0.02)
            nn.init.trunc_normal_(self.up_weight, std=0.02)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def forward(self, x: Tensor, residual: Tensor | tuple[Tensor, Tensor] | bool | None = None) -> Tensor:
        """x: (..., dim). residual: None for x itself, one tensor of x's shape or two in a tuple, or False for none. Returns
        (..., dim). Parameters of another dtype than x's take x's for the call (autocast's under autocast)."""
        weights: list[Tensor] = [self.down_weight, self.down_bias, self.up_weight, self.up_bias]
        if self.norm_weight is not None and self.norm_bias is not None:
            weights += [self.norm_weight, self.norm_bias]
        in_kernel = x.dtype.itemsize == 2 and weights[0].dtype == torch.float32  # float32 adapters in a half model
        if x.dtype != weights[0].dtype and not in_kernel and not autocast_enabled(x.device):
            weights = [w.to(x.dtype) for w in weights]
        down_weight, down_bias, up_weight, up_bias, *norm = weights
        return functional.adapter(
            x,
            down_weight,
            down_bias,
            up_weight,
            up_bias,
            activation=self.activation,
            scale=self.scale,
            residual=residual,
            norm=(norm[0], norm[1], self.norm_eps) if norm else None,
            dropout_p=self.dropout,
            training=self.training,
        )

    def extra_repr(self) -> str:
        norm = "" if self.norm_weight is None else ", norm=True"
        dropout = f", dropout={self.dropout}" if self.dropout else ""
        return (
            f"{self.dim} -> {self.bottleneck_dim} -> {self.dim}, activation={self.activation!r}, scale={self.scale}"
            f"{norm}{dropout}"
        )


def _check_adapter(owner: str, adapter: object) -> None:
    if not isinstance(adapter, Adapter):
        raise TypeError(f"{owner}: adapter must be an Adapter, got {type(adapter).__name__}")


class AdaptedLayer(nn.Module):
    """A sublayer with an adapter: after it (``A(f(x))``, A with its own residual) or beside it (``f(x) + A(x)``).

    Args:
        base_layer: the frozen sublayer f, (..., dim) -> (..., dim); further arguments of a call go to it.
        adapter: the :class:`Adapter`.
        placement: "sequential" or "parallel".
    """

    def __init__(self, base_layer: nn.Module, adapter: Adapter, placement: str = "sequential") -> None:
        super().__init__()
        check_module("AdaptedLayer", "base_layer", base_layer)
        _check_adapter("AdaptedLayer", adapter)
        if isinstance(base_layer, AdaptedLayer):
            raise ValueError("AdaptedLayer: base_layer has an adapter already")
        check_one_of("AdaptedLayer", "placement", placement, PLACEMENTS)
        self.base_layer = base_layer
        self.adapter = adapter
        self.placement = placement

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.combine(x, self.base_layer(x, *args, **kwargs))

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output from its input x and the sublayer's output y = f(x), row by row."""
        return self.adapter(y) if self.placement == "sequential" else self.adapter(x, residual=y)

    def reset_parameters(self) -> None:
        self.adapter.reset_parameters()

    def extra_repr(self) -> str:
        return f"placement={self.placement!r}"


class AdaptedBlock(nn.Module):
    """A transformer block with one adapter beside its branches, on their un-normed input: ``x + f(norm(x)) + A(x)``.

    Beside both branches it is GIST's shared adapter (arXiv 2312.07255), beside the MLP AdaptFormer (arXiv 2205.13535).

    Args:
        base_layer: the frozen block.
        adapter: the :class:`Adapter`, used once a branch.
        run: the block's forward with its additions left open; see ``BlockForward``. A function of a module (for pickle).
        branches: "attention", "mlp" or both.
    """

    def __init__(
        self, base_layer: nn.Module, adapter: Adapter, run: BlockForward, branches: Sequence[str] = BRANCHES
    ) -> None:
        super().__init__()
        check_module("AdaptedBlock", "base_layer", base_layer)
        _check_adapter("AdaptedBlock", adapter)
        if isinstance(base_layer, AdaptedBlock):
            raise ValueError("AdaptedBlock: base_layer has an adapter already")
        if not branches or not set(branches) <= set(BRANCHES):
            raise ValueError(f"AdaptedBlock: branches must be some of {', '.join(BRANCHES)}, got {tuple(branches)}")
        check_callable("AdaptedBlock", "run", run)
        self.base_layer = base_layer
        self.adapter = adapter
        self.run = run
        self.branches = tuple(branches)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.run(self.base_layer, self.add, x, *args, **kwargs)

    def add(self, kind: str, x: Tensor, branch: Tensor) -> Tensor:
        """x + branch, and the adapter's output for x where the branch has one."""
        return self.adapter(x, residual=(x, branch)) if kind in self.branches else x + branch

    def reset_parameters(self) -> None:
        self.adapter.reset_parameters()

    def extra_repr(self) -> str:
        return f"branches={self.branches}"
