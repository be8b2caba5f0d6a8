"""The numbers of ``fastgist demo petal``.

The learning rate of every method is the best of its row by mean accuracy over draws 100-102, on pool images that were not
drawn: neither those draws nor those images are among what the demo reports. ``scripts/petal_study.py --rates`` gave
(docs/studies-rates.json; CPU, PyTorch 2.15, transformers 5.23), 10 images a digit:

==============  =====  =====  =====  =====  =====  =====  =====  =====
method          1e-3   2e-3   4e-3   5e-3   1e-2   2e-2   4e-2   8e-2
==============  =====  =====  =====  =====  =====  =====  =====  =====
PETAL                                87.2%  91.5%  91.6%  88.9%
LoRA                                 88.6%  90.3%  85.2%
adapter                              73.6%  85.6%  92.2%  94.6%  94.8%
full Q-Former   94.2%  94.7%  94.6%
==============  =====  =====  =====  =====  =====  =====  =====  =====
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["ARCHITECTURE", "CONTESTANTS", "PRETRAIN", "TUNE", "VISION", "Contestant", "Training", "quick"]

_WIDTH = 64
_PART: dict[str, Any] = {"hidden_size": _WIDTH, "num_attention_heads": 4, "initializer_range": 0.05}

#: A small InstructBLIP in transformers' words; vocabulary and token ids come from the tokenizer. Weights start wider than
#: transformers' 0.02, which suits a width of 768; of 0.05 and 0.1 the first was better, before and after tuning.
ARCHITECTURE: dict[str, Any] = {
    "num_query_tokens": 4,
    "initializer_range": 0.05,
    "vision_config": _PART | {"intermediate_size": 128, "num_hidden_layers": 2, "image_size": 8, "patch_size": 2},
    "qformer_config": _PART
    | {"intermediate_size": 128, "num_hidden_layers": 4, "cross_attention_frequency": 2, "max_position_embeddings": 16,
       "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "text_config": {
        "model_type": "opt", "hidden_size": _WIDTH, "word_embed_proj_dim": _WIDTH, "ffn_dim": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32, "dropout": 0.0, "init_std": 0.05,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Training:
    """AdamW with a linear warm-up over a tenth of the steps and a cosine to 0; gradients of norm 1 at most."""

    steps: int
    lr: float
    batch_size: int = 32
    weight_decay: float = 0.01
    seed: int = 0


#: The image encoder learns to name the digit, alone.
VISION = Training(steps=400, lr=2e-3, batch_size=64, weight_decay=0.05)
#: Then Q-Former and language model, from questions about images and from sentences; the image encoder is frozen.
#: With 4e-3 in place of 1.5e-3 the base learns as well, and PETAL afterwards much worse from it.
PRETRAIN = Training(steps=400, lr=1.5e-3)
#: What every method is tuned with, beside its learning rate.
TUNE = Training(steps=200, lr=1e-2)


@dataclass(frozen=True)
class Contestant:
    """One row of the demo's table."""

    name: str
    method: str
    lr: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> Training:
        return replace(TUNE, lr=self.lr)


CONTESTANTS: Sequence[Contestant] = (
    Contestant(
        "PETAL", "petal", 2e-2,
        {"rank": 16, "core": "cp", "dropout": 0.1, "num_experts": 4, "expert_dim": 8, "gating": "softmax"},
    ),
    Contestant("LoRA", "lora", 1e-2, {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ("q", "k", "v")}),
    Contestant("adapter", "adapter", 8e-2, {"bottleneck_dim": 8}),
    Contestant("full Q-Former", "full", 2e-3),
)  # fmt: skip


def quick(training: Training) -> Training:
    """A tenth of the steps: shows the way, not a result."""
    return replace(training, steps=training.steps // 10)
