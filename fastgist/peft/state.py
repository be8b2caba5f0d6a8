"""What a wrapped model carries: which adapters it has, which is in place, and what it was before.

The state hangs on the plain model as an ordinary attribute (not a submodule), so deepcopy and pickle take it along.
The adapter in place is in the module tree; the others are not: they cost nothing in a forward, and state_dict,
``.to()`` and wrappers such as DDP see only the one in place (a switch moves the newcomer to the right device).
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn._checks import check_module
from fastgist.nn._quantised import can_train, guard
from fastgist.peft.config import PeftConfig
from fastgist.peft.family import Family, find_family
from fastgist.peft.once import hold_once

__all__ = [
    "Extension",
    "Front",
    "Record",
    "State",
    "begin",
    "check_name",
    "inner",
    "is_foreign",
    "need_state",
    "owned_tensors",
    "state_of",
]

_ATTRIBUTE = "_fastgist_state"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")


class Front(nn.Module):
    """A module around a model that has a state, such as a gist model: functions of this package look through it."""

    model: Any


class Extension(ABC):
    """Something beside the layers that belongs to an adaptation (a gist token): trained, saved, switched with it."""

    #: Key in files, and the section its tensors stand in.
    name: str
    #: How an error that it cannot be merged calls it.
    title: str
    config: Any

    @abstractmethod
    def module(self) -> nn.Module:
        """The trained module at present."""

    @abstractmethod
    def set_module(self, module: nn.Module) -> None: ...

    @abstractmethod
    def fresh(self) -> nn.Module:
        """A newly drawn module of the same kind."""

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Put it into the model."""

    @abstractmethod
    def detach(self, model: nn.Module) -> None:
        """Take it out: the model is as it was before."""


@dataclass
class Record:
    """One named adapter. ``sites``: wrappers by path. ``heads``, ``extra``: its head and its extension's module while
    it is not in place (None: it takes what is there)."""

    name: str
    config: PeftConfig
    sites: dict[str, Any]
    heads: dict[str, nn.Module] | None = None
    extra: nn.Module | None = None
    #: Whether the model's own weights are trained too.
    whole: bool = False


@dataclass
class State:
    family: Family
    #: requires_grad of every parameter before wrapping.
    flags: dict[str, bool]
    #: copies of the head's modules as they were before wrapping.
    original_heads: dict[str, nn.Module]
    records: dict[str, Record] = field(default_factory=dict)
    active: str | None = None
    extension: Extension | None = None
    disabled: bool = False
    #: Kinds of the Hugging Face PEFT adapters inside, which stay what they are.
    foreign: tuple[str, ...] = ()
    #: Of the hooks on the model and on layers in it.
    hooks: tuple[Any, ...] = ()

    def record(self) -> Record | None:
        return None if self.active is None else self.records[self.active]


def is_foreign(model: nn.Module) -> bool:
    """Whether ``model`` is a Hugging Face PeftModel."""
    return any(base.__module__ == "peft.peft_model" for base in type(model).__mro__)


def inner(model: nn.Module) -> nn.Module:
    """The plain model inside a front, torch.compile's wrapper, DistributedDataParallel or a Hugging Face PeftModel."""
    while True:
        if isinstance(model, Front):
            model = model.model
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif is_foreign(model):
            model = model.get_base_model()
        else:
            return model


def state_of(model: nn.Module) -> State | None:
    return inner(model).__dict__.get(_ATTRIBUTE)


def need_state(model: nn.Module, caller: str) -> State:
    """The state of a wrapped model, enabled.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model is not wrapped.
        RuntimeError: called inside disable_adapter.
    """
    check_module(caller, "model", model)
    state = state_of(model)
    if state is None:
        raise ValueError(f"{caller}: {type(model).__name__} is not wrapped by get_peft_model or add_gist")
    if state.disabled:
        raise RuntimeError(f"{caller}: not inside disable_adapter")
    return state


