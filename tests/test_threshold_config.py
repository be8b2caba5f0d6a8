"""CPConfig(threshold=...): what it takes, what it builds, and that files and training runs carry its state."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from vits import images, stir, vit

from fastgist import CPConfig, get_peft_model, load_adapter, save_adapter
from fastgist.nn import CPFactors, CPThreshold, Linear, update_thresholds
from fastgist.peft import ThresholdConfig
from fastgist.peft.config import config_from_dict
from fastgist.peft.method import registered_configs

DYNAMIC = ThresholdConfig("modes", gamma=2.0, dynamic=True, decay=0.5, softness=0.125, floor=0.01)
STATE = ("gamma_now", "average", "updates", "weight_norms")


def thresholds(model: nn.Module) -> list[CPThreshold]:
    return [m for m in model.modules() if isinstance(m, CPThreshold)]


def state(model: nn.Module) -> list[dict[str, Tensor]]:
    return [{name: t.get_buffer(name).clone() for name in STATE} for t in thresholds(model)]


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(torch.equal(a[n], b[n]) for a, b in zip(one, other) for n in STATE)


def test_every_spelling_is_the_same_configuration() -> None:
    want = CPConfig(threshold=ThresholdConfig("trust"))
    assert CPConfig(threshold="trust") == want == CPConfig(threshold={"policy": "trust"})
    assert CPConfig(threshold="modes") != want != CPConfig()
    assert CPConfig().threshold is None
    given = CPConfig(threshold=ThresholdConfig("trust", gamma=1))
    assert type(given.threshold.gamma) is float


@pytest.mark.parametrize("threshold", [None, "modes", "trust", DYNAMIC])
def test_the_configuration_survives_json(threshold) -> None:
    config = CPConfig(rank=3, core="tucker", threshold=threshold)
    data = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert config_from_dict(data, registered_configs()) == config


def test_a_file_from_before_there_were_thresholds() -> None:
    data = {"method": "cp", "rank": 3, "core": "cp", "targets": ["q"], "dropout": 0.0}
    assert config_from_dict(data, registered_configs()) == CPConfig(3, "cp", ("q",), 0.0)


def test_each_group_of_factors_has_its_own() -> None:
    model = get_peft_model(vit(mlp_ratio=1.5), CPConfig(3, targets=("q", "v", "fc1", "fc2"), threshold=DYNAMIC))
    groups = {m for m in model.modules() if isinstance(m, CPFactors)}
    assert len(groups) == 3  # 32 x 32, 32 -> 48 and 48 -> 32
    assert len({f.threshold for f in groups}) == 3
    for f in groups:
        t = f.threshold
        assert t.weight_norms.shape == (f.modes,)
        assert ThresholdConfig(t.policy, t.gamma, t.dynamic, t.decay, t.softness, t.floor) == DYNAMIC


def test_trust_knows_the_weights() -> None:
    model = get_peft_model(vit(), CPConfig(3, targets=("q", "v"), threshold="trust"))
    (t,) = thresholds(model)
    norms = [block.attn.qkv.base_layer.weight.chunk(3)[i].norm() for block in model.blocks for i in (0, 2)]
    torch.testing.assert_close(t.weight_norms, torch.stack(norms))


@pytest.mark.parametrize("policy", ["modes", "trust"])
def test_a_file_holds_the_state_and_training_goes_on_from_it(policy, tmp_path) -> None:
    plain = vit()
    config = CPConfig(3, dropout=0.0, threshold=ThresholdConfig(policy, dynamic=True, gamma=0.7))
    model = get_peft_model(copy.deepcopy(plain), config)
    for _ in range(3):
        stir(model)
        update_thresholds(model)
    save_adapter(model, tmp_path)
    into_plain = load_adapter(copy.deepcopy(plain), tmp_path)
    alike = load_adapter(get_peft_model(copy.deepcopy(plain), config), tmp_path)
    moved = state(model)
    assert float(moved[0]["gamma_now"]) > 0
    assert int(moved[0]["updates"]) == 3
    x = images()
    for other in (into_plain, alike):
        assert same(state(other), moved)
        assert torch.equal(other.eval()(x), model.eval()(x))
    for other in (model, into_plain, alike):
        with torch.no_grad():
            for f in (m for m in other.modules() if isinstance(m, CPFactors)):
                f.v.mul_(1.5)
        update_thresholds(other)
    assert same(state(into_plain), state(model))
    assert same(state(alike), state(model))
    assert not same(state(model), moved)
    other = get_peft_model(copy.deepcopy(plain), CPConfig(3, dropout=0.0))
    with pytest.raises(
        ValueError, match=r"holds CPConfig\(.*ThresholdConfig\(.*the model has CPConfig\(.*threshold=None"
    ):
        load_adapter(other, tmp_path)


def test_errors_name_field_and_value() -> None:
    for options, kind, match in (
        ({"policy": "hard"}, ValueError, "policy must be one of modes, trust, got 'hard'"),
        ({"gamma": 0.0}, ValueError, "gamma must be a finite number > 0, got 0.0"),
        ({"gamma": math.inf}, ValueError, "gamma must be a finite number > 0, got inf"),
        ({"gamma": Linear(0.1, 1.0)}, TypeError, r"gamma must be a finite number > 0, got Linear\("),
        ({"gamma": True}, TypeError, "gamma must be a finite number > 0, got True"),
        ({"decay": 1.0}, ValueError, r"decay must be a number in \[0, 1\), got 1.0"),
        ({"softness": -1.0}, ValueError, "softness must be a finite number > 0, got -1.0"),
        ({"floor": math.nan}, ValueError, "floor must be a finite number > 0, got nan"),
        ({"dynamic": "yes"}, TypeError, "dynamic must be True or False, got 'yes'"),
    ):
        for made in (lambda o=options: ThresholdConfig(**o), lambda o=options: CPConfig(threshold=o)):
            with pytest.raises(kind, match=f"ThresholdConfig: {match}"):
                made()
    for value, kind, match in (
        ("hard", ValueError, "threshold must be None, one of modes, trust, or a ThresholdConfig, got 'hard'"),
        ({"gama": 1.0}, ValueError, "threshold: ThresholdConfig has no field gama"),
        (0.5, TypeError, "threshold must be None, one of modes, trust, or a ThresholdConfig, got float"),
    ):
        with pytest.raises(kind, match=f"CPConfig: {match}"):
            CPConfig(threshold=value)


def test_a_damaged_configuration_names_the_file(tmp_path) -> None:
    from safetensors import safe_open

    from fastgist.peft import storage

    save_adapter(get_peft_model(vit(), CPConfig(3, threshold="modes")), tmp_path)
    path = tmp_path / storage.MODEL_NAME
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["fastgist"])
    config["adapter"]["threshold"]["gamma"] = -1.0
    storage.write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=f"{path}: ThresholdConfig: gamma must be a finite number > 0, got -1.0"):
        load_adapter(vit(), tmp_path)


# -- training runs ---------------------------------------------------------------------------------------------------


def test_a_run_moves_them_and_its_checkpoints_hold_them(digits: Path, tmp_path: Path, monkeypatch) -> None:
    """The adapter holds those of the selected epoch, which is the first: scores fall."""
    pytest.importorskip("accelerate")
    from runs import adapter_file, config, falling, quiet, same_files
    from safetensors.torch import load_file

    from fastgist.train.config import Method

    settings = config(digits, tmp_path / "whole", method=Method.CP, rank=2, set=["threshold=modes"], checkpoint_every=1)
    settings = replace(settings, keep_checkpoints=100)
    judged = falling(monkeypatch)
    quiet(settings)
    found = [int(v) for k, v in load_file(adapter_file(settings.output_dir)).items() if k.endswith("updates")]
    steps = [json.loads(line) for line in (settings.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "step" in record] == [3, 6, 9]
    assert found and set(found) == {3}
    judged.clear()

    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    shutil.copy(settings.output_dir / "checkpoints" / "step-00000002.safetensors", other / "checkpoints")
    quiet(replace(settings, output_dir=other, resume=True))
    same_files(adapter_file(other), adapter_file(settings.output_dir))


def test_transformers_trainer_moves_them(tmp_path) -> None:
    pytest.importorskip("transformers")
    from trainers import bert, rows
    from trainers import settings as arguments

    from fastgist.integrations.transformers.trainer import PartsTrainer
    from fastgist.train.text_trainer import MovingThresholds

    model = get_peft_model(bert(), CPConfig(2, targets=("query", "value"), threshold=DYNAMIC))
    trainer = PartsTrainer(
        model, arguments(tmp_path, max_steps=4), train_dataset=rows(), callbacks=[MovingThresholds()]
    )
    trainer.train()
    assert [int(t.updates) for t in thresholds(model)] == [4]
    assert all(float(t.gamma_now) > 0 for t in thresholds(model))
