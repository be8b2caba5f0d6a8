#!/usr/bin/env python3
"""The C++ losses' time by where their four tensors lie to each other: the smallest of many calls, forward with both gradients.

    python scripts/loss_offsets.py                    bidirectional_kl and gist_loss, (512, 1000), one thread
    python scripts/loss_offsets.py --threads 2 --rows 256 --classes 32000

A processor takes a load for one of what was just stored where the two addresses agree in their last twelve bits. Where an
allocator puts gradients some vectors behind the logits, modulo 4 KiB, each turn of a loop so waits for the one before.
csrc/cpu/pair_avx512.h says what is done against it, DESIGN.md has readings from before and after. Prints; writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastgist import backends  # noqa: E402

#: Bytes, modulo 4 KiB, at which logits, other logits and the two gradients begin.
OFFSETS = [
    (0, 1024, 2048, 3072), (0, 0, 0, 0), (0, 64, 128, 192), (0, 64, 64, 128), (0, 1024, 64, 1088), (0, 64, 256, 320),
    (192, 128, 64, 0), (16, 1040, 2064, 3088),
]  # fmt: skip
PAGE = 4096


def placed(rows: int, classes: int, offsets: tuple[int, ...]) -> list[Tensor]:
    """Four (rows, classes) float32 tensors at these offsets into pages, logits random."""
    pages = (rows * classes * 4 + PAGE - 1) // PAGE + 2
    memory = torch.empty((len(offsets) + 1) * pages * PAGE // 4)
    first = -memory.data_ptr() % PAGE
    starts = [(first + i * pages * PAGE + offset) // 4 for i, offset in enumerate(offsets)]
    tensors = [memory[s : s + rows * classes].view(rows, classes) for s in starts]
    for logits in tensors[:2]:
        logits.normal_()
    return tensors


def call_of(op: str, tensors: list[Tensor]) -> Callable[[], object]:
    z, o, *grads = tensors
    row_loss, loss = torch.empty(len(z)), torch.empty(())
    native = torch.ops.fastgist_native
    if op == "bidirectional_kl":
        return lambda: native.bidirectional_kl_fwd_bwd(z, o, None, None, 1.0, 1.0 / len(z), row_loss, loss, *grads)
    target = torch.randint(z.shape[1], (len(z),))
    numbers = 0.5, 0.75, 0.75, 0.75, 1.0, 0.0, -100
    return lambda: native.gist_loss_fwd_bwd(z, o, target, None, *numbers, 1.0 / len(z), row_loss, loss, *grads)


def smallest(call: Callable[[], object], seconds: float) -> float:
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each operation and placement")
    args = parser.parse_args(argv)
    obstacle = backends.available()["native"]
    if not obstacle.startswith("yes"):
        parser.error(f"there is nothing to time: {obstacle}")
    torch.set_num_threads(args.threads)
    vector = 8 * torch.ops.fastgist_native.vector_bytes()
    print(f"({args.rows}, {args.classes}) float32, {args.threads} threads, {vector}-bit vectors; microseconds")
    print(f"{'z, other, their gradients begin at':36s} bidirectional_kl   gist_loss, T = 1")
    for offsets in OFFSETS:
        tensors = placed(args.rows, args.classes, offsets)
        times = [smallest(call_of(op, tensors), args.seconds) for op in ("bidirectional_kl", "gist_loss")]
        print(f"{', '.join(map(str, offsets)):36s} {times[0] * 1e6:16.1f}   {times[1] * 1e6:16.1f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
