"""Try every method on every backbone and write docs/pairs.md: python scripts/pairs_table.py [output]"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pairs import (  # noqa: E402
    DECODER_BACKBONES,
    MERGED,
    METHODS,
    TIMM_BACKBONES,
    TRANSFORMERS_BACKBONES,
    attempt,
    merging,
)

from fastgist import assert_training  # noqa: E402

YES = "yes"
HEAD = """\
# Which method goes on which backbone

Written by `python scripts/pairs_table.py`, which builds a tiny model of each architecture, puts the method and a gist token
on it and runs a forward and a backward. A number stands for the reason of a refusal, below the table; "alone" means that
the method works there without a gist token.
"""
MERGING = """\
What `merge`, `unmerge` and `merge_and_unload` do, tried in float64 without a gist token: the logits stay, and the way back is
bitwise. "yes": a fresh model of the class loads the merged weights. "more keys": the merged model is right, but layers without
a bias got one, for which a fresh model has no place (`merge_and_unload` warns). Empty: the method does not go there. Methods
without a column do not merge; with a linear probe and full fine-tuning there is nothing to merge.
"""


def _trains(model: nn.Module, method: str) -> None:
    """A forward and a backward reach what is trained. Full fine-tuning trains what some models keep and never read (mask
    tokens of pre-training): there it need not be all."""
    try:
        assert_training(model)
    except RuntimeError as error:
        if METHODS[method].method != "full" or "receive no gradient" not in str(error):
            raise


def outcome(build: Callable[[], nn.Module], method: str) -> tuple[str, str]:
    """("yes" | "alone" | "no", why not).

    Raises:
        RuntimeError: a pair that is taken does not train: a mistake, not a refusal.
    """
    try:
        model = attempt(build, method)
    except (ValueError, TypeError) as error:
        why = re.sub(r"^\w+: |; known: .*", "", str(error))
    else:
        _trains(model, method)
        return YES, ""
    try:
        _trains(attempt(build, method, gist=False), method)
    except (ValueError, TypeError):
        return "no", why
    return "alone", why


def table(backbones: Mapping[str, Callable[[], nn.Module]], methods: Iterable[str], reasons: list[str]) -> list[str]:
    """Lines of a Markdown table; ``reasons`` grows by what is new."""
    methods = list(methods)
    lines = ["| | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for name, build in backbones.items():
        cells = []
        for method in methods:
            result, why = outcome(build, method)
            if why and why not in reasons:
                reasons.append(why)
            cells.append(result if not why else f"{result} [{reasons.index(why) + 1}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def merged_table(backbones: Mapping[str, Callable[[], nn.Module]], reasons: list[str]) -> list[str]:
    """As :func:`table`, of which methods' updates go into the weights."""
    lines = ["| | " + " | ".join(MERGED) + " |", "|---|" + "---|" * len(MERGED)]
    for name, build in backbones.items():
        cells = []
        for method in MERGED:
            result, why = merging(build, method)
            why = f"more keys: {why}" if result == "more keys" else why.removesuffix("; nothing was changed")
            if result and why and why not in reasons:
                reasons.append(why)
            cells.append(f"{result} [{reasons.index(why) + 1}]" if result and why else result)
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def page() -> str:
    reasons: list[str] = []
    parts = [HEAD, "## timm\n", *table(TIMM_BACKBONES, METHODS, reasons), ""]
    if TRANSFORMERS_BACKBONES:
        parts += ["## transformers, encoders\n", *table(TRANSFORMERS_BACKBONES, METHODS, reasons), ""]
    if DECODER_BACKBONES:
        parts += ["## transformers, decoders\n", *table(DECODER_BACKBONES, METHODS, reasons), ""]
    everything = TIMM_BACKBONES | TRANSFORMERS_BACKBONES | DECODER_BACKBONES
    parts += ["## Merging\n", MERGING, *merged_table(everything, reasons), ""]
    parts += ["## Why not\n", *(f"{i}. {why}" for i, why in enumerate(reasons, 1)), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "pairs.md").write_text(page())
