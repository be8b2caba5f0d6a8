"""What fastgist is timed against, written independently of it. A peer that is not installed is skipped by name.

``PEERS[op]`` maps a provider's name to a function that takes the case's tensors and returns a callable of the same
tensors. Building happens once and is not timed. ``torch.compile`` of an expression is the provider "<name>, compiled".
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import adapter_peers
from benchmarks.problems import arguments

Build = Callable[[dict[str, Tensor]], Callable[..., Tensor]]
T = 3.0
ALPHA, BETA = 0.5, 0.75


class Missing(Exception):
    """The peer cannot run here; the message says why."""


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Missing(f"{package} is not installed")


# -- the losses --------------------------------------------------------------------------------------------------------


def authors_kl(z: Tensor, g: Tensor, temperature: float = T) -> Tensor:
    """The paper's code: softmax().log() through F.kl_div both ways. It underflows to inf for large logit gaps."""
    p, q = (z / temperature).softmax(-1), (g / temperature).softmax(-1)
    return F.kl_div(q.log(), p, reduction="batchmean") + F.kl_div(p.log(), q, reduction="batchmean")


def log_softmax_kl(z: Tensor, g: Tensor, temperature: float = T) -> Tensor:
    log_p, log_q = F.log_softmax(z / temperature, -1), F.log_softmax(g / temperature, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) + F.kl_div(
        log_p, log_q, reduction="batchmean", log_target=True
    )


class _Analytic(torch.autograd.Function):
    """sum (p - q)(u - v) with its gradients by formula, in plain PyTorch: the honest peer of a fused kernel."""

    @staticmethod
    def forward(ctx, z, g, temperature):
        u, v = z.float() / temperature, g.float() / temperature
        p, q = u.softmax(-1), v.softmax(-1)
        d = u - v
        mean_p, mean_q = (p * d).sum(-1, keepdim=True), (q * d).sum(-1, keepdim=True)
        scale = 1.0 / (temperature * z.shape[0])
        ctx.save_for_backward(
            ((p * (d - mean_p) + p - q) * scale).to(z.dtype), ((q * (mean_q - d) + q - p) * scale).to(g.dtype)
        )
        return (mean_p - mean_q).sum() / z.shape[0]

    @staticmethod
    def backward(ctx, grad):
        grad_z, grad_g = ctx.saved_tensors
        return grad_z * grad, grad_g * grad, None


def analytic_kl(z: Tensor, g: Tensor, temperature: float = T) -> Tensor:
    return _Analytic.apply(z, g, temperature)


