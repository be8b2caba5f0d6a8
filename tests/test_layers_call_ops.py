"""Layers of a wrapped model call our operations, not chains of nn.Linear: which, with which weights, for every method."""

from __future__ import annotations

import pytest
import torch
from hf_models import backbone, example_inputs
from pairs import DECODER_BACKBONES, DECODER_PAIRS, ENCODER_PAIRS, METHODS, PAIRS, TIMM_BACKBONES, example
from torch import Tensor, nn
from vits import stir

from fastgist import GistConfig, add_gist, functional, get_peft_model
from fastgist.nn import Adapter, GistLoss, TunerLinear

MODELS = {
    "ViT": TIMM_BACKBONES["ViT"],
    "EVA-02": TIMM_BACKBONES["EVA-02"],
    "Swin": TIMM_BACKBONES["Swin"],
    "bert": lambda: backbone("bert"),
    "llama": DECODER_BACKBONES["llama"],
    "gpt2": DECODER_BACKBONES["gpt2"],
}
TRIED = [(name, method) for name, method in PAIRS + ENCODER_PAIRS + DECODER_PAIRS if name in MODELS]
LOW_RANK = ("LoRA", "CP", "CP, Tucker core", "FacT-TT", "FacT-TK")


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def calls(monkeypatch) -> dict[str, list[tuple[int, int]]]:
    """For each operation, where its frozen or down weight and its first factor are in memory, a pair a call."""
    made: dict[str, list[tuple[int, int]]] = {"cp_linear": [], "cp_update": [], "adapter": []}
    cp_linear, cp_update, adapter = functional.cp_linear, functional.cp_update, functional.adapter

    def spied_cp_linear(x, weight, bias, u, *args, **options):
        made["cp_linear"].append((place(weight), place(u)))
        return cp_linear(x, weight, bias, u, *args, **options)

    def spied_cp_update(y, x, u, *args, **options):
        made["cp_update"].append((0, place(u)))
        return cp_update(y, x, u, *args, **options)

    def spied_adapter(x, down, down_bias, up, *args, **options):
        made["adapter"].append((place(down), place(up)))
        return adapter(x, down, down_bias, up, *args, **options)

    monkeypatch.setattr(functional, "cp_linear", spied_cp_linear)
    monkeypatch.setattr(functional, "cp_update", spied_cp_update)
    monkeypatch.setattr(functional, "adapter", spied_adapter)
    return made


def _given(model: nn.Module) -> dict[str, Tensor]:
    return example_inputs(model) if hasattr(model, "main_input_name") else {"x": example(model, 3)}


@pytest.mark.parametrize(("name", "method"), TRIED)
def test_every_layer_reaches_its_operation(name, method, calls) -> None:
    """GPT-2's layers keep their weights the other way round: they are called, and cp_update adds the update."""
    model = stir(add_gist(get_peft_model(MODELS[name](), METHODS[method]), GistConfig(dropout=0.0))).train()
    GistLoss()(model(**_given(model.model)), torch.tensor([0, 2, 1])).backward()
    adapters = {(place(m.down_weight), place(m.up_weight)) for m in model.modules() if isinstance(m, Adapter)}
    tuned = [place(m.base_layer.weight) for m in model.modules() if isinstance(m, TunerLinear)]
    assert bool(adapters) == method.startswith("adapter") and bool(tuned) == (method in LOW_RANK)
    assert set(calls["adapter"]) == adapters
    if name == "gpt2":
        assert not calls["cp_linear"] and len(calls["cp_update"]) == len(tuned)
    else:
        assert not calls["cp_update"] and {weight for weight, _ in calls["cp_linear"]} == set(tuned)
    if "FacT" in method or (name == "llama" and "CP" in method):
        return  # factors made for each layer, or turned for matrices that are wider than high
    factors = {place(p) for n, p in model.named_parameters() if p.requires_grad and n.rpartition(".")[2] == "u"}
    assert {u for _, u in calls["cp_linear"] + calls["cp_update"]} == factors
