"""The compiled extension's gist_loss, torch.ops.fastgist_native.gist_loss_fwd and _bwd, below fastgist.functional.

What is said of the operation as a whole is in test_gist_loss.py, which takes ``native`` too; csrc/tests/check_gist_loss.cpp
is run with sanitizers by test_extension_build.py.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from losses import gradient_terms, loss_terms
from test_extension import DTYPES, ROOT, accumulates, assert_same, python
from torch import Tensor

from fastgist import _extension
from fastgist.ops.gist_loss import STATS
from fastgist.reference.gist_loss import gist_loss as formula
from fastgist.testing import assert_within_budget, layouts

if os.environ.get("FASTGIST_TEST_DEVICE", "cpu") != "cpu":
    pytest.skip("about CPU code; tests/gpu/test_losses_on_gpu.py has CUDA's", allow_module_level=True)
pytestmark = [] if os.environ.get("TRITON_INTERPRET", "0") == "1" else [pytest.mark.kernel]

NAN = float("nan")
ALPHA, BETA = 0.5, 0.75
native = torch.ops.fastgist_native


def run(
    z, g, target, *, alpha=ALPHA, beta=BETA, temperature=3.0, smoothing=0.0, ignore=-100, grad=None, need=(True, True)
):
    """(row_loss, stats, grad_z, grad_g) from outputs that were NaN before."""
    dtype = accumulates(z.dtype)
    options = (alpha, beta, beta, beta, temperature, smoothing, ignore)
    row_loss = torch.full((z.shape[0],), NAN, dtype=dtype)
    stats = torch.full((len(STATS), z.shape[0]), NAN, dtype=dtype)
    native.gist_loss_fwd(z, g, target, *options, row_loss, stats)
    grads = [torch.full(z.shape, NAN, dtype=z.dtype) if n else None for n in need]
    grad = torch.ones(z.shape[0], dtype=dtype) if grad is None else grad
    native.gist_loss_bwd(z, g, target, stats, grad, *options, *grads)
    return row_loss, stats, *grads


def case(rows: int, classes: int, dtype: torch.dtype, soft: bool) -> tuple[Tensor, Tensor, Tensor]:
    z, g = ((torch.randn(rows, classes) * 3).to(dtype) for _ in range(2))
    if not soft:
        return z, g, torch.randint(classes, (rows,))
    weights = torch.rand(rows, classes).softmax(-1)
    return z, g, torch.where(torch.rand(rows, classes) < 0.3, 0.0, weights).to(dtype)


def check(z, g, target, temperature=3.0, smoothing=0.0):
    grad = torch.randn(z.shape[0], dtype=accumulates(z.dtype))
    loss, _, *grads = run(z, g, target, temperature=temperature, smoothing=smoothing, grad=grad)

    def by_formula(z, g):
        leaves = [z.detach().requires_grad_(), g.detach().requires_grad_()]
        loss = formula(*leaves, target, temperature=temperature, label_smoothing=smoothing, reduction="none")
        return loss.detach(), *torch.autograd.grad(loss, leaves, grad.to(loss.dtype))

    plain, exact = by_formula(z, g), by_formula(z.double(), g.double())
    largest = float(max((x.double().amax(-1) - x.double().amin(-1)).max() for x in (z, g)))
    loss_scale = 2 * largest + BETA * loss_terms(z, g, temperature)
    # d comes of two centred logits, which may be larger than it is.
    p, q = ((x.double() / temperature).softmax(-1) for x in (z, g))
    gaps = sum(x.double().amax(-1, keepdim=True) - x.double() for x in (z, g))
    centred = float(((p + q) * gaps).max()) / temperature
    grad_scale = float(grad.abs().max()) * (2 + BETA * (gradient_terms(z, g, temperature) + centred))
    named = zip(("loss", "grad_z", "grad_g"), (loss, *grads), plain, exact, strict=True)
    for (what, ours, p, e), scale in zip(named, (loss_scale, grad_scale, grad_scale), strict=True):
        if z.dtype == torch.float64:  # there is nothing more exact to hold it against: two ways of rounding
            assert float((ours - e).abs().max()) <= 32 * torch.finfo(torch.float64).eps * scale, what
        else:
            assert_within_budget(ours, p, e, what=what, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 127, 1025, 50257])
@pytest.mark.parametrize("soft", [False, True])
def test_agrees_with_float64(classes, dtype, soft):
    check(*case(4, classes, dtype, soft))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_temperatures_and_smoothing(temperature, soft, dtype):
    check(*case(4, 1100, dtype, soft), temperature=temperature, smoothing=0.2)


def test_maxima_that_rise_all_along_the_row():
    z, g, target = case(4, 5000, torch.float32, soft=True)
    check(z.sort(-1).values, g.sort(-1, descending=True).values, target)
    check(z.sort(-1).values, g.sort(-1).values, target, smoothing=0.1)
    check(z.sort(-1).values, g.sort(-1).values, torch.tensor([0, 4999, 1023, 1024]), smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_layout(dtype):
    z, g, soft = case(5, 1500, dtype, soft=True)
    wanted = run(z, g, soft)
    for (name, z_as), (other, g_as), (third, soft_as) in zip(
        itertools.islice(itertools.cycle(layouts(z)), 16),
        (pair for x in layouts(g) for pair in [x] * 4),
        itertools.islice(itertools.cycle(list(layouts(soft))[::-1]), 16),
        strict=True,
    ):
        for ours, theirs in zip(run(z_as, g_as, soft_as), wanted, strict=True):
            assert_same(ours, theirs, f"{name}, {other} and {third}")
    hard, grad = torch.randint(1500, (5,)), torch.randn(5, dtype=accumulates(dtype))
    strided = run(z, g, torch.stack((hard, hard), 1)[:, 1], grad=torch.stack((grad, grad), 1)[:, 0])
    for ours, theirs in zip(strided, run(z, g, hard, grad=grad), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_targets_of_every_dtype(dtype, given):
    z, g, _ = case(3, 1300, dtype, soft=True)
    soft = torch.randint(0, 8, (3, 1300)) / 8  # exact in all of them
    for ours, theirs in zip(run(z, g, soft.to(given)), run(z, g, soft.to(accumulates(dtype))), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_subsets_of_gradients(need, dtype, beta):
    z, g, target = case(3, 1500, dtype, soft=False)
    both = run(z, g, target, beta=beta)[2:]
    for grad, wanted, needed in zip(run(z, g, target, beta=beta, need=need)[2:], both, need, strict=True):
        if needed:
            assert_same(grad, wanted)
        else:
            assert grad is None


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_an_absent_term_brings_nothing_across(bad):
    """alpha = beta = 0: whatever the gist's logits hold, the loss is the class token's cross-entropy."""
    z, g, target = case(4, 700, torch.float32, soft=False)
    g[:, 5:9] = bad
    z[1, 20] = -float("inf")
    loss, _, grad_z, grad_g = run(z, g, target, alpha=0.0, beta=0.0)
    leaf = z.clone().requires_grad_()
    wanted = F.cross_entropy(leaf, target, reduction="none")
    wanted.sum().backward()
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(grad_z, leaf.grad)
    assert not grad_g.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_zero_and_not_read(dtype):
    z, g, target = case(5, 1100, dtype, soft=False)
    kept = torch.tensor([True, False, True, False, True])
    target = target.masked_fill(~kept, 7)
    target[kept] += target[kept] == 7
    wanted = run(z, g, target)
    z[1], g[1, 3], g[3] = NAN, float("inf"), -float("inf")
    loss, stats, *grads = run(z, g, target, ignore=7)
    for ours, full in ((loss, wanted[0]), (stats.T, wanted[1].T), *zip(grads, wanted[2:], strict=True)):
        assert_same(ours[kept], full[kept])
        assert not ours[~kept].any()


@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (0, 0)])
def test_empty(rows, classes):
    loss, _, grad_z, grad_g = run(*case(rows, classes, torch.float32, True))
    assert loss.shape == (rows,)
    assert grad_z.shape == grad_g.shape == (rows, classes)


def test_threads_do_not_change_the_result():
    z, g, target = case(64, 3000, torch.float32, soft=False)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(z, g, target, smoothing=0.1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lesser_instruction_sets_as_built(isa):
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import test_extension_gist_loss as t\n"
        "for dtype in t.DTYPES:\n"
        "    for classes in (1, 127, 4097):\n"
        "        for soft in (False, True): t.check(*t.case(3, classes, dtype, soft))\n"
    )
    done = python("-c", script, FASTGIST_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr


# -- errors ----------------------------------------------------------------------------------------------------------


def _arguments() -> dict:
    z, g, target = case(3, 4, torch.float32, soft=False)
    options = {"alpha": 0.5, "beta": 0.75, "beta_logits": 0.75, "beta_gist": 0.75}
    options |= {"temperature": 3.0, "label_smoothing": 0.0, "ignore_index": -100}
    return {"logits": z, "gist_logits": g, "target": target} | options


ERRORS = {
    "integers": (lambda a: {"logits": a["logits"].int()}, "logits must be float32"),
    "gist shape": (
        lambda a: {"gist_logits": a["gist_logits"][:, :3]},
        r"gist_logits of shape \(3, 4\), got \(3, 3\)",
    ),
    "gist dtype": (lambda a: {"gist_logits": a["gist_logits"].half()}, "gist_logits must be Float, got Half"),
    "target rows": (lambda a: {"target": a["target"][:2]}, r"target of shape \(3,\)"),
    "target width": (lambda a: {"target": a["target"].int()}, r"target of shape \(3, 4\), got 1 dimension"),
    "target integers": (lambda a: {"target": a["logits"].int()}, "target must be float32"),
    "soft target shape": (lambda a: {"target": a["logits"][:, :3]}, r"target of shape \(3, 4\), got \(3, 3\)"),
    "temperature": (lambda a: {"temperature": 0.0}, "temperature must be finite and > 0, got 0"),
    "row_loss": (lambda a: {"row_loss": torch.empty(2)}, r"row_loss of shape \(3,\)"),
    "stats of the divergence alone": (lambda a: {"stats": torch.empty(6, 3)}, r"stats of shape \(9, 3\), got \(6, 3\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_forward_refuses(name):
    change, message = ERRORS[name]
    arguments = _arguments() | {"row_loss": torch.empty(3), "stats": torch.empty(9, 3)}
    with pytest.raises(RuntimeError, match=rf"fastgist_native::gist_loss_fwd: .*{message}"):
        native.gist_loss_fwd(**(arguments | change(arguments)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_grad": torch.ones(2)}, r"row_grad of shape \(3,\)"),
        ({"grad_logits": torch.empty(3, 4).half()}, "grad_logits must be Float, got Half"),
        ({"grad_gist": torch.empty(4, 3).T}, "grad_gist must be contiguous"),
        ({"stats": torch.empty(6, 3)}, r"stats of shape \(9, 3\)"),
    ],
)
def test_backward_refuses(change, message):
    arguments = _arguments() | {"stats": torch.empty(9, 3), "row_grad": torch.ones(3)}
    arguments |= {"grad_logits": torch.empty(3, 4), "grad_gist": None}
    with pytest.raises(RuntimeError, match=rf"fastgist_native::gist_loss_bwd: .*{message}"):
        native.gist_loss_bwd(**(arguments | change))


def test_an_extension_of_an_older_version_is_left_alone(monkeypatch):
    """It lacks an operation that this version expects of it: everything runs without it, and says why."""
    if _extension.load() is not None:
        pytest.skip("no extension here")
    monkeypatch.setattr(_extension, "_HOLDS", (*_extension._HOLDS, "an_operation_of_tomorrow_fwd"))
    assert "older version, without an_operation_of_tomorrow_fwd" in _extension._load()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_blocks_of_classes_have_the_gradients_of_whole_rows(dtype, soft, smoothing):
    """With the rows' statistics, and the same bits."""
    z, g, target = case(7, 2100, dtype, soft)
    if not soft:
        target[2], target[3] = -100, 2100  # ignored, impossible
    grad = torch.randn(7, dtype=accumulates(dtype))
    _, stats, *whole = run(z, g, target, smoothing=smoothing, grad=grad)
    options = (ALPHA, BETA, BETA, BETA, 3.0, smoothing, -100)
    for start, stop in ((0, 2100), (0, 1), (5, 1500), (1500, 2100)):
        part = slice(start, stop)
        grads = [torch.full((7, stop - start), NAN, dtype=dtype) for _ in range(2)]
        aim = target[:, part] if soft else target
        native.gist_loss_bwd_classes(z[:, part], g[:, part], aim, stats, grad, *options, start, 2100, *grads)
        for ours, wanted in zip(grads, whole, strict=True):
            assert_same(ours, wanted[:, part])
    for first, every in ((-1, 2100), (1, 2100), (0, 2099)):
        with pytest.raises(RuntimeError, match=rf"gist_loss_bwd_classes: classes {first} to .* are not within {every}"):
            native.gist_loss_bwd_classes(z, g, target, stats, grad, *options, first, every, *whole)
