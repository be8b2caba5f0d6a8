"""``fastgist finetune-text``: a sequence classifier of transformers, texts, and the Trainer between them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastgist.gist import GistConfig, GistModel
from fastgist.nn import PromptedBlock
from fastgist.recipes import PartRates
from fastgist.recipes.text import EPOCHS
from fastgist.train.checkpoint import write_atomically
from fastgist.train.config import MixedPrecision, UserError
from fastgist.train.data import seed_everything
from fastgist.train.finetune import Interrupted
from fastgist.train.interrupt import deferred_interrupt
from fastgist.train.measure import commit, trainable_share, versions
from fastgist.train.models import adapt, frozen_fingerprint
from fastgist.train.optim import groups_of, to_schedule
from fastgist.train.settings import written_settings
from fastgist.train.text_base import base_model, quiet
from fastgist.train.text_config import PaddingSide, TextConfig
from fastgist.train.text_data import TextSplits, load_texts
from fastgist.train.text_metrics import metric_names, metrics_function
from fastgist.train.tracking import wandb_settings

__all__ = ["build_classifier", "finetune_text", "tokenize"]

#: Tokens at most where neither the user nor the model sets a smaller limit.
_LONGEST = 512


def finetune_text(config: TextConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run ``config`` from data to saved adapter; returns the summary that is also written to summary.json.

    Raises UserError for what the user can put right, before anything is written, and Interrupted on Ctrl-C.
    """
    if config.seeds is not None:
        raise UserError("finetune_text makes one run: fastgist.train.sweep.sweep takes several --seeds")
    config = config.resolved()
    _needs_transformers()
    from fastgist.train import text_trainer as trainers

    checkpoints = config.output_dir / "checkpoints"
    newest = _check_output(config, checkpoints)
    main = int(os.environ.get("RANK", "0")) == 0
    tell = say if main else lambda line: None
    with quiet(config.progress):
        splits = load_texts(config)
        regression = splits.classes is None
        names = metric_names(config.metrics, regression)
        model, tokenizer, about = build_classifier(config, splits.classes, tell)
        kept_config = model.config
        model = adapt(
            model, config.method, gist=config.gist, rank=config.rank, bottleneck_dim=config.bottleneck_dim,
            settings=config.set, gist_config=GistConfig(length=config.gist_length, readout=config.gist_readout.value),
        )  # fmt: skip
        limit = length_limit(config, model, tokenizer)
        groups_of(model, config)  # what is wrong with the numbers is said before anything is written
        metrics = metrics_function(names, None if regression else len(splits.classes or []))
        selecting = names[0] if metrics else "loss"
        tables = {name: tokenize(table, tokenizer, limit) for name, table in splits.named().items()}

    trained, everything = trainable_share(model)
    method = config.method.value + (" + GIST" if config.gist else "")
    sizes = ", ".join(f"{len(table)} {name}" for name, table in splits.named().items())
    task = "regression" if regression else f"{len(splits.classes or [])} classes"
    tell(f"{config.model}, {method}: {trained:,} of {everything:,} parameters trained ({trained / everything:.3%})")
    tell(f"{task}; texts of {limit} tokens at most: {sizes}")
    if metrics is None:
        splits.notes.append("torchmetrics is not installed: only the loss is measured (pip install 'fastgist[train]')")
    for note in [*about, *splits.notes]:
        tell(f"note: {note}")

    identity = config.trajectory() | {
        "data": _fingerprint(splits), "frozen weights": frozen_fingerprint(model), "selected by": selecting,
    }  # fmt: skip
    _check_identity(config, identity, newest)
    if main:
        checkpoints.mkdir(parents=True, exist_ok=True)
        trainers.remove_incomplete(checkpoints)
        _write_json(config.output_dir / "identity.json", identity)
        _write_json(config.output_dir / "config.json", written_settings(config))
    objective = trainers.GistObjective(
        config.alpha, to_schedule(config.beta), to_schedule(config.temperature), regression
    )
    with deferred_interrupt(int(os.environ.get("WORLD_SIZE", "1")) == 1) as interrupted:
        trainer = trainers.TextTrainer(
            trainers.Trained(model, kept_config),
            training_arguments(config, checkpoints, val=splits.val is not None, selecting=selecting),
            data_collator=collator(tokenizer, config.padding_side, positions=not config.gist),
            train_dataset=tables["train"],
            eval_dataset=tables.get("val"),
            compute_loss_func=objective,
            compute_metrics=metrics,
            callbacks=[
                trainers.Interruptible(config.checkpoint_every, interrupted),
                trainers.FiniteLoss(),
                trainers.MovingThresholds(),
                trainers.MovingNumbers(objective.loss),
            ],
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(PartRates)},
        )
        _settle(trainer)
        try:
            if newest is not None:
                tell(f"resuming from {newest}")
            elif config.resume:
                tell(f"no checkpoint in {checkpoints}: starting from the beginning")
            with wandb_settings(config.output_dir):
                trainer.train(resume_from_checkpoint=str(newest) if newest else None)
                tests = {name: _evaluate(trainer, tables[name], name) for name in splits.tests}
        except KeyboardInterrupt:
            left = next(iter(trainers.complete_checkpoints(checkpoints)), None)
            hint = (
                f"{left} is complete; the same command with --resume goes on from there"
                if left
                else "no checkpoint had been written yet (one comes with each epoch, or --checkpoint-every N steps)"
            )
            raise Interrupted(f"interrupted: {hint}") from None
    return _finish(config, trainer, model, splits, selecting, tests, tell)


