"""What cp_linear and adapter allocate while they run: an update of a layer adds no temporary as large as the layer's output.

Plain PyTorch runs, and its allocations are seen by torch's profiler. Of the kernels the launchers run as on a card, and the
kernels themselves do not (benchmarks/launches.py): what they allocate is a matter of host code. Beside results (y; dx and the
factors' gradients) there may be:

- M x R (M x H) numbers: h, dL/dh, z, act(z), float32 for float16;
- N x K where plain PyTorch adds the update to the weight first (float32 and many rows: reference.cp_linear.merge_pays);
- N x R: V times each fold's gain;
- partial sums of a weight's gradient, which the kernels add up in a second stage. They grow with the programs, not with M:
  up to four a processor, an eighth of what is read or one program a processor, whichever is more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import cpu_allocations
from fastgist import backends
from fastgist import functional as F
from fastgist.reference.cp_linear import merge_pays

#: Bytes of scalars and the like.
SMALL = 4096


def temporaries(step: Callable[[], object], results: list[int]) -> tuple[list[int], int]:
    """(sizes of the allocations beside ``results``, largest first; the peak less the results). Each result must have been
    allocated, once."""
    sizes = cpu_allocations(step)
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    others = sorted((s for s in sizes if s > 0), reverse=True)
    for size in results:
        fitting = [s for s in others if size <= s < size + SMALL // 4]  # malloc's alignment
        assert fitting, f"no allocation of {size} bytes"
        others.remove(fitting[-1])
    return others, peak - sum(results)


def _cp(rows, inner, out, rank, folds, dtype, weights=1, dropout=0.0, gain=True):
    x, u, v = torch.randn(rows, inner), torch.randn(inner, rank), torch.randn(out // folds, rank)
    trained = [t.to(dtype).requires_grad_() for t in (x, u, v)]
    trained += [torch.randn(folds, rank).to(dtype).requires_grad_()] if gain else []
    ws = [torch.randn(out // weights, inner).to(dtype) for _ in range(weights)]
    bs = [torch.randn(out // weights).to(dtype) for _ in range(weights)]
    x, *factors = trained

    def run(impl: str):
        base = (ws, bs) if weights > 1 else (ws[0], bs[0])
        return F.cp_linear(x, *base, *factors, dropout_p=dropout, training=True, impl=impl)

    return trained, run


def _both(run: Callable[[], object], trained: list, y_bytes: int, kept: list[int]):
    """Temporaries of a forward, which leaves y and ``kept``, and of a backward, which leaves gradients."""
    run()
    held: list = []
    forward = temporaries(lambda: held.append(run()), [y_bytes, *kept])
    ys = held[0] if isinstance(held[0], tuple) else held
    grads = [torch.ones_like(y) for y in ys]
    backward = temporaries(
        lambda: held.append(torch.autograd.grad(ys, trained, grads)), [t.numel() * t.element_size() for t in trained]
    )
    return forward, backward


# -- plain PyTorch -----------------------------------------------------------------------------------------------------

PLAIN = {
    "merged": {"rows": 1600, "inner": 128, "out": 384, "rank": 16, "folds": 1},
    "merged, folds": {"rows": 1600, "inner": 128, "out": 384, "rank": 16, "folds": 3},
    "merged, lora": {"rows": 1600, "inner": 128, "out": 384, "rank": 16, "folds": 1, "gain": False},
    "factored": {"rows": 40, "inner": 128, "out": 384, "rank": 16, "folds": 1},
    "factored, folds": {"rows": 40, "inner": 128, "out": 384, "rank": 16, "folds": 3},
    "dropout": {"rows": 1600, "inner": 128, "out": 384, "rank": 16, "folds": 3, "dropout": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", PLAIN)
def test_cp_linear_in_plain_pytorch_adds_nothing_as_large_as_y(form, dtype):
    sizes = PLAIN[form]
    rows, inner, out, rank = (sizes[n] for n in ("rows", "inner", "out", "rank"))
    b = dtype.itemsize
    trained, run = _cp(**sizes, dtype=dtype)
    merges = dtype != torch.bfloat16 and not sizes.get("dropout") and merge_pays(rows, inner, out, rank, True)
    assert merges == (form.startswith("merged") and dtype != torch.bfloat16)
    h, weight, folded = rows * rank * b, out * inner * b, out * rank * b
    wide = out * rank * 4 if dtype == torch.bfloat16 else 0  # P = dy^T h is summed up in float32
    forward, backward = _both(lambda: run("reference"), trained, rows * out * b, [h])
    if sizes.get("dropout"):  # the mask's rule in int64, a few numbers of eight bytes for each of h's
        most, peaks = (
            8 * rows * rank,
            (16 * 8 * rows * rank + folded, 16 * 8 * rows * rank + folded + 5 * out * rank * b),
        )
    else:
        most = max(h, folded, wide, weight if merges else 0)
        peaks = (folded + weight * merges, h + 2 * folded + weight * merges + 4 * max(out * rank * b, wide))
    if (
        dtype == torch.bfloat16
    ):  # a CPU's products pack their operands: theirs with factors and with W, no larger than both
        most, peaks = max(most, weight + folded), tuple(p + 2 * (weight + h + folded) for p in peaks)
    for (others, peak), allowed in zip((forward, backward), peaks, strict=True):
        assert max(others, default=0) <= most + SMALL
        assert peak <= allowed + SMALL


def test_several_weights_need_no_joined_weight_and_gradient_in_plain_pytorch():
    """Forward: each product makes its own result. Backward: each incoming gradient is read where it is."""
    rows, inner, out, rank = 100, 128, 384, 16
    assert not merge_pays(rows, inner, out // 3, rank, True)
    trained, run = _cp(rows, inner, out, rank, 3, torch.float32, weights=3)
    piece = rows * out // 3 * 4
    (others, peak), (after, peak_after) = _both(
        lambda: run("reference"), trained, piece, [piece, piece, rows * rank * 4]
    )
    small = max(rows * rank, out * rank) * 4 + SMALL
    assert max(others) <= small and max(after) <= small
    assert peak <= (rows * rank + 2 * out * rank) * 4 + SMALL
    assert peak_after <= (3 * rows * rank + 6 * out * rank) * 4 + SMALL
    assert rows * out * 4 > small


@pytest.mark.parametrize("hidden", [8, 48, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapter_in_plain_pytorch_adds_numbers_of_the_bottleneck_only(dtype, hidden):
    """Forward: z, which is kept, act(z), and that beside a column of ones. Backward: those two, dL/dh and dz."""
    rows, width, b = 512, 384, dtype.itemsize
    shapes = ((rows, width), (hidden, width), (hidden,), (width, hidden), (width,))
    trained = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    low, weights = rows * (hidden + 1) * b, 4 * width * (hidden + 1) * b
    forward, backward = _both(
        lambda: F.adapter(*trained, impl="reference"), trained, rows * width * b, [rows * hidden * b]
    )
    for (others, peak), count in ((forward, 2), (backward, 4)):
        assert max(others) <= max(low, weights // 4) + SMALL
        assert peak <= count * low + weights + SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_residuals_are_added_in_place_in_plain_pytorch(dtype):
    rows, width, hidden, b = 512, 384, 8, dtype.itemsize
    shapes = ((rows, width), (hidden, width), (hidden,), (width, hidden), (width,), (rows, width), (rows, width))
    *inputs, residual, branch = (torch.randn(s).to(dtype) for s in shapes)
    step = lambda: F.adapter(*inputs, residual=(residual, branch), residual_scale=0.5, impl="reference")  # noqa: E731
    held = [step()]
    others, _ = temporaries(lambda: held.append(step()), [rows * width * b])
    assert max(others) <= max(rows * (hidden + 1), width * (hidden + 1)) * b + SMALL


@pytest.mark.parametrize("way", ["reference", "native"])
@pytest.mark.parametrize("inplace", [False, True])
def test_cp_update_adds_nothing_as_large_as_y(way, inplace):
    """Forward: y where it is not written in place, h, and V times the gain. Backward: the gradients, dL/dh and dV before it is
    weighed by the gain. (C++ takes its own packed factors from malloc, which the profiler does not see.)"""
    if way == "native" and backends.vector_bytes() == 0:
        pytest.skip("no extension")
    rows, width, rank = 1600, 384, 16
    y, x = torch.randn(rows, width), torch.randn(rows, width).requires_grad_()
    factors = [torch.randn(s).requires_grad_() for s in ((width, rank), (width, rank), (1, rank))]
    b, held = 4, []

    def step():
        held.append(F.cp_update(y, x, *factors, inplace=inplace, impl=way))

    F.cp_update(y.clone(), x, *factors, impl=way)
    h, factor = rows * rank * b, width * rank * b
    others, _ = temporaries(step, [h] if inplace else [rows * width * b, h])
    assert max(others) <= factor + SMALL
    out, grad = held[0], torch.ones(rows, width)
    sizes = [t.numel() * b for t in (x, *factors)]
    others, _ = temporaries(lambda: held.append(torch.autograd.grad(out, [x, *factors], grad)), sizes)
    assert max(others) <= max(h, factor) + SMALL


# -- C++ ---------------------------------------------------------------------------------------------------------------


def _peak_of_process(step: Callable[[], object]) -> int:
    """Bytes by which the process was largest during ``step``, over what it was before: memory of every allocator."""

    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = read("VmRSS")
    step()
    return read("VmHWM") - before


def adapter_in_cpp() -> None:
    """In a process of its own: memory that was freed and not given back would hide what is taken again."""
    torch.set_num_threads(1)
    rows, width, hidden = 40000, 256, 64
    shapes = ((rows, width), (hidden, width), (hidden,), (width, hidden), (width,))
    trained = [torch.randn(s).requires_grad_() for s in shapes]
    gate = torch.rand(rows, 4)

    def run():
        return F.adapter(*trained, gate=gate, impl="native")

    torch.autograd.grad(run(), trained, torch.ones(rows, width))  # code is memory too, once
    held: list = []
    y, z, slack = rows * width * 4, rows * hidden * 4, 2**21
    assert _peak_of_process(lambda: held.append(run())) <= y + z + z + slack
    grad = torch.ones(rows, width)
    assert _peak_of_process(lambda: held.append(torch.autograd.grad(held[0], trained, grad))) <= y + z + slack
    with torch.no_grad():
        assert _peak_of_process(lambda: held.append(run())) <= y + z + slack
    hungry = _peak_of_process(lambda: torch.nn.functional.gelu(trained[0] @ trained[1].t()) * 2.0)
    assert hungry > 2 * z, "a form with temporaries is seen"


#: Bytes of pages half used, of those that the system counts late (64 a thread), and of workspace of the library's products.
_ROUNDING = 2**19


def low_rank_in_cpp(op: str, dropout: float, threads: int) -> None:
    """cp_linear or cp_update (also in place) at 3152 x 768, R = 32, in a process of its own.

    Beside results: h, in the forward, which is kept; the factors packed, and sums of their gradients as wide: at most three
    times (K + N) R numbers, however many rows or threads; and N K where dL/dx is a product with W + dW.
    """
    torch.set_num_threads(threads)
    rows, width, rank = 3152, 768, 32
    x, u, v, gain = (torch.randn(s).requires_grad_() for s in ((rows, width), (width, rank), (width, rank), (1, rank)))
    weight, bias, trained = torch.randn(width, width), torch.randn(width), [x, u, v, gain]
    target, grad = torch.zeros(rows, width), torch.ones(rows, width)
    options = {"dropout_p": dropout, "training": True, "impl": "native"}

    def run():
        if op == "cp_linear":
            return F.cp_linear(x, weight, bias, u, v, gain, **options)
        return F.cp_update(target.detach(), x, u, v, gain, inplace=op.endswith("in place"), **options)

    torch.autograd.grad(run(), trained, grad)  # code is memory too, once
    y, low, factors = rows * width * 4, rows * rank * 4, 2 * width * rank * 4
    held: list = []
    forward = _peak_of_process(lambda: held.append(run()))
    assert forward <= (0 if op.endswith("in place") else y) + low + 3 * factors + _ROUNDING, forward
    merged = width * width * 4 if op == "cp_linear" and dropout == 0 else 0
    backward = _peak_of_process(lambda: held.append(torch.autograd.grad(held[0], trained, grad)))
    assert backward <= y + merged + low + 3 * factors + _ROUNDING, backward
    with torch.no_grad():
        added = _peak_of_process(lambda: held.append(target + (x @ u) @ v.t()))
    assert added > y + y // 2, "a temporary as large as y is seen"


def _in_a_process(call: str) -> None:
    try:
        backends.resolve("adapter", "native", torch.empty(1))
        Path("/proc/self/clear_refs").write_text("5")
    except (RuntimeError, OSError) as e:
        pytest.skip(f"{e}")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    # malloc maps what is large and gives it back: what was freed before is no room for what is counted
    settings = {"PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", f"import test_temporary_memory as t; t.{call}"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_adapter_in_cpp_adds_one_m_by_h_at_most():
    """Beside results, forward and backward, in whatever memory: blocks of rows stay in buffers of a thread's own."""
    _in_a_process("adapter_in_cpp()")


