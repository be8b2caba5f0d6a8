"""The numbers of the small text models that are pre-trained on the standard library's docstrings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ARCHITECTURE", "BASES", "PRETRAIN", "Pretraining"]

#: One size for the encoder and the decoder, in transformers' words.
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How a base model is trained: ``passes`` over the text, each with other masks and neighbours, ``length`` tokens a row."""

    passes: int
    lr: float
    length: int
    vocabulary: int = 4096
    batch_size: int = 32
    warmup: float = 0.06
    weight_decay: float = 0.01
    mask: float = 0.15
    seed: int = 0


#: Name of a base model -> its pre-training.
PRETRAIN = {
    "stdlib-bert": Pretraining(passes=3, lr=1e-3, length=32),
    "stdlib-llama": Pretraining(passes=2, lr=2e-3, length=128, batch_size=16),
}
BASES = tuple(PRETRAIN)

#: What ``scripts/text_study.py`` trains with, beside a method's learning rate: GIST's constants are TextConfig's defaults.
STUDY: dict[str, Any] = {"epochs": 3, "batch_size": 16, "max_length": 32}
#: What ``scripts/studies.py --data stdlib`` trains an adapter with, at each T and length of the gist token.
TEXT_STUDIES: dict[str, Any] = {
    "model": "stdlib-bert",
    "shots": 80,
    "epochs": 3,
    "batch_size": 16,
    "max_length": 32,
    "lr": 3e-3,
}
TUNING_SEED = 100
_GRID = (3e-3, 1e-2)
#: Name in the study -> method and settings, where the name is not the method's own. Adapters beside the MLP ("parallel")
#: have no place in a BERT; AdaptFormer's and the authors' shared form have scale 0.1, as AdaptFormer has it.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "adapter-houlsby": ("adapter", ("placement=houlsby",)),
    "adapter-adaptformer": ("adapter", ("placement=adaptformer", "scale=0.1")),
    "adapter-shared": ("adapter", ("placement=shared", "scale=0.1")),
    "fact-tt": ("fact", ("form=tt",)),
    "fact-tk": ("fact", ("form=tk",)),
    "prompt": ("prompt", ()),
    "prompt-deep": ("prompt", ("deep=true",)),
    "prefix": ("prefix", ()),
}
TUNING_GRID: dict[str, tuple[float, ...]] = {
    "linear-probe": (1e-2, 3e-2), "adapter": _GRID, "lora": _GRID, "cp": _GRID, "ssf": _GRID, "bitfit": _GRID,
    "full": (5e-4, 2e-3), **dict.fromkeys(VARIANTS, _GRID),
}  # fmt: skip
#: Name -> learning rate: set by hand after a few runs without a gist token that were judged on validation texts. Those of
#: VARIANTS were not tuned: they take what the others take.
LEARNING_RATES = {
    "linear-probe": 1e-2, "adapter": 3e-3, "lora": 3e-3, "cp": 3e-3, "ssf": 3e-3, "bitfit": 3e-3, "full": 5e-4,
    **dict.fromkeys(VARIANTS, 3e-3),
}  # fmt: skip
#: What the study on the small Llama leaves out: it has no biases, and the others came to decoders after the study.
NOT_CAUSAL = ("bitfit", "adapter-adaptformer", "adapter-shared", "prompt", "prompt-deep", "prefix")
