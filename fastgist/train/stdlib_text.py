"""Real text without a network: the docstrings of the Python that runs, read from the standard library's sources.

The task is to tell from a docstring which package it is from (:data:`PACKAGES`), the packages' names taken out of every
text. The docstrings of all other modules are text to pre-train on. Sources are parsed and never imported; test suites,
which some distributions leave out, are not read.

Which texts there are depends on the Python version, so a result stands beside :attr:`StdlibText.fingerprint`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastgist.train.config import UserError

__all__ = ["PACKAGES", "Docstring", "Part", "StdlibText", "docstrings", "scrub", "text_key"]

#: The classes: the packages of Python 3.11 to 3.13 with the most docstrings.
PACKAGES = (
    "asyncio", "email", "http", "idlelib", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml",
)  # fmt: skip
#: Docstrings kept of a package at most (idlelib has 800, http 140), and the fewest it may have to be a class.
MOST, FEWEST = 240, 60
#: Words that a text of the task has at least, once the names are gone.
WORDS = 5
#: Shares of every class that are trained on and selected by; the rest is the test part.
SHARES = (0.6, 0.15)

_NOT_READ = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
_NAMES = re.compile("|".join([*PACKAGES, r"\btk\b", r"\btcl\b", r"\bidle\b"]), re.IGNORECASE)


@dataclass(frozen=True)
class Docstring:
    """One docstring: ``package`` is the top-level package or module, ``file`` the source within the library."""

    package: str
    file: str
    name: str
    text: str


def docstrings(root: Path | None = None) -> list[Docstring]:
    """Every docstring of modules, classes and functions under ``root`` (the standard library), by file and line.

    Raises UserError where there are no sources.
    """
    return list(_docstrings(Path(sysconfig.get_path("stdlib")) if root is None else root))


@functools.lru_cache(maxsize=8)
def _docstrings(root: Path) -> tuple[Docstring, ...]:
    found: list[Docstring] = []
    files = [p for p in root.rglob("*.py") if not _NOT_READ & set(p.relative_to(root).parts)]
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        package = relative.parts[0].removesuffix(".py")
        found += [Docstring(package, relative.as_posix(), name, text) for name, text in _walk(tree, "")]
    if not found:
        raise UserError(f"this Python has no sources of its standard library: no docstrings under {root}")
    return tuple(found)


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of ``node`` and of what is defined within it; expressions, which define nothing, are passed by."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield name, text
    blocks = [getattr(node, block, ()) for block in ("body", "handlers", "orelse", "finalbody", "cases")]
    for child in (child for block in blocks if isinstance(block, list) for child in block):
        inner = getattr(child, "name", None)
        known = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _walk(child, f"{name}.{inner}".lstrip(".") if known else name)


def scrub(text: str) -> str:
    """``text`` without the names of any package of the task, in any case, also within words."""
    return _NAMES.sub("", text)


def text_key(text: str) -> str:
    """What two texts share that say the same: letters and digits in lower case."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _rank(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass
class Part:
    """Texts and their labels."""

    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class StdlibText:
    """The task's three parts, and what is left to pre-train on: a list of documents (files), each a list of docstrings.

    No text, compared by :func:`text_key`, is in two parts, or in a part and in ``documents``, or in a part twice; one
    that two packages share is left out.
    """

    classes: list[str]
    train: Part
    val: Part
    test: Part
    documents: list[list[str]]
    notes: list[str]

    @classmethod
    def load(cls, root: Path | None = None) -> StdlibText:
        """The corpus of the Python that runs. Raises UserError where it has no sources, or too few."""
        return _corpus(tuple(docstrings(root)))

    def parts(self) -> dict[str, Part]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def fingerprint(self) -> str:
        """A digest of all texts in their places."""
        named = [self.classes, *((p.texts, p.labels) for p in self.parts().values()), self.documents]
        return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _corpus(found: tuple[Docstring, ...]) -> StdlibText:
    task: dict[str, dict[str, str]] = {package: {} for package in PACKAGES}
    owners: Counter[str] = Counter()
    for entry in found:
        if entry.package in task:
            text = scrub(entry.text)
            key = text_key(text)
            if key not in task[entry.package]:
                task[entry.package][key] = text
                owners[key] += 1
    kept = {
        package: sorted((k for k in texts if owners[k] == 1 and len(k.split()) >= WORDS), key=_rank)[:MOST]
        for package, texts in task.items()
    }
    classes = [package for package in PACKAGES if len(kept[package]) >= FEWEST]
    if len(classes) < 2:
        raise UserError("too few docstrings in this Python's sources: at least two packages of the task are needed")
    parts = Part(), Part(), Part()
    for label, package in enumerate(classes):
        keys = kept[package]
        ends = [0, round(SHARES[0] * len(keys)), round(sum(SHARES) * len(keys)), len(keys)]
        for part, first, last in zip(parts, ends[:-1], ends[1:], strict=True):
            part.texts += [task[package][key] for key in keys[first:last]]
            part.labels += [label] * (last - first)
    absent = [package for package in PACKAGES if package not in classes]
    notes = [f"too few docstrings of {', '.join(absent)} in this Python: left out"] if absent else []
    return StdlibText(classes, *parts, _documents(found, set(owners)), notes)


def _documents(found: Sequence[Docstring], taken: set[str]) -> list[list[str]]:
    """The docstrings outside the task's packages by file, none twice and none whose text the task knows."""
    documents: dict[str, list[str]] = {}
    seen: set[str] = set()
    for entry in found:
        key = text_key(entry.text)
        if entry.package in PACKAGES or not key or key in seen or text_key(scrub(entry.text)) in taken:
            continue
        seen.add(key)
        documents.setdefault(entry.file, []).append(entry.text)
    return list(documents.values())
