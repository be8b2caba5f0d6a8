#!/usr/bin/env python3
"""Which form of cp_linear pays where: writes docs/crossovers.md, docs/crossovers.svg and benchmarks/predicted/.

    python scripts/crossovers.py            from the model and the committed readings; seconds

On a GPU what kernels/fastgist_kernels/cp_linear_cost.py predicts, and beside it what scripts/tune.py measured where it has
run; on a CPU what scripts/cp_linear_forms.py measured. Neither page nor figure holds a number that is not from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from tune import sizes_of  # noqa: E402

from benchmarks.cases import CASES  # noqa: E402
from fastgist.reference.cp_linear import merge_pays  # noqa: E402
from fastgist_kernels import cp_linear_cost as model  # noqa: E402
from fastgist_kernels import cp_linear_plan as plan  # noqa: E402

#: The card of the tables: architecture, name, processors.
CARD = ("sm_90", "H200", 132)
RECORD = ROOT / "benchmarks" / "predicted" / "sm_90" / "cp_linear_forms.json"
RESULTS = ROOT / "benchmarks" / "results"
DIRECTIONS = ("fwd", "bwd")
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
WIDTHS = (768, 1024, 2048, 4096, 5120)
RANKS = (16, 64)
LETTERS = {"fused": "F", "started": "S", "blas": "B", "few": "W", "tma_fused": "TF", "tma_started": "TS"}


def record() -> dict[str, object]:
    """Predicted seconds of each form, of the eager forms and the floor, for the benchmark's shapes."""
    card = model.card_of(*CARD)
    rows = []
    for case in CASES["cp_linear", "cuda"]:
        s = sizes_of(dict(case.sizes), str(case.dtype).removeprefix("torch."))
        for direction in DIRECTIONS:
            forward = direction == "fwd"
            forms = {form: found.seconds for form, found in plan.predicted(*CARD, s, forward)}
            eager = {name: model.eager_cost(name, s, card, forward=forward).seconds for name in model.EAGER}
            row: dict[str, object] = {"case": case.name, "direction": direction, **dict(case.sizes), "dtype": s.dtype}
            row |= {"source": "predicted", "spread": model.SPREAD, "forms": forms, "eager": eager}
            rows.append(row | {"floor": model.roofline(s, card, forward=forward).seconds})
    what = f"seconds on an {CARD[1]} as kernels/fastgist_kernels/cp_linear_cost.py predicts them; nothing here was measured"
    return {"what": what, "arch": CARD[0], "rows": _rounded(rows)}


def _rounded(value):
    """Four digits: what a prediction is worth, and the same file on every machine."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def measured_on_gpus() -> Iterator[tuple[str, list[dict]]]:
    """(device, rows) of each card on which scripts/tune.py has timed the forms."""
    for path in sorted(RESULTS.glob("nvidia-*/cp_linear_forms.json")):
        data = json.loads(path.read_text())
        yield data["device"], data["rows"]


def measured_on_cpus() -> Iterator[tuple[dict, list[dict], list[dict]]]:
    """(environment, grid, benchmark's cases) of each CPU."""
    for path in sorted(RESULTS.glob("cpu-*/cp_linear_forms.json")):
        data = json.loads(path.read_text())
        yield data["environment"], data["grid"], data["benchmark"]


# -- the page ----------------------------------------------------------------------------------------------------------


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}" if seconds >= 1e-4 else f"{seconds * 1e6:.1f}"


def _sizes(row: dict) -> str:
    several = "".join(f", {name} = {row[name]}" for name in ("W", "G") if name in row)
    return f"{row['M']}, {row['d']}, {row['R']}{several}"


def _of_benchmark() -> Iterator[str]:
    names = (*plan.FORMS, *(f"eager {name}" for name in model.EAGER))
    yield "| M, d, R | | " + " | ".join(names) + " | floor |"
    yield "|---" * (len(names) + 3) + "|"
    for row in record()["rows"]:
        s = sizes_of(row, row["dtype"])
        taken = plan.by_model(*CARD, s, row["direction"] == "fwd")[0]
        times = {**row["forms"], **{f"eager {name}": t for name, t in row["eager"].items()}}
        cells = [_microseconds(times[n]) if n in times else "" for n in names]
        cells = [f"**{cell}**" if name == taken else cell for name, cell in zip(names, cells, strict=True)]
        yield f"| {_sizes(row)} | {row['direction']} | " + " | ".join(cells) + f" | {_microseconds(row['floor'])} |"


