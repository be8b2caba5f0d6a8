"""What get_peft_model does to a model and how it is undone: every step compared with the model as it was."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from pairs import METHODS
from torch import nn
from vits import dinov3, eva, images, stir, trainable, vit

import fastgist
from fastgist import (
    AdapterConfig,
    CPConfig,
    FullConfig,
    GistConfig,
    LinearProbeConfig,
    LoraConfig,
    add_gist,
    assert_training,
    disable_adapter,
    get_peft_model,
    merge,
    print_trainable_parameters,
    report,
    set_adapter,
    unload,
    unmerge,
)
from fastgist.nn import AdaptedLayer, Adapter, CPFactors, CPLinear, GistLoss, LoRALinear
from fastgist.peft import Method, PeftConfig, register_method
from fastgist.peft.method import registered_configs

CONFIGS = [LoraConfig(), CPConfig(rank=4), CPConfig(rank=3, core="tucker"), AdapterConfig(4), LinearProbeConfig()]


def logits(model, x):
    output = model.eval()(x)
    return output if isinstance(output, torch.Tensor) else output.logits


# -- injection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*CONFIGS, AdapterConfig(4, "houlsby"), AdapterConfig(4, "parallel")], ids=repr)
@pytest.mark.parametrize("make", [vit, eva, dinov3])
def test_in_place_frozen_and_the_model_it_was(config, make) -> None:
    base = make()
    model = copy.deepcopy(base)
    assert get_peft_model(model, config) is model
    x = images()
    torch.testing.assert_close(logits(model, x), logits(base, x))
    ours = {n for n in trainable(model) if not n.startswith("head.")}
    assert trainable(model) - ours == {"head.weight", "head.bias"}
    old = {n.replace("base_layer.", "") for n in dict(model.named_parameters()) if n not in ours}
    assert old == set(dict(base.named_parameters()))
    nn.functional.cross_entropy(model.train()(x), torch.tensor([0, 3, 1])).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable(model)


def test_where_the_layers_go() -> None:
    lora = get_peft_model(vit(), LoraConfig(rank=2, targets=("q", "v", "fc1", "attn.proj")))
    kinds = {n: type(m) for n, m in lora.named_modules() if isinstance(m, LoRALinear)}
    assert set(kinds) == {f"blocks.{i}.{n}" for i in range(2) for n in ("attn.qkv", "attn.proj", "mlp.fc1")}
    assert lora.blocks[0].attn.qkv.parts == (0, 2)
    assert lora.blocks[0].attn.qkv.u.shape == (32, 4)

    one = get_peft_model(vit(), LoraConfig(rank=2, targets=("blocks.1.attn.qkv",)))
    assert isinstance(one.blocks[1].attn.qkv, LoRALinear)
    assert type(one.blocks[0].attn.qkv) is nn.Linear
    assert one.blocks[1].attn.qkv.v.shape == (96, 2)  # the layer as a whole

    houlsby = get_peft_model(vit(), AdapterConfig(4, "houlsby"))
    places = {n for n, m in houlsby.named_modules() if isinstance(m, AdaptedLayer)}
    assert places == {f"blocks.{i}.{n}" for i in range(2) for n in ("attn", "mlp")}
    assert len({id(m) for m in houlsby.modules() if isinstance(m, Adapter)}) == 4

    split = get_peft_model(eva(qkv_fused=False), LoraConfig(rank=2))
    assert type(split.blocks[0].attn.k_proj) is nn.Linear
    assert isinstance(split.blocks[0].attn.q_proj, LoRALinear)
    assert isinstance(split.blocks[0].attn.v_proj, LoRALinear)


def test_cp_shares_factors_between_layers_of_a_shape() -> None:
    model = get_peft_model(vit(depth=3), CPConfig(rank=4, targets=("q", "v", "proj", "fc1", "fc2")))
    layers = [m for m in model.modules() if isinstance(m, CPLinear)]
    groups = {id(layer.factors): layer.factors for layer in layers}
    assert {(f.in_features, f.out_features): f.modes for f in groups.values()} == {
        (32, 32): 3 * (2 + 1 + 4 + 4),  # q, v, proj, and fc1 and fc2 as four square matrices, of each of three blocks
    }
    used = [m for layer in layers for m in ((layer.mode,), layer.mode)[isinstance(layer.mode, tuple)]]
    assert sorted(m for m in used if m is not None) == list(range(33))  # every matrix has a row of its own
    assert model.blocks[0].attn.qkv.mode == (0, None, 1)


def test_numbers_of_parameters() -> None:
    """Counted by hand for a ViT of width 32, two blocks, five classes."""
    for config, ours in (
        (LoraConfig(rank=3), 2 * 2 * (32 * 3 + 32 * 3)),
        (CPConfig(rank=4), 2 * 32 * 4 + 6 * 4 + 4),
        (CPConfig(rank=4, core="tucker"), 2 * 32 * 4 + 6 * 4 + 64),
        (AdapterConfig(4), 2 * (32 * 4 + 4 + 4 * 32 + 32)),
        (LinearProbeConfig(), 0),
    ):
        model = add_gist(get_peft_model(vit(), config))
        r = report(model)
        base = sum(p.numel() for p in vit().parameters())
        assert (r.trainable, r.total) == (ours + 32 + 165, base + ours + 32)
        assert r.parts == {k: v for k, v in {"adapter": ours, "gist": 32, "head": 165}.items() if v}
        assert r.share == r.trainable / r.total


def test_report_and_print(capsys) -> None:
    model = add_gist(get_peft_model(vit(), LoraConfig(rank=3), name="pets"))
    print_trainable_parameters(model)
    r = report(model)
    assert capsys.readouterr().out == (
        f"trainable params: {r.trainable:,} || all params: {r.total:,} || "
        f"trainable%: {100 * r.trainable / r.total:.4f}\n"
    )
    text = str(r)
    for part in (
        "VisionTransformer",
        f"{r.trainable:,} of {r.total:,}",
        "'pets'",
        "LoraConfig(rank=3",
        "2 x LoRALinear",
        "float32",
    ):
        assert part in text
    plain = report(vit())
    assert plain.adapter is None
    assert plain.trainable == plain.total
    assert "other" in str(plain)


# -- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [LoraConfig(targets=("q", "v", "fc2")), CPConfig(rank=4), CPConfig(3, "tucker")], ids=repr
)
def test_merge_and_unmerge(config) -> None:
    model = stir(get_peft_model(vit().double(), config))
    x = images(dtype=torch.float64)
    before, state = logits(model, x), copy.deepcopy(model.state_dict())
    assert merge(model) is model
    torch.testing.assert_close(logits(model, x), before, rtol=1e-9, atol=1e-11)
    assert report(model).merged
    assert "(merged)" in str(report(model))
    weight = model.blocks[0].attn.qkv.base_layer.weight
    assert not torch.equal(weight, state["blocks.0.attn.qkv.base_layer.weight"])
    with pytest.raises(RuntimeError, match="merge: adapter 'default' is merged; call unmerge"):
        merge(model)
    for call in (lambda: set_adapter(model, "default"), lambda: get_peft_model(model, config, "b")):
        with pytest.raises(RuntimeError, match="'default' is merged; call unmerge"):
            call()
    unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model, x), before)
    with pytest.raises(RuntimeError, match="unmerge: nothing is merged"):
        unmerge(model)


def test_what_cannot_merge_says_so_and_changes_nothing() -> None:
    adapted = get_peft_model(vit(), AdapterConfig(4))
    with pytest.raises(
        RuntimeError, match=r"an adapter .*AdapterConfig, adapter 'default'.*cannot be merged.*nothing was"
    ):
        merge(adapted)
    model = stir(add_gist(get_peft_model(vit(), LoraConfig())))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"the gist token .*cannot be merged"):
        merge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not report(model).merged


def test_merging_is_all_or_nothing() -> None:
    model = stir(get_peft_model(vit(depth=3), LoraConfig()))
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.blocks[2].attn.qkv.v.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="not finite"):
        merge(model)
    frozen = [k for k in state if not k.endswith((".u", ".v"))]
    assert all(torch.equal(model.state_dict()[k], state[k]) for k in frozen)
    assert not report(model).merged

    class Odd(nn.Linear):
        """A linear layer of another library."""

    odd = vit()
    odd.blocks[1].attn.qkv.__class__ = Odd
    stir(get_peft_model(odd, LoraConfig()))
    state = copy.deepcopy(odd.state_dict())
    with pytest.raises(TypeError, match=r"blocks.1.attn.qkv: LoRALinear.merge: base_layer is Odd.*nothing was changed"):
        merge(odd)
    assert all(torch.equal(v, state[k]) for k, v in odd.state_dict().items())


# -- unloading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_the_plain_model_back(config, merged) -> None:
    base = vit()
    base.cls_token.requires_grad_(False)
    model = stir(get_peft_model(copy.deepcopy(base), config))
    if merged and not isinstance(config, AdapterConfig):
        merge(model)
    head = model.head.weight.clone()
    plain = unload(model)
    assert plain is model
    assert type(plain.blocks[0].attn.qkv) is nn.Linear
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in plain.state_dict().items() if not k.startswith("head."))
    assert torch.equal(plain.head.weight, head)
    assert not torch.equal(head, base.head.weight)
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == {
        n: p.requires_grad for n, p in base.named_parameters()
    }
    with pytest.raises(ValueError, match="unload: VisionTransformer is not wrapped"):
        unload(plain)
    get_peft_model(plain, config)


def test_unload_can_put_the_old_head_back() -> None:
    base = vit()
    model = stir(get_peft_model(copy.deepcopy(base), LoraConfig()))
    model.reset_classifier(9)
    plain = unload(model, keep_head=False)
    assert plain.num_classes == 5
    x = images()
    assert torch.equal(logits(plain, x), logits(base, x))


def test_unload_of_a_gist_model_warns() -> None:
    base = vit()
    inner = copy.deepcopy(base)
    model = stir(add_gist(get_peft_model(inner, LoraConfig())))
    with pytest.warns(UserWarning, match=r"the gist token .*logits change"):
        plain = unload(model, keep_head=False)
    assert plain is inner
    assert plain.num_prefix_tokens == 1
    x = images()
    assert torch.equal(logits(plain, x), logits(base, x))
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert list(model(x)) == ["logits"]  # the front that is left passes the plain model's logits on
    with pytest.raises(RuntimeError, match="detached"):
        model(x, return_gist_logits=True)


# -- several adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_gist", [False, True])
def test_named_adapters_are_apart(with_gist) -> None:
    base, x = vit(), images()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(rank=2), name="a")
    if with_gist:
        model = add_gist(model, GistConfig(dropout=0.0))
    stir(model)
    a = logits(model, x)
    assert get_peft_model(model, AdapterConfig(4), name="b") is model
    assert report(model).adapter == "b"
    assert report(model).others == ("a",)
    inner = model.model if with_gist else model
    assert torch.equal(inner.head.weight, base.head.weight)  # a head of its own, as before wrapping
    assert inner.head.weight.requires_grad
    assert type(inner.blocks[0].attn.qkv) is nn.Linear
    if not with_gist:
        assert torch.equal(logits(model, x), logits(base, x))
    stir(model)
    b = logits(model, x)
    assert not torch.allclose(a, b)
    for name, expected in (("a", a), ("b", b), ("b", b), ("a", a)):
        set_adapter(model, name)
        assert torch.equal(logits(model, x), expected)
        assert report(model).adapter == name
    get_peft_model(model, CPConfig(rank=2), name="lora")
    set_adapter(model, "b")
    assert torch.equal(logits(model, x), b)
    with pytest.raises(ValueError, match="no adapter named 'c'; there are a, b, lora"):
        set_adapter(model, "c")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_adapter(copied, "a")
        assert torch.equal(logits(copied, x), a)
    assert torch.equal(logits(model, x), b)


def test_a_gist_token_added_late_is_one_an_adapter() -> None:
    model = get_peft_model(vit(), LoraConfig(rank=2), name="a")
    get_peft_model(model, LoraConfig(rank=2), name="b")
    model = add_gist(model)
    token = model.gist.token.detach().clone()
    set_adapter(model, "a")
    assert not torch.equal(model.gist.token, token)
    assert "model.norm_pre.gist.token" in trainable(model)
    with torch.no_grad():
        model.gist.token.zero_()
    set_adapter(model, "b")
    assert torch.equal(model.gist.token, token)


def test_heads_of_different_sizes() -> None:
    model = get_peft_model(vit(), LoraConfig(rank=2), name="five")
    get_peft_model(model, LoraConfig(rank=2), name="nine")
    model.reset_classifier(9)
    x = images()
    assert logits(model, x).shape == (3, 9)
    set_adapter(model, "five")
    assert logits(model, x).shape == (3, 5)
    assert model.num_classes == 5
    set_adapter(model, "nine")
    assert logits(model, x).shape == (3, 9)
    assert model.num_classes == 9


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("with_gist", [False, True])
def test_disable_adapter(config, with_gist) -> None:
    base, x = vit(), images()
    model = get_peft_model(copy.deepcopy(base), config)
    model = stir(add_gist(model) if with_gist else model)
    adapted, names = logits(model, x), trainable(model)
    with disable_adapter(model) as same:
        assert same is model
        assert torch.equal(logits(model, x), logits(base, x))
        for call in (
            lambda: set_adapter(model, "default"),
            lambda: merge(model),
            lambda: disable_adapter(model).__enter__(),
        ):
            with pytest.raises(RuntimeError, match="not inside disable_adapter"):
                call()
    assert torch.equal(logits(model, x), adapted)
    assert trainable(model) == names
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert torch.equal(logits(model, x), adapted)
    inner = model.model if with_gist else model
    with disable_adapter(model, keep_head=True):
        want = copy.deepcopy(base)
        want.head.load_state_dict(inner.head.state_dict())
        assert torch.equal(logits(model, x), logits(want, x))


def test_disable_adapter_under_compile() -> None:
    torch._dynamo.reset()
    base, x = vit(), images()
    model = stir(get_peft_model(copy.deepcopy(base), LoraConfig(rank=2))).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    adapted = compiled(x)
    with disable_adapter(model):
        torch.testing.assert_close(compiled(x), base.eval()(x))
    torch.testing.assert_close(compiled(x), adapted)


# -- assert_training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_assert_training_leaves_everything_as_it_was(config) -> None:
    model = add_gist(get_peft_model(vit(), config)).eval()
    model.gist.token.grad = torch.ones_like(model.gist.token)
    x, state, rng = images(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert_training(model)
    assert_training(model, x)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not model.training
    assert (model.gist.token.grad == 1).all()
    assert model.model.head.weight.grad is None


def test_assert_training_finds_what_is_not_trained() -> None:
    with pytest.raises(RuntimeError, match="no parameter of VisionTransformer requires a gradient"):
        assert_training(vit().requires_grad_(False))
    merged = merge(get_peft_model(vit(), LoraConfig()))
    with pytest.raises(RuntimeError, match=r"4 of 6 trainable parameters receive no gradient: blocks.0.attn.qkv.u"):
        assert_training(merged)
    dead = get_peft_model(vit(), AdapterConfig(4))
    for module in dead.modules():
        if isinstance(module, Adapter):
            module.scale = 0.0
    with pytest.raises(RuntimeError, match="every gradient outside the head is zero"):
        assert_training(dead)


# -- the registry ----------------------------------------------------------------------------------------------------


@dataclass
class ScaleConfig(PeftConfig):
    """A third party's method: a trained factor on every MLP."""

    method: ClassVar[str] = "scale"
    start: float = 1.0


