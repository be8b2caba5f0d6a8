"""InstructBLIP and BLIP-2 (transformers): adapters go into the Q-Former, and into nothing else.

Image encoder, query tokens, language projection and language model stay frozen; there is no head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgist.peft.family import Family, LinearSite, register_family

__all__ = ["QFormer"]

_NAMES = ("InstructBlipForConditionalGeneration", "InstructBlipModel", "Blip2ForConditionalGeneration", "Blip2Model")
#: The end of a linear layer's path -> the name that targets know it by.
_ALIASES = {
    "attention.query": "q", "attention.key": "k", "attention.value": "v",
    "attention.output.dense": "proj", "crossattention.output.dense": "proj",
    "intermediate.dense": "fc1", "intermediate_query.dense": "fc1", "output_query.dense": "fc2",
}  # fmt: skip
_LAYERS = "qformer.encoder.layer"


class QFormer(Family):
    """transformers' vision-language models with a Q-Former."""

    name = "transformers InstructBLIP and BLIP-2 (their Q-Former)"

    def matches(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith("transformers.") and type(model).__name__ in _NAMES

    def head_paths(self, model: Any) -> tuple[str, ...]:
        return ()

    def linears(self, model: Any) -> list[LinearSite]:
        return [
            LinearSite(path, module, (_alias(path),))
            for path, module in model.get_submodule(_LAYERS).named_modules(prefix=_LAYERS)
            if all(isinstance(getattr(module, a, None), int) for a in ("in_features", "out_features"))
        ]

    def sublayers(self, model: Any) -> dict[str, list[str]]:
        """The output layers, behind which the Q-Former adds and norms, as in BERT."""
        paths = [site.path for site in self.linears(model)]
        return {
            "mlp": [p for p in paths if p.endswith((".output_query.dense", ".output.dense")) and "attention" not in p],
            "attention": [p for p in paths if p.endswith("attention.output.dense")],
        }

    def width(self, model: Any, path: str) -> int:
        return model.config.qformer_config.hidden_size

    def reserved_paths(self, model: Any) -> tuple[str, ...]:
        return "qformer.embeddings.layernorm", "qformer.layernorm"  # whose weight they ask for its dtype

    def affine_layers(self, model: Any) -> dict[str, nn.Module]:
        return {p: m for p, m in super().affine_layers(model).items() if p.startswith("qformer.")}

    def after_change(self, model: Any) -> None:
        from fastgist.integrations.transformers.qformer_attention import open_up  # loads both models' code

        open_up(model.qformer.encoder)

    def example_inputs(self, model: Any) -> tuple[Tensor, ...]:
        vision, text = model.config.vision_config, model.config.text_config
        device = model.device
        pixels = torch.randn(2, 3, vision.image_size, vision.image_size, device=device)
        words = torch.full((2, 3), 3, device=device)
        ids = torch.cat(
            (torch.full((2, self.query_count(model)), model.config.image_token_id, device=device), words), 1
        )
        seq2seq = [] if model.config.use_decoder_only_language_model else [words]
        assert 3 < text.vocab_size
        if not self.has_text(model):
            return pixels, ids, torch.ones_like(ids), *seq2seq
        return pixels, words, torch.ones_like(words), ids, torch.ones_like(ids), *seq2seq

    def gist_host(self, model: Any) -> Any:
        raise TypeError(
            f"add_gist: {type(model).__name__} is no classifier; a gist token among the queries is "
            "petal.PetalConfig(gist=True)'s"
        )

    # -- what PETAL asks --------------------------------------------------------------------------------------------------
    def projections(self, model: Any) -> dict[str, list[str]]:
        """Paths of the adapted matrices in the order in which a forward reaches them: "text" (self-attention's query, key and
        value, cross-attention's query) and "image" (cross-attention's key and value)."""
        text, image = [], []
        for i, layer in enumerate(model.qformer.encoder.layer):
            text += [f"{_LAYERS}.{i}.attention.attention.{name}" for name in ("query", "key", "value")]
            if layer.has_cross_attention:
                cross = f"{_LAYERS}.{i}.crossattention.attention"
                text.append(f"{cross}.query")
                image += [f"{cross}.key", f"{cross}.value"]
        return {"text": text, "image": image}

    def layer_paths(self, model: Any) -> list[str]:
        return [f"{_LAYERS}.{i}" for i in range(len(model.qformer.encoder.layer))]

    def embedded_path(self, model: Any) -> str:
        """The module whose output is the Q-Former's embedded sequence: queries first, then the instruction."""
        return "qformer.embeddings.dropout" if self.has_text(model) else "qformer.dropout"

    @staticmethod
    def has_text(model: Any) -> bool:
        """Whether the Q-Former reads the instruction (InstructBLIP's does)."""
        return hasattr(model.qformer, "embeddings")

    @staticmethod
    def query_count(model: Any) -> int:
        return model.query_tokens.shape[1]


def _alias(path: str) -> str:
    ends = [end for end in _ALIASES if path.endswith(f".{end}")]
    return _ALIASES[max(ends, key=len)] if ends else "fc2"  # a text FFN's output.dense


register_family(QFormer())
