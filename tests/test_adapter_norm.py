"""adapter with a LayerNorm in front and dropout on its hidden units, on every implementation against float64. Hard cases
1-7, 18, 19 and 21 for these arguments are here, by number."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapters import NAMES, NORM, case, check, evaluate
from torch.utils.checkpoint import checkpoint

from fastgist.functional import adapter
from fastgist.reference.adapter import ACTIVATIONS
from fastgist.reference.adapter import adapter as formula
from fastgist.reference.philox import keep_mask
from fastgist.testing import assert_within_budget, layouts, poisoned_allocations

OP = "adapter"
EPS = 1e-5


def seed_of(number, device):
    return torch.tensor([number], dtype=torch.int64, device=device)


def dropping(device, p=0.3, seed=-(2**40) + 77):
    return {"dropout_p": p, "training": True, "seed": seed_of(seed, device)}


# -- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_formula_gradcheck(activation):
    inputs = case(3, 5, 4, experts=2, residual=True, norm=True)
    seed = seed_of(3, "cpu")
    for function in (formula, lambda *a, **k: adapter(*a, impl="reference", **k)):
        assert torch.autograd.gradcheck(
            lambda x, d, db, u, ub, r, g, w, b, f=function: f(
                x, d, db, u, ub, activation=activation, scale=0.3, residual=r, residual_scale=0.6, gate=g,
                norm=(w, b, EPS), dropout_p=0.4, training=True, seed=seed,
            ),
            [t.double().requires_grad_() for t in inputs.values()],
        )  # fmt: skip


# -- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "hidden"), [(1, 16, 16), (33, 40, 8), (64, 64, 64), (70, 130, 24)])
@pytest.mark.parametrize("dropped", [False, True])
def test_matches_float64(impl, device, dtype, rows, inner, hidden, dropped):
    inputs = case(rows, inner, hidden, dtype=dtype, device=device, norm=True)
    options = dropping(device) if dropped else {}
    grad = torch.randn(rows, inner, device=device)
    with poisoned_allocations():
        check(inputs, grad, impl, scale=0.7, norm_eps=EPS, **options)


@pytest.mark.parametrize("hidden", [1, 4, 8, 65, 130])
@pytest.mark.parametrize("normed", [False, True])
def test_hard_18_bottlenecks(impl, device, hidden, normed):
    inputs = case(21, 44, hidden, device=device, norm=normed)
    check(inputs, torch.randn(21, 44, device=device), impl, norm_eps=EPS if normed else None, **dropping(device))


@pytest.mark.parametrize(("inner", "hidden"), [(64, 4), (8192, 4), (65, 255), (771, 100), (64, 256)])
@pytest.mark.parametrize("normed", [False, True])
def test_the_ends_of_the_stated_ranges(impl, device, inner, hidden, normed):
    """Bottlenecks of 4 to 256, widths of 64 to 8192, and odd ones."""
    inputs = case(5, inner, hidden, device=device, norm=normed)
    options = {"norm_eps": EPS} | dropping(device) if normed else {}
    check(inputs, torch.randn(5, inner, device=device), impl, **options)


@pytest.mark.parametrize("experts", [1, 2, 6])
@pytest.mark.parametrize("per_expert_bias", [False, True])
@pytest.mark.parametrize("kind", ["x", "none", "tensor", "wider"])
def test_with_gates_and_residuals(impl, device, experts, per_expert_bias, kind):
    out = 56 if kind == "wider" else 36
    inputs = case(
        17, 36, 12, out, experts=experts, residual=kind in ("tensor", "wider"), device=device, norm=True
    )  # fmt: skip
    if not per_expert_bias:
        inputs["up_bias"] = torch.randn(out, device=device)
    options = {"residual": False} if kind == "none" else {}
    grad = torch.randn(17, out, device=device)
    check(inputs, grad, impl, scale=0.4, residual_scale=0.6, norm_eps=EPS, **dropping(device), **options)


@pytest.mark.parametrize("hidden", [48, 66])
def test_gated_bottlenecks_wider_than_a_tile(impl, device, hidden):
    inputs = case(21, 44, hidden, experts=3, residual=True, device=device, norm=True)
    grad = torch.randn(21, 44, device=device)
    check(inputs, grad, impl, scale=0.7, residual_scale=0.4, norm_eps=EPS, **dropping(device))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_norms_without_weight_or_bias(impl, device, activation, has_weight, has_bias, biases):
    inputs = case(23, 40, 9, device=device, norm=True)
    for name, there in (
        ("norm_weight", has_weight),
        ("norm_bias", has_bias),
        ("down_bias", biases),
        ("up_bias", biases),
    ):
        if not there:
            inputs[name] = None
    grad = torch.randn(23, 40, device=device)
    check(inputs, grad, impl, activation=activation, scale=2.0, norm_eps=1e-3, residual=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inner", [40, 96, 130])
def test_large_means(impl, device, dtype, inner):
    """Rows far from zero: their deviations are what counts. (What the sums of x and of x^2 gave would be noise.)"""
    inputs = case(33, inner, 8, dtype=dtype, device=device, norm=True)
    inputs["x"] = (inputs["x"].float() + 1e3 * torch.randn(33, 1, device=device)).to(dtype)
    inputs["x"][0] = (torch.randn(inner, device=device) + 1e3).to(dtype)
    grad = torch.randn(33, inner, device=device)
    check(inputs, grad, impl, norm_eps=EPS, residual=False)
    check(inputs, grad, impl, norm_eps=EPS)


def test_an_outlier_at_the_head_of_a_row(impl, device):
    inputs = case(33, 96, 8, device=device, norm=True)
    inputs["x"][::2, 0] = 3e4
    inputs["x"][1::2, 95] = -3e4
    check(inputs, torch.randn(33, 96, device=device), impl, norm_eps=EPS, residual=False)


@pytest.mark.parametrize("value", [0.0, 1.0, -1234.567])
def test_constant_rows(impl, device, value):
    """Variance 0: the norm returns its bias, and the gradient is 1 / sqrt(eps) times the centred one."""
    inputs = case(20, 40, 8, device=device, norm=True)
    inputs["x"][3:] = value
    y, grads = check(inputs, torch.randn(20, 40, device=device), impl, norm_eps=EPS, residual=False)
    assert bool(y.isfinite().all()) and bool(grads["x"].isfinite().all())


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("residual", [None, False])
def test_one_column(impl, device, rows, residual):
    """D = 1: the norm is its bias and x gets no gradient through it."""
    inputs = case(rows, 1, 4, device=device, norm=True)
    options = {} if residual is None else {"residual": residual}
    check(inputs, torch.randn(rows, 1, device=device), impl, norm_eps=EPS, residual_scale=0.5, **options)


@pytest.mark.parametrize("wanted", [("down_weight", "norm_weight", "norm_bias"), ("x",), (*NAMES[:5], *NORM)])
@pytest.mark.parametrize("experts", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_weights_beside_a_half_precision_x(impl, device, wanted, experts, dtype):
    """Their gradients are float32, and the norm's weights enter as they are."""
    half = case(50, 24, 6, experts=experts, dtype=dtype, device=device, norm=True)
    wide = {k: t.float() if t is not None and k in (*NAMES[1:5], *NORM) else t for k, t in half.items()}
    grad = torch.randn(50, 24, device=device)
    needs = dict.fromkeys(half, False) | dict.fromkeys(wanted, True)
    options = dropping(device) | {"residual": False}
    y, grads = evaluate(adapter, wide, needs, grad, EPS, impl=impl, **options)
    plain_y, plain_grads = check(half, grad, impl, needs, norm_eps=EPS, **options)
    close = {"rtol": 0.0, "atol": 0.0} if device.type == "cpu" else {"rtol": 2.0**-7, "atol": 2.0**-10}
    torch.testing.assert_close(y, plain_y, **close)
    for name in wanted:
        assert grads[name].dtype == wide[name].dtype
        size = float(plain_grads[name].abs().max())
        torch.testing.assert_close(grads[name].to(dtype), plain_grads[name], rtol=0.0, atol=size * 2.0**-6)


