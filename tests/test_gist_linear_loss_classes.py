"""gist_linear_loss where the head's gradient is formed by blocks of classes in a second pass: when that is, and that it is the
same gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import INTERPRETING
from losses import evaluate
from test_gist_linear_loss_chunks import NAMES, OPTIONS, case, peak, unfused

from fastgist.functional import gist_linear_loss
from fastgist.ops import _linear_chunks as chunks
from fastgist.ops import _linear_head
from fastgist.reference import _numerics
from fastgist.reference.gist_linear_loss import gist_linear_loss as formula
from fastgist.testing import assert_within_budget

OP = "gist_linear_loss"
HALF = torch.bfloat16
V = 128256


@pytest.fixture
def blocks(monkeypatch):
    """(classes of a block, rows, whether the gist token's half is left out) of each block of a second pass; blocks of 16."""
    monkeypatch.setattr(chunks, "LEAST_CLASSES", 16)
    made, original = [], _linear_head.by_classes

    def watch(work, states, *rest):
        classes = work.classes
        work.classes = lambda at, *more: made.append((at.shape[1], len(at), not more[-1])) or classes(at, *more)
        return original(work, states, *rest)

    monkeypatch.setattr(_linear_head, "by_classes", watch)
    return made


# -- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [512, 1024, 2048, 8192, 50_000])  # 4 times as many as hidden: half of the sum has room
@pytest.mark.parametrize("hidden", [256, 1024, 4096])
def test_a_wider_sum_is_held_only_within_an_eighth_of_whole_logits(rows, hidden):
    """Two products and gist_loss hold 3.5 times the logits of one head at their peak."""
    size, block = chunks.plan(rows, hidden, V, 2, 0, 0, 4 * V * hidden)
    eighth = 3.5 * rows * V * 2 / 8
    in_hand = chunks.chunk_bytes(size, hidden, V, 2)
    if block:
        # Stacked hidden states come with any block.
        assert 2 * rows * (block + hidden) * 2 <= max(in_hand, 2 * rows * (chunks.LEAST_CLASSES + hidden) * 2)
        assert in_hand <= eighth
        least = chunks.rows_of_chunk(rows, hidden, V, 2, max(int(eighth) - 2 * V * hidden, 1))
        assert 4 * V * hidden > eighth or least < chunks.LEAST_ROWS
    else:
        assert max(in_hand + 2 * V * hidden, 4 * V * hidden) <= eighth
        assert size >= chunks.LEAST_ROWS


@pytest.mark.parametrize("budget", [2**20, 2**26, 2**28, 2**30])
def test_a_budget_that_is_given_holds_the_sum_too(budget):
    rows, hidden = 4096, 256
    size, block = chunks.plan(rows, hidden, V, 2, 0, budget, 4 * V * hidden)
    one = chunks.chunk_bytes(1, hidden, V, 2)
    assert chunks.chunk_bytes(size, hidden, V, 2) <= max(budget, one)
    if block:
        assert 2 * rows * (block + hidden) * 2 <= max(budget, 2 * rows * (chunks.LEAST_CLASSES + hidden) * 2)
    else:
        assert chunks.chunk_bytes(size, hidden, V, 2) + 2 * V * hidden <= budget
    assert bool(block) == (budget <= 2**26)


def test_one_pass_where_no_sum_is_wider_or_there_is_one_chunk():
    assert chunks.plan(512, 256, V, 4, 0, 0, 0) == (64, 0)  # a float32 head, or a frozen one
    assert chunks.plan(512, 256, V, 2, 512, 0, 4 * V * 256) == (512, 0)
    assert chunks.plan(4096, 64, 1000, 2, 512, 0, 4 * 1000 * 64) == (512, 0)  # a small head
    assert chunks.plan(4096, 64, 1000, 2, 8, 0, 4 * 1000 * 64)[1]  # 512 times over the sum


@pytest.mark.parametrize(
    ("dtype", "options", "second"),
    [
        (HALF, {"chunk_rows": 4}, True),
        (HALF, {"chunk_rows": 4, "reduction": "none"}, True),
        (HALF, {"chunk_rows": 11}, False),  # one chunk has nothing to sum
        (torch.float32, {"chunk_rows": 4}, False),  # its sum is the gradient
        (torch.float16, {"chunk_rows": 4}, False),  # waits for its loss scale in float32
        (torch.float16, {"chunk_rows": 4, "reduction": "none"}, True),
    ],
)
def test_only_a_gradient_that_is_narrower_than_its_sum_takes_a_second_pass(
    impl, device, blocks, dtype, options, second
):
    inputs, target = case(dtype=dtype, device=device)
    for wanted in (True, False):
        evaluate(lambda *a: gist_linear_loss(*a, target, impl=impl, **options), inputs, [True, True, wanted, wanted])
        assert blocks == ([(16, 22, False), (16, 22, False), (5, 22, False)] if second and wanted else [])
        blocks.clear()


def test_under_autocast_a_float32_heads_gradient_is_the_sum(impl, device, blocks):
    inputs, target = case(device=device)

    def loss(*a):
        with torch.autocast(device.type, dtype=HALF):
            return gist_linear_loss(*a, target, chunk_rows=4, impl=impl)

    assert evaluate(loss, inputs, [True] * 4)[1][2].dtype == torch.float32 and not blocks


def test_a_gist_token_that_learns_nothing_costs_no_product(impl, device, blocks):
    inputs, target = case(dtype=HALF, device=device)
    _, grads = evaluate(
        lambda *a: gist_linear_loss(*a, target, impl=impl, chunk_rows=4, alpha=0.0, beta=0.0), inputs, [True] * 4
    )
    assert {quiet for _, _, quiet in blocks} == {True} and not grads[1].any() and grads[2].any()


def test_a_head_that_alone_is_trained_leaves_the_first_pass_statistics(impl, device, blocks, monkeypatch):
    """No gradient of the logits is formed twice where no hidden state wants one."""
    inputs, target = case(dtype=HALF, device=device)
    products, original = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(tuple(a[0].shape)) or original(*a, **k))
    evaluate(lambda *a: gist_linear_loss(*a, target, chunk_rows=4, impl=impl), inputs, [False, False, True, True])
    assert len(blocks) == 3 and products == [(16, 22), (16, 22), (5, 22)]


