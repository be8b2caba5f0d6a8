#!/usr/bin/env python3
"""Ours and all peers of a case, one call each in turns, on this CPU: what differs by a tenth shows nowhere else.

    python -m benchmarks.in_turns                                    the cases that have goals, and all of cp_linear
    python -m benchmarks.in_turns cp_linear -k M3152_d768_R32        of an operation the cases with this in their names
    python -m benchmarks.in_turns --save                             and write the results (with nothing else running)

bench_*.py times a provider for a while and then the next; on a shared machine the minutes differ by more than the
providers. Here all take turns in every round, in an order drawn for it, and a ratio is the median of the rounds' ratios. Each
result is held against the formula first: ours is not timed where it is wrong, a peer's row says so, and no goal is held by
it. Prints a table, with the goals (DESIGN.md) and whether they are met, the case's roofline, and whether the machine was too
busy for the figures to mean anything. --save writes benchmarks/results/<device>/in_turns.json, --out FOLDER writes there; rows
that are not measured again keep the run that they came from.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import floors, harness, problems  # noqa: E402
from benchmarks.cases import CASES, Case, case  # noqa: E402
from benchmarks.parity import WITHIN, verdict  # noqa: E402
from benchmarks.peers import OTHER_FUNCTION, PEERS, Missing  # noqa: E402
from benchmarks.turns import summary, take_turns  # noqa: E402

FLOOR = "floor"  # the copies, or the matrix products alone
SCALED = "ours, incoming gradient of 2"
DETACHED = "ours, one side detached"
#: What a row without a result of its own says of it.
OTHER, WORK = "another function, there for its cost", "work, not a result"
#: What is timed as ours; of cp_linear that is what "auto" makes of a CPU.
OURS = {"bidirectional_kl": "fastgist native", "gist_loss": "fastgist native", "adapter": "fastgist native"} | {
    "cp_update": "fastgist native",
    "cp_linear": "fastgist auto",
    "gist_linear_loss": "fastgist native",
    "topk_kl": "fastgist auto",
}
#: The least that a peer's time may be of ours for cp_linear to be "never slower than the best eager form".
NEVER_SLOWER = 0.99
#: From which ratio of the upper quartile of our times to the lower on the machine was busy with something else.
BUSY_SPREAD = 1.5
_EAGER = ("eager", "factored", "released", "autograd.Function", "dense delta")
#: (op, case) -> what another has to take at least, as a multiple of ours.
AT_LEAST: dict[tuple[str, str], dict[str, float]] = {
    **{
        ("bidirectional_kl", case): {
            "log_softmax": 10, "log_softmax, compiled": 5.5, "analytic": 5, "analytic, compiled": 3.5
        }
        for case in ("M512_V1000", "M256_V32000")
    },
    **{("gist_loss", case): {"authors": 10, "authors, compiled": 6} for case in ("M512_V1000", "M256_V32000")},
    ("cp_linear", "M3152_d768_R32"): dict.fromkeys(_EAGER, 1.05),
    **{("adapter", f"M3152_d768_H{h}"): dict.fromkeys(_EAGER, 1.05) for h in (8, 64)},
    ("cp_update", "M3152_d768_R32"): {"addmm": 1.05, "chain": 1.05, "added": 1.05},
}  # fmt: skip
#: What ours may take at most, as a multiple of the floor, and with a gradient other than 1 of its own time with 1.
AT_MOST: dict[tuple[str, str], dict[str, float]] = {
    ("bidirectional_kl", "M512_V1000"): {FLOOR: 4.0, SCALED: 1.6, DETACHED: 1.0},
    ("bidirectional_kl", "M256_V32000"): {FLOOR: 2.5, SCALED: 1.6, DETACHED: 1.0},
    ("gist_loss", "M512_V1000"): {FLOOR: 6.0, SCALED: 1.6, DETACHED: 1.0},
    ("gist_loss", "M256_V32000"): {FLOOR: 3.5, SCALED: 1.6, DETACHED: 1.0},
    ("cp_linear", "M3152_d768_R32"): {FLOOR: 1.12},
    **{("adapter", f"M3152_d768_H{h}"): {FLOOR: 1.2} for h in (8, 64)},
}


@dataclass
class Turns:
    """Of a case: what takes turns, what its rows say of the results, what the floor is, and the peers that are not here."""

    steps: dict[str, Callable[[], object]]
    parity: dict[str, str]
    floor: str
    absent: dict[str, str]


def calls(op: str, case: Case) -> Turns:
    """Without ours, and where its result is wrong, there is nothing to time: RuntimeError."""
    problem = problems.make_problem(op, case, torch.device("cpu"))
    found = Turns({}, {}, "", {})
    for name, build in PEERS[op].items():
        ours = name == OURS[op]
        if name.startswith("fastgist") and not ours:
            continue
        try:
            call = build(problems.given(problem, problem.tensors))
        except Missing as e:
            if ours:
                raise RuntimeError(f"{op} {case.id}: {name}: {e}") from e
            if "not installed" in str(e):
                found.absent[name] = str(e)
            continue
        held = OTHER if name in OTHER_FUNCTION else verdict(problem, call, build, ours)
        _add(found, name, problem, call, "fwd_bwd", held, ours)
        if ours and op in ("bidirectional_kl", "gist_loss"):
            held = verdict(problem, call, build, ours, "fwd_bwd_scaled")
            _add(found, SCALED, problem, call, "fwd_bwd_scaled", held, ours)
            if not case.get("detached", 0):
                detached = problems.make_problem(op, _detached(case), torch.device("cpu"))
                _add(found, DETACHED, detached, call, "fwd_bwd", verdict(detached, call, build, ours), ours)
    found.steps[FLOOR], found.floor = floors.cpu_floor(problem)
    found.parity[FLOOR] = WORK
    return found


def _detached(of: Case) -> Case:
    return case(of.dtype, **dict(of.sizes), detached=1)


def _add(
    found: Turns, name: str, problem: problems.Problem, call: Callable, direction: str, held: str, ours: bool
) -> None:
    if ours and held != WITHIN:
        raise RuntimeError(f"{problem.op} {problem.case.id}: {name}: {held}")
    found.steps[name], found.parity[name] = harness.make_step(problem, call, direction), held


def right(row: dict) -> bool:
    """Whether a row's result is right, or none that could be wrong."""
    return row["parity"].startswith((WITHIN, WORK))


