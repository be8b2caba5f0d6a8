"""Swin's stages, blocks, window attention and patch merging with gist tokens beside the grid.

A grid of patches (B, H, W, C) with L tokens travels as one sequence (B, L + H W, C), tokens first, and its size (H, W):
norms, MLPs, adapters and residuals then work on all rows in one call. Only window attention takes it apart:

- every window gets a copy of its image's tokens, before its patches; windows are numbered image by image, as timm does;
- a token and the patches of its window all see each other, in shifted windows too. What timm lets patches see is left
  as it is: the mask between the parts of a shifted window, and the zeros that fill up a grid;
- the position bias has no entry for a token: it gets the neutral value, 0 in Swin and 16 sigmoid(0) = 8 in Swin V2,
  whose biases lie between 0 and 16 (with 0 there, the patches would give a token e^-8 of what they give each other);
- after attention an image's token is the mean of its copies in that image's windows, whether a window is full or not.
  What stands around attention, such as an adapter behind it, works on every copy.

Patch merging joins four patches side by side; a token is joined with itself, four times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.integrations.timm.blocks import plain_add, queries_keys_values, run_mlp

__all__ = [
    "PackedForward",
    "Size",
    "check_parts",
    "pack_forwards",
    "run_swin_block",
    "run_swin_v2_block",
    "swin_classes",
    "unpack_forwards",
]

Size = tuple[int, int]


def run_swin_block(block: Any, add: Any, x: Tensor, size: Size | None = None) -> Tensor:
    """timm's SwinTransformerBlock with its two additions left to ``add``: x (B, H, W, C), or packed with its size."""
    if size is None:
        return run_swin_block(block, add, x.flatten(1, 2), (x.shape[1], x.shape[2])).reshape(x.shape)
    x = add("attention", x, block.drop_path1(attend_windows(block, block.norm1(x), size)))
    return add("mlp", x, block.drop_path2(run_mlp(block.mlp, block.norm2(x))))


def run_swin_v2_block(block: Any, add: Any, x: Tensor, size: Size | None = None) -> Tensor:
    """timm's SwinTransformerV2Block, which norms what its branches return, in the same way."""
    if size is None:
        return run_swin_v2_block(block, add, x.flatten(1, 2), (x.shape[1], x.shape[2])).reshape(x.shape)
    x = add("attention", x, block.drop_path1(block.norm1(attend_windows(block, x, size))))
    return add("mlp", x, block.drop_path2(block.norm2(run_mlp(block.mlp, x))))


def attend_windows(block: Any, x: Tensor, size: Size) -> Tensor:
    """A block's (shifted) window attention for a packed sequence (B, L + H W, C)."""
    height, width = size
    tokens = x.shape[1] - height * width
    if tokens == 0:
        return block._attn(x.unflatten(1, size)).flatten(1, 2)
    token, grid = x[:, :tokens], x[:, tokens:].unflatten(1, size)
    (down, right), (window_h, window_w) = block.shift_size, block.window_size
    if down or right:
        grid = torch.roll(grid, (-down, -right), (1, 2))
    grid = nn.functional.pad(grid, (0, 0, 0, -width % window_w, 0, -height % window_h))
    rows, columns = grid.shape[1] // window_h, grid.shape[2] // window_w
    cut = grid.unflatten(1, (rows, window_h)).unflatten(3, (columns, window_w)).transpose(2, 3)
    cut = cut.flatten(3, 4).flatten(1, 2)  # (B, windows, patches of one, C)
    copies = token[:, None].expand(-1, rows * columns, -1, -1)
    mask = block.get_attn_mask(grid) if getattr(block, "dynamic_mask", False) else block.attn_mask
    if mask is not None:
        mask = nn.functional.pad(mask, (tokens, 0, tokens, 0))
    out = block.attn(torch.cat((copies, cut), dim=2).flatten(0, 1), mask=mask)
    out = out.unflatten(0, (x.shape[0], rows * columns))
    token, cut = out[:, :, :tokens].mean(1), out[:, :, tokens:]
    grid = cut.unflatten(2, (window_h, window_w)).unflatten(1, (rows, columns)).transpose(2, 3)
    grid = grid.flatten(3, 4).flatten(1, 2)[:, :height, :width]
    if down or right:
        grid = torch.roll(grid, (down, right), (1, 2))
    return torch.cat((token, grid.flatten(1, 2)), dim=1)


def run_window_attention(attention: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """timm's WindowAttention (both versions) for windows (B windows, L + patches, C) and a mask (windows, N, N)."""
    q, k, v = queries_keys_values(attention, x)
    second = hasattr(attention, "logit_scale")
    bias = _position_bias_v2(attention) if second else attention._get_rel_pos_bias()[0]
    tokens = x.shape[1] - bias.shape[-1]
    bias = nn.functional.pad(bias, (tokens, 0, tokens, 0), value=8.0 if second else 0.0)[None]
    if mask is not None:
        bias = bias + mask[:, None]  # (1 or windows, heads, N, N)
    if getattr(attention, "fused_attn", False):
        p = attention.attn_drop.p if attention.training else 0.0
        each = (
            bias.expand(q.shape[0], -1, -1, -1) if mask is None else bias.repeat(q.shape[0] // mask.shape[0], 1, 1, 1)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=each, dropout_p=p)
    else:
        if second:
            q, k = (nn.functional.normalize(t, dim=-1) for t in (q, k))
            scores = q @ k.transpose(-2, -1) * attention.logit_scale.clamp(max=_HIGHEST_SCALE).exp()
        else:
            scores = (q * attention.scale) @ k.transpose(-2, -1)
        scores = (scores.unflatten(0, (-1, bias.shape[0])) + bias).flatten(0, 1)
        out = attention.attn_drop(attention.softmax(scores)) @ v
    return attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2)))


