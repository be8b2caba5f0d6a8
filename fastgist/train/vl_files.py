"""Reading annotation files so that what is wrong with one is said with its name and the place in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastgist.train.config import UserError

__all__ = ["Table", "read_json", "read_text", "split_in", "wanted_split"]

_KINDS = {int: "a whole number", str: "a text", list: "a list", dict: "an object", bool: "true or false"}


def read_text(path: Path) -> str:
    """The UTF-8 text of ``path``, a byte order mark dropped. UserError where it is not there or no UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_json(path: Path) -> Any:
    """What the JSON file ``path`` holds. UserError where it is not there, cut off, or no JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        cut = not rest or error.msg.startswith("Unterminated string")
        what = (
            "ends too soon: it was cut off" if text.strip() and cut else "is empty" if not text.strip() else "no JSON"
        )
        raise UserError(f"{path}: {what} (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise UserError(f"{path}: no annotations (nested too deeply)") from None


class Table:
    """A list of objects in a file, with typed access to their fields; errors name the file, the row and the field.

    Args:
        path: the file, for messages.
        rows: what stands at ``where``.
        where: its place in the file; "" for the whole.

    Raises:
        UserError: ``rows`` is no list.
    """

    def __init__(self, path: Path, rows: Any, where: str = "") -> None:
        self.path, self.where = path, where
        if not isinstance(rows, list):
            raise UserError(
                f"{path}: expected a list of objects{f' in {where!r}' if where else ''}, found {_kind(rows)}"
            )
        self.rows = rows

    @classmethod
    def of(cls, path: Path, whole: Any, key: str) -> Table:
        """The list that the file's object has under ``key``."""
        return cls(path, field(path, "", whole, key, list), key)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """(place of the row, row)."""
        for number, row in enumerate(self.rows):
            yield f"{self.where}[{number}]", row

    def get(self, place: str, row: Any, key: str, kind: type) -> Any:
        """``row[key]``, which must be there and a ``kind``."""
        return field(self.path, place, row, key, kind)

    def texts(self, place: str, row: Any, key: str) -> tuple[str, ...]:
        """``row[key]``, which must be a list of texts, not empty."""
        found = self.get(place, row, key, list)
        wrong = [item for item in found if not isinstance(item, str)]
        if wrong or not found:
            what = f"a list with {_kind(wrong[0])}" if wrong else "an empty list"
            raise UserError(f"{self.path}: {place}[{key!r}] is {what}, expected texts")
        return tuple(found)

    def file(self, place: str, row: Any, key: str) -> str:
        """``row[key]``, the name of a file."""
        name = self.get(place, row, key, str)
        if not name:
            raise UserError(f"{self.path}: {place}[{key!r}] is empty, expected a file's name")
        return str(name)

    def identity(self, place: str, row: Any, key: str) -> int | str:
        """``row[key]``, a whole number or a text, as the file has it."""
        value = row.get(key) if isinstance(row, dict) else None
        return value if isinstance(value, str) else self.get(place, row, key, int)


def field(path: Path, place: str, row: Any, key: str, kind: type) -> Any:
    """``row[key]``, which must be there and a ``kind``; UserError with ``path`` and ``place`` otherwise."""
    if not isinstance(row, dict):
        raise UserError(f"{path}: {place or 'the whole'} is {_kind(row)}, expected an object with {key!r}")
    if key not in row:
        raise UserError(f"{path}: {place or 'it'} has no {key!r} (it has {', '.join(map(str, row)) or 'nothing'})")
    value = row[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{path}: {place}[{key!r}] is {_kind(value)}, expected {_KINDS[kind]}")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return next((name for kind, name in _KINDS.items() if type(value) is kind), f"a {type(value).__name__}")


def split_in(text: str, names: Sequence[str]) -> str | None:
    """Which of ``names`` stands in ``text`` as a word of its own (a year may follow); None if none or several do."""
    found = {name for name in names if re.search(rf"(?<![a-z]){re.escape(name)}(?![a-z]|-dev)", text.lower())}
    return found.pop() if len(found) == 1 else None


def wanted_split(path: Path, said: str | None, wanted: str | None, names: Sequence[str]) -> str:
    """The split of a file: what it ``said``, checked against what the caller ``wanted``.

    Raises:
        UserError: it is another one, or none of ``names``, or neither is given.
        ValueError: ``wanted`` is not one of ``names``.
    """
    if wanted is not None and wanted not in names:
        raise ValueError(f"split: expected one of {', '.join(names)}, got {wanted!r}")
    if said is not None and said not in names:
        raise UserError(f"{path}: says that it is the split {said!r}, expected one of {', '.join(names)}")
    if said is not None and wanted is not None and said != wanted:
        raise UserError(f"{path}: holds the split {said!r}, not {wanted!r}")
    if said is None and wanted is None:
        raise UserError(f"{path}: does not say which split it is: pass split= ({', '.join(names)})")
    return said or wanted or ""
