"""What reaches wandb and trackio: stand-ins of those names record the calls that accelerate and transformers make of our runs.
Where both packages are installed they are run too, offline: what their servers do with the numbers is not shown.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("datasets")

from images import write_digits
from texts import few, write_bert, write_csv

from fastgist.train.stdlib_text import StdlibText

#: A module whose functions, config and run write down what they are called with.
STAND_IN = """
import json, os, types

def _write(name, /, *args, **kwargs):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([__name__, name, args, kwargs], default=str) + chr(10))

class _Run:
    id = name = "run"
    url = ""
    def __init__(self): self.config, self.summary = _Config(), {}
    def log(self, values, **kwargs): _write("log", values, **kwargs)
    def finish(self): finish()
    def _label(self, **kwargs): pass

class _Config(dict):
    def update(self, values, **kwargs): _write("config", values)

run, config, summary, __version__ = None, _Config(), {}, "99"

def init(**kwargs):
    global run
    _write("init", **kwargs)
    run = _Run()
    return run

def log(values, **kwargs): _write("log", values, **kwargs)
def finish():
    global run
    run = None
    _write("finish")
"""

RUN = """
import sys
from pathlib import Path
from fastgist.train.config import FinetuneConfig
from fastgist.train.finetune import finetune
from fastgist.train.text import finetune_text
from fastgist.train.text_config import TextConfig

images, texts, bert, out = map(Path, sys.argv[1:])
finetune(FinetuneConfig(
    data=str(images), output_dir=out / "images", model="test_vit", pretrained=False, image_size=32, epochs=2, batch_size=8,
    workers=0, device="cpu", progress=False, report_to="wandb,trackio"), say=lambda line: None)
finetune_text(TextConfig(
    data=str(texts), model=str(bert), epochs=2, batch_size=8, max_length=16, rank=2, output_dir=out / "texts", progress=False,
    device="cpu", report_to="wandb"), say=lambda line: None)
"""


def run(code: str, root: Path, **settings: str) -> None:
    """``code`` in a process of its own, with digits, texts and a BERT in ``root``."""
    for (name, part), each in zip(StdlibText.load().parts().items(), (8, 4, 4), strict=True):
        write_csv(root / "texts" / f"{name}.csv", ["text", "label"], few(part, 2, each))
    arguments = [write_digits(root / "digits"), root / "texts", write_bert(root / "bert"), root / "out"]
    environment = {**os.environ, "WANDB_WATCH": "false", **settings}
    environment.pop("WANDB_DISABLED", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, Path]:
    """(what was called in both runs, their folder)."""
    root = tmp_path_factory.mktemp("trackers")
    for name in ("wandb", "trackio"):  # accelerate asks for a distribution, transformers for wandb's own error
        (root / "site" / name / "sdk" / "lib").mkdir(parents=True)
        (root / "site" / name / "__init__.py").write_text(STAND_IN)
        for part in ("sdk", "sdk/lib"):
            (root / "site" / name / part / "__init__.py").touch()
        (root / "site" / name / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass\n")
        (root / "site" / f"{name}-99.dist-info").mkdir()
        (root / "site" / f"{name}-99.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n"
        )
    code = f"import sys; sys.path.insert(0, {str(root / 'site')!r})\n{RUN}"
    run(code, root, CALLS=str(root / "calls.jsonl"))
    return [json.loads(line) for line in (root / "calls.jsonl").read_text().splitlines()], root / "out"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_on_images_sends_its_settings_then_its_journal(name: str, calls: tuple[list, Path]) -> None:
    found, out = calls
    end = next(i for i, call in enumerate(found) if call[:2] == [name, "finish"])
    mine = [call for call in found[: end + 1] if call[0] == name]
    assert [call[1] for call in mine] == ["init", "config", "log", "log", "log", "finish"]
    assert mine[0][3]["project"] == "fastgist" and mine[0][3]["name"] == "images"
    assert mine[1][2][0]["model"] == "test_vit" and mine[1][2][0]["epochs"] == 2
    records = [json.loads(line) for line in (out / "images" / "metrics.jsonl").read_text().splitlines()]
    for call, record in zip(mine[2:4], records, strict=True):
        assert call[2][0]["train_loss"] == pytest.approx(record["train_loss"])
        assert call[2][0]["val_accuracy"] == pytest.approx(record["val_accuracy"])
    summary = json.loads((out / "images" / "summary.json").read_text())
    assert mine[4][2][0]["test_accuracy"] == pytest.approx(summary["test_accuracy"])


def test_a_run_on_texts_sends_what_the_trainer_logs(calls: tuple[list, Path]) -> None:
    found, out = calls
    first = next(i for i, call in enumerate(found) if call[1] == "finish" and call[0] == "wandb") + 1
    mine = [call for call in found[first:] if call[0] == "wandb"]
    assert mine[0][1] == "init" and "log" in {call[1] for call in mine}
    assert mine[0][3]["project"] == "fastgist" and mine[0][3]["name"] == "texts"
    assert mine[-1][1] == "finish", "the next seed's numbers would go on in this run"
    assert any(call[1] == "config" and call[2][0].get("num_train_epochs") == 2 for call in mine)
    sent = [call[2][0] for call in mine if call[1] == "log"]
    history = [json.loads(line) for line in (out / "texts" / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "eval_loss"):
        prefix, name = ("eval/", key.removeprefix("eval_")) if key.startswith("eval_") else ("train/", key)
        want = [entry[key] for entry in history if key in entry]
        assert [values[prefix + name] for values in sent if prefix + name in values] == pytest.approx(want), key


def test_the_packages_themselves_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    imports, images, text = re.split(r"\n(?=finetune)", RUN)
    for code in (
        images,
        text,
        text.replace('"texts"', '"texts-trackio"').replace("wandb", "trackio"),
    ):  # wandb: a folder each
        run(f"{imports}\n{code}", tmp_path, WANDB_MODE="offline", TRACKIO_DIR=str(tmp_path / "trackio"))
    runs = sorted((tmp_path / "out").rglob("offline-run-*"))
    assert len(runs) == 2 and all(list(folder.glob("run-*.wandb")) for folder in runs), (
        "a run each of images and of texts"
    )
    with sqlite3.connect(tmp_path / "trackio" / "fastgist.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    sent = {name: [json.loads(text) for run, _, text in rows if run == name] for name in ("images", "texts-trackio")}
    assert len({run for run, _, _ in rows}) == 2
    for name, key, mine in (
        ("images", "val_accuracy", "val_accuracy"),
        ("texts-trackio", "eval/accuracy", "eval_accuracy"),
    ):
        journal = (json.loads(line) for line in (tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines())
        want = [record[mine] for record in journal if mine in record]
        assert len(want) == 2 and [values[key] for values in sent[name] if key in values] == pytest.approx(want)
