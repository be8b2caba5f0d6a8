"""The loss that a gist model computes of its own outputs, where it is given labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from fastgist.nn import GistLoss
from fastgist.nn._checks import check_integer

__all__ = ["WITHOUT_GIST", "default_loss", "divided", "fuses", "hooked_everywhere", "loss_of", "shaped"]

#: Head and loss are one operation from this many classes, where the logits and hidden states of both heads take more bytes
#: than the operation has in hand by itself. Measured on a CPU (float32, a head of 768, forward and backward): from there on
#: it takes less memory, 0.16 of it at 512 rows and 21,843 classes, in 0.83 to 1.05 of the time. DESIGN.md has the numbers.
FUSED_CLASSES = 4096
FUSED_BYTES = 2**25

#: What is said where transformers' Trainer takes a loss that does not read the gist logits.
WITHOUT_GIST = (
    "a loss was taken of a gist model's logits that does not read its gist logits, so the gist token is trained by nothing "
    "of its own: with label_smoothing_factor transformers' Trainer takes such a loss (set model.loss = "
    "GistLoss(label_smoothing=...) instead); a compute_loss_func must read output.gist_logits (gist_loss_func() does)"
)

_SINGLE, _MULTI, _REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def fuses(rows: int, width: int, classes: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a gist model takes its head (width -> classes, of ``dtype``) and its loss in one operation for a batch of
    ``rows``, unless it is told: :func:`fastgist.functional.gist_linear_loss`, which makes no whole logits."""
    if (
        dtype.itemsize < 4 and rows < width
    ):  # its gradient takes a second pass: memory for time, which is the user's to say
        return False
    return classes >= FUSED_CLASSES and 2 * rows * (classes + width) * dtype.itemsize > FUSED_BYTES


def hooked_everywhere() -> bool:
    """Whether torch has hooks that run at every module's forward or backward."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(_torch_module, f"_global_{kind}", None) for kind in kinds)


def default_loss(config: Any, labels: Tensor, logits_width: int | None) -> GistLoss:
    """The paper's loss, of the kind of problem that transformers' classifiers read out of the same things.

    ``config.problem_type`` if it is set; else regression for one output, several labels for floating-point labels. A
    model without such a configuration (timm's) is a classifier of single labels, whose floating-point labels are soft.
    """
    problem = getattr(config, "problem_type", None)
    if problem is None:
        problem = _SINGLE
        if hasattr(config, "problem_type"):
            if logits_width == 1:
                problem = _REGRESSION
            elif labels.is_floating_point():
                problem = _MULTI
    return GistLoss(problem_type=problem)


def shaped(loss: nn.Module, labels: Tensor, rows: int, width: int) -> Tensor:
    """``labels`` as ``loss`` takes them: (B,) classes, or (B, C); from (B, 1), or (B,) numbers for one output."""
    regression = getattr(loss, "problem_type", _SINGLE) == _REGRESSION
    if regression and labels.shape == (rows,) and width == 1:
        return labels[:, None]
    if not regression and labels.shape == (rows, 1) and not labels.is_floating_point():
        return labels[:, 0]
    return labels


def loss_of(loss: nn.Module, logits: Tensor, gist_logits: Tensor | None, labels: Tensor) -> Tensor:
    """``loss`` of logits (B, C), with gist logits or without, at labels in any form that :func:`shaped` knows."""
    labels = shaped(loss, labels, logits.shape[0], logits.shape[-1])
    if gist_logits is None:
        return loss({"logits": logits}, labels)
    return loss(logits, gist_logits, labels)


def divided(loss: nn.Module, value: Tensor, labels: Tensor, number: Tensor | int) -> Tensor:
    """``loss``'s ``value`` for a batch as its share of a mean over ``number`` labels, of several batches.

    ``number`` counts elements of the labels, as transformers' Trainer counts them (without those that are -100), over
    all batches that are accumulated into one step; a row with C labels counts C times.
    """
    if not isinstance(number, Tensor):
        number = check_integer("GistModel", "num_items_in_batch", number)
    rows = labels.shape[0]
    number = number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)  # a step of ignored labels alone: 0
    reduction = getattr(loss, "reduction", "mean")
    if reduction == "none":
        value = value.sum()
    elif reduction == "mean":
        kept: Tensor | int = rows
        if not labels.is_floating_point() and getattr(loss, "problem_type", _SINGLE) == _SINGLE:
            kept = (labels != getattr(loss, "ignore_index", -100)).sum()
            return value * (kept / number)
        value = value * kept
    each = labels.numel() // max(rows, 1)
    return value * (each / number if isinstance(number, int) else each / number.to(torch.float32))
