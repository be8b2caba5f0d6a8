"""The numbers of a text fine-tuning run.

alpha, beta and T are GIST's (arXiv 2312.07255), and so are AdamW and the cosine. The paper gives no numbers for language;
the rest is this package's choice: what is usual for parameter-efficient tuning of BERT-sized encoders.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastgist.recipes.parts import PartRates

__all__ = ["EPOCHS", "TextRecipe"]

#: Epochs where neither the user nor a named recipe says otherwise.
EPOCHS = 10


def _number(default, help: str, **extra):
    return field(default=default, metadata={"help": help, "panel": "Recipe", **extra})


@dataclass(frozen=True, kw_only=True)
class TextRecipe(PartRates):
    """How long, how fast and towards what a text model is trained."""

    epochs: int | None = _number(
        None, f"Passes over the training texts; {EPOCHS}, or the recipe's, if not given.", min=1
    )
    lr: float = _number(5e-4, "Peak learning rate; full fine-tuning wants a tenth of it.", min=0)
    warmup: float = _number(0.06, "Share of the steps in which the learning rate rises.", min=0, max=0.99)
    weight_decay: float = _number(0.01, "AdamW's weight decay; biases and other vectors take none.", min=0)
    batch_size: int = _number(32, "Texts a step and process, before accumulation.", min=1)
    accumulate: int = _number(1, "Batches whose gradients make one step.", min=1)
    clip_grad: float = _number(1.0, "Largest gradient norm; 0 does not clip.", min=0)
    alpha: float = _number(0.5, "Weight of the gist token's own loss.", min=0)
    beta: float | str = _number(
        0.75,
        "Weight of the interaction of the two outputs: a number, or linear:START:END or cosine:START:END over the run.",
        schedule=True,
    )
    temperature: float | str = _number(
        3.0, "Temperature T of the interaction; a number or a schedule, as --beta.", schedule=True
    )
    seed: int = _number(0, "Seed of initialisation, order, dropout and of what is held out.", min=0)
