"""adapter on every implementation against float64. Hard cases 1-4, 6, 7, 18, 19 for this op are here, by number."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
import torch.nn.functional as F
from adapters import NAMES, case, check, evaluate

from fastgist.functional import adapter
from fastgist.reference.adapter import ACTIVATIONS
from fastgist.reference.adapter import adapter as formula
from fastgist.testing import assert_within_budget, layouts, poisoned_allocations

OP = "adapter"


# -- the formula -----------------------------------------------------------------------------------------------------


def test_formula_gradcheck():
    inputs = case(3, 4, 4, experts=2, residual=True)
    for function in (formula, lambda *a, **k: adapter(*a, impl="reference", **k)):
        for activation in ACTIVATIONS:
            leaves = [t.double().requires_grad_() for t in inputs.values()]
            assert torch.autograd.gradcheck(
                lambda x, d, db, u, ub, r, g, f=function, a=activation: f(
                    x, d, db, u, ub, activation=a, scale=0.3, residual=r, residual_scale=0.6, gate=g
                ),
                leaves,
            )


def test_experts_are_one_adapter():
    inputs = case(5, 6, 6, experts=3)
    x, gate = inputs["x"], inputs["gate"]
    one = formula(*list(inputs.values())[:5], gate=gate)
    want = x.clone()
    for e in range(3):
        part = slice(2 * e, 2 * e + 2)
        hidden = F.gelu(F.linear(x, inputs["down_weight"][part], inputs["down_bias"][part]))
        want += gate[:, e : e + 1] * F.linear(hidden, inputs["up_weight"][:, part], inputs["up_bias"][e])
    torch.testing.assert_close(one, want)


# -- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "hidden"), [(1, 16, 16), (33, 40, 8), (64, 64, 64), (70, 130, 24)])
def test_matches_float64(impl, device, dtype, rows, inner, hidden):
    inputs = case(rows, inner, hidden, dtype=dtype, device=device)
    check(inputs, torch.randn(rows, inner, device=device), impl, scale=0.7)


@pytest.mark.parametrize("hidden", [1, 4, 8, 65, 130])
def test_hard_18_bottlenecks(impl, device, hidden):
    inputs = case(21, 44, hidden, device=device)
    check(inputs, torch.randn(21, 44, device=device), impl)


@pytest.mark.parametrize("hidden", [48, 66])
def test_gated_bottlenecks_wider_than_a_tile(impl, device, hidden):
    """Hidden units go in chunks; experts, residual and bias belong to the whole."""
    inputs = case(21, 44, hidden, experts=3, residual=True, device=device)
    check(inputs, torch.randn(21, 44, device=device), impl, scale=0.7, residual_scale=0.4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(impl, device, activation):
    inputs = case(device=device)
    check(inputs, torch.randn(19, 40, device=device), impl, activation=activation, scale=2.0)


@pytest.mark.parametrize("experts", [1, 2, 6])
@pytest.mark.parametrize("per_expert_bias", [False, True])
def test_gates(impl, device, experts, per_expert_bias):
    inputs = case(17, 36, 12, experts=experts, device=device)
    if not per_expert_bias:
        inputs["up_bias"] = torch.randn(36, device=device)
    check(inputs, torch.randn(17, 36, device=device), impl, scale=0.4, residual_scale=0.6)


@pytest.mark.parametrize("kind", ["x", "none", "tensor", "wider"])
@pytest.mark.parametrize("biases", [False, True])
def test_residuals_and_biases(impl, device, kind, biases):
    inputs = case(out=56 if kind == "wider" else None, residual=kind in ("tensor", "wider"), device=device)
    if not biases:
        inputs["down_bias"] = inputs["up_bias"] = None
    options = {"residual": False} if kind == "none" else {}
    grad = torch.randn(19, inputs["up_weight"].shape[0], device=device)
    check(inputs, grad, impl, scale=0.1, residual_scale=-1.5, **options)


@pytest.mark.parametrize("first", ["x", "another"])
def test_a_branch_beside_the_residual(impl, device, first):
    """A block's input and the branch beside the adapter, both added: as one residual of their sum, with a gradient each."""
    inputs = case(37, 24, 6, device=device, residual=True)
    branch, grad = torch.randn(37, 24, device=device), torch.randn(37, 24, device=device)
    residual = inputs.pop("residual")
    inputs.pop("gate")

    def run(function, dtype, **options):
        leaves = {k: t.to(dtype).detach().requires_grad_() for k, t in inputs.items()}
        added = leaves["x"] if first == "x" else residual.to(dtype).detach().requires_grad_()
        other = branch.to(dtype).detach().requires_grad_()
        y = function(*leaves.values(), added, other, **options)
        y.backward(grad.to(dtype))
        return y.detach(), [t.grad for t in (*leaves.values(), added, other)]

    def ours(*args, **options):
        return adapter(*args[:-2], residual=args[-2:], scale=0.7, residual_scale=0.6, impl=impl)

    def written(x, d, db, u, ub, added, other):
        return 0.7 * F.linear(F.gelu(F.linear(x, d, db)), u, ub) + 0.6 * (added + other)

    (y, grads), (plain_y, plain_grads) = run(ours, torch.float32), run(written, torch.float32)
    exact_y, exact_grads = run(written, torch.float64)
    assert_within_budget(y, plain_y, exact_y, what="y")
    terms = float(grad.abs().sum(0).max())  # of a bias's gradient, a sum over the rows that may cancel
    for name, *three in zip((*inputs, "residual", "branch"), grads, plain_grads, exact_grads, strict=True):
        assert_within_budget(*three, what=f"gradient of {name}", scale=terms if "bias" in name else None)


