"""transformers' models. Importing this package makes their families known."""

from __future__ import annotations

from fastgist.integrations.transformers.encoders import Encoder, EncoderGist

__all__ = ["Encoder", "EncoderGist"]
