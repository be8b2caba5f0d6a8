"""What of PETAL stands around the Q-Former's embeddings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastgist.nn import Gate, InformationBottleneckLoss, InstructionMixer, InstructionMoE
from fastgist.petal import losses
from fastgist.petal.calls import PerThread, arguments
from fastgist.petal.instructed_llm import InstructedLanguageModel
from fastgist.petal.query_gist import QueryGist

__all__ = ["Enriched"]


class Enriched(nn.Module):
    """Around the last layer of the Q-Former's embeddings: the experts on queries and instruction, and what of PETAL is in the
    model's loss.

    The gate is that of the instruction's real tokens; of a Q-Former that reads no instruction (BLIP-2's), of the queries: then
    it is the same for every input.

    Args:
        base_layer: what makes the embedded sequence (B, N, D), queries first.
        experts, mixer, bottleneck, gist, language: or None.
        load_balance: factor of the experts' load-balance loss.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        experts: InstructionMoE | None,
        mixer: InstructionMixer | None,
        bottleneck: InformationBottleneckLoss | None,
        gist: QueryGist | None,
        language: InstructedLanguageModel | None,
        load_balance: float,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.experts, self.mixer, self.bottleneck, self.gist, self.language = experts, mixer, bottleneck, gist, language
        self.load_balance = load_balance
        #: The last training forward's parts of the loss, detached scalars: "task", "gist", "balance", "bottleneck".
        self.parts: dict[str, Tensor] = {}
        self._warned = False
        #: noted: see :meth:`note`. gate, plain: see :meth:`gated_by` and :meth:`plain`. due: whether the last call's gate is
        #: still to go into a loss.
        self._now = PerThread(noted=(None, None), gate=None, plain=False, due=False)
        self._handles: tuple[Any, ...] = ()

    # -- in and out of a model --------------------------------------------------------------------------------------------
    def attached(self, model: Any) -> None:
        handles = [handle for part in (self.gist, self.language) if part is not None for handle in part.hooks(model)]
        # Behind the gist token's hook: what is noted is the sequence with the token in it.
        handles.append(model.qformer.register_forward_pre_hook(_note, with_kwargs=True))
        if self.bottleneck is not None or self.gist is not None or (self.gated and self.load_balance > 0):
            handles.append(model.register_forward_hook(losses.add, with_kwargs=True))
        self._handles = tuple(handles)

    @property
    def gated(self) -> list[InstructionMoE]:
        """The mixtures that have a gate."""
        both = (self.experts, None if self.language is None else self.language.experts)
        return [moe for moe in both if moe is not None and moe.gating == "softmax"]

    def due(self) -> list[InstructionMoE]:
        """The mixtures with a gate that no loss has counted, and counted from now on: a call may leave one of them out, and
        find the gate of another call, whose graph is gone."""
        called = [site for site in (self, self.language) if site is not None and site._now["due"]]
        for site in called:
            site._now["due"] = False
        return [moe for moe in self.gated if any(moe is site.experts for site in called)]

    def detached(self, model: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def warn_of_evaluation(self) -> None:
        """Say once that a loss was taken with gradients in evaluation mode, where nothing of PETAL is in it."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "petal: a loss with gradients was taken in evaluation mode, where dropout and PETAL's terms of the loss are "
                "off: call model.train() to train (from_pretrained gives a model in evaluation mode)",
                UserWarning,
                stacklevel=3,
            )

    # -- forward ----------------------------------------------------------------------------------------------------------
    def note(self, attention_mask: Tensor | None, query_length: int | None) -> None:
        """What the Q-Former was called with: (B, N) of its sequence, and how many of it are queries (None: all)."""
        self._now["noted"] = (attention_mask, query_length)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        (mask, queries), self._now["noted"] = self._now["noted"], (None, None)
        if self.experts is None or self._now["plain"]:
            return y
        gate = self._now["gate"]
        if gate is None:
            gate = self._gate_of(y, mask, y.shape[1] if queries is None else queries)
        elif gate.weights.shape[0] != y.shape[0]:
            raise ValueError(f"petal.instructed: the gate is for {gate.weights.shape[0]} samples, got {y.shape[0]}")
        self._now["due"] = True
        return self.experts(y, gate=gate).to(y.dtype)  # under autocast the sequence stays as wide as the model has it

    def _gate_of(self, y: Tensor, mask: Tensor | None, queries: int) -> Gate:
        assert self.experts is not None
        if queries >= y.shape[1]:
            return self.experts.get_gate(y)
        mask = None if mask is None else mask[:, queries:] != 0  # transformers takes floating-point ones too
        return self.experts.get_gate(y[:, queries:], mask)

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Within it the experts are left out."""
        before, self._now["plain"] = self._now["plain"], True
        try:
            yield
        finally:
            self._now["plain"] = before

    @contextlib.contextmanager
    def gated_by(self, gate: Gate) -> Iterator[None]:
        """Within it ``gate`` takes the place of the instruction's own."""
        before, self._now["gate"] = self._now["gate"], gate
        try:
            yield
        finally:
            self._now["gate"] = before

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"parts": {}}  # tensors in a graph


def _note(qformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Tell :class:`Enriched` in this Q-Former of the call to come."""
    given = arguments(qformer, args, kwargs)
    length = given.get("query_length")
    embeds = given.get("query_embeds")
    if length is None:
        length = 0 if embeds is None else embeds.shape[1]
    for child in getattr(qformer, "embeddings", qformer).children():
        if isinstance(child, Enriched):
            child.note(given.get("attention_mask"), length)
