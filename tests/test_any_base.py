"""Layers around linear layers that can only be called: output and gradients against the update in float64, in place where the
output is theirs to change, and everything that a training run does with a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from quantised import BASES, K, N, activated, dense, four_bits, hooked
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastgist import functional
from fastgist.nn import CPFactors, CPLinear, LoRALinear
from fastgist.testing import assert_within_budget

LAYERS = {
    "lora": lambda base: LoRALinear(base, 4),
    "lora of two parts": lambda base: LoRALinear(base, 4, folds=3, parts=(0, 2)),
    "cp": lambda base: CPLinear(base, CPFactors(K, N, 5, 3), 1, scale=0.7),
    "cp folds": lambda base: CPLinear(base, CPFactors(K, N // 3, 5, 3), (2, None, 1)),
    "tucker": lambda base: CPLinear(base, CPFactors(K, N, 5, 3, "tucker"), 2),
    "folds of the input": lambda base: CPLinear(base, CPFactors(K // 2, N, 5, 3), (0, 1)),
}
every_base = pytest.mark.parametrize("base", BASES)


def stirred(layer):
    torch.manual_seed(1)
    for p in layer.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return layer


def made(base, layer="lora", dtype=torch.float32):
    """Half-precision bases have no bias, so that their weight can be read off their output."""
    return stirred(LAYERS[layer](BASES[base][0](dense(dtype == torch.float32, dtype)))).train()


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of the fused update was in place."""
    seen = []
    original = functional.cp_update
    monkeypatch.setattr(
        functional, "cp_update", lambda *a, **k: (seen.append(k.get("inplace", False)), original(*a, **k))[1]
    )
    return seen


def update(layer, x):
    """scale * (x U * gain) V^T in x's dtype, one fold after another."""
    u, v, gain = (None if t is None else t.to(x.dtype) for t in layer.get_factors())
    folds = layer.out_features // v.shape[0]
    gain = torch.ones(1, v.shape[1], dtype=x.dtype) if gain is None else gain.reshape(-1, v.shape[1])
    return layer.scale * torch.cat([((x @ u) * g) @ v.T for g in gain.expand(folds, -1)], -1)


def trained(layer):
    return {n: p for n, p in layer.named_parameters() if p.requires_grad}


def gradients(layer, out, x, incoming):
    found = torch.autograd.grad(out, [x, *trained(layer).values()], incoming, allow_unused=True)
    return dict(zip(["x", *trained(layer)], found, strict=True))


def in_float64(layer, form, base):
    """The same function of float64: the base's weight as its output shows it, the factors widened."""
    double = LAYERS[form](dense()).double()
    double.load_state_dict({n: p.double() for n, p in trained(layer).items()}, strict=False)
    if base == "hooked":
        return lambda x: nn.functional.linear(
            x, layer.base_layer.weight.double(), layer.base_layer.bias.double()
        ), double
    if base == "a subclass with a forward of its own":
        called = copy.deepcopy(layer.base_layer).double()
        return called, double
    dtype = torch.promote_types(layer.base_layer.weight.dtype, torch.bfloat16)
    with torch.no_grad():
        probe = torch.cat((torch.eye(K), torch.zeros(1, K))).to(dtype)
        out = layer.base_layer(probe).double()
    return lambda x: x @ (out[:-1] - out[-1]) + out[-1], double


def check(layer, form, base, x, **options):
    incoming = torch.randn(*x.shape[:-1], N).to(x.dtype)
    y = layer(x)
    got = gradients(layer, y, x, incoming)
    plain = layer.base_layer(x) + update(layer, x)
    expected = gradients(layer, plain, x, incoming)
    called, double = in_float64(layer, form, base)
    wide = x.detach().double().requires_grad_()
    exact = called(wide) + update(double, wide)
    right = gradients(double, exact, wide, incoming.double())
    assert y.dtype == x.dtype
    assert_within_budget(y, plain, exact.detach())
    for name in got:
        assert got[name].dtype == (x if name == "x" else trained(layer)[name]).dtype
        assert_within_budget(got[name], expected[name], right[name], what=name, dtype=x.dtype)


# -- output and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LAYERS)
@every_base
def test_output_and_gradients_are_those_of_the_dense_layer(base, form, calls):
    check(made(base, form), form, base, rows(5, 7).requires_grad_())
    assert calls == [BASES[base][1]]


