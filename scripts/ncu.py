#!/usr/bin/env python3
"""DRAM bytes of operations by Nsight Compute beside those that must move and those that the launches name.

    python scripts/ncu.py --op adapter --out results/ncu/adapter.json

Each case and direction of benchmarks/cases.py runs once in a process of its own under ``ncu --metrics dram__bytes.sum``, after
a warm call; between the kernels of the step the caches stay as they are. ``bytes`` is what the operation must at least move
(benchmarks/cases.py), ``launched_bytes`` the tensors that its launches take (benchmarks/launches.py). Without ncu: one line
and code 2. GPU counters may be kept for administrators; ncu then says ERR_NVGPUCTRPERM, and so does this.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METRIC = "dram__bytes.sum"
OPS = ("cp_linear", "cp_update", "adapter")
PROVIDER = "fastgist triton"
_UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def find() -> str | None:
    """Nsight Compute's command line, or None."""
    usual = Path("/usr/local/cuda/bin/ncu")
    return shutil.which("ncu") or (str(usual) if usual.exists() else None)


def parse(text: str) -> list[tuple[str, float]]:
    """(kernel, DRAM bytes) of each launch, in order, from what ``ncu --csv`` printed: lines of its own and the program's, then
    a header and a line for each kernel and metric.

    Raises:
        ValueError: no such lines (nothing was profiled), or a unit that is not of bytes.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        said = [line for line in lines if line.startswith("==ERROR==")] or lines[-1:] or ["nothing"]
        raise ValueError(f"ncu profiled nothing: {said[0]}")
    found = []
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        if row["Metric Name"] != METRIC:
            continue
        if row["Metric Unit"] not in _UNITS:
            raise ValueError(f"ncu: {METRIC} in {row['Metric Unit']!r}, expected one of {', '.join(_UNITS)}")
        value = float(row["Metric Value"].replace(",", ""))
        found.append((row["Kernel Name"].split("(")[0], value * _UNITS[row["Metric Unit"]]))
    return found


def one_step(op: str, index: int, direction: str) -> None:
    """What ncu watches: the case's step between the profiler's start and stop."""
    import torch

    from benchmarks import harness
    from benchmarks.cases import CASES
    from benchmarks.peers import PEERS

    problem = harness.make_problem(op, CASES[op, "cuda"][index], torch.device("cuda"))
    step = harness.make_step(problem, PEERS[op][PROVIDER](harness.given(problem, problem.tensors)), direction)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def launched(op: str, index: int, direction: str) -> int:
    """Bytes of the tensors that the step's launches take, counted without a device."""
    import torch

    from benchmarks import harness
    from benchmarks.cases import CASES
    from benchmarks.launches import Ledger, on_a_card
    from benchmarks.peers import PEERS

    problem = harness.make_problem(op, CASES[op, "cuda"][index], torch.device("cpu"))
    with on_a_card():
        with Ledger(forms_only=True):
            provider = PEERS[op][PROVIDER](harness.given(problem, problem.tensors))
            step = harness.make_step(problem, provider, direction)
        with Ledger(forms_only=True) as ledger:
            step()
    return ledger.total.bytes


def measure(binary: str, op: str, index: int, direction: str, seconds: float) -> dict[str, object]:
    """One row."""
    from benchmarks.cases import CASES, costs

    case = CASES[op, "cuda"][index]
    row: dict[str, object] = {"op": op, "case": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
    row |= {"direction": direction, "provider": PROVIDER, "bytes": costs(op, case, direction)[0]}
    options = ["--metrics", METRIC, "--csv", "--print-units", "base", "--profile-from-start", "off"]
    options += ["--cache-control", "none", "--clock-control", "none", "--target-processes", "all"]
    step = [sys.executable, __file__, "--op", op, "--step", str(index), direction]
    try:
        done = subprocess.run(
            [binary, *options, *step], cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds
        )
        kernels = parse(done.stdout)
    except (ValueError, subprocess.TimeoutExpired) as e:
        return row | {"error": str(e)}
    row["launched_bytes"] = launched(op, index, direction)
    row["dram_bytes"] = sum(moved for _, moved in kernels)
    row["kernels"] = kernels
    return row


def line(row: dict) -> str:
    what = f"{row['op']} {row['case']} {row['direction']}"
    if "error" in row:
        return f"{what}: {row['error']}"
    least, by_launch, moved = (row[name] / 1e6 for name in ("bytes", "launched_bytes", "dram_bytes"))
    return (
        f"{what}: must move {least:.1f} MB, launches name {by_launch:.1f}, DRAM {moved:.1f} "
        f"({moved / least:.2f} x) in {len(row['kernels'])} kernels"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", required=True, choices=OPS)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--step", nargs=2, metavar=("CASE", "DIRECTION"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    if args.step:
        one_step(args.op, int(args.step[0]), args.step[1])
        return 0
    binary = find()
    if binary is None:
        print("ncu.py: Nsight Compute (ncu) is not installed here", file=sys.stderr)
        return 2
    from benchmarks.cases import CASES, directions

    ends, rows = time.monotonic() + 60 * args.minutes, []
    for index, case in enumerate(CASES[args.op, "cuda"]):
        for direction in directions(args.op, "cuda", case):
            left = ends - time.monotonic()
            if left > 15:
                rows.append(measure(binary, args.op, index, direction, left))
                print(line(rows[-1]), flush=True)
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps({"metric": METRIC, "rows": rows}, indent=1) + "\n")
    return int(not rows or all("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
