"""Tiny transformers decoders with a classification head, and forwards of two of them written out by hand, one row of real
tokens at a time: no padding, no mask, positions counted from 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from vits import dense, layer_norm, randomised

from fastgist.nn import AdaptedLayer, TunerLinear

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROPE = SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ROPE |= {"intermediate_size": 64, "max_position_embeddings": 24}
GPT2 = SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}


def _classifier(name: str, **options) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**options)
    return randomised(getattr(transformers, f"{name}ForSequenceClassification")(config)).eval()


def llama(**options) -> nn.Module:
    return _classifier("Llama", **ROPE | options)


def mistral(**options) -> nn.Module:
    """With a window of five tokens."""
    return _classifier("Mistral", **ROPE | {"sliding_window": 5} | options)


def qwen2(**options) -> nn.Module:
    """Biases on queries, keys and values."""
    return _classifier("Qwen2", **ROPE | options)


def qwen3(**options) -> nn.Module:
    """Queries and keys normed."""
    return _classifier("Qwen3", **ROPE | {"head_dim": 8} | options)


def gemma(**options) -> nn.Module:
    """Scaled embeddings, norms of 1 + weight."""
    return _classifier("Gemma", **ROPE | {"head_dim": 8} | options)


def gpt2(**options) -> nn.Module:
    """Learned positions, fused queries, keys and values in a Conv1D."""
    return _classifier("GPT2", **GPT2 | options)


DECODER_BACKBONES = [llama, mistral, qwen2, qwen3, gemma, gpt2]


def texts(side: str = "right", lengths: tuple[int, ...] = (8, 5, 6), extra: int = 0) -> dict[str, Tensor]:
    """Token ids and attention mask of texts of these lengths, padded on one side (and with ``extra`` more padding). The
    same texts for both sides under the same seed."""
    width = max(lengths) + extra
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    words = torch.randint(3, 50, (len(lengths), max(lengths)))
    for i, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[i, place], mask[i, place] = words[i, :length], 1
    return {"input_ids": ids, "attention_mask": mask}


def _adapted(layer: nn.Module, run, *args: Tensor) -> Tensor:
    """``run`` of a sublayer, then the adapter after it, if there is one."""
    if not isinstance(layer, AdaptedLayer):
        return run(layer, *args)
    y, a = run(layer.base_layer, *args), layer.adapter
    return y + a.scale * (nn.functional.gelu(y @ a.down_weight.T + a.down_bias) @ a.up_weight.T + a.up_bias)


def _rms(norm: nn.Module, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (heads, n, d) -> (n, heads d), causal."""
    n = q.shape[1]
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def _rotated(t: Tensor, theta: float = 10000.0) -> Tensor:
    """(heads, n, d): channels i and i + d/2 turned by n theta^(-2i/d)."""
    half = t.shape[-1] // 2
    angle = torch.arange(t.shape[1]).double()[:, None] * theta ** -(torch.arange(half).double() / half)
    a, b = t[..., :half], t[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def _llama_states(model: nn.Module, h: Tensor) -> Tensor:
    body = model.model
    for layer in body.layers:
        own, x = layer.self_attn, _rms(layer.input_layernorm, h)
        q, k, v = (dense(p, x).unflatten(-1, (-1, 8)).transpose(0, 1) for p in (own.q_proj, own.k_proj, own.v_proj))
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        h = h + _adapted(own.o_proj, dense, _attend(_rotated(q), _rotated(k), v))

        def mlp(mlp, x):
            return dense(mlp.down_proj, nn.functional.silu(dense(mlp.gate_proj, x)) * dense(mlp.up_proj, x))

        h = h + _adapted(layer.mlp, mlp, _rms(layer.post_attention_layernorm, h))
    return _rms(body.norm, h)


def conv1d(layer: nn.Module, x: Tensor) -> Tensor:
    base = layer.base_layer if isinstance(layer, TunerLinear) else layer
    weight = base.weight + layer.get_delta_weight().T if isinstance(layer, TunerLinear) else base.weight
    return x @ weight + base.bias


def _gpt2_states(model: nn.Module, h: Tensor) -> Tensor:
    body = model.transformer
    h = h + body.wpe.weight[: len(h)]
    for layer in body.h:
        q, k, v = (
            t.unflatten(-1, (4, -1)).transpose(0, 1)
            for t in conv1d(layer.attn.c_attn, layer_norm(layer.ln_1, h)).chunk(3, -1)
        )
        h = h + _adapted(layer.attn.c_proj, conv1d, _attend(q, k, v))

        def mlp(mlp, x):
            return conv1d(mlp.c_proj, nn.functional.gelu(conv1d(mlp.c_fc, x), approximate="tanh"))

        h = h + _adapted(layer.mlp, mlp, layer_norm(layer.ln_2, h))
    return layer_norm(body.ln_f, h)


def written_out(model: nn.Module, token: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, gist logits) of a Llama or GPT-2 classifier in float64, the gist token's (1, L, D) states averaged."""
    states, embed = (
        (_gpt2_states, "transformer.wte") if hasattr(model, "transformer") else (_llama_states, "model.embed_tokens")
    )
    z, gist = [], []
    for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
        words = model.get_submodule(embed).weight[ids[mask]]
        h = states(model, torch.cat((words, token[0])))
        z.append(h[len(words) - 1])
        gist.append(h[len(words) :].mean(0))
    return torch.stack(z) @ model.score.weight.T, torch.stack(gist) @ model.score.weight.T
