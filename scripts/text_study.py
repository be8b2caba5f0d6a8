#!/usr/bin/env python3
"""Does a gist token help on text? Every method with and without one, on a small BERT that is pre-trained here.

    python scripts/text_study.py                 table, docs/text-study.json, docs/text-study.svg
    python scripts/text_study.py --tune          the learning rates: on validation texts, on a draw no result uses
    python scripts/text_study.py --causal        the same on the small Llama (where add_gist takes decoders)
    python scripts/text_study.py --add prefix    these methods, and the other rows of the JSON as they stand

Docstrings of each package are drawn to train on; the test texts of the corpus are looked at once, after training,
and choose nothing: no epoch is selected. With and without gist a pair shares draw, head, order and learning rate, which
was chosen without gist. Finished runs are kept in the cache, so an interrupted study goes on; --fresh forgets them.
--add refuses rows of another base, other texts, settings, packages or draws, and makes one of their runs again: it must
come to what the row says.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tqdm import tqdm

from fastgist.recipes.stdlib_text import LEARNING_RATES, NOT_CAUSAL, STUDY, TUNING_GRID, TUNING_SEED, VARIANTS
from fastgist.train.config import Method, UserError
from fastgist.train.data import derive_seed
from fastgist.train.measure import versions
from fastgist.train.stdlib_text import Part, StdlibText
from fastgist.train.text import finetune_text
from fastgist.train.text_base import base_model, cache_folder
from fastgist.train.text_config import TextConfig

ROOT = Path(__file__).resolve().parents[1]


def draw(part: Part, shots: int, seed: int) -> Part:
    """``shots`` texts of every class."""
    generator = torch.Generator().manual_seed(derive_seed(seed, len(part)))
    found = Part()
    for label in sorted(set(part.labels)):
        members = [i for i, y in enumerate(part.labels) if y == label]
        for i in torch.randperm(len(members), generator=generator)[:shots].tolist():
            found.texts.append(part.texts[members[i]])
            found.labels.append(label)
    return found


class Study:
    """Runs one configuration after another, from the cache where it was run before."""

    def __init__(self, corpus: StdlibText, base: Path, shots: int, fresh: bool) -> None:
        self.corpus, self.base, self.shots, self.fresh = corpus, base, shots, fresh
        self.cache = cache_folder() / "text-study"

    def accuracy(self, method: str, gist: bool, lr: float, seed: int, *, judge: str, **options: Any) -> dict[str, Any]:
        """{"accuracy", "trained", "seconds", "commit"} on part ``judge`` ("val" to tune, "test" to report)."""
        kind, settings = VARIANTS.get(method, (method, ()))
        config = TextConfig(
            model=str(self.base), method=Method(kind), set=list(settings), gist=gist, lr=lr, seed=seed, val_split=0.0,
            val_name="", metrics="accuracy", progress=False, device="cpu", data="", **STUDY, **options,
        )  # fmt: skip
        key = config.trajectory() | {"shots": self.shots, "judge": judge, "text": self.corpus.fingerprint}
        key |= versions() | {"--model": self.base.name, "format": 2}
        kept = self.cache / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"
        if kept.is_file() and not self.fresh:
            return json.loads(kept.read_text())
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            parts = {"train": draw(self.corpus.train, self.shots, seed), "test": self.corpus.parts()[judge]}
            for name, part in parts.items():
                with open(Path(scratch) / f"{name}.csv", "w", newline="") as file:
                    csv.writer(file).writerows([("text", "label"), *zip(part.texts, part.labels, strict=True)])
            run = replace(config, data=scratch, output_dir=Path(scratch) / "run")
            summary = finetune_text(run, say=lambda line: None)
        found = {
            "accuracy": summary["test"]["test"]["accuracy"], "trained": summary["trained_parameters"],
            "seconds": time.perf_counter() - started, "commit": summary["commit"],
        }  # fmt: skip
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
        return found

    def words(self, seed: int) -> float:
        """Logistic regression on TF-IDF of the words of the same draw: what needs no network."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        train = draw(self.corpus.train, self.shots, seed)
        model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=30, max_iter=2000))
        return float(model.fit(train.texts, train.labels).score(self.corpus.test.texts, self.corpus.test.labels))


def interval(differences: list[float]) -> tuple[float, float, float]:
    """(mean, lower, upper) of a 95 % t interval; (mean, nan, nan) of one number."""
    from scipy import stats

    if len(differences) < 2:
        return mean(differences), float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(differences) - 1) * stdev(differences) / len(differences) ** 0.5
    return mean(differences), mean(differences) - half, mean(differences) + half


