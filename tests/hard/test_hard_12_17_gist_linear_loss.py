"""Hard cases 12 to 17 of gist_linear_loss on every implementation that runs here: gist_loss of the logits that the head makes.

Hidden states and head hold multiples of 1/4, so that every ordinary logit is exact in float16 and an offset of 100 too. Two
columns of both are kept for what a case is about: where their product overflows, the logit is -inf. The truth is the plain
path in float64 on the exact logits, rounded once to the working dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE, INTERPRETING, implementations
from losses import evaluate, on_every_device
from torch import Tensor

from fastgist.functional import gist_linear_loss, gist_loss
from fastgist.ops import gist_linear_loss as module
from fastgist.reference.gist_linear_loss import gist_linear_loss as formula
from fastgist.testing import assert_within_budget, poisoned_allocations

pytestmark = pytest.mark.kernel
OP = "gist_linear_loss"
BY = pytest.mark.parametrize("by", implementations(OP))
CHUNKS = pytest.mark.parametrize("chunk_rows", [4] if INTERPRETING else [1, 4, None])
INF, NAN = float("inf"), float("nan")
ROWS, CLASSES, KEPT = 6, 37, 2


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def _quarters(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape) / 4.0


def _problem(rows: int = ROWS, classes: int = CLASSES, width: int = 6) -> list[Tensor]:
    """hidden, gist_hidden, weight, bias; the columns that are kept hold 0."""
    inputs = [_quarters(n, KEPT + width) for n in (rows, rows, classes)]
    for x in inputs:
        x[:, :KEPT] = 0.0
    return [*inputs, _quarters(classes)]


def _overflowing(dtype: torch.dtype) -> float:
    """A number whose square is beyond ``dtype``."""
    return 1e30 if dtype == torch.float32 else 1e3


def _absent(h, g, w, b, big) -> None:
    b[::3] = -INF


def _lone(h, g, w, b, big) -> None:
    w[5, 0] = -big
    h[1, 0] = g[2, 0] = big


def _empty_rows(h, g, w, b, big) -> None:
    w[:, 0] = -big
    h[0, 0] = g[2, 0] = h[3, 0] = g[3, 0] = big


def _bad(h, g, w, b, big) -> None:
    h[1, 3], g[2, 4] = NAN, NAN


def _gaps(h, g, w, b, big) -> None:
    w[0, 0] = w[-1, 1] = 256.0
    h[:4, 0] = g[:4, 1] = torch.tensor([320.0, 1e4, 3e4, 6e4]) / 256.0


def _offset(h, g, w, b, big) -> None:
    w[:, 0], g[:, 0] = 1.0, 100.0


def _equal(h, g, w, b, big) -> None:
    g.copy_(h)


#: name -> what is done to hidden, gist_hidden, weight and bias, and the rows whose (loss, gradient) are then not finite.
INPUTS: dict[str, tuple[Callable[..., None], dict[int, float]]] = {
    "classes absent on both sides": (_absent, {}),
    "a class absent on one side": (_lone, {1: INF, 2: INF}),
    "rows of nothing but -inf": (_empty_rows, {0: NAN, 2: NAN, 3: NAN}),
    "NaN": (_bad, {1: NAN, 2: NAN}),
    "gaps": (_gaps, {}),
    "an offset": (_offset, {}),
    "equal sides": (_equal, {}),
}


def _target(classes: int = CLASSES, rows: int = ROWS) -> Tensor:
    """Classes that no input makes absent; the last row is ignored."""
    target = torch.arange(rows) * 3 % max(classes - 1, 1) + (1 if classes > 1 else 0)
    if rows > 2:
        target[-1] = -100
    return target.to(DEVICE)


def _of_logits(target: Tensor, **options) -> Callable[..., Tensor]:
    """gist_loss of the logits that plain products make, in the inputs' dtype: what half precision is held against."""

    def loss(h, g, w, b):
        z, o = (torch.nn.functional.linear(x, w, b) for x in (h, g))
        return gist_loss(z, o, target, impl="reference", **options)

    return loss


