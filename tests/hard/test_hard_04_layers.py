"""Hard case 4, layouts, for the operations of layers: gains, biases, and incoming gradients whose elements are one."""

from __future__ import annotations

from collections.abc import Iterator

import adapters
import pytest
import test_cp_linear as linear
import torch
import updates as update
from every_op import LAYERS, PAIRS
from torch import Tensor

OP = "cp_linear"
pytestmark = pytest.mark.kernel
WAYS = [(op, impl) for op, impl in PAIRS if op in LAYERS]


def inputs_of(op: str, device: torch.device) -> dict[str, Tensor]:
    if op == "adapter":
        return adapters.case(21, 40, 8, experts=2, device=device)
    module = {"cp_linear": linear, "cp_update": update}[op]
    return dict(zip(module.NAMES, module.case(21, device=device), strict=True))


def check(op: str, impl: str, inputs: dict[str, Tensor], grad: Tensor, ours: dict[str, Tensor] | None = None) -> None:
    ours = inputs if ours is None else ours
    if op == "adapter":
        adapters.check(inputs, grad, impl, ours=ours, scale=0.7)
    elif op == "cp_linear":
        linear.check(list(inputs.values()), grad, impl, None, list(ours.values()), True, scale=0.7)
    else:
        update.check(list(inputs.values()), grad, impl, ours=list(ours.values()), scale=0.7)


def laid(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """``t``, a vector or a matrix, in other strides, and with one value for all of a dimension."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan, device=t.device)
    strided = wide[..., 1 : 1 + 2 * t.shape[-1] : 2]
    strided.copy_(t)
    yield "strided", strided
    joined = torch.cat((torch.full_like(t, torch.nan), t, torch.full_like(t, torch.nan)), -1)
    yield "slice of a cat", joined[..., t.shape[-1] : 2 * t.shape[-1]]
    if t.dim() == 1:
        yield "a column", torch.stack((t, torch.full_like(t, torch.nan)), 1)[:, 0]
    else:
        yield "transposed", t.t().contiguous().t()
        yield "one row", t[:1].expand(t.shape)
        yield "one column", t[:, :1].expand(t.shape)
    yield "one number", t.reshape(-1)[:1].reshape((1,) * t.dim()).expand(t.shape)


OPERANDS = {"cp_linear": ("bias", "gain"), "cp_update": ("gain",), "adapter": ("down_bias", "up_bias")}


@pytest.mark.parametrize(("op", "by", "name"), [(op, by, name) for op, by in WAYS for name in OPERANDS[op]])
@pytest.mark.parametrize("single", [False, True])
def test_gains_and_biases(op, by, name, single, device):
    """``single``: a vector, one gain for all folds and one output bias for all experts."""
    inputs = inputs_of(op, device)
    if single and inputs[name].dim() == 2:
        inputs[name] = inputs[name][0].clone()
    grad = torch.randn(21, 40 if op == "adapter" else 64, device=device)
    for layout, view in laid(inputs[name]):
        values = inputs | {name: view.clone(memory_format=torch.contiguous_format)}
        assert layout.startswith("one") or torch.equal(view, inputs[name])
        check(op, by, values, grad, values | {name: view})


@pytest.mark.parametrize(("op", "by"), WAYS)
def test_incoming_gradients_of_stride_0(op, by, device):
    """As of a sum over all, over rows, over columns."""
    inputs = inputs_of(op, device)
    columns = 40 if op == "adapter" else 64
    for shape in ((1, 1), (1, columns), (21, 1)):
        check(op, by, inputs, torch.randn(shape, device=device).expand(21, columns))


def test_biases_and_incoming_gradients_of_several_weights(impl, device):
    """The same of each weight by itself, whatever the others' are."""
    x, weight, bias, u, v, gain = linear.case(21, device=device)
    weights, biases = list(weight.split(32)), list(bias.split(32))
    views = [[view for _, view in laid(b)] for b in biases]
    for i in range(len(views[0])):
        given = [views[0][i], views[1][-1 - i]]
        leaves = [t.detach().requires_grad_() for t in (x, u, v, gain)]
        grads = [torch.randn(1, 32, device=device).expand(21, 32), torch.randn(1, 1, device=device).expand(21, 32)]
        ys = linear.cp_linear(leaves[0], weights, given, *leaves[1:], impl=impl)
        found = torch.autograd.grad(ys, leaves, grads)
        whole = (x, weight, torch.cat(given), u, v, gain)
        wanted, grad = [True, False, False, True, True, True], torch.cat(grads, 1)
        y, plain = linear.evaluate(linear.plain, whole, wanted, grad)
        exact_y, exact = linear.evaluate(linear.formula, [t.double() for t in whole], wanted, grad)
        _, terms = linear.evaluate(linear.formula, [t.double().abs() for t in whole], wanted, grad.abs())
        linear.assert_within_budget(torch.cat(ys, 1).detach(), y, exact_y)
        some = [j for j, w in enumerate(wanted) if w]
        for j, mine in zip(some, found, strict=True):
            scale = float(terms[j].max())
            linear.assert_within_budget(mine, plain[j], exact[j], what=linear.NAMES[j], scale=scale)
