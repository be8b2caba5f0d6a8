"""transformers' models. Importing this package makes their families known."""

from __future__ import annotations

from typing import Any

from fastgist.integrations.transformers.encoders import Encoder, EncoderGist

__all__ = ["Encoder", "EncoderGist", "T5EncoderForSequenceClassification"]


def __getattr__(name: str) -> Any:
    if name == "T5EncoderForSequenceClassification":  # loads transformers' T5, which few need
        from fastgist.integrations.transformers.t5 import T5EncoderForSequenceClassification

        return T5EncoderForSequenceClassification
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
