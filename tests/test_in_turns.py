"""Calls timed in turns: what a turn counts, what is compared, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import in_turns
from benchmarks.cases import CASES, case
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
    return {name: {"median_s": m * 1e-3, "over_base": [m * 0.9, m, m * 1.1]} for name, m in middles.items()}


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


def test_goals_name_cases_and_providers_that_there_are():
    cases = {(op, c.name) for op in in_turns.OURS for c in CASES[op, "cpu"]}
    assert set(in_turns.AT_LEAST) <= cases and set(in_turns.AT_MOST) <= cases
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


def test_the_command(tmp_path, capsys, monkeypatch):
    small = case(torch.float32, M=64, d=32, R=4)
    monkeypatch.setitem(CASES, ("cp_linear", "cpu"), [small])
    kept = [n for n in PEERS["cp_linear"] if not n.startswith("PEFT") and "compiled" not in n]
    monkeypatch.setitem(PEERS, "cp_linear", {n: PEERS["cp_linear"][n] for n in kept})
    arguments = ["cp_linear", "-k", "d32", "--seconds", "0.01", "--out", str(tmp_path)]
    assert in_turns.main(arguments) == 0
    (path,) = tmp_path.glob("*/in_turns.json")
    found = json.loads(path.read_text())
    providers = [row["provider"] for row in found["turns"]]
    assert {"fastgist auto", "factored", in_turns.FLOOR} <= set(providers) and "fastgist reference" not in providers
    assert all(row["median_s"] > 0 and len(row["over_base"]) == 3 for row in found["turns"])
    assert in_turns.main(arguments) == 0  # measured again: in the place of the first
    assert len(json.loads(path.read_text())["turns"]) == len(providers)
    with pytest.raises(SystemExit):
        in_turns.main(["cp_linear", "-k", "nothing"])
    assert "no case of cp_linear" in capsys.readouterr().err
