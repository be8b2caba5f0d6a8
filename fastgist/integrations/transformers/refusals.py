"""Why a model of transformers cannot carry a gist token or its methods, and which one can."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastgist.integrations.transformers.kinds import KINDS

__all__ = ["why_not"]

_CONVOLUTIONS = "is a convolutional network: it has no sequence of tokens that another could join"
_WINDOWS = "attends within windows of patches and merges them from stage to stage: a token has no place in them"
_STAGES = "changes its sequence of patches from stage to stage: a token has no place in it"
_PAGE = "places its tokens on a page by boxes, and another token has none"
_GRID = "biases its attention by places on a fixed grid of patches, and another token has none"
_SPARSE = "attends in a fixed sparse pattern, which one more token would shift"
_RECURRENT = "mixes its tokens without attention: one more would not see the others"
_TWO_SIDED = "has an encoder and a decoder, and reads its prediction from the decoder"

#: config.model_type -> what stands in the way.
_REASONS = {
    **dict.fromkeys(
        ("resnet", "regnet", "convnext", "convnextv2", "dinov3_convnext", "efficientnet", "mobilenet_v1", "mobilenet_v2",
         "bit", "hgnet_v2", "pp_lcnet", "textnet"),
        _CONVOLUTIONS,
    ),
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "dinat", "hiera", "maxvit"), _WINDOWS),
    **dict.fromkeys(
        ("pvt", "pvt_v2", "cvt", "levit", "segformer", "mobilevit", "mobilevitv2", "poolformer", "focalnet",
         "swiftformer", "funnel"),
        _STAGES,
    ),
    **dict.fromkeys(("layoutlm", "layoutlmv2", "layoutlmv3", "lilt", "bros", "markuplm", "udop"), _PAGE),
    **dict.fromkeys(("beit", "data2vec-vision"), _GRID),
    **dict.fromkeys(("longformer", "big_bird", "led", "nystromformer", "yoso", "reformer"), _SPARSE),
    **dict.fromkeys(("fnet", "mamba", "rwkv"), _RECURRENT),
    "siglip": "has no class token for the gist token to stand behind, and pools its patches by attention or as a mean",
    "siglip2": "has no class token for the gist token to stand behind, and pools its patches by attention or as a mean",
}  # fmt: skip

#: The classifiers with this encoder: body class without "Model" -> name.
_BY_PREFIX = {name.split("For")[0]: name for name in KINDS}
_TEXT = "BertForSequenceClassification, RobertaForSequenceClassification, DebertaV2ForSequenceClassification"
_IMAGES = "ViTForImageClassification, Dinov2ForImageClassification, CLIPForImageClassification"


def why_not(model: nn.Module) -> str | None:
    """A sentence on why ``model`` is not served, with what is; None if it is not transformers' or nothing is known."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not type(model).__module__.startswith("transformers."):
        return None
    kind: Any = getattr(config, "model_type", "")
    reason = _REASONS.get(kind)
    if reason is not None:
        return f"{name} {reason}; {_instead(model)}"
    if kind in ("t5", "mt5", "umt5") and not name.endswith("Generation"):
        return (
            f"{name} is not served: a T5 as a classifier reads its decoder or every token, or has no head; "
            "fastgist.integrations.transformers.T5EncoderForSequenceClassification puts a head on its encoder"
        )
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} {_TWO_SIDED}; {_instead(model)}"
    prefix = next((p for p in sorted(_BY_PREFIX, key=len, reverse=True) if name.startswith(p)), None)
    if prefix is None or not hasattr(config, "num_attention_heads"):
        return None
    served = _BY_PREFIX[prefix]
    if "For" not in name:
        return f"{name} has no classification head, whose logits GIST compares: take {served}"
    return f"{name} does not predict one set of classes for its whole input, as GIST needs it: take {served}"


def _instead(model: Any) -> str:
    names = _IMAGES if "pixel_values" in getattr(model, "main_input_name", "") else _TEXT
    return f"classifiers that work are {names} and others"
