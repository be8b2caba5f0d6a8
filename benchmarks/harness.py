"""Inputs, parity and timing, shared by all benchmark files. Parity comes first: a wrong result is not timed."""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, costs, outputs
from fastgist.testing import within_budget

#: Tensors whose first dimension is the rows M: parity compares their first and last rows.
ROWWISE = {"z", "g", "x", "y", "log_probs", "indices", "hidden", "gist_hidden", "target"}
CHUNK = 256


@dataclass
class Problem:
    """The tensors of one case, which of them get gradients, and the incoming gradient."""

    op: str
    case: Case
    tensors: dict[str, Tensor]
    leaves: tuple[str, ...]
    options: dict[str, object] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def is_loss(self) -> bool:
        return self.op not in ("cp_linear", "cp_update", "adapter", "gelu")


def make_problem(op: str, case: Case, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * spread).to(case.dtype)

    def targets(classes: int) -> Tensor:
        return torch.randint(0, classes, (case["M"],), generator=generator, device=device)

    if op == "bidirectional_kl":
        shape = case["M"], case["V"]
        return Problem(
            op, case, {"z": randn(*shape, spread=3), "g": randn(*shape, spread=3)}, ("z", "g"), {"temperature": 3.0}
        )
    if op == "gist_loss":
        shape = case["M"], case["V"]
        tensors = {"z": randn(*shape, spread=3), "g": randn(*shape, spread=3), "target": targets(case["V"])}
        return Problem(op, case, tensors, ("z", "g"))
    if op == "topk_kl":
        m, v, k = case["M"], case["V"], case["K"]
        known = (randn(m, v, spread=3) / 3.0).float().log_softmax(-1).topk(k)
        tensors = {"z": randn(m, v, spread=3), "log_probs": known.values, "indices": known.indices}
        return Problem(op, case, tensors, ("z",), {"temperature": 3.0})
    if op == "gist_linear_loss":
        m, v, h = case["M"], case["V"], case["H"]
        tensors = {"hidden": randn(m, h), "gist_hidden": randn(m, h), "weight": randn(v, h, spread=2 / math.sqrt(h))}
        tensors |= {"bias": randn(v, spread=0.1), "target": targets(v)}
        return Problem(op, case, tensors, ("hidden", "gist_hidden", "weight", "bias"))
    m, d = case["M"], case["d"]
    if op == "gelu":
        return Problem(op, case, {"x": randn(m, d)}, ("x",))
    if op == "cp_linear":
        r = case["R"]
        n, many = d * outputs(case), (outputs(case),) if outputs(case) > 1 else ()
        tensors = {"x": randn(m, d), "weight": randn(n, d, spread=d**-0.5), "bias": randn(n, spread=0.1)}
        tensors |= {"u": randn(d, r, spread=d**-0.5), "v": randn(d, r, spread=0.3), "gain": randn(*many, r)}
        return Problem(op, case, tensors, ("x", "u", "v", "gain"))
    if op == "cp_update":
        r = case["R"]
        tensors = {"y": randn(m, d), "x": randn(m, d), "u": randn(d, r, spread=d**-0.5), "v": randn(d, r, spread=0.3)}
        return Problem(op, case, tensors, tuple(tensors))
    h = case["H"]
    tensors = {"x": randn(m, d), "down": randn(h, d, spread=d**-0.5), "down_bias": randn(h, spread=0.1)}
    tensors |= {"up": randn(d, h, spread=h**-0.5), "up_bias": randn(d, spread=0.1)}
    return Problem(op, case, tensors, tuple(tensors))


