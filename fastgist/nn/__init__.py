"""Modules: parameters, initialisation and state; the arithmetic is :mod:`fastgist.functional`'s."""

from fastgist.nn._tuner import Factors, TunerLinear, factory, is_hooked, linear_slice
from fastgist.nn.adapter import AdaptedLayer, Adapter
from fastgist.nn.cp import CPFactors, CPLinear
from fastgist.nn.gist_token import GistToken
from fastgist.nn.lora import LoRALinear
from fastgist.nn.losses import BidirectionalKLLoss, GistLoss

__all__ = [
    "AdaptedLayer",
    "Adapter",
    "BidirectionalKLLoss",
    "CPFactors",
    "CPLinear",
    "Factors",
    "GistLoss",
    "GistToken",
    "LoRALinear",
    "TunerLinear",
    "factory",
    "is_hooked",
    "linear_slice",
]
