"""What cp_linear and adapter save on a CPU, against what was measured: saving is kept where forming again is no faster."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

from fastgist import functional

ROOT = Path(__file__).parents[1]
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("cpu-*/saved_or_again.json"))


def _script():
    spec = importlib.util.spec_from_file_location("saved_or_again", ROOT / "scripts" / "saved_or_again.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()


def faster_again(row: dict) -> bool:
    """Whether forming it again was the faster one, by more than a hundredth, in three rounds of four."""
    return row["again_over_saved"][2] < 0.99


@pytest.mark.parametrize("op", script.SIZES)
def test_both_ways_are_the_same_function(op):
    both, kept = script.calls(op, 70, 48, 8)
    saved, again = both["saved"](), both["again"]()
    assert len(saved) == {"cp_linear": 5, "adapter": 6}[op] and kept == 70 * 8 * 4
    for a, b in zip(saved, again, strict=True):
        assert a.shape == b.shape and float((a - b).norm() / a.norm()) < 1e-5
    row = script.measure(op, (70, 48, 8), 0.01, time.perf_counter)
    assert row["seconds"]["saved"] > 0 and len(row["again_over_saved"]) == 3
    assert "70, 48" in script.line(row)


@pytest.mark.parametrize("op", script.SIZES)
def test_a_wrong_way_is_not_timed(op, monkeypatch):
    original = script.calls

    def wrong(*args):
        both, kept = original(*args)
        again = both["again"]
        return both | {"again": lambda: (*again()[:-1], again()[-1] * 1.001)}, kept

    monkeypatch.setattr(script, "calls", wrong)
    with pytest.raises(RuntimeError, match="differ by"):
        script.measure(op, (70, 48, 8), 0.01, time.perf_counter)


@pytest.mark.parametrize("op", script.SIZES)
def test_saved_is_what_the_operation_does(op):
    """Of the tensors kept for the backward exactly one is (M, R) or (M, H), of the bytes that the script says."""
    m, d, width, kept = 140, 48, 8, []  # more than the few rows of cp_linear that PyTorch differentiates itself
    x = torch.randn(m, d, requires_grad=True)
    narrow = [torch.randn(width, d, requires_grad=True), torch.randn(width, requires_grad=True)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        if op == "cp_linear":
            u, v = (torch.randn(d, width, requires_grad=True) for _ in range(2))
            functional.cp_linear(x, torch.randn(d, d), None, u, v, torch.randn(width, requires_grad=True))
        else:
            functional.adapter(x, *narrow, torch.randn(d, width, requires_grad=True), None)
    held = [t for t in kept if t.shape == (m, width)]
    assert len(held) == 1 and held[0].numel() * held[0].element_size() == script.calls(op, m, d, width)[1]


def test_a_cpu_was_measured_at_every_size():
    assert RECORDS
    for path in RECORDS:
        turns = json.loads(path.read_text())["turns"]
        found = [(row["op"], (row["M"], row["d"], row["R"] if "R" in row else row["H"])) for row in turns]
        assert found == [(op, size) for op, sizes in script.SIZES.items() for size in sizes]
        assert all(row["bytes"] == row["M"] * (row["R"] if "R" in row else row["H"]) * 4 for row in turns)


def test_what_is_saved_is_nowhere_slower_than_forming_it_again():
    for path in RECORDS:
        for row in json.loads(path.read_text())["turns"]:
            assert not faster_again(row), row
    assert faster_again({"again_over_saved": [0.9, 0.95, 0.985]})
    assert not faster_again({"again_over_saved": [0.9, 0.95, 0.995]})


def test_design_says_what_was_measured():
    design = (ROOT / "DESIGN.md").read_text()
    (path,) = RECORDS  # of more than one machine the table would have to name them
    record = json.loads(path.read_text())
    written = script.block(record, path.relative_to(ROOT).as_posix())
    assert script.into(design, written) == design
    assert ("is provisional" in written) == ("provisional" in record["environment"])
    faster = json.loads(json.dumps(record))
    faster["turns"][0]["seconds"]["again"] /= 2
    assert script.into(design, script.block(faster, "there")) != design
