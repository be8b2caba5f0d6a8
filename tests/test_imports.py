"""Which room may import what (DESIGN.md's table), read from the sources; and ``import fastgist`` in fresh processes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = sys.stdlib_module_names
#: What a room above the operations may call: names that outside code calls too.
PUBLIC = {f"fastgist.{name}" for name in ("functional", "nn", "peft", "gist", "petal", "backends", "testing")} | {
    "fastgist"
}
RUN = PUBLIC | {
    "fastgist._later",
    "fastgist._extension",
    "fastgist.train",
    "fastgist.recipes",
    "fastgist.cli",
    "fastgist.distributed",
}
ANYTHING = None


@dataclass(frozen=True)
class Room:
    """``top``: importable when the room's modules are imported. ``inside``: also importable within functions."""

    top: set[str]
    inside: set[str] | None = None


MODELS = {"timm", "transformers", "peft", "safetensors", "fastgist.integrations", "huggingface_hub"}
ROOMS = {
    "fastgist/reference": Room({"torch", "fastgist.reference", "fastgist._later"}, set()),
    "fastgist/ops": Room(
        {"torch", "fastgist.reference", "fastgist.ops", "fastgist.backends"},
        {"fastgist_kernels", "fastgist._extension"},
    ),
    "fastgist/functional.py": Room({"fastgist.ops"}, set()),
    "fastgist/_later.py": Room(set(), set()),
    "fastgist/backends.py": Room({"torch", "fastgist._extension"}, set()),
    "fastgist/_extension.py": Room({"torch"}, {"fastgist"}),
    "fastgist/testing.py": Room({"torch"}, {"fastgist.reference", "fastgist.functional"}),
    "fastgist/distributed.py": Room({"torch", "fastgist.nn", "fastgist.functional"}, set()),
    "fastgist/nn": Room({"torch", "fastgist.functional", "fastgist.nn"}, set()),
    "fastgist/peft": Room({"torch", "fastgist.functional", "fastgist.nn", "fastgist.peft"}, MODELS),
    "fastgist/gist": Room({"torch", "fastgist.functional", "fastgist.nn", "fastgist.peft", "fastgist.gist"}, MODELS),
    "fastgist/petal": Room({"torch", "fastgist.functional", "fastgist.nn", "fastgist.peft", "fastgist.petal"}, MODELS),
    "fastgist/train/text_trainer.py": Room(  # subclasses its Trainer, as the integration does
        {"torch", "transformers", "fastgist.integrations.transformers"} | RUN, ANYTHING
    ),
    "fastgist/train": Room({"torch"} | RUN, ANYTHING),
    "fastgist/recipes": Room({"torch"} | RUN, ANYTHING),
    "fastgist/cli.py": Room({"torch"} | RUN, ANYTHING),
    "fastgist/__main__.py": Room({"fastgist.cli"}, set()),
    "fastgist/__init__.py": Room({"torch", "fastgist._later"} | PUBLIC, PUBLIC),
    "kernels/fastgist_kernels": Room({"torch", "triton", "fastgist_kernels"}, set()),
}
#: Rooms whose modules meet their library at the top: nothing imports these but functions that were asked to.
GUESTS = ("fastgist/integrations",)


