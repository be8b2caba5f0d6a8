"""The gist model against a forward written out by hand, the full computation, and the libraries around it."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from vits import by_hand, dinov3, eva, gradients, images, stir, trainable, vit, whole

import fastgist
from fastgist import AdapterConfig, CPConfig, GistConfig, LinearProbeConfig, LoraConfig, add_gist, get_peft_model
from fastgist.gist import GistModel, GistOutput
from fastgist.nn import GistLoss

CONFIGS = [
    None,
    LinearProbeConfig(),
    LoraConfig(rank=3, targets=("q", "v", "proj", "fc1", "fc2")),
    CPConfig(rank=4, targets=("q", "v", "fc1", "proj"), dropout=0.0),
    CPConfig(rank=3, core="tucker", dropout=0.0),
    AdapterConfig(bottleneck_dim=4, scale=0.5),
]


def gist(config=None, settings: GistConfig | None = None, **options) -> GistModel:
    model = vit(**options)
    if config is not None:
        get_peft_model(model, config)
    return stir(add_gist(model, settings or GistConfig(dropout=0.0)))


def objective(z, g, y, alpha=0.5, beta=0.75, t=3.0):
    """The paper's loss in plain words."""
    ce = nn.functional.cross_entropy
    p, q = torch.softmax(z / t, -1), torch.softmax(g / t, -1)
    kl = (p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)
    return ce(z, y) + alpha * ce(g, y) + beta * kl.mean()


