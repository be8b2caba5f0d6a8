#!/usr/bin/env python3
"""Two studies of GIST, paired by seed: its temperature T, and the length of its gist token; on digits, and on text.

    python scripts/studies.py                    both, on digits, into docs/ (minutes on two cores; finished runs are kept)
    python scripts/studies.py --data stdlib      both, on the standard library's docstrings (half an hour)
    python scripts/studies.py --only length      one of them
    python scripts/studies.py --seeds 0-31       more seeds

Digits: the base is the demo's small ViT, the adaptation an adapter with the demo's learning rate, all else the GIST
paper's numbers. Text: the small BERT that is pre-trained here, an adapter, draws of docstrings of ten packages, and the
numbers of ``TEXT_STUDIES`` in fastgist/recipes/stdlib_text.py. Everything is decided beforehand: the last step's weights
are judged on the test half of either.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


@dataclass(frozen=True)
class Study:
    """Settings to compare: the value shown, and what it changes. ``reference``: the value the others are paired with."""

    title: str
    field: str
    values: tuple[Any, ...]
    reference: Any
    label: str


STUDIES = {
    "temperature": Study("temperature of the divergence", "temperature", (1.0, 3.0, 10.0), 3.0, "T = {:g}"),
    "length": Study("length of the gist token", "gist_length", (1, 2, 5, 10), 1, "L = {}"),
}


def cells(study: Study, common: Any) -> dict[str, Any]:
    """Settings by name: the adapter alone, then each value of the study."""
    found = {"no gist": replace(common, gist=False)}
    return found | {study.label.format(value): replace(common, **{study.field: value}) for value in study.values}


def judge(study: Study, names: Sequence[str], accuracies: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row a setting: its accuracies, and the difference to the reference, paired by seed."""
    from fastgist.train.statistics import paired, spread

    reference = study.label.format(study.reference)
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name, **spread(accuracies[name]), "values": accuracies[name]}
        if name != reference:
            row["difference"] = paired(accuracies[name], accuracies[reference])
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Bench:
    """The data that is studied on: what all runs share, and what is read of a run's summary."""

    common: Any
    seeds: str
    prefix: str
    accuracy: Callable[[dict[str, Any]], float]
    about: Callable[[dict[str, Any]], dict[str, Any]]


def digits(epochs: int | None, progress: bool) -> Bench:
    from fastgist.recipes.digits import compared
    from fastgist.train.config import FinetuneConfig, Method

    given = compared(["adapter"])
    lr = float(given.pop("method_lr")[0].partition("=")[2])
    given |= {"lr": lr, "set": [], "epochs": epochs or given["epochs"]}
    common = FinetuneConfig(data="digits", method=Method.ADAPTER, device="cpu", progress=progress, **given)
    return Bench(
        common,
        seeds="0-15",
        prefix="",
        accuracy=lambda summary: summary["test_accuracy"],
        about=lambda summary: {"data": f"digits 5-9 from {common.shots} images each", "images": summary["images"]},
    )


def stdlib(epochs: int | None, progress: bool) -> Bench:
    from fastgist.recipes.stdlib_text import TEXT_STUDIES
    from fastgist.train.config import Method
    from fastgist.train.stdlib_text import StdlibText
    from fastgist.train.text_config import TextConfig

    given = TEXT_STUDIES | {"epochs": epochs or TEXT_STUDIES["epochs"]}
    common = TextConfig(
        data="stdlib", method=Method.ADAPTER, val_name="", val_split=0.0, metrics="accuracy",
        device="cpu", progress=progress, **given,
    ).resolved()  # fmt: skip

    def about(summary: dict[str, Any]) -> dict[str, Any]:
        classes = summary["classes"]
        words = f"{len(classes)} packages from {common.shots} docstrings each, small BERT"
        return {
            "data": words, "texts": summary["texts"], "classes": classes, "batch_size": common.batch_size,
            "max_length": common.max_length, "fingerprint": StdlibText.load().fingerprint,
        }  # fmt: skip

    return Bench(common, "0-4", "text-", lambda summary: summary["test"]["test"]["accuracy"], about)


