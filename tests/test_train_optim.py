"""Parameter groups for any optimiser, and settings that follow a schedule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import fastgist as fg
from fastgist.train import parameter_groups
from fastgist.train.config import UserError
from fastgist.train.optim import PARTS, parse_schedule, to_schedule

timm = pytest.importorskip("timm")

CONFIGS = [
    fg.AdapterConfig(bottleneck_dim=2, placement="houlsby"),
    fg.LoraConfig(rank=2),
    fg.CPConfig(rank=3),
    fg.FacTConfig(rank=2, form="tk"),
    fg.SSFConfig(),
    fg.BitFitConfig(),
    fg.PromptConfig(length=2, deep=True),
    fg.PrefixConfig(length=2),
    fg.LinearProbeConfig(),
    fg.FullConfig(),
]


def vit(num_classes: int = 3):
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=num_classes
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.method)
@pytest.mark.parametrize("gist", [False, True])
def test_every_trained_parameter_is_in_exactly_one_group(config, gist: bool) -> None:
    model = fg.get_peft_model(vit(), config)
    model = fg.add_gist(model) if gist else model
    groups = parameter_groups(model, 0.1, 0.2)
    listed = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(listed) == sorted(trained) and len(set(listed)) == len(listed)
    parts = {group["part"] for group in groups}
    expected = {"head"} | ({"gist"} if gist else set())
    if config.method == "full":
        expected.add("model")
    elif config.method != "linear_probe":
        expected.add("peft")
    assert parts == expected and all(group["lr"] == 0.1 for group in groups)
    torch.optim.AdamW(groups)


def test_each_part_has_its_numbers_and_vectors_take_no_decay() -> None:
    model = fg.add_gist(fg.get_peft_model(vit(), fg.AdapterConfig(bottleneck_dim=2)))
    groups = parameter_groups(
        model, 0.1, 0.2, lrs={"gist": 0.3, "head": 0.4, "peft": None}, weight_decays={"gist": 0.5, "peft": 0.6}
    )
    of = {id(p): group for group in groups for p in group["params"]}
    found = {name: (of[id(p)]["lr"], of[id(p)]["weight_decay"]) for name, p in model.named_parameters() if id(p) in of}
    for name, numbers in found.items():
        if name.endswith("gist.token"):
            assert numbers == (0.3, 0.5)  # the token is (1, 1, D) and takes decay, as the paper's does
        elif name.startswith("model.head."):
            assert numbers == ((0.4, 0.2) if name.endswith("weight") else (0.4, 0.0)), name
        else:
            assert numbers == ((0.1, 0.6) if name.endswith("weight") else (0.1, 0.0)), name
    assert sum(name.endswith("gist.token") for name in found) == 1 and len(found) == 1 + 2 + 2 * 4
    assert {group["name"] for group in groups} == {"gist", "peft", "peft, no decay", "head", "head, no decay"}


def test_what_the_model_exempts_is_exempt() -> None:
    model = fg.get_peft_model(vit(), fg.FullConfig())
    decays = {id(p): g["weight_decay"] for g in parameter_groups(model, 0.1, 0.2) for p in g["params"]}
    assert decays[id(model.pos_embed)] == decays[id(model.cls_token)] == 0.0  # timm's no_weight_decay(); both are 3-D
    assert decays[id(model.blocks[0].mlp.fc1.weight)] == 0.2 and decays[id(model.norm.weight)] == 0.0


def test_a_shared_parameter_and_a_model_of_ones_own() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    groups = parameter_groups(model, 0.1, 0.2)
    assert [(g["name"], len(g["params"])) for g in groups] == [("model", 1), ("model, no decay", 2)]


def test_wrappers_are_looked_through() -> None:
    model = fg.add_gist(fg.get_peft_model(vit(), fg.LoraConfig(rank=2)))
    compiled = torch.compile(model)
    ids = [[id(p) for g in parameter_groups(m, 0.1, 0.2) for p in g["params"]] for m in (model, compiled)]
    assert ids[0] == ids[1]


def test_wrong_numbers_and_parts_are_named() -> None:
    model = fg.get_peft_model(vit(), fg.LoraConfig(rank=2))
    with pytest.raises(
        ValueError, match=r"lrs names 'gist', of which this model trains nothing \(it trains peft, head\)"
    ):
        parameter_groups(model, 0.1, 0.2, lrs={"gist": 0.1})
    with pytest.raises(ValueError, match="weight_decays has no part 'token'; there are gist, peft, head, model"):
        parameter_groups(model, 0.1, 0.2, weight_decays={"token": 0.1})
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="lrs must be finite and >= 0, got .* for head"):
            parameter_groups(model, 0.1, 0.2, lrs={"head": value})
    with pytest.raises(ValueError, match="no parameter of Linear is trained"):
        parameter_groups(torch.nn.Linear(2, 2).requires_grad_(False), 0.1, 0.2)
    assert PARTS == ("gist", "peft", "head", "model")


def test_one_step_moves_each_part_at_its_own_rate() -> None:
    """AdamW's first step is lr * sign(gradient), and decay is lr * wd * weight: what the groups ask for happens."""
    model = fg.add_gist(fg.get_peft_model(vit(), fg.AdapterConfig(bottleneck_dim=2, init="paper")))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, 0.0, lrs={"gist": 1e-2, "head": 1e-4}, weight_decays={"gist": 10.0})
    optimizer = torch.optim.AdamW(groups)
    output = model.train()(torch.randn(4, 3, 16, 16))
    fg.nn.GistLoss()(output, torch.tensor([0, 1, 2, 0])).backward()
    token = model.gist.token
    expected = before["model.norm_pre.gist.token"] * (1 - 1e-2 * 10.0) - 1e-2 * token.grad.sign()
    optimizer.step()
    torch.testing.assert_close(token.detach(), expected, rtol=1e-3, atol=1e-6)
    assert float((model.model.head.weight - before["model.head.weight"]).detach().abs().max()) == pytest.approx(
        1e-4, rel=1e-2
    )
    up = "model.blocks.1.mlp.adapter.up_weight"
    assert float((dict(model.named_parameters())[up] - before[up]).detach().abs().max()) == pytest.approx(
        1e-3, rel=1e-2
    )


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "at"),
    [
        ("linear:10:1", {0.0: 10.0, 0.5: 5.5, 1.0: 1.0}),
        ("cosine:1:0", {0.0: 1.0, 0.25: 0.5 + math.cos(math.pi / 4) / 2, 1.0: 0.0}),
        ("linear:0:2:0.5:1", {0.25: 0.0, 0.75: 1.0}),
    ],
)
def test_words_become_schedules(words: str, at: dict[float, float]) -> None:
    schedule = to_schedule(words)
    for progress, value in at.items():
        assert schedule(progress) == pytest.approx(value, abs=1e-12)
    assert parse_schedule(words) == words


