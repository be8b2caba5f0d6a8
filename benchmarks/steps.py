#!/usr/bin/env python3
"""Whole training steps of every provider and shape on one GPU, in minutes: ``python benchmarks/steps.py --out DIR``, and
``--op petal_step`` for PETAL's Q-Former.

What bench_train_step.py (bench_petal_step.py) measures row by row, with torch.compile's minute for each: here every compiled
row is a process of its own, all of them compile at once, and then, one at a time and with nothing else running, each takes
its times. Rows go to DIR/<device>/<op>.json as they come. Steps follow each other without waiting, as in training.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from benchmarks import floors, harness, petal_step, train_step  # noqa: E402
from benchmarks.cases import CASES, Case, case  # noqa: E402


@dataclass(frozen=True)
class Op:
    """steps: the module with the providers. everywhere: providers that are timed at every shape; the others where ``is_main``.
    small: the shape that stands for all of them on a CPU."""

    steps: Any
    everywhere: tuple[str, ...]
    is_main: Callable[[Case], bool]
    small: Case


_VIT: tuple[str, ...] = ("authors", "authors, autocast", "plain", "plain, compiled", "fastgist", "fastgist, compiled")
_VIT += ("fastgist without gist", "PEFT LoRA")
OPS = {
    "train_step": Op(
        train_step, _VIT, lambda c: (c["B"], c["D"]) == (256, 768), case(torch.bfloat16, B=4, S=32, D=64, L=2)
    ),
    "petal_step": Op(
        petal_step,
        petal_step.EVERYWHERE,
        petal_step.is_main,
        case(torch.bfloat16, B=2, T=5, R=8, D=64, K=48, N=17, L=2),
    ),
}
STEPS = 12  # timed, one after the other
REPLAYS = 20


def cases(op: str, device: str) -> list[Case]:
    return CASES[op, "cuda"] if device == "cuda" else [OPS[op].small]


def is_main(op: str, c: Case) -> bool:
    return OPS[op].is_main(c) or c is OPS[op].small


def plan(op: str, device: str, only: str = "", like: str = "") -> list[tuple[str, list[int]]]:
    """(provider, numbers of its cases) of each process: one a compiled row, one for all shapes of an eager provider. The main
    shape comes first. ``only`` and ``like`` are parts of a provider's and a case's name."""
    found = []
    shapes = cases(op, device)
    for provider in OPS[op].steps.PROVIDERS:
        mine = [
            i
            for i, c in enumerate(shapes)
            if like in f"{c.name}_" and (provider in OPS[op].everywhere or is_main(op, c))
        ]
        mine.sort(key=lambda i: not is_main(op, shapes[i]))
        if only in provider and mine:
            found += [(provider, [i]) for i in mine] if "compiled" in provider else [(provider, mine)]
    return sorted(found, key=lambda process: not is_main(op, shapes[process[1][0]]))


# -- one process -------------------------------------------------------------------------------------------------------


def child(op: str, provider: str, numbers: list[int], device: torch.device, shared: Path, name: str) -> None:
    """Compile, check, say so, and measure when it is one's turn."""
    steps, shapes = OPS[op].steps, cases(op, device.type)
    made: dict[int, Any] = {}
    if "compiled" not in provider and provider not in steps.OTHER_MODEL:
        for i in numbers:
            steps.parity(provider, shapes[i], device)  # remembered
        _release(device)
    if "compiled" in provider:
        for i in numbers:
            made[i] = steps.PROVIDERS[provider](shapes[i], device)
            for _ in range(3):
                made[i]()
            made[i].optimizer.zero_grad()
        _release(device)
    (shared / f"ready-{name}").touch()
    parent = os.getppid()
    while not (shared / f"turn-{name}").exists() and os.getppid() == parent:
        time.sleep(0.05)
    for i in numbers:
        step = made.pop(i, None) or steps.PROVIDERS[provider](shapes[i], device)
        row = measure(op, provider, shapes[i], step, device)
        unfinished = shared / f"unfinished-{name}"
        unfinished.write_text(json.dumps(row))
        unfinished.rename(shared / f"row-{name}-{i}.json")
        del step
        _release(device)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure(op: str, provider: str, c: Case, step: Any, device: torch.device) -> dict[str, object]:
    """One row. Parity comes first: of a wrong step of ours nothing is timed. What is compiled is the eager provider's code,
    whose parity stands for it (:func:`_with_parity`)."""
    steps = OPS[op].steps
    row: dict[str, object] = {"op": op, "case": c.name, "dtype": str(c.dtype).removeprefix("torch.")}
    row |= {"direction": "step", "provider": provider, **dict(c.sizes), "model": steps.describe(c)}
    if provider in steps.OTHER_MODEL:
        row["parity"] = "another model, there for its cost"
    elif "compiled" not in provider:
        row["parity"] = steps.parity(provider, c, device) or "within the budget"
        if row["parity"] != "within the budget" and provider.startswith("fastgist"):
            return row
    for _ in range(3):
        step()
    row["peak_bytes"] = harness.peak_bytes(step, device)
    row["model_bytes"] = torch.cuda.memory_allocated() if device.type == "cuda" else None
    row |= steps.cost_row(provider, c, device)
    times = _times(step, device)
    low, _, high = statistics.quantiles(times, n=4)
    row |= {"median_s": statistics.median(times), "min_s": min(times), "spread_s": high - low, "rounds": len(times)}
    row["images_per_s"] = c["B"] / statistics.median(times)
    if device.type == "cuda":
        row["kernels"], row["launches"] = steps.kernels(step)
        if "compiled" in provider or provider.startswith("fastgist"):
            row["graph_replay_s"] = harness.graph_replay(step, harness.Clock(device), REPLAYS)
    return row


