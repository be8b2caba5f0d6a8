"""What broke the losses from a caller's side: batches of gradients, compiled counts, arguments of other kinds."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from fastgist import functional as F

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is done by looking at numbers, on CPUs alone")
ROWS, CLASSES, WIDTH = 6, 17, 5
DRAW = torch.Generator().manual_seed(1)
OTHER, HEAD = torch.randn(ROWS, CLASSES, generator=DRAW), torch.randn(CLASSES, WIDTH, generator=DRAW)
LOG_PROBS, INDICES = OTHER.log_softmax(-1).topk(4)
OPS = ("bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl")


def call(op: str, x: Tensor, **options) -> Tensor:
    """``op`` of ``x``: logits (ROWS, CLASSES), of which gist_linear_loss takes the first columns for its hidden states."""
    target = options.pop("target", INDICES[:, 0])
    if op == "bidirectional_kl":
        return F.bidirectional_kl(x, OTHER, **options)
    if op == "gist_loss":
        return F.gist_loss(x, OTHER, target, **options)
    if op == "topk_kl":
        return F.topk_kl(x, LOG_PROBS, INDICES, **options)
    bias = options.pop("bias", None)
    return F.gist_linear_loss(x[:, :WIDTH], OTHER[:, :WIDTH], HEAD, bias, target, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("by", ["auto", "reference"])
def test_a_batch_of_incoming_gradients_scales_each_result(op, by):
    """torch.autograd.grad(is_grads_batched=True): the factor is several numbers that nobody may look at."""
    x = torch.randn(ROWS, CLASSES, requires_grad=True)
    factors = torch.tensor([1.0, 2.0, -0.5])
    (batched,) = torch.autograd.grad(call(op, x, impl=by), x, factors, is_grads_batched=True)
    (single,) = torch.autograd.grad(call(op, x, impl=by), x)
    torch.testing.assert_close(batched, factors[:, None, None] * single)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", [int, float])
def test_a_count_of_tokens_is_no_constant_of_a_compiled_graph(op, kind):
    """Another number in every step: without it torch gives up after eight."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, n: call(op, x, divisor=n), fullgraph=True, backend=counter)
    x = torch.randn(ROWS, CLASSES)
    for tokens in range(7, 12):
        given = kind(tokens) + (0.5 if kind is float else 0)
        torch.testing.assert_close(compiled(x, given), call(op, x, divisor=given))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["divisor", "temperature"])
@pytest.mark.parametrize("kind", [np.int64, np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(op, name, kind):
    x = torch.randn(ROWS, CLASSES)
    assert torch.equal(call(op, x, **{name: kind(6)}), call(op, x, **{name: 6.0}))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("divisor", "error", "message"),
    [
        ("8", TypeError, "divisor must be a number or a Tensor, got str"),
        (True, TypeError, "divisor must be a number or a Tensor, got bool"),
        (torch.tensor(True), TypeError, "divisor must be a real number, got bool"),
        (torch.tensor(6j), TypeError, "divisor must be a real number, got complex64"),
        (torch.ones((), requires_grad=True), ValueError, "divisor gets no gradient; detach it"),
    ],
)
def test_what_no_mean_divides_by(op, divisor, error, message):
    with pytest.raises(error, match=f"^{op}: {message}"):
        call(op, torch.randn(ROWS, CLASSES), divisor=divisor)


@pytest.mark.parametrize("op", ["gist_loss", "gist_linear_loss"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": None}, "alpha must be a number, got NoneType"),
        ({"beta": "2"}, "beta must be a number, got str"),
        ({"alpha": torch.tensor(2.0)}, "alpha must be a number, got Tensor"),
        ({"label_smoothing": "0.1"}, "label_smoothing must be a number, got str"),
        ({"ignore_index": 3.5}, "ignore_index must be an integer, got float"),
        ({"ignore_index": None}, "ignore_index must be an integer, got NoneType"),
        ({"target": [0] * ROWS}, "target must be a Tensor, got list"),
        ({"target": np.zeros(ROWS, dtype=np.int64)}, "target must be a Tensor, got ndarray"),
        (
            {"target": torch.ones(ROWS, CLASSES).to(torch.float8_e4m3fn)},
            "target must be float32, float64, bfloat16 or float16, got float8_e4m3fn",
        ),
    ],
)
def test_options_of_another_kind_are_named(op, options, message):
    with pytest.raises(TypeError, match=f"^{op}: {message}"):
        call(op, torch.randn(ROWS, CLASSES), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_rows": 2.5}, "chunk_rows must be an integer, got float"),
        ({"chunk_rows": "4"}, "chunk_rows must be an integer, got str"),
        ({"memory_budget": "1GiB"}, "memory_budget must be an integer, got str"),
        ({"bias": 3.0}, "bias must be a Tensor, got float"),
    ],
)
def test_what_a_head_and_its_chunks_are_made_of(options, message):
    with pytest.raises(TypeError, match=f"^gist_linear_loss: {message}"):
        call("gist_linear_loss", torch.randn(ROWS, CLASSES), **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("temperature", [1e-39, 1e-310, 1e-38, 1e-20, 2e19, 1e300])
def test_a_temperature_whose_square_or_inverse_overflows_is_refused(op, temperature):
    """It used to give NaN, and one whose square does NaN or 0."""
    message = "temperature must be finite and > 0, and its square and that of its inverse finite in float32, got "
    with pytest.raises(ValueError, match="^" + re.escape(f"{op}: {message}{temperature}")):
        call(op, torch.randn(ROWS, CLASSES), temperature=temperature)


def test_float64_takes_temperatures_that_float32_does_not():
    assert F.bidirectional_kl(OTHER.double(), OTHER.double() + 1, temperature=1e-40) == 0
    with pytest.raises(ValueError, match="that of its inverse finite in float64, got 1e-309"):
        F.bidirectional_kl(OTHER.double(), OTHER.double(), temperature=1e-309)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("by", ["auto", "reference"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "jacrev", "jacfwd", "hessian"])
def test_transforms_of_functions_are_refused_by_name_and_taken_by_the_formula(op, by, transform):
    """torch's own error was about how to write an autograd.Function."""
    x = torch.randn(2, ROWS, CLASSES) if transform == "vmap" else torch.randn(ROWS, CLASSES)

    def run(loss):
        if transform == "jvp":
            return torch.func.jvp(loss, (x,), (x,))
        return getattr(torch.func, transform)(loss)(x)

    message = f"{op}: no rule for torch.func's transforms"
    with pytest.raises(RuntimeError, match="^" + re.escape(message)) as error:
        run(lambda y: call(op, y, impl=by))
    assert f"fastgist.reference.{op}.{op} is" in str(error.value)
    formula = getattr(importlib.import_module(f"fastgist.reference.{op}"), op)
    target = INDICES[:, 0]
    formulas = {
        "bidirectional_kl": lambda y: formula(y, OTHER),
        "gist_loss": lambda y: formula(y, OTHER, target),
        "gist_linear_loss": lambda y: formula(y[:, :WIDTH], OTHER[:, :WIDTH], HEAD, None, target),
        "topk_kl": lambda y: formula(y, LOG_PROBS, INDICES),
    }
    results = run(formulas[op])
    assert all(bool(t.isfinite().all()) for t in (results if isinstance(results, tuple) else (results,)))
