"""torch.compile(fullgraph=True), autocast, checkpointing, deterministic mode and opcheck, for all operations."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, INTERPRETING
from every_op import PAIRS, make
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastgist import functional  # noqa: F401  (defines the raw ops)
from fastgist.backends import OPS

pytestmark = pytest.mark.kernel
every = pytest.mark.parametrize(("op", "by"), PAIRS)


def _same(ours, want) -> None:
    assert torch.equal(ours[0], want[0])
    for mine, w in zip(ours[1], want[1], strict=True):
        assert torch.equal(mine, w)


@every
def test_fullgraph(op, by):
    """One graph, forward and backward, the same numbers. aot_eager runs the traced graph with the ops' own kernels."""
    call = make(op)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *v: call(*v, impl=by), fullgraph=True, backend="aot_eager")
    want, got = call.run(impl=by), call.run(compiled)
    torch.testing.assert_close(got[0], want[0])
    for mine, w in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(mine, w)


@every
def test_an_evaluation_compiles(op, by):
    """With gradients off, parameters requiring them: torch takes another way through a Function then."""
    call = make(op)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *v: call(*v, impl=by), fullgraph=True, backend="aot_eager")
    values = call.values()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*values), call(*values, impl=by))


@every
def test_fullgraph_with_other_row_counts(op, by):
    """A second shape makes dimensions symbolic, and that graph serves all others: forward and backward."""
    torch._dynamo.reset()
    shared, graphs = make(op), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *v: shared(*v, impl=by), fullgraph=True, backend=graphs)
    for rows in (9, 14, 5, 21):
        call = make(op, rows=rows)
        got, want = call.run(compiled), call.run(impl=by)
        torch.testing.assert_close(got[0], want[0])
        for mine, w in zip(got[1], want[1], strict=True):
            torch.testing.assert_close(mine, w)
    assert graphs.frame_count == 2


@pytest.mark.parametrize(
    ("op", "by"), [(op, by) for op, by in PAIRS if op in ("bidirectional_kl", "gist_loss", "gist_linear_loss")]
)
def test_fullgraph_with_one_tensor_for_both_sides(op, by):
    torch._dynamo.reset()
    call = make(op)
    first, _, *rest = call.tensors

    def loss(x, *rest):
        return call(x, x, *rest, impl=by)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = [call.tensors[name] for name in rest]
    found = []
    for function in (loss, compiled):
        x = call.tensors[first].clone().requires_grad_()
        out = function(x, *values)
        found.append((out.detach(), *torch.autograd.grad(out, x)))
    torch.testing.assert_close(found[1], found[0])


#: op -> its numeric options, which a training schedule or a second model changes.
NUMBERS = {
    "bidirectional_kl": ("temperature",),
    "gist_loss": ("temperature", "alpha", "beta"),
    "gist_linear_loss": ("temperature", "alpha", "beta"),
    "topk_kl": ("temperature",),
    "cp_linear": ("scale",),
    "cp_update": ("scale",),
    "adapter": ("scale", "residual_scale"),
    "gelu": (),
}


@every
def test_fullgraph_with_other_numbers(op, by):
    """A number that changes becomes symbolic to the compiler; it must still be checked and used."""
    torch._dynamo.reset()
    call = make(op)
    call.options = {}
    compiled = torch.compile(
        lambda number, *v: call(*v, impl=by, **dict.fromkeys(NUMBERS[op], number)), fullgraph=True, backend="aot_eager"
    )
    for number in (1.0, 0.5, 0.25):
        eager = call.run(lambda *v, n=number: call(*v, impl=by, **dict.fromkeys(NUMBERS[op], n)))
        got = call.run(lambda *v, n=number: compiled(n, *v))
        torch.testing.assert_close(got[0], eager[0])
        for mine, w in zip(got[1], eager[1], strict=True):
            torch.testing.assert_close(mine, w)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="the ordinary run has shown it")