# -- before training -------------------------------------------------------------------------------------------------


def _needs_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError("text needs transformers: pip install 'fastgist[train]'") from None


def _check_output(config: TextConfig, checkpoints: Path) -> Path | None:
    """The checkpoint to go on from, if that was asked for."""
    from fastgist.train.text_trainer import complete_checkpoints

    folder = config.output_dir
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    if not parent.is_dir():
        raise UserError(f"--output-dir {folder}: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"cannot write to --output-dir {folder}")
    newest = next(iter(complete_checkpoints(checkpoints)), None)
    if newest is not None and not config.resume:
        raise UserError(f"{folder} holds a run already ({newest.name}): pass --resume, or another --output-dir")
    return newest


def _write_json(path: Path, found: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())


def _check_identity(config: TextConfig, identity: dict[str, Any], newest: Path | None) -> None:
    """A resumed run must be the run it continues."""
    if newest is None:
        return
    path = config.output_dir / "identity.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot resume from {newest}: {path} cannot be read ({error})") from error
    for key, ours in identity.items():
        if before.get(key) != ours:
            raise UserError(
                f"cannot resume from {newest}: it was made with {key} = {before.get(key)!r}, this run has {ours!r}"
            )


def build_classifier(
    config: TextConfig, classes: list[str] | None, say: Callable[[str], None] = print
) -> tuple[Any, Any, list[str]]:
    """(sequence classifier with a fresh head, tokenizer, notes). Raises UserError for what cannot be had."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from fastgist.recipes.stdlib_text import BASES

    name = str(base_model(config.model, progress=config.progress, say=say)) if config.model in BASES else config.model
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if classes is not None:
        head = {"num_labels": len(classes), "id2label": dict(enumerate(classes))}
        head |= {"label2id": {c: i for i, c in enumerate(classes)}, "problem_type": "single_label_classification"}
    seed_everything(config.seed)
    try:
        settings = AutoConfig.from_pretrained(name, **head)
        tokenizer = AutoTokenizer.from_pretrained(name)
        if config.pretrained:
            model = AutoModelForSequenceClassification.from_pretrained(
                name, config=settings, ignore_mismatched_sizes=True, dtype="float32"
            )
        else:
            model = AutoModelForSequenceClassification.from_config(settings)
    except Exception as error:
        hint = "a folder or a hub name is needed" if isinstance(error, OSError) else type(error).__name__
        raise UserError(
            f"could not get the model {config.model}: {' '.join(str(error).split())[:300]} ({hint}; stdlib-bert needs no "
            "network)"
        ) from error
    notes = []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"{config.model} has no padding token: {tokenizer.pad_token!r} stands in")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if config.padding_side is PaddingSide.LEFT and not is_decoder(model):
        raise UserError(
            f"--padding-side left: {type(model).__name__} reads the first token, which padding would displace"
        )
    return model, tokenizer, notes


def is_decoder(model: Any) -> bool:
    """Whether ``model`` is of a causal family, whose classifiers read the last token."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
    )

    kind = model.config.model_type
    return kind in CAUSAL and kind not in MASKED


