#!/usr/bin/env python3
"""Ours and all peers of a case, one call each in turns, on this CPU: what differs by a tenth shows nowhere else.

    python -m benchmarks.in_turns                                    the cases that have goals, some ten minutes
    python -m benchmarks.in_turns cp_linear -k M3152_d768_R32        one of an operation's cases

bench_*.py times a provider for a while and then the next; on a shared machine the minutes differ by more than the
providers. Here all take turns in every round, in an order drawn for it, and a ratio is the median of the rounds' ratios. Each
result is held against the formula first. Prints a table, with the goals (DESIGN.md) and whether they are met, and writes
benchmarks/results/<device>/in_turns.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import harness  # noqa: E402
from benchmarks.cases import CASES  # noqa: E402
from benchmarks.peers import OTHER_FUNCTION, PEERS, Missing  # noqa: E402
from benchmarks.turns import summary, take_turns  # noqa: E402

FLOOR = "floor"  # the copies, or the matrix products alone
SCALED = "ours, incoming gradient of 2"
#: What is timed as ours; of cp_linear that is what "auto" makes of a CPU.
OURS = {"bidirectional_kl": "fastgist native", "gist_loss": "fastgist native", "adapter": "fastgist native"} | {
    "cp_update": "fastgist native",
    "cp_linear": "fastgist auto",
}
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
    ("bidirectional_kl", "M512_V1000"): {FLOOR: 4.0, SCALED: 1.6},
    ("bidirectional_kl", "M256_V32000"): {FLOOR: 2.5, SCALED: 1.6},
    ("gist_loss", "M512_V1000"): {FLOOR: 6.0, SCALED: 1.6},
    ("gist_loss", "M256_V32000"): {FLOOR: 3.5, SCALED: 1.6},
    ("cp_linear", "M3152_d768_R32"): {FLOOR: 1.12},
    **{("adapter", f"M3152_d768_H{h}"): {FLOOR: 1.2} for h in (8, 64)},
}


def calls(op: str, case) -> tuple[dict[str, Callable[[], object]], str]:
    """What takes turns, and what the floor is. Peers that are not here are left out; without ours, and where its result is
    wrong, there is nothing to time: RuntimeError."""
    problem = harness.make_problem(op, case, torch.device("cpu"))
    found: dict[str, Callable[[], object]] = {}
    for name, build in PEERS[op].items():
        if name.startswith("fastgist") and name != OURS[op]:
            continue
        try:
            call = build(harness.given(problem, problem.tensors))
        except Missing as e:
            if name == OURS[op]:
                raise RuntimeError(f"{op} {case.id}: {name}: {e}") from e
            continue
        wrong = None if name in OTHER_FUNCTION else harness.parity(problem, call)
        if wrong and name == OURS[op]:
            raise RuntimeError(f"{op} {case.id}: {name}: {wrong}")
        found[name] = harness.make_step(problem, call, "fwd_bwd")
        if name == OURS[op] and op in ("bidirectional_kl", "gist_loss"):
            found[SCALED] = harness.make_step(problem, call, "fwd_bwd_scaled")
    found[FLOOR], what = harness.cpu_floor(problem)
    return found, what


def goals(op: str, case: str, rows: dict[str, dict]) -> dict[str, tuple[float, float, bool]]:
    """Name -> (the goal, the ratio found, whether it is met) of those that were timed. A ratio is another's time over ours;
    the floor's, and that of a gradient other than 1, is ours over it, or over ours."""
    found = {}
    for name, least in AT_LEAST.get((op, case), {}).items():
        if name in rows:
            ratio = rows[name]["over_base"][1]
            found[name] = least, ratio, ratio >= least
    for name, most in AT_MOST.get((op, case), {}).items():
        if name in rows:
            middle = rows[name]["over_base"][1]
            ratio = 1.0 / middle if name == FLOOR else middle
            found[name] = most, ratio, ratio <= most
    return found


def table(op: str, case: str, rows: dict[str, dict]) -> str:
    held = goals(op, case, rows)
    lines = [f"{op} {case}, {torch.get_num_threads()} threads, float32, forward and backward"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["median_s"]):
        low, middle, high = row["over_base"]
        goal = ""
        if name in held:
            wanted, ratio, met = held[name]
            bound = "at most" if name in AT_MOST.get((op, case), {}) else "at least"
            goal = f"  {ratio:.2f}, goal {bound} {wanted:g}: {'met' if met else 'MISSED'}"
        lines.append(
            f"  {name:32s} {row['median_s'] * 1e3:9.3f} ms  {middle:6.2f} of ours ({low:.2f} to {high:.2f}){goal}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "ops", nargs="*", choices=[*OURS, []], metavar="op", help=f"of {', '.join(OURS)} (default: all)"
    )
    parser.add_argument("-k", dest="case", help="a part of the case's name (default: the cases with goals)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each case (default 20)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of results")
    args = parser.parse_args(argv)
    from tqdm import tqdm

    from benchmarks.conftest import environment  # it also asks malloc to keep what is freed

    wanted = [
        (op, case)
        for op in args.ops or OURS
        for case in CASES[op, "cpu"]
        if case.dtype == torch.float32 and (args.case in case.name if args.case else (op, case.name) in AT_LEAST)
    ]
    if not wanted:
        parser.error(f"no case of {', '.join(args.ops or OURS)} in float32 has {args.case!r} in its name")
    described = environment()
    described["timing"] = "wall clock; one turn each in every round, ratios within a round: quartiles"
    path = args.out / str(described["device_slug"]) / "in_turns.json"
    kept = json.loads(path.read_text())["turns"] if path.exists() else []
    for op, case in tqdm(wanted, desc="cases", unit="case"):
        timed, what = calls(op, case)
        rows = summary(take_turns(timed, args.seconds, time.perf_counter, turn_seconds=0.008), OURS[op])
        tqdm.write(table(op, case.name, rows))
        kept = [r for r in kept if (r["op"], r["case"]) != (op, case.name)]
        kept += [{"op": op, "case": case.name, "floor": what, "provider": name, **row} for name, row in rows.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": described, "turns": kept}, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