def test_autocast(impl, device):
    """float32 parameters go to the kernel, which makes float32 gradients; statistics are of the cast x."""
    inputs = case(20, 24, 6, device=device, norm=True)
    weights = [inputs[k].detach().requires_grad_() for k in (*NAMES[1:5], *NORM)]
    x = inputs["x"].bfloat16() if impl != "triton" or device.type != "cpu" else inputs["x"].half()
    options = {"norm": (*weights[4:], EPS), "impl": impl}
    with torch.autocast(device.type, x.dtype):
        y = adapter(inputs["x"], *weights[:4], **options)
    assert y.dtype == x.dtype and torch.equal(y, adapter(x, *weights[:4], **options))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and bool(t.grad.isfinite().all()) for t in weights)


def test_a_branch_and_leading_dimensions(impl, device):
    inputs = case(24, device=device, norm=True)
    branch = torch.randn(24, 40, device=device)
    parts, norm = [inputs[k] for k in NAMES[1:5]], (*(inputs[k] for k in NORM), EPS)
    x, options = inputs["x"], {"norm": norm, "impl": impl} | dropping(device)
    flat = adapter(x, *parts, residual=(x, branch), **options)
    shaped = adapter(x.view(2, 3, 4, 40), *parts, residual=(x.view(2, 3, 4, 40), branch.view(2, 3, 4, 40)), **options)
    assert torch.equal(shaped.view(24, 40), flat)
    alone = adapter(x, *parts, residual=False, **options)
    assert_within_budget(flat, alone + x + branch, alone.double() + x.double() + branch.double())


