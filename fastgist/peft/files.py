"""save_adapter and load_adapter: what goes into the file, and what is checked before anything of a model is touched."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn import AffineLayer, TunerLinear
from fastgist.nn._checks import check_module, shown
from fastgist.nn._quantised import can_train
from fastgist.peft import state as _state
from fastgist.peft import storage, surgery
from fastgist.peft.config import PeftConfig, config_from_dict
from fastgist.peft.method import registered_configs
from fastgist.peft.quantised import same_before, sample, stored

__all__ = ["load_adapter", "register_extension", "save_adapter"]

#: name in files -> (configuration from plain data, what adds it to a model and returns the model to use)
_EXTENSIONS: dict[str, tuple[Callable[..., Any], Callable[[nn.Module, Any], nn.Module]]] = {}


def register_extension(name: str, config_class: Callable[..., Any], add: Callable[[nn.Module, Any], nn.Module]) -> None:
    """Let load_adapter rebuild an extension (:class:`fastgist.peft.state.Extension`) of this name."""
    _EXTENSIONS[name] = (config_class, add)


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Save the adapter in place: its layers (shared factors once), the head, and the gist token if there is one.

    Writes ``adapter_model.safetensors`` (tensors, configuration, checksum) and ``fastgist_config.json``, a copy of the
    configuration for people. Killed at any moment, it leaves the old file or the new one. In a distributed run call it
    on one process.

    A fingerprint of the frozen weights goes with it, so that load_adapter can tell another backbone of the same shape.

    Of a gist token in a Hugging Face PeftModel it is the token and the head; the rest is PEFT's ``save_pretrained``'s, in
    another folder (see :mod:`fastgist.integrations.peft`). Of any other parameter that is trained (unfrozen by hand, or of an
    adapter that transformers' ``add_adapter`` put in) a UserWarning says that the file does not hold it.

    Raises:
        ValueError: the model is not wrapped, or the folder holds an adapter of Hugging Face PEFT.
        OSError: the folder cannot be written.
    """
    state = _state.need_state(model, "save_adapter")
    _check_folder("save_adapter", folder)
    if (Path(folder) / "adapter_config.json").exists():
        raise ValueError(
            f"save_adapter: {folder} holds an adapter of Hugging Face PEFT (adapter_config.json), whose "
            f"{storage.MODEL_NAME} would be overwritten; give another folder"
        )
    plain = _state.inner(model)
    if state.foreign:
        _check_peft_head(plain, state)
    record = state.record()
    config: dict[str, Any] = {
        "name": "default" if record is None else record.name,
        "adapter": None if record is None else record.config.to_dict(),
        "model": type(plain).__name__,
        "head": list(state.original_heads),
        "backbone": backbone_fingerprint(plain, state),
    }
    if state.foreign:
        config["peft"] = list(state.foreign)
    if state.extension is not None:
        config[state.extension.name] = dataclasses.asdict(state.extension.config)
    owned = _state.owned_tensors(plain, state)
    if not state.foreign:
        _warn_of_others(plain, owned, folder)
    storage.write(folder, config, owned)


def _warn_of_others(model: nn.Module, owned: Mapping[str, Tensor], folder: str | os.PathLike) -> None:
    known = {id(t) for t in owned.values()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        warnings.warn(
            f"save_adapter: {folder} does not hold {', '.join(others[:3])}{more}, which are trained but are no part of the "
            "adapter; save them apart",
            UserWarning,
            stacklevel=3,
        )


def _check_folder(caller: str, folder: object) -> None:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"{caller}: folder must be a path, got {shown(folder)}")


