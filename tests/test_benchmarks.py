"""The benchmarks themselves: floors as derived by hand, a parity check that finds what is wrong, peers that agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import floors, harness, parity, problems
from benchmarks.cases import CASES, DIRECTIONS, case, costs, directions
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
#: More forms of an operation whose peers must agree too.
FORMS = list(SMALL.items())
FORMS += [("cp_linear", case(torch.float32, M=600, d=48, R=5, **many)) for many in ({"W": 3}, {"G": 4}, {"G": 2})]


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
        # bytes: 16384 (768 + 3072) 2 + 3072 768 2 + ...; FLOPs: 2 16384 (768 3072 + 16 3840)
        ("cp_linear", "fwd", {"M": 16384, "d": 768, "R": 16, "G": 4}, 100.4),
        ("cp_linear", "fwd", {"M": 16384, "d": 768, "R": 16, "W": 4}, 100.4),
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


@pytest.mark.parametrize(("op", "shape"), FORMS, ids=lambda v: v if isinstance(v, str) else v.name)
def test_peers_agree_with_the_formula(op, shape):
    problem = harness.make_problem(op, shape, CPU)
    checked = []
    for name, build in PEERS[op].items():
        if name in OTHER_FUNCTION or name.endswith("compiled"):
            continue
        try:
            provider = build(problems.given(problem, problem.tensors))
        except Missing:
            continue
        if name.startswith("fastgist"):
            assert harness.parity(problem, provider) is None, name
        else:  # the same function; how exactly it sums is its own affair and the processor's
            _, (exact, exact_grads), _ = parity.expected(op, problem.case, CPU, False)
            out, grads = harness.run(problem, provider)
            pairs = [(out if problem.is_loss else parity._rows("x", out), exact)]
            pairs += [(parity._rows(leaf, grads[leaf]), exact_grads[leaf]) for leaf in problem.leaves]
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
    seconds, how = floors.floor_seconds(problem, "fwd_bwd")
    assert seconds > 0
    assert "same run" in how


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd_bwd"])
def test_several_results_are_timed_as_they_come(direction):
    """q, k and v: three results, each with its gradient, and the same gradients as those of one tall layer."""
    shape = case(torch.float32, M=600, d=48, R=5, W=3)
    problem = harness.make_problem("cp_linear", shape, CPU)
    given = problems.given(problem, problem.tensors)
    assert [w.shape for w in given["weight"]] == [(48, 48)] * 3
    provider = PEERS["cp_linear"]["fastgist reference"](given)
    result = harness.make_step(problem, provider, direction)()
    if direction == "fwd":
        assert len(result) == 3
        return
    _, wanted = harness.run(problem, provider)
    assert len(result) == len(problem.leaves)
    for ours, name in zip(result, problem.leaves, strict=True):
        torch.testing.assert_close(ours, wanted[name])


def test_a_row_carries_its_roofline(monkeypatch):
    shape = case(torch.float32, M=600, d=48, R=5)
    monkeypatch.setattr(floors, "cpu_copy_rate", lambda moved: 1e9)
    monkeypatch.setattr(floors, "cpu_flop_rate", lambda dtype: ({torch.float32: 2e9}[dtype], "what"))
    found = floors.roofline("cp_linear", shape, "fwd", CPU)
    moved, flops = costs("cp_linear", shape, "fwd")
    assert found == {
        "bytes": moved, "flops": flops, "bytes_s": moved / 1e9, "flops_s": flops / 2e9, "roofline_s": flops / 2e9,
        "flops_ceiling": "what",
    }  # fmt: skip
    moved, _ = costs("gelu", SMALL["gelu"], "fwd_bwd")
    assert floors.roofline("gelu", SMALL["gelu"], "fwd_bwd", CPU)["roofline_s"] == moved / 1e9
    row = {"op": "cp_linear", "case": "M1", "dtype": "float32", "direction": "fwd", "provider": "x", "median_s": 2e-3}
    row |= found | {"floor_s": 1e-3, "ratio_to_floor": 2.0, "ratio_to_roofline": 2e-3 / found["roofline_s"]}
    pytest.importorskip("pytest_benchmark")
    from benchmarks.conftest import table

    lines = table(
        [row | {"parity": "within the budget"}, row | {"parity": "gradient of u: error 1 exceeds the budget"}]
    )
    assert len(lines) == 3
    for said in (f"{found['bytes'] / 1e6:.4g}", f"{row['ratio_to_roofline']:.2f}", "2.00", "ok"):
        assert said in lines[1]
    assert lines[2].endswith("gradient of u")


def test_decoding_is_timed_forward_alone():
    assert directions("cp_linear", "cuda", case(torch.bfloat16, forward_only=True, M=16, d=2048, R=16)) == ("fwd",)
    assert directions("cp_linear", "cuda", SMALL["cp_linear"]) == ("fwd", "bwd")
    assert any(c.forward_only for c in CASES["cp_linear", "cuda"])


def test_plot_draws_the_layers_by_their_time_over_the_floor(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    times = {"fastgist native": 1.1, "eager": 3.0, "eager, compiled": 2.0, "frozen linear alone": 0.5, "wrong": 0.1}
    verdicts = {"frozen linear alone": "another function, there for its cost", "wrong": "no gradient for x"}
    rows = [
        {"op": op, "case": f"M{m}_d768", "dtype": "float32", "direction": "fwd_bwd", "provider": provider, "M": m}
        | {"median_s": ratio * 1e-3, "floor_s": 1e-3, "floor": "why", "peak_bytes": 1, "bytes": 1}
        | {"parity": verdicts.get(provider, "within the budget")}
        for op in ("cp_linear", "adapter")
        for m in (3, 5)
        for provider, ratio in times.items()
    ]
    environment = {"device": "A CPU", "device_slug": "cpu-a", "versions": {"torch": "2.0"}, "date": "today"}
    (tmp_path / "cpu-a").mkdir()
    where = {}
    # An operation that was measured twice, on another number of threads, has a panel for each.
    for op, file, threads in (("cp_linear", "cp_linear", 1), ("adapter", "adapter", 2), ("adapter", "again", 1)):
        mine = [r for r in rows if r["op"] == op]
        content = {"environment": environment | {"threads": threads}, "rows": mine}
        (tmp_path / "cpu-a" / f"{file}.json").write_text(json.dumps(content))
        where[threads] = f"measured on A CPU, {threads} thread{'s' * (threads > 1)}, torch 2.0, today"
    results = plot.load(tmp_path, [], cpu=True)
    found = plot.by_layers(results)["cpu-a"]
    assert set(found) == {("cp_linear", where[1]), ("adapter", where[2]), ("adapter", where[1])}
    assert list(found["adapter", where[2]]) == [f"M{m} d768, float32, forward + backward" for m in (3, 5)]
    ratios = found["adapter", where[2]]["M3 d768, float32, forward + backward"]
    assert ratios == {"fastgist native": pytest.approx(1.1), "eager": pytest.approx(2.0)}, (
        "compiled, the faster of the two"
    )
    # None of the cases that are shown was measured: the last one is.
    last = [(device, title) for device, title, _ in plot.panels(results) if title.startswith("adapter")]
    assert last == [(where[n], "adapter  M5 d768  float32  fwd+bwd") for n in (2, 1)]
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "figures")]) == 0
    drawn = (tmp_path / "figures" / "layers-cpu-a.svg").read_text()
    assert all(drawn.count(words) == n for words, n in ((where[1], 2), (where[2], 1)))
    assert "M5 d768, float32, forward + backward" in drawn and ">fastgist native<" in drawn
    assert "frozen" not in drawn and "wrong" not in drawn


def test_every_operation_that_was_measured_on_a_cpu_has_a_panel(tmp_path):
    from benchmarks import plot

    environment = {
        "device": "A CPU",
        "device_slug": "cpu-a",
        "versions": {"torch": "2.0"},
        "date": "today",
        "threads": 2,
    }
    ops = sorted({op for op, kind in CASES if kind == "cpu"})
    (tmp_path / "cpu-a").mkdir()
    for op in ops:
        rows = [
            {
                "op": op,
                "case": c.name,
                "dtype": "float32",
                "direction": directions(op, "cpu", c)[0],
                "provider": "eager",
            }
            | {"median_s": 1.0, "floor_s": 1.0, "parity": "within the budget"}
            for c in CASES[op, "cpu"]
        ]
        (tmp_path / "cpu-a" / f"{op}.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    drawn = {title.split()[0] for _, title, _ in plot.panels(plot.load(tmp_path, [], cpu=True))}
    assert drawn == set(ops) and {"cp_update", "topk_kl", "gelu"} <= drawn


def test_there_are_marks_for_every_provider_of_the_layers():
    from benchmarks import plot

    names = {n.removesuffix(", compiled") for op in plot.LAYERS for n in PEERS[op]} - OTHER_FUNCTION
    assert len(names - {"fastgist cuda"}) <= len(plot.LINES)


def test_the_scale_of_a_sum_is_that_of_its_terms():
    """Of a bias's gradient, row by row: what the budget of sums that cancel is proportional to."""
    problem = harness.make_problem("adapter", SMALL["adapter"], CPU)
    found = parity.term_scales(problem)
    assert set(found) == {"down", "down_bias", "up", "up_bias"}
    grad = parity.incoming_rows(problem, 0, torch.empty(600, 48, dtype=torch.float64))
    assert found["up_bias"] == pytest.approx(float(grad.abs().sum(0).max()))
    x, down, down_bias, up, _ = (t.double() for t in problem.tensors.values())
    z = x @ down.T + down_bias
    dz = torch.ops.aten.gelu_backward(grad @ up, z)
    assert found["down_bias"] == pytest.approx(float(dz.abs().sum(0).max()))
    assert found["down"] == pytest.approx(float((dz.abs().T @ x.abs()).max()))
    assert parity.term_scales(harness.make_problem("gist_loss", SMALL["gist_loss"], CPU)) == {}


