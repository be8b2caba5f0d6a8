"""A whole training step of a ViT with GIST: forward, loss, backward, AdamW. Providers in train_step.py, shapes in cases.py."""

from __future__ import annotations

import statistics

import pytest
import torch

from benchmarks import floors, harness, train_step
from benchmarks.conftest import CLOCK, DEVICE, ROWS, measured_by
from benchmarks.peers import Missing

OP = "train_step"
PROVIDERS = train_step.PROVIDERS


@pytest.fixture(autouse=True)
def _clean_device():
    yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def test_train_step(request, benchmark, case, direction, provider):
    row = {"op": OP, "case": case.name, "dtype": str(case.dtype).removeprefix("torch."), "direction": direction}
    row |= {"provider": provider, **dict(case.sizes), **measured_by(), "model": train_step.describe(case)}
    try:
        step = train_step.PROVIDERS[provider](case, DEVICE)
    except Missing as e:
        pytest.skip(f"{provider}: {e}")
    request.config.stash[ROWS].append(row)
    if provider in train_step.OTHER_MODEL:
        row["parity"] = "another model, there for its cost"
    else:
        row["parity"] = train_step.parity(provider, case, DEVICE) or "within the budget"
        if row["parity"] != "within the budget" and provider.startswith("fastgist"):
            pytest.fail(f"not timed, its result is wrong: {row['parity']}")
    try:
        for _ in range(3):  # the optimiser has its state, a compiled step its code
            step()
        row["peak_bytes"] = harness.peak_bytes(step, DEVICE)
        row["flops"] = train_step.flops(case)
        row["floor_s"], row["floor"] = _floor(case)
        row |= floors.of_counts(train_step.least_bytes(case), row["flops"], case.dtype, DEVICE)
        if DEVICE.type == "cuda":
            row["kernels"], row["launches"] = train_step.kernels(step)
        rounds = max(5, harness.rounds_for(step, CLOCK, request.config.getoption("--seconds")))
        benchmark.pedantic(CLOCK.timed(step), rounds=rounds, iterations=1, warmup_rounds=1)
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
    benchmark.extra_info.update({k: v for k, v in row.items() if k not in ("median_s", "min_s", "spread_s")})


def _floor(case) -> tuple[float, str]:
    """On a GPU the step's FLOPs at the measured rate of the dtype's matrix products; on a CPU likewise, this run's."""
    name = str(case.dtype).removeprefix("torch.")
    if DEVICE.type == "cuda":
        rate = floors.ceilings(DEVICE)[f"matmul_{name}_flops_per_s"]
    else:
        rate = floors.cpu_matmul_rate()
    return train_step.flops(case) / rate, "FLOPs / matmul rate"
