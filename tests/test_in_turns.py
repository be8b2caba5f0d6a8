"""Calls timed in turns: what a turn counts, what is compared, and the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import in_turns
from benchmarks.cases import CASES, case, costs
from benchmarks.parity import WITHIN
from benchmarks.peers import PEERS, Missing
from benchmarks.turns import summary, take_turns


class Watch:
    """A clock that only the calls advance."""

    def __init__(self) -> None:
        self.now, self.seen = 0.0, []

    def call(self, name: str, seconds: float, first: float | None = None):
        def run():
            fresh = not self.seen or self.seen[-1] != name
            self.seen.append(name)
            self.now += first if fresh and first is not None else seconds

        return run


def test_all_take_turns_in_an_order_drawn_for_each_round():
    watch = Watch()
    calls = {name: watch.call(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    times = take_turns(calls, 70.0, lambda: watch.now)
    assert times == {"a": [1.0] * 10, "b": [2.0] * 10, "c": [4.0] * 10}
    rounds = [tuple(watch.seen[i : i + 3]) for i in range(6, 36, 3)]  # behind two calls each, to begin with
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 2
    assert len(take_turns(calls, 0.0, lambda: watch.now)["a"]) == 5
    assert len(take_turns(calls, 1e9, lambda: watch.now, most_rounds=7)["a"]) == 7


def test_a_short_call_is_repeated_and_its_first_ones_do_not_count():
    watch = Watch()
    calls = {"short": watch.call("short", 1.0, first=9.0), "long": watch.call("long", 40.0)}
    times = take_turns(calls, 500.0, lambda: watch.now, turn_seconds=10.0)
    assert set(times["short"]) == {1.0} and set(times["long"]) == {40.0}
    assert watch.seen[4:].count("short") == 10 * watch.seen[4:].count("long")


def test_ratios_are_of_the_same_round():
    times = {"ours": [1.0, 2.0, 4.0, 8.0], "peer": [2.0, 4.0, 8.0, 16.0]}  # the machine slows down, for both
    found = summary(times, "ours")
    assert found["peer"] == {"median_s": 6.0, "over_base": [2.0, 2.0, 2.0]}
    assert found["ours"]["over_base"] == [1.0, 1.0, 1.0]


def rows(**middles: float) -> dict[str, dict]:
    right = {"parity": WITHIN}
    return {name: {"median_s": m * 1e-3, "over_base": [m * 0.9, m, m * 1.1]} | right for name, m in middles.items()}


def test_goals_are_held_by_the_median_of_the_ratios():
    op, name = "bidirectional_kl", "M512_V1000"
    timed = rows(**{"fastgist native": 1.0, "analytic": 4.9, "log_softmax": 10.1, in_turns.FLOOR: 0.24})
    timed |= rows(**{in_turns.SCALED: 1.7})
    held = in_turns.goals(op, name, timed)
    assert {n: met for n, (_, _, met) in held.items()} == {
        "analytic": False,
        "log_softmax": True,
        in_turns.FLOOR: False,  # 1 / 0.24 of the copies, and 4 at most
        in_turns.SCALED: False,
    }
    lines = in_turns.table(op, name, timed).splitlines()
    assert lines[1].split()[0] == in_turns.FLOOR and "4.17, goal at most 4: MISSED" in lines[1]
    assert any("10.10, goal at least 10: met" in line for line in lines)


def test_what_is_wrong_holds_no_goal_and_its_row_says_so():
    op, name = "cp_linear", "M3152_d768_R32"
    timed = rows(**{"fastgist auto": 1.0, "factored": 1.04, "PEFT LoRA": 0.5, "frozen linear alone": 0.8})
    timed["PEFT LoRA"]["parity"] = "gradient of x: error 1 exceeds the budget"
    timed["frozen linear alone"]["parity"] = in_turns.OTHER
    assert in_turns.goals(op, name, timed) == {"factored": (1.05, 1.04, False)}
    assert in_turns.slower_than(timed) == []
    text = in_turns.table(op, name, timed, {"Liger JSD": "liger_kernel is not installed"})
    assert "gradient of x: error 1" in text and "Liger JSD was not timed: liger_kernel is not installed" in text
    timed["factored"]["parity"] = "result: wrong"
    assert in_turns.goals(op, name, timed) == {}


def test_slower_is_what_three_rounds_of_four_say():
    ours = rows(**{"fastgist auto": 1.0})
    for over_base, slower in (([0.9, 0.985, 0.995], True), ([0.9, 0.985, 1.01], False), ([0.97, 0.992, 0.998], False)):
        timed = ours | {"PEFT LoRA, compiled": {"over_base": over_base, "median_s": 1e-3, "parity": WITHIN}}
        assert in_turns.slower_than(timed) == ["PEFT LoRA, compiled"] * slower
        assert ("SLOWER than PEFT LoRA, compiled" in in_turns.table("cp_linear", "M1", timed)) == slower
    floor = {in_turns.FLOOR: {"over_base": [0.5, 0.5, 0.5], "median_s": 1e-3, "parity": in_turns.WORK}}
    assert in_turns.slower_than(ours | floor) == []


def test_goals_name_cases_and_providers_that_there_are():
    cases = {(op, c.name) for op in in_turns.OURS for c in CASES[op, "cpu"]}
    assert set(in_turns.AT_LEAST) <= cases and set(in_turns.AT_MOST) <= cases
    assert {c.name for op, c in in_turns.wanted([], None) if op == "cp_linear"} == {
        c.name for c in CASES["cp_linear", "cpu"]
    }
    assert {c for op, c in in_turns.wanted(["topk_kl"], None)} == set(CASES["topk_kl", "cpu"])
    assert ("adapter", "M3152_d768_H64_norm1") in {(op, c.name) for op, c in in_turns.wanted([], "norm")}
    for (op, _), bounds in in_turns.AT_LEAST.items():
        assert in_turns.OURS[op] in PEERS[op] and set(bounds) & set(PEERS[op])
        assert all(name in PEERS[op] or name in in_turns._EAGER for name in bounds)


def test_what_is_wrong_is_not_timed(monkeypatch):
    small = case(torch.float32, M=40, V=65)
    right = PEERS["bidirectional_kl"]["fastgist native"]
    monkeypatch.setitem(
        PEERS["bidirectional_kl"], "fastgist native", lambda tensors: lambda *a: right(tensors)(*a) * 1.01
    )
    with pytest.raises(RuntimeError, match="fastgist native: result"):
        in_turns.calls("bidirectional_kl", small)


def test_without_the_extension_it_says_so(monkeypatch):
    def missing(tensors):
        raise Missing("the compiled extension is not available")

    monkeypatch.setitem(PEERS["adapter"], "fastgist native", missing)
    with pytest.raises(RuntimeError, match="fastgist native: the compiled extension is not available"):
        in_turns.calls("adapter", case(torch.float32, M=40, d=48, H=9))


def test_a_file_of_before_keeps_its_commit_and_claims_no_verdict(tmp_path):
    path = tmp_path / "in_turns.json"
    row = {"op": "adapter", "case": "M1", "provider": "eager", "median_s": 1.0, "over_base": [1.0, 1.0, 1.0]}
    path.write_text(json.dumps({"environment": {"commit": "old"}, "turns": [row]}))
    found = in_turns.load(path)
    assert found["turns"] == [row | {"run": "1", "commit": "old", "parity": "not recorded"}]
    assert found["runs"] == {"1": {"commit": "old"}} and not in_turns.right(found["turns"][0])


def test_scaled_and_detached_calls_are_held_too(monkeypatch):
    small = case(torch.float32, M=40, V=65)
    turns = in_turns.calls("bidirectional_kl", small)
    for name in (in_turns.OURS["bidirectional_kl"], in_turns.SCALED, in_turns.DETACHED, "analytic"):
        assert turns.parity[name] == WITHIN and turns.steps[name]()
    assert len(turns.steps[in_turns.DETACHED]()) == 1 and len(turns.steps["analytic"]()) == 2
    right = PEERS["bidirectional_kl"]["fastgist native"]

    def once(tensors):
        call = right(tensors)

        def provider(z, g):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (z, g)]
                grads = torch.autograd.grad(call(*leaves), leaves)
            return _Handed.apply(z, g, call(z.detach(), g.detach()), *grads)

        return provider

    monkeypatch.setitem(PEERS["bidirectional_kl"], "fastgist native", once)
    with pytest.raises(RuntimeError, match="incoming gradient of 2: gradient of z"):
        in_turns.calls("bidirectional_kl", small)


class _Handed(torch.autograd.Function):
    """A loss whose backward hands out what it was given, whatever comes in."""

    @staticmethod
    def forward(ctx, z, g, loss, grad_z, grad_g):
        ctx.save_for_backward(grad_z, grad_g)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return *ctx.saved_tensors, None, None, None


def test_the_command(tmp_path, capsys, monkeypatch):
    from benchmarks import conftest

    small = case(torch.float32, M=64, d=32, R=4)
    monkeypatch.setitem(CASES, ("cp_linear", "cpu"), [small])
    kept = [n for n in PEERS["cp_linear"] if not n.startswith("PEFT") and "compiled" not in n]
    monkeypatch.setitem(PEERS, "cp_linear", {n: PEERS["cp_linear"][n] for n in kept})
    arguments = ["cp_linear", "-k", "M64_d32", "--seconds", "0.01", "--out", str(tmp_path)]
    assert in_turns.main(arguments) == 0
    (path,) = tmp_path.glob("*/in_turns.json")
    found = json.loads(path.read_text())
    providers = [row["provider"] for row in found["turns"]]
    assert {"fastgist auto", "factored", in_turns.FLOOR} <= set(providers) and "fastgist reference" not in providers
    assert all(row["median_s"] > 0 and len(row["over_base"]) == 3 for row in found["turns"])
    named = {row["provider"]: row for row in found["turns"]}
    assert named["factored"]["parity"] == WITHIN and named["frozen linear alone"]["parity"] == in_turns.OTHER
    assert named[in_turns.FLOOR]["parity"] == in_turns.WORK
    moved, flops = costs("cp_linear", small, "fwd_bwd")
    for row in named.values():
        assert (row["bytes"], row["flops"]) == (moved, flops) and row["roofline_s"] > 0
        assert row["ratio_to_roofline"] == row["median_s"] / row["roofline_s"] and row["peak_bytes"] >= 0
    assert named["factored"]["peak_bytes"] >= 64 * 32 * 4
    assert "of its roofline" in capsys.readouterr().out
    # Another case at another commit: the rows before it keep theirs.
    other = case(torch.float32, M=72, d=32, R=4)
    monkeypatch.setitem(CASES, ("cp_linear", "cpu"), [small, other])
    monkeypatch.setenv("FASTGIST_COMMIT", "another")
    conftest.measured_by.cache_clear()
    assert in_turns.main(["cp_linear", "-k", "M72", *arguments[3:]]) == 0
    twice = json.loads(path.read_text())
    commits = {c: {r["commit"] for r in twice["turns"] if r["case"] == c} for c in (small.name, other.name)}
    assert commits[other.name] == {"another"} and commits[small.name] == {named["factored"]["commit"]} != {"another"}
    assert {r["run"] for r in twice["turns"]} == {"1", "2"} == set(twice["runs"])
    assert twice["runs"]["2"]["commit"] == "another" and twice["runs"]["1"] == found["runs"]["1"]
    assert in_turns.main(arguments) == 0  # measured again: in the place of the first, and its run is forgotten
    again = json.loads(path.read_text())
    assert len([r for r in again["turns"] if r["case"] == small.name]) == len(providers)
    assert set(again["runs"]) == {"2", "3"}
    conftest.measured_by.cache_clear()
    with pytest.raises(SystemExit):
        in_turns.main(["cp_linear", "-k", "nothing"])
    assert "no case of cp_linear" in capsys.readouterr().err


def test_without_a_place_it_prints_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(in_turns, "ROOT", tmp_path)
    monkeypatch.setitem(CASES, ("cp_linear", "cpu"), [case(torch.float32, M=64, d=32, R=4)])
    monkeypatch.setitem(PEERS, "cp_linear", {n: PEERS["cp_linear"][n] for n in ("fastgist auto", "factored")})
    arguments = ["cp_linear", "-k", "M64_d32", "--seconds", "0.01"]
    assert in_turns.main(arguments) == 0
    assert not list(tmp_path.rglob("*.json"))
    out = capsys.readouterr().out
    assert "factored" in out and "not saved (--save, --out FOLDER)" in out
    assert in_turns.main([*arguments, "--save"]) == 0
    (path,) = tmp_path.glob("benchmarks/results/*/in_turns.json")
    found = json.loads(path.read_text())
    assert all(row["spread"] >= 1 for row in found["turns"]) and found["runs"]["1"]["load_average"] >= 0
    assert str(path) in capsys.readouterr().out


def test_a_busy_machine_is_named():
    timed = rows(**{"fastgist native": 1.0, "analytic": 4.9})
    line = "the machine was busy: these figures say little"
    for spread, load, why in (
        (1.0, 0.0, None),
        (1.5, float(in_turns.cores()), None),
        (1.6, 0.0, "(the quartiles of ours are a factor 1.6 apart)"),
        (
            1.0,
            in_turns.cores() + 0.5,
            f"(load average {in_turns.cores() + 0.5:.1f} at the start on {in_turns.cores()} cores)",
        ),
    ):
        timed["fastgist native"]["spread"] = spread
        timed["analytic"]["spread"] = 9.0  # a peer's own affair
        last = in_turns.table("bidirectional_kl", "M512_V1000", timed, None, load).splitlines()[-1]
        assert (last == f"  {line} {why}") if why else line not in last


def test_the_profiler_is_silent_and_others_are_heard(capfd):
    from benchmarks import harness

    sizes = harness.cpu_allocations(lambda: (os.write(2, b"ours\n"), torch.empty(1000)))
    assert 4000 in sizes
    assert capfd.readouterr().err == "ours\n"
    with harness._without_the_profilers_lines():
        os.write(2, b"USDT:2026 1:1 SyncActivityProfilerHandler.cpp:39] profiler_start\nERROR: another\n")
        os.write(2, b"ERROR:2026 DeviceProperties.cpp:56] gpuGetDeviceCount failed with code 35\n")
    assert capfd.readouterr().err == "ERROR: another\n"
    with pytest.raises(ZeroDivisionError):
        harness.cpu_allocations(lambda: 1 / 0)
    assert harness.cpu_allocations(lambda: torch.empty(10))  # the profiler was stopped


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("", "-m pytest benchmarks --benchmark-only"),
        ("-k M512", "-m pytest benchmarks --benchmark-only -k M512"),
        (
            "--save-results benchmarks/results",
            "-m pytest benchmarks --benchmark-only --save-results benchmarks/results",
        ),
        ("benchmarks/bench_adapter.py -k M512", "-m pytest --benchmark-only benchmarks/bench_adapter.py -k M512"),
    ],
)
def test_make_bench_narrows(arguments, wanted):
    if shutil.which("make") is None:
        pytest.skip("no make")
    command = ["make", "-n", "bench", f"ARGS={arguments}", "VENV=none", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=in_turns.ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert any(" ".join(line.split()).endswith(wanted) for line in done.stdout.splitlines()), done.stdout