#: Swin V2's cosine scores are multiplied by at most 100.
_HIGHEST_SCALE = 4.605170185988092


def _position_bias_v2(attention: Any) -> Tensor:
    """Swin V2's bias (heads, patches, patches): between 0 and 16, by a small network of the (log-spaced) distance."""
    table = attention.cpb_mlp(attention.relative_coords_table).reshape(-1, attention.num_heads)
    return 16 * torch.sigmoid(table[attention.relative_position_index].permute(2, 0, 1))


def _join_fours(x: Tensor, size: Size) -> tuple[Tensor, Size]:
    """Every two by two patches side by side, in timm's order: (B, L + H W, C) -> (B, L + H/2 W/2, 4 C), rounded up."""
    height, width = size
    tokens = x.shape[1] - height * width
    grid = nn.functional.pad(x[:, tokens:].unflatten(1, size), (0, 0, 0, width % 2, 0, height % 2))
    size = (grid.shape[1] // 2, grid.shape[2] // 2)
    fours = grid.unflatten(1, (size[0], 2)).unflatten(3, (size[1], 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return torch.cat((x[:, :tokens].repeat(1, 1, 4), fours.flatten(1, 2)), dim=1), size


def run_merging(merging: Any, x: Tensor, size: Size) -> tuple[Tensor, Size]:
    """timm's PatchMerging of Swin for a packed sequence."""
    x, size = _join_fours(x, size)
    return merging.reduction(merging.norm(x)), size


def run_merging_v2(merging: Any, x: Tensor, size: Size) -> tuple[Tensor, Size]:
    """timm's PatchMerging of Swin V2, which norms last."""
    x, size = _join_fours(x, size)
    return merging.norm(merging.reduction(x)), size


def run_stage(stage: Any, x: Tensor, size: Size | None = None) -> tuple[Tensor, Size]:
    """A stage: the first gets a grid (B, H, W, C), into which its ``downsample`` puts the tokens."""
    x, size = stage.downsample(x) if size is None else stage.downsample(x, size)
    if stage.grad_checkpointing:
        from timm.models import checkpoint
    for block in stage.blocks:
        x = checkpoint(block, x, size) if stage.grad_checkpointing else block(x, size)
    return x, size


def _packed_block(block: Any, x: Tensor, size: Size) -> Tensor:
    return run_swin_block(block, plain_add, x, size)


def _packed_v2_block(block: Any, x: Tensor, size: Size) -> Tensor:
    return run_swin_v2_block(block, plain_add, x, size)


def swin_classes() -> tuple[Any, Any]:
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return SwinTransformer, SwinTransformerV2


def _runs() -> dict[type, Callable[..., Any]]:
    """Class of a module -> its forward for packed sequences."""
    from timm.models import swin_transformer as v1
    from timm.models import swin_transformer_v2 as v2

    return {
        v1.SwinTransformerStage: run_stage,
        v2.SwinTransformerV2Stage: run_stage,
        v1.PatchMerging: run_merging,
        v2.PatchMerging: run_merging_v2,
        v1.SwinTransformerBlock: _packed_block,
        v2.SwinTransformerV2Block: _packed_v2_block,
        v1.WindowAttention: run_window_attention,
        v2.WindowAttention: run_window_attention,
    }


def check_parts(model: Any) -> None:
    """Raise ValueError where a part that tokens go through is of a kind that is not known (a subclass, say)."""
    runs = _runs()
    for stage in model.layers:
        blocks = [getattr(block, "base_layer", block) for block in stage.blocks]
        parts = [stage, *blocks, *(getattr(block.attn, "base_layer", block.attn) for block in blocks)]
        if not isinstance(stage.downsample, nn.Identity):
            parts.append(stage.downsample)
        for part in parts:
            if type(part) not in runs or not _PARTS.issuperset(part._modules):
                raise ValueError(
                    f"add_gist: how a gist token goes through a {type(part).__name__} is not known (through timm's own "
                    "Swin stages, blocks, window attention and patch merging it is)"
                )


#: What the code here does with a part's modules; a version of timm that has more is left alone.
_PARTS = frozenset(
    "downsample blocks norm1 attn drop_path1 norm2 mlp drop_path2 qkv softmax attn_drop proj proj_drop cpb_mlp norm "
    "reduction".split()
)


class PackedForward:
    """A module's forward for packed sequences, in the place of its own; copied and pickled with it."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self.module, self.run = module, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.module, *args, **kwargs)


def pack_forwards(model: Any) -> None:
    """Let every part of ``model.layers`` work on packed sequences."""
    runs = _runs()
    for module in model.layers.modules():
        if type(module) in runs:
            module.forward = PackedForward(module, runs[type(module)])


def unpack_forwards(model: Any) -> None:
    """Undo :func:`pack_forwards`."""
    for module in model.layers.modules():
        if isinstance(module.__dict__.get("forward"), PackedForward):
            del module.forward