def _check_peft_head(plain: nn.Module, state: _state.State) -> None:
    """The head that PEFT trains now must be the one that the gist token was added to.

    Raises:
        RuntimeError: PEFT has switched to another of its adapters, with a head of its own.
    """
    from fastgist.integrations import peft as hf_peft

    now = [hf_peft.head_path(plain, path) for path in state.family.head_paths(plain)]
    if now != list(state.original_heads):
        raise RuntimeError(
            f"save_adapter: Hugging Face PEFT trains the head {', '.join(now)} now, the gist token was added beside "
            f"{', '.join(state.original_heads)}; switch back with peft_model.set_adapter first"
        )


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, strict: bool = True, *, name: str | None = None
) -> nn.Module:
    """Load what :func:`save_adapter` wrote: into a plain model, which is wrapped accordingly, or one wrapped alike.

    Everything is checked first (checksum, names, shapes, configuration); on an error the model is as it was. Frozen
    weights other than those the adapter was trained on are no error, but a UserWarning says so. The same in another dtype, or
    unquantised where it was trained on them in 4 or 8 bits (told by their scales), are no others.

    Args:
        model: a plain model, or one that get_peft_model / add_gist wrapped with the same configuration.
        folder: where save_adapter wrote.
        strict: False skips tensors that are missing, unexpected or of another shape (a head for other classes), with a
            warning that lists them. The checksum is checked all the same.
        name: load as the adapter of this name: added beside the others, or filled if it is the one in place. Default:
            the one in place, or the name it was saved under.

    Returns:
        The model to use: a gist model if the file holds a gist token and ``model`` was none, else ``model``.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: the file is damaged, of another kind, or does not fit the model. The error gives the path.
    """
    check_module("load_adapter", "model", model)
    _check_folder("load_adapter", folder)
    config, tensors = storage.read(folder)
    path = Path(folder) / storage.MODEL_NAME
    adapter = _adapter_config(config, path)
    extension = {key: config[key] for key in _EXTENSIONS if isinstance(config.get(key), dict)}
    state = _state.state_of(model)
    foreign = _state.is_foreign(model) if state is None else bool(state.foreign)
    if foreign != bool(config.get("peft")):
        if foreign:
            raise ValueError(f"{path}: is of a plain model, and this one is a Hugging Face PeftModel")
        raise ValueError(
            f"{path}: stands beside Hugging Face PEFT's {', '.join(map(str, config['peft']))}: load that first, and give the "
            "PeftModel that PeftModel.from_pretrained returns"
        )
    if state is not None:
        _state.need_state(model, "load_adapter")
        surgery._refuse_merged(state, "load_adapter")
    if state is None or (name is not None and name not in state.records) or (adapter and not state.records):
        new_name = name if name is not None else config.get("name", "default")
        model = _load_new(model, state, adapter, extension, new_name, tensors, path, strict)
        _check_backbone(model, config, path)
        return model
    if name is not None and name != state.active:
        raise ValueError(
            f"load_adapter: adapter {name!r} is there and not in place; set_adapter(model, {name!r}) first"
        )
    _check_alike(state, adapter, extension, path)
    _fill(_state.owned_tensors(_state.inner(model), state), tensors, path, strict)
    _check_backbone(model, config, path)
    return model


def backbone_fingerprint(model: nn.Module, state: _state.State) -> dict[str, Any] | None:
    """What tells the frozen weights from others: a digest of some 256 elements of each, and two elements of each as numbers.
    Of a weight in 4 or 8 bits (bitsandbytes, torchao) the digest has the stored numbers, and ``scales`` two of the scales.

    Without what depends on the image's size (position embeddings). None where weights are not plain tensors in memory
    (sharded, on the meta device, quantised by others): to look into those could fail, or wait for other processes.
    """
    digests, numbers, scales, dtypes = [], [], [], set()
    for name, parameter, original in _frozen(model, state):
        if not can_train(parameter):
            held = stored(model.get_submodule(name.rpartition(".")[0])) if name.endswith(".weight") else None
            if held is None:
                return None
            digests += [_digest(t.shape, sample(t).to(torch.int32)) for t in held[0]]
            scales += [float(t[i]) for t in map(sample, held[1]) for i in (0, -1)]
            dtypes.add(type(parameter).__name__)
            continue
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        if original is None:  # a bias that merging added
            continue
        some = sample(original).float()
        digests.append(_digest(parameter.shape, some))
        numbers += [float(some[0]), float(some[-1])]
        dtypes.add(str(parameter.dtype).removeprefix("torch."))
    digest = hashlib.sha256(b"".join(digests)).hexdigest()
    found = {"sha256": digest, "numbers": numbers, "dtype": ", ".join(sorted(dtypes))}
    return found | ({"scales": scales} if scales else {})


