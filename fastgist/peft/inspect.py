"""What is trained, and whether it really is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn._checks import check_module
from fastgist.nn._quantised import count
from fastgist.peft import state as _state
from fastgist.peft.family import find_family

__all__ = ["Report", "assert_training", "print_trainable_parameters", "report"]


@dataclass(frozen=True)
class Report:
    """Numbers of a model. ``parts``: trained numbers by part. ``total``: every parameter once, added ones included
    (one of 4 bits as one number)."""

    model: str
    adapter: str | None
    config: Any
    others: tuple[str, ...]
    trainable: int
    total: int
    parts: dict[str, int]
    layers: dict[str, int]
    dtypes: tuple[str, ...]
    merged: bool

    @property
    def share(self) -> float:
        """trainable / total."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.trainable:,} of {self.total:,} parameters are trained ({100 * self.share:.4f}%)"]
        lines += [f"  {part:<8} {count:>12,}" for part, count in self.parts.items()]
        if self.adapter is not None:
            others = f"; set aside: {', '.join(self.others)}" if self.others else ""
            lines.append(f"  adapter {self.adapter!r}: {self.config}{' (merged)' if self.merged else ''}{others}")
        lines += [f"  {count} x {layer}" for layer, count in self.layers.items()]
        lines.append(f"  trained in {', '.join(self.dtypes) or 'nothing'}")
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What is trained in ``model``, wrapped or not; ``print(report(model))`` shows it."""
    check_module("report", "model", model)
    state = _state.state_of(model)
    plain = _state.inner(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    part_of: dict[int, str] = {}
    record = None
    if state is not None:
        record = state.record()
        for name, tensor in _state.owned_tensors(plain, state).items():
            part_of[id(tensor)] = name.split(".", 1)[0]
    parts: Counter[str] = Counter()
    for p in trained:
        parts[part_of.get(id(p), "other")] += p.numel()
    layers = Counter(type(layer).__name__ for layer in record.sites.values()) if record else Counter()
    return Report(
        model=type(plain).__name__,
        adapter=record.name if record else None,
        config=record.config if record else None,
        others=tuple(n for n in state.records if n != state.active) if state else (),
        trainable=sum(p.numel() for p in trained),
        total=sum(count(p) for p in model.parameters()),
        parts=dict(parts),
        layers=dict(layers),
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in trained})),
        merged=record is not None and any(getattr(layer, "merged", False) for layer in record.sites.values()),
    )


def print_trainable_parameters(model: nn.Module) -> None:
    """Print numerator, denominator and share: ``trainable params: 1,234 || all params: 5,678 || trainable%: 21.73``."""
    check_module("print_trainable_parameters", "model", model)
    r = report(model)
    print(f"trainable params: {r.trainable:,} || all params: {r.total:,} || trainable%: {100 * r.share:.4f}")


def assert_training(model: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Run one small forward and backward and raise unless every trainable parameter receives a gradient.

    It finds what goes wrong silently: gradient checkpointing in its reentrant form cuts the graph when nothing before
    the first checkpointed block is trained; an adapter that is merged or not in place; a detached activation. The model
    is left as it was (gradients, random state, buffers, training mode).

    Args:
        inputs, kwargs: arguments for ``model``; made up for models of a known family if absent.

    Raises:
        RuntimeError: nothing is trainable, or parameters (named) receive no gradient, or those outside the head only
            zeros; or the backward fails, which is explained where it comes of reentrant checkpointing.
    """
    check_module("assert_training", "model", model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise RuntimeError(f"assert_training: no parameter of {type(model).__name__} requires a gradient")
    plain = _state.inner(model)
    state = _state.state_of(model)
    with torch.random.fork_rng(devices=[d for d in _state.own_devices(model) if d.type == "cuda"]):
        if not inputs and not kwargs:
            family = state.family if state is not None else find_family(plain, "assert_training")
            inputs = family.example_inputs(plain)
        gradients = _probe(model, list(trained.values()), inputs, kwargs)
    missing = [name for name, g in zip(trained, gradients, strict=True) if g is None]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise RuntimeError(
            f"assert_training: {len(missing)} of {len(trained)} trainable parameters receive no gradient: {shown}. "
            "Reentrant gradient checkpointing does this when everything before the first block is frozen (use the "
            "non-reentrant kind); so does a merged adapter"
        )
    heads = {id(p) for path in (state.original_heads if state else {}) for p in plain.get_submodule(path).parameters()}
    ours = [g for p, g in zip(trained.values(), gradients, strict=True) if id(p) not in heads]
    if ours and not any(g is not None and bool(g.any()) for g in ours):
        raise RuntimeError(
            "assert_training: every gradient outside the head is zero: nothing but the head would be trained"
        )


def _probe(model: nn.Module, parameters: list[nn.Parameter], inputs: tuple, kwargs: dict) -> list[Tensor | None]:
    """Gradients of a random projection of the model's outputs; the model's state is put back."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    grads = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        model.train()
        with torch.enable_grad():
            outputs = _tensors(model(*inputs, **kwargs))
            loss = sum((out.float() * torch.randn_like(out, dtype=torch.float32)).sum() for out in outputs)
        if isinstance(loss, Tensor) and loss.requires_grad:
            _backward(loss)
        return [p.grad for p in parameters]
    finally:
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            "assert_training: the backward goes through a part of the graph twice. Reentrant gradient checkpointing does so "
            "where blocks share a tensor that is trained, as DeBERTa's do their relative positions, also in the plain model: "
            "use the non-reentrant kind"
        ) from error


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else ()
    return [t for value in values for t in _tensors(value)]
