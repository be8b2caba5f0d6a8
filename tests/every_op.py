"""Each operation at one small ragged shape, behind one interface: what tests of all have in common."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from conftest import DEVICE, implementations
from torch import Tensor

from fastgist import functional
from fastgist.backends import OPS

#: (op, implementation) for each implementation that this run checks.
PAIRS = [(op, impl) for op in OPS for impl in implementations(op)]


@dataclass
class Call:
    """An operation with its tensors, in argument order, and which of them get gradients."""

    op: str
    tensors: dict[str, Tensor | None]
    leaves: tuple[str, ...]
    options: dict[str, object] = field(default_factory=dict)

    def __call__(self, *values: Tensor, impl: str = "auto", **options: object) -> Tensor:
        return getattr(functional, self.op)(*values, impl=impl, **self.options, **options)

    def formula(self, *values: Tensor) -> Tensor:
        return self.function()(*values, **self.options)

    def function(self) -> Callable[..., Tensor]:
        return getattr(importlib.import_module(f"fastgist.reference.{self.op}"), self.op)

    def values(self, dtype: torch.dtype | None = None, grad: bool = True) -> list[Tensor | None]:
        """Fresh copies of the tensors, the leaves requiring grad."""
        out = []
        for name, t in self.tensors.items():
            if t is not None:
                t = t.detach().clone()
                t = t.to(dtype) if dtype is not None and t.is_floating_point() else t
                t.requires_grad_(grad and name in self.leaves)
            out.append(t)
        return out

    def wanted(self, values: list[Tensor | None]) -> list[Tensor]:
        return [v for name, v in zip(self.tensors, values, strict=True) if name in self.leaves]

    def run(self, function: Callable[..., Tensor] | None = None, *, impl: str = "auto", dtype=None):
        """(result, gradients of the leaves) of ``function`` (default: the operation) with a fixed incoming gradient."""
        values = self.values(dtype)
        out = self(*values, impl=impl) if function is None else function(*values)
        incoming = torch.linspace(0.5, 1.5, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
        return out.detach(), list(torch.autograd.grad(out, self.wanted(values), incoming))


@dataclass
class Variant(Call):
    """The same with what else the operation takes; ``arrange`` makes (arguments, options) of the tensors by name. Several
    results come side by side."""

    arrange: Callable[[dict[str, Tensor | None]], tuple[tuple, dict[str, object]]] = lambda named: ((), {})

    def __call__(self, *values: Tensor, impl: str = "auto", **options: object) -> Tensor:
        args, more = self.arrange(dict(zip(self.tensors, values, strict=True)))
        out = getattr(functional, self.op)(*args, impl=impl, **self.options, **more, **options)
        return torch.cat(out, -1) if isinstance(out, tuple) else out


def make(op: str, dtype: torch.dtype = torch.float32, device: str = DEVICE, rows: int = 9) -> Call:
    generator = torch.Generator().manual_seed(7)

    def randn(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * spread).to(device, dtype)

    def classes(n: int) -> Tensor:
        return torch.randint(0, n, (rows,), generator=generator).to(device)

    if op == "bidirectional_kl":
        return Call(op, {"z": randn(rows, 131), "o": randn(rows, 131)}, ("z", "o"), {"temperature": 2.0})
    if op == "gist_loss":
        tensors = {"z": randn(rows, 131), "g": randn(rows, 131), "target": classes(131)}
        return Call(op, tensors, ("z", "g"))
    if op == "topk_kl":
        log_probs, indices = (randn(rows, 131) / 2.0).float().log_softmax(-1).topk(7)
        return Call(op, {"z": randn(rows, 131), "t": log_probs.to(dtype), "i": indices}, ("z",), {"temperature": 2.0})
    if op == "gist_linear_loss":
        tensors = {"hidden": randn(rows, 24), "gist": randn(rows, 24), "weight": randn(37, 24, spread=0.2)}
        tensors |= {"bias": randn(37), "target": classes(37)}
        return Call(op, tensors, ("hidden", "gist", "weight", "bias"))
    if op == "cp_linear":
        tensors = {"x": randn(rows, 72), "weight": randn(48, 72, spread=0.1), "bias": randn(48)}
        tensors |= {"u": randn(72, 5, spread=0.1), "v": randn(24, 5), "gain": randn(2, 5)}
        return Call(op, tensors, ("x", "u", "v", "gain"), {"scale": 0.5})
    if op == "cp_update":
        tensors = {"y": randn(rows, 48), "x": randn(rows, 72), "u": randn(72, 5, spread=0.1)}
        tensors |= {"v": randn(24, 5), "gain": randn(2, 5)}
        return Call(op, tensors, tuple(tensors), {"scale": 0.5})
    if op == "gelu":
        return Call(op, {"x": randn(rows, 72)}, ("x",))
    tensors = {"x": randn(rows, 72), "down": randn(9, 72, spread=0.1), "down_bias": randn(9)}
    tensors |= {"up": randn(72, 9), "up_bias": randn(72)}
    return Call(op, tensors, ("x", "down", "down_bias", "up", "up_bias"), {"scale": 0.5})


def variants(op: str, dtype: torch.dtype = torch.float32, device: str = DEVICE, rows: int = 9) -> dict[str, Variant]:
    """cp_linear, cp_update and adapter with dropout and, where there are such, several weights, a gate, a norm, a residual."""
    call = make(op, dtype, device, rows)
    dropped = call.options | {"dropout_p": 0.3, "training": True}

    def randn(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * spread).to(device, dtype)

    generator = torch.Generator().manual_seed(8)
    seed = {"seed": torch.tensor([7], device=device)}
    if op == "adapter":
        more = {
            "gate": randn(rows, 3).softmax(-1),
            "residual": randn(rows, 72),
            "norm": randn(72),
            "norm_bias": randn(72),
        }
        more |= {"up_bias": randn(3, 72)}

        def with_all(t: dict[str, Tensor | None]) -> tuple[tuple, dict[str, object]]:
            norm = t["norm"], t["norm_bias"], 1e-5
            return tuple(t.values())[:5], {
                "gate": t["gate"],
                "residual": t["residual"],
                "norm": norm,
                "seed": t["seed"],
            }

        leaves = (*call.leaves, *(name for name in more if name != "up_bias"))
        return {"gate, norm, dropout": Variant(op, call.tensors | more | seed, leaves, dropped, with_all)}

    def with_seed(t: dict[str, Tensor | None]) -> tuple[tuple, dict[str, object]]:
        return tuple(t.values())[:-1], {"seed": t["seed"]}

    found = {"dropout": Variant(op, call.tensors | seed, call.leaves, dropped, with_seed)}
    if op == "cp_linear":
        weights = {f"weight{i}": randn(24 * n, 72, spread=0.1) for i, n in enumerate((1, 2, 1))}
        biases = {f"bias{i}": randn(w.shape[0]) for i, w in enumerate(weights.values())}
        factors = {name: call.tensors[name] for name in ("u", "v")} | {"gain": randn(4, 5)}
        tensors = {"x": call.tensors["x"], **weights, **biases, **factors, **seed}

        def with_weights(t: dict[str, Tensor | None]) -> tuple[tuple, dict[str, object]]:
            base = ([t[name] for name in names] for names in (weights, biases))
            return (t["x"], *base, t["u"], t["v"], t["gain"]), {"seed": t["seed"]}

        found["several weights"] = Variant(op, tensors, ("x", "u", "v", "gain"), dropped, with_weights)
    return found


LAYERS = ("cp_linear", "cp_update", "adapter")
#: (op, implementation, variant) for each variant of a layer's operation that this run checks.
VARIANTS = [(op, impl, name) for op, impl in PAIRS if op in LAYERS for name in variants(op)]
