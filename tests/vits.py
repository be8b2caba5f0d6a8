"""Tiny timm vision transformers, and a forward of them written out by hand, for the tests of models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastgist.nn import TunerLinear

pytest.importorskip("timm")


def vit(**options) -> nn.Module:
    """A VisionTransformer of width 32 on 16 x 16 images in four patches, with random (not zero) biases and norms."""
    from timm.models.vision_transformer import VisionTransformer

    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return randomised(VisionTransformer(**settings | options))


def eva(**options) -> nn.Module:
    """An EVA-02-like model: rotary embedding, class token, token pooling."""
    from timm.models.eva import Eva

    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    settings |= {"global_pool": "token", "use_rot_pos_emb": True, "ref_feat_shape": (2, 2)}
    return randomised(Eva(**settings | options))


def dinov3(**options) -> nn.Module:
    """A DINOv3-like Eva: four register tokens, no position embedding but rotary, LayerScale."""
    settings = {"num_reg_tokens": 4, "use_abs_pos_emb": False, "rope_type": "dinov3", "init_values": 0.5}
    return eva(
        **settings
        | {"ref_feat_shape": None, "attn_type": "rope", "qkv_bias": True, "rope_temperature": 100.0}
        | options
    )


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Every parameter away from its special initial value, so that a forgotten bias or scale shows."""
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.1)
    return model


@torch.no_grad()
def stir(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Move every trainable parameter: updates that start at zero are zero no more."""
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p), alpha=scale)
    return model


def images(batch: int = 3, size: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=dtype)


def dense(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer by its dense weight, base plus update."""
    if isinstance(layer, TunerLinear):
        base = layer.base_layer
        return x @ (base.weight + layer.get_delta_weight()).T + (0 if base.bias is None else base.bias)
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def by_hand(model: nn.Module, x: Tensor, token: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(logits, gist logits) of a VisionTransformer with token pooling, written out; ``token`` (1, L, D) or None."""
    batch, width, patch = x.shape[0], model.embed_dim, model.patch_embed.patch_size[0]
    side = x.shape[-1] // patch
    cut = x.reshape(batch, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)
    proj = model.patch_embed.proj
    h = cut @ proj.weight.reshape(width, -1).T + (0 if proj.bias is None else proj.bias)
    prefix = [model.cls_token] + ([] if model.reg_token is None else [model.reg_token])
    h = torch.cat([t.expand(batch, -1, -1) for t in prefix] + [h], 1) + model.pos_embed
    place = 1 + model.num_reg_tokens
    if token is not None:
        h = torch.cat([h[:, :place], token.expand(batch, -1, -1), h[:, place:]], 1)
    norm_pre = getattr(model.norm_pre, "base_layer", model.norm_pre)
    h = layer_norm(norm_pre, h)
    for block in model.blocks:
        attn, n = block.attn, h.shape[1]
        size = width // attn.num_heads
        qkv = dense(attn.qkv, layer_norm(block.norm1, h)).reshape(batch, n, 3, attn.num_heads, size)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        q, k = layer_norm(attn.q_norm, q), layer_norm(attn.k_norm, k)
        weights = torch.softmax(q @ k.transpose(-1, -2) / size**0.5, -1)
        out = dense(attn.proj, (weights @ v).transpose(1, 2).reshape(batch, n, width))
        h = h + out * getattr(block.ls1, "gamma", 1)
        mlp, adapter = getattr(block.mlp, "base_layer", block.mlp), getattr(block.mlp, "adapter", None)
        out = dense(mlp.fc2, nn.functional.gelu(dense(mlp.fc1, layer_norm(block.norm2, h))))
        if adapter is not None:
            inside = nn.functional.gelu(out @ adapter.down_weight.T + adapter.down_bias)
            out = out + adapter.scale * (inside @ adapter.up_weight.T + adapter.up_bias)
        h = h + out * getattr(block.ls2, "gamma", 1)
    h = layer_norm(model.norm, h)
    z = dense(model.head, layer_norm(model.fc_norm, h[:, 0]))
    return z, None if token is None else dense(model.head, layer_norm(model.fc_norm, h[:, place]))


def whole(model: nn.Module) -> nn.Module:
    """A copy of a gist model whose last block is computed for all tokens."""
    other = copy.deepcopy(model)
    other.host.rowwise = None
    return other


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}
