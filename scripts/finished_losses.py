#!/usr/bin/env python3
"""Measures on this CPU whether a loss's gradients should be finished in its forward or made in a backward that takes the
exponentials again, which keeps a few numbers a row in place of the gradients: what DESIGN.md says of every shape.

    python scripts/finished_losses.py [--op gist_loss] [--dtype bfloat16] [--seconds 5]

The C++ form, one thread, forward and backward through autograd: of the sum, whose gradients the forward finishes, and of the
row losses added up by torch, whose backward recomputes. They take turns, so that what else the machine does meets both; the
ratio within a round is what counts. Prints a line a shape and exits with 1 where recomputing was faster in most rounds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.harness import keep_freed_memory  # noqa: E402
from benchmarks.turns import summary, take_turns  # noqa: E402
from fastgist import functional  # noqa: E402

#: (rows, classes), from what fits a first-level cache to rows that fit none.
SHAPES = ((16, 16), (512, 100), (512, 1000), (4096, 1000), (64, 10_000), (256, 32_000), (64, 128_256), (8, 200_000))


def measure(op: str, dtype: torch.dtype, rows: int, classes: int, seconds: float) -> tuple[float, list[float]]:
    """Seconds of the finishing form, and the quartiles of the recomputing form's ratio to it."""
    pair = [torch.randn(rows, classes).mul_(3).to(dtype).requires_grad_() for _ in range(2)]
    rest = (torch.randint(classes, (rows,)),) if op == "gist_loss" else ()
    function = getattr(functional, op)
    calls = {
        "finished": lambda: torch.autograd.grad(function(*pair, *rest, reduction="sum", impl="native"), pair),
        "again": lambda: torch.autograd.grad(function(*pair, *rest, reduction="none", impl="native").sum(), pair),
    }
    found = summary(take_turns(calls, seconds, turn_seconds=0.01), "finished")
    return found["finished"]["median_s"], found["again"]["over_base"]  # type: ignore[return-value]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=("bidirectional_kl", "gist_loss"), default="bidirectional_kl")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each shape")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    lost = 0
    for rows, classes in SHAPES:
        took, ratios = measure(options.op, getattr(torch, options.dtype), rows, classes, options.seconds)
        low, middle, high = ratios
        print(
            f"({rows}, {classes}): finished {took * 1e3:.3f} ms; again {middle:.2f} times that ({low:.2f} to {high:.2f})",
            flush=True,
        )
        lost += middle < 1.0
    return min(lost, 1)


if __name__ == "__main__":
    sys.exit(main())
