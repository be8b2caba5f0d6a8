"""transformers' attention layers, run with their keys and values left open."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgist.integrations.transformers.opened import opened
from fastgist.peft.family import AttentionSite

__all__ = ["attention_site", "find_attention"]


class _Names(NamedTuple):
    """What an attention layer calls its parts; ``out`` None: the output layer is not one of them."""

    projections: tuple[str, str, str]
    out: str | None
    heads: str
    head_dim: str
    scaling: str
    dropout: str
    run: Any


def _attend(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: Any, **kwargs: Any) -> tuple[Any, Any]:
    """transformers' attention function of the model's choice: (B, N, heads, d), weights or None."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(attention).__module__].eager_attention_forward
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    p = dropout.p if isinstance(dropout, nn.Dropout) else dropout
    return interface(attention, q, k, v, mask, dropout=p if attention.training else 0.0, **kwargs)


def _seen(mask: Any, count: int) -> Any:
    """``mask`` with ``count`` more keys in front, which every query sees."""
    if mask is None or count == 0:
        return mask
    if not isinstance(mask, Tensor):
        raise ValueError(f"a prefix needs attention masks that are tensors (sdpa, eager), got {type(mask).__name__}")
    added = mask.dtype.is_floating_point and mask.dim() > 2  # to the scores; else what is seen is true
    return nn.functional.pad(mask, (count, 0), value=0.0 if added else 1)


