"""Calls timed in turns, so that what else the machine does meets all of them: the ratio within a round is what counts."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["summary", "take_turns"]


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.thread_time,
    turn_seconds: float = 0.0,
    most_rounds: int = 301,
) -> dict[str, list[float]]:
    """Seconds of each call, one number a round.

    In every round each has its turn, in an order drawn for it (the one before decides what is in the caches). A turn is one
    call, or, where that is shorter than ``turn_seconds``, as many as fill them; its number is then their median, so that
    the first ones, which find the caches full of another's data, do not count. Rounds: what ``seconds`` of ``clock`` allow,
    5 to ``most_rounds``.
    """
    names, order = list(calls), random.Random(0)
    repeats = {}
    for name in names:
        calls[name]()
        start = clock()
        calls[name]()
        once = max(clock() - start, 1e-9)
        repeats[name] = max(1, round(turn_seconds / once))
    times: dict[str, list[float]] = {name: [] for name in names}
    begun, rounds = clock(), 0
    while rounds < 5 or (rounds < most_rounds and clock() - begun < seconds):
        for name in order.sample(names, len(names)):
            call, turn = calls[name], []
            for _ in range(repeats[name]):
                start = clock()
                call()
                turn.append(clock() - start)
            times[name].append(statistics.median(turn))
        rounds += 1
    return times


def summary(times: Mapping[str, list[float]], base: str) -> dict[str, dict[str, object]]:
    """Of each call the median and, of its ratios to ``base`` in the same round, the quartiles."""
    found: dict[str, dict[str, object]] = {}
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times[base], strict=True)]
        found[name] = {"median_s": statistics.median(own), "over_base": statistics.quantiles(ratios, n=4)}
    return found