def test_fresh_adapter_is_the_identity(impl, device):
    inputs = case(device=device, norm=True)
    parts = [
        inputs["x"],
        inputs["down_weight"],
        None,
        torch.zeros(40, 8, device=device),
        torch.zeros(40, device=device),
    ]
    norm = (*(inputs[k] for k in NORM), EPS)
    assert torch.equal(adapter(*parts, norm=norm, impl=impl, **dropping(device)), inputs["x"])


# -- hard cases ------------------------------------------------------------------------------------------------------


def test_hard_01_zero_rows(impl, device):
    inputs = case(rows=0, experts=2, residual=True, device=device, norm=True)
    wanted = dict.fromkeys(inputs, True)
    grad = torch.zeros(0, 40, device=device)
    y, grads = evaluate(adapter, inputs, wanted, grad, EPS, impl=impl, **dropping(device))
    assert y.shape == (0, 40)
    for name in inputs:
        assert grads[name].shape == inputs[name].shape and bool((grads[name] == 0).all()), name


def test_hard_02_03_bad_arguments(impl, device):
    inputs = case(device=device, norm=True)
    parts, (w, b) = [inputs[k] for k in NAMES[:5]], [inputs[k] for k in NORM]

    def refused(error, match, **options):
        with pytest.raises(error, match=match):
            adapter(*parts, impl=impl, **options)

    refused(ValueError, r"adapter: expected the norm weight's shape == \(40,\) .*got \(39,\)", norm=(w[:39], b, EPS))
    refused(ValueError, r"adapter: expected the norm bias's shape == \(40,\) .*got \(1, 40\)", norm=(w, b[None], EPS))
    refused(TypeError, r"norm must be None or a tuple .*got a tuple of 2", norm=(w, b))
    refused(TypeError, r"norm must be None or a tuple .*got bool", norm=True)
    refused(TypeError, "x is float32 and norm_weight is bfloat16", norm=(w.bfloat16(), b, EPS))
    refused(TypeError, "norm_bias must be a Tensor, got int", norm=(w, 1, EPS))
    refused(ValueError, "norm's eps must be >= 0, got -1", norm=(w, b, -1.0))
    refused(ValueError, "norm's eps must be finite, got nan", norm=(w, b, float("nan")))
    refused(TypeError, "norm's eps must be a number, got str", norm=(w, b, "1e-5"))
    refused(ValueError, "expected 0 <= dropout_p < 1, got 1.0", dropout_p=1.0)
    refused(ValueError, "expected 0 <= dropout_p < 1, got -0.1", dropout_p=-0.1)
    refused(TypeError, "seed must be an int64 Tensor, got int", dropout_p=0.1, training=True, seed=3)
    refused(TypeError, "seed must be an int64 Tensor, got torch.int32", seed=torch.zeros(1, dtype=torch.int32))
    refused(ValueError, "seed must hold one number, got shape", seed=torch.zeros(2, dtype=torch.int64, device=device))


