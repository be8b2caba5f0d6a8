"""A gist token in a Hugging Face PeftModel: against PEFT's own forward, and against our LoRA with the same weights."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from vits import images, stir, vit

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from decoders import gpt2, llama, qwen3, texts
from trainers import bert, rows, settings
from transformers import Trainer

from fastgist import (
    AdapterConfig,
    GistConfig,
    LoraConfig,
    add_gist,
    assert_training,
    disable_adapter,
    get_peft_model,
    load_adapter,
    save_adapter,
    unload,
)
from fastgist.integrations.transformers import GistTrainer
from fastgist.nn import GistLoss

TARGET = torch.tensor([0, 2, 1])


def lora(**options) -> peft.PeftConfig:
    return peft.LoraConfig(**{"task_type": "SEQ_CLS", "r": 2} | options)


def ia3(**options) -> peft.PeftConfig:
    return peft.IA3Config(task_type="SEQ_CLS", **options)


def prefix(**options) -> peft.PeftConfig:
    return peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, **options)


def theirs(base: nn.Module, config: peft.PeftConfig) -> nn.Module:
    return stir(peft.get_peft_model(base, config), 0.3).eval()


DECODERS = [(llama, lora), (llama, ia3), (llama, prefix), (gpt2, lora), (gpt2, prefix), (qwen3, prefix)]


@pytest.mark.parametrize(("make", "config"), DECODERS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_forward_is_pefts_and_the_tokens(make, config, side) -> None:
    """z is the PeftModel's of a row without padding, and z_g what it says of the row's embeddings and the token behind
    them."""
    model = theirs(make(), config())
    gist = stir(add_gist(model, GistConfig(full_length="truncate"))).eval()
    given = texts(side)
    output = gist(**given, return_gist_logits=True)
    torch.testing.assert_close(gist(**given).logits, output.logits)
    if side == "right":
        torch.testing.assert_close(output.logits, model(**given).logits)
        torch.testing.assert_close(gist(input_ids=given["input_ids"], return_gist_logits=True), output)
    embed = model.get_base_model().get_input_embeddings()
    for i, (ids, mask) in enumerate(zip(given["input_ids"], given["attention_mask"].bool(), strict=True)):
        alone = model(input_ids=ids[mask][None], attention_mask=torch.ones(1, mask.sum())).logits
        torch.testing.assert_close(output.logits[i : i + 1], alone)
        row = torch.cat((embed(ids[mask]), gist.gist.token[0]))[None]
        behind = model(inputs_embeds=row, attention_mask=torch.ones(row.shape[:2])).logits
        torch.testing.assert_close(output.gist_logits[i : i + 1], behind)


def copied(ours: nn.Module, model: nn.Module) -> nn.Module:
    """``ours`` (LoraConfig) with the weights of PEFT's LoRA, token and head."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    with torch.no_grad():
        mine = {name: m for name, m in ours.named_modules() if hasattr(m, "get_factors")}
        assert mine.keys() == layers.keys()
        for name, layer in mine.items():
            layer.u.copy_(layers[name].lora_A["default"].weight.T)
            layer.v.copy_(layers[name].lora_B["default"].weight)
        ours.gist.token.copy_(model.gist.token)
    path = "head" if hasattr(ours.model, "head") else "classifier"
    theirs_head = model.model.get_submodule(path)
    theirs_head = getattr(theirs_head, "modules_to_save", {"default": theirs_head})["default"]
    ours.model.get_submodule(path).load_state_dict(theirs_head.state_dict())
    return ours


