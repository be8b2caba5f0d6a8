"""What a PETAL step and a decoded token are to reach on a CPU, and which of the committed readings do.

tests/test_petal_readings.py holds the readings against this, and what they miss against the list in DESIGN.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

#: Released : ours, FLOPs of the update; and the time of a step, each as a multiple of the frozen one that ran beside it.
FLOPS, STEP = 2.0, 1.5
#: No slower than this share of the released form, whatever else is missed.
NEVER_BELOW = 0.95
#: A layer with factors that are not merged : the layer alone, at one row.
DECODED = 1.1
STEPS = ("fastgist", "fastgist cp")
LAYERS = ("fastgist CPLinear", "fastgist LoRALinear")


def short(row: dict[str, Any]) -> str:
    """``B8_T20_R64`` of a case of petal_step."""
    return "_".join(row["case"].split("_")[:3])


def step_ratios(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, float, float]]:
    """(case, provider, released : ours in update FLOPs, in the step's time) of every reading."""
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["provider"]] = row
    for of_case in by_case.values():
        released = of_case["released"]
        for provider in STEPS:
            ours = of_case[provider]
            flops = released["update_flops"] / ours["update_flops"]
            yield short(ours), provider, flops, released["over_base"] / ours["over_base"]


def missed_steps(rows: Iterable[dict[str, Any]]) -> set[str]:
    """As ``B8_T20_R64 fastgist cp, step``."""
    found = set()
    for case, provider, flops, step in step_ratios(rows):
        found |= {f"{case} {provider}, FLOPs"} if flops < FLOPS else set()
        found |= {f"{case} {provider}, step"} if step < STEP else set()
    return found


def missed_tokens(rows: Iterable[dict[str, Any]]) -> set[str]:
    """As ``M1_d2048 bfloat16 fastgist CPLinear``."""
    ours = [row for row in rows if row["provider"] in LAYERS]
    return {f"{row['case']} {row['dtype']} {row['provider']}" for row in ours if row["over_base"] > DECODED}