def _truth(target: Tensor, dtype: torch.dtype, **options) -> Callable[..., Tensor]:
    def loss(h, g, w, b):
        z, o = (_Rounded.apply(torch.nn.functional.linear(x, w, b), dtype) for x in (h, g))
        return gist_loss(z, o, target, impl="reference", **options)

    return loss


def _terms(
    inputs: list[Tensor], target: Tensor, temperature: float, factor: float, one_hot: bool
) -> tuple[float, list[float]]:
    """The sums of absolute terms behind the row losses, and behind an element of each gradient, of rows times ``factor``."""
    h, g, w, b = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in inputs)
    z, o = ((x @ w.T + b).clamp(-1e5, 1e5) for x in (h, g))
    p, q = ((x / temperature).softmax(-1) for x in (z, o))
    d = ((z - z.amax(-1, keepdim=True)) - (o - o.amax(-1, keepdim=True))).abs() / temperature
    loss_terms = float(((p + q) * d).sum(-1).max())
    if one_hot:
        d[(h[:, :KEPT] != 0).any(-1)] = 0.0
    means = [(x * d).sum(-1, keepdim=True) for x in (p, q)]
    label = torch.zeros_like(z).scatter_(-1, target.clamp(min=0)[:, None], 1.0)
    kl = [(x * (d + mean) + p + q) / temperature for x, mean in zip((p, q), means, strict=True)]
    of_z, of_o = ((x + y.softmax(-1) + label) * factor for x, y in zip(kl, (z, o), strict=True))
    columns = [x[:, KEPT:].abs() for x in (h, g, w)]
    head = of_z.T @ columns[0] + of_o.T @ columns[1]
    sizes = [of_z @ columns[2], of_o @ columns[2], head, (of_z + of_o).sum(0)]
    return loss_terms, [float(x.max()) for x in sizes]


def check(
    by: str,
    inputs: list[Tensor],
    target: Tensor,
    chunk_rows: int | None,
    wanted=(True,) * 4,
    one_hot: bool = False,
    **options,
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients against the truth, but for the columns that are kept. ``one_hot``: one class has all the mass of each
    row that holds something there, so that its gradients' terms vanish or are of their own size."""
    wanted, dtype = list(wanted), inputs[0].dtype
    with poisoned_allocations():
        loss, grads = evaluate(
            lambda *a: gist_linear_loss(*a, target, chunk_rows=chunk_rows, impl=by, **options), inputs, wanted
        )

    def plainly(xs, y):
        return evaluate(_of_logits(y, **options), xs, wanted)

    plain = on_every_device(plainly, inputs, target)
    exact = evaluate(_truth(target, dtype, **options), [x.double() for x in inputs], wanted)
    factor = 1.0 if options.get("reduction") == "none" else 1.0 / max(int((target != -100).sum()), 1)
    terms, sizes = _terms(inputs, target, options.get("temperature", 3.0), factor, one_hot)
    scale = terms + float(exact[0][exact[0].isfinite()].abs().sum()) + 1.0
    assert_within_budget(loss, [p[0] for p in plain], exact[0], what="loss", scale=scale)
    for i, name in enumerate(("hidden", "gist_hidden", "weight", "bias")):
        if not wanted[i]:
            assert grads[i] is None
            continue
        part = (..., slice(KEPT, None)) if i < 3 else ...
        peers = [p[1][i][part] for p in plain]
        assert_within_budget(grads[i][part], peers, exact[1][i][part], what=f"gradient of {name}", scale=sizes[i])
    return loss, grads


@BY
@CHUNKS
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@pytest.mark.parametrize("name", INPUTS)
def test_hard_12_13_17_what_is_in_the_logits(by, chunk_rows, reduction, dtype, temperature, name):
    change, lost = INPUTS[name]
    inputs = [x.to(dtype) for x in _problem()]
    change(*inputs, _overflowing(dtype))
    inputs, target = [x.to(DEVICE) for x in inputs], _target()
    for wanted in ((True,) * 4, (True, True, False, False)):  # a head's gradient is a sum over rows, NaN if one is
        options = {"reduction": reduction, "temperature": temperature}
        loss, grads = check(by, inputs, target, chunk_rows, wanted, one_hot=name == "gaps", **options)
    for row in range(ROWS):
        if reduction == "none" and row in lost:
            assert loss[row].isnan() if lost[row] != lost[row] else loss[row] == lost[row]
        for grad in grads[:2]:
            assert grad[row, KEPT:].isfinite().all() != (row in lost)
    assert bool(loss.isfinite().all()) == (not lost)


@BY
@CHUNKS
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0, 100.0])
def test_hard_13_equal_sides_diverge_by_nothing_at_any_temperature(by, chunk_rows, temperature):
    """With the cross-entropies' part taken off: what is left of loss and gradients is within the floor."""
    inputs, target = [x.to(DEVICE) for x in _problem()], _target()
    inputs[1].copy_(inputs[0])
    with_it, without = (
        evaluate(
            lambda *a, f=beta: gist_linear_loss(
                *a, target, beta=f, temperature=temperature, reduction="none", chunk_rows=chunk_rows, impl=by
            ),
            inputs,
            [True] * 4,
        )
        for beta in (1.0, 0.0)
    )
    few = 4 * torch.finfo(torch.float32).eps
    assert float((with_it[0] - without[0]).abs().max()) <= few * float(without[0].max())
    for a, b in zip(with_it[1], without[1], strict=True):
        assert float((a - b).abs().max()) <= few * (1.0 + 1.0 / temperature) * CLASSES


