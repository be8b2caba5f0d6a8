#!/usr/bin/env python3
"""Errors of the losses and their gradients against float64, by dtype, distance, gap, offset, temperature and classes.

    python scripts/numerics.py                  docs/numerics.md and docs/numerics.svg (some minutes: peers are compiled)
    python scripts/numerics.py --no-compile     without torch.compile of the peers (a minute)
    FASTGIST_DEVICE=cuda python scripts/numerics.py --out results     the same on a GPU

Each table changes one thing about the same problem. What is true is the formula in float64, of the inputs as rounded to
their dtype; the gradients' error is the largest of any element over the largest gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import peers  # noqa: E402
from fastgist import backends, functional  # noqa: E402
from fastgist.reference.bidirectional_kl import bidirectional_kl as kl_formula  # noqa: E402
from fastgist.reference.gist_linear_loss import gist_linear_loss as linear_formula  # noqa: E402
from fastgist.reference.gist_loss import gist_loss as gist_formula  # noqa: E402
from fastgist.reference.topk_kl import topk_kl as topk_formula  # noqa: E402

DEVICE = torch.device(os.environ.get("FASTGIST_DEVICE", "cpu"))
FORMULAS = {
    "bidirectional_kl": kl_formula,
    "gist_loss": gist_formula,
    "gist_linear_loss": linear_formula,
    "topk_kl": topk_formula,
}
PEERS = {"authors": peers.authors_kl, "log_softmax": peers.log_softmax_kl, "analytic": peers.analytic_kl}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
WIDTH = 64  # of gist_linear_loss's hidden states
KNOWN = 16  # classes of topk_kl's teacher


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

    def inputs(self, op: str) -> tuple[list[Tensor], list[Tensor | None]]:
        """What ``op`` differentiates, and what it takes beside it."""
        generator = torch.Generator().manual_seed(0)
        dtype = DTYPES[self.dtype]

        def randn(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

        def pair(columns: int, spread: float) -> tuple[Tensor, Tensor]:
            z = spread * randn(self.rows, columns)
            noise = randn(self.rows, columns)
            return z, spread * noise if self.distance is None else z + self.distance * noise

        z, other = pair(WIDTH, 1.0) if op == "gist_linear_loss" else pair(self.classes, self.spread)
        if op != "gist_linear_loss":
            z[:, 0] += self.gap
            other[:, -1] += self.gap
        target = torch.randint(self.classes, (self.rows,), generator=generator).to(DEVICE)
        first, second = z.to(DEVICE, dtype), (other + self.offset).to(DEVICE, dtype)
        if op == "bidirectional_kl":
            return [first, second], []
        if op == "gist_loss":
            return [first, second], [target]
        if op == "topk_kl":
            log_probs, indices = torch.log_softmax(second.double() / self.temperature, -1).topk(
                min(KNOWN, self.classes)
            )
            return [first], [log_probs.float(), indices]
        head = self.spread * randn(self.classes, WIDTH) / WIDTH**0.5
        return [first, second, head.to(DEVICE, dtype)], [None, target]


@dataclass(frozen=True)
class Table:
    title: str
    head: str
    problems: dict[str, Problem]
    about: str = ""
    ops: tuple[str, ...] = tuple(FORMULAS)
    compiled: bool = False  # of the divergence's peers too: where a compiler's roundings could matter


BASE = Problem()
OF_LOGITS = ("bidirectional_kl", "gist_loss")  # a head's product has no gap nor offset, a teacher of few classes no gap


def _vary(name: str, values: tuple, base: Problem = BASE) -> dict[str, Problem]:
    return {f"{v:g}" if isinstance(v, float) else f"{v:,}": replace(base, **{name: v}) for v in values}


HALF = replace(BASE, dtype="float16", temperature=0.5)
NEAR = replace(BASE, distance=1e-2)
LONG = replace(BASE, rows=8)
GAP = "One class is this much above the others, another one in each head."

TABLES = (
    Table("By dtype", "dtype", {name: replace(BASE, dtype=name) for name in DTYPES}, compiled=True),
    Table(
        "Two heads that nearly agree",
        "distance",
        _vary("distance", (1.0, 1e-1, 1e-2, 1e-3, 0.0)),
        "The second head (of gist_linear_loss: its hidden states; of topk_kl: the teacher's logits) is the first plus this "
        "much noise; the divergence falls with its square. At 0 it is 0, and what is written is the result itself.",
    ),
    Table(
        "A gap between the heads",
        "gap",
        _vary("gap", (10.0, 100.0, 320.0, 1e3, 1e4)),
        GAP,
        OF_LOGITS,
        compiled=True,
    ),
    Table(
        "A gap at 32,000 classes",
        "gap",
        _vary("gap", (100.0, 1e3, 1e4), replace(LONG, classes=32000)),
        "8 rows, which are read in blocks and parts.",
        OF_LOGITS,
    ),
    Table("A gap in float16, T = 0.5", "gap", _vary("gap", (10.0, 320.0, 6e4), HALF), "", OF_LOGITS, True),
    Table(
        "An offset of one head",
        "offset",
        _vary("offset", (0.0, 1.0, 100.0, 1e4), NEAR),
        "A constant added to all of the second head's logits, which changes no probability; heads at distance 0.01. (The "
        "inputs are rounded after it is added: what is true is the formula of the rounded ones.)",
        (*OF_LOGITS, "topk_kl"),
    ),
    Table("By temperature", "T", _vary("temperature", (0.5, 1.0, 3.0, 10.0))),
    Table("By classes", "V", _vary("classes", (2, 100, 1000)) | _vary("classes", (32000, 128256), LONG)),
)


def peers_of(op: str) -> dict[str, Callable[..., Tensor]]:
    """Losses of (inputs, temperature)."""
    if op == "topk_kl":
        return {"pooled log_softmax": _pooled}
    if op == "bidirectional_kl":
        return PEERS
    if op == "gist_loss":
        return {name: peers.gist(form) for name, form in PEERS.items()}
    return {name: _of_products(peers.gist(form)) for name, form in PEERS.items()}


def _pooled(z: Tensor, log_probs: Tensor, indices: Tensor, temperature: float) -> Tensor:
    return peers.pooled_kl(
        z.to(torch.promote_types(z.dtype, torch.float32)) * (peers.T / temperature), log_probs, indices
    )


def _of_products(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    linear = torch.nn.functional.linear
    return lambda h, g, weight, bias, target, t: loss(linear(h, weight, bias), linear(g, weight, bias), target, t)


def providers(op: str, compile_peers: bool) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """(name, loss of (inputs, temperature)): what fastgist has here, and each peer."""
    probe = torch.empty(1, device=DEVICE)
    for impl in backends.IMPLEMENTATIONS[1:]:
        try:
            backends.resolve(op, impl, probe)
        except RuntimeError:
            continue
        function = getattr(functional, op)
        yield f"fastgist {impl}", lambda *args, f=function, i=impl: f(*args[:-1], temperature=args[-1], impl=i)
    for name, form in peers_of(op).items():
        yield name, form
        if compile_peers and op == "bidirectional_kl":
            yield f"{name}, compiled", torch.compile(form, dynamic=False)


#: Peers that compute other functions, by the formula of each. Their own gradients are held against that formula's: Liger's KL
#: is taken both ways, each giving a gradient to the side that it measures; its JSD, and flash-linear-attention's teacher, give
#: the second head none.
def _jsd(z: Tensor, g: Tensor) -> Tensor:
    u, v = (torch.log_softmax(x / peers.T, -1) for x in (z, g))
    p, q = u.exp(), v.exp()
    m = ((p + q) / 2).log()
    return ((p * (u - m)).sum() + (q * (v - m)).sum()) / (2 * z.shape[0])


def _one_sided(z: Tensor, g: Tensor, temperature: float = peers.T) -> Tensor:
    u, v = (torch.log_softmax(x / temperature, -1) for x in (z, g))
    a, b = u.detach(), v.detach()
    return ((a.exp() * (a - v)).sum() + (b.exp() * (b - u)).sum()) / z.shape[0]


def _one_sided_heads(h: Tensor, g: Tensor, weight: Tensor, *_: object) -> Tensor:
    """At T = 1. The head is the student's in either direction and takes a gradient from both."""
    return _one_sided(h @ weight.T, g @ weight.T, 1.0)


