"""Small text models and files for the tests: a tokenizer of real docstrings, a BERT of width 32 with random weights."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch

from fastgist.train.stdlib_text import StdlibText
from fastgist.train.text_pretrain import train_tokenizer

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def write_bert(folder: Path, vocabulary: int = 400, positions: int = 48, **options) -> Path:
    """A BERT without a head and its tokenizer, as ``from_pretrained`` reads them."""
    from transformers import BertConfig, BertModel

    documents = StdlibText.load().documents[:20]
    tokenizer = train_tokenizer([t for d in documents for t in d], vocabulary, positions)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=positions, **TINY | options)
    torch.manual_seed(1)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def few(part, classes: int, each: int):
    """(text, label) of the first ``each`` texts of the first ``classes`` classes of a part of the corpus."""
    rows = []
    for label in range(classes):
        texts = [t for t, y in zip(part.texts, part.labels) if y == label]
        rows += [(t, label) for t in texts[:each]]
    random.Random(0).shuffle(rows)
    return rows


def write_csv(path: Path, header: list[str], rows, delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def pairs(part, each: int, seed: int = 0) -> list[tuple[str, str, int]]:
    """Pairs of docstrings: 1 where both are of one package, as GLUE's MRPC has sentence1, sentence2, label."""
    draw = random.Random(seed)
    by_class: dict[int, list[str]] = {}
    for text, label in zip(part.texts, part.labels):
        by_class.setdefault(label, []).append(text)
    rows = []
    for _ in range(each):
        a, b = draw.sample(sorted(by_class), 2)
        rows.append((*draw.sample(by_class[a], 2), 1))
        rows.append((draw.choice(by_class[a]), draw.choice(by_class[b]), 0))
    return rows
