"""The model of a run: a timm backbone from a name, its weights, and the method that adapts it."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist import GistConfig
from fastgist.peft import PeftConfig, ThresholdConfig
from fastgist.peft.family import find_family
from fastgist.train.config import FinetuneConfig, Method, UserError

__all__ = ["adapt", "build_backbone", "check_name", "frozen_fingerprint", "load_weights"]


def check_name(config: FinetuneConfig) -> None:
    """UserError with the nearest names unless timm knows the model: asked before a minute goes into reading images."""
    import timm

    name = config.model
    local = ":" in name  # timm's hf-hub: and local-dir: schemes
    if not local and not timm.is_model(name.split(".", 1)[0]):
        known = timm.list_models()
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models('vit*') lists them"
        raise UserError(f"timm has no model named {name!r}: {hint}")


def build_backbone(config: FinetuneConfig, num_classes: int) -> nn.Module:
    """The timm model of ``config`` with a head for ``num_classes``, its weights loaded."""
    import timm

    check_name(config)
    name = config.model
    options: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": config.drop_path}
    if config.image_size is not None:
        options["img_size"] = config.image_size
    download = config.pretrained and config.checkpoint is None
    try:
        model = timm.create_model(name, pretrained=download, **options)
    except Exception as error:
        reason = " ".join(str(error).split())
        if download:
            raise UserError(
                f"could not get pre-trained weights of {name}: {reason[:300]} "
                "(--checkpoint takes a safetensors file, --no-pretrained starts from random weights; with "
                "HF_HUB_OFFLINE=1 in the environment only the cache is asked, at once)"
            ) from error
        raise UserError(f"could not build {name}: {reason[:300]}") from error
    try:
        find_family(model, "fastgist finetune")
    except TypeError:
        kind = type(model).__name__
        raise UserError(
            f"{name} is a {kind}: only timm's Vision Transformers (vit_*, deit_*, eva*, beit*, swin*) are known"
        ) from None
    if config.checkpoint is not None:
        load_weights(model, config.checkpoint)
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a timm model, the head excepted where its classes differ; nothing else may differ.

    Position embeddings and patch kernels of another size are resampled by the model's own timm filter.
    """
    import safetensors.torch

    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        state = safetensors.torch.load_file(path)
    except Exception as error:
        raise UserError(f"{path} is not a complete safetensors file ({error})") from error
    own = model.state_dict()
    filter_fn = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if filter_fn is not None:
        try:
            state = filter_fn(state, model)
        except Exception as error:
            raise UserError(f"{path} does not fit {type(model).__name__}: {error}") from error
    heads = getattr(model, "pretrained_cfg", {}).get("classifier", "head")  # a distilled DeiT has two
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    replaced = {k for k, v in own.items() if k.startswith(heads) and (k not in state or state[k].shape != v.shape)}
    missing = sorted(own.keys() - state.keys() - replaced)
    unexpected = sorted(k for k in state.keys() - own.keys() if not k.startswith(heads))
    shapes = sorted(k for k in own.keys() & state.keys() - replaced if own[k].shape != state[k].shape)
    for problem, names in (("lacks", missing), ("has unexpected", unexpected), ("has another shape of", shapes)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path} does not fit the model: it {problem} {names[0]}{more}")
    model.load_state_dict({k: v for k, v in state.items() if k in own and k not in replaced}, strict=False)


def adapt(
    model: nn.Module,
    method: Method,
    *,
    gist: bool,
    rank: int | None = None,
    bottleneck_dim: int | None = None,
    settings: Sequence[str] = (),
    gist_config: GistConfig | None = None,
    **options: Any,
) -> nn.Module:
    """Freeze ``model`` and add ``method``, and a gist token if asked; ``options`` go to the method's config."""
    import fastgist
    from fastgist.peft.method import registered_configs

    kind = registered_configs()[method.value.replace("-", "_")]
    options = _settings(kind, settings) | options
    if rank is not None:
        if method not in (Method.LORA, Method.CP, Method.FACT):
            raise UserError(f"--rank is for lora, cp and fact, not for {method.value}")
        options["rank"] = rank
    if bottleneck_dim is not None:
        if method is not Method.ADAPTER:
            raise UserError(f"--bottleneck-dim is for adapter, not for {method.value}")
        options["bottleneck_dim"] = bottleneck_dim
    try:
        model = fastgist.get_peft_model(model, kind(**options))
        return fastgist.add_gist(model, gist_config) if gist else model
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _settings(kind: type[PeftConfig], given: Sequence[str]) -> dict[str, Any]:
    """``field=value`` words as arguments of ``kind``, read by the types of its fields."""
    types = typing.get_type_hints(kind)
    fields = {f.name: types[f.name] for f in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    for word in given:
        name, equals, value = word.partition("=")
        has = ", ".join(fields) or "no settings"
        if not equals:
            raise UserError(f"--set {word}: expected field=value; {kind.__name__} has {has}")
        if name not in fields:
            raise UserError(f"--set {word}: {kind.__name__} has no {name!r}; it has {has}")
        try:
            found[name] = _READ.get(fields[name], _names)(value)
        except (ValueError, KeyError):
            raise UserError(
                f"--set {word}: {value!r} is no {getattr(fields[name], '__name__', fields[name])}"
            ) from None
    return found


def _names(value: str) -> tuple[str, ...]:
    return tuple(filter(None, value.split(",")))


_READ: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    ThresholdConfig | dict[str, Any] | str | None: str,  # a policy's name
    bool: lambda value: {"true": True, "1": True, "false": False, "0": False}[value.lower()],
}


def frozen_fingerprint(model: nn.Module) -> str:
    """A digest of the frozen weights: a resumed run must stand on the same ones."""
    sha = hashlib.sha256()
    frozen: Mapping[str, Tensor] = {k: p for k, p in model.named_parameters() if not p.requires_grad}
    for name in sorted(frozen):
        sha.update(name.encode())
        sha.update(frozen[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
