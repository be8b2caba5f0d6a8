"""Hard cases 12 to 16 on every way through bidirectional_kl and gist_loss: row losses, whose gradients a backward recomputes,
and a scalar loss, whose gradients the forward finishes. Each way against the other's truth: the plain PyTorch path in float64
(which tests/test_bidirectional_kl.py and test_gist_loss.py hold against the formula, case by case)."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE, INTERPRETING, implementations
from losses import evaluate, gradient_terms, in_other_orders, loss_terms, on_every_device
from torch import Tensor

from fastgist import functional as F
from fastgist.testing import assert_within_budget, poisoned_allocations

pytestmark = pytest.mark.kernel
OPS = ("bidirectional_kl", "gist_loss")
CASES = [(op, by) for op in OPS for by in implementations(op)]
INF, NAN = float("inf"), float("nan")


def _pair(rows: int, classes: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    return spread * torch.randn(rows, classes), spread * torch.randn(rows, classes)


def _absent(z: Tensor, o: Tensor) -> None:
    z[:, ::3] = o[:, ::3] = -INF


def _lone(z: Tensor, o: Tensor) -> None:
    z[1, 5] = o[2, 7] = -INF


def _empty_row(z: Tensor, o: Tensor) -> None:
    z[0], o[2] = -INF, -INF
    z[3] = o[3] = -INF


def _bad(z: Tensor, o: Tensor) -> None:
    z[1, 3], o[2, 0], z[3, 1] = NAN, NAN, INF


def _gaps(z: Tensor, o: Tensor) -> None:
    for row, gap in enumerate((320.0, 1e4, 3e4, 6e4)):
        z[row, 0] += gap
        o[row, -1] += gap


def _offset(z: Tensor, o: Tensor) -> None:
    o += 100.0


def _equal(z: Tensor, o: Tensor) -> None:
    o.copy_(z)


#: name -> what is done to a pair of logits (4, V). Values fit float16.
INPUTS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "classes absent on both sides": _absent,
    "a class absent on one side": _lone,
    "rows of nothing but -inf": _empty_row,
    "NaN and +inf": _bad,
    "gaps": _gaps,
    "an offset": _offset,
    "equal sides": _equal,
}


def check(op: str, by: str, z: Tensor, o: Tensor, *rest: Tensor, one_hot: bool = False, **options) -> None:
    """Loss and gradients by ``by`` against the plain path in float64, with the same in z's dtype as the peer. ``one_hot``: one
    class has all of each row's mass, so that the gradients' terms vanish or are of their own size."""
    function = getattr(F, op)
    wanted = [True, True]
    with poisoned_allocations():
        loss, grads = evaluate(lambda a, b: function(a, b, *rest, impl=by, **options), (z, o), wanted)

    def plainly(x, y, *given):
        named = {"target": given[0]} if given else {}
        return in_other_orders(
            lambda pair, more: evaluate(lambda a, b: function(a, b, impl="reference", **options, **more), pair, wanted),
            (x, y),
            named,
        )

    wide = [t.double() if t.is_floating_point() else t for t in rest]
    exact_loss, exact_grads = plainly(z.double(), o.double(), *wide)[0]
    plain = list(itertools.chain(*on_every_device(plainly, z, o, *rest)))
    temperature = options.get("temperature", 3.0)
    # The terms behind a result, and not the result, say what float32 can hold; where nothing is finite any scale will do.
    calm = [t.double().nan_to_num(0.0, 0.0, 0.0) for t in (z, o)]
    scale = loss_terms(*calm, temperature) * len(z) + float(exact_loss[exact_loss.isfinite()].abs().sum()) + 1.0
    assert_within_budget(loss, [p for p, _ in plain], exact_loss, what="loss", scale=scale)
    grad_scale = None if one_hot else gradient_terms(*calm, temperature) + 1.0
    for i, (g, e) in enumerate(zip(grads, exact_grads, strict=True)):
        assert_within_budget(g, [p[i] for _, p in plain], e, what=f"gradient {i}", scale=grad_scale)


def _run(op: str, by: str, z: Tensor, o: Tensor, reduction: str, **options) -> None:
    rest = ()
    if op == "gist_loss":
        target = torch.randint(z.shape[1], (len(z),), device=z.device)
        target[-1] = -100 if len(z) > 2 else target[-1]
        rest = (target,)
    check(op, by, z, o, *rest, reduction=reduction, **options)


@pytest.mark.parametrize(("op", "by"), CASES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("name", INPUTS)
def test_hard_12_13_what_is_in_the_logits(op, by, reduction, dtype, temperature, name):
    z, o = _pair(4, 41)
    INPUTS[name](z, o)
    _run(op, by, z.to(DEVICE, dtype), o.to(DEVICE, dtype), reduction, temperature=temperature, one_hot=name == "gaps")


@pytest.mark.skipif("triton" not in implementations("gist_loss"), reason="forms of the Triton launches")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("form", "classes", "reduction"),
    [
        ("whole", 41, "mean"),
        ("rows", 41, "sum"),
        ("rows", 2100, "mean"),
        ("rows", 2100, "none"),
        ("split", 41, "mean"),
        ("split", 4100, "sum"),
        ("split", 4100, "none"),
    ],
)
@pytest.mark.parametrize("name", INPUTS)
def test_hard_12_13_in_every_form_of_a_launch(op, form, classes, reduction, name, monkeypatch):
    """A problem as small as the others here is one program's alone: each other form is told to take it. Row losses know two
    forms, one of them in parts."""
    module = importlib.import_module(f"fastgist_kernels.{op}")
    taken = []
    launch = "_launch" if op == "bidirectional_kl" else "launch_gist_loss"
    original = getattr(module, launch)
    monkeypatch.setattr(module, launch, lambda of, *a, **k: taken.append(of) or original(of, *a, **k))
    monkeypatch.setattr(module, "choose_form", lambda *_: form)
    monkeypatch.setattr(module, "few_rows", lambda *_: form == "split")
    z, o = _pair(4, classes)
    INPUTS[name](z, o)
    _run(op, "triton", z.to(DEVICE), o.to(DEVICE), reduction, temperature=3.0, one_hot=name == "gaps")
    if form == "split":
        wanted = ["split", "merge", *(["bwd"] if reduction == "none" else [])]
    else:
        wanted = ["fwd", "bwd"] if reduction == "none" else [form]
    assert taken == wanted


@pytest.mark.parametrize(("op", "by"), CASES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("classes", [1, 2, 127, 4097] if INTERPRETING else [1, 2, 127, 4097, 50257, 131073])
@pytest.mark.parametrize("rows", [1, 3])
def test_hard_16_class_counts_and_few_rows(op, by, reduction, classes, rows):
    z, o = _pair(rows, classes)
    _run(op, by, z.to(DEVICE), o.to(DEVICE), reduction, temperature=3.0)


@pytest.mark.parametrize(("op", "by"), CASES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_hard_15_rows_that_count_nowhere_may_hold_anything(op, by, reduction, all_of_them):
    z, o = (x.to(DEVICE) for x in _pair(6, 41))
    out = torch.ones(6, dtype=torch.bool) if all_of_them else torch.tensor([False, True, False, True, True, False])
    clean = [x.clone() for x in (z, o)]
    for x in (z, o):
        x[out.to(DEVICE)] = NAN
    if op == "bidirectional_kl":
        rest, options = (), {"mask": ~out.to(DEVICE), "reduction": reduction}
    else:
        rest, options = (torch.randint(41, (6,)).masked_fill(out, -100).to(DEVICE),), {"reduction": reduction}
    results = []
    for pair in ((z, o), clean):
        with poisoned_allocations():
            results.append(evaluate(lambda a, b: getattr(F, op)(a, b, *rest, impl=by, **options), pair, [True, True]))
    (loss, grads), (clean_loss, clean_grads) = results
    assert torch.equal(loss, clean_loss)
    assert loss.isfinite().all()
    for g, c in zip(grads, clean_grads, strict=True):
        assert torch.equal(g, c)
        assert (g[out.to(DEVICE)] == 0).all()
    if all_of_them:
        assert (loss == 0).all()


@pytest.mark.parametrize(("op", "by"), CASES)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_hard_16_swapped_sides_swap_their_gradients_and_constants_change_nothing(op, by, reduction):
    """A constant of a power of two that leaves every logit exact."""
    z, o = ((x * 16).round().div(16).to(DEVICE) for x in _pair(5, 41))
    rest = () if op == "bidirectional_kl" else (torch.randint(41, (5,), device=DEVICE),)
    options = {"temperature": 3.0, "reduction": reduction} | ({} if op == "bidirectional_kl" else {"alpha": 1.0})

    def run(a: Tensor, b: Tensor):
        return evaluate(lambda x, y: getattr(F, op)(x, y, *rest, impl=by, **options), (a, b), [True, True])

    loss, (grad_z, grad_o) = run(z, o)
    swapped, (swapped_z, swapped_o) = run(o, z)
    shifted, shifted_grads = run(z + 64.0, o - 128.0)
    few = 8 * torch.finfo(torch.float32).eps
    scale = max(float(g.abs().max()) for g in (grad_z, grad_o))
    torch.testing.assert_close(swapped, loss, rtol=few, atol=few)
    torch.testing.assert_close(swapped_z, grad_o, rtol=few, atol=few * scale)
    torch.testing.assert_close(swapped_o, grad_z, rtol=few, atol=few * scale)
    torch.testing.assert_close(shifted, loss, rtol=few, atol=few)
    for a, b in zip(shifted_grads, (grad_z, grad_o), strict=True):
        torch.testing.assert_close(a, b, rtol=few, atol=few * scale)