def _frozen(model: nn.Module, state: _state.State) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
    """(name, parameter, what it is without what was merged into it) of the backbone's, in the order of their names."""
    owned = {id(t) for t in _state.owned_tensors(model, state).values()}
    unmerged: dict[int, Tensor | None] = {}
    for layer in model.modules():
        if isinstance(layer, TunerLinear | AffineLayer) and layer.merged:
            originals = layer.original_parameters()
            unmerged |= {id(p): originals.get(name) for name, p in layer.base_layer.named_parameters(recurse=False)}
    for name, parameter in sorted(model.named_parameters()):
        apart = any(word in name for word in ("pos_embed", "position", "original_module"))  # the last: PEFT's old heads
        if id(parameter) not in owned and not apart and parameter.numel():
            yield name, parameter, unmerged.get(id(parameter), parameter)


def _digest(shape: torch.Size, some: Tensor) -> bytes:
    return hashlib.sha256(",".join(map(str, shape)).encode() + some.numpy().tobytes()).digest()


def _close(a: list[float], b: list[float]) -> bool:
    """Whether numbers are those of one backbone, rounded to another dtype."""
    if len(a) != len(b):
        return False
    both = torch.tensor([a, b], dtype=torch.float64)
    return torch.allclose(both[0], both[1], rtol=2.0**-6, atol=1e-6)


def _check_backbone(model: nn.Module, config: Mapping[str, Any], path: Path) -> None:
    """Warn where the frozen weights are not those that the adapter was saved on."""
    saved, state = config.get("backbone"), _state.state_of(model)
    found = None if state is None or not isinstance(saved, dict) else backbone_fingerprint(_state.inner(model), state)
    if found is None:
        return
    there, here = saved.get("dtype"), found["dtype"]  # type: ignore[union-attr]
    same_scales = _close(saved.get("scales", []), found.get("scales", []))  # type: ignore[union-attr]
    if found["sha256"] == saved.get("sha256") and same_scales:  # type: ignore[union-attr]
        return
    # A copy in another dtype is the same backbone. Of a quantised one too little is in floating point to say.
    plain = here != there and not ("scales" in found or "scales" in saved)  # type: ignore[operator]
    if plain and _close(saved.get("numbers", []), found["numbers"]):  # type: ignore[union-attr]
        return
    if "scales" in saved and "scales" not in found:  # type: ignore[operator]
        weights = [t for _, _, t in _frozen(_state.inner(model), state) if t is not None]  # type: ignore[arg-type]
        if same_before(saved, weights):  # type: ignore[arg-type]
            return
    dtypes = "" if here == there else f" ({there} there, {here} here)"
    quantised = " (or in other bits, or rounded to them elsewhere)" if "scales" in found else ""
    warnings.warn(
        f"{path}: was trained on other frozen weights than this model's{dtypes}{quantised}; its predictions will differ. "
        "Build the model with the same pretrained weights first",
        UserWarning,
        stacklevel=3,
    )


