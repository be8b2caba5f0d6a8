"""The small InstructBLIP of ``fastgist demo petal``: how it is made, trained, and asked."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn import InstructionMoE
from fastgist.petal.parts import Enriched
from fastgist.recipes import petal_digits as recipes
from fastgist.recipes.petal_digits import Training
from fastgist.train.data import derive_seed, seed_everything
from fastgist.train.digits import DigitImages
from fastgist.train.measure import StepMemory
from fastgist.train.petal_data import (
    IMAGE_TOKEN,
    PRETRAINED,
    PetalDigits,
    Question,
    Row,
    collate,
    draw_rows,
    encode,
    rows_of,
    sentences,
)

__all__ = ["Fit", "answers", "fit", "plain_model", "pretrain", "score"]

#: Tokens of an answer at most: three words and the end.
_ANSWER = 4
_EVAL_BATCH = 512


def plain_model(tokenizer: Any) -> Any:
    """An InstructBlipForConditionalGeneration of the demo's size with fresh weights."""
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

    parts = copy.deepcopy(recipes.ARCHITECTURE)  # transformers writes into what it is given
    words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    parts["qformer_config"] |= words
    parts["text_config"] |= words | {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = InstructBlipConfig(image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), **parts)
    model = InstructBlipForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens)  # zero as transformers leaves them: all queries would stay alike
    return model.eval()


@dataclass
class Fit:
    """What a training came to: the loss of every step, the median seconds of a step (on a CPU of processor time, to which
    other programs' load adds nothing), and its peak memory."""

    losses: list[float]
    seconds_per_step: float
    peak_memory_bytes: int | None


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    training: Training,
    device: torch.device,
    *,
    description: str | None = None,
    measure_memory: bool = False,
    after_step: Callable[[float], Any] | None = None,
) -> Fit:
    """Train what of ``model`` requires gradients.

    Args:
        loss_of: step -> the batch's loss.
        description: of a progress bar; None for none.
        measure_memory: of the third step, which then is left out of the timing.
        after_step: called with the training's progress in (0, 1] after every step.
    """
    from tqdm import tqdm

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.lr, weight_decay=training.weight_decay)
    warmup = max(1, training.steps // 10)

    def rate(step: int) -> float:
        rest = (step - warmup) / max(1, training.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * rest)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    memory = StepMemory(device)
    losses: list[Tensor] = []
    seconds: list[float] = []
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def step(number: int) -> None:
        loss = loss_of(number)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.detach())

    model.train()
    for number in tqdm(range(training.steps), desc=description, unit="step", disable=description is None, leave=False):
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(derive_seed(training.seed, number))  # dropout is the step's, whatever was drawn before
        started = clock()
        if measure_memory and number == 2:
            _forget(model)
            with memory.measure(model, optimizer):
                step(number)
        else:
            step(number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(clock() - started)
        schedule.step()
        if after_step is not None:
            after_step((number + 1) / training.steps)
    model.eval()
    return Fit(torch.stack(losses).tolist(), median(seconds), memory.peak_bytes)


def _forget(model: nn.Module) -> None:
    """Drop what the last step left to be read: freed within a measured step, the profiler would not know it."""
    for module in model.modules():
        if isinstance(module, InstructionMoE):
            module.last_gate = None
        if isinstance(module, Enriched):
            module.parts = {}


def _to(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def question_loss(
    model: Any,
    tokenizer: Any,
    part: DigitImages,
    questions: Sequence[Question],
    training: Training,
    device: torch.device,
) -> Callable[[int], Tensor]:
    """The loss of a step's batch: rows drawn by (seed, step), so that every method of one seed sees the same."""
    rows = rows_of(part, questions)
    queries = model.query_tokens.shape[1]

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(training.seed, step, len(rows)))
        drawn = draw_rows(rows, training.batch_size, generator)
        return model(**_to(collate(tokenizer, part.images, drawn, queries), device)).loss

    return loss_of


def pretrain(tokenizer: Any, data: PetalDigits, vision: Training, training: Training, device: torch.device) -> Any:
    """The base model, from scratch: the image encoder first, then Q-Former and language model together."""
    seed_everything(training.seed)
    model = plain_model(tokenizer).to(device)
    encoder = model.vision_model
    head = nn.Linear(model.config.vision_config.hidden_size, 10, device=device)
    images, labels = data.pretrain.images.expand(-1, 3, -1, -1).to(device), data.pretrain.labels.to(device)

    def naming(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(vision.seed, step))
        picked = torch.randint(len(labels), (vision.batch_size,), generator=generator).to(device)
        states = encoder(images[picked]).last_hidden_state
        return nn.functional.cross_entropy(head(states[:, 1:].mean(1)), labels[picked])

    fit(nn.ModuleList([encoder, head]), naming, vision, device, description="image encoder")
    encoder.requires_grad_(False)
    asking = question_loss(model, tokenizer, data.pretrain, PRETRAINED, training, device)
    texts = sentences()

    def both(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(training.seed, step, 1))
        picked = torch.randint(len(texts), (training.batch_size,), generator=generator).tolist()
        read = _to(encode(tokenizer, [texts[i] for i in picked]), device)
        return asking(step) + model.language_model(**read).loss

    fit(model, both, training, device, description="Q-Former and language model")
    return model


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, images: Tensor, rows: Sequence[Row], device: torch.device, beams: int = 1
) -> list[str]:
    """What the model generates for each row, greedily or by a search with ``beams`` beams."""
    model.eval()
    queries = model.query_tokens.shape[1]
    found: list[str] = []
    for start in range(0, len(rows), _EVAL_BATCH):
        batch = _to(collate(tokenizer, images, rows[start : start + _EVAL_BATCH], queries, answered=False), device)
        made = model.generate(**batch, max_new_tokens=_ANSWER, do_sample=False, num_beams=beams)
        new = made[:, batch["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return found


def score(
    model: Any, tokenizer: Any, part: DigitImages, questions: Sequence[Question], device: torch.device
) -> dict[str, float]:
    """Share of answers that are right to the word, by question's name, and their mean under "all"."""
    rows = rows_of(part, questions)
    given = answers(model, tokenizer, part.images, rows, device)
    right = torch.tensor([a == row.answer for a, row in zip(given, rows, strict=True)], dtype=torch.float64)
    found: dict[str, float] = {}
    start = 0
    for question in questions:
        count = len(question.phrasings) * len(part)
        found[question.name] = float(right[start : start + count].mean())
        start += count
    return found | {"all": sum(found.values()) / len(found)}
