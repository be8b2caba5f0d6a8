"""Adapter layers with a norm of their own and dropout: the module, every placement in a ViT against a forward written out
here in float64, files, copies, compilation and checkpointing. Hard cases 18, 20, 21 and 22 for these options."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vits import dense, images, layer_norm, stir, trainable, vit, whole

from fastgist import AdapterConfig, GistConfig, add_gist, get_peft_model, load_adapter, report, save_adapter
from fastgist.nn import AdaptedBlock, AdaptedLayer, Adapter
from fastgist.peft import storage
from fastgist.reference.philox import keep_mask
from fastgist.testing import assert_within_budget

PLACEMENTS = ("pfeiffer", "houlsby", "parallel", "adaptformer", "shared")


def bottleneck(adapter: Adapter, x: Tensor) -> Tensor:
    """What an adapter adds to its residual; in training under a mask whose seed is drawn here."""
    a = x
    if adapter.norm_weight is not None:
        centred = x - x.mean(-1, keepdim=True)
        a = centred / (centred.square().mean(-1, keepdim=True) + adapter.norm_eps).sqrt()
        a = a * adapter.norm_weight + adapter.norm_bias
    inside = nn.functional.gelu(a @ adapter.down_weight.T + adapter.down_bias)
    if adapter.training and adapter.dropout:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
        keep = keep_mask(seed, (inside[..., 0].numel(), inside.shape[-1]), adapter.dropout).view(inside.shape)
        inside = inside * keep / (1 - adapter.dropout)
    return adapter.scale * (inside @ adapter.up_weight.T + adapter.up_bias)


def filled(adapter: Adapter) -> Adapter:
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return adapter


# -- the module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("training", [False, True])
def test_the_module_is_the_formula(norm, dropout, training) -> None:
    layer = filled(Adapter(6, 3, scale=0.7, norm=norm, norm_eps=1e-3, dropout=dropout, dtype=torch.float64))
    layer.train(training)
    x, r = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    for residual, added in ((None, x), (r, r), (False, 0.0), ((x, r), x + r)):
        torch.manual_seed(3)
        got = layer(x, residual)
        torch.manual_seed(3)
        torch.testing.assert_close(got, added + bottleneck(layer, x), rtol=1e-12, atol=1e-12)


def test_parameters_and_their_start() -> None:
    plain, normed = Adapter(64, 8), Adapter(64, 8, norm=True, dropout=0.5)
    assert "norm_weight" not in dict(plain.named_parameters()) and "norm_weight" not in plain.state_dict()
    assert bool((normed.norm_weight == 1).all()) and bool((normed.norm_bias == 0).all())
    x = torch.randn(4, 64)
    assert torch.equal(normed(x), x), "a fresh adapter returns its residual, in training too"
    stir(normed).reset_parameters()
    assert torch.equal(normed.train()(x), x) and bool((normed.norm_weight == 1).all())
    assert repr(normed) == "Adapter(64 -> 8 -> 64, activation='gelu', scale=1.0, norm=True, dropout=0.5)"
    normed.load_state_dict(copy.deepcopy(normed.state_dict()))
    with pytest.raises(RuntimeError, match="Missing key.*norm_weight"):
        normed.load_state_dict(plain.state_dict())


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"Adapter: dropout must be a number in \[0, 1\), got 1"):
        Adapter(6, 3, dropout=1.0)
    with pytest.raises(TypeError, match="Adapter: norm must be True or False, got 'in'"):
        Adapter(6, 3, norm="in")
    with pytest.raises(ValueError, match="Adapter: norm_eps must be a finite number > 0, got 0"):
        Adapter(6, 3, norm=True, norm_eps=0.0)
    with pytest.raises(ValueError, match="dropout"):
        get_peft_model(vit(), AdapterConfig(dropout=-0.5))


@pytest.mark.parametrize("bottleneck_dim", [1, 4, 8, 65])
@pytest.mark.parametrize("width", [12, 37])
def test_18_bottlenecks(bottleneck_dim, width) -> None:
    layer = filled(Adapter(width, bottleneck_dim, norm=True))
    x = torch.randn(5, width)
    plain = (
        x
        + nn.functional.gelu(
            nn.functional.layer_norm(x, (width,), layer.norm_weight, layer.norm_bias) @ layer.down_weight.T
            + layer.down_bias
        )
        @ layer.up_weight.T
        + layer.up_bias
    )
    assert_within_budget(layer(x), plain, copy.deepcopy(layer).double()(x.double()))


def test_dtypes() -> None:
    """float32 parameters in a half-precision model keep their dtype, others take the model's."""
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    layer = filled(Adapter(6, 3, norm=True, dropout=0.2))
    layer(x).sum().backward()
    assert layer(x).dtype == torch.bfloat16 and layer.norm_weight.grad.dtype == torch.float32
    assert Adapter(6, 3, norm=True, dtype=torch.float64)(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 6)).dtype == torch.bfloat16


