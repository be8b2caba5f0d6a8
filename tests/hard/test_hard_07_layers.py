"""Hard case 7 for the operations of layers: no gradient is computed in vain, counted where it would be; and a second backward,
and a second derivative, of what every_op.py calls variants."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from conftest import implementations
from every_op import VARIANTS, variants
from torch.utils._python_dispatch import TorchDispatchMode

from fastgist import functional

OP = "cp_linear"
pytestmark = pytest.mark.kernel
M, K, N, R = 12, 40, 64, 5
#: FLOPs of a product of the rows with a (K, N), a (K, R) and an (N, R) matrix.
BASE, OF_X, OF_Y = 2 * M * K * N, 2 * M * K * R, 2 * M * N * R


def _wanted(names):
    return [set(some) for count in range(len(names) + 1) for some in itertools.combinations(names, count)]


class _Products(TorchDispatchMode):
    """FLOPs of PyTorch's products (torch's counter leaves out those in place), and which results the kernels in C++ were asked
    for: places among those of adapter_bwd, dL/dx first."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.asked = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        if str(func).startswith("fastgist_native.adapter_bwd"):
            self.asked.append({i for i, t in enumerate(args[-8:]) if t is not None})
        return func(*args, **(kwargs or {}))


@pytest.fixture
def spied(monkeypatch):
    """Runs a step; gives FLOPs of PyTorch's products in its backward, what C++ was asked for, and Triton's launcher."""

    def run(op, impl, given, trained, call):
        module = importlib.import_module(f"fastgist.ops.{op}")
        products, launched = _Products(), []

        def counted(*args):
            with products:
                return module._bwd(*args)

        monkeypatch.setattr(module, "_bwd_op", counted)
        if impl == "triton":
            name = {"cp_linear": "cp_linear_bwd", "cp_update": "cp_update", "adapter": "adapter_bwd"}[op]
            kernels = importlib.import_module(f"fastgist_kernels.{name}")
            real = getattr(kernels, f"{op}_bwd")
            monkeypatch.setattr(kernels, f"{op}_bwd", lambda *a: (launched.append(a), real(*a))[1])
        leaves = [given[name].requires_grad_() for name in given if name in trained]
        for name in given.keys() - trained:
            given[name].requires_grad_(False)
        out = call(impl)
        if leaves:
            torch.autograd.grad(out.sum(), leaves)
        results = 8 if op == "adapter" else 4
        written = [{i for i, t in enumerate(args[-results:]) if t is not None} for args in launched]
        return products.flops, products.asked, written

    return run