def _adapter_config(config: Mapping[str, Any], path: Path) -> PeftConfig | None:
    data = config.get("adapter")
    if data is None:
        return None
    try:
        return config_from_dict(data, registered_configs())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _load_new(
    model: nn.Module,
    state: _state.State | None,
    adapter: PeftConfig | None,
    extension: Mapping[str, dict[str, Any]],
    name: str,
    tensors: Mapping[str, Tensor],
    path: Path,
    strict: bool,
) -> nn.Module:
    """Wrap, then fill; undone if the tensors do not fit (they are all checked before the first is copied)."""
    if adapter is not None:
        _state.check_name(name, f"load_adapter: {path}")
    plain = _state.inner(model)
    had_extension = state is not None and state.extension is not None
    previous = None if state is None else state.active
    added = False
    result = model
    if had_extension and not extension:
        raise ValueError(f"{path}: holds no {state.extension.name}, and the model has one")  # type: ignore[union-attr]
    if had_extension:
        _check_extension(state, extension, path)  # type: ignore[arg-type]
    elif extension and state is not None and state.records:
        raise ValueError(
            f"{path}: holds a {', '.join(extension)}, and the model's adapters ({', '.join(state.records)}) have none; "
            "load into a plain model instead"
        )
    try:
        if adapter is not None:
            surgery.add_record(plain, adapter, name, "load_adapter", filled=True)
            added = True
        for key, values in extension.items():
            if not had_extension:
                config_class, add = _EXTENSIONS[key]
                try:
                    made = config_class(**values)
                except TypeError as error:
                    raise ValueError(f"{path}: its {key} configuration does not fit this version: {error}") from error
                result = add(model, made)
        state = _state.state_of(plain)
        if state is None:
            raise ValueError(f"{path}: holds neither an adapter nor an extension that is known here")
        _fill(_state.owned_tensors(plain, state), tensors, path, strict)
    except Exception:
        _undo(plain, previous, name if added else None, had_extension)
        raise
    return result


def _undo(plain: nn.Module, previous: str | None, name: str | None, had_extension: bool) -> None:
    """Back to where load_adapter began."""
    state = _state.state_of(plain)
    if state is None:
        return
    if name is not None:
        _state.deactivate(plain, state)
        del state.records[name]
    if state.extension is not None and not had_extension:
        state.extension.detach(plain)
        state.extension = None
    if previous is not None:
        _state.activate(plain, state, previous)
    if not state.records and state.extension is None:
        _state.end(plain, state)


def _check_alike(
    state: _state.State, adapter: PeftConfig | None, extension: Mapping[str, dict[str, Any]], path: Path
) -> None:
    record = state.record()
    have = None if record is None else record.config
    if have != adapter:
        raise ValueError(f"{path}: holds {adapter}, the model has {have} in place")
    if state.extension is None and extension:
        raise ValueError(f"{path}: holds a {', '.join(extension)}, the model has none; load into a plain model instead")
    if state.extension is not None:
        if not extension:
            raise ValueError(f"{path}: holds no {state.extension.name}, and the model has one")
        _check_extension(state, extension, path)


def _check_extension(state: _state.State, extension: Mapping[str, dict[str, Any]], path: Path) -> None:
    assert state.extension is not None
    have, found = state.extension.config, extension.get(state.extension.name)
    fields = {f.name for f in dataclasses.fields(have)}
    if found is None or not fields.issuperset(found) or type(have)(**found) != have:
        raise ValueError(f"{path}: holds {state.extension.name} {found}, the model has {dataclasses.asdict(have)}")


@torch.no_grad()
def _fill(owned: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path, strict: bool) -> None:
    """Copy ``tensors`` into ``owned`` once all names and shapes are checked."""
    missing = [name for name in owned if name not in tensors]
    unexpected = [name for name in tensors if name not in owned]
    wrong = [
        f"{name}: expected {tuple(t.shape)}, got {tuple(tensors[name].shape)}"
        for name, t in owned.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    problems = [
        f"{title}: {_listed(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if problems and strict:
        raise ValueError(f"{path}: does not fit the model; {'; '.join(problems)}")
    if problems:
        warnings.warn(f"{path}: skipped, as strict=False: {'; '.join(problems)}", UserWarning, stacklevel=3)
    for name, target in owned.items():
        if name in tensors and tensors[name].shape == target.shape:
            target.copy_(tensors[name])


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
