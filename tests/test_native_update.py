"""The low-rank update in C++: when "auto" takes it for cp_linear and cp_update, threads, instruction sets.

Values and gradients of both are held against float64 in test_cp_linear.py and test_cp_update.py, which run for "native" too.
"""

from __future__ import annotations

import itertools

import pytest
import test_cp_linear as linear
import torch
import updates as update

from fastgist import _extension, backends
from fastgist.functional import cp_linear, cp_update
from fastgist.ops import _few_rows, _native_update
from fastgist.reference.cp_linear import merge_pays
from fastgist.testing import poisoned_allocations

if _extension.load() is not None:
    pytest.skip(f"no extension: {_extension.load()}", allow_module_level=True)

from test_extension import DEVICE, python

if DEVICE != "cpu" or backends.interpreting():
    pytest.skip("about CPU code", allow_module_level=True)

pytestmark = pytest.mark.kernel
SEED = torch.tensor([11])


@pytest.fixture
def passes(monkeypatch):
    """ "auto" takes C++ at any size; which of its passes ran."""
    seen: list[str] = []

    def telling(name):
        real = getattr(_native_update, name)
        return lambda *args: (seen.append(name), real(*args))[1]

    monkeypatch.setattr(_native_update, "pays", lambda *args: True)
    monkeypatch.setattr(_few_rows, "MOST", 0)
    for name in ("forward", "backward"):
        monkeypatch.setattr(_native_update, name, telling(name))
    return seen


# -- cp_linear -------------------------------------------------------------------------------------------------------

OPTIONS = {"plain": {"scale": 0.5}, "dropout": {"scale": 0.5, "dropout_p": 0.25, "training": True, "seed": SEED}}


