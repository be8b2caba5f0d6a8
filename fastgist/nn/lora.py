"""LoRA (arXiv 2106.09685) on the same fused operation as CP: ``y = x W^T + b + (alpha / r) (x A) B^T``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fastgist.nn._checks import check_dropout, check_number, check_one_of, check_place, check_positive
from fastgist.nn._tuner import Factors, TunerLinear, factory, uniform_fan_in_

__all__ = ["LoRALinear"]

INITS = ("identity", "paper")


class LoRALinear(TunerLinear):
    """A linear layer with a rank-r update, scaled by alpha / r.

    A fused projection (qkv: one D -> 3D layer) can be adapted in chosen parts, each with factors of its own, still in
    one operation: with ``folds=3, parts=(0, 2)``, ``u`` holds [A_q, A_v] (K, 2r), ``v`` [B_q, B_v] (D, 2r), and a
    constant mask of ones and zeros (3, 2r) in the gain's place lets each part see its own block only.

    Args:
        base_layer: the frozen linear layer (K -> N).
        rank: r of each adapted part.
        alpha: the update is scaled by alpha / rank.
        dropout: rate on ``x A`` in training (the original drops x itself; on the low-rank side it costs r numbers a
            row).
        folds: into how many equal parts the outputs fall.
        parts: which of them are adapted; None for all.
        init: "identity": A as nn.Linear would draw it; "paper": A normal with deviation 1 / rank. B = 0 in both.
        device, dtype: of the new parameters; default base_layer's device, and float32 for half-precision layers.

    Raises:
        ValueError: rank, alpha, dropout, folds or parts out of range, or base_layer wrapped already.
    """

    mask: torch.Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        *,
        folds: int = 1,
        parts: Sequence[int] | None = None,
        init: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base_layer)
        self.rank = check_positive("LoRALinear", "rank", rank)
        check_number("LoRALinear", "alpha", alpha, above=0.0)
        check_one_of("LoRALinear", "init", init, INITS)
        self.folds = check_positive("LoRALinear", "folds", folds)
        if self.out_features % folds:
            raise ValueError(f"LoRALinear: folds must divide {self.out_features} (out_features), got {folds}")
        given = tuple(range(folds)) if parts is None else tuple(parts) if isinstance(parts, Iterable) else (None,)
        if any(isinstance(part, bool) or not isinstance(part, int) for part in given):
            raise TypeError(f"LoRALinear: parts must be None or a tuple of ints, got {parts!r}")
        self.parts: tuple[int, ...] = tuple(sorted(given))
        if not self.parts or len(set(self.parts)) != len(self.parts) or not set(self.parts) <= set(range(folds)):
            raise ValueError(f"LoRALinear: parts must be different numbers in 0..{folds - 1}, got {parts}")
        self.alpha = alpha
        self.scale = alpha / rank
        self.dropout_p = check_dropout("LoRALinear", dropout)
        self.init = init
        kwargs = factory(base_layer, **check_place("LoRALinear", device, dtype))
        width = rank * len(self.parts)
        self.u = nn.Parameter(torch.empty(self.in_features, width, **kwargs))
        self.v = nn.Parameter(torch.empty(self.out_features // folds, width, **kwargs))
        mask = None
        if folds > 1:
            mask = torch.zeros(folds, width, **kwargs)
            for block, part in enumerate(self.parts):
                mask[part, block * rank : (block + 1) * rank] = 1.0
        self.register_buffer("mask", mask, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == "identity":
            uniform_fan_in_(self.u, self.in_features)
        else:
            nn.init.normal_(self.u, std=1.0 / self.rank)
        nn.init.zeros_(self.v)

    def get_factors(self) -> Factors:
        return Factors(self.u, self.v, self.mask)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}, dropout={self.dropout_p}"
        return text if self.folds == 1 else f"{text}, parts={self.parts} of {self.folds}"
