"""How the gradients of bidirectional_kl and gist_loss reach their inputs: finished in the forward for a scalar loss, scaled by
what arrives, right again over a retained graph; what a mean divides by; a side that is detached."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, INTERPRETING, implementations
from every_op import make
from losses import assert_same, gradient_terms
from torch import Tensor

from fastgist import functional as F
from fastgist import nn
from fastgist.reference.bidirectional_kl import bidirectional_kl as kl_formula
from fastgist.reference.gist_loss import gist_loss as gist_formula
from fastgist.testing import assert_within_budget

CASES = [(op, by) for op in ("bidirectional_kl", "gist_loss") for by in implementations(op)]
each = pytest.mark.parametrize(("op", "by"), CASES)
pytestmark = pytest.mark.kernel
OP = "gist_loss"  # of the tests below that take `impl` alone
HALVES = (torch.float32, torch.bfloat16, torch.float16)
#: What backwards over one graph are given, the last of which frees it.
ORDERS = [(1.0, 4.0), (4.0, 1.0), (1.0, 1.0), (1.0, 4.0, 1.0), (1.0, 1.0, 4.0), (4.0, 1.0, 4.0), (4.0, 4.0, 1.0)]


def problem(op: str, dtype=torch.float32, rows: int = 6, classes: int = 37) -> tuple[list[Tensor], tuple, dict]:
    """(both logits, further arguments, options with which some rows count and others do not)."""
    z, g = ((torch.randn(rows, classes, device=DEVICE) * 3).to(dtype).requires_grad_() for _ in range(2))
    out = torch.arange(rows, device=DEVICE) % 3 == 2
    if op == "bidirectional_kl":
        return [z, g], (), {"temperature": 3.0, "mask": ~out}
    target = torch.randint(classes, (rows,), device=DEVICE).masked_fill(out, -100)
    return [z, g], (target,), {}


def formula(op: str):
    return kl_formula if op == "bidirectional_kl" else gist_formula


def gradients(loss: Tensor, leaves: list[Tensor], factor: float = 1.0, keep: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, torch.full_like(loss, factor), retain_graph=keep)


def exact(op: str, leaves: list[Tensor], rest: tuple, dtype: torch.dtype, factor: float = 1.0, **options):
    """Loss and gradients by the formula in ``dtype``, times ``factor``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    loss = formula(op)(*leaves, *rest, **options)
    return loss.detach(), gradients(loss, leaves, factor)


def terms(op: str, leaves: list[Tensor]) -> float:
    """The terms of a row's gradient, which are larger than their sum where they cancel. (The softmaxes of gist_loss's
    cross-entropies are 1 at most.)"""
    of_divergence = gradient_terms(*(x.detach() for x in leaves), 3.0)
    return of_divergence if op == "bidirectional_kl" else 2 + 0.75 * of_divergence


@each
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, -2.0, 65536.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_incoming_gradient_is_applied(op, by, reduction, factor, dtype):
    if dtype == torch.float16 and factor == 65536.0 and reduction == "sum":
        factor = 1024.0  # a float16 gradient must hold the result
    leaves, rest, options = problem(op, dtype)
    options |= {"reduction": reduction}
    loss = getattr(F, op)(*leaves, *rest, impl=by, **options)
    ours = gradients(loss, leaves, factor)
    _, plain = exact(op, leaves, rest, dtype, factor, **options)
    _, true = exact(op, leaves, rest, torch.float64, factor, **options)
    scale = abs(factor) * terms(op, leaves) / (4 if reduction == "mean" else 1)  # 4 of the 6 rows count
    for a, p, t in zip(ours, plain, true, strict=True):
        assert a.dtype == dtype
        assert_within_budget(a, p, t, what=f"{factor} times the gradient", scale=scale)


