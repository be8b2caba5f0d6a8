"""timm's SwinTransformer and SwinTransformerV2, with a gist token that goes through every window.

Swin has neither class token nor sequence. The token enters with the patch embedding's output, is copied into every
window, averaged over an image's windows, joined with itself where patches are merged (see
:mod:`fastgist.integrations.timm.windows`). The final norm and the same classifier serve the pooled patches (the
prediction) and the token. Our own design: the papers do not describe one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist import GistConfig, GistHost, GistInsert
from fastgist.integrations.timm.blocks import example_images, separate_biases
from fastgist.integrations.timm.prefix import plain_input_size
from fastgist.integrations.timm.windows import (
    Size,
    check_parts,
    pack_forwards,
    run_swin_block,
    run_swin_v2_block,
    swin_classes,
    unpack_forwards,
)
from fastgist.nn import BlockForward, GistToken
from fastgist.peft.family import AttentionSite, Family, LinearSite, register_family

__all__ = ["SwinInsert", "TimmSwin", "TimmSwinGist"]

#: The first stage's downsampling does nothing: there the token goes in.
_ENTRANCE = "layers.0.downsample"


class TimmSwin(Family):
    """timm's SwinTransformer and SwinTransformerV2."""

    name = "timm SwinTransformer and SwinTransformerV2"

    def matches(self, model: Any) -> bool:
        return isinstance(model, swin_classes())

    def head_paths(self, model: Any) -> tuple[str, ...]:
        return ("head.fc",) if isinstance(getattr(model.head, "fc", None), nn.Module) else ("head",)

    def linears(self, model: Any) -> list[LinearSite]:
        """All but the small network that makes Swin V2's position bias."""
        sites = []
        for path, module in model.layers.named_modules(prefix="layers"):
            if isinstance(getattr(module, "in_features", None), int) and ".cpb_mlp." not in path:
                parts = ("q", "k", "v") if path.endswith(".qkv") and module.out_features % 3 == 0 else ()
                sites.append(LinearSite(path, module, parts=parts))
        return sites

    def sublayers(self, model: Any) -> dict[str, list[str]]:
        paths = [path for path, _ in model.layers.named_modules(prefix="layers")]
        return {"mlp": [p for p in paths if p.endswith(".mlp")], "attention": [p for p in paths if p.endswith(".attn")]}

    def width(self, model: Any, path: str) -> int:
        stage = model.get_submodule(".".join(path.split(".")[:2]))
        return stage.blocks[0].dim

    def residual_blocks(self, model: Any) -> dict[str, BlockForward]:
        from timm.models.swin_transformer import SwinTransformerBlock
        from timm.models.swin_transformer_v2 import SwinTransformerV2Block

        runs: dict[type, BlockForward] = {
            SwinTransformerBlock: run_swin_block,
            SwinTransformerV2Block: run_swin_v2_block,
        }
        found = {}
        for i, stage in enumerate(model.layers):
            for j, block in enumerate(stage.blocks):
                if type(block) not in runs:
                    raise ValueError(f"how a {type(block).__name__} adds up is not known (Swin's own blocks are)")
                found[f"layers.{i}.blocks.{j}"] = runs[type(block)]
        return found

    def prompt_blocks(self, model: Any) -> list[str]:
        raise ValueError(
            f"prompts are rows of a sequence, and a {type(model).__name__} has none: its patches are a grid cut into windows"
        )

    def attentions(self, model: Any) -> dict[str, AttentionSite]:
        raise ValueError(
            f"the windows of a {type(model).__name__} give every pair of positions a bias of its own; what a prefix, which "
            "has no position in a window, would get is not known"
        )

    def reserved_paths(self, model: Any) -> tuple[str, ...]:
        return (_ENTRANCE,)

    def after_change(self, model: Any) -> None:
        separate_biases(model.layers)
        plain_input_size(model)
        head = model.head.fc if self.head_paths(model) == ("head.fc",) else model.head
        if isinstance(head, nn.Linear):
            model.num_classes = head.out_features

    def example_inputs(self, model: Any) -> tuple[Tensor]:
        return (example_images(model),)

    def gist_host(self, model: Any) -> TimmSwinGist:
        return TimmSwinGist(model)


