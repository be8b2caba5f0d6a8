"""A gist token in a Hugging Face PeftModel: the values of LoRA and IA3 against forwards written out, autocast, checkpointing
and compiled steps. What is saved, and what is refused, is in test_hf_peft.py."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from vits import by_hand as vit_by_hand
from vits import images, stir, vit

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from decoders import llama, texts, written_out
from hf_by_hand import by_hand as encoder_by_hand
from trainers import bert

from fastgist import GistConfig, add_gist
from fastgist.nn import GistLoss

TARGET = torch.tensor([0, 2, 1])
#: Attention and the MLP's second layer; its input is what IA3 scales there.
TARGETS = {
    "llama": ["k_proj", "v_proj", "down_proj"],
    "bert": ["key", "value", "output.dense"],
    "vit": ["qkv", "mlp.fc2"],
}
PAIRS = list(product(TARGETS, ("lora", "ia3")))


def peft_model(name: str, method: str) -> nn.Module:
    """A PeftModel of a tiny model, its parameters away from where they start."""
    base = {"llama": llama, "bert": bert, "vit": vit}[name](**{"num_classes": 3} if name == "vit" else {})
    options = {"target_modules": TARGETS[name], "task_type": None if name == "vit" else "SEQ_CLS"}
    if name == "vit":
        options["modules_to_save"] = ["head"]
    if method == "ia3":
        config = peft.IA3Config(feedforward_modules=TARGETS[name][2:], **options)
    else:
        config = peft.LoraConfig(r=2, **options)
    return stir(peft.get_peft_model(base, config), 0.2).eval()


def inputs(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"x": images(dtype=dtype)} if name == "vit" else texts()


def gisted(name: str, method: str) -> nn.Module:
    return add_gist(peft_model(name, method), GistConfig(dropout=0.0))


def step(run: nn.Module, given: dict[str, Tensor], parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(GistLoss()(run(**given), TARGET), parameters)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_the_values_are_those_of_the_merged_weights_written_out(name, method) -> None:
    """PEFT merges its update into a plain copy; a forward in float64 puts the token in by itself."""
    inner = peft_model(name, method)
    plain = copy.deepcopy(inner).double().merge_and_unload()
    assert not any("lora" in n or "ia3" in n for n, _ in plain.named_parameters())
    model = add_gist(inner.double()).eval()
    given, token = inputs(name, torch.float64), model.gist.token
    output = model(**given, return_gist_logits=True)
    if name == "llama":
        z, z_gist = written_out(plain, token, **given)
    else:
        z, z_gist = (
            vit_by_hand(plain, given["x"], token) if name == "vit" else encoder_by_hand(name, plain, given, token)
        )
    close = {"rtol": 1e-5, "atol": 1e-5} if name == "llama" else {"rtol": 1e-9, "atol": 1e-10}  # its norms are float32
    torch.testing.assert_close(output.logits, z, **close)
    torch.testing.assert_close(output.gist_logits, z_gist, **close)
    assert (z - z_gist).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_autocast_and_checkpointing(name, method) -> None:
    model = gisted(name, method).train()
    given = inputs(name)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_" in n or "ia3_" in n for n in named) and any("gist" in n for n in named)
    want = step(model, given, list(named.values()))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**given)
        GistLoss()(output, TARGET).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == named.keys()
    scale = max(g.abs().max() for g in want)
    for p, g in zip(named.values(), want, strict=True):
        assert p.grad.dtype == torch.float32 and (p.grad - g).abs().max() <= 0.1 * scale
        assert p.grad.any() == g.any()

    calls: list[int] = []
    layer = {"llama": "model.layers.1.mlp", "bert": "encoder.layer.1.intermediate", "vit": "blocks.1.mlp"}[name]
    (inside,) = (m for n, m in model.named_modules() if n.endswith(layer))
    inside.register_forward_pre_hook(lambda *_: calls.append(1))
    if name == "vit":
        model.set_grad_checkpointing()
    else:
        model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(step(model, given, list(named.values())), want)
    assert len(calls) == 2, "the last layer was not run again in the backward"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_compiled_step_has_the_same_gradients(name, method) -> None:
    model = gisted(name, method).train()
    given, ours = inputs(name), [p for p in model.parameters() if p.requires_grad]
    want = step(model, given, ours)
    torch._dynamo.reset()
    torch.testing.assert_close(step(torch.compile(model, backend="eager", fullgraph=True), given, ours), want)
