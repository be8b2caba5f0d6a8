"""What is done to a model: adapters in, out, switched, merged."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch import nn

from fastgist.nn._checks import check_module
from fastgist.peft import state as _state
from fastgist.peft.config import PeftConfig
from fastgist.peft.method import method_of
from fastgist.peft.state import Record, State, need_state

__all__ = [
    "disable_adapter",
    "get_peft_model",
    "merge",
    "merge_and_unload",
    "set_adapter",
    "unload",
    "unmerge",
]


def get_peft_model(model: nn.Module, config: PeftConfig, name: str = "default") -> nn.Module:
    """Freeze ``model`` and add what ``config`` says, in place; the head stays trainable.

    A second call with another ``name`` adds one more adapter, with a head of its own (a copy of the head as it was
    before wrapping) and, on a gist model, a gist token of its own, and puts it in place; :func:`set_adapter` switches.

    Args:
        model: a model of a known family, wrapped before or not, or a gist model around one.
        config: a registered configuration, such as ``LoraConfig()``.
        name: how the adapter is called: letters, digits, "_", "-", ".".

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: nothing in the model matches (the error lists what names exist), a layer is matched twice, nothing
            would be trainable, or an adapter of that name is there already. The model is unchanged.
        TypeError: an unknown configuration or model family.
        RuntimeError: an adapter is merged at present.
        ImportError: the configuration asks for a library that is not installed. The model is unchanged.
    """
    add_record(model, config, name, "get_peft_model")
    return model


def add_record(model: nn.Module, config: PeftConfig, name: str, caller: str, filled: bool = False) -> Record:
    """``filled``: a file fills the layers at once, so that what they start from does not matter."""
    check_module(caller, "model", model)
    method = method_of(config)
    _state.check_name(name, caller)
    plain = _state.inner(model)
    known = _state.state_of(plain)
    if _state.is_foreign(model) or (known is not None and known.foreign):
        raise ValueError(
            f"{caller}: the model holds Hugging Face PEFT's adapters, and {type(config).__name__} does not stand beside "
            "those; take the plain model, or only add_gist"
        )
    if known is not None:
        need_state(plain, caller)
        if name in known.records:
            raise ValueError(
                f"{caller}: the model has an adapter named {name!r} already "
                f"({known.records[name].config}); give another name, or unload(model) first"
            )
        _refuse_merged(known, caller)
        whole = next((r for r in known.records.values() if r.whole), None)
        if whole is not None or (method.whole and known.records):
            raise ValueError(
                f"{caller}: full fine-tuning stands alone, and the model has {', '.join(known.records)}; unload(model) first"
            )
    state = _state.begin(plain, caller)
    previous = state.active
    try:
        _state.deactivate(plain, state)
        record = Record(name, config, method.build(plain, state.family, config), whole=method.whole)
        heads = state.original_heads.values()
        if not (record.sites or record.whole or any(True for head in heads for _ in head.parameters())):
            raise ValueError(
                f"{caller}: {type(config).__name__} adds no layers and the model has no head: nothing to train"
            )
        if not filled:
            method.start(record.sites, config)
        if state.records:
            record.heads = _state.fresh_heads(state)
            record.extra = None if state.extension is None else state.extension.fresh()
    except Exception:
        if previous is not None:
            _state.activate(plain, state, previous)
        if known is None:
            _state.end(plain, state)
        raise
    state.records[name] = record
    _state.activate(plain, state, name)
    return record


def set_adapter(model: nn.Module, name: str) -> None:
    """Put the adapter called ``name`` in place, with its head (and gist token); the one there is set aside.

    Optimisers and DDP wrappers hold the parameters of the adapter they were made for: make them anew after a switch.

    Raises:
        ValueError: no adapter of that name.
        RuntimeError: an adapter is merged at present.
    """
    state = need_state(model, "set_adapter")
    if not isinstance(name, str) or name not in state.records:
        raise ValueError(f"set_adapter: no adapter named {name!r}; there are {', '.join(state.records) or 'none'}")
    _refuse_merged(state, "set_adapter")
    if name != state.active:
        plain = _state.inner(model)
        _state.deactivate(plain, state)
        _state.activate(plain, state, name)


@contextlib.contextmanager
def disable_adapter(model: nn.Module, *, keep_head: bool = False) -> Iterator[nn.Module]:
    """Within the context the model is what it was before wrapping: no adapter, no gist token, the original head.

    Layers are swapped, so nothing is paid while adapters are enabled; other threads must not use the model meanwhile.

    Args:
        keep_head: keep the trained head.

    Raises:
        ValueError: the model is not wrapped.
        RuntimeError: an adapter is merged at present, or the contexts are nested.
    """
    state = need_state(model, "disable_adapter")
    _refuse_merged(state, "disable_adapter")
    _refuse_whole(state, "disable_adapter")
    plain = _state.inner(model)
    active = state.active
    trained = {path: plain.get_submodule(path) for path in state.original_heads}
    _state.deactivate(plain, state)
    if state.extension is not None:
        state.extension.detach(plain)
    if not keep_head:
        _state._place_heads(plain, state.original_heads)
        state.family.after_change(plain)
    state.disabled = True
    try:
        yield model
    finally:
        state.disabled = False
        for path, head in trained.items():
            head.train(plain.get_submodule(path).training)
            _state.replace_module(plain, path, head)
        if state.extension is not None:
            state.extension.attach(plain)
        if active is not None:
            _state.activate(plain, state, active)
        state.family.after_change(plain)


def merge(model: nn.Module) -> nn.Module:
    """Add the updates of the adapter in place to the weights they belong to. All or nothing.

    Each merged weight's original is kept beside it (that much more memory), so :func:`unmerge` is bitwise. Merged, the
    model runs at the plain model's speed; its adapter's parameters stay and can be saved.

    Raises:
        ValueError: the model is not wrapped.
        RuntimeError: merged already, or the method cannot merge (adapters, a gist token): the error names it; nothing
            changed.
        TypeError: a base layer is quantised or otherwise not a plain linear layer; nothing changed.
    """
    state = need_state(model, "merge")
    _refuse_merged(state, "merge")
    if state.extension is not None:
        raise RuntimeError(
            f"merge: {state.extension.title} cannot be merged into weights: it is a row of the sequence; nothing was "
            "changed"
        )
    record = state.record()
    if record is None:
        return model
    method = method_of(record.config)
    if not method.can_merge(record.config):
        raise RuntimeError(
            f"merge: {method.title} ({type(record.config).__name__}, adapter {record.name!r}) cannot be merged into "
            "weights; nothing was changed"
        )
    for path, layer in record.sites.items():
        try:
            layer.check_mergeable()
        except TypeError as error:
            raise TypeError(f"{path}: {error}; nothing was changed") from None
    done = []
    try:
        for layer in record.sites.values():
            layer.merge()
            done.append(layer)
    except Exception:
        for layer in done:
            layer.unmerge()
        raise
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put the original weights back, bitwise.

    Raises:
        RuntimeError: nothing is merged.
    """
    state = need_state(model, "unmerge")
    if not _merged(state):
        raise RuntimeError("unmerge: nothing is merged")
    for layer in state.records[state.active].sites.values():  # type: ignore[index]
        layer.unmerge()
    return model