# -- the method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_logits_loss_and_gradients_are_the_method_written_out(config) -> None:
    model = gist(config, init_values=0.3, qk_norm=True).double()
    x, y = images(dtype=torch.float64), torch.tensor([0, 3, 1])
    output = model.train()(x)
    z, g = by_hand(model.model, x, model.gist.token)
    torch.testing.assert_close(output.logits, z, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(output.gist_logits, g, rtol=1e-9, atol=1e-11)

    names = sorted(trainable(model))
    parameters = dict(model.named_parameters())
    GistLoss()(output, y).backward()
    got = gradients(model)
    assert sorted(got) == names  # exactly the trainable set
    exact = torch.autograd.grad(objective(z, g, y), [parameters[n] for n in names])
    for name, want in zip(names, exact, strict=True):
        torch.testing.assert_close(got[name], want, rtol=1e-8, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_register_tokens_norm_pre_and_no_dropout_in_evaluation() -> None:
    model = gist(LoraConfig(), GistConfig(dropout=0.5), reg_tokens=3, pre_norm=True).double()
    assert model.model.norm_pre.index == 4
    x = images(dtype=torch.float64)
    output = model.eval()(x, return_gist_logits=True)
    z, g = by_hand(model.model, x, model.gist.token)
    torch.testing.assert_close(output.logits, z, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(output.gist_logits, g, rtol=1e-9, atol=1e-11)


def test_several_tokens_read_first_or_mean() -> None:
    model = gist(None, GistConfig(length=3, dropout=0.0), reg_tokens=2).double().eval()
    x = images(dtype=torch.float64)
    features = model.forward_features(x)
    assert features.shape == (3, 4 + 3 + 3, 32)
    first = model.model.head(features[:, 3])
    torch.testing.assert_close(model(x, return_gist_logits=True).gist_logits, first)
    model.config.readout = "mean"
    mean = model.model.head(features[:, 3:6].mean(1))
    torch.testing.assert_close(model(x, return_gist_logits=True).gist_logits, mean)


def test_the_token_stays_at_inference_and_gist_logits_are_on_request() -> None:
    model = gist()
    x = images()
    assert list(model.train()(x)) == ["logits", "gist_logits"]
    assert list(model(x, return_gist_logits=False)) == ["logits"]
    assert list(model.eval()(x)) == ["logits"]
    assert list(model(x, return_gist_logits=True)) == ["logits", "gist_logits"]
    torch.testing.assert_close(model(x).logits, by_hand(model.model, x, model.gist.token)[0])
    assert not torch.allclose(model(x).logits, by_hand(model.model, x, None)[0])


def test_the_head_is_called_once_for_both() -> None:
    model = gist().train()
    shapes = []
    model.model.head.register_forward_hook(lambda m, args, out: shapes.append(tuple(args[0].shape)))
    output = model(images(4))
    assert shapes == [(8, 32)]
    assert output.logits.is_contiguous()
    assert output.gist_logits.is_contiguous()


def test_what_is_trained() -> None:
    model = add_gist(get_peft_model(vit(), LoraConfig(rank=2)))
    lora = {f"model.blocks.{i}.attn.qkv.{n}" for i in range(2) for n in "uv"}
    head = {"model.head.weight", "model.head.bias"}
    assert trainable(model) == lora | head | {"model.norm_pre.gist.token"}
    assert trainable(add_gist(vit())) == head | {"model.norm_pre.gist.token"}
    other = get_peft_model(add_gist(vit()), LoraConfig(rank=2))
    assert isinstance(other, GistModel)
    assert trainable(other) == trainable(model)
    assert model.gist.token.shape == (1, 1, 32)
    assert model.gist.token.abs().max() <= 0.5


# -- only the rows that are read -------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "layerscale, qk norm": {"init_values": 0.3, "qk_norm": True},
    "scaled norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "registers, no final norm": {"reg_tokens": 2, "final_norm": False},
    "fc norm": {"fc_norm": True},
    "drop path": {"drop_path_rate": 0.5},
}


@pytest.mark.parametrize("config", [*CONFIGS, AdapterConfig(4, "houlsby"), AdapterConfig(4, "parallel")], ids=repr)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_rows_read_equal_the_full_computation(config, options, training) -> None:
    model = gist(config, **options).double().train(training)
    full = whole(model)
    x, y = images(4, dtype=torch.float64), torch.tensor([0, 3, 1, 4])
    torch.manual_seed(5)
    ours = model(x)
    torch.manual_seed(5)
    exact = full(x)
    assert list(ours) == list(exact)
    for name in ours:
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-10, atol=1e-12)
    GistLoss()(ours, y).backward()
    GistLoss()(exact, y).backward()
    got, want = gradients(model), gradients(full)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def rows_in_last_mlp(model: GistModel, call) -> int:
    """How many tokens the last block's fc2 worked on, seen from a place that does not count as a hook of the block."""
    seen = []
    linear = nn.functional.linear

    def spy(x, weight, bias=None):
        if weight is model.model.blocks[-1].mlp.fc2.weight:
            seen.append(x.shape[1])
        return linear(x, weight, bias)

    nn.functional.linear = spy
    try:
        call()
    finally:
        nn.functional.linear = linear
    (rows,) = seen
    return rows


def test_the_last_block_works_on_the_read_rows_only() -> None:
    model, x = gist(), images()
    every = 4 + 2
    assert rows_in_last_mlp(model.train(), lambda: model(x)) == 2
    assert rows_in_last_mlp(model.eval(), lambda: model(x)) == 1
    assert rows_in_last_mlp(model, lambda: model(x, return_gist_logits=True)) == 2
    assert rows_in_last_mlp(model, lambda: model.forward_features(x)) == every
    assert rows_in_last_mlp(model, lambda: model.forward_intermediates(x)) == every
    assert rows_in_last_mlp(model, lambda: model.model(x)) == every
    average = gist(global_pool="avg").eval()
    assert rows_in_last_mlp(average, lambda: average(x)) == every
    registers = gist(reg_tokens=4).train()
    assert rows_in_last_mlp(registers, lambda: registers(x)) == 2


@pytest.mark.parametrize(
    "place", ["blocks", "blocks.1", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.mlp.fc2", "blocks.1.ls1", "norm"]
)
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "forward replaced"])
def test_hooks_see_all_tokens(place, kind) -> None:
    model = gist(LoraConfig(dropout=0.0)).train()
    x = images()
    expected = model(x).logits
    target = model.model.get_submodule(place)
    shapes = []
    if kind == "forward":
        target.register_forward_hook(lambda m, args, out: shapes.append(out.shape[1]))
    elif kind == "pre":
        target.register_forward_pre_hook(lambda m, args: shapes.append(args[0].shape[1]))
    elif kind == "backward":
        target.register_full_backward_hook(lambda m, gi, go: shapes.append(go[0].shape[1]))
    else:
        original = target.forward
        target.forward = lambda *a, **k: (shapes.append(a[0].shape[1]), original(*a, **k))[1]
    output = model(x)
    output.logits.sum().backward()
    assert shapes == [6]
    torch.testing.assert_close(output.logits, expected)


def test_global_hooks_see_the_last_block() -> None:
    model, seen = gist().eval(), []
    block = model.model.blocks[-1]
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: seen.append(1) if m is block else None)
    try:
        model(images())
    finally:
        handle.remove()
    assert seen == [1]


