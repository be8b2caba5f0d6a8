"""GIST and the PEFT methods on transformers' encoders, against a BERT written out here, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from vits import dense, layer_norm, randomised, stir

pytest.importorskip("transformers")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fastgist import (
    AdapterConfig,
    CPConfig,
    GistConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    add_gist,
    get_peft_model,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 3}
WORDS = {"vocab_size": 50, "max_position_embeddings": 24}


def bert(**options) -> nn.Module:
    return randomised(BertForSequenceClassification(BertConfig(**SIZES | WORDS | options))).eval()


def roberta(**options) -> nn.Module:
    return randomised(RobertaForSequenceClassification(RobertaConfig(**SIZES | WORDS | options))).eval()


def hf_vit(**options) -> nn.Module:
    return randomised(ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SIZES | options))).eval()


MODELS = [bert, roberta, hf_vit]


def inputs(model, batch=3, length=7) -> dict[str, Tensor]:
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(batch, 3, 16, 16, dtype=model.dtype)}
    ids = torch.randint(3, 50, (batch, length))
    mask = (torch.arange(length) < torch.tensor([length, length - 2, length - 3])[:batch, None]).long()
    pad = model.config.pad_token_id
    return {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}


def written_out(model, token, input_ids, attention_mask) -> tuple[Tensor, Tensor]:
    """(logits, gist logits) of a BERT classifier with a gist token (1, L, D) behind [CLS]."""
    body = model.bert
    embeddings = getattr(body.embeddings, "base_layer", body.embeddings)
    positions = torch.arange(input_ids.shape[1])
    h = embeddings.word_embeddings.weight[input_ids] + embeddings.position_embeddings.weight[positions]
    h = layer_norm(embeddings.LayerNorm, h + embeddings.token_type_embeddings.weight[0])
    h = torch.cat([h[:, :1], token.expand(len(h), -1, -1), h[:, 1:]], 1)
    seen = torch.cat([attention_mask[:, :1], torch.ones(len(h), token.shape[1]), attention_mask[:, 1:]], 1).bool()

    def adapted(layer, x):
        y = dense(getattr(layer, "base_layer", layer) if hasattr(layer, "adapter") else layer, x)
        a = getattr(layer, "adapter", None)
        if a is None:
            return y
        return y + a.scale * (nn.functional.gelu(y @ a.down_weight.T + a.down_bias) @ a.up_weight.T + a.up_bias)

    for layer in body.encoder.layer:
        own = layer.attention.self
        q, k, v = (dense(f, h).unflatten(-1, (2, -1)).transpose(1, 2) for f in (own.query, own.key, own.value))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen[:, None, None], -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = layer_norm(layer.attention.output.LayerNorm, h + adapted(layer.attention.output.dense, out))
        inside = nn.functional.gelu(dense(layer.intermediate.dense, h))
        h = layer_norm(layer.output.LayerNorm, h + adapted(layer.output.dense, inside))

    def head(row):
        return dense(model.classifier, torch.tanh(dense(body.pooler.dense, row)))

    return head(h[:, 0]), head(h[:, 1])


@pytest.mark.parametrize(
    "config", [LoraConfig(rank=2, targets=("q", "v", "fc2")), AdapterConfig(3, "houlsby"), CPConfig(rank=2)], ids=repr
)
@pytest.mark.parametrize("length", [1, 2])
def test_against_a_bert_written_out(config, length) -> None:
    model = stir(add_gist(get_peft_model(bert().double(), config), GistConfig(length))).eval()
    given = inputs(model.model)
    output = model(**given, return_gist_logits=True)
    z, gist = written_out(model.model, model.gist.token, given["input_ids"], given["attention_mask"])
    torch.testing.assert_close(output.logits, z)
    torch.testing.assert_close(output.gist_logits, gist)


@pytest.mark.parametrize("make", MODELS)
def test_compiled_and_checkpointed(make) -> None:
    model = stir(add_gist(get_peft_model(make(), LoraConfig(rank=2)))).eval()
    given = inputs(model.model)
    expected = model(**given, return_gist_logits=True)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    torch.testing.assert_close(compiled(**given, return_gist_logits=True).gist_logits, expected.gist_logits)
    ours = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(expected.gist_logits.square().sum(), ours)
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for config in {
        id(m.config): m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "hidden_size")
    }.values():
        config.attention_probs_dropout_prob = 0.0
    again = torch.autograd.grad(model(**given).gist_logits.square().sum(), ours)
    for got, want in zip(again, plain, strict=True):
        torch.testing.assert_close(got, want)


def test_what_cannot_be_says_so() -> None:
    model = add_gist(bert())
    given = inputs(model.model)
    with pytest.raises(ValueError, match=r"expected attention_mask of shape \(B, N\), got \(3, 1, 7, 7\)"):
        model(given["input_ids"], torch.ones(3, 1, 7, 7))
    with pytest.raises(
        ValueError, match=r"'parallel' needs sublayers that keep the width; bert.encoder.layer.0.output.*'adaptformer'"
    ):
        get_peft_model(bert(), AdapterConfig(placement="parallel"))
    for config in (PromptConfig(), PrefixConfig(), AdapterConfig(placement="shared")):
        with pytest.raises(ValueError, match="BertForSequenceClassification is set up as a decoder"):
            get_peft_model(bert(is_decoder=True), config)
    with pytest.raises(ValueError, match="is set up as a decoder"):
        add_gist(bert(is_decoder=True))
    with pytest.raises(TypeError, match="BertModel has no classification head, .*: take BertForSequenceClassification"):
        get_peft_model(bert().bert, LoraConfig())