def length_limit(config: TextConfig, model: Any, tokenizer: Any) -> int:
    """Tokens that a text is cut to. In a decoder each row of the gist token takes a position, and so does each prompt of an
    adapted ``model``; in an encoder they take none."""
    model = model.model if isinstance(model, GistModel) else model
    positions = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    limits = [tokenizer.model_max_length]
    if positions is not None:
        embeddings = getattr(getattr(model, model.base_model_prefix, None), "embeddings", None)
        offset = getattr(embeddings, "padding_idx", None) if "roberta" in model.config.model_type else None
        limits.append(positions - (0 if offset is None else offset + 1))
    room = min(limits)
    if is_decoder(model):
        prompts = sum(m.length for m in model.modules() if isinstance(m, PromptedBlock) and m.insert)
        room -= (config.gist_length if config.gist else 0) + prompts
    if room < 1:
        raise UserError(
            f"--gist-length {config.gist_length}: {config.model} takes {min(limits)} tokens at most, the gist token's rows "
            "and the prompts among them"
        )
    if config.max_length is None:
        return min(room, _LONGEST)
    if config.max_length > room:
        raise UserError(f"--max-length {config.max_length}: {config.model} takes {room} tokens at most")
    return config.max_length


def tokenize(table: Any, tokenizer: Any, max_length: int) -> Any:
    """``table`` (text, perhaps pair, label) as token ids, cut to ``max_length`` and not padded, and ``labels``.

    Of a pair, the longer text is cut first.
    """

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(rows["text"], rows.get("pair"), truncation=True, max_length=max_length)
        return {**encoded, "labels": rows["label"]}

    return table.map(encode, batched=True, remove_columns=table.column_names, desc="tokenizing")


def collator(tokenizer: Any, side: PaddingSide, positions: bool = False) -> Any:
    """Pads each batch to its longest text, on ``side``.

    ``positions``: with ``position_ids`` that count each row's own tokens, which a causal model with absolute positions
    needs under padding on the left. (A gist model makes its own.)
    """
    from transformers import DataCollatorWithPadding

    tokenizer.padding_side = side.value
    pad = DataCollatorWithPadding(tokenizer)
    if not (positions and side is PaddingSide.LEFT):
        return pad

    def pad_and_count(examples: list[dict[str, Any]]) -> Any:
        batch = pad(examples)
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch

    return pad_and_count