@pytest.mark.parametrize("op", ["gist_loss", "cp_linear", "cp_update"])
def test_inductor(op):
    call = make(op)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *v: call(*v), fullgraph=True)
    try:
        got = call.run(compiled)
    except Exception as e:
        if "compiler" in str(e).lower() and "InvalidCxxCompiler" in type(e).__name__ + str(e):
            pytest.skip("no C++ compiler for inductor")
        raise
    want = call.run()
    torch.testing.assert_close(got[0], want[0])
    for mine, w in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(mine, w)


@every
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast(op, by, narrow):
    """Layers run in autocast's dtype as nn.Linear does, losses give float32; gradients come in the leaves' dtype."""
    call = make(op)
    want, want_grads = call.run(impl=by)

    def cast(*values):
        with torch.autocast(DEVICE, dtype=narrow):
            return call(*values, impl=by)

    out, grads = call.run(cast)
    assert out.dtype == (narrow if op in ("cp_linear", "adapter") else torch.float32)
    torch.testing.assert_close(out.float(), want, rtol=3e-2, atol=3e-2)
    for grad, w in zip(grads, want_grads, strict=True):
        assert grad.dtype == torch.float32
        assert float((grad - w).norm() / w.norm()) < 3e-2


@every
def test_autocast_under_fullgraph(op, by):
    call = make(op)
    torch._dynamo.reset()

    def cast(*values):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return call(*values, impl=by)

    compiled = torch.compile(cast, fullgraph=True, backend="aot_eager")
    want, got = call.run(cast), call.run(compiled)
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got[0], want[0])


def _trained(call, function):
    """(result, gradients) by backward(), which reentrant checkpointing asks for."""
    values = call.values()
    out = function(*values)
    out.backward(torch.linspace(0.5, 1.5, out.numel(), device=out.device).reshape(out.shape).to(out.dtype))
    return out.detach(), [leaf.grad for leaf in call.wanted(values)]


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(op, by, reentrant):
    call = make(op)
    again = _trained(call, lambda *v: checkpoint(lambda *w: call(*w, impl=by), *v, use_reentrant=reentrant))
    _same(again, call.run(impl=by))


@pytest.mark.parametrize(("op", "by"), [pair for pair in PAIRS if pair[0] in ("cp_linear", "cp_update")])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_sees_one_dropout_mask(op, by, reentrant):
    call = make(op)

    def dropped(*values):
        return call(*values, impl=by, dropout_p=0.4, training=True)

    torch.manual_seed(3)
    want = call.run(dropped)
    torch.manual_seed(3)
    _same(_trained(call, lambda *v: checkpoint(dropped, *v, use_reentrant=reentrant)), want)


@pytest.mark.skipif(INTERPRETING, reason="the ordinary run has shown it")
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(op):
    """Shapes without data, as tools that plan memory use them."""
    call = make(op)
    out = call(*(None if t is None else t.to("meta") for t in call.values(grad=False)))
    assert out.is_meta
    assert out.shape == call(*call.values(grad=False)).shape


@pytest.mark.skipif(INTERPRETING, reason="the ordinary run has shown it")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_export(op, strict):
    """torch.export of a model whose parameters require grad, in both of its modes."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.call = make(op)
            values = self.call.values(grad=False)
            names = list(self.call.tensors)
            self.rest = torch.nn.ParameterDict(
                {n: torch.nn.Parameter(v) for n, v in zip(names[1:], values[1:], strict=True) if n in self.call.leaves}
            )
            self.fixed = {n: v for n, v in zip(names[1:], values[1:], strict=True) if n not in self.call.leaves}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = [self.rest[n] if n in self.rest else self.fixed[n] for n in list(self.call.tensors)[1:]]
            return self.call(x, *values)

    model, x = Model().eval(), make(op).values(grad=False)[0]
    exported = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,), strict=strict).module()(x), model(x))


@every
def test_a_gradient_penalty_is_no_silent_constant(op, by):
    """A second derivative asked for by torch.autograd.grad, whose engine skips what is on no path to its inputs."""
    call = make(op)
    values = call.values()
    first = call.wanted(values)[0]
    with pytest.raises(RuntimeError, match=f"{op}: no second derivative"):
        torch.autograd.grad(call(*values, impl=by).sum(), first, create_graph=True)


@every
def test_deterministic_mode(op, by):
    call = make(op)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = call.run(impl=by), call.run(impl=by)
    finally:
        torch.use_deterministic_algorithms(False)
    _same(first, again)


class _RawOps(TorchDispatchMode):
    """Collects every call of a raw op that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastgist":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def _raw_calls(op: str, by: str) -> list:
    with _RawOps() as seen:
        call = make(op)
        call.run(impl=by)
        if op == "cp_update":
            call.run(lambda y, *rest: call(y * 1.0, *rest, impl=by, inplace=True))
    assert seen.calls, f"{op} called no raw op: nothing was checked"
    return seen.calls