@pytest.mark.parametrize("name", ["x", "down_weight", "up_weight", "gate"])
def test_hard_04_layouts(impl, device, name):
    inputs = case(experts=2, residual=True, device=device, norm=True)
    grad = torch.randn(19, 40, device=device)
    for layout, laid in layouts(inputs[name]):
        if layout != "contiguous":
            check(inputs, grad, impl, ours=inputs | {name: laid}, norm_eps=EPS, **dropping(device))
    for _, laid in layouts(grad):
        check(inputs, laid, impl, norm_eps=EPS, **dropping(device))


def test_hard_04_strided_and_expanded_norm_weights(impl, device):
    inputs = case(device=device, norm=True)
    grad = torch.randn(19, 40, device=device)
    every_other = torch.full((80,), torch.nan, device=device)
    every_other[::2] = inputs["norm_weight"]
    inputs["norm_bias"] = torch.full((1,), 0.3, device=device).expand(40)
    check(inputs, grad, impl, ours=inputs | {"norm_weight": every_other[::2]}, norm_eps=EPS)
    one_row = inputs["x"][:1].expand(19, 40)
    check(inputs | {"x": one_row}, torch.randn(1, 1, device=device).expand(19, 40), impl, norm_eps=EPS)


def test_hard_06_bad_rows_stay_alone_and_inputs_untouched(impl, device):
    inputs = case(device=device, norm=True)
    inputs["x"][4, 3] = torch.nan
    inputs["x"][9, 5] = torch.inf
    before = {k: None if t is None else t.clone() for k, t in inputs.items()}
    wanted = {k: t is not None for k, t in inputs.items()}
    options = dropping(device)
    with poisoned_allocations():
        y, grads = evaluate(adapter, inputs, wanted, torch.ones(19, 40, device=device), EPS, impl=impl, **options)
    assert all(torch.equal(inputs[k].nan_to_num(), t.nan_to_num()) for k, t in before.items() if t is not None)
    rest = torch.ones(19, dtype=torch.bool, device=device)
    rest[[4, 9]] = False
    assert bool(y[4].isnan().all()) and not bool(y[9].isfinite().all())
    assert bool(y[rest].isfinite().all()) and bool(grads["x"][rest].isfinite().all())


_SUBSETS = list(itertools.product([False, True], repeat=6))


@pytest.mark.parametrize("wanted", _SUBSETS)
def test_hard_07_gradient_subsets(impl, device, wanted):
    """All subsets of x, D, its bias and the norm's; those of U, its bias, residual and gate go with the last of six."""
    inputs = case(9, 24, 6, experts=2, residual=True, device=device, norm=True)
    needs = dict(zip(("x", "down_weight", "down_bias", *NORM), wanted, strict=False))
    needs |= dict.fromkeys(("up_weight", "up_bias", "residual", "gate"), wanted[5])
    with poisoned_allocations():
        check(inputs, torch.randn(9, 24, device=device), impl, needs, scale=0.5, norm_eps=EPS, **dropping(device))