def given(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a provider is built from and called with: of cp_linear's W weights, one above the other, each by itself."""
    count = problem.case.get("W", 1)
    if count == 1:
        return tensors
    return tensors | {name: tensors[name].chunk(count) for name in ("weight", "bias")}


def joined(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else torch.cat(out, -1)


def incoming(problem: Problem, out: Tensor, direction: str) -> Tensor:
    if problem.is_loss:
        return torch.full_like(out, 2.0 if direction.endswith("scaled") else 1.0)
    return torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device).to(out.dtype)


# -- parity ------------------------------------------------------------------------------------------------------------


def _formula(op: str) -> Callable[..., Tensor]:
    return getattr(importlib.import_module(f"fastgist.reference.{op}"), op)


def _rows(name: str, t: Tensor) -> Tensor:
    """The rows that parity compares: those of the first and of the last chunk. A large weight's are as many."""
    if t.shape[0] <= 2 * CHUNK or (name not in ROWWISE and t.numel() <= 2**25):
        return t
    return torch.cat([t[:CHUNK], t[(t.shape[0] - 1) // CHUNK * CHUNK :]])


def _evaluate(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The formula in ``dtype``: the result and the gradients, on the CPU, of the rows that parity compares."""
    rows = problem.case["M"]
    formula = _formula(problem.op)
    fixed = {n: t for n, t in problem.tensors.items() if n not in ROWWISE}
    fixed = {n: (t.to(dtype) if t.is_floating_point() else t) for n, t in fixed.items()}
    for name in fixed:
        fixed[name] = fixed[name].detach().requires_grad_(name in problem.leaves)
    outs, grads = [], {name: [] for name in problem.leaves if name in ROWWISE}
    edge_rows = rows <= 2 * CHUNK
    every_chunk = any(name not in ROWWISE for name in problem.leaves)
    for start in range(0, rows, CHUNK):
        part = {n: problem.tensors[n][start : start + CHUNK] for n in problem.tensors if n in ROWWISE}
        part = {n: (t.to(dtype) if t.is_floating_point() else t).detach() for n, t in part.items()}
        compared = edge_rows or start < CHUNK or start + CHUNK >= rows
        with torch.set_grad_enabled(compared or every_chunk):
            for name, t in part.items():
                t.requires_grad_(name in problem.leaves)
            args = [part.get(name, fixed.get(name)) for name in problem.tensors]
            if problem.is_loss:
                out = formula(*args, reduction="sum", **problem.options) / rows
                if compared or every_chunk:
                    out.backward()
                outs.append(out.detach())
            else:
                out = formula(*args, **problem.options)
                if compared or every_chunk:
                    out.backward(incoming_rows(problem, start, out))
                outs.append(out.detach())
        if compared:
            for name in grads:
                grads[name].append(part[name].grad)
    found = {name: torch.cat(parts).cpu() for name, parts in grads.items()}
    found |= {name: _rows(name, fixed[name].grad).cpu() for name in problem.leaves if name in fixed}
    if problem.is_loss:
        return torch.stack(outs).double().sum().to(outs[0].dtype).cpu(), found
    return _rows("x", torch.cat(outs)).cpu(), found


def incoming_rows(problem: Problem, start: int, out: Tensor) -> Tensor:
    """The rows of :func:`incoming` that belong to ``out``, a chunk of the result that begins at row ``start``."""
    whole = problem.tensors["x"]
    shape = (whole.shape[0], out.shape[1])
    grad = torch.randn(shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device).to(whole.dtype)
    return grad[start : start + out.shape[0]].to(out.dtype)


def _term_scales(problem: Problem) -> dict[str, float]:
    """Of small gradients of a layer that are sums over its rows (a bias's, a gain's): the largest sum of the absolute terms,
    which is what rounding is proportional to where they cancel."""
    names = [n for n in problem.leaves if n not in ROWWISE and problem.tensors[n].numel() <= 4096]
    if problem.is_loss or not names:
        return {}
    formula = _formula(problem.op)
    wide = {n: t.detach().double() for n, t in problem.tensors.items()}
    rowwise = [n for n in problem.tensors if n in ROWWISE]
    totals = {n: torch.zeros_like(wide[n]) for n in names}

    def row(leaves: dict[str, Tensor], grad: Tensor, *rows: Tensor) -> Tensor:
        given = wide | dict(zip(rowwise, (r[None] for r in rows), strict=True)) | leaves
        return (formula(*(given[n] for n in problem.tensors), **problem.options) * grad).sum()

    each = torch.func.vmap(torch.func.grad(row), in_dims=(None, 0, *(0 for _ in rowwise)))
    with torch.no_grad():
        width = formula(*(wide[n][:1] if n in rowwise else wide[n] for n in problem.tensors), **problem.options).shape[
            1
        ]
    for start in range(0, problem.case["M"], CHUNK):
        rows = [wide[n][start : start + CHUNK] for n in rowwise]
        grads = incoming_rows(problem, start, rows[0].new_empty(rows[0].shape[0], width))
        for name, found in each({n: wide[n] for n in names}, grads, *rows).items():
            totals[name] += found.abs().sum(0)
    return {n: float(t.max()) for n, t in totals.items()}


@functools.lru_cache(maxsize=1)
def _expected(op: str, case: Case, device: torch.device):
    """(plain, exact, scales): the formula in the case's dtype and in float64, and :func:`_term_scales`. Kept while one case's
    providers are compared."""
    problem = make_problem(op, case, device)
    return _evaluate(problem, case.dtype), _evaluate(problem, torch.float64), _term_scales(problem)


def parity(problem: Problem, provider: Callable[..., Tensor]) -> str | None:
    """None if the provider's result and gradients are within the error budget, else what is wrong."""
    (plain, plain_grads), (exact, exact_grads), scales = _expected(problem.op, problem.case, problem.device)
    out, grads = run(problem, provider)
    if problem.is_loss:
        out = out.to(plain.dtype)
        wrong = within_budget(out.cpu(), plain, exact, scale=float(exact.abs()) + 1.0)
    else:
        wrong = within_budget(_rows("x", out).cpu(), plain, exact)
    if wrong:
        return f"result: {wrong}"
    for name in problem.leaves:
        if grads[name] is None:
            return f"no gradient for {name}"
        ours = _rows(name, grads[name]).cpu()
        wrong = within_budget(ours, plain_grads[name], exact_grads[name], scale=scales.get(name))
        if wrong:
            return f"gradient of {name}: {wrong}"
    return None


def leaves(problem: Problem) -> dict[str, Tensor]:
    return {n: t.detach().requires_grad_(n in problem.leaves) for n, t in problem.tensors.items()}


def run(problem: Problem, provider: Callable[..., Tensor], direction: str = "fwd_bwd"):
    tensors = leaves(problem)
    out = joined(provider(*given(problem, tensors).values()))
    wanted = [tensors[name] for name in problem.leaves]
    grads = torch.autograd.grad(out, wanted, incoming(problem, out, direction), allow_unused=True)
    return out.detach(), dict(zip(problem.leaves, grads, strict=True))


# -- timing ------------------------------------------------------------------------------------------------------------


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


def cpu_allocations(step: Callable[[], object]) -> list[int]:
    """Bytes of each allocation of one call on a CPU in their order, negative where memory is freed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]


# -- floors ------------------------------------------------------------------------------------------------------------


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


@functools.cache
def cpu_matmul_rate(dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a product of this machine, random data."""
    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    times = sample(functools.partial(torch.mm, a, b), Clock(torch.device("cpu")), 13)[3:]
    return 2 * 1024**3 / statistics.median(times)


@functools.cache
def cpu_copy_rate() -> float:
    """Bytes read plus written per second by a copy that no cache holds."""
    return _copy_bandwidth(torch.device("cpu"), Clock(torch.device("cpu")), 2**28)


def _copy_bandwidth(device: torch.device, clock: Clock, size: int = 2**31) -> float:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(sample(lambda: target.copy_(source), clock, 20))


def roofline(op: str, case: Case, direction: str, device: torch.device) -> dict[str, float | int]:
    """Of a row: the bytes and FLOPs that it cannot do without, what each takes at this device's measured ceilings, and the
    larger of both. On a CPU a case that a cache holds may be faster than its bytes: the ceiling is memory's."""
    moved, flops = costs(op, case, direction)
    name = str(case.dtype).removeprefix("torch.")
    if device.type == "cuda":
        top = ceilings(device)
        copy, rate = top["copy_bytes_per_s"], top.get(f"matmul_{name}_flops_per_s", math.inf)
    else:
        copy, rate = cpu_copy_rate(), cpu_matmul_rate(case.dtype) if flops else math.inf
    by = {"bytes_s": moved / copy, "flops_s": flops / rate}
    return {"bytes": moved, "flops": flops, **by, "roofline_s": max(by.values())}


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