@BY
@CHUNKS
def test_hard_13_an_offset_of_the_gist_token_loses_nothing(by, chunk_rows):
    """Every logit is exact with the offset and without it, so the results are those without."""
    inputs, target = [x.to(DEVICE) for x in _problem()], _target()
    moved = [x.clone() for x in inputs]
    moved[2][:, 0], moved[1][:, 0] = 1.0, 64.0

    def run(xs):
        return evaluate(
            lambda *a: gist_linear_loss(*a, target, reduction="none", chunk_rows=chunk_rows, impl=by), xs, [True] * 4
        )

    (near, near_grads), (far, far_grads) = run(inputs), run(moved)
    few = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(far, near, rtol=few, atol=few)
    for a, b, part in zip(far_grads, near_grads, [(..., slice(KEPT, None))] * 3 + [...], strict=True):
        torch.testing.assert_close(a[part], b[part], rtol=few, atol=few * float(b.abs().max()))


@BY
@CHUNKS
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_hard_15_rows_that_count_nowhere_may_hold_anything(by, chunk_rows, reduction, all_of_them):
    clean, target = [x.to(DEVICE) for x in _problem()], _target()
    out = torch.ones(ROWS, dtype=torch.bool) if all_of_them else torch.tensor([False, True, False, True, True, False])
    out = out.to(DEVICE)
    target = target.masked_fill(out, -100)
    dirty = [x.clone() for x in clean]
    dirty[0][out], dirty[1][out] = NAN, INF

    def run(xs):
        with poisoned_allocations():
            return evaluate(
                lambda *a: gist_linear_loss(*a, target, reduction=reduction, chunk_rows=chunk_rows, impl=by),
                xs,
                [True] * 4,
            )

    (loss, grads), (wanted_loss, wanted_grads) = run(dirty), run(clean)
    assert torch.equal(loss, wanted_loss) and loss.isfinite().all()
    for grad, wanted in zip(grads, wanted_grads, strict=True):
        assert torch.equal(grad, wanted)
    for grad in grads[:2]:
        assert (grad[out] == 0).all()
    if reduction == "mean" and not all_of_them:  # the divisor counts the rows that stay, here without the last one
        kept = ~out & (target != -100)
        alone, _ = evaluate(
            lambda *a: gist_linear_loss(*a, target[kept], reduction="sum", impl=by),
            [clean[0][kept], clean[1][kept], *clean[2:]],
            [False] * 4,
        )
        torch.testing.assert_close(loss, alone / int(kept.sum()))
    if all_of_them:
        assert (loss == 0).all()
        assert not any(g.any() for g in grads)