OTHER_FUNCTIONS: dict[str, tuple[str, Callable, Callable[..., Tensor]]] = {
    "Liger KL": ("bidirectional_kl", peers._liger_kl, _one_sided),
    "Liger JSD": ("bidirectional_kl", peers._liger_jsd, _jsd),
    "Liger fused linear JSD": (
        "gist_linear_loss",
        peers._liger_linear_jsd,
        lambda h, g, w, *_: _jsd(h @ w.T, g.detach() @ w.detach().T),
    ),
    "flash-linear-attention KL": ("gist_linear_loss", peers._fla_linear_kl, _one_sided_heads),
}


def other_functions() -> dict[str, Error | str]:
    """Of each, its error in float32, or why there is none."""
    found: dict[str, Error | str] = {}
    for name, (op, make, formula) in OTHER_FUNCTIONS.items():
        try:
            loss = make({})
        except peers.Missing as missing:
            found[name] = f"not run: {missing} here"
            continue
        found[name] = error(op, BASE, lambda *args, f=loss: f(*args[:-1]), lambda *args, f=formula, **_: f(*args))
    return found


@dataclass(frozen=True)
class Error:
    """Of a loss: relative, or the loss itself where the true one is 0; of its gradients: over the largest. NaN where one is
    not finite and should be."""

    loss: float
    gradient: float


