"""timm's vision transformers: VisionTransformer and its subclasses, and Eva (EVA-02, DINOv3).

The gist token goes in before ``norm_pre``: after the position embedding, ``pos_drop`` and patch dropout, right after
the prefix tokens. Whatever counts prefix tokens from there on (attention with rotary embedding, pooling, the split into
prefix and patches) counts it too; what runs earlier (position embedding, its resampling, patch dropout) does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist import GistConfig, GistHost
from fastgist.integrations.timm.blocks import ATTENTION_PARTS, BLOCK_PARTS, run_attention, run_block, run_eva_block
from fastgist.integrations.timm.prefix import GIST_PATH, count_prefix, own_prefix
from fastgist.integrations.timm.rowwise import Rowwise
from fastgist.nn import BlockForward
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
        return (GIST_PATH,)

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


class TimmViTGist(GistHost):
    """A gist token in a timm ViT.

    Raises:
        ValueError: no class token to stand after, or pooling that a gist token has no part in.
    """

    path = GIST_PATH
    last = "head"

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
        self.rowwise = Rowwise() if self.plain_forward else None

    def attached(self, model: Any, length: int) -> None:
        count_prefix(model)

    def detached(self, model: Any, length: int) -> None:
        count_prefix(model)

    # -- forward -----------------------------------------------------------------------------------------------------
    def forward(self, model: Any, config: GistConfig, want_gist: bool, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: (B, 3, H, W) -> logits (B, C) and gist logits (B, C) or None."""
        logits = model.head(self.rows(model, config, x, want_gist=want_gist))  # one call: the halves are contiguous
        batch = x.shape[0]
        return (logits[:batch], logits[batch:]) if want_gist else (logits, None)

    def rows(self, model: Any, config: GistConfig, x: Tensor, want_gist: bool = True) -> Tensor:
        """x: (B, 3, H, W) -> (2 B, D), or (B, D) for the prediction alone: what goes into the head."""
        if self.rowwise is not None and model.global_pool == "token" and self.rowwise.serves(model):
            rows = self._last_rows(model, config, want_gist, x)
            z, gist = rows[:, 0], rows[:, 1:]
        else:
            features = model.forward_features(x)
            z, gist = model.pool(features), features[:, self.index : self.index + config.rows]
        if not want_gist:
            return model.head_drop(model.fc_norm(z))
        if config.rows > 1 and not isinstance(model.fc_norm, nn.Identity):
            gist = model.fc_norm(gist)  # the mean is of final, normed states
            both = torch.cat((model.fc_norm(z), gist.mean(1)))
        else:
            both = model.fc_norm(torch.cat((z, gist.mean(1) if config.rows > 1 else gist[:, 0])))
        return model.head_drop(both)

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


register_family(TimmViT())