@pytest.mark.parametrize("op", ["cp_linear", "cp_update", "cp_update in place"])
def test_a_low_rank_update_in_cpp_adds_h_and_factors_at_most(op):
    _in_a_process(f"low_rank_in_cpp({op!r}, 0.0, 1); t.low_rank_in_cpp({op!r}, 0.1, 2)")


@pytest.mark.parametrize("weights", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cp_linear_by_name_in_cpp_allocates_nothing_as_large_as_y(dtype, weights):
    """What torch's allocator sees: results, h, V times the gain, and sums of the factors' gradients in float32, one weight's
    beside the total. (float16 is widened.)"""
    if backends.vector_bytes() == 0:
        pytest.skip("no extension")
    rows, inner, out, rank = 100, 128, 384, 16
    trained, run = _cp(rows, inner, out, rank, 3, dtype, weights=weights)
    b, piece = dtype.itemsize, rows * out // weights * dtype.itemsize
    kept = [*[piece] * (weights - 1), rows * rank * b]
    (others, peak), (after, peak_after) = _both(lambda: run("native"), trained, piece, kept)
    packed = (inner + out) * inner * b if dtype == torch.bfloat16 else 0  # a CPU's products pack their operands
    factors = (inner + out) * rank * 4
    assert max(others, default=0) <= max(factors, packed) + SMALL
    assert max(after) <= max(factors, packed) + SMALL
    assert peak <= 2 * factors + packed + SMALL and peak_after <= 4 * factors + packed + SMALL


# -- the kernels' host code --------------------------------------------------------------------------------------------


@pytest.fixture
def card():
    pytest.importorskip("triton")
    pytest.importorskip("timm")
    from benchmarks.launches import HOPPER, Ledger, on_a_card

    with on_a_card(HOPPER), Ledger(forms_only=True):  # a CPU's products pack their operands, a card's do not
        yield HOPPER


def _partials(card, columns: int, rank: int, read: int) -> int:
    """Bytes of the first stage's sums of a (columns, rank) gradient, at most, made from ``read`` bytes."""
    return max(read // 8, card.processors * 128 * rank * 4) + columns * rank * 4


CARD = {
    "one pass over dy": {"rank": 16, "out": 768, "folds": 1},
    "one pass, wider": {"rank": 32, "out": 4096, "inner": 4096, "folds": 1, "rows": 65536},
    "qkv": {"rank": 16, "out": 2304, "folds": 3},
    "qkv, dropout": {"rank": 16, "out": 2304, "folds": 3, "dropout": 0.1},
    "lora": {"rank": 16, "out": 768, "folds": 1, "gain": False},
    "wide rank": {"rank": 64, "out": 768, "folds": 1},
    "q, k, v": {"rank": 64, "out": 2304, "folds": 3, "weights": 3},
    "keys and values of several layers": {"rank": 64, "out": 3840, "folds": 5, "weights": 5},
    "library's product": {"rank": 64, "out": 4096, "inner": 4096, "folds": 1, "rows": 4096},
}


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, torch.bfloat16) for form in CARD),
        *((form, torch.float16) for form in ("qkv, dropout", "wide rank")),
        *((form, torch.float32) for form in ("one pass over dy", "wide rank")),
    ],
)
def test_cp_linear_on_a_card_adds_nothing_as_large_as_y(form, dtype, card):
    sizes = {"rows": 16384, "inner": 768} | CARD[form]
    rows, inner, out, rank = (sizes[n] for n in ("rows", "inner", "out", "rank"))
    b = dtype.itemsize
    trained, run = _cp(**sizes, dtype=dtype)
    low = rows * rank * (4 if dtype == torch.float16 else b)
    folded = out * rank * b
    (others, peak), (after, peak_after) = _both(lambda: run("triton"), trained, rows * out * b, [low])
    assert max(others, default=0) <= folded + SMALL
    assert peak <= 2 * folded + SMALL
    parts = [_partials(card, out, rank, rows * out * b), _partials(card, inner, rank, rows * inner * b)]
    assert max(after) <= max(low, *parts) + SMALL
    assert peak_after <= low + sum(parts) + 2 * out * rank * 4 + SMALL


