"""PETAL's tasks (arXiv 2312.12458): data, prompts, the numbers of training and of generating.

The numbers are those of the released configurations (github.com/melonking32/PETAL, projects/blip2/train/aurora_mixture,
InstructBLIP with Flan-T5-XXL), and so are the splits and the one prompt of each task. Ours are:

- 1,000 steps of warm-up for the question tasks too, where the released files name none;
- A-OKVQA is judged on val, since its test answers are not public;
- an answer is drawn by its counts (:class:`fastgist.train.vl_collate.VLCollator`), where the released code takes the
  first of the file's list;
- prompts stand as they are, where the released code lower-cases them and drops their punctuation, colons included.

Not here is what it does to images (random crops of half the area at least, flips, RandAugment: pass a ``transform`` to the
data set) and to generated answers of OK-VQA and TextVQA (spaCy's lemmas instead of words, which raises their accuracy).

    task = petal.task("okvqa")
    train = load(task.dataset, root, task.train)
    collator = VLCollator.for_model(model, processor, task.template)
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

__all__ = ["CAPTION_TEMPLATES", "MIXED_INSTRUCTIONS", "QUESTION_TEMPLATES", "TASKS", "PetalTask", "task"]

#: InstructBLIP's instructions (arXiv 2305.06500, appendix on templates) for questions with a short answer.
QUESTION_TEMPLATES = (
    "{}",
    "Question: {}",
    "{} A short answer to the question is",
    "Q: {} A:",
    "Question: {} Short answer:",
    "Given the image, answer the following question with no more than three words. {}",
    "Based on the image, respond to this question with a short answer: {}. Answer:",
    "Use the provided image to answer the question: {} Provide your answer as short as possible:",
    'What is the answer to the following question? "{}"',
    'The question "{}" can be answered using the image. A short answer is',
)

#: And for captions.
CAPTION_TEMPLATES = (
    "A short image caption:",
    "A short image description:",
    "A photo of",
    "An image that shows",
    "Write a short description for the image.",
    "Write a description for the photo.",
    "Provide a description of what is presented in the photo.",
    "Briefly describe the content of the image.",
    "Can you briefly explain what you see in the image?",
    "Could you use a few words to describe what you perceive in the photo?",
    "Please provide a short depiction of the picture.",
    "Using language, provide a short account of the image.",
    "Use a few words to illustrate what is happening in the picture.",
)

#: Instructions that the released code mixes with a task's own, for the experts.
MIXED_INSTRUCTIONS = (
    "What objects are in the picture",
    "What are the characteristics of the objects in the picture",
    "What is the relationship between the objects in the picture",
)


@dataclass(frozen=True, kw_only=True)
class PetalTask:
    """One task.

    Attributes:
        dataset: a name of :data:`fastgist.train.vl_load.NAMES`.
        train, evaluation: its splits to train on and to be judged on.
        template: the prompt, ``{}`` for the question.
        lr, min_lr, warmup_lr: AdamW's learning rate at its peak, at the end of the cosine, at the first step.
        batch_size: of all devices together, as published for one.
        per_reference: an epoch passes over every caption, not every image.
        max_new_tokens, min_new_tokens: of a generated answer. (The published smallest lengths count T5's start token.)
        normalize: judge normalised strings, as LAVIS does for GQA.
    """

    dataset: str
    train: str
    evaluation: str
    template: str
    lr: float
    min_lr: float
    weight_decay: float
    batch_size: int
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    warmup_lr: float = 1e-8
    warmup_steps: int = 1000
    epochs: int = 5
    image_size: int = 224
    num_beams: int = 5
    repetition_penalty: float = 1.5
    per_reference: bool = False
    normalize: bool = False

    def generation(self, decoder_only: bool = False) -> dict[str, Any]:
        """Arguments of ``generate``, for :func:`fastgist.train.vl_evaluate.evaluate`.

        Args:
            decoder_only: leave the repetition penalty out. transformers counts a decoder-only model's prompt as said
                before, so that an answer in the question's words would be penalised; the released code does not.
        """
        found = {
            "num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens, "min_new_tokens": self.min_new_tokens,
            "length_penalty": self.length_penalty, "do_sample": False,
        }  # fmt: skip
        return found if decoder_only else found | {"repetition_penalty": self.repetition_penalty}


def _question(dataset: str, train: str, evaluation: str, batch: int, longest: int, **more: Any) -> PetalTask:
    return PetalTask(
        dataset=dataset, train=train, evaluation=evaluation, template="Question: {} Short answer:", lr=2e-5, min_lr=1e-6,
        weight_decay=0.02, batch_size=batch, max_new_tokens=longest, min_new_tokens=0, length_penalty=-1.0, **more,
    )  # fmt: skip


def _caption(dataset: str, evaluation: str, template: str) -> PetalTask:
    return PetalTask(
        dataset=dataset, train="train", evaluation=evaluation, template=template, lr=1e-5, min_lr=0.0, weight_decay=0.05,
        batch_size=32, max_new_tokens=50, min_new_tokens=5, length_penalty=1.0, per_reference=True,
    )  # fmt: skip


TASKS: dict[str, PetalTask] = {
    "okvqa": _question("okvqa", "train", "val", 16, 100),
    "aokvqa": _question("aokvqa", "train", "val", 16, 100),
    "gqa": _question("gqa", "train", "testdev", 32, 10, normalize=True),
    "textvqa": _question("textvqa", "train", "val", 32, 10),
    "flickr30k": _caption("flickr30k", "test", "A short image caption:"),
    "textcaps": _caption("textcaps", "val", "A photo of"),
}


def task(name: str) -> PetalTask:
    """PETAL's task ``name``. Raises ValueError for a name that is not one."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"petal.task: expected one of {', '.join(TASKS)}, got {name!r}{hint}")
    return TASKS[name]