def check_name(name: str, caller: str) -> str:
    """An adapter's name: letters, digits, "_", "-", "."; no path."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"{caller}: an adapter's name is letters, digits, '_', '-' and '.', without '..', got {name!r}"
        )
    return name


def begin(model: nn.Module, caller: str) -> State:
    """The state of ``model``, made on first use: all but the head is frozen, and the head as it was kept as a copy. What a
    Hugging Face PeftModel trains goes on being trained.

    Raises:
        TypeError: no family knows the model, or its head is quantised. The model is unchanged.
    """
    outer, model = model, inner(model)
    state = state_of(model)
    if state is not None:
        return need_state(model, caller)
    family = find_family(model, caller)
    paths = family.head_paths(model)
    trained: set[int] = set()
    foreign: tuple[str, ...] = ()
    if is_foreign(outer):
        from fastgist.integrations import peft as hf_peft

        paths = tuple(hf_peft.head_path(model, path) for path in paths)
        trained, foreign = hf_peft.trained(outer), tuple(hf_peft.kinds(outer))
    for path in paths:
        _check_head(model, path, caller)
    heads = {path: copy.deepcopy(model.get_submodule(path)) for path in paths}
    state = State(family, {n: p.requires_grad for n, p in model.named_parameters()}, heads, foreign=foreign)
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    for path in heads:
        model.get_submodule(path).requires_grad_(True)
    model.__dict__[_ATTRIBUTE] = state
    state.hooks = (*hold_once(model, _site_names), *guard(model))
    return state


def _check_head(model: nn.Module, path: str, caller: str) -> None:
    """The head at ``path`` can be trained.

    Raises:
        TypeError: it is quantised.
    """
    for name, p in model.get_submodule(path).named_parameters(prefix=path):
        if not can_train(p):
            raise TypeError(
                f"{caller}: {name} is quantised (a {type(p).__name__}), and the head is trained: leave {path} out of "
                "quantisation (bitsandbytes: BitsAndBytesConfig(llm_int8_skip_modules=[...]), torchao: a filter_fn)"
            )


def end(model: nn.Module, state: State) -> None:
    """Forget the state and give every parameter its requires_grad back. Nothing of ours is in the tree any more."""
    for name, p in model.named_parameters():
        p.requires_grad_(state.flags.get(name, True))
    for handle in state.hooks:
        handle.remove()
    model.__dict__.pop(_ATTRIBUTE, None)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


# -- putting in and taking out ---------------------------------------------------------------------------------------


def activate(model: nn.Module, state: State, name: str) -> None:
    """Put adapter ``name`` in place; none may be."""
    record = state.records[name]
    for path, wrapper in record.sites.items():
        base = model.get_submodule(path)
        device = next((p.device for p in base.parameters()), None)
        if device is not None:
            wrapper.to(device=device)
        wrapper.base_layer = base
        wrapper.train(base.training)
        replace_module(model, path, wrapper)
    for wrapper in record.sites.values():
        if hasattr(wrapper, "attached"):
            wrapper.attached(model)
    _place_heads(model, record.heads)
    record.heads = None
    if state.extension is not None:
        if record.extra is not None:
            state.extension.set_module(_like(record.extra, state.extension.module()))
        record.extra = None
    state.active = name
    state.family.after_change(model)
    if record.whole:
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())


def deactivate(model: nn.Module, state: State) -> None:
    """Take the adapter in place out, with its head and its extension's module (the head stays in the model too)."""
    record = state.record()
    if record is None:
        return
    for path, wrapper in record.sites.items():
        if hasattr(wrapper, "detached"):
            wrapper.detached(model)
        replace_module(model, path, wrapper.base_layer)
    record.heads = {path: model.get_submodule(path) for path in state.original_heads}
    record.extra = None if state.extension is None else state.extension.module()
    state.active = None
    state.family.after_change(model)


def fresh_heads(state: State) -> dict[str, nn.Module]:
    """Trainable copies of the head as it was before wrapping, for one more adapter."""
    heads = copy.deepcopy(state.original_heads)
    for head in heads.values():
        head.requires_grad_(True)
    return heads


def _place_heads(model: nn.Module, heads: dict[str, nn.Module] | None) -> None:
    for path, head in (heads or {}).items():
        replace_module(model, path, _like(head, model.get_submodule(path)))


def _like(module: nn.Module, other: nn.Module) -> nn.Module:
    """``module`` on the device, in the dtype and in the training mode of ``other``."""
    like = next((p for p in other.parameters() if p.is_floating_point()), None)
    if like is not None:
        module.to(device=like.device, dtype=like.dtype)
    return module.train(other.training)


# -- what is ours ----------------------------------------------------------------------------------------------------


def site_tensors(sites: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """What wrappers hold beside their base layers, by full name; shared tensors once."""
    seen: set[int] = set()
    for path, wrapper in sites.items():
        for name, tensor in wrapper.state_dict(keep_vars=True).items():
            if name.startswith("base_layer.") or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield f"{path}.{name}", tensor


def _site_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What the wrappers in place hold beside their base layers, under every name."""
    state = state_of(model)
    record = None if state is None else state.record()
    for path, wrapper in ({} if record is None else record.sites).items():
        held = (wrapper.named_parameters, wrapper.named_buffers)
        for name, tensor in (pair for named in held for pair in named(prefix=path, remove_duplicate=False)):
            if not name.startswith(f"{path}.base_layer."):
                yield name, tensor


def owned_tensors(model: nn.Module, state: State) -> dict[str, Tensor]:
    """The adaptation in place: layers under "adapter.", the head under "head.", an extension under its own name."""
    record = state.record()
    owned = {f"adapter.{name}": t for name, t in site_tensors({} if record is None else record.sites)}
    for path in state.original_heads:
        head = model.get_submodule(path).state_dict(keep_vars=True)
        owned |= {f"head.{path}.{name}": t for name, t in head.items()}
    if state.extension is not None:
        extra = state.extension.module().state_dict(keep_vars=True)
        owned |= {f"{state.extension.name}.{name}": t for name, t in extra.items()}
    if record is not None and record.whole:
        known = {id(t) for t in owned.values()}
        for name, t in model.state_dict(keep_vars=True).items():
            if id(t) not in known:  # tied weights once
                known.add(id(t))
                owned[f"model.{name}"] = t
    return owned


def own_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type != "cpu"}, key=str)