@pytest.mark.parametrize("form", ["lora", "cp folds"])
@pytest.mark.parametrize("base", ["bitsandbytes nf4", "bitsandbytes int8", "torchao int8", "parametrised"])
def test_float32_factors_beside_a_bfloat16_base(base, form, calls):
    check(made(base, form, torch.bfloat16), form, base, rows(5, 7, dtype=torch.bfloat16).requires_grad_())
    assert calls == [BASES[base][1]]


@every_base
def test_without_gradients_and_with_few_rows(base, calls):
    layer = made(base).eval()
    for shape in ((3, 40), (2,), *([()] if base != "bitsandbytes int8" else [])):  # that one takes no single row
        x = rows(*shape)
        with torch.no_grad():
            y = layer(x)
            plain = layer.base_layer(x) + update(layer, x)
        double = LAYERS["lora"](dense()).double()
        double.load_state_dict({n: p.double() for n, p in trained(layer).items()}, strict=False)
        with torch.no_grad():
            exact = layer.base_layer(x).double() + update(double, x.double())
        assert_within_budget(y, plain, exact)
    assert len(calls) == 1, "a few rows on a CPU take a shorter way"
    assert calls[0] == (base not in ("hooked", "a subclass with a forward of its own", "Conv1D")), "views too"


def test_a_layer_that_is_known_but_for_a_hook_anywhere_is_not_written_to(calls):
    layer = made("bitsandbytes nf4")
    x = rows(20)
    layer(x)
    kept = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: kept.append(out))
    try:
        layer(x)
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="wrapped already"):
        LoRALinear(layer, 4)
    inner = made("PEFT's LoRA")
    inner.base_layer.base_layer.register_forward_hook(lambda module, args, out: None)
    inner(x)
    assert calls == [True, False, False]


def test_what_a_hook_kept_is_the_base_layers_own_output():
    layer = stirred(LoRALinear(hooked(dense()), 4))
    x = rows(20)
    y = layer(x)
    (kept,) = layer.base_layer.kept
    assert torch.equal(kept, nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))
    assert not torch.equal(kept, y)


def test_a_layer_that_gives_its_own_input_back_is_left_alone():
    class Same(nn.Linear):
        forward = nn.Linear.forward

    base = Same(K, K).requires_grad_(False)
    layer = stirred(LoRALinear(base, 4))
    x = rows(20)
    base.forward = lambda x: x  # replaced on the instance, so that nothing is known of it
    before = x.clone()
    torch.testing.assert_close(layer(x), x + update(layer, x))
    assert torch.equal(x, before)


def test_what_a_call_of_its_own_kept_is_the_base_layers_own_output():
    class Keeping(nn.Linear):
        def __call__(self, x):
            self.kept = super().__call__(x)
            return self.kept

    base = Keeping(K, N).requires_grad_(False)
    x = rows(20)
    stirred(LoRALinear(base, 4))(x)
    assert torch.equal(base.kept, nn.functional.linear(x, base.weight, base.bias))


def test_a_base_layer_that_returns_no_tensor_is_named():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    with pytest.raises(TypeError, match="LoRALinear: base_layer, a Pair, must return a Tensor, got tuple"):
        LoRALinear(Pair(K, N), 4)(rows(20))


def test_a_model_may_be_quantised_after_it_was_wrapped(calls):
    quantization = pytest.importorskip("torchao.quantization")
    layer = stirred(LoRALinear(dense(), 4))
    x = rows(20)
    with torch.no_grad():
        before = layer(x)
    assert not calls
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        after = layer(x)
    assert len(calls) == 1
    torch.testing.assert_close(after, before, atol=0.05, rtol=0.05)
    assert layer.forward_slice(x, 0, 32) is None, "only the whole can be computed"
    with pytest.raises(TypeError, match="Int8Tensor"):
        layer.merge()


@pytest.mark.parametrize("base", ["bitsandbytes nf4", "torchao int8", "parametrised"])
def test_under_autocast_the_output_is_what_the_base_layer_gives(base):
    layer, x = made(base), rows(20).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        called = layer.base_layer(x)
        y = layer(x)
    assert y.dtype == called.dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained(layer).values())
    torch.testing.assert_close(y.float(), called.float() + update(layer, x), rtol=2e-2, atol=6e-2)


