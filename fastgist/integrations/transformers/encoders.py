"""transformers' encoder classifiers, of text and of images; :mod:`.kinds` lists them.

The gist token goes in after the embeddings (their position, LayerNorm and dropout included), right after the class token
(and distillation and register tokens), and has no position of its own. In CLIP, as in timm's, it goes in before the norm
in front of the first layer; in T5 the model's own dropout of its embeddings acts on it too. The attention mask grows by
a one in the same place. Both logits come from the same pooler and head; :mod:`.kinds` says which rows they read.

Where positions are relative (DeBERTa-v2, T5) or rotary (ModernBERT), the token takes the place right behind the first
one and the others move up. So the first token sees it at distance 1, as it saw the second token before: in T5 the bucket
``num_buckets / 2 + 1`` of the bias from first token to gist and bucket 1 back, in DeBERTa-v2 rows ``span - 1`` and
``span + 1`` of the relative embedding. No model has a longest sequence that this would exceed.

A text padded on the left is rolled so that its first real token stands first, then run: the logits are those of the same
text padded on the right. (That is the gist model's doing. Without one, a text padded on the left is the model's own
affair, and most read a padding row then.)

Prompts stand behind the gist token, prefixes have no position at all.

Our own reconstruction: the paper speaks of language and releases no code for it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist import GistConfig, GistHost
from fastgist.integrations.transformers.attention import attention_site, find_attention
from fastgist.integrations.transformers.blocks import block_forward
from fastgist.integrations.transformers.kinds import KINDS, hidden_config, kind_of, matching
from fastgist.integrations.transformers.refusals import why_not
from fastgist.integrations.transformers.rows import GIST_STATES, count_rows
from fastgist.nn import BlockForward
from fastgist.peft.family import AttentionSite, Family, LinearSite, register_family

__all__ = ["Encoder", "EncoderGist"]

#: The end of a linear layer's path -> the name that targets know it by, in every architecture; the longest end counts.
_ALIASES = {
    "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v", "attention.output.dense": "proj",
    "intermediate.dense": "fc1", "output.dense": "fc2",
    "query_proj": "q", "key_proj": "k", "value_proj": "v",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "proj", "out_proj": "proj",
    "q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "proj", "ffn.lin1": "fc1", "ffn.lin2": "fc2",
    "gate_proj": "fc1", "up_proj": "fc1", "down_proj": "fc2",
    "SelfAttention.o": "proj", "wi": "fc1", "wi_0": "fc1", "wi_1": "fc1", "wo": "fc2",
    "attn.Wo": "proj", "mlp.Wi": "fc1", "mlp.Wo": "fc2",
}  # fmt: skip
#: Arguments of a text model that hold something for each token.
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


class Encoder(Family):
    """Classifiers of transformers with an encoder."""

    name = (
        "transformers BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, DeBERTa-v2, ModernBERT, T5 encoder, "
        "ViT, DeiT, DINOv2 and CLIP classifiers"
    )

    def matches(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith(("transformers.", __package__)) and type(model).__name__ in KINDS

    def why_not(self, model: nn.Module) -> str | None:
        return why_not(model)

    def head_paths(self, model: Any) -> tuple[str, ...]:
        return kind_of(model).head

    def linears(self, model: Any) -> list[LinearSite]:
        kind = kind_of(model)
        sites = []
        for path, module in model.get_submodule(kind.layers).named_modules(prefix=kind.layers):
            if all(isinstance(getattr(module, a, None), int) for a in ("in_features", "out_features")):
                ends = [end for end in _ALIASES if path.endswith(f".{end}")]
                aliases = (_ALIASES[max(ends, key=len)],) if ends else ()
                parts = ("q", "k", "v") if path.endswith(".Wqkv") else ()
                sites.append(LinearSite(path, module, aliases, parts))
        return sites

    def sublayers(self, model: Any) -> dict[str, list[str]]:
        """BERT adds and norms behind its output layers: an adapter after those stands where Houlsby et al. have it."""
        kind = kind_of(model)
        paths = [path for path, _ in model.get_submodule(kind.layers).named_modules(prefix=kind.layers)]
        attention = matching(paths, kind.attention)
        return {"mlp": [p for p in matching(paths, kind.mlp) if p not in attention], "attention": attention}

    def reserved_paths(self, model: Any) -> tuple[str, ...]:
        kind = kind_of(model)
        return kind.entry_of(model), *kind.reserved

    def width(self, model: Any, path: str) -> int:
        kind, config = kind_of(model), hidden_config(model)
        behind_it = kind.projection is not None and path == kind.prompts  # in ELECTRA's small sizes
        return config.embedding_size if behind_it else config.hidden_size

    def residual_blocks(self, model: Any) -> dict[str, BlockForward]:
        layers = model.get_submodule(kind_of(model).layers)
        _refuse_decoder(model)
        return {path: block_forward(layer) for path, layer in self._layers(model, layers)}

    def attentions(self, model: Any) -> dict[str, AttentionSite]:
        _refuse_decoder(model)
        layers = model.get_submodule(kind_of(model).layers)
        paths = [find_attention(layer, path) for path, layer in self._layers(model, layers)]
        return {path: attention_site(model.get_submodule(path)) for path in paths}

    def prompt_blocks(self, model: Any) -> list[str]:
        kind = kind_of(model)
        _refuse_decoder(model)
        first, *others = [path for path, _ in self._layers(model, model.get_submodule(kind.layers))]
        return [first if kind.prompts is None else kind.prompts, *others]

    def prompts_after(self, model: Any) -> bool:
        return kind_of(model).prompts is not None

    @staticmethod
    def _layers(model: nn.Module, layers: Any) -> list[tuple[str, nn.Module]]:
        return [(f"{kind_of(model).layers}.{name}", layer) for name, layer in layers.named_children()]

    def after_change(self, model: Any) -> None:
        kind = kind_of(model)
        count_rows(model, kind)
        for module in model.get_submodule(kind.layers).modules():
            base: Any = getattr(module, "base_layer", None)
            if hasattr(base, "attention_type"):  # ModernBERT's body asks its layers for it
                module.attention_type = base.attention_type
            wo = getattr(module, "wo", None)
            if hasattr(wo, "base_layer"):  # T5 asks this layer's weight for its dtype; our layers have none
                wo.__dict__.setdefault("weight", None)

    def example_inputs(self, model: Any) -> tuple[Tensor, ...]:
        config = hidden_config(model)
        if kind_of(model).image:
            size, channels = config.image_size, config.num_channels
            sides = (size, size) if isinstance(size, int) else tuple(size)
            return (torch.randn(2, channels, *sides, device=model.device, dtype=model.dtype),)
        return (torch.randint(2, config.vocab_size, (2, 8), device=model.device),)

    def gist_host(self, model: Any) -> EncoderGist:
        return EncoderGist(model)


def _refuse_decoder(model: Any) -> None:
    if getattr(model.config, "is_decoder", False):
        raise ValueError(f"{type(model).__name__} is set up as a decoder, whose first rows see no others")


class EncoderGist(GistHost):
    """A gist token in an encoder classifier: behind the class token and what belongs to it."""

    def __init__(self, model: Any) -> None:
        kind = kind_of(model)
        self.path = kind.entry_of(model)
        self.after = kind.after
        self.index = kind.own(model)
        config = hidden_config(model)
        self.dim = config.hidden_size
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        if getattr(model.config, "is_decoder", False):
            raise ValueError(f"add_gist: {type(model).__name__} is set up as a decoder, whose first rows see no others")

    def attached(self, model: Any, length: int) -> None:
        count_rows(model, kind_of(model))

    def detached(self, model: Any, length: int) -> None:
        count_rows(model, kind_of(model))

    def forward(
        self, model: Any, config: GistConfig, want_gist: bool, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The classifier's arguments -> logits (B, C) and gist logits (B, C) or None."""
        if len(args) > len(self.names):
            raise TypeError(
                f"GistModel: {type(model).__name__} takes {', '.join(self.names)}; got {len(args)} arguments"
            )
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if given.pop("labels", None) is not None:
            raise TypeError("GistModel: labels are given by name, labels=...")
        kind = kind_of(model)
        mask = given.get("attention_mask")
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError(f"GistModel: expected attention_mask of shape (B, N), got {tuple(mask.shape)}")
            if not kind.image:
                given = _first_token_first(given, mask)
                mask = given["attention_mask"]
        encode = model.encode if kind.encode else model.get_submodule(kind.body)
        output = encode(**given | {"return_dict": True})
        states = output.last_hidden_state
        rows = kind.pool(model, states, mask)
        if not want_gist:
            return kind.classify(model, rows), None
        gist = output[GIST_STATES][:, : config.rows]
        gist = gist[:, 0] if config.rows == 1 else gist.mean(1)
        # one call: the halves are contiguous
        logits = kind.classify(model, torch.cat((rows, kind.pool_gist(model, states, gist))))
        return logits[: len(states)], logits[len(states) :]


def _first_token_first(given: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """Each row of a batch of texts rolled by the padding on its left."""
    first = (mask != 0).int().argmax(dim=1, keepdim=True)  # of equals, argmax gives the first
    order = torch.arange(mask.shape[1], device=mask.device) + first
    order = torch.where(
        order < mask.shape[1], order, order - mask.shape[1]
    )  # ONNX takes no remainder by a dynamic size
    rolled = dict(given)
    for name in _PER_TOKEN:
        value = given.get(name)
        if value is not None:
            value = value.expand(mask.shape[0], *value.shape[1:])
            rolled[name] = value.gather(1, order if value.dim() == 2 else order[..., None].expand_as(value))
    return rolled


register_family(Encoder())
