#!/usr/bin/env python3
"""Measures on this CPU the two forms of cp_linear's products: merged (W + s V' U^T, then one product) and factored.

    python scripts/cp_linear_forms.py                       all sizes, some ten minutes of one core
    python scripts/cp_linear_forms.py --only benchmark      the benchmark's cases alone

Writes benchmarks/results/<device>/cp_linear_forms.json: what :func:`fastgist.reference.cp_linear.merge_pays` was chosen
by, what docs/crossovers.md draws and what tests/test_cp_linear_plan.py holds the choice against. One thread, its own
processor time, so that waiting for a core that others use does not count. The forms take turns, so that what else the machine
does to caches and memory meets both: the ratio within a round is what counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import turns  # noqa: E402
from benchmarks.turns import take_turns  # noqa: E402

#: (N, K) of the square grid and of layers that are not square (a Transformer's two MLP layers).
WIDTHS = ((256, 256), (768, 768), (2048, 2048), (3072, 768), (768, 3072))
RANKS = (4, 16, 64, 256)
#: M over the width that is summed over (K forward, N for dx), and where products of the widest would take too long.
SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)
MOST_ROWS = 6144
#: What is computed: y and h = x U (training), y alone (evaluation), dx and the factors' gradients, dx alone.
DIRECTIONS = ("fwd", "fwd_alone", "bwd", "dx_alone")
FORMS = ("merged", "factored")


def forms(direction: str, m: int, n: int, k: int, r: int) -> dict[str, Callable[[], object]]:
    """A call of the reference's forward or backward in each form."""
    from fastgist.reference import cp_linear as reference

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * spread

    x, grad = randn(m, k), randn(m, n)
    weight, u, v, gain = randn(n, k, spread=k**-0.5), randn(k, r, spread=k**-0.5), randn(n, r), randn(1, r)
    bias, h = randn(n), x @ u

    def call() -> object:
        if direction in ("fwd", "fwd_alone"):
            return reference.forward(x, [weight], [bias], u, v, gain, None, 1.0, 0.0, direction == "fwd")
        rest = direction == "bwd"
        return reference.backward([grad], x, [weight], u, v, gain, None, h, 1, 1.0, 0.0, True, rest, rest, rest)

    return {name: forced(name, call) for name in FORMS}


def forced(form: str, call: Callable[[], object]) -> Callable[[], object]:
    """``call`` with every product of cp_linear in that form."""
    from fastgist.reference import cp_linear as reference

    def run() -> object:
        chosen, reference.merge_pays = reference.merge_pays, lambda *sizes: form == "merged"
        try:
            return call()
        finally:
            reference.merge_pays = chosen

    return run


def benchmark_forms(case) -> dict[str, Callable[[], object]]:
    """Forward and backward of a benchmark case: the operation in each form, and the eager forms it is compared with."""
    from benchmarks import harness
    from benchmarks.peers import PEERS

    problem = harness.make_problem("cp_linear", case, torch.device("cpu"))
    providers = {"merged": "fastgist reference", "factored": "fastgist reference"}
    providers |= {"eager factored": "factored", "eager dense": "dense delta"}

    def step(name: str) -> Callable[[], object]:
        run = harness.make_step(problem, PEERS["cp_linear"][providers[name]](problem.tensors), "fwd_bwd")
        return forced(name, run) if name in FORMS else run

    return {name: step(name) for name in providers}


def summary(times: dict[str, list[float]], base: str = "merged") -> dict[str, object]:
    """Medians, and of every other form the ratios to ``base`` of the same round: median and quartiles."""
    each = turns.summary(times, base)
    return {
        "rounds": len(times[base]),
        "seconds": {name: row["median_s"] for name, row in each.items()},
        "over_merged": {name: row["over_base"] for name, row in each.items() if name != base},
    }


def sizes() -> Iterator[tuple[str, int, int, int, int]]:
    """(direction, M, N, K, R) of the grid."""
    for n, k in WIDTHS:
        for direction in DIRECTIONS:
            inner = k if direction.startswith("fwd") else n
            square = n == k
            for r in RANKS if square else (16,):
                for share in SHARES if square else (0.5, 1.0, 2.0):
                    if share * inner <= MOST_ROWS:
                        yield direction, round(share * inner), n, k, r


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.8, help="time for each size (default 0.8)")
    parser.add_argument("--only", choices=("grid", "benchmark"), help="one of the two parts")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of results")
    args = parser.parse_args(argv)
    from tqdm import tqdm

    from benchmarks.cases import square
    from benchmarks.conftest import environment  # it also asks malloc to keep what is freed

    torch.set_num_threads(1)
    described = environment()
    path = args.out / str(described["device_slug"]) / "cp_linear_forms.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    described["timing"] = "processor time of the one thread, medians; forms in turn, ratios within a round"
    found = {"environment": described, "grid": kept.get("grid", []), "benchmark": kept.get("benchmark", [])}
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.only != "grid":
        found["benchmark"] = [
            {"case": case.name, **dict(case.sizes)} | summary(take_turns(benchmark_forms(case), 5 * args.seconds))
            for case in tqdm(square("cpu"), desc="cases", unit="case")
        ]
        path.write_text(json.dumps(found, indent=1) + "\n")
    if args.only != "benchmark":
        found["grid"] = rows = []
        for direction, m, n, k, r in tqdm(list(sizes()), desc="sizes", unit="size"):
            times = take_turns(forms(direction, m, n, k, r), args.seconds)
            rows.append({"direction": direction, "M": m, "N": n, "K": k, "R": r} | summary(times))
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
