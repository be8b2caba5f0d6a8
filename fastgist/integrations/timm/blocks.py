"""timm's blocks and attention layers, run with their additions, or their keys and values, left open."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgist.functional import gelu
from fastgist.gist.loss import hooked_everywhere
from fastgist.nn import AdaptedBlock, AdaptedLayer, PromptedBlock, is_hooked, is_plain
from fastgist.ops._projection import project_to_heads

__all__ = [
    "ATTENTION_PARTS",
    "BLOCK_PARTS",
    "attend",
    "attend_and_project",
    "example_images",
    "is_watched",
    "open_block",
    "plain_add",
    "plain_block",
    "project",
    "queries_keys_values",
    "run_attention",
    "run_beit_attention",
    "run_beit_block",
    "run_block",
    "run_eva_block",
    "run_mlp",
    "separate_biases",
    "split_heads",
]

#: What the code here does with a block's parts; a version of timm that has more is left alone.
BLOCK_PARTS = frozenset({"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"})


#: What the code here does with an attention layer's parts.
ATTENTION_PARTS = frozenset(
    ("qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")
)


def run_attention(
    attention: Any,
    extend: Any,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """timm's Attention, AttentionRope or EvaAttention with keys and values (B, heads, N, d) passed through ``extend``."""
    if is_causal:
        raise ValueError("an attention layer with a prefix cannot be causal")
    q, k, v = queries_keys_values(attention, x)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        q, k = (_rotated(attention, t, rope).type_as(v) for t in (q, k))
    groups = getattr(attention, "num_kv_groups", 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    k, v = extend(k, v)
    if attn_mask is not None:  # every query sees the prefix
        seen = True if attn_mask.dtype == torch.bool else 0.0
        attn_mask = nn.functional.pad(attn_mask, (k.shape[2] - q.shape[2], 0), value=seen)
    return attend_and_project(attention, q, k, v, x, attn_mask)


def run_beit_attention(attention: Any, extend: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """timm's BEiT Attention in the same way; the position bias of what ``extend`` puts before the keys is 0."""
    q, k, v = queries_keys_values(attention, x)
    bias = shared_rel_pos_bias
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()
        bias = own if bias is None else own + bias
    k, v = extend(k, v)
    if bias is not None:
        bias = nn.functional.pad(bias, (k.shape[2] - q.shape[2], 0))
    return attend_and_project(attention, q, k, v, x, bias)


def queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, heads, N, d) of x (B, N, D), before any norm."""
    if attention.qkv is None:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        head_dim = attention.q_proj.out_features // attention.num_heads
        q, k, v = (layer(x).unflatten(-1, (-1, head_dim)).transpose(1, 2) for layer in layers)
        return q, k, v
    if _apart(attention, x):
        return project_to_heads(x, attention.qkv.weight, attention.qkv.bias, attention.num_heads)
    qkv = attention.qkv(x)
    if getattr(attention, "q_bias", None) is not None:
        qkv = qkv + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    q, k, v = split_heads(qkv, 3, attention.num_heads)
    return q, k, v


def _apart(attention: Any, x: Tensor) -> bool:
    """Whether the gradients of q, k and v are best left apart: on a GPU in half precision, behind a frozen layer."""
    qkv = attention.qkv
    return (
        _in_half_on_gpu(x)
        and x.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
        and is_plain(qkv)
        and not (is_watched(qkv) or hooked_everywhere())
        and not any(t is not None and (t.requires_grad or t.dtype != x.dtype) for t in (qkv.weight, qkv.bias))
        and getattr(attention, "q_bias", None) is None
    )


def split_heads(packed: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """packed (B, N, parts heads d) -> ``parts`` tensors (B, heads, N, d), all of them views.

    Taken apart before heads and rows change places: an attention kernel's gradients are stored row by row, so they are
    put together in one pass over memory. The other way round autograd copies them twice, element by element: 8 of an
    eager ViT-B/16's 60 ms a step at batch 256 on an H200.
    """
    return tuple(part.transpose(1, 2) for part in packed.unflatten(-1, (parts, heads, -1)).unbind(2))


def _rotated(attention: Any, t: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
    return torch.cat((t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)), dim=2)


def attend(attention: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """``attention(x, **kwargs)``, with timm's Attention and an adapter around it written out: the same numbers, see
    :func:`split_heads` for why. A layer of another type, one that somebody watches and one with a mask are called."""
    asked = any(not (value is None or value is False) for value in kwargs.values())
    if asked or is_watched(attention) or hooked_everywhere():
        return attention(x, **kwargs)
    if type(attention) is AdaptedLayer:
        return attention.combine(x, attend(attention.base_layer, x))
    from timm.layers import Attention

    if type(attention) is Attention and ATTENTION_PARTS.issuperset(attention._modules):
        return run_attention(attention, lambda k, v: (k, v), x)
    return attention(x, **kwargs)


def attend_and_project(
    attention: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """Softmax, values and everything after them, for queries q (B, heads, n, d) that came from ``rows`` (B, n, D)."""
    if attention.fused_attn:
        p = attention.attn_drop.p if attention.training else 0.0
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=p)
    else:
        weights = (q * attention.scale) @ k.transpose(-2, -1)
        if attn_mask is not None:
            weights = (
                weights.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else weights + attn_mask
            )
        out = attention.attn_drop(weights.softmax(dim=-1)) @ v
    return project(attention, out, rows)


def project(attention: Any, out: Tensor, rows: Tensor) -> Tensor:
    """What comes after the values, for ``out`` (B, heads, n, d)."""
    out = out.transpose(1, 2).flatten(2)
    norm = getattr(attention, "norm", None)
    if norm is not None:
        out = norm(out)
    gate = getattr(attention, "gate", None)
    if gate is not None:
        out = out * gate(rows).sigmoid()
    return attention.proj_drop(attention.proj(out))


def plain_add(kind: str, x: Tensor, branch: Tensor) -> Tensor:
    return x + branch


def run_block(
    block: Any,
    add: Any,
    x: Tensor,
    *,
    recompute: bool = False,
    attention: Callable[[Tensor], Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """timm's Block with its two additions left to ``add``.

    ``attention``: in the place of norm and attention, a function of x.

    ``recompute``: the MLP keeps nothing but x for its backward, which forms the first product again. (Not the second: its
    layer is frozen and keeps no input, and recomputation stops at the last thing that was kept.)
    """
    out = attend(block.attn, block.norm1(x), **kwargs) if attention is None else attention(x)
    x = add("attention", x, block.drop_path1(block.ls1(out)))
    if recompute and torch.is_grad_enabled():
        # The generators' state is noted where something may draw: it costs the host time.
        branch = checkpoint(_normed_mlp, block, x, use_reentrant=False, preserve_rng_state=not _is_quiet(block))
    else:
        branch = _normed_mlp(block, x)
    return add("mlp", x, block.drop_path2(block.ls2(branch)))


def _is_quiet(block: Any) -> bool:
    """Whether norm and MLP surely draw no random numbers."""
    from timm.layers import LayerNorm

    layers = (block.mlp.fc1, block.mlp.fc2) if _is_plain_mlp(block.mlp) else (None,)
    if type(block.norm2) not in (nn.LayerNorm, LayerNorm) or is_watched(block.norm2):
        return False
    return all(layer is not None and is_plain(layer) and not is_watched(layer) for layer in layers)


def _normed_mlp(block: Any, x: Tensor) -> Tensor:
    return run_mlp(block.mlp, block.norm2(x))


def plain_block(block: Any) -> Any:
    """timm's Block inside ``block``, which is one or one of our wrappers; None where it is another or somebody watches."""
    from timm.models.vision_transformer import Block

    inner = block.base_layer if type(block) in (AdaptedBlock, PromptedBlock) else block
    if type(block) is AdaptedBlock and block.run is not run_block:  # somebody's own
        return None
    if type(inner) is not Block or not BLOCK_PARTS.issuperset(inner._modules) or is_watched(block) or is_watched(inner):
        return None
    return inner


def open_block(
    block: Any, recompute: bool = False, attention: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    """``block`` as a function of x that runs timm's Block, plain or in one of our wrappers, by :func:`run_block`; the block
    itself where it is another or somebody watches."""
    inner = plain_block(block)
    if inner is None:
        return block
    add = block.add if type(block) is AdaptedBlock else plain_add
    run = functools.partial(run_block, inner, add, recompute=recompute, attention=attention)
    if type(block) is not PromptedBlock:
        return run
    return lambda x: run(block.place(x))


def run_mlp(mlp: Any, x: Tensor) -> Tensor:
    """``mlp(x)``; on a GPU in half precision with our GELU between the layers of timm's Mlp.

    By erf, GELU took 5.9 of the 52.6 ms of a ViT-B/16's compiled step at batch 256 on an H200; this one takes 4.0, the time
    of its bytes.
    """
    if not _in_half_on_gpu(x):
        return mlp(x)
    if type(mlp) is AdaptedLayer and not is_watched(mlp):
        return mlp.combine(x, run_mlp(mlp.base_layer, x))
    return mlp.fc2(gelu(mlp.fc1(x))) if _is_plain_mlp(mlp) else mlp(x)


def _in_half_on_gpu(x: Tensor) -> bool:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False  # torch.func goes through torch's own operators
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return x.is_cuda and dtype in (torch.float16, torch.bfloat16)


def _is_plain_mlp(mlp: Any) -> bool:
    """Whether between its two layers, which are called as they are, nothing but an exact GELU happens, unwatched."""
    from timm.layers import GELU, Mlp

    return (
        type(mlp) is Mlp
        and mlp._modules.keys() == {"fc1", "act", "drop1", "norm", "fc2", "drop2"}
        and (type(mlp.act) is GELU or (type(mlp.act) is nn.GELU and mlp.act.approximate == "none"))
        and type(mlp.norm) is nn.Identity
        and all(type(drop) is nn.Dropout and not (drop.training and drop.p) for drop in (mlp.drop1, mlp.drop2))
        and not any(is_watched(part) for part in (mlp, mlp.act, mlp.drop1, mlp.norm, mlp.drop2))
        and not hooked_everywhere()
    )


def is_watched(module: nn.Module) -> bool:
    """Whether calling ``module`` runs something else than its class's forward."""
    return is_hooked(module) or module._compiled_call_impl is not None


def run_eva_block(block: Any, add: Any, x: Tensor, rope: Tensor | None = None, **kwargs: Any) -> Tensor:
    """timm's EvaBlock with its two additions left to ``add``."""
    return _run_scaled_block(block, add, x, rope=rope, **kwargs)


def run_beit_block(block: Any, add: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """timm's BEiT Block with its two additions left to ``add``."""
    return _run_scaled_block(block, add, x, shared_rel_pos_bias=shared_rel_pos_bias)


def _run_scaled_block(block: Any, add: Any, x: Tensor, **kwargs: Any) -> Tensor:
    branch = block.attn(block.norm1(x), **kwargs)
    x = add("attention", x, block.drop_path1(branch if block.gamma_1 is None else block.gamma_1 * branch))
    branch = _normed_mlp(block, x)
    return add("mlp", x, block.drop_path2(branch if block.gamma_2 is None else block.gamma_2 * branch))


def separate_biases(blocks: nn.Module) -> None:
    """Let attention layers with their q and v biases apart (EvaAttention, BEiT's, Swin V2's) call what stands in qkv's place.

    They pass qkv.weight to F.linear, past whatever was put around qkv, unless told otherwise. Once nothing stands there, a
    bias that was merged into qkv, which they would not read, goes to where they have theirs.
    """
    for module in blocks.modules():
        if getattr(module, "q_bias", None) is None or not hasattr(module, "qkv_bias_separate"):
            continue
        mine = module.__dict__.get("_fastgist_bias_was")
        wrapped = hasattr(module.qkv, "base_layer")
        if wrapped and mine is None:
            module._fastgist_bias_was = module.qkv_bias_separate
            module.qkv_bias_separate = True
        elif not wrapped and mine is not None:
            if not mine and module.qkv.bias is not None:
                _move_bias(module)
            module.qkv_bias_separate = mine
            del module._fastgist_bias_was


@torch.no_grad()
def _move_bias(attention: Any) -> None:
    """qkv's bias into q_bias, k_bias and v_bias. k_bias is a buffer of zeros that files do not hold: BEiT's softmax, which is
    over the keys, does not see what all keys have in common, and elsewhere (keys normed or rotated) it becomes persistent."""
    from timm.models.beit import Attention

    q, k, v = attention.qkv.bias.chunk(3)
    attention.q_bias.add_(q)
    attention.v_bias.add_(v)
    if type(attention) is not Attention and bool(k.any()):
        attention.register_buffer("k_bias", attention.k_bias + k, persistent=True)
    attention.qkv.bias = None


def example_images(model: Any) -> Tensor:
    """Two random images of the size, device and dtype that ``model`` takes."""
    size = model.patch_embed.img_size or (224, 224)
    proj = model.patch_embed.proj
    p = next(model.parameters())
    return torch.randn(2, getattr(proj, "base_layer", proj).in_channels, *size, device=p.device, dtype=p.dtype)
