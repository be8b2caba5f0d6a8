"""Why a model of transformers cannot carry a gist token or the methods here, and which one can."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fastgist.integrations.transformers.kinds import KINDS

__all__ = ["why_not"]

_CONVOLUTIONS = "is a convolutional network: it has no sequence of tokens that another could join"
_WINDOWS = "attends within windows of patches and merges patches from stage to stage: a token has no place in them"
_STAGES = "changes its sequence of patches from stage to stage: a token has no place in it"
_PAGE = "takes a box on the page for every token, and another token has none"
_GRID = "biases its attention by places on a fixed grid of patches, and another token has none"
_SPARSE = "does not let every token attend to every other, as a gist token has to"
_NO_CLASS = "has no class token for the gist token to stand behind"

#: config.model_type -> what stands in the way.
REASONS = {
    **dict.fromkeys(
        ("resnet", "regnet", "convnext", "convnextv2", "dinov3_convnext", "efficientnet", "mobilenet_v1", "mobilenet_v2",
         "bit", "hgnet_v2", "textnet"),
        _CONVOLUTIONS,
    ),
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "dinat"), _WINDOWS),
    **dict.fromkeys(
        ("pvt", "pvt_v2", "cvt", "levit", "segformer", "mobilevit", "mobilevitv2", "poolformer", "focalnet", "hiera",
         "swiftformer"),
        _STAGES,
    ),
    **dict.fromkeys(("layoutlm", "layoutlmv2", "layoutlmv3", "lilt", "bros"), _PAGE),
    **dict.fromkeys(("beit", "data2vec-vision"), _GRID),
    **dict.fromkeys(("longformer", "big_bird", "reformer", "yoso", "nystromformer", "fnet"), _SPARSE),
    **dict.fromkeys(("siglip", "siglip2", "ijepa"), _NO_CLASS),
}  # fmt: skip

_TEXTS = "BertForSequenceClassification, RobertaForSequenceClassification, DebertaV2ForSequenceClassification"
_IMAGES = "ViTForImageClassification, Dinov2ForImageClassification, CLIPForImageClassification"


def why_not(model: nn.Module) -> str | None:
    """A sentence on why ``model`` is not served, with what is; None if it is not transformers' or nothing is known."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not type(model).__module__.startswith("transformers."):
        return None
    kind: Any = getattr(config, "model_type", "")
    image = getattr(model, "main_input_name", "") == "pixel_values"
    instead = f"classifiers that work: {_IMAGES if image else _TEXTS}, others"
    if kind in REASONS:
        return f"{name} {REASONS[kind]}; {instead}"
    if kind in ("t5", "mt5", "umt5"):
        return (
            f"{name} has no head that reads one row of its encoder; "
            "fastgist.integrations.transformers.T5EncoderForSequenceClassification puts one on a T5's encoder"
        )
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} has an encoder and a decoder, and a gist token would be in the one and read in the other; {instead}"
    for served in KINDS:
        prefix = served.split("For")[0]
        if re.fullmatch(f"{prefix}(Vision|Text)?Model(WithProjection)?", name):
            return f"{name} has no classification head, whose logits GIST compares: take {served}"
        if name.startswith(f"{prefix}For"):
            return f"{name} does not read its classes from one row of the last layer: take {served}"
    return None
