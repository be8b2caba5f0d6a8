"""The settings of ``fastgist finetune``: one dataclass, whose fields are the command line's flags."""

# ruff: noqa: RUF009 - _option is dataclasses.field with the command line's words in its metadata

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fastgist.recipes import Recipe

__all__ = [
    "CompareConfig",
    "Demo",
    "DemoConfig",
    "FinetuneConfig",
    "Method",
    "MixedPrecision",
    "Readout",
    "Settings",
    "UserError",
]


class UserError(Exception):
    """Something the user can put right: the command line prints it as one line and exits with 2."""


def check_parts(config: Any) -> None:
    """UserError where a run without a gist token is given numbers for one, or a token of one row a mean to read."""
    tokens = [name for name in ("lr_gist", "wd_gist") if getattr(config, name) is not None]
    if tokens and not config.gist:
        raise UserError(f"--{tokens[0].replace('_', '-')} is for a gist token, and this run has --no-gist")
    if config.gist_length == 1 and config.gist_readout is Readout.MEAN:
        raise UserError("--gist-readout mean is for --gist-length 2 and more")


class Method(enum.StrEnum):
    """What is trained beside the head."""

    LINEAR_PROBE = "linear-probe"
    ADAPTER = "adapter"
    LORA = "lora"
    CP = "cp"
    FACT = "fact"
    SSF = "ssf"
    BITFIT = "bitfit"
    PROMPT = "prompt"
    PREFIX = "prefix"
    FULL = "full"


class Readout(enum.StrEnum):
    """Where the gist logits are read when the gist token has several rows."""

    FIRST = "first"
    MEAN = "mean"


class MixedPrecision(enum.StrEnum):
    """The dtype of matrix products; parameters stay float32."""

    NO = "no"
    BF16 = "bf16"
    FP16 = "fp16"


def _option(default, help: str, panel: str, **extra):
    return field(default=default, metadata={"help": help, "panel": panel, **extra})


class Settings:
    """What the dataclasses of fine-tuning runs share: which of their fields make a run what it is."""

    #: Fields that say where a run goes and how it is shown, and what stands for others.
    free: ClassVar[tuple[str, ...]]
    #: Fields for which what they lead to is compared, when a run is resumed.
    by_content: ClassVar[tuple[str, ...]]

    def decisive(self) -> list[str]:
        """The settings that decide what comes out."""
        return [f.name for f in dataclasses.fields(self) if f.name not in self.free]  # type: ignore[arg-type]

    def trajectory(self) -> dict[str, object]:
        """The settings that a resumed run must share with the run it continues, as JSON values."""
        names = [name for name in self.decisive() if name not in self.by_content]
        return {f"--{name.replace('_', '-')}": _plain(getattr(self, name)) for name in names}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Settings, Recipe):
    """Everything that decides a fine-tuning run. The recipe's fields default to the GIST paper's."""

    free: ClassVar[tuple[str, ...]] = (
        "output_dir", "resume", "checkpoint_every", "keep_checkpoints", "progress", "workers", "verify", "device", "seeds",
        "report_to",
    )  # fmt: skip
    by_content: ClassVar[tuple[str, ...]] = ("data", "checkpoint", "batch_size", "metrics")

    data: str = _option(
        ...,
        "A folder (train/ val/ test/ of class folders, or class folders alone), a folder of parquet or WebDataset tar "
        "files, or a data set's name on the Hugging Face hub.",
        "Data",
        argument=True,
    )
    val_split: float = _option(
        0.2, "Share of the training images held out for selection where there is no val split.", "Data", min=0, max=0.9
    )
    splits: str | None = _option(
        None,
        "Which of the data's splits are which, such as train=train,test=validation; by their names if not given.",
        "Data",
    )
    shots: int | None = _option(
        None, "Few-shot: so many training images of each class, drawn by the seed.", "Data", min=1
    )
    train_images: int | None = _option(None, "So many training images in all, drawn by the seed.", "Data", min=1)
    val_images: int | None = _option(
        None, "So many images for selection, drawn by the seed from what the training images leave.", "Data", min=1
    )
    subset: str | None = _option(None, "Configuration of a hub data set.", "Data")
    image_column: str | None = _option(None, "Image column of a hub data set; found by its type if not given.", "Data")
    label_column: str | None = _option(None, "Label column of a hub data set; found by its type if not given.", "Data")
    skip_unreadable: bool = _option(False, "Leave unreadable images out instead of stopping.", "Data")
    verify: bool = _option(True, "Decode every image once before training starts.", "Data")
    augment: bool = _option(True, "timm's random crop, flip and colour jitter while training.", "Data")
    workers: int = _option(2, "Processes that load images, for each training process.", "Data", min=0)

    model: str = _option("vit_base_patch16_224", "Any Vision Transformer of timm.", "Model")
    pretrained: bool = _option(True, "Start from timm's published weights.", "Model")
    checkpoint: Path | None = _option(None, "Start from this safetensors file instead.", "Model")
    image_size: int | None = _option(None, "Pixels a side; the model's own if not given.", "Model", min=1)
    method: Method = _option(Method.ADAPTER, "What is trained beside the head.", "Model")
    gist: bool = _option(True, "Add a gist token and its loss.", "Model")
    gist_length: int = _option(1, "Rows of the gist token; longer ones did worse in the paper.", "Model", min=1)
    gist_readout: Readout = _option(Readout.FIRST, "Which of several rows the gist logits are read from.", "Model")
    rank: int | None = _option(None, "Rank of lora, cp and fact; the method's default if not given.", "Model", min=1)
    bottleneck_dim: int | None = _option(None, "Width of the adapter's bottleneck.", "Model", min=1)
    set: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "A setting of the method, such as placement=shared or deep=true; may be repeated.",
            "panel": "Model",
        },
    )

    output_dir: Path = _option(Path("fastgist-finetune"), "Where everything is written.", "Run")
    seeds: str | None = _option(
        None, "Several runs, a folder each, and their mean and deviation: seeds such as 0,1,2 or 0-4.", "Run"
    )
    metrics: str = _option(
        "accuracy", "Metrics of the val and test images, by commas; any unknown name lists them.", "Run"
    )
    report_to: str = _option("none", "Trackers, by commas: tensorboard, wandb, trackio, or none.", "Run")
    resume: bool = _option(False, "Continue from the newest complete checkpoint in the output folder.", "Run")
    checkpoint_every: int = _option(0, "Steps between checkpoints; 0 writes one after every epoch.", "Run", min=0)
    keep_checkpoints: int = _option(2, "How many checkpoints to keep.", "Run", min=1)
    device: str | None = _option(None, "cpu, or nothing for what accelerate finds.", "Run")
    mixed_precision: MixedPrecision | None = _option(None, "Half precision; accelerate's setting if not given.", "Run")
    progress: bool = _option(True, "Show progress bars.", "Run")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The flags by which a run becomes a comparison: each method with and without a gist token, over seeds."""

    not_flags: ClassVar[tuple[str, ...]] = ("method", "gist", "seed", "rank", "bottleneck_dim", "resume", "report_to")

    methods: str = _option("adapter,lora", "Methods to compare, by commas: the names of finetune --method.", "Compare")
    seeds: str | None = _option("0-4", "Seeds that all methods share, such as 0,1,2 or 0-9.", "Compare")
    method_lr: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "A method's own learning rate, such as lora=3e-3; may be repeated.", "panel": "Compare"},
    )
    set: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "A setting of one method, such as lora:rank=4; may be repeated.", "panel": "Compare"},
    )
    confidence: float = _option(0.95, "Of the intervals.", "Compare", min=0.5, max=0.999)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Compared, FinetuneConfig):
    """Flags of ``fastgist compare``: those of a run on images, and :class:`Compared`'s."""

    data: str = _option(
        ..., "digits (offline: the demo's small ViT), or images as for finetune.", "Data", argument=True
    )
    output_dir: Path = _option(Path("fastgist-compare"), "Where runs, table and figure go.", "Run")

    @classmethod
    def of(cls, **given: Any) -> CompareConfig:
        """From what was given; for ``digits`` the demo's numbers stand beneath it.

        Raises:
            UserError: a setting that digits do not have.
        """
        if given.get("data") != "digits":
            return cls(**given)
        from fastgist.recipes import digits

        foreign = set(given) & set(digits.NOT_FOR_DIGITS)
        if foreign:
            raise UserError(f"--{min(foreign).replace('_', '-')} is for images, not for digits")
        methods = [name.strip() for name in given.get("methods", cls.methods).split(",")]
        return cls(**{**digits.compared(methods), **given})


