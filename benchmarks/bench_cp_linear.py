"""cp_linear: forward and backward against its peers; shapes in cases.py, peers in peers.py. Forms that form the dense update
or an R x R core, and AdaLoRA compiled, are timed at the main shapes alone: many rows, one layer, one fold."""

from __future__ import annotations

OP = "cp_linear"
#: Timed with one weight of one fold: with many rows, and but for the last at a language model's 1 and 512.
ONE_WEIGHT = ("released", "released, compiled", "dense delta, compiled", "PEFT AdaLoRA, compiled")


def wanted(case, provider) -> bool:
    one = case.get("W", 1) == case.get("G", 1) == 1
    rows = case["M"] >= 3152 or (case["M"] in (1, 512) and provider != "PEFT AdaLoRA, compiled")
    return provider not in ONE_WEIGHT or (one and rows)


def test_cp_linear(timed, case, direction, provider):
    timed(OP, case, direction, provider)
