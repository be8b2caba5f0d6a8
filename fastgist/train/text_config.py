"""The settings of ``fastgist finetune-text``: one dataclass, whose fields are the command line's flags."""

# ruff: noqa: RUF009 - _option is dataclasses.field with the command line's words in its metadata

from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastgist.recipes.text import EPOCHS, TextRecipe
from fastgist.train.config import (
    Compared,
    Method,
    MixedPrecision,
    Readout,
    Settings,
    UserError,
    _option,
    check_parts,
)
from fastgist.train.optim import check_schedules

__all__ = ["CompareTextConfig", "PaddingSide", "Problem", "TextConfig"]


class Problem(enum.StrEnum):
    """What the label is."""

    AUTO = "auto"
    CLASSIFICATION = "classification"
    REGRESSION = "regression"


class PaddingSide(enum.StrEnum):
    """Where a batch's shorter texts are filled up."""

    RIGHT = "right"
    LEFT = "left"


@dataclass(frozen=True, kw_only=True)
class TextConfig(Settings, TextRecipe):
    """Everything that decides a text fine-tuning run. What is None is found in the data, or said by ``recipe``."""

    free: ClassVar[tuple[str, ...]] = (
        "output_dir", "resume", "checkpoint_every", "keep_checkpoints", "progress", "device", "seeds", "report_to", "recipe",
    )  # fmt: skip
    by_content: ClassVar[tuple[str, ...]] = ("data",)

    data: str | None = _option(
        None,
        "A csv, tsv, json, jsonl or parquet file, a folder of such (train.csv, val.csv, test.csv), a data set's name on "
        "the Hugging Face hub, or stdlib: docstrings of this Python, by package.",
        "Data",
        argument=True,
    )
    recipe: str | None = _option(
        None, "A named task, such as glue/mrpc: data, columns, splits, metrics and epochs.", "Data"
    )
    subset: str | None = _option(None, "Configuration of a hub data set.", "Data")
    text_column: str | None = _option(None, "Column of the text; found by its type if not given.", "Data")
    pair_column: str | None = _option(
        None, "Column of the second text of a pair; found by its type if neither is given, '' for none.", "Data"
    )
    label_column: str | None = _option(None, "Column of the label; found by its type or name if not given.", "Data")
    problem: Problem | None = _option(
        None, "classification, or regression; auto, the default, takes floating-point labels for regression.", "Data"
    )
    val_name: str | None = _option(
        None,
        "Split to select by; val, valid, validation or dev if not given, '' for a part of the training split.",
        "Data",
    )
    test_name: str | None = _option(None, "Splits to report on, by commas; test if not given, '' for none.", "Data")
    val_split: float = _option(
        0.1, "Share of the training texts held out for selection where there is no val split.", "Data", min=0, max=0.9
    )
    shots: int | None = _option(
        None, "Few-shot: so many training texts of each class, drawn by the seed.", "Data", min=1
    )
    max_length: int | None = _option(
        None, "Tokens a text is cut to; the model's own, 512 at most, if not given.", "Data", min=4
    )
    padding_side: PaddingSide = _option(PaddingSide.RIGHT, "Side of the padding; left is for decoders.", "Data")
    metrics: str | None = _option(
        None,
        "accuracy, f1, matthews, pearson, spearman, by commas; the first selects. accuracy,f1 or pearson,spearman if not "
        "given. They need torchmetrics.",
        "Data",
    )

    model: str = _option(
        "bert-base-uncased",
        "A BERT, RoBERTa or other known sequence classifier: hub name or folder; or stdlib-bert or stdlib-llama, small "
        "ones that are pre-trained here.",
        "Model",
    )
    pretrained: bool = _option(True, "Start from the published weights.", "Model")
    method: Method = _option(Method.LORA, "What is trained beside the head.", "Model")
    gist: bool = _option(True, "Add a gist token and its loss.", "Model")
    gist_length: int = _option(1, "Rows of the gist token; longer ones did worse in the paper.", "Model", min=1)
    gist_readout: Readout = _option(Readout.FIRST, "Which of several rows the gist logits are read from.", "Model")
    rank: int | None = _option(None, "Rank of lora, cp and fact; the method's default if not given.", "Model", min=1)
    bottleneck_dim: int | None = _option(None, "Width of the adapter's bottleneck.", "Model", min=1)
    set: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "A setting of the method, such as targets=q,k,v; may be repeated.", "panel": "Model"},
    )

    output_dir: Path = _option(Path("fastgist-finetune-text"), "Where everything is written.", "Run")
    seeds: str | None = _option(
        None, "Several runs, a folder each, and their mean and deviation: seeds such as 0,1,2 or 0-4.", "Run"
    )
    resume: bool = _option(False, "Continue from the newest complete checkpoint in the output folder.", "Run")
    checkpoint_every: int = _option(0, "Steps between checkpoints beside the one after every epoch.", "Run", min=0)
    keep_checkpoints: int = _option(2, "How many checkpoints to keep.", "Run", min=1)
    device: str | None = _option(None, "cpu, or nothing for what the Trainer finds.", "Run")
    mixed_precision: MixedPrecision = _option(MixedPrecision.NO, "Half precision.", "Run")
    report_to: str = _option("none", "Where the Trainer reports: tensorboard, wandb, ..., by commas.", "Run")
    progress: bool = _option(True, "Show progress bars.", "Run")

    def resolved(self) -> TextConfig:
        """With the recipe's settings where a field is None. Raises UserError for what cannot be a run."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given: dict[str, Any] = _named_recipe(self.recipe) if self.recipe else {}
        filled = dataclasses.replace(self, **{k: v for k, v in given.items() if fields[k] is None})
        if filled.data is None:
            raise UserError("no data: give a file, a folder, a data set's name, stdlib, or --recipe glue/mrpc")
        filled = dataclasses.replace(
            filled, epochs=filled.epochs or EPOCHS, problem=Problem(filled.problem or Problem.AUTO)
        )
        for name, value in fields.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name.replace('_', '-')} must be finite, got {value}")
        check_schedules(filled)
        if filled.lr <= 0:
            raise UserError(f"--lr must be > 0, got {filled.lr}")
        if filled.gist_length < 1:
            raise UserError(f"--gist-length must be >= 1, got {filled.gist_length}")
        if filled.gist_length > 1 and not filled.gist:
            raise UserError(f"--gist-length {filled.gist_length} is for a gist token, and this run has --no-gist")
        check_parts(filled)
        return filled


@dataclass(frozen=True, kw_only=True)
class CompareTextConfig(Compared, TextConfig):
    """Flags of ``fastgist compare-text``: those of a run on texts, and :class:`fastgist.train.config.Compared`'s."""

    output_dir: Path = _option(Path("fastgist-compare-text"), "Where runs, table and figure go.", "Run")


def _named_recipe(name: str) -> dict[str, Any]:
    from fastgist.recipes import glue

    collection, _, task = name.partition("/")
    if collection != "glue" or task not in glue.TASKS:
        raise UserError(f"no recipe named {name!r}: there are {', '.join(f'glue/{task}' for task in glue.TASKS)}")
    return glue.TASKS[task].settings(task)
