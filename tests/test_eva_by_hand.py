"""EVA-02 and DINOv3 with gist tokens, against a forward written out: rotary positions of patches alone, SwiGLU with its norm,
one and two tokens. Images are wider than they are high, so that rows and columns are told apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from vits import dense, dinov3, eva, layer_norm, stir

from fastgist import AdapterConfig, GistConfig, LoraConfig, add_gist, get_peft_model

EVA02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "global_pool": "avg", "img_size": (16, 24)}
METHODS = {"LoRA": LoraConfig(rank=2, targets=("q", "v", "fc1", "fc2")), "adapter": AdapterConfig(4, "houlsby")}


def eva02() -> nn.Module:
    return eva(**EVA02)


def dino() -> nn.Module:
    return dinov3(img_size=(16, 24), qkv_fused=True)


def _angles(model: nn.Module, size: int) -> Tensor:
    """(6, size / 2): for each of 2 x 3 patches the angle that channels 2 i and 2 i + 1 of a head are turned by.

    EVA-02: bands 10000^(-i / (size / 4)) of the row, then of the column, both counted in patches of a 2 x 2 grid.
    DINOv3: places from -1 to 1 at the middles of patches, times 2 pi 100^(-i / (size / 4)).
    """
    bands = size // 4
    y, x = torch.meshgrid(torch.arange(2).double(), torch.arange(3).double(), indexing="ij")
    if model.rope.__class__.__name__ == "RotaryEmbeddingCat":
        y, x, base, turn = y * 2 / 2, x * 2 / 3, 10000.0, 1.0
    else:
        y, x, base, turn = (2 * y + 1) / 2 - 1, (2 * x + 1) / 3 - 1, 100.0, 2 * math.pi
    frequency = turn * base ** -(torch.arange(bands).double() / bands)
    return torch.cat([t.reshape(-1, 1) * frequency for t in (y, x)], 1)


def _turned(t: Tensor, angles: Tensor) -> Tensor:
    """(B, heads, n, d): its last rows, as many as there are angles, turned in pairs of neighbouring channels."""
    still, moved = t[:, :, : -len(angles)], t[:, :, -len(angles) :]
    a, b = moved[..., 0::2], moved[..., 1::2]
    pair = (a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos())
    return torch.cat((still, torch.stack(pair, -1).flatten(-2)), 2)


def _adapted(layer: nn.Module, run, x: Tensor) -> Tensor:
    """``run`` of the sublayer, and the adapter behind it, if there is one."""
    y, a = run(getattr(layer, "base_layer", layer), x), getattr(layer, "adapter", None)
    if a is None:
        return y
    return y + a.scale * (nn.functional.gelu(y @ a.down_weight.T + a.down_bias) @ a.up_weight.T + a.up_bias)


def by_hand(model: nn.Module, x: Tensor, token: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """(logits, gist logits) in float64; ``token`` (1, L, D), read at the first or in the mean."""
    batch, own = len(x), 1 + (0 if model.reg_token is None else model.reg_token.shape[1])
    proj = model.patch_embed.proj
    cut = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(batch, 6, -1)
    h = cut @ proj.weight.flatten(1).T + proj.bias
    first = [model.cls_token] + ([] if model.reg_token is None else [model.reg_token])
    h = torch.cat([*(t.expand(batch, -1, -1) for t in first), h], 1)
    h = h if model.pos_embed is None else h + model.pos_embed
    h = torch.cat([h[:, :own], token.expand(batch, -1, -1), h[:, own:]], 1)

    def attention(attn: nn.Module, x: Tensor) -> Tensor:
        size = 32 // attn.num_heads
        if attn.qkv is not None:
            q, k, v = dense(attn.qkv, x).chunk(3, -1)
        else:
            q, k, v = (dense(p, x) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in (q, k, v))
        q, k = (_turned(t, _angles(model, size)) for t in (q, k))
        weights = (q @ k.transpose(-1, -2) / size**0.5).softmax(-1)
        return dense(attn.proj, (weights @ v).transpose(1, 2).flatten(2))

    def mlp(mlp: nn.Module, x: Tensor) -> Tensor:
        if not hasattr(mlp, "fc1_g"):
            return dense(mlp.fc2, nn.functional.gelu(dense(mlp.fc1, x)))
        gate = dense(mlp.fc1_g, x)
        return dense(mlp.fc2, layer_norm(mlp.norm, gate * torch.sigmoid(gate) * dense(mlp.fc1_x, x)))

    for block in model.blocks:
        scales = [1.0 if g is None else g for g in (block.gamma_1, block.gamma_2)]
        h = h + scales[0] * _adapted(block.attn, attention, layer_norm(block.norm1, h))
        h = h + scales[1] * _adapted(block.mlp, mlp, layer_norm(block.norm2, h))
    h, length = layer_norm(model.norm, h), token.shape[1]
    pooled = h[:, own + length :].mean(1) if model.global_pool == "avg" else h[:, 0]
    rows = layer_norm(model.fc_norm, h[:, own : own + length])  # the mean is of final, normed states
    return tuple(
        dense(model.head, t) for t in (layer_norm(model.fc_norm, pooled), rows.mean(1) if mean else rows[:, 0])
    )


@pytest.mark.parametrize("make", [eva02, dino])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gist", [(1, "first"), (2, "first"), (2, "mean"), (3, "mean")], ids=str)
def test_against_one_written_out(make, method, gist) -> None:
    length, readout = gist
    model = add_gist(get_peft_model(make(), METHODS[method]), GistConfig(length, dropout=0.0, readout=readout))
    model = stir(model).double().train()
    x = torch.randn(3, 3, 16, 24, dtype=torch.float64)
    output = model(x)
    z, z_gist = by_hand(model.model, x, model.gist.token, readout == "mean")
    assert model.gist.token.shape == (1, length, 32) and (z - z_gist).abs().max() > 1e-2
    close = {"rtol": 1e-5, "atol": 1e-6}  # timm keeps its rotation in float32
    torch.testing.assert_close(output.logits, z, **close)
    torch.testing.assert_close(output.gist_logits, z_gist, **close)
    ours = [p for p in model.parameters() if p.requires_grad]
    got, want = (torch.autograd.grad((a - 2 * b).square().sum(), ours) for a, b in (output.values(), (z, z_gist)))
    scale = max(g.abs().max() for g in want).item()
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g / scale, w / scale, **close)
    torch.testing.assert_close(model.eval()(x).logits, z, **close)
