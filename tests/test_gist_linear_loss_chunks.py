"""gist_linear_loss: how large its chunks are, what it keeps and computes, and how its finished gradients reach their inputs.
Hard case 17 with every option."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from conftest import INTERPRETING
from losses import evaluate

from fastgist.functional import gist_linear_loss, gist_loss
from fastgist.ops import _linear_chunks as chunks
from fastgist.reference.gist_linear_loss import gist_linear_loss as formula
from fastgist.testing import assert_within_budget

OP = "gist_linear_loss"
NAMES = ("hidden", "gist", "weight", "bias")


def case(rows=11, width=24, classes=37, dtype=torch.float32, device="cpu"):
    hidden, gist = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    weight = (torch.randn(classes, width, device=device) * width**-0.5).to(dtype)
    bias = torch.randn(classes, device=device).to(dtype)
    target = torch.randint(classes, (rows,), device=device)
    target[1] = -100
    return [hidden, gist, weight, bias], target


def unfused(target, **options):
    def loss(hidden, gist, weight, bias):
        z, g = (torch.nn.functional.linear(h, weight, bias) for h in (hidden, gist))
        return gist_loss(z, g, target, impl="reference", **options)

    return loss


# -- as gist_loss, for every chunk size --------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"detach": "logits"},
    {"detach": "gist_logits", "reduction": "none"},
    {"divisor": 7.5},
    {"divisor": "tensor", "detach": "logits"},
    {"alpha": 0.0},
    {"alpha": 0.0, "detach": "gist_logits"},
    {"temperature": 2.5, "t_squared": True, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] if INTERPRETING else [torch.float32, torch.bfloat16])
def test_hard_17_equals_gist_loss_on_the_logits(impl, device, options, frozen, dtype):
    inputs, target = case(dtype=dtype, device=device)
    wanted = [True, True, not frozen, not frozen]
    options = dict(options)
    if options.get("divisor") == "tensor":
        options["divisor"] = torch.tensor(7.5, device=device)
    grad = torch.randn(11, device=device) if options.get("reduction") == "none" else torch.tensor(1.3, device=device)
    of_formula = {k: v for k, v in options.items() if k != "divisor"}
    share = 1.0
    if "divisor" in options:
        of_formula["reduction"], share = "sum", 1 / 7.5
    plain = evaluate(unfused(target, **options), inputs, wanted, grad)
    exact = evaluate(lambda *a: formula(*a, target, **of_formula), [x.double() for x in inputs], wanted, grad * share)
    terms = 5.0 * (11 if options.get("reduction") == "sum" else 1)
    for size in (4, None) if INTERPRETING else (1, 4, 11, 100, None):
        loss, grads = evaluate(
            lambda *a, c=size: gist_linear_loss(*a, target, chunk_rows=c, impl=impl, **options), inputs, wanted, grad
        )
        assert_within_budget(loss, plain[0], exact[0] * share, what="loss", scale=terms)
        for name, mine, p, e in zip(NAMES, grads, plain[1], exact[1], strict=True):
            if e is not None:
                assert_within_budget(mine, p, e, what=f"{name}, chunks of {size}")
            else:  # frozen, or nothing of the loss reaches it
                assert mine is None or not mine.any()


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [512, 1000, 2048, 8192, 50_000])
@pytest.mark.parametrize("hidden", [256, 1024, 4096])
def test_a_chunk_is_an_eighth_of_what_whole_logits_take_in_whole_tiles(rows, hidden, itemsize):
    """Logits and gradients of both heads are 4 M V numbers."""
    size = chunks.rows_of_chunk(rows, hidden, 128256, itemsize)
    assert size % chunks.TILE == 0
    assert 8 * chunks.chunk_bytes(size, hidden, 128256, itemsize) <= 4 * rows * 128256 * itemsize
    of_states = 2 * rows * hidden * itemsize
    assert chunks.chunk_bytes(size, hidden, 128256, itemsize) <= max(chunks.MOST_BUDGET, of_states)


def test_small_problems_are_one_chunk():
    assert chunks.rows_of_chunk(64, 768, 100, 4) == 64
    assert chunks.rows_of_chunk(4096, 768, 1000, 4) == 2304  # 32 MiB, in tiles of 64
    assert chunks.rows_of_chunk(0, 768, 1000, 4) == 1


@pytest.mark.parametrize("budget", [1, 10_000, 2**20, 2**24, 2**30])
def test_a_budget_that_is_given_is_kept(budget):
    rows, hidden, classes = 4096, 64, 5000
    size = chunks.rows_of_chunk(rows, hidden, classes, 4, budget)
    one = chunks.chunk_bytes(1, hidden, classes, 4)
    assert chunks.chunk_bytes(size, hidden, classes, 4) <= max(budget, one)
    grown = size + (chunks.TILE if size >= chunks.TILE else 1)
    assert size == rows or chunks.chunk_bytes(grown, hidden, classes, 4) > budget


def allocations(run) -> list[int]:
    """Bytes of each tensor that ``run`` allocates."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    found = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert found, "the profiler saw nothing, so this would pass whatever happened"
    return found


