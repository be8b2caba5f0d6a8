"""Metrics of text tasks, by torchmetrics."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgist.train.config import UserError

__all__ = ["METRICS", "metric_names", "metrics_function"]

#: Name -> what it is for.
METRICS = {
    "accuracy": "classification", "f1": "classification", "matthews": "classification",
    "pearson": "regression", "spearman": "regression",
}  # fmt: skip


def metric_names(asked: str | None, regression: bool) -> list[str]:
    """The metrics of a run, the selecting one first. Raises UserError for one that does not fit."""
    if asked is None:
        return ["pearson", "spearman"] if regression else ["accuracy", "f1"]
    names = [name for name in asked.split(",") if name]
    problem = "regression" if regression else "classification"
    for name in names:
        if METRICS.get(name) != problem:
            fitting = ", ".join(metric for metric, kind in METRICS.items() if kind == problem)
            raise UserError(f"--metrics {name}: for {problem} there are {fitting}")
    if not names:
        raise UserError("--metrics names no metric")
    return names


def metrics_function(names: list[str], classes: int | None) -> Callable[[Any], dict[str, float]] | None:
    """The Trainer's ``compute_metrics``; None where torchmetrics is not installed.

    ``f1`` is that of class 1 where there are two, as in GLUE, and the mean over classes (macro) otherwise.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        return None

    def compute(prediction: Any) -> dict[str, float]:
        scores = torch.as_tensor(prediction.predictions).float()
        target = torch.as_tensor(prediction.label_ids)
        return {name: float(_FUNCTIONS[name](scores, target, classes)) for name in names}

    return compute


def _accuracy(scores: Tensor, target: Tensor, classes: int) -> Tensor:
    from torchmetrics.functional.classification import multiclass_accuracy

    return multiclass_accuracy(scores, target, num_classes=classes, average="micro")


def _f1(scores: Tensor, target: Tensor, classes: int) -> Tensor:
    from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score

    if classes == 2:
        return binary_f1_score(scores.argmax(-1), target)
    return multiclass_f1_score(scores, target, num_classes=classes, average="macro")


def _matthews(scores: Tensor, target: Tensor, classes: int) -> Tensor:
    from torchmetrics.functional.classification import multiclass_matthews_corrcoef

    return multiclass_matthews_corrcoef(scores, target, num_classes=classes)


def _pearson(scores: Tensor, target: Tensor, classes: None) -> Tensor:
    from torchmetrics.functional.regression import pearson_corrcoef

    return pearson_corrcoef(scores.reshape(-1), target.float().reshape(-1))


def _spearman(scores: Tensor, target: Tensor, classes: None) -> Tensor:
    from torchmetrics.functional.regression import spearman_corrcoef

    return spearman_corrcoef(scores.reshape(-1), target.float().reshape(-1))


_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman,
}  # fmt: skip
