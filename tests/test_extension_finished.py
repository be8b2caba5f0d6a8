"""The compiled forwards that finish the gradients, torch.ops.fastgist_native.*_fwd_bwd, and threads that share a row.

What is said of every gradient that a forward finished is in test_loss_gradients.py.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from losses import gradient_terms, loss_terms
from test_extension import BAD, DTYPES, ROOT, accumulates, assert_same, python
from torch import Tensor

from fastgist import functional
from fastgist.ops.bidirectional_kl import STATS as KL_STATS
from fastgist.ops.gist_loss import STATS as GIST_STATS
from fastgist.reference.bidirectional_kl import bidirectional_kl as kl_formula
from fastgist.reference.gist_loss import gist_loss as gist_formula
from fastgist.testing import assert_within_budget, layouts

if os.environ.get("FASTGIST_TEST_DEVICE", "cpu") != "cpu":
    pytest.skip("about CPU code", allow_module_level=True)
pytestmark = [] if os.environ.get("TRITON_INTERPRET", "0") == "1" else [pytest.mark.kernel]

INF, NAN = float("inf"), float("nan")
native = torch.ops.fastgist_native
OPS = ("bidirectional_kl", "gist_loss")
each = pytest.mark.parametrize("op", OPS)
ALPHA, BETA, T = 0.5, 0.75, 3.0
SHARED = 50257  # classes that several threads share: three whole stretches and a piece


def logits(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    z, o = ((torch.randn(rows, classes) * 3).to(dtype) for _ in range(2))
    return z, o


def labels(op: str, rows: int, classes: int) -> Tensor | None:
    """The argument that follows the logits: classes, or no mask."""
    return torch.randint(classes, (rows,)) if op == "gist_loss" else None


def options(op: str, alpha=ALPHA, beta=BETA, beta_z=None, beta_o=None, temperature=T, smoothing=0.0) -> tuple:
    if op == "bidirectional_kl":
        return (temperature,)
    betas = beta, beta if beta_z is None else beta_z, beta if beta_o is None else beta_o
    return alpha, *betas, temperature, smoothing, -100


def finished(op, z, o, third, *, divisor=None, scale=1.0, need=(True, True), **rest):
    """(row_loss, loss, grad_z, grad_o) from outputs that were NaN before."""
    dtype = accumulates(z.dtype)
    row_loss, loss = torch.full((len(z),), NAN, dtype=dtype), torch.full((), NAN, dtype=dtype)
    grads = [torch.full(z.shape, NAN, dtype=z.dtype) if n else None for n in need]
    divisor = None if divisor is None else torch.tensor(divisor, dtype=dtype)
    call = getattr(native, f"{op}_fwd_bwd")
    call(z, o, third, divisor, *options(op, **rest), scale, row_loss, loss, *grads)
    return row_loss, loss, *grads


def two_calls(op, z, o, third, **rest):
    """(row_loss, stats, grad_z, grad_o) by the forward that leaves statistics, and the backward."""
    dtype = accumulates(z.dtype)
    row_loss = torch.full((len(z),), NAN, dtype=dtype)
    stats = torch.full((len(KL_STATS if op == "bidirectional_kl" else GIST_STATS), len(z)), NAN, dtype=dtype)
    grads = [torch.full(z.shape, NAN, dtype=z.dtype) for _ in range(2)]
    ones = torch.ones(len(z), dtype=dtype)
    getattr(native, f"{op}_fwd")(z, o, third, *options(op, **rest), row_loss, stats)
    late = options(op, **rest)
    if op == "bidirectional_kl":
        native.bidirectional_kl_bwd(z, o, third, stats, ones, *late, *grads)
    else:
        native.gist_loss_bwd(z, o, third, stats, ones, *late, *grads)
    return row_loss, stats, *grads


def by_formula(op, z, o, third, factor, temperature, smoothing):
    leaves = [x.detach().requires_grad_() for x in (z, o)]
    if op == "bidirectional_kl":
        loss = kl_formula(*leaves, temperature=temperature, reduction="none")
    else:
        loss = gist_formula(*leaves, third, temperature=temperature, label_smoothing=smoothing, reduction="none")
    loss = loss * factor
    return loss.detach(), loss.detach().sum(), *torch.autograd.grad(loss.sum(), leaves)


def check(op, z, o, third, temperature=T, smoothing=0.0):
    scale, divisor = 0.75, 2.5
    factor = scale / divisor
    ours = finished(op, z, o, third, scale=scale, divisor=divisor, temperature=temperature, smoothing=smoothing)
    plain = by_formula(op, z, o, third, factor, temperature, smoothing)
    exact = by_formula(op, z.double(), o.double(), third, factor, temperature, smoothing)
    of_loss, of_grad = loss_terms(z, o, temperature), gradient_terms(z, o, temperature)
    # d comes of two centred logits, which may be larger than it is.
    p, q = ((x.double() / temperature).softmax(-1) for x in (z, o))
    gaps = sum(x.double().amax(-1, keepdim=True) - x.double() for x in (z, o))
    of_grad += float(((p + q) * gaps).max()) / temperature
    if op == "gist_loss":
        largest = float(max((x.double().amax(-1) - x.double().amin(-1)).max() for x in (z, o)))
        of_loss, of_grad = 2 * largest + BETA * of_loss, 2 + BETA * of_grad
    scales = of_loss * factor, of_loss * factor * len(z), of_grad * factor, of_grad * factor
    named = zip(("row_loss", "loss", "grad_z", "grad_o"), ours, plain, exact, scales, strict=True)
    for what, a, p, e, size in named:
        if z.dtype == torch.float64:  # there is nothing more exact to hold it against: two ways of rounding
            assert float((a - e).abs().max()) <= 32 * torch.finfo(torch.float64).eps * size, what
        else:
            assert_within_budget(a, p, e, what=what, scale=size)


# -- values ----------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 127, 1000, 1025, SHARED])
def test_agrees_with_float64(op, classes, dtype):
    check(op, *logits(5, classes, dtype), labels(op, 5, classes))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("soft", [False, True])
def test_gist_loss_at_temperatures_and_targets(temperature, soft):
    target = torch.rand(4, 1100).softmax(-1) if soft else torch.randint(1100, (4,))
    check("gist_loss", *logits(4, 1100), target, temperature=temperature, smoothing=0.2)


@each
@pytest.mark.parametrize("classes", [5000, SHARED])
def test_maxima_that_rise_from_block_to_block(op, classes):
    """What waits about an earlier block's maxima is moved to the row's. (13 rows: of few, whose mass lies in a class or two,
    plain arithmetic may err by a tenth of what it does.)"""
    z, o = logits(13, classes)
    third = labels(op, 13, classes)
    check(op, z.sort(-1).values, o.sort(-1, descending=True).values, third)
    check(op, 20 * z.sort(-1).values, 20 * o.sort(-1).values, third)


@each
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("classes", [1, 15, 16, 100, 1000, 1024, 1100])
def test_a_row_is_what_it_is_alone_wherever_its_largest_class_stands(op, classes, absent):
    """Rows are looked at while the ones before are summed. Each has maxima 1,000 above the rest, which about another centre
    would be infinite, or a class that is absent, at another place; alone, nothing was looked at beforehand."""
    rows = 71
    z, o = logits(rows, classes)
    third = labels(op, rows, classes)
    for row in range(rows):
        at = row * (classes - 1) // (rows - 1)
        if absent and classes > 1:
            z[row, at] = o[row, at] = -INF
            if third is not None:
                third[row] = (at + 1) % classes
        else:
            z[row, at] = 1000.0
            o[row, classes - 1 - at] = 1000.0
    row_loss, _, *grads = finished(op, z, o, third)
    assert bool(row_loss.isfinite().all())
    for row in range(rows):
        some = slice(row, row + 1)
        alone = finished(op, z[some], o[some], None if third is None else third[some])
        for a, b in zip((row_loss, *grads), (alone[0], *alone[2:]), strict=True):
            assert torch.equal(a[some], b), f"row {row}"


@each
@pytest.mark.parametrize("classes", [1000, 2100])
def test_where_the_tensors_lie_changes_no_bit(op, classes):
    """Vectors are loaded ahead of stores, and rows looked at ahead of their turn: from memory right behind the logits too."""
    z, o = logits(7, classes)
    third = labels(op, 7, classes)
    wanted = finished(op, z, o, third)
    size, page = z.numel(), 1024  # 4 KiB of float32
    for behind in (16, 32, 48, 64, 80, 8):
        memory = torch.full((4 * (size + 2 * page),), NAN)
        places = [(i * (size // page + 2) * page + i * behind) for i in range(4)]
        here = [memory[start : start + size].view(7, classes) for start in places]
        here[0].copy_(z)
        here[1].copy_(o)
        row_loss, loss = torch.full((7,), NAN), torch.full((), NAN)
        getattr(native, f"{op}_fwd_bwd")(
            here[0], here[1], third, None, *options(op), 1.0, row_loss, loss, here[2], here[3]
        )
        for a, b in zip((row_loss, loss, *here[2:]), wanted, strict=True):
            assert torch.equal(a, b), f"{behind} numbers behind"


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_is_the_sum_of_its_rows(op, dtype):
    z, o = logits(300, 40, dtype)
    row_loss, loss, *_ = finished(op, z, o, labels(op, 300, 40), scale=0.25)
    torch.testing.assert_close(loss, row_loss.double().sum().to(loss.dtype), rtol=2e-7, atol=0)


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absent_classes(op, dtype):
    """-inf on both sides, from the beginning of the row and over whole blocks: as the row without them."""
    z, o = logits(4, 5000, dtype)
    absent = torch.zeros(5000, dtype=torch.bool)
    absent[:2500] = absent[-1] = absent[3000] = True
    z[:, absent] = o[:, absent] = -INF
    third = torch.randint(3001, 4999, (4,)) if op == "gist_loss" else None
    short = torch.where(~absent)[0]
    kept = None if third is None else torch.searchsorted(short, third)
    _, loss, *grads = finished(op, z, o, third)
    _, wanted_loss, *wanted = finished(op, z[:, short], o[:, short], kept)
    few = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss, wanted_loss, rtol=few, atol=0)
    for grad, w in zip(grads, wanted, strict=True):
        assert not grad[:, absent].any()
        torch.testing.assert_close(grad[:, short], w, rtol=few, atol=few * float(w.abs().max()))


@each
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize(("classes", "where"), [(5, 2), (3000, 2999), (SHARED, 20000)])
def test_what_is_bad_stays_in_its_row(op, case, classes, where):
    (bad_z, bad_o), _ = BAD[case]
    z, o = logits(5, classes)
    third = labels(op, 5, classes)
    if third is not None:
        third[2] = where
    clean = finished(op, z, o, third)
    if bad_z is not None:
        z[2, where] = bad_z
    if bad_o is not None:
        o[2, where] = bad_o
    row_loss, loss, *grads = finished(op, z, o, third)
    others = [0, 1, 3, 4]
    for ours, theirs in zip((row_loss, *grads), (clean[0], *clean[2:]), strict=True):
        assert_same(ours[others], theirs[others])
    assert not row_loss[2].isfinite()
    assert not loss.isfinite()
    assert all(grad[2].isnan().all() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [37, 1100, SHARED])
def test_rows_that_do_not_count_are_zero_and_not_read(classes, dtype):
    z, o = logits(7, classes, dtype)
    mask = torch.tensor([True, True, False, True, False, False, True])  # one may be looked at ahead
    target = torch.randint(classes, (7,)).masked_fill(~mask, -100)
    wanted = [finished("bidirectional_kl", z, o, None), finished("gist_loss", z, o, target.clamp(min=0))]
    z[2], o[2, 3], o[4], z[5] = NAN, INF, -INF, NAN
    for op, third, full in (("bidirectional_kl", mask, wanted[0]), ("gist_loss", target, wanted[1])):
        row_loss, loss, *grads = finished(op, z, o, third)
        assert loss.isfinite()
        for ours, theirs in zip((row_loss, *grads), (full[0], *full[2:]), strict=True):
            assert_same(ours[mask], theirs[mask])
            assert not ours[~mask].any()


@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (3, 0), (0, 0)])
def test_empty(rows, classes):
    row_loss, loss, *grads = finished("bidirectional_kl", *logits(rows, classes), None)
    assert loss == 0
    assert not row_loss.any()
    assert all(g.shape == (rows, classes) for g in grads)
    assert finished("gist_loss", *logits(0, classes), torch.zeros(0, dtype=torch.int64))[1] == 0


# -- a side that is not wanted, or detached --------------------------------------------------------------------------


@each
@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [1500, SHARED])
def test_subsets_of_gradients(op, need, dtype, classes):
    z, o = logits(3, classes, dtype)
    third = labels(op, 3, classes)
    both = finished(op, z, o, third)
    ours = finished(op, z, o, third, need=need)
    assert_same(ours[1], both[1])
    for grad, wanted, needed in zip(ours[2:], both[2:], need, strict=True):
        if needed:
            assert_same(grad, wanted)
        else:
            assert grad is None


@pytest.mark.parametrize("side", ["beta_z", "beta_o"])
@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@pytest.mark.parametrize("bad", [None, NAN, INF])
@pytest.mark.parametrize("by", [finished, two_calls])
@pytest.mark.parametrize("soft", [False, True])
def test_a_detached_side_knows_nothing_of_the_other(side, alpha, bad, by, soft):
    """Its gradient is that of its cross-entropy, or 0, whatever the other side holds."""
    z, o = logits(4, 1100)
    target = torch.rand(4, 1100).softmax(-1) if soft else torch.randint(1100, (4,))
    own, other = (z, o) if side == "beta_z" else (o, z)
    leaf = own.clone().requires_grad_()
    F.cross_entropy(leaf, target, reduction="sum").backward()
    wanted = leaf.grad if side == "beta_z" else alpha * leaf.grad
    attached = by("gist_loss", z, o, target, alpha=alpha)
    if bad is not None:
        other[1, 7] = bad
    grads = by("gist_loss", z, o, target, alpha=alpha, **{side: 0.0})[2:]
    ours, others = grads if side == "beta_z" else grads[::-1]
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)
    if side == "beta_o" and alpha == 0.0:
        assert not ours.any()
    if bad is None:  # the side that is not detached has the gradient that it has without
        assert_same(others, attached[2:][side == "beta_z"])
    else:
        assert others[1].isnan().all()


# -- layouts and threads ---------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_layout_of_both_inputs(op, dtype):
    z, o = logits(5, 1500, dtype)
    third = labels(op, 5, 1500)
    wanted = finished(op, z, o, third)
    for (name, z_as), (other_name, o_as) in itertools.product(layouts(z), layouts(o)):
        for ours, theirs in zip(finished(op, z_as, o_as, third), wanted, strict=True):
            assert_same(ours, theirs, f"{name} and {other_name}")


THREADED = [(64, 3000), (1, 16384), (1, 16385), (1, 200001), (3, SHARED), (5, 33000), (7, 20000)]


@each
@pytest.mark.parametrize(("rows", "classes"), THREADED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_the_result(op, rows, classes, dtype):
    """Nor whether they take whole rows or share them."""
    z, o = logits(rows, classes, dtype)
    third = labels(op, rows, classes)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                [
                    *finished(op, z, o, third),
                    *finished(op, z, o, third, need=(True, False))[:3],
                    *two_calls(op, z, o, third),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert torch.equal(ours, theirs)


# -- errors, memory, instruction sets --------------------------------------------------------------------------------

ERRORS = {
    "divisor of two": ({"divisor": torch.ones(2)}, r"expected divisor of shape \(\), got 1 dimension"),
    "divisor dtype": ({"divisor": torch.ones((), dtype=torch.float64)}, "divisor must be Float, got Double"),
    "loss of one": ({"loss": torch.empty(1)}, r"expected loss of shape \(\), got 1 dimension"),
    "loss dtype": ({"loss": torch.empty((), dtype=torch.float16)}, "loss must be Float, got Half"),
    "row_loss": ({"row_loss": torch.empty(2)}, r"row_loss of shape \(3,\)"),
    "row_loss strided": ({"row_loss": torch.empty(6)[::2]}, "row_loss must be contiguous"),
    "gradient dtype": ({"grad_logits": torch.empty(3, 4).half()}, "grad_logits must be Float, got Half"),
    "gradient shape": ({"grad_logits": torch.empty(3, 3)}, r"grad_logits of shape \(3, 4\), got \(3, 3\)"),
    "gradient strided": ({"grad_logits": torch.empty(4, 3).T}, "grad_logits must be contiguous"),
    "temperature": ({"temperature": 0.0}, "temperature must be finite and > 0, got 0"),
    "logits": ({"logits": torch.ones(3, 4, dtype=torch.int32)}, "logits must be float32"),
}


@each
@pytest.mark.parametrize("case", ERRORS)
def test_refuses(op, case):
    z, o = logits(3, 4)
    arguments = {"logits": z, "divisor": None, "temperature": T, "scale": 1.0, "grad_logits": torch.empty(3, 4)}
    arguments |= {"row_loss": torch.empty(3), "loss": torch.empty(())}
    if op == "bidirectional_kl":
        arguments |= {"other_logits": o, "mask": None, "grad_other": None}
    else:
        arguments |= {"gist_logits": o, "target": labels(op, 3, 4), "grad_gist": None, "alpha": 1.0, "beta": 1.0}
        arguments |= {"beta_logits": 1.0, "beta_gist": 1.0, "label_smoothing": 0.0, "ignore_index": -100}
    call = getattr(native, f"{op}_fwd_bwd")
    call(**arguments)
    change, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=rf"fastgist_native::{op}_fwd_bwd: .*{message}"):
        call(**(arguments | change))


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lesser_instruction_sets_as_built(isa):
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import test_extension_finished as t\n"
        "for op in t.OPS:\n"
        "    for dtype in t.DTYPES:\n"
        "        for classes in (1, 31, 127, 4097): t.check(op, *t.logits(3, classes, dtype), t.labels(op, 3, classes))\n"
        "    t.test_threads_do_not_change_the_result(op, 3, 33000, t.torch.float32)\n"
    )
    done = python("-c", script, FASTGIST_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr


@each
@pytest.mark.parametrize(("rows", "classes"), [(64, 1000), (3, 40_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_side_without_a_gradient_takes_no_memory_for_one(op, rows, classes, dtype):
    """Its place is not allocated, in the forward or after, and the other side's gradient is the same numbers. (What C++ takes
    for itself, scratch for a row at a time, torch does not see.)"""
    pair = logits(rows, classes, dtype)
    rest = () if op == "bidirectional_kl" else (labels(op, rows, classes),)

    def run(*wanted: bool) -> tuple[int, list[Tensor | None]]:
        leaves = [x.detach().requires_grad_(w) for x, w in zip(pair, wanted, strict=True)]
        with torch.profiler.profile(profile_memory=True) as profile:
            getattr(functional, op)(*leaves, *rest, impl="native").backward()
        events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        large = [size for size in events if size >= rows * classes * dtype.itemsize]
        return len(large), [x.grad for x in leaves]

    both, of_both = run(True, True)
    assert both == 2, "a gradient a side, and nothing else as large as the logits"
    for side in (0, 1):
        count, grads = run(side == 0, side == 1)
        assert count == 1
        assert grads[1 - side] is None
        assert torch.equal(grads[side], of_both[side])
