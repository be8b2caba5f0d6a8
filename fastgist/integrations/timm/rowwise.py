"""The last block for the rows that are read."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist.loss import hooked_everywhere
from fastgist.integrations.timm.blocks import (
    ATTENTION_PARTS,
    BLOCK_PARTS,
    attend_and_project,
    plain_add,
    split_heads,
)
from fastgist.nn import (
    AdaptedBlock,
    AdaptedLayer,
    Adapter,
    AffineLayer,
    BiasShift,
    CPFactors,
    CPLinear,
    CPThreshold,
    LoRALinear,
    PrefixedAttention,
    PromptedBlock,
    ScaleShift,
    is_hooked,
    linear_slice,
)

__all__ = ["Rowwise"]


class Rowwise:
    """The last block for some of its rows only: exact, since everything but attention's keys and values is row by row.

    It serves blocks that are known to work that way and that nobody watches: every module in the last block, the final
    norm and the container of the blocks must be of a known type, without hooks.
    """

    def __init__(self) -> None:
        from timm import layers
        from timm.models.vision_transformer import Block

        self.block_type, self.attention_type = Block, layers.Attention
        norms = [nn.LayerNorm, nn.RMSNorm] + [
            getattr(layers, n) for n in ("LayerNorm", "LayerNormFp32", "RmsNorm", "SimpleNorm") if hasattr(layers, n)
        ]
        self.norms = frozenset([*norms, nn.Identity])
        activations = [nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.Hardswish, nn.LeakyReLU, nn.ELU]
        activations += [getattr(layers, n) for n in ("GELU", "GELUTanh", "QuickGELU", "Swish") if hasattr(layers, n)]
        others = [
            getattr(layers, n)
            for n in ("Mlp", "GluMlp", "SwiGLU", "SwiGLUPacked", "LayerScale", "DropPath")
            if inspect.isclass(getattr(layers, n, None))
        ]
        ours = [AdaptedBlock, AdaptedLayer, Adapter, BiasShift, CPFactors, CPLinear, LoRALinear, PrefixedAttention]
        ours += [CPThreshold, PromptedBlock, ScaleShift]
        self.known = self.norms | {Block, layers.Attention, nn.Linear, nn.Dropout, *activations, *others, *ours}

    def serves(self, model: Any) -> bool:
        """Whether the last block may be computed in part."""
        blocks = model.blocks
        if type(blocks) is not nn.Sequential or len(blocks) == 0 or is_hooked(blocks):
            return False
        if hooked_everywhere():
            return False
        whole = blocks[-1]
        block = whole.base_layer if type(whole) in (AdaptedBlock, PromptedBlock) else whole
        if type(block) is not self.block_type or not BLOCK_PARTS.issuperset(block._modules):
            return False
        attention = block.attn.base_layer if type(block.attn) in (AdaptedLayer, PrefixedAttention) else block.attn
        if type(attention) is not self.attention_type or not ATTENTION_PARTS.issuperset(attention._modules):
            return False
        norm = model.norm.base_layer if isinstance(model.norm, AffineLayer) else model.norm
        if type(norm) not in self.norms or is_hooked(norm) or is_hooked(model.norm):
            return False
        modules = [whole]
        while modules:  # in every forward: a plain loop
            module = modules.pop()
            if type(module) not in self.known or is_hooked(module):
                return False
            modules += [child for child in module._modules.values() if child is not None]
        return True

    def block(self, block: Any, x: Tensor, index: int, count: int) -> Tensor:
        """Rows 0 and ``index .. index + count`` of ``block(x)``, x (B, N, D)."""
        add = plain_add
        if isinstance(block, AdaptedBlock):
            add, block = block.add, block.base_layer
        elif isinstance(block, PromptedBlock):
            x, block = block.place(x), block.base_layer
        out = self._attend(block.attn, block.norm1(x), index, count)
        x = add("attention", self._pick(x, index, count), block.drop_path1(block.ls1(out)))
        return add("mlp", x, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))

    @staticmethod
    def _pick(x: Tensor, index: int, count: int) -> Tensor:
        """Rows 0 and ``index .. index + count`` of x (B, N, ...): a view where they are neighbours."""
        if count == 0 or index == 1:
            return x[:, : 1 + count]
        return torch.cat((x[:, :1], x[:, index : index + count]), dim=1)

    def _attend(self, attention: Any, h: Tensor, index: int, count: int) -> Tensor:
        """The picked rows of attention's output for its input h (B, N, D): their queries, all keys and values."""
        rows = self._pick(h, index, count)
        if isinstance(attention, AdaptedLayer):
            return attention.combine(rows, self._attend(attention.base_layer, h, index, count))
        extend = None
        if isinstance(attention, PrefixedAttention):
            extend, attention = attention.extend, attention.base_layer
        batch, number = rows.shape[:2]
        heads, width = attention.num_heads, attention.qkv.out_features // 3
        q = linear_slice(attention.qkv, rows, 0, width)
        if q is None:  # the layer only works whole, for example while its dropout is active
            q, kv = attention.qkv(h).split((width, 2 * width), dim=-1)
            q = self._pick(q, index, count)
        else:
            kv = linear_slice(attention.qkv, h, width, 3 * width)
        k, v = split_heads(kv, 2, heads)
        q = q.reshape(batch, number, heads, attention.head_dim).transpose(1, 2)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if extend is not None:
            k, v = extend(k, v)
        return attend_and_project(attention, q, k, v, rows)
