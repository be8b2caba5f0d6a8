"""The first block's attention with gradients for the gist token's rows alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist.loss import hooked_everywhere
from fastgist.gist.model import GistInsert
from fastgist.integrations.timm.blocks import (
    ATTENTION_PARTS,
    attend,
    is_watched,
    plain_block,
    project,
    queries_keys_values,
)
from fastgist.nn import AdaptedLayer, PromptedBlock, is_plain
from fastgist.ops._attention import attention_for_rows, serves_attention

__all__ = ["FirstBlock"]


class FirstBlock:
    """The first block where nothing before it is trained but the gist token: of its attention's inputs only the token's rows
    lead to anything that takes a gradient. Outputs are the same numbers; the backward leaves out what nobody reads.

    It serves timm's own block and attention, plain or with an adapter around the block or behind the attention, whose norm
    and projection to queries, keys and values are frozen, and which nobody watches.
    """

    def __init__(self, norms: frozenset[type]) -> None:
        from timm.layers import Attention

        self.attention_type, self.norms = Attention, norms

    def serves(self, model: Any, x: Tensor) -> bool:
        """Whether the first block may run so behind x (B, N, D), the sequence without the token."""
        if not torch.is_grad_enabled() or x.requires_grad or model.grad_checkpointing or len(model.blocks) < 2:
            return False
        if torch.compiler.is_compiling():
            if not torch.compiler.is_dynamo_compiling():  # torch.export, whose is_exporting() some versions say of both
                return False
        elif x.is_cuda or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
            # One after the other the sums cost an H200 more than the attention's backward; a compiler joins them.
            return False
        if hooked_everywhere():
            return False
        insert, block = model.norm_pre, plain_block(model.blocks[0])
        if type(insert) is not GistInsert or is_watched(insert) or not insert.gist.token.requires_grad:
            return False
        if block is None or type(model.blocks[0]) is PromptedBlock:
            return False
        attention = block.attn
        if type(attention) is AdaptedLayer and attention.placement == "sequential" and not is_watched(attention):
            attention = attention.base_layer
        if type(attention) is not self.attention_type or not ATTENTION_PARTS.issuperset(attention._modules):
            return False
        if is_watched(attention) or not attention.fused_attn or getattr(attention, "gate", None) is not None:
            return False
        if (attention.training and attention.attn_drop.p > 0.0) or not is_plain(attention.qkv):
            return False
        norms = (insert.base_layer, block.norm1, attention.q_norm, attention.k_norm)
        if any(type(norm) not in self.norms for norm in norms):
            return False
        # Called once for all rows and once for the token's: a hook would see both.
        parts = (*norms, attention.qkv)
        return not any(is_watched(part) or _is_trained(part) for part in parts)

    def enter(self, model: Any, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The first block's input, and its attention for :func:`fastgist.integrations.timm.blocks.run_block`."""
        insert, block = model.norm_pre, plain_block(model.blocks[0])
        rows = insert.gist(x)
        whole = insert.base_layer(insert.place(x, rows))
        # The rows before they are put in: taken out of the whole, their gradient would be as large as the whole.
        rows = insert.base_layer(rows)
        return whole, functools.partial(_attend_for_rows, block.attn, block.norm1, rows, insert.index)


def _is_trained(leaf: nn.Module) -> bool:
    """Whether a gradient may go through the weights of a norm or a linear layer, which may be plain tensors, too: computed
    ones, or those of a replica."""
    weights = (getattr(leaf, name, None) for name in ("weight", "bias"))
    return any(isinstance(t, Tensor) and t.requires_grad for t in (*weights, *leaf._parameters.values()))


def _attend_for_rows(attention: Any, norm: Any, rows: Tensor, first: int, x: Tensor) -> Tensor:
    """``attention(norm(x))`` for x (B, N, D), whose gradient goes to ``rows`` (B, L, D), x's rows from ``first`` on."""
    if type(attention) is AdaptedLayer:
        return attention.combine(x, _attend_for_rows(attention.base_layer, norm, rows, first, x))
    with torch.no_grad():
        whole = _normed_heads(attention, norm(x))
    if not serves_attention(*whole):
        return attend(attention, norm(x))
    out = attention_for_rows(_normed_heads(attention, norm(rows)), whole, first)
    return project(attention, out, x)


def _normed_heads(attention: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = queries_keys_values(attention, h)
    return attention.q_norm(q), attention.k_norm(k), v
