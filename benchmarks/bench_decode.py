"""One token through a layer whose update is not merged, and through a small Llama; providers in decode.py, shapes in cases.py.

Every call stands behind one of the base, as in bench_petal_step.py: ``over_base`` is the median of their ratios and
``update_s`` of their differences.
"""

from __future__ import annotations

import functools
import os
import statistics

import pytest
import torch

from benchmarks import decode, floors, harness
from benchmarks.conftest import CLOCK, DEVICE, ROWS, measured_by
from benchmarks.peers import Missing

OP = "decode"
PROVIDERS = decode.LAYERS


def wanted(case, provider) -> bool:
    return not decode.is_llama(case) or provider in decode.LLAMA


@functools.lru_cache(maxsize=1)
def _base(case):
    call, given = decode.build("base", case, DEVICE)
    return lambda: call(*given)


@torch.no_grad()
def test_decode(request, benchmark, case, direction, provider):
    row = {"op": OP, "case": case.name, "dtype": str(case.dtype).removeprefix("torch."), "direction": direction}
    row |= {"provider": provider, **dict(case.sizes), **measured_by(), "R": decode.RANK}
    try:
        call, given = decode.build(provider, case, DEVICE)
    except Missing as e:
        pytest.skip(f"{provider}: {e}")
    request.config.stash[ROWS].append(row)
    if provider == "base" or (provider == "PEFT LoRA" and decode.is_llama(case)):
        row["parity"] = "another function, there for its cost"
    else:
        row["parity"] = decode.parity(provider, case, DEVICE) or "within the budget"
        if row["parity"] != "within the budget" and provider.startswith("fastgist"):
            pytest.fail(f"not timed, its result is wrong: {row['parity']}")

    def step():
        return call(*given)

    row |= {"peak_bytes": harness.peak_bytes(step, DEVICE)}
    row |= floors.of_counts(*decode.least(provider, case), case.dtype, DEVICE)
    rounds = harness.rounds_for(step, CLOCK, request.config.getoption("--seconds"))
    base_s: list[float] = []

    def base_first() -> None:
        base_s.append(harness.sample(_base(case), CLOCK, 2)[1])  # the first warms what the harness has cooled

    benchmark.pedantic(CLOCK.timed(step), setup=base_first, rounds=rounds, iterations=1, warmup_rounds=0)
    if benchmark.stats is not None:
        stats = benchmark.stats.stats
        low, _, high = statistics.quantiles(stats.data, n=4)
        row |= {"median_s": stats.median, "min_s": stats.min, "spread_s": high - low, "rounds": stats.rounds}
        row |= harness.against_base(list(stats.data), base_s[-stats.rounds :])
        row |= {
            "floor_s": row["base_s"],
            "floor": "the base layer, before each call",
            "ratio_to_floor": row["over_base"],
        }
        row["tokens_per_s"] = case["M"] / stats.median
        row["ratio_to_roofline"] = stats.median / row["roofline_s"]
    row["load_average"] = round(os.getloadavg()[0], 2)
    benchmark.extra_info.update({k: v for k, v in row.items() if k not in ("median_s", "min_s", "spread_s")})