@pytest.mark.parametrize("wanted", [("down_weight", "up_weight", "up_bias"), ("x",), NAMES[:5]])
@pytest.mark.parametrize("experts", [None, 2])
def test_float32_weights_beside_a_half_precision_x(impl, device, wanted, experts):
    """Rounded where they meet x, as .to() would: the same y, and gradients that are the same before they are rounded."""
    half = case(50, 24, 6, experts=experts, dtype=torch.float16, device=device)
    wide = {k: t.float() if t is not None and k in NAMES[1:5] else t for k, t in half.items()}
    wide |= {k: t + 1e-5 * torch.rand_like(t) for k, t in wide.items() if k in NAMES[1:5]}
    half = {k: t if t is None else t.half() for k, t in wide.items()}
    grad = torch.randn(50, 24, device=device)
    found = []
    for inputs in (wide, half):
        leaves = {k: None if t is None else t.detach().requires_grad_(k in wanted) for k, t in inputs.items()}
        y = adapter(*(leaves[k] for k in NAMES[:5]), gate=leaves["gate"], impl=impl)
        y.backward(grad.half())
        found.append((y, {k: leaves[k].grad for k in wanted}))
    # Bit for bit where the arithmetic is the same; on a card float32 weights are another compilation, which contracts
    # multiply and add otherwise: one unit in the last place.
    close = {"rtol": 2.0**-10, "atol": 2.0**-14} if device.type == "cuda" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(found[0][0], found[1][0], **close)
    for name in wanted:
        ours, rounded = found[0][1][name], found[1][1][name]
        assert ours.dtype == wide[name].dtype
        torch.testing.assert_close(ours.half(), rounded, **close)


def test_two_residuals_do_not_share_a_gradients_memory(impl, device):
    inputs = case(6, 24, 4, device=device)
    r, q = (torch.randn(6, 24, device=device, requires_grad=True) for _ in range(2))
    y = adapter(*(inputs[k] for k in NAMES[:5]), residual=(r, q), impl=impl)
    y.square().sum().backward()
    assert torch.equal(r.grad, q.grad) and torch.equal(r.grad, (2 * y).detach())
    r.grad.zero_()
    assert q.grad.abs().max() > 0


