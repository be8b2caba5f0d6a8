#!/usr/bin/env python3
"""Errors of the losses and their gradients against float64, by dtype, distance, gap, offset, temperature and classes.

    python scripts/numerics.py                  docs/numerics.md and docs/numerics.svg (some minutes: peers are compiled)
    python scripts/numerics.py --no-compile     without torch.compile of the peers (seconds)
    FASTGIST_DEVICE=cuda python scripts/numerics.py --out results     the same on a GPU

Each table changes one thing about the same problem. What is true is the formula in float64, of the inputs as rounded to
their dtype; the gradients' error is the largest of any element over the largest gradient.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import peers  # noqa: E402
from fastgist import backends, functional  # noqa: E402
from fastgist.reference.bidirectional_kl import bidirectional_kl as kl_formula  # noqa: E402
from fastgist.reference.gist_loss import gist_loss as gist_formula  # noqa: E402

DEVICE = torch.device(os.environ.get("FASTGIST_DEVICE", "cpu"))
FORMULAS = {"bidirectional_kl": kl_formula, "gist_loss": gist_formula}
PEERS = {"authors": peers.authors_kl, "log_softmax": peers.log_softmax_kl, "analytic": peers.analytic_kl}
HALVES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """Two heads' logits of M rows: normal, ``spread`` wide, the second one at ``distance`` from the first."""

    dtype: str = "float32"
    temperature: float = 3.0
    classes: int = 1000
    rows: int = 64
    spread: float = 3.0
    distance: float | None = None  # None: independent of the first
    gap: float = 0.0  # added to one class of the first head and to another of the second
    offset: float = 0.0  # added to all of the second head

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def randn() -> Tensor:
            return torch.randn(self.rows, self.classes, generator=generator, dtype=torch.float64)

        z = self.spread * randn()
        other = self.spread * randn() if self.distance is None else z + self.distance * randn()
        z[:, 0] += self.gap
        other[:, -1] += self.gap
        target = torch.randint(self.classes, (self.rows,), generator=generator)
        dtype = HALVES[self.dtype]
        return z.to(DEVICE, dtype), (other + self.offset).to(DEVICE, dtype), target.to(DEVICE)


@dataclass(frozen=True)
class Table:
    title: str
    head: str
    problems: dict[str, Problem]
    about: str = ""
    drawn: bool = True  # in the figure, which has room for seven


BASE = Problem()


def _vary(name: str, values: tuple, base: Problem = BASE) -> dict[str, Problem]:
    return {f"{v:g}" if isinstance(v, float) else f"{v:,}": replace(base, **{name: v}) for v in values}


HALF = replace(BASE, dtype="float16", temperature=0.5)
NEAR = replace(BASE, distance=1e-2)
LONG = replace(BASE, rows=8)

TABLES = (
    Table("By dtype", "dtype", {name: replace(BASE, dtype=name) for name in HALVES}),
    Table(
        "Two heads that nearly agree",
        "distance",
        _vary("distance", (1.0, 1e-1, 1e-2, 1e-3, 0.0)),
        "The second head is the first plus this much noise; the divergence falls with its square. At 0 it is 0, and what is "
        "written is the result itself.",
    ),
    Table(
        "A gap between the heads",
        "gap",
        _vary("gap", (10.0, 100.0, 320.0, 1e3, 1e4)),
        "One class is this much above the others, another one in each head.",
    ),
    Table(
        "The same at 32,000 classes",
        "gap",
        _vary("gap", (100.0, 1e3, 1e4), replace(LONG, classes=32000)),
        "8 rows, which are read in blocks and parts.",
        drawn=False,
    ),
    Table("The same in float16, T = 0.5", "gap", _vary("gap", (10.0, 320.0, 6e4), HALF)),
    Table(
        "An offset of one head",
        "offset",
        _vary("offset", (0.0, 1.0, 100.0, 1e4), NEAR),
        "A constant added to all of the second head's logits, which changes no probability; heads at distance 0.01. (The "
        "inputs are rounded after it is added: what is true is the formula of the rounded ones.)",
    ),
    Table("By temperature", "T", _vary("temperature", (0.5, 1.0, 3.0, 10.0))),
    Table("By classes", "V", _vary("classes", (2, 100, 1000)) | _vary("classes", (32000, 128256), LONG)),
)


def providers(op: str, compile_peers: bool) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """(name, loss of (z, other, [target,] temperature)): what fastgist has here, and each peer."""
    probe = torch.empty(1, device=DEVICE)
    for impl in backends.IMPLEMENTATIONS[1:]:
        try:
            backends.resolve(op, impl, probe)
        except RuntimeError:
            continue
        function = getattr(functional, op)
        yield f"fastgist {impl}", lambda *args, f=function, i=impl: f(*args[:-1], temperature=args[-1], impl=i)
    for name, form in PEERS.items():
        form = form if op == "bidirectional_kl" else peers.gist(form)
        yield name, form
        if compile_peers:
            yield f"{name}, compiled", torch.compile(form, dynamic=False)


@dataclass(frozen=True)
class Error:
    """Of a loss: relative, or the loss itself where the true one is 0; of its gradients: over the largest. NaN where one is
    not finite and should be."""

    loss: float
    gradient: float


