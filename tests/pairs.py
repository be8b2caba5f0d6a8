"""Which backbones and which methods there are, for tests and for the table in docs/pairs.md: tiny models, small settings."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vits import dinov3, eva, randomised, stir, vit

import fastgist
from fastgist import (
    AdapterConfig,
    BitFitConfig,
    CPConfig,
    FacTConfig,
    FullConfig,
    GistConfig,
    LinearProbeConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    SSFConfig,
    add_gist,
    get_peft_model,
)
from fastgist.gist import GistModel, GistOutput
from fastgist.peft import PeftConfig
from fastgist.peft.method import method_of

__all__ = [
    "CARRIERS",
    "DECODER_BACKBONES",
    "DECODER_NO_PLACE",
    "DECODER_PAIRS",
    "ENCODER_PAIRS",
    "METHODS",
    "NO_PLACE",
    "PAIRS",
    "ROWS",
    "TIMM_BACKBONES",
    "TRANSFORMERS_BACKBONES",
    "VARIANTS",
    "MERGED",
    "attempt",
    "both",
    "example",
    "made",
    "merging",
    "without_gist",
]


def beit(**options: Any) -> nn.Module:
    """A BEiT: a relative position bias in every block, LayerScale, average pooling with the norm behind it."""
    from timm.models.beit import Beit

    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    settings |= {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.5}
    return randomised(Beit(**settings | options))


def distilled(**options: Any) -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return randomised(VisionTransformerDistilled(**settings | options))


def swin(second: bool = False, **options: Any) -> nn.Module:
    """A Swin of two stages on 24 x 24 images: 12 x 12 patches in nine windows, then 6 x 6 in four that it does not fill,
    plain and shifted in both."""
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    settings = {
        "img_size": 24,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
    }
    settings |= {"num_classes": 5, "drop_path_rate": 0.0}
    return randomised((SwinTransformerV2 if second else SwinTransformer)(**settings | options))


def resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 8, 8, 8), stem_width=8)


def convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=5, img_size=16, patch_size=8, num_blocks=2, embed_dim=32)


#: EVA-02's shape: rotary and absolute positions, SwiGLU with a norm inside, separate q, k and v.
_EVA02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "global_pool": "avg"}
_DINOV2 = {"init_values": 0.5}

TIMM_BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "ViT": vit,
    "ViT, average pooling": partial(vit, global_pool="avg"),
    "ViT, CLIP's": partial(vit, pre_norm=True),
    "DeiT III": partial(vit, no_embed_class=True, init_values=0.5),
    "DeiT, distilled": distilled,
    "DINOv2": partial(vit, **_DINOV2),
    "DINOv2, registers": partial(vit, **_DINOV2, reg_tokens=4, no_embed_class=True),
    "EVA-02": partial(eva, **_EVA02),
    "DINOv3": dinov3,
    "BEiT": beit,
    "BEiT, shared bias": partial(beit, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, global_pool="token"),
    "SigLIP": partial(vit, class_token=False, global_pool="map"),
    "Swin": swin,
    "Swin V2": partial(swin, second=True),
    "ResNet": resnet,
    "ConvNeXt": convnext,
    "MLP-Mixer": mixer,
}

try:  # builders of transformers' models, in the same form
    from hf_models import TEXTS, TRANSFORMERS_BACKBONES
except ImportError:
    TEXTS: list[str] = []  # type: ignore[no-redef]
    TRANSFORMERS_BACKBONES: dict[str, Callable[[], nn.Module]] = {}  # type: ignore[no-redef]

try:
    from decoders import DECODER_BACKBONES as _decoders

    DECODER_BACKBONES: dict[str, Callable[[], nn.Module]] = {build.__name__: build for build in _decoders}
except ImportError:
    DECODER_BACKBONES = {}

#: Every registered configuration, and every placement and form of it.
METHODS: dict[str, PeftConfig] = {
    "adapter, pfeiffer": AdapterConfig(4),
    "adapter, houlsby": AdapterConfig(4, "houlsby"),
    "adapter, parallel": AdapterConfig(4, "parallel"),
    "adapter, adaptformer": AdapterConfig(4, "adaptformer", scale=0.1),
    "adapter, shared": AdapterConfig(4, "shared", scale=0.1),
    "LoRA": LoraConfig(rank=2),
    "CP": CPConfig(rank=3, dropout=0.0),
    "CP, Tucker core": CPConfig(rank=3, core="tucker", dropout=0.0),
    "FacT-TT": FacTConfig(rank=3),
    "FacT-TK": FacTConfig(rank=3, form="tk"),
    "SSF": SSFConfig(),
    "BitFit": BitFitConfig(),
    "VPT": PromptConfig(length=2),
    "VPT, deep": PromptConfig(length=2, deep=True),
    "prefix": PrefixConfig(length=2),
    "linear probe": LinearProbeConfig(),
    "full": FullConfig(),
}
#: Further settings, which the table has no column for.
VARIANTS: dict[str, PeftConfig] = {
    "LoRA, q and MLP": LoraConfig(rank=2, targets=("q", "fc1", "fc2")),
    "LoRA, k, proj and MLP": LoraConfig(rank=2, targets=("k", "proj", "fc1", "fc2")),
}
#: What puts rows into the sequence: a fresh one changes the logits, and windows have no place for it.
ROWS = ("VPT", "VPT, deep", "prefix")

WITHOUT_TOKEN = ("SigLIP",)
WITHOUT_ATTENTION = ("ResNet", "ConvNeXt", "MLP-Mixer")
SWINS = ("Swin", "Swin V2")
#: timm's backbones that carry a gist token, and which methods go on them.
CARRIERS = [name for name in TIMM_BACKBONES if name not in (*WITHOUT_TOKEN, *WITHOUT_ATTENTION)]
PAIRS = [(b, m) for b in CARRIERS for m in METHODS if not (b in SWINS and m in ROWS)]

#: Which methods transformers' encoders have no place for, and why.
NO_PLACE = {
    **{(name, "adapter, parallel"): "needs sublayers that keep the width" for name in [*TEXTS[:5], "deberta-v2"]},
    **{(name, "BitFit"): "no layer of this model has a bias" for name in ("modernbert", "t5-encoder")},
}
ENCODER_PAIRS = [(name, m) for name in TRANSFORMERS_BACKBONES for m in METHODS if (name, m) not in NO_PLACE]

#: Which methods transformers' decoders have no place for, and why.
DECODER_NO_PLACE = {
    (name, "BitFit"): "no layer of this model has a bias" for name in ("llama", "mistral", "qwen3", "gemma")
}
DECODER_PAIRS = [(name, m) for name in DECODER_BACKBONES for m in METHODS if (name, m) not in DECODER_NO_PLACE]


def attempt(build: Callable[[], nn.Module], method: str, gist: bool = True) -> nn.Module:
    """A fresh model of ``build`` with the method, and a gist token; raises what the two raise."""
    model = build()
    get_peft_model(model, METHODS[method])
    return add_gist(model, GistConfig(dropout=0.0)) if gist else model


#: The methods whose updates can go into weights.
MERGED = [
    name
    for name, config in METHODS.items()
    if method_of(config).can_merge(config) and name not in ("linear probe", "full")
]


def merging(build: Callable[[], nn.Module], method: str) -> tuple[str, str]:
    """Merge a method of :data:`MERGED` into a fresh model of ``build`` and back, then for good, in float64.

    Returns:
        ("yes", "") where the plain model's own class loads the weights, ("more keys", which ones) where it has no place for
        some, ("no", why) where the merge is refused, ("", why) where the model does not take the method.

    Raises:
        AssertionError: logits differ, or what is put back is not bitwise the original.
    """
    plain = build().double().eval()
    model = copy.deepcopy(plain)
    try:
        stir(get_peft_model(model, METHODS[method])).eval()
    except (ValueError, TypeError) as error:
        return "", str(error)
    given = _inputs(model)
    want, state = _logits(model, given), copy.deepcopy(model.state_dict())
    try:
        fastgist.merge(model)
    except TypeError as error:
        same_state(model, state)
        return "no", str(error).split(": ", 1)[1]
    torch.testing.assert_close(_logits(model, given), want)
    same_state(fastgist.unmerge(model), state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = fastgist.merge_and_unload(model)
    torch.testing.assert_close(_logits(merged, given), want)
    more = sorted(merged.state_dict().keys() - plain.state_dict().keys())
    told = [str(w.message) for w in caught if "merge_and_unload" in str(w.message)]
    assert len(told) == bool(more) and all(more[0] in text for text in told), (more, told)
    if more:
        return "more keys", ", ".join(
            sorted({name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in more})
        )
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(_logits(plain, given), want)
    return "yes", ""


def same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in found.items())


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    if not hasattr(model, "main_input_name"):
        return {"x": example(model, dtype=torch.float64)}
    from hf_models import example_inputs

    return example_inputs(model)


@torch.no_grad()
def _logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    output = model(**given)
    return output if isinstance(output, Tensor) else output.logits


def example(model: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images for a timm model, or for a gist model around one."""
    inner = getattr(model, "model", model)
    size = inner.patch_embed.img_size
    return torch.randn(batch, 3, *size, dtype=dtype)


def made(backbone: str, method: str = "LoRA", dtype: torch.dtype = torch.float64) -> GistModel:
    """A gist model of timm's backbones whose trained parameters are away from their initial values."""
    return stir(attempt(TIMM_BACKBONES[backbone], method).to(dtype))


def both(output: GistOutput) -> Tensor:
    """(2, B, C): logits and gist logits."""
    return torch.stack([output.logits, output.gist_logits])


def without_gist(model: GistModel) -> nn.Module:
    """A plain copy of the model inside, its head from before wrapping."""
    with pytest.warns(UserWarning, match="logits change"):
        return fastgist.unload(copy.deepcopy(model), keep_head=False)
