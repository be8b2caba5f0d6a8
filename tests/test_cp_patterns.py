"""CPConfig by patterns of paths on a ViT, a BERT and a Llama: the model is the plain one with the matrices' updates added to
its weights, in float64, and trains the factors alone."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn

from fastgist import CPConfig, get_peft_model, unload
from fastgist.nn import CPFactors, CPLinear

PATTERNS = {
    "vit": ("blocks.[01].attn.proj", "*.mlp.fc2"),
    "bert": ("*.layer.0.attention.self.*", "*.attention.output.dense"),
    "llama": ("model.layers.0.self_attn.[qo]_proj", "*.layers.1.mlp.down_proj"),
}


def model_of(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small one in float64, and what it is called with."""
    if kind == "vit":
        pytest.importorskip("timm")
        from vits import images, vit

        return vit().double().eval(), {"x": images().double()}
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        config = BertConfig(**sizes, vocab_size=30, max_position_embeddings=16)
        model: nn.Module = BertForSequenceClassification(config)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=30, max_position_embeddings=16))
    return model.double().eval(), {"input_ids": torch.randint(3, 30, (2, 7))}


def output(model: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    out = model(*given.values()) if "x" in given else model(**given)
    return out if isinstance(out, torch.Tensor) else out[0]


def update(layer: CPLinear) -> torch.Tensor:
    """(out, in), written out: U diag(lambda p_m) V^T or U (C x_3 p_m) V^T of every fold."""
    f: CPFactors = layer.factors
    folds = []
    for m in layer.mode if isinstance(layer.mode, tuple) else (layer.mode,):
        core = torch.diag(f.lam * f.p[m]) if f.core == "cp" else torch.einsum("ijr,r->ij", f.c, f.p[m])
        folds.append((f.u @ core @ f.v.T).T)
    return torch.cat(folds, 1 if layer.inward else 0)


@pytest.mark.parametrize("core", ["cp", "tucker"])
@pytest.mark.parametrize("kind", PATTERNS)
def test_the_model_with_its_updates(kind, core) -> None:
    plain, given = model_of(kind)
    want = {
        n for n, m in plain.named_modules() if isinstance(m, nn.Linear) for p in PATTERNS[kind] if fnmatchcase(n, p)
    }
    before = output(plain, given)
    model = get_peft_model(copy.deepcopy(plain), CPConfig(rank=3, core=core, targets=PATTERNS[kind], dropout=0.0))
    torch.testing.assert_close(output(model.eval(), given), before, rtol=1e-12, atol=1e-12)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, CPLinear)}
    assert layers.keys() == want and want
    assert {n for n, p in model.named_parameters() if p.requires_grad and "factors" in n.split(".")}
    for group in {m.factors for m in layers.values()}:
        assert group.modes == sum(
            len(m.mode) if isinstance(m.mode, tuple) else 1 for m in layers.values() if m.factors is group
        )
        with torch.no_grad():
            for p in group.parameters():
                p.copy_(torch.randn_like(p) * 0.4)
    other = copy.deepcopy(plain).requires_grad_(False)
    with torch.no_grad():
        for path, layer in layers.items():
            other.get_submodule(path).weight.add_(update(layer))
    changed = output(other, given)
    assert not torch.allclose(changed, before, rtol=1e-3)
    torch.testing.assert_close(output(model, given), changed, rtol=1e-9, atol=1e-10)
    if kind == "llama":  # a step with a cache, as decoding takes it
        ids = given["input_ids"]
        first = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
        torch.testing.assert_close(last, changed[:, -1], rtol=1e-9, atol=1e-10)
    output(model.train(), given).square().sum().backward()
    for group in {m.factors for m in layers.values()}:
        assert all(p.grad is not None and bool(p.grad.any()) for p in group.parameters())
    torch.testing.assert_close(output(unload(model).eval(), given), before, rtol=0, atol=0)