def error(
    op: str, problem: Problem, loss: Callable[..., Tensor], formula: Callable[..., Tensor] | None = None
) -> Error:
    """``formula``: what is true, if it is not the one of ``op``."""
    leaves, rest = problem.inputs(op)
    wide = [x.double().requires_grad_() for x in leaves]
    true = (formula or FORMULAS[op])(*wide, *rest, temperature=problem.temperature)
    true_grads = torch.autograd.grad(true, wide, allow_unused=True)
    leaves = [x.clone().requires_grad_() for x in leaves]
    found = loss(*leaves, *rest, problem.temperature)
    grads = torch.autograd.grad(found, leaves, allow_unused=True)
    true_value = float(true.detach())
    off = abs(float(found.detach().double()) - true_value)
    pairs = [(g.double(), t) for g, t in zip(grads, true_grads, strict=True) if g is not None and t is not None]
    of_each = [(float((g - t).abs().max()), float(t.abs().max())) for g, t in pairs]
    if op == "gist_linear_loss":  # the head's gradient and the hidden states' are of different sizes
        gradient = max(wrong / largest if largest else wrong for wrong, largest in of_each)
    else:
        largest = max(t for _, t in of_each)
        gradient = max(wrong for wrong, _ in of_each) / (largest or 1.0)
    if not all(bool(g.isfinite().all()) for g, _ in pairs):
        gradient = float("nan")
    return Error(off / true_value if true_value else off, gradient)


def served(op: str, problem: Problem, name: str) -> bool:
    """Whether that provider of ours takes the problem's dtype; peers take all."""
    if not name.startswith("fastgist "):
        return True
    try:
        backends.resolve(op, name.removeprefix("fastgist "), torch.empty(1, device=DEVICE, dtype=DTYPES[problem.dtype]))
    except RuntimeError:
        return False
    return True


Findings = dict[tuple[str, str, str], dict[str, Error]]  # (op, table's title, row) -> provider -> error


def measure(compile_peers: bool, progress: bool, keep: Path | None = None) -> Findings:
    """``keep``: a file of what was found, a line a case: it is read, added to, and what it holds is not measured again."""
    from tqdm import tqdm

    before = [json.loads(line) for line in keep.read_text().splitlines()] if keep and keep.exists() else []
    known = {(op, title, row, name): Error(*numbers) for op, title, row, name, *numbers in before}
    jobs = [
        (op, table.title, row, problem, name, loss)
        for op in FORMULAS
        for name, loss in providers(op, compile_peers)
        for table in TABLES
        if op in table.ops and (table.compiled or "compiled" not in name)
        for row, problem in table.problems.items()
        if served(op, problem, name)
    ]
    found: Findings = {}
    for op, title, row, problem, name, loss in tqdm(jobs, desc="errors", unit="case", disable=not progress):
        result = known.get((op, title, row, name))
        if result is None:
            torch._dynamo.reset()  # each case is compiled by itself: none meets another's shapes
            result = error(op, problem, loss)
            if keep:
                with keep.open("a") as file:
                    file.write(json.dumps([op, title, row, name, *astuple(result)]) + "\n")
        found.setdefault((op, title, row), {})[name] = result
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


SOURCES = ("csrc", "fastgist", "kernels", "benchmarks/peers.py", "scripts/numerics.py")


def _commit() -> str:
    """The last commit that changed what is measured, and whether files have changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    last = git("log", "-1", "--format=%h", "--", *SOURCES) or "unknown"
    return f"commit {last}" + (" and changes to it" if git("status", "--porcelain", "--", *SOURCES) else "")


def _cell(errors: dict[str, Error], name: str) -> str:
    return f"{_said(errors[name].loss)} / {_said(errors[name].gradient)}" if name in errors else "-"


def _about() -> str:
    return f"""\
Unless a table says otherwise: float32, T = {BASE.temperature:g}, {BASE.rows} rows of {BASE.classes:,} classes, both heads
normal with a spread of {BASE.spread:g} and independent, the mean over the rows. Each cell: error of the loss / of the
gradients (of gist_linear_loss: the largest among hidden states' and head's). A number is 6e-8 of itself away from its
neighbour in float32, 4e-3 in bfloat16, 5e-4 in float16: the gradients of the last two cannot be nearer than half of that.
gist_linear_loss has hidden states of {WIDTH} numbers, normal, and a head that gives logits of that spread; topk_kl a
teacher of whom {KNOWN} classes are known, in float32, both directions. `-`: not measured, or that dtype is not served.

