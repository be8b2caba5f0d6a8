"""Every method on every backbone of timm that carries a gist token: what must hold for all of them. Autocast, files and
checkpointing of every pair are in test_pairs_timm.py."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from pairs import (
    CARRIERS,
    METHODS,
    PAIRS,
    ROWS,
    SWINS,
    TIMM_BACKBONES,
    WITHOUT_ATTENTION,
    WITHOUT_TOKEN,
    attempt,
    both,
    example,
    made,
    without_gist,
)
from swins import swin_by_hand
from vits import gradients, stir, trainable

import fastgist
from fastgist import CPConfig, LoraConfig, add_gist, get_peft_model
from fastgist.nn import GistLoss
from fastgist.peft.method import method_of, registered_configs
from fastgist.petal import PetalConfig

# -- hard cases 23 to 25, for every pair -----------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "method"), PAIRS)
def test_a_pair_trains_what_it_says_and_no_sample_sees_another(backbone, method) -> None:
    model = made(backbone, method).eval()
    x = example(model, 3, torch.float64)
    together = both(model(x, return_gist_logits=True))
    alone = torch.cat([both(model(x[i : i + 1], return_gist_logits=True)) for i in range(3)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
    other = x.clone()
    other[1] = torch.randn_like(x[1])
    changed = both(model(other, return_gist_logits=True))
    torch.testing.assert_close(changed[:, ::2], together[:, ::2], rtol=1e-9, atol=1e-11)
    assert (changed[:, 1] - together[:, 1]).abs().amax(-1).min() > 1e-6

    output = model.train()(x)  # nothing here drops
    torch.testing.assert_close(both(output), together, rtol=1e-9, atol=1e-11)
    names = trainable(model)
    GistLoss()(output, torch.tensor([0, 3, 1])).backward()
    got = gradients(model)
    assert got.keys() == names
    silent = {name for name, g in got.items() if not g.any()}
    assert silent <= {n for n in names if method == "full" and "relative_position_bias_table" in n}
    with torch.no_grad():
        model.gist.token.zero_()
    assert (both(model.eval()(x, return_gist_logits=True)) - together).abs().amax((1, 2)).min() > 1e-8


@pytest.mark.parametrize("backbone", [b for b in TIMM_BACKBONES if b not in CARRIERS or b in SWINS])
def test_a_refused_pair_says_why_and_leaves_the_model_alone(backbone) -> None:
    why = "class token" if backbone in WITHOUT_TOKEN else "no attention layers" if backbone not in SWINS else "window"
    for method in METHODS:
        if (backbone, method) in PAIRS:
            continue
        model = TIMM_BACKBONES[backbone]()
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        with pytest.raises((ValueError, TypeError), match=why):
            attempt(lambda model=model: model, method)
        if backbone in WITHOUT_TOKEN:  # the method itself was taken
            fastgist.unload(model)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("backbone", [*CARRIERS, *WITHOUT_TOKEN])
def test_methods_alone_train_and_merge(backbone) -> None:
    for method in METHODS:
        if backbone in SWINS and method in ROWS:
            continue
        base = TIMM_BACKBONES[backbone]().double().eval()
        x = example(base, 2, torch.float64)
        before = base(x)
        model = get_peft_model(base, METHODS[method])
        if method not in ROWS:
            torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-11)  # starts as the model it was
        after = stir(model)(x)
        assert not torch.allclose(after, before), method
        after.square().sum().backward()
        got = gradients(model)
        assert got.keys() == trainable(model), method
        assert method == "full" or all(g.any() for g in got.values()), method
        if method_of(METHODS[method]).mergeable:
            torch.testing.assert_close(fastgist.merge(model)(x), after, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backbone", CARRIERS)
def test_what_is_asked_twice_or_for_nothing_is_refused(backbone) -> None:
    build = TIMM_BACKBONES[backbone]
    with pytest.raises(ValueError, match=r"nothing in this model is called 'query'; it has .*proj.*fc2"):
        get_peft_model(build(), LoraConfig(targets=("query",)))
    with pytest.raises(ValueError, match="is matched twice"):
        get_peft_model(build(), LoraConfig(targets=("proj", "attn.proj")))
    model = get_peft_model(build(), LoraConfig())
    with pytest.raises(ValueError, match="an adapter named 'default' already"):
        get_peft_model(model, LoraConfig())
    with pytest.raises(ValueError, match="has a gist token already"):
        add_gist(add_gist(model))
    fastgist.assert_training(model)


@pytest.mark.parametrize("backbone", [*WITHOUT_TOKEN, *WITHOUT_ATTENTION])
def test_backbones_without_a_place_for_a_token_say_why(backbone) -> None:
    model = TIMM_BACKBONES[backbone]()
    flags = [p.requires_grad for p in model.parameters()]
    if backbone in WITHOUT_TOKEN:
        with pytest.raises(ValueError, match="has no class token, and the gist token's place is right after it"):
            add_gist(model)
        get_peft_model(model, LoraConfig())
        return
    for call in (add_gist, lambda m: get_peft_model(m, LoraConfig())):
        with pytest.raises(
            TypeError, match=rf"{type(model).__name__} is not known \(it has no attention layers, which"
        ):
            call(model)
    assert [p.requires_grad for p in model.parameters()] == flags


# -- what must keep working, for every backbone ----------------------------------------------------------------------


@pytest.mark.parametrize("backbone", CARRIERS)
def test_copied_set_aside_and_taken_out(backbone) -> None:
    with torch.no_grad():  # attention takes another path on a CPU where a position bias is trained
        copies_and_ways_back(backbone)


def copies_and_ways_back(backbone: str) -> None:
    base = TIMM_BACKBONES[backbone]().eval()
    build = lambda: copy.deepcopy(base)  # noqa: E731
    model = stir(attempt(build, "adapter, houlsby")).eval()
    x = example(model)
    expected, plain = both(model(x, return_gist_logits=True)), base(x)
    other = attempt(build, "adapter, houlsby").eval()
    other.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    clone, loaded = copy.deepcopy(model), torch.load(buffer, weights_only=False)
    for p in model.parameters():  # nothing of a copy may lean on the original
        p.zero_()
    for copied in (clone, loaded, other):
        assert torch.equal(both(copied(x, return_gist_logits=True)), expected)
    with fastgist.disable_adapter(clone):
        assert torch.equal(clone(x).logits, plain)
    get_peft_model(clone, CPConfig(rank=2, dropout=0.0), "second")
    stir(clone)
    assert not torch.allclose(clone(x).logits, expected[0])
    fastgist.set_adapter(clone, "default")
    assert torch.equal(both(clone(x, return_gist_logits=True)), expected)
    assert torch.equal(without_gist(clone).eval()(x), plain)
    clone.reset_classifier(7)
    assert clone.train()(x).gist_logits.shape == (2, 7)
    assert clone.num_classes == 7


@pytest.mark.parametrize(
    "backbone", [b for b in CARRIERS if b not in ("ViT, average pooling", "ViT, CLIP's", "DeiT III")]
)
def test_compiles_whole(backbone) -> None:
    torch._dynamo.reset()
    model = made(backbone, dtype=torch.float32).train()
    x, y = example(model), torch.tensor([0, 3])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(both(compiled(x)), both(model(x)))
    GistLoss()(compiled(x), y).backward()
    assert gradients(model).keys() == trainable(model)


#: timm hands arguments by name to the blocks of Eva and Beit, which reentrant checkpointing does not take.
CHECKPOINTED = [(b, False) for b in CARRIERS] + [(b, True) for b in ("ViT", "DeiT, distilled", "Swin", "Swin V2")]


@pytest.mark.parametrize(("backbone", "reentrant"), CHECKPOINTED)
def test_gradient_checkpointing_changes_nothing(backbone, reentrant) -> None:
    from timm.layers import set_reentrant_ckpt

    model = made(backbone).train()
    x, y = example(model, 2, torch.float64), torch.tensor([0, 3])
    GistLoss()(model(x), y).backward()
    expected = gradients(model)
    model.zero_grad()
    model.set_grad_checkpointing()
    calls = []
    next(m for m in model.modules() if hasattr(m, "mlp")).mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    set_reentrant_ckpt(reentrant)
    try:
        GistLoss()(model(x), y).backward()
    finally:
        set_reentrant_ckpt(False)
    assert len(calls) == 2  # once more in the backward
    assert gradients(model).keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(gradients(model)[name], want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backbone", CARRIERS)
def test_half_precision(backbone) -> None:
    half = attempt(lambda: TIMM_BACKBONES[backbone]().bfloat16(), "LoRA").train()
    half(example(half).bfloat16()).gist_logits.float().sum().backward()
    assert half.gist.token.grad.dtype == torch.float32


@pytest.mark.parametrize("backbone", CARRIERS)
def test_intermediates_are_those_of_the_forward(backbone) -> None:
    model = made(backbone).eval()
    x = example(model, 2, torch.float64)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(final), model(x).logits)
    (last,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    patches = final if backbone in SWINS else final[:, model.num_prefix_tokens :]
    torch.testing.assert_close(last.flatten(2), patches.flatten(1, -2).transpose(1, 2))
    assert maps[0].shape[0] == 2
    with fastgist.disable_adapter(model):
        without = model.forward_intermediates(x)[1]
    assert not any(torch.allclose(a, b) for a, b in zip(maps, without, strict=True))


@pytest.mark.parametrize("method", ["LoRA", "adapter, houlsby", "adapter, shared"])
@pytest.mark.parametrize("backbone", ["ViT", "EVA-02", "BEiT", "BEiT, shared bias", "Swin", "Swin V2"])
def test_another_input_size(backbone, method) -> None:
    base = TIMM_BACKBONES[backbone]().double()
    size = tuple(2 * s for s in base.patch_embed.img_size)
    model = stir(attempt(lambda: copy.deepcopy(base), method)).eval()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    prefix = getattr(model.model, "num_prefix_tokens", None)
    model.set_input_size(img_size=size)
    base.set_input_size(img_size=size)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert getattr(model.model, "num_prefix_tokens", None) == prefix
    x = example(model, 2, torch.float64)
    assert x.shape[-2:] == size
    assert model.train()(x).gist_logits.shape == (2, 5)
    with fastgist.disable_adapter(model), torch.no_grad():
        assert torch.equal(model.eval()(x).logits, base.eval()(x))
    if "Swin" in backbone and method == "LoRA":
        torch.testing.assert_close(
            model(x).logits[0], swin_by_hand(model.model, x[0], model.gist.token[0])[0], rtol=1e-6, atol=1e-7
        )


def test_every_registered_configuration_is_among_the_methods() -> None:
    """PETAL's is for a Q-Former alone."""
    assert {type(config) for config in METHODS.values()} == set(registered_configs().values()) - {PetalConfig}
