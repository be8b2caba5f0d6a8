"""Hard cases 14 and 15 that are the same for every loss: a temperature that is none, and what FASTGIST_DEBUG=1 looks at."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE, implementations
from every_op import make
from torch import Tensor

pytestmark = pytest.mark.kernel
LOSSES = ("bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl")
CASES = [(op, by) for op in LOSSES for by in implementations(op)]


@pytest.mark.parametrize(("op", "by"), CASES)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_hard_14_a_temperature_that_is_none(op, by, temperature):
    call = make(op)
    call.options["temperature"] = temperature
    message = f"{op}: temperature must be finite and > 0, got {temperature}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(*call.values(), impl=by)


class _OnACard(Tensor):
    """A tensor that says it is on a card: what is not looked at there unless FASTGIST_DEBUG=1 asks for it."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


@pytest.mark.parametrize("op", ["gist_loss", "gist_linear_loss"])
def test_hard_15_targets_on_a_card_are_looked_at_under_debug_alone(op, monkeypatch):
    module = importlib.import_module("fastgist.ops.gist_loss")
    target = torch.tensor([4, -100, 21, 3])
    far = target.as_subclass(_OnACard)
    monkeypatch.setattr(module, "DEBUG", False)
    module.check_targets_in_range(op, far, 21, -100)
    message = re.escape(f"{op}: target[2] is 21, and there are 21 classes (ignore_index=-100)")
    with pytest.raises(IndexError, match=f"^{message}$"):
        module.check_targets_in_range(op, target, 21, -100)
    monkeypatch.setattr(module, "DEBUG", True)
    with pytest.raises(IndexError, match=f"^{message}$"):
        module.check_targets_in_range(op, far, 21, -100)
    module.check_targets_in_range(op, far, 22, -100)


_UNDER_DEBUG = """
import importlib, torch
from every_op import make
for op, flag in (("gist_loss", "DEBUG"), ("gist_linear_loss", "DEBUG"), ("topk_kl", "_DEBUG"), ("bidirectional_kl", None)):
    assert flag is None or getattr(importlib.import_module(f"fastgist.ops.{op}"), flag) is True, op
    call = make(op)
    loss, grads = call.run()
    assert loss.isfinite().all() and all(g.isfinite().all() for g in grads), op
    if flag is None:
        continue
    values = call.values()
    values[-1] = values[-1].clone()
    values[-1].view(-1)[3 if op != "topk_kl" else 3 * values[-1].shape[1]] = 131
    try:
        call(*values)
    except IndexError as error:
        print(error)
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="a process of its own, on a CPU")
def test_hard_15_every_loss_runs_under_debug_and_names_a_class_that_is_none():
    done = subprocess.run(
        [sys.executable, "-c", _UNDER_DEBUG],
        env=os.environ | {"FASTGIST_DEBUG": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "gist_loss: target[3] is 131, and there are 131 classes (ignore_index=-100)"
    assert said[1] == "gist_linear_loss: target[3] is 131, and there are 37 classes (ignore_index=-100)"
    assert said[2].startswith("topk_kl: teacher_indices[3] holds 131, and there are 131 classes")
    assert len(said) == 3