@each
def test_small_gradients_survive_float16_until_the_loss_scale_lifts_them(op, by):
    """One over 4,096 rows times a probability is nothing in float16; times 65,536 it is a number again."""
    leaves, rest, _ = problem(op, torch.float16)
    loss = getattr(F, op)(*leaves, *rest, impl=by, divisor=2.0**24)
    ours = gradients(loss, leaves, 2.0**24)
    whole = gradients(getattr(F, op)(*leaves, *rest, impl=by, divisor=1), leaves)
    for a, b in zip(ours, whole, strict=True):
        assert b.abs().max() > 0.01
        assert_same(a, b)


@each
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("factors", ORDERS)
def test_every_backward_over_a_retained_graph_is_right_and_stays_so(op, by, dtype, reduction, factors):
    leaves, rest, options = problem(op, dtype)

    def loss() -> Tensor:
        return getattr(F, op)(*leaves, *rest, impl=by, reduction=reduction, **options)

    fresh = [gradients(loss(), leaves, factor) for factor in factors]
    retained = loss()
    again = [gradients(retained, leaves, f, i < len(factors) - 1) for i, f in enumerate(factors)]
    for a, b in zip(again, fresh, strict=True):  # compared after all: none may have changed another's result
        for ours, wanted in zip(a, b, strict=True):
            assert_same(ours, wanted)
    assert len({g.data_ptr() for each in again for g in each}) == 2 * len(factors)


@each
def test_gradients_that_were_changed_by_a_user_are_not_handed_out_again(op, by):
    leaves, rest, options = problem(op)
    fresh = gradients(getattr(F, op)(*leaves, *rest, impl=by, **options), leaves)
    loss = getattr(F, op)(*leaves, *rest, impl=by, **options)
    hook = leaves[0].register_hook(lambda g: g.zero_())
    for _ in range(2):
        for g in gradients(loss, leaves, keep=True):
            g.zero_()
    hook.remove()
    for ours, wanted in zip(gradients(loss, leaves), fresh, strict=True):
        assert_same(ours, wanted)


@each
def test_another_loss_may_add_to_the_gradient_that_was_handed_out(op, by):
    """``.grad`` is the very tensor that a backward handed out, and later backwards add to it in place."""
    leaves, rest, options = problem(op)
    fresh = gradients(getattr(F, op)(*leaves, *rest, impl=by, **options), leaves)
    loss = getattr(F, op)(*leaves, *rest, impl=by, **options)
    loss.backward(retain_graph=True)
    first = [x.grad for x in leaves]
    sum(x.square().sum() for x in leaves).backward()
    for x, grad, of_loss in zip(leaves, first, fresh, strict=True):
        assert x.grad is grad
        assert not torch.equal(grad, of_loss)
    for ours, wanted in zip(gradients(loss, leaves), fresh, strict=True):
        assert_same(ours, wanted)


@each
def test_a_backward_with_gradient_one_hands_out_what_the_forward_made(op, by):
    """No tensor of the logits' size is allocated by it."""
    leaves, rest, options = problem(op, rows=64, classes=1000)
    loss = getattr(F, op)(*leaves, *rest, impl=by, **options)
    with torch.profiler.profile(profile_memory=True) as profile:
        gradients(loss, leaves)
    size = leaves[0].numel() * leaves[0].element_size()
    allocated = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert allocated, "the profiler saw nothing, so this would pass whatever happened"
    assert max(allocated) < size


@each
@pytest.mark.parametrize("divisor", [7.5, "tensor"])
def test_a_mean_divides_by_what_the_caller_gives(op, by, divisor):
    leaves, rest, options = problem(op)
    given = torch.tensor(7.5, device=DEVICE) if divisor == "tensor" else divisor
    loss = getattr(F, op)(*leaves, *rest, impl=by, divisor=given, **options)
    ours = gradients(loss, leaves)
    total = exact(op, leaves, rest, torch.float64, 1 / 7.5, reduction="sum", **options)
    plain = exact(op, leaves, rest, torch.float32, 1 / 7.5, reduction="sum", **options)
    assert_within_budget(loss.detach(), plain[0] / 7.5, total[0] / 7.5, what="loss")
    for a, p, t in zip(ours, plain[1], total[1], strict=True):
        assert_within_budget(a, p, t, what="gradient", scale=terms(op, leaves) / 7.5)


