"""The PEFT methods beyond LoRA, CP and sequential adapters, each against a forward written out here, in float64."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from vits import dense, dinov3, eva, images, layer_norm, stir, trainable, vit, whole

from fastgist import (
    AdapterConfig,
    BitFitConfig,
    FacTConfig,
    FullConfig,
    GistConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    SSFConfig,
    add_gist,
    disable_adapter,
    get_peft_model,
    load_adapter,
    merge,
    report,
    save_adapter,
    unload,
    unmerge,
)
from fastgist.nn import (
    AdaptedBlock,
    BiasShift,
    CPFactors,
    CPLinear,
    LoRALinear,
    PrefixedAttention,
    PromptedBlock,
    ScaleShift,
)

SHARED = AdapterConfig(4, "shared", scale=0.1, init="paper")
CONFIGS = [
    AdapterConfig(3, "adaptformer", scale=0.5),
    SHARED,
    FacTConfig(rank=3),
    FacTConfig(rank=3, form="tk", scale=0.5),
    SSFConfig(),
    BitFitConfig(),
    PrefixConfig(length=3),
    PromptConfig(length=3),
    PromptConfig(length=2, deep=True, dropout=0.1),
]
MERGEABLE = [c for c in CONFIGS if not isinstance(c, AdapterConfig | PrefixConfig | PromptConfig)]


def logits(model, x):
    output = model.eval()(x)
    return output if isinstance(output, Tensor) else output.logits


# -- the models, written out -----------------------------------------------------------------------------------------


def affine(layer: nn.Module, run, x: Tensor) -> Tensor:
    """``run(plain layer, x)`` with what SSF or BitFit does to its output."""
    if isinstance(layer, ScaleShift):
        return run(layer.base_layer, x) * layer.scale + layer.shift
    if isinstance(layer, BiasShift):
        return run(layer.base_layer, x) + layer.delta
    return run(layer, x)


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """A VisionTransformer's logits: patches, blocks with whatever stands beside their branches, head."""
    size, side = model.patch_embed.patch_size[0], x.shape[-1] // model.patch_embed.patch_size[0]
    cut = x.reshape(len(x), 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5).reshape(len(x), side * side, -1)
    h = affine(model.patch_embed.proj, lambda c, t: t @ c.weight.flatten(1).T + c.bias, cut)
    h = torch.cat([model.cls_token.expand(len(x), -1, -1), h], 1) + model.pos_embed
    for whole_block in model.blocks:
        block = getattr(whole_block, "base_layer", whole_block)
        if isinstance(whole_block, PromptedBlock):
            tail = h[:, 1:] if whole_block.insert else h[:, 1 + whole_block.length :]
            h = torch.cat([h[:, :1], whole_block.prompt.expand(len(x), -1, -1), tail], 1)

        def beside(kind: str, h: Tensor, whole_block=whole_block) -> Tensor | float:
            if kind not in getattr(whole_block, "branches", ()):
                return 0.0
            a = whole_block.adapter
            inside = nn.functional.gelu(h @ a.down_weight.T + a.down_bias)
            return a.scale * (inside @ a.up_weight.T + a.up_bias)

        attn, prefix = getattr(block.attn, "base_layer", block.attn), block.attn
        n, heads = h.shape[1], attn.num_heads
        qkv = affine(attn.qkv, dense, affine(block.norm1, layer_norm, h)).reshape(len(x), n, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if isinstance(prefix, PrefixedAttention):
            k = torch.cat([prefix.key.expand(len(x), -1, -1, -1), k], 2)
            v = torch.cat([prefix.value.expand(len(x), -1, -1, -1), v], 2)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        mixed = affine(attn.proj, dense, mixed.transpose(1, 2).reshape(h.shape))
        h = h + mixed + beside("attention", h)
        inside = affine(block.mlp.fc1, dense, affine(block.norm2, layer_norm, h))
        h = h + affine(block.mlp.fc2, dense, nn.functional.gelu(inside)) + beside("mlp", h)
    return affine(model.head, dense, affine(model.norm, layer_norm, h)[:, 0])


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_against_a_forward_written_out(config) -> None:
    model = stir(get_peft_model(vit().double(), config)).eval()
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x), by_hand(model, x), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_gradients_are_those_of_the_forward_written_out(config) -> None:
    model = stir(get_peft_model(vit().double(), config)).eval()
    x = images(dtype=torch.float64)
    ours = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(x).square().sum(), ours)
    expected = torch.autograd.grad(by_hand(model, x).square().sum(), ours)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


