"""Hard cases 1, 2, 4, 7, 18, 20 and 22 in every form of cp_linear's kernels, at small sizes, whatever the plan chooses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import test_cp_linear as linear
import torch
from conftest import DEVICE, INTERPRETING
from test_cp_linear_forms import hold, upstream
from test_cp_pieces import case
from torch import Tensor

from fastgist.functional import cp_linear
from fastgist.testing import assert_within_budget, layouts, poisoned_allocations

pytest.importorskip("triton")
from fastgist_kernels import cp_linear as forward_kernels
from fastgist_kernels import cp_linear_bwd as backward_kernels
from fastgist_kernels.cp_linear_forms import FORMS, can

OP = "cp_linear"
if not INTERPRETING:
    pytest.skip("a card's time goes to tests/gpu/test_forms.py", allow_module_level=True)
#: (forward, backward): each forward once, each backward once.
PAIRS = [("fused", "fused"), ("started", "started"), ("blas", "blas"), ("few", "started"), ("tma_fused", "fused")]
PAIRS += [("tma_started", "started")]


@pytest.fixture
def forms(monkeypatch) -> Iterator[Callable]:
    """Sets the forms that the launchers take, where what they get allows it ("started" elsewhere); tells which ran."""
    ran: set[str] = set()

    def use(forward: str, backward: str) -> set[str]:
        def chosen(form: str, forwards: bool):
            def choose(x: Tensor, weights, rank: int, *others, **named) -> str:
                allowed = can(form, x, list(weights), rank, False, forward=forwards)
                ran.add(form if allowed else "started")
                return form if allowed else "started"

            return choose

        monkeypatch.setattr(forward_kernels, "cp_linear_form", chosen(forward, True))
        monkeypatch.setattr(backward_kernels, "cp_linear_form", chosen(backward, False))
        return ran

    return use


def test_every_form_is_here():
    assert {f for f, _ in PAIRS} == set(FORMS)
    assert {b for _, b in PAIRS} == {f for f in FORMS if f != "few" and not f.startswith("tma")}


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_hard_01_zero_rows(impl, forms, forward, backward):
    forms(forward, backward)
    linear.test_hard_01_zero_rows(impl, torch.device(DEVICE))


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_hard_02_nothing_is_launched_for_sizes_that_do_not_fit(impl, forms, forward, backward):
    ran = forms(forward, backward)
    linear.test_hard_02_03_bad_arguments(impl, torch.device(DEVICE))
    assert not ran


@pytest.mark.parametrize("which", ["x", "weight", "bias", "u", "v", "gain", "grad"])
@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_hard_04_layouts(impl, forms, forward, backward, which):
    forms(forward, backward)
    inputs = dict(zip(linear.NAMES, linear.case(9, 32, 16, 4, 2, device=DEVICE), strict=True))
    grad = torch.randn(9, 32, device=DEVICE)
    t = grad if which == "grad" else inputs[which]
    views = [view[0] for _, view in layouts(t[None])] if t.dim() == 1 else [view for _, view in layouts(t)][1:]
    views.append(t.reshape(-1)[:1].reshape((1,) * t.dim()).expand(t.shape))
    for view in views:
        values = inputs | ({} if which == "grad" else {which: view.contiguous()})
        ours = inputs | ({} if which == "grad" else {which: view})
        incoming = view if which == "grad" else grad
        linear.check(list(values.values()), incoming, impl, None, list(ours.values()), True, scale=0.7)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_hard_07_every_subset_of_gradients(impl, forms, forward, backward, wanted):
    """The base's weight and bias go with x and u: they are PyTorch's in every form."""
    ran = forms(forward, backward)
    inputs = linear.case(9, 32, 16, 4, 2, device=DEVICE)
    x, u, v, gain = wanted
    options = {"dropout_p": 0.25, "training": True, "seed": torch.tensor([11], device=DEVICE)}
    with poisoned_allocations():
        linear.check(
            inputs, torch.randn(9, 32, device=DEVICE), impl, [x, x, u, u, v, gain], None, True, scale=0.5, **options
        )
    assert forward in ran


@pytest.mark.parametrize("rank", [1, 16, 17])
@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_hard_18_few_rows_in_float16(impl, forms, rows, rank):
    """The ends of tiles of 16 rows, and the most that the form takes."""
    ran = forms("few", "started")
    given = case(rows, 64, (48, 32), rank, 16, torch.float16)
    options = {"scale": 0.7, "dropout_p": 0.3, "training": True, "seed": torch.tensor([5], device=DEVICE)}
    hold(given, upstream(given[1], rows, torch.float16), impl, **options)
    assert "few" in ran


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_hard_20_without_an_update(impl, forms, forward, backward):
    """The base's matmul is within the kernel: the budget, and no trace of U."""
    forms(forward, backward)
    x, weight, bias, u, v, gain = linear.case(9, 32, 16, 4, 2, device=DEVICE)
    y = cp_linear(x, weight, bias, u * 1e4, torch.zeros_like(v), gain, impl=impl)
    base = torch.nn.functional.linear(x, weight, bias)
    assert_within_budget(y, base, torch.nn.functional.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_hard_22_gradients_of_shared_factors_are_the_sum_over_layers(impl, forms, forward, backward):
    """Two layers, one behind the other, with one U, one V and a gain each."""
    forms(forward, backward)
    x, weight, bias, u, v, gain = linear.case(9, 32, 32, 4, 1, device=DEVICE)
    other, gains = torch.randn_like(weight) * 32**-0.5, (gain, torch.randn_like(gain))
    grad = torch.randn(9, 32, device=DEVICE)

    def run(function, dtype, apart, **options):
        leaves = [t.to(dtype).detach().requires_grad_() for t in ((u, v, u, v) if apart else (u, v))]
        first, second = leaves[:2], leaves[-2:]
        base = [t.to(dtype) for t in (weight, bias, other)]
        y = function(x.to(dtype), base[0], base[1], *first, gains[0].to(dtype), **options)
        y = function(y, base[2], None, *second, gains[1].to(dtype), **options)
        y.backward(grad.to(dtype))
        found = [t.grad for t in leaves]
        return [found[0] + found[2], found[1] + found[3]] if apart else found

    exact = run(linear.formula, torch.float64, True)
    torch.testing.assert_close(run(linear.formula, torch.float64, False), exact, rtol=1e-11, atol=1e-11)
    shared, plain = run(cp_linear, torch.float32, False, impl=impl), run(linear.plain, torch.float32, False)
    for name, mine, p, e in zip(("u", "v"), shared, plain, exact, strict=True):
        assert_within_budget(mine, p, e, what=f"gradient of {name}")
