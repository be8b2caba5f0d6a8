"""Whole models on quantised weights, and Hugging Face PEFT's AdaLoRA and the Tucker form through the same operations."""

from __future__ import annotations

import copy

import pytest
import torch
from quantised import K, N, dense, eight_bits, four_bits
from torch import nn

import fastgist
from fastgist import CPConfig, FacTConfig, LoraConfig, functional, get_peft_model
from fastgist.nn import CPFactors
from fastgist.testing import assert_within_budget, error_floor

transformers = pytest.importorskip("transformers")

CONFIGS = [
    LoraConfig(rank=4),
    CPConfig(rank=4, dropout=0.0),
    CPConfig(rank=3, core="tucker", dropout=0.0),
    FacTConfig(rank=4),
]


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.LlamaConfig(**sizes, **tokens, intermediate_size=128, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config).train()


def quantised(model: nn.Module, how) -> nn.Module:
    """``model`` with all linear layers but the head in 4 or 8 bits, and frozen."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, how(layer))
    return model.requires_grad_(False)


def dequantised(model: nn.Module) -> nn.Module:
    """A plain model with the weights that ``model``'s layers multiply by."""
    plain = llama()
    for name, layer in plain.named_modules():
        if type(layer) is nn.Linear and name != "lm_head":
            with torch.no_grad():
                layer.weight.copy_(model.get_submodule(name)(torch.eye(layer.in_features)).T)
    return plain.requires_grad_(False)


def stirred(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("how", [four_bits, eight_bits])
def test_a_quantised_llama_trains_as_its_dequantised_twin(how, config):
    model = quantised(llama(), how)
    twin = stirred(get_peft_model(dequantised(model), config))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    stirred(get_peft_model(model, config)).train(), twin.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and not any("base_layer" in n for n in trained)
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(3))

    def step(model):
        out = model(input_ids=ids, labels=ids)
        found = [p for p in model.parameters() if p.requires_grad]
        return out.logits.detach(), torch.autograd.grad(out.loss, found)

    (logits, grads), (plain, plain_grads) = step(model), step(twin)
    exact, exact_grads = step(copy.deepcopy(twin).double())
    # The budget, of norms: attention and layers between spread a rounding over all elements.
    for name, mine, p, e in zip(
        ["logits", *trained], [logits, *grads], [plain, *plain_grads], [exact, *exact_grads], strict=True
    ):
        floor = error_floor(e, torch.float32) * e.numel() ** 0.5
        assert float((mine - e).norm()) <= 2 * float((p - e).norm()) + floor, name
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    first = model(input_ids=ids, labels=ids).loss
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert model(input_ids=ids, labels=ids).loss < first
    for name, p in model.named_parameters():
        if name not in trained:
            assert torch.equal(p, frozen[name.replace("base_layer.", "")]), name
    model.gradient_checkpointing_enable()
    loss = model(input_ids=ids, labels=ids).loss
    again = torch.autograd.grad(loss, list(trained.values()))
    model.gradient_checkpointing_disable()
    want = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(trained.values()))
    assert all(torch.equal(a, w) for a, w in zip(again, want, strict=True))


@pytest.mark.parametrize("config", CONFIGS[:2], ids=str)
def test_a_quantised_llama_decodes_is_saved_and_taken_apart(config, tmp_path):
    model = stirred(get_peft_model(quantised(llama(), four_bits), config)).eval()
    ids = torch.randint(3, 50, (2, 6))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    words = model.generate(ids, **options)
    assert words.shape == (2, 12)
    assert torch.equal(model.generate(ids, use_cache=False, **options), words)
    with torch.no_grad():
        logits = model(words).logits
    fastgist.save_adapter(model, tmp_path)
    other = fastgist.load_adapter(quantised(llama(), four_bits), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(other(words).logits, logits)
        torch.testing.assert_close(copy.deepcopy(model)(words).logits, logits)
    with pytest.raises(TypeError, match=r"q_proj: .*base_layer is Linear4bit.*nothing was changed"):
        fastgist.merge(model)
    fastgist.unload(model)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        torch.testing.assert_close(model(words).logits, quantised(llama(), four_bits).eval()(words).logits)


# -- other names for the factors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranknum", [4.0, 3.0])
@pytest.mark.parametrize("base", [dense, lambda: four_bits(dense())], ids=["dense", "4 bits"])
def test_adalora_of_peft_is_the_update_with_its_singular_values_as_the_gain(base, ranknum):
    """y + x (A E)^T B^T scaling / (ranknum + 1e-5), with a singular value that AdaLoRA has masked. The gain of one fold."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=8, target_modules=["0"], total_step=10, init_lora_weights=False)
    layer = peft.get_peft_model(nn.Sequential(base()), config).base_model.model[0]
    a, b, e = layer.lora_A["default"], layer.lora_B["default"], layer.lora_E["default"]
    with torch.no_grad():
        e[1] = 0.0
        layer.ranknum["default"].fill_(ranknum)
    incoming, x = torch.randn(20, N), torch.randn(20, K, requires_grad=True)
    wanted = [x, a, b, e]
    plain = layer(x)
    expected = torch.autograd.grad(plain, wanted, incoming)
    scale = layer.scaling["default"] / (ranknum + 1e-5)
    called = layer.base_layer(x)
    inside = functional.cp_update(called, x, a.T, b, e[:, 0], scale=scale, inplace=True)
    results = [(inside, torch.autograd.grad(inside, wanted, incoming))]
    if base is dense:
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        fused = functional.cp_linear(x, weight, bias, a.T, b, e[:, 0], scale=scale)
        results.append((fused, torch.autograd.grad(fused, wanted, incoming)))
    double = [t.detach().double().requires_grad_() for t in wanted]
    with torch.no_grad():
        probe = layer.base_layer(torch.cat((torch.eye(K), torch.zeros(1, K)))).double()
    x64, a64, b64, e64 = double
    exact = x64 @ (probe[:-1] - probe[-1]) + probe[-1] + scale * (x64 @ a64.T * e64[:, 0]) @ b64.T
    right = torch.autograd.grad(exact, double, incoming.double())
    for y, grads in results:
        assert_within_budget(y, plain, exact.detach())
        for name, mine, p, r in zip(("x", "A", "B", "E"), grads, expected, right, strict=True):
            assert_within_budget(mine, p, r, what=name)


def test_tucker_is_the_update_with_its_core_in_v():
    """x U S_m V^T with S_m = C x_3 p_m, every factor's gradient through v = V S_m^T."""
    factors = CPFactors(K, N, 5, 3, "tucker", dtype=torch.float64)
    nn.init.normal_(factors.v, std=0.3)
    x, y = torch.randn(20, K, dtype=torch.float64), torch.randn(20, N, dtype=torch.float64)
    core = torch.einsum("abr,r->ab", factors.c, factors.p[1])
    plain = y + 0.7 * x @ factors.u @ core @ factors.v.T
    ours = functional.cp_update(y, x, factors.u, factors.v @ core.T, scale=0.7)
    torch.testing.assert_close(ours, plain)
    leaves = [factors.u, factors.v, factors.c, factors.p]
    got = torch.autograd.grad(ours.square().sum(), leaves, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(plain.square().sum(), leaves))
    u, v, gain = factors(1)
    assert gain is None
    torch.testing.assert_close(functional.cp_update(y, x, u, v, scale=0.7), plain)