def _extended(
    attention: Any,
    extend: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    dropout: Any,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention of q (B, heads, N, d) to what ``extend`` makes of k and v: (B, N, heads d), weights or None.

    What is added stands in front, is seen by every query and, where positions have a bias, has none.
    """
    own = k.shape[2]
    k, v = extend(k, v)
    count = k.shape[2] - own
    if position_bias is not None:
        kwargs["position_bias"] = nn.functional.pad(position_bias, (count, 0))
    out, weights = _attend(attention, q, k, v, _seen(mask, count), dropout, **kwargs)
    return out.flatten(2).contiguous(), weights


@opened
def run_projected(
    attention: Any, extend: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Attention with three projections, of BERT and its relatives, DistilBERT, ViT, DeiT, DINOv2 and CLIP."""
    if kwargs.pop("past_key_values", None) is not None:
        raise ValueError("attention with a prefix has no cache")
    names = _ATTENTIONS[type(attention).__name__]
    shape = (*hidden_states.shape[:-1], -1, getattr(attention, names.head_dim))
    q, k, v = (getattr(attention, p)(hidden_states).view(shape).transpose(1, 2) for p in names.projections)
    dropout, scaling = getattr(attention, names.dropout), getattr(attention, names.scaling)
    out, weights = _extended(attention, extend, q, k, v, attention_mask, dropout, scaling=scaling, **kwargs)
    return out if names.out is None else getattr(attention, names.out)(out), weights


@opened
def run_modernbert(
    attention: Any,
    extend: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """ModernBERT's attention: one projection, rotated queries and keys; the prefix is not rotated."""
    from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

    if attention.sliding_window is not None and "flash" in attention.config._attn_implementation:
        raise ValueError(
            "a prefix in ModernBERT needs attn_implementation sdpa or eager: flash attention counts it into its windows"
        )
    shape = (*hidden_states.shape[:-1], 3, -1, attention.head_dim)
    q, k, v = (t.transpose(1, 2) for t in attention.Wqkv(hidden_states).view(shape).unbind(dim=-3))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=1)
    kwargs |= {"scaling": attention.head_dim**-0.5, "deterministic": attention.deterministic_flash_attn}
    out, weights = _extended(attention, extend, q, k, v, attention_mask, attention.attention_dropout, **kwargs)
    return attention.out_drop(attention.Wo(out)), weights


@opened
def run_t5(
    attention: Any,
    extend: Any,
    hidden_states: Tensor,
    mask: Any = None,
    key_value_states: None = None,
    position_bias: Tensor | None = None,
    past_key_values: None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Any]:
    """T5's self-attention; the prefix has no position: its bias is zero."""
    shape = (*hidden_states.shape[:-1], -1, attention.key_value_proj_dim)
    q, k, v = (layer(hidden_states).view(shape).transpose(1, 2) for layer in (attention.q, attention.k, attention.v))
    if position_bias is None:
        own = k.shape[2]
        if attention.has_relative_attention_bias:
            position_bias = attention.compute_bias(own, own, device=q.device)
        else:
            position_bias = q.new_zeros(1, attention.n_heads, own, own)
    kwargs |= {"scaling": attention.scaling, "position_bias": position_bias}
    out, weights = _extended(attention, extend, q, k, v, mask, attention.dropout, **kwargs)
    return attention.o(out), position_bias, weights


@opened
def run_deberta(
    attention: Any,
    extend: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """DeBERTa-v2's attention; the prefix has no position: its scores are those of content with content."""
    heads = attention.num_attention_heads
    source = hidden_states if query_states is None else query_states
    q = attention.transpose_for_scores(attention.query_proj(source), heads)  # (B heads, N, d)
    k = attention.transpose_for_scores(attention.key_proj(hidden_states), heads)
    v = attention.transpose_for_scores(attention.value_proj(hidden_states), heads)
    factor = 1 + sum(kind in attention.pos_att_type for kind in ("c2p", "p2c"))
    scale = (q.shape[-1] * factor) ** 0.5
    scores = q @ (k.transpose(-1, -2) / scale)
    if attention.relative_attention:
        rel_embeddings = attention.pos_dropout(rel_embeddings)
        scores = scores + attention.disentangled_attention_bias(q, k, relative_pos, rel_embeddings, factor)
    q, k, v, scores = (t.unflatten(0, (-1, heads)) for t in (q, k, v, scores))
    own = k.shape[2]
    k, v = extend(k, v)
    count = k.shape[2] - own
    scores = torch.cat((q @ (k[:, :, :count].transpose(-1, -2) / scale), scores), dim=-1)
    seen = nn.functional.pad(attention_mask.bool(), (count, 0), value=True)
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(dim=-1)
    weights = attention.dropout(weights)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return out, weights if output_attentions else None


def _own_mask(attention: Any, q: Tensor, k: Tensor, mask: Any, is_causal: bool | None = None) -> Any:
    """The mask of causal attention without a prefix, where transformers leaves it to the attention function: there key j is
    seen from query i on, counted from the first of both, and by a query alone all are."""
    chosen = attention.config._attn_implementation
    if chosen not in ("sdpa", "eager"):  # others count the prefix into their windows, or align what is causal otherwise
        raise ValueError(f"a prefix in a decoder needs attn_implementation sdpa or eager, got {chosen!r}")
    causal = attention.is_causal if is_causal is None else is_causal
    if mask is not None or q.shape[2] == 1 or not causal:
        return mask
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]


@opened
def run_rotary(
    attention: Any,
    extend: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Causal attention of Llama, Mistral, Qwen2, Qwen3 and Gemma.

    The prefix has no position: it is not rotated, no window leaves it out, and it comes before what a cache holds."""
    names = _ATTENTIONS[type(attention).__name__]
    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    q, k, v = (getattr(attention, p)(hidden_states).view(shape) for p in names.projections)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k = sys.modules[type(attention).__module__].apply_rotary_pos_emb(q, k, *position_embeddings)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, attention.layer_idx)
    mask = _own_mask(attention, q, k, attention_mask, kwargs.get("is_causal"))
    kwargs |= {"scaling": attention.scaling}
    out, weights = _extended(attention, extend, q, k, v, mask, attention.attention_dropout, **kwargs)
    return attention.o_proj(out), weights


@opened
def run_gpt2(
    attention: Any,
    extend: Any,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """GPT-2's attention; the prefix has no position and comes before what a cache holds."""
    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    q, k, v = (t.view(shape).transpose(1, 2) for t in attention.c_attn(hidden_states).chunk(3, dim=-1))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, attention.layer_idx)
    mask = _own_mask(attention, q, k, attention_mask, kwargs.get("is_causal"))
    if attention.reorder_and_upcast_attn and attention.config._attn_implementation == "eager":
        own = k.shape[2]
        k, v = extend(k, v)
        out, weights = attention._upcast_and_reordered_attn(q, k, v, _seen(mask, k.shape[2] - own))
        out = out.flatten(2)
    else:
        kwargs |= {"scaling": attention.scaling}
        out, weights = _extended(attention, extend, q, k, v, mask, attention.attn_dropout, **kwargs)
    return attention.resid_dropout(attention.c_proj(out)), weights


_BERT = _Names(
    ("query", "key", "value"),
    None,
    "num_attention_heads",
    "attention_head_size",
    "scaling",
    "dropout",
    run_projected,
)
_VIT = _Names(
    ("q_proj", "k_proj", "v_proj"),
    "o_proj",
    "num_attention_heads",
    "head_dim",
    "scaling",
    "attention_dropout",
    run_projected,
)
_ROTARY = _VIT._replace(heads="", run=run_rotary)
_ATTENTIONS = {
    "BertSelfAttention": _BERT,
    "RobertaSelfAttention": _BERT,
    "XLMRobertaSelfAttention": _BERT,
    "CamembertSelfAttention": _BERT,
    "ElectraSelfAttention": _BERT,
    "DistilBertSelfAttention": _Names(
        ("q_lin", "k_lin", "v_lin"), "out_lin", "n_heads", "attention_head_size", "scaling", "dropout", run_projected
    ),
    "ViTAttention": _VIT,
    "DeiTAttention": _VIT,
    "Dinov2Attention": _VIT,
    "Dinov2WithRegistersAttention": _VIT,
    "CLIPAttention": _VIT._replace(out="out_proj", heads="num_heads", scaling="scale", dropout="dropout"),
    "ModernBertAttention": _VIT._replace(projections=("Wqkv", "Wqkv", "Wqkv"), out="Wo", heads="", run=run_modernbert),
    "T5Attention": _Names(("q", "k", "v"), "o", "n_heads", "key_value_proj_dim", "scaling", "dropout", run_t5),
    "DisentangledSelfAttention": _BERT._replace(
        projections=("query_proj", "key_proj", "value_proj"), run=run_deberta
    ),
    **dict.fromkeys(
        ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "GemmaAttention"), _ROTARY
    ),
    "GPT2Attention": _Names(
        ("c_attn", "c_attn", "c_attn"), "c_proj", "num_heads", "head_dim", "scaling", "attn_dropout", run_gpt2
    ),
}  # fmt: skip


