"""cp_linear of several weights with one input: the same as of the weights one above the other."""

import pytest
import torch
from conftest import DEVICE
from torch.utils.flop_counter import FlopCounterMode

from fastgist.functional import cp_linear
from fastgist.reference import cp_linear as reference
from fastgist.reference.cp_linear import cp_linear as formula
from fastgist.testing import assert_within_budget

OP = "cp_linear"
NAMES = ("x", "u", "v", "gain")


def case(rows=37, inner=40, outs=(24, 24, 48), rank=5, fold=24, dtype=torch.float32):
    """x, weights, biases, u, v, gain; ``fold`` None: v has a row for each of all rows, and there is no gain."""
    randn = lambda *shape: (torch.randn(*shape) * max(shape[-1], 1) ** -0.5).to(DEVICE, dtype)  # noqa: E731
    total = sum(outs)
    v, gain = (randn(total, rank), None) if fold is None else (randn(fold, rank), randn(total // fold, rank) + 1)
    return (
        randn(rows, inner) * 5,
        [randn(n, inner) for n in outs],
        [randn(n) for n in outs],
        randn(inner, rank),
        v,
        gain,
    )


def leaf(t):
    return None if t is None else t.detach().clone().requires_grad_()


def run(function, x, weights, biases, u, v, gain, grads, wanted=(True,) * 4, **options):
    given = [
        None if t is None else t.detach().clone().requires_grad_(w)
        for t, w in zip((x, u, v, gain), wanted, strict=True)
    ]
    out = function(given[0], weights, biases, *given[1:], **options)
    out = out if isinstance(out, tuple) else out.split([g.shape[-1] for g in grads], -1)
    torch.autograd.backward(out, grads)
    return [o.detach() for o in out], [None if t is None else t.grad for t in given]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(("outs", "fold"), [((24, 24, 48), 24), ((20, 36), None), ((24,), 24), ((24, 24), 48)])
def test_equals_the_weights_one_above_the_other(impl, dtype, outs, fold, dropout_p):
    x, weights, biases, u, v, gain = case(outs=outs, fold=fold, dtype=dtype)
    grads = [torch.randn(37, n, device=DEVICE, dtype=dtype) for n in outs]
    options = {"scale": 0.7, "dropout_p": dropout_p, "training": True, "seed": torch.tensor([11], device=DEVICE)}
    ours, our_grads = run(cp_linear, x, weights, biases, u, v, gain, grads, impl=impl, **options)

    def whole(x, weights, biases, *others, **options):
        return formula(x, torch.cat(weights), torch.cat(biases), *others, **options)

    plain, plain_grads = run(whole, x, weights, biases, u, v, gain, grads, **options)
    double = [None if t is None else t.double() for t in (x, u, v, gain)]
    wide = [w.double() for w in weights], [b.double() for b in biases]
    exact, exact_grads = run(whole, double[0], *wide, *double[1:], [g.double() for g in grads], **options)
    assert [o.shape for o in ours] == [(37, n) for n in outs]
    for o, p, e in zip(ours, plain, exact, strict=True):
        assert_within_budget(o, p, e)
    for name, g, p, e in zip(NAMES, our_grads, plain_grads, exact_grads, strict=True):
        if e is not None:
            assert_within_budget(g, p, e, what=name)


def by_formula(dtype, given, grad):
    """Gradients of x, u, v and gain by the plain formula from dy (M, N)."""
    x, weights, biases, u, v, gain = given
    leaves = [leaf(None if t is None else t.to(dtype)) for t in (x, u, v, gain)]
    y = formula(leaves[0], torch.cat(weights).to(dtype), torch.cat(biases).to(dtype), *leaves[1:])
    return torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(dtype))


def hold(given, outputs, grads, leaves, grad):
    """``grads`` into some of ``outputs`` of ``leaves``, against what the formula makes of the whole dy."""
    torch.autograd.backward(outputs, grads)
    leaves = [t for t in leaves if t is not None]
    plain, exact = (by_formula(dtype, given, grad) for dtype in (torch.float32, torch.float64))
    for name, g, p, e in zip(NAMES, leaves, plain, exact, strict=False):
        assert_within_budget(g.grad, p, e, what=name)


def test_outputs_that_nobody_uses_or_that_come_in_other_layouts(impl):
    """No gradient for the one, and gradients as wide as a row of them or expanded for the others."""
    given = x, weights, biases, u, v, gain = case()
    wide = torch.randn(37, 100, device=DEVICE)[:, ::4]
    grad = torch.cat((wide[:, :24], torch.zeros(37, 24, device=DEVICE), torch.ones(37, 48, device=DEVICE)), 1)
    mine = [leaf(t) for t in (x, u, v, gain)]
    q, _, o = cp_linear(mine[0], weights, biases, *mine[1:], impl=impl)
    hold(given, [q, o.sum()], [wide[:, :24], torch.ones((), device=DEVICE)], mine, grad)


def _inside(g):
    wide = torch.full((g.shape[0], 3 * g.shape[1] + 1), torch.nan, device=g.device)
    wide[:, 5 : 5 + g.shape[1]] = g
    return wide[:, 5 : 5 + g.shape[1]]


LAYOUTS = {
    "contiguous": lambda g: g.clone(),
    "columns of a wider matrix": _inside,
    "transposed": lambda g: g.t().contiguous().t(),
    "every second column": lambda g: g.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("rank", [5, 20])  # one read of dy for dL/dh and dV, and two
@pytest.mark.parametrize(("outs", "fold"), [((24, 24, 48), 24), ((20, 36, 7), None), ((66, 33), 33)])
def test_incoming_gradients_of_different_layouts(impl, outs, fold, rank):
    """Each where it lies: another layout, and another row stride, for each piece."""
    given = x, weights, biases, u, v, gain = case(outs=outs, fold=fold, rank=rank)
    pieces = [torch.randn(37, n, device=DEVICE) for n in outs]
    for turn in range(len(LAYOUTS)):
        chosen = [list(LAYOUTS.values())[(turn + i) % len(LAYOUTS)] for i in range(len(outs))]
        mine = [leaf(t) for t in (x, u, v, gain)]
        outputs = cp_linear(mine[0], weights, biases, *mine[1:], impl=impl)
        hold(given, outputs, [lay(g) for lay, g in zip(chosen, pieces, strict=True)], mine, torch.cat(pieces, 1))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(("outs", "fold"), [((24, 24, 48), 24), ((20, 36, 7), None)])
def test_results_without_a_gradient_are_left_out(impl, outs, fold, missing, shared):
    """As if their weights were not there: zeros where a gradient is theirs alone, none for their weights."""
    given = list(case(outs=outs, fold=fold))
    if shared:
        given[5] = torch.randn(5, device=DEVICE)
    x, weights, biases, u, v, gain = given
    pieces = [torch.randn(37, n, device=DEVICE) for n in outs]
    whole = torch.cat([torch.zeros_like(g) if i in missing else g for i, g in enumerate(pieces)], 1)
    mine, base = [leaf(t) for t in (x, u, v, gain)], [[leaf(t) for t in ts] for ts in (weights, biases)]
    outputs = cp_linear(mine[0], *base, *mine[1:], impl=impl)
    used = [i for i in range(3) if i not in missing]
    hold(given, [outputs[i] for i in used], [pieces[i] for i in used], mine, whole)
    for i, (weight, bias) in enumerate(zip(*base, strict=True)):
        assert (weight.grad is None, bias.grad is None) == (i in missing, i in missing)
        if i not in missing:
            torch.testing.assert_close(weight.grad, pieces[i].T @ x)
            torch.testing.assert_close(bias.grad, pieces[i].sum(0))


def test_no_gradient_at_all(impl):
    """What stands behind may hand out none."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.sum()

        @staticmethod
        def backward(ctx, grad):
            return None

    x, weights, biases, u, v, gain = case()
    mine = [leaf(t) for t in (x, u, v, gain)]
    for outputs in (cp_linear(mine[0], weights, biases, *mine[1:], impl=impl),
                    [cp_linear(mine[0], weights[0], None, *mine[1:3], impl=impl)]):  # fmt: skip
        sum(Nothing.apply(o) for o in outputs).backward()
    assert all(t.grad is None for t in mine)


def test_results_can_be_viewed_and_written_to_where_each_lies_alone(impl):
    """PyTorch's products are contiguous, as a layer's own. Triton's are columns of one matrix, and views of it."""
    x, weights, biases, u, v, gain = case()
    q, k, o = cp_linear(x.requires_grad_(), weights, biases, u, v, gain, impl=impl)
    assert (q.requires_grad, k.view(37, 2, 12).transpose(0, 1).shape) == (True, (2, 37, 12))
    if impl != "triton":
        assert all(t.is_contiguous() for t in (q, k, o))
        assert len({t.untyped_storage().data_ptr() for t in (q, k, o)}) == 3
        q.mul_(2)
    else:
        assert q.stride() == k.stride() == o.stride() == (96, 1)
        assert q.untyped_storage().data_ptr() == o.untyped_storage().data_ptr()
        with pytest.raises(RuntimeError, match="multiple views"):
            q.mul_(2)


@pytest.mark.parametrize("rows", [12, 200])  # 200: W + dW is cheaper, and taken
def test_many_rows_and_few_by_the_reference(rows):
    x, weights, biases, u, v, gain = case(rows, 16, (24, 24), 3, 24, torch.float64)
    grads = [torch.randn(rows, 24, dtype=torch.float64) for _ in weights]
    ours = run(cp_linear, x, weights, biases, u, v, gain, grads, impl="reference")
    whole = run(lambda x, w, b, *o: formula(x, torch.cat(w), torch.cat(b), *o), x, weights, biases, u, v, gain, grads)
    torch.testing.assert_close(ours, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "wanted", [(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1) if a + b + c + d]
)
def test_hard_07_every_subset_of_gradients(impl, wanted):
    x, weights, biases, u, v, gain = case()
    grads = [torch.randn(37, w.shape[0], device=DEVICE) for w in weights]
    wanted = tuple(map(bool, wanted))
    _, some = run(cp_linear, x, weights, biases, u, v, gain, grads, wanted, impl=impl)
    _, every = run(cp_linear, x, weights, biases, u, v, gain, grads, impl=impl)
    for got, all_of_them, want in zip(some, every, wanted, strict=True):
        assert (got is not None) == want
        if want:
            torch.testing.assert_close(got, all_of_them)


@pytest.mark.parametrize("unused", [None, 0, 2])
@pytest.mark.parametrize("of_biases", [(), (0, 1, 2), (2,)])
@pytest.mark.parametrize("of_weights", [(0, 1, 2), (1,), (0, 2)])
def test_base_weights_that_are_trained_get_their_own_gradients(impl, of_weights, of_biases, unused):
    x, weights, biases, u, v, gain = case()
    weights = [w.clone().requires_grad_(i in of_weights) for i, w in enumerate(weights)]
    biases = [b.clone().requires_grad_(i in of_biases) for i, b in enumerate(biases)]
    x, v = leaf(x), leaf(v)
    out = cp_linear(x, weights, biases, u, v, gain, impl=impl)
    grads = [torch.randn_like(o) for o in out]
    used = [i for i in range(3) if i != unused]
    torch.autograd.backward([out[i] for i in used], [grads[i] for i in used])
    for i, (w, b, g) in enumerate(zip(weights, biases, grads, strict=True)):
        for t, some, wanted in ((w, of_weights, g.T @ x.detach()), (b, of_biases, g.sum(0))):
            assert (t.grad is not None) == (i in some and i in used)
            if t.grad is not None:
                torch.testing.assert_close(t.grad, wanted)
    factors = [leaf(x), leaf(v)]
    whole = cp_linear(factors[0], torch.cat(weights).detach(), None, u, factors[1], gain, impl=impl).split(
        [24, 24, 48], 1
    )
    torch.autograd.backward([whole[i] for i in used], [grads[i] for i in used])
    torch.testing.assert_close([x.grad, v.grad], [t.grad for t in factors])


def test_a_frozen_weight_beside_a_trained_one_costs_no_product():
    x, weights, biases, u, v, gain = case(rows=20, inner=64, outs=(48, 48, 48), rank=8, fold=48)

    def flops(*trained):
        given = [w.clone().requires_grad_(i in trained) for i, w in enumerate(weights)]
        with FlopCounterMode(display=False) as counter:
            out = cp_linear(x, given, biases, u, leaf(v), gain, impl="reference")
            sum(o.sum() for o in out).backward()
        return counter.get_total_flops()

    assert flops(1) - flops() == 2 * 20 * 64 * 48
    assert flops(0, 1, 2) - flops() == 3 * 2 * 20 * 64 * 48


def test_without_biases_and_more_leading_dimensions(impl):
    x, weights, _, u, v, gain = case()
    out = cp_linear(x.view(1, 37, 40), weights, None, u, v, gain, impl=impl)
    whole = cp_linear(x, torch.cat(weights), None, u, v, gain, impl=impl)
    assert [o.shape for o in out] == [(1, 37, 24), (1, 37, 24), (1, 37, 48)]
    torch.testing.assert_close(torch.cat(out, -1)[0], whole)


def test_x_u_is_formed_once():
    x, weights, biases, u, v, gain = case(rows=20, inner=64, outs=(48, 48, 48), rank=8, fold=48)
    rows, products = 20, 2 * 20 * 64 * 48
    with FlopCounterMode(display=False) as together:
        cp_linear(x, weights, biases, u, v, gain, impl="reference")
    with FlopCounterMode(display=False) as apart:
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            cp_linear(x, w, b, u, v, gain[i], impl="reference")
    once = 2 * rows * 64 * 8
    assert together.get_total_flops() == 3 * products + 3 * (2 * rows * 8 * 48) + once
    assert apart.get_total_flops() - together.get_total_flops() == 2 * once


def test_the_reference_itself_forms_x_u_once(monkeypatch):
    """Seen where it is formed: counters of FLOPs ask the operator, which says what it should be."""
    x, weights, biases, u, v, gain = case(rows=20, inner=64, outs=(48, 48, 48), rank=8, fold=48)
    formed, dropped = [], reference._dropped
    monkeypatch.setattr(reference, "_dropped", lambda h, *rest: (formed.append(tuple(h.shape)), dropped(h, *rest))[1])
    reference.forward(x, weights, biases, u, v, gain, None, 1.0, 0.0, True)
    assert formed == [(20, 8)]


def test_what_is_kept_does_not_grow_with_the_number_of_weights():
    """The pieces themselves, x and h: no concatenated weight and no second h."""
    x, weights, biases, u, v, gain = case()
    x.requires_grad_(), u.requires_grad_(), v.requires_grad_()
    kept: dict[int, int] = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = cp_linear(x, weights, biases, u, v, gain, impl="reference")
    mine = [t.untyped_storage().data_ptr() for t in (x, *weights, u, v, gain)]
    extra = {p: n for p, n in kept.items() if p not in mine}
    assert list(extra.values()) == [37 * 5 * 4]
    torch.autograd.backward(out, [torch.ones_like(o) for o in out])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"weight": []}, "expected several weights and a bias for each"),
        (lambda a: a | {"bias": a["bias"][:2]}, "got 3 weights and 2 biases"),
        (lambda a: a | {"weight": [*a["weight"][:2], a["weight"][2][:, :39]]}, r"weight\[2\].shape\[1\] == 40"),
        (lambda a: a | {"bias": [*a["bias"][:2], a["bias"][2][:7]]}, r"bias\[2\].shape == \(48,\)"),
        (lambda a: a | {"weight": [a["weight"][0][:12], a["weight"][1], torch.cat((a["weight"][2], a["weight"][2][:12]))],
                        "bias": None}, r"weight\[0\].shape\[0\] to be a multiple of v.shape\[0\] == 24"),
        (lambda a: a | {"gain": a["gain"][:3]}, "gain.shape"),
    ],
)  # fmt: skip
def test_errors(change, message):
    x, weights, biases, u, v, gain = case()
    given = change({"x": x, "weight": weights, "bias": biases, "u": u, "v": v, "gain": gain})
    with pytest.raises(ValueError, match=message):
        cp_linear(**given)


