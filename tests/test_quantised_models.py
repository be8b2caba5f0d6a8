"""Models whose frozen weights are in 4 or 8 bits: training after an evaluation, files that know their weights, methods that
train all they say, a start from the weights."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import transformers
from quantised import K, N, by_torchao, dense, eight_bits, four_bits
from safetensors import safe_open
from test_any_base_models import llama, quantised
from torch import nn

import fastgist
from fastgist import (
    AdapterConfig,
    BitFitConfig,
    CPConfig,
    FullConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    SSFConfig,
    get_peft_model,
)
from fastgist.nn import BiasShift, CPFactors, CPLinear, LoRALinear, ScaleShift
from fastgist.peft.quantised import dequantised
from fastgist.testing import assert_within_budget

HOWS = {
    "nf4": four_bits,
    "int8": eight_bits,
    "torchao int8": lambda layer: by_torchao(layer, 8),
    "torchao int4": lambda layer: by_torchao(layer, 4),
}
every_way = pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(3))


def wide_four_bits(nested: bool, inner: int = 256) -> nn.Module:
    """Rows of several blocks of 64, whose scales differ."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    weight = torch.randn(N, inner) * torch.rand(N, 1) * torch.rand(1, inner)
    options = {"quant_type": "nf4", "compress_statistics": nested}
    made = bnb.nn.Linear4bit(inner, N, compute_dtype=torch.float32, **options)
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
    return made.requires_grad_(False).to("cpu")


def is_packed(layer: nn.Module) -> bool:
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def evaluated(model: nn.Module, *args, **kwargs) -> nn.Module:
    """``model`` after an evaluation, which may have packed its weights."""
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    return model.train()


def stirred(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in module.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return module


# -- training after an evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["nothing", "state_dict"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_layer_evaluated_on_a_cpu_trains_as_its_weights_say(nested, between):
    """On CPUs with AVX512-BF16 bitsandbytes packs the weight for a product without a backward; its state_dict, which takes
    that back, leaves the scales transposed. (Elsewhere nothing is packed, and this holds as well.)"""
    layer = stirred(LoRALinear(wide_four_bits(nested), 4)).train()
    before = dequantised(layer.base_layer)
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(2))
    evaluated(layer, x)
    if between == "state_dict":
        layer.state_dict()
        with torch.no_grad():
            late = layer.eval()(x)
        layer.train()
    rows = x.clone().requires_grad_()
    got = layer(rows)
    incoming = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    mine = torch.autograd.grad(got, [rows, layer.u, layer.v], incoming)
    weight = dequantised(layer.base_layer)
    assert not is_packed(layer.base_layer)
    # bitsandbytes rounds the scales to bfloat16 (nested: and anew to 8 bits, of a range of scales of some 1).
    assert float((weight - before).norm() / before.norm()) < (0.02 if nested else 2.0**-8)

    def written_out(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, layer.u, layer.v)]
        a, u, v = leaves
        y = a @ weight.to(dtype).T + layer.base_layer.bias.to(dtype) + layer.scale * (a @ u) @ v.T
        return y, torch.autograd.grad(y, leaves, incoming.to(dtype))

    (plain, plain_grads), (exact, exact_grads) = written_out(torch.float32), written_out(torch.float64)
    assert_within_budget(got, plain, exact)
    for name, m, p, e in zip(("x", "u", "v"), mine, plain_grads, exact_grads, strict=True):
        assert_within_budget(m, p, e, what=name)
    if between == "state_dict":  # by a product in bfloat16
        assert float((late - exact.detach()).norm() / exact.detach().norm()) < 2.0**-6


