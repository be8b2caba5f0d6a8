"""The command line: env, warmup, errors in one line, exit codes."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from images import write_digits

import fastgist
from fastgist import backends

pytest.importorskip("typer")

from typer.testing import CliRunner

from fastgist import cli
from fastgist.train import diagnostics


def invoke(*arguments: str):
    return CliRunner().invoke(cli.build_app(), list(arguments), env={"COLUMNS": "120"})


def test_version_and_help() -> None:
    assert invoke("--version").stdout.strip() == f"fastgist {fastgist.__version__}"
    for command in ("demo", "finetune", "finetune-text", "compare", "compare-text", "export", "env", "warmup"):
        assert command in invoke("--help").stdout
        assert invoke(command, "--help").exit_code == 0
    text = invoke("finetune", "--help").stdout
    for flag in ("--gist", "--no-gist", "--resume", "--temperature", "--skip-unreadable", "--mixed-precision"):
        assert flag in text


def test_python_m_fastgist() -> None:
    done = subprocess.run([sys.executable, "-m", "fastgist", "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == f"fastgist {fastgist.__version__}"


def test_env_says_what_each_operation_runs_on_and_why() -> None:
    result = invoke("env", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["fastgist"] == fastgist.__version__
    assert found["operations"] == {op: backends.explain(op) for op in backends.OPS}
    assert found["implementations"] == backends.available()
    assert found["devices"][0]["name"] == "cpu" and "state" in found["extension"]
    text = invoke("env").stdout
    for op in backends.OPS:
        assert op in text


def test_env_lists_what_the_extras_name_and_how_to_get_what_is_missing(monkeypatch) -> None:
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {
        extra: tuple(re.match(r"[\w-]+", r)[0] for r in extras[extra] if not r.startswith("fastgist["))
        for extra in diagnostics.EXTRAS
        if extra
    }
    assert {extra: packages for extra, packages in diagnostics.EXTRAS.items() if extra} == named
    assert set(extras) - set(named) == {"build", "dev"}
    installed = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("torchao", "peft"):
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.2.3" if package == "bitsandbytes" else installed(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = json.loads(invoke("env", "--json").stdout)
    assert found["versions"]["bitsandbytes"] == "1.2.3"
    assert (
        found["missing"].items() >= {"torchao": "pip install 'fastgist[quantized]'", "peft": "pip install peft"}.items()
    )
    assert not found["versions"].keys() & found["missing"].keys()
    text = invoke("env").stdout
    assert "bitsandbytes" in text and "fastgist[quantized]" in text


def test_env_needs_torch_and_the_table_printer_only() -> None:
    """timm, accelerate and the rest blocked."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['timm', 'accelerate', 'datasets', 'transformers', 'sklearn', "
        "'matplotlib', 'tqdm', 'torchvision', 'safetensors', 'numpy'])); "
        "sys.argv = ['fastgist', 'env', '--json']; from fastgist.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "operations" in json.loads(done.stdout)