BENCHES = {"digits": digits, "stdlib": stdlib}


def draw(path: Path, study: Study, found: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    from fastgist.train.compare_figure import BLUE, VERMILION, differences, save, seeds_of

    rows, reference = found["rows"], study.label.format(study.reference)
    others = [row for row in rows if row["name"] != reference]
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, row in enumerate(rows):
        plain = row["name"] == "no gist"
        seeds_of(left, row, place, BLUE if plain else VERMILION, "o" if plain else "D")
    left.set_yticks(range(len(rows)), [row["name"] for row in rows])
    left.set_xlabel(f"test accuracy (%), {len(found['seeds'])} seeds; bar: mean")
    differences(right, [row["difference"] for row in others], f"minus {reference} (points)")
    right.set_yticks(range(len(others)), [row["name"] for row in others])
    for axes, count in ((left, len(rows)), (right, len(others))):
        axes.set_ylim(count - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{study.title}: {found['data']}, adapter", fontsize=11)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(BENCHES), default="digits")
    parser.add_argument("--only", choices=list(STUDIES))
    parser.add_argument("--seeds", help="0-15 on digits, 0-4 on text if not given")
    parser.add_argument("--epochs", type=int, help="fewer epochs: shows the way, not a result")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "studies", help="where runs are kept")
    parser.add_argument("--no-progress", action="store_true")
    options = parser.parse_args(arguments)

    from fastgist.train.checkpoint import write_atomically
    from fastgist.train.compare import run_all
    from fastgist.train.measure import versions
    from fastgist.train.sweep import parse_seeds

    bench = BENCHES[options.data](options.epochs, not options.no_progress)
    common = bench.common
    seeds = parse_seeds(options.seeds or bench.seeds)
    names = [options.only] if options.only else list(STUDIES)
    grids = {name: cells(STUDIES[name], common) for name in names}
    runs: dict[Any, Any] = {}  # the reference and the adapter alone belong to both studies
    for seed in seeds:
        for grid in grids.values():
            for cell in grid.values():
                place = f"T{cell.temperature:g}-L{cell.gist_length}" if cell.gist else "plain"
                folder = options.runs / f"{bench.prefix}{place}-seed{seed}"
                runs[place, seed] = replace(cell, seed=seed, output_dir=folder, resume=bool(bench.prefix))
    summaries = run_all(list(runs.values()), common)
    if summaries is None:
        raise SystemExit("run this in one process")
    accuracy = {key: bench.accuracy(summary) for key, summary in zip(runs, summaries, strict=True)}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, grid in grids.items():
        study = STUDIES[name]
        values = {
            words: [accuracy[f"T{cell.temperature:g}-L{cell.gist_length}" if cell.gist else "plain", s] for s in seeds]
            for words, cell in grid.items()
        }
        found = {
            "study": study.title, "reference": study.label.format(study.reference), "seeds": seeds,
            "shots": common.shots, "epochs": common.epochs, "lr": common.lr, **bench.about(summaries[0]),
            "rows": judge(study, list(grid), values), "cores": os.cpu_count(), "versions": versions(),
            "commits": sorted({str(summary["commit"]) for summary in summaries}),
        }  # fmt: skip
        stem = options.out / f"studies-{bench.prefix}{name}"
        write_atomically(stem.with_suffix(".json"), (json.dumps(found, indent=2) + "\n").encode())
        draw(stem.with_suffix(".svg"), study, found)
        print(f"{study.title}, {found['data']} ({stem}.svg):")
        for row in found["rows"]:
            gap = row.get("difference")
            against = "the reference"
            if gap is not None:
                interval = "" if gap["low"] is None else f" (95%: {100 * gap['low']:+.2f} to {100 * gap['high']:+.2f})"
                against = f"{100 * gap['mean']:+.2f} points{interval}"
            print(f"  {row['name']:<10} {row['mean']:6.2%}  {against}")


if __name__ == "__main__":
    main()