@each
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divisor": 0.0}, ValueError, "divisor must be finite and > 0, got 0.0"),
        ({"divisor": float("nan")}, ValueError, "divisor must be finite and > 0, got nan"),
        ({"divisor": "8"}, TypeError, "divisor must be a number or a Tensor, got str"),
        ({"divisor": torch.ones(2)}, ValueError, r"divisor must be one number, got a tensor of shape \(2,\)"),
        ({"divisor": torch.ones((), requires_grad=True)}, ValueError, "divisor gets no gradient"),
        ({"divisor": 8, "reduction": "sum"}, ValueError, "divisor is what a mean divides by, and reduction is 'sum'"),
    ],
)
def test_what_a_divisor_cannot_be(op, by, options, error, message):
    leaves, rest, _ = problem(op)
    with pytest.raises(error, match=f"{op}: {message}"):
        getattr(F, op)(*leaves, *rest, impl=by, **options)


@each
@pytest.mark.parametrize("side", [0, 1])
def test_one_side_that_needs_no_gradient_gets_none(op, by, side):
    leaves, rest, options = problem(op)
    both = gradients(getattr(F, op)(*leaves, *rest, impl=by, **options), leaves)
    fixed = [x.detach().requires_grad_(i == side) for i, x in enumerate(leaves)]
    getattr(F, op)(*fixed, *rest, impl=by, **options).backward()
    assert fixed[1 - side].grad is None
    assert_same(fixed[side].grad, both[side])


