r"""A gist token among the Q-Former's queries: GIST (arXiv 2312.07255) and PETAL together. Our own design; no paper has it.

The token stands behind the queries and goes with them through every layer, image tokens included. The language model
reads the queries as before. In training it reads the gist token's state a second time, in the place of every image token, and
the two give each other the bidirectional KL loss word by word:

.. math:: L = CE(z, y) + \alpha\, CE(z_g, y) + \beta\, [KL(p \| q) + KL(q \| p)].

The second reading doubles the language model's part of a training step. In inference there is none; the token stays in the
Q-Former, whose queries attend to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgist import functional
from fastgist.nn import GistToken
from fastgist.petal.calls import IGNORED, PerThread, arguments, items_of
from fastgist.petal.config import QueryGistConfig
from fastgist.petal.instructed_llm import InstructedLanguageModel

__all__ = ["QueryGist"]


class QueryGist(nn.Module):
    """The token, how it goes into a Q-Former and out, and its loss.

    Args:
        dim: the Q-Former's width. config: its settings. place: device and dtype.
    """

    def __init__(self, dim: int, config: QueryGistConfig, **place: Any) -> None:
        super().__init__()
        self.config = config
        self.token = GistToken(dim, config.length, config.dropout, **place)
        #: states: the token's final ones, (B, length, D), until the model's forward is over. They are no part of the
        #: Q-Former's output, which those around a model (accelerate, DistributedDataParallel, torch.export) make anew
        #: from what transformers' class knows.
        self._now = PerThread(states=None)

    def hooks(self, model: Any) -> list[Any]:
        """Put the token into every call of the Q-Former, and take it out of what comes back."""
        return [
            model.qformer.register_forward_pre_hook(self._put_in, with_kwargs=True),
            model.qformer.register_forward_hook(self._take_out, with_kwargs=True),
        ]

    def _put_in(self, qformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = arguments(qformer, args, kwargs)
        queries = given.get("query_embeds")
        if queries is None:
            return None
        number, length = queries.shape[1], self.config.length
        given["query_embeds"] = torch.cat((queries, self.token(queries).to(queries.dtype)), dim=1)
        mask = given.get("attention_mask")
        if mask is not None:
            given["attention_mask"] = torch.cat(
                (mask[:, :number], mask.new_ones(mask.shape[0], length), mask[:, number:]), dim=1
            )
        if given.get("query_length") is not None:
            given["query_length"] += length
        return (), given

    def _take_out(self, qformer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        given = arguments(qformer, args, kwargs)
        if given.get("query_embeds") is None:
            return output
        stop = given["query_embeds"].shape[1]  # those that went in: the hook before this call has put the token there
        start = stop - self.config.length
        states = output[0]
        kept = torch.cat((states[:, :start], states[:, stop:]), dim=1)
        self._now["states"] = states[:, start:stop]
        if isinstance(output, tuple):
            return (kept, *output[1:])
        output["last_hidden_state"] = kept
        return output

    def take_states(self) -> Tensor | None:
        """The token's states in the last call of the Q-Former, once."""
        states, self._now["states"] = self._now["states"], None
        return states

    def loss(self, model: Any, given: dict[str, Any], output: Any, language: InstructedLanguageModel | None) -> Tensor:
        """The whole loss of a training forward: the task's, the token's own and the interaction.

        Args:
            given: the model's arguments by name. output: what it returned, with a loss. language: the experts on the
                language model's instruction, if there are any.

        Raises:
            ValueError: nothing says where the image tokens are (``input_ids``), or the Q-Former has not run since the last
                loss (features of the image came along a second time).
        """
        ids, labels = given.get("input_ids"), given["labels"]
        if ids is None:
            raise ValueError("petal: a gist token among the queries needs input_ids, which say where image tokens are")
        states = self.take_states()
        if states is None:
            raise ValueError(
                "petal: a gist token among the queries is read from the Q-Former, which did not run for this loss"
            )
        states = states.mean(1, keepdim=True)
        seen = model.language_projection(states.to(model.language_projection.weight.dtype))
        causal = model.config.use_decoder_only_language_model
        embeds = model.get_input_embeddings()(ids)
        if language is not None:
            embeds = language(ids, embeds, labels == IGNORED if causal else None)
        embeds = torch.where((ids == model.config.image_token_id)[..., None], seen.to(embeds.dtype), embeds)
        mask = given.get("attention_mask")
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids) if mask is None else mask}
        if not causal:
            options |= {"labels": labels} | {
                name: given[name]
                for name in ("decoder_input_ids", "decoder_attention_mask")
                if given.get(name) is not None
            }
        other = model.language_model(inputs_embeds=embeds, **options).logits
        logits, target = output.logits, labels.to(output.logits.device)
        if causal:  # a word is read from the state before it
            logits, other, target = logits[:, :-1], other[:, :-1], target[:, 1:]
        items = items_of(model, given)
        value = functional.gist_loss(
            logits,
            other.to(logits.dtype),
            target,
            alpha=self.config.alpha,
            beta=self.config.beta,
            temperature=self.config.temperature,
            ignore_index=IGNORED,
            reduction="mean" if items is None else "sum",
        )
        return value if items is None else value / items
