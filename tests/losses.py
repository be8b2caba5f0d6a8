"""What the tests of the three losses share: evaluating one loss with its gradients, and logits of many shapes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastgist.testing import assert_within_budget, layouts


def layout_pairs(a: Tensor, b: Tensor) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """Two tensors in memory layouts: every combination, or, where kernels are interpreted (slowly), each layout of each."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        return itertools.product(layouts(a), layouts(b))
    of_b = list(layouts(b))
    return zip(layouts(a), of_b[1:] + of_b[:1], strict=True)


def evaluate(
    loss: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor | None = None, **options
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of ``inputs`` where ``wanted``; ``grad`` is the incoming gradient."""
    leaves = [x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
    out = loss(*leaves, **options)
    if any(wanted):
        out.backward(torch.ones_like(out) if grad is None else grad.to(out.dtype))
    return out.detach(), [leaf.grad for leaf in leaves]


def _sides(z: Tensor, other: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and |d| of the rows, with d about the rows' maxima as the kernels take it; absent classes count 0."""
    u, v = (x.double().flatten(0, -2).div(temperature) for x in (z, other))
    d = ((u - u.amax(-1, keepdim=True)) - (v - v.amax(-1, keepdim=True))).nan_to_num(0.0, 0.0, 0.0)
    return u.softmax(-1).nan_to_num(0.0), v.softmax(-1).nan_to_num(0.0), d


def loss_terms(z: Tensor, other: Tensor, temperature: float) -> float:
    """The sum of absolute terms in a row's divergence, sum (p + q) |d|, averaged over the rows."""
    p, q, d = _sides(z, other, temperature)
    return float(((p + q) * d.abs()).sum(-1).mean())


def gradient_terms(z: Tensor, other: Tensor, temperature: float) -> float:
    """The largest sum of absolute terms in a gradient of the row divergence: (p (|d| + |E_p d|) + p + q) / T. Where the
    terms cancel, they and not the small difference say what float32 can hold."""
    p, q, d = _sides(z, other, temperature)
    sides = (w * (d.abs() + (w * d).sum(-1, keepdim=True).abs()) + p + q for w in (p, q))
    return max(float(side.max()) for side in sides) / temperature


def assert_same(a: Tensor, b: Tensor) -> None:
    """The same numbers: bitwise on a CPU. On a GPU other strides, or other gradients asked for, are another compilation, which
    may contract other products and sums: the same but for a few units in the last place."""
    if a.is_cuda:
        few = 8 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=few, atol=few * float(b.abs().max()), equal_nan=True)
    else:
        assert torch.equal(a, b)


def on_every_device(evaluate_plain: Callable, *tensors):
    """``evaluate_plain(*tensors)``, once where the tensors are and, for tensors on a GPU, once more on the CPU: a list."""
    results = [evaluate_plain(*tensors)]
    if any(t.is_cuda for t in tree_leaves(tensors) if isinstance(t, Tensor)):
        results.append(evaluate_plain(*tree_map_only(Tensor, Tensor.cpu, tensors)))
    return results


def in_other_orders(run: Callable, inputs: Sequence[Tensor], options: dict) -> list[tuple[Tensor, list[Tensor | None]]]:
    """``run(inputs, options)`` -> (loss, gradients) with the classes in three orders, the gradients in the first one. Another
    order of summation is another sample of what plain arithmetic errs by, and of one number's error one says little."""
    classes = inputs[0].shape[-1]
    found = [run(inputs, options)]
    whole = torch.arange(classes, device=inputs[0].device)
    for order in (whole.flip(0), whole.roll(classes // 2)):
        back = order.argsort()
        moved = dict(options)
        target = options.get("target")
        if target is not None:
            soft = target.is_floating_point()
            known = (target >= 0) & (target < classes) if not soft else None
            moved["target"] = (
                target[..., order] if soft else torch.where(known, back[target.clamp(0, classes - 1)], target)
            )
        loss, grads = run([x[..., order] for x in inputs], moved)
        found.append((loss, [None if g is None else g[..., back] for g in grads]))
    return found


def check_against_float64(
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    grad: Tensor | None = None,
    scale: float | None = None,
    grad_scale: float | None = None,
    ours_options: dict | None = None,
    **options,
) -> tuple[Tensor, list[Tensor | None]]:
    """Hold ours against ``formula`` in float64, with ``formula`` in the inputs' dtype as the plain peer.

    ``scale`` and ``grad_scale``: the sums of absolute terms behind the loss and an element of the gradients.
    """
    wanted = [True] * len(inputs)
    loss, grads = evaluate(ours, inputs, wanted, grad, **options, **(ours_options or {}))

    def plainly(x, y, o):
        return in_other_orders(lambda a, k: evaluate(formula, a, wanted, y, **k), x, o)

    plain = list(itertools.chain(*on_every_device(plainly, list(inputs), grad, options)))
    plain_loss, plain_grads = [loss for loss, _ in plain], list(zip(*(grads for _, grads in plain), strict=True))
    exact_loss, exact_grads = evaluate(formula, [x.double() for x in inputs], wanted, grad, **options)
    assert_within_budget(loss, plain_loss, exact_loss, what="loss", scale=scale)
    for i, (g, p, exact) in enumerate(zip(grads, plain_grads, exact_grads, strict=True)):
        assert g.dtype == inputs[i].dtype, f"gradient {i} is {g.dtype}, its input {inputs[i].dtype}"
        assert_within_budget(g, p, exact, what=f"gradient {i}", scale=grad_scale)
    return loss, grads
