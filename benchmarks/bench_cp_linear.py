"""cp_linear: forward and backward against its peers; shapes in cases.py, peers in peers.py. Forms that form the dense update
or an R x R core, and AdaLoRA compiled, are timed at the main shapes alone: many rows, one layer, one fold."""

from __future__ import annotations

OP = "cp_linear"
MAIN_ONLY = ("released", "released, compiled", "dense delta, compiled", "PEFT AdaLoRA, compiled")


def wanted(case, provider) -> bool:
    main = case["M"] >= 3152 and case.get("W", 1) == case.get("G", 1) == 1
    return main or provider not in MAIN_ONLY


def test_cp_linear(timed, case, direction, provider):
    timed(OP, case, direction, provider)