# -- the same gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hard_17_equals_gist_loss_on_the_logits(impl, device, blocks, options, soft):
    inputs, target = case(dtype=HALF, device=device)
    if soft:
        target = torch.rand(11, 37, device=device).softmax(-1)
    options = dict(options)
    if options.get("divisor") == "tensor":
        options["divisor"] = torch.tensor(7.5, device=device)
    grad = torch.randn(11, device=device) if options.get("reduction") == "none" else torch.tensor(1.3, device=device)
    of_formula, share = {k: v for k, v in options.items() if k != "divisor"}, 1.0
    if "divisor" in options:
        of_formula["reduction"], share = "sum", 1 / 7.5
    plain = evaluate(unfused(target, **options), inputs, [True] * 4, grad)
    exact = evaluate(
        lambda *a: formula(*a, target, **of_formula), [x.double() for x in inputs], [True] * 4, grad * share
    )
    loss, grads = evaluate(
        lambda *a: gist_linear_loss(*a, target, chunk_rows=4, impl=impl, **options), inputs, [True] * 4, grad
    )
    assert len(blocks) == 3
    terms = 5.0 * (11 if options.get("reduction") == "sum" else 1)
    assert_within_budget(loss, plain[0], exact[0] * share, what="loss", scale=terms)
    for name, mine, p, e in zip(NAMES, grads, plain[1], exact[1], strict=True):
        assert mine.dtype == HALF
        if e is not None:
            assert_within_budget(mine, p, e, what=name)


@pytest.mark.parametrize("soft", [False, True])
def test_no_result_depends_on_the_blocks(impl, device, monkeypatch, soft):
    """Nor on how often it is asked for."""
    inputs, target = case(dtype=HALF, device=device)
    target = torch.rand(11, 37, device=device).softmax(-1) if soft else target

    def run(least):
        monkeypatch.setattr(chunks, "LEAST_CLASSES", least)
        options = {"label_smoothing": 0.1, "chunk_rows": 4, "impl": impl}
        return evaluate(lambda *a: gist_linear_loss(*a, target, **options), inputs, [True] * 4)

    whole, *others = (run(least) for least in (64, 16, 16, 1, 36))
    for (loss, grads), name in itertools.product(others, range(4)):
        assert torch.equal(loss, whole[0]) and torch.equal(grads[name], whole[1][name])


