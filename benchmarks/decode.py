"""Decoding one token with adapters that are not merged: one linear layer at M = 1, and a small Llama's step.

Gradients are off, as in ``generate``. "plain torch" is the least that an update can be in eager PyTorch without a kernel of
its own: the layer's product, x U, and one addmm with V whose gain is multiplied in beforehand.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.peers import Missing, _need

RANK = 16
VOCABULARY, PROMPT = 6400, 32


@functools.lru_cache(maxsize=1)
def layer(case: Case, device: torch.device) -> nn.Linear:
    """One for all providers: which weight is in a cache must not be what differs between them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return nn.Linear(case["d"], case["d"], bias=False, dtype=case.dtype).requires_grad_(False)


def factors(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """u, v (d, R) and gain (R,), float32, away from zero."""
    generator = torch.Generator().manual_seed(1)
    d = case["d"]
    u, v, gain = (torch.randn(*s, generator=generator) for s in ((d, RANK), (d, RANK), (RANK,)))
    return (u * d**-0.5).to(device), (v * 0.1).to(device), gain.to(device)


def _cp(base: nn.Linear, u: Tensor, v: Tensor, gain: Tensor) -> nn.Module:
    from fastgist.nn import CPFactors, CPLinear

    d = base.in_features
    made = CPLinear(base, CPFactors(d, d, RANK, 1, device=u.device), 0)
    with torch.no_grad():
        for parameter, value in zip((made.factors.u, made.factors.v, made.factors.p), (u, v, gain[None]), strict=True):
            parameter.copy_(value)
    return made


def _lora(base: nn.Linear, u: Tensor, v: Tensor, gain: Tensor) -> nn.Module:
    from fastgist.nn import LoRALinear

    made = LoRALinear(base, RANK, alpha=RANK)
    with torch.no_grad():
        made.u.copy_(u * gain)
        made.v.copy_(v)
    return made


def _merged(base: nn.Linear, u: Tensor, v: Tensor, gain: Tensor) -> nn.Module:
    made: Any = _cp(copy.deepcopy(base), u, v, gain)
    made.merge()
    return made


def _peft(base: nn.Linear, u: Tensor, v: Tensor, gain: Tensor) -> nn.Module:
    _need("peft")
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(nn.Sequential(base), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]))
    linear: Any = made.base_model.model[0]
    with torch.no_grad():
        linear.lora_A["default"].weight.copy_((u * gain).T)
        linear.lora_B["default"].weight.copy_(v)
    return linear


class _Plain(nn.Module):
    def __init__(self, base: nn.Linear, u: Tensor, v: Tensor, gain: Tensor) -> None:
        super().__init__()
        self.base, self.u, self.v = base, u.to(base.weight.dtype), (v * gain).to(base.weight.dtype).T

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        rows = y.view(-1, y.shape[-1])
        return torch.addmm(rows, x.view(-1, x.shape[-1]) @ self.u, self.v).view_as(y)


class _Operation(nn.Module):
    """The fused operation, as a layer calls it for more rows and in training."""

    def __init__(self, base: nn.Linear, u: Tensor, v: Tensor, gain: Tensor) -> None:
        super().__init__()
        self.layer: Any = _cp(base, u, v, gain)

    def forward(self, x: Tensor) -> Tensor:
        from fastgist import functional

        weight = self.layer.base_layer.weight
        u, v, gain = (t.to(weight.dtype) for t in self.layer.get_factors())
        return functional.cp_linear(x, weight, None, u, v, gain)


Built = Callable[[nn.Linear, Tensor, Tensor, Tensor], nn.Module]
LAYERS: dict[str, Built] = {
    "base": lambda base, *factors: base,
    "plain torch": _Plain,
    "PEFT LoRA": _peft,
    "fastgist CPLinear": _cp,
    "fastgist cp_linear": _Operation,
    "fastgist LoRALinear": _lora,
    "fastgist CPLinear, merged": _merged,
}


#: Providers of a Llama's step.
LLAMA = ("base", "PEFT LoRA", "fastgist CPLinear", "fastgist LoRALinear", "fastgist CPLinear, merged")


def is_llama(case: Case) -> bool:
    return "L" in dict(case.sizes)