def test_unknown_modules_in_the_last_block_take_the_full_path() -> None:
    model = gist().eval()

    class Mixing(nn.Module):  # not row by row
        def forward(self, x):
            return x + x.mean(1, keepdim=True)

    model.model.blocks[-1].ls2 = Mixing()
    x = images()
    torch.testing.assert_close(model(x).logits, model.model(x))


def test_dropout_inside_a_wrapped_qkv_stays_one_mask() -> None:
    """With dropout active the projection is computed whole, so queries, keys and values share the layer's mask."""
    model = gist(CPConfig(rank=4, dropout=0.4)).double().train()
    full, x = whole(model), images(dtype=torch.float64)
    torch.manual_seed(3)
    ours = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(ours.logits, full(x).logits, rtol=1e-10, atol=1e-12)


def test_parallel_blocks_and_other_attention_take_the_full_path() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    layers = pytest.importorskip("timm.layers")
    others = [{"block_fn": ParallelScalingBlock}]
    if hasattr(layers, "DiffAttention"):
        others.append({"attn_layer": "diff"})
    for options in others:
        model, x = gist(**options).eval(), images()
        torch.testing.assert_close(model(x).logits, model.model(x))


# -- pooling and families --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_pooling_does_not_swallow_the_gist(pool) -> None:
    model = gist(global_pool=pool, reg_tokens=1).double().eval()
    x, inner = images(dtype=torch.float64), model.model
    features = model.forward_features(x)
    patches = features[:, 3:]
    pooled = {"avg": patches.mean(1), "max": patches.amax(1), "avgmax": (patches.mean(1) + patches.amax(1)) / 2}[pool]
    output = model(x, return_gist_logits=True)
    torch.testing.assert_close(output.logits, inner.head(inner.fc_norm(pooled)))
    torch.testing.assert_close(output.gist_logits, inner.head(inner.fc_norm(features[:, 2])))
    torch.testing.assert_close(inner(x), output.logits)


@pytest.mark.parametrize("make", [eva, dinov3, lambda: eva(patch_drop_rate=0.5), lambda: eva(global_pool="avg")])
def test_rotary_models(make) -> None:
    torch.manual_seed(0)
    base = make().double()
    model = stir(add_gist(get_peft_model(copy.deepcopy(base), LoraConfig(rank=2)), GistConfig(dropout=0.0)))
    x, inner, place = images(dtype=torch.float64), model.model, base.num_prefix_tokens
    output = model.eval()(x, return_gist_logits=True)
    features = model.forward_features(x)
    assert features.shape[1] == place + 1 + 4
    pooled = features[:, 0] if inner.global_pool == "token" else features[:, place + 1 :].mean(1)
    torch.testing.assert_close(output.logits, inner.head(inner.fc_norm(pooled)))
    torch.testing.assert_close(output.gist_logits, inner.head(inner.fc_norm(features[:, place])))
    assert all(b.attn.num_prefix_tokens == place + 1 for b in inner.blocks)
    model.train()(x)
    fastgist.assert_training(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = fastgist.unload(model, keep_head=False)
    torch.testing.assert_close(plain.eval()(x), base.eval()(x), rtol=0, atol=0)
    assert plain.num_prefix_tokens == place
    assert all(b.attn.num_prefix_tokens == place for b in plain.blocks)


def test_a_gist_is_one_more_register_token() -> None:
    """In a model with rotary embedding a gist token and a register token of the same value are the same thing."""
    more = dinov3(num_reg_tokens=2).double().eval()
    fewer = dinov3(num_reg_tokens=1).double().eval()
    state = {k: v for k, v in more.state_dict().items() if k != "reg_token"}
    fewer.load_state_dict(state, strict=False)
    with torch.no_grad():
        fewer.reg_token.copy_(more.reg_token[:, :1])
        model = add_gist(fewer).eval()
        model.gist.token.copy_(more.reg_token[:, 1:])
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x).logits, more(x))


def test_eva_with_a_separate_bias_and_fused_qkv() -> None:
    """EvaAttention passes qkv.weight to F.linear: an update in qkv's place must not be lost."""
    base = eva(qkv_bias=True).double()
    model = stir(get_peft_model(copy.deepcopy(base), LoraConfig(rank=2))).eval()
    x = images(dtype=torch.float64)
    want = copy.deepcopy(base)
    with torch.no_grad():
        for ours, theirs in zip(model.blocks, want.blocks, strict=True):
            theirs.attn.qkv.weight += ours.attn.qkv.get_delta_weight()
        want.head.load_state_dict(model.head.state_dict())
    torch.testing.assert_close(model(x), want.eval()(x))
    assert not fastgist.unload(model).blocks[0].attn.qkv_bias_separate