def _sources() -> list[Path]:
    found = [p for folder in ("fastgist", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]
    return [p for p in found if not p.relative_to(ROOT).as_posix().startswith(GUESTS)]


def _room(path: Path) -> Room:
    relative = path.relative_to(ROOT).as_posix()
    for name, room in ROOMS.items():
        if relative == name or relative.startswith(name + "/"):
            return room
    raise AssertionError(f"{relative} belongs to no room: give it one in {Path(__file__).name} and in DESIGN.md")


def _package_of(path: Path) -> list[str]:
    base = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    return list(path.relative_to(base).with_suffix("").parts[:-1])


def _imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(module, whether inside a function, line) of each import; ``from fastgist import x`` gives fastgist.x."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parent = _package_of(path)
                    parent = parent[: len(parent) - child.level + 1]
                    base = ".".join([*parent, *([base] if base else [])])
                for alias in child.names:
                    name = f"{base}.{alias.name}"
                    yield (name if base == "fastgist" else base), inside, child.lineno
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from visit(child, inside or function)

    yield from visit(ast.parse(path.read_text()), False)


def _within(module: str, allowed: set[str]) -> bool:
    return any(module == a or (a != "fastgist" and module.startswith(a + ".")) for a in allowed)


@pytest.mark.parametrize("path", _sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_rooms_import_what_they_may(path):
    room = _room(path)
    for module, inside, line in _imports(path):
        if module.split(".")[0] in STANDARD:
            continue
        if module.startswith("fastgist.") and not _is_module(module):
            module = "fastgist"  # a public name of the package itself
        allowed = room.top if not inside else (ANYTHING if room.inside is ANYTHING else room.top | room.inside)
        where = "inside a function" if inside else "at module level"
        if allowed is ANYTHING:
            continue
        assert _within(module, allowed), (
            f"{path.relative_to(ROOT)}:{line} imports {module} {where}, which its room may not"
        )


def _is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or place.is_dir()


def test_benchmarks_and_scripts_stay_outside():
    for path in _sources():
        for module, _, line in _imports(path):
            assert module.split(".")[0] not in {"tests", "benchmarks", "scripts"}, f"{path}:{line} imports {module}"


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("folder", ["cuda", "cpu"])
def test_device_and_cpu_code_compile_without_torch(folder):
    for path in sorted((ROOT / "csrc" / folder).glob("*")):
        if path.suffix in {".cu", ".cuh", ".cpp", ".h"}:
            foreign = [i for i in _includes(path) if i.startswith(("torch/", "ATen/", "c10/", "pybind11/"))]
            assert not foreign, f"{path.relative_to(ROOT)} includes {foreign}"


def test_bindings_use_the_stable_abi_only():
    for path in sorted((ROOT / "csrc").glob("*.cpp")):
        for include in _includes(path):
            if include.startswith(("ATen/", "c10/")):
                pytest.fail(f"{path.relative_to(ROOT)} includes {include}: not part of torch's stable ABI")
            if include.startswith("torch/"):
                stable = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/", "torch/headeronly/")
                assert include.startswith(stable), f"{path.relative_to(ROOT)} includes {include}"


def _python(script: str, **env: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    settings = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env
    settings.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import torch
import fastgist, fastgist.functional as F, fastgist.backends as backends
z, o = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
F.bidirectional_kl(z, o).backward()
F.gist_loss(z, o, torch.tensor([0, 1, 4])).backward()
assert z.grad is not None and all(backends.explain(op)["cpu"] for op in backends.OPS)
"""


@pytest.mark.parametrize("missing", ["triton", "timm", "transformers", "everything optional"])
def test_import_and_use_with_libraries_missing(missing):
    optional = (
        "triton timm transformers accelerate typer rich tqdm safetensors peft datasets PIL fastgist_kernels".split()
    )
    names = optional if missing == "everything optional" else [missing]
    out = _python(
        f"import sys\nfor name in {names!r}: sys.modules[name] = None\n{USE}\n"
        "import fastgist.nn\nprint('it works')\n"
        "try: F.bidirectional_kl(z, o, impl='triton')\nexcept RuntimeError as e: print(e)\n"
    )
    assert "it works" in out
    if "triton" in names:
        assert "Triton is not installed" in out
        assert "pip install" in out


def test_import_brings_nothing_but_torch():
    out = _python(
        "import sys, torch\nbefore = set(sys.modules)\nimport fastgist\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    foreign = {name for name in out.split() if name not in STANDARD and not name.startswith("fastgist")}
    assert foreign <= {"torch"}, f"import fastgist also imports {sorted(foreign)}"
    assert "fastgist_kernels" not in out.split()
