"""Prompt tuning (VPT, arXiv 2203.12119; of language models arXiv 2104.08691): trained rows in the sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn._checks import check_bool, check_dropout, check_module, check_place, check_positive

__all__ = ["PromptedBlock"]


class PromptedBlock(nn.Module):
    """A transformer block that first puts its prompts into the sequence, or in the place of the prompts before it.

    Args:
        base_layer: the frozen block, (B, N, D) -> (B, N, D); further arguments of a call go to it.
        dim: D.
        length: how many prompts.
        insert: True puts them in at ``index`` (the first block), False replaces the rows there (later blocks: VPT-deep).
        after: they go into what comes out of ``base_layer``, whose arguments may be any, such as the last layer of the
            embeddings.
        dropout: rate on the prompts, in training.
        device, dtype: of ``prompt`` (length, dim), drawn from U(-b, b) with b = sqrt(3 / dim): the paper's bound at ViT-B/16.
    """

    #: Where the prompts stand: after the class, register and gist tokens. None: in each sample elsewhere, which a call says
    #: (``prompt_place``); those of the first block have been put in before then. Set by the model's family.
    index: int | None = 1

    def __init__(
        self,
        base_layer: nn.Module,
        dim: int,
        length: int = 10,
        *,
        insert: bool = True,
        after: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_module("PromptedBlock", "base_layer", base_layer)
        if isinstance(base_layer, PromptedBlock):
            raise ValueError("PromptedBlock: base_layer has prompts already")
        self.base_layer = base_layer
        self.dim = check_positive("PromptedBlock", "dim", dim)
        self.length = check_positive("PromptedBlock", "length", length)
        self.insert = check_bool("PromptedBlock", "insert", insert)
        self.after = check_bool("PromptedBlock", "after", after)
        self.dropout = nn.Dropout(check_dropout("PromptedBlock", dropout))
        self.prompt = nn.Parameter(torch.empty(length, dim, **check_place("PromptedBlock", device, dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = math.sqrt(3.0 / self.dim)
        nn.init.uniform_(self.prompt, -bound, bound)

    def forward(self, x: Tensor, *args: Any, prompt_place: Tensor | None = None, **kwargs: Any) -> Tensor:
        """prompt_place: (B, 1), where ``index`` is None; None: no prompts are in this call's rows (a cache holds them)."""
        if self.index is None:
            if prompt_place is not None and not self.insert:
                x = self.replaced(x, prompt_place)
            return self.base_layer(x, *args, **kwargs)
        if self.after:
            return self.place(self.base_layer(x, *args, **kwargs))
        return self.base_layer(self.place(x), *args, **kwargs)

    def place(self, x: Tensor) -> Tensor:
        """x (B, N, D) with the prompts at ``index``: (B, N + length, D) where they are new."""
        assert self.index is not None
        rest = self.index if self.insert else self.index + self.length
        return torch.cat((x[:, : self.index], self.rows(x), x[:, rest:]), dim=1)

    def replaced(self, x: Tensor, first: Tensor) -> Tensor:
        """x (B, N, D) with the prompts in the place of each sample's ``length`` rows from ``first`` (B, 1) on."""
        rows = self.rows(x)
        at = first + torch.arange(self.length, device=first.device)
        return x.scatter(1, at[..., None].expand_as(rows), rows)

    def rows(self, x: Tensor) -> Tensor:
        """(B, length, D) for x (B, N, D), with dropout."""
        return self.dropout(self.prompt.to(x.dtype).expand(x.shape[0], -1, -1))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, length={self.length}, insert={self.insert}, index={self.index}"