@pytest.mark.parametrize("factors", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", [5, 90])
def test_cp_linear_takes_it_for_its_update(passes, rows, options, need_x, factors):
    """Of few rows y and dx have the update added. Of many dx, and y where nobody needs h, which C++ forms on the update's way,
    are of W with the update, and C++ forms the factors' gradients alone."""
    inputs = linear.case(rows, 24, 16, 3, 2)
    merged = options == "plain" and merge_pays(rows, 24, 32, 3, factors[1] or factors[2])
    assert merged == (options == "plain" and rows == 90)
    with poisoned_allocations():
        linear.check(
            inputs, torch.randn(rows, 32), "auto", [need_x, True, False, *factors], None, True, **OPTIONS[options]
        )
    needs_h = factors[1] or factors[2]
    assert ("forward" in passes) == (needs_h or not merged)
    assert ("backward" in passes) == (any(factors) or (need_x and not merged))


@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("gain", [False, True])
def test_cp_linear_with_folds_and_without_a_gain(passes, folds, gain):
    *inputs, its = linear.case(33, 40, 24, 17, folds)
    linear.check([*inputs, its if gain else None], torch.randn(33, 24 * folds), "auto", by_terms=True)
    assert passes == ["forward", "backward"]


def test_cp_linear_of_several_weights_is_plain_unless_asked_for(passes):
    x, weight, bias, u, v, gain = linear.case()
    v.requires_grad_()
    base = [weight[:32], weight[32:]], [bias[:32], bias[32:]]
    q, k = cp_linear(x, *base, u, v, gain)
    (q.sum() + k.sum()).backward()
    cp_linear(x, weight, bias, u, v, gain, impl="reference").sum().backward()
    assert not passes
    q, k = cp_linear(x, *base, u, v, gain, impl="native")
    (q.sum() + k.sum()).backward()
    assert passes == ["forward", "forward", "backward", "backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_cp_linear_by_name_runs_in_every_dtype_and_of_any_rows(monkeypatch, dtype):
    """Not where "auto" would take it, and never plain PyTorch instead."""
    ran = []
    for name in ("forward", "backward"):
        real = getattr(_native_update, name)
        monkeypatch.setattr(_native_update, name, lambda *a, real=real, name=name: (ran.append(name), real(*a))[1])
    for rows in (1, 70):
        inputs = linear.case(rows, 40, 24, 5, 2, dtype)
        y, grads = linear.evaluate(cp_linear, inputs, [True] * 6, torch.randn(rows, 48), impl="native")
        assert {t.dtype for t in (y, *grads)} == {dtype}
    assert ran == ["forward", "backward"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_raw_operators_give_what_a_compiler_is_told(dtype):
    """Shapes and dtypes (a Function's gradients autograd would cast), of one weight and of several."""
    x, weight, bias, u, v, gain = linear.case(dtype=dtype)
    forward, backward = torch.ops.fastgist.cp_linear_fwd.default, torch.ops.fastgist.cp_linear_bwd.default
    checks = ("test_schema", "test_faketensor")
    for rows in (64, 32):
        weights, biases = list(weight.split(rows)), list(bias.split(rows))
        options = (SEED, 0.7, 0.3)
        given = (x, weights, biases, u, v, gain, *options, True, "native")
        torch.library.opcheck(forward, given, test_utils=checks)
        ys, h = forward(*given)
        needs = [True] * 4 + [True, False, True, False][:: rows // 32]
        given = ([y.clone() for y in ys], x, weights, u, v, gain, SEED, h, 2, 0.7, 0.3, needs, "native")
        torch.library.opcheck(backward, given, test_utils=checks)
        assert {g.dtype for g in backward(*given)} == {dtype}


def test_cp_linear_by_name_takes_what_auto_takes():
    """The same bits, of y merged with W and not, with dropout, and of a backward that merges dx."""
    for rows, p in ((512, 0.0), (512, 0.3), (80, 0.0)):
        inputs = linear.case(rows, 64, 48, 8, 2)
        assert _native_update.pays(inputs[0], 8, 96) or backends.vector_bytes() < 32
        grad, options = torch.randn(rows, 96), {"dropout_p": p, "training": True, "seed": SEED}
        for wanted in ([True, False, False, True, True, True], [True, False, False, False, False, False]):
            found = [linear.evaluate(cp_linear, inputs, wanted, grad, impl=i, **options) for i in ("auto", "native")]
            for a, b in zip(*([y, *(g for g in grads if g is not None)] for y, grads in found), strict=True):
                assert torch.equal(a, b) or backends.vector_bytes() < 32


# -- cp_update -------------------------------------------------------------------------------------------------------


def test_float16_gain_that_takes_v_past_its_range():
    """V times the gain is 90,000; the scale brings the result back."""
    x, u = torch.full((70, 8), 0.5).half().requires_grad_(), torch.full((8, 2), 0.25).half().requires_grad_()
    v, gain = (torch.full((n, 2), 300.0).half().requires_grad_() for n in (16, 1))
    y = torch.zeros(70, 16).half()
    results = {}
    for impl in ("native", "reference"):
        out = cp_update(y, x, u, v, gain, scale=1e-3, impl=impl)
        results[impl] = [out, *torch.autograd.grad(out.float().mean(), (x, u, v, gain))]
        assert all(bool(t.isfinite().all()) for t in results[impl])
    torch.testing.assert_close(results["native"], results["reference"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    inputs = update.case(1100, 72, 40, 9, 2, dtype)
    grad = torch.randn(1100, 80)
    options = {"dropout_p": 0.3, "training": True, "seed": SEED, "impl": "native"}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, grads = update.evaluate(cp_update, inputs, [True] * 5, grad, **options)
            found.append([y, *grads])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_rows_that_are_not_contiguous_are_written_where_they_are(passes):
    """ "auto" leaves them to plain PyTorch, which needs no copy of y there."""
    y, x, u, v, gain = update.case(128)
    wide = torch.zeros(128, 100)
    wide[:, :64] = y
    cp_update(wide[:, :64], x, u, v, gain, inplace=True)
    assert not passes
    torch.testing.assert_close(wide[:, :64], cp_update(y, x, u, v, gain, impl="native"))
    assert bool((wide[:, 64:] == 0).all())


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lesser_instruction_sets(isa):
    script = (
        "import torch, updates as t\n"
        "for shape in ((1, 8, 8, 1, 1), (70, 130, 37, 17, 2), (600, 40, 24, 40, 1)):\n"
        "    inputs = t.case(*shape)\n"
        "    t.check(inputs, torch.randn(shape[0], shape[2] * shape[4]), 'native', scale=0.7)\n"
        "print('right')"
    )
    done = python("-c", f"import sys; sys.path.insert(0, 'tests')\n{script}", FASTGIST_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert "right" in done.stdout


# -- what "auto" takes -----------------------------------------------------------------------------------------------


def test_auto_takes_it_where_it_was_faster(monkeypatch):
    def pays(rows, inner, rank, dtype=torch.float32):
        return _native_update.pays(torch.empty(rows, inner, dtype=dtype, device="cpu"), rank, inner)

    for vectors, wanted in ((64, True), (32, False), (16, False), (0, False)):
        monkeypatch.setattr(_extension, "vector_bytes", lambda vectors=vectors: vectors)
        assert pays(3152, 768, 32) == pays(64, 768, 64) == pays(256, 4096, 256) == wanted
        assert not pays(63, 768, 4) and not pays(64, 2048, 256) and not pays(4096, 4096, 512)
        assert not pays(3152, 768, 32, torch.bfloat16) and not pays(3152, 768, 32, torch.float64)
        assert pays(64, 768, 8) == (vectors >= 32)


def test_auto_runs_what_it_takes(monkeypatch):
    ran = []
    monkeypatch.setattr(_native_update, "pays", lambda x, rank, widest: (x.shape[0], rank, widest) == (70, 5, 90))
    real = _native_update.forward
    monkeypatch.setattr(_native_update, "forward", lambda *args: (ran.append("forward"), real(*args))[1])
    for rows, inner in ((70, 90), (70, 40), (69, 90)):
        cp_update(*update.case(rows, inner))
    assert ran == ["forward"]


def test_auto_runs_what_it_takes_of_cp_linear(monkeypatch):
    """The forward asks with x and the wider side, the backward with dL/dy."""
    ran = []
    for name in ("forward", "backward"):
        real = getattr(_native_update, name)
        monkeypatch.setattr(_native_update, name, lambda *a, real=real, name=name: (ran.append(name), real(*a))[1])
    for sizes, wanted in (((70, 90), ["forward"]), ((70, 64), ["backward"]), ((70, 5), [])):
        monkeypatch.setattr(_native_update, "pays", lambda a, rank, widest, sizes=sizes: tuple(a.shape) == sizes)
        inputs = linear.case(70, 90, 32, 5, 2)
        linear.evaluate(cp_linear, inputs, [True] * 6, torch.randn(70, 64))
        assert ran == wanted
        ran.clear()
