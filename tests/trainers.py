"""A tiny BERT classifier without dropout, and data and settings for transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vits import randomised

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BertConfig, BertForSequenceClassification, TrainingArguments


def bert(**options) -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 50,
    }
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    return randomised(BertForSequenceClassification(BertConfig(**sizes | options)))


def rows(count: int = 8) -> list[dict]:
    torch.manual_seed(5)
    ids = torch.randint(3, 50, (count, 6))
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": int(i[0] % 3), "idx": 7} for i in ids]


def settings(tmp_path, **options) -> TrainingArguments:
    common = {
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "report_to": "none",
    }
    common |= {"output_dir": str(tmp_path), "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    common |= {"max_grad_norm": 0.0, "seed": 1, "logging_strategy": "no", "dataloader_pin_memory": False}
    return TrainingArguments(**common | options)
