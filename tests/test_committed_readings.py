"""The committed readings of benchmarks/in_turns.py: every goal but those that DESIGN.md names is met, and cp_linear is nowhere
slower than an eager form.

They are read anew by ``python -m benchmarks.in_turns --save`` on a machine with nothing else running."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import in_turns
from benchmarks.cases import CASES, costs
from benchmarks.peers import OTHER_FUNCTION, PEERS

ROOT = Path(__file__).parents[1]
PATH = ROOT / "benchmarks" / "results" / "cpu-amd-epyc" / "in_turns.json"
#: The losses on a second machine, whose clock is slower and whose caches are faster: by --out benchmarks/results/zen-4.
SECOND = ROOT / "benchmarks" / "results" / "zen-4" / "cpu-amd-epyc" / "in_turns.json"
LOSSES = [key for key in in_turns.AT_LEAST if key[0] in ("bidirectional_kl", "gist_loss")]
AGAIN = "read it again: python -m benchmarks.in_turns --save"


@pytest.fixture(scope="module")
def content() -> dict:
    return in_turns.load(PATH)


def by_case(content: dict) -> dict[tuple[str, str], dict[str, dict]]:
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in content["turns"]:
        found.setdefault((row["op"], row["case"]), {})[row["provider"]] = row
    return found


@pytest.fixture(scope="module")
def rows(content) -> dict[tuple[str, str], dict[str, dict]]:
    return by_case(content)


@pytest.fixture(scope="module")
def second() -> dict[tuple[str, str], dict[str, dict]]:
    return by_case(in_turns.load(SECOND))


def missed(of_case: dict[str, dict], op: str, case: str) -> set[str]:
    held = in_turns.goals(op, case, of_case)
    wanted = {n for bounds in (in_turns.AT_LEAST, in_turns.AT_MOST) for n in bounds.get((op, case), {})}
    peers = {n for n in wanted if n in PEERS[op] or n in (in_turns.FLOOR, in_turns.SCALED, in_turns.DETACHED)}
    absent = peers - set(held)
    assert not absent, f"{op} {case}: no right row of {', '.join(sorted(absent))}: {AGAIN} {op} -k {case}"
    return {f"{op} {case} {name}" for name, (_, _, met) in held.items() if not met}


def named_in_design(text: str, begins: str = "Missed in turns (") -> set[str]:
    _, found, rest = text.partition(begins)
    assert found, "DESIGN.md names what is missed"
    return set(re.findall(r"`([^`]+)`", rest.partition("\n\n")[0]))


@pytest.mark.parametrize("op", ["cp_linear", "adapter", "gist_loss", "cp_update"])
def test_every_goal_is_met(rows, op):
    cases = [case for o, case in in_turns.AT_LEAST if o == op]
    assert cases
    for case in cases:
        assert missed(rows[op, case], op, case) == set()


def test_what_is_missed_is_what_design_names(rows):
    found = {name for op, case in in_turns.AT_LEAST for name in missed(rows[op, case], op, case)}
    assert found == named_in_design((ROOT / "DESIGN.md").read_text())


def test_what_the_losses_miss_on_a_second_machine_is_what_design_names(second):
    found = {name for op, case in LOSSES for name in missed(second[op, case], op, case)}
    assert found == named_in_design((ROOT / "DESIGN.md").read_text(), "Missed on a second machine (")


def test_what_the_losses_miss_on_one_machine_they_meet_on_the_other(rows, second):
    for op, case in LOSSES:
        assert not missed(rows[op, case], op, case) & missed(second[op, case], op, case)


@pytest.mark.parametrize("case", [c.name for c in CASES["cp_linear", "cpu"]])
def test_cp_linear_is_never_slower_than_an_eager_form(rows, case):
    """Against every form, eager or compiled: slower is a median ratio below 0.99 whose upper quartile is below 1 too."""
    assert ("cp_linear", case) in rows, f"{AGAIN} cp_linear -k {case}"
    of_case = rows["cp_linear", case]
    assert {"factored", "factored, compiled", "dense delta", "autograd.Function"} <= set(of_case)
    compared = [n for n, r in of_case.items() if in_turns.right(r) and n not in OTHER_FUNCTION]
    assert {"fastgist auto", "factored", "autograd.Function"} <= set(compared)
    slower = in_turns.slower_than(of_case)
    assert not slower, [(n, of_case[n]["over_base"]) for n in slower]


@pytest.mark.parametrize("path", [PATH, SECOND], ids=["first machine", "second machine"])
def test_a_row_says_where_it_is_from_and_what_it_can_reach(path):
    content = in_turns.load(path)
    assert content["turns"]
    for row in content["turns"]:
        assert row["commit"] == content["runs"][row["run"]]["commit"]
        assert row["parity"] != "not recorded", f"{AGAIN} {row['op']} -k {row['case']}"
        of = next(c for c in CASES[row["op"], "cpu"] if c.name == row["case"] and c.dtype.itemsize == 4)
        if row["provider"] != in_turns.DETACHED:
            assert (row["bytes"], row["flops"]) == costs(row["op"], of, "fwd_bwd")
        assert row["roofline_s"] > 0 and row["ratio_to_roofline"] == pytest.approx(row["median_s"] / row["roofline_s"])


def test_a_reading_that_misses_is_noticed(rows):
    """The checks of this file on readings made for it."""
    right = {"parity": in_turns.WITHIN}
    made = {n: {"over_base": [1.1, 1.1, 1.1]} | right for n in ("fastgist auto", "factored", "released", "dense delta")}
    made |= {
        "autograd.Function": {"over_base": [1.04, 1.04, 1.04]} | right,
        in_turns.FLOOR: {"over_base": [1, 1, 1]} | right,
    }
    case = "M3152_d768_R32"
    assert missed(made, "cp_linear", case) == {f"cp_linear {case} autograd.Function"}
    del made[in_turns.FLOOR]
    with pytest.raises(AssertionError, match="no right row of floor"):
        missed(made, "cp_linear", case)
    assert named_in_design("Missed in turns (why):\n`a b c`, `d e, f`.\n\n`not this`") == {"a b c", "d e, f"}
    assert named_in_design("Missed in turns (why): nothing.\n\n`not this`") == set()