@pytest.mark.parametrize("used", [[0], [1, 2], [0, 2]])
def test_results_without_a_gradient_cost_nothing_on_a_card(used, card):
    rows, inner, out, rank = 16384, 768, 2304, 32
    trained, run = _cp(rows, inner, out, rank, 3, torch.bfloat16, weights=3)
    ys = run("triton")
    held = [[ys[i] for i in used], trained, [torch.ones_like(ys[i]) for i in used]]
    others, peak = temporaries(lambda: held.append(torch.autograd.grad(*held)), [rows * inner * 2])
    parts = [_partials(card, n, rank, rows * n * 2) for n in (out, inner)]
    assert max(others) <= max(rows * rank * 2, *parts) + SMALL < rows * (out // 3) * 2
    assert peak <= rows * rank * 2 + sum(parts) + 4 * out * rank * 4 + SMALL


@pytest.mark.parametrize("rows", [64, 16384])
@pytest.mark.parametrize("weights", [1, 3])
def test_every_form_of_cp_linear_adds_nothing_as_large_as_y(weights, rows, card, monkeypatch):
    """Whatever the plan chooses: each form in turn, forward and backward."""
    from fastgist_kernels import cp_linear, cp_linear_bwd
    from fastgist_kernels.cp_linear_forms import FORMS, can

    inner, out, rank = 768, 2304, 16
    trained, run = _cp(rows, inner, out, rank, 3, torch.bfloat16, weights=weights)
    x, pieces = trained[0].detach(), [torch.empty(out // weights, inner, dtype=torch.bfloat16)] * weights
    low, folded = rows * rank * 2, out * rank * 2
    seen = set()
    for form in FORMS:
        for forward, module in ((True, cp_linear), (False, cp_linear_bwd)):
            operand = x if forward else torch.empty(rows, out, dtype=torch.bfloat16)
            if not can(form, operand, pieces, rank, False, forward=forward):
                continue
            monkeypatch.setattr(module, "cp_linear_form", lambda *a, form=form, **k: form)
            (others, peak), (after, peak_after) = _both(lambda: run("triton"), trained, rows * out * 2, [low])
            if forward:  # few rows: sums of ranges of K, in float32, beside a y of few rows
                parts = card.processors * 4 * 64 * 64 * 4 if form == "few" else 0
                augmented = 2 * (low + folded) if form == "blas" and weights > 1 else 0  # the biases as one more rank
                assert max(others, default=0) <= max(low, folded, parts, augmented) + SMALL, form
                assert peak <= low + 3 * folded + parts + 2 * augmented + SMALL, form
            else:
                parts = [_partials(card, n, rank, rows * n * 2) for n in (out, inner)]
                assert max(after) <= max(low, folded, *parts) + SMALL, form
                assert peak_after <= low + sum(parts) + 4 * out * rank * 4 + SMALL, form
            seen.add((form, forward))
    assert {("fused", True), ("started", True), ("blas", True), ("started", False), ("blas", False)} <= seen
    assert (("few", True) in seen) == (rows == 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("hidden", "experts"), [(4, None), (8, None), (48, 6), (64, None), (256, None)])
def test_adapter_on_a_card_adds_numbers_of_the_bottleneck_and_partial_sums(hidden, experts, dtype, card):
    rows, width, b = 16384, 768, dtype.itemsize
    shapes = [(rows, width), (hidden, width), (hidden,), (width, hidden), (width,)]
    shapes += [(rows, experts)] if experts else []
    trained = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]

    def run():
        return F.adapter(*trained[:5], gate=trained[5] if experts else None, impl="triton")

    low = rows * hidden * b
    chunked = rows * width * 4 * (dtype == torch.float32 and hidden > 64)  # hidden units in parts, collected in float32
    kept = [low] if hidden > 64 else []
    (others, peak), (after, peak_after) = _both(run, trained, rows * width * b, kept)
    assert max(others, default=0) <= chunked + SMALL
    assert peak <= chunked + SMALL
    part = max(_partials(card, width, hidden, rows * width * b), 2 * card.processors * 2 * width * 9 * 4)
    assert max(after) <= max(low, part, chunked) + SMALL
    gates = 3 * rows * (experts or 0) * 4
    assert peak_after <= 2 * low + part + chunked + gates + 2 * width * hidden * 4 + rows // 16 * (width + hidden) * 4


def _update_in_place(impl: str, rows: int, dtype: torch.dtype) -> tuple[list[int], int]:
    """What cp_update allocates when it writes over y, and its peak."""
    y, x, u, v = (torch.randn(s).to(dtype) for s in ((rows, 768), (rows, 512), (512, 16), (768, 16)))
    factors = [t.requires_grad_() for t in (u, v)]
    F.cp_update(y.clone(), x, *factors, inplace=True, impl=impl)
    return temporaries(lambda: F.cp_update(y, x, *factors, inplace=True, impl=impl), [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_update_in_place_allocates_h_alone_in_plain_pytorch(dtype):
    others, peak = _update_in_place("reference", 2000, dtype)
    assert max(others) <= 2000 * 16 * dtype.itemsize + SMALL
    assert peak <= 2 * 2000 * 16 * dtype.itemsize + SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_in_place_allocates_h_alone_on_a_card(dtype, card):
    others, peak = _update_in_place("triton", 16384, dtype)
    assert max(others) <= 16384 * 16 * dtype.itemsize + SMALL
    assert peak <= 2 * 16384 * 16 * dtype.itemsize + SMALL
