"""transformers' layers, of encoders and decoders, run with their two additions left open.

Where a layer norms before its branches, ``add(kind, x, branch)`` gets the un-normed x, as in timm. Where it norms
behind the addition (BERT and its relatives), x is what the norm before left, which is also what the branch reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgist.integrations.transformers.opened import opened
from fastgist.nn import BlockForward

__all__ = ["block_forward"]


def _added_and_normed(output: Any, add: Any, kind: str, x: Tensor, branch: Tensor) -> Tensor:
    """BERT's output layers, which end a branch, with the addition left to ``add``."""
    return output.LayerNorm(add(kind, x, output.dropout(output.dense(branch))))


@opened
def run_bert_layer(layer: Any, add: Any, x: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """The layer of BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA as an encoder."""
    if kwargs.pop("past_key_values", None) is not None:
        raise ValueError("an encoder layer with an adapter beside its branches has no cache")
    kwargs.pop("encoder_attention_mask", None)
    branch, _ = layer.attention.self(x, attention_mask, **kwargs)
    x = _added_and_normed(layer.attention.output, add, "attention", x, branch)
    return _added_and_normed(layer.output, add, "mlp", x, layer.intermediate(x))


@opened
def run_deberta_layer(
    layer: Any,
    add: Any,
    x: Tensor,
    attention_mask: Tensor,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """DeBERTa-v2's layer."""
    branch, weights = layer.attention.self(
        x,
        attention_mask,
        output_attentions,
        query_states=query_states,
        relative_pos=relative_pos,
        rel_embeddings=rel_embeddings,
    )
    rows = x if query_states is None else query_states
    rows = _added_and_normed(layer.attention.output, add, "attention", rows, branch)
    return _added_and_normed(layer.output, add, "mlp", rows, layer.intermediate(rows)), weights


@opened
def run_distilbert_layer(layer: Any, add: Any, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    branch, _ = layer.attention(x, attention_mask=attention_mask, **kwargs)
    x = layer.sa_layer_norm(add("attention", x, branch))
    return layer.output_layer_norm(add("mlp", x, layer.ffn(x)))


@opened
def run_vit_layer(layer: Any, add: Any, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    """ViT's and DeiT's layer."""
    branch, _ = layer.attention(layer.layernorm_before(x), attention_mask, **kwargs)
    x = add("attention", x, layer.dropout(branch))
    return add("mlp", x, layer.dropout(layer.mlp(layer.layernorm_after(x))))


@opened
def run_dinov2_layer(layer: Any, add: Any, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    """DINOv2's layer, with registers or without."""
    branch, _ = layer.attention(layer.norm1(x), attention_mask=attention_mask, **kwargs)
    x = add("attention", x, layer.drop_path(layer.layer_scale1(branch)))
    return add("mlp", x, layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(x)))))


@opened
def run_clip_layer(layer: Any, add: Any, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    branch, _ = layer.self_attn(layer.layer_norm1(x), attention_mask=attention_mask, **kwargs)
    x = add("attention", x, branch)
    return add("mlp", x, layer.mlp(layer.layer_norm2(x)))


@opened
def run_modernbert_layer(
    layer: Any, add: Any, x: Tensor, attention_mask: Any = None, position_embeddings: Any = None, **kwargs: Any
) -> Tensor:
    normed = layer.attn_norm(x)
    branch, _ = layer.attn(normed, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs)
    x = add("attention", x, branch)
    return add("mlp", x, layer.mlp(layer.mlp_norm(x)))


@opened
def run_t5_block(
    block: Any, add: Any, x: Tensor, attention_mask: Any = None, position_bias: Any = None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, None]:
    """A block of T5's encoder."""
    for name in ("past_key_values", "encoder_hidden_states", "encoder_attention_mask", "encoder_decoder_position_bias"):
        kwargs.pop(name, None)
    attention, mlp = block.layer
    x, position_bias, _ = _run_t5_attention(attention, add, x, attention_mask, position_bias, **kwargs)
    return _finite_in_half(_run_t5_mlp(mlp, add, _finite_in_half(x))), position_bias, None


@opened
def _run_t5_attention(
    layer: Any, add: Any, x: Tensor, attention_mask: Any, position_bias: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Any]:
    branch, position_bias, weights = layer.SelfAttention(
        layer.layer_norm(x), mask=attention_mask, position_bias=position_bias, **kwargs
    )
    return add("attention", x, layer.dropout(branch)), position_bias, weights


@opened
def _run_t5_mlp(layer: Any, add: Any, x: Tensor) -> Tensor:
    return add("mlp", x, layer.dropout(layer.DenseReluDense(layer.layer_norm(x))))


@opened
def run_llama_layer(layer: Any, add: Any, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    """The layer of Llama, Mistral, Qwen2, Qwen3 and Gemma; what it keeps of keys and values is its attention's affair."""
    branch, _ = layer.self_attn(layer.input_layernorm(x), attention_mask=attention_mask, **kwargs)
    x = add("attention", x, branch)
    return add("mlp", x, layer.mlp(layer.post_attention_layernorm(x)))


@opened
def run_gpt2_block(
    block: Any,
    add: Any,
    x: Tensor,
    past_key_values: Any = None,
    attention_mask: Any = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """GPT-2's block without cross-attention, whose arguments come by position."""
    if encoder_hidden_states is not None:
        raise ValueError("a GPT2Block without cross-attention was given an encoder's states")
    kwargs |= {"past_key_values": past_key_values, "attention_mask": attention_mask}
    branch, _ = block.attn(block.ln_1(x), **kwargs)
    x = add("attention", x, branch)
    return add("mlp", x, block.mlp(block.ln_2(x)))


def _finite_in_half(x: Tensor) -> Tensor:
    """T5's clamp of infinite values, which only float16 has."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    bound = torch.where(x.isinf().any(), largest - 1000, largest)
    return x.clamp(min=-bound, max=bound)


_BERT_PARTS = frozenset({"attention", "intermediate", "output"})
_DINO_PARTS = frozenset({"norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2"})
_LLAMA_PARTS = frozenset({"self_attn", "input_layernorm", "mlp", "post_attention_layernorm"})
_VIT_PARTS = frozenset({"attention", "layernorm_before", "layernorm_after", "mlp", "dropout"})
#: Layer class -> its run function and all its parts; a version of transformers that has others is left alone.
_LAYERS: dict[str, tuple[BlockForward, frozenset[str]]] = {
    "BertLayer": (run_bert_layer, _BERT_PARTS),
    "RobertaLayer": (run_bert_layer, _BERT_PARTS),
    "XLMRobertaLayer": (run_bert_layer, _BERT_PARTS),
    "CamembertLayer": (run_bert_layer, _BERT_PARTS),
    "ElectraLayer": (run_bert_layer, _BERT_PARTS),
    "DebertaV2Layer": (run_deberta_layer, _BERT_PARTS),
    "TransformerBlock": (
        run_distilbert_layer,
        frozenset({"attention", "sa_layer_norm", "ffn", "output_layer_norm"}),
    ),
    "ViTLayer": (run_vit_layer, _VIT_PARTS),
    "DeiTLayer": (run_vit_layer, _VIT_PARTS),
    "Dinov2Layer": (run_dinov2_layer, _DINO_PARTS),
    "Dinov2WithRegistersLayer": (run_dinov2_layer, _DINO_PARTS),
    "CLIPEncoderLayer": (run_clip_layer, frozenset({"self_attn", "layer_norm1", "mlp", "layer_norm2"})),
    "ModernBertEncoderLayer": (run_modernbert_layer, frozenset({"attn_norm", "attn", "mlp_norm", "mlp"})),
    "T5Block": (run_t5_block, frozenset({"layer"})),
    **dict.fromkeys(
        ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "GemmaDecoderLayer"),
        (run_llama_layer, _LLAMA_PARTS),
    ),
    "GPT2Block": (run_gpt2_block, frozenset({"ln_1", "attn", "ln_2", "mlp"})),
}


def block_forward(layer: nn.Module) -> BlockForward:
    """How ``layer`` runs with its additions left open.

    Raises:
        ValueError: a class, or a part in it, that is not known here.
    """
    kind = type(layer)
    known = _LAYERS.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
    if known is None:
        raise ValueError(f"how a {kind.__module__}.{kind.__name__} adds up is not known")
    run, parts = known
    if layer._modules.keys() != parts or (kind.__name__ == "T5Block" and len(layer.layer) != 2):
        have = ", ".join(layer._modules)
        raise ValueError(f"how this {kind.__name__} adds up is not known: it has {have}")
    return run
