"""What the pages and docstrings write with dots works after ``import fastgist``; none is imported before it is asked for."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastgist

ROOT = Path(__file__).parents[1]
LATER = ("distributed", "integrations", "recipes", "testing", "train")
#: A key in a file; an attribute of instances.
OTHER = {"fastgist.json", "fastgist.GistModel.loss"}


def _texts() -> list[str]:
    pages = [ROOT / "README.md", ROOT / "DESIGN.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [page.read_text() for page in pages]
    for path in sorted((ROOT / "fastgist").rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts += [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    return texts


def _names() -> list[str]:
    found = {name for text in _texts() for name in re.findall(r"(?<![\w/.-])fastgist(?:\.[A-Za-z]\w*)+(?![\w/])", text)}
    return sorted(name for name in found if name not in OTHER and not name.endswith(".py"))


def _python(code: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_of_pages_and_docstrings_resolve_after_one_import() -> None:
    names = _names()
    assert {"fastgist.distributed.mean_divisor", "fastgist.integrations.peft.register"} <= set(names) and len(
        names
    ) > 30
    code = (
        "import functools, json\nimport fastgist\nmissing = {}\n"
        "for name in NAMES:\n"
        "    try: functools.reduce(getattr, name.split('.')[1:], fastgist)\n"
        "    except AttributeError as error: missing[name] = str(error)\n"
        "print(json.dumps(missing))"
    )
    assert json.loads(_python(f"NAMES = {names!r}\n{code}").splitlines()[-1]) == {}


@pytest.mark.parametrize("name", LATER)
def test_each_alone_in_a_fresh_process(name) -> None:
    """None of them is there only because another was asked for first."""
    out = _python(
        f"import sys, fastgist as fg\nassert 'fastgist.{name}' not in sys.modules and {name!r} in dir(fg)\n"
        f"print(fg.{name}.__name__)"
    )
    assert out.strip() == f"fastgist.{name}"


def test_importing_still_brings_none_of_them() -> None:
    brought = _python("import sys, fastgist\nprint(*sys.modules)").split()
    assert not [m for m in brought if m.split(".")[:2] in [["fastgist", name] for name in LATER]]
    assert "torch.distributed.fsdp" not in brought


def test_what_is_not_there_is_an_attribute_error() -> None:
    for module in (fastgist, fastgist.recipes, fastgist.train, fastgist.integrations):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nothing_of_this'"):
            _ = module.nothing_of_this
        assert not hasattr(module, "__wrapped__")
    assert {"mutual", "GIST"} <= set(dir(fastgist.recipes)) and "transformers" in dir(fastgist.integrations)
    assert {"export", "parameter_groups"} <= set(dir(fastgist.train))
