"""PETAL's experts on the instruction that the language model reads (its figure has the instruction feed both)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn import InstructionMoE
from fastgist.petal.calls import IGNORED, PerThread, arguments

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
        #: awaited: which words of the call to come count, (B, L); True: no labels say so. None: the next embeddings are no
        #: instruction. due: whether the last call's gate is still to go into a loss.
        self._now = PerThread(awaited=None, due=False)
        self._image = -1
        self._padding: int | None = None

    def hooks(self, model: Any) -> list[Any]:
        """What is embedded first in a forward is the instruction, and in ``generate``, which is no forward, what is embedded
        next after the Q-Former ran; nothing once the language model runs, or a forward is over, if by an error."""
        self._image, self._padding = model.config.image_token_id, model.config.text_config.pad_token_id
        return [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._stop, always_call=True),
            model.qformer.register_forward_pre_hook(self._await),
            model.get_input_embeddings().register_forward_hook(self._enrich),
            model.language_model.register_forward_pre_hook(self._stop),
        ]

    def _begin(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        labels = arguments(model, args, kwargs).get("labels")
        counts = labels is not None and model.config.use_decoder_only_language_model
        self._now["awaited"], self._now["due"] = labels == IGNORED if counts else True, False

    def _await(self, *_: Any) -> None:
        if self._now["awaited"] is None:
            self._now["awaited"] = True

    def _stop(self, *_: Any) -> None:
        self._now["awaited"] = None

    def _enrich(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        ids, counted = args[0], self._now["awaited"]
        if counted is None or ids.dim() != 2:
            return output
        self._now["awaited"], self._now["due"] = None, True
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
