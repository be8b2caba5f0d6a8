"""``fastgist finetune``: a Vision Transformer, a folder of images, and the engine between them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgist.gist import GistConfig
from fastgist.train import data as images
from fastgist.train import selection
from fastgist.train.checkpoint import Checkpoints, write_atomically
from fastgist.train.config import FinetuneConfig, UserError, check_parts
from fastgist.train.engine import FitResult, evaluate, fit
from fastgist.train.measure import commit, memory_method, trainable_share, versions
from fastgist.train.metrics import Metrics, parse_metrics
from fastgist.train.models import adapt, build_backbone, check_name, frozen_fingerprint
from fastgist.train.optim import check_schedules
from fastgist.train.settings import written_settings
from fastgist.train.tracking import Tracking, check_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Interrupted", "check_numbers", "finetune"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; the message says what is on disk and how to go on."""


def finetune(config: FinetuneConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run ``config`` from data to saved adapter; returns the summary that is also written to summary.json.

    Raises UserError for what the user can put right, before anything is written, and Interrupted on Ctrl-C.
    """
    if config.seeds is not None:
        raise UserError("finetune makes one run: fastgist.train.sweep.sweep takes several --seeds")
    check_numbers(config)
    chosen = parse_metrics(config.metrics)
    trackers = check_trackers(config.report_to)
    accelerator = _accelerator(config)
    main = accelerator.is_main_process
    tell = say if main else lambda line: None
    checkpoints = Checkpoints(config.output_dir / "checkpoints", config.keep_checkpoints)
    _check_output(config, checkpoints)
    check_name(config)

    splits = _checked_splits(config, accelerator)
    metrics = Metrics(chosen, len(splits.classes))
    images.seed_everything(config.seed)
    model = build_backbone(config, len(splits.classes))
    _set_transforms(splits, model, config)
    if min(len(split) for split in splits.named().values()) < 1 or len(splits.train) < len(splits.classes):
        raise UserError(f"too few images: {len(splits.train)} to train on for {len(splits.classes)} classes")
    model = adapt(
        model,
        config.method,
        gist=config.gist,
        rank=config.rank,
        bottleneck_dim=config.bottleneck_dim,
        settings=config.set,
        gist_config=GistConfig(length=config.gist_length, readout=config.gist_readout.value),
    )
    identity = {
        **config.trajectory(),
        "data": splits.train.fingerprint(),
        "classes": splits.classes,
        "frozen weights": frozen_fingerprint(model),
    }
    trained, all_parameters = trainable_share(model)
    sizes = ", ".join(f"{len(split)} {name}" for name, split in splits.named().items())
    method = config.method.value + (" + GIST" if config.gist else "")
    tell(
        f"{config.model}, {method}: {trained:,} of {all_parameters:,} parameters trained ({trained / all_parameters:.3%})"
    )
    tell(f"{len(splits.classes)} classes; images: {sizes}; {accelerator.num_processes} x {accelerator.device.type}")
    each = config.batch_size * accelerator.num_processes
    if 0 < (left := len(splits.train) % each) < len(splits.train):
        splits.notes.append(
            f"{left} of {len(splits.train)} images are left over in each epoch, others in each (batches of {each})"
        )
    for note in splits.notes:
        tell(f"note: {note}")

    tracking = Tracking(trackers, accelerator, config)
    journal = _Journal(config.output_dir / "metrics.jsonl", enabled=main)

    def start(step: int, notes: list[str]) -> None:
        if main:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            checkpoints.sweep()
            journal.rewind(step)
            settings = json.dumps(written_settings(config), indent=2) + "\n"
            write_atomically(config.output_dir / "config.json", settings.encode())
        for note in notes:
            tell(note)
        tracking.start(step)

    def epoch(record: dict[str, float]) -> None:
        journal.add(record)
        tracking.log(record)

    try:
        result = fit(
            model,
            splits.train,
            config,
            accelerator,
            val=splits.val,
            workers=config.workers,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            resume=config.resume,
            identity=identity,
            on_epoch=epoch,
            metrics=metrics,
            on_start=start,
            progress=config.progress,
            description=method,
        )
        summary = _finish(config, accelerator, model, splits, result, metrics, tell)
        tracking.log({name: summary[name] for name in summary if name.startswith("test_")} | {"step": result.steps})
        return summary
    except KeyboardInterrupt:
        newest = next(iter(checkpoints), None)
        hint = (
            f"{newest} is complete; the same command with --resume goes on from there"
            if newest
            else "no checkpoint had been written yet (one comes with each epoch, or --checkpoint-every N steps)"
        )
        raise Interrupted(f"interrupted: {hint}") from None
    finally:
        tracking.end()


def check_numbers(config: FinetuneConfig) -> None:
    """UserError for a number out of range, or one that this run has no use for."""
    if config.warmup >= config.epochs:
        raise UserError(f"--warmup-epochs {config.warmup:g} must be less than --epochs {config.epochs}")
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{option.name.replace('_', '-')} must be finite, got {value}")
    check_schedules(config)
    if config.lr <= 0:
        raise UserError(f"--lr must be > 0, got {config.lr}")
    check_parts(config)


def _check_output(config: FinetuneConfig, checkpoints: Checkpoints) -> None:
    folder = config.output_dir
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not parent.is_dir():
        raise UserError(f"--output-dir {folder}: {parent} is a file")
    newest = next(iter(checkpoints), None)
    if newest is not None and not config.resume:
        raise UserError(f"{folder} holds a run already ({newest.name}): pass --resume, or another --output-dir")
    if not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to --output-dir {folder}")
    if newest is not None:
        _check_model(config)


def _check_model(config: FinetuneConfig) -> None:
    """Before anything is fetched or decoded: a run goes on with the model it was begun with."""
    settings = config.output_dir / "config.json"
    try:
        before = json.loads(settings.read_text()).get("model", config.model)
    except (OSError, ValueError, AttributeError):
        return  # the checkpoint itself says what it was made with
    if before != config.model:
        raise UserError(
            f"{config.output_dir} holds a run of --model {before}, this one has {config.model}: with --config {settings} "
            "--resume it goes on"
        )


def _accelerator(config: FinetuneConfig) -> Accelerator:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise UserError(f"training needs {error.name}: pip install 'fastgist[train]'") from None
    if config.device not in (None, "cpu", "cuda", "mps"):
        raise UserError(f"--device is cpu, cuda, mps or left out (accelerate decides), got {config.device!r}")
    precision = config.mixed_precision.value if config.mixed_precision else None
    try:
        accelerator = Accelerator(mixed_precision=precision, cpu=config.device == "cpu")
    except (ValueError, RuntimeError) as error:
        raise UserError(f"accelerate refuses these settings: {error}") from error
    if config.device not in (None, accelerator.device.type):
        raise UserError(f"--device {config.device} is not available: accelerate found {accelerator.device.type}")
    return accelerator


def _checked_splits(config: FinetuneConfig, accelerator: Accelerator) -> images.Splits:
    """The splits, without unreadable images, with a validation split: the same on every process."""
    from accelerate.utils import broadcast_object_list

    splits = selection.draw(images.load_splits(config), config)
    if config.verify:
        found: list[Any] = [None]
        if accelerator.is_main_process:
            found = [
                {
                    name: images.unreadable(split, f"checking {name}", config.progress)
                    for name, split in splits.named().items()
                }
            ]
        splits = images.without(splits, broadcast_object_list(found)[0], config.skip_unreadable)
    if config.shots is not None or config.train_images is not None:
        return splits  # the draw took what is selected by
    return selection.hold_out(splits, config.val_split, config.seed)


def _set_transforms(splits: images.Splits, model: Any, config: FinetuneConfig) -> None:
    """timm's transforms for this model: random for training if asked, the centre crop elsewhere; tried on a blank."""
    from timm.data import create_transform, resolve_model_data_config

    settings = resolve_model_data_config(model)
    if config.image_size is not None:
        settings["input_size"] = (3, config.image_size, config.image_size)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *settings["input_size"]))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = " x ".join(map(str, settings["input_size"]))
        raise UserError(f"{config.model} does not take images of {size}: {error}") from error
    for name, split in splits.named().items():
        split.seed = config.seed
        random = name == "train" and config.augment
        split.transform = create_transform(**settings, is_training=random)