# -- with everything else --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("make", [vit, eva])
def test_with_a_gist_token_saved_loaded_disabled_unloaded(config, make, tmp_path) -> None:
    base, x = make(), images()
    model = stir(add_gist(get_peft_model(copy.deepcopy(base), config), GistConfig())).eval()
    output = model(x, return_gist_logits=True)
    full = whole(model)(x, return_gist_logits=True)
    torch.testing.assert_close(tuple(output.values()), tuple(full.values()))
    alone = torch.cat([model(image[None]).logits for image in x])
    torch.testing.assert_close(alone, output.logits, msg="samples depend on their batch")
    assert all(p.grad is None for p in model.parameters())
    model.train()(x).gist_logits.square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moved == trainable(model)
    model.eval()
    save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(load_adapter(copy.deepcopy(base), tmp_path), x), output.logits)
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(model)), x), output.logits)
    with disable_adapter(model):
        torch.testing.assert_close(logits(model, x), logits(base, x))
    with pytest.warns(UserWarning, match="leaves the sequence"):
        plain = unload(model, keep_head=False)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("config", MERGEABLE, ids=repr)
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}], ids=repr)
def test_merging(config, options, tmp_path) -> None:
    base, x = vit(**options).double(), images(dtype=torch.float64)
    model = stir(get_peft_model(copy.deepcopy(base), config))
    before, state = logits(model, x), copy.deepcopy(model.state_dict())
    merge(model)
    assert report(model).merged
    merged = model.state_dict()
    assert merged.keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in merged.items())
    torch.testing.assert_close(logits(model, x), before, rtol=1e-10, atol=1e-11)
    with pytest.warns(UserWarning, match=r"train\(\) of a merged layer"):
        model.train()
    save_adapter(model.eval(), tmp_path)
    torch.testing.assert_close(logits(load_adapter(copy.deepcopy(base), tmp_path), x), before)
    unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(logits(model, x), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_compiled_checkpointed_and_in_half_precision(config) -> None:
    model = stir(add_gist(get_peft_model(vit(), config)))
    x = images()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model).train(), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = model.train()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(tuple(compiled(x).values()), tuple(expected.values()))
    model.eval()
    loss = model(x, return_gist_logits=True).gist_logits.square().sum()
    ours = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(loss, ours)
    model.set_grad_checkpointing()
    loss = model(x, return_gist_logits=True).gist_logits.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, ours), plain)
    half = copy.deepcopy(model).bfloat16()
    assert half(x.bfloat16()).logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        close = model(x).logits
    torch.testing.assert_close(close.float(), model(x).logits, rtol=0.1, atol=0.1)


# -- each alone ------------------------------------------------------------------------------------------------------


def test_the_shared_adapter_is_one_a_block_and_the_papers_size() -> None:
    model = get_peft_model(vit(depth=3), SHARED)
    blocks = [m for m in model.modules() if isinstance(m, AdaptedBlock)]
    assert len(blocks) == 3
    assert report(model).trainable == 3 * (2 * 32 * 4 + 4 + 32) + 32 * 5 + 5
    assert all(b.branches == ("attention", "mlp") for b in blocks)


