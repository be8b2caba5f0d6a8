"""What benchmark rows are held against: the plain error is drawn often enough not to be luck, and what is wrong fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import parity, problems
from benchmarks.cases import CASES, case
from benchmarks.peers import PEERS
from fastgist.backends import OPS
from fastgist.testing import within_budget

CPU = torch.device("cpu")
ONE_ROW = case(torch.float32, M=1, d=2048, R=16)
NARROW = case(torch.float32, M=3152, d=768, H=8)
FEW = {
    "bidirectional_kl": {"V": 65},
    "gist_loss": {"V": 65},
    "topk_kl": {"V": 65, "K": 7},
    "gist_linear_loss": {"V": 65, "H": 24},
    "cp_linear": {"d": 48, "R": 5},
    "cp_update": {"d": 48, "R": 5},
    "adapter": {"d": 48, "H": 9},
    "gelu": {"d": 48},
}


class _Edited(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, edit):
        ctx.edit = edit
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return ctx.edit(grad.clone()), None


def with_gradient(op, names, leaf, edit):
    """The right operation, but for the gradient of one leaf."""
    right = PEERS[op]["fastgist reference"](dict.fromkeys(names, torch.zeros(1)))

    def provider(*values):
        given = dict(zip(names, values, strict=True))
        given[leaf] = _Edited.apply(given[leaf], edit)
        return right(*given.values())

    return provider


def test_cases_in_this_file_are_the_benchmark_s():
    assert ONE_ROW in CASES["cp_linear", "cpu"] and NARROW in CASES["adapter", "cpu"]


@pytest.mark.parametrize(
    ("op", "extra"), [*((op, {}) for op in OPS), ("cp_linear", {"G": 3}), ("cp_linear", {"W": 2})], ids=str
)
def test_another_order_is_the_same_formula(op, extra):
    problem = problems.make_problem(op, case(torch.float32, M=1, **FEW[op], **extra), CPU)
    orders = parity.orders(problem)
    assert len(orders) == 16 and orders[0] == {} and orders[1]
    exact, grads = parity._evaluate(problem, torch.float64)
    for order in orders[1:4]:
        out, found = parity._evaluate(problem, torch.float64, order)
        torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
        for name in problem.leaves:
            torch.testing.assert_close(found[name], grads[name], rtol=1e-11, atol=1e-11, msg=name)


def test_another_order_rounds_otherwise_and_many_rows_need_none():
    problem = problems.make_problem("cp_linear", ONE_ROW, CPU)
    drawn, (_, exact), _ = parity.expected("cp_linear", ONE_ROW, CPU, False)
    errors = [float((grads["u"].double() - exact["u"]).abs().max()) for _, grads in drawn]
    assert len(errors) == 16 and len(set(errors)) > 8, "each order is a draw of its own"
    assert max(errors) > 2 * errors[0], "the first is the lucky one that the row failed by"
    assert len(parity.orders(problems.make_problem("adapter", NARROW, CPU))) == 1
    assert len(parity.orders(problem)) * problem.case["M"] == parity.LEAST_ROWS


def test_chunks_of_rows_err_less_than_all_at_once():
    """Why peers failed at H = 8: they sum 3,152 rows in one product, and the plain error was that of thirteen sums of 256."""
    drawn, (_, exact), scales = parity.expected("adapter", NARROW, CPU, False)
    chunks, whole = (grads["up"] for _, grads in drawn)
    error = [float((g.double() - exact["up"]).abs().max()) for g in (chunks, whole)]
    assert error[1] > 1.5 * error[0]
    assert scales["up"] > float(exact["up"].abs().max()), "6,144 numbers, and their terms are known"
    one_off = whole.clone()
    one_off[100, 3] += 2.0 * error[1] + 2.0 * scales["up"] * 2.0**-23
    assert within_budget(whole, [chunks, whole], exact["up"], scale=scales["up"]) is None
    assert "at 1 of 6144" in within_budget(one_off, [chunks, whole], exact["up"], scale=scales["up"])


@pytest.mark.parametrize("peer", ["eager", "autograd.Function", "fastgist reference"])
def test_right_peers_of_a_narrow_adapter_are_right(peer):
    problem = problems.make_problem("adapter", NARROW, CPU)
    assert parity.parity(problem, PEERS["adapter"][peer](problem.tensors)) is None


#: Of one row: (leaf, what is wrong with its gradient).
WRONG_OF_ONE = {
    "no gain": ("u", lambda tensors, g: g / tensors["gain"]),
    "a column of U is missing": ("u", lambda tensors, g: g.index_fill(1, torch.tensor([7]), 0.0)),
    "an input is missing": ("u", lambda tensors, g: g.index_fill(0, torch.tensor([393]), 0.0)),
    "one of 2,048 terms is missing": (
        "gain", lambda tensors, g: g - tensors["x"][0, 0] * tensors["u"][0] * (tensors["v"] * _dy(tensors)).sum(0)
    ),
    "dV with its gain twice": ("v", lambda tensors, g: g * tensors["gain"]),
    "the update's share of dx is missing": ("x", lambda tensors, g: _dy(tensors).T @ tensors["weight"]),
    "one number a part in 1e4 off": ("u", lambda tensors, g: g.index_put((torch.tensor([393]), torch.tensor([1])),
                                                                    g[393, 1] * 1.0001)),
}  # fmt: skip


def _dy(tensors):
    """(N, 1)"""
    return parity.incoming_rows(problems.make_problem("cp_linear", ONE_ROW, CPU), 0, torch.empty(1, 2048)).T


@pytest.mark.parametrize("what", WRONG_OF_ONE)
def test_what_is_wrong_with_one_row_is_found(what):
    problem = problems.make_problem("cp_linear", ONE_ROW, CPU)
    names = list(problem.tensors)
    leaf, edit = WRONG_OF_ONE[what]
    assert parity.parity(problem, with_gradient("cp_linear", names, leaf, lambda g: g)) is None
    wrong = parity.parity(problem, with_gradient("cp_linear", names, leaf, lambda g: edit(problem.tensors, g)))
    assert wrong is not None and f"gradient of {leaf}" in wrong


@pytest.mark.parametrize("leaf", ["up", "up_bias", "down", "down_bias"])
def test_a_row_of_many_that_is_missing_is_found(leaf):
    """One row of 3,152 that does not reach a gradient: its own share of it is left out."""
    problem = problems.make_problem("adapter", NARROW, CPU)
    right = PEERS["adapter"]["fastgist reference"](problem.tensors)
    last = {n: (t[-1:] if n == "x" else t).clone().requires_grad_() for n, t in problem.tensors.items()}
    dy = parity.incoming_rows(problem, 3151, torch.empty(1, 768))
    right(*last.values()).backward(dy)
    wrong = parity.parity(problem, with_gradient("adapter", list(problem.tensors), leaf, lambda g: g - last[leaf].grad))
    assert wrong is not None and wrong.startswith(f"gradient of {leaf}")


def test_a_result_without_its_gain_or_a_row_is_found():
    problem = problems.make_problem("cp_linear", ONE_ROW, CPU)
    right = PEERS["cp_linear"]["fastgist reference"](problem.tensors)
    assert "result" in parity.parity(problem, lambda *a: right(*a[:-1], torch.ones_like(a[-1])) + 0.0 * a[-1].sum())
    narrow = problems.make_problem("adapter", NARROW, CPU)
    adapter = PEERS["adapter"]["fastgist reference"](narrow.tensors)

    def forgetful(*values):
        return torch.cat((adapter(*values)[:-1], values[0][-1:]))

    assert "result" in parity.parity(narrow, forgetful)


OPTIONS = [{"norm": 1}, {"residual": 1}, {"dropout": 1}, {"E": 3}, {"E": 3, "norm": 1, "residual": 1}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "_".join(o))
def test_an_adapter_s_options_are_in_its_problem(options):
    problem = problems.make_problem("adapter", case(torch.float32, M=600, d=48, H=9, **options), CPU)
    plain = problems.make_problem("adapter", case(torch.float32, M=600, d=48, H=9), CPU)
    build = PEERS["adapter"]["fastgist reference"]
    assert parity.verdict(problem, build(problem.tensors), build, True) == parity.WITHIN
    eager = PEERS["adapter"]["eager"]
    said = parity.OTHER_MASK if "dropout" in options else parity.WITHIN
    assert parity.verdict(problem, eager(problem.tensors), eager, False) == said
    # Without its option it is another function, so the option is in what is compared.
    if "E" not in options:
        assert "result" in parity.parity(
            problem, lambda *a: build(plain.tensors)(*a[:5]) + 0.0 * sum(t.sum() for t in a)
        )


def test_a_dropout_s_mask_is_a_gate_to_the_formula():
    shape = case(torch.float32, M=37, d=48, H=9, dropout=1)
    problem = problems.make_problem("adapter", shape, CPU)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in problem.tensors.items()}
    masked = parity.masked(problem)
    gate = masked.tensors["gate"]
    assert gate.shape == (37, 9) and 0 < int((gate == 0).sum()) < 100
    exact = parity._plain("adapter", wide)
    torch.testing.assert_close(parity._evaluate(masked, torch.float64)[0], exact, rtol=1e-6, atol=1e-6)


def test_experts_one_by_one_are_for_experts():
    from benchmarks.peers import Missing

    with pytest.raises(Missing, match="no experts"):
        PEERS["adapter"]["experts one by one"](problems.make_problem("adapter", NARROW, CPU).tensors)
    gated = problems.make_problem("adapter", case(torch.float32, M=40, d=48, H=9, E=3), CPU)
    with pytest.raises(Missing, match="plain adapter"):
        PEERS["adapter"]["autograd.Function"](gated.tensors)
    assert parity.parity(gated, PEERS["adapter"]["experts one by one"](gated.tensors)) is None


def test_absent_classes_and_a_nan_row_are_in_the_timed_inputs():
    shapes = [c for c in CASES["bidirectional_kl", "cpu"] if c.get("absent", 0)]
    assert {c.get("nan", 0) for c in shapes} == {0, 1} and all(c["V"] % 2 for c in shapes)
    for nan in (0, 1):
        shape = case(torch.float32, M=40, V=65, absent=8, **({"nan": 1} if nan else {}))
        problem = problems.make_problem("bidirectional_kl", shape, CPU)
        z, g = problem.tensors.values()
        assert torch.equal(z.isneginf() & ~z.isnan(), g.isneginf() & ~z.isnan()) and z.isneginf().sum() > 100
        assert int(z.isnan().sum()) == nan
        right = PEERS["bidirectional_kl"]["fastgist reference"](problem.tensors)
        assert parity.parity(problem, right) is None
        zeros = with_gradient("bidirectional_kl", ["z", "g"], "z", lambda grad: grad.nan_to_num())
        wrong = parity.parity(problem, zeros)
        assert "NaN at" in wrong if nan else wrong is None


def test_a_detached_side_gets_no_gradient():
    problem = problems.make_problem("bidirectional_kl", case(torch.float32, M=40, V=65, detached=1), CPU)
    assert problem.leaves == ("z",) and not problems.leaves(problem)["g"].requires_grad
    right = PEERS["bidirectional_kl"]["fastgist reference"](problem.tensors)
    assert parity.parity(problem, right) is None


def test_of_many_classes_smaller_chunks_find_the_same_rows(monkeypatch):
    shape = case(torch.float32, M=600, V=65, H=24)
    problem = problems.make_problem("gist_linear_loss", shape, CPU)
    whole, grads = parity._evaluate(problem, torch.float64)
    assert grads["hidden"].shape == (256 + 88, 24) and parity._chunk(problem) == 256
    wide = problems.Problem("gist_linear_loss", case(torch.float32, M=600, V=128256, H=24), {}, ())
    assert (
        parity._chunk(wide) == 64
        and parity._chunk(problems.Problem("gist_loss", case(torch.float32, M=1, V=10**8), {}, ())) == 1
    )
    monkeypatch.setattr(parity, "_chunk", lambda problem: 64)
    out, found = parity._evaluate(problem, torch.float64)
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=0)
    for name in problem.leaves:
        torch.testing.assert_close(found[name], grads[name], rtol=1e-9, atol=1e-12, msg=name)
