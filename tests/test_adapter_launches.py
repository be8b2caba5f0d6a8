"""How many launches adapter takes, counted on its host code as on a card: what DESIGN.md says, and no more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.launches import Ledger, on_a_card
from fastgist.functional import adapter
from fastgist.ops import _common

ROWS, EXPERTS = 512, 4
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
#: Hidden units of a launch at most: forward, backward, and both with a gate.
MOST = {"bfloat16": (256, 256, 256, 128), "float16": (128, 64, 64, 64), "tf32": (128, 64, 64, 64), "float32": (64,) * 4}
FEATURES = {
    "plain": (),
    "norm": ("norm",),
    "gate": ("gate",),
    "dropout": ("dropout",),
    "residual": ("residual",),
    "branch": ("branch",),
    "all": ("norm", "gate", "dropout", "residual"),
}


def _count(hidden: int, kind: str, features: tuple[str, ...], width: int, monkeypatch) -> tuple[Ledger, Ledger]:
    """Forward and backward, everything trained."""
    monkeypatch.setattr(_common, "tf32_allowed", lambda: kind == "tf32")

    def leaf(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=DTYPES[kind], requires_grad=True)

    x, more, options = leaf(ROWS, width), [], {}
    bias = leaf(EXPERTS, width) if "gate" in features else leaf(width)
    weights = [leaf(hidden, width), leaf(hidden), leaf(width, hidden), bias]
    if "gate" in features:
        more.append(leaf(ROWS, EXPERTS))
        options["gate"] = more[-1]
    if "norm" in features:
        more += [leaf(width), leaf(width)]
        options["norm"] = (*more[-2:], 1e-5)
    if {"residual", "branch"} & set(features):
        more.append(leaf(ROWS, width))
        options["residual"] = more[-1] if "residual" in features else (x, more[-1])
    if "dropout" in features:
        options |= {"dropout_p": 0.1, "training": True, "seed": torch.tensor(7)}
    with on_a_card():
        with Ledger(forms_only=True) as forward:
            y = adapter(x, *weights, **options)
        with Ledger(forms_only=True) as backward:
            torch.autograd.grad(y, [x, *weights, *more], torch.empty_like(y))
    return forward, backward


def _chunks(hidden: int, most: int) -> int:
    return -(-hidden // most)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("hidden", [4, 64, 128, 256])
def test_forward_is_one_launch_and_backward_as_many_as_are_documented(hidden, kind, features, monkeypatch):
    most, most_back, gated, gated_back = MOST[kind]
    if "gate" in features:
        most, most_back = gated, gated_back
    forward, backward = _count(hidden, kind, features, 768, monkeypatch)
    assert forward.found == {"_adapter_fwd_kernel": _chunks(hidden, most)}
    once = hidden == 4 and kind != "float16" and not {"norm", "gate", "dropout"} & set(features)
    if once:
        want = 2
    else:
        want = 6 + ("norm" in features) + 6 * ("gate" in features) + 2 * (_chunks(hidden, most_back) - 1)
        want += 2 * (features == ("residual",))
    assert backward.total.launches == want, backward.found


@pytest.mark.parametrize(("width", "hidden", "want"), [
    (64, 4, 2), (768, 4, 2), (1024, 4, 6), (8192, 4, 6), (64, 256, 6), (8192, 256, 6), (640, 8, 6),
])  # fmt: skip
def test_one_launch_forward_and_two_or_six_backward_at_any_width(width, hidden, want, monkeypatch):
    forward, backward = _count(hidden, "bfloat16", (), width, monkeypatch)
    assert forward.found == {"_adapter_fwd_kernel": 1}
    assert backward.total.launches == want, backward.found
