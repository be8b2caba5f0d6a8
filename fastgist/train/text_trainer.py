"""transformers' Trainer around a gist model: GIST's loss, checkpoints of what is trained alone, Ctrl-C, resuming.

A checkpoint is the Trainer's own folder, with ``trained.safetensors`` in place of the whole model. It is complete when
``trainer_state.json``, which the Trainer writes last, can be read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastgist.integrations.transformers.trainer import PartsTrainer
from fastgist.nn import GistLoss, update_thresholds
from fastgist.nn.schedule import Schedule
from fastgist.peft.state import Front
from fastgist.train.config import UserError
from fastgist.train.engine import trained_tensors

__all__ = ["GistObjective", "TextTrainer", "Trained", "complete_checkpoints"]

_WEIGHTS = "trained.safetensors"


class Trained(Front):
    """What the Trainer trains: the model, plain or with a gist token, beside its transformers ``config``."""

    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


class GistObjective:
    """GIST's loss as the Trainer's ``compute_loss_func``: the task's alone for a model without a gist token.

    The sum over rows is divided by ``num_items_in_batch``, so accumulated batches of different sizes weigh by rows.
    ``beta`` and ``temperature`` may be schedules: :class:`MovingNumbers` says how far the run is.
    """

    def __init__(self, alpha: float, beta: float | Schedule, temperature: float | Schedule, regression: bool) -> None:
        problem = "regression" if regression else "single_label_classification"
        self.loss = GistLoss(alpha, beta, temperature, problem_type=problem, reduction="sum")
        self.regression = regression

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """outputs: a mapping with logits (B, C) and perhaps gist_logits; labels (B,)."""
        rows = len(labels) if num_items_in_batch is None else num_items_in_batch
        return self.loss(outputs, labels.float()[:, None] if self.regression else labels) / rows


class TextTrainer(PartsTrainer):
    """Saves and loads what training moves alone."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        import safetensors.torch

        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in trained_tensors(self._inner()).items()}
        safetensors.torch.save_file(tensors, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        import safetensors.torch

        path = Path(resume_from_checkpoint) / _WEIGHTS
        try:
            stored = safetensors.torch.load_file(path)
        except Exception as error:
            raise UserError(f"{path} is damaged or missing: {error}") from error
        own = trained_tensors(self._inner())
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in stored.items()}:
            raise UserError(f"{path}: its parameters are not those of this model")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _inner(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The Trainer's complete checkpoints in ``folder``, newest first."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = json.loads((path / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        if path.name == f"checkpoint-{step}":
            found.append((step, path))
    return [path for _, path in sorted(found, reverse=True)]


def remove_incomplete(folder: Path) -> None:
    """Remove what a killed run left half-written in ``folder``."""
    complete = set(complete_checkpoints(folder))
    for path in folder.glob("checkpoint-*"):
        if path not in complete:
            shutil.rmtree(path, ignore_errors=True)


class Interruptible(TrainerCallback):
    """Checkpoints every ``every`` steps, and one more when ``interrupted()``, after which KeyboardInterrupt is raised.

    The last step of an epoch is left to the epoch's own checkpoint, which holds its evaluation too.
    """

    def __init__(self, every: int, interrupted: Callable[[], bool]) -> None:
        self.every, self.interrupted, self.stopping = every, interrupted, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.stopping = self.stopping or self.interrupted()
        per_epoch = state.max_steps // int(args.num_train_epochs)
        due = self.stopping or (self.every and state.global_step % self.every == 0)
        if due and state.global_step % per_epoch:
            control.should_save = True
        return control

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            raise KeyboardInterrupt


class MovingThresholds(TrainerCallback):
    """Lets thresholds on mode approximation's updates follow each optimiser step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        update_thresholds(kwargs["model"], (state.global_step + 1) / state.max_steps)


class MovingNumbers(TrainerCallback):
    """Says before each step what share of the run's steps is done, which schedules of beta and T are asked with.

    The share is the Trainer's own count over its own number, so a resumed run asks as the run it continues.
    """

    def __init__(self, loss: GistLoss) -> None:
        self.loss = loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loss.progress = state.global_step / state.max_steps


class FiniteLoss(TrainerCallback):
    """Stops a run whose logged loss is no number."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not torch.isfinite(torch.tensor(float(loss))):
            raise RuntimeError(
                f"the loss became {loss} at step {state.global_step}: try an --lr below {args.learning_rate:g}"
            )
