"""Temperatures and weights of the losses that change at every step of compiled code: two graphs, whatever the values."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, INTERPRETING
from every_op import PAIRS, make
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastgist import nn

NUMBERS = {
    "bidirectional_kl": ("temperature",),
    "gist_loss": ("temperature", "alpha", "beta", "label_smoothing"),
    "gist_linear_loss": ("temperature", "alpha", "beta", "label_smoothing"),
    "topk_kl": ("temperature",),
}
pytestmark = pytest.mark.kernel
once = pytest.mark.skipif(INTERPRETING, reason="the ordinary run has shown it")
each = pytest.mark.parametrize(("op", "by"), [pair for pair in PAIRS if pair[0] in NUMBERS])


def _values(name: str, count: int) -> list[float]:
    first, last = (0.05, 0.3) if name == "label_smoothing" else (0.5, 4.0)
    return torch.linspace(first, last, count, dtype=torch.float64).tolist()


def _compare_all(got, want) -> None:
    got, want = ([x] if isinstance(x, torch.Tensor) else x for x in (got, want))
    for mine, w in zip(got, want, strict=True):
        assert torch.equal(mine, w)


def _compare(got, want) -> None:
    torch.testing.assert_close(got[0], want[0])
    for mine, w in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(mine, w)


@each
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_twenty_values_take_two_graphs(op, by, reduction):
    """The first value is a constant; the next ones are one graph. All numbers move at once, T^2 among them."""
    call = make(op)
    call.options = {"reduction": reduction, "t_squared": True}
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda v, numbers: call(*v, impl=by, **numbers), fullgraph=True, backend=counter)
    columns = [_values(name, 20) for name in NUMBERS[op]]
    with torch._dynamo.config.patch(recompile_limit=3):
        for values in zip(*columns, strict=True):
            numbers = dict(zip(NUMBERS[op], values, strict=True))
            want = call.run(lambda *v, n=numbers: call(*v, impl=by, **n))
            _compare(call.run(lambda *v, n=numbers: compiled(v, n)), want)
    assert counter.frame_count == 2


@each
def test_a_number_that_stays_is_a_constant(op, by):
    """What is replayed as a CUDA graph has no tensor on the CPU unless a number has moved."""
    call = make(op)
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    compiled = torch.compile(lambda *v: call(*v, impl=by), fullgraph=True, backend=backend)
    for _ in range(2):
        call.run(compiled)
    assert len(seen) == 1
    assert "_moving" not in seen[0].print_readable(print_output=False)


@once
@pytest.mark.parametrize("schedule", [nn.Linear, nn.Cosine])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("head", [False, True])
def test_schedules_of_the_module(schedule, reduction, head):
    """progress moves, past both bends of the schedule."""
    beta, temperature = schedule(0.1, 0.9, 0.2, 0.8), schedule(6.0, 2.0)
    loss = nn.GistLoss(beta=beta, temperature=temperature, t_squared=True, halve=True, reduction=reduction)
    torch.manual_seed(0)
    leaves = [torch.randn(9, 37, device=DEVICE, requires_grad=True) for _ in range(2)]
    weight = torch.randn(37, 37, device=DEVICE)
    target = torch.randint(37, (9,), device=DEVICE)

    def of(*leaves):
        return loss.of_linear(*leaves, weight, None, target) if head else loss(*leaves, target)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(of, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(recompile_limit=3):
        for step in range(20):
            loss.progress = step / 19
            want, got = of(*leaves), compiled(*leaves)
            torch.testing.assert_close(got, want)
            for mine, w in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
                torch.testing.assert_close(mine, w)
    assert counter.frame_count == 2


@each
def test_opcheck_of_the_twins(op, by):
    """The operators that take tensors in the place of numbers, as the compiler is told of them."""
    calls = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fastgist":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    call = make(op)
    with Seen():
        call.run(impl=by)
    assert calls
    for raw, args in calls:
        twin = getattr(torch.ops.fastgist, f"{raw._opname}_moving").default
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        given = [torch.tensor(a, dtype=torch.float64) if isinstance(a, float) else a for a in args]
        _compare_all(twin(*given), raw(*args))
        torch.library.opcheck(twin, tuple(given))


@once
@pytest.mark.parametrize("op", NUMBERS)
def test_a_number_that_moves_is_checked(op):
    call = make(op)
    torch._dynamo.reset()
    compiled = torch.compile(lambda number, *v: call(*v, temperature=number), backend="eager")
    call.options = {k: v for k, v in call.options.items() if k != "temperature"}
    for good in (1.0, 2.0, 3.0):
        call.run(lambda *v, n=good: compiled(n, *v))
    for bad in (0.0, -1.0, float("inf"), float("nan"), 1e-310):
        with pytest.raises(ValueError, match=f"{op}: temperature must be finite and > 0"):
            compiled(bad, *call.values())


@once
@pytest.mark.parametrize("op", NUMBERS)
def test_a_tensor_is_no_number(op):
    """Not even one on the CPU: whether it may be read is for the caller to know."""
    call = make(op)
    call.options = {k: v for k, v in call.options.items() if k not in NUMBERS[op]}
    for name in NUMBERS[op]:
        with pytest.raises(TypeError, match=f"{op}: {name} must be a (Python )?number.*got"):
            call(*call.values(), **{name: torch.tensor(0.5)})