def unload(model: nn.Module, keep_head: bool = True) -> nn.Module:
    """Take everything out: the plain model again, its frozen parts bitwise the original, requires_grad as before
    wrapping.

    Updates are dropped, not kept in the weights (:func:`merge_and_unload` keeps them). All named
    adapters go. Where a gist token goes, a warning says that the logits change.

    Args:
        keep_head: keep the head as trained; False puts the head from before wrapping back.

    Returns:
        The plain model: the object that was wrapped, not a gist model around it (a Hugging Face PeftModel, where the
        gist token was in one).

    Raises:
        ValueError: the model is not wrapped.
    """
    state = need_state(model, "unload")
    plain = _state.inner(model)
    if not keep_head:
        _refuse_whole(state, "unload")
    if _merged(state):
        unmerge(plain)
    return _taken_out(model, state, keep_head)


def merge_and_unload(model: nn.Module, keep_head: bool = True) -> nn.Module:
    """The plain model with the updates of the adapter in place in its weights, for ``save_pretrained`` and whatever else wants
    a plain model. There is no way back: save the adapter first. Other named adapters go.

    SSF's shift needs a bias. A layer without one gets one, and a warning says so: a fresh model of the class has no place for
    it, and must be given one before the weights are loaded (``load_state_dict`` refuses, ``from_pretrained`` drops it).

    Args:
        keep_head: as :func:`unload`'s.

    Returns:
        The plain model.

    Raises:
        ValueError, RuntimeError, TypeError: as :func:`merge`'s; a model that is merged already is taken as it is.
    """
    state = need_state(model, "merge_and_unload")
    if not _merged(state):
        merge(model)
    if not keep_head:
        _refuse_whole(state, "merge_and_unload")
    plain = _state.inner(model)
    before = {name.replace(".base_layer.", ".") for name in plain.state_dict()}
    merged = _taken_out(model, state, keep_head)
    added = sorted(name for name in plain.state_dict() if name.replace(".base_layer.", ".") not in before)
    if added:
        shown = ", ".join(added[:4]) + (f" and {len(added) - 4} more" if len(added) > 4 else "")
        warnings.warn(
            f"merge_and_unload: {len(added)} layers without a bias got one, which a fresh model of this class has no place "
            f"for: {shown}; give it those before loading these weights",
            UserWarning,
            stacklevel=2,
        )
    return merged


def _taken_out(model: nn.Module, state: State, keep_head: bool) -> nn.Module:
    plain = _state.inner(model)
    _state.deactivate(plain, state)
    if state.extension is not None:
        warnings.warn(
            f"unload: {state.extension.title} leaves the sequence, so the logits change", UserWarning, stacklevel=3
        )
        state.extension.detach(plain)
    if not keep_head:
        _state._place_heads(plain, state.original_heads)
        state.family.after_change(plain)
    _state.end(plain, state)
    outer = model if _state.is_foreign(model) else getattr(model, "peft_model", None)
    return plain if outer is None else outer


def _merged(state: State) -> bool:
    record = state.record()
    return record is not None and any(getattr(layer, "merged", False) for layer in record.sites.values())


def _refuse_whole(state: State, caller: str) -> None:
    record = state.record()
    if record is not None and record.whole:
        raise RuntimeError(
            f"{caller}: after full fine-tuning (adapter {record.name!r}) the model it was is not there any more"
        )


def _refuse_merged(state: State, caller: str) -> None:
    if _merged(state):
        raise RuntimeError(f"{caller}: adapter {state.active!r} is merged; call unmerge(model) first")
