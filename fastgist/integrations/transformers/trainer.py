"""transformers' Trainer around a wrapped model.

``Trainer(model=gist_model)`` works as it is: the model computes its loss where it is given labels. :class:`GistTrainer` adds
what Trainer cannot know of: parameter groups for token, adapter and head (:class:`PartsTrainer`), the progress that schedules
ask for, and checkpoints that hold the adaptation, not the model. :class:`AdapterTrainer` is the same for a model without a
gist token. Both take quantised models, which Trainer refuses where PEFT has not wrapped them.

With ``label_smoothing_factor`` the plain Trainer keeps the labels and takes its own loss of the logits: the model sees it in
the first backward and warns (smooth with ``model.loss = GistLoss(label_smoothing=...)``).
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from fastgist import GistModel, load_adapter, save_adapter
from fastgist.peft.state import inner, state_of
from fastgist.train import parameter_groups

__all__ = ["AdapterTrainer", "GistTrainer", "PartsTrainer"]


@contextlib.contextmanager
def _with_adapters(model: Any) -> Iterator[None]:
    """Within it a quantised model that fastgist has wrapped says that it has adapters: Trainer asks for PEFT's only."""
    plain = inner(model) if isinstance(model, nn.Module) and state_of(model) is not None else None
    if plain is None or not getattr(plain, "is_quantized", False) or getattr(plain, "_hf_peft_config_loaded", False):
        yield
        return
    plain._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del plain._hf_peft_config_loaded


class PartsTrainer(Trainer):
    """Trainer whose optimiser has the groups of :func:`fastgist.train.parameter_groups`: token, adapter, head, the rest.

    Weight decay is on matrices and the gist token, not on biases and other vectors. A scheduler scales all groups alike;
    where their rates differ the log has each part's (``learning_rate_gist``, ...) in place of ``learning_rate``.
    Optimisers that make groups of their own (GaLore, LOMO, Muon, ...) keep those.

    Args:
        lr_gist, lr_peft, lr_head: peak learning rates of parts; None: ``args.learning_rate``.
        wd_gist, wd_peft, wd_head: weight decays of parts; None: ``args.weight_decay``.
        args, kwargs: Trainer's.

    Raises:
        ValueError: a number out of range, or one for a part that the model does not train; or one beside an optimiser that
            was given, or that makes its own groups.
    """

    def __init__(
        self,
        *args: Any,
        lr_gist: float | None = None,
        lr_peft: float | None = None,
        lr_head: float | None = None,
        wd_gist: float | None = None,
        wd_peft: float | None = None,
        wd_head: float | None = None,
        **kwargs: Any,
    ) -> None:
        model = inspect.signature(Trainer.__init__).bind_partial(self, *args, **kwargs).arguments.get("model")
        with _with_adapters(model):
            super().__init__(*args, **kwargs)
        self._lrs = {"gist": lr_gist, "peft": lr_peft, "head": lr_head}
        self._rates: dict[str | None, float] = {}
        self._weight_decays = {"gist": wd_gist, "peft": wd_peft, "head": wd_head}
        if self._chosen():
            self._groups(self.model)
            if self.optimizer is not None or not self._takes_groups():
                raise ValueError(
                    f"{type(self).__name__}: {', '.join(self._chosen())} would not reach an optimiser that is given, or "
                    "that makes groups of its own"
                )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is not None or not self._takes_groups():
            return super().create_optimizer(model)
        before, (kind, settings) = self.optimizer_cls_and_kwargs, self._optimizer()
        groups = self._groups(self.model if model is None else model)
        self.optimizer_cls_and_kwargs = (kind, {**settings, "params": groups})  # Trainer's own groups give way to these
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = before

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "learning_rate" in logs and len(set(self._rates.values())) > 1:
            del logs["learning_rate"]
            logs |= {f"learning_rate_{part}": rate for part, rate in self._rates.items()}
        super().log(logs, *args, **kwargs)

    def _get_learning_rate(self) -> float:
        """The first group's. Trainer asks before the scheduler moves on, and logs it afterwards."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        self._rates = {group.get("part"): float(group["lr"]) for group in groups}
        return super()._get_learning_rate()

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        rates, decay = self.args.learning_rate, self.args.weight_decay
        return parameter_groups(model, rates, decay, lrs=self._lrs, weight_decays=self._weight_decays)

    def _chosen(self) -> list[str]:
        given = {"lr": self._lrs, "wd": self._weight_decays}
        return [f"{k}_{part}" for k, parts in given.items() for part, value in parts.items() if value is not None]

    def _optimizer(self) -> tuple[Any, dict[str, Any]]:
        if self.optimizer_cls_and_kwargs is not None:
            return self.optimizer_cls_and_kwargs
        return self.get_optimizer_cls_and_kwargs(self.args, self.model)

    def _takes_groups(self) -> bool:
        kind, settings = self._optimizer()
        own = {"params", "model", "optimizer_dict"} & settings.keys()
        return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and not own


class AdapterTrainer(PartsTrainer):
    """Trainer for a model that get_peft_model or petal.wrap has wrapped, quantised or not.

    - The optimiser has groups: :class:`PartsTrainer`, whose ``lr_peft`` and so on are arguments here too.
    - A checkpoint holds what :func:`fastgist.save_adapter` writes, beside Trainer's own files; resuming and
      ``load_best_model_at_end`` fill the model from it, and :func:`fastgist.load_adapter` takes it. (Trainer's own
      checkpoints hold every weight.)

    Raises:
        ValueError: ``model`` is not wrapped. FSDP or DeepSpeed, whose checkpoints are their own; a gist token in a Hugging
            Face PeftModel, of which a checkpoint would hold a part.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check()

    def _check(self) -> None:
        owner, state = type(self).__name__, state_of(self.model)
        if state is None:
            raise ValueError(f"{owner}: {type(self.model).__name__} is not wrapped by get_peft_model or add_gist")
        if state.foreign:
            raise ValueError(
                f"{owner}: a checkpoint would hold nothing of the PeftModel around the model; take Trainer"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"{owner}: FSDP and DeepSpeed write checkpoints of their own; take Trainer")

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


class GistTrainer(AdapterTrainer):
    """Trainer for a gist model.

    - All of :class:`AdapterTrainer`: parameter groups (``lr_gist`` and so on), checkpoints of the adaptation.
    - ``model.loss.progress`` is the share of the steps done, which schedules of beta and temperature are asked with.

    Raises:
        TypeError: ``model`` is no gist model.
        ValueError: ``label_smoothing_factor``: Trainer would take a loss of its own, without the gist logits; give
            ``GistLoss(label_smoothing=...)`` to the model. What :class:`AdapterTrainer` refuses.
    """

    def _check(self) -> None:
        if not isinstance(self.model, GistModel):
            raise TypeError(f"GistTrainer: model must be a GistModel (add_gist), got {type(self.model).__name__}")
        super()._check()
        if self.args.label_smoothing_factor:
            raise ValueError(
                "GistTrainer: label_smoothing_factor replaces the model's loss by one without gist logits; set "
                "model.loss = GistLoss(label_smoothing=...) instead"
            )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = getattr(self.model, "loss", None)
        if loss is not None and hasattr(loss, "progress"):
            loss.progress = self.state.global_step / max(self.state.max_steps, 1)
        return super().training_step(model, inputs, num_items_in_batch)