# -- what must keep working ------------------------------------------------------------------------------------------


def test_dynamic_img_size() -> None:
    model = gist(LoraConfig(), dynamic_img_size=True).eval()
    plain = gist(LoraConfig())
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images()).logits.shape, torch.Size([3, 5]))
    x = images()
    torch.testing.assert_close(model(x).logits, plain.eval()(x).logits)
    assert model(images(size=32)).logits.shape == (3, 5)
    assert copy.deepcopy(model)(images(size=24)).logits.shape == (3, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    big = images(size=32)
    torch.testing.assert_close(compiled(big).logits, model(big).logits)


def test_set_input_size() -> None:
    base = vit()
    model = stir(add_gist(copy.deepcopy(base))).eval()
    model.set_input_size(img_size=(32, 32))
    base.set_input_size(img_size=(32, 32))
    assert torch.equal(model.model.pos_embed, base.pos_embed)
    assert not model.model.pos_embed.requires_grad
    assert model(images(size=32)).logits.shape == (3, 5)
    assert model.num_prefix_tokens == 2
    x = images(size=32)
    torch.testing.assert_close(model(x).logits, by_hand(model.model, x, model.gist.token)[0])


def test_patch_dropout_drops_patches_only() -> None:
    model = gist(patch_drop_rate=0.5).train()
    lengths = []
    model.model.norm_pre.register_forward_hook(lambda m, a, out: lengths.append(out))
    kept = set()
    patches = model.model.patch_embed(x := images(1)) + model.model.pos_embed[:, 1:]
    for _ in range(20):
        model(x)
        (out,) = (lengths.pop()[:, 2:],)
        assert out.shape[1] == 2  # of four
        kept |= {int((patches[0] - row).abs().sum(-1).argmin()) for row in out[0]}
    assert kept == {0, 1, 2, 3}  # patch 0 too is dropped at times


def test_forward_intermediates() -> None:
    model = gist(reg_tokens=2).eval()
    x = images()
    final, maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(3, 32, 2, 2)] * 2
    torch.testing.assert_close(final, model.forward_features(x))
    pairs = model.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True, norm=True)
    patches, prefix = pairs[-1]
    assert prefix.shape == (3, 1 + 2 + 1, 32)
    torch.testing.assert_close(torch.cat([prefix, patches.flatten(2).transpose(1, 2)], 1), final)
    torch.testing.assert_close(model.forward_head(final), model(x).logits)


def test_classifier_interface() -> None:
    model = gist()
    assert model.num_classes == 5
    assert model.get_classifier() is model.model.head
    assert (model.num_features, model.embed_dim, model.head_hidden_size) == (32, 32, 32)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.train()(images()).gist_logits.shape == (3, 7)
    assert "model.head.weight" in trainable(model)
    assert all(name.startswith("model.") for name in model.no_weight_decay())
    assert model.no_weight_decay() & set(dict(model.named_parameters())) == {"model.pos_embed", "model.cls_token"}


@pytest.mark.parametrize("config", [CPConfig(rank=4, dropout=0.0), AdapterConfig(4)], ids=repr)
def test_compiles_whole_and_trains(config) -> None:
    torch._dynamo.reset()
    model = gist(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, y, loss = images(), torch.tensor([0, 3, 1]), GistLoss()
    expected = model.train()(x)
    loss(expected, y).backward()
    eager = gradients(model)
    model.zero_grad()
    output = compiled(x)
    assert isinstance(output, GistOutput)
    assert list(output) == ["logits", "gist_logits"]
    torch.testing.assert_close(output.logits, expected.logits)
    loss(output, y).backward()
    for name, want in eager.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, want, msg=lambda m, n=name: f"{n}: {m}")
    model.eval()
    torch.testing.assert_close(compiled(x).logits, model(x).logits)
    assert list(compiled(x)) == ["logits"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant) -> None:
    from timm.layers import set_reentrant_ckpt

    model = gist(LoraConfig(), drop_path_rate=0.3).double().train()
    x, y = images(dtype=torch.float64), torch.tensor([0, 3, 1])
    torch.manual_seed(2)
    GistLoss()(model(x), y).backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_grad_checkpointing()
    set_reentrant_ckpt(reentrant)
    try:
        torch.manual_seed(2)
        GistLoss()(model(x), y).backward()
    finally:
        set_reentrant_ckpt(False)
    assert model.model.grad_checkpointing
    assert gradients(model).keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(gradients(model)[name], want)


