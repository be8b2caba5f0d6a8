"""docs/layers.md: counted again, and the rules that it is counted by."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")
pytest.importorskip("timm")

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "scripts"))

from benchmarks.launches import HOPPER, Ledger, on_a_card
from fastgist import backends
from fastgist.functional import adapter, cp_linear

ROOT = Path(__file__).parents[1]


def _layers():
    return importlib.import_module("layers")


def _page(name: str) -> list[str]:
    """The lines of one layer's table in the committed page."""
    text = (ROOT / "docs" / "layers.md").read_text()
    part = text.split(f"## {_layers().LAYERS[name].title}\n", 1)[1].split("\n## ", 1)[0]
    return [line for line in part.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    "name", ["qkv", "q_k_v", "ffn", *(pytest.param(of, marks=pytest.mark.slow) for of in ("vit", "block", "qformer"))]
)
def test_the_page_says_what_is_counted_now(name):
    layers = _layers()
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    if name == "qformer":
        pytest.importorskip("transformers")
    assert _page(name) == layers.table(layers.counted(name)), "run `python scripts/layers.py`"


def test_every_layer_is_on_the_page_and_ours_launches_less_than_plain_pytorch():
    for name, layer in _layers().LAYERS.items():
        rows = {cells[1].strip(): cells for cells in (line.split("|") for line in _page(name)[2:])}
        assert set(rows) == set(layer.forms)
        launches = {form: int(cells[2]) + int(cells[3]) for form, cells in rows.items()}
        moved = {form: float(cells[4]) + float(cells[5]) for form, cells in rows.items()}
        for before in {"plain PyTorch", "plain", "authors", "released", "PEFT LoRA"} & set(rows):
            assert moved[list(rows)[-1]] < moved[before], (name, before)
        for before in {"plain PyTorch", "plain", "authors", "released"} & set(rows):
            assert launches[list(rows)[-1]] < launches[before], (name, before)


def test_the_page_says_where_peft_takes_fewer_launches():
    layers, text = _layers(), (ROOT / "docs" / "layers.md").read_text().replace("\n", " ")
    notes = {name: layers.where_peft_is_less(_page(name)) for name in layers.LAYERS}
    assert all(note in text for note in notes.values())
    rows = ["| | forward | backward |", "|---|", "| plain | 1 | 1 |", "| PEFT LoRA | 3 | 9 |", "| fastgist | 4 | 5 |"]
    assert layers.where_peft_is_less(rows) == "Fewer launches: PEFT LoRA 3 forward where fastgist takes 4."
    assert layers.where_peft_is_less([*rows[:4], "| fastgist | 3 | 9 |"]) == ""


def test_what_counts_as_a_launch_and_its_bytes():
    x, layer = torch.randn(6, 8, requires_grad=True), nn.Linear(8, 10)
    with Ledger() as ledger:
        y = F.gelu(layer(x.view(2, 3, 8).reshape(6, 8)))
    assert ledger.found == {"addmm": 1, "gelu": 1}
    assert ledger.total.bytes == 4 * ((48 + 80 + 10 + 60) + (60 + 60))
    with Ledger() as ledger:
        y.sum().backward()
    assert ledger.found == {"sum": 2, "ones_like": 1, "gelu_backward": 1, "mm": 2}  # the bias's is the second sum
    gelus = 4 + 2 * 240  # the gradient of a sum is one number, spread by strides alone
    assert ledger.total.bytes == (240 + 4) + (4 + 4) + gelus + 4 * (60 + 80 + 48) + 4 * (60 + 48 + 80) + 4 * (60 + 10)
    with torch.no_grad(), Ledger() as ledger:
        x.add_(1.0)
        x.zero_()
        torch.empty(1000)
        x[:, 0].expand(5, 6)
    assert ledger.found == {"add_": 1, "zero_": 1}
    assert ledger.total.bytes == 2 * 192 + 192


def test_products_left_out_change_no_count():
    x, layer = torch.randn(6, 8, requires_grad=True), nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8))
    totals = []
    for forms_only in (False, True):
        with Ledger(forms_only) as ledger:
            y = layer(x)
            torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
        totals.append((ledger.total, ledger.found))
    assert totals[0] == totals[1]


def test_on_a_card_takes_what_a_card_takes_and_leaves_nothing_behind():
    from fastgist_kernels import cp_linear as kernels

    launch, x = kernels.launch, torch.randn(256, 64, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in ((4, 64), (4,), (64, 4), (64,))]
    before = backends.resolve("adapter", "auto", x)
    with on_a_card(HOPPER):
        assert backends.resolve("adapter", "auto", x) == "triton"
        with Ledger() as forward:
            y = adapter(x, *weights)
        with Ledger() as backward:
            torch.autograd.grad(y, [x, *weights], torch.ones_like(y))
        small = [torch.randn(s, dtype=torch.bfloat16) for s in ((64, 64), (64,), (64, 4), (64, 4))]
        with Ledger() as linear:
            cp_linear(x, *small)
    assert forward.found == {"_adapter_fwd_kernel": 1}
    assert forward.total.bytes == 2 * (2 * 256 * 64 + 2 * 256 + 4 + 64)
    assert {"_adapter_bwd_once_kernel", "_adapter_once_reduce_kernel"} <= set(backward.found)
    assert sum(linear.found.values()) <= 2
    assert kernels.launch is launch and backends.resolve("adapter", "auto", x) == before
    assert bool(adapter(x, *weights).isfinite().all())
