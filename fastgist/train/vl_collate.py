"""Records to the inputs of InstructBLIP and BLIP-2, for training and for generating.

transformers' processors put the image tokens in front, before the tokenizer's own first token: <image> * 32, BOS, prompt.
InstructBLIP's gives the prompt to the Q-Former too, in that one's tokens; BLIP-2's has no text there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgist.train.config import UserError
from fastgist.train.data import derive_seed
from fastgist.train.vl_records import Example

__all__ = ["VLCollator", "fill"]

IGNORED = -100


def fill(template: str, question: str | None) -> str:
    """``template`` with the question where it has ``{}``; one without ``{}`` is the prompt.

    Raises:
        ValueError: a question and no place for it, or the other way round.
    """
    if template.count("{}") != (question is not None):
        asked = "a question" if question is not None else "no question"
        raise ValueError(f"template {template!r}: has {template.count('{}')} places for {asked}")
    return template.replace("{}", question) if question is not None else template


class VLCollator:
    """Batches of :class:`Example`, as a loader's ``collate_fn`` or a Trainer's ``data_collator``.

    A decoder-only language model (OPT, Vicuna) reads prompt, answer and end in one sequence, padded on the right; its
    labels are -100 but for answer and end. An encoder-decoder (T5) reads the prompt, and its labels are the answer. Which
    answer, and of several templates which one, is drawn anew every epoch: with the probability that the annotators gave
    it, as a function of (seed, epoch, row) alone.

    Args:
        processor: an InstructBlipProcessor or a Blip2Processor.
        decoder_only: which kind of language model; :meth:`for_model` asks the model.
        templates: prompts with ``{}`` where the question goes (see :mod:`fastgist.recipes.petal`), or for captions
            without. Evaluation takes the first. "" is BLIP-2's captioning without a prompt.
        sample: draw answer and template; else the most frequent answer, of equals the first, and the first template.
        seed: of the draws.
        max_prompt_tokens: longer prompts are cut by the tokenizer, at its ``truncation_side``. (The processor lets the
            Q-Former's be longer by the number of queries.)
        max_answer_tokens: longer answers are cut on the right, and then have no end.
        end_token_id: what ends an answer of a decoder-only model: what its generation stops at, which for BLIP-2's OPT
            is a newline and not the tokenizer's end; that if None. T5's tokenizer writes its own.

    Raises:
        ValueError: no template; a processor that would insert no image tokens, whose images today's models would not see;
            a tokenizer without a padding token, or without an end.
    """

    def __init__(
        self,
        processor: Any,
        decoder_only: bool,
        templates: str | Sequence[str],
        *,
        sample: bool = True,
        seed: int = 0,
        max_prompt_tokens: int = 128,
        max_answer_tokens: int = 256,
        end_token_id: int | None = None,
    ) -> None:
        self.templates = [templates] if isinstance(templates, str) else list(templates)
        if not self.templates:
            raise ValueError("VLCollator: expected at least one template")
        if getattr(processor, "num_query_tokens", None) is None:
            raise ValueError(
                "VLCollator: the processor has no num_query_tokens and would insert no image tokens: set "
                "processor.num_query_tokens to model.config.num_query_tokens"
            )
        tokenizer = processor.tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError("VLCollator: the processor's tokenizer has no pad_token")
        self.end_token_id = tokenizer.eos_token_id if end_token_id is None else end_token_id
        if self.end_token_id is None and decoder_only:
            raise ValueError("VLCollator: the tokenizer has no eos_token: pass end_token_id")
        self.processor, self.decoder_only = processor, decoder_only
        self.sample, self.seed = sample, seed
        self.max_prompt_tokens, self.max_answer_tokens = max_prompt_tokens, max_answer_tokens

    @classmethod
    def for_model(cls, model: Any, processor: Any, templates: str | Sequence[str], **options: Any) -> VLCollator:
        """A collator for ``model``: its kind of language model, and what ends a generation of it.

        Raises:
            ValueError: as the class; or model and processor disagree on the image token, the number of queries, or whether the
                Q-Former reads the instruction.
        """
        config = model.config
        if hasattr(model.qformer, "embeddings") and getattr(processor, "qformer_tokenizer", None) is None:
            raise ValueError(
                f"VLCollator: {type(model).__name__}'s Q-Former reads the instruction, for which {type(processor).__name__} "
                "has no tokenizer: take an InstructBlipProcessor"
            )
        token = _image_token_id(processor)
        if token != config.image_token_index:
            raise ValueError(
                f"VLCollator: the processor's image token is {token}, model.config.image_token_index is "
                f"{config.image_token_index}: they must agree, and the model's embedding must have that row"
            )
        queries = getattr(processor, "num_query_tokens", None)
        if queries is not None and queries != config.num_query_tokens:
            raise ValueError(f"VLCollator: the processor has {queries} queries, the model {config.num_query_tokens}")
        decoder_only = bool(config.use_decoder_only_language_model)
        if decoder_only and "end_token_id" not in options:
            end = getattr(model.language_model.generation_config, "eos_token_id", None)
            options["end_token_id"] = end[0] if isinstance(end, list) else end
        return cls(processor, decoder_only, templates, **options)

    # -- what is asked and what should be said -----------------------------------------------------------------------

    def prompt(self, example: Example) -> str:
        """The prompt of an example: the first template's, or the drawn one's."""
        template = self._random(example, 1).choice(self.templates) if self.sample else self.templates[0]
        return fill(template, example.record.question)

    def target(self, example: Example) -> str:
        """The answer or caption to learn: drawn by the counts, or the most frequent.

        Raises:
            UserError: the record has none, as in a test split.
        """
        record = example.record
        if not record.targets:
            raise UserError(
                f"{record.dataset}'s {record.split} split has no answers to train on (record {record.id}); to generate, "
                f"take VLCollator.inputs"
            )
        return self._random(example, 0).choice(record.targets) if self.sample else next(iter(record.counts))

    def _random(self, example: Example, what: int) -> random.Random:
        return random.Random(derive_seed(self.seed, example.epoch, example.row, what))

    # -- tensors -----------------------------------------------------------------------------------------------------

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Inputs with labels.

        Returns:
            pixel_values (B, 3, H, W); input_ids and attention_mask (B, L), L counting the image tokens; labels, (B, L)
            or for an encoder-decoder (B, A); for InstructBLIP qformer_input_ids and qformer_attention_mask (B, Q).
        """
        prompts = [self.prompt(example) for example in examples]
        targets = [self.target(example) for example in examples]
        encoded, batch = self._encode(examples, prompts)
        if not self.decoder_only:
            tokenizer = self.processor.tokenizer
            answers = tokenizer(text_target=targets, truncation=True, max_length=self.max_answer_tokens, verbose=False)[
                "input_ids"
            ]
            return batch | self._language(encoded, "right") | {"labels": _padded(answers, IGNORED, "right")}
        answers = [self._answer(prompt, target) for prompt, target in zip(prompts, targets)]
        labels = [[IGNORED] * len(ids) + answer for ids, answer in zip(encoded, answers)]
        whole = [ids + answer for ids, answer in zip(encoded, answers)]
        return batch | self._language(whole, "right") | {"labels": _padded(labels, IGNORED, "right")}

    def inputs(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Inputs to generate from: no labels, the first template; prompts of decoder-only models padded on the left.

        (The processor itself pads between the image tokens and the prompt. A model that counts positions by the attention
        mask, as generation does, makes the same of both.)
        """
        prompts = [fill(self.templates[0], example.record.question) for example in examples]
        encoded, batch = self._encode(examples, prompts)
        return batch | self._language(encoded, "left" if self.decoder_only else "right")

    def _encode(self, examples: Sequence[Example], prompts: list[str]) -> tuple[list[list[int]], dict[str, Tensor]]:
        """(image and prompt tokens of each example, the tensors that do not depend on the answers)."""
        encoded = self.processor(
            images=[example.picture for example in examples],
            text=prompts,
            padding=False,
            truncation=True,
            max_length=self.max_prompt_tokens + self.processor.num_query_tokens,
        )
        batch = {"pixel_values": torch.stack([torch.as_tensor(image) for image in encoded["pixel_values"]])}
        if "qformer_input_ids" in encoded:
            padding = self.processor.qformer_tokenizer.pad_token_id
            batch["qformer_input_ids"] = _padded(encoded["qformer_input_ids"], padding, "right")
            batch["qformer_attention_mask"] = _padded(encoded["qformer_attention_mask"], 0, "right")
        return encoded["input_ids"], batch

    def _language(self, ids: list[list[int]], side: str) -> dict[str, Tensor]:
        mask = _padded([[1] * len(row) for row in ids], 0, side)
        return {"input_ids": _padded(ids, self.processor.tokenizer.pad_token_id, side), "attention_mask": mask}

    def _answer(self, prompt: str, target: str) -> list[int]:
        """Tokens of ``target`` as they follow ``prompt`` in running text, and the end."""
        tokenizer = self.processor.tokenizer

        def tokens(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        before = tokens(prompt)
        space = " " if prompt and not prompt[-1].isspace() else ""
        together = tokens(prompt + space + target)
        # A tokenizer that merges across the boundary would give the prompt other tokens than generation starts from.
        answer = together[len(before) :] if together[: len(before)] == before else tokens(target)
        assert self.end_token_id is not None
        return (
            answer[: self.max_answer_tokens] if len(answer) >= self.max_answer_tokens else [*answer, self.end_token_id]
        )


def _image_token_id(processor: Any) -> int:
    token = processor.image_token
    return processor.tokenizer.convert_tokens_to_ids(getattr(token, "content", token))


def _padded(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    """(B, longest) int64."""
    length = max(len(row) for row in rows)
    fillers = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if side == "left" else [*row, *f] for f, row in zip(fillers, rows)])
