"""``fastgist compare`` and ``compare-text``: methods with and without a gist token, on the same data and seeds, and their
paired differences.

One seed means one draw of data, one initial head, one order of the data and one stream of dropout, whatever is trained: a
difference between two runs of a seed is the method's. A finished run is kept and not repeated.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastgist.train.checkpoint import write_atomically
from fastgist.train.config import CompareConfig, FinetuneConfig, Method, UserError, _plain
from fastgist.train.finetune import Interrupted, check_numbers, finetune
from fastgist.train.measure import commit, versions
from fastgist.train.statistics import paired, spread
from fastgist.train.sweep import Config, finished, parse_seeds, scores_of
from fastgist.train.text_config import CompareTextConfig, TextConfig

__all__ = ["bench", "compare", "plan", "run_all"]

Bench = Callable[[Any], dict[str, Any]]
Comparison = CompareConfig | CompareTextConfig


def compare(config: Comparison) -> dict[str, Any]:
    """Make every run that is not finished, then the table, the figure, compare.json and compare.csv.

    Returns:
        What compare.json holds.

    Raises:
        UserError: what the user can put right. Interrupted: Ctrl-C; the same command goes on.
    """
    runs = plan(config)
    parent = next(p for p in [config.output_dir, *config.output_dir.absolute().parents] if p.exists())
    if not parent.is_dir():
        raise UserError(f"--output-dir {config.output_dir}: {parent} is a file")
    summaries = run_all(list(runs.values()), config)
    if summaries is None:  # not the first process
        return {}
    scores = [scores_of(summary) for summary in summaries]
    measured = _measured(config, scores[0])
    values = {key: each[measured] for key, each in zip(runs, scores, strict=True)}
    methods, seeds = _methods(config), parse_seeds(config.seeds or "0")
    trained = {
        (method, gist): summary["trained_parameters"]
        for (method, gist, _), summary in zip(runs, summaries, strict=True)
    }
    kind = "texts" if isinstance(config, TextConfig) else "images"
    found: dict[str, Any] = {
        "measured": measured, kind: summaries[0][kind], "seeds": seeds, "confidence": config.confidence,
        "rows": [_row(method, values, trained, seeds, config.confidence) for method in methods],
        "settings": {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)},
        "versions": versions(), "commit": commit(),
    }  # fmt: skip
    from fastgist.train.compare_figure import draw

    folder = config.output_dir
    write_atomically(folder / "compare.json", (json.dumps(found, indent=2) + "\n").encode())
    write_atomically(folder / "compare.csv", _table_of_runs(runs, summaries).encode())
    draw(folder / "compare.svg", found)
    _print_table(found, folder)
    return found


def _measured(config: Comparison, scores: dict[str, float]) -> str:
    """The score that methods are compared by: of the test data, or else of what selected; a metric before the loss."""
    first = "accuracy"
    if isinstance(config, TextConfig):
        first = (
            config.metrics.split(",")[0].strip() if config.metrics else "pearson" if "val_pearson" in scores else first
        )
    for name in (
        f"test_{first}",
        *(n for n in scores if n.endswith(f"_{first}") and n.startswith("test")),
        f"val_{first}",
    ):
        if name in scores:
            return name
    what = "texts" if isinstance(config, TextConfig) else "images"
    raise UserError(f"nothing to compare by: the data has neither test nor val {what}, or no {first} was measured")


def plan(config: Comparison) -> dict[tuple[str, bool, int], Config]:
    """Every run by (method, gist, seed)."""
    kind = TextConfig if isinstance(config, TextConfig) else FinetuneConfig
    rates = dict(_pair(word, "=", "--method-lr", config) for word in config.method_lr)
    settings: dict[str, list[str]] = {}
    for word in config.set:
        method, setting = _pair(word, ":", "--set", config)
        settings.setdefault(method, []).append(setting)
    common = {f.name: getattr(config, f.name) for f in dataclasses.fields(kind)}
    runs: dict[tuple[str, bool, int], Config] = {}
    for seed in parse_seeds(config.seeds or "0"):
        for method in _methods(config):
            try:
                lr = float(rates.get(method, config.lr))
            except ValueError:
                raise UserError(f"--method-lr {method}={rates[method]}: expected a number") from None
            for gist in (False, True):
                name = f"{method}{'-gist' if gist else ''}-seed{seed}"
                own: dict[str, Any] = {
                    "method": Method(method),
                    "gist": gist,
                    "seed": seed,
                    "seeds": None,
                    "lr": lr,
                    "resume": True,
                }
                own |= {"set": settings.get(method, []), "output_dir": config.output_dir / "runs" / name}
                run = kind(**common | own)
                runs[method, gist, seed] = run = run if gist else _without_token(run)
                if isinstance(run, FinetuneConfig):
                    check_numbers(run)
                else:
                    runs[method, gist, seed] = run.resolved()
    return runs


def _methods(config: Comparison) -> list[str]:
    names = [name.strip() for name in config.methods.split(",")]
    for name in names:
        if name not in list(Method):
            raise UserError(f"--methods: no method is called {name!r}; there are {', '.join(Method)}")
    if len(set(names)) < len(names):
        raise UserError(f"--methods {config.methods}: a method is named twice")
    return names


def _pair(word: str, sign: str, flag: str, config: Comparison) -> tuple[str, str]:
    """``method<sign>value``, the method one of those compared."""
    method, found, value = word.partition(sign)
    if not found or method not in _methods(config):
        raise UserError(f"{flag} {word}: expected METHOD{sign}..., the method one of {', '.join(_methods(config))}")
    return method, value


def _without_token(run: Config) -> Config:
    """A plain run: what is said about the token is not for it."""
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(run)}
    names = ("lr_gist", "wd_gist", "gist_length", "gist_readout")
    return replace(run, **{name: defaults[name] for name in names})


# -- running ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bench(config: Config) -> Iterator[Bench]:
    """What makes a run: on digits, or on images or texts as ``fastgist finetune`` and ``finetune-text`` do."""
    if isinstance(config, TextConfig):
        from fastgist.train.text import finetune_text

        yield lambda run: finetune_text(run, say=lambda line: None)
    elif config.data == "digits":
        if Path("digits").is_dir():
            raise UserError("digits is the built-in data set and a folder here: write ./digits for the folder")
        from fastgist.train.digits_bench import DigitsBench

        with DigitsBench.opened(config) as digits:
            yield digits.run
    else:
        yield lambda run: finetune(run, say=lambda line: None)


def run_all(runs: Sequence[Config], config: Config) -> list[dict[str, Any]] | None:
    """The summaries of ``runs``, each made unless it is finished; None on processes other than the first.

    Raises:
        UserError: a folder holds a run with other settings. Interrupted: Ctrl-C.
    """
    from accelerate import PartialState
    from tqdm import tqdm

    done = [finished(run) for run in runs]
    left = [index for index, summary in enumerate(done) if summary is None]
    main = PartialState(cpu=config.device == "cpu").is_main_process
    if left:
        with (
            bench(config) as make,
            tqdm(left, desc="runs", unit="run", disable=not (config.progress and main)) as bar,
        ):
            try:
                for index in bar:
                    bar.set_postfix_str(runs[index].output_dir.name)
                    done[index] = make(runs[index])
            except KeyboardInterrupt:
                ready = sum(summary is not None for summary in done)
                raise Interrupted(
                    f"interrupted: {ready} of {len(runs)} runs are finished; the same command makes the others"
                ) from None
    return [summary for summary in done if summary is not None] if main else None


# -- what came out ---------------------------------------------------------------------------------------------------


def _row(
    method: str,
    values: dict[tuple[str, bool, int], float],
    trained: dict[tuple[str, bool], int],
    seeds: list[int],
    confidence: float,
) -> dict[str, Any]:
    without, with_token = ([values[method, gist, seed] for seed in seeds] for gist in (False, True))
    return {
        "method": method,
        "plain": {**spread(without), "values": without, "trained": trained[method, False]},
        "gist": {**spread(with_token), "values": with_token, "trained": trained[method, True]},
        "difference": paired(with_token, without, confidence),
    }


def _table_of_runs(runs: dict[tuple[str, bool, int], Config], summaries: list[dict[str, Any]]) -> str:
    """One line a run."""
    text = io.StringIO()
    scores = [scores_of(summary) for summary in summaries]
    measured = list(scores[0])
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "gist", "seed", "lr", "trained_parameters", *measured])
    for ((method, gist, seed), run), summary, each in zip(runs.items(), summaries, scores, strict=True):
        numbers = [summary["trained_parameters"], *(each[name] for name in measured)]
        writer.writerow([method, int(gist), seed, run.lr, *numbers])
    return text.getvalue()


def _print_table(found: dict[str, Any], folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def percent(entry: dict[str, Any]) -> str:
        return f"{entry['mean']:.1%}" + (f" ± {100 * entry['std']:.1f}" if entry["std"] is not None else "")

    measured = found["measured"].replace("_", " ")
    count = len(found["seeds"])
    title = f"{measured}, {count} seed{'s' if count > 1 else ''}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    interval = f"{found['confidence']:.0%} interval"
    for column in ("plain", "gist", "gain", "interval", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        gap = row["difference"]
        bounds = "-" if gap["low"] is None else f"{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}"
        chance = "-" if gap["p_value"] is None else f"{gap['p_value']:.3f}"
        table.add_row(
            row["method"], percent(row["plain"]), percent(row["gist"]), f"{100 * gap['mean']:+.2f}", bounds, chance
        )
    console = Console()
    console.print(table)
    lines = [
        "mean ± standard deviation over seeds; gain: gist minus plain in points, paired by seed, with its "
        f"{interval} (Student's t)",
        "an interval that holds 0 says that these runs do not tell the two apart",
    ]
    if len(found["rows"]) > 1:
        lines.append(f"{len(found['rows'])} comparisons: the p-values are not corrected for their number")
    if measured.startswith("val"):
        lines.append("no test data: judged by what chose the epoch, which flatters every row")
    lines.append(f"{folder / 'compare.json'}, compare.csv, compare.svg")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