def test_hard_19_residuals_and_gradients_beyond_float16(impl, device):
    """60000 + 60000 passes float16's range, half of it does not; float32 gradients have float32's range."""
    inputs = case(8, 24, 4, dtype=torch.float16, device=device)
    big = torch.full((8, 24), 60000.0, dtype=torch.float16, device=device)
    weights = [torch.zeros_like(inputs[k]) for k in NAMES[1:5]]
    y = adapter(inputs["x"], *weights, residual=(big, big), residual_scale=0.5, impl=impl)
    assert torch.equal(y, big)
    leaves = [inputs[k].float().requires_grad_() for k in NAMES[1:5]]
    y = adapter(inputs["x"], *leaves, residual=False, impl=impl)
    y.backward(torch.full_like(y, 20000.0))
    assert leaves[3].grad.dtype == torch.float32 and torch.equal(leaves[3].grad, torch.full_like(leaves[3], 160000.0))
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_autocast_leaves_float32_weights_to_the_kernel(impl, device):
    inputs = case(20, 24, 6, device=device)
    leaves = [inputs[k].detach().requires_grad_() for k in NAMES[1:5]]
    x = inputs["x"].bfloat16() if impl != "triton" or device.type != "cpu" else inputs["x"].half()
    with torch.autocast(device.type, x.dtype):
        y = adapter(inputs["x"], *leaves, impl=impl)
    assert y.dtype == x.dtype and torch.equal(y, adapter(x, *leaves, impl=impl))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_leading_dimensions(impl, device):
    inputs = case(24, device=device)
    parts = list(inputs.values())[:5]
    flat = adapter(*parts, impl=impl)
    assert torch.equal(adapter(parts[0].view(2, 3, 4, 40), *parts[1:], impl=impl).view(24, 40), flat)


def test_fresh_adapter_is_the_identity(impl, device):
    inputs = case(device=device)
    parts = [*list(inputs.values())[:3], torch.zeros(40, 8, device=device), torch.zeros(40, device=device)]
    assert torch.equal(adapter(*parts, impl=impl), inputs["x"])


# -- the backward in one pass ----------------------------------------------------------------------------------------

#: (rows, width, bottleneck) that the kernels take in one pass over dy and x: one row block and several a program, chunks
#: of columns that are full and that are not, and every tile of the bottleneck.
ONE_PASS = [(1, 16, 1), (16, 32, 4), (33, 48, 7), (70, 208, 8), (150, 64, 15), (141, 80, 4)]


@pytest.fixture
def passes(monkeypatch):
    """A count of the backwards that went in one pass."""
    if importlib.util.find_spec("triton") is None:
        return []
    from fastgist_kernels import adapter_bwd

    taken: list[int] = []
    real = adapter_bwd.adapter_bwd_once
    monkeypatch.setattr(adapter_bwd, "adapter_bwd_once", lambda *args: (taken.append(1), real(*args)))
    return taken


def _one_pass(impl, device, dtype) -> bool:
    """Whether that is a backward in one pass: in bfloat16, and where kernels are interpreted in float32 as well."""
    return impl == "triton" and (device.type == "cpu" or dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "hidden"), ONE_PASS)
def test_one_pass_matches_float64(impl, device, passes, rows, inner, hidden, dtype):
    inputs = case(rows, inner, hidden, dtype=dtype, device=device)
    with poisoned_allocations():
        check(inputs, torch.randn(rows, inner, device=device), impl, scale=0.7, residual_scale=-1.5)
    assert bool(passes) == _one_pass(impl, device, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["x", "none", "tensor"])
def test_one_pass_residuals_and_activations(impl, device, passes, kind, activation):
    inputs = case(41, 48, 5, residual=kind == "tensor", device=device)
    options = {"residual": False} if kind == "none" else {}
    grad = torch.randn(41, 48, device=device)
    check(inputs, grad, impl, scale=0.3, residual_scale=0.6, activation=activation, **options)
    assert bool(passes) == _one_pass(impl, device, torch.float32)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("biases", [False, True])
