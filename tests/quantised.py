"""Linear layers that are no plain nn.Linear: quantised by bitsandbytes and torchao, parametrised, wrapped, hooked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

K, N = 64, 96


def dense(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias).to(dtype).requires_grad_(False)


def four_bits(layer: nn.Linear, kind: str = "nf4") -> nn.Module:
    """``layer`` as bitsandbytes stores it in 4 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    has_bias, options = layer.bias is not None, {"quant_type": kind, "compress_statistics": False}
    sizes = (layer.in_features, layer.out_features)
    made = bnb.nn.Linear4bit(*sizes, bias=has_bias, compute_dtype=layer.weight.dtype, **options)
    made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, **options)
    made.bias = layer.bias
    return made.to("cpu")


def eight_bits(layer: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
    )
    made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to("cpu")


def by_torchao(layer: nn.Linear, bits: int) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    config = quantization.Int8WeightOnlyConfig()
    if bits == 4:
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    model = nn.Sequential(layer)
    quantization.quantize_(model, config)
    return model[0]


class _Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2.0 * weight


def parametrised(layer: nn.Linear) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", _Twice())
    return layer.requires_grad_(False)


def of_peft(layer: nn.Module) -> nn.Module:
    """Hugging Face PEFT's LoRA around ``layer``, which it trains no more."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(layer)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    return peft.get_peft_model(model, config).base_model.model[0].requires_grad_(False)


def hooked(layer: nn.Linear) -> nn.Module:
    """A hook that keeps what the layer gave, as a feature extractor does."""
    layer.kept = []
    layer.register_forward_hook(lambda module, args, out: module.kept.append(out))
    return layer


class Activated(nn.Linear):
    """A subclass that ends in an activation, whose backward needs the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sigmoid()


def activated(layer: nn.Linear) -> nn.Module:
    made = Activated(K, N)
    made.load_state_dict(layer.state_dict())
    return made.requires_grad_(False)


def conv1d(layer: nn.Linear) -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils")
    made = utils.Conv1D(N, K)
    made.weight.data, made.bias.data = layer.weight.data.T.contiguous(), layer.bias.data
    return made.requires_grad_(False)


#: name -> (how it is made of a dense layer, whether its output may be written to while gradients are recorded).
BASES: dict[str, tuple[Callable[[nn.Linear], nn.Module], bool]] = {
    "bitsandbytes nf4": (four_bits, True),
    "bitsandbytes fp4": (lambda layer: four_bits(layer, "fp4"), True),
    "bitsandbytes int8": (eight_bits, True),
    "torchao int8": (lambda layer: by_torchao(layer, 8), False),  # its output is a view
    "torchao int4": (lambda layer: by_torchao(layer, 4), True),
    "parametrised": (parametrised, True),
    "PEFT's LoRA": (of_peft, True),
    "PEFT's LoRA of nf4": (lambda layer: of_peft(four_bits(layer)), True),
    "hooked": (hooked, False),
    "a subclass with a forward of its own": (activated, False),
    "Conv1D": (conv1d, False),
}