def test_numbers_stay_numbers_and_the_rest_is_refused() -> None:
    assert to_schedule(3.0) == parse_schedule("3") == 3.0
    for words in ("linear", "linear:1", "linear:1:2:3", "cosine:a:b", "step:1:2", "nan", "linear:inf:1", "1:2", ""):
        with pytest.raises(ValueError, match="expected a finite number, linear:START:END or cosine:START:END"):
            to_schedule(words)
    with pytest.raises(ValueError, match="0 <= since < until <= 1"):
        to_schedule("linear:1:2:0.9:0.1")


def _fit(**changes: object) -> list[dict[str, float]]:
    from accelerate import Accelerator

    from fastgist.recipes import Recipe
    from fastgist.train.digits import DigitImages, Digits
    from fastgist.train.engine import fit

    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=5
    )
    model = fg.add_gist(fg.get_peft_model(model, fg.LoraConfig(rank=2)))
    data = Digits.load().old_train
    recipe = replace(Recipe(epochs=2, lr=0.01, batch_size=32, drop_path=0.0), **changes)
    part = DigitImages(data.images[:64], data.labels[:64])
    return fit(model, part, recipe, Accelerator(cpu=True), progress=False, measure_memory=False).history


def test_a_schedule_reaches_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The temperature and weight at which the operation is called follow the run's progress, step by step."""
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    from fastgist import functional

    called: list[tuple[float, float]] = []
    original = functional.gist_loss

    def spy(*args, **kwargs):
        called.append((kwargs["temperature"], kwargs["beta"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "gist_loss", spy)
    _fit(temperature="linear:10:2", beta="linear:1:0:0.5:1")
    assert called == [(10.0, 1.0), (8.0, 1.0), (6.0, 1.0), (4.0, 0.5)]


def test_parts_have_their_rates_in_a_run() -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    last = _fit(lr_gist=0.1, wd_head=0.3, warmup_epochs=0.5)[0]
    assert last["lr_gist"] == pytest.approx(10 * last["lr_head"]) and last["lr_head"] == last["lr_peft"]
    assert "lr" not in last and "lr" in _fit()[0]
    with pytest.raises(UserError, match="lrs must be finite"):
        _fit(lr_gist=math.nan)
