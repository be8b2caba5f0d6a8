"""Ceilings of a device, measured in the same run, and what they make of a case: its roofline and its floor.

A roofline is counted: the bytes that must move and the FLOPs that must be done (cases.py), each over the device's ceiling. A
floor is work: on a GPU the roofline, on a CPU the copies or matrix products that a case cannot do without, timed.

What is a CPU's ceiling: for float32 multiply-adds of registers alone, on all threads (fma.c, compiled where there is a C
compiler): no kernel does more, while torch.mm's library may do less on one maker's processors than on another's. The best
torch.mm stands beside it. For bytes a copy, or a sum, as large as what the case moves: a cache that holds the case is faster
than memory.
"""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import Case, costs, outputs
from benchmarks.harness import Clock, rounds_for, sample
from benchmarks.problems import Problem

__all__ = [
    "beside",
    "ceilings",
    "cpu_ceilings",
    "cpu_copy_rate",
    "cpu_flop_rate",
    "cpu_floor",
    "cpu_fma_rate",
    "cpu_matmul_rate",
    "floor_seconds",
    "of_counts",
    "roofline",
]

#: Products whose fastest is a CPU's matmul rate: squares, and as many rows and columns as layers have.
_PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (3072, 768, 768), (4096, 1024, 1024))


@functools.cache
def ceilings(device: torch.device) -> dict[str, float]:
    """Copy bandwidth (bytes read plus written, per second) and matmul rates (FLOP/s) of this card, random data."""
    clock = Clock(device)
    found = {"copy_bytes_per_s": _copy_bandwidth(device, clock)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
        times = sample(functools.partial(torch.mm, a, b), clock, 13)[3:]
        found[f"matmul_{str(dtype).removeprefix('torch.')}_flops_per_s"] = 2 * 8192**3 / statistics.median(times)
    return found


def cpu_ceilings() -> dict[str, float | str]:
    """Of this CPU, for a run's record."""
    found: dict[str, float | str] = {"copy_bytes_per_s": cpu_copy_rate()}
    found["matmul_float32_flops_per_s"] = cpu_matmul_rate()
    fma = cpu_fma_rate()
    if fma is not None:
        found["fma_float32_flops_per_s"] = fma
    return found | {"flops_ceiling": cpu_flop_rate()[1]}


@functools.cache
def cpu_matmul_rate(dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of this machine's fastest product of a few shapes, random data."""
    best = 0.0
    for m, k, n in _PRODUCTS:
        a, b, out = (torch.randn(*shape).to(dtype) for shape in ((m, k), (k, n), (m, n)))
        times = sample(functools.partial(torch.mm, a, b, out=out), Clock(torch.device("cpu")), 4)
        best = max(best, 2 * m * k * n / min(times))
    return best


@functools.cache
def cpu_fma_rate() -> float | None:
    """FLOP/s of float32 multiply-adds of registers on as many threads as torch uses, or None without a C compiler."""
    function = _fma()
    if function is None:
        return None
    threads = torch.get_num_threads()
    rounds, best = 2**17, 0.0

    def one(done: list[float]) -> None:
        sink = ctypes.c_float(0.0)
        done.append(function(rounds, ctypes.byref(sink)))

    for _ in range(20):
        done: list[float] = []
        workers = [threading.Thread(target=one, args=(done,)) for _ in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - start
        best = max(best, sum(done) / seconds)
        rounds = max(rounds, min(2**24, int(rounds * 0.02 / seconds)))  # some 20 ms: starting threads must not be seen
    return best


@functools.cache
def _fma() -> Callable[..., float] | None:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma.so"
        options = "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"
        made = subprocess.run(
            [compiler, *options, "-o", str(library), str(Path(__file__).with_name("fma.c"))], capture_output=True
        )
        if made.returncode:
            return None
        function = ctypes.CDLL(str(library)).multiply_add
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    return function


def cpu_flop_rate(dtype: torch.dtype = torch.float32) -> tuple[float, str]:
    """(FLOP/s, what they are): the ceiling of a row's FLOPs. Half precision has instructions of its own."""
    mm, fma = cpu_matmul_rate(dtype), cpu_fma_rate() if dtype == torch.float32 else None
    if fma is None or fma < mm:
        return mm, "the fastest torch.mm of a few shapes"
    return fma, "multiply-adds of registers"


def cpu_copy_rate(moved: int = 2**29) -> float:
    """Bytes per second of a copy, read and written ones, or of a sum that only reads, whichever is more, where as many are
    moved (to the power of two below): up to some megabytes a cache holds them, beyond 2^29 none does."""
    return _cpu_copy_rate(min(29, max(16, math.floor(math.log2(moved)))))


@functools.cache
def _cpu_copy_rate(log_moved: int) -> float:
    both = torch.rand(2 ** (log_moved - 2))
    source, target = both.chunk(2)
    clock, rounds = Clock(torch.device("cpu")), 20 if log_moved > 26 else 200
    calls = (lambda: target.copy_(source)), (lambda: both.sum())
    return 2**log_moved / min(min(sample(call, clock, rounds)) for call in calls)


def _copy_bandwidth(device: torch.device, clock: Clock, size: int = 2**31) -> float:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(sample(lambda: target.copy_(source), clock, 20))


def roofline(op: str, case: Case, direction: str, device: torch.device) -> dict[str, float | int | str]:
    """Of a row: the bytes and FLOPs that it cannot do without, what each takes at this device's measured ceilings, and the
    larger of both."""
    moved, flops = costs(op, case, direction)
    return of_counts(moved, flops, case.dtype, device)


def of_counts(moved: int, flops: int, dtype: torch.dtype, device: torch.device) -> dict[str, float | int | str]:
    """:func:`roofline` of what was counted elsewhere: a step's, a token's."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        top = ceilings(device)
        copy, rate = top["copy_bytes_per_s"], top.get(f"matmul_{name}_flops_per_s", math.inf)
        what = "torch.mm"
    else:
        copy = cpu_copy_rate(moved)
        rate, what = cpu_flop_rate(dtype) if flops else (math.inf, "none")
    by = {"bytes_s": moved / copy, "flops_s": flops / rate}
    return {"bytes": moved, "flops": flops, **by, "roofline_s": max(by.values()), "flops_ceiling": what}


def beside(row: dict) -> str:
    """A row's roofline in words, for tables."""
    by = "bytes" if row["bytes_s"] >= row["flops_s"] else "FLOPs"
    return (
        f"{row['median_s'] / row['roofline_s']:.2f} of its roofline ({row['roofline_s'] * 1e3:.4g} ms by {by}: "
        f"{row['bytes'] / 1e6:.4g} MB, {row['flops'] / 1e9:.4g} GFLOP)"
    )


def floor_seconds(problem: Problem, direction: str) -> tuple[float, str]:
    """(seconds that no implementation can beat here, how they were found)."""
    if problem.device.type == "cuda":
        found = roofline(problem.op, problem.case, direction, problem.device)
        by_bytes = found["bytes_s"] >= found["flops_s"]
        return found["roofline_s"], "bytes / copy bandwidth" if by_bytes else "FLOPs / matmul rate"
    clock = Clock(problem.device)
    work, what = cpu_floor(problem)
    return statistics.median(sample(work, clock, rounds_for(work, clock, 1.0))), what


def cpu_floor(problem: Problem) -> tuple[Callable[[], object], str]:
    t, case = problem.tensors, problem.case
    if problem.op in ("bidirectional_kl", "gist_loss"):
        copies = [(t[n], torch.empty_like(t[n])) for n in ("z", "g")]
        return lambda: [target.copy_(source) for source, target in copies], "copy of the two tensors, same run"
    if problem.op == "topk_kl":
        copy = torch.empty_like(t["z"])
        return lambda: copy.copy_(t["z"]), "copy of the student's logits, same run"
    if problem.op == "gelu":
        once, twice = torch.empty_like(t["x"]), torch.empty_like(t["x"])
        return lambda: (once.copy_(t["x"]), torch.add(t["x"], once, out=twice)), "a copy and a sum, same run"
    rows, width = case["M"], case.dtype

    def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return a, b, torch.empty(a.shape[0], b.shape[1], dtype=width)

    if problem.op == "cp_linear":
        x, w, u = t["x"], t["weight"], t["u"]
        low, y = torch.randn(rows, case["R"], dtype=width), torch.randn(rows, w.shape[0], dtype=width)
        factor = t["v"].repeat(outputs(case), 1)
        # The update can be added to W for what it costs to form it: no product with a factor is needed for y and dx.
        products = [product(x, w.T), product(y, w), product(x, u), product(y, factor)]
        products += [product(low.T, x), product(low.T, y)]
    elif problem.op == "cp_update":
        x, u, v = t["x"], t["u"], t["v"]
        low = torch.randn(rows, case["R"], dtype=width)
        products = [product(x, u), product(low, v.T), product(x, v), product(low, u.T)]
        products += [product(low.T, x), product(low.T, x)]
    elif problem.op == "adapter":
        x, down, up = t["x"], t["down"], t["up"]
        low = torch.randn(rows, case["H"], dtype=width)
        products = [product(x, down.T), product(low, up.T)]
        products += [product(x, up), product(low, down), product(low.T, x), product(low.T, x)]
    else:
        weight = t["weight"]
        logits = torch.randn(rows, case["V"], dtype=width)
        products = [product(t[n], weight.T) for n in ("hidden", "gist_hidden")]
        products += [product(logits, weight)] * 2 + [product(logits.T, t["hidden"])] * 2
    return lambda: [torch.mm(a, b, out=out) for a, b, out in products], "its matrix products alone, same run"
