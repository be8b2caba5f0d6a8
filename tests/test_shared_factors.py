"""Factors that many layers share are in a state_dict once: safetensors, save_pretrained and the plain Trainer take them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vits import images, stir, vit

import fastgist
from fastgist import CPConfig, FacTConfig, FullConfig, LoraConfig, add_gist, get_peft_model

CONFIGS = [
    CPConfig(rank=3, dropout=0.0),
    CPConfig(rank=3, core="tucker", dropout=0.0),
    FacTConfig(rank=3),
    FacTConfig(rank=3, form="tk"),
]


def made(config, gist: bool, base: nn.Module | None = None) -> nn.Module:
    model = get_peft_model(vit() if base is None else base, config)
    return stir(add_gist(model) if gist else model).eval()


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("gist", [False, True])
def test_each_tensor_is_held_once_and_loads_under_every_name(config, gist, tmp_path) -> None:
    base = vit()
    model, other = made(config, gist, copy.deepcopy(base)), made(config, gist, copy.deepcopy(base))
    x = images()
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    factors = [name for name in state if ".factors." in name]
    assert len(factors) == len({name.rsplit(".", 1)[1] for name in factors}) < 6
    save_file(state, tmp_path / "model.safetensors")  # refuses tensors that share memory
    loaded = other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    torch.testing.assert_close(logits(other, x), logits(model, x))

    every = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    assert len(every) > len(state)
    stir(other).load_state_dict(every)  # as one was before
    torch.testing.assert_close(logits(other, x), logits(model, x))
    last = {name.rsplit(".factors.", 1)[-1]: name for name in every if ".factors." in name}  # under another name alone
    renamed = {last.get(name.rsplit(".factors.", 1)[-1], name): t for name, t in state.items()}
    assert set(renamed) != set(state)
    stir(other).load_state_dict(renamed, assign=True)
    torch.testing.assert_close(logits(other, x), logits(model, x))
    shared = {id(m.factors) for m in other.modules() if hasattr(m, "factors")}
    assert len(shared) == 1
    del state[factors[0]]
    with pytest.raises(RuntimeError, match=f"Missing key.*{factors[0]}"):
        other.load_state_dict(state)


@pytest.mark.parametrize("gist", [False, True])
def test_copies_pickles_switches_and_what_is_taken_out(gist) -> None:
    base = vit()
    names, hooks = set(base.state_dict()), (len(base._state_dict_hooks), len(base._load_state_dict_pre_hooks))
    model = made(CONFIGS[0], gist, base)
    want = set(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(twin.state_dict()) == want
        twin.load_state_dict(model.state_dict())
        for p in twin.parameters():
            p.data.zero_()
        assert any(p.any() for p in model.parameters())
    get_peft_model(model, LoraConfig(rank=2), name="other")
    assert not any(".factors." in name for name in model.state_dict())
    fastgist.set_adapter(model, "default")
    assert set(model.state_dict()) == want
    with fastgist.disable_adapter(model):
        assert not any(".factors." in name for name in model.state_dict())
    if gist:
        with pytest.warns(UserWarning, match="leaves the sequence"):
            plain = fastgist.unload(model)
    else:
        plain = fastgist.unload(model)
    assert plain is base
    assert set(plain.state_dict()) == names
    assert (len(base._state_dict_hooks), len(base._load_state_dict_pre_hooks)) == hooks


def test_a_layer_alone_holds_its_factors_under_its_own_names() -> None:
    model = made(CONFIGS[0], False)
    for block in model.blocks:
        assert "attn.qkv.factors.u" in block.state_dict()


def test_names_that_a_model_ties_itself_stay_its_own() -> None:
    """Of a plain model that is adapted only what the adapters share is dropped."""
    pytest.importorskip("transformers")
    from hf_models import backbone

    tied = {"transformer.shared.weight", "transformer.encoder.embed_tokens.weight"}
    for config in (LoraConfig(rank=2), CONFIGS[0], FullConfig()):
        assert tied <= set(get_peft_model(backbone("t5-encoder"), config).state_dict())
    gist = add_gist(backbone("t5-encoder"))
    assert {f"model.{name}" for name in tied} - set(gist.state_dict()) == {
        "model.transformer.encoder.embed_tokens.weight"
    }


# -- transformers' Trainer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*CONFIGS[::2], LoraConfig(rank=2)], ids=repr)
@pytest.mark.parametrize("name", ["bert", "t5-encoder"])
@pytest.mark.parametrize("gist", [False, True])
def test_the_plain_trainer_saves_resumes_and_loads(config, name, gist, tmp_path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from hf_models import backbone, without_dropout
    from trainers import rows, settings
    from transformers import Trainer

    base = without_dropout(backbone(name))
    data = rows(8)
    options = {"save_strategy": "steps", "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01}

    def run(folder: str, steps: int, resume: str | None = None):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), config)
        model = add_gist(model, fastgist.GistConfig(dropout=0.0)) if gist else model
        trainer = Trainer(model, settings(tmp_path / folder, save_steps=steps, **options), train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, again = run("a", 2), run("b", 4, resume=str(tmp_path / "a" / "checkpoint-2"))
    for (key, got), want in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want), key
    whole.save_model(str(tmp_path / "saved"))
    fresh = run("c", 4).model
    state = load_file(tmp_path / "saved" / "model.safetensors")
    for p in fresh.parameters():
        p.data.zero_()
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"transformer.encoder.embed_tokens.weight"}  # which transformers itself saves once
    for (key, got), want in zip(fresh.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, want), key