def test_amp_and_half_precision() -> None:
    model = gist(CPConfig(rank=4)).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images())
        GistLoss()(output, torch.tensor([0, 3, 1])).backward()
    assert output.logits.dtype == torch.bfloat16
    assert gradients(model).keys() == trainable(model)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    half = add_gist(get_peft_model(vit().bfloat16(), LoraConfig()))
    assert half.gist.token.dtype == half.model.blocks[0].attn.qkv.u.dtype == torch.float32
    half.train()(images(dtype=torch.bfloat16)).gist_logits.sum().backward()
    assert half.gist.token.grad.dtype == torch.float32


def test_deepcopy_pickle_and_state_dict() -> None:
    model, x = gist(CPConfig(rank=4), dynamic_img_size=True).eval(), images()
    expected = model(x).logits
    clone = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    other = gist(CPConfig(rank=4), dynamic_img_size=True)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():  # nothing of a copy may lean on the original
        for p in model.parameters():
            p.zero_()
    for copied in (clone, loaded, other.eval()):
        assert torch.equal(copied(x).logits, expected)
        assert copied.gist is copied.model.norm_pre.gist
        assert list(fastgist.report(copied).parts) == ["gist", "adapter", "head"]
        with fastgist.disable_adapter(copied):
            copied(x)
        copied.set_input_size((32, 32))
        assert copied(images(size=32)).logits.shape == (3, 5)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_add_gist_twice() -> None:
    model = add_gist(vit())
    for again in (model, model.model):
        with pytest.raises(ValueError, match="add_gist: the model has a gist token already"):
            add_gist(again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, "has no class token"),
        ({"global_pool": "map"}, "global_pool='map'"),
        ({"global_pool": ""}, "global_pool=''"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "pools its prefix tokens too"),
    ],
)
def test_models_without_a_place_for_it_are_left_alone(options, message) -> None:
    model = vit(**options)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        add_gist(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    get_peft_model(model, LoraConfig())  # still a plain model


def test_strangers() -> None:
    with pytest.raises(TypeError, match=r"add_gist: the structure of torch.nn.*Linear is not known; known: .*timm"):
        add_gist(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="config must be a GistConfig, got a LoraConfig"):
        add_gist(vit(), LoraConfig())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="readout must be one of first, mean, got 'last'"):
        GistConfig(readout="last")
    with pytest.raises(ValueError, match="length must be a positive int, got 0"):
        add_gist(vit(), GistConfig(length=0))


# -- GistOutput ------------------------------------------------------------------------------------------------------


def test_output_is_a_mapping_with_loss_first() -> None:
    z, g, loss = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor(1.0)
    out = GistOutput(logits=z, gist_logits=g)
    assert isinstance(out, dict)
    assert list(out) == ["logits", "gist_logits"]
    assert out.loss is None
    assert out[0] is z
    assert out[1] is g
    assert out[1:] == (g,)
    assert out["logits"] is out.logits is z
    out.loss = loss
    assert list(out) == ["loss", "logits", "gist_logits"]
    assert out[0] is loss
    assert list(GistOutput(loss, z)) == ["loss", "logits"]
    for rebuilt in (GistOutput(dict(out)), type(out)((k, v) for k, v in out.items()), copy.deepcopy(out)):
        assert list(rebuilt) == list(out)
        assert torch.equal(rebuilt.logits, z)
    with pytest.raises(KeyError):
        out["hidden"] = z
    with pytest.raises(TypeError, match="got hidden"):
        GistOutput({"hidden": z})
    with pytest.raises(AttributeError, match="no attribute 'hidden'"):
        out.hidden  # noqa: B018


def test_output_is_a_pytree_and_what_accelerate_expects() -> None:
    out = GistOutput(logits=torch.ones(2, 3), gist_logits=torch.zeros(2, 3))
    leaves, spec = pytree.tree_flatten(out)
    assert len(leaves) == 2
    doubled = pytree.tree_map(lambda t: t * 2, out)
    assert isinstance(doubled, GistOutput)
    assert doubled.logits.sum() == 12
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    accelerate = pytest.importorskip("accelerate")
    halves = GistOutput(logits=torch.ones(2, 3).half())
    wide = accelerate.utils.convert_to_fp32(halves)
    assert isinstance(wide, GistOutput)
    assert wide.logits.dtype == torch.float32