def test_a_cpu_s_ceilings_are_ceilings():
    """No product is faster than the multiply-adds of registers, and a small copy is none the slower."""
    rate, what = floors.cpu_flop_rate()
    assert rate >= floors.cpu_matmul_rate() > 1e9 and rate == floors.cpu_ceilings().get("fma_float32_flops_per_s", rate)
    assert what in ("multiply-adds of registers", "the fastest torch.mm of a few shapes")
    assert (floors.cpu_fma_rate() == rate) == (what == "multiply-adds of registers")
    half, what = floors.cpu_flop_rate(torch.bfloat16)
    assert half == floors.cpu_matmul_rate(torch.bfloat16) and "torch.mm" in what
    assert floors._cpu_copy_rate.__wrapped__(12) > 1e8


def test_without_a_compiler_the_best_product_is_the_ceiling(monkeypatch):
    monkeypatch.setattr(floors.shutil, "which", lambda name: None)
    assert floors._fma.__wrapped__() is None
    monkeypatch.setattr(floors, "cpu_fma_rate", lambda: None)
    monkeypatch.setattr(floors, "cpu_matmul_rate", lambda dtype=None: 7.0)
    assert floors.cpu_flop_rate() == (7.0, "the fastest torch.mm of a few shapes")
    monkeypatch.setattr(floors, "cpu_fma_rate", lambda: 6.0)  # a core that was taken away while it was measured
    assert floors.cpu_flop_rate()[0] == 7.0


