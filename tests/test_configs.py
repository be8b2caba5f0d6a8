"""Configurations check their values when they are made, each field by name; a file with a bad one says which."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle

import numpy
import pytest
import torch
from torch import nn

import fastgist as fg
from fastgist import CPConfig, FacTConfig, LoraConfig, get_peft_model
from fastgist.peft import ThresholdConfig
from fastgist.peft.config import PeftConfig, config_from_dict
from fastgist.peft.method import registered_configs
from fastgist.petal import BottleneckConfig, PetalConfig, QueryGistConfig

CONFIGS = [
    fg.AdapterConfig, fg.LoraConfig, fg.CPConfig, fg.FacTConfig, fg.PromptConfig, fg.PrefixConfig, fg.SSFConfig,
    fg.BitFitConfig, fg.FullConfig, fg.LinearProbeConfig, fg.GistConfig, ThresholdConfig, PetalConfig, QueryGistConfig,
    BottleneckConfig,
]  # fmt: skip
#: Fields that hold other things than a number, a word or a switch, tried elsewhere.
APART = {"targets", "threshold", "bottleneck", "gist"}
ODD = object()
CASES = [
    (kind, field.name, value)
    for kind in CONFIGS
    for field in dataclasses.fields(kind)
    if field.name not in APART
    for value in ("x", None, [1], math.nan, math.inf, -1, True, torch.ones(()), ODD, 2.5)
]


def allowed(kind, field: str, value) -> bool:
    """What of the above is right, field by field."""
    default = {f.name: f.default for f in dataclasses.fields(kind)}[field]
    if value is None:
        return field in ("top_k", "compression", "relevance", "preset")
    if isinstance(default, bool):
        return value is True
    if isinstance(default, float):
        signed = field in ("scale", "alpha", "beta") and kind is not fg.LoraConfig
        if type(value) is float and not math.isfinite(value):
            return False
        return (
            (value == -1 and value is not True and signed)
            if type(value) is int
            else (type(value) is float and field not in ("dropout", "decay"))
        )
    if field == "alpha":  # LoRA's, an int by default
        return type(value) is float and math.isfinite(value)
    return False


@pytest.mark.parametrize(("kind", "field", "value"), CASES)
def test_every_field_is_checked_where_it_is_given(kind, field, value):
    if allowed(kind, field, value):
        kind(**{field: value})
        return
    with pytest.raises((TypeError, ValueError), match=rf"^{kind.__name__}: {field} must be .*, got "):
        kind(**{field: value})


@pytest.mark.parametrize("kind", [k for k in CONFIGS if issubclass(k, PeftConfig)])
def test_defaults_and_numbers_of_numpy_are_right_and_survive_json(kind):
    config = kind()
    if hasattr(config, "rank"):
        config = kind(rank=numpy.int64(3))
        assert type(config.rank) is int
    assert config_from_dict(json.loads(json.dumps(config.to_dict())), registered_configs()) == config


@pytest.mark.parametrize("kind", [k for k in CONFIGS if any(f.name == "targets" for f in dataclasses.fields(k))])
@pytest.mark.parametrize("targets", ["q", None, 3, (1,), ("q", None)])
def test_targets_are_names(kind, targets):
    with pytest.raises(TypeError, match=f"{kind.__name__}: targets must be a tuple of names, got"):
        kind(targets=targets)


def test_what_depends_on_two_fields():
    with pytest.raises(ValueError, match=r"PetalConfig: top_k must be in 1..2 \(num_experts\), got 3"):
        PetalConfig(num_experts=2, top_k=3)
    with pytest.raises(ValueError, match="PetalConfig: top_k needs gating='softmax'"):
        PetalConfig(gating="uniform", top_k=2)
    with pytest.raises(ValueError, match="BottleneckConfig: a score takes dims from 2 to 8"):
        BottleneckConfig(dims=9)
    BottleneckConfig(preset="released", sigma=0.0, dims=9)


def test_a_third_partys_fields_are_its_own():
    @dataclasses.dataclass
    class Other(PeftConfig):
        method = "other"
        scale: str = "large"
        length: float = 0.5

    assert Other(scale="small").scale == "small"


@pytest.mark.parametrize("config", [LoraConfig, CPConfig, FacTConfig])
def test_names_of_peft_get_ours(config) -> None:
    with pytest.raises(TypeError, match=f"{config.__name__}: no field 'r'; here it is called 'rank'"):
        config(r=8)
    with pytest.raises(TypeError, match="no field 'target_modules'; here it is called 'targets'"):
        config(target_modules=["q"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        config(ranks=8)
    assert "rank: " in str(inspect.signature(config)) and "values" not in str(inspect.signature(config))
    kept = dataclasses.replace(config(rank=3), dropout=0.2)
    assert pickle.loads(pickle.dumps(kept)) == copy.deepcopy(kept) == config(rank=3, dropout=0.2)


def test_only_lora_has_peft_names_of_alpha() -> None:
    with pytest.raises(TypeError, match="no field 'lora_alpha'; here it is called 'alpha'"):
        LoraConfig(lora_alpha=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lora_alpha'"):
        CPConfig(lora_alpha=8)


def test_another_librarys_config_of_the_same_name() -> None:
    stranger = type("LoraConfig", (), {"__module__": "peft.tuners.lora.config"})()
    wanted = r"got peft\.tuners\.lora\.config\.LoraConfig of Hugging Face PEFT: .*peft\.get_peft_model.*add_gist"
    with pytest.raises(TypeError, match=wanted):
        get_peft_model(nn.Linear(2, 2), stranger)
    other = type("LoraConfig", (), {"__module__": "somewhere"})()
    with pytest.raises(TypeError, match=r"got somewhere\.LoraConfig$"):
        get_peft_model(nn.Linear(2, 2), other)


def test_strangers_hear_of_every_family() -> None:
    """Whatever was imported before: the list is the integrations' own."""
    import fastgist.integrations.timm
    import fastgist.integrations.transformers  # noqa: F401
    from fastgist.peft import family

    ours = [f.name for f in family._FAMILIES if type(f).__module__.startswith("fastgist.integrations.")]
    assert sorted(family._INTEGRATED) == sorted(ours)
    with pytest.raises(TypeError) as raised:
        get_peft_model(nn.Linear(2, 2), LoraConfig())
    assert all(name in str(raised.value) for name in ours)
