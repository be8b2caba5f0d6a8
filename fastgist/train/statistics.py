"""Means, spreads and paired differences of repeated runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

__all__ = ["paired", "spread"]


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation (None for one value) and count."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "n": len(values)}


def paired(ours: Sequence[float], base: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """The mean of ours - base over pairs, its two-sided Student interval and p-value (scipy).

    Both are None where one pair says nothing about the spread. Equal differences give an interval of no width; its
    p-value is None.

    Raises:
        ValueError: no pairs, unequal lengths, a confidence outside (0, 1).
    """
    from scipy import stats

    if len(ours) != len(base) or not ours:
        raise ValueError(f"paired: expected pairs, got {len(ours)} and {len(base)} numbers")
    if not 0 < confidence < 1:
        raise ValueError(f"paired: confidence must be in (0, 1), got {confidence}")
    differences = [a - b for a, b in zip(ours, base, strict=True)]
    found: dict[str, Any] = {**spread(differences), "confidence": confidence}
    found |= {"low": None, "high": None, "p_value": None}
    if len(differences) == 1:
        return found
    # Equal up to how the differences round: the test's own variance would be noise.
    rounding = 4 * math.ulp(max(map(abs, [*ours, *base, 1e-300])))
    if max(differences) - min(differences) <= rounding:
        return found | {"std": 0.0, "low": found["mean"], "high": found["mean"]}
    test = stats.ttest_rel(ours, base)
    interval = test.confidence_interval(confidence)
    return found | {"low": float(interval.low), "high": float(interval.high), "p_value": float(test.pvalue)}