def test_one_pass_gradient_subsets(impl, device, passes, wanted, biases):
    inputs = case(37, 48, 3, device=device)
    if not biases:
        inputs["down_bias"] = inputs["up_bias"] = None
    need_x, need_down_bias, need_up_bias = wanted
    needs = dict.fromkeys(NAMES, False) | {"x": need_x, "down_weight": True, "up_weight": True}
    needs |= {"down_bias": biases and need_down_bias, "up_bias": biases and need_up_bias}
    with poisoned_allocations():
        check(inputs, torch.randn(37, 48, device=device), impl, needs)
    assert bool(passes) == _one_pass(impl, device, torch.float32)


def test_one_pass_rows_and_weights_inside_wider_ones(impl, device, passes):
    """Row strides of their own for all four operands."""
    inputs = case(37, 48, 4, device=device)
    ours = dict(inputs)
    for name, wide in (("x", 80), ("down_weight", 64), ("up_weight", 7)):
        t = torch.full((inputs[name].shape[0], wide), torch.nan, device=device)
        ours[name] = t[:, : inputs[name].shape[1]]
        ours[name].copy_(inputs[name])
    grad = torch.randn(37, 96, device=device)[:, :48]
    check(inputs, grad, impl, ours=ours)
    assert bool(passes) == _one_pass(impl, device, torch.float32)


@pytest.mark.parametrize("name", ["x", "down_weight", "up_weight"])
def test_one_pass_layouts(impl, device, name):
    """Those that the pass cannot take go the other way."""
    inputs = case(37, 48, 4, device=device)
    grad = torch.randn(37, 48, device=device)
    for _, laid in layouts(inputs[name]):
        check(inputs, grad, impl, ours=inputs | {name: laid})
    for _, laid in layouts(grad):
        check(inputs, laid, impl)


def test_one_pass_leaves_bad_rows_alone(impl, device, passes):
    inputs = case(37, 48, 4, device=device)
    inputs["x"][4, 3] = torch.nan
    grad = torch.ones(37, 48, device=device)
    grad[20, 5] = torch.inf
    wanted = {k: t is not None for k, t in inputs.items()}
    _, grads = evaluate(adapter, inputs, wanted, grad, impl=impl)
    rest = torch.ones(37, dtype=torch.bool, device=device)
    rest[[4, 20]] = False
    assert bool(grads["x"][rest].isfinite().all()) and not bool(grads["x"][~rest].isfinite().all(1).any())
    assert bool(passes) == _one_pass(impl, device, torch.float32)


# -- hard cases ------------------------------------------------------------------------------------------------------


def test_hard_01_zero_rows(impl, device):
    inputs = case(rows=0, experts=2, residual=True, device=device)
    wanted = dict.fromkeys(NAMES, True)
    y, grads = evaluate(adapter, inputs, wanted, torch.zeros(0, 40, device=device), impl=impl)
    assert y.shape == (0, 40)
    for name in NAMES:
        assert grads[name].shape == inputs[name].shape and bool((grads[name] == 0).all()), name


def test_hard_02_03_bad_arguments(impl, device):
    x, down, down_bias, up, up_bias, *_ = case(device=device).values()
    with pytest.raises(ValueError, match=r"adapter: expected x\.shape\[-1\] == 40 \(down_weight is 8 x 40\), got 39"):
        adapter(x[:, :39], down, down_bias, up, up_bias, impl=impl)
    with pytest.raises(ValueError, match=r"up_weight\.shape\[1\] == 8 .*got 7"):
        adapter(x, down, down_bias, up[:, :7], up_bias, impl=impl)
    with pytest.raises(ValueError, match="activation must be one of .*got 'swish'"):
        adapter(x, down, down_bias, up, up_bias, activation="swish", impl=impl)
    with pytest.raises(ValueError, match=r"gate\.shape\[-1\] to divide the 8 hidden units, got 3"):
        adapter(x, down, down_bias, up, up_bias, gate=torch.rand(19, 3, device=device), impl=impl)
    with pytest.raises(ValueError, match=r"residual=None adds x"):
        adapter(x, down, down_bias, up[:30], up_bias[:30], impl=impl)
    with pytest.raises(TypeError, match="x is float32 and up_weight is bfloat16"):
        adapter(x, down, down_bias, up.bfloat16(), up_bias, impl=impl)
    with pytest.raises(TypeError, match="residual must be None"):
        adapter(x, down, down_bias, up, up_bias, residual=True, impl=impl)


