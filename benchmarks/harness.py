"""Timing, shared by all benchmark files: steps, clocks, graph replays, bytes. Inputs are in problems.py, what a result is held
against in parity.py (it comes first: a wrong result is not timed), floors and ceilings in floors.py."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.parity import parity
from benchmarks.problems import Problem, given, incoming, joined, leaves, make_problem, run

__all__ = [
    "Clock",
    "against_base",
    "cpu_allocations",
    "given",
    "graph_replay",
    "keep_freed_memory",
    "make_problem",
    "make_step",
    "parity",
    "peak_bytes",
    "rounds_for",
    "run",
    "sample",
]


def make_step(problem: Problem, provider: Callable[..., Tensor], direction: str) -> Callable[[], object]:
    """A call that does ``direction`` once."""
    tensors = leaves(problem)
    args, wanted = list(given(problem, tensors).values()), [tensors[name] for name in problem.leaves]
    if direction == "fwd":
        return lambda: provider(*args)

    def gradients(out: Tensor | tuple[Tensor, ...]) -> Tensor | list[Tensor]:
        whole = incoming(problem, joined(out), direction)
        return (
            whole if isinstance(out, Tensor) else [g.contiguous() for g in whole.split([t.shape[-1] for t in out], -1)]
        )

    if direction == "bwd":
        out = provider(*args)
        grad = gradients(out)
        return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        grad = gradients(provider(*args))
    return lambda: torch.autograd.grad(provider(*args), wanted, grad, allow_unused=True)


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed, for the whole process: else each large result is mapped anew, its page faults cost
    as much as the arithmetic, and whether they do depends on what ran before. True where it was done."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    m_mmap_max, m_trim_threshold = -4, -1
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


class Clock:
    """Time as pytest-benchmark sees it. On a GPU it advances by what CUDA events measured, and by nothing else."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._flush = None

    def __call__(self) -> float:
        return self.seconds if self.device.type == "cuda" else time.perf_counter()

    def timed(self, step: Callable[[], object]) -> Callable[[], object]:
        if self.device.type != "cuda":
            return step
        if self._flush is None:
            self._flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def once() -> object:
            self._flush.zero_()  # empties the L2, and keeps the device busy while the step is enqueued
            start.record()
            result = step()
            end.record()
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1e3
            return result

        return once


def sample(step: Callable[[], object], clock: Clock, rounds: int) -> list[float]:
    timed = clock.timed(step)
    times = []
    for _ in range(rounds):
        before = clock()
        timed()
        times.append(clock() - before)
    return times


def against_base(own: list[float], base: list[float]) -> dict[str, float]:
    """Of pairs of steps: ratio and difference, with the difference's quartile distance."""
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    differences = [a - b for a, b in zip(own, base, strict=True)]
    low, middle, high = statistics.quantiles(differences, n=4)
    found = {"base_s": statistics.median(base), "over_base": statistics.median(ratios)}
    return found | {"update_s": middle, "update_spread_s": high - low}


def rounds_for(step: Callable[[], object], clock: Clock, budget_s: float) -> int:
    sample(step, clock, 2)
    one = statistics.median(sample(step, clock, 3))
    return max(7, min(300, int(budget_s / max(one, 1e-7))))


def graph_replay(step: Callable[[], object], clock: Clock, rounds: int = 100) -> float | None:
    """Median seconds of a replay of ``step`` as a CUDA graph: what is left once nothing waits for launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        return None
    return statistics.median(sample(graph.replay, clock, rounds))


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Largest sum of live allocations during one call, above what lived before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    live = peak = 0
    for size in cpu_allocations(step):
        live += size
        peak = max(peak, live)
    return peak


#: What the profiler writes to stderr at every start and stop, on a machine without a GPU too; no setting of its own stops it.
_PROFILER_LINE = re.compile(rb"^(USDT|STAGE):.*profiler_(start|stop)|^ERROR:.*gpuGetDeviceCount failed")


@contextlib.contextmanager
def _without_the_profilers_lines() -> Iterator[None]:
    """stderr of the process without those lines; all others follow when it is over."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            rest = [line for line in held.read().splitlines(keepends=True) if not _PROFILER_LINE.search(line)]
            if rest:
                os.write(2, b"".join(rest))


def cpu_allocations(step: Callable[[], object]) -> list[int]:
    """Bytes of each allocation of one call on a CPU in their order, negative where memory is freed."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _without_the_profilers_lines():
        profile.start()
    try:
        step()
    finally:
        with _without_the_profilers_lines():
            profile.stop()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
