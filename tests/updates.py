"""What the tests of cp_update share: inputs, the expression as anyone would write it, and both held against float64."""

from __future__ import annotations

import torch
from losses import on_every_device

from fastgist.functional import cp_update
from fastgist.reference.cp_update import cp_update as formula
from fastgist.reference.philox import keep_mask
from fastgist.testing import assert_within_budget

NAMES = ("y", "x", "u", "v", "gain")


def case(rows=19, inner=40, out=32, rank=5, folds=2, dtype=torch.float32, device="cpu", factors=None):
    """y, x, u, v, gain: an update of the size of y, so that its errors count."""

    def randn(*shape, spread=1.0, dtype=factors or dtype):
        return (torch.randn(*shape, device=device) * spread).to(dtype)

    return (
        randn(rows, out * folds, dtype=dtype),
        randn(rows, inner, dtype=dtype),
        randn(inner, rank, spread=inner**-0.5),
        randn(out, rank, spread=rank**-0.5),
        randn(folds, rank),
    )


def plain(y, x, u, v, gain=None, *, scale=1.0, dropout_p=0.0, training=False, seed=None):
    """The expression in x's dtype, as anyone would write it."""
    u, v = u.to(x.dtype), v.to(x.dtype)
    h = x @ u
    if training and dropout_p:
        h = h * keep_mask(seed, tuple(h.shape), dropout_p) / (1 - dropout_p)
    folds = y.shape[1] // v.shape[0]
    gain = x.new_ones(1, v.shape[1]) if gain is None else gain.to(x.dtype).reshape(-1, v.shape[1])
    return y + scale * torch.cat([(h * g) @ v.T for g in gain.expand(folds, -1)], dim=-1)


def in_place(y, *args, **options):
    """The same into memory that y's value was copied to."""
    target = y * 1.0
    out = cp_update(target, *args, inplace=True, **options)
    assert out is target
    return out


def evaluate(function, inputs, wanted, grad, **options):
    leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    y = function(*leaves, **options)
    if any(wanted):
        y.backward(grad.to(y.dtype))
    return y.detach(), [None if t is None else t.grad for t in leaves]


def check(inputs, grad, impl, wanted=None, ours=None, function=cp_update, **options):
    wanted = [t is not None for t in inputs] if wanted is None else wanted
    y, grads = evaluate(function, inputs if ours is None else ours, wanted, grad, impl=impl, **options)
    peers = on_every_device(lambda i, g, o: evaluate(plain, i, wanted, g, **o), list(inputs), grad, options)
    plain_y, plain_grads = [y for y, _ in peers], list(zip(*(grads for _, grads in peers), strict=True))
    double = [None if t is None else t.double() for t in inputs]
    exact_y, exact_grads = evaluate(formula, double, wanted, grad.to(y.dtype), **options)
    # The oracle itself, held against the expression as anyone would write it: a wrong one would widen the budget.
    torch.testing.assert_close(
        evaluate(plain, double, wanted, grad.to(y.dtype), **options), (exact_y, exact_grads), rtol=1e-9, atol=1e-9
    )
    assert_within_budget(y, plain_y, exact_y, what="y")
    # No base product hides the rounding of dL/dh, whose terms cancel: in float32 the floor's scale is their absolute sum.
    sizes = [None if t is None else t.abs() for t in double]
    _, terms = evaluate(formula, sizes, wanted, grad.abs(), **(options | {"scale": abs(options.get("scale", 1.0))}))
    for name, w, g, p, e, t in zip(NAMES, wanted, grads, plain_grads, exact_grads, terms, strict=True):
        assert (g is not None) == w, name
        if w:
            scale = float(t.max()) if y.dtype == torch.float32 and t.numel() else None
            assert_within_budget(g, p, e, what=f"gradient of {name}", dtype=y.dtype, scale=scale)
    return y, grads