def test_a_model_evaluated_on_a_cpu_trains_through_the_layers_without_an_adapter_too():
    model = stirred(get_peft_model(quantised(llama(), four_bits), LoraConfig()))
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        return torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, trained)

    fresh = gradients()
    evaluated(model, input_ids=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of an operation without a backward
        again = gradients()
    for a, b in zip(fresh, again, strict=True):
        assert float((a - b).norm()) < 0.05 * float(a.norm())  # the scales in bfloat16, a softmax in between
    fastgist.unload(copy.deepcopy(model))
    plain = fastgist.unload(model)
    assert not any(module._forward_pre_hooks for module in plain.modules())


class NoBackward(nn.Linear):
    """As a quantised layer whose kernel has none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


def test_a_base_without_a_backward_is_refused_where_one_is_needed():
    layer = stirred(LoRALinear(NoBackward(K, N).requires_grad_(False), 4))
    x = torch.randn(20, K)
    y = layer(x)
    assert y.requires_grad and all(g.any() for g in torch.autograd.grad(y.sum(), [layer.u, layer.v]))
    with pytest.raises(RuntimeError, match=r"LoRALinear: base_layer, a NoBackward, has no backward here: .*below"):
        layer(x.requires_grad_())
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_a_base_for_which_torch_would_only_warn_is_refused():
    library = torch.library.Library("fastgist_tests", "FRAGMENT")
    library.define("doubled(Tensor x) -> Tensor")
    library.impl("doubled", lambda x: 2 * x.detach(), "CPU")
    base = nn.Linear(K, N).requires_grad_(False)
    base.forward = lambda x: torch.ops.fastgist_tests.doubled(nn.functional.linear(x, base.weight))
    layer = LoRALinear(base, 4)
    with pytest.raises(RuntimeError, match="has no backward here"):
        layer(torch.randn(20, K, requires_grad=True))


# -- files -------------------------------------------------------------------------------------------------------------


def other_llama() -> nn.Module:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(torch.randn(128, 64))
    return model


def rescaled_llama() -> nn.Module:
    """Whose stored numbers are the same, with other scales."""
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    return model


def loads_quietly(model, folder) -> bool:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fastgist.load_adapter(model, folder)
    return not any("other frozen weights" in str(w.message) for w in seen)


@every_way
def test_a_file_knows_its_quantised_weights(how, tmp_path):
    model = evaluated(get_peft_model(quantised(llama(), how), LoraConfig()), input_ids=IDS)
    fastgist.save_adapter(model, tmp_path)
    assert loads_quietly(quantised(llama(), how), tmp_path)
    assert loads_quietly(evaluated(quantised(llama(), how), input_ids=IDS), tmp_path)
    assert not loads_quietly(quantised(other_llama(), how), tmp_path)
    assert not loads_quietly(quantised(rescaled_llama(), how), tmp_path)
    assert loads_quietly(llama(), tmp_path)  # those that were quantised
    assert loads_quietly(llama().bfloat16(), tmp_path)
    with pytest.warns(UserWarning, match=r"other frozen weights .*\(.* there, float32 here\)"):
        fastgist.load_adapter(other_llama(), tmp_path)
    assert not loads_quietly(rescaled_llama(), tmp_path)
    other_norm = llama()
    with torch.no_grad():
        other_norm.model.norm.weight.mul_(1.5)
    assert not loads_quietly(other_norm, tmp_path)


def test_weights_before_two_rounds_of_quantisation_are_known(tmp_path):
    """Double quantisation, whose scales are in 8 bits."""

    def nested(layer):
        bnb = pytest.importorskip("bitsandbytes")
        options = {"quant_type": "nf4", "compress_statistics": True}
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, **options)
        made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, **options)
        return made.to("cpu")

    fastgist.save_adapter(get_peft_model(quantised(llama(), nested), LoraConfig()), tmp_path)
    assert loads_quietly(llama(), tmp_path)
    assert not loads_quietly(other_llama(), tmp_path) and not loads_quietly(rescaled_llama(), tmp_path)


def test_an_adapter_of_a_quantised_model_merges_into_the_dense_one(tmp_path):
    model = stirred(get_peft_model(quantised(llama(), four_bits), LoraConfig()))
    with pytest.raises(TypeError, match=r"q_proj: .*load the adapter into the model unquantised, and merge there"):
        fastgist.merge(model)
    fastgist.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense_model = fastgist.load_adapter(llama(), tmp_path).eval()
    with torch.no_grad():
        before = dense_model(IDS).logits
        merged = fastgist.merge_and_unload(dense_model)
        torch.testing.assert_close(merged(IDS).logits, before)


def test_a_file_that_says_nothing_of_its_weights_loads(tmp_path, monkeypatch):
    """As those from before quantised weights were looked at."""
    model = get_peft_model(quantised(llama(), four_bits), LoraConfig())
    monkeypatch.setattr(fastgist.peft.files, "backbone_fingerprint", lambda *_: None)
    fastgist.save_adapter(model, tmp_path)
    monkeypatch.undo()
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert any('"backbone": null' in v for v in file.metadata().values())
    assert loads_quietly(quantised(other_llama(), four_bits), tmp_path)


def test_dense_weights_have_the_fingerprint_that_they_had(tmp_path):
    """Files of before must not warn: what is written of dense weights is the same, key by key."""
    fastgist.save_adapter(get_peft_model(llama(), LoraConfig()), tmp_path)
    backbone = json.loads((tmp_path / "fastgist_config.json").read_text())["backbone"]
    assert sorted(backbone) == ["dtype", "numbers", "sha256"]
    flat = llama().model.embed_tokens.weight.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // 256)]
    assert backbone["numbers"][2:4] == [float(some[0]), float(some[-1])]


# -- methods that train more than an update ------------------------------------------------------------------------------


def biased(how) -> nn.Module:
    """A small Qwen2, whose q, k and v have biases, quantised."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, vocab_size=50, intermediate_size=128))
    return quantised(model.train(), how)


@pytest.mark.parametrize("config", [SSFConfig(), BitFitConfig()], ids=str)
@every_way
def test_scales_and_biases_of_quantised_layers_are_trained_as_those_of_dense_ones(how, config):
    model = get_peft_model(biased(how), config)
    twin = get_peft_model(biased(lambda layer: layer), config)
    names = [n for n, p in twin.named_parameters() if p.requires_grad]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names
    assert any("q_proj" in name for name in names)
    report = fastgist.report(model)
    assert (report.trainable, report.total) == (fastgist.report(twin).trainable, fastgist.report(twin).total)
    stirred(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [AdapterConfig(placement="shared"), PromptConfig(), PrefixConfig()], ids=str)
def test_methods_beside_quantised_layers_train(config):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=50))
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "classifier":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, four_bits(layer))
    model = fastgist.add_gist(get_peft_model(model.requires_grad_(False), config))
    fastgist.assert_training(evaluated(model, input_ids=IDS), input_ids=IDS)


