#!/usr/bin/env python3
"""Measures on this CPU what cp_linear and adapter save between forward and backward, against forming it again there.

    python scripts/saved_or_again.py                    both, some two minutes
    python scripts/saved_or_again.py --only adapter     one of them

cp_linear keeps h = x U (M, R), adapter z = D x + b (M, H). "saved" is what the operations do; "again" is a forward that is
asked for neither and a backward in front of which one product forms it. Forward and backward are those that users
get (impl="auto"), all gradients wanted, called without autograd. They take turns, so that what else the machine does meets
both: the ratio within a round is what counts. Writes benchmarks/results/<device>/saved_or_again.json, which
tests/test_saved_or_again.py holds the choice against, and, where the results are the committed ones, DESIGN.md's table of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.turns import summary, take_turns  # noqa: E402

#: (M, d, R) and (M, d, H).
SIZES = {
    "cp_linear": [(m, d, r) for m, d in ((3152, 768), (1024, 2048)) for r in (16, 32, 64)],
    "adapter": [(3152, 768, h) for h in (8, 64, 256)],
}
Call = Callable[[], tuple[Tensor, ...]]


def calls(op: str, m: int, d: int, width: int) -> tuple[dict[str, Call], int]:
    """("saved" and "again", each (y, gradients..), and the bytes that one keeps and the other does not."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, spread: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * spread

    x, grad = randn(m, d), randn(m, d)
    if op == "cp_linear":
        from fastgist.ops.cp_linear import _bwd_op, _fwd_op

        weight, bias = randn(d, d, spread=d**-0.5), randn(d, spread=0.1)
        u, v, gain = randn(d, width, spread=d**-0.5), randn(d, width, spread=0.3), randn(1, width)

        def step(saved: bool) -> tuple[Tensor, ...]:
            (y,), h = _fwd_op(x, [weight], [bias], u, v, gain, None, 1.0, 0.0, saved, "auto")
            h = h if saved else x @ u
            needs = [True, True, True, True, False, False]
            found = _bwd_op([grad], x, [weight], u, v, gain, None, h, 1, 1.0, 0.0, needs, "auto")
            return y, found[0], *found[3:]

    else:
        from fastgist.ops.adapter import _bwd_op, _fwd_op

        down, down_bias = randn(width, d, spread=d**-0.5), randn(width, spread=0.1)
        up, up_bias = randn(d, width, spread=width**-0.5), randn(d, spread=0.1)

        def step(saved: bool) -> tuple[Tensor, ...]:
            none = (None,) * 4  # gate, the norm's two, seed
            options = ("gelu", 1.0, 1.0, None, 0.0, saved, True, "auto")
            y, z, _ = _fwd_op(x, down, down_bias, up, up_bias, x, None, *none, *options)
            z = z if saved else torch.addmm(down_bias, x, down.t())
            held = (grad, x, down, None, up, up_bias, None, z, None, None, None, None)
            needs = [*[True] * 5, *[False] * 3]
            found = _bwd_op(*held, "gelu", 1.0, 1.0, True, 0.0, needs, torch.float32, "auto")
            return y, *found[:5]

    return {"saved": lambda: step(True), "again": lambda: step(False)}, m * width * x.element_size()


def measure(op: str, sizes: tuple[int, int, int], seconds: float, clock: Callable[[], float]) -> dict[str, object]:
    """A row. The two have to agree first: RuntimeError."""
    m, d, width = sizes
    both, kept = calls(op, *sizes)
    for ours, other in zip(both["saved"](), both["again"](), strict=True):
        error = float((ours - other).norm() / ours.norm())
        if not error < 1e-5:
            raise RuntimeError(f"{op} {sizes}: saved and formed again differ by {error:.1e}")
    times = summary(take_turns(both, seconds, clock, turn_seconds=0.008), "saved")
    row: dict[str, object] = {"op": op, "M": m, "d": d, "R" if op == "cp_linear" else "H": width}
    row |= {"bytes": kept, "share_of_x": width / d}
    row |= {"seconds": {name: found["median_s"] for name, found in times.items()}}
    return row | {"again_over_saved": times["again"]["over_base"]}


def line(row: dict) -> str:
    low, middle, high = row["again_over_saved"]
    width = f"R = {row['R']}" if "R" in row else f"H = {row['H']}"
    saved, again = (1e3 * row["seconds"][name] for name in ("saved", "again"))
    return (
        f"| {row['op']} | {row['M']}, {row['d']}, {width} | {row['bytes'] / 2**20:.2f} MiB, {row['share_of_x']:.2f} of x | "
        f"{saved:.2f} | {again:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |"
    )


BEGIN, END = "<!-- scripts/saved_or_again.py writes this -->", "<!-- until here -->"


def block(record: dict, where: str) -> str:
    """What DESIGN.md says of a record, between its two marks."""
    environment, rows = record["environment"], record["turns"]
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"
    about = f"{environment['device']}, {threads}, float32, forward and backward, {environment['date']}"
    said = [f"{about} (`{where}`):"]
    if "provisional" in environment:
        said.append(f"`{where}` is provisional: {environment['provisional']}.")
    head = "| | M, d, width | kept | saved, ms | again, ms | again / saved (quartiles) |", "|---|---|---|---|---|---|"
    return "\n".join([BEGIN, *said, "", *head, *map(line, rows), END])


def into(text: str, written: str) -> str:
    start, end = text.index(BEGIN), text.index(END) + len(END)
    return text[:start] + written + text[end:]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="time for each size (default 12)")
    parser.add_argument("--only", choices=tuple(SIZES), help="one of the operations")
    parser.add_argument("--provisional", metavar="WHY", help="say in the file why it has to be read again")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of results")
    args = parser.parse_args(argv)
    from tqdm import tqdm

    from benchmarks.conftest import environment  # it also asks malloc to keep what is freed

    described = environment()
    described["timing"] = "wall clock; forward and backward without autograd, in turns: medians, ratios' quartiles"
    if args.provisional:
        described["provisional"] = args.provisional
    path = args.out / str(described["device_slug"]) / "saved_or_again.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text())["turns"] if path.exists() and args.only else []
    rows = [row for row in kept if row["op"] != args.only]
    sizes = [(op, s) for op in SIZES if args.only in (None, op) for s in SIZES[op]]
    for op, size in tqdm(sizes, desc="sizes", unit="size"):
        row = measure(op, size, args.seconds, time.perf_counter) | {"commit": described["commit"]}
        tqdm.write(line(row))
        rows.append(row)
        path.write_text(json.dumps({"environment": described, "turns": rows}, indent=1) + "\n")
    if path.is_relative_to(ROOT / "benchmarks" / "results"):
        design = ROOT / "DESIGN.md"
        written = block(json.loads(path.read_text()), path.relative_to(ROOT).as_posix())
        design.write_text(into(design.read_text(), written))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
