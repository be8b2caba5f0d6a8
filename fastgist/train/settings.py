"""Settings from files: what ``--config`` reads, and what config.json of a run holds."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgist.train.config import UserError, _plain

__all__ = ["known_settings", "read_settings", "understood", "written_settings"]

_SUFFIXES = (".yaml", ".yml", ".toml", ".json")


def read_settings(path: Path, config_class: type) -> dict[str, Any]:
    """The settings in a YAML, TOML or JSON file, by the names of ``config_class``'s fields.

    Raises:
        UserError: no such file, another suffix, not a table of settings, or what :func:`understood` refuses.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"--config {path}: expected a file that ends in {', '.join(_SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 text") from error
    try:
        found = _parse(text, path.suffix.lower())
    except ImportError as error:
        raise UserError(f"--config {path}: reading YAML needs {error.name}: pip install 'fastgist[train]'") from None
    except ValueError as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(f"--config {path}: expected settings by name, got {type(found).__name__}")
    return understood(found, config_class, f"--config {path}")


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".json":
        return json.loads(text)
    if suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def known_settings(config_class: Any) -> list[str]:
    """The names that a file may set, those of the flags."""
    without = getattr(config_class, "not_flags", ())
    return [f.name for f in dataclasses.fields(config_class) if f.name not in without]


def understood(found: Mapping[str, Any], config_class: type, where: str) -> dict[str, Any]:
    """Settings as the command line takes them: names with underscores, lists and tables as words.

    Raises:
        UserError: an unknown name (the known ones are listed), a nested table, null where nothing is no choice.
    """
    known = known_settings(config_class)
    hints = typing.get_type_hints(config_class)
    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    settings: dict[str, Any] = {}
    for given, value in found.items():
        name = str(given).lstrip("-").replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"{where}: no setting is called {given!r}{hint}; there are {', '.join(sorted(known))}")
        if name in settings:
            raise UserError(f"{where}: {name} is given twice")
        if value is None:
            if defaults[name] is not None:
                raise UserError(f"{where}: {name} is null; leave it out for its default")
            continue
        if hints[name] == list[str]:
            words = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
            value = [str(word) for word in words] if isinstance(words, list) else [str(words)]
        elif isinstance(value, (list, tuple)) and all(isinstance(v, (str, int)) for v in value):
            value = ",".join(map(str, value))
        if value is False and _has_choice(hints[name], "no"):
            value = "no"  # YAML's word for false
        if isinstance(value, (dict, list)) and hints[name] != list[str]:
            raise UserError(f"{where}: {name} takes one value, got {value!r}")
        settings[name] = value
    return settings


def _has_choice(hint: Any, word: str) -> bool:
    kinds = [hint, *typing.get_args(hint)]
    return any(isinstance(kind, type) and issubclass(kind, enum.Enum) and word in list(kind) for kind in kinds)


def written_settings(config: Any) -> dict[str, Any]:
    """Every setting as a JSON value; :func:`understood` reads them back."""
    names = [name for name in known_settings(config) if name != "resume"]
    return {name: _plain(getattr(config, name)) for name in names}