@pytest.mark.parametrize("kind", [ScaleShift, BiasShift])
@every_way
def test_a_shifted_quantised_layer_is_its_output_shifted(how, kind):
    layer = stirred(kind(how(dense())))
    x = torch.randn(20, K, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = layer(x)
    base = layer.base_layer(x)
    scale, shift = (layer.scale, layer.shift) if kind is ScaleShift else (1.0, layer.delta)
    plain = base * scale + shift
    assert_within_budget(y, plain, base.double() * scale + shift)
    incoming = torch.randn(y.shape)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    torch.testing.assert_close(torch.autograd.grad(y, leaves, incoming), torch.autograd.grad(plain, leaves, incoming))
    with pytest.raises(TypeError, match=f"{kind.__name__}.merge: base_layer is"):
        layer.merge()


@pytest.mark.parametrize("kind", [ScaleShift, BiasShift])
def test_a_shifted_layer_that_computes_in_bfloat16_trains_after_an_evaluation(kind):
    base = wide_four_bits(False)
    base.compute_dtype = torch.bfloat16
    layer = stirred(kind(base)).train()
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(2))
    evaluated(layer, x)
    rows = x.clone().requires_grad_()
    y, below = layer(rows), base(rows)
    scale, shift = (layer.scale, layer.shift) if kind is ScaleShift else (1.0, layer.delta)
    assert_within_budget(y, below * scale + shift, below.double() * scale + shift)
    assert torch.autograd.grad(y.sum(), rows)[0].any()


@every_way
def test_full_tuning_of_quantised_weights_is_refused_by_name(how):
    model = quantised(llama(), how)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"FullConfig: .* 14 of 21 are quantised.*layers\.0\.self_attn\.q_proj\.weight"
    ):
        get_peft_model(model, FullConfig())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize("how", [four_bits, lambda layer: by_torchao(layer, 8)])
def test_a_quantised_head_is_refused_by_name(how):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=50, intermediate_size=128, num_labels=32, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config)
    model.score = how(model.score)
    with pytest.raises(TypeError, match=r"get_peft_model: score\.weight is quantised.*leave score out"):
        get_peft_model(model, LoraConfig())
    assert fastgist.peft.state.state_of(model) is None


@every_way
def test_a_threshold_that_reads_weights_refuses_quantised_ones(how):
    with pytest.raises(TypeError, match="CPThreshold: policy 'trust' reads the weight's norm.*'modes' reads none"):
        get_peft_model(quantised(llama(), how), CPConfig(threshold="trust"))
    get_peft_model(quantised(llama(), how), CPConfig(threshold="modes"))


# -- a start from the weights --------------------------------------------------------------------------------------------


@every_way
def test_the_start_from_quantised_weights_is_that_of_what_they_multiply_by(how):
    pytest.importorskip("tensorly")
    model = quantised(llama(), how)
    twin = llama()
    for name, layer in twin.named_modules():
        if type(layer) is nn.Linear and name != "lm_head":
            layer.weight.data = dequantised(model.get_submodule(name)).float()
    config = CPConfig(rank=4, init="weights")
    started = []
    for each in (model, twin):
        torch.manual_seed(5)
        started.append(dict(get_peft_model(each, config).named_parameters()))
    names = [n for n, p in started[1].items() if p.requires_grad]
    assert names and all(torch.equal(started[0][n], started[1][n]) for n in names)


@every_way
def test_the_dense_form_is_what_the_layer_multiplies_by(how):
    layer = how(dense(bias=False))
    weight = dequantised(layer)
    assert weight is not None and weight.shape == (N, K)
    with torch.no_grad():
        seen = layer(torch.eye(K)).T
    # 8 bits of bitsandbytes: their product is in float16
    torch.testing.assert_close(weight.float(), seen, rtol=2.0**-8, atol=2.0**-10)
    assert dequantised(dense()) is None


def test_a_start_from_weights_that_are_not_known_names_the_layer():
    init_from_weights = pytest.importorskip("fastgist.integrations.tensorly").init_from_weights
    base = nn.Linear(K, N)
    base.weight = nn.Parameter(torch.zeros(N, K // 2, dtype=torch.uint8), requires_grad=False)
    layer = CPLinear(base, CPFactors(K, N, 4, 1), 0)
    with pytest.raises(TypeError, match=r"here: expected a dense floating-point weight .*init='identity'"):
        init_from_weights({"here": layer})
