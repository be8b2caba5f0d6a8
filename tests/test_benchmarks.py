"""The benchmarks themselves: floors as derived by hand, a parity check that finds what is wrong, peers that agree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from benchmarks.cases import CASES, DIRECTIONS, case, costs
from benchmarks.peers import OTHER_FUNCTION, PEERS, Missing
from fastgist.backends import OPS

CPU = torch.device("cpu")
SMALL = {
    "bidirectional_kl": case(torch.float32, M=40, V=65),
    "gist_loss": case(torch.float32, M=40, V=65),
    "gist_linear_loss": case(torch.float32, M=40, V=65, H=24),
    "topk_kl": case(torch.float32, M=40, V=65, K=7),
    "cp_linear": case(torch.float32, M=600, d=48, R=5),
    "cp_update": case(torch.float32, M=600, d=48, R=5),
    "adapter": case(torch.float32, M=600, d=48, H=9),
    "gelu": case(torch.float32, M=600, d=48),
}


def test_every_operation_is_timed_everywhere():
    for op in OPS:
        for kind in ("cpu", "cuda"):
            assert CASES[op, kind]
            assert DIRECTIONS[op, kind]
        assert (Path(__file__).parents[1] / "benchmarks" / f"bench_{op}.py").exists()
        assert "fastgist triton" in PEERS[op]


@pytest.mark.parametrize(
    ("op", "direction", "sizes", "microseconds"),
    [
        ("bidirectional_kl", "fwd_bwd", {"M": 8192, "V": 32000}, 488),
        ("bidirectional_kl", "fwd_bwd", {"M": 8192, "V": 128256}, 1955),
        ("topk_kl", "fwd_bwd", {"M": 8192, "V": 128256, "K": 64}, 981),
        ("cp_linear", "fwd", {"M": 16384, "d": 768, "R": 16}, 25.5),
        ("cp_linear", "bwd", {"M": 16384, "d": 4096, "R": 64}, 739),
        ("cp_update", "fwd", {"M": 16384, "d": 4096, "R": 16}, 93.7),
        ("cp_update", "bwd", {"M": 16384, "d": 4096, "R": 16}, 94),
        ("adapter", "fwd", {"M": 16384, "d": 768, "H": 64}, 11.8),
        ("adapter", "bwd", {"M": 16384, "d": 1024, "H": 64}, 23.5),
        ("gelu", "fwd", {"M": 50688, "d": 3072}, 145),
        ("gelu", "bwd", {"M": 50688, "d": 3072}, 217),
        ("gist_linear_loss", "fwd_bwd", {"M": 8192, "V": 128256, "H": 4096}, 65_000),
    ],
)
def test_floors_are_those_derived_by_hand(op, direction, sizes, microseconds):
    """At 4.3 TB/s and 790 TFLOP/s, bfloat16."""
    moved, flops = costs(op, case(torch.bfloat16, **sizes), direction)
    assert max(moved / 4.3e12, flops / 790e12) * 1e6 == pytest.approx(microseconds, rel=0.02)


@pytest.mark.parametrize("op", OPS)
def test_peers_agree_with_the_formula(op):
    problem = harness.make_problem(op, SMALL[op], CPU)
    checked = []
    for name, build in PEERS[op].items():
        if name in OTHER_FUNCTION or name.endswith("compiled"):
            continue
        try:
            provider = build(problem.tensors)
        except Missing:
            continue
        if name.startswith("fastgist"):
            assert harness.parity(problem, provider) is None, name
        else:  # the same function; how exactly it sums is its own affair and the processor's
            _, (exact, exact_grads) = harness._expected(op, problem.case, CPU)
            out, grads = harness.run(problem, provider)
            pairs = [(out if problem.is_loss else harness._rows("x", out), exact)]
            pairs += [(harness._rows(leaf, grads[leaf]), exact_grads[leaf]) for leaf in problem.leaves]
            for mine, e in pairs:
                assert float((mine - e).norm() / e.norm()) < 1e-5, name
        checked.append(name)
    assert any(not name.startswith("fastgist") for name in checked), "no independent peer was there to compare"


@pytest.mark.parametrize("op", OPS)
def test_parity_finds_a_wrong_result_and_a_wrong_gradient(op):
    problem = harness.make_problem(op, SMALL[op], CPU)
    right = PEERS[op]["fastgist reference"](problem.tensors)
    first = next(iter(problem.tensors.values()))
    assert harness.parity(problem, right) is None
    assert "result" in harness.parity(problem, lambda *a: right(*a) * 1.01)
    nothing = torch.zeros((), dtype=first.dtype)
    assert "gradient" in harness.parity(problem, lambda x, *a: right(x.detach(), *a) + nothing * x.sum())


def test_steps_time_what_they_say():
    problem = harness.make_problem("adapter", SMALL["adapter"], CPU)
    provider = PEERS["adapter"]["eager"](problem.tensors)
    assert harness.make_step(problem, provider, "fwd")().shape == (600, 48)
    for direction in ("bwd", "fwd_bwd"):
        assert len(harness.make_step(problem, provider, direction)()) == len(problem.leaves)
    step = harness.make_step(problem, provider, "fwd_bwd")
    clock = harness.Clock(CPU)
    assert len(harness.sample(step, clock, 3)) == 3
    assert harness.peak_bytes(step, CPU) >= 600 * 48 * 4
    seconds, how = harness.floor_seconds(problem, "fwd_bwd")
    assert seconds > 0
    assert "same run" in how