def training_arguments(config: TextConfig, folder: Path, *, val: bool, selecting: str) -> Any:
    """The Trainer's arguments of a resolved ``config``."""
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    if config.device not in (None, "cpu", "cuda", "mps"):
        raise UserError(f"--device is cpu, cuda, mps or left out, got {config.device!r}")
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=config.epochs or EPOCHS,
            learning_rate=config.lr,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup,
            weight_decay=config.weight_decay,
            max_grad_norm=config.clip_grad,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulate,
            seed=config.seed,
            bf16=config.mixed_precision is MixedPrecision.BF16,
            fp16=config.mixed_precision is MixedPrecision.FP16,
            use_cpu=config.device == "cpu",
            eval_strategy="epoch" if val else "no",
            save_strategy="epoch",
            save_total_limit=config.keep_checkpoints,
            load_best_model_at_end=val,
            metric_for_best_model=selecting if val else None,
            greater_is_better=selecting != "loss" if val else None,
            logging_strategy="epoch",
            logging_nan_inf_filter=False,
            report_to=[name for name in config.report_to.split(",") if name],
            run_name=config.output_dir.name,
            project="fastgist",
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=not config.progress,
            log_level="error",
        )
        arguments.dataloader_pin_memory = arguments.device.type == "cuda"
        get_reporting_integration_callbacks(arguments.report_to)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"the Trainer refuses these settings: {' '.join(str(error).split())}") from error
    if config.device not in (None, arguments.device.type):
        raise UserError(f"--device {config.device} is not available: found {arguments.device.type}")
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several cards in one process: DataParallel, which takes no mappings
    return arguments


def _settle(trainer: Any) -> None:
    """Without bars the Trainer prints dictionaries instead; metrics.jsonl has them."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _fingerprint(splits: TextSplits) -> str:
    """A digest of the training and validation texts with their labels."""
    sha = hashlib.sha256()
    for table in (splits.train, splits.val):
        for row in table or ():
            sha.update(repr(row).encode())
    return sha.hexdigest()[:16]


# -- after training --------------------------------------------------------------------------------------------------


def _evaluate(trainer: Any, table: Any, name: str) -> dict[str, float]:
    found = trainer.evaluate(table, metric_key_prefix=name)
    return _scores(found, name)


def _scores(found: dict[str, Any], prefix: str) -> dict[str, float]:
    """The loss and the metrics out of what the Trainer calls prefix_metric, without its timings."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    scores = {k.removeprefix(f"{prefix}_"): v for k, v in found.items() if k.startswith(f"{prefix}_")}
    return {k: v for k, v in scores.items() if k not in timings}


def _finish(
    config: TextConfig,
    trainer: Any,
    model: nn.Module,
    splits: TextSplits,
    selecting: str,
    tests: dict[str, dict[str, float]],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Save the adapter and the summary."""
    import fastgist

    state = trainer.state
    best = state.best_global_step if splits.val is not None and state.best_global_step else state.global_step
    evaluated = [e for e in state.log_history if e["step"] == best and "eval_loss" in e]
    trained, everything = trainable_share(model)
    summary: dict[str, Any] = {
        "model": config.model, "method": config.method.value, "gist": config.gist, "classes": splits.classes,
        "texts": {name: len(table) for name, table in splits.named().items()}, "notes": splits.notes,
        "steps": state.global_step, "selected_by": f"val {selecting}" if splits.val is not None else "last epoch",
        "selected_step": best, "val": _scores(evaluated[-1], "eval") if evaluated else None, "test": tests,
        "trained_parameters": trained, "all_parameters": everything, "device": trainer.args.device.type,
        "processes": trainer.args.world_size, "mixed_precision": config.mixed_precision.value,
        "versions": versions(), "commit": commit(),
    }  # fmt: skip
    summary["config"] = written_settings(config)
    if trainer.is_world_process_zero():
        fastgist.save_adapter(model, config.output_dir / "adapter")
        lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
        write_atomically(config.output_dir / "metrics.jsonl", lines.encode())
        write_atomically(config.output_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    trainer.accelerator.wait_for_everyone()
    for name, scores in [*([("val", summary["val"])] if evaluated else []), *tests.items()]:
        tell(f"{name}: {', '.join(f'{k} {v:.4f}' for k, v in scores.items())} (weights of step {best})")
    if splits.val is None:
        tell("nothing to select by: the last epoch's weights are kept")
    tell(f"adapter saved in {config.output_dir / 'adapter'}; metrics in {config.output_dir / 'metrics.jsonl'}")
    return summary
