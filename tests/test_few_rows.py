"""A few rows without autograd, as in decoding, go around the fused operation: the same function, within the error budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgist import functional
from fastgist.nn import CPFactors, CPLinear, LoRALinear
from fastgist.testing import within_budget

K = 48


def stirred(layer):
    torch.manual_seed(1)
    for p in layer.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return layer.eval()


def base(outs, dtype, inner=K, bias=True):
    torch.manual_seed(0)
    return nn.Linear(inner, outs, bias=bias, dtype=dtype).requires_grad_(False)


FORMS = {
    "cp": lambda d: CPLinear(base(K, d), CPFactors(K, K, 5, 3), 1, scale=0.7),
    "cp, factors as the base": lambda d: CPLinear(base(K, d), CPFactors(K, K, 5, 3, dtype=d), 1),
    "tucker": lambda d: CPLinear(base(K, d, bias=False), CPFactors(K, K, 5, 3, "tucker"), 2),
    "a fused qkv": lambda d: CPLinear(base(3 * K, d), CPFactors(K, K, 5, 3), (2, None, 1)),
    "folds of tt": lambda d: CPLinear(base(2 * K, d), CPFactors(K, K, 5, 3, "tt"), (2, 0)),
    "folds of the input": lambda d: CPLinear(base(K, d, 2 * K), CPFactors(K, K, 5, 3), (0, 1)),
    "lora": lambda d: LoRALinear(base(K, d), 4),
    "lora of q and v": lambda d: LoRALinear(base(3 * K, d), 4, folds=3, parts=(0, 2)),
}


@pytest.fixture
def fused(monkeypatch):
    """Calls of the fused operation."""
    calls = []
    original = functional.cp_linear
    monkeypatch.setattr(functional, "cp_linear", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_formula_in_float64(form, dtype, fused):
    layer = stirred(FORMS[form](dtype))
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(2)).to(dtype)
    u, v, gain = layer.get_factors()

    def formula(to):
        weight, down = layer.base_layer.weight.to(to), u.to(to)
        up = layer._folded(v.to(to), None if gain is None else gain.to(to))
        bias = None if layer.base_layer.bias is None else layer.base_layer.bias.to(to)
        y = nn.functional.linear(x.to(to), weight, bias)
        return y + layer.scale * ((x.to(to) @ down) @ up.T)

    with torch.no_grad():
        assert within_budget(layer(x), formula(dtype), formula(torch.float64)) is None
    assert bool(fused) == (u.dtype == torch.float16 or torch.finfo(u.dtype).bits < torch.finfo(dtype).bits)
    assert layer(x).requires_grad and fused  # with autograd it is the operation


@torch.no_grad()
def test_what_is_not_a_few_rows_takes_the_operation(fused):
    layer = stirred(FORMS["cp"](torch.float32))
    x = torch.randn(16, K)
    layer(x)
    layer(x[0])
    assert not fused
    layer(torch.randn(17, K))
    layer(x[:0])
    assert len(fused) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert len(fused) == 3
    layer.factors.dropout = 0.5
    layer.train()(x)
    assert len(fused) == 4
    with pytest.raises(ValueError, match="shape"):
        layer(torch.randn(2, K + 1))
    with pytest.raises(TypeError):
        layer(x.double())


def test_inference_mode_and_a_merged_layer(fused):
    layer = stirred(FORMS["cp"](torch.float32))
    x = torch.randn(2, K)
    with torch.inference_mode():
        found = layer(x)
    torch.testing.assert_close(found, layer(x))
    layer.merge()
    torch.testing.assert_close(found, layer(x))
    assert len(fused) == 1