@every_base
def test_dropout_has_one_mask_for_forward_and_recomputation(base):
    layer = made(base, "lora")
    layer.dropout_p = 0.5
    x = rows(20).requires_grad_()
    torch.manual_seed(4)
    y = layer(x)
    want = gradients(layer, y.square().sum(), x, None)
    for reentrant in (False, True):
        torch.manual_seed(4)
        x.grad = None
        layer.zero_grad()
        again = checkpoint(layer, x, use_reentrant=reentrant)
        assert torch.equal(again, y)
        again.square().sum().backward()
        for name, p in {"x": x, **trained(layer)}.items():
            assert torch.equal(p.grad, want[name]), name
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("base", ["bitsandbytes nf4", "torchao int8", "torchao int4", "parametrised", "Conv1D"])
def test_fullgraph(base):
    layer, x = made(base, "cp"), rows(20).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want = gradients(layer, layer(x).square().sum(), x, None)
    got = gradients(layer, compiled(x).square().sum(), x, None)
    torch.testing.assert_close(got, want)


def test_meta_tensors():
    layer = LoRALinear(activated(dense()), 4).to("meta")
    assert layer(torch.empty(3, K, device="meta")).shape == (3, N)


# -- what a run does with a layer -------------------------------------------------------------------------------------


@every_base
def test_merging_is_refused_with_a_word(base):
    layer = made(base)
    state = copy.deepcopy(layer.state_dict())
    if base in ("hooked", "Conv1D"):  # a dense layer after all
        layer.merge()
        layer.unmerge()
    else:
        with pytest.raises(TypeError, match=f"base_layer is {type(layer.base_layer).__name__}.*only a dense"):
            layer.merge()
    assert not layer.merged and _same(state, layer.state_dict())


def _same(state, other):
    assert state.keys() == other.keys()
    return all(
        a is b or (torch.is_tensor(a) and _plain_equal(a, other[n])) for n, a in state.items() for b in [other[n]]
    )


def _plain_equal(a, b):
    return torch.equal(a.dequantize(), b.dequantize()) if hasattr(a, "qdata") else torch.equal(a, b)


@every_base
def test_a_step_changes_the_factors_alone_and_the_state_travels(base, tmp_path):
    layer, x = made(base), rows(20)
    frozen = copy.deepcopy(layer.base_layer.state_dict())
    optimizer = torch.optim.AdamW(trained(layer).values(), lr=0.1, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in trained(layer).items()}
    layer(x).square().mean().backward()
    assert all(p.grad is None for n, p in layer.named_parameters() if n not in before)
    optimizer.step()
    assert _same(frozen, layer.base_layer.state_dict())
    assert all(not torch.equal(p, before[n]) for n, p in trained(layer).items())
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = made(base)
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    other.load_state_dict(
        state, strict="nf4" not in base and "fp4" not in base
    )  # bitsandbytes loads 4 bits its own way
    layer.base_layer.kept = other.base_layer.kept = []
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(other(x), want)
        layer.base_layer.kept = []
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x), want)
        nn.init.zeros_(next(iter(trained(twin).values())))
        assert torch.equal(layer(x), want) and not torch.equal(twin(x), want)


def test_a_base_layer_that_is_trained_too_gets_its_gradient():
    base = nn.utils.parametrizations.weight_norm(nn.Linear(K, N, dtype=torch.float64))
    layer, x = stirred(LoRALinear(base, 4)), rows(20, dtype=torch.float64)
    got = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    want = torch.autograd.grad((base(x) + update(layer, x)).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(got, want)


def test_four_bits_need_no_dense_weight_for_the_update():
    """The largest tensor that a step makes beside the base layer's own is an output, (M, N), not a weight."""
    layer = stirred(LoRALinear(four_bits(dense()), 4))
    x, made_here = rows(8).requires_grad_(), []

    def keep(t):
        made_here.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer.base_layer(x)
        of_base = len(made_here)
        functional.cp_update(y, x, *layer.get_factors(), scale=layer.scale, inplace=True).sum().backward()
    assert sorted(made_here[of_base:]) == sorted([(8, K), (K, 4), (N, 4), (8, 4)])
