"""transformers' encoder classifiers: BERT, RoBERTa and ViT.

The gist token goes in after the embeddings (their position, LayerNorm and dropout included), right after the first token,
and has no position of its own. The attention mask grows by a one in the same place. Both logits come from the same
pooler and head, which read the first row of what they are given: once the sequence, once the gist's rows.

Our own reconstruction: the paper speaks of language and releases no code for it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist import GistConfig, GistHost
from fastgist.peft.family import Family, LinearSite, register_family

__all__ = ["Encoder", "EncoderGist"]


@dataclass(frozen=True)
class _Kind:
    """One architecture: where its parts are, and how the head reads rows (B, n, D), of which the first counts."""

    body: str
    layers: str
    attention: str
    mlp: str
    read: Callable[[Any, Tensor], Tensor]
    example: Callable[[Any], dict[str, Tensor]]


def _read_bert(model: Any, rows: Tensor) -> Tensor:
    return model.classifier(model.dropout(model.bert.pooler(rows)))


def _read_roberta(model: Any, rows: Tensor) -> Tensor:
    return model.classifier(rows)


def _read_vit(model: Any, rows: Tensor) -> Tensor:
    return model.classifier(rows[:, 0])


def _words(model: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(2, model.config.vocab_size, (2, 8), device=model.device)}


def _pictures(model: Any) -> dict[str, Tensor]:
    size, channels = model.config.image_size, model.config.num_channels
    return {"pixel_values": torch.randn(2, channels, size, size, device=model.device, dtype=model.dtype)}


_POST_NORM = (r"\.attention\.output\.dense", r"\.\d+\.output\.dense")
_KINDS = {
    "BertForSequenceClassification": _Kind("bert", "bert.encoder", *_POST_NORM, _read_bert, _words),
    "RobertaForSequenceClassification": _Kind("roberta", "roberta.encoder", *_POST_NORM, _read_roberta, _words),
    "XLMRobertaForSequenceClassification": _Kind("roberta", "roberta.encoder", *_POST_NORM, _read_roberta, _words),
    "ViTForImageClassification": _Kind("vit", "vit.layers", r"\.attention\.o_proj", r"\.mlp", _read_vit, _pictures),
}
#: The end of a linear layer's path -> the name that targets know it by, in every architecture.
_ALIASES = {
    "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v", "attention.output.dense": "proj",
    "intermediate.dense": "fc1", "output.dense": "fc2",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "proj",
}  # fmt: skip


class Encoder(Family):
    """Classifiers of transformers with an encoder that starts with a class token."""

    name = "transformers BERT, RoBERTa, XLM-RoBERTa and ViT classifiers"

    def matches(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith("transformers.") and type(model).__name__ in _KINDS

    def head_paths(self, model: Any) -> tuple[str, ...]:
        return ("classifier",)

    def linears(self, model: Any) -> list[LinearSite]:
        kind = _KINDS[type(model).__name__]
        sites = []
        for path, module in model.get_submodule(kind.layers).named_modules(prefix=kind.layers):
            if all(isinstance(getattr(module, a, None), int) for a in ("in_features", "out_features")):
                alias = next((name for end, name in _ALIASES.items() if path.endswith(f".{end}")), None)
                sites.append(LinearSite(path, module, () if alias is None else (alias,)))
        return sites

    def sublayers(self, model: Any) -> dict[str, list[str]]:
        """BERT adds and norms behind its output layers: an adapter after those stands where Houlsby et al. have it."""
        kind = _KINDS[type(model).__name__]
        paths = [path for path, _ in model.get_submodule(kind.layers).named_modules(prefix=kind.layers)]
        attention = [p for p in paths if re.search(f"{kind.attention}$", p)]
        return {"mlp": [p for p in paths if re.search(f"{kind.mlp}$", p)], "attention": attention}

    def reserved_paths(self, model: Any) -> tuple[str, ...]:
        body = _KINDS[type(model).__name__].body  # transformers' ViT asks its patch embedding's weight for the dtype
        return EncoderGist(model).path, f"{body}.embeddings.patch_embeddings"

    def width(self, model: Any, path: str) -> int:
        return model.config.hidden_size

    def example_inputs(self, model: Any) -> tuple[Tensor, ...]:
        return tuple(_KINDS[type(model).__name__].example(model).values())

    def gist_host(self, model: Any) -> EncoderGist:
        return EncoderGist(model)


class EncoderGist(GistHost):
    """A gist token in an encoder classifier: row 1 of the sequence, behind the class token."""

    index = 1
    after = True

    def __init__(self, model: Any) -> None:
        kind = _KINDS[type(model).__name__]
        self.path = f"{kind.body}.embeddings.dropout"  # the last of them; the models look into the others
        self.dim = model.config.hidden_size
        if getattr(model.config, "is_decoder", False):
            raise ValueError(f"add_gist: {type(model).__name__} is set up as a decoder, whose first rows see no others")

    def forward(
        self, model: Any, config: GistConfig, want_gist: bool, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The classifier's arguments -> logits (B, C) and gist logits (B, C) or None."""
        given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        given = given | given.pop("kwargs", {})
        given.pop("self", None)
        if given.pop("labels", None) is not None:
            raise TypeError("GistModel: labels are given by name, labels=...")
        mask = given.get("attention_mask")
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError(f"GistModel: expected attention_mask of shape (B, N), got {tuple(mask.shape)}")
            ones = mask.new_ones(mask.shape[0], config.length)
            given["attention_mask"] = torch.cat((mask[:, :1], ones, mask[:, 1:]), dim=1)
        kind = _KINDS[type(model).__name__]
        states = model.get_submodule(kind.body)(**given | {"return_dict": True}).last_hidden_state
        if not want_gist:
            return kind.read(model, states), None
        gist = states[:, 1 : 1 + config.rows]
        if config.rows > 1:
            gist = gist.mean(1, keepdim=True)
        logits = kind.read(model, torch.cat((states[:, :1], gist)))  # one call: the halves are contiguous
        return logits[: len(states)], logits[len(states) :]


register_family(Encoder())