def _least_lead() -> str:
    """Of the choices over the best eager form, where it is least."""
    leads = []
    for row in record()["rows"]:
        taken = plan.by_model(*CARD, sizes_of(row, row["dtype"]), row["direction"] == "fwd")[0]
        name, best = min(row["eager"].items(), key=lambda found: found[1])
        leads.append((best / row["forms"][taken], f"{_sizes(row)} {row['direction']}: {taken} over {name}"))
    ratio, where = min(leads)
    return f"{100 * (ratio - 1):+.2f} % ({where})"


def _chosen(rank: int, forward: bool) -> Iterator[str]:
    yield f"| R = {rank} | " + " | ".join(f"M = {m}" for m in ROWS) + " |"
    yield "|---" * (len(ROWS) + 1) + "|"
    card = model.card_of(*CARD)
    for d in WIDTHS:
        cells = []
        for m in ROWS:
            s = model.Sizes(m, d, d, rank)
            order = plan.by_model(*CARD, s, forward)
            best = dict(plan.predicted(*CARD, s, forward))[order[0]].seconds
            eager = min(model.eager_cost(name, s, card, forward=forward).seconds for name in model.EAGER)
            cells.append(f"{LETTERS[order[0]]} {eager / best:.2f}")
        yield f"| N = K = {d} | " + " | ".join(cells) + " |"


def _on_gpus() -> Iterator[str]:
    for device, rows in measured_on_gpus():
        yield f"Measured on {device} (microseconds, medians of graph replays; the table's entry is the fastest form):\n"
        names = list(dict.fromkeys(n for row in rows for n in (*row["forms"], *(f"eager {e}" for e in row["eager"]))))
        yield "| M, d, R | | " + " | ".join(names) + " |"
        yield "|---" * (len(names) + 2) + "|"
        for row in rows:
            times = {**row["forms"], **{f"eager {name}": t for name, t in row["eager"].items()}}
            cells = (_microseconds(times[n]) if n in times else "" for n in names)
            yield f"| {_sizes(row)} | {row['direction']} | " + " | ".join(cells) + " |"
        yield ""


def _of_readings() -> Iterator[str]:
    yield "| M, N, K | measured, us | model, us | |"
    yield "|---|---|---|---|"
    card = model.card_of(*CARD)
    for m, n, k, us in model.READINGS:
        found = model.library_product(card, model.Sizes(m, n, k, 0)).seconds * 1e6
        yield f"| {m}, {n}, {k} | {us:.4g} | {found:.4g} | {100 * (found / us - 1):+.1f} % |"


#: direction -> what it is called, and whether the factor is computed in any case.
CPU_DIRECTIONS = {
    "fwd": ("y and x U (training)", True),
    "fwd_alone": ("y alone (evaluation)", False),
    "bwd": ("dx and the factors' gradients", True),
    "dx_alone": ("dx alone", False),
}


def _inner_out(row: dict) -> tuple[int, int]:
    """What is summed over and what the result has as columns."""
    return (row["K"], row["N"]) if row["direction"].startswith("fwd") else (row["N"], row["K"])


def _on_cpu(grid: list[dict]) -> Iterator[str]:
    for direction, (what, needed) in CPU_DIRECTIONS.items():
        rows = [r for r in grid if r["direction"] == direction]
        shares = sorted({r["M"] / _inner_out(r)[0] for r in rows})
        yield f"**{what}**\n"
        yield (
            "| N, K, R | "
            + " | ".join(f"M = {share:g} {'K' if 'fwd' in direction else 'N'}" for share in shares)
            + " |"
        )
        yield "|---" * (len(shares) + 1) + "|"
        for n, k, r in dict.fromkeys((row["N"], row["K"], row["R"]) for row in rows):
            cells = []
            for share in shares:
                own = [q for q in rows if (q["N"], q["K"], q["R"]) == (n, k, r) and q["M"] / _inner_out(q)[0] == share]
                cell = ""
                for row in own:
                    ratio = f"{row['over_merged']['factored'][1]:.3f}"
                    inner, out = _inner_out(row)
                    cell = f"**{ratio}**" if merge_pays(row["M"], inner, out, r, needed) else ratio
                cells.append(cell)
            yield f"| {n}, {k}, {r} | " + " | ".join(cells) + " |"
        yield ""


