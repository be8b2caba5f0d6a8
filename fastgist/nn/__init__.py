"""Modules: parameters, initialisation and state; the arithmetic is :mod:`fastgist.functional`'s."""

from fastgist.nn._tuner import Factors, TunerLinear, factory, fan, is_hooked, is_plain, linear_slice
from fastgist.nn.adapter import AdaptedBlock, AdaptedLayer, Adapter, BlockForward
from fastgist.nn.affine import AffineLayer, BiasShift, ScaleShift, channels
from fastgist.nn.bottleneck import InformationBottleneckLoss
from fastgist.nn.cp import CPFactors, CPLinear, cp_together, joint_mode, update_thresholds
from fastgist.nn.gist_token import GistToken
from fastgist.nn.lora import LoRALinear
from fastgist.nn.losses import BidirectionalKLLoss, GistLoss, TopKKLLoss
from fastgist.nn.moe import (
    Gate,
    InstructionMixer,
    InstructionMoE,
    load_balance_loss,
    mix_instructions,
    pool_instruction,
)
from fastgist.nn.prefix import AttentionForward, PrefixedAttention
from fastgist.nn.prompt import PromptedBlock
from fastgist.nn.schedule import Cosine, Linear, Schedule
from fastgist.nn.threshold import CPThreshold

__all__ = [
    "AdaptedBlock",
    "AdaptedLayer",
    "Adapter",
    "AffineLayer",
    "AttentionForward",
    "BiasShift",
    "BlockForward",
    "BidirectionalKLLoss",
    "Cosine",
    "Linear",
    "Schedule",
    "CPFactors",
    "CPLinear",
    "CPThreshold",
    "Factors",
    "Gate",
    "GistLoss",
    "GistToken",
    "InstructionMixer",
    "InstructionMoE",
    "InformationBottleneckLoss",
    "LoRALinear",
    "PrefixedAttention",
    "PromptedBlock",
    "ScaleShift",
    "TopKKLLoss",
    "TunerLinear",
    "channels",
    "cp_together",
    "factory",
    "fan",
    "is_hooked",
    "is_plain",
    "joint_mode",
    "linear_slice",
    "load_balance_loss",
    "mix_instructions",
    "pool_instruction",
    "update_thresholds",
]