def test_bytes_of_steps_are_those_derived_by_hand():
    from benchmarks import decode, petal_step, train_step

    vit = case(torch.float32, B=8, S=224, D=192, L=12)
    # 12 blocks of 12 D^2, patches of 768 and 1000 classes, twice; images; 198 tokens into and out of each block, both ways
    weights = 12 * 12 * 192**2 + 768 * 192 + 1000 * 192
    assert train_step.least_bytes(vit) == (2 * weights + 8 * 3 * 224**2 + 4 * 12 * 8 * 198 * 192) * 4
    qformer = case(torch.bfloat16, B=16, T=20, R=64, D=768, K=1408, N=257, L=12)
    weights = 12 * 20 * 768**2 + 6 * (2 * 768**2 + 2 * 1408 * 768)
    moved = 2 * weights + 2 * 6 * 16 * 257 * 1408 + 4 * 12 * 16 * 52 * 768
    assert petal_step.least_bytes(qformer) == moved * 2
    without = case(torch.bfloat16, B=16, T=0, R=64, D=768, K=1408, N=257, L=12)
    assert (
        petal_step.least_bytes(qformer) - petal_step.least_bytes(without)
        == (2 * 12 * 8 * 768**2 + 4 * 12 * 16 * 20 * 768) * 2
    )
    token = case(torch.float32, M=1, d=2048)
    assert decode.least("base", token) == ((2048**2 + 2 * 2048) * 4, 2 * 2048**2)
    assert decode.least("fastgist CPLinear", token)[1] == 2 * (2048**2 + 2 * 2048 * 16)
    assert decode.least("fastgist CPLinear, merged", token) == decode.least("base", token)
    llama = case(torch.float32, M=1, d=1024, L=4)
    assert decode.least("base", llama)[0] == (4 * (4 * 1024**2 + 3 * 1024 * 2816) + 6400 * 1024 + 2 * 4 * 32 * 1024) * 4
    assert decode.least("PEFT LoRA", llama)[0] - decode.least("base", llama)[0] == 4 * 3 * 2 * 1024 * 16 * 4


@pytest.mark.parametrize("module", ["train_step", "petal_step", "decode"])
def test_steps_and_tokens_have_their_rooflines_too(module):
    """Their files put in every row what the summary prints beside it."""
    source = (Path(__file__).parents[1] / "benchmarks" / f"bench_{module}.py").read_text()
    assert "floors.of_counts(" in source and 'row["ratio_to_roofline"] = ' in source
    row = floors.of_counts(10**9, 10**9, torch.float32, CPU)
    assert row["roofline_s"] == max(row["bytes_s"], row["flops_s"]) > 0
    assert "of its roofline" in floors.beside(row | {"median_s": 1.0})


def test_options_of_an_adapter_are_counted():
    shapes = {"": {}, "residual": {"residual": 1}, "E": {"E": 6}, "norm": {"norm": 1}}
    found = {
        name: costs("adapter", case(torch.float32, M=60, d=48, H=12, **o), "fwd_bwd") for name, o in shapes.items()
    }
    plain, _ = found[""]
    assert found["residual"][0] - plain == 60 * 48 * 4 and found["E"][0] - plain == 3 * 60 * 6 * 4
    assert found["norm"] == found[""] and found[""][1] == 12 * 60 * 48 * 12, "z is not formed again"
    detached = costs("bidirectional_kl", case(torch.float32, M=60, V=48, detached=1), "fwd_bwd")
    assert detached[0] == 3 * 60 * 48 * 4
