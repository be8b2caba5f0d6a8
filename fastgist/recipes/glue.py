"""The nine tasks of GLUE (arXiv 1804.07461): columns, metrics, and which split stands for the test split.

The labels of GLUE's test splits are not public, so what is reported is of the validation split, as everywhere. Nothing
is selected on it: the epoch is selected on a tenth of the training texts, held out (``val_split``). The first metric of
a task is the one that selects.

``fastgist finetune-text --recipe glue/mrpc`` runs one where the hub can be reached; ``config("mrpc")`` is the same from
Python. The learning rate, batch and lengths are the command's defaults; the epochs are fewer where there are many texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgist.train.text_config import TextConfig

__all__ = ["DATA", "TASKS", "GlueTask", "config"]

#: The data set on the Hugging Face hub; a task is a subset of it.
DATA = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task. ``labels`` is the number of classes, 1 for the one that is a regression."""

    text: str
    pair: str | None
    labels: int
    metrics: tuple[str, ...]
    epochs: int
    test: tuple[str, ...] = ("validation",)

    def settings(self, name: str) -> dict[str, Any]:
        """The fields of a TextConfig that the task decides."""
        return {
            "data": DATA, "subset": name, "text_column": self.text, "pair_column": self.pair or "", "label_column": "label",
            "problem": "regression" if self.labels == 1 else "classification", "metrics": ",".join(self.metrics),
            "val_name": "", "test_name": ",".join(self.test), "epochs": self.epochs,
        }  # fmt: skip


TASKS = {
    "cola": GlueTask("sentence", None, 2, ("matthews",), 20),
    "sst2": GlueTask("sentence", None, 2, ("accuracy",), 5),
    "mrpc": GlueTask("sentence1", "sentence2", 2, ("f1", "accuracy"), 30),
    "qqp": GlueTask("question1", "question2", 2, ("f1", "accuracy"), 3),
    "stsb": GlueTask("sentence1", "sentence2", 1, ("pearson", "spearman"), 30),
    "mnli": GlueTask("premise", "hypothesis", 3, ("accuracy",), 3, ("validation_matched", "validation_mismatched")),
    "qnli": GlueTask("question", "sentence", 2, ("accuracy",), 5),
    "rte": GlueTask("sentence1", "sentence2", 2, ("accuracy",), 30),
    "wnli": GlueTask("sentence1", "sentence2", 2, ("accuracy",), 30),
}


def config(name: str, **overrides: Any) -> TextConfig:
    """The configuration of a GLUE task, any field replaced. Raises ValueError for a name that is not a task."""
    from fastgist.train.text_config import TextConfig

    if name not in TASKS:
        raise ValueError(f"glue.config: expected one of {', '.join(TASKS)}, got {name!r}")
    return TextConfig(**TASKS[name].settings(name) | overrides)