class Format(enum.StrEnum):
    """What an exported model is written as."""

    TORCH = "torch"
    ONNX = "onnx"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Flags of ``fastgist export``."""

    adapter: Path = _option(..., "A run's folder, or one that save_adapter wrote.", "Export", argument=True)
    output: Path | None = _option(None, "The file; model.pt2 or model.onnx beside the adapter if not given.", "Export")
    format: Format = _option(Format.TORCH, "torch.export's .pt2, or ONNX.", "Export")
    overwrite: bool = _option(False, "Replace the file if it is there.", "Export")
    model: str | None = _option(None, "The timm model it was trained on (images); a run's own if not given.", "Model")
    pretrained: bool | None = _option(None, "With the published weights; as the run had it if not given.", "Model")
    checkpoint: Path | None = _option(None, "With the weights of this safetensors file instead.", "Model")
    image_size: int | None = _option(None, "Pixels a side; the run's own if not given.", "Model", min=1)


class Demo(enum.StrEnum):
    """Which paper's method the demo shows."""

    GIST = "gist"
    PETAL = "petal"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Flags of ``fastgist demo``."""

    which: Demo = _option(Demo.GIST, "gist, or petal.", "Demo", argument=True)
    output_dir: Path | None = _option(
        None,
        "Where figures, metrics.json and adapters go; fastgist-demo (petal: fastgist-demo-petal) if not given.",
        "Demo",
    )
    seeds: int = _option(3, "Few-shot draws; every method is trained on each.", "Demo", min=1)
    shots: int = _option(10, "Training images of each digit that is learnt from.", "Demo", min=1, max=40)
    device: str = _option("auto", "cpu, cuda, mps, or auto.", "Demo")
    quick: bool = _option(False, "A fraction of the training: shows the way, not a result.", "Demo")
    cache: bool = _option(True, "Keep the pre-trained model for the next time.", "Demo")

    @property
    def folder(self) -> Path:
        """Where the output goes."""
        if self.output_dir is not None:
            return self.output_dir
        return Path("fastgist-demo" if self.which is Demo.GIST else f"fastgist-demo-{self.which}")


def _plain(value: object) -> object:
    """A setting as a JSON value."""
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