@pytest.mark.parametrize("name", ["x", "down_weight", "up_weight", "residual", "gate"])
def test_hard_04_layouts(impl, device, name):
    inputs = case(experts=2, residual=True, device=device)
    grad = torch.randn(19, 40, device=device)
    for layout, laid in layouts(inputs[name]):
        if layout != "contiguous":
            check(inputs, grad, impl, ours=inputs | {name: laid})


def test_hard_04_layouts_of_the_incoming_gradient(impl, device):
    inputs = case(device=device)
    grad = torch.randn(19, 40, device=device)
    for _, laid in layouts(grad):
        check(inputs, laid, impl)
    check(inputs, torch.randn(1, 1, device=device).expand(19, 40), impl)
    check(inputs | {"x": inputs["x"][:1].expand(19, 40)}, grad, impl)


def test_hard_06_bad_rows_stay_alone_and_inputs_untouched(impl, device):
    inputs = case(device=device)
    inputs["x"][4, 3] = torch.nan
    before = {k: None if t is None else t.clone() for k, t in inputs.items()}
    wanted = {k: t is not None for k, t in inputs.items()}
    with poisoned_allocations():
        y, grads = evaluate(adapter, inputs, wanted, torch.ones(19, 40, device=device), impl=impl)
    assert all(torch.equal(inputs[k].nan_to_num(), t.nan_to_num()) for k, t in before.items() if t is not None)
    rest = torch.arange(19, device=device) != 4
    assert bool(y[4].isnan().all()) and bool(y[rest].isfinite().all())
    assert bool(grads["x"][rest].isfinite().all())


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=7)))
def test_hard_07_gradient_subsets(impl, device, wanted):
    inputs = case(9, 24, 6, experts=2, residual=True, device=device)
    with poisoned_allocations():
        check(inputs, torch.randn(9, 24, device=device), impl, dict(zip(NAMES, wanted, strict=True)), scale=0.5)


def test_hard_07_second_backward_and_double_backward(impl, device):
    x, *rest = list(case(device=device).values())[:5]
    x.requires_grad_()
    loss = adapter(x, *rest, impl=impl).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="adapter: no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_hard_19_large_hidden_units_in_float16(impl, device):
    """Hidden units above 65504 where the output fits: finite and right."""

    def half(*shape, value):
        return torch.full(shape, value, device=device, dtype=torch.float16)

    parts = (half(4, 64, value=60.0), half(2, 64, value=30.0), None, half(64, 2, value=1e-3), None)
    y = adapter(*parts, activation="relu", impl=impl)
    exact = formula(*(None if t is None else t.double() for t in parts), activation="relu")
    assert bool(y.isfinite().all())
    assert_within_budget(y, exact.half(), exact)


def test_autocast_casts_as_nn_linear(impl, device):
    parts = list(case(device=device).values())[:5]
    leaves = [t.detach().requires_grad_() for t in parts]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = adapter(*leaves, impl=impl)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, adapter(*(t.bfloat16() for t in parts), impl=impl))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)


def test_runs_are_bitwise_equal(impl, device):
    inputs = case(70, 130, 24, device=device)
    wanted = {k: t is not None for k, t in inputs.items()}
    grad = torch.randn(70, 130, device=device)
    first = evaluate(adapter, inputs, wanted, grad, impl=impl)
    again = evaluate(adapter, inputs, wanted, grad, impl=impl)
    assert torch.equal(first[0], again[0])
    assert all(first[1][k] is None or torch.equal(first[1][k], again[1][k]) for k in NAMES)
