"""Settings from files: --config beneath the flags, and config.json as a file of settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fastgist.train.config import FinetuneConfig, Method, MixedPrecision, Readout, UserError
from fastgist.train.settings import known_settings, read_settings, written_settings

pytest.importorskip("typer")

from typer.testing import CliRunner

from fastgist import cli

YAML = """
data: somewhere
lr: 1e-2        # YAML 1.1 takes this for a string
gist: no
mixed_precision: no
method: lora
set: {rank: 3, targets: "q,v"}
warmup-epochs: 2
temperature: linear:10:1
metrics: [accuracy, macro-f1]
checkpoint: weights.safetensors
"""
TOML = """
data = "somewhere"
lr = 0.01
gist = false
mixed_precision = "no"
method = "lora"
set = ["rank=3", "targets=q,v"]
warmup_epochs = 2
temperature = "linear:10:1"
metrics = "accuracy,macro-f1"
checkpoint = "weights.safetensors"
"""
EXPECTED = FinetuneConfig(
    data="somewhere", lr=0.01, gist=False, mixed_precision=MixedPrecision.NO, method=Method.LORA,
    set=["rank=3", "targets=q,v"], warmup_epochs=2.0, temperature="linear:10:1", metrics="accuracy,macro-f1",
    checkpoint=Path("weights.safetensors"),
)  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneConfig]:
    from fastgist.train import finetune as module
    from fastgist.train import sweep as sweeping

    got: list[FinetuneConfig] = []
    monkeypatch.setattr(module, "finetune", got.append)
    monkeypatch.setattr(sweeping, "sweep", lambda config, run: got.append(config))
    return got


def invoke(*arguments: object):
    return CliRunner().invoke(cli.build_app(), ["finetune", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.mark.parametrize("suffix", [".yaml", ".toml", ".json"])
def test_a_file_gives_the_settings_and_flags_override_it(suffix: str, tmp_path: Path, seen: list) -> None:
    as_json = json.dumps(written_settings(EXPECTED))
    (tmp_path / f"run{suffix}").write_text({".yaml": YAML, ".toml": TOML, ".json": as_json}[suffix])
    assert invoke("--config", tmp_path / f"run{suffix}").exit_code == 0
    assert seen.pop() == EXPECTED
    flags = ["elsewhere", "--lr", "0.5", "--gist", "--set", "alpha=1", "--method", "cp"]
    assert invoke(*flags, "--config", tmp_path / f"run{suffix}").exit_code == 0
    changes = {"data": "elsewhere", "lr": 0.5, "gist": True, "set": ["alpha=1"], "method": Method.CP}
    assert seen.pop() == dataclasses.replace(EXPECTED, **changes)


def test_every_setting_survives_the_way_through_a_file(tmp_path: Path, seen: list) -> None:
    """Each field away from its default."""
    other = {
        "gist_readout": Readout.MEAN, "method": Method.SSF, "mixed_precision": MixedPrecision.BF16, "data": "d",
        "set": ["a=b", "c=d,e"], "beta": "cosine:0:1", "temperature": 7.0, "checkpoint": Path("c"),
        "output_dir": Path("o"), "drop_path": 0.25, "val_split": 0.5,
    }  # fmt: skip
    kinds = {bool: lambda v: not v, int: lambda v: v + 3, float: lambda v: v + 0.5, str: lambda v: f"{v}x"}
    for field in dataclasses.fields(FinetuneConfig):
        if field.name in other or field.name == "resume":
            continue
        if field.default is None:
            kind = str(field.type).split(" ")[0]
            other[field.name] = {"int": 5, "float": 0.5, "str": "word"}[kind]
        else:
            other[field.name] = kinds[type(field.default)](field.default)
    config = FinetuneConfig(**other)
    (tmp_path / "config.json").write_text(json.dumps(written_settings(config)))
    result = invoke("--config", tmp_path / "config.json")
    assert result.exit_code == 0, result.output
    assert seen == [config] and set(written_settings(config)) == set(known_settings(FinetuneConfig)) - {"resume"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "learning_rate: 1", r"no setting is called 'learning_rate'.* there are alpha, augment, batch_size"),
        ("a.yaml", "lrs: 1", r"did you mean lr"),
        ("a.yaml", "lr: 1\n--lr: 2", "lr is given twice"),
        ("a.yaml", "lr: null", "lr is null; leave it out for its default"),
        ("a.yaml", "model: {a: 1}", "model takes one value, got"),
        ("a.yaml", "- lr", "expected settings by name, got list"),
        ("a.yaml", "lr: [", "while parsing a flow node"),
        ("a.json", "{", "Expecting property name"),
        ("a.toml", "lr", "Expected '=' after a key"),
        ("a.ini", "lr=1", "expected a file that ends in .yaml"),
        ("absent.yaml", None, "No such file or directory"),
        ("a.yaml", b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(name: str, text, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as raised:
        read_settings(tmp_path / name, FinetuneConfig)
    assert str(raised.value).startswith(f"--config {tmp_path / name}: ") and "\n" not in str(raised.value)
    result = invoke("--config", tmp_path / name)
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1


def test_values_in_a_file_are_checked_as_flags_are(tmp_path: Path, seen: list) -> None:
    for text, words in (
        ("epochs: 0", "epochs"), ("method: lara", "method"), ("gist: maybe", "gist"), ("temperature: hot", "temperature"),
    ):  # fmt: skip
        (tmp_path / "a.yaml").write_text(f"data: d\n{text}\n")
        result = invoke("--config", tmp_path / "a.yaml")
        assert result.exit_code == 2 and words in result.stderr, result.output
    (tmp_path / "a.yaml").write_text("lr: 1\n")
    result = invoke("--config", tmp_path / "a.yaml")
    assert result.exit_code == 2 and "data" in result.stderr
    assert not seen


def test_a_yaml_file_without_pyyaml_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "a.yaml").write_text("lr: 1\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UserError, match=r"reading YAML needs yaml: pip install 'fastgist\[train\]'"):
        read_settings(tmp_path / "a.yaml", FinetuneConfig)