@pytest.mark.parametrize("name", [*NAMES, *NORM])
@pytest.mark.parametrize("normed", [False, True])
def test_hard_07_each_gradient_alone(impl, device, name, normed):
    inputs = case(9, 24, 6, experts=2, residual=True, device=device, norm=normed)
    if name in inputs:
        needs = dict.fromkeys(inputs, False) | {name: True}
        eps = EPS if normed else None
        check(inputs, torch.randn(9, 24, device=device), impl, needs, norm_eps=eps, **dropping(device))


def test_hard_07_second_backward_and_double_backward(impl, device):
    inputs = case(device=device, norm=True)
    x, *rest = (inputs[k] for k in NAMES[:5])
    x.requires_grad_()
    loss = adapter(x, *rest, norm=(inputs["norm_weight"], None, EPS), impl=impl, **dropping(device)).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="adapter: no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_hard_19_large_values_in_float16(impl, device):
    """Rows whose squares, and hidden units that, pass 65504 where the output fits."""

    def half(*shape, value):
        return torch.full(shape, value, device=device, dtype=torch.float16)

    x = (torch.randn(4, 64, device=device) * 2e4).clamp(-6e4, 6e4).half()
    parts = (x, half(2, 64, value=0.0), half(2, value=60000.0), half(64, 2, value=1e-3), None)
    norm = (half(64, value=30.0), half(64, value=1.0), EPS)
    parts[1][0] = (x[0].float() / 10).half()  # a hidden unit of the order of 64 * 30 * 2e3
    y = adapter(*parts, activation="relu", norm=norm, residual=False, scale=0.01, impl=impl)
    wide = [None if t is None else t.double() for t in parts]
    exact = formula(
        *wide, activation="relu", norm=(norm[0].double(), norm[1].double(), EPS), residual=False, scale=0.01
    )
    assert bool(y.isfinite().all()) and float(exact.abs().max()) < 65504
    assert_within_budget(y, exact.half(), exact)


def test_runs_are_bitwise_equal(impl, device):
    inputs = case(70, 130, 24, device=device, norm=True)
    wanted = {k: t is not None for k, t in inputs.items()}
    grad = torch.randn(70, 130, device=device)
    first, again = (evaluate(adapter, inputs, wanted, grad, EPS, impl=impl, **dropping(device)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(t is None or torch.equal(t, again[1][k]) for k, t in first[1].items())


# -- dropout ---------------------------------------------------------------------------------------------------------


def hidden_units(seed, p, rows, hidden, impl, device, dtype=torch.float32):
    """The hidden units themselves: x = 1, everything else the identity."""
    eye = torch.eye(hidden, device=device, dtype=dtype)
    x = torch.ones(rows, hidden, device=device, dtype=dtype)
    options = {"dropout_p": p, "training": True, "seed": seed, "activation": "identity", "residual": False}
    return adapter(x, eye, None, eye, None, impl=impl, **options)


@pytest.mark.parametrize("hidden", [1, 3, 8, 31, 66])
@pytest.mark.parametrize("number", [0, 5, -1, 2**63 - 1])
def test_hard_21_the_mask_is_the_rules(impl, device, hidden, number):
    seed = seed_of(number, device)
    y = hidden_units(seed, 0.4, 37, hidden, impl, device)
    assert torch.equal(y != 0, keep_mask(seed, (37, hidden), 0.4))
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.6))


def test_hard_21_rate_and_evaluation(impl, device):
    y = hidden_units(seed_of(11, device), 0.25, 200, 48, impl, device)
    assert abs(float((y == 0).float().mean()) - 0.25) < 4 * (0.25 * 0.75 / y.numel()) ** 0.5
    inputs = case(device=device)
    parts = [inputs[k] for k in NAMES[:5]]
    plainly = adapter(*parts, impl=impl)
    assert torch.equal(adapter(*parts, dropout_p=0.5, impl=impl), plainly)
    assert torch.equal(adapter(*parts, dropout_p=0.0, training=True, impl=impl), plainly)


