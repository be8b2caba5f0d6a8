"""The loop under fastgist finetune: learning rates, losses that are no number, the memory of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

for _package in ("timm", "accelerate", "sklearn"):
    pytest.importorskip(_package)

from fastgist.train.data import Draw  # noqa: E402


def _tiny(**changes: object):
    from accelerate import Accelerator

    from fastgist.recipes import Recipe
    from fastgist.train.digits import Digits

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(64, 5))
    return model, Digits.load().old_train, replace(Recipe(epochs=2, lr=0.01), **changes), Accelerator(cpu=True)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    from fastgist.train.engine import fit

    model, data, recipe, accelerator = _tiny()
    with pytest.raises(RuntimeError, match="the loss became nan in epoch 1"):
        fit(model, data, recipe, accelerator, objective=lambda out, y: out.sum() * float("nan"), progress=False)


def test_the_learning_rate_warms_up_from_the_recipes_first_value_and_ends_at_its_last() -> None:
    from fastgist.train.digits import DigitImages
    from fastgist.train.engine import fit

    model, data, recipe, accelerator = _tiny(epochs=10, min_lr=1e-5)
    rates: list[float] = []
    fit(model, data, recipe, accelerator, on_epoch=lambda record: rates.append(record["lr"]), progress=False)
    assert max(rates) == pytest.approx(0.01, rel=0.05) and rates.index(max(rates)) <= 1
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5, rel=0.1)
    model, data, recipe, accelerator = _tiny(epochs=1, warmup_epochs=0.9, lr=1.0, warmup_lr=1e-7)
    before = model[2].weight.detach().clone()
    fit(model, DigitImages(data.images[:32], data.labels[:32]), recipe, accelerator, progress=False)  # one step
    assert float((model[2].weight - before).detach().abs().max()) == pytest.approx(
        1e-7, rel=0.3
    )  # AdamW's first step is the rate


def test_the_memory_of_a_step_is_at_least_what_it_must_allocate() -> None:
    from fastgist.train.measure import StepMemory

    model = torch.nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = StepMemory(torch.device("cpu"))
    with memory.measure(model, optimizer):
        loss = model(torch.randn(128, 256)).sum()
        loss.backward()
        optimizer.step()
    weight, activation = 4 * 256 * 256, 4 * 128 * 256
    least = 2 * weight + 2 * activation  # parameters, gradient, input, output
    assert memory.peak_bytes is not None and least <= memory.peak_bytes <= least + 2 * weight


def test_draws_are_what_loaders_ask_for() -> None:
    _, data, _, _ = _tiny()
    image, label = data[Draw(3, 1)]
    assert image.shape == (1, 8, 8) and label == data.labels[3]
