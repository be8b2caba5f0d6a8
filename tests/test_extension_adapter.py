"""The compiled extension's adapter and dropout as they are: layouts, memory, threads, instruction sets; and what "auto" takes.

Values and gradients are held against float64 in test_adapter.py and test_adapter_norm.py, which run for "native" too.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from adapters import case
from conftest import INTERPRETING
from torch import Tensor

from fastgist import _extension, backends
from fastgist.functional import adapter, cp_linear, cp_update
from fastgist.ops import _low_rank
from fastgist.reference import philox
from fastgist.testing import layouts

if _extension.load() is not None:
    pytest.skip(f"no extension: {_extension.load()}", allow_module_level=True)

from test_extension import DEVICE, NAN, python
from test_extension_build import GUARD

if DEVICE != "cpu":
    pytest.skip("about CPU code", allow_module_level=True)

pytestmark = [] if INTERPRETING else [pytest.mark.kernel]
native = torch.ops.fastgist_native
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WEIGHTS = ("down_weight", "down_bias", "up_weight", "up_bias")
NORM = ("norm_weight", "norm_bias")
SEED = torch.tensor([-1099511627699])


def forward(inputs, **options):
    """(y, z, stats) from outputs that were NaN before."""
    x, out = inputs["x"], inputs["up_weight"].shape[0]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.full((x.shape[0], out), NAN, dtype=x.dtype)
    z = torch.full((x.shape[0], inputs["down_weight"].shape[0]), NAN, dtype=wide)
    stats = torch.full((2, x.shape[0]), NAN, dtype=wide)
    given = [inputs[k] for k in ("x", *WEIGHTS)], [inputs["residual"], None, inputs["gate"]], [inputs[k] for k in NORM]
    settings = {
        "activation": "gelu",
        "scale": 0.7,
        "residual_scale": -1.5,
        "norm_eps": 1e-5,
        "dropout_p": 0.3,
    } | options
    native.adapter_fwd(*itertools.chain(*given), SEED, *settings.values(), y, z, stats)
    return y, z, stats


def backward(inputs, grad, z, stats, **options):
    """All eight gradients from outputs that were NaN before."""
    names = ("x", *WEIGHTS, "gate", *NORM)
    grads = [torch.full(tuple(inputs[k].shape), NAN, dtype=inputs[k].dtype) for k in names]
    given = [grad, *(inputs[k] for k in ("x", *WEIGHTS)), inputs["gate"], z, *(inputs[k] for k in NORM), stats, SEED]
    settings = {"activation": "gelu", "scale": 0.7, "residual_scale": -1.5, "residual_is_x": True, "dropout_p": 0.3}
    native.adapter_bwd(*given, *(settings | options).values(), *grads)
    return grads


def problem(rows=37, inner=48, hidden=6, dtype=torch.float32):
    inputs = case(rows, inner, hidden, experts=2, residual=True, dtype=dtype, norm=True)
    return inputs, torch.randn(rows, inner).to(dtype)


def run(inputs, grad):
    y, z, stats = forward(inputs)
    return [y, z, stats, *backward(inputs, grad, z, stats)]


def assert_same(ours, theirs, what=""):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


# -- layouts and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inner", "hidden"), [(64, 64), (39, 6)])
@pytest.mark.parametrize("name", ["x", "down_weight", "up_weight", "up_bias", "residual", "gate", "grad"])
def test_every_layout(name, inner, hidden, dtype):
    """Weights that are read where they are, and those that are packed: the same bits."""
    inputs, grad = problem(21, inner, hidden, dtype)
    wanted = run(inputs, grad)
    for layout, laid in layouts(grad if name == "grad" else inputs[name]):
        ours = run(inputs, laid) if name == "grad" else run(inputs | {name: laid}, grad)
        assert_same(ours, wanted, layout)


def test_vectors_with_steps():
    inputs, grad = problem()
    wanted = run(inputs, grad)
    for name in ("down_bias", *NORM):
        stepped = torch.stack((inputs[name], torch.full_like(inputs[name], NAN)), 1)[:, 0]
        assert_same(run(inputs | {name: stepped}, grad), wanted, name)


def test_stride_zero():
    inputs, grad = problem()
    one = inputs["x"][:1]
    assert_same(run(inputs | {"x": one.expand(37, 48)}, grad), run(inputs | {"x": one.repeat(37, 1)}, grad))
    number = grad[:1, :1]
    assert_same(run(inputs, number.expand(37, 48)), run(inputs, number.repeat(37, 48)))


ADAPTER_GUARD = (
    GUARD.split("native = torch.ops")[0]
    + """