def _detached(args):
    return tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)


@every
def test_opcheck(op, by):
    for raw, args in _raw_calls(op, by):
        torch.library.opcheck(raw, _detached(args))


@every
def test_a_raw_op_refuses_what_requires_grad(op, by):
    for raw, args in _raw_calls(op, by):
        leaves = tuple(
            a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in _detached(args)
        )
        if raw._schema.is_mutable:  # nothing that it returns could raise in a backward
            with pytest.raises(
                RuntimeError, match=rf"computes without autograd.*fastgist\.functional\.{op} for gradients"
            ):
                raw(*leaves)
            continue
        results = raw(*leaves)
        with pytest.raises(RuntimeError, match=rf"computes without autograd.*fastgist\.functional\.{op} for gradients"):
            sum(r.sum() for r in pytree.tree_leaves(results)).backward()
        with torch.no_grad():
            assert not any(r.requires_grad for r in pytree.tree_leaves(raw(*leaves)))


def test_raw_ops_go_past_the_dispatcher_only_where_nobody_listens():
    from fastgist.ops._common import _nobody_listens

    x, seen = torch.ones(2), []
    assert not _nobody_listens((x, None, 1.0)), "gradients are on: a raw op would drop them"
    with torch.no_grad():
        assert _nobody_listens((x, torch.nn.Parameter(x), None, 1.0))
        with _RawOps():
            assert not _nobody_listens((x,))
        torch.func.vmap(lambda row: seen.append(_nobody_listens((x,))) or row)(x)
        torch.jit.trace(lambda t: seen.append(_nobody_listens((t,))) or t + 1, (x,), check_trace=False)
        with torch._subclasses.FakeTensorMode():
            fake = torch.empty(2)
        seen.append(_nobody_listens((fake,)))
        seen.append(_nobody_listens((torch.randn(2, dtype=torch.cfloat).conj().imag,)))  # its memory is the negative
        assert _nobody_listens((torch.ones(3, 2).t(), torch.ones(4)[1:], torch.ones(2).bfloat16()))
    assert seen == [False] * 4


def test_a_batch_of_gradients_is_seen_by_the_dispatcher():
    """torch.autograd.functional's vectorize is torch's older vmap, whose batches look like ordinary tensors."""
    from fastgist.ops._common import _nobody_listens

    seen = []

    class Listening(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(_nobody_listens((x,)))
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            seen.append(_nobody_listens((grad,)))
            return grad

    torch.autograd.functional.jacobian(Listening.apply, torch.randn(3), vectorize=True)
    assert seen == [True, False]


def test_every_raw_op_was_reached():
    """opcheck saw each op of the library: one added later must be reachable from a public function above."""
    names = {
        n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastgist::")
    }
    # Of no public function: tests/test_first_block.py and tests/test_step.py check them.
    names -= {"attention_lse", "sum_of_products"}
    missing = [n for n in names if not n.startswith(OPS)]
    assert not missing, f"raw ops that belong to no operation: {missing}"
    reached = {raw._opname for op, by in PAIRS for raw, _ in _raw_calls(op, by)}
    # An implementation that finishes gradients in its forward has no backward op to call; the others reach it.
    # The twins that take moving numbers are reached in compiled code alone: tests/test_moving_numbers.py.
    names = {n.removesuffix("_moving") for n in names}
    unreached = {n for n in names - reached if not n.endswith("_bwd")}
    assert not unreached, f"raw ops that no public function calls here: {unreached}"
