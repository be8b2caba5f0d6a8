"""The committed readings of a PETAL step and of decoding: every goal but those that DESIGN.md names is met; and the update's
FLOPs at the published size, counted here on the meta device, are those of the readings and of DESIGN's table.

They are read anew by ``pytest benchmarks/bench_petal_step.py benchmarks/bench_decode.py --benchmark-only`` on a machine with
nothing else running."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import bench_cp_linear, decode, petal_goals, petal_step
from benchmarks.cases import CASES, is_first

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-amd-epyc"
DESIGN = (ROOT / "DESIGN.md").read_text()
TITLE = "## A PETAL step, counted and on a CPU"
TOKENS = "## Decoding with adapters that are not merged"
STEPS = [c for c in CASES["petal_step", "cpu"] if (c["B"], c["T"], c["R"]) in ((8, 20, 64), (1, 20, 128))]
#: Decoded layers that have been added since the readings.
UNREAD = {"M1_d5120"}


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def named(title: str) -> set[str]:
    """What DESIGN.md says is missed, in the section of ``title``."""
    section = DESIGN.partition(title)[2].partition("\n## ")[0]
    _, found, rest = section.partition("Missed (tests/test_petal_readings.py holds this list")
    assert found, f"{title!r} names what is missed"
    return set(re.findall(r"`([^`]+)`", rest.partition("\n\n")[0]))


def test_what_a_step_misses_is_what_design_names() -> None:
    assert petal_goals.missed_steps(rows("petal_step")) == named(TITLE)


def test_what_a_token_misses_is_what_design_names() -> None:
    assert petal_goals.missed_tokens(rows("decode")) == named(TOKENS)


def test_every_case_is_read_and_the_default_is_nowhere_behind_the_released_form() -> None:
    found = list(petal_goals.step_ratios(rows("petal_step")))
    assert {r["case"] for r in rows("petal_step")} == {c.name for c in CASES["petal_step", "cpu"]}
    assert len(found) == 2 * len(CASES["petal_step", "cpu"])
    for case, provider, _, step in found:
        assert provider != "fastgist cp" or step >= petal_goals.NEVER_BELOW, case
    for row in rows("petal_step"):
        if row["provider"] not in petal_step.OTHER_MODEL:
            assert row["parity"] == "within the budget", row["provider"]
    read = {(r["case"], r["dtype"], r["provider"]) for r in rows("decode")}
    for name in {c.name for c in CASES["decode", "cpu"]} - UNREAD:
        for dtype in ("float32", "bfloat16"):
            assert {(name, dtype, p) for p in petal_goals.LAYERS} <= read
    assert set(petal_goals.LAYERS) <= set(decode.LAYERS)


def test_a_reading_that_misses_is_noticed() -> None:
    def step(provider, flops, over):
        return {"case": "B1_T2_R3_D4", "provider": provider, "update_flops": flops, "over_base": over}

    made = [step("released", 20, 3.0), step("fastgist", 10, 2.0), step("fastgist cp", 11, 2.1)]
    assert petal_goals.missed_steps(made) == {"B1_T2_R3 fastgist cp, FLOPs", "B1_T2_R3 fastgist cp, step"}
    token = {"case": "M1", "dtype": "float32", "provider": "fastgist CPLinear"}
    assert petal_goals.missed_tokens([token | {"over_base": 1.1}]) == set()
    assert petal_goals.missed_tokens([token | {"over_base": 1.11}]) == {"M1 float32 fastgist CPLinear"}


# -- counted -----------------------------------------------------------------------------------------------------------


def _batch(case, device, dtype):
    """petal_step's batch without numbers: a meta device has no generator."""
    b, words = case["B"], case["T"]
    masks = (torch.empty(b, n, dtype=torch.long, device=device) for n in (petal_step.QUERIES + words, case["N"]))
    image = torch.empty(b, case["N"], case["K"], dtype=dtype, device=device)
    ids = torch.empty(b, words, dtype=torch.long, device=device) if words else None
    return image, ids, *masks, torch.empty(b, petal_step.QUERIES, case["D"], device=device)


@pytest.fixture
def meta(monkeypatch):
    """The providers of petal_step on the meta device, where a step of the published size costs nothing."""
    masking = pytest.importorskip("transformers.masking_utils")
    monkeypatch.setattr(petal_step, "batch", _batch)
    monkeypatch.setattr(masking, "_ignore_bidirectional_mask_sdpa", lambda *a, **k: True)  # it would read the mask
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **_: torch.optim.SGD(parameters, 1e-5))
    petal_step._frozen.cache_clear()
    yield torch.device("meta")
    petal_step._frozen.cache_clear()


@pytest.mark.parametrize("case", STEPS, ids=lambda c: petal_goals.short({"case": c.name}))
def test_the_flops_of_the_update_are_those_that_were_read_and_written_down(case, meta) -> None:
    found = {}
    for provider in ("base", "released", *petal_goals.STEPS):
        step = petal_step.PROVIDERS[provider](case, meta)
        with FlopCounterMode(display=False) as counter:
            step()
        found[provider] = counter.get_total_flops()
    updates = {p: found[p] - found["base"] for p in ("released", *petal_goals.STEPS)}
    read = {r["provider"]: r["update_flops"] for r in rows("petal_step") if r["case"] == case.name}
    assert updates == {p: read[p] for p in updates}
    start = f"| {case['B']}, {case['T']}, {case['R']} |"
    line = next(x for x in DESIGN.partition(TITLE)[2].splitlines() if x.startswith(start))  # the first of two tables
    frozen, released, same, cp, ratio = (float(cell) for cell in line.strip("| ").split("|")[1:])
    for said, flops in zip((frozen, released, same, cp), (found["base"], *updates.values()), strict=True):
        assert said == pytest.approx(flops / 1e9, rel=0.005)
    assert ratio == pytest.approx(updates["released"] / updates["fastgist cp"], abs=0.006)
    assert ratio >= (1.7 if case["R"] == 64 else 1.98)


# -- what a run on a card times ----------------------------------------------------------------------------------------


def test_a_language_models_rows_are_timed_beside_the_released_form() -> None:
    peers = ("released", "released, compiled", "dense delta, compiled")
    of = {c.name: c for c in CASES["cp_linear", "cuda"]}
    for name in ("M1_d2048_R16", "M512_d4096_R16", "M1_d5120_R16", "M16384_d768_R16"):
        assert all(bench_cp_linear.wanted(of[name], p) for p in peers), name
    assert not bench_cp_linear.wanted(of["M1_d2048_R16"], "PEFT AdaLoRA, compiled")
    assert not any(bench_cp_linear.wanted(of["M16384_d768_R16_W3"], p) for p in peers)
    assert is_first("cp_linear", of["M512_d2048_R16"], "released", "fwd")
    assert {c["d"] for c in CASES["decode", "cpu"] if "L" not in dict(c.sizes)} == {2048, 4096, 5120}
