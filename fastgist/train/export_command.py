"""``fastgist export``: from the folder of a run, or an adapter's and a timm model, to one file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgist.train.config import ExportConfig, FinetuneConfig, UserError
from fastgist.train.data import seed_everything
from fastgist.train.export import FORMATS, Exported, export_model
from fastgist.train.models import build_backbone

__all__ = ["export"]


def export(config: ExportConfig, say: Callable[[str], None] = print) -> Exported:
    """Build the model, load the adapter, write and check the file. Raises UserError for what the user can put right."""
    folder, run = _folders(config.adapter)
    output = config.output or folder.parent / f"model{FORMATS[config.format.value]}"
    if output.exists() and not config.overwrite:
        raise UserError(f"{output} is there already: pass --overwrite, or another --output")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: no such folder as {output.parent}")
    if run is not None and (run / "identity.json").exists():
        model, example, about = _text_model(config, run, folder)
    else:
        model, example, about = _image_model(config, run, folder)
    try:
        done = export_model(model, output, example, format=config.format.value, metadata=about)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    kept = "update merged into the weights" if done.merged else "nothing merged"
    say(
        f"{output}: {output.stat().st_size / 2**20:.1f} MiB, {kept}; largest difference to the model "
        f"{done.difference:.1e} ({done.allowed:.1e} allowed)"
    )
    return done


def _image_model(config: ExportConfig, run: Path | None, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(adapted model, shape of an image, what is known of it)."""
    import fastgist
    from fastgist.peft import storage

    settings, classes = _settings(config, run)
    try:
        _, tensors = storage.read(folder)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    counts = [t.shape[0] for name, t in tensors.items() if name.startswith("head.") and t.dim() == 2]
    if not counts:
        raise UserError(f"{folder} holds no classifier: it cannot be exported as a model")
    seed_everything(settings.seed)  # a run from random weights drew them from its seed
    model = _loaded(build_backbone(settings, counts[0]), folder, "--model, --checkpoint, --pretrained")
    from timm.data import resolve_model_data_config

    about: dict[str, Any] = resolve_model_data_config(model.model if hasattr(model, "gist") else model)
    size = settings.image_size
    shape = tuple(about["input_size"]) if size is None else (3, size, size)
    about |= {"input_size": shape, "model": settings.model, "classes": classes, "fastgist": fastgist.__version__}
    return model, shape, about


def _text_model(config: ExportConfig, run: Path, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(adapted classifier, example texts, what is known of it) of a run of ``finetune-text``."""
    import torch

    import fastgist
    from fastgist.train.text import build_classifier, length_limit
    from fastgist.train.text_base import quiet
    from fastgist.train.text_config import TextConfig

    for flag in ("model", "checkpoint", "image_size"):
        if getattr(config, flag) is not None:
            flag = flag.replace("_", "-")
            raise UserError(
                f"--{flag} is for images; {config.adapter} is a run of finetune-text, which is exported as it was"
            )
    try:
        found = json.loads((run / "config.json").read_text())
        classes = json.loads((run / "summary.json").read_text())["classes"]
    except FileNotFoundError as error:
        raise UserError(f"{run} is a run that has not ended: {error.filename} is not there") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{run} holds no settings of a run that can be read: {error}") from error
    pretrained = found.get("pretrained", True) if config.pretrained is None else config.pretrained
    kept = {name: found[name] for name in ("model", "seed", "gist", "gist_length", "max_length") if name in found}
    settings = TextConfig(**kept, pretrained=pretrained, progress=False)
    with quiet(False):
        model, tokenizer, _ = build_classifier(settings, classes)
        model = _loaded(model, folder, "--pretrained")
        limit = length_limit(settings, model, tokenizer)
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in tokenizer.model_input_names:
        names.append("token_type_ids")
    length = max(2, min(16, limit))
    example = {name: torch.full((2, length), int(name == "attention_mask")) for name in names}
    example["input_ids"].fill_(1 if tokenizer.pad_token_id == 0 else 0)
    about = {
        "model": settings.model, "classes": classes, "max_length": limit, "pad_token_id": tokenizer.pad_token_id,
        "fastgist": fastgist.__version__,
    }  # fmt: skip
    return model, example, about


def _loaded(model: Any, folder: Path, flags: str) -> Any:
    """``model`` with the adapter in ``folder``. Raises UserError where the two do not belong together."""
    import fastgist

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = fastgist.load_adapter(model, folder)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from error
    for warning in caught:
        if "other frozen weights" in str(warning.message):
            raise UserError(f"{warning.message} ({flags})")
    return model


def _folders(given: Path) -> tuple[Path, Path | None]:
    """The adapter's folder, and that of the run it comes from."""
    from fastgist.peft import storage

    for folder in (given, given / "adapter"):
        if (folder / storage.MODEL_NAME).exists():
            return folder, folder.parent if (folder.parent / "config.json").exists() else None
    seeds = sorted(path.parent.name for path in given.glob("seed-*/adapter"))
    hint = f"; it holds {', '.join(seeds)}: export one of them" if seeds else ""
    raise UserError(f"no {storage.MODEL_NAME} in {given} or {given / 'adapter'}{hint}")


def _settings(config: ExportConfig, run: Path | None) -> tuple[FinetuneConfig, list[str] | None]:
    """What the backbone is built by, flags above the run's settings, and the names of the classes."""
    found: dict[str, Any] = {}
    classes = None
    if run is not None:
        try:
            found = json.loads((run / "config.json").read_text())
            classes = json.loads((run / "summary.json").read_text())["classes"]
        except FileNotFoundError:
            pass  # a run that did not end has an adapter of an older one
        except (ValueError, KeyError) as error:
            raise UserError(f"{run} holds no settings of a run that can be read: {error}") from error
    given = {name: getattr(config, name) for name in ("model", "pretrained", "checkpoint", "image_size")}
    chosen = {name: value if value is not None else found.get(name) for name, value in given.items()}
    if chosen["model"] is None:
        raise UserError(f"{config.adapter} is not a run's: name its --model")
    if config.checkpoint is None and config.pretrained is not None:
        chosen["checkpoint"] = None
    settings = FinetuneConfig(
        data="", model=chosen["model"], pretrained=chosen["pretrained"] is not False, seed=found.get("seed", 0),
        checkpoint=Path(chosen["checkpoint"]) if chosen["checkpoint"] else None, image_size=chosen["image_size"],
        drop_path=0.0,
    )  # fmt: skip
    return settings, classes