def test_compiled() -> None:
    layer = filled(Adapter(6, 3, norm=True, dropout=0.3))
    x = torch.randn(5, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, layer):
        torch.manual_seed(1)
        y = run(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), tuple(layer.parameters()))])
    torch.testing.assert_close(*found)
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_21_checkpointing_sees_the_same_mask(reentrant) -> None:
    layer = filled(Adapter(6, 3, norm=True, dropout=0.5))
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(50, 6, requires_grad=True)
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_22_one_adapter_called_twice_sums_its_gradients() -> None:
    layer = filled(Adapter(6, 3, norm=True, dtype=torch.float64))
    x = torch.randn(5, 6, dtype=torch.float64)
    layer(layer(x)).square().sum().backward()
    hand = [p.grad.clone() for p in layer.parameters()]
    inner = x + bottleneck(layer, x)
    wanted = torch.autograd.grad((inner + bottleneck(layer, inner)).square().sum(), tuple(layer.parameters()))
    torch.testing.assert_close(hand, list(wanted))
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


# -- in a model ------------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """A VisionTransformer's logits with adapters wherever a placement puts them."""
    size, side = model.patch_embed.patch_size[0], x.shape[-1] // model.patch_embed.patch_size[0]
    cut = x.reshape(len(x), 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5).reshape(len(x), side * side, -1)
    h = cut @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    h = torch.cat([model.cls_token.expand(len(x), -1, -1), h], 1) + model.pos_embed

    def attend(attn: nn.Module, h: Tensor) -> Tensor:
        q, k, v = dense(attn.qkv, h).reshape(len(x), h.shape[1], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        return dense(attn.proj, mixed.transpose(1, 2).reshape(h.shape))

    def feed(mlp: nn.Module, h: Tensor) -> Tensor:
        return dense(mlp.fc2, nn.functional.gelu(dense(mlp.fc1, h)))

    def run(sublayer: nn.Module, function, h: Tensor) -> Tensor:
        if not isinstance(sublayer, AdaptedLayer):
            return function(sublayer, h)
        y = function(sublayer.base_layer, h)
        return y + bottleneck(sublayer.adapter, y if sublayer.placement == "sequential" else h)

    for outer in model.blocks:
        block = outer.base_layer if isinstance(outer, AdaptedBlock) else outer
        for kind, norm, sublayer, function in (
            ("attention", block.norm1, block.attn, attend),
            ("mlp", block.norm2, block.mlp, feed),
        ):
            branch = run(sublayer, function, layer_norm(norm, h))
            beside = isinstance(outer, AdaptedBlock) and kind in outer.branches
            h = h + branch + (bottleneck(outer.adapter, h) if beside else 0.0)
    return dense(model.head, layer_norm(model.norm, h)[:, 0])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("norm", "dropout"), [(True, 0.0), (False, 0.3), (True, 0.3)])
@pytest.mark.parametrize("training", [False, True])
def test_placements_against_a_forward_written_out(placement, norm, dropout, training) -> None:
    config = AdapterConfig(4, placement, scale=0.5, norm=norm, dropout=dropout)
    model = stir(get_peft_model(vit().double(), config)).train(training)
    x = images(dtype=torch.float64)
    ours = [p for p in model.parameters() if p.requires_grad]
    found = []
    for run in (model, lambda t: by_hand(model, t)):
        torch.manual_seed(5)
        y = run(x)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), ours)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_freshly_wrapped_model_is_the_model(placement) -> None:
    base, x = vit(), images()
    plain = base.eval()(x)
    model = get_peft_model(copy.deepcopy(base), AdapterConfig(4, placement, norm=True, dropout=0.2))
    for training in (False, True):
        assert torch.equal(model.train(training)(x), plain)
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    assert report(model).trainable == len(adapters) * (2 * 32 * 4 + 4 + 32 + 2 * 32) + 32 * 5 + 5


@pytest.mark.parametrize("placement", ["houlsby", "adaptformer", "shared"])
def test_with_a_gist_token_saved_and_loaded(placement, tmp_path) -> None:
    base, x = vit(), images()
    config = AdapterConfig(4, placement, norm=True, dropout=0.2)
    model = stir(add_gist(get_peft_model(copy.deepcopy(base), config), GistConfig())).eval()
    output = model(x, return_gist_logits=True)
    full = whole(model)(x, return_gist_logits=True)
    torch.testing.assert_close(tuple(output.values()), tuple(full.values()))
    model.train()(x).gist_logits.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable(model)
    save_adapter(model.eval(), tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path).eval()
    again = loaded(x, return_gist_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(again.values(), output.values(), strict=True))
    assert {m.dropout for m in loaded.modules() if isinstance(m, Adapter)} == {0.2}


def test_files_from_before_there_was_a_norm_still_load(tmp_path) -> None:
    """Their configuration has neither field: no norm, no dropout."""
    base, x = vit(), images()
    model = stir(get_peft_model(copy.deepcopy(base), AdapterConfig(4))).eval()
    save_adapter(model, tmp_path)
    config, tensors = storage.read(tmp_path)
    assert config["adapter"].pop("norm") is False and config["adapter"].pop("dropout") == 0.0
    old = tmp_path / "old"
    storage.write(old, config, tensors)
    loaded = load_adapter(copy.deepcopy(base), old).eval()
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match="norm=False.*norm=True"):
        load_adapter(get_peft_model(copy.deepcopy(base), AdapterConfig(4, norm=True)), old)
