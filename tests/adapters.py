"""What the tests of adapter share: inputs, the expression as anyone would write it, and both held against float64."""

from __future__ import annotations

import math

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
    dropout_p=0.0, training=False, seed=None, products=False,
):  # fmt: skip
    """The expression in the inputs' own dtype, as anyone would write it; with ``products`` the biases are multiplied by a
    column of ones, so that their gradients are sums as a product makes them, not torch.sum's, which err less."""
    if products:
        ones = x.new_ones(x.shape[0], 1)
        down_weight = down_weight if down_bias is None else torch.cat((down_weight, down_bias[:, None]), 1)
    a = x if norm is None else F.layer_norm(x, x.shape[-1:], *norm)
    if products and down_bias is not None:
        a, down_bias = torch.cat((a, ones.to(a.dtype)), 1), None
    hidden = ACT[activation](F.linear(a, down_weight, down_bias))
    if gate is not None:
        hidden = hidden * gate.repeat_interleave(hidden.shape[-1] // gate.shape[-1], dim=-1)
    if training:
        keep = keep_mask(seed, tuple(hidden.shape), dropout_p)
        hidden = hidden * (keep.to(hidden.dtype) / (1.0 - dropout_p))
    y = F.linear(hidden, up_weight)
    if up_bias is not None:
        of_bias = gate @ up_bias if up_bias.dim() == 2 else ones @ up_bias[None] if products else up_bias
        y = y + of_bias
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


def _widened(inputs, norm_eps):
    """The operands in float32 and what the down projection sees: x, or x behind the norm."""
    x, down, down_bias, up, weight, bias = (
        None if inputs.get(k) is None else inputs[k].float() for k in ("x", *NAMES[1:4], *NORM)
    )
    a = x if norm_eps is None else F.layer_norm(x, x.shape[-1:], weight, bias, norm_eps)
    return x, a, down, down_bias, up, weight


def _terms(name, inputs, grad, scale, norm_eps):
    """The size of the terms in a result that is a sum which may cancel, over hidden units, columns or rows or, of x behind a
    norm, of a row and its means: the floor is there. No hidden unit is larger than the terms of
    its z."""
    if name == "gate":
        return _gate_terms(inputs, grad, scale, norm_eps)
    if name == "up_bias":
        of_rows = grad.abs().float()
        if inputs[name].dim() == 1:
            return float(of_rows.sum(0).max()) * abs(scale)
        return float((inputs["gate"].abs().float().transpose(0, 1) @ of_rows).max()) * abs(scale)
    x, a, down, down_bias, up, weight = _widened(inputs, norm_eps)
    z = F.linear(a.abs(), down.abs(), None if down_bias is None else down_bias.abs())
    if inputs.get("gate") is not None:
        gate = inputs["gate"].float().abs()
        z = z * gate.repeat_interleave(z.shape[1] // gate.shape[1], dim=1)
    if name == "y":
        return float((z @ up.abs().transpose(0, 1)).max()) * abs(scale)
    if name == "up_weight":
        return float((grad.abs().transpose(0, 1).float() @ z).max()) * abs(scale)
    hidden = abs(scale) * grad.abs().float() @ up.abs()
    if name == "down_bias":
        return float(hidden.sum(0).max())
    if name == "down_weight":
        return float((hidden.transpose(0, 1) @ a.abs()).max())
    of_a = hidden @ down.abs()
    if name == "norm_weight":
        return float((of_a * F.layer_norm(x, x.shape[-1:]).abs()).sum(0).max())
    if name == "norm_bias":
        return float(of_a.sum(0).max())
    if name == "x":
        if norm_eps is None:
            return float(of_a.max())
        rstd = (x.var(-1, unbiased=False, keepdim=True) + norm_eps).rsqrt()
        return float((rstd * (of_a if weight is None else of_a * weight.abs())).max())
    return None


def _no_less(terms, exact):
    """A floor at the terms' size, or at the result's own where that is larger."""
    finite = exact[exact.isfinite()]
    own = float(finite.abs().max()) if finite.numel() else 0.0
    return None if terms is None or not math.isfinite(terms) else max(terms, own)


def check(inputs, grad, impl, wanted=None, ours=None, **options):
    """adapter against float64 with plain PyTorch as the peer: y and the gradients that are ``wanted`` (all, if None).
    ``ours``: the same tensors in other layouts."""
    wanted = {k: t is not None for k, t in inputs.items()} if wanted is None else wanted
    y, grads = evaluate(adapter, inputs if ours is None else ours, wanted, grad, impl=impl, **options)
    peers = [
        peer
        for products in (False, True)
        for peer in on_every_device(
            lambda i, g, o, p=products: evaluate(plain, i, wanted, g, products=p, **o), inputs, grad, options
        )
    ]
    plain_y, plain_grads = [y for y, _ in peers], {k: [grads[k] for _, grads in peers] for k in inputs}
    double = {k: None if t is None else t.double() for k, t in inputs.items()}
    exact_y, exact_grads = evaluate(formula, double, wanted, grad, **options)
    # The oracle itself, held against the expression as anyone would write it: a wrong one would widen the budget.
    again_y, again_grads = evaluate(plain, double, wanted, grad, **options)
    torch.testing.assert_close(
        (again_y, list(again_grads.values())), (exact_y, list(exact_grads.values())), rtol=1e-9, atol=1e-9
    )
    scaled = options.get("scale", 1.0), options.get("norm_eps")
    assert_within_budget(y, plain_y, exact_y, what="y", scale=_no_less(_terms("y", inputs, grad, *scaled), exact_y))
    for name in inputs:
        assert (grads[name] is not None) == wanted[name], name
        if wanted[name]:
            terms = _no_less(_terms(name, inputs, grad, *scaled), exact_grads[name])
            what = f"gradient of {name}"
            assert_within_budget(grads[name], plain_grads[name], exact_grads[name], what=what, scale=terms)
    return y, grads
