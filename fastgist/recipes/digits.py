"""The numbers of ``fastgist demo``.

The learning rate of every method was chosen from one grid by mean accuracy over draws 100-104 on pool images that were
not drawn: neither those draws nor those images are among what the demo reports. ``python -m fastgist.train.tune_demo``
does it again; it gave (CPU, PyTorch 2.15, timm 1.0.31), 10 images a digit:

==============  =====  =====  =====  =====
method          1e-3   3e-3   1e-2   3e-2
==============  =====  =====  =====  =====
linear probe    72.5%  89.3%  91.1%  91.2%
adapter         75.9%  88.6%  89.5%  90.9%
adapter + GIST  72.6%  86.6%  88.4%  90.1%
LoRA + GIST     80.3%  91.4%  90.9%  89.2%
CP + GIST       75.8%  90.9%  93.0%  91.8%
==============  =====  =====  =====  =====
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastgist.recipes import Recipe

__all__ = [
    "ARCHITECTURE",
    "CONTESTANTS",
    "FEW_SHOT",
    "LEARNING_RATES",
    "NOT_FOR_DIGITS",
    "PRETRAIN",
    "TUNING_SEEDS",
    "Contestant",
    "compared",
    "quick",
]

#: A timm VisionTransformer on 8 x 8 pixels: 16 patches of 2 x 2.
ARCHITECTURE: dict[str, Any] = {
    "img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0,
}  # fmt: skip

#: The class token learns to redraw the digits 0-4 in their eight rotations and reflections: of the objectives tried,
#: the one whose features separate unseen digits best (draws 100-104, pool images; naming 0-4: under 60%, this: 92%).
PRETRAIN = Recipe(epochs=6, lr=4e-3, weight_decay=0.05, batch_size=64, drop_path=0.0)

#: GIST's own constants (alpha, beta, T, weight decay, warm-up); batch and epochs for a handful of images.
FEW_SHOT = Recipe(epochs=45, batch_size=25, drop_path=0.0)

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEEDS = (100, 101, 102, 103, 104)


@dataclass(frozen=True)
class Contestant:
    """One row of the demo's table."""

    name: str
    method: str
    gist: bool
    lr: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return replace(FEW_SHOT, lr=self.lr)


CONTESTANTS = (
    Contestant("linear probe", "linear-probe", False, 3e-2),
    Contestant("adapter", "adapter", False, 3e-2),
    Contestant("adapter + GIST", "adapter", True, 3e-2),
    Contestant("LoRA + GIST", "lora", True, 3e-3, {"rank": 4, "alpha": 8}),
    Contestant("CP + GIST", "cp", True, 1e-2, {"rank": 16}),
)


#: Settings of image data and timm models, which digits do not have.
NOT_FOR_DIGITS = (
    "val_split", "splits", "train_images", "val_images", "subset", "image_column", "label_column", "skip_unreadable",
    "verify", "augment", "workers", "model", "pretrained", "checkpoint", "image_size", "metrics", "checkpoint_every",
    "keep_checkpoints", "mixed_precision",
)  # fmt: skip


def compared(methods: Sequence[str]) -> dict[str, Any]:
    """The settings beneath ``fastgist compare digits``: the few-shot recipe, and of ``methods`` the rates and ranks above;
    other methods take lr. (LoRA's and CP's rates were chosen with a gist token, the adapter's is best with and without.)
    """
    chosen = [c for c in CONTESTANTS if c.method in methods and (c.gist or c.method == "linear-probe")]
    return {
        "epochs": FEW_SHOT.epochs, "batch_size": FEW_SHOT.batch_size, "drop_path": FEW_SHOT.drop_path, "lr": 1e-2,
        "shots": 10, "method_lr": [f"{c.method}={c.lr:g}" for c in chosen],
        "set": [f"{c.method}:{name}={value}" for c in chosen for name, value in c.options.items()],
    }  # fmt: skip


def quick(recipe: Recipe) -> Recipe:
    """An eighth of the training, at least one epoch."""
    return replace(recipe, epochs=max(1, recipe.epochs // 8))