def _of_cpu_cases(rows: list[dict]) -> Iterator[str]:
    names = list(rows[0]["seconds"])
    yield "| M, d, R | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for row in rows:
        taken = "merged" if merge_pays(row["M"], row["d"], row["d"], row["R"], True) else "factored"
        cells = [f"{row['seconds'][n] * 1e3:.4g} ms" for n in names]
        cells = [f"**{c}**" if n == taken else c for n, c in zip(names, cells, strict=True)]
        yield f"| {row['M']}, {row['d']}, {row['R']} | " + " | ".join(cells) + " |"


def gpu_page() -> str:
    """The part of the page that is the model's."""
    lines = [
        "## On a GPU: predicted, not yet measured",
        "",
        '**Not yet run on a GPU: every time below is a prediction from counts, and so is each "faster than eager".** No form',
        "of cp_linear has been timed on a card since its kernels were written. For an H200",
        "`kernels/fastgist_kernels/cp_linear_cost.py` counts launches (those that the host code makes:",
        "tests/test_cp_linear_counts.py), bytes, and products in waves of tiles. On a card `scripts/tune.py --op cp_linear`",
        f"times each form that can run there, both ways, at each of the benchmark's {len(CASES['cp_linear', 'cuda'])}",
        "shapes, after a parity check, beside the eager forms, and writes the launch table, which is asked before the model.",
        "",
        "Measured on that card: the copy's speed, the library's products below, narrow products' share of the copy's",
        "speed. Assumed: that a Triton loop reaches 0.85 of the library's rate with pointers and 0.93 with descriptors",
        "(between what others printed on an H100, `Card`), and what smaller tiles lose. The rows of",
        "`benchmarks/results/nvidia-h200/first-run/cp_linear.json` do not say: a launch took some 200 us of host time then.",
        "",
        *_of_readings(),
        "",
        "Microseconds of y and x U (fwd), and of all gradients (bwd); bfloat16, N = K = d. W: so many weights with one input,",
        "each with a gain of its own, as q, k and v are; G: one weight of G d rows, a gain a fold. Eager: the factored form,",
        "the dense update, and a chain by formula in a Function, in the manner of Unsloth's. **Bold**: what is taken where",
        "nothing was measured. Forms that fetch by descriptors (tma) are not taken on the model's word alone. The least lead",
        f"over eager is {_least_lead()}.",
        "",
        *_of_benchmark(),
        "",
        "What is taken by M, width and rank, and how many times faster it is than the best eager form, all by the model:",
        "F fused, S started, B the library's product then the update, W few rows.",
        "",
    ]
    for forward in (True, False):
        lines += ["Forward:" if forward else "Backward (how dx is computed):", ""]
        for rank in RANKS:
            lines += [*_chosen(rank, forward), ""]
    lines += list(_on_gpus())
    return "\n".join(lines).rstrip() + "\n"


def cpu_page() -> str:
    lines = [
        "## On a CPU: measured",
        "",
        "Time of the factored form over the merged one (above 1: merging is faster), medians over pairs taken in turn;",
        "**bold** where `merge_pays` (fastgist/reference/cp_linear.py) merges. float32, one thread, its processor time. The",
        "machine did other work meanwhile: the ratio of a pair counts, not its milliseconds. All is plain PyTorch's: where",
        '"auto" has C++ add the update of one weight and h is needed, y is not merged (DESIGN.md, "cp_update in C++").',
        "",
    ]
    for environment, grid, benchmark in measured_on_cpus():
        versions = environment["versions"]
        lines += [f"{environment['device']}, torch {versions['torch']}, {environment['date']}:", "", *_on_cpu(grid)]
        lines += ["The benchmark's cases, forward and backward, ours in either form and the eager ones. At M = 1 the"]
        lines += ["products are eager's; what ours takes beside them is the operation's Python:", ""]
        lines += [*_of_cpu_cases(benchmark), ""]
    return "\n".join(lines).rstrip() + "\n"


