"""The training loop: one function for the demo and for ``fastgist finetune``; accelerate does devices and processes.

Dropout and drop path are seeded at every step from (seed, step, process), the order of images from (seed, epoch) and
their augmentation from (seed, epoch, image), and the learning rate is a function of the step. So the step number is
all the random state there is, and a run resumed from a checkpoint goes on as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from fastgist.nn import CPThreshold, update_thresholds
from fastgist.recipes import Recipe
from fastgist.train.checkpoint import Checkpoints
from fastgist.train.config import UserError
from fastgist.train.data import EpochBatches, seed_everything
from fastgist.train.interrupt import deferred_interrupt
from fastgist.train.measure import StepMemory
from fastgist.train.metrics import Metrics
from fastgist.train.optim import groups_of, to_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["FitResult", "evaluate", "fit", "predict", "trained_tensors"]

_STEP_STREAM = 1  # keeps the steps' seeds apart from the images'


@dataclass
class FitResult:
    """What a training run came to."""

    steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_accuracy: float | None = None
    best_epoch: int | None = None
    best_loss: float | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None


@dataclass
class _State:
    """What a checkpoint restores, beside the tensors of the model and the optimiser."""

    step: int = 0
    best_accuracy: float | None = None
    best_loss: float | None = None
    best_epoch: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)


_NUMBERS = ("best_accuracy", "best_loss", "best_epoch", "best_metrics")


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits"]


def _objective(recipe: Recipe) -> Callable[[Any, Tensor], Tensor]:
    """GIST's loss: cross-entropy for a plain model."""
    from fastgist.nn import GistLoss

    return GistLoss(alpha=recipe.alpha, beta=to_schedule(recipe.beta), temperature=to_schedule(recipe.temperature))


def _rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate, or that of each part where they differ."""
    rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
    if len(set(rates.values())) == 1:
        return {"lr": next(iter(rates.values()))}
    return {f"lr_{part}": rate for part, rate in rates.items()}


def _better(accuracy: float, loss: float, state: _State) -> bool:
    """A higher accuracy, or an equal one at a lower loss."""
    if state.best_accuracy is None or state.best_loss is None:
        return True
    return (accuracy, -loss) > (state.best_accuracy, -state.best_loss)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training moves, by name, shared ones once: the trained parameters, and the state of thresholds."""
    moved = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, CPThreshold):
            moved |= dict(module.named_buffers(prefix=path))
    return moved


@torch.no_grad()
def predict(
    model: nn.Module, data: Dataset, batch_size: int, device: torch.device, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """(logits, labels) of every image, float32 on the CPU. The model is left in evaluation mode."""
    model.eval()
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers, pin_memory=device.type == "cuda")
    logits, labels = [], []
    for images, target in loader:
        logits.append(_logits(model(images.to(device, non_blocking=True))).float().cpu())
        labels.append(target)
    return torch.cat(logits), torch.cat(labels)


def evaluate(
    model: nn.Module,
    data: Dataset,
    batch_size: int,
    accelerator: Accelerator,
    workers: int = 0,
    metrics: Metrics | None = None,
) -> dict[str, float]:
    """ "accuracy", "loss" (mean cross-entropy) and ``metrics`` by name over all processes, every image counted once."""
    mine = Subset(data, range(accelerator.process_index, len(data), accelerator.num_processes))  # type: ignore[arg-type]
    sums = torch.zeros(3)
    logits, labels = torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)
    if len(mine):
        logits, labels = predict(model, mine, batch_size, accelerator.device, workers)
        correct = (logits.argmax(-1) == labels).sum()
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums = torch.stack([correct.float(), loss, torch.tensor(float(len(labels)))])
    correct, loss, count = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    found = {"accuracy": correct / count, "loss": loss / count}
    return found if metrics is None else found | metrics.of(logits, labels, accelerator)