def test_fact_shares_its_factors_between_all_square_matrices() -> None:
    model = get_peft_model(vit(depth=2), FacTConfig(rank=4))
    factors = {id(m): m for m in model.modules() if isinstance(m, CPFactors)}
    (one,) = factors.values()
    assert one.modes == 2 * (3 + 1 + 4 + 4)
    assert one.s.shape == (24, 4, 4)
    used = [m for layer in model.modules() if isinstance(layer, CPLinear) for m in _modes(layer)]
    assert sorted(used) == list(range(24)), "every matrix has a mode of its own"


def _modes(layer: CPLinear) -> tuple[int, ...]:
    return layer.mode if isinstance(layer.mode, tuple) else (layer.mode,)


@pytest.mark.parametrize("core", ["cp", "tucker", "tt"])
def test_folds_of_the_input(core) -> None:
    """A 3K -> N layer is three K -> N matrices side by side, one of them left alone."""
    factors = CPFactors(6, 5, 4, 3, core, dtype=torch.float64)
    nn.init.normal_(factors.v)
    layer = CPLinear(nn.Linear(18, 5, dtype=torch.float64), factors, (2, None, 0), scale=0.5)
    x = torch.randn(7, 18, dtype=torch.float64)
    expected = layer.base_layer(x)
    for fold, mode in ((0, 2), (2, 0)):
        u, v, gain = factors(mode)
        dense_update = u @ (v if gain is None else v * gain).T
        expected = expected + 0.5 * x[:, 6 * fold : 6 * fold + 6] @ dense_update
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(
        layer.get_delta_weight(), torch.autograd.functional.jacobian(lambda t: layer(t) - layer.base_layer(t), x[0])
    )
    with pytest.raises(ValueError, match=r"expected 3 modes, one for each fold of 6 in base_layer's 18 inputs"):
        CPLinear(nn.Linear(18, 5), factors, 0)
    with pytest.raises(ValueError, match=r"factors\.in_features must divide 19"):
        CPLinear(nn.Linear(19, 5), factors, 0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (3, 6)),
        (nn.Linear(6, 4, bias=False), (3, 6)),
        (nn.LayerNorm(6), (3, 6)),
        (nn.RMSNorm(6), (3, 6)),
        (nn.Conv2d(3, 4, 2), (2, 3, 5, 5)),
        (nn.Conv1d(3, 4, 2), (2, 3, 5)),
    ],
    ids=repr,
)
def test_scale_and_shift_of_each_kind_of_layer(layer, shape) -> None:
    layer = layer.double()
    mine = ScaleShift(copy.deepcopy(layer), init="paper", dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    places = (...,) + (None,) * (len(shape) - 2) if isinstance(layer, nn.Conv1d | nn.Conv2d) else (...,)
    expected = layer(x) * mine.scale[places] + mine.shift[places]
    torch.testing.assert_close(mine(x), expected)
    if isinstance(layer, nn.RMSNorm):
        with pytest.raises(TypeError, match=r"ScaleShift.merge: base_layer is RMSNorm; .* and a place for a bias"):
            mine.merge()
        return
    mine.merge()
    torch.testing.assert_close(mine.base_layer(x), expected)
    torch.testing.assert_close(mine(x), expected)
    mine.unmerge()
    assert mine.base_layer.state_dict().keys() == layer.state_dict().keys()
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in mine.base_layer.state_dict().items())