def peak(run) -> int:
    live = most = 0
    for size in allocations(run):
        live += size
        most = max(most, live)
    return most


@pytest.mark.skipif(INTERPRETING, reason="the interpreter copies what it is given")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("rows", "classes", "chunk_rows"), [(256, 32768, 20), pytest.param(512, 128256, None, marks=pytest.mark.slow)]
)
def test_the_peak_stays_within_an_eighth_of_whole_logits(impl, device, frozen, rows, classes, chunk_rows):
    """Peak of forward and backward beyond inputs, parameters and the gradients of those, which exist either way."""
    if device.type != "cpu":
        pytest.skip("the profiler is asked for the CPU's allocations")
    inputs, target = case(rows, 8, classes)
    leaves = [x.requires_grad_() for x in (inputs[:2] if frozen else inputs)]
    exist = sum(x.numel() * 4 for x in leaves)
    whole = peak(lambda: torch.autograd.grad(unfused(target)(*inputs), leaves)) - exist
    options = {"impl": impl, "chunk_rows": chunk_rows}
    ours = peak(lambda: torch.autograd.grad(gist_linear_loss(*inputs, target, **options), leaves)) - exist
    assert whole >= 3.5 * rows * classes * 4
    assert ours <= whole / 8


@pytest.mark.parametrize("given", [{"memory_budget": 50_000}, {"chunk_rows": 3}])
def test_chunks_are_as_large_as_asked(impl, device, given, monkeypatch):
    inputs, target = case(device=device)
    products, original = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: products.append(len(a[1])) or original(*a, **k))
    gist_linear_loss(*inputs, target, impl=impl, **given)
    if "chunk_rows" in given:
        assert products == [6, 6, 6, 4]
    else:
        assert products == [22] and chunks.chunk_bytes(11, 24, 37, 4) <= 50_000


def test_what_a_chunk_cannot_be(device):
    inputs, target = case(device=device)
    with pytest.raises(ValueError, match="memory_budget must be at least 1, got 0"):
        gist_linear_loss(*inputs, target, memory_budget=0)
    with pytest.raises(ValueError, match="chunk_rows and memory_budget both say"):
        gist_linear_loss(*inputs, target, memory_budget=1000, chunk_rows=2)


# -- what is computed and kept -----------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """(rows of the result, its columns) of each product of the chunks, logits first."""
    made = []

    def watch(name):
        original = getattr(torch, name)

        def run(*args, **kwargs):
            out = original(*args, **kwargs)
            made.append(tuple(out.shape))
            return out

        monkeypatch.setattr(torch, name, run)

    watch("mm"), watch("addmm")
    original = torch.Tensor.addmm_

    def in_place(self, *args, **kwargs):
        made.append(("dW", len(args[1])))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "addmm_", in_place)
    return made


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (("hidden", "gist"), [(22, 37), (22, 24)]),
        (("hidden",), [(22, 37), (11, 24)]),
        (("gist",), [(22, 37), (11, 24)]),
        (("weight",), [(22, 37), ("dW", 22)]),
        (("bias",), [(22, 37)]),
        (NAMES, [(22, 37), ("dW", 22), (22, 24)]),
    ],
)
def test_only_the_products_that_somebody_asked_for(impl, device, products, trained, expected):
    inputs, target = case(device=device)
    evaluate(lambda *a: gist_linear_loss(*a, target, impl=impl), inputs, [name in trained for name in NAMES])
    assert products == expected


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"detach": "gist_logits"}])
def test_a_gist_token_that_learns_nothing_costs_no_product(impl, device, products, options):
    inputs, target = case(device=device)
    _, grads = evaluate(lambda *a: gist_linear_loss(*a, target, impl=impl, alpha=0.0, **options), inputs, [True] * 4)
    assert products == [(22, 37), ("dW", 11), (11, 24)]
    assert not grads[1].any() and grads[0].any()


