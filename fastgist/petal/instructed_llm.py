"""PETAL's experts on the instruction that the language model reads (its figure has the instruction feed both)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn import InstructionMoE
from fastgist.petal.calls import IGNORED, arguments

__all__ = ["InstructedLanguageModel"]


class InstructedLanguageModel(nn.Module):
    """Experts on the language model's embeddings of an instruction's words, gated by those words.

    Words of the instruction are those that are no image token and no padding and, where labels are given for the same
    sequence (a decoder-only model), that no loss counts: an answer must not show through the gate. So **labels have to be
    -100 on the instruction**, as they are for question answering; what the model generates is never enriched either.

    Args:
        experts: of the language model's width.
    """

    def __init__(self, experts: InstructionMoE) -> None:
        super().__init__()
        self.experts = experts
        #: Which words of the call to come count, (B, L); True: no labels say so. None: the next embeddings are no instruction.
        self._awaited: Tensor | bool | None = None
        self._labels: Tensor | None = None
        self._image = -1
        self._padding: int | None = None

    def hooks(self, model: Any) -> list[Any]:
        """What is embedded next after the Q-Former ran is the instruction, and nothing once the language model runs."""
        self._image, self._padding = model.config.image_token_id, model.config.text_config.pad_token_id
        return [
            model.register_forward_pre_hook(self._note_labels, with_kwargs=True),
            model.qformer.register_forward_pre_hook(self._await),
            model.get_input_embeddings().register_forward_hook(self._enrich),
            model.language_model.register_forward_pre_hook(self._stop),
        ]

    def _note_labels(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        labels = arguments(model, args, kwargs).get("labels")
        self._labels = labels if model.config.use_decoder_only_language_model else None

    def _await(self, *_: Any) -> None:
        self._awaited = True if self._labels is None else self._labels == IGNORED
        self._labels = None

    def _stop(self, *_: Any) -> None:
        self._awaited = None

    def _enrich(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        ids, counted = args[0], self._awaited
        if counted is None or ids.dim() != 2:
            return output
        self._awaited = None
        return self.forward(ids, output, counted if isinstance(counted, Tensor) else None)

    def forward(self, ids: Tensor, embedded: Tensor, counted: Tensor | None = None) -> Tensor:
        """Words (B, L) and their embeddings (B, L, D) -> the latter with the instruction's enriched. ``counted`` (B, L): False
        for words of an answer."""
        words = ids != self._image
        if self._padding is not None:
            words = words & (ids != self._padding)
        if counted is not None:
            words = words & counted.to(words.device)
        return torch.where(words[..., None], self.experts(embedded, embedded, words), embedded)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_awaited": None, "_labels": None}
