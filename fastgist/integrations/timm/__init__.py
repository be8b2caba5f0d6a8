"""timm's models. Importing this package makes their families known."""

from __future__ import annotations

from torch import nn

from fastgist.integrations.timm.swin import TimmSwin, TimmSwinGist
from fastgist.integrations.timm.vit import TimmViT, TimmViTGist

__all__ = ["TimmSwin", "TimmSwinGist", "TimmViT", "TimmViTGist", "why_unknown"]


def why_unknown(model: nn.Module) -> str:
    """Why a model of timm is of no known family, for an error message."""
    for module in model.modules():
        parts = module._modules
        if "qkv" in parts or {"q", "kv"} <= parts.keys() or "attention" in type(module).__name__.lower():
            return "it has attention layers, but how a token would go through them has not been written down"
    return (
        "it has no attention layers, which the methods here adapt and through which a gist token meets the patches: "
        "convolutions and token-mixing MLPs work on a fixed grid of positions"
    )