def test_hard_21_seeds_are_drawn_from_the_default_generator(impl, device):
    inputs = case(device=device)
    parts = [inputs[k] for k in NAMES[:5]]
    state = torch.get_rng_state()
    first, second = (adapter(*parts, dropout_p=0.5, training=True, impl=impl) for _ in range(2))
    torch.set_rng_state(state)
    if device.type == "cpu":
        assert torch.equal(adapter(*parts, dropout_p=0.5, training=True, impl=impl), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("normed", [False, True])
def test_shapes_that_one_pass_serves_without_dropout(impl, device, normed):
    inputs = case(37, 48, 4, device=device, norm=normed)
    options = {"norm_eps": EPS} if normed else dropping(device)
    check(inputs, torch.randn(37, 48, device=device), impl, residual_scale=-0.5, **options)


def test_output_bias_is_not_dropped(impl, device):
    inputs = case(19, 40, 6, experts=2, device=device)
    zero = torch.zeros_like
    parts = (zero(inputs["x"]), zero(inputs["down_weight"]), None, inputs["up_weight"], inputs["up_bias"])
    y = adapter(*parts, gate=inputs["gate"], impl=impl, **dropping(device, p=0.9))
    assert_within_budget(y, inputs["gate"] @ inputs["up_bias"], inputs["gate"].double() @ inputs["up_bias"].double())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_hard_21_checkpointing_sees_the_same_mask(impl, device, reentrant, given):
    inputs = case(device=device, norm=True)
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if t is not None}
    options = dropping(device) if given else {"dropout_p": 0.3, "training": True}

    def layer(x):
        weights = (leaves[k] for k in NAMES[1:5])
        return adapter(x, *weights, norm=(leaves["norm_weight"], leaves["norm_bias"], EPS), impl=impl, **options)

    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        y = run(leaves["x"])
        found.append(
            [y.detach(), *torch.autograd.grad(y.square().sum(), tuple(leaves.values()))] if not reentrant else []
        )
        if reentrant:  # which knows backward() alone
            for t in leaves.values():
                t.grad = None
            torch.manual_seed(5)
            y = run(leaves["x"])
            y.square().sum().backward()
            found[-1] = [y.detach(), *(t.grad.clone() for t in leaves.values())]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [6, 80])
def test_opcheck(impl, device, hidden):
    inputs = case(9, 24, hidden, experts=2, residual=True, device=device, norm=True)
    x, down, down_bias, up, up_bias, residual, gate, weight, bias = inputs.values()
    seed = seed_of(7, device)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    raw = torch.ops.fastgist
    args = (x, down, down_bias, up, up_bias, residual, None, gate, weight, bias, seed)
    forward = (*args, "gelu", 0.5, 1.0, EPS, 0.3, True, True, impl)
    torch.library.opcheck(raw.adapter_fwd.default, forward, test_utils=tests[:2])
    _, z, stats = raw.adapter_fwd(*forward)
    saved = (
        torch.randn_like(x),
        x,
        down,
        down_bias,
        up,
        up_bias,
        gate,
        z if z.dim() == 2 else None,
        weight,
        bias,
        stats,
    )
    backward = (*saved, seed, "gelu", 0.5, 1.0, False, 0.3, [True] * 8, torch.float32, impl)
    torch.library.opcheck(raw.adapter_bwd.default, backward, test_utils=tests[:2])


@pytest.mark.parametrize("normed", [False, True])
def test_compile_fullgraph(impl, device, normed):
    inputs = case(device=device, norm=True)
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if t is not None}

    def layer(leaves, seed):
        norm = (leaves["norm_weight"], leaves["norm_bias"], EPS) if normed else None
        parts = (leaves[k] for k in NAMES[:5])
        return adapter(*parts, norm=norm, dropout_p=0.3, training=True, seed=seed, impl=impl).square().sum()

    wanted = tuple(t for k, t in leaves.items() if normed or k not in NORM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for number in (1, 2):  # the seed is data: another one is no other program
        seed = seed_of(number, device)
        ours, eager = (torch.autograd.grad(f(leaves, seed), wanted) for f in (compiled, layer))
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
