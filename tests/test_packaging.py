"""What is installed, and what happens where parts of it are missing."""

from __future__ import annotations

import configparser
import email
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastgist
from fastgist import _extension

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: The parts of a checkout that a build reads.
BUILT_FROM = ("fastgist", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# -- an absent or broken extension -----------------------------------------------------------------------------------


@pytest.fixture
def loader(monkeypatch, tmp_path):
    """fastgist._extension looking for its library in an empty folder, as if nothing had been loaded yet."""
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    _extension._load_once.cache_clear()
    yield _extension
    monkeypatch.undo()
    _extension._load_once.cache_clear()
    _extension.load()


def _lines(caplog) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "fastgist"]


def test_absence_is_one_info_line(loader, caplog):
    with caplog.at_level(logging.DEBUG, logger="fastgist"):
        reasons = {loader.load() for _ in range(3)}
        assert not loader.has_cuda()
        assert loader.build_info() is None
    assert reasons == {"it was not built with this installation"}
    (line,) = _lines(caplog)
    assert line.levelno == logging.INFO
    assert "without its compiled extension" in line.getMessage()


def test_threads_share_one_attempt_and_one_line(loader, caplog):
    with caplog.at_level(logging.DEBUG, logger="fastgist"):
        threads = [threading.Thread(target=loader.load) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(_lines(caplog)) == 1


def test_a_broken_library_is_named(loader, caplog, tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with caplog.at_level(logging.DEBUG, logger="fastgist"):
        reason = loader.load()
    assert reason.startswith("_C.abi3.so could not be loaded: ")
    assert "\n" not in reason
    assert len(_lines(caplog)) == 1


def test_importing_loads_and_says_nothing():
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    script = (
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        "import fastgist, fastgist._extension as e\n"
        "assert e._load_once.cache_info().currsize == 0, 'the extension was loaded at import'\n"
    )
    said = run(sys.executable, "-c", script, cwd=ROOT, PYTHONPATH=path)
    assert "fastgist" not in said


# -- metadata --------------------------------------------------------------------------------------------------------


def _requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(r) for group in [PROJECT["dependencies"], *extras] for r in group]


def test_torch_is_the_only_dependency():
    assert [Requirement(r).name for r in PROJECT["dependencies"]] == ["torch"]


def test_version_is_said_once():
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", fastgist.__version__)
    for name in ("setup.py", "pyproject.toml"):
        assert fastgist.__version__ not in (ROOT / name).read_text()


def test_constraints_pin_everything_asked_for():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert len(requirement.specifier) == 1, line
            assert next(iter(requirement.specifier)).operator == "==", line
            pinned[canonicalize_name(requirement.name)] = next(iter(requirement.specifier)).version
    for requirement in _requirements():
        if requirement.name == "fastgist":
            continue
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


def test_extras_refer_to_extras_that_exist():
    for requirement in _requirements():
        if requirement.name == "fastgist":
            assert requirement.extras <= set(PROJECT["optional-dependencies"])


def test_scripts_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


# -- wheels ----------------------------------------------------------------------------------------------------------


def wheel(tmp_path: Path, **env: str) -> Path:
    """Built from a copy of the checkout, so that nothing built here before gets into it."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "build", "*.egg-info")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    out = tmp_path / "dist"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=tmp_path, **env)
    (built,) = out.glob("*.whl")
    return built


def _needs_pip_and_setuptools() -> None:
    # Asked by version: to import setuptools here would patch distutils in the test process.
    for name, least in (("pip", 23), ("setuptools", 77)):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"needs {name}")
        if int(version.split(".")[0]) < least:
            pytest.skip(f"needs {name} >= {least}, found {version}")


def _check_contents(built: Path) -> set[str]:
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        (metadata,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        info = email.message_from_string(archive.read(metadata).decode())
        (scripts,) = [n for n in names if n.endswith(".dist-info/entry_points.txt")]
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(scripts).decode())
    for folder in ("fastgist", "kernels/fastgist_kernels"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".json"} and "__pycache__" not in path.parts:
                base = ROOT / "kernels" if folder.startswith("kernels") else ROOT
                assert path.relative_to(base).as_posix() in names, f"{path.relative_to(ROOT)} is not in the wheel"
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastgist", "fastgist_kernels"}
    assert any(name.endswith("LICENSE") for name in names)
    assert info["Name"] == "fastgist"
    assert info["Version"] == fastgist.__version__
    always = [r for r in map(Requirement, info.get_all("Requires-Dist")) if r.marker is None]
    assert [r.name for r in always] == ["torch"]
    assert entry_points["console_scripts"]["fastgist"] == "fastgist.cli:main"
    return names


def _import_from(built: Path, tmp_path: Path) -> str:
    """Install into a folder of its own and use it from there, with the checkout out of sight."""
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, built, cwd=tmp_path)
    script = (
        "import fastgist, fastgist_kernels, torch\n"
        "from fastgist import _extension, functional\n"
        "assert fastgist.__file__.startswith(SITE) and fastgist_kernels.__file__.startswith(SITE)\n"
        "z, o = torch.randn(3, 5), torch.randn(3, 5)\n"
        "assert functional.bidirectional_kl(z, o).isfinite()\n"
        "print('extension:', _extension.load() or _extension.build_info())\n"
    )
    return run(sys.executable, "-c", f"SITE = {str(site)!r}\n{script}", cwd=tmp_path, PYTHONPATH=str(site))


@pytest.mark.slow
def test_wheel_with_the_extension(tmp_path):
    _needs_pip_and_setuptools()
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    # Whether a clean copy has all that a build needs does not hang on optimisation, which takes most of the time; at -O3 make
    # setup has built the same sources by the same setup.py, and all other tests of the extension run what that made.
    unhurried = tmp_path / "c++"
    unhurried.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" -O0\n')
    unhurried.chmod(0o755)
    built = wheel(tmp_path, FASTGIST_REQUIRE_EXT="1", FASTGIST_CUDA="0", FASTGIST_NO_EXT="0", CXX=str(unhurried))
    names = _check_contents(built)
    assert "fastgist/_C.abi3.so" in names
    assert any(name.startswith("fastgist/_build_info.") for name in names)
    assert not built.name.endswith("none-any.whl")
    assert "'cuda_kernels': False" in _import_from(built, tmp_path)


@pytest.mark.slow
def test_wheel_without_the_extension(tmp_path):
    _needs_pip_and_setuptools()
    built = wheel(tmp_path, FASTGIST_NO_EXT="1", FASTGIST_REQUIRE_EXT="0", FASTGIST_CUDA="0")
    names = _check_contents(built)
    assert not [name for name in names if name.endswith(".so")]
    assert built.name.endswith("py3-none-any.whl")
    assert "it was not built with this installation" in _import_from(built, tmp_path)
