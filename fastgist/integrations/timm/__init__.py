"""timm's models. Importing this package makes their families known."""

from __future__ import annotations

from fastgist.integrations.timm.vit import TimmViT, TimmViTGist

__all__ = ["TimmViT", "TimmViTGist"]
