"""Parameter groups in transformers' Trainer: GistTrainer's, and those of ``fastgist finetune-text``."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from decoders import llama
from trainers import bert, rows, settings

from fastgist import AdapterConfig, CPConfig, GistConfig, LinearProbeConfig, LoraConfig, add_gist, get_peft_model
from fastgist.integrations.transformers import GistTrainer
from fastgist.train import parameter_groups

PARTS = {"lr_gist": 0.3, "lr_head": 0.4, "wd_gist": 0.5, "wd_peft": 0.6}


def gist_model(config=None, base: nn.Module | None = None) -> nn.Module:
    model = get_peft_model(bert() if base is None else base, config or AdapterConfig(bottleneck_dim=2))
    return add_gist(model, GistConfig(dropout=0.0))


def trainer(model: nn.Module, folder: Path, parts: dict | None = None, **options) -> GistTrainer:
    args = settings(folder, **{"weight_decay": 0.2, "optim": "adamw_torch", "max_steps": 4} | options)
    return GistTrainer(model, args, train_dataset=rows(8), **parts or {})


def test_the_groups_are_those_of_parameter_groups(tmp_path) -> None:
    model = gist_model()
    made = trainer(model, tmp_path, PARTS)
    made.create_optimizer()
    want = parameter_groups(model, 0.1, 0.2, lrs={"gist": 0.3, "head": 0.4}, weight_decays={"gist": 0.5, "peft": 0.6})
    assert [group["name"] for group in want] == ["gist", "peft", "peft, no decay", "head", "head, no decay"]
    for got, group in zip(made.optimizer.param_groups, want, strict=True):
        assert all(got[key] == group[key] for key in ("name", "part", "lr", "weight_decay"))
        assert [id(p) for p in got["params"]] == [id(p) for p in group["params"]]
    assert isinstance(made.optimizer, torch.optim.AdamW)
    assert made.optimizer.defaults["lr"] == 0.1


def test_without_numbers_of_its_own_a_part_has_the_common_ones_and_the_token_decays(tmp_path) -> None:
    made = trainer(gist_model(), tmp_path)
    made.create_optimizer()
    assert {group["lr"] for group in made.optimizer.param_groups} == {0.1}
    assert {group["name"]: group["weight_decay"] for group in made.optimizer.param_groups} == {
        "gist": 0.2, "peft": 0.2, "peft, no decay": 0.0, "head": 0.2, "head, no decay": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_scheduler_scales_all_groups_alike(tmp_path, kind) -> None:
    options = {"lr_scheduler_type": kind, "logging_strategy": "steps", "logging_steps": 1}
    made = trainer(gist_model(), tmp_path, PARTS, **options)
    made.train()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logged) == 4
    factors = {"linear": [1.0, 0.75, 0.5, 0.25], "cosine": [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]}
    for entry, factor in zip(logged, factors[kind], strict=True):
        rates = [entry[f"learning_rate_{part}"] for part in ("gist", "peft", "head")]
        assert rates == pytest.approx([0.3 * factor, 0.1 * factor, 0.4 * factor])
        assert "learning_rate" not in entry


def test_one_rate_is_logged_as_ever(tmp_path) -> None:
    made = trainer(gist_model(), tmp_path, {"wd_gist": 0.9}, logging_strategy="steps", logging_steps=4)
    made.train()
    assert [entry["learning_rate"] for entry in made.state.log_history if "loss" in entry] == [0.1]


def test_a_resumed_run_restores_the_groups(tmp_path) -> None:
    """Three groups of rates under a falling schedule, stopped after two steps: the parameters of one in one go."""
    base = llama()
    options = {"lr_scheduler_type": "linear", "save_strategy": "steps", "learning_rate": 0.01}
    options["per_device_train_batch_size"] = 2

    def run(folder: str, steps: int, resume: str | None = None) -> tuple[GistTrainer, nn.Module]:
        torch.manual_seed(2)
        model = gist_model(CPConfig(rank=2, dropout=0.0), copy.deepcopy(base))
        parts = {"lr_gist": 0.03, "lr_head": 0.002, "wd_gist": 0.5}
        made = trainer(model, tmp_path / folder, parts, save_steps=steps, **options)
        made.train(resume_from_checkpoint=resume)
        return made, model

    (_, whole), (again, resumed) = run("a", 2), run("b", 4, resume=str(tmp_path / "a" / "checkpoint-2"))
    for (name, got), want in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want), name
    assert [group["name"] for group in again.optimizer.param_groups] == ["gist", "peft", "peft, no decay", "head"]
    assert [group["initial_lr"] for group in again.optimizer.param_groups] == [0.03, 0.01, 0.01, 0.002]


def test_wrong_numbers_and_optimisers_that_groups_do_not_reach_are_refused(tmp_path) -> None:
    model = gist_model(LinearProbeConfig())
    with pytest.raises(ValueError, match=r"lrs names 'peft', of which this model trains nothing"):
        trainer(model, tmp_path, {"lr_peft": 0.1})
    with pytest.raises(ValueError, match="weight_decays must be finite and >= 0, got -1 for gist"):
        trainer(model, tmp_path, {"wd_gist": -1})
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"GistTrainer: lr_head would not reach an optimiser that is given"):
        GistTrainer(model, settings(tmp_path), optimizers=(own, None), lr_head=0.1)
    given = (torch.optim.SGD, {"params": list(model.parameters()), "lr": 0.1})
    with pytest.raises(ValueError, match=r"lr_head, wd_gist would not reach .* makes groups of its own"):
        GistTrainer(model, settings(tmp_path), optimizer_cls_and_kwargs=given, lr_head=0.1, wd_gist=0.1)
    kept = GistTrainer(model, settings(tmp_path), optimizers=(own, None))
    assert kept.create_optimizer() is own


def test_an_optimiser_of_ones_own_class_takes_the_groups(tmp_path) -> None:
    model = gist_model(LoraConfig(rank=2))
    chosen = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5})
    made = GistTrainer(model, settings(tmp_path), optimizer_cls_and_kwargs=chosen, lr_gist=0.7)
    optimizer = made.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert made.optimizer_cls_and_kwargs is chosen
    assert set(chosen[1]) == {"lr", "momentum"}
