"""Which parts an encoder classifier of transformers has, and what its head reads.

A head reads a pooled row a sample. The prediction's is what the model itself pools, without our rows; the gist
logits' is the same with the gist token's final state in the place of the class token's:

========================  =======================================  =========================================
model                     the prediction's row                     the gist token's row
========================  =======================================  =========================================
most                      the class token                          the gist token
DINOv2                    class token, mean of the patches         gist token, mean of the patches
CLIP                      mean of the patches                      gist token
ModernBERT, "mean"        mean of the real tokens                  gist token
T5 encoder                mean of the real tokens                  gist token
========================  =======================================  =========================================

No mean has the gist token, prompts or registers in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "Kind", "hidden_config", "kind_of"]

#: (model, final states without our rows (B, N, D), attention mask (B, N) or None) -> rows (B, W)
Pool = Callable[[Any, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Kind:
    """One architecture. Paths are those of a model that is not wrapped."""

    #: The head for rows (M, W).
    classify: Callable[[Any, Tensor], Tensor]
    #: What embeds and encodes; its last_hidden_state is what the head pools.
    body: str
    #: The layers' container.
    layers: str
    #: The gist token goes in behind (``after``) or before this module.
    entry: str
    #: Ends of the paths of the attention and MLP sublayers, for adapters in sequence.
    attention: str
    mlp: str
    #: Prompts go in behind this module, and under the model's own dropout of its embeddings; None: before layer 0.
    prompts: str | None = None
    after: bool = True
    head: tuple[str, ...] = ("classifier",)
    pool: Pool = lambda model, states, mask: states[:, 0]
    #: (model, states, gist states (B, D)) -> rows (B, W)
    pool_gist: Callable[[Any, Tensor, Tensor], Tensor] = lambda model, states, gist: gist
    #: Where else than in the body's ``attention_mask`` masks have to grow: (path, argument, for prompts alone).
    masks: tuple[tuple[str, str, bool], ...] = ()
    #: Whether positions are counted before the embeddings are made, and have to grow too.
    positions: bool = False
    #: Class, distillation and register tokens.
    own: Callable[[Any], int] = lambda model: 1
    #: Modules that the model's code looks into, or that the prediction does not pass.
    reserved: tuple[str, ...] = ()
    image: bool = False
    #: Whether the model's own ``encode`` runs the body.
    encode: bool = False
    #: Stands behind ``entry`` in some sizes; the token then goes in behind it.
    projection: str | None = None

    def entry_of(self, model: nn.Module) -> str:
        """The path of the module at which the gist token goes in."""
        if self.projection is None:
            return self.entry
        parent, _, leaf = self.projection.rpartition(".")
        return self.projection if hasattr(model.get_submodule(parent), leaf) else self.entry

    def grown(self) -> tuple[tuple[str, str, bool], ...]:
        """(path, argument, for prompts alone) of every mask that has to grow."""
        return self.masks or ((self.body, "attention_mask", False),)


def hidden_config(model: Any) -> Any:
    """The part of a model's config that speaks of the encoder."""
    return getattr(model.config, "vision_config", model.config)


def kind_of(model: nn.Module) -> Kind:
    return KINDS[type(model).__name__]


# -- heads -----------------------------------------------------------------------------------------------------------


def _linear(model: Any, rows: Tensor) -> Tensor:
    return model.classifier(rows)


def _first_of_one(model: Any, rows: Tensor) -> Tensor:
    return model.classifier(rows[:, None])


def _bert(model: Any, rows: Tensor) -> Tensor:
    return model.classifier(model.dropout(model.bert.pooler(rows[:, None])))


def _deberta(model: Any, rows: Tensor) -> Tensor:
    return model.classifier(model.dropout(model.pooler(rows[:, None])))


def _distilbert(model: Any, rows: Tensor) -> Tensor:
    return model.classifier(model.dropout(nn.functional.relu(model.pre_classifier(rows))))


def _modernbert(model: Any, rows: Tensor) -> Tensor:
    return model.classifier(model.drop(model.head(rows)))


def _t5(model: Any, rows: Tensor) -> Tensor:
    return model.classifier(model.dropout(rows))


# -- pooling ---------------------------------------------------------------------------------------------------------


def _patches(model: Any, states: Tensor, mask: Tensor | None = None) -> Tensor:
    return states[:, kind_of(model).own(model) :].mean(1)


