"""Small text models pre-trained here, on the docstrings that the task leaves: a BERT and a causal Llama.

BERT learns as BERT did: masked words, and whether the second segment follows the first in its document (a source file)
or is from another, which is what trains the class token and the pooler. Llama predicts the next token. Both take
transformers' Trainer and one WordPiece vocabulary of the same text. A model is a folder that ``from_pretrained`` reads,
kept in the cache under a name that follows from everything that decided it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastgist.recipes import stdlib_text as recipes
from fastgist.recipes.stdlib_text import Pretraining
from fastgist.train.config import UserError
from fastgist.train.data import derive_seed, seed_everything
from fastgist.train.measure import versions
from fastgist.train.stdlib_text import StdlibText

__all__ = ["base_model", "cache_folder", "causal_blocks", "segment_pairs", "segments", "train_tokenizer"]

_MANIFEST = "fastgist_base.json"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def cache_folder() -> Path:
    """Where pre-trained models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgist"


def train_tokenizer(texts: Sequence[str], vocabulary: int = recipes.VOCABULARY, max_length: int = recipes.MAX_LENGTH):
    """A lower-casing WordPiece tokenizer of ``texts``, as BERT's, in transformers' form."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=list(_SPECIAL), show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


# -- what is learned from --------------------------------------------------------------------------------------------


def segments(tokenizer: Any, documents: Sequence[Sequence[str]], room: int) -> list[list[list[int]]]:
    """Each document's docstrings, in order, as token lists of at most ``room``: whole docstrings where they fit."""
    found = []
    for document in documents:
        encoded = tokenizer(list(document), add_special_tokens=False, verbose=False)["input_ids"]
        parts: list[list[int]] = []
        for ids in encoded:
            for start in range(0, len(ids), room):
                piece = ids[start : start + room]
                if parts and len(parts[-1]) + len(piece) <= room:
                    parts[-1] = parts[-1] + piece
                else:
                    parts.append(piece)
        found.append(parts)
    return found


def segment_pairs(
    tokenizer: Any, documents: Sequence[Sequence[str]], passes: int, max_length: int, seed: int
) -> list[dict[str, Any]]:
    """BERT's examples: [CLS] a [SEP] b [SEP], where b follows a in its document (label 0) or is from another (label 1).

    Half of the pairs are true wherever a document has more than one segment; every pass draws anew.
    """
    parts = segments(tokenizer, documents, (max_length - 3) // 2)
    everywhere = [(d, i) for d, document in enumerate(parts) for i in range(len(document))]
    if len({d for d, _ in everywhere}) < 2:
        raise ValueError("segment_pairs: at least two documents are needed")
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    draw = random.Random(derive_seed(seed, len(everywhere)))
    found = []
    for _ in range(passes):
        for d, i in everywhere:
            follows = i + 1 < len(parts[d]) and draw.random() < 0.5
            other = (d, i + 1)
            while not follows and other[0] == d:
                other = draw.choice(everywhere)
            a, b = parts[d][i], parts[other[0]][other[1]]
            found.append(
                {
                    "input_ids": [cls, *a, sep, *b, sep],
                    "token_type_ids": [0] * (len(a) + 2) + [1] * (len(b) + 1),
                    "next_sentence_label": int(not follows),
                }
            )
    return found


def causal_blocks(
    tokenizer: Any, documents: Sequence[Sequence[str]], passes: int, max_length: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of ``max_length`` tokens, docstrings end to end with [SEP] behind each; every pass in another order."""
    encoded = [
        ids for d in documents for ids in tokenizer(list(d), add_special_tokens=False, verbose=False)["input_ids"]
    ]
    draw = random.Random(derive_seed(seed, len(encoded)))
    found = []
    for _ in range(passes):
        draw.shuffle(encoded)
        stream = [token for ids in encoded for token in (*ids, tokenizer.sep_token_id)]
        rows = range(0, len(stream) - max_length + 1, max_length)
        found += [{"input_ids": stream[start : start + max_length]} for start in rows]
    return found


# -- training --------------------------------------------------------------------------------------------------------


def _bert(tokenizer: Any, architecture: dict[str, Any]) -> Any:
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=len(tokenizer), intermediate_size=4 * architecture["hidden_size"],
        pad_token_id=tokenizer.pad_token_id, **architecture,
    )  # fmt: skip
    return BertForPreTraining(config)


def _llama(tokenizer: Any, architecture: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), intermediate_size=3 * architecture["hidden_size"], tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.sep_token_id, **architecture,
    )  # fmt: skip
    return LlamaForCausalLM(config)


_KINDS: dict[str, tuple[Callable[..., Any], Callable[..., list[dict[str, Any]]], bool]] = {
    "stdlib-bert": (_bert, segment_pairs, True),
    "stdlib-llama": (_llama, causal_blocks, False),
}


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

    build, examples, masked = _KINDS[name]
    held_out, trained = documents[::20], [d for i, d in enumerate(documents) if i % 20]
    length = architecture["max_position_embeddings"]
    tokenizer = train_tokenizer([text for document in trained for text in document], max_length=length)
    seed_everything(recipe.seed)
    model = build(tokenizer, architecture)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=masked, mlm_probability=recipe.mask)
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
            logging_steps=50,
            logging_strategy="steps",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=not progress,
        )
        trainer = Trainer(
            model,
            arguments,
            data_collator=collator,
            train_dataset=examples(tokenizer, trained, recipe.passes, length, recipe.seed),
            eval_dataset=examples(tokenizer, held_out, 1, length, recipe.seed + 1),
        )
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

    Raises UserError for an unknown name, a Python without sources, or a cache that cannot be written.
    """
    if name not in _KINDS:
        raise UserError(f"no base model named {name!r}: there are {', '.join(_KINDS)}")
    corpus = StdlibText.load() if corpus is None else corpus
    recipe = recipes.PRETRAIN[name] if recipe is None else recipe
    architecture = recipes.ARCHITECTURE if architecture is None else architecture
    cache = cache_folder() if cache is None else cache
    key = {"name": name, "recipe": dataclasses.asdict(recipe), "architecture": architecture, "format": 1}
    key |= {"text": corpus.fingerprint, "vocabulary": recipes.VOCABULARY}
    key |= {k: v for k, v in versions().items() if k in ("fastgist", "torch", "transformers")}
    folder = cache / f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"
    if folder.is_dir():
        if _intact(folder):
            return folder
        say(f"{folder} is damaged: pre-training again")
    say(f"pre-training {name} on the standard library's docstrings, once: minutes")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=cache))
    except OSError as error:
        raise UserError(f"cannot keep the pre-trained model in {cache}: {error.strerror}") from error
    try:
        started = time.perf_counter()
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