def goals(op: str, case: str, rows: dict[str, dict]) -> dict[str, tuple[float, float, bool]]:
    """Name -> (the goal, the ratio found, whether it is met) of those that were timed and are right. A ratio is another's time
    over ours; the floor's, and that of a gradient other than 1, is ours over it, or over ours."""
    found = {}
    for name, least in AT_LEAST.get((op, case), {}).items():
        if name in rows and right(rows[name]):
            ratio = rows[name]["over_base"][1]
            found[name] = least, ratio, ratio >= least
    for name, most in AT_MOST.get((op, case), {}).items():
        if name in rows:
            low, middle, _ = rows[name]["over_base"]
            ratio = 1.0 / middle if name == FLOOR else middle
            # "Nothing extra" is told from noise by the quartiles: a call that is none slower is as often above 1 as below.
            found[name] = most, ratio, (low if name == DETACHED else ratio) <= most
    return found


def slower_than(rows: dict[str, dict]) -> list[str]:
    """The peers that ours is slower than: their median ratio is below :data:`NEVER_SLOWER`, and that is no noise, since in
    three rounds of four they were the faster. Those whose result is wrong, or another, are none."""
    others = {n: r for n, r in rows.items() if right(r) and n != FLOOR and not n.startswith(("fastgist", "ours"))}
    others = {n: r for n, r in others.items() if n not in OTHER_FUNCTION}
    return [n for n, r in others.items() if r["over_base"][1] < NEVER_SLOWER and r["over_base"][2] < 1.0]


def busy(spread: float, load: float, cores: int) -> list[str]:
    """Why figures say little: of ``spread``, the ratio of the quartiles of our times, and the load average at the start."""
    found = [f"the quartiles of ours are a factor {spread:.1f} apart"] if spread > BUSY_SPREAD else []
    return found + ([f"load average {load:.1f} at the start on {cores} cores"] if load > cores else [])


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def table(
    op: str, case: str, rows: dict[str, dict], absent: dict[str, str] | None = None, load: float | None = None
) -> str:
    """``load``: the load average when the command began."""
    held = goals(op, case, rows)
    lines = [f"{op} {case}, {torch.get_num_threads()} threads, float32, forward and backward"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["median_s"]):
        low, middle, high = row["over_base"]
        goal = ""
        if name in held:
            wanted, ratio, met = held[name]
            bound = "at most" if name in AT_MOST.get((op, case), {}) else "at least"
            goal = f"  {ratio:.2f}, goal {bound} {wanted:g}: {'met' if met else 'MISSED'}"
        if not right(row):
            goal = f"  {row['parity']}"
        beside = f"  {row['median_s'] / row['roofline_s']:.2f} of its roofline" if "roofline_s" in row else ""
        lines.append(
            f"  {name:32s} {row['median_s'] * 1e3:9.3f} ms  {middle:6.2f} of ours ({low:.2f} to {high:.2f}){beside}{goal}"
        )
    ours = rows[OURS[op]]
    if "roofline_s" in ours:
        lines.append(f"  ours: {floors.beside(ours)}")
    lines += [f"  {name} was not timed: {why}" for name, why in (absent or {}).items()]
    if op == "cp_linear" and (peers := slower_than(rows)):
        lines.append(f"  SLOWER than {', '.join(peers)}")
    if why := busy(ours.get("spread", 1.0), load or 0.0, cores()):
        lines.append(f"  the machine was busy: these figures say little ({'; '.join(why)})")
    return "\n".join(lines)