def test_a_frozen_head_leaves_nothing_of_its_size_behind(impl, device):
    inputs, target = case(64, 8, 256 if INTERPRETING else 4096, device=device)
    loss = gist_linear_loss(*(x.requires_grad_(i < 2) for i, x in enumerate(inputs)), target, impl=impl)
    kept = [t for t in loss.grad_fn.saved_tensors if t is not None]
    assert sorted(t.numel() for t in kept if t.numel()) == [512, 512]


@pytest.mark.skipif(INTERPRETING, reason="the profiler is asked for the CPU's allocations")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_with_gradient_one_hands_out_what_the_forward_made(impl, device, dtype):
    if device.type != "cpu":
        pytest.skip("the profiler is asked for the CPU's allocations")
    inputs, target = case(64, 32, 1000, dtype=dtype)
    leaves = [x.requires_grad_() for x in inputs]
    for factor in (1.0, 3.0):  # another factor is applied in place
        loss = gist_linear_loss(*leaves, target, impl=impl)
        sizes = allocations(
            lambda loss=loss, factor=factor: torch.autograd.grad(loss, leaves, torch.full_like(loss, factor))
        )
        assert max(sizes) < 64 * 32 * dtype.itemsize


# -- the gradients' way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("factors", [(1.0, 4.0), (4.0, 1.0), (1.0, 4.0, 1.0), (1.0, 1.0, 4.0)])
def test_every_backward_over_a_retained_graph_is_right_and_stays_so(impl, device, dtype, reduction, factors):
    if INTERPRETING and dtype == torch.bfloat16:
        pytest.skip("interpreted bfloat16")
    inputs, target = case(dtype=dtype, device=device)
    leaves = [x.requires_grad_() for x in inputs]

    def gradients(loss, factor, keep=False):
        return torch.autograd.grad(loss, leaves, torch.full_like(loss, factor), retain_graph=keep)

    def loss():
        return gist_linear_loss(*leaves, target, chunk_rows=4, impl=impl, reduction=reduction)

    fresh = [gradients(loss(), factor) for factor in factors]
    retained = loss()
    again = [gradients(retained, factor, i < len(factors) - 1) for i, factor in enumerate(factors)]
    for a, b in zip(again, fresh, strict=True):  # compared after all: none may have changed another's result
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len({g.data_ptr() for each in again for g in each}) == 4 * len(factors)


@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_incoming_gradient_is_applied_to_every_gradient(impl, device, factor, dtype):
    inputs, target = case(dtype=dtype, device=device)
    grad = torch.tensor(factor, device=device)
    ours = evaluate(lambda *a: gist_linear_loss(*a, target, chunk_rows=4, impl=impl), inputs, [True] * 4, grad)[1]
    plain = evaluate(unfused(target), inputs, [True] * 4, grad)[1]
    exact = evaluate(lambda *a: formula(*a, target), [x.double() for x in inputs], [True] * 4, grad)[1]
    for name, mine, p, e in zip(NAMES, ours, plain, exact, strict=True):
        assert mine.dtype == dtype
        assert_within_budget(mine, p, e, what=name)


@pytest.mark.skipif(INTERPRETING, reason="interpreted bfloat16")
def test_on_a_device_the_scale_reaches_gradients_of_every_shape_once(monkeypatch):
    """The kernel takes one tensor, or two that are alike."""
    from fastgist import backends
    from fastgist.ops import _finished

    def scale_unless_one(grads, factor):
        assert len(grads) in (1, 2) and len({(g.shape, g.dtype) for g in grads}) == 1
        for g in grads:
            g.mul_(factor)

    kernels = types.ModuleType("fastgist_kernels.scale")
    kernels.scale_unless_one = scale_unless_one
    monkeypatch.setitem(sys.modules, "fastgist_kernels.scale", kernels)
    monkeypatch.setattr(backends, "available", lambda: {"triton": "yes"})
    shapes = [(4, 3), (4, 3), (4, 3), (7, 3), (7,)]  # the head may be as large as the hidden states
    grads = [torch.ones(shape) for shape in shapes] + [torch.ones(4, 3, dtype=torch.bfloat16)]
    assert _finished._scale_on_device(grads, torch.tensor(3.0))
    assert all((g == 3).all() for g in grads)


