"""Hard cases 18 (sizes), 20 (fresh layers, merging), 21 (dropout), 22 (shared factors), for layers and models."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint
from vits import images, stir, vit

from fastgist import (
    AdapterConfig,
    CPConfig,
    GistConfig,
    LoraConfig,
    add_gist,
    get_peft_model,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from fastgist.nn import Adapter, CPFactors, CPLinear, GistLoss, GistToken, LoRALinear
from fastgist.testing import assert_within_budget

pytestmark = pytest.mark.kernel  # what "auto" takes, interpreted too


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def _randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return module


# -- 18 --------------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("rank", [1, 3, 17, 64, 256])
@pytest.mark.parametrize("width", [12, 37])
def test_18_ranks(rank, width) -> None:
    base = nn.Linear(width, 2 * width).requires_grad_(False)
    factors = CPFactors(width, width, rank, 2)
    with torch.no_grad():
        factors.v.normal_()
    for layer in (CPLinear(base, factors, (0, 1)), LoRALinear(base, rank), LoRALinear(base, rank, folds=2, parts=(1,))):
        if isinstance(layer, LoRALinear):
            with torch.no_grad():
                layer.v.normal_()
        exact = copy.deepcopy(layer).double()
        x = torch.randn(5, width)
        plain = x @ (base.weight + layer.get_delta_weight()).T + base.bias
        assert_within_budget(layer(x), plain, exact(x.double()), what=repr(layer))


@pytest.mark.kernel
@pytest.mark.parametrize("bottleneck", [1, 4, 8, 65])
@pytest.mark.parametrize("width", [12, 37])
def test_18_bottlenecks(bottleneck, width) -> None:
    layer = _randomise(Adapter(width, bottleneck))
    x = torch.randn(5, width)
    plain = x + nn.functional.gelu(x @ layer.down_weight.T + layer.down_bias) @ layer.up_weight.T + layer.up_bias
    assert_within_budget(layer(x), plain, copy.deepcopy(layer).double()(x.double()))


@pytest.mark.parametrize("size", [0, -1])
def test_18_sizes_that_are_none(size) -> None:
    base = nn.Linear(6, 6)
    with pytest.raises(ValueError, match=f"CPFactors: rank must be a positive int, got {size}"):
        CPFactors(6, 6, size, 1)
    with pytest.raises(ValueError, match=f"CPFactors: modes must be a positive int, got {size}"):
        CPFactors(6, 6, 2, size)
    with pytest.raises(ValueError, match=f"LoRALinear: rank must be a positive int, got {size}"):
        LoRALinear(base, size)
    with pytest.raises(ValueError, match=f"Adapter: bottleneck_dim must be a positive int, got {size}"):
        Adapter(6, size)
    with pytest.raises(ValueError, match=f"GistToken: length must be a positive int, got {size}"):
        GistToken(6, size)
    model = vit()
    for kind, field, name in (
        (LoraConfig, "rank", "LoRALinear: rank"),
        (CPConfig, "rank", "CPFactors: rank"),
        (AdapterConfig, "bottleneck_dim", "Adapter: bottleneck_dim"),
    ):
        with pytest.raises(ValueError, match=f"{kind.__name__}: {field} must be a positive int, got {size}"):
            kind(**{field: size})
        config = kind()
        setattr(config, field, size)  # after it was checked
        with pytest.raises(ValueError, match=name):
            get_peft_model(model, config)
    assert all(p.requires_grad for p in model.parameters())  # untouched
    assert type(model.blocks[0].attn.qkv) is nn.Linear


@pytest.mark.parametrize("size", [2.0, True, "8", None])
def test_18_sizes_that_are_no_ints(size) -> None:
    with pytest.raises(TypeError, match="rank must be a positive int, got"):
        LoRALinear(nn.Linear(6, 6), size)
    with pytest.raises(TypeError, match="bottleneck_dim must be a positive int, got"):
        Adapter(6, size)


# -- 20 --------------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_20_fresh_layers_are_the_layer_they_wrap(dtype) -> None:
    base = nn.Linear(64, 96, dtype=dtype).requires_grad_(False)
    factors = CPFactors(64, 32, 8, 3)
    x = torch.randn(33, 64, dtype=dtype)
    exact = nn.functional.linear(x.double(), base.weight.double(), base.bias.double())
    for layer in (CPLinear(base, factors, (0, 1, 2)), LoRALinear(base), LoRALinear(base, folds=3, parts=(0, 2))):
        assert_within_budget(layer(x), base(x), exact, what=repr(layer))
    adapter = Adapter(64, 8)
    assert torch.equal(adapter(x), x)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(),
        CPConfig(rank=8),
        CPConfig(rank=4, core="tucker"),
        AdapterConfig(),
        AdapterConfig(placement="parallel"),
    ],
    ids=repr,
)
def test_20_a_freshly_wrapped_model_is_the_model(config) -> None:
    base = vit()
    x = images(6)
    plain, exact = base.eval()(x), copy.deepcopy(base).double().eval()(x.double())
    wrapped = get_peft_model(copy.deepcopy(base), config).eval()
    assert_within_budget(wrapped(x), plain, exact)
    if isinstance(config, AdapterConfig):  # the base's own products run: bitwise
        assert torch.equal(wrapped(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LoraConfig(targets=("q", "k", "fc1")), CPConfig(rank=8, dropout=0.0)], ids=repr)
def test_20_merge_then_unmerge_is_bitwise(config, dtype) -> None:
    model = stir(get_peft_model(vit().to(dtype), config), 0.05).eval()
    state = copy.deepcopy(model.state_dict())
    exact = copy.deepcopy(model).double()
    x = images(4, dtype=dtype)
    unmerged = model(x)
    merge(model)
    assert_within_budget(model(x), unmerged, exact(x.double()), what="merged")
    assert any(not torch.equal(p, state[k]) for k, p in model.named_parameters())
    unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), unmerged)


# -- 21 --------------------------------------------------------------------------------------------------------------


@pytest.mark.kernel
@pytest.mark.parametrize("reentrant", [False, True])
def test_21_recomputation_under_checkpointing_sees_the_same_mask(reentrant) -> None:
    layer = CPLinear(
        nn.Linear(16, 16).requires_grad_(False), _randomise(CPFactors(16, 16, 8, 1, dropout=0.5)), 0
    ).train()
    x = torch.randn(64, 16, requires_grad=True)
    torch.manual_seed(4)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, *layer.factors.parameters()])
    torch.manual_seed(4)
    leaf = x.detach().clone().requires_grad_(True)
    checkpoint(layer, leaf, use_reentrant=reentrant).square().sum().backward()
    for got, want in zip([leaf.grad, *(p.grad for p in layer.factors.parameters())], expected, strict=True):
        torch.testing.assert_close(got, want)


# -- 22 --------------------------------------------------------------------------------------------------------------


def _shared(model: nn.Module) -> int:
    factors = [m.factors for m in model.modules() if isinstance(m, CPLinear)]
    assert len(factors) == 3
    return len({id(f) for f in factors}) * len({f.u.data_ptr() for f in factors})


@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_22_gradients_are_the_sum_over_all_layers(core) -> None:
    model = add_gist(get_peft_model(vit(depth=3), CPConfig(rank=3, core=core, dropout=0.0)), GistConfig(dropout=0.0))
    stir(model).double().train()
    x, y = images(4, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    GistLoss()(model(x), y).backward()

    # The same model, but every layer with factors of its own: their gradients must add up.
    apart = copy.deepcopy(model)
    apart.zero_grad()
    for block in apart.model.blocks:
        block.attn.qkv.factors = copy.deepcopy(block.attn.qkv.factors)
    GistLoss()(apart(x), y).backward()
    shared = model.model.blocks[0].attn.qkv.factors
    for name, p in shared.named_parameters():
        parts = [dict(b.attn.qkv.factors.named_parameters())[name].grad for b in apart.model.blocks]
        assert all(part.abs().sum() > 0 for part in parts)
        torch.testing.assert_close(p.grad, sum(parts), rtol=1e-10, atol=1e-13)


def test_22_saved_once_loaded_once_still_shared(tmp_path) -> None:
    base = vit(depth=3)
    model = stir(get_peft_model(copy.deepcopy(base), CPConfig(rank=3)))
    assert _shared(model) == 1
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 32 * 3 + 9 * 3 + 3 + 165

    save_adapter(model, tmp_path)
    from safetensors.torch import load_file

    names = sorted(load_file(tmp_path / "adapter_model.safetensors"))
    assert [n for n in names if n.endswith(".u")] == ["adapter.blocks.0.attn.qkv.factors.u"]
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    restored = get_peft_model(copy.deepcopy(base), CPConfig(rank=3))
    restored.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = images()
    for other in (
        loaded,
        restored,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert _shared(other) == 1
        assert torch.equal(other.eval()(x), model.eval()(x))
    state = torch.load(io.BytesIO(_saved(model.state_dict())), weights_only=True)
    assert [name for name in state if name.endswith("factors.u")] == ["blocks.0.attn.qkv.factors.u"]


def _saved(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