class _Journal:
    """metrics.jsonl: one line an epoch; a resumed run first drops the lines after its checkpoint."""

    def __init__(self, path: Path, enabled: bool) -> None:
        self.path, self.enabled = path, enabled

    def rewind(self, step: int) -> None:
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError):  # a line that a killed run did not finish
                    continue
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())

    def add(self, record: dict[str, float]) -> None:
        if self.enabled:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")


def _finish(
    config: FinetuneConfig,
    accelerator: Accelerator,
    model: Any,
    splits: images.Splits,
    result: FitResult,
    metrics: Metrics,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Judge the selected weights on the test split, once; save the adapter and the summary."""
    import fastgist

    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    trained, all_parameters = trainable_share(model)
    summary: dict[str, Any] = {
        "model": config.model, "method": config.method.value, "gist": config.gist, "classes": splits.classes,
        "images": {name: len(split) for name, split in splits.named().items()},
        "steps": result.steps, "selected_by": "val accuracy" if splits.val is not None else "last epoch",
        "val_accuracy": result.best_accuracy, "val_loss": result.best_loss,
        **{f"val_{name}": value for name, value in result.best_metrics.items()},
        "selected_epoch": result.best_epoch or config.epochs,
        "trained_parameters": trained, "all_parameters": all_parameters,
        "images_per_second": result.images_per_second, "peak_memory_bytes": result.peak_memory_bytes,
        "peak_memory_method": memory_method(accelerator.device) if result.peak_memory_bytes else None,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision,
        "versions": versions(), "commit": commit(),
    }  # fmt: skip
    if splits.test is not None:
        with accelerator.autocast():
            judged = evaluate(model, splits.test, config.batch_size, accelerator, config.workers, metrics)
        summary |= {f"test_{name}": value for name, value in judged.items()}
    if accelerator.is_main_process:
        fastgist.save_adapter(model, config.output_dir / "adapter")
        summary["config"] = written_settings(config)
        write_atomically(config.output_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    accelerator.wait_for_everyone()
    for name in ("val", "test"):
        if summary.get(f"{name}_accuracy") is not None:
            tell(f"{name} accuracy {summary[f'{name}_accuracy']:.2%} (weights of epoch {summary['selected_epoch']})")
    if splits.val is None:
        tell("no validation images: the last epoch's weights are kept")
    tell(f"adapter saved in {config.output_dir / 'adapter'}; metrics in {config.output_dir / 'metrics.jsonl'}")
    return summary
