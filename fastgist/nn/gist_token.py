"""The gist token of GIST (arXiv 2312.07255): one trained row that gathers what the task needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgist.nn._checks import check_dropout, check_place, check_positive

__all__ = ["GistToken"]


class GistToken(nn.Module):
    """A trainable token, ``token`` (1, length, dim), drawn from U(-0.5, 0.5), with dropout in training.

    Args:
        dim: the model's width.
        length: how many tokens; longer ones did worse in the paper.
        dropout: rate on the token, a mask of its own for each sample.
        device, dtype: of the parameter.
    """

    def __init__(
        self,
        dim: int,
        length: int = 1,
        dropout: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = check_positive("GistToken", "dim", dim)
        self.length = check_positive("GistToken", "length", length)
        self.dropout = nn.Dropout(check_dropout("GistToken", dropout))
        self.token = nn.Parameter(torch.empty(1, length, dim, **check_place("GistToken", device, dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.token, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The token for each row of a batch ``x`` (B, ...): (B, length, dim) in x's dtype."""
        return self.dropout(self.token.to(x.dtype).expand(x.shape[0], -1, -1))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, length={self.length}"