def _factors(device):
    return [torch.randn(s, device=device) for s in ((K, R), (N // 2, R), (2, R))]


@pytest.mark.parametrize("base", [False, True])
def test_cp_linear_computes_nothing_in_vain(impl, device, spied, base):
    """``base``: the base weight is trained as well."""
    x, weight = torch.randn(M, K, device=device), torch.randn(N, K, device=device)
    given = dict(zip(("x", "weight", "u", "v", "gain"), (x, weight, *_factors(device)), strict=True))

    def call(impl):
        return functional.cp_linear(x, weight, None, *list(given.values())[2:], scale=0.5, impl=impl)

    for trained in _wanted(("x", "u", "v", "gain")):
        through_h, outer = trained & {"x", "u"}, trained & {"v", "gain"}
        some = trained | ({"weight"} if base else set())
        flops, asked, written = spied("cp_linear", impl, given, some, call)
        products = BASE * (("x" in trained) + base)
        if impl == "reference":
            products += OF_Y * bool(through_h) + OF_X * ("x" in trained) + OF_X * ("u" in trained) + OF_Y * bool(outer)
        if impl != "triton":
            assert flops == products, some
        places = {place for name, place in (("x", 0), ("u", 1), ("v", 3), ("gain", 3)) if name in trained}
        assert asked == ([places] if impl == "native" and trained else []), some
        order = ("x", "u", "v", "gain")
        assert written == ([{order.index(n) for n in trained}] if impl == "triton" and trained else []), some


@pytest.mark.op("cp_update")
def test_cp_update_computes_nothing_in_vain(impl, device, spied):
    y, x = torch.randn(M, N, device=device), torch.randn(M, K, device=device)
    given = dict(zip(("y", "x", "u", "v", "gain"), (y, x, *_factors(device)), strict=True))

    def call(impl):
        return functional.cp_update(*given.values(), scale=0.5, impl=impl)

    for trained in _wanted(("y", "x", "u", "v", "gain")):
        through_h, outer, low = trained & {"x", "u"}, trained & {"v", "gain"}, trained - {"y"}
        flops, asked, written = spied("cp_update", impl, given, trained, call)
        products = OF_Y * bool(through_h) + OF_X * ("x" in trained) + OF_X * ("u" in trained) + OF_Y * bool(outer)
        if impl != "triton":
            assert flops == (products if impl == "reference" else 0), trained
        places = {place for name, place in (("x", 0), ("u", 1), ("v", 3), ("gain", 3)) if name in trained}
        assert asked == ([places] if impl == "native" and low else []), trained
        order = ("x", "u", "v", "gain")
        assert written == ([{order.index(n) for n in low}] if impl == "triton" and low else []), trained


@pytest.mark.op("adapter")
def test_adapter_computes_nothing_in_vain(impl, device, spied):
    shapes = {"x": (M, N), "down": (R, N), "down_bias": (R,), "up": (N, R), "up_bias": (N,)}
    given = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}

    def call(impl):
        return functional.adapter(*given.values(), scale=0.5, impl=impl)

    for trained in _wanted(tuple(given)):
        flops, asked, written = spied("adapter", impl, given, trained, call)
        products = (
            OF_Y * bool(trained & {"x", "down", "down_bias"}) + OF_Y * ("x" in trained) + OF_Y * ("down" in trained)
        )
        products += OF_Y * ("up" in trained) + 2 * M * N * ("up_bias" in trained)
        if impl != "triton":
            assert flops == (products if impl == "reference" else 0), trained
        places = {list(given).index(name) for name in trained}
        assert asked == ([places] if impl == "native" and trained else []), trained
        assert written == ([places] if impl == "triton" and trained else []), trained


@pytest.mark.parametrize("by", [i for i in implementations("cp_linear") if i != "triton"])
def test_of_several_weights_each_is_asked_for_what_is_wanted(by, spied, device):
    weights = [torch.randn(n, K, device=device) for n in (16, 0, 32, 16)]
    x, u, v, gain = (
        torch.randn(M, K, device=device),
        *(torch.randn(s, device=device) for s in ((K, R), (16, R), (4, R))),
    )
    given = {"x": x, "u": u, "v": v, "gain": gain}

    def call(impl):
        return torch.cat(functional.cp_linear(x, weights, None, u, v, gain, impl=impl), -1)

    for trained in _wanted(tuple(given)):
        through_h, outer = trained & {"x", "u"}, trained & {"v", "gain"}
        flops, asked, _ = spied("cp_linear", by, given, trained, call)
        products = BASE * ("x" in trained)
        if by == "reference":
            products += OF_Y * bool(through_h) + OF_X * ("x" in trained) + OF_X * ("u" in trained) + OF_Y * bool(outer)
            assert asked == []
        else:
            later = ({1} if "u" in trained else set()) | ({3} if outer else set())
            first = later | ({0} if "x" in trained else set())
            assert asked == [places for places in (first, later, later) if places], trained
        assert flops == products, trained


@pytest.mark.parametrize(("op", "by", "variant"), VARIANTS)
def test_second_backward_and_double_backward(op, by, variant):
    call = variants(op)[variant]
    values = call.values()
    leaves = call.wanted(values)
    loss = call(*values, impl=by).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match=f"{op}: no second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)