@pytest.mark.parametrize("make", [vit, bert])
@pytest.mark.parametrize("saved_head", [True, False])
def test_the_same_as_our_own_lora(make, saved_head) -> None:
    base = make(num_classes=3) if make is vit else make()
    targets = ("qkv", "fc1") if make is vit else ("query", "value")
    options: dict = {"task_type": None} if make is vit or not saved_head else {}
    if make is vit and saved_head:
        options["modules_to_save"] = ["head"]
    inner = theirs(copy.deepcopy(base), lora(r=3, lora_alpha=7, target_modules=list(targets), **options))
    model = stir(add_gist(inner)).eval()
    mine = copied(add_gist(get_peft_model(base, LoraConfig(rank=3, alpha=7, targets=targets))), model).eval()
    given = {"x": images()} if make is vit else texts()
    got, want = (m(**given, return_gist_logits=True) for m in (model, mine))
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.gist_logits, want.gist_logits)
    losses = [m.eval()(**given, return_gist_logits=True) for m in (model, mine)]
    grads = []
    for m, output in zip((model, mine), losses, strict=True):
        GistLoss()(output, TARGET).backward()
        grads.append(m.gist.token.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(("make", "config"), [*DECODERS, (bert, lora), (bert, ia3), (vit, lora)])
def test_trained_saved_and_taken_out(make, config, tmp_path) -> None:
    base = make(num_classes=3) if make is vit else make()
    options = {"task_type": None, "target_modules": ["qkv"], "modules_to_save": ["head"]} if make is vit else {}
    model = theirs(copy.deepcopy(base), config(**options))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    names = [name for name, _ in model.named_modules()]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    given = {"x": images()} if make is vit else texts()
    head = "head" if make is vit else "classifier" if make is bert else "score"
    gist = add_gist(model)
    wanted |= {id(gist.gist.token)}
    gist.train()
    GistLoss()(gist(**given), TARGET).backward()
    assert {id(p) for p in gist.parameters() if p.grad is not None} == wanted, "not PEFT's parameters, token and head"
    assert {id(p) for p in gist.parameters() if p.requires_grad} == wanted
    assert any(f"{head}.modules_to_save" in n and p.grad is not None for n, p in gist.named_parameters())

    gist = stir(gist).eval()
    output = gist(**given, return_gist_logits=True)
    save_adapter(gist, tmp_path / "gist")
    model.save_pretrained(tmp_path / "peft")
    start = copy.deepcopy(base)
    stir(start.get_submodule(head))  # a head that was drawn anew, as from_pretrained of a bare backbone draws one
    fresh = peft.PeftModel.from_pretrained(start, tmp_path / "peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained on other frozen weights")
        loaded = load_adapter(fresh, tmp_path / "gist").eval()
    again = loaded(**given, return_gist_logits=True)
    torch.testing.assert_close(again.logits, output.logits)
    torch.testing.assert_close(again.gist_logits, output.gist_logits)
    for other in (copy.deepcopy(gist), pickle.loads(pickle.dumps(gist))):
        torch.testing.assert_close(other(**given, return_gist_logits=True).gist_logits, output.gist_logits)
    if config is not prefix:  # whose parameters are not in the model, so that nobody looks at them
        with pytest.warns(UserWarning, match="trained on other frozen weights"):
            load_adapter(peft.get_peft_model(copy.deepcopy(base), config(**options)), tmp_path / "gist")

    with torch.no_grad(), disable_adapter(gist):
        assert gist(**given).gist_logits is None
    with pytest.warns(UserWarning, match="leaves the sequence"):
        assert unload(gist, keep_head=False) is model
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("config", [lora, prefix])
def test_in_a_trainer(config, tmp_path) -> None:
    model = add_gist(theirs(llama(), config()))
    assert_training(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    Trainer(model, settings(tmp_path), train_dataset=rows(4)).train()
    changed = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert changed == before.keys()
    with pytest.raises(ValueError, match="hold nothing of the PeftModel"):
        GistTrainer(model, settings(tmp_path))


def test_what_cannot_be_says_so(tmp_path) -> None:
    model = theirs(llama(), lora())
    with pytest.raises(ValueError, match="holds Hugging Face PEFT's adapters, and AdapterConfig does not stand beside"):
        get_peft_model(model, AdapterConfig())
    gist = add_gist(model)
    with pytest.raises(ValueError, match="holds Hugging Face PEFT's adapters, and AdapterConfig does not stand beside"):
        get_peft_model(gist, AdapterConfig())
    with pytest.raises(ValueError, match="has a gist token already"):
        add_gist(model)
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="holds an adapter of Hugging Face PEFT .* give another folder"):
        save_adapter(gist, tmp_path / "peft")
    save_adapter(gist, tmp_path / "gist")
    with pytest.raises(ValueError, match="stands beside Hugging Face PEFT's LORA: load that first"):
        load_adapter(llama(), tmp_path / "gist")
    save_adapter(add_gist(llama()), tmp_path / "plain")
    for target in (theirs(llama(), lora()), gist):
        with pytest.raises(ValueError, match="is of a plain model, and this one is a Hugging Face PeftModel"):
            load_adapter(target, tmp_path / "plain")

    tuned = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    for base, config, message in (
        (llama(), tuned, "PROMPT_TUNING puts tokens of its own into the sequence"),
        (vit(num_classes=3), lora(task_type=None, target_modules=["qkv", "head"]), "PEFT adapts the head"),
    ):
        model = peft.get_peft_model(base, config)
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            add_gist(model)
        assert [p.requires_grad for p in model.parameters()] == flags
    gist = add_gist(theirs(llama(), prefix())).train()
    gist.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="no checkpointing with prefix tuning"):
        gist(**texts())


def test_prefix_tuning_of_an_encoder_is_refused() -> None:
    model = bert()
    with pytest.raises(ValueError, match="prefix tuning of a BertForSequenceClassification is not served"):
        add_gist(peft.get_peft_model(model, prefix()))
    assert not hasattr(model, "_fastgist_state")


def test_another_head_of_peft_is_not_saved_as_ours(tmp_path) -> None:
    """peft_model.set_adapter puts another copy of the head in place: saving refuses, and works again after the way back."""
    model = add_gist(theirs(llama(), lora(task_type="SEQ_CLS")))
    model.peft_model.add_adapter("other", lora(task_type="SEQ_CLS"))
    model.peft_model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r"save_adapter: Hugging Face PEFT trains the head .*other now"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    model.peft_model.set_adapter("default")
    save_adapter(model, tmp_path / "a")


def test_merging_by_peft_says_what_stands_in_the_way() -> None:
    model = add_gist(theirs(bert(), lora(target_modules=["query", "value"])))
    with pytest.raises(RuntimeError, match=r"a gist token cannot be merged: .*fastgist\.unload"):
        model.peft_model.merge_and_unload()
