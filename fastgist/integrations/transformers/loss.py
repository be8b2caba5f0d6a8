"""The GIST objective as transformers' Trainer takes one: ``Trainer(..., compute_loss_func=gist_loss_func())``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastgist.gist import divided, loss_of
from fastgist.nn import GistLoss

__all__ = ["gist_loss_func"]


class _LossFunc:
    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if not isinstance(outputs, Mapping) or "logits" not in outputs:
            raise TypeError(
                f"gist_loss_func: outputs must be a gist model's, with 'logits', got {type(outputs).__name__}"
            )
        value = loss_of(self.loss, outputs["logits"], outputs.get("gist_logits"), labels)
        return value if num_items_in_batch is None else divided(self.loss, value, labels, num_items_in_batch)


def gist_loss_func(loss: nn.Module | None = None) -> _LossFunc:
    """A function (outputs, labels, num_items_in_batch) -> loss for Trainer's ``compute_loss_func``.

    Where ``num_items_in_batch`` is given the loss is a sum divided by it, so that batches which are accumulated into one
    step weigh as one batch would. A gist model needs none of this (it computes :attr:`fastgist.GistModel.loss` itself).

    Args:
        loss: a :class:`fastgist.nn.GistLoss`; default the paper's. The kind of problem is the loss's own.
    """
    return _LossFunc(GistLoss() if loss is None else loss)
