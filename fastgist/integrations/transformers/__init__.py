"""transformers' models. Importing this package makes their families known."""

from __future__ import annotations

from typing import Any

from fastgist.integrations.transformers.decoders import Decoder, DecoderGist
from fastgist.integrations.transformers.encoders import Encoder, EncoderGist
from fastgist.integrations.transformers.loss import gist_loss_func
from fastgist.integrations.transformers.qformer import QFormer

__all__ = [
    "AdapterTrainer",
    "Decoder",
    "DecoderGist",
    "Encoder",
    "EncoderGist",
    "GistTrainer",
    "PartsTrainer",
    "QFormer",
    "T5EncoderForSequenceClassification",
    "gist_loss_func",
]


def __getattr__(name: str) -> Any:
    if name in ("AdapterTrainer", "GistTrainer", "PartsTrainer"):  # Trainer is a slow import, and few ask for it
        from fastgist.integrations.transformers import trainer

        return getattr(trainer, name)
    if name == "T5EncoderForSequenceClassification":  # loads transformers' T5, which few need
        from fastgist.integrations.transformers.t5 import T5EncoderForSequenceClassification

        return T5EncoderForSequenceClassification
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