@pytest.mark.parametrize(("package", "command"), [("typer", "env"), ("sklearn", "demo")])
def test_a_missing_package_is_one_line_that_says_what_to_install(package: str, command: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['fastgist', {command!r}]"
    code += f" + ['--output-dir', {str(tmp_path)!r}]" if command == "demo" else ""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; from fastgist.cli import main; main()"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert package in line and "pip install 'fastgist[train]'" in line


def test_warmup_says_when_there_is_nothing_to_compile() -> None:
    result = invoke("warmup", "--device", "cpu")
    assert result.exit_code == 0, result.output
    if not backends.interpreting():
        assert "nothing to compile for cpu" in result.stdout
    result = invoke("warmup", "--dtype", "float31")
    assert result.exit_code == 2 and "float31" in result.stderr
    result = invoke("warmup", "--dtype", ",")
    assert result.exit_code == 2 and "--dtype takes" in result.stderr


def test_warmup_runs_every_operation_forward_and_backward() -> None:
    from fastgist.train.diagnostics import _cases

    ran = []
    for op, run in _cases("cpu", torch.float32, batch=2, tokens=3, dim=16, classes=5, rank=2, bottleneck_dim=4):
        run()
        ran.append(op)
    assert tuple(ran) == backends.OPS


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for arguments, message in (
        ((str(tmp_path / "nowhere"),), "no such folder"),
        ((str(Path(__file__)),), "is a file"),
    ):
        result = invoke("finetune", *arguments, "--device", "cpu", "--output-dir", str(tmp_path / "out"))
        (line,) = result.stderr.strip().splitlines()
        assert result.exit_code == 2 and line.startswith("fastgist: ") and message in line
    result = invoke("finetune", "somewhere", "--epochs", "0")
    assert result.exit_code == 2 and "epochs" in result.stderr


def test_failures_at_run_time_exit_with_1_and_ctrl_c_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgist.train import finetune as module

    def fail(error: BaseException):
        def finetune(config: object) -> None:
            raise error

        return finetune

    monkeypatch.setattr(module, "finetune", fail(OSError(28, "No space left on device")))
    result = invoke("finetune", "data")
    assert result.exit_code == 1 and "No space left on device" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    monkeypatch.setattr(module, "finetune", fail(module.Interrupted("interrupted: step-4 is complete")))
    result = invoke("finetune", "data")
    assert result.exit_code == 130 and result.stderr.strip() == "fastgist: interrupted: step-4 is complete"
    monkeypatch.setenv("FASTGIST_DEBUG", "1")
    monkeypatch.setattr(module, "finetune", fail(OSError("disk")))
    assert isinstance(invoke("finetune", "data").exception, OSError)


def test_flags_become_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgist.recipes import GIST
    from fastgist.train import finetune as module
    from fastgist.train.config import Method, MixedPrecision

    seen = []
    monkeypatch.setattr(module, "finetune", seen.append)
    assert invoke("finetune", "data").exit_code == 0
    assert invoke(
        "finetune", "data", "--method", "cp", "--rank", "7", "--no-gist", "--temperature", "10",
        "--mixed-precision", "bf16", "--checkpoint", "w.safetensors", "--warmup-epochs", "3",
    ).exit_code == 0  # fmt: skip
    plain, changed = seen
    for name in ("epochs", "warmup", "warmup_lr", "lr", "weight_decay", "batch_size", "alpha", "beta", "temperature"):
        assert getattr(plain, name) == getattr(GIST, name)
    assert (plain.alpha, plain.beta, plain.temperature, plain.epochs, plain.warmup) == (0.5, 0.75, 3.0, 100, 10)
    assert plain.gist and plain.method is Method.ADAPTER and plain.pretrained
    assert changed.method is Method.CP and changed.rank == 7 and not changed.gist and changed.temperature == 10
    assert changed.mixed_precision is MixedPrecision.BF16 and changed.checkpoint == Path("w.safetensors")
    assert changed.warmup == 3


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_real_ctrl_c(tmp_path: Path) -> None:
    """The signal, to a process in the middle of training: a complete checkpoint, one line, 130."""
    import os
    import signal
    import time

    for package in ("timm", "accelerate", "sklearn"):
        pytest.importorskip(package)
    data, out = write_digits(tmp_path / "data"), tmp_path / "out"
    flags = "--model test_vit --no-pretrained --image-size 32 --workers 0 --epochs 5000 --batch-size 8"
    flags += " --no-progress --device cpu"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgist", "finetune", str(data), *flags.split(), "--output-dir", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a shell's background job is started with SIGINT ignored, and hands that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.time() + 120
        while not list(out.glob("checkpoints/step-*")) and process.poll() is None and time.time() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    said = [line for line in errors.splitlines() if line.startswith("fastgist:")]
    assert len(said) == 2 and "stopping after this step" in said[0], errors
    assert process.returncode == 130 and "is complete; the same command with --resume" in said[1]
