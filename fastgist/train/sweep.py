"""``fastgist finetune --seeds``: the same run from several seeds, a folder each, and what they came to together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastgist.train.checkpoint import write_atomically
from fastgist.train.config import FinetuneConfig, UserError
from fastgist.train.finetune import finetune
from fastgist.train.settings import written_settings
from fastgist.train.statistics import spread

__all__ = ["finished", "parse_seeds", "sweep"]


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


def finished(config: FinetuneConfig) -> dict[str, Any] | None:
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


def sweep(config: FinetuneConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run ``config`` once a seed of ``config.seeds``, in ``seed-<n>`` folders; returns what summary.json then holds.

    With ``config.resume`` finished seeds are kept, an interrupted one goes on, and new ones are added.
    """
    if config.seeds is None:
        raise UserError("sweep: --seeds says which seeds to run")
    if config.seed != 0:
        raise UserError("--seed and --seeds exclude each other")
    seeds = parse_seeds(config.seeds)
    runs = [replace(config, seeds=None, seed=seed, output_dir=config.output_dir / f"seed-{seed}") for seed in seeds]
    from accelerate import PartialState

    main = PartialState(cpu=config.device == "cpu").is_main_process
    tell = say if main else lambda line: None
    done = {run.seed: finished(run) for run in runs}
    if any(done.values()) and not config.resume:
        raise UserError(f"{config.output_dir} holds finished runs: pass --resume, or another --output-dir")
    summaries: dict[int, dict[str, Any]] = {}
    for run in runs:
        tell(f"seed {run.seed} ({len(summaries) + 1} of {len(runs)}){': finished before' if done[run.seed] else ''}")
        summaries[run.seed] = done[run.seed] or finetune(run, say)
    together = {
        "seeds": seeds,
        "runs": {str(seed): str(run.output_dir.name) for seed, run in zip(seeds, runs, strict=True)},
        **{name: spread([s[name] for s in summaries.values()]) for name in _measured(summaries)},
        "config": written_settings(config),
    }
    if main:
        path = config.output_dir / "summary.json"
        write_atomically(path, (json.dumps(together, indent=2) + "\n").encode())
        for name in _measured(summaries):
            found: Any = together[name]
            deviation = f" ± {found['std']:.4f}" if found["std"] is not None else ""
            say(f"{name.replace('_', ' ')}: {found['mean']:.4f}{deviation} (n = {found['n']})")
        say(f"together in {path}")
    return together


def _measured(summaries: dict[int, dict[str, Any]]) -> list[str]:
    """The numbers of the val and test images that every run has."""
    each = list(summaries.values())
    return [
        name
        for name, value in each[0].items()
        if name.startswith(("val_", "test_")) and isinstance(value, float) and all(name in s for s in each)
    ]