@BY
@CHUNKS
@pytest.mark.parametrize("bad", [-1, CLASSES, CLASSES + 10, 2**40])
def test_hard_15_an_impossible_target_is_an_error_or_its_rows_nan(by, chunk_rows, bad, monkeypatch):
    """Rows of logits are padded to whole vectors: a target that is a padded column's index matches nothing there. A CPU shows
    what happens where nobody may look once the look is taken out."""
    inputs, target = [x.to(DEVICE) for x in _problem()], _target()
    target[3] = bad

    def run():
        return evaluate(
            lambda *a: gist_linear_loss(*a, target, reduction="none", chunk_rows=chunk_rows, impl=by),
            inputs,
            [True, True, False, False],
        )

    if DEVICE == "cpu":
        message = rf"gist_linear_loss: target\[3\] is {bad}, and there are {CLASSES} classes \(ignore_index=-100\)"
        with pytest.raises(IndexError, match=message):
            run()
        monkeypatch.setattr(module, "check_targets_in_range", lambda *_: None)
    loss, grads = run()
    rows = torch.arange(ROWS, device=loss.device) == 3
    assert torch.equal(loss.isnan(), rows)
    for grad in grads[:2]:
        assert torch.equal(grad.isnan().all(-1), rows) and torch.equal(grad.isnan().any(-1), rows)


@BY
@pytest.mark.parametrize("classes", [1, 2, 127, 4097] if INTERPRETING else [1, 2, 127, 50257, 131073])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("frozen", [False, True])
def test_hard_16_17_class_counts_and_few_rows(by, classes, rows, frozen):
    inputs = [x.to(DEVICE) for x in _problem(rows, classes, 4)]
    target = _target(classes, rows)
    loss, _ = check(by, inputs, target, None, (True, True, not frozen, not frozen))
    for size in (1, 2):
        one, _ = check(by, inputs, target, size, (True, True, not frozen, not frozen))
        torch.testing.assert_close(one, loss)
    exact = formula(*(x.double() for x in inputs), target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@BY
@CHUNKS
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_hard_16_swapped_sides_swap_their_gradients_and_constants_change_nothing(by, chunk_rows, reduction):
    hidden, gist, weight, bias = (x.to(DEVICE) for x in _problem())
    target = _target()

    def run(a: Tensor, b: Tensor, c: Tensor):
        return evaluate(
            lambda *x: gist_linear_loss(*x, target, alpha=1.0, reduction=reduction, chunk_rows=chunk_rows, impl=by),
            (a, b, weight, c),
            [True] * 4,
        )

    loss, grads = run(hidden, gist, bias)
    swapped, other = run(gist, hidden, bias)
    shifted, shifted_grads = run(hidden, gist, bias + 64.0)  # exact
    few = 8 * torch.finfo(torch.float32).eps
    order = [(0, 1), (1, 0), (2, 2), (3, 3)]
    torch.testing.assert_close(swapped, loss, rtol=few, atol=few)
    torch.testing.assert_close(shifted, loss, rtol=few, atol=few)
    assert (loss >= 0).all()
    for i, j in order:
        size = few * max(1.0, float(grads[i].abs().max()))
        torch.testing.assert_close(other[j], grads[i], rtol=few, atol=size)
        torch.testing.assert_close(shifted_grads[i], grads[i], rtol=few, atol=size)