class Scaled(nn.Module):
    def __init__(self, base_layer, start):
        super().__init__()
        self.base_layer = base_layer
        self.weight = nn.Parameter(torch.tensor(start))

    def forward(self, x):
        return self.weight * self.base_layer(x)


class Scale(Method):
    title = "a scale"

    def build(self, model, family, config):
        return {p: Scaled(model.get_submodule(p), config.start) for p in family.sublayers(model)["mlp"]}


@pytest.fixture
def scale_method():
    from fastgist.peft import method

    register_method(ScaleConfig, Scale())
    yield
    del method._METHODS["scale"]


def test_third_parties_can_add_methods(scale_method, tmp_path) -> None:
    base, x = vit(), images()
    model = stir(get_peft_model(copy.deepcopy(base), ScaleConfig()))
    assert "blocks.0.mlp.weight" in trainable(model)
    with pytest.raises(RuntimeError, match=r"a scale .*cannot be merged"):
        merge(model)
    fastgist.save_adapter(model, tmp_path)
    other = fastgist.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(other, x), logits(model, x))
    assert torch.equal(unload(model, keep_head=False).blocks[0].mlp.fc1.weight, base.blocks[0].mlp.fc1.weight)
    with pytest.raises(ValueError, match="'lora' is taken by LoraConfig"):
        register_method(type("Other", (PeftConfig,), {"method": "lora"}), Scale())


