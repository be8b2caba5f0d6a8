"""Hard case 27, training checkpoints: killed at any moment of a save, the newest complete one is there and wins."""

from __future__ import annotations

import builtins
import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fastgist.train.checkpoint import Checkpoints
from fastgist.train.config import UserError

pytest.importorskip("safetensors")

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process to kill")


def contents(step: int) -> dict[str, torch.Tensor]:
    """Tensors that all say which step they belong to."""
    return {"model/weight": torch.full((64, 33), float(step)), "optimizer/0/step": torch.tensor(float(step))}


def check(folder: Path) -> int | None:
    """The step of the newest complete checkpoint, after checking that it is of one piece."""
    found = Checkpoints(folder).latest()
    if found is None:
        return None
    path, tensors, state, complaints = found
    assert not complaints
    assert int(path.stem.split("-")[1]) == state["step"]
    for name, expected in contents(state["step"]).items():
        assert torch.equal(tensors[name], expected)
    return state["step"]


class _Killer:
    """Ends the process, as kill -9 does, before the n-th thing it asks of the file system."""

    def __init__(self, after: int) -> None:
        self.left = after

    def before(self, function):
        def wrapped(*args, **kwargs):
            if self.left == 0:
                os._exit(9)
            self.left -= 1
            return function(*args, **kwargs)

        return wrapped


def save_and_die(folder: Path, step: int, after: int) -> bool:
    """Save in a child that dies before its ``after``-th system call; True if it lived to the end."""
    child = os.fork()
    if child == 0:
        try:
            killer = _Killer(after)
            for name in ("fsync", "replace", "open", "unlink"):
                setattr(os, name, killer.before(getattr(os, name)))
            builtins.open = killer.before(builtins.open)
            Checkpoints(folder, keep=2).save(step, contents(step), {"n": step})
            os._exit(0)
        except BaseException:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 9)
    return os.waitstatus_to_exitcode(status) == 0


@needs_fork
def test_a_save_killed_before_any_of_its_system_calls_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    seen, after = set(), 0
    while True:
        folder = tmp_path / str(after)
        for step in (1, 2, 3):
            Checkpoints(folder, keep=2).save(step, contents(step), {"n": step})
        finished = save_and_die(folder, 4, after)
        seen.add(step := check(folder))
        assert step in (3, 4)
        Checkpoints(folder).sweep()
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        Checkpoints(folder, keep=2).save(5, contents(5), {"n": 5})  # and life goes on
        assert check(folder) == 5 and len(list(Checkpoints(folder))) == 2
        if finished:
            break
        after += 1
    assert seen == {3, 4} and after >= 5


@needs_fork
def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    newest, generator = 0, torch.Generator().manual_seed(0)
    for _ in range(25):
        child = os.fork()
        if child == 0:
            checkpoints, step = Checkpoints(tmp_path, keep=2), newest
            while True:
                step += 1
                checkpoints.save(step, contents(step), {"n": step})
        time.sleep(0.01 + 0.03 * float(torch.rand((), generator=generator)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = check(tmp_path)
        assert (found or 0) >= newest
        newest = found or 0
    assert newest > 5


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, contents(step), {"n": step})
    newest = tmp_path / "step-00000002.safetensors"
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1  # safetensors itself loads this without a word
    for damaged in (whole[:-7], bytes(flipped), b"", b"\x80\x04."):
        newest.write_bytes(damaged)
        found = checkpoints.latest()
        assert found is not None and found[2]["step"] == 1
        assert len(found[3]) == 1 and found[3][0].startswith("step-00000002.safetensors is damaged")
    (tmp_path / "step-00000001.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no complete checkpoint in .*step-00000002.* damaged.*step-00000001"):
        checkpoints.latest()


def test_names_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for name in ("step-1.safetensors", "step-00000009.pt", "step-00000009.safetensors.bak", "notes.txt"):
        (tmp_path / name).write_text("mine")
    for step in (1, 2):
        checkpoints.save(step, contents(step), {})
    assert check(tmp_path) == 2
    assert sorted(p.name for p in tmp_path.iterdir() if p.read_bytes() == b"mine") == [
        "notes.txt", "step-00000009.pt", "step-00000009.safetensors.bak", "step-1.safetensors",
    ]  # fmt: skip


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, contents(1), {})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, contextlib.suppress(OSError):
        patch.setattr(os, "fsync", full)
        checkpoints.save(2, contents(2), {})
        pytest.fail("the error was swallowed")
    assert check(tmp_path) == 1 and len(list(tmp_path.iterdir())) == 1


@needs_fork
def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = Checkpoints(tmp_path).save(1, contents(1), {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
