"""AdapterTrainer: transformers' Trainer of wrapped models without a gist token, language models in 4 bits among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from quantised import four_bits
from test_any_base_models import llama, quantised
from trainers import bert, rows, settings

pytest.importorskip("accelerate")

import fastgist
from fastgist import AdapterConfig, LoraConfig, add_gist, get_peft_model
from fastgist.integrations.transformers import AdapterTrainer, GistTrainer


def in_four_bits(folder: Path):
    """A causal model as transformers loads it in 4 bits."""
    pytest.importorskip("bitsandbytes")
    if not (folder / "base").exists():
        llama().save_pretrained(folder / "base")
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=bits)


def words(count: int = 8) -> list[dict]:
    ids = torch.randint(3, 50, (count, 6), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": i, "labels": i} for i in ids]


def test_a_language_model_in_4_bits_trains_is_evaluated_and_resumes_bitwise(tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}

    def trainer(folder: str) -> AdapterTrainer:
        torch.manual_seed(0)
        model = get_peft_model(in_four_bits(tmp_path), LoraConfig())
        args = settings(tmp_path / folder, **options)
        made = AdapterTrainer(model, args, train_dataset=words(), eval_dataset=words(2), lr_peft=0.5)
        made.evaluate()  # on some CPUs bitsandbytes rounds its scales in the first one
        return made

    whole = trainer("whole")
    start = {n: p.detach().clone() for n, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    trained = {n: p for n, p in whole.model.named_parameters() if p.requires_grad}
    assert all(not torch.equal(p, start[n]) for n, p in trained.items())
    held = {p.name for p in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in held and "model.safetensors" not in held
    again = trainer("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, p in again.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(
                p, trained[name], rtol=1e-3, atol=1e-4
            )  # an evaluation rounds scales to bfloat16
    fastgist.load_adapter(in_four_bits(tmp_path), tmp_path / "whole" / "checkpoint-4")


def test_trainer_itself_still_refuses_what_has_no_adapters(tmp_path) -> None:
    model = in_four_bits(tmp_path)
    with pytest.raises(ValueError, match="purely quantized"):
        AdapterTrainer(model, settings(tmp_path), train_dataset=words())
    get_peft_model(model, LoraConfig())
    AdapterTrainer(model, settings(tmp_path), train_dataset=words())
    assert "_hf_peft_config_loaded" not in vars(model), "what Trainer asked for is taken back"


def test_what_is_no_wrapped_model_is_named(tmp_path) -> None:
    with pytest.raises(
        ValueError, match="AdapterTrainer: BertForSequenceClassification is not wrapped by get_peft_model"
    ):
        AdapterTrainer(bert(), settings(tmp_path), train_dataset=rows())
    with pytest.raises(TypeError, match="GistTrainer: model must be a GistModel"):
        GistTrainer(get_peft_model(bert(), AdapterConfig()), settings(tmp_path), train_dataset=rows())


def test_a_gist_model_of_a_quantised_classifier_trains(tmp_path) -> None:
    model = add_gist(get_peft_model(quantised(bert(hidden_size=64), keep_head(four_bits)), AdapterConfig()))
    model.model.is_quantized = True  # as transformers marks a model that it has quantised
    trainer = GistTrainer(model, settings(tmp_path), train_dataset=rows())
    trainer.train()


def test_a_quantised_model_with_adapters_of_transformers_own_keeps_them(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    plain = bert()
    plain.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    model = add_gist(plain)
    plain.is_quantized = True
    GistTrainer(model, settings(tmp_path), train_dataset=rows())
    assert plain._hf_peft_config_loaded and plain.active_adapters() == ["default"]


def keep_head(how):
    """All but the head, whose outputs are few."""
    return lambda layer: layer if layer.out_features < 16 else how(layer)
