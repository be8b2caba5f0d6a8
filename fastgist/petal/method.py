"""How a :class:`PetalConfig` becomes layers of a model with a Q-Former."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastgist.nn import (
    CPFactors,
    CPLinear,
    CPThreshold,
    InformationBottleneckLoss,
    InstructionMixer,
    InstructionMoE,
    factory,
    fan,
)
from fastgist.peft.config import PeftConfig, ThresholdConfig
from fastgist.peft.method import Method, register_method, start_from_weights
from fastgist.petal.config import PetalConfig
from fastgist.petal.extras import CrossOutput, QueryTransformation, Transformed
from fastgist.petal.instructed_llm import InstructedLanguageModel
from fastgist.petal.parts import Enriched
from fastgist.petal.query_gist import QueryGist

__all__ = ["Petal"]


class Petal(Method):
    """Mode approximation of the Q-Former's attention, with the experts around its embeddings."""

    title = "PETAL with more than its mode approximation (PetalConfig(num_experts=0) alone)"

    def can_merge(self, config: PeftConfig) -> bool:
        assert isinstance(config, PetalConfig)
        others = (config.bottleneck, config.batch_mean, config.gated_query, config.gist, config.instruct_llm)
        return not (config.num_experts or any(others))

    def start(self, built: Mapping[str, nn.Module], config: PeftConfig) -> None:
        start_from_weights(built, config)

    def build(self, model: Any, family: Any, config: PeftConfig) -> dict[str, nn.Module]:
        assert isinstance(config, PetalConfig)
        if not hasattr(family, "projections"):
            raise TypeError(
                f"petal.wrap: expected a model with a Q-Former (InstructBLIP, BLIP-2), got {type(model).__name__}"
            )
        groups = family.projections(model)
        place = factory(model.get_submodule(groups["text"][0]), None, None)
        built: dict[str, nn.Module] = {}
        for kind, paths in groups.items():
            built |= _group(model, kind, paths, config, place)
        built |= _around(model, family, config, place)
        return built


def _group(model: Any, kind: str, paths: list[str], config: PetalConfig, place: dict[str, Any]) -> dict[str, nn.Module]:
    """CP layers at ``paths``, all of one shape, with factors of their own."""
    layers = [model.get_submodule(path) for path in paths]
    sizes = fan(layers[0])
    if sizes is None:  # a wrapper of somebody else's
        raise TypeError(f"petal.wrap: expected a linear layer at {paths[0]}, got {type(layers[0]).__name__}")
    if config.rank > min(sizes):
        raise ValueError(
            f"PetalConfig: rank must be at most {min(sizes)}, the {kind} matrices being {sizes[0]} -> {sizes[1]}, got "
            f"{config.rank}"
        )
    threshold = ThresholdConfig.of("PetalConfig", config.threshold)
    factors = CPFactors(
        *sizes,
        config.rank,
        len(paths),
        config.core,
        config.dropout,
        threshold=None if threshold is None else CPThreshold(**dataclasses.asdict(threshold)),
        **place,
    )
    return {path: CPLinear(layer, factors, i) for i, (path, layer) in enumerate(zip(paths, layers, strict=True))}


def _around(model: Any, family: Any, config: PetalConfig, place: dict[str, Any]) -> dict[str, nn.Module]:
    """What is no mode approximation."""
    dim = model.config.qformer_config.hidden_size
    experts = mixer = bottleneck = gist = language = None
    if config.num_experts:
        experts = InstructionMoE(dim, config.num_experts, config.expert_dim, config.gating, config.top_k, **place)
        if config.num_instructions > 1:
            mixer = InstructionMixer(config.num_instructions, **place)
    if config.bottleneck is not None:
        widths = (dim, model.config.vision_config.hidden_size, model.config.text_config.vocab_size)
        bottleneck = InformationBottleneckLoss(*widths, **config.bottleneck.options(), device=place["device"])
    if config.gist is not None:
        gist = QueryGist(dim, config.gist, **place)
    if config.instruct_llm:
        width = model.get_input_embeddings().weight.shape[1]
        language = InstructedLanguageModel(
            InstructionMoE(width, config.num_experts, config.expert_dim, config.gating, config.top_k, **place)
        )
    built: dict[str, nn.Module] = {}
    parts = (experts, mixer, bottleneck, gist, language)
    if any(part is not None for part in parts):
        path = family.embedded_path(model)
        built[path] = Enriched(model.get_submodule(path), *parts, config.load_balance)
    return built | _extras(model, family, config, place)


def _extras(model: Any, family: Any, config: PetalConfig, place: dict[str, Any]) -> dict[str, nn.Module]:
    """What the released code does beside the paper."""
    if not (config.batch_mean or config.gated_query):
        return {}
    if config.batch_mean:
        warnings.warn(
            f"PetalConfig: batch_mean={config.batch_mean} makes what the model says of an image depend on the other images "
            "of its batch, in evaluation too",
            UserWarning,
            stacklevel=6,
        )
    sizes = model.config.qformer_config
    if config.gated_query and sizes.chunk_size_feed_forward:
        raise ValueError(
            "PetalConfig: gated_query reads whole sequences, and the Q-Former's chunk_size_feed_forward is "
            f"{sizes.chunk_size_feed_forward}"
        )
    built: dict[str, nn.Module] = {}
    for path in family.layer_paths(model):
        layer: Any = model.get_submodule(path)
        queries = None
        if config.gated_query:
            transformation = QueryTransformation(sizes.hidden_size, **place)
            queries = built[f"{path}.output_query"] = Transformed(layer.output_query, transformation)
            if hasattr(layer, "output"):  # of the instruction's rows
                built[f"{path}.output"] = Transformed(layer.output, transformation)
        if layer.has_cross_attention:
            built[f"{path}.crossattention.output"] = CrossOutput(
                layer.crossattention.output, config.batch_mean, queries
            )
    return built


register_method(PetalConfig, Petal())