def _first_and_patches(model: Any, states: Tensor, mask: Tensor | None) -> Tensor:
    return torch.cat((states[:, 0], _patches(model, states)), dim=1)


def _gist_and_patches(model: Any, states: Tensor, gist: Tensor) -> Tensor:
    return torch.cat((gist, _patches(model, states)), dim=1)


def _real(model: Any, states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over the tokens that ``mask`` counts."""
    if mask is None:
        return states.mean(1)
    mask = mask.to(states.dtype)
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _as_configured(model: Any, states: Tensor, mask: Tensor | None) -> Tensor:
    return states[:, 0] if model.config.classifier_pooling == "cls" else _real(model, states, mask)


# -- the table -------------------------------------------------------------------------------------------------------


def _like_bert(body: str, classify: Callable[[Any, Tensor], Tensor], **others: Any) -> Kind:
    return Kind(
        classify,
        body,
        f"{body}.encoder.layer",
        f"{body}.embeddings.dropout",
        r"\.attention\.output\.dense",
        r"\.\d+\.output\.dense",
        prompts=f"{body}.embeddings.LayerNorm",
        **others,
    )


def _like_vit(body: str, layers: str, **others: Any) -> Kind:
    return Kind(
        _linear,
        body,
        f"{body}.{layers}",
        f"{body}.embeddings.dropout",
        r"\.attention\.o_proj",
        r"\.mlp",
        reserved=(f"{body}.embeddings.patch_embeddings",),  # whose weight they ask for its dtype
        image=True,
        **others,
    )


def _registers(model: Any) -> int:
    return 1 + model.config.num_register_tokens


def _two(model: Any) -> int:
    return 2


_DINO: dict[str, Any] = {"pool": _first_and_patches, "pool_gist": _gist_and_patches}

KINDS = {
    "BertForSequenceClassification": _like_bert("bert", _bert),
    "RobertaForSequenceClassification": _like_bert("roberta", _first_of_one),
    "XLMRobertaForSequenceClassification": _like_bert("roberta", _first_of_one),
    "CamembertForSequenceClassification": _like_bert("roberta", _first_of_one),
    "ElectraForSequenceClassification": _like_bert(
        "electra", _first_of_one, projection="electra.embeddings_project"
    ),
    "DebertaV2ForSequenceClassification": _like_bert(
        "deberta",
        _deberta,
        head=("pooler", "classifier"),  # transformers makes both anew for a classifier
        masks=(("deberta.encoder", "attention_mask", False), ("deberta.embeddings", "mask", True)),
    ),
    "DistilBertForSequenceClassification": Kind(
        _distilbert,
        "distilbert",
        "distilbert.transformer.layer",
        "distilbert.embeddings.dropout",
        r"\.attention\.out_lin",
        r"\.ffn",
        prompts="distilbert.embeddings.LayerNorm",
        head=("pre_classifier", "classifier"),
    ),
    "ModernBertForSequenceClassification": Kind(
        _modernbert,
        "model",
        "model.layers",
        "model.embeddings.drop",
        r"\.attn\.Wo",
        r"\.mlp",
        prompts="model.embeddings.norm",
        pool=_as_configured,
        positions=True,
    ),
    "T5EncoderForSequenceClassification": Kind(
        _t5,
        "transformer",
        "transformer.encoder.block",
        "entry",
        r"\.SelfAttention\.o",
        r"\.DenseReluDense",
        prompts="embedded",
        pool=_real,
        encode=True,
    ),
    "ViTForImageClassification": _like_vit("vit", "layers"),
    "DeiTForImageClassification": _like_vit("deit", "layers", own=_two),
    "Dinov2ForImageClassification": _like_vit("dinov2", "encoder.layer", **_DINO),
    "Dinov2WithRegistersForImageClassification": _like_vit(
        "dinov2_with_registers", "encoder.layer", own=_registers, **_DINO
    ),
    "CLIPForImageClassification": Kind(
        _linear,
        "vision_model",
        "vision_model.encoder.layers",
        "vision_model.pre_layrnorm",
        r"\.self_attn\.out_proj",
        r"\.mlp",
        after=False,
        pool=_patches,
        reserved=("vision_model.embeddings.patch_embedding", "vision_model.post_layernorm"),
        image=True,
    ),
}  # fmt: skip


def matching(paths: list[str], end: str) -> list[str]:
    """Those of ``paths`` that end as ``end`` says."""
    return [path for path in paths if re.search(f"{end}$", path)]