def test_mixed_dtypes_and_autocast():
    x, weights, biases, u, v, gain = case()
    with pytest.raises(TypeError, match=r"x is float32 and weight\[1\] is bfloat16"):
        cp_linear(x, [weights[0], weights[1].bfloat16(), weights[2]], biases, u, v, gain)
    with torch.autocast(DEVICE.split(":")[0], torch.bfloat16):
        out = cp_linear(x, [weights[0], weights[1].bfloat16(), weights[2]], biases, u, v, gain)
    assert {o.dtype for o in out} == {torch.bfloat16}


def test_opcheck_and_compile():
    x, weights, biases, u, v, gain = case()
    op = torch.ops.fastgist.cp_linear_fwd.default
    torch.library.opcheck(op, (x, weights, biases, u, v, gain, None, 1.0, 0.0, True, "auto"))
    fwd = torch.compile(lambda *a: torch.cat(cp_linear(*a), -1), fullgraph=True, backend="aot_eager")
    leaves = [leaf(t) for t in (x, u, v, gain)]
    got = torch.autograd.grad(fwd(leaves[0], weights, biases, *leaves[1:]).square().sum(), leaves)
    want = torch.autograd.grad(torch.cat(cp_linear(leaves[0], weights, biases, *leaves[1:]), -1).square().sum(), leaves)
    torch.testing.assert_close(got, want)


def test_one_bias_for_several_weights_is_refused():
    x, weights, _biases, u, v, gain = case()
    with pytest.raises(TypeError, match=r"several weights take a sequence of biases, or None, got one Tensor \(96,\)"):
        cp_linear(x, weights, torch.zeros(96), u, v, gain)
