"""Numbers that change over a training run: a weight that is warmed up, a temperature that falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Cosine", "Linear", "Schedule", "value_at"]

#: Training progress in [0, 1] -> the number there.
Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Linear:
    """``start`` to ``end`` in a straight line over the progress from ``since`` to ``until``; constant outside."""

    start: float
    end: float
    since: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.since < self.until <= 1.0:
            raise ValueError(
                f"{type(self).__name__}: expected 0 <= since < until <= 1, got {self.since} and {self.until}"
            )

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * self._share(progress)

    def _share(self, progress: float) -> float:
        return min(1.0, max(0.0, (progress - self.since) / (self.until - self.since)))


@dataclass(frozen=True)
class Cosine(Linear):
    """``start`` to ``end`` along half a cosine: slow at both ends."""

    def _share(self, progress: float) -> float:
        return 0.5 - 0.5 * math.cos(math.pi * super()._share(progress))


def value_at(number: float | Schedule, progress: float) -> float:
    return float(number(progress)) if callable(number) else float(number)
