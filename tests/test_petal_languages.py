"""PETAL around other language models: a Llama, as InstructBLIP's Vicuna is one, and quantised ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from petal_by_hand import by_hand
from qformers import VICUNA, inputs, make, quiet, stir
from quantised import by_torchao, eight_bits, four_bits

import fastgist as fg
from fastgist import petal

SMALL = {"rank": 4, "expert_dim": 3, "num_experts": 2}
HOWS = {"torchao int8": lambda layer: by_torchao(layer, 8), "bitsandbytes int8": eight_bits}


def wrapped(plain, **config):
    return petal.wrap(plain, petal.PetalConfig(**SMALL | config), verbose=False)


def doubles(given):
    return {k: v.double() if v.is_floating_point() else v for k, v in given.items()}


@pytest.mark.parametrize("kind", VICUNA)
def test_vicuna_starts_as_the_model_and_equals_every_matrix_by_itself(kind):
    experts = 2 if kind.startswith("instructblip") else 0
    plain, given = make(kind).double(), doubles(inputs(kind))
    assert type(plain.language_model).__name__ == "LlamaForCausalLM"
    model = wrapped(copy.deepcopy(plain), num_experts=experts, dropout=0.0)
    torch.testing.assert_close(model(**given).logits, plain(**given).logits, rtol=1e-9, atol=1e-10)
    stir(model)
    got, want = model(**given), by_hand(model, plain, given.get("qformer_attention_mask"))(**given)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(got.logits, plain(**given).logits, rtol=1e-3)


def test_vicuna_trains_is_saved_and_generates_with_beams(tmp_path):
    kind = VICUNA[0]
    model = stir(wrapped(make(kind), instruct_llm=True)).train()
    quiet(model)(**inputs(kind)).loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {name for name, p in model.named_parameters() if p.requires_grad}
    fg.save_adapter(model.eval(), tmp_path)
    loaded, given = fg.load_adapter(make(kind), tmp_path).eval(), inputs(kind, labels=False)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    words = model.generate(**given, **options)
    assert torch.equal(loaded.generate(**given, **options), words)
    with fg.disable_adapter(model):
        plain = model.generate(**given, **options)
    assert torch.equal(plain, make(kind).generate(**given, **options))


def quantise_language(model: nn.Module, how) -> nn.Module:
    """Every linear layer of the language model but its head, as quantised loading has them."""
    language, mode = model.language_model, model.training
    for path, layer in list(language.named_modules()):
        if type(layer) is nn.Linear and not path.endswith("lm_head"):
            parent, _, leaf = path.rpartition(".")
            setattr(language.get_submodule(parent), leaf, how(layer.requires_grad_(False)))
    return model.train(mode)


@pytest.mark.parametrize("kind", ["instructblip-opt", "instructblip-t5", "instructblip-vicuna"])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_a_quantised_language_model(kind, how, tmp_path):
    """The start is the quantised model's, gradients reach all that is trained through it, files and generation work."""
    plain = quantise_language(make(kind), how)
    with torch.no_grad():
        before = plain(**inputs(kind)).logits
    model = wrapped(plain, instruct_llm=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs(kind)).logits, before)
    stir(model)
    quiet(model).train()(**inputs(kind)).loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {name for name, p in model.named_parameters() if p.requires_grad}
    fg.save_adapter(model.eval(), tmp_path)
    loaded = fg.load_adapter(quantise_language(make(kind), how), tmp_path).eval()
    given, options = inputs(kind, labels=False), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert torch.equal(loaded.generate(**given, **options), model.generate(**given, **options))


@pytest.mark.parametrize("kind", ["instructblip-opt", "instructblip-vicuna"])
def test_a_language_model_in_four_bits(kind):
    """Also once it was evaluated, which packs its weights on some CPUs. bitsandbytes packs no width but multiples of 32, and
    transformers' T5 casts its states to the type of wo's weight, which its quantised loading leaves as it was."""
    sizes = {"hidden_size": 64}
    sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 64} if kind.endswith("opt") else {"intermediate_size": 64}
    plain = quantise_language(make(kind, text=sizes), four_bits)
    with torch.no_grad():
        before = plain(**inputs(kind)).logits
    model = wrapped(plain, instruct_llm=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs(kind)).logits, before)
    stir(model)
    quiet(model).train()(**inputs(kind)).loss.backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {name for name, p in model.named_parameters() if p.requires_grad}
    assert model.eval().generate(**inputs(kind, labels=False), max_new_tokens=3, min_new_tokens=3).shape[0] == 3
