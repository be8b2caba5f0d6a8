"""A Swin with gist tokens written out for one image, window by window and position by position, for the tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from vits import dense, layer_norm

__all__ = ["swin_by_hand"]


def swin_by_hand(model: nn.Module, image: Tensor, token: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(logits, gist logits) of one image (3, H, W); ``token`` (L, C) or None. Average pooling, no dropout."""
    second = hasattr(model.layers[0].blocks[0].attn, "logit_scale")
    embed, patch = model.patch_embed, model.patch_embed.patch_size[0]
    weight, bias = embed.proj.weight.flatten(1), embed.proj.bias
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    grid = {}
    for r in range(rows):
        for c in range(columns):
            piece = image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            grid[r, c] = layer_norm(embed.norm, weight @ piece.flatten() + bias)
    tokens = [] if token is None else list(token)
    for i, stage in enumerate(model.layers):
        if i > 0:
            grid, tokens, rows, columns = merge(stage.downsample, grid, tokens, rows, columns, norm_last=second)
        for block in stage.blocks:
            grid, tokens = run_block(block, grid, tokens, rows, columns, second)
    final = torch.stack([layer_norm(model.norm, state) for state in grid.values()])
    z = dense(model.head.fc, final.mean(0))
    return z, dense(model.head.fc, layer_norm(model.norm, tokens[0])) if tokens else None


def merge(merging, grid, tokens, rows, columns, norm_last):
    def reduce(x: Tensor) -> Tensor:
        if norm_last:
            return layer_norm(merging.norm, dense(merging.reduction, x))
        return dense(merging.reduction, layer_norm(merging.norm, x))

    nothing = torch.zeros_like(grid[0, 0])
    rows, columns = (rows + 1) // 2, (columns + 1) // 2
    merged = {}
    for r in range(rows):
        for c in range(columns):
            four = [(2 * r, 2 * c), (2 * r + 1, 2 * c), (2 * r, 2 * c + 1), (2 * r + 1, 2 * c + 1)]
            merged[r, c] = reduce(torch.cat([grid.get(place, nothing) for place in four]))
    return merged, [reduce(torch.cat([t, t, t, t])) for t in tokens], rows, columns


def run_block(block, grid, tokens, rows, columns, second):
    before = nn.Identity() if second else block.norm1
    after = block.norm1 if second else nn.Identity()
    attended, seen = attend(
        block,
        {place: layer_norm(before, x) for place, x in grid.items()},
        [layer_norm(before, t) for t in tokens],
        rows,
        columns,
        second,
    )
    grid = {place: x + layer_norm(after, attended[place]) for place, x in grid.items()}
    tokens = [t + layer_norm(after, s) for t, s in zip(tokens, seen, strict=True)]

    def branch(x: Tensor) -> Tensor:
        mlp, adapter = getattr(block.mlp, "base_layer", block.mlp), getattr(block.mlp, "adapter", None)
        out = dense(mlp.fc2, nn.functional.gelu(dense(mlp.fc1, x if second else layer_norm(block.norm2, x))))
        if adapter is not None:
            inside = nn.functional.gelu(out @ adapter.down_weight.T + adapter.down_bias)
            out = out + adapter.scale * (inside @ adapter.up_weight.T + adapter.up_bias)
        return layer_norm(block.norm2, out) if second else out

    return {place: x + branch(x) for place, x in grid.items()}, [t + branch(t) for t in tokens]


def attend(block, grid, tokens, rows, columns, second):
    """Attention in each window; the tokens are in all of them, and come out as the mean over the windows."""
    (high, wide), (down, right) = block.window_size, block.shift_size
    full_rows, full_columns = math.ceil(rows / high) * high, math.ceil(columns / wide) * wide

    def region(place: int, full: int, size: int, shift: int) -> int:
        return 0 if place < full - size else 1 if place < full - shift else 2

    out, sums, windows = {}, [0 * t for t in tokens], 0
    bias = bias_by_distance(block.attn, second)
    for top in range(0, full_rows, high):
        for left in range(0, full_columns, wide):
            places = [(r, c) for r in range(top, top + high) for c in range(left, left + wide)]
            came = [((r + down) % rows, (c + right) % columns) if r < rows and c < columns else None for r, c in places]
            states = [torch.zeros_like(grid[0, 0]) if p is None else grid[p] for p in came]
            count = len(tokens) + len(places)
            extra = torch.zeros(block.attn.num_heads, count, count, dtype=grid[0, 0].dtype)
            if second:
                extra += 8  # what a position bias of 0 before the sigmoid is
            for i, (ri, ci) in enumerate(places, len(tokens)):
                for j, (rj, cj) in enumerate(places, len(tokens)):
                    extra[:, i, j] = bias(ri - rj, ci - cj)
                    mine = region(ri, full_rows, high, down), region(ci, full_columns, wide, right)
                    theirs = region(rj, full_rows, high, down), region(cj, full_columns, wide, right)
                    if (down or right) and mine != theirs:
                        extra[:, i, j] -= 100
            result = softmax_attention(block.attn, torch.stack(tokens + states), extra, second)
            sums = [s + new for s, new in zip(sums, result, strict=False)]
            out |= {place: x for place, x in zip(came, result[len(tokens) :], strict=True) if place is not None}
            windows += 1
    return out, [s / windows for s in sums]


def softmax_attention(attn, x: Tensor, extra: Tensor, second: bool) -> Tensor:
    """x (N, C) -> (N, C), with ``extra`` (heads, N, N) on the scores."""
    qkv = dense(attn.qkv, x)
    if second:
        qkv = qkv + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    q, k, v = (part.reshape(len(x), attn.num_heads, -1).transpose(0, 1) for part in qkv.chunk(3, -1))
    if second:
        q, k = (t / t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (q, k))  # a filled-up place has k = 0
        scores = q @ k.transpose(1, 2) * attn.logit_scale.exp().clamp(max=100)
    else:
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return dense(attn.proj, ((scores + extra).softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1))


def bias_by_distance(attn, second: bool) -> Callable[[int, int], Tensor]:
    """(rows, columns) from key to query -> the position bias of each head."""
    high, wide = attn.window_size
    if not second:
        table = attn.relative_position_bias_table.reshape(2 * high - 1, 2 * wide - 1, -1)
        return lambda r, c: table[r + high - 1, c + wide - 1]

    def spaced(distance: int, size: int) -> float:
        x = 8 * distance / max(size - 1, 1)
        return math.copysign(math.log2(abs(x) + 1) / 3, x)

    known: dict[tuple[int, int], Tensor] = {}

    def bias(r: int, c: int) -> Tensor:
        if (r, c) not in known:
            place = torch.tensor([spaced(r, high), spaced(c, wide)], dtype=attn.logit_scale.dtype)
            first, _, last = attn.cpb_mlp
            known[r, c] = 16 * torch.sigmoid(dense(last, dense(first, place).relu()))
        return known[r, c]

    return bias
