"""The GIST objective on hidden states: a shared linear head and :mod:`fastgist.reference.gist_loss` on its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgist.reference import gist_loss as _loss

__all__ = ["gist_linear_loss"]


def gist_linear_loss(
    hidden: Tensor, gist_hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options
) -> Tensor:
    """gist_loss(hidden W^T + b, gist_hidden W^T + b, target): hidden (..., H), weight (V, H), bias (V,) or None."""
    linear = torch.nn.functional.linear
    return _loss.gist_loss(linear(hidden, weight, bias), linear(gist_hidden, weight, bias), target, **options)
