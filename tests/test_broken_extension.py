"""An extension that is there and does not load is one warning where it would have served; one that is absent is silent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgist import _extension

ROOT = Path(__file__).parents[1]
USE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("always")
import torch, fastgist.functional as F
from fastgist import _extension, backends
kind, folder = sys.argv[1:]
if kind == "of another version":
    _extension._HOLDS += ("nothing_of_this",)
else:
    _extension._FOLDER = Path(folder)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    backends.available(), [backends.explain(op) for op in backends.OPS]  # these say it themselves
    before = len(seen)
    z, o, y = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 1, 4])
    for dtype in (torch.float32, torch.float64):
        F.bidirectional_kl(z.to(dtype), o.to(dtype))
        F.gist_loss(z.to(dtype), o.to(dtype), y)
    F.gelu(z)
    try:
        F.gist_loss(z, o, y, impl="native")
    except RuntimeError as error:
        print("native:", error)
print(before, len(seen))
for warning in seen:
    print(warning.category.__name__, warning.message)
"""


def use(kind: str, folder: Path) -> list[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", USE, kind, str(folder)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_junk_is_one_warning(tmp_path) -> None:
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    native, counts, said = use("junk", tmp_path)
    assert counts == "0 1" and "could not be loaded" in native
    assert said.startswith(
        "RuntimeWarning fastgist: the compiled extension is there and of no use: _C.abi3.so could not"
    )
    assert "pip install --no-build-isolation ." in said and "delete it" in said


def test_another_version_is_one_warning(tmp_path) -> None:
    if _extension.load() is not None:
        pytest.skip("needs the extension")
    native, counts, said = use("of another version", tmp_path)
    assert counts == "0 1" and "older version, without nothing_of_this" in native and "without nothing_of_this" in said


def test_absence_is_silent(tmp_path) -> None:
    native, counts = use("absent", tmp_path)
    assert counts == "0 0" and "it was not built with this installation" in native
