#!/usr/bin/env python3
"""What has run on a GPU and what has not, row by row: writes docs/gpu-rows.md from benchmarks/cases.py and the results.

python scripts/gpu_rows.py [output]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import cases  # noqa: E402
from benchmarks.cases import CASES, FIRST, Case  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu-rows.md"
NOT_RUN = "not yet run on a GPU"
#: Where the parts of a benchmark lie that scripts/gpu.py writes beside its rows, under a device's folder.
BESIDE = {
    "every form of cp_linear at each of its shapes": "cp_linear_forms.json",
    "bytes that the memory moved, by ncu: cp_linear": "ncu/cp_linear.json",
    "bytes that the memory moved, by ncu: cp_update": "ncu/cp_update.json",
    "bytes that the memory moved, by ncu: adapter": "ncu/adapter.json",
    "errors of the losses against float64": "numerics/numerics.md",
    "tests, sanitizers and their verdicts": "gpu.json",
}
HEAD = """\
# What has run on a GPU, row by row

Written by `python scripts/gpu_rows.py`. Each row of the benchmark on a GPU (`benchmarks/cases.py`), the bytes and FLOPs that
its floor is made of, and the file and commit of ours if it has been timed. "Earlier kernels" are readings in a folder of a run
whose code was changed since (its README names it): they say nothing of what stands in `kernels/` and `csrc/` now. "Run" names
the commit that was timed: since 662a284 all of adapter's kernels have changed, and the losses'. "First": what `scripts/gpu.py
--budget` times before all else. `make gpu` writes every file that is missing here.
"""


def results() -> dict[tuple[str, str, str, str], tuple[str, str, bool]]:
    """(op, case, dtype, direction) -> (file, commit, whether the kernels are earlier ones) of rows of ours that were timed."""
    found: dict[tuple[str, str, str, str], tuple[str, str, bool]] = {}
    for path in sorted(RESULTS.glob("nvidia-*/**/*.json"), key=lambda p: (-len(p.parts), str(p))):
        data = json.loads(path.read_text())
        commit = data.get("environment", {}).get("commit", "") if isinstance(data, dict) else ""
        for row in data["rows"] if commit and "rows" in data else ():
            if row.get("provider", "").startswith("fastgist") and "median_s" in row:
                earlier = path.parent.parent.parent == RESULTS
                key = row["op"], row["case"], row["dtype"], row["direction"]
                found[key] = str(path.relative_to(ROOT)), commit[:7], earlier
    return found


def status(op: str, case: Case, direction: str, known: dict) -> str:
    dtype = str(case.dtype).removeprefix("torch.")
    row = known.get((op, case.name, dtype, direction))
    if row is None:
        return NOT_RUN
    file, commit, earlier = row
    place = f"[{commit}](../{file})"
    return f"{NOT_RUN} (earlier kernels: {place})" if earlier else f"run: {place}"


def _floor(op: str, case: Case, direction: str) -> str:
    if op not in cases._COSTS:
        return ""
    moved, flops = cases.costs(op, case, direction)
    return f"{moved / 1e6:.4g} MB" + (f", {flops / 1e9:.4g} GFLOP" if flops else "")


def _table(op: str, known: dict) -> Iterator[str]:
    yield "| case | dtype | | floor of | first | |"
    yield "|---|---|---|---|---|---|"
    names = FIRST.get(op, ((), ()))[0]
    for case in CASES[op, "cuda"]:
        for direction in cases.directions(op, "cuda", case):
            dtype = str(case.dtype).removeprefix("torch.")
            cells = [case.name, dtype, direction, _floor(op, case, direction)]
            first = case.name in names and case.dtype.itemsize == 2 and "scaled" not in direction
            cells += ["first" if first else "", status(op, case, direction, known)]
            yield "| " + " | ".join(cells) + " |"


def page() -> str:
    known = results()
    lines = [HEAD]
    for op in (op for op, kind in CASES if kind == "cuda"):
        lines += [f"## {op}", "", *_table(op, known), ""]
    lines += ["## Beside the rows", "", "| what | file | |", "|---|---|---|"]
    for what, file in BESIDE.items():
        paths = [p.relative_to(ROOT) for p in sorted(RESULTS.glob(f"nvidia-*/{file}"))]
        done = ", ".join(f"[{p.parts[2]}](../{p})" for p in paths)
        lines.append(f"| {what} | `benchmarks/results/<gpu>/{file}` | {f'run: {done}' if done else NOT_RUN} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    path = Path(argv[0]) if argv else PAGE
    path.write_text(page())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