def _times(step: Callable[[], object], device: torch.device) -> list[float]:
    if device.type != "cuda":
        return harness.sample(step, harness.Clock(device), 5)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


# -- all of them -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the results' folder (committed ones: benchmarks/results)")
    parser.add_argument("--op", default="train_step", choices=tuple(OPS))
    parser.add_argument("--only", default="", help="providers whose name contains this")
    parser.add_argument("--like", default="", help="shapes whose name contains this (R64_, say)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--compile-seconds", type=float, default=150, help="how long to wait for what compiles")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has and time only the others")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        provider, numbers, shared, name = args.child
        child(args.op, provider, json.loads(numbers), torch.device(args.device), Path(shared), name)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return _run(args, Path(folder))


def _run(args: argparse.Namespace, shared: Path) -> int:
    if args.out is not None:
        _environment()  # it measures the card's ceilings, while nothing else runs
        _release(torch.device(args.device))
    have = {(row["provider"], row["case"]) for row in _kept(args) if "median_s" in row}
    started = time.monotonic()
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "FASTGIST_BENCH_DEVICE": args.device}
    running: list[tuple[str, str, subprocess.Popen]] = []
    shapes = cases(args.op, args.device)
    for n, (provider, planned) in enumerate(plan(args.op, args.device, args.only, args.like)):
        numbers = [i for i in planned if (provider, shapes[i].name) not in have]
        if not numbers:
            continue
        command = [sys.executable, __file__, "--op", args.op, "--device", args.device]
        command += ["--child", provider, json.dumps(numbers), str(shared), str(n)]
        with (shared / f"log-{n}").open("w") as log:
            running.append((str(n), provider, subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)))
    while time.monotonic() < started + args.compile_seconds:
        if all((shared / f"ready-{name}").exists() or p.poll() is not None for name, _, p in running):
            break
        time.sleep(0.2)
    print(f"{len(running)} processes compiled what they had to in {time.monotonic() - started:.0f} s", flush=True)
    written, failed = 0, 0
    for name, provider, process in running:
        (shared / f"turn-{name}").touch()
        process.wait()
        if process.returncode:
            failed += 1
            print(f"{provider}: failed\n{(shared / f'log-{name}').read_text()[-1500:]}", file=sys.stderr)
        written = _save(args, shared, written)
    return int(failed > 0)


def _file(args: argparse.Namespace) -> Path:
    return args.out / str(_environment()["device_slug"]) / f"{args.op}.json"


def _kept(args: argparse.Namespace) -> list[dict]:
    """Rows of an earlier run, those of compiled steps without the verdict of an eager row that had not come yet."""
    if not args.resume or args.out is None or not _file(args).exists():
        return []
    rows = json.loads(_file(args).read_text())["rows"]
    return [{k: v for k, v in row.items() if k != "parity" or not v.startswith("not checked")} for row in rows]


@functools.cache
def _environment() -> dict[str, object]:
    from benchmarks.conftest import environment

    return environment() | {"timing": f"CUDA events around each of {STEPS} steps that follow each other, median"}


def _save(args: argparse.Namespace, shared: Path, written: int) -> int:
    """Print the rows behind the first ``written`` and write all of them; returns how many there are."""
    files = sorted(shared.glob("row-*.json"), key=lambda file: file.stat().st_mtime_ns)
    rows = [json.loads(file.read_text()) for file in files]
    for row in rows[written:]:
        print(_line(row), flush=True)
    if args.out is None or len(rows) == written:
        return len(rows)
    described, found = _environment(), len(rows)
    again = {(row["provider"], row["case"]) for row in rows}
    rows = [row for row in _kept(args) if (row["provider"], row["case"]) not in again] + rows
    for row in _with_parity(rows):
        if "median_s" in row and args.device == "cuda":
            rate = described["ceilings"][f"matmul_{row['dtype']}_flops_per_s"]  # type: ignore[index]
            floor = row["flops"] - row.get("update_flops", 0)  # of a Q-Former, the frozen one's
            row |= {"floor_s": floor / rate, "floor": "FLOPs / matmul rate"}
            row["ratio_to_floor"] = row["median_s"] / row["floor_s"]
        if "median_s" in row:
            of = next(c for c in cases(args.op, args.device) if c.name == row["case"])
            moved = OPS[args.op].steps.least_bytes(of)
            row |= floors.of_counts(moved, row["flops"], of.dtype, torch.device(args.device))
            row["ratio_to_roofline"] = row["median_s"] / row["roofline_s"]
    path = _file(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": described, "rows": rows}, indent=1) + "\n")
    return found


def _with_parity(rows: list[dict]) -> list[dict]:
    """Compiled rows get the verdict of the eager row of their model."""
    found = {(row["provider"], _model(row)): row["parity"] for row in rows if "parity" in row}
    for row in rows:
        if "parity" not in row:
            eager = row["provider"].replace(", compiled", "")
            row["parity"] = f"{found.get((eager, _model(row)), 'not checked')} (as {eager!r})"
    return rows


def _model(row: dict) -> str:
    return str(row["case"]).split("_", 1)[1]  # behind the batch


def _line(row: dict) -> str:
    if "median_s" not in row:
        return f"{row['provider']}, batch {row['B']}: not timed, {row['parity']}"
    replay = f", {1e3 * row['graph_replay_s']:.2f} as a graph" if row.get("graph_replay_s") else ""
    what = f"{row['model']}, batch {row['B']}: {row['provider']}"
    return (
        f"{what}: {1e3 * row['median_s']:.2f} ms{replay}, {row['peak_bytes'] / 2**30:.2f} GiB, "
        f"{row.get('launches')} launches; {row.get('parity', 'compiled')}"
    )


if __name__ == "__main__":
    sys.exit(main())
