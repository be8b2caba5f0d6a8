"""cp_linear of a few rows on a CPU, which "auto" leaves to PyTorch's own autograd: the numbers, and who gets there."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgist.functional import cp_linear
from fastgist.nn import LoRALinear
from fastgist.ops import cp_linear as ops
from fastgist.reference.cp_linear import cp_linear as formula
from fastgist.testing import within_budget


def case(rows, inner=40, out=56, rank=5, bias=True, gain=True, dtype=torch.float32):
    x, weight = torch.randn(*rows, inner), torch.randn(out, inner) / inner**0.5
    u, v = torch.randn(inner, rank) / inner**0.5, torch.randn(out, rank)
    made = [x, weight, torch.randn(out) if bias else None, u, v, torch.randn(rank) if gain else None]
    return [None if t is None else t.to(dtype) for t in made]


@pytest.fixture
def no_function(monkeypatch):
    """Whoever comes to the Function fails."""

    def refuse(*args):
        raise AssertionError("the Function was called")

    monkeypatch.setattr(ops._CPLinear, "apply", refuse)


def run(function, given, trained, grad, **options):
    leaves = [t if t is None else t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(given)]
    y = function(*leaves, **options)
    return y.detach(), torch.autograd.grad(y, [leaves[i] for i in trained], grad.to(y.dtype))


@pytest.mark.parametrize("rows", [(1,), (2, 3), (128,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [True, False])
def test_the_numbers_without_a_function(no_function, rows, bias, gain):
    given = case(rows, bias=bias, gain=gain)
    trained = [i for i, t in enumerate(given) if t is not None]  # the weight and the bias too
    grad = torch.randn(*rows, 56)
    y, grads = run(cp_linear, given, trained, grad, scale=0.7)
    plain, plain_grads = run(formula, given, trained, grad, scale=0.7)
    wide = [t if t is None else t.double() for t in given]
    exact, exact_grads = run(formula, wide, trained, grad, scale=0.7)
    for ours, theirs, truth in zip((y, *grads), (plain, *plain_grads), (exact, *exact_grads), strict=True):
        assert ours.shape == truth.shape and ours.dtype == torch.float32
        assert within_budget(ours, theirs, truth, scale=float(truth.abs().mean())) is None


def test_no_update_is_the_base_bitwise(no_function):
    x, weight, bias, u, v, gain = case((3,))
    y = cp_linear(x, weight, bias, u, torch.zeros_like(v), gain)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


def test_a_gain_of_one_row_is_a_gain(no_function):
    x, weight, bias, u, v, gain = case((3,))
    assert torch.equal(cp_linear(x, weight, bias, u, v, gain[None]), cp_linear(x, weight, bias, u, v, gain))


def test_counted_as_the_operator_is():
    """By torch's counter, which knows PyTorch's own products and is told of ours."""
    given = case((8,))

    def flops(impl):
        with FlopCounterMode(display=False) as counter:
            cp_linear(*given, impl=impl)
        return counter.get_total_flops()

    assert flops("auto") == flops("reference") == 2 * 8 * (40 * 56 + 40 * 5 + 5 * 56)


def test_the_factors_alone_in_a_batch(no_function):
    x, weight, bias, u, v, gain = case((3,))
    us, vs = torch.randn(2, *u.shape), torch.randn(2, *v.shape)
    y = torch.vmap(cp_linear, in_dims=(None, None, None, 0, 0, None))(x, weight, bias, us, vs, gain)
    for i in range(2):
        torch.testing.assert_close(y[i], cp_linear(x, weight, bias, us[i], vs[i], gain))


@pytest.mark.parametrize("rows", [3, 129])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_layer_whose_factors_are_not_there_yet_says_so(rows, recorded):
    layer = LoRALinear(torch.nn.Linear(16, 8), rank=2, device="meta")
    with torch.set_grad_enabled(recorded), pytest.raises(ValueError, match="is on meta"):
        layer(torch.randn(rows, 16))


def test_a_vector_and_an_evaluation(no_function):
    x, *rest = case((1,))
    with torch.no_grad():
        assert torch.equal(cp_linear(x[0], *rest), cp_linear(x, *rest)[0])


@pytest.mark.parametrize(
    "change",
    [
        {"rows": (129,)},
        {"rows": (0,)},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"options": {"impl": "reference"}},
        {"options": {"dropout_p": 0.5, "training": True}},
        {"options": {"seed": torch.tensor([3]), "training": True}},
        {"gain": torch.ones(2, 5), "v": torch.ones(28, 5)},
    ],
)
def test_others_come_to_the_function(no_function, change):
    given = case(change.get("rows", (4,)), dtype=change.get("dtype", torch.float32))
    given[5], given[4] = change.get("gain", given[5]), change.get("v", given[4])
    with pytest.raises(AssertionError, match="the Function was called"):
        cp_linear(*given, **change.get("options", {}))


@pytest.mark.parametrize(
    ("at", "wrong", "kind", "message"),
    [
        (0, torch.randn(4, 39), ValueError, r"x.shape\[-1\] == 40 .*got 39"),
        (1, torch.randn(56, 41), ValueError, "weight is 56 x 41"),
        (2, torch.randn(1), ValueError, r"bias.shape == \(56,\)"),
        (2, torch.randn(56).bfloat16(), TypeError, "bias is bfloat16"),
        (3, torch.randn(40, 4), ValueError, r"v.shape\[1\] == 4"),
        (3, torch.randn(40, 5).double(), TypeError, "u is float64"),
        (3, torch.randn(40), ValueError, "u must be 2-D"),
        (3, [1.0], TypeError, "u must be a Tensor"),
        (4, torch.randn(56), ValueError, "v must be 2-D"),
        (4, torch.randn(56, 0), ValueError, "v.shape"),
        (5, torch.randn(1), ValueError, r"gain.shape == \(5,\)"),
        (5, torch.ones(5, dtype=torch.int64), TypeError, "gain"),
        (5, [1.0] * 5, TypeError, "gain must be a Tensor, got list"),
        (2, 0.0, TypeError, "bias must be a Tensor, got float"),
        (3, torch.randn(40, 1), ValueError, r"v.shape\[1\] == 1"),  # would be spread over the gain
        (0, torch.eye(4, 40).to_sparse(), TypeError, "x must be strided"),
        (1, torch.eye(56, 40).to_sparse_csr(), TypeError, "must be strided"),
        (1, torch.randn(56, 40, device="meta"), ValueError, "weight is on meta"),
        (3, torch.randn(40, 5, device="meta"), ValueError, "u is on meta"),
        (4, torch.randn(56, 5, device="meta"), ValueError, "v is on meta"),
    ],
)
def test_what_is_wrong_is_said_as_ever(at, wrong, kind, message):
    given = case((4,))
    given[at] = wrong
    with pytest.raises(kind, match=message):
        cp_linear(*given)


@pytest.mark.parametrize("options", [{"scale": float("nan")}, {"dropout_p": 1.5}, {"dropout_p": -0.1}], ids=str)
def test_numbers_out_of_range(options):
    with pytest.raises(ValueError, match="cp_linear"):
        cp_linear(*case((4,)), **options)


def test_autocast_and_compiled_code_take_the_operator(no_function):
    given = case((4,))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(AssertionError, match="the Function was called"):
        cp_linear(*given)


def test_a_second_derivative_is_right():
    given = case((2,))

    def slope(function, given):
        x = given[0].detach().requires_grad_()
        (first,) = torch.autograd.grad(function(x, *given[1:]).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    exact = slope(formula, [t.double() for t in given])
    ours, plain = slope(cp_linear, given), slope(formula, given)
    assert within_budget(ours, plain, exact, scale=float(exact.abs().mean())) is None
