"""Metrics of an evaluation by torchmetrics, over all processes, every image counted once.

Accuracy and loss are not from here: they decide which epoch is kept, and are counted exactly by the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastgist.train.config import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torchmetrics import Metric

__all__ = ["METRICS", "Metrics", "parse_metrics"]


def _classification(name: str, **options: Any) -> Callable[[int], Metric]:
    def build(classes: int) -> Metric:
        import torchmetrics.classification as kinds

        return getattr(kinds, f"Multiclass{name}")(num_classes=classes, sync_on_compute=False, **options)

    return build


def _top(k: int) -> Callable[[int], Metric]:
    def build(classes: int) -> Metric:
        if classes < k:
            raise UserError(f"--metrics top{k}: there are only {classes} classes")
        return _classification("Accuracy", average="micro", top_k=k)(classes)

    return build


#: Beside "accuracy" (top-1) and the cross-entropy, which are always there. macro-recall is the balanced accuracy.
METRICS: dict[str, Callable[[int], Metric]] = {
    "top5": _top(5),
    "macro-f1": _classification("F1Score", average="macro"),
    "macro-precision": _classification("Precision", average="macro"),
    "macro-recall": _classification("Recall", average="macro"),
    "kappa": _classification("CohenKappa"),
    "mcc": _classification("MatthewsCorrCoef"),
    "ece": _classification("CalibrationError", n_bins=15),
}


def parse_metrics(words: str) -> list[str]:
    """The names in ``words`` beside accuracy. UserError for an unknown one, or torchmetrics absent."""
    names = [word.strip() for word in words.split(",")]
    for name in names:
        if name not in METRICS and name != "accuracy":
            raise UserError(f"--metrics: no metric is called {name!r}; there are accuracy, {', '.join(METRICS)}")
    chosen = [name for name in dict.fromkeys(names) if name != "accuracy"]
    if chosen:
        try:
            import torchmetrics  # noqa: F401
        except ImportError:
            raise UserError(f"--metrics {words} needs torchmetrics: pip install 'fastgist[train]'") from None
    return chosen


class Metrics:
    """The metrics of one run, by name."""

    def __init__(self, names: list[str], classes: int) -> None:
        self.classes = classes
        self.metrics = {name: METRICS[name](classes) for name in names}

    def of(self, logits: Tensor, labels: Tensor, accelerator: Accelerator) -> dict[str, float]:
        """name -> value over the images of all processes; logits (M, C) and labels (M,) are this process's own.

        M may be 0 on some process. Every process must call this, and gets the same numbers.
        """
        if not self.metrics:
            return {}
        if accelerator.num_processes > 1:
            logits = logits.reshape(len(labels), self.classes)
            logits, labels = _everyones(logits, accelerator), _everyones(labels, accelerator)
            counted = labels >= 0
            logits, labels = logits[counted], labels[counted]
        found: dict[str, float] = {}
        for name, metric in self.metrics.items():
            metric.reset()
            metric.update(logits.softmax(-1), labels)
            found[name.replace("-", "_")] = float(metric.compute())
        return found


def _everyones(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all processes, on the CPU; those with fewer are filled up with -1."""
    padded = accelerator.pad_across_processes(tensor.to(accelerator.device), dim=0, pad_index=-1)
    return accelerator.gather(padded).cpu()
