"""transformers' Trainer around a gist model.

``Trainer(model=gist_model)`` works as it is: the model computes its loss where it is given labels. :class:`GistTrainer` adds
what Trainer cannot know of: the progress that schedules ask for, and checkpoints that hold the adaptation, not the model.

Two things the plain Trainer does without a word that reaches us: with ``label_smoothing_factor`` it keeps the labels and takes
its own loss of the logits (smooth with ``model.loss = GistLoss(label_smoothing=...)``), and it cannot save CP and FacT,
whose factors many layers share.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from fastgist import GistModel, load_adapter, save_adapter

__all__ = ["GistTrainer"]


class GistTrainer(Trainer):
    """Trainer for a gist model.

    - ``model.loss.progress`` is the share of the steps done, which schedules of beta and temperature are asked with.
    - A checkpoint holds what :func:`fastgist.save_adapter` writes, beside Trainer's own files; resuming and
      ``load_best_model_at_end`` fill the model from it, and :func:`fastgist.load_adapter` takes it. (Trainer's own
      checkpoints hold every weight, and it cannot write CPConfig's and FacTConfig's: shared factors stand in its state
      dict more than once.)

    Raises:
        TypeError: ``model`` is no gist model.
        ValueError: ``label_smoothing_factor``: Trainer would take a loss of its own, without the gist logits; give
            ``GistLoss(label_smoothing=...)`` to the model. FSDP or DeepSpeed, whose checkpoints are their own; a gist token
            in a Hugging Face PeftModel, of which a checkpoint would hold a part.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, GistModel):
            raise TypeError(f"GistTrainer: model must be a GistModel (add_gist), got {type(self.model).__name__}")
        if self.model.peft_model is not None:
            raise ValueError(
                "GistTrainer: a checkpoint would hold nothing of the PeftModel around the model; take Trainer"
            )
        if self.args.label_smoothing_factor:
            raise ValueError(
                "GistTrainer: label_smoothing_factor replaces the model's loss by one without gist logits; set "
                "model.loss = GistLoss(label_smoothing=...) instead"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("GistTrainer: FSDP and DeepSpeed write checkpoints of their own; take Trainer")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = getattr(self.model, "loss", None)
        if loss is not None and hasattr(loss, "progress"):
            loss.progress = self.state.global_step / max(self.state.max_steps, 1)
        return super().training_step(model, inputs, num_items_in_batch)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or self.args.output_dir
        if not self.args.should_save or folder is None:
            return
        save_adapter(self.model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # Trainer asks for it only then
        load_adapter(self.model, self.state.best_model_checkpoint)
