"""What a mutant is. The lists are in the files mutants_of_*.py."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mutant", "kernel", "op", "reference"]


@dataclass(frozen=True)
class Mutant:
    """Replace ``old``, which stands once in ``file``, by ``new``. Tests default to tests/test_<op>.py."""

    name: str
    op: str
    file: str
    old: str
    new: str
    why: str
    interpret: bool = True
    tests: tuple[str, ...] = ()


def _file(op: str, file: str, *rows: tuple[str, str, str, str], interpret: bool, tests: tuple[str, ...] = ()):
    """Mutants of one file from rows (name, old, new, why)."""
    stem = file.removesuffix(".py").split("/")
    prefix = {"reference": "reference/", "ops": "ops/"}.get(stem[-2], "") + stem[-1]
    return [Mutant(f"{prefix}: {n}", op, file, old, new, why, interpret, tests) for n, old, new, why in rows]


def kernel(of: str, *rows: tuple[str, str, str, str], file: str = "", tests: tuple[str, ...] = ()):
    return _file(of, f"kernels/fastgist_kernels/{file or of}.py", *rows, interpret=True, tests=tests)


def reference(of: str, *rows: tuple[str, str, str, str], tests: tuple[str, ...] = ()):
    return _file(of, f"fastgist/reference/{of}.py", *rows, interpret=False, tests=tests)


def op(of: str, *rows: tuple[str, str, str, str], file: str = "", tests: tuple[str, ...] = ()):
    return _file(of, f"fastgist/ops/{file or of}.py", *rows, interpret=False, tests=tests)
