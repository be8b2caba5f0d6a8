"""Small text models pre-trained here, on the docstrings that the task leaves: a BERT and a causal Llama.

transformers' Trainer trains them (:mod:`fastgist.train.text_pretrain` has what they learn). A model is a folder that
``from_pretrained`` reads, kept in the cache under a name that follows from everything that decided it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgist.recipes import stdlib_text as recipes
from fastgist.recipes.stdlib_text import Pretraining
from fastgist.train import text_pretrain as pretraining
from fastgist.train.config import UserError
from fastgist.train.data import seed_everything
from fastgist.train.measure import versions
from fastgist.train.stdlib_text import StdlibText

__all__ = ["base_model", "cache_folder", "pretrain", "quiet"]

_MANIFEST = "fastgist_base.json"


def cache_folder() -> Path:
    """Where pre-trained models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgist"


@contextmanager
def quiet(progress: bool) -> Iterator[None]:
    """transformers and datasets say what the user must know only; their bars follow ``progress``."""
    import datasets
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    if not progress:
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if not bars:
            datasets.enable_progress_bars()
        logging.enable_progress_bar()


def pretrain(
    name: str,
    documents: Sequence[Sequence[str]],
    recipe: Pretraining,
    architecture: dict[str, Any],
    folder: Path,
    progress: bool = True,
) -> dict[str, float]:
    """Train base model ``name`` on ``documents`` and write it, with its tokenizer, to ``folder``; returns its losses.

    A twentieth of the documents is held out, and the loss there is what ``held_out_loss`` says.
    """
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    held_out, trained = documents[::20], [d for i, d in enumerate(documents) if i % 20]
    length = architecture["max_position_embeddings"]
    texts = [text for document in trained for text in document]
    tokenizer = pretraining.train_tokenizer(texts, recipe.vocabulary, length, causal=name == "stdlib-llama")
    seed_everything(recipe.seed)
    if name == "stdlib-bert":
        model, examples = pretraining.plain_bert(tokenizer, architecture), pretraining.neighbours
        learner: Any = pretraining.Neighbours(model)
        collator: Any = pretraining.NeighbourCollator(tokenizer, recipe.mask)
    else:
        model, examples = pretraining.plain_llama(tokenizer, architecture), pretraining.causal_blocks
        learner, collator = model, DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            learning_rate=recipe.lr,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            warmup_steps=recipe.warmup,
            weight_decay=recipe.weight_decay,
            lr_scheduler_type="cosine",
            seed=recipe.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            prediction_loss_only=True,
            label_names=["labels"],
            disable_tqdm=not progress,
            log_level="error",
        )
        arguments.dataloader_pin_memory = arguments.device.type == "cuda"
        trainer = Trainer(
            learner,
            arguments,
            data_collator=collator,
            train_dataset=examples(tokenizer, trained, recipe.passes, recipe.length, recipe.seed),
            eval_dataset=examples(tokenizer, held_out, 1, recipe.length, recipe.seed + 1),
        )
        if not progress:
            from transformers import PrinterCallback

            trainer.remove_callback(PrinterCallback)
        losses = {"train_loss": trainer.train().training_loss}
        seed_everything(recipe.seed, 1)
        losses["held_out_loss"] = trainer.evaluate()["eval_loss"]
    model.to("cpu").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


# -- the cache -------------------------------------------------------------------------------------------------------


def base_model(
    name: str,
    *,
    corpus: StdlibText | None = None,
    recipe: Pretraining | None = None,
    architecture: dict[str, Any] | None = None,
    cache: Path | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """The folder of base model ``name`` ("stdlib-bert" or "stdlib-llama"): from the cache, or trained now, in minutes.

    Raises UserError for an unknown name, a Python without sources, a cache that cannot be written, or where it would be
    trained by several processes.
    """
    if name not in recipes.BASES:
        raise UserError(f"no base model named {name!r}: there are {', '.join(recipes.BASES)}")
    corpus = StdlibText.load() if corpus is None else corpus
    recipe = recipes.PRETRAIN[name] if recipe is None else recipe
    architecture = recipes.ARCHITECTURE if architecture is None else architecture
    cache = cache_folder() if cache is None else cache
    key = {"name": name, "recipe": dataclasses.asdict(recipe), "architecture": architecture, "format": 1}
    key["text"] = corpus.fingerprint
    key |= {k: v for k, v in versions().items() if k in ("fastgist", "torch", "transformers")}
    folder = cache / f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    if folder.is_dir():
        if _intact(folder):
            return folder
        say(f"{folder} is damaged: pre-training again")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{name} is not pre-trained yet: run once in one process first")
    say(f"pre-training {name} on the standard library's docstrings, once: minutes")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=cache))
    except OSError as error:
        raise UserError(f"cannot keep the pre-trained model in {cache}: {error.strerror}") from error
    try:
        started = time.perf_counter()
        with quiet(progress):
            losses = pretrain(name, corpus.documents, recipe, architecture, scratch, progress)
        about = {**losses, "seconds": time.perf_counter() - started}
        manifest = {"files": dict(_digests(scratch)), "key": key, "about": about}
        (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        scratch.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say(f"{name}: {', '.join(f'{k} {v:.4g}' for k, v in about.items())}; kept in {folder}")
    return folder


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.iterdir()):
        if path.name != _MANIFEST:
            yield path.name, hashlib.sha256(path.read_bytes()).hexdigest()


def _intact(folder: Path) -> bool:
    """Whether every file is what the manifest, which comes last, says."""
    try:
        return json.loads((folder / _MANIFEST).read_text())["files"] == dict(_digests(folder))
    except (OSError, ValueError, KeyError):
        return False