def tune(study: Study, methods: list[str]) -> None:
    """Accuracy on the validation texts for each learning rate, without gist, on a draw that no result uses."""
    for method in methods:
        row = {
            lr: study.accuracy(method, False, lr, TUNING_SEED, judge="val")["accuracy"] for lr in TUNING_GRID[method]
        }
        print(f"{method:14}", "  ".join(f"{lr:g}: {value:.1%}" for lr, value in row.items()), flush=True)


def earlier(path: Path, study: Study, seeds: list[int]) -> dict[str, Any]:
    """The results in ``path``, to which rows are added. Raises UserError where they were made of something else.

    One run, the first method's with a token, is made again: its accuracy must be the one that is written.
    """
    before = json.loads(path.read_text())
    ours = {"shots": study.shots, "settings": STUDY, "base": study.base.name}
    ours |= {"text": study.corpus.fingerprint, "versions": {k: versions().get(k) for k in before["versions"]}}
    for name, value in ours.items():
        if before[name] != value:
            raise UserError(f"--add: {path} was made with {name} = {before[name]}, this is {value}")
    if before["seeds"][: len(seeds)] != seeds:
        raise UserError(f"--add: {path} has draws {before['seeds']}, of which these are not the first: {seeds}")
    row = before["rows"][0]
    again = study.accuracy(row["method"], True, row["lr"], seeds[0], judge="test")["accuracy"]
    if again != row["gist"][0]:
        raise UserError(
            f"--add: {row['method']} with a token, draw {seeds[0]}: {path} has {row['gist'][0]}, now {again}"
        )
    for row in before["rows"]:
        row.setdefault("commits", [before.get("commit")])
    return before


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The change of all methods, a mean over them for each of the draws that all of them have."""
    count = min(len(row["plain"]) for row in rows)
    middle, low, high = interval([mean(r["gist"][i] - r["plain"][i] for r in rows) for i in range(count)])
    return {"difference": middle, "interval": [low, high], "draws": count}


def compare(study: Study, methods: list[str], seeds: list[int], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """All runs, and what they come to, with the rows of other methods that are in ``before``."""
    jobs = [(method, seed, gist) for seed in seeds for method in methods for gist in (False, True)]
    results: dict[str, dict[bool, list[dict[str, Any]]]] = {m: {False: [], True: []} for m in methods}
    for method, seed, gist in tqdm(jobs, desc="fine-tuning", unit="run"):
        results[method][gist].append(study.accuracy(method, gist, LEARNING_RATES[method], seed, judge="test"))
    rows = []
    for method in methods:
        plain, gist = ([r["accuracy"] for r in results[method][g]] for g in (False, True))
        middle, low, high = interval([b - a for a, b in zip(plain, gist, strict=True)])
        rows.append(
            {
                "method": method, "lr": LEARNING_RATES[method], "trained": results[method][False][0]["trained"],
                "plain": plain, "gist": gist, "difference": middle, "interval": [low, high],
                "commits": sorted({str(r["commit"]) for g in (False, True) for r in results[method][g]}),
                "seconds": sum(r["seconds"] for g in (False, True) for r in results[method][g]),
            }
        )  # fmt: skip
    if before is None:
        words = [study.words(s) for s in seeds]
        rate = LEARNING_RATES["full"]
        scratch = [study.accuracy("full", False, rate, s, judge="test", pretrained=False)["accuracy"] for s in seeds]
    else:
        scratch, words, seeds = before["full from random weights"], before["words alone"], before["seeds"]
        rows = sorted(
            [*(row for row in before["rows"] if row["method"] not in methods), *rows],
            key=lambda row: list(LEARNING_RATES).index(row["method"]),
        )
    return {
        "rows": rows, "seeds": seeds, "all methods": together(rows),
        "full from random weights": scratch, "words alone": words,
        "chance": 1 / len(study.corpus.classes), "classes": study.corpus.classes, "shots": study.shots,
        "test_texts": len(study.corpus.test), "settings": STUDY, "base": study.base.name,
        "text": study.corpus.fingerprint, "versions": versions(),
        "commits": sorted({name for row in rows for name in row["commits"]}),
        "device": "cpu", "threads": torch.get_num_threads(),
    }  # fmt: skip


def named(row: dict[str, Any], found: dict[str, Any]) -> str:
    """The row's name, with its number of draws where others have more."""
    draws = len(row["plain"] or ()) or row.get("draws", len(found["seeds"]))
    return row["method"] + ("" if draws == len(found["seeds"]) else f" ({draws} draws)")


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def percent(values: list[float]) -> str:
        return f"{mean(values):.1%}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")

    def change(entry: dict[str, Any]) -> tuple[str, str]:
        low, high = entry["interval"]
        return f"{100 * entry['difference']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"

    console = Console()
    table = Table(
        title=f"{len(found['classes'])} packages, {found['shots']} docstrings each, {len(found['seeds'])} paired draws",
        title_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for column in ("trained", "accuracy", "with gist", "change", "95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        table.add_row(
            named(row, found), f"{row['trained']:,}", percent(row["plain"]), percent(row["gist"]), *change(row)
        )
    table.add_section()
    table.add_row("all methods", "", "", "", *change(found["all methods"]))
    for name, words in (("full from random weights", "full, random"), ("words alone", "words alone")):
        table.add_row(words, "", percent(found[name]), "", "", "")
    console.print(table)
    count = len(found["rows"])
    better = [r["method"] for r in found["rows"] if r["interval"][0] > 0]
    worse = [r["method"] for r in found["rows"] if r["interval"][1] < 0]
    for line in (
        f"accuracy: mean ± standard deviation over draws, on {found['test_texts']} test texts; chance {found['chance']:.0%}",
        "the gist token helps beyond the interval: " + (", ".join(better) or "no method"),
        "it hurts beyond the interval: " + (", ".join(worse) or "no method"),
        f"intervals are of one method each; of {count} that say nothing, {1 - 0.95**count:.0%} show one that excludes 0",
        "change: with gist minus without, in points, and its 95 % interval; full, random: full fine-tuning of random weights",
        "words alone: logistic regression on TF-IDF of the same draw",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = [*found["rows"], {"method": "all methods", **found["all methods"], "plain": None}]
    with plt.rc_context({"svg.hashsalt": "fastgist", "font.size": 9, "svg.fonttype": "none"}):
        figure, axis = plt.subplots(figsize=(7, 0.42 * len(rows) + 1.3), layout="constrained")
        for place, row in enumerate(reversed(rows)):
            low, high = (100 * value for value in row["interval"])
            colour = "#333333" if row["plain"] is None else "#3b6ea5"
            axis.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
            axis.plot(100 * row["difference"], place, "o", color=colour)
            if row["plain"] is not None:
                points = [100 * (b - a) for a, b in zip(row["plain"], row["gist"], strict=True)]
                axis.plot(points, [place + 0.22] * len(points), ".", color="#909090", markersize=5)
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [named(row, found) for row in reversed(rows)])
        axis.set_xlabel("accuracy with gist minus without, in points: each draw (grey), mean, 95 % interval")
        title = f"A gist token on a small {_NAMES[found['model']]}, {found['shots']} docstrings a package"
        axis.set_title(title, loc="left", fontsize=10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


_NAMES = {"stdlib-bert": "BERT", "stdlib-llama": "Llama"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="paired draws")
    parser.add_argument("--shots", type=int, default=100, help="training texts of each package")
    parser.add_argument("--methods", help="by commas (default: all that have a place in the model)")
    parser.add_argument("--add", help="the same, beside the rows of other methods that the JSON has")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where JSON and figure go")
    parser.add_argument("--fresh", action="store_true", help="forget finished runs")
    parser.add_argument("--tune", action="store_true", help="print validation accuracies by learning rate, and leave")
    parser.add_argument("--causal", action="store_true", help="the small Llama in place of the BERT")
    arguments = parser.parse_args()
    started = time.perf_counter()
    name = "stdlib-llama" if arguments.causal else "stdlib-bert"
    corpus = StdlibText.load()
    study = Study(corpus, base_model(name, corpus=corpus), arguments.shots, arguments.fresh)
    every = [m for m in LEARNING_RATES if not (arguments.causal and m in NOT_CAUSAL)]
    named = arguments.add or arguments.methods
    methods = [word.strip() for word in named.split(",")] if named else every
    unknown = sorted(set(methods) - set(every))
    if unknown:
        raise UserError(f"no method of this study is called {unknown[0]!r}; there are {', '.join(every)}")
    if arguments.tune:
        tune(study, methods)
        return
    stem = "text-study-causal" if arguments.causal else "text-study"
    seeds = list(range(arguments.seeds))
    before = earlier(arguments.out / f"{stem}.json", study, seeds) if arguments.add else None
    found = compare(study, methods, seeds, before) | {"model": name}
    found["seconds"] = time.perf_counter() - started
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, arguments.out / f"{stem}.svg")
    show(found)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"text_study: {error}") from None
