"""Wrong input at the public entrances: an error that names the entrance, the argument, and what came."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from pairs import TIMM_BACKBONES
from torch import nn
from vits import images, vit

import fastgist as fg
from fastgist import nn as layers
from fastgist.nn import Adapter, CPFactors

#: Of no argument's type.
ODD = ["x", [1], torch.ones(()), 3.5, math.nan, True, object]


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


LAYERS = {
    "CPFactors": {"in_features": 8, "out_features": 8, "rank": 2, "modes": 3},
    "CPLinear": {"base_layer": linear(), "factors": CPFactors(8, 8, 2, 3), "mode": 0},
    "LoRALinear": {"base_layer": linear()},
    "Adapter": {"dim": 8, "bottleneck_dim": 2},
    "AdaptedLayer": {"base_layer": linear(), "adapter": Adapter(8, 2)},
    "AdaptedBlock": {"base_layer": linear(), "adapter": Adapter(8, 2), "run": print},
    "InstructionMoE": {"dim": 8},
    "InstructionMixer": {"num_instructions": 2},
    "GistToken": {"dim": 8},
    "ScaleShift": {"base_layer": linear()},
    "BiasShift": {"base_layer": linear()},
    "PromptedBlock": {"base_layer": linear(), "dim": 8},
    "PrefixedAttention": {"base_layer": linear(), "run": print, "heads": 2, "head_dim": 4},
    "CPThreshold": {},
    "BidirectionalKLLoss": {},
    "TopKKLLoss": {},
    "GistLoss": {},
    "InformationBottleneckLoss": {"z_dim": 8, "x_dim": 8, "y_dim": 8},
}
#: layer -> arguments by kind, each with what it refuses.
SIZES = (
    "in_features",
    "out_features",
    "rank",
    "modes",
    "dim",
    "bottleneck_dim",
    "num_experts",
    "num_instructions",
    "length",
)
SIZES += ("heads", "head_dim", "folds", "z_dim", "x_dim", "y_dim", "dims", "bank", "noise_pairs")
NUMBERS = (
    "scale",
    "alpha",
    "beta",
    "temperature",
    "gamma",
    "decay",
    "softness",
    "floor",
    "norm_eps",
    "eta",
    "b",
    "sigma",
)
NUMBERS += ("dropout", "label_smoothing", "estimator_lr")
WORDS = (
    "core",
    "activation",
    "init",
    "gating",
    "placement",
    "policy",
    "reduction",
    "direction",
    "interaction",
    "detach",
)
WORDS += ("problem_type", "compression", "relevance", "projection", "preset")
SWITCHES = ("norm", "insert", "after", "dynamic", "t_squared", "halve")
REFUSED = {
    **dict.fromkeys(SIZES, ("x", None, -1, 0, math.nan, True, [1], torch.ones(()), 2.5)),
    **dict.fromkeys(NUMBERS, ("x", None, math.nan, math.inf, True, [1], torch.ones(()))),
    **dict.fromkeys(WORDS, ("x", 3, math.nan, [1], "")),
    **dict.fromkeys(SWITCHES, ("x", None, 1, math.nan, torch.ones(()))),
    **dict.fromkeys(("base_layer", "adapter", "factors", "run"), ("x", None, 3, [1], torch.ones(()))),
    "ignore_index": ("x", None, 2.5, True), "mode": ("x", None, 2.5, True, -1, 3, (0, 1), ()),
    "parts": ("x", 3, (True,), (9,), ()), "device": ("x", 3.5, [1]), "dtype": ("float32", torch.int64, 3),
}  # fmt: skip


def cases():
    import inspect

    for name, given in LAYERS.items():
        for argument, parameter in inspect.signature(getattr(layers, name)).parameters.items():
            for value in REFUSED.get(argument, ()):
                if value is not None or parameter.default is not None:
                    yield name, given, argument, value


@pytest.mark.parametrize(("name", "given", "argument", "value"), cases())
def test_layers_name_what_is_wrong(name, given, argument, value):
    getattr(layers, name)(**given)
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: .*got"):
        getattr(layers, name)(**{**given, argument: value})


ENTRANCES = {
    "get_peft_model": lambda model: fg.get_peft_model(model, fg.LoraConfig()),
    "add_gist": fg.add_gist,
    "merge": fg.merge,
    "unmerge": fg.unmerge,
    "unload": fg.unload,
    "merge_and_unload": fg.merge_and_unload,
    "set_adapter": lambda model: fg.set_adapter(model, "default"),
    "save_adapter": lambda model: fg.save_adapter(model, "nowhere"),
    "load_adapter": lambda model: fg.load_adapter(model, "nowhere"),
    "disable_adapter": lambda model: fg.disable_adapter(model).__enter__(),
    "report": fg.report,
    "print_trainable_parameters": fg.print_trainable_parameters,
    "assert_training": fg.assert_training,
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("model", [*ODD, None, {}, nn.Linear], ids=repr)
def test_what_is_no_model_is_named(entrance, model):
    with pytest.raises(TypeError, match=rf"^{entrance}: model must be a torch.nn.Module, got "):
        ENTRANCES[entrance](model)


@pytest.mark.parametrize("config", [*ODD, None, {"rank": 3}], ids=repr)
def test_what_is_no_configuration_is_named(config):
    model = vit()
    with pytest.raises(TypeError, match="^get_peft_model: config must be one of AdapterConfig, .* got "):
        fg.get_peft_model(model, config)
    if config is not None:
        with pytest.raises(TypeError, match="^add_gist: config must be a GistConfig, got "):
            fg.add_gist(model, config)
    assert fg.peft.state.state_of(model) is None


def test_a_class_in_a_configurations_place_says_what_to_write():
    with pytest.raises(TypeError, match=r"got the class LoraConfig \(write LoraConfig\(\)\)"):
        fg.get_peft_model(vit(), fg.LoraConfig)


@pytest.mark.parametrize("folder", [None, 3, [], torch.ones(())], ids=repr)
def test_what_is_no_folder_is_named(folder):
    model = fg.get_peft_model(vit(), fg.LoraConfig())
    for entrance in (fg.save_adapter, fg.load_adapter):
        with pytest.raises(TypeError, match=rf"^{entrance.__name__}: folder must be a path, got"):
            entrance(model, folder)


@pytest.mark.parametrize("name", [None, 3, [], "", "../up", "a/b"], ids=repr)
def test_what_is_no_name_is_named(name):
    with pytest.raises(ValueError, match="^get_peft_model: an adapter's name is"):
        fg.get_peft_model(vit(), fg.LoraConfig(), name)
    model = fg.get_peft_model(vit(), fg.LoraConfig())
    with pytest.raises(ValueError, match="^set_adapter: no adapter named"):
        fg.set_adapter(model, name)


def test_a_gist_models_input_and_labels_are_tensors():
    model = fg.add_gist(vit()).train()
    for given in ("x", 3, [1.0]):
        with pytest.raises(TypeError, match="^GistModel: its input must be a Tensor, got"):
            model(given)
        with pytest.raises(TypeError, match="^GistModel: labels must be a Tensor, got"):
            model(images(2), labels=given)
    with pytest.raises(ValueError, match="^GistModel: labels must have a row for each sample"):
        model(images(2), labels=torch.tensor(1))
    for number in ("x", 2.5, math.nan, [1]):
        with pytest.raises(TypeError, match="^GistModel: num_items_in_batch must be an int, got"):
            model(images(2), labels=torch.tensor([0, 1]), num_items_in_batch=number)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (fg.LoraConfig(rank=33), "LoraConfig: rank must be at most 32, blocks.0.attn.qkv being 32 -> 32, got 33"),
        (fg.CPConfig(rank=64), "CPConfig: rank must be at most 32, blocks.0.attn.qkv being 32 -> 32, got 64"),
        (fg.FacTConfig(rank=33), "FacTConfig: rank must be at most 32, blocks.0.attn.qkv being 32 -> 32, got 33"),
        (fg.LoraConfig(rank=97, targets=("fc1", "qkv")),
         "LoraConfig: rank must be at most 32, blocks.0.attn.qkv being 32 -> 96, got 97"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_rank_above_every_width_is_named_and_nothing_changes(config, words) -> None:
    model = vit()
    modules, state = {n: type(m) for n, m in model.named_modules()}, copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        fg.get_peft_model(model, config)
    assert str(error.value) == words
    assert {n: type(m) for n, m in model.named_modules()} == modules
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_above_the_width_of_some_layers_is_warned_of() -> None:
    """A Swin's stages are 16 and 32 wide."""
    words = r"LoraConfig: rank 20 is above the smaller width of 2 of 4 layers \(layers\.0\.blocks\.0\.attn\.qkv is 16 -> 16\)"
    with pytest.warns(UserWarning, match=words):
        fg.get_peft_model(TIMM_BACKBONES["Swin"](), fg.LoraConfig(rank=20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.get_peft_model(TIMM_BACKBONES["Swin"](), fg.LoraConfig(rank=16))
        fg.get_peft_model(vit(), fg.LoraConfig(rank=32))