def error(op: str, problem: Problem, loss: Callable[..., Tensor]) -> Error:
    z, other, target = problem.tensors()
    rest = (target,) if op == "gist_loss" else ()
    wide = [x.double().requires_grad_() for x in (z, other)]
    true = FORMULAS[op](*wide, *rest, temperature=problem.temperature)
    true_grads = torch.autograd.grad(true, wide)
    leaves = [x.clone().requires_grad_() for x in (z, other)]
    found = loss(*leaves, *rest, problem.temperature)
    grads = torch.autograd.grad(found, leaves)
    true_value = float(true.detach())
    off = abs(float(found.detach().double()) - true_value)
    largest = max(float(g.abs().max()) for g in true_grads)
    gradient = max(float((g.double() - t).abs().max()) for g, t in zip(grads, true_grads, strict=True))
    if not all(bool(g.isfinite().all()) for g in grads):
        gradient = float("nan")
    return Error(off / true_value if true_value else off, gradient / largest if largest else gradient)


Findings = dict[tuple[str, str, str], dict[str, Error]]  # (op, table's title, row) -> provider -> error


def measure(compile_peers: bool, progress: bool) -> Findings:
    from tqdm import tqdm

    jobs = [
        (op, table.title, row, problem, name, loss)
        for op in FORMULAS
        for name, loss in providers(op, compile_peers)
        for table in TABLES
        for row, problem in table.problems.items()
    ]
    found: Findings = {}
    for op, title, row, problem, name, loss in tqdm(jobs, desc="errors", unit="case", disable=not progress):
        torch._dynamo.reset()  # each case is compiled by itself: none meets another's shapes
        found.setdefault((op, title, row), {})[name] = error(op, problem, loss)
    return found


def _said(value: float) -> str:
    if not math.isfinite(value):
        return f"**{'NaN' if math.isnan(value) else 'inf'}**"
    return f"{value:.0e}" if value > 1e-20 else "0"


def _where() -> str:
    if DEVICE.type == "cuda":
        return f"Measured on one {torch.cuda.get_device_name()}"
    interpreted = "; fastgist triton is interpreted" if backends.interpreting() else ""
    return f"Measured on a CPU ({torch.backends.cpu.get_cpu_capability()}){interpreted}; not on a GPU"


def document(found: Findings) -> str:
    names = {op: list(next(v for (o, *_), v in found.items() if o == op)) for op in FORMULAS}
    made = " ".join(__doc__.split("\n\n")[-1].split())
    lines = [
        "# Errors against float64",
        "",
        f"Written by `TRITON_INTERPRET=1 python scripts/numerics.py`. {made}",
        "",
        f"Unless a table says otherwise: float32, T = {BASE.temperature:g}, {BASE.rows} rows of {BASE.classes:,} classes,",
        f"both heads normal with a spread of {BASE.spread:g} and independent, the mean over the rows. Each cell: error of the",
        "loss / of the gradients. A number is 6e-8 of itself away from its neighbour in float32, 4e-3 in bfloat16, 5e-4 in",
        "float16: the gradients of the last two cannot be nearer than half of that.",
        "",
        "authors: softmax, log and `kl_div` both ways; log_softmax: `kl_div` of log-probabilities; analytic: the sum of",
        "(p - q)(u - v) with gradients by formula (benchmarks/peers.py). Liger and flash-linear-attention compute other",
        "functions (a Jensen-Shannon divergence; one side's gradient): they are in the benchmarks, not here.",
        "",
        f"{_where()}, torch {torch.__version__}.",
        "",
        "![Gradient errors of the divergence](numerics.svg)",
    ]
    for op in FORMULAS:
        lines += ["", f"## {op}"]
        for table in TABLES:
            lines += ["", f"**{table.title}.** {table.about}".strip(), ""]
            lines += [f"| {table.head} | " + " | ".join(names[op]) + " |", "|---" * (len(names[op]) + 1) + "|"]
            for row in table.problems:
                errors = found[op, table.title, row]
                cells = (f"{_said(errors[n].loss)} / {_said(errors[n].gradient)}" for n in names[op])
                lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(found: Findings, out: Path) -> None:
    """Gradient errors of bidirectional_kl, a panel a table; what is not finite stands on the line at the top."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastgist", "font.size": 8}):
        drawing = Figure(figsize=(11, 6), layout="constrained")
        panels = list(drawing.subplots(2, 4).flat)
        for axes, table in zip(panels, (t for t in TABLES if t.drawn), strict=False):
            rows = list(table.problems)
            of_row = [found["bidirectional_kl", table.title, row] for row in rows]
            names = [name for name in of_row[0] if "compiled" not in name]
            for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
                values = [errors[name].gradient for errors in of_row]
                drawn = [max(v, LEAST) if math.isfinite(v) else MOST for v in values]
                axes.plot(rows, drawn, color=colour, marker=marker, markersize=5, linewidth=1, label=name, alpha=0.85)
            axes.axhline(MOST, color="#bbbbbb", linewidth=0.8, linestyle=":")
            axes.set_yscale("log")
            axes.set_ylim(LEAST / 3, 3 * MOST)
            axes.set_title(table.title, loc="left")
            axes.set_xlabel(table.head)
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1].axis("off")
        panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
        title = "Largest error of a gradient over the largest gradient, against float64; dotted line: not finite"
        drawing.suptitle(title, fontsize=9)
        drawing.savefig(out, format="svg", metadata={"Date": None})


LEAST, MOST = 1e-9, 10.0
# Okabe and Ito's colours, told apart in every common form of colour blindness; shapes differ as well.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#666666")
MARKERS = ("o", "s", "x", "^", "D", "v")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of numerics.md and numerics.svg")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the peers out")
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    found = measure(not args.no_compile, not args.no_progress)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "numerics.md").write_text(document(found))
    figure(found, args.out / "numerics.svg")
    print(args.out / "numerics.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