def page() -> str:
    return f"# Which form of cp_linear pays where\n\nWritten by `scripts/crossovers.py`.\n\n{gpu_page()}\n{cpu_page()}"


# -- the figure --------------------------------------------------------------------------------------------------------

#: Okabe and Ito's colours.
COLOURS = dict(zip(plan.FORMS, ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#CC79A7"), strict=True))


def draw(out: Path) -> None:
    """Above: predicted time over the best eager form's against M, a panel a width. Below: factored over merged on each CPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "svg.hashsalt": "fastgist", "font.size": 8, "font.family": "sans-serif"}
    cpus = list(measured_on_cpus())
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(10, 3.4 * (1 + len(cpus))), layout="constrained")
        parts = figure.subfigures(1 + len(cpus), 1, squeeze=False)[:, 0]
        parts[0].suptitle(
            "PREDICTED for an H200, not measured: forward in bfloat16, R = 16, time over the best eager form's",
            fontsize=9,
        )
        panels = parts[0].subplots(1, 3, sharey=True)
        for panel, d in zip(panels, (768, 2048, 4096), strict=True):
            _draw_predicted(panel, d)
        panels[0].legend(frameon=False, fontsize=7)
        for part, (environment, grid, _) in zip(parts[1:], cpus, strict=True):
            part.suptitle(
                f"Measured on {environment['device']}, one thread, {environment['date']}: y and x U in float32, time of the "
                "factored form over the merged one's;\nbands: quartiles, dotted: merged from here on",
                fontsize=9,
            )
            panels = part.subplots(1, 3)
            for panel, d in zip(panels, (256, 768, 2048), strict=True):
                _draw_measured(panel, d, [r for r in grid if r["direction"] == "fwd" and r["N"] == r["K"] == d])
            panels[0].legend(frameon=False, fontsize=7)
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _draw_predicted(panel, d: int) -> None:
    rows = [2**i for i in range(15)]
    card = model.card_of(*CARD)
    times: dict[str, list[float]] = {form: [] for form in plan.FORMS}
    for m in rows:
        s = model.Sizes(m, d, d, 16)
        eager = min(model.eager_cost(name, s, card).seconds for name in model.EAGER)
        found = dict(plan.predicted(*CARD, s, True))
        for form in plan.FORMS:
            times[form].append(found[form].seconds / eager if form in found else float("nan"))
    for form, own in times.items():
        reserved = form in plan.MEASURED_ONLY
        panel.plot(rows, own, color=COLOURS[form], linewidth=1.2, label=form, linestyle=":" if reserved else "-")
    panel.axhline(1.0, color="#666666", linewidth=0.8)
    panel.set_ylim(0.3, 1.5)
    _finish(panel, "rows M", f"N = K = {d}")


def _draw_measured(panel, d: int, rows: list[dict]) -> None:
    for r, colour in zip(sorted({row["R"] for row in rows}), COLOURS.values(), strict=False):
        mine = sorted((row for row in rows if row["R"] == r), key=lambda row: row["M"])
        shares = [row["M"] / d for row in mine]
        low, middle, high = ([row["over_merged"]["factored"][i] for row in mine] for i in range(3))
        panel.plot(shares, middle, color=colour, marker="o", markersize=3, linewidth=1.2, label=f"R = {r}")
        panel.fill_between(shares, low, high, color=colour, alpha=0.15, linewidth=0)
    first = next(m for m in range(1, 8 * d + 1) if merge_pays(m, d, d, 1, True))
    panel.axvline(first / d, color="#d62728", linestyle=":", linewidth=1)
    panel.axhline(1.0, color="#666666", linewidth=0.8)
    _finish(panel, "M / K", f"N = K = {d}")


def _finish(panel, below: str, title: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xlabel(below)
    panel.set_title(title, loc="left", fontsize=8)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="the folder of page and figure")
    parser.add_argument("--record", type=Path, default=RECORD, help="the file of the predictions")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(record(), indent=1) + "\n")
    (args.out / "crossovers.md").write_text(page())
    draw(args.out / "crossovers.svg")
    for path in (args.record, args.out / "crossovers.md", args.out / "crossovers.svg"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
