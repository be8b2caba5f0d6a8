"""Forwards of transformers' decoders written out, one row of real tokens at a time: no padding, positions counted from 0,
every position's scores against what it may see. With a gist token, prompts, prefixes and adapters beside branches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from vits import layer_norm

from fastgist.nn import AdaptedBlock, PrefixedAttention, PromptedBlock

#: What transformers computes in float32 whatever the model is in: RMS norms and rotary angles.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}
EXACT = {"rtol": 1e-9, "atol": 1e-10}


def tolerance(model: Any) -> dict[str, float]:
    return EXACT if model.config.model_type == "gpt2" else TOLERANCE


def close(model: Any, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **tolerance(model))


def _rms(model: Any, norm: Any, x: Tensor) -> Tensor:
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    weight = 1 + norm.weight if model.config.model_type == "gemma" else norm.weight
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _turned(t: Tensor, theta: float) -> Tensor:
    """t (heads, n, d): channels i and i + d/2 turned by the angle n theta^(-2i/d)."""
    half = t.shape[-1] // 2
    angle = torch.arange(t.shape[1]).double()[:, None] * theta ** -(torch.arange(half).double() / half)
    a, b = t[..., :half], t[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def _conv1d(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight + layer.bias


def _attended(q: Tensor, k: Tensor, v: Tensor, prefix: Any, window: int | None) -> Tensor:
    """q (heads, n, d), k and v (kv heads, n, d) -> (n, heads d), query by query."""
    heads, n, d = q.shape
    group = heads // len(k)
    rows = []
    for h in range(heads):
        own_k, own_v = k[h // group], v[h // group]
        for i in range(n):
            first = 0 if window is None else max(0, i - window + 1)
            keys, values = own_k[first : i + 1], own_v[first : i + 1]
            if prefix is not None:  # no position, no turning, no window
                keys = torch.cat((prefix.key[h // group], keys))
                values = torch.cat((prefix.value[h // group], values))
            rows.append((q[h, i] @ keys.T / math.sqrt(d)).softmax(-1) @ values)
    return torch.stack(rows).unflatten(0, (heads, n)).transpose(0, 1).flatten(1)


def _attention(model: Any, module: Any, x: Tensor) -> Tensor:
    prefix = module if isinstance(module, PrefixedAttention) else None
    own = module if prefix is None else module.base_layer
    config = model.config
    if config.model_type == "gpt2":
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(0, 1) for t in _conv1d(own.c_attn, x).chunk(3, -1))
        return _conv1d(own.c_proj, _attended(q, k, v, prefix, None))
    q, k, v = (_linear(p, x).unflatten(-1, (-1, 8)).transpose(0, 1) for p in (own.q_proj, own.k_proj, own.v_proj))
    if config.model_type == "qwen3":
        q, k = _rms(model, own.q_norm, q), _rms(model, own.k_norm, k)
    theta = config.rope_parameters["rope_theta"]
    window = config.sliding_window if config.model_type == "mistral" else getattr(own, "sliding_window", None)
    return _linear(own.o_proj, _attended(_turned(q, theta), _turned(k, theta), v, prefix, window))


def _mlp(model: Any, mlp: Any, x: Tensor) -> Tensor:
    if model.config.model_type == "gpt2":
        return _conv1d(mlp.c_proj, nn.functional.gelu(_conv1d(mlp.c_fc, x), approximate="tanh"))
    gate = _linear(mlp.gate_proj, x)
    gate = (
        nn.functional.gelu(gate, approximate="tanh") if model.config.model_type == "gemma" else nn.functional.silu(gate)
    )
    return _linear(mlp.down_proj, gate * _linear(mlp.up_proj, x))


def _beside(block: Any, kind: str, x: Tensor) -> Tensor | float:
    """The adapter's output for a block's un-normed rows where it stands beside the branch."""
    if not isinstance(block, AdaptedBlock) or kind not in block.branches:
        return 0.0
    a = block.adapter
    return a.scale * (nn.functional.gelu(x @ a.down_weight.T + a.down_bias) @ a.up_weight.T + a.up_bias)


def states(model: Any, rows: Tensor) -> Tensor:
    """The final states (n, D) of a classifier's or a language model's rows (n, D), prompts in front of them left out."""
    gpt2 = model.config.model_type == "gpt2"
    body = model.transformer if gpt2 else model.model
    blocks = list(body.h if gpt2 else body.layers)
    count = blocks[0].length if isinstance(blocks[0], PromptedBlock) else 0
    h = torch.cat((blocks[0].prompt, rows)) if count else rows
    if gpt2:
        h = h + body.wpe.weight[: len(h)]
    norms = ("ln_1", "ln_2") if gpt2 else ("input_layernorm", "post_attention_layernorm")
    norm = (lambda m, x: layer_norm(m, x)) if gpt2 else (lambda m, x: _rms(model, m, x))
    for i, block in enumerate(blocks):
        own = block.base_layer if isinstance(block, PromptedBlock | AdaptedBlock) else block
        if i and isinstance(block, PromptedBlock):
            h = torch.cat((block.prompt, h[count:]))
        attention = own.attn if gpt2 else own.self_attn
        h = h + _attention(model, attention, norm(getattr(own, norms[0]), h)) + _beside(block, "attention", h)
        h = h + _mlp(model, own.mlp, norm(getattr(own, norms[1]), h)) + _beside(block, "mlp", h)
    return norm(body.ln_f if gpt2 else body.norm, h)[count:]


def embedded(model: Any, ids: Tensor) -> Tensor:
    """(n,) -> (n, D); Gemma's are sqrt(D) larger than its table, rounded to float32."""
    table = model.get_input_embeddings()
    rows = table.weight[ids]
    return rows * torch.tensor(rows.shape[-1] ** 0.5).double() if model.config.model_type == "gemma" else rows


def by_hand(model: Any, given: dict[str, Tensor], token: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, gist logits) of a classifier in float64; the gist token's (1, L, D) states are averaged."""
    z, gist = [], []
    for ids, mask in zip(given["input_ids"], given["attention_mask"].bool(), strict=True):
        words = embedded(model, ids[mask])
        h = states(model, torch.cat((words, token[0])))
        z.append(h[len(words) - 1])
        gist.append(h[len(words) :].mean(0))
    return torch.stack(z) @ model.score.weight.T, torch.stack(gist) @ model.score.weight.T
