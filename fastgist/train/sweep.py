"""``--seeds`` of ``fastgist finetune`` and ``finetune-text``: the same run from several seeds, a folder each, and what they
came to together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastgist.train.checkpoint import write_atomically
from fastgist.train.config import FinetuneConfig, UserError
from fastgist.train.settings import written_settings
from fastgist.train.statistics import spread
from fastgist.train.text_config import TextConfig

__all__ = ["finished", "parse_seeds", "scores_of", "sweep"]

Config = FinetuneConfig | TextConfig


def parse_seeds(words: str) -> list[int]:
    """ "0,1,2" or "0-4" or both, as numbers in the order given; UserError for anything else, or a seed twice."""
    seeds: list[int] = []
    for word in words.split(","):
        first, dash, last = word.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UserError(f"--seeds {words}: expected numbers by commas, or a range such as 0-4")
        seeds += range(int(first), int(last or first) + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {words}: a seed is given twice")
    return seeds


def finished(config: Config) -> dict[str, Any] | None:
    """The summary of a run that ended in ``config.output_dir``, or None.

    Raises:
        UserError: it was made with other settings, or cannot be read.
    """
    path = config.output_dir / "summary.json"
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text())
        theirs = summary["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no summary of a run ({error}): remove it, or take another --output-dir") from error
    for name, value in written_settings(config).items():
        if name in config.decisive() and theirs.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{config.output_dir} holds a run with {flag} = {theirs.get(name)!r}, this one has {value!r}: "
                "take another --output-dir"
            )
    return summary


def sweep(config: Config, run: Callable[..., dict[str, Any]], say: Callable[[str], None] = print) -> dict[str, Any]:
    """``run(config, say)`` once a seed of ``config.seeds``, in ``seed-<n>`` folders; returns what summary.json then holds.

    ``run``: :func:`fastgist.train.finetune.finetune`; or :func:`fastgist.train.text.finetune_text`, of a resolved config.
    With ``config.resume`` finished seeds are kept, an interrupted one goes on, and new ones are added.
    """
    if config.seeds is None:
        raise UserError("sweep: --seeds says which seeds to run")
    if config.seed != 0:
        raise UserError("--seed and --seeds exclude each other")
    seeds = parse_seeds(config.seeds)
    configs = [replace(config, seeds=None, seed=seed, output_dir=config.output_dir / f"seed-{seed}") for seed in seeds]
    from accelerate import PartialState

    main = PartialState(cpu=config.device == "cpu").is_main_process
    tell = say if main else lambda line: None
    done = {each.seed: finished(each) for each in configs}
    if any(done.values()) and not config.resume:
        raise UserError(f"{config.output_dir} holds finished runs: pass --resume, or another --output-dir")
    summaries: dict[int, dict[str, Any]] = {}
    for each in configs:
        seed, before = each.seed, done[each.seed]
        tell(f"seed {seed} ({len(summaries) + 1} of {len(configs)}){': finished before' if before else ''}")
        if len(configs) == 1:
            tell(f"one seed, number {seed}: a range such as 0-4 or a list such as 0,1,2 repeats the run")
        summaries[seed] = before or run(each, say)
    scores = [scores_of(summary) for summary in summaries.values()]
    measured = {name: spread([s[name] for s in scores]) for name in scores[0] if all(name in s for s in scores)}
    together = {
        "seeds": seeds,
        "runs": {str(each.seed): each.output_dir.name for each in configs},
        **measured,
        "config": written_settings(config),
    }
    if main:
        path = config.output_dir / "summary.json"
        write_atomically(path, (json.dumps(together, indent=2) + "\n").encode())
        for name, found in measured.items():
            deviation = f" ± {found['std']:.4f}" if found["std"] is not None else ""
            say(f"{name.replace('_', ' ')}: {found['mean']:.4f}{deviation} (n = {found['n']})")
        say(f"together in {path}")
    return together


def scores_of(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers of the val and test data in a summary, under names such as val_accuracy.

    A run of images has them so; one of texts has "val" with its numbers, and "test" with those of each split by name.
    """
    flat = {name: value for name, value in summary.items() if name.startswith(("val_", "test_"))}
    splits = {"val": summary.get("val") or {}, **summary.get("test", {})}
    flat |= {f"{split}_{name}": value for split, scores in splits.items() for name, value in scores.items()}
    return {name: value for name, value in flat.items() if isinstance(value, float)}
