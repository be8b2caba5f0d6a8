"""The numbers of a fine-tuning run, as the papers give them.

``GIST`` is the recipe of GIST (arXiv 2312.07255): 224 px, AdamW, cosine over 100 epochs with 10 of warm-up from 1e-7,
alpha 0.5, beta 0.75, T 3. The paper gives ranges for three numbers and the choice here is ours: learning rate 1e-3 (of
1e-3 to 5e-2: the end that suits every method), weight decay 5e-5 (of 5e-5 or 5e-2), drop path 0.1 (of 0 to 0.2). Its
batch is 32 on each of two devices; ``batch_size`` here is a device's, so two processes give the paper's 64. What the
paper does not say (augmentation, gradient clipping, the learning rate at the end) is timm's default, off, and 0.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from fastgist._later import modules_of
from fastgist.recipes.parts import PartRates

__all__ = ["GIST", "PartRates", "Recipe"]


def _number(default, help: str, **extra):
    return field(default=default, metadata={"help": help, "panel": "Recipe", **extra})


@dataclass(frozen=True, kw_only=True)
class Recipe(PartRates):
    """How long, how fast and towards what a model is trained. All of it decides the result; nothing else does."""

    epochs: int = _number(100, "Passes over the training images.", min=1)
    warmup_epochs: float | None = _number(
        None, "Epochs of linear warm-up; a tenth of the epochs if not given (the paper's 10 of 100).", min=0
    )
    warmup_lr: float = _number(1e-7, "Learning rate at the first step of the warm-up.", min=0)
    lr: float = _number(1e-3, "Peak learning rate.", min=0)
    min_lr: float = _number(0.0, "Learning rate at the end of the cosine.", min=0)
    weight_decay: float = _number(5e-5, "AdamW's weight decay; biases and other vectors take none.", min=0)
    batch_size: int = _number(32, "Images a step and process.", min=1)
    drop_path: float = _number(0.1, "Stochastic depth of the backbone.", min=0, max=0.99)
    clip_grad: float = _number(0.0, "Largest gradient norm; 0 does not clip.", min=0)
    alpha: float = _number(0.5, "Weight of the gist token's cross-entropy.", min=0)
    beta: float | str = _number(
        0.75,
        "Weight of the bidirectional KL divergence: a number, or linear:START:END or cosine:START:END over the run.",
        schedule=True,
    )
    temperature: float | str = _number(
        3.0, "Temperature T of that divergence; a number or a schedule, as --beta.", schedule=True
    )
    seed: int = _number(0, "Seed of initialisation, order, augmentation and dropout.", min=0)

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs


GIST = Recipe()

__getattr__, __dir__ = modules_of(sys.modules[__name__])
