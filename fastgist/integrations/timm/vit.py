"""timm's vision transformers: VisionTransformer and its subclasses, Eva (EVA-02, DINOv3) and Beit.

The gist token goes in before ``norm_pre``: after the position embedding, ``pos_drop`` and patch dropout, right after
the prefix tokens. Whatever counts prefix tokens from there on (attention with rotary embedding, pooling, the split into
prefix and patches) counts it too; what runs earlier (position embedding, its resampling, patch dropout) does not. A Beit
has no ``norm_pre``: there it goes in behind ``pos_drop``, and in the relative position bias it is a second class token.

A distilled DeiT predicts with the mean of two classifiers, of its class and its distillation token: the gist's logits are
the mean of both classifiers for the gist token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist import GistConfig, GistHost
from fastgist.integrations.timm.blocks import (
    ATTENTION_PARTS,
    BLOCK_PARTS,
    example_images,
    open_block,
    plain_block,
    run_attention,
    run_beit_attention,
    run_beit_block,
    run_block,
    run_eva_block,
    separate_biases,
)
from fastgist.integrations.timm.first import FirstBlock
from fastgist.integrations.timm.patches import embed_patches
from fastgist.integrations.timm.prefix import count_prefix, gist_path, own_prefix
from fastgist.integrations.timm.rowwise import Rowwise
from fastgist.nn import AttentionForward, BlockForward
from fastgist.peft.family import AttentionSite, Family, LinearSite, register_family

__all__ = ["TimmViT", "TimmViTGist"]

_QKV = ("q", "k", "v")
#: A layer's own name -> others that targets know it by. A gated MLP may have its first layer in two.
_ALIASES = {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",), "fc1_g": ("fc1",), "fc1_x": ("fc1",)}


def _classes() -> tuple[Any, Any, Any, Any]:
    """VisionTransformerDistilled, VisionTransformer (its base), Eva, Beit."""
    from timm.models.beit import Beit
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformerDistilled, VisionTransformer, Eva, Beit


def _pools_prefix(model: Any) -> bool:
    """Whether the prediction is pooled from all rows, prefix tokens included."""
    if model.global_pool == "token":
        return False
    attentive = getattr(model, "attn_pool", None) is not None and not hasattr(model, "pool_include_prefix")  # Eva's
    return attentive or getattr(model, "pool_include_prefix", False)


class TimmViT(Family):
    """timm's VisionTransformer (with its subclasses), Eva and Beit."""

    name = "timm VisionTransformer, Eva and Beit"

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
                sites.append(LinearSite(path, module, _ALIASES.get(leaf, ())))
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
        from timm.models.beit import Attention as BeitAttention
        from timm.models.eva import EvaAttention

        runs: dict[type, AttentionForward] = dict.fromkeys((Attention, AttentionRope, EvaAttention), run_attention)
        runs[BeitAttention] = run_beit_attention
        found = {}
        for path in self.sublayers(model)["attention"]:
            attention = model.get_submodule(path)
            kind = type(attention)
            if kind not in runs or not ATTENTION_PARTS.issuperset(attention._modules):
                raise ValueError(f"what happens inside {kind.__name__} is not known (inside timm's Attention it is)")
            inside = attention.proj.in_features
            found[path] = AttentionSite(runs[kind], attention.num_heads, inside // attention.num_heads)
        return found

    def prompt_blocks(self, model: Any) -> list[str]:
        if _pools_prefix(model):
            raise ValueError(f"{type(model).__name__} pools its prefix tokens; the prompts would enter the prediction")
        return [f"blocks.{i}" for i in range(len(model.blocks))]

    def after_change(self, model: Any) -> None:
        count_prefix(model)
        head = model.head
        if isinstance(head, nn.Linear):
            model.num_classes = head.out_features
        separate_biases(model.blocks)

    def reserved_paths(self, model: Any) -> tuple[str, ...]:
        return (gist_path(model),)

    def residual_blocks(self, model: Any) -> dict[str, BlockForward]:
        from timm.models.beit import Block as BeitBlock
        from timm.models.eva import EvaBlock
        from timm.models.vision_transformer import Block

        runs: dict[type, BlockForward] = {Block: run_block, EvaBlock: run_eva_block, BeitBlock: run_beit_block}
        found = {}
        for i, block in enumerate(model.blocks):
            kind = type(block)
            if kind not in runs or not BLOCK_PARTS.issuperset(block._modules):
                raise ValueError(f"how a {kind.__name__} adds up is not known (that of timm's Block and EvaBlock is)")
            found[f"blocks.{i}"] = runs[kind]
        return found

    def example_inputs(self, model: Any) -> tuple[Tensor]:
        return (example_images(model),)

    def gist_host(self, model: Any) -> TimmViTGist:
        return TimmViTGist(model)


class TimmViTGist(GistHost):
    """A gist token in a timm ViT.

    Raises:
        ValueError: no class token to stand after, or pooling that a gist token has no part in.
    """

    #: Of models that were pickled before there were these.
    first: FirstBlock | None = None
    recompute_mlp: bool = False

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        family = next(c for c in _classes() if isinstance(model, c))
        distilled, vit, _, _ = _classes()
        if getattr(model, "cls_token", None) is None:
            raise ValueError(f"add_gist: {name} has no class token, and the gist token's place is right after it")
        if getattr(model, "attn_pool", None) is not None or model.global_pool not in ("token", "avg", "avgmax", "max"):
            raise ValueError(
                f"add_gist: {name} has global_pool={model.global_pool!r}; the head must read the class token or pooled "
                "patches (token, avg, avgmax or max) for the gist token to share it"
            )
        if _pools_prefix(model):
            raise ValueError(f"add_gist: {name} pools its prefix tokens too; the gist token would enter the prediction")
        for method in ("forward_head", "pool"):
            if getattr(type(model), method, None) is not getattr(family, method, None):
                raise ValueError(
                    f"add_gist: {name} has a {method} of its own; which logits the gist token shares is not known"
                )
        self.path = gist_path(model)
        self.after = self.path == "pos_drop"
        self.index = own_prefix(model)
        self.dim = model.embed_dim
        self.distilled = family is distilled
        self.last = None if self.distilled else "head"
        self.plain_forward = (
            family is vit
            and type(model).forward_features is vit.forward_features
            and type(model)._pos_embed is vit._pos_embed
        )
        self.rowwise = Rowwise() if self.plain_forward else None
        self.first = FirstBlock(self.rowwise.norms) if self.rowwise is not None else None
        self.recompute_mlp = False

    def attached(self, model: Any, length: int) -> None:
        count_prefix(model)

    def detached(self, model: Any, length: int) -> None:
        count_prefix(model)

    def recompute_mlps(self, model: Any, enable: bool) -> None:
        if enable and not (self._serves(model) and all(plain_block(block) is not None for block in model.blocks)):
            raise ValueError(
                f'GistModel: checkpointing "mlp" is for a VisionTransformer of timm\'s own blocks, without hooks on them, '
                f"that is read at its class token; this is a {type(model).__name__}, read by {model.global_pool!r}"
            )
        self.recompute_mlp = enable

    def _serves(self, model: Any) -> bool:
        """Whether the blocks are run one by one, the last for the rows that are read."""
        return self.rowwise is not None and model.global_pool == "token" and self.rowwise.serves(model)

    # -- forward -----------------------------------------------------------------------------------------------------
    def forward(self, model: Any, config: GistConfig, want_gist: bool, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: (B, 3, H, W) -> logits (B, C) and gist logits (B, C) or None."""
        if self.distilled:
            features = model.forward_features(x)
            gist = features[:, self.index : self.index + config.rows].mean(1) if want_gist else None
            return self._both_heads(model, features, gist)
        logits = model.head(self.rows(model, config, x, want_gist=want_gist))  # one call: the halves are contiguous
        batch = x.shape[0]
        return (logits[:batch], logits[batch:]) if want_gist else (logits, None)

    def rows(self, model: Any, config: GistConfig, x: Tensor, want_gist: bool = True) -> Tensor:
        """x: (B, 3, H, W) -> (2 B, D), or (B, D) for the prediction alone: what goes into the head."""
        if self._serves(model):
            rows = self._last_rows(model, config, want_gist, x)
            z, gist = rows[:, 0], rows[:, 1:]
        else:
            features = model.forward_features(x)
            z, gist = self._pool(model, features), features[:, self.index : self.index + config.rows]
        if not want_gist:
            return model.head_drop(model.fc_norm(z))
        if config.rows > 1 and not isinstance(model.fc_norm, nn.Identity):
            gist = model.fc_norm(gist)  # the mean is of final, normed states
            both = torch.cat((model.fc_norm(z), gist.mean(1)))
        else:
            both = model.fc_norm(torch.cat((z, gist.mean(1) if config.rows > 1 else gist[:, 0])))
        return model.head_drop(both)

    @staticmethod
    def _pool(model: Any, features: Tensor) -> Tensor:
        """Final states (B, N, D) -> (B, D)."""
        if hasattr(model, "pool"):
            return model.pool(features)
        return (
            features[:, 0] if model.global_pool == "token" else features[:, model.num_prefix_tokens :].mean(1)
        )  # Beit

    @staticmethod
    def _both_heads(model: Any, features: Tensor, gist: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The mean of a distilled model's classifiers: of its class and distillation token, and both of the gist token.

        Raises:
            ValueError: in training with ``set_distilled_training``, which asks for two predictions.
        """
        if model.distilled_training and model.training:
            raise ValueError(
                f"GistModel: {type(model).__name__} is set to return two predictions (set_distilled_training); a gist "
                "model returns their mean"
            )
        batch, more = features.shape[0], [] if gist is None else [gist]
        first = model.head(model.head_drop(torch.cat([features[:, 0], *more])))
        second = model.head_dist(model.head_drop(torch.cat([features[:, 1], *more])))
        logits = (first + second) / 2
        return logits[:batch], None if gist is None else logits[batch:]

    def _last_rows(self, model: Any, config: GistConfig, want_gist: bool, x: Tensor) -> Tensor:
        """forward_features, but of the last block and the norm only the rows that are read: (B, 1 or 1 + rows, D)."""
        x = embed_patches(model.patch_embed, x)
        x = model.patch_drop(model._pos_embed(x))
        checkpointing = model.grad_checkpointing
        if checkpointing:
            from timm.models import checkpoint
        attention = None  # the first block's, where it has a way of its own
        if self.first is not None and self.first.serves(model, x):
            x, attention = self.first.enter(model, x)
        else:
            x = model.norm_pre(x)
        *blocks, last = model.blocks
        for block in blocks:
            run = open_block(block, self.recompute_mlp and not checkpointing, attention)
            x, attention = checkpoint(run, x) if checkpointing else run(x), None
        count = config.rows if want_gist else 0

        def rows(x: Tensor) -> Tensor:
            return self.rowwise.block(last, x, self.index, count)  # type: ignore[union-attr]

        return model.norm(checkpoint(rows, x) if checkpointing else rows(x))


register_family(TimmViT())