def gist(kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """GIST's objective by a form of the divergence."""

    def loss(z: Tensor, g: Tensor, target: Tensor, temperature: float = T) -> Tensor:
        return F.cross_entropy(z, target) + ALPHA * F.cross_entropy(g, target) + BETA * kl(z, g, temperature)

    return loss


def _gist_linear(kl: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    loss = gist(kl)

    def whole(hidden: Tensor, gist_hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return loss(F.linear(hidden, weight, bias), F.linear(gist_hidden, weight, bias), target)

    return whole


def _liger_jsd(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    _need("liger_kernel")
    from liger_kernel.transformers import LigerJSD

    jsd = LigerJSD(beta=0.5)
    return lambda z, g: jsd(F.log_softmax(z / T, -1), F.log_softmax(g / T, -1))


def _liger_kl(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Both divergences; each gives a gradient to the side that it measures, none to the other."""
    _need("liger_kernel")
    from liger_kernel.transformers import LigerKLDIVLoss

    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def both(z: Tensor, g: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(z / T, -1), F.log_softmax(g / T, -1)
        return kl(log_q, log_p.detach()) + kl(log_p, log_q.detach())

    return both


def _fla_linear_kl(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    """flash-linear-attention's head + KL both ways, at T = 1 and without bias: its teacher gets no gradient."""
    _need("fla.modules" if importlib.util.find_spec("fla") else "fla")
    from fla.modules import FusedKLDivLoss

    kl = FusedKLDivLoss()

    def both(hidden: Tensor, gist_hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        fixed = weight.detach()
        one = kl(hidden, gist_hidden.detach(), weight, fixed)
        other = kl(gist_hidden, hidden.detach(), weight, fixed)
        return one + other

    return both


def _liger_linear_jsd(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    _need("liger_kernel")
    from liger_kernel.transformers import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=0.5, temperature=T)
    return lambda hidden, gist_hidden, weight, bias, target: jsd(hidden, weight, gist_hidden, weight, target)


def pooled_kl(z: Tensor, log_probs: Tensor, indices: Tensor) -> Tensor:
    """Both directions on k + 1 classes of the student's log_softmax, its rest as a masked logsumexp."""
    log_p = F.log_softmax(z.float() / T, -1)
    rest = log_p.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat((log_p.gather(-1, indices), rest), -1)
    teacher = log_probs.double()
    log_q = torch.cat((teacher, torch.log1p(-teacher.exp().sum(-1, keepdim=True))), -1).float()
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / z.shape[0]


class _AnalyticTopk(torch.autograd.Function):
    """The same with its gradient by formula: of class j it is p_j (e_j - E_p[e]), e_j = u_j - v_j, p_j - q_j apart, and the
    classes of the rest share one e."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_probs: Tensor, indices: Tensor) -> Tensor:
        log_p = F.log_softmax(z.float() / T, -1)
        known = log_p.gather(-1, indices)
        p_rest = log_p.exp().scatter_(-1, indices, 0.0).sum(-1, keepdim=True)
        q_rest = -torch.expm1(log_probs.double().logsumexp(-1, keepdim=True)).float()
        u, v = torch.cat((known, p_rest.log()), -1), torch.cat((log_probs, q_rest.log()), -1)
        p, q = u.exp(), v.exp()
        d = u - v
        mean = (p * d).sum(-1, keepdim=True)
        grad = p * (d - mean) + p - q  # to the k + 1 pooled logits
        scale = 1.0 / (T * z.shape[0])
        whole = (log_p - u[:, -1:]).exp_().mul_(grad[:, -1:]).scatter_(-1, indices, grad[:, :-1])
        ctx.save_for_backward((whole * scale).to(z.dtype))
        return ((p - q) * d).sum() / z.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (grad_z,) = ctx.saved_tensors
        return grad_z * grad, None, None


def analytic_topk(z: Tensor, log_probs: Tensor, indices: Tensor) -> Tensor:
    return _AnalyticTopk.apply(z, log_probs, indices)


# -- the layers --------------------------------------------------------------------------------------------------------
# cp_linear: several weights come as a tuple, as do their biases and results; a row of the gain (G, R) is a fold's, or a
# weight's. Liger has no layer of this kind, nor has PEFT a bottleneck adapter: neither is among the peers.

Weights = Tensor | tuple[Tensor, ...]


def _layer_by_layer(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Of one layer, for several with one input as well: each called by itself, as in a model."""

    def run(
        x: Tensor, weight: Weights, bias: Weights, u: Tensor, v: Tensor, gain: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        if isinstance(weight, Tensor):
            return function(x, weight, bias, u, v, gain)
        return tuple(function(x, w, b, u, v, gain[i]) for i, (w, b) in enumerate(zip(weight, bias, strict=True)))

    return run


def folded(v: Tensor, gain: Tensor) -> Tensor:
    """V' (G n, R): V times each fold's gain, the folds one above the other."""
    return v * gain if gain.dim() == 1 else (v * gain[:, None]).flatten(0, 1)


@_layer_by_layer
def cp_factored(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, v: Tensor, gain: Tensor) -> Tensor:
    h = x @ u
    if gain.dim() == 1:
        return F.linear(x, weight, bias) + (h * gain) @ v.T
    return F.linear(x, weight, bias) + ((h[..., None, :] * gain) @ v.T).flatten(-2)


@_layer_by_layer
def cp_dense(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, v: Tensor, gain: Tensor) -> Tensor:
    """The update materialised and added to the weight at every step, as CaRA and Aurora's code do."""
    return F.linear(x, weight, bias) + F.linear(x, folded(v, gain) @ u.T)


@_layer_by_layer
def cp_released(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, v: Tensor, gain: Tensor) -> Tensor:
    """An R x R core between the factors, as PETAL's released code has it; here its diagonal."""
    h, gains = x @ u, gain.reshape(-1, gain.shape[-1])
    return F.linear(x, weight, bias) + torch.cat([(h @ torch.diag(g)) @ v.T for g in gains], -1)


@_layer_by_layer
def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, v: Tensor, gain: Tensor) -> Tensor:
    """The frozen layer alone: what any update costs more than."""
    return F.linear(x, weight, bias)


class _Chain(torch.autograd.Function):
    """y_i = x W_i^T + b_i + (x U) V_i'^T for layers with one input, by formula both ways, in the manner of Unsloth's: products
    accumulate into buffers (addmm_), x U is formed again, and nothing beside inputs is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, count: int, *rest: Tensor) -> tuple[Tensor, ...]:
        weights, biases, updates = rest[:count], rest[count : 2 * count], rest[2 * count :]
        h, out = x @ u, []
        for w, b, v in zip(weights, biases, updates, strict=True):
            out.append(torch.addmm(b, x, w.t()).addmm_(h, v.t()))
        ctx.save_for_backward(x, u, *weights, *updates)
        ctx.count = count
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, u, *rest = ctx.saved_tensors
        weights, updates = rest[: ctx.count], rest[ctx.count :]
        h = x @ u
        grad_h, grad_x = grads[0] @ updates[0], grads[0] @ weights[0]
        for grad, w, v in zip(grads[1:], weights[1:], updates[1:], strict=True):
            grad_h.addmm_(grad, v)
            grad_x.addmm_(grad, w)
        grad_x.addmm_(grad_h, u.t())
        of_updates = [grad.t() @ h for grad in grads]
        return grad_x, x.t() @ grad_h, None, *[None] * (2 * ctx.count), *of_updates


def cp_chain(x: Tensor, weight: Weights, bias: Weights, u: Tensor, v: Tensor, gain: Tensor) -> Any:
    if isinstance(weight, Tensor):
        return _Chain.apply(x, u, 1, weight, bias, folded(v, gain))[0]
    return _Chain.apply(x, u, len(weight), *weight, *bias, *(v * g for g in gain))


def _each_layer(build: Callable[[Tensor, Tensor, dict[str, Tensor]], Callable[..., Tensor]]) -> Build:
    """A peer that is a module around one layer, built for each of several."""

    def built(tensors: dict[str, Any]) -> Callable[..., Any]:
        weight, bias = tensors["weight"], tensors["bias"]
        if isinstance(weight, Tensor):
            one = build(weight, bias, tensors)
            return lambda x, weight, bias, *factors: one(x, *factors)
        layers = [build(w, b, tensors) for w, b in zip(weight, bias, strict=True)]
        return lambda x, weight, bias, u, v, gain: tuple(layer(x, u, v, gain[i]) for i, layer in enumerate(layers))

    return built


@_each_layer
def _peft_lora(weight: Tensor, bias: Tensor, tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    _need("peft")
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraConfig

    rank = tensors["u"].shape[1]
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    try:
        layer = LoraLinear(base, "default", config=LoraConfig(r=rank, lora_alpha=rank), r=rank, lora_alpha=rank)
    except TypeError:
        layer = LoraLinear(base, "default", r=rank, lora_alpha=rank)
    layer.to(weight.device, weight.dtype)
    # Our tensors in the place of its parameters, so that the gradients arrive where everyone else's do.
    down, up = layer.lora_A["default"], layer.lora_B["default"]
    for linear in (base, down, up):
        del linear.weight
    del base.bias
    base.weight, base.bias = weight, bias

    def run(x: Tensor, u: Tensor, v: Tensor, gain: Tensor) -> Tensor:
        down.weight, up.weight = u.T, folded(v, gain)
        return layer(x)

    return run


@_each_layer
def _peft_adalora(weight: Tensor, bias: Tensor, tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    """A = U^T, B = V and the singular values in the gain's place."""
    _need("peft")
    if isinstance(tensors["weight"], Tensor) and tensors["gain"].dim() == 2:
        raise Missing("AdaLoRA has one row of singular values a layer, not one a fold")
    from peft.tuners.adalora import AdaLoraConfig, SVDLinear

    rank = tensors["u"].shape[1]
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    config = AdaLoraConfig(init_r=rank, target_r=rank, lora_alpha=1, total_step=1)
    layer = SVDLinear(base, "default", config, r=rank, lora_alpha=1).to(weight.device, weight.dtype)
    layer.ranknum["default"].data.fill_(1.0 - 1e-5)  # it divides by this + 1e-5
    del base.weight, base.bias, layer.lora_A, layer.lora_B, layer.lora_E
    base.weight, base.bias = weight, bias

    def run(x: Tensor, u: Tensor, v: Tensor, gain: Tensor) -> Tensor:
        layer.lora_A, layer.lora_B, layer.lora_E = {"default": u.T}, {"default": v}, {"default": gain[:, None]}
        return layer(x)

    return run


def update_added(y: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The update as a product of its own, added to y: what wrappers around quantised layers do."""
    return y + (x @ u) @ v.T


def update_addmm(y: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.addmm(y, x @ u, v.T)


def update_chain(y: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """PEFT's expression: two linear layers, their result scaled, and a sum."""
    return y + F.linear(F.linear(x, u.T), v) * 1.0


def update_dense(y: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.addmm(y, x, u @ v.T)


# -- fastgist itself and the table -------------------------------------------------------------------------------------


def _ours(op: str, impl: str) -> Build:
    def build(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
        from fastgist import backends, functional

        any_tensor = next(t for t in tensors.values() if isinstance(t, Tensor))
        try:
            backends.resolve(op, impl, any_tensor)
        except RuntimeError as e:
            raise Missing(str(e)) from e
        options = {"temperature": T} if op in ("bidirectional_kl", "topk_kl") else {}
        function, names = getattr(functional, op), list(tensors)

        def call(*values: Any) -> Any:
            if op != "adapter":
                return function(*values, impl=impl, **options)
            positional, named = arguments(op, dict(zip(names, values, strict=True)))
            return function(*positional, impl=impl, **named)

        return call

    return build


def _where_it_applies(build: Callable[[dict[str, Tensor]], Callable[..., Tensor] | None], why: str) -> Build:
    """A peer of some cases of an operation."""

    def built(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
        function = build(tensors)
        if function is None:
            raise Missing(why)
        return function

    return built


def _auto_on_cpus(op: str) -> Build:
    """What users get where no implementation is named, which on CPUs is none of those above alone: PyTorch multiplies by the
    weight, and the update is C++'s where that is the faster."""

    def build(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
        device = next(t for t in tensors.values() if isinstance(t, Tensor)).device.type
        if device != "cpu":
            raise Missing(f"on {device} 'auto' is one of the others")
        return _ours(op, "auto")(tensors)

    return build


def _plain(function: Callable[..., Tensor]) -> Build:
    return lambda tensors: function


def _compiled(function: Callable[..., Tensor]) -> Build:
    def build(tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    return build


def _compiled_build(build: Build) -> Build:
    return lambda tensors: _compiled(build(tensors))(tensors)


def _both(name: str, function: Callable[..., Tensor]) -> dict[str, Build]:
    return {name: _plain(function), f"{name}, compiled": _compiled(function)}


def _implementations(op: str) -> dict[str, Build]:
    return {f"fastgist {impl}": _ours(op, impl) for impl in ("triton", "cuda", "native", "reference")}


_EXPERTS = _where_it_applies(adapter_peers.expert_by_expert, "there are no experts")

PEERS: dict[str, dict[str, Build]] = {
    "bidirectional_kl": _implementations("bidirectional_kl")
    | _both("authors", authors_kl)
    | _both("log_softmax", log_softmax_kl)
    | _both("analytic", analytic_kl)
    | {"Liger JSD": _liger_jsd, "Liger KL": _liger_kl},
    "gist_loss": _implementations("gist_loss")
    | _both("authors", gist(authors_kl))
    | _both("log_softmax", gist(log_softmax_kl))
    | _both("analytic", gist(analytic_kl)),
    "gist_linear_loss": _implementations("gist_linear_loss")
    | _both("authors", _gist_linear(authors_kl))
    | _both("log_softmax", _gist_linear(log_softmax_kl))
    | _both("analytic", _gist_linear(analytic_kl))
    | {"Liger fused linear JSD": _liger_linear_jsd, "flash-linear-attention KL": _fla_linear_kl},
    "topk_kl": _implementations("topk_kl")
    | _both("log_softmax", pooled_kl)
    | _both("analytic", analytic_topk)
    | {"fastgist auto": _auto_on_cpus("topk_kl")},
    "cp_linear": _implementations("cp_linear")
    | {"fastgist auto": _auto_on_cpus("cp_linear")}
    | _both("released", cp_released)
    | _both("factored", cp_factored)
    | _both("dense delta", cp_dense)
    | {"frozen linear alone": _plain(frozen_linear), "autograd.Function": _plain(cp_chain)}
    | {"PEFT LoRA": _peft_lora, "PEFT LoRA, compiled": _compiled_build(_peft_lora)}
    | {"PEFT AdaLoRA": _peft_adalora, "PEFT AdaLoRA, compiled": _compiled_build(_peft_adalora)},
    "cp_update": _implementations("cp_update")
    | _both("added", update_added)
    | _both("addmm", update_addmm)
    | {"chain": _plain(update_chain), "dense delta": _plain(update_dense)},
    "adapter": _implementations("adapter")
    | {"eager": adapter_peers.eager, "eager, compiled": _compiled_build(adapter_peers.eager)}
    | {"autograd.Function": _where_it_applies(adapter_peers.chain, "it is derived for the plain adapter")}
    | {"experts one by one": _EXPERTS, "experts one by one, compiled": _compiled_build(_EXPERTS)},
    "gelu": _implementations("gelu") | _both("eager", F.gelu),
}
#: Providers that compute something else, there for their cost: their result is not held against the formula.
OTHER_FUNCTION = {"Liger JSD", "Liger KL", "Liger fused linear JSD", "flash-linear-attention KL", "frozen linear alone"}