def _save(
    checkpoints: Checkpoints,
    state: _State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_sum: Tensor,
    accelerator: Accelerator,
    identity: Mapping[str, Any],
) -> None:
    loss_sum = accelerator.reduce(loss_sum, reduction="mean")
    if accelerator.is_main_process:
        tensors = {f"model/{name}": p for name, p in trained_tensors(model).items()}
        tensors |= {f"best/{name}": p for name, p in state.best.items()}
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in entry.items()}
        tensors["loss_sum"] = loss_sum
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        numbers = {key: getattr(state, key) for key in _NUMBERS}
        checkpoints.save(state.step, tensors, {**numbers, "scaler": scaler, "identity": identity})
    accelerator.wait_for_everyone()


def _restore(
    checkpoints: Checkpoints,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_sum: Tensor,
    accelerator: Accelerator,
    identity: Mapping[str, Any],
) -> tuple[_State, list[str]]:
    """The newest complete checkpoint into model and optimiser; a fresh state where there is none."""
    found = checkpoints.latest()
    if found is None:
        return _State(), [f"no checkpoint in {checkpoints.folder}: starting from the beginning"]
    path, tensors, saved, complaints = found
    for key, ours in identity.items():
        theirs = saved["identity"].get(key)
        if theirs != ours:
            raise UserError(f"cannot resume from {path}: it was made with {key} = {theirs!r}, this run has {ours!r}")
    own = trained_tensors(model)
    stored = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in stored.items()}:
        raise UserError(f"cannot resume from {path}: its parameters are not those of this model")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])
        loss_sum.copy_(tensors["loss_sum"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if accelerator.scaler is not None and saved["scaler"] is not None:
        accelerator.scaler.load_state_dict(saved["scaler"])
    best = {name.removeprefix("best/"): t for name, t in tensors.items() if name.startswith("best/")}
    state = _State(saved["step"], best=best, **{key: saved[key] for key in _NUMBERS})
    return state, [*complaints, f"resuming after step {state.step} from {path}"]


def fit(
    model: nn.Module,
    train: Dataset,
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    val: Dataset | None = None,
    objective: Callable[[Any, Tensor], Tensor] | None = None,
    metrics: Metrics | None = None,
    workers: int = 0,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    on_epoch: Callable[[dict[str, float]], None] = lambda record: None,
    on_start: Callable[[int, list[str]], None] = lambda step, notes: None,
    progress: bool = True,
    description: str = "training",
    measure_memory: bool = True,
) -> FitResult:
    """Train ``model`` in place on ``train``; with ``val``, end with the weights of its best epoch there.

    ``train`` is indexed by :class:`~fastgist.train.data.Draw` (index and epoch). ``objective`` (output, target) -> loss is
    GIST's loss if not given, which for a plain model is cross-entropy; its ``progress`` follows the run. ``metrics`` are
    those of ``val`` beside accuracy and loss, which select. ``identity`` is
    what a resumed run must have in common with the run it continues. Without ``val`` the last epoch's weights stay.
    """
    from timm.scheduler import CosineLRScheduler
    from tqdm import tqdm

    device, world = accelerator.device, accelerator.num_processes
    sampler = EpochBatches(len(train), recipe.batch_size, recipe.seed, accelerator.process_index, world)  # type: ignore[arg-type]
    loader = DataLoader(
        train,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )
    per_epoch = sampler.steps
    total = per_epoch * recipe.epochs
    groups = groups_of(model, recipe)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=total,
        lr_min=recipe.min_lr,
        warmup_t=round(recipe.warmup * per_epoch),
        warmup_lr_init=recipe.warmup_lr,
        t_in_epochs=False,
    )
    prepared = accelerator.prepare_model(model)
    stepper = accelerator.prepare_optimizer(optimizer)
    inner = accelerator.unwrap_model(prepared)
    objective = objective or _objective(recipe)
    loss_sum = torch.zeros((), device=device)
    state, notes = _State(), list[str]()
    identity = {**(identity or {}), "global batch": recipe.batch_size * world}
    identity["parameter groups"] = [[group["name"], len(group["params"])] for group in groups]
    if checkpoints is not None and resume:
        state, notes = _restore(checkpoints, inner, optimizer, loss_sum, accelerator, identity)
    on_start(state.step, notes)

    result = FitResult()
    memory = StepMemory(device)
    measure_memory = measure_memory and (world == 1 or device.type == "cuda")  # the CPU profiler stumbles over DDP
    first = state.step
    timed_images, timed_seconds = 0, 0.0
    show = progress and accelerator.is_main_process
    # Several processes would see Ctrl-C at different steps and wait for each other: there it interrupts at once.
    with (
        deferred_interrupt(checkpoints is not None and world == 1) as interrupted,
        tqdm(total=total, initial=first, desc=description, unit="step", disable=not show, leave=False) as bar,
    ):
        for epoch in range(first // per_epoch, recipe.epochs):
            sampler.seek(epoch, state.step - epoch * per_epoch)
            prepared.train()
            clock, images_since = time.perf_counter(), 0
            for images, target in loader:
                images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
                seed_everything(recipe.seed, _STEP_STREAM, state.step, accelerator.process_index)
                scheduler.step_update(state.step)
                if hasattr(objective, "progress"):
                    objective.progress = state.step / total

                def one_step(images: Tensor = images, target: Tensor = target) -> None:
                    loss = objective(prepared(images), target)
                    accelerator.backward(loss)
                    if recipe.clip_grad:
                        accelerator.clip_grad_norm_(inner.parameters(), recipe.clip_grad)
                    stepper.step()
                    update_thresholds(inner, (state.step + 1) / total)
                    stepper.zero_grad()
                    loss_sum.add_(loss.detach())

                if measure_memory and state.step == first + 1:  # the second step: the optimiser has its state
                    with memory.measure(inner, optimizer):
                        one_step()
                else:
                    one_step()
                state.step += 1
                bar.update()
                if state.step <= first + 2:  # warm-up and the profiled step are not timed
                    clock, images_since = time.perf_counter(), 0
                else:
                    images_since += len(target) * world
                stop = interrupted()  # asked once: Ctrl-C during the save is the next step's affair
                due = stop or (checkpoint_every and state.step % checkpoint_every == 0)
                if checkpoints is not None and due and state.step % per_epoch:
                    _save(checkpoints, state, inner, optimizer, loss_sum, accelerator, identity)
                    if stop:
                        raise KeyboardInterrupt
            mean_loss = float(accelerator.reduce(loss_sum, reduction="mean")) / per_epoch  # waits for the device
            timed_seconds += time.perf_counter() - clock
            timed_images += images_since
            loss_sum.zero_()
            if not math.isfinite(mean_loss):
                raise RuntimeError(f"the loss became {mean_loss} in epoch {epoch + 1}: try an --lr below {recipe.lr:g}")
            record: dict[str, float] = {"epoch": epoch + 1, "step": state.step, **_rates(optimizer)}
            record["train_loss"] = mean_loss
            if val is not None:
                judged = evaluate(inner, val, recipe.batch_size, accelerator, workers, metrics)
                record |= {f"val_{name}": value for name, value in judged.items()}
                accuracy, loss = judged["accuracy"], judged["loss"]
                if _better(accuracy, loss, state):
                    state.best_accuracy, state.best_loss, state.best_epoch = accuracy, loss, epoch + 1
                    state.best_metrics = {name: judged[name] for name in judged if name not in ("accuracy", "loss")}
                    state.best = {k: v.detach().to("cpu", copy=True) for k, v in trained_tensors(inner).items()}
            bar.set_postfix({k: f"{record[k]:.3f}" for k in ("train_loss", "val_accuracy") if k in record})
            result.history.append(record)
            on_epoch(record)
            due = checkpoint_every == 0 or state.step % checkpoint_every == 0 or state.step == total
            stop = interrupted()
            if checkpoints is not None and (due or stop):
                _save(checkpoints, state, inner, optimizer, loss_sum, accelerator, identity)
            if stop and state.step < total:
                raise KeyboardInterrupt
    if state.best:
        with torch.no_grad():
            for name, parameter in trained_tensors(inner).items():
                parameter.copy_(state.best[name])
    inner.eval()
    result.steps = state.step
    for name in _NUMBERS:
        setattr(result, name, getattr(state, name))
    result.images_per_second = timed_images / timed_seconds if timed_images and timed_seconds else None
    result.peak_memory_bytes = memory.peak_bytes
    return result
