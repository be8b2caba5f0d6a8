"""timm's vision transformers: VisionTransformer and its subclasses, and Eva (EVA-02, DINOv3).

The gist token goes in before ``norm_pre``: after the position embedding, ``pos_drop`` and patch dropout, right after
the prefix tokens. Whatever counts prefix tokens from there on (attention with rotary embedding, pooling, the split into
prefix and patches) counts it too; what runs earlier (position embedding, its resampling, patch dropout) does not.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist import GistConfig, GistHost
from fastgist.gist.model import GistInsert
from fastgist.nn import (
    AdaptedBlock,
    AdaptedLayer,
    Adapter,
    AffineLayer,
    BiasShift,
    BlockForward,
    CPFactors,
    CPLinear,
    LoRALinear,
    PrefixedAttention,
    PromptedBlock,
    ScaleShift,
    is_hooked,
    linear_slice,
)
from fastgist.peft.family import AttentionSite, Family, LinearSite, register_family

__all__ = ["TimmViT", "TimmViTGist"]

_QKV = ("q", "k", "v")


def _classes() -> tuple[Any, Any]:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer, Eva


class TimmViT(Family):
    """timm's VisionTransformer (with its subclasses) and Eva."""

    name = "timm VisionTransformer and Eva"

    def matches(self, model: Any) -> bool:
        return isinstance(model, _classes())

    def head_paths(self, model: Any) -> tuple[str, ...]:
        heads = ("head", "head_dist")
        return tuple(name for name in heads if isinstance(getattr(model, name, None), nn.Module))

    def linears(self, model: Any) -> list[LinearSite]:
        sites = []
        for path, module in model.blocks.named_modules(prefix="blocks"):
            if not all(isinstance(getattr(module, a, None), int) for a in ("in_features", "out_features")):
                continue
            leaf = path.rsplit(".", 1)[-1]
            if leaf == "qkv" and module.out_features % 3 == 0:
                sites.append(LinearSite(path, module, parts=_QKV))
            else:
                aliases = (leaf[0],) if leaf in ("q_proj", "k_proj", "v_proj") else ()
                sites.append(LinearSite(path, module, aliases))
        return sites

    def sublayers(self, model: Any) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"mlp": [], "attention": []}
        for path, _ in model.blocks.named_modules(prefix="blocks"):
            leaf = path.rsplit(".", 1)[-1]
            if leaf == "mlp":
                found["mlp"].append(path)
            elif leaf == "attn":
                found["attention"].append(path)
        return found

    def width(self, model: Any, path: str) -> int:
        return model.embed_dim

    def attentions(self, model: Any) -> dict[str, AttentionSite]:
        from timm.layers.attention import Attention, AttentionRope
        from timm.models.eva import EvaAttention

        found = {}
        for path in self.sublayers(model)["attention"]:
            attention = model.get_submodule(path)
            kind = type(attention)
            if kind not in (Attention, AttentionRope, EvaAttention) or not ATTENTION_PARTS.issuperset(
                attention._modules
            ):
                raise ValueError(f"what happens inside {kind.__name__} is not known (inside timm's Attention it is)")
            inside = attention.proj.in_features
            found[path] = AttentionSite(run_attention, attention.num_heads, inside // attention.num_heads)
        return found

    def prompt_blocks(self, model: Any) -> list[str]:
        if model.global_pool != "token" and getattr(model, "pool_include_prefix", False):
            raise ValueError(f"{type(model).__name__} pools its prefix tokens; the prompts would enter the prediction")
        return [f"blocks.{i}" for i in range(len(model.blocks))]

    def after_change(self, model: Any) -> None:
        count_prefix(model)
        head = model.head
        if isinstance(head, nn.Linear):
            model.num_classes = head.out_features
        for module in model.blocks.modules():
            # EvaAttention passes qkv.weight to F.linear, past whatever stands in qkv's place, unless told otherwise
            if getattr(module, "q_bias", None) is not None and hasattr(module, "qkv_bias_separate"):
                mine = module.__dict__.get("_fastgist_bias_was")
                wrapped = hasattr(module.qkv, "base_layer")
                if wrapped and mine is None:
                    module._fastgist_bias_was = module.qkv_bias_separate
                    module.qkv_bias_separate = True
                elif not wrapped and mine is not None:
                    module.qkv_bias_separate = mine
                    del module._fastgist_bias_was

    def reserved_paths(self, model: Any) -> tuple[str, ...]:
        return (TimmViTGist.path,)

    def residual_blocks(self, model: Any) -> dict[str, BlockForward]:
        from timm.models.eva import EvaBlock
        from timm.models.vision_transformer import Block

        runs: dict[type, BlockForward] = {Block: run_block, EvaBlock: run_eva_block}
        found = {}
        for i, block in enumerate(model.blocks):
            kind = type(block)
            if kind not in runs or not BLOCK_PARTS.issuperset(block._modules):
                raise ValueError(f"how a {kind.__name__} adds up is not known (timm's Block and EvaBlock are)")
            found[f"blocks.{i}"] = runs[kind]
        return found

    def example_inputs(self, model: Any) -> tuple[Tensor]:
        size = model.patch_embed.img_size or (224, 224)
        p = next(model.parameters())
        channels = getattr(model, "in_chans", None) or model.patch_embed.proj.in_channels
        return (torch.randn(2, channels, *size, device=p.device, dtype=p.dtype),)

    def gist_host(self, model: Any) -> TimmViTGist:
        return TimmViTGist(model)


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
    q, k, v = _queries_keys_values(attention, x)
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
    return _attend_and_project(attention, q, k, v, x, attn_mask)


def _queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, heads, N, d) of x (B, N, D), before any norm."""
    if attention.qkv is None:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        head_dim = attention.q_proj.out_features // attention.num_heads
        q, k, v = (layer(x).unflatten(-1, (-1, head_dim)).transpose(1, 2) for layer in layers)
        return q, k, v
    qkv = attention.qkv(x)
    if getattr(attention, "q_bias", None) is not None:
        qkv = qkv + torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _rotated(attention: Any, t: Tensor, rope: Tensor) -> Tensor:
    from timm.layers import apply_rot_embed_cat

    prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
    return torch.cat((t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)), dim=2)


def _attend_and_project(
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
    out = attention.norm(out.transpose(1, 2).flatten(2))
    gate = getattr(attention, "gate", None)
    if gate is not None:
        out = out * gate(rows).sigmoid()
    return attention.proj_drop(attention.proj(out))


def _plain_add(kind: str, x: Tensor, branch: Tensor) -> Tensor:
    return x + branch


def run_block(block: Any, add: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """timm's Block with its two additions left to ``add``."""
    x = add("attention", x, block.drop_path1(block.ls1(block.attn(block.norm1(x), **kwargs))))
    return add("mlp", x, block.drop_path2(block.ls2(block.mlp(block.norm2(x)))))