def test_no_result_depends_on_the_blocks_of_rows_within(device, monkeypatch):
    """A block of classes goes through the row work a few rows at a time."""
    from fastgist import backends

    if INTERPRETING or device.type != "cpu" or backends.available()["native"] != "yes, on CPU tensors":
        pytest.skip("no compiled extension")
    inputs, target = case(dtype=HALF, device=device)
    incoming = torch.linspace(0.5, 1.5, 11)
    options = {"chunk_rows": 4, "impl": "native", "reduction": "none"}

    def run():
        return evaluate(lambda *a: gist_linear_loss(*a, target, **options), inputs, [True] * 4, incoming)[1]

    whole = run()
    for elements in (1, 37 * 3):
        monkeypatch.setattr(chunks, "BLOCK_ELEMENTS", elements)
        assert all(torch.equal(a, b) for a, b in zip(run(), whole, strict=True))


def test_absent_classes_bad_rows_and_ignored_rows(impl, device, blocks):
    inputs, target = case(dtype=HALF, device=device)
    inputs[3][30:] = -torch.inf  # of a padded vocabulary
    target[target >= 30] = 0
    inputs[0][1] = torch.nan  # its target is ignored
    clean = [x.clone() for x in inputs]
    clean[0][1] = 0.0
    ours, without = (
        evaluate(lambda *a: gist_linear_loss(*a, target, chunk_rows=4, impl=impl), given, [True] * 4)
        for given in (inputs, clean)
    )
    plain = evaluate(unfused(target), clean, [True] * 4)
    exact = evaluate(lambda *a: formula(*a, target), [x.double() for x in clean], [True] * 4)
    for name, mine, same, p, e in zip(NAMES, ours[1], without[1], plain[1], exact[1], strict=True):
        assert torch.equal(mine, same)
        assert_within_budget(mine[:30] if name in ("weight", "bias") else mine, *(x[: len(mine[:30])] for x in (p, e)))
    assert not ours[1][2][30:].any() and not ours[1][3][30:].any()
    inputs[0][4] = torch.nan  # and this one counts: no class is spared
    _, grads = evaluate(lambda *a: gist_linear_loss(*a, target, chunk_rows=4, impl=impl), inputs, [True] * 4)
    assert grads[2].isnan().all() and len(blocks) == 9


def test_hard_01_zero_rows(impl, device):
    inputs, target = case(dtype=HALF, device=device)
    empty = [inputs[0][:0], inputs[1][:0], *inputs[2:]]
    _, grads = evaluate(lambda *a: gist_linear_loss(*a, target[:0], chunk_rows=1, impl=impl), empty, [True] * 4)
    assert not grads[2].any() and grads[2].shape == (37, 24)


def test_the_peak_stays_within_an_eighth_of_whole_logits(impl, device):
    """The float32 sum alone takes more here."""
    if device.type != "cpu" or impl == "triton":
        pytest.skip("the profiler is asked for the CPU's allocations, and the interpreter copies what it is given")
    rows, classes, width = 768, 32768, 256
    inputs, target = case(rows, width, classes, dtype=HALF)
    leaves = [x.requires_grad_() for x in inputs]
    exist = sum(x.numel() * 2 for x in leaves)
    whole = peak(lambda: torch.autograd.grad(unfused(target)(*inputs), leaves)) - exist
    options = {"impl": impl, "memory_budget": 2**22}
    ours = peak(lambda: torch.autograd.grad(gist_linear_loss(*inputs, target, **options), leaves)) - exist
    assert whole >= 3.5 * rows * classes * 2
    assert ours <= whole / 8 < 4 * classes * width


def test_a_budget_that_is_given_holds_the_sum_and_what_is_added_to_it(impl, device, blocks):
    """One pass: a chunk, the float32 sum, and the part of a product on its way into it."""
    if impl != "native":
        pytest.skip(
            "asks the profiler for the CPU's allocations; plain PyTorch's row work has blocks of its own beside them"
        )
    rows, classes, width, budget = 512, 4096, 256, 2**23
    inputs, target = case(rows, width, classes, dtype=HALF)
    leaves = [x.requires_grad_() for x in inputs]
    exist = sum(x.numel() * 2 for x in leaves)
    options = {"impl": impl, "memory_budget": budget}
    ours = peak(lambda: torch.autograd.grad(gist_linear_loss(*inputs, target, **options), leaves)) - exist
    assert not blocks
    rows_between = 2 * 2 * _numerics.BLOCK_ELEMENTS  # on their way from logits to gradients
    assert 2 * classes * width < ours <= budget + rows_between