def load(path: Path) -> dict:
    """{"runs": {number: environment}, "turns": rows, "absent": op -> provider -> why}; a file of before gets its one run."""
    if not path.exists():
        return {"runs": {}, "turns": [], "absent": {}}
    found = json.loads(path.read_text())
    if "runs" not in found:
        about = {"run": "1", "commit": found["environment"]["commit"], "parity": "not recorded"}
        rows = [row | about for row in found["turns"]]
        found = {"runs": {"1": found["environment"]}, "turns": rows, "absent": {}}
    return found


def save(path: Path, content: dict) -> None:
    """Runs that no row is of any more are forgotten."""
    used = {row["run"] for row in content["turns"]}
    content = content | {"runs": {n: run for n, run in content["runs"].items() if n in used}}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def wanted(ops: list[str], part: str | None) -> list[tuple[str, Case]]:
    """The cases: those with ``part`` in their names, else those with goals and all of cp_linear; of operations that are named
    and have no goals, all."""

    def asked(op: str, c: Case) -> bool:
        if part is not None:
            return part in c.name
        has_goals = any(o == op for o, _ in AT_LEAST)
        return (op, c.name) in AT_LEAST or op == "cp_linear" or (op in ops and not has_goals)

    return [(op, c) for op in ops or OURS for c in CASES[op, "cpu"] if c.dtype == torch.float32 and asked(op, c)]


def measure(op: str, of: Case, seconds: float) -> tuple[dict[str, dict], dict[str, str]]:
    """(provider -> row, provider -> why it is not here)."""
    turns = calls(op, of)
    times = take_turns(turns.steps, seconds, time.perf_counter, turn_seconds=0.008)
    rows = summary(times, OURS[op])
    for name, row in rows.items():
        low, _, high = statistics.quantiles(times[name], n=4)
        row["spread"] = high / low
        counted = _detached(of) if name == DETACHED else of
        row |= {"parity": turns.parity[name], "floor": turns.floor}
        row |= _roofline(op, counted)
        row["ratio_to_roofline"] = row["median_s"] / row["roofline_s"]
        row["peak_bytes"] = harness.peak_bytes(turns.steps[name], torch.device("cpu"))
    return rows, turns.absent


@functools.cache
def _roofline(op: str, of: Case) -> dict[str, object]:
    return floors.roofline(op, of, "fwd_bwd", torch.device("cpu"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OURS)} (default: all)")
    parser.add_argument(
        "-k", dest="case", help="a part of the case's name (default: those with goals, all of cp_linear)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each case (default 20)")
    results = ROOT / "benchmarks" / "results"
    parser.add_argument(
        "--save", action="store_true", help="write the results, into benchmarks/results (default: print)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results into this folder")
    args = parser.parse_args(argv)
    folder = args.out or (results if args.save else None)
    load_average = os.getloadavg()[0]
    from tqdm import tqdm

    from benchmarks.conftest import environment, measured_by  # it also asks malloc to keep what is freed

    if unknown := [op for op in args.ops if op not in OURS]:
        parser.error(f"{', '.join(unknown)}: not among {', '.join(OURS)}")
    chosen = wanted(args.ops, args.case)
    if not chosen:
        known = ", ".join(f"{op} {case.name}" for op, case in wanted(args.ops, ""))
        parser.error(
            f"no case of {', '.join(args.ops or OURS)} in float32 has {args.case!r} in its name; there are {known}"
        )
    described = environment()
    described["timing"] = "wall clock; one turn each in every round, ratios within a round: quartiles"
    described["load_average"] = round(load_average, 2)
    path = None if folder is None else folder / str(described["device_slug"]) / "in_turns.json"
    content: dict = {"runs": {}, "turns": [], "absent": {}} if path is None else load(path)
    run = str(max((int(n) for n in content["runs"]), default=0) + 1)
    content["runs"][run] = described
    for op, of in tqdm(chosen, desc="cases", unit="case"):
        rows, absent = measure(op, of, args.seconds)
        tqdm.write(table(op, of.name, rows, absent, load_average))
        content["turns"] = [r for r in content["turns"] if (r["op"], r["case"]) != (op, of.name)]
        about = {"op": op, "case": of.name, "run": run, "commit": measured_by()["commit"]}
        content["turns"] += [about | {"provider": name, **row} for name, row in rows.items()]
        content["absent"][op] = absent
        if path is not None:
            save(path, content)
    print("not saved (--save, --out FOLDER)" if path is None else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