@pytest.mark.parametrize("chunk_rows", [64, 512] if INTERPRETING else [2, 64, 512])
def test_many_chunks_do_not_wear_a_bfloat16_heads_gradient_down(impl, device, chunk_rows):
    """Summed in bfloat16, 256 chunks of gradients of one sign stop adding up."""
    inputs = [(torch.rand(512, 8, device=device) + 0.5).bfloat16() for _ in range(2)]
    inputs += [torch.zeros(16, 8, device=device).bfloat16(), torch.zeros(16, device=device).bfloat16()]
    target = torch.zeros(512, dtype=torch.int64, device=device)
    options = {"reduction": "sum"}
    ours = evaluate(
        lambda *a: gist_linear_loss(*a, target, impl=impl, chunk_rows=chunk_rows, **options), inputs, [True] * 4
    )[1]
    plain = evaluate(unfused(target, **options), inputs, [True] * 4)[1]
    exact = evaluate(lambda *a: formula(*a, target, **options), [x.double() for x in inputs], [True] * 4)[1]
    for name, mine, p, e in zip(NAMES, ours, plain, exact, strict=True):
        assert_within_budget(mine, p, e, what=name)


def test_under_autocast_a_float32_heads_gradient_is_never_rounded_to_half(impl, device, monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_ROWS", 1)  # the half-precision head's comes of the same sum
    inputs, target = case(dtype=torch.float32, device=device)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    for chunk_rows in (4, 11):

        def run(*a, c=chunk_rows):
            with torch.autocast(device.type, dtype=dtype):
                return gist_linear_loss(*a, target, chunk_rows=c, impl=impl)

        grads = evaluate(run, inputs, [True] * 4)[1]
        narrow = evaluate(
            lambda *a, c=chunk_rows: gist_linear_loss(*a, target, chunk_rows=c, impl=impl),
            [x.to(dtype) for x in inputs],
            [True] * 4,
        )[1]
        for name, wide, half in zip(NAMES, grads, narrow, strict=True):
            assert wide.dtype == torch.float32
            torch.testing.assert_close(wide.to(dtype), half, msg=name)
    assert not torch.equal(grads[3], grads[3].to(dtype).float())  # the bias, a plain sum


def test_a_tied_heads_gradient_adds_up(impl, device):
    """The head is also the embedding that made the hidden states: gradient comes along both ways."""
    _, target = case(device=device)
    tokens = torch.randint(37, (11,), device=device)

    def tied(loss):
        def run(weight, mix):
            hidden = torch.nn.functional.embedding(tokens, weight)
            return loss(hidden, hidden @ mix, weight)

        return run

    inputs = [torch.randn(37, 24, device=device) * 0.2, torch.randn(24, 24, device=device)]
    ours = evaluate(
        tied(lambda h, g, w: gist_linear_loss(h, g, w, None, target, chunk_rows=4, impl=impl)), inputs, [True] * 2
    )
    plain = evaluate(tied(lambda h, g, w: unfused(target)(h, g, w, None)), inputs, [True] * 2)
    exact = evaluate(tied(lambda h, g, w: formula(h, g, w, None, target)), [x.double() for x in inputs], [True] * 2)
    for mine, p, e in zip(ours[1], plain[1], exact[1], strict=True):
        assert_within_budget(mine, p, e)


def test_the_compiled_row_work_fits_any_block(device, monkeypatch):
    """Rows of a chunk go through it a few at a time; the last block is smaller."""
    from fastgist import backends

    if INTERPRETING or device.type != "cpu" or backends.available()["native"] != "yes, on CPU tensors":
        pytest.skip("no compiled extension")
    inputs, target = case(rows=13)
    incoming = torch.linspace(0.5, 1.5, 13)

    def run():
        loss = lambda *a: gist_linear_loss(*a, target, impl="native", reduction="none")  # noqa: E731
        return evaluate(loss, inputs, [True] * 4, incoming)

    whole = run()
    for elements in (1, 37 * 2, 37 * 5, 37 * 13):
        monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", elements)
        parts = run()
        assert torch.equal(parts[0], whole[0])
        assert all(torch.equal(a, b) for a, b in zip(parts[1], whole[1], strict=True))


def test_a_bias_s_gradient_of_many_classes_errs_no_more_than_torch_s_sum():
    """Blocks of a row or two, added one after the other, erred three times as much at 128,256 classes."""
    from fastgist.ops._linear_head import add_rows

    torch.manual_seed(0)
    rows = torch.rand(128, 2**17) * 1e-5
    rows[0, ::7] -= 4e-3  # a label's class: all that follows is small beside it
    total = torch.zeros(rows.shape[1])
    add_rows(total, rows)
    exact = rows.double().sum(0)
    errors = [float((t.double() - exact).abs().max()) for t in (total, rows.sum(0))]
    assert errors[0] <= errors[1]
    half = torch.zeros(rows.shape[1])
    add_rows(half, rows.bfloat16())
    assert float((half.double() - rows.bfloat16().double().sum(0)).abs().max()) < 1e-8