def run_eva_block(block: Any, add: Any, x: Tensor, rope: Tensor | None = None, **kwargs: Any) -> Tensor:
    """timm's EvaBlock with its two additions left to ``add``."""
    branch = block.attn(block.norm1(x), rope=rope, **kwargs)
    x = add("attention", x, block.drop_path1(branch if block.gamma_1 is None else block.gamma_1 * branch))
    branch = block.mlp(block.norm2(x))
    return add("mlp", x, block.drop_path2(branch if block.gamma_2 is None else block.gamma_2 * branch))


class TimmViTGist(GistHost):
    """A gist token in a timm ViT.

    Raises:
        ValueError: no class token to stand after, or pooling that a gist token has no part in.
    """

    path = "norm_pre"

    def __init__(self, model: Any) -> None:
        vit, eva = _classes()
        name = type(model).__name__
        family = vit if isinstance(model, vit) else eva
        if getattr(model, "cls_token", None) is None:
            raise ValueError(f"add_gist: {name} has no class token, and the gist token's place is right after it")
        if model.attn_pool is not None or model.global_pool not in ("token", "avg", "avgmax", "max"):
            raise ValueError(
                f"add_gist: {name} has global_pool={model.global_pool!r}; the head must read the class token or pooled "
                "patches (token, avg, avgmax or max) for the gist token to share it"
            )
        if model.global_pool != "token" and getattr(model, "pool_include_prefix", False):
            raise ValueError(f"add_gist: {name} pools its prefix tokens too; the gist token would enter the prediction")
        for method in ("forward_head", "pool"):
            if getattr(type(model), method) is not getattr(family, method):
                raise ValueError(
                    f"add_gist: {name} has a {method} of its own; which logits the gist token shares is not known"
                )
        self.index = own_prefix(model)
        self.dim = model.embed_dim
        self.plain_forward = (
            family is vit
            and type(model).forward_features is vit.forward_features
            and type(model)._pos_embed is vit._pos_embed
        )
        self.rowwise = _Rowwise() if self.plain_forward else None

    def attached(self, model: Any, length: int) -> None:
        count_prefix(model)

    def detached(self, model: Any, length: int) -> None:
        count_prefix(model)

    # -- forward -----------------------------------------------------------------------------------------------------
    def forward(self, model: Any, config: GistConfig, want_gist: bool, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: (B, 3, H, W) -> logits (B, C) and gist logits (B, C) or None."""
        if self.rowwise is not None and model.global_pool == "token" and self.rowwise.serves(model):
            rows = self._last_rows(model, config, want_gist, x)
            z, gist = rows[:, 0], rows[:, 1:]
        else:
            features = model.forward_features(x)
            z, gist = model.pool(features), features[:, self.index : self.index + config.rows]
        if not want_gist:
            return model.head(model.head_drop(model.fc_norm(z))), None
        if config.rows > 1 and not isinstance(model.fc_norm, nn.Identity):
            gist = model.fc_norm(gist)  # the mean is of final, normed states
            both = torch.cat((model.fc_norm(z), gist.mean(1)))
        else:
            both = model.fc_norm(torch.cat((z, gist.mean(1) if config.rows > 1 else gist[:, 0])))
        logits = model.head(model.head_drop(both))  # one call: the halves are contiguous
        batch = x.shape[0]
        return logits[:batch], logits[batch:]

    def _last_rows(self, model: Any, config: GistConfig, want_gist: bool, x: Tensor) -> Tensor:
        """forward_features, but of the last block and the norm only the rows that are read: (B, 1 or 1 + rows, D)."""
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        checkpointing = model.grad_checkpointing
        if checkpointing:
            from timm.models import checkpoint
        *blocks, last = model.blocks
        for block in blocks:
            x = checkpoint(block, x) if checkpointing else block(x)
        count = config.rows if want_gist else 0

        def rows(x: Tensor) -> Tensor:
            return self.rowwise.block(last, x, self.index, count)  # type: ignore[union-attr]

        return model.norm(checkpoint(rows, x) if checkpointing else rows(x))


def own_prefix(model: Any) -> int:
    """How many prefix tokens the model itself has: class and register tokens, no gist token and no prompts."""
    return model.__dict__.get(_COUNTED, (model.num_prefix_tokens, 0))[0]


#: Where a model keeps (its own prefix tokens, ours that its counters include).
_COUNTED = "_fastgist_prefix"


def count_prefix(model: Any) -> None:
    """Bring everything that counts prefix tokens in line with the gist token and the prompts that are there now."""
    own, counted = model.__dict__.get(_COUNTED, (model.num_prefix_tokens, 0))
    insert = model.get_submodule(TimmViTGist.path)
    gist = insert.gist.length if isinstance(insert, GistInsert) else 0
    prompted = [block for block in model.blocks if isinstance(block, PromptedBlock)]
    ours = gist + (prompted[0].length if prompted else 0)
    for block in prompted:
        block.index = own + gist
    model.num_prefix_tokens = own + ours
    for module in model.blocks.modules():  # rotary attention leaves the prefix unrotated
        if isinstance(getattr(module, "num_prefix_tokens", None), int):
            module.num_prefix_tokens += ours - counted
    for method in ("_pos_embed", "set_input_size", _COUNTED):
        model.__dict__.pop(method, None)
    if ours:
        model.__dict__[_COUNTED] = (own, ours)
        if model.dynamic_img_size:
            model._pos_embed = _WithOwnPrefix(model, "_pos_embed", own)
        if hasattr(model, "set_input_size"):
            model.set_input_size = _WithOwnPrefix(model, "set_input_size", own)


class _WithOwnPrefix:
    """A method of ``model`` that sees the number of the model's own prefix tokens; copied and pickled with it."""

    def __init__(self, model: Any, method: str, prefix: int) -> None:
        self.model, self.method, self.prefix = model, method, prefix

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.method == "_pos_embed":  # runs in every forward: read through a view, so that threads do not meet
            return type(self.model)._pos_embed(_View(self.model, self.prefix), *args, **kwargs)
        counted, pos_embed = self.model.num_prefix_tokens, self.model.pos_embed
        self.model.num_prefix_tokens = self.prefix
        try:
            return getattr(type(self.model), self.method)(self.model, *args, **kwargs)
        finally:
            self.model.num_prefix_tokens = counted
            if pos_embed is not None:  # a resampled one is a new parameter, which older versions of timm unfreeze
                self.model.pos_embed.requires_grad_(pos_embed.requires_grad)


class _View:
    """Reads a model's attributes, but for num_prefix_tokens."""

    def __init__(self, model: Any, prefix: int) -> None:
        self.model = model
        self.num_prefix_tokens = prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class _Rowwise:
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
        ours += [PromptedBlock, ScaleShift]
        self.known = self.norms | {Block, layers.Attention, nn.Linear, nn.Dropout, *activations, *others, *ours}

    def serves(self, model: Any) -> bool:
        """Whether the last block may be computed in part."""
        from torch.nn.modules import module as torch_module

        blocks = model.blocks
        if type(blocks) is not nn.Sequential or len(blocks) == 0 or is_hooked(blocks):
            return False
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
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
        add = _plain_add
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
        k, v = kv.reshape(batch, -1, 2, heads, attention.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q = q.reshape(batch, number, heads, attention.head_dim).transpose(1, 2)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if extend is not None:
            k, v = extend(k, v)
        return _attend_and_project(attention, q, k, v, rows)


register_family(TimmViT())