@pytest.mark.parametrize("detach", ["logits", "gist_logits"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_detached_side_of_gist_loss_learns_from_its_cross_entropy_alone(impl, detach, reduction, dtype):
    leaves, rest, _ = problem("gist_loss", dtype)
    options = {"detach": detach, "reduction": reduction}
    loss = F.gist_loss(*leaves, *rest, impl=impl, **options)
    ours = gradients(loss, leaves)
    loss_plain, plain = exact("gist_loss", leaves, rest, dtype, **options)
    loss_true, true = exact("gist_loss", leaves, rest, torch.float64, **options)
    assert_within_budget(loss.detach(), loss_plain, loss_true, what="loss")
    for a, p, t in zip(ours, plain, true, strict=True):
        assert_within_budget(a, p, t, what="gradient")


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_a_detached_side_takes_no_nan_from_the_other(impl, alpha):
    leaves, rest, _ = problem("gist_loss")
    with torch.no_grad():
        leaves[0][0, 0] = float("nan")
    loss = F.gist_loss(*leaves, *rest, impl=impl, alpha=alpha, detach="gist_logits", reduction="sum")
    of_logits, of_gist = gradients(loss, leaves)
    assert loss.isnan()
    assert of_logits[0].isnan().all()
    assert of_logits[1:].isfinite().all()
    assert of_gist.isfinite().all()
    if alpha == 0.0:
        assert (of_gist == 0).all()


def test_a_side_to_detach_is_named():
    leaves, rest, _ = problem("gist_loss")
    with pytest.raises(ValueError, match="gist_loss: detach must be None, 'logits' or 'gist_logits', got 'teacher'"):
        F.gist_loss(*leaves, *rest, detach="teacher")


@pytest.mark.parametrize("interaction", ["bkld", "jsd", "mse"])
@pytest.mark.parametrize("with_gist", [True, False])
def test_modules_average_by_the_rows_of_all_batches(interaction, with_gist):
    """Two batches of unequal numbers of rows that count, each over the number of both, are one batch."""
    leaves, (target,), _ = problem("gist_loss", torch.float64, rows=9)
    loss = nn.GistLoss(interaction=interaction)
    count = (target != -100).sum()

    def of(rows: slice, divisor=None):
        output = {"logits": leaves[0][rows]} | ({"gist_logits": leaves[1][rows]} if with_gist else {})
        return loss(output, target[rows], divisor=divisor)

    parts = of(slice(0, 2), count) + of(slice(2, 9), float(count))
    torch.testing.assert_close(parts, of(slice(0, 9)))
    with pytest.raises(ValueError, match="GistLoss: divisor is what a mean divides by, and reduction is 'sum'"):
        nn.GistLoss(reduction="sum")(*leaves, target, divisor=3)


def test_the_divergence_as_a_module_takes_a_divisor():
    (z, g), _, options = problem("bidirectional_kl")
    whole = nn.BidirectionalKLLoss(3.0, reduction="sum")(z, g, options["mask"])
    torch.testing.assert_close(nn.BidirectionalKLLoss(3.0)(z, g, options["mask"], divisor=8), whole / 8)


@pytest.mark.skipif(INTERPRETING, reason="the ordinary run has shown it")
@pytest.mark.parametrize("op", ["bidirectional_kl", "gist_loss", "gist_linear_loss"])
def test_a_divisor_that_changes_compiles_once_as_a_float_and_once_as_an_integer(op):
    """The count of a step's tokens, as a Python number, is not a constant of a compiled graph."""
    leaves, rest, _ = problem("gist_loss")
    if op == "gist_linear_loss":
        rest = (torch.randn(9, 37, device=DEVICE), None, torch.randint(9, (6,), device=DEVICE))

    def loss(*leaves, divisor):
        return getattr(F, op)(*leaves, *(() if op == "bidirectional_kl" else rest), divisor=divisor)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=4):
        for divisor in (*(n + 0.5 for n in range(1, 9)), *range(1, 9)):
            torch.testing.assert_close(compiled(*leaves, divisor=divisor), loss(*leaves, divisor=divisor))


@each
def test_a_divisor_that_is_no_count_is_never_a_plausible_number(op, by):
    """A tensor on the CPU is looked at. One that nobody may look at, on a device or in compiled code, makes the loss NaN."""
    leaves, rest, options = problem(op)

    def loss(divisor, *leaves):
        return getattr(F, op)(*leaves, *rest, impl=by, divisor=divisor, **options)

    for bad in (-5.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f"{op}: divisor must be finite and > 0 .* got {bad}"):
            loss(torch.tensor(bad), *leaves)
    if not INTERPRETING:
        torch._dynamo.reset()
        unseen = torch.compile(loss, backend="eager", fullgraph=True)(torch.tensor(-5.0, device=DEVICE), *leaves)
        assert unseen.isnan()
        assert all(g.isnan().any() for g in gradients(unseen, leaves))


@pytest.mark.parametrize("op", ["bidirectional_kl", "gist_loss"])
@pytest.mark.parametrize("to", ["to_sparse", "to_mkldnn"])
def test_logits_in_another_layout_are_named(op, to):
    leaves, rest, _ = problem(op)
    dense, other = leaves[0].detach().cpu(), getattr(leaves[0].detach().cpu(), to)()
    second = "other_logits" if op == "bidirectional_kl" else "gist_logits"
    for pair, name in (((other, dense), "logits"), ((other, other), "logits"), ((dense, other), second)):
        with pytest.raises(TypeError, match=f"^{op}: {name} must be strided, got a .* tensor"):
            getattr(F, op)(*pair, *rest)


@pytest.mark.parametrize("op", ["bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl"])
def test_fake_tensors_need_no_mode_around_the_call(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = make(op, device="cpu")
    mode = FakeTensorMode()
    loss = call(*(None if t is None else mode.from_tensor(t) for t in call.tensors.values()))
    assert loss.shape == ()


@each
def test_a_count_of_no_rows_divides_a_loss_of_nothing(op, by):
    leaves, rest, options = problem(op)
    if op == "bidirectional_kl":
        options["mask"] = torch.zeros_like(options["mask"])
    else:
        rest = (torch.full_like(rest[0], -100),)
    loss = getattr(F, op)(*leaves, *rest, impl=by, divisor=torch.tensor(0, device=DEVICE), **options)
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, leaves))
