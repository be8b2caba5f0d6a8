"""The inputs of a case, which of them get gradients, and one call with its gradients; timing is in harness.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, outputs

#: Tensors whose first dimension is the rows M: parity compares their first and last rows.
ROWWISE = {"z", "g", "x", "y", "log_probs", "indices", "hidden", "gist_hidden", "target", "gate", "residual"}
#: Of the adapter's norm, and of its hidden units' dropout.
EPSILON, DROPOUT = 1e-5, 0.1


@dataclass
class Problem:
    """The tensors of one case, which of them get gradients, and the incoming gradient."""

    op: str
    case: Case
    tensors: dict[str, Tensor]
    leaves: tuple[str, ...]
    options: dict[str, object] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def is_loss(self) -> bool:
        return self.op not in ("cp_linear", "cp_update", "adapter", "gelu")


def make_problem(op: str, case: Case, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * spread).to(case.dtype)

    def targets(classes: int) -> Tensor:
        return torch.randint(0, classes, (case["M"],), generator=generator, device=device)

    if op == "bidirectional_kl":
        shape = case["M"], case["V"]
        z, g = randn(*shape, spread=3), randn(*shape, spread=3)
        if one_in := case.get("absent", 0):  # a masked class is -inf in both heads
            absent = torch.rand(shape, generator=generator, device=device) < 1 / one_in
            z, g = z.masked_fill_(absent, -torch.inf), g.masked_fill_(absent, -torch.inf)
        if case.get("nan", 0):
            z[case["M"] // 2, case["V"] // 3] = torch.nan
        leaves = ("z",) if case.get("detached", 0) else ("z", "g")
        return Problem(op, case, {"z": z, "g": g}, leaves, {"temperature": 3.0})
    if op == "gist_loss":
        shape = case["M"], case["V"]
        tensors = {"z": randn(*shape, spread=3), "g": randn(*shape, spread=3), "target": targets(case["V"])}
        return Problem(op, case, tensors, ("z",) if case.get("detached", 0) else ("z", "g"))
    if op == "topk_kl":
        m, v, k = case["M"], case["V"], case["K"]
        known = (randn(m, v, spread=3) / 3.0).float().log_softmax(-1).topk(k)
        tensors = {"z": randn(m, v, spread=3), "log_probs": known.values, "indices": known.indices}
        return Problem(op, case, tensors, ("z",), {"temperature": 3.0})
    if op == "gist_linear_loss":
        m, v, h = case["M"], case["V"], case["H"]
        tensors = {"hidden": randn(m, h), "gist_hidden": randn(m, h), "weight": randn(v, h, spread=2 / math.sqrt(h))}
        tensors |= {"bias": randn(v, spread=0.1), "target": targets(v)}
        return Problem(op, case, tensors, ("hidden", "gist_hidden", "weight", "bias"))
    m, d = case["M"], case["d"]
    if op == "gelu":
        return Problem(op, case, {"x": randn(m, d)}, ("x",))
    if op == "cp_linear":
        r = case["R"]
        n, many = d * outputs(case), (outputs(case),) if outputs(case) > 1 else ()
        tensors = {"x": randn(m, d), "weight": randn(n, d, spread=d**-0.5), "bias": randn(n, spread=0.1)}
        tensors |= {"u": randn(d, r, spread=d**-0.5), "v": randn(d, r, spread=0.3), "gain": randn(*many, r)}
        return Problem(op, case, tensors, ("x", "u", "v", "gain"))
    if op == "cp_update":
        r = case["R"]
        tensors = {"y": randn(m, d), "x": randn(m, d), "u": randn(d, r, spread=d**-0.5), "v": randn(d, r, spread=0.3)}
        return Problem(op, case, tensors, tuple(tensors))
    h, experts = case["H"], case.get("E", 0)
    tensors = {"x": randn(m, d), "down": randn(h, d, spread=d**-0.5), "down_bias": randn(h, spread=0.1)}
    many = (experts,) if experts else ()
    tensors |= {"up": randn(d, h, spread=h**-0.5), "up_bias": randn(*many, d, spread=0.1)}
    if experts:
        tensors["gate"] = randn(m, experts).float().softmax(-1).to(case.dtype)
    if case.get("residual", 0):
        tensors["residual"] = randn(m, d)
    if case.get("norm", 0):
        tensors |= {"norm_weight": 1 + randn(d, spread=0.1), "norm_bias": randn(d, spread=0.1)}
    leaves = tuple(tensors)
    if case.get("dropout", 0):
        tensors["seed"] = torch.tensor([20], device=device)
    return Problem(op, case, tensors, leaves)


def given(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a provider is built from and called with: of cp_linear's W weights, one above the other, each by itself."""
    count = problem.case.get("W", 1)
    if count == 1:
        return tensors
    return tensors | {name: tensors[name].chunk(count) for name in ("weight", "bias")}


def arguments(op: str, tensors: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, by name) of our operation and of its formula: the adapter's options have names."""
    if op != "adapter":
        return tuple(tensors.values()), {}
    named: dict[str, Any] = {name: tensors[name] for name in ("gate", "residual") if name in tensors}
    if "norm_weight" in tensors:
        named["norm"] = tensors["norm_weight"], tensors["norm_bias"], EPSILON
    if "seed" in tensors:
        named |= {"seed": tensors["seed"], "dropout_p": DROPOUT, "training": True}
    return tuple(tensors[name] for name in ("x", "down", "down_bias", "up", "up_bias")), named


def joined(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else torch.cat(out, -1)


def incoming(problem: Problem, out: Tensor, direction: str) -> Tensor:
    if problem.is_loss:
        return torch.full_like(out, 2.0 if direction.endswith("scaled") else 1.0)
    return torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device).to(out.dtype)


def leaves(problem: Problem) -> dict[str, Tensor]:
    return {n: t.detach().requires_grad_(n in problem.leaves) for n, t in problem.tensors.items()}


def run(
    problem: Problem, provider: Callable[..., Any], direction: str = "fwd_bwd"
) -> tuple[Tensor, dict[str, Tensor | None]]:
    tensors = leaves(problem)
    out = joined(provider(*given(problem, tensors).values()))
    wanted = [tensors[name] for name in problem.leaves]
    grads = torch.autograd.grad(out, wanted, incoming(problem, out, direction), allow_unused=True)
    return out.detach(), dict(zip(problem.leaves, grads, strict=True))
