"""A training step of PETAL's Q-Former: forward, loss, backward, AdamW. Providers in petal_step.py, shapes in cases.py.

Before each timed step runs one of the frozen Q-Former alone, so that both see the same load: ``over_base`` and ``update_s``
are the medians of their ratios and differences.
"""

from __future__ import annotations

import functools
import os
import statistics

import pytest
import torch

from benchmarks import floors, harness, petal_step
from benchmarks.conftest import CLOCK, DEVICE, ROWS, measured_by
from benchmarks.peers import Missing

OP = "petal_step"
PROVIDERS = petal_step.PROVIDERS


def wanted(case, provider) -> bool:
    return provider in petal_step.EVERYWHERE or petal_step.is_main(case)


@pytest.fixture(autouse=True)
def _clean_device():
    yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@functools.lru_cache(maxsize=1)
def _base(case):
    return petal_step.PROVIDERS["base"](case, DEVICE)


def test_petal_step(request, benchmark, case, direction, provider):
    row = {"op": OP, "case": case.name, "dtype": str(case.dtype).removeprefix("torch."), "direction": direction}
    row |= {"provider": provider, **dict(case.sizes), **measured_by(), "model": petal_step.describe(case)}
    try:
        step = PROVIDERS[provider](case, DEVICE)
    except Missing as e:
        pytest.skip(f"{provider}: {e}")
    request.config.stash[ROWS].append(row)
    if provider in petal_step.OTHER_MODEL:
        row["parity"] = "another model, there for its cost"
    else:
        row["parity"] = petal_step.parity(provider, case, DEVICE) or "within the budget"
        if row["parity"] != "within the budget" and provider.startswith("fastgist"):
            pytest.fail(f"not timed, its result is wrong: {row['parity']}")
    row["trained"] = petal_step.trained(step)
    try:
        for _ in range(3 if "compiled" in provider or DEVICE.type == "cuda" else 1):
            step()
        row |= petal_step.cost_row(provider, case, DEVICE)
        row["peak_bytes"] = harness.peak_bytes(step, DEVICE)
        row["floor_s"], row["floor"] = _floor(case, row["flops"] - row["update_flops"])
        row |= floors.of_counts(petal_step.least_bytes(case), row["flops"], case.dtype, DEVICE)
        if DEVICE.type == "cuda":
            row["kernels"], row["launches"] = petal_step.kernels(step)
        (one,) = harness.sample(step, CLOCK, 1)
        rounds = min(300, max(5, int(request.config.getoption("--seconds") / one)))
        base_s: list[float] = []

        def base_first() -> None:
            base_s.extend(harness.sample(_base(case), CLOCK, 1))

        benchmark.pedantic(CLOCK.timed(step), setup=base_first, rounds=rounds, iterations=1, warmup_rounds=0)
        if DEVICE.type == "cuda" and ("compiled" in provider or provider.startswith("fastgist")):
            row["graph_replay_s"] = harness.graph_replay(step, CLOCK)
    except torch.OutOfMemoryError:
        row["parity"] += ", out of memory when timed"
        pytest.skip(f"{provider}: out of memory")
    if benchmark.stats is not None:
        stats = benchmark.stats.stats
        low, _, high = statistics.quantiles(stats.data, n=4)
        row |= {"median_s": stats.median, "min_s": stats.min, "spread_s": high - low, "rounds": stats.rounds}
        row |= {"ratio_to_floor": stats.median / row["floor_s"], "images_per_s": case["B"] / stats.median}
        row["ratio_to_roofline"] = stats.median / row["roofline_s"]
        row |= harness.against_base(list(stats.data), base_s[-stats.rounds :])
    row["load_average"] = round(os.getloadavg()[0], 2)
    benchmark.extra_info.update({k: v for k, v in row.items() if k not in ("median_s", "min_s", "spread_s")})


def _floor(case, flops: int) -> tuple[float, str]:
    """The products of the frozen Q-Former at the measured rate of the dtype's."""
    name = str(case.dtype).removeprefix("torch.")
    if DEVICE.type == "cuda":
        rate = floors.ceilings(DEVICE)[f"matmul_{name}_flops_per_s"]
    else:
        rate = floors.cpu_matmul_rate()
    return flops / rate, "FLOPs of the frozen Q-Former / matmul rate"