def test_unregistered_configurations() -> None:
    with pytest.raises(TypeError, match=r"config must be one of AdapterConfig, .*got ScaleConfig"):
        get_peft_model(vit(), ScaleConfig())
    with pytest.raises(TypeError, match="targets must be a tuple of names, got the string 'q'"):
        LoraConfig(targets="q")  # type: ignore[arg-type]


# -- training really moves it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in METHODS.items()])
def test_a_few_steps_lower_the_loss(config) -> None:
    """Every registered method, in every placement and form; what is trained moves, and what is frozen stays bitwise."""
    model = add_gist(get_peft_model(vit(), config)).train()
    x, y = images(8), torch.arange(8) % 5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    moved = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = GistLoss()(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert moved and bool(frozen) is not isinstance(config, FullConfig)
    assert [n for n, p in model.named_parameters() if n in frozen and not torch.equal(p, frozen[n])] == []
    assert [n for n, p in model.named_parameters() if n in moved and torch.equal(p, moved[n])] == []


def test_the_methods_above_are_all_that_are_registered() -> None:
    ours = {kind for kind in registered_configs().values() if kind.__module__ == "fastgist.peft.config"}
    assert {type(config) for config in METHODS.values()} == ours


def test_factors_stay_shared_through_torch_save() -> None:
    model = get_peft_model(vit(), CPConfig(rank=2))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert len({id(m) for m in loaded.modules() if isinstance(m, CPFactors)}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_heads_set_aside_follow_the_models_dtype(dtype) -> None:
    base = vit()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(rank=2))
    get_peft_model(model, LoraConfig(rank=3), "b")
    model.to(dtype)
    x = images(dtype=dtype)
    set_adapter(model, "default")
    assert logits(model, x).dtype == dtype
    with disable_adapter(model):
        torch.testing.assert_close(logits(model, x), logits(base.to(dtype), x))
    get_peft_model(model, LoraConfig(rank=2), "c")
    assert logits(model, x).dtype == dtype
    assert logits(unload(model, keep_head=False), x).dtype == dtype
