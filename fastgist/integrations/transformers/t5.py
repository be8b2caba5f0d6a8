"""A classifier on T5's encoder alone, which transformers does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["T5EncoderForSequenceClassification"]


class T5EncoderForSequenceClassification(T5PreTrainedModel):
    """T5's encoder, the mean of its final states over the real tokens, dropout and a linear layer.

    T5 has no class token. The mean is what Sentence-T5 (arXiv 2108.08877) found best of the encoder's poolings.
    ``T5EncoderForSequenceClassification.from_pretrained("google-t5/t5-base", num_labels=3)`` takes a T5's weights; the
    classifier is new.
    """

    _keys_to_ignore_on_load_unexpected = [r"decoder", r"lm_head"]

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 2)
        self.transformer = T5EncoderModel(config)
        self.embedded = nn.Identity()  # rows go into the sequence behind these
        self.entry = nn.Identity()
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, self.num_labels)
        self.post_init()

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The encoder's output for tokens (B, N) or their embeddings (B, N, D)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__}: give input_ids or inputs_embeds, not both")
        if inputs_embeds is None:
            inputs_embeds = self.transformer.get_input_embeddings()(input_ids)
        rows = self.entry(self.embedded(inputs_embeds))
        return self.transformer(inputs_embeds=rows, attention_mask=attention_mask, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """input_ids: (B, N); attention_mask: (B, N), 1 for real tokens; labels: (B,) int64, for the cross-entropy."""
        output = self.encode(input_ids, attention_mask, inputs_embeds, **kwargs)
        states = output.last_hidden_state
        mask = states.new_ones(states.shape[:2]) if attention_mask is None else attention_mask.to(states.dtype)
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
