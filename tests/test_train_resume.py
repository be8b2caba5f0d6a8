"""fastgist finetune --resume, and Ctrl-C: a run that goes on ends bitwise where one in one go ends."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from runs import adapter_file, config, quiet, same_files

from fastgist.train import finetune as run
from fastgist.train.config import FinetuneConfig, Method, UserError
from fastgist.train.finetune import finetune


@pytest.fixture(scope="module")
def uninterrupted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """A whole run with everything random in it, and a checkpoint of every step."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    settings = config(
        digits, out, drop_path=0.3, checkpoint_every=1, keep_checkpoints=100, clip_grad=1.0, lr_gist=0.03, lr_head=0.002,
        wd_gist=0.05, weight_decay=0.01, temperature="linear:10:1", beta="cosine:0.25:1:0.2:0.9",
    )  # fmt: skip
    quiet(settings)
    return settings


@pytest.mark.parametrize("step", [2, 3, 7, 9])
def test_a_resumed_run_ends_bitwise_where_an_uninterrupted_one_ends(
    uninterrupted: FinetuneConfig, tmp_path: Path, step: int
) -> None:
    """From the middle of an epoch, from its end, with images loaded in another process, and from the very end."""
    whole, out = uninterrupted.output_dir, tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    for path in (whole / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) <= step:
            shutil.copy(path, out / "checkpoints")
    shutil.copy(whole / "metrics.jsonl", out)  # holds epochs after the checkpoint: they are done again
    quiet(replace(uninterrupted, output_dir=out, resume=True, workers=1 if step == 7 else 0))
    same_files(adapter_file(out), adapter_file(whole))
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    last = sorted((whole / "checkpoints").iterdir())[-1]
    same_files(out / "checkpoints" / last.name, last)  # the last weights, the best, the optimiser, all numbers


def test_ctrl_c_leaves_a_complete_checkpoint_and_says_how_to_go_on(
    uninterrupted: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgist.train import engine

    settings = replace(uninterrupted, output_dir=tmp_path / "out")
    calls, evaluate = [], engine.evaluate

    def interrupt(*args: object) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(engine, "evaluate", interrupt)
    with pytest.raises(run.Interrupted, match=r"step-00000005\.safetensors is complete; .*--resume"):
        quiet(settings)
    monkeypatch.setattr(engine, "evaluate", evaluate)
    with pytest.raises(UserError, match="holds a run already"):
        quiet(settings)
    quiet(replace(settings, resume=True))
    same_files(adapter_file(settings.output_dir), adapter_file(uninterrupted.output_dir))


@pytest.fixture
def python_handles_ctrl_c() -> Iterator[None]:
    """A shell's background job, and so what runs the tests there, is started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_ctrl_c_before_the_first_checkpoint_writes_one(
    uninterrupted: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """A real signal in the second step, long before an epoch ends: the step is finished and saved."""
    from fastgist.train import engine

    settings = replace(uninterrupted, output_dir=tmp_path / "out", checkpoint_every=0)
    seed = engine.seed_everything

    def press(*numbers: int) -> None:
        if numbers[2:3] == (1,):
            os.kill(os.getpid(), signal.SIGINT)
        seed(*numbers)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(engine, "seed_everything", press)
    with pytest.raises(run.Interrupted, match=r"step-00000002\.safetensors is complete; .*--resume"):
        quiet(settings)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this step" in capfd.readouterr().err
    monkeypatch.setattr(engine, "seed_everything", seed)
    quiet(replace(settings, resume=True))
    same_files(adapter_file(settings.output_dir), adapter_file(uninterrupted.output_dir))


def test_where_ctrl_c_is_ignored_it_stays_so() -> None:
    from fastgist.train.interrupt import deferred_interrupt

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupt(True) as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupted()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_a_second_ctrl_c_stops_at_once() -> None:
    from fastgist.train.interrupt import deferred_interrupt

    with deferred_interrupt(True) as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with deferred_interrupt(False) as interrupted, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert not interrupted()


def test_resuming_something_else_is_refused(uninterrupted: FinetuneConfig, digits: Path, tmp_path: Path) -> None:
    resume = replace(uninterrupted, resume=True)
    before = {p: p.read_bytes() for p in sorted(uninterrupted.output_dir.rglob("*")) if p.is_file()}
    for changes, message in (
        ({"lr": 0.5}, "--lr = 0.01, this run has 0.5"),
        ({"batch_size": 4}, "global batch = 8, this run has 4"),
        ({"method": Method.LORA}, "--method = 'adapter', this run has 'lora'"),
        ({"seed": 9}, "--seed"),
    ):
        with pytest.raises(UserError, match=f"cannot resume from .*{message}"):
            quiet(replace(resume, **changes))
    with pytest.raises(UserError, match=r"holds a run of --model .*, this one has vit_base_patch16_224: with --config"):
        quiet(replace(resume, model="vit_base_patch16_224"))  # at once: nothing is downloaded
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    next((other / "train" / "digit1").iterdir()).unlink()
    with pytest.raises(UserError, match="made with data ="):
        quiet(replace(resume, data=str(other)))
    assert before == {p: p.read_bytes() for p in sorted(uninterrupted.output_dir.rglob("*")) if p.is_file()}


def test_resume_without_a_checkpoint_starts_from_the_beginning(digits: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    finetune(config(digits, tmp_path / "out", epochs=1, resume=True), say=lines.append)
    assert any("starting from the beginning" in line for line in lines)