def find_attention(layer: nn.Module, path: str) -> str:
    """The path of the attention layer in ``layer``, which is at ``path``.

    Raises:
        ValueError: none of a class that is known here.
    """
    for name, module in layer.named_modules(prefix=path):
        if type(module).__name__ in _ATTENTIONS:
            return name
    raise ValueError(
        f"what happens inside the attention of {type(layer).__module__}.{type(layer).__name__} is not known"
    )


def attention_site(attention: Any) -> AttentionSite:
    """How ``attention`` runs with its keys and values left open.

    Raises:
        ValueError: a class, or a part in it, that is not known here.
    """
    kind = type(attention)
    names = _ATTENTIONS.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
    if names is None:
        raise ValueError(f"what happens inside {kind.__module__}.{kind.__name__} is not known")
    parts = {*names.projections} | ({names.out} if names.out else set())
    others = {"dropout", "out_drop", "pos_dropout", "pos_key_proj", "pos_query_proj", "relative_attention_bias",
              "q_norm", "k_norm", "attn_dropout", "resid_dropout"}  # fmt: skip
    have = attention._modules.keys()
    if not parts <= have <= parts | others:
        raise ValueError(f"what happens inside this {kind.__name__} is not known: it has {', '.join(have)}")
    if names.run is run_rotary:
        heads = attention.config.num_key_value_heads
    else:
        heads = getattr(attention, names.heads) if names.heads else attention.config.num_attention_heads
    return AttentionSite(names.run, heads, getattr(attention, names.head_dim))