def test_what_has_no_channels_or_bias_is_refused() -> None:
    with pytest.raises(TypeError, match="ScaleShift: expected a linear layer, .*got BatchNorm2d"):
        ScaleShift(nn.BatchNorm2d(3))
    with pytest.raises(TypeError, match="ScaleShift: expected a linear layer, .*got GELU"):
        ScaleShift(nn.GELU())
    with pytest.raises(ValueError, match=r"BiasShift: base_layer \(Linear\) has no bias"):
        BiasShift(nn.Linear(3, 3, bias=False))
    with pytest.raises(ValueError, match="ScaleShift: init must be one of identity, paper, got 'zero'"):
        ScaleShift(nn.Linear(3, 3), init="zero")
    with pytest.raises(ValueError, match="ScaleShift: base_layer is wrapped already, by BiasShift"):
        ScaleShift(BiasShift(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="FacTConfig: form must be one of tt, tk, got 'cp'"):
        get_peft_model(vit(), FacTConfig(form="cp"))


def test_blocks_that_are_not_known_are_refused() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    model = vit(block_fn=ParallelScalingBlock)
    state = set(model.state_dict())
    with pytest.raises(ValueError, match=r"placement 'shared' is not to be had: how a ParallelScalingBlock adds up"):
        get_peft_model(model, SHARED)
    assert set(model.state_dict()) == state


def test_hooks_see_bitfit_layers() -> None:
    layer = BiasShift(nn.Linear(3, 3))
    nn.init.ones_(layer.delta)
    seen = []
    layer.base_layer.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    x = torch.randn(2, 3)
    assert torch.equal(layer(x), seen[0])
    torch.testing.assert_close(seen[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias + 1))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("first", ["prompts", "gist"])
def test_prompts_and_what_counts_tokens(pool, first) -> None:
    """Prompts stand after class, register and gist tokens whichever came first, and average pooling leaves them out."""
    base = vit(global_pool=pool, reg_tokens=2, dynamic_img_size=True, no_embed_class=True).eval()
    x = images(2, 32)
    model = copy.deepcopy(base)
    if first == "gist":
        model = get_peft_model(add_gist(model), PromptConfig(length=4))
    else:
        model = add_gist(get_peft_model(model, PromptConfig(length=4)))
    plain = model.model
    assert plain.num_prefix_tokens == 1 + 2 + 1 + 4
    assert plain.blocks[0].index == 4
    features = model.eval().forward_features(x)
    assert features.shape[1] == 8 + 16
    if pool == "avg":
        torch.testing.assert_close(plain.pool(features), features[:, 8:].mean(1))
    torch.testing.assert_close(model(x, return_gist_logits=True).gist_logits, plain.head(plain.fc_norm(features[:, 3])))
    with disable_adapter(model):
        assert plain.num_prefix_tokens == 3
        torch.testing.assert_close(logits(model, x), base(x))
    assert plain.num_prefix_tokens == 8
    with pytest.warns(UserWarning, match="leaves the sequence"):
        unload(model, keep_head=False)
    assert plain.num_prefix_tokens == 3
    assert not [name for name in plain.__dict__ if "fastgist" in name]
    torch.testing.assert_close(plain(x), base(x))


def test_prompts_without_a_gist_token_train_only_themselves() -> None:
    model = get_peft_model(eva(), PromptConfig(length=3, deep=True))
    assert trainable(model) == {"blocks.0.prompt", "blocks.1.prompt", "head.weight", "head.bias"}
    assert model.blocks[1].base_layer.attn.num_prefix_tokens == 4
    with pytest.raises(ValueError, match="PromptConfig: VisionTransformer pools its prefix tokens"):
        get_peft_model(vit(global_pool="avg", pool_include_prefix=True), PromptConfig())
    with pytest.raises(RuntimeError, match=r"prompts .*cannot be merged"):
        merge(model)


@pytest.mark.parametrize("with_gist", [False, True])
def test_full_fine_tuning(with_gist, tmp_path) -> None:
    base, x = vit(), images()
    model = get_peft_model(copy.deepcopy(base), FullConfig())
    model = stir(add_gist(model) if with_gist else model)
    assert trainable(model) == set(dict(model.named_parameters()))
    assert report(model).trainable == report(model).total
    model.train()(x)
    save_adapter(model, tmp_path)
    loaded = load_adapter(vit(), tmp_path)  # on any model of the same shape: everything is in the file
    assert torch.equal(logits(loaded, x), logits(model, x))
    assert trainable(loaded) == trainable(model)
    with pytest.raises(ValueError, match="full fine-tuning stands alone, and the model has default"):
        get_peft_model(model, BitFitConfig(), "other")
    with pytest.raises(RuntimeError, match="disable_adapter: after full fine-tuning"), disable_adapter(model):
        pass
    with pytest.raises(RuntimeError, match="unload: after full fine-tuning"):
        unload(model, keep_head=False)
    before = logits(model, x)
    if not with_gist:
        assert torch.equal(logits(unload(model), x), before)
    with pytest.raises(ValueError, match="full fine-tuning stands alone"):
        get_peft_model(get_peft_model(vit(), BitFitConfig()), FullConfig(), "other")


ATTENTIONS = {
    "vit": vit,
    "vit, normed queries": lambda: vit(qk_norm=True),
    "eva": eva,
    "eva, q k v apart": lambda: eva(qkv_fused=False),
    "eva, no bias": lambda: eva(qkv_bias=False),
    "dinov3": dinov3,
}


@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_with_its_keys_left_open_is_timms(make, fused) -> None:
    """What PrefixedAttention runs, with nothing put in: timm's own forward, with rotation and masks."""
    from fastgist.integrations.timm.blocks import run_attention

    model = make().double().eval()
    attention = model.blocks[0].attn
    attention.fused_attn = fused
    h = torch.randn(2, 5, 32, dtype=torch.float64)
    rope = {} if getattr(model, "rope", None) is None else {"rope": model.rope.get_embed()}
    if "rope" in rope and getattr(model, "rope_mixed", False):
        rope = {"rope": rope["rope"][0]}
    own = model.num_prefix_tokens
    h = torch.randn(2, own + 4, 32, dtype=torch.float64)
    mask = torch.rand(own + 4, own + 4) < 0.5
    mask.fill_diagonal_(True)
    for given in (None, mask, torch.where(mask, 0.0, -3.0).double()):
        got = run_attention(attention, lambda k, v: (k, v), h, attn_mask=given, **rope)
        torch.testing.assert_close(got, attention(h, attn_mask=given, **rope))
    with pytest.raises(ValueError, match="cannot be causal"):
        run_attention(attention, lambda k, v: (k, v), h, is_causal=True)


def test_a_prefix_under_a_mask_is_seen_by_every_query() -> None:
    from fastgist.integrations.timm.blocks import run_attention

    model = get_peft_model(vit().double(), PrefixConfig(length=2))
    layer = stir(model).blocks[0].attn
    h, alone = torch.randn(1, 5, 32, dtype=torch.float64), torch.eye(5, dtype=torch.bool)
    got = layer(h, attn_mask=alone)
    for row in range(5):  # a query that sees nothing but itself and the prefix
        torch.testing.assert_close(
            got[:, row : row + 1], run_attention(layer.base_layer, layer.extend, h[:, row : row + 1])
        )


def test_attention_that_is_not_known_is_refused() -> None:
    from timm.layers import Attention

    class Other(Attention):
        pass

    model = vit()
    model.blocks[1].attn.__class__ = Other
    with pytest.raises(ValueError, match="PrefixConfig: what happens inside Other is not known"):
        get_peft_model(model, PrefixConfig())


def test_targets_may_be_patterns_of_whole_paths():
    model = vit()
    get_peft_model(model, LoraConfig(rank=2, targets=("blocks.0.mlp.*", "*.attn.proj")))
    found = {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    depth = len(model.blocks)
    assert found == {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2", *(f"blocks.{i}.attn.proj" for i in range(depth))}
    with pytest.raises(ValueError, match=r"nothing in this model is called 'blocks.\[9\].\*'"):
        get_peft_model(vit(), LoraConfig(targets=("blocks.[9].*",)))
    with pytest.raises(ValueError, match="is matched twice, by 'fc1' and"):
        get_peft_model(vit(), LoraConfig(targets=("fc1", "blocks.?.mlp.fc1")))