class SwinInsert(GistInsert):
    """Packs the grid with its gist tokens."""

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:  # type: ignore[override]
        """x: (B, H, W, C) -> (B, length + H W, C) and (H, W)."""
        x = self.base_layer(x)
        return torch.cat((self.gist(x), x.flatten(1, 2)), dim=1), (x.shape[1], x.shape[2])


class TimmSwinGist(GistHost):
    """A gist token in a Swin.

    Raises:
        ValueError: blocks, a head or a forward of another kind, or a pooling whose width a single token has not.
    """

    path = _ENTRANCE
    index = 0

    def __init__(self, model: Any) -> None:
        from timm.layers import ClassifierHead

        name = type(model).__name__
        family = next(c for c in swin_classes() if isinstance(model, c))
        for method in ("forward_features", "forward_head", "forward_intermediates"):
            if getattr(type(model), method) is not getattr(family, method):
                raise ValueError(
                    f"add_gist: {name} has a {method} of its own; how a gist token goes through is not known"
                )
        head = model.head
        if type(head) is not ClassifierHead:
            raise ValueError(
                f"add_gist: {name} has a {type(head).__name__} as its head; the gist token's logits are known for timm's "
                "ClassifierHead"
            )
        _check_pool(head, "add_gist", name)
        check_parts(model)
        self.dim = model.layers[0].dim

    def make_insert(self, base: nn.Module, gist: GistToken) -> SwinInsert:
        return SwinInsert(base, gist, self.index)

    def attached(self, model: Any, length: int) -> None:
        pack_forwards(model)
        model.forward_features = _Features(model, length)
        model.forward_intermediates = _Intermediates(model, length)
        plain_input_size(model)

    def detached(self, model: Any, length: int) -> None:
        unpack_forwards(model)
        for method in ("forward_features", "forward_intermediates"):
            model.__dict__.pop(method, None)
        plain_input_size(model)

    def forward(self, model: Any, config: GistConfig, want_gist: bool, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: (B, 3, H, W) -> logits (B, C) and gist logits (B, C) or None."""
        head = model.head
        _check_pool(head, "GistModel", type(model).__name__)  # reset_classifier may have changed it
        states, size = _final(model, x)
        z = head.global_pool(states[:, config.length :].unflatten(1, size))
        if not want_gist:
            return head.fc(head.drop(z)), None
        logits = head.fc(head.drop(torch.cat((z, states[:, : config.rows].mean(1)))))  # one call: contiguous halves
        batch = z.shape[0]
        return logits[:batch], logits[batch:]


def _check_pool(head: Any, caller: str, name: str) -> None:
    if not head.global_pool.pool_type or head.global_pool.feat_mult() != 1:
        raise ValueError(
            f"{caller}: {name} has global_pool={head.global_pool.pool_type!r}; the head must read pooled patches of the "
            "model's width (avg, max or avgmax) for the gist token to share it"
        )


def _stages(model: Any, x: Tensor) -> Any:
    """Images (B, 3, H, W) -> (packed sequence, size) after each stage."""
    state: tuple = (model.patch_embed(x),)
    for stage in model.layers:
        state = stage(*state)
        yield state


def _final(model: Any, x: Tensor) -> tuple[Tensor, Size]:
    """The final, normed states, packed."""
    for state in _stages(model, x):
        x, size = state
    return model.norm(x), size


class _Features:
    """forward_features of a Swin with a gist token: the patches (B, H, W, C)."""

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.length = model, length

    def __call__(self, x: Tensor) -> Tensor:
        states, size = _final(self.model, x)
        return states[:, self.length :].unflatten(1, size)


class _Intermediates(_Features):
    """forward_intermediates of a Swin with a gist token, with timm's arguments: the patches after each stage."""

    def __call__(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        from timm.models._features import feature_take_indices

        if output_fmt != "NCHW":
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW', got {output_fmt!r}")
        model, maps = self.model, []
        wanted, last = feature_take_indices(len(model.layers), indices)
        final = len(model.layers) - 1
        for i, (state, size) in enumerate(_stages(model, x)):
            grid = state[:, self.length :].unflatten(1, size)
            if i in wanted:
                maps.append((model.norm(grid) if norm and i == final else grid).permute(0, 3, 1, 2).contiguous())
            if stop_early and i == last:
                break
        if intermediates_only:
            return maps
        return (model.norm(grid) if i == final else grid), maps


register_family(TimmSwin())
