"""The error budget itself: it must accept plain torch and reject every kind of wrong result, at every size and dtype."""

from __future__ import annotations

import pytest
import torch

from fastgist.testing import assert_within_budget, error_floor, layouts, poisoned_allocations, within_budget

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(1,), (3,), (5, 7), (64, 100), (8, 4097)]


def _case(shape, dtype, magnitude=1.0):
    exact = torch.randn(shape, dtype=torch.float64) * magnitude
    return exact.to(dtype), exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 300.0])
def test_rounded_result_passes_and_wrong_ones_fail(shape, dtype, magnitude):
    plain, exact = _case(shape, dtype, magnitude)
    assert within_budget(plain, plain, exact) is None
    largest = int(exact.abs().argmax())

    assert "error" in within_budget(torch.zeros_like(plain), plain, exact), "a zero gradient must fail"
    wrong_sign = plain.clone()
    wrong_sign.view(-1)[largest] *= -1
    assert "error" in within_budget(wrong_sign, plain, exact), "one wrong element must fail"
    spoiled = plain.clone()
    spoiled.view(-1)[largest] = torch.nan
    assert "NaN" in within_budget(spoiled, plain, exact)
    spoiled.view(-1)[largest] = torch.inf
    assert "inf" in within_budget(spoiled, plain, exact)
    scaled = plain * 1.05
    assert within_budget(scaled, plain, exact) is not None, "five percent off must fail"


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_fails_even_when_the_plain_result_is_as_coarse_as_the_dtype(dtype):
    exact = torch.rand(1000, dtype=torch.float64) * 1e-3 + 1e-3
    plain = exact.to(dtype)
    assert within_budget(torch.zeros_like(plain), plain, exact) is not None


def test_finite_where_infinite_is_wanted_fails_and_the_reverse():
    exact = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    plain = exact.float()
    assert within_budget(plain, plain, exact) is None
    for i in range(1, 4):
        ours = plain.clone()
        ours[i] = 0.0
        assert within_budget(ours, plain, exact) is not None


def test_shape_and_dtype_are_part_of_the_result():
    plain, exact = _case((4, 4), torch.float32)
    assert "shapes" in within_budget(plain[:2], plain, exact)
    assert "dtypes" in within_budget(plain.half(), plain, exact)
    assert "float64" in within_budget(plain, plain, exact.float())
    with pytest.raises(AssertionError, match=r"grad_x: .*error"):
        assert_within_budget(plain + 1, plain, exact, what="grad_x")


def test_scalar_scale_widens_the_floor_but_not_to_the_value():
    exact = torch.tensor(1e-5, dtype=torch.float64)
    assert error_floor(exact, torch.float32, scale=1.0) > error_floor(exact, torch.float32) > 0.0
    assert error_floor(exact, torch.float32, scale=1.0) < 1e-6
    assert error_floor(torch.zeros(3, dtype=torch.float64), torch.float32) == 0.0


def test_layouts_keep_the_values_and_change_the_strides():
    x = torch.randn(5, 7)
    seen = dict(layouts(x))
    assert all(torch.equal(v, x) for v in seen.values())
    assert len({v.stride() for v in seen.values()}) == len(seen)


def test_poisoned_allocations_poison_and_are_undone():
    with poisoned_allocations():
        assert torch.empty(3).isnan().all() and torch.zeros(2).new_empty(4).isnan().all()
        assert torch.empty_like(torch.zeros(2)).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    before = torch.empty
    assert before is torch.empty and not hasattr(torch.empty, "__wrapped__")
    assert torch.zeros(3).eq(0).all()


def test_the_worst_of_several_plain_results_sets_the_budget():
    exact = torch.linspace(-1, 1, 9, dtype=torch.float64)
    near, far, ours = (exact.float() + e for e in (1e-6, 4e-6, 7e-6))
    assert within_budget(ours, near, exact) is not None
    assert within_budget(ours, [near, far], exact) is None
    assert within_budget(exact.float() + 1e-5, [near, far], exact) is not None