native = torch.ops.fastgist_native
seed = guarded(torch.tensor([5]))
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for rows, inner, hidden in ((1, 1, 1), (9, 33, 6), (17, 64, 64), (3, 31, 18)):
        g = lambda *shape, dtype=dtype: guarded(torch.randn(shape).to(dtype))
        x, grad, residual, gate = g(rows, inner), g(rows, inner), g(rows, inner), g(rows, 1)
        w = [g(hidden, inner), g(hidden), g(inner, hidden), g(1, inner)]
        norm = [g(inner), g(inner)]
        y, z, stats = g(rows, inner), g(rows, hidden, dtype=wide), g(2, rows, dtype=wide)
        native.adapter_fwd(x, *w, residual, None, gate, *norm, seed, "gelu", 1.0, 1.0, 1e-5, 0.5, y, z, stats)
        out = [g(*t.shape) for t in (x, *w, gate, *norm)]
        native.adapter_bwd(grad, x, *w, gate, z, *norm, stats, seed, "gelu", 1.0, 1.0, True, 0.5, *out)
        assert all(t.isfinite().all() for t in (y, z, stats, *out))
        native.dropout(grad, seed, 0.5, y)
print("untouched")
"""
)


def test_reads_nothing_past_an_unreadable_page():
    done = python("-c", ADAPTER_GUARD)
    assert done.returncode == 0, done.stderr
    assert "untouched" in done.stdout


@pytest.mark.parametrize("rows", [1, 7, 8, 511, 513, 1200])
def test_threads_do_not_change_the_result(rows):
    inputs, grad = problem(rows)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("rows", [5, 1030])
def test_a_rows_result_does_not_depend_on_the_others(rows):
    inputs, grad = problem(rows)
    y, z, stats = forward(inputs)
    dx = backward(inputs, grad, z, stats)[0]
    bad = inputs["x"].clone()
    bad[3], bad[4, 7] = NAN, float("inf")
    bad_grad = grad.clone()
    bad_grad[0, 1] = NAN
    changed = inputs | {"x": bad}
    bad_y, bad_z, bad_stats = forward(changed)
    bad_dx = backward(changed, bad_grad, bad_z, bad_stats)[0]
    rest = torch.ones(rows, dtype=torch.bool)
    rest[[3, 4]] = False
    assert_same([bad_y[rest], bad_z[rest]], [y[rest], z[rest]])
    assert bool(bad_y[~rest].isnan().all())
    rest[0] = False
    assert_same([bad_dx[rest]], [dx[rest]])
    assert bool(bad_dx[~rest].isnan().any(1).all())


def test_offsets_past_two_to_the_31():
    inputs, grad = problem(3, 4, 2, torch.float16)
    wanted = run(inputs, grad)
    strided = torch.empty_strided((3, 4), (1 << 30, 1 << 28), dtype=torch.float16)  # the last element is past 2^31
    strided.copy_(inputs["x"])
    assert_same(run(inputs | {"x": strided}, grad), wanted)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lesser_instruction_sets_as_built(isa):
    script = (
        "import torch\nfrom adapters import case, check\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    for rows, inner, hidden in ((5, 40, 6), (70, 130, 24), (33, 64, 64)):\n"
        "        torch.manual_seed(0)\n"
        "        inputs = case(rows, inner, hidden, experts=2, residual=True, dtype=dtype, norm=True)\n"
        "        check(inputs, torch.randn(rows, inner), 'native', norm_eps=1e-5)\n"
        "print('bytes', torch.ops.fastgist_native.vector_bytes())"
    )
    done = python("-c", f"import sys; sys.path.insert(0, 'tests')\n{script}", FASTGIST_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("bytes ")[1]) <= {"portable": 16, "avx2": 32}[isa]


# -- errors ----------------------------------------------------------------------------------------------------------

FWD_ERRORS = {
    "other width": ({"up_bias": torch.ones(2, 47)}, r"expected up_bias of shape \(2, 48\)"),
    "other dtype": ({"down_bias": torch.ones(6).double()}, "down_bias must be Float, got Double"),
    "norm": ({"norm_weight": torch.ones(47)}, r"expected norm_weight of shape \(48,\)"),
    "gate": ({"gate": torch.ones(37, 4)}, "4 columns must divide the 6 hidden units"),
    "no gate": ({"gate": None}, "up_bias of 2 dimensions without a gate"),
    "residual": ({"residual": torch.ones(36, 48)}, r"expected residual of shape \(37, 48\)"),
}


@pytest.mark.parametrize("case", FWD_ERRORS)
def test_forward_refuses(case):
    change, message = FWD_ERRORS[case]
    with pytest.raises(RuntimeError, match=f"fastgist_native::adapter_fwd: .*{message}"):
        forward(problem()[0] | change)


BWD_ERRORS = {
    "z": ({"z": None}, "the wanted gradients need z"),
    "stats": ({"stats": torch.ones(2, 36)}, "expected stats"),
    "z strided": ({"z": torch.ones(6, 37).T}, "z must be contiguous"),
    "x": ({"x": None}, "the wanted gradients need x"),
}


@pytest.mark.parametrize("case", BWD_ERRORS)
def test_backward_refuses(case):
    change, message = BWD_ERRORS[case]
    inputs, grad = problem()
    _, z, stats = forward(inputs)
    given = {"grad": grad} | {k: inputs[k] for k in ("x", *WEIGHTS)} | {"gate": inputs["gate"], "z": z}
    given |= {k: inputs[k] for k in NORM} | {"stats": stats} | change
    grads = [torch.empty(tuple(inputs[k].shape)) for k in ("x", *WEIGHTS, "gate", *NORM)]
    with pytest.raises(RuntimeError, match=f"fastgist_native::adapter_bwd: .*{message}"):
        native.adapter_bwd(*given.values(), SEED, "gelu", 1.0, 1.0, True, 0.3, *grads)


def test_an_unknown_activation_is_refused():
    with pytest.raises(RuntimeError, match="no activation named swish"):
        forward(problem()[0], activation="swish")


# -- dropout ---------------------------------------------------------------------------------------------------------


def dropped(h: Tensor, p: float, seed: Tensor) -> Tensor:
    return torch.where(philox.keep_mask(seed, tuple(h.shape), p), h / (1.0 - p), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.3, 0.5, 0.9, 1.0 - 1e-12])
@pytest.mark.parametrize("seed", [0, 5, -1, -(2**62) - 3, 2**63 - 1])
def test_dropout_is_the_rule_bit_for_bit(seed, p, dtype):
    seed = torch.tensor([seed])
    for shape in ((1, 1), (7, 3), (33, 32), (5, 130), (9, 17), (70, 4)):
        h = torch.randn(shape).to(dtype)
        h[0, 0] = NAN
        wanted = dropped(h, p, seed)
        for layout, laid in layouts(h):
            out = torch.full(shape, 7.0, dtype=dtype)
            native.dropout(laid, seed, p, out)
            assert_same([out], [wanted], layout)
        native.dropout(h, seed, p, h)
        assert_same([h], [wanted], "in place")


def test_dropout_keeps_what_is_at_the_threshold():
    zero = torch.zeros(1, dtype=torch.int64)
    words = philox.philox4x32((zero, zero, zero, zero), (SEED & 0xFFFFFFFF, (SEED >> 32) & 0xFFFFFFFF))
    for i, word in enumerate(words):
        draw = int(word) >> 1
        for p, kept in ((draw / 2**31, True), ((draw + 1) / 2**31, False)):
            out = torch.full((1, 4), NAN)
            native.dropout(torch.ones(1, 4), SEED, p, out)
            assert bool(out[0, i] != 0) == kept


def test_dropout_of_nothing():
    for shape in ((0, 4), (4, 0)):
        native.dropout(torch.empty(shape), SEED, 0.5, torch.empty(shape))


@pytest.mark.skipif(backends.interpreting(), reason="'auto' interprets Triton's kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cp_linear_drops_the_same_with_and_without(dtype, monkeypatch):
    calls = []
    real = _low_rank._dropped_in_place
    monkeypatch.setattr(_low_rank, "_dropped_in_place", lambda *args: (calls.append(1), real(*args))[1])
    found = []
    for impl in ("auto", "reference"):
        torch.manual_seed(3)
        leaves = [torch.randn(s).to(dtype).requires_grad_() for s in ((40, 24), (24, 24), (24, 6), (24, 6))]
        x, weight, u, v = leaves
        y = cp_linear(x, weight, None, u, v, dropout_p=0.3, training=True, seed=SEED, impl=impl)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert_same(*found)
    assert len(calls) == 2


@pytest.mark.skipif(backends.interpreting(), reason="'auto' interprets Triton's kernels")
@pytest.mark.parametrize("op", ["cp_update", "adapter", "adapter, identity"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_plain_paths_drop_the_same_with_and_without(op, dtype, monkeypatch):
    """Where "auto" leaves the operation to plain PyTorch: of the adapters whose weights are too large for C++."""
    calls = []
    real = _low_rank._dropped_in_place
    monkeypatch.setattr(_low_rank, "_dropped_in_place", lambda *args: (calls.append(1), real(*args))[1])
    found = []
    for impl in ("auto", "reference"):
        torch.manual_seed(3)
        options = {"dropout_p": 0.3, "training": True, "seed": SEED, "impl": impl}
        if op == "cp_update":
            leaves = [torch.randn(s).to(dtype).requires_grad_() for s in ((40, 24), (24, 6), (24, 6))]
            y = cp_update(torch.ones(40, 24, dtype=dtype), *leaves, **options)
        else:
            shapes = ((40, 1100), (1024, 1100), (1024,), (1100, 1024), (1100,))
            leaves = [(torch.randn(s) / 30).to(dtype).requires_grad_() for s in shapes]
            activation = "identity" if op.endswith("identity") else "gelu"
            y = adapter(*leaves, activation=activation, **options)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert_same(*found)
    hidden = 1 if op == "cp_update" else 2  # an adapter's backward forms act(z) again
    assert len(calls) == 1 + hidden


# -- what "auto" takes -----------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """Which implementation each forward and backward took."""
    from fastgist.ops import adapter as ops

    seen = []
    real = ops._resolve
    monkeypatch.setattr(ops, "_resolve", lambda *args: (seen.append(real(*args)), seen[-1])[1])
    return seen


def took(taken, rows, inner, hidden, dtype=torch.float32):
    inputs = case(rows, inner, hidden, dtype=dtype)
    leaves = [inputs[k].requires_grad_() for k in ("x", *WEIGHTS)]
    adapter(*leaves).sum().backward()
    (chosen,) = set(taken)
    taken.clear()
    return chosen


@pytest.mark.skipif(backends.interpreting(), reason="kernels are interpreted")
def test_auto_takes_it_where_it_was_faster(taken, monkeypatch):
    monkeypatch.setattr(_extension, "vector_bytes", lambda: 64)
    backends._resolve.cache_clear()
    assert took(taken, 200, 768, 64) == took(taken, 200, 64, 8, torch.float16) == "native"
    assert took(taken, 64, 64, 8, torch.bfloat16) == "native" and took(taken, 65, 64, 8, torch.bfloat16) == "reference"
    assert took(taken, 200, 64, 8, torch.float64) == "reference"
    assert took(taken, 1, 768, 64) == "reference" and took(taken, 2, 768, 64) == "native"  # to be packed for one row
    monkeypatch.setattr(_extension, "vector_bytes", lambda: 32)
    assert took(taken, 200, 768, 64) == "native" and took(taken, 200, 768, 128) == "reference"
    monkeypatch.setattr(_extension, "vector_bytes", lambda: 16)
    backends._resolve.cache_clear()
    assert took(taken, 200, 768, 64) == "reference"
    backends._resolve.cache_clear()