authors: softmax, log and `kl_div` both ways; log_softmax: `kl_div` of log-probabilities; analytic: the sum of
(p - q)(u - v) with gradients by formula, always in float32; pooled log_softmax: the rest as a masked logsumexp
(benchmarks/peers.py).

**Where two heads nearly agree** the divergence falls with the square of the distance, while d = (z - max z) - (z' - max z')
falls with the distance itself. C++ and Triton read a row once, sum p d and q d in float32, and subtract the two means: at
distance 1e-3 a mean is some 2,000 times the divergence, and so is the rounding of its sum (single rows 1e-3 off, of
either sign: 1e-10 in absolute terms). Plain PyTorch has the mean when it sums (p - q)(d - E_p[d]), whose terms are as small
as their sum, and keeps one digit more, two in single rows: it passes over the row once more. Exact sums of the same
rounded products would be as good. Gradients are taken about the means in all forms, and err alike."""


def document(found: Findings, others: dict[str, Error | str], command: str) -> str:
    lines = [
        "# Errors against float64",
        "",
        f"Written by `{command}` from the sources of {_commit()}. {' '.join(__doc__.split(_BREAK)[-1].split())}",
        "",
        *_about().splitlines(),
        "",
        f"{_where()}, torch {torch.__version__}.",
        "",
        "![Gradient errors of the divergence](numerics.svg)",
    ]
    for op in FORMULAS:
        names = list(dict.fromkeys(name for (o, *_), errors in found.items() if o == op for name in errors))
        lines += ["", f"## {op}"]
        for table in TABLES:
            if op not in table.ops:
                continue
            lines += ["", f"**{table.title}.** {table.about}".strip(), ""]
            lines += [f"| {table.head} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
            for row in table.problems:
                cells = (_cell(found[op, table.title, row], name) for name in names)
                lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += ["", "## Other functions", ""]
    lines += [
        "Peers that compute another function than ours, each against the float64 formula of its own, float32.",
        "",
    ]
    lines += ["| peer | error |", "|---|---|"]
    for name, result in others.items():
        lines.append(f"| {name} | {result if isinstance(result, str) else _cell({name: result}, name)} |")
    return "\n".join(lines) + "\n"


_BREAK = "\n\n"


def figure(found: Findings, out: Path) -> None:
    """Gradient errors of bidirectional_kl, a panel a table; what is not finite stands on the line at the top."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastgist", "font.size": 8}):
        drawing = Figure(figsize=(11, 8), layout="constrained")
        panels = list(drawing.subplots(3, 3).flat)
        tables = [table for table in TABLES if "bidirectional_kl" in table.ops]
        lines: dict[str, object] = {}
        every = [name for (op, *_), errors in found.items() if op == "bidirectional_kl" for name in errors]
        names = [name for name in dict.fromkeys(every) if "compiled" not in name]  # a colour each, in whatever panel
        for axes, table in zip(panels, tables, strict=False):
            rows = list(table.problems)
            of_row = [found["bidirectional_kl", table.title, row] for row in rows]
            for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
                values = [errors[name].gradient if name in errors else None for errors in of_row]
                drawn = [math.nan if v is None else max(v, LEAST) if math.isfinite(v) else MOST for v in values]
                (line,) = axes.plot(
                    rows,
                    drawn,
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linewidth=1,
                    alpha=0.85,
                    markerfacecolor="none",
                )
                lines.setdefault(name, line)
            axes.axhline(MOST, color="#bbbbbb", linewidth=0.8, linestyle=":")
            axes.set_yscale("log")
            axes.set_ylim(LEAST / 3, 3 * MOST)
            axes.set_title(table.title, loc="left")
            axes.set_xlabel(table.head)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[len(tables) :]:
            axes.axis("off")
        panels[-1].legend(list(lines.values()), list(lines), loc="center", frameon=False)
        title = "Largest error of a gradient over the largest gradient, against float64; "
        title += f"on the dotted line: not finite; at {LEAST:.0e}: that or less"
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
    parser.add_argument(
        "--keep", type=Path, help="file of cases that were measured already, which grows: to go on from"
    )
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    found = measure(not args.no_compile, not args.no_progress, args.keep)
    args.out.mkdir(parents=True, exist_ok=True)
    given = "TRITON_INTERPRET=1 " if backends.interpreting() else ""
    command = f"{given}python scripts/numerics.py{' --no-compile' if args.no_compile else ''}"
    (args.out / "numerics.md").write_text(document(found, other_functions(), command))
    figure(found, args.out / "numerics.svg")
    print(args.out / "numerics.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
