"""Tiny transformers models with random weights, of every kind that is served, and inputs for them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vits import randomised

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 3}
WORDS = {"vocab_size": 50, "max_position_embeddings": 24, "pad_token_id": 1}
IMAGES = {"image_size": 16, "patch_size": 8}
NO_DROPOUT = (
    "hidden_dropout_prob attention_probs_dropout_prob attention_dropout dropout_rate classifier_dropout dropout "
    "seq_classif_dropout pooler_dropout embedding_dropout mlp_dropout drop_path_rate"
).split()


def _built(name: str, config: str, sizes: dict[str, Any], **options: Any) -> nn.Module:
    made = getattr(transformers, config)(**sizes | options)
    if name == "T5EncoderForSequenceClassification":
        from fastgist.integrations.transformers import T5EncoderForSequenceClassification as kind
    else:
        kind = getattr(transformers, name)
    return randomised(kind(made)).eval()


def clip(**options: Any) -> nn.Module:
    vision = {k: v for k, v in SIZES.items() if k != "num_labels"} | IMAGES
    vision |= {k: options.pop(k) for k in list(options) if k != "num_labels"}
    config = transformers.CLIPConfig(text_config={}, vision_config=vision, num_labels=options.get("num_labels", 3))
    return randomised(transformers.CLIPForImageClassification(config)).eval()


_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "num_labels": 3, "vocab_size": 50}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "pad_token_id": 1}
_DEBERTA = SIZES | WORDS | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
_DEBERTA |= {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0}
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "num_labels": 3}
_MODERN = SIZES | WORDS | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3}
_MODERN |= {"bos_token_id": 2, "eos_token_id": 3}
_DINO = {k: v for k, v in SIZES.items() if k != "intermediate_size"} | IMAGES | {"layerscale_value": 0.5}

_MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES | WORDS),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SIZES | WORDS),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", "XLMRobertaConfig", SIZES | WORDS),
    "camembert": ("CamembertForSequenceClassification", "CamembertConfig", SIZES | WORDS),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", SIZES | WORDS | {"embedding_size": 16}),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", _DISTIL | WORDS),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", _DEBERTA),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBertConfig", _MODERN),
    "t5-encoder": ("T5EncoderForSequenceClassification", "T5Config", _T5),
    "vit": ("ViTForImageClassification", "ViTConfig", SIZES | IMAGES),
    "deit": ("DeiTForImageClassification", "DeiTConfig", SIZES | IMAGES),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", _DINO),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        _DINO | {"num_register_tokens": 2},
    ),
}
#: name -> a builder of a tiny model; options go to its config.
TRANSFORMERS_BACKBONES: dict[str, Callable[..., nn.Module]] = {
    name: functools.partial(_built, *parts) for name, parts in _MODELS.items()
} | {"clip": clip}
TEXTS = [name for name, (kind, *_) in _MODELS.items() if kind.endswith("ForSequenceClassification")]


@functools.cache
def _once(name: str) -> nn.Module:
    return TRANSFORMERS_BACKBONES[name]()


def backbone(name: str, **options: Any) -> nn.Module:
    """A model of one's own; without options, all of a name have the same weights."""
    return TRANSFORMERS_BACKBONES[name](**options) if options else copy.deepcopy(_once(name))


def example_inputs(model: Any, batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    """A batch for ``model`` (as add_gist's ``.model`` has it): images, or texts of different lengths padded on the right."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, dtype=model.dtype)}
    pad = model.config.pad_token_id
    ids = torch.randint(4, 50, (batch, length))
    mask = torch.arange(length) < length - torch.arange(batch)[:, None] % 4
    return {"input_ids": torch.where(mask, ids, pad), "attention_mask": mask.long()}


def without_dropout(model: Any) -> Any:
    """``model`` with every dropout rate 0, in the modules, their configs and the attributes they copied from them."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in NO_DROPOUT:
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)
            if isinstance(getattr(getattr(module, "config", None), name, None), float):
                setattr(module.config, name, 0.0)
    return model
