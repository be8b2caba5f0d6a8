"""The data of ``fastgist demo petal``: scikit-learn's handwritten digits (8 x 8 pixels), questions about them, words.

Four questions belong to the pre-training of the small InstructBLIP, four tasks (three questions and a caption) to the tuning
of its Q-Former: no image was ever shown with those before. The language model, as language models have, has read all
of them in words, with the digit's name in the image's place. The images are cut once, by a fixed seed: half to pre-train
on, a quarter to draw few images from (what is left over validates), a quarter to test on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgist.train.digits import DigitImages

__all__ = [
    "HELD_OUT",
    "IMAGE_TOKEN",
    "NAMES",
    "PRETRAINED",
    "PetalDigits",
    "Question",
    "Row",
    "collate",
    "draw_rows",
    "encode",
    "rows_of",
    "sentences",
    "train_tokenizer",
]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
IMAGE_TOKEN = "<image>"
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_CUT_SEED = 20240901


@dataclass(frozen=True)
class Question:
    """What is asked of an image: several phrasings of one instruction, and the answer for each of the ten digits."""

    name: str
    phrasings: tuple[str, ...]
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.answers) != 10 or not self.phrasings:
            raise ValueError(f"Question: {self.name} needs a phrasing and ten answers, got {len(self.answers)}")


def _yes_no(right: Sequence[int]) -> tuple[str, ...]:
    return tuple("yes" if digit in right else "no" for digit in range(10))


#: What the small InstructBLIP is pre-trained on.
PRETRAINED = (
    Question("digit", ("which digit is it ?", "name the digit"), NAMES[:10]),
    Question("even", ("is it even ?", "can it be halved ?"), _yes_no((0, 2, 4, 6, 8))),
    Question("before", ("what comes before ?", "take one from it"), ("none", *NAMES[:9])),
    Question("kind", ("of what kind is it ?", "say its kind"), ("an even digit", "an odd digit") * 5),
)
#: What the Q-Former is tuned on. Holes are those of the digit as it is mostly written by hand: four is open.
HELD_OUT = (
    Question("larger", ("is it larger than four ?", "does it exceed four ?"), _yes_no((5, 6, 7, 8, 9))),
    Question(
        "holes",
        ("how many holes has it ?", "count its loops"),
        ("one", "none", "none", "none", "none", "none", "one", "none", "two", "one"),
    ),
    Question("next", ("what comes next ?", "add one to it"), NAMES[1:]),
    Question(
        "caption", ("describe the image", "give a caption"), tuple(f"a handwritten {name}" for name in NAMES[:10])
    ),
)


@dataclass
class PetalDigits:
    """The three parts of the images, labels 0-9; no image is in two of them."""

    pretrain: DigitImages
    pool: DigitImages
    test: DigitImages

    @classmethod
    def load(cls) -> PetalDigits:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
        whole = DigitImages(images, torch.from_numpy(bunch.target).long())
        pretrain, rest = whole.cut(0.5, _CUT_SEED)
        return cls(pretrain, *rest.cut(0.5, _CUT_SEED))


class Row(NamedTuple):
    """One question about one image: the image's place in its part, the instruction's words and the answer's."""

    image: int
    instruction: str
    answer: str


def rows_of(part: DigitImages, questions: Sequence[Question]) -> list[Row]:
    """Every image with every phrasing of every question: by question, phrasing, image."""
    labels = part.labels.tolist()
    return [
        Row(image, phrasing, question.answers[label])
        for question in questions
        for phrasing in question.phrasings
        for image, label in enumerate(labels)
    ]


def draw_rows(rows: Sequence[Row], count: int, generator: torch.Generator) -> list[Row]:
    """``count`` rows, with replacement."""
    return [rows[i] for i in torch.randint(len(rows), (count,), generator=generator).tolist()]


def sentences() -> list[str]:
    """What the language model reads: the name of a digit in the image's place, every instruction, and the answer."""
    return [
        f"{name} {phrasing} {question.answers[digit]}"
        for digit, name in enumerate(NAMES[:10])
        for question in (*PRETRAINED, *HELD_OUT)
        for phrasing in question.phrasings
    ]


def train_tokenizer() -> Any:
    """A word-level tokenizer of every word in use, in transformers' form: the same ids in every run."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in sentences() for word in text.split()})
    ids = {word: number for number, word in enumerate((_PAD, _END, _UNKNOWN, IMAGE_TOKEN, *words))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, bos_token=_END, unk_token=_UNKNOWN,
        additional_special_tokens=[IMAGE_TOKEN], padding_side="left",
    )  # fmt: skip


def encode(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts with the end token behind each, padded on the left: input_ids, attention_mask, labels (B, L)."""
    batch = tokenizer([f"{text} {_END}" for text in texts], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def collate(
    tokenizer: Any, images: Tensor, rows: Sequence[Row], queries: int, answered: bool = True
) -> dict[str, Tensor]:
    """Rows as InstructBlipForConditionalGeneration takes them.

    Args:
        images: (M, 1, 8, 8), what ``row.image`` counts in.
        queries: how many image tokens stand before the instruction.
        answered: with the answers behind the instructions, as ``labels`` (B, L), -100 where nothing is to be learnt;
            without for ``generate``.

    Returns:
        pixel_values (B, 3, 8, 8), input_ids and attention_mask (B, L), padded on the left, qformer_input_ids and
        qformer_attention_mask (B, Lq), padded on the right, and labels.
    """
    prompts = [" ".join([*[IMAGE_TOKEN] * queries, row.instruction]) for row in rows]
    texts = [f"{prompt} {row.answer} {_END}" if answered else prompt for prompt, row in zip(prompts, rows, strict=True)]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    instructions = tokenizer([row.instruction for row in rows], padding=True, padding_side="right", return_tensors="pt")
    batch = {
        "pixel_values": images[[row.image for row in rows]].expand(-1, 3, -1, -1),
        "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"],
        "qformer_input_ids": instructions["input_ids"], "qformer_attention_mask": instructions["attention_mask"],
    }  # fmt: skip
    if answered:
        lengths = torch.tensor([len(row.answer.split()) + 1 for row in rows])
        width = tokens["input_ids"].shape[1]
        learnt = torch.arange(width) >= width - lengths[:, None]
        batch["labels"] = tokens["input_ids"].masked_fill(~learnt, -100)
    return batch
