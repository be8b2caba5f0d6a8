"""Hard case 23: nothing matched or trainable, matched twice, wrapped twice; a frozen first layer with checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from vits import images, vit

from fastgist import (
    AdapterConfig,
    CPConfig,
    LinearProbeConfig,
    LoraConfig,
    add_gist,
    assert_training,
    get_peft_model,
    report,
    set_adapter,
)


def _unchanged(model: nn.Module, before: nn.Module) -> None:
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in before.named_modules()}
    now, then = dict(model.named_parameters()), dict(before.named_parameters())
    assert now.keys() == then.keys()
    assert all(torch.equal(p, then[n]) and p.requires_grad == then[n].requires_grad for n, p in now.items())


@pytest.mark.parametrize("config", [LoraConfig, CPConfig])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("query", "value"), "nothing in this model is called 'query'; it has qkv, q, k, v, proj, fc1, fc2"),
        (("q", "w_out"), "nothing in this model is called 'w_out'; it has qkv, q, k, v, proj"),
        (("head",), "nothing in this model is called 'head'"),
        ((), "targets is empty; this model has qkv, q, k, v, proj, fc1, fc2"),
        (("q", "qkv"), "layer blocks.0.attn.qkv is matched twice, by 'q' and 'qkv'"),
        (("attn.qkv", "v"), "layer blocks.0.attn.qkv is matched twice, by 'attn.qkv' and 'v'"),
        (("fc1", "mlp.fc1"), "layer blocks.0.mlp.fc1 is matched twice, by 'fc1' and 'mlp.fc1'"),
        (("q", "q"), "target 'q' is given twice"),
    ],
)
def test_23_targets(config, targets, message) -> None:
    model = vit()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(targets=targets))
    _unchanged(model, before)
    get_peft_model(model, config(rank=2))  # nothing is in the way of a second attempt


def test_23_a_failed_second_adapter_leaves_the_first_in_place() -> None:
    model = add_gist(get_peft_model(vit(), LoraConfig(rank=2), "a"))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="nothing in this model is called 'query'"):
        get_peft_model(model, LoraConfig(targets=("query",)), "b")
    _unchanged(model, before)
    assert report(model).adapter == "a"
    assert report(model).others == ()
    set_adapter(model, "a")


def test_23_placements() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    model = vit(block_fn=ParallelScalingBlock)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="placement 'pfeiffer' needs mlp sublayers; this model has none"):
        get_peft_model(model, AdapterConfig())
    with pytest.raises(ValueError, match="must be one of pfeiffer, houlsby, parallel, adaptformer, shared, got 'gist'"):
        get_peft_model(model, AdapterConfig(placement="gist"))
    _unchanged(model, before)


def test_23_wrapping_twice() -> None:
    model = get_peft_model(vit(), LoraConfig(rank=2))
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=r"an adapter named 'default' already \(LoraConfig\(rank=2.*unload\(model\) first"
    ):
        get_peft_model(model, LoraConfig(rank=2))
    _unchanged(model, before)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a\\b", ".hidden", "a..b", "x" * 101, 3])
def test_23_names(name) -> None:
    model = vit()
    with pytest.raises(ValueError, match="an adapter's name is letters, digits"):
        get_peft_model(model, LoraConfig(), name)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["lora", "weight", "base_layer", "head", "adapter.1", "default-2"])
def test_23_unlucky_names_are_fine(name) -> None:
    model = get_peft_model(vit(), LoraConfig(rank=2), name)
    get_peft_model(model, LoraConfig(rank=2), "other")
    set_adapter(model, name)
    assert report(model).adapter == name


def test_23_nothing_trainable() -> None:
    model = vit(num_classes=0)
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match="LinearProbeConfig adds no layers and the model has no head: nothing to train"
    ):
        get_peft_model(model, LinearProbeConfig())
    _unchanged(model, before)
    get_peft_model(model, LoraConfig())
    with pytest.raises(RuntimeError, match="assert_training: no parameter of VisionTransformer requires a gradient"):
        assert_training(model.requires_grad_(False))


def test_23_strangers() -> None:
    with pytest.raises(
        TypeError, match=r"get_peft_model: the structure of torch.nn.*Sequential is not known; known: timm"
    ):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


@pytest.mark.parametrize("config", [LoraConfig(rank=2), AdapterConfig(4), CPConfig(rank=2)], ids=repr)
def test_23_a_frozen_first_layer_with_reentrant_checkpointing(config) -> None:
    """Nothing before the first block requires a gradient, so a reentrant checkpoint cuts the graph, silently."""
    from timm.layers import set_reentrant_ckpt

    model = get_peft_model(vit(), config)
    model.set_grad_checkpointing()
    assert_training(model)  # the non-reentrant kind
    set_reentrant_ckpt(True)
    try:
        with pytest.warns(UserWarning, match="requires_grad"), pytest.raises(RuntimeError) as error:
            assert_training(model)
        text = str(error.value)
        assert "receive no gradient: blocks.0." in text
        assert "eentrant gradient checkpointing" in text
        gist = add_gist(model)  # the token is trained and goes in before the blocks: the graph holds
        assert_training(gist)
        assert_training(gist, images())
    finally:
        set_reentrant_ckpt(False)