def build(provider: str, case: Case, device: torch.device) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """(call, its arguments): one layer's output, or a Llama's logits of the next token."""
    if is_llama(case):
        return _llama(provider, case, device)
    call = LAYERS[provider](layer(case, device), *factors(case, device)).eval()
    generator = torch.Generator().manual_seed(2)
    return call, (torch.randn(1, case["M"], case["d"], generator=generator).to(device, case.dtype),)


def _llama(provider: str, case: Case, device: torch.device) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A step of a random Llama behind PROMPT tokens in its cache; q, k and v adapted."""
    try:
        from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    except ImportError as e:
        raise Missing("transformers is not installed") from e
    import fastgist as fg

    d = case["d"]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=d, intermediate_size=11 * d // 4, num_hidden_layers=case["L"],
        num_attention_heads=d // 64, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config).to(case.dtype).eval().requires_grad_(False)
        tuned: Any = LlamaForSequenceClassification(config).to(case.dtype)  # decoders are adapted as classifiers
        tuned.model = model.model
        if provider == "PEFT LoRA":
            _need("peft")
            from peft import LoraConfig, get_peft_model

            get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "k_proj", "v_proj"]))
        elif provider != "base":
            adapted = fg.LoraConfig(RANK, targets=("q", "k", "v")) if "LoRA" in provider else fg.CPConfig(RANK)
            fg.get_peft_model(tuned, adapted)
        for name, p in model.named_parameters():
            if p.requires_grad and (name.endswith(".v") or ".lora_B." in name):
                nn.init.normal_(p, std=0.02)
        model.eval()
        if provider.endswith("merged"):
            fg.merge(tuned)
        cache = DynamicCache(config=config)
        prompt = torch.randint(0, VOCABULARY, (case["M"], PROMPT))
        with torch.no_grad():
            model(prompt, past_key_values=cache, use_cache=True)
    token, at = prompt[:, -1:], torch.tensor([[PROMPT]], device=device)

    def step(token: Tensor, at: Tensor) -> Tensor:
        logits = model(token, past_key_values=cache, position_ids=at, use_cache=True).logits
        cache.crop(-1)  # every step is the same one
        return logits

    return step, (token, at)


def parity(provider: str, case: Case, device: torch.device) -> str | None:
    """None if a layer's result is as near to float64 as the same in plain PyTorch, or a Llama's logits to those of its merged
    layers, else what is not."""
    with torch.no_grad():
        return _llama_parity(provider, case, device) if is_llama(case) else _layer_parity(provider, case, device)


def _llama_parity(provider: str, case: Case, device: torch.device) -> str | None:
    """In float32, where the merged model's rounding is the yardstick."""
    from fastgist.testing import within_budget

    found = {}
    for dtype in (torch.float32, torch.float64):
        at = Case(case.name, case.sizes, dtype)
        for name in (provider, f"{provider}, merged"):
            call, given = _llama(name.replace(", merged, merged", ", merged"), at, device)
            found[name, dtype] = call(*given)
    ours, plain = (found[name, torch.float32] for name in (provider, f"{provider}, merged"))
    return within_budget(ours, plain, found[f"{provider}, merged", torch.float64])


def _layer_parity(provider: str, case: Case, device: torch.device) -> str | None:
    from fastgist.testing import within_budget

    call, (x,) = build(provider, case, device)
    base, (u, v, gain) = layer(case, device), factors(case, device)
    exact = F.linear(x.double(), base.weight.double()) + ((x.double() @ u.double()) * gain.double()) @ v.double().T
    plain = _Plain(base, u, v, gain)(x)
    return within_budget(call(x), plain, exact)


def least(provider: str, case: Case) -> tuple[int, int]:
    """(bytes, FLOPs) of a call: every weight is read once, and of a Llama what its cache holds; an update that is not merged
    brings two factors a layer, of a Llama's q, k and v."""
    m, d, b = case["M"], case["d"], case.dtype.itemsize
    updated = provider != "base" and not provider.endswith("merged")
    if not is_llama(case):
        weights = d * d + (2 * d * RANK if updated else 0)
        return (weights + 2 * m * d) * b, 2 * m * weights
    layers = case["L"]
    weights = layers * (4 * d * d + 3 * d * (11 * d // 4)) + VOCABULARY * d
    weights += 3 * layers * 2 * d * RANK if updated else 0
    cache = 2 * layers * m * PROMPT * d
    return (weights + cache) * b, 2 * m * weights + 2 * cache


__all__ = ["LAYERS", "build", "least", "parity"]
