"""What the tests of adapter share: inputs, the expression as anyone would write it, and both held against float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from losses import on_every_device

from fastgist.functional import adapter
from fastgist.reference.adapter import adapter as formula
from fastgist.reference.philox import keep_mask
from fastgist.testing import assert_within_budget

NAMES = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual", "gate")
NORM = ("norm_weight", "norm_bias")
ACT = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda z: z,
}


def case(
    rows=19, inner=40, hidden=8, out=None, experts=None, dtype=torch.float32, device="cpu", residual=False, norm=False
):
    """Tensors by name, in the order of NAMES; with ``norm`` also those of NORM."""

    def randn(*shape, spread=1.0):
        return (torch.randn(*shape, device=device) * spread).to(dtype)

    out = inner if out is None else out
    found = {
        "x": randn(rows, inner),
        "down_weight": randn(hidden, inner, spread=inner**-0.5),
        "down_bias": randn(hidden),
        "up_weight": randn(out, hidden, spread=hidden**-0.5),
        "up_bias": randn(out) if experts is None else randn(experts, out),
        "residual": randn(rows, out) if residual else None,
        "gate": None if experts is None else randn(rows, experts).softmax(-1),
    }
    return found | (
        {"norm_weight": 1 + randn(inner, spread=0.3), "norm_bias": randn(inner, spread=0.3)} if norm else {}
    )


def plain(
    x, down_weight, down_bias, up_weight, up_bias, *, activation, scale, residual, residual_scale, gate, norm=None,
    dropout_p=0.0, training=False, seed=None,
):  # fmt: skip
    """The expression in the inputs' own dtype, as anyone would write it."""
    a = x if norm is None else F.layer_norm(x, x.shape[-1:], *norm)
    hidden = ACT[activation](F.linear(a, down_weight, down_bias))
    if gate is not None:
        hidden = hidden * gate.repeat_interleave(hidden.shape[-1] // gate.shape[-1], dim=-1)
    if training:
        keep = keep_mask(seed, tuple(hidden.shape), dropout_p)
        hidden = hidden * (keep.to(hidden.dtype) / (1.0 - dropout_p))
    y = F.linear(hidden, up_weight)
    if up_bias is not None:
        y = y + (gate @ up_bias if up_bias.dim() == 2 else up_bias)
    y = scale * y
    return y if residual is False else y + residual_scale * (x if residual is None else residual)


def evaluate(function, inputs, wanted, grad, norm_eps=None, **options):
    """(y, gradients by name) of ``function``; ``norm_eps``: with the norm of NORM."""
    leaves = {k: None if t is None else t.detach().requires_grad_(wanted.get(k, False)) for k, t in inputs.items()}
    named = dict(leaves)
    residual, gate, *norm = (named.pop(k, None) for k in ("residual", "gate", *NORM))
    options = {"activation": "gelu", "scale": 1.0, "residual_scale": 1.0, "residual": residual} | options
    if norm_eps is not None:
        options["norm"] = (*norm, norm_eps)
    y = function(*named.values(), gate=gate, **options)
    if any(wanted.values()):
        y.backward(grad.to(y.dtype))
    return y.detach(), {k: None if t is None else t.grad for k, t in leaves.items()}


def _gate_terms(inputs, grad, scale, norm_eps):
    """The largest sum of absolute terms in a gate's gradient: over the output's columns and an expert's hidden units, of
    which none is larger than its z."""
    x, down, down_bias, up, up_bias = (None if inputs[k] is None else inputs[k].float() for k in NAMES[:5])
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], *(None if inputs[k] is None else inputs[k].float() for k in NORM), norm_eps)
    terms = ((grad.abs() @ up.abs()) * F.linear(x, down, down_bias).abs()).view(*inputs["gate"].shape, -1).sum(-1)
    if up_bias is not None and up_bias.dim() == 2:
        terms = terms + grad.abs() @ up_bias.abs().transpose(0, 1)
    return float(terms.max()) * abs(scale)


def _terms(name, inputs, grad, scale, norm_eps):
    """The size of the terms in a gradient that is a sum which may cancel, over the rows or, of x behind a norm, of a row and
    its means: the floor is there."""
    if name == "gate":
        return _gate_terms(inputs, grad, scale, norm_eps)
    if name == "up_bias" and inputs[name].dim() == 1:
        return float(grad.abs().sum(0).max()) * abs(scale)
    hidden = grad.abs() @ inputs["up_weight"].abs().float()
    if name == "down_bias":
        return float(hidden.sum(0).max())
    if norm_eps is None:
        return None
    x = inputs["x"].float()
    weight, bias = (None if inputs[k] is None else inputs[k].float() for k in NORM)
    if name == "down_weight":
        a = F.layer_norm(x, x.shape[-1:], weight, bias, norm_eps)
        return float((abs(scale) * hidden.transpose(0, 1) @ a.abs()).max())
    of_a = abs(scale) * hidden @ inputs["down_weight"].abs().float()
    if name == "norm_weight":
        return float((of_a * F.layer_norm(x, x.shape[-1:]).abs()).sum(0).max())
    if name == "norm_bias":
        return float(of_a.sum(0).max())
    if name == "x":
        rstd = (x.var(-1, unbiased=False, keepdim=True) + norm_eps).rsqrt()
        return float((rstd * (of_a if weight is None else of_a * weight.abs())).max())
    return None


def check(inputs, grad, impl, wanted=None, ours=None, **options):
    """adapter against float64 with plain PyTorch as the peer: y and the gradients that are ``wanted`` (all, if None).
    ``ours``: the same tensors in other layouts."""
    wanted = {k: t is not None for k, t in inputs.items()} if wanted is None else wanted
    y, grads = evaluate(adapter, inputs if ours is None else ours, wanted, grad, impl=impl, **options)
    peers = on_every_device(lambda i, g, o: evaluate(plain, i, wanted, g, **o), inputs, grad, options)
    plain_y, plain_grads = [y for y, _ in peers], {k: [grads[k] for _, grads in peers] for k in inputs}
    double = {k: None if t is None else t.double() for k, t in inputs.items()}
    exact_y, exact_grads = evaluate(formula, double, wanted, grad, **options)
    # The oracle itself, held against the expression as anyone would write it: a wrong one would widen the budget.
    again_y, again_grads = evaluate(plain, double, wanted, grad, **options)
    torch.testing.assert_close(
        (again_y, list(again_grads.values())), (exact_y, list(exact_grads.values())), rtol=1e-9, atol=1e-9
    )
    assert_within_budget(y, plain_y, exact_y, what="y")
    for name in inputs:
        assert (grads[name] is not None) == wanted[name], name
        if wanted[name]:
            terms = _terms(name, inputs, grad, options.get("scale", 1.0), options.get("norm_eps"))
            what = f"gradient of {name}"
            assert_within_budget(grads[name], plain_grads[name], exact_grads[name], what=what, scale=terms)
    return y, grads
