"""``--report-to``: the trackers of accelerate (TensorBoard, Weights & Biases, Trackio), each imported only if asked for."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgist.train.config import FinetuneConfig, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TRACKERS", "Tracking", "check_trackers", "wandb_settings"]

#: Tracker -> the module it needs and how to install it.
TRACKERS = {
    "tensorboard": ("tensorboard", "pip install 'fastgist[tensorboard]'"),
    "wandb": ("wandb", "pip install wandb"),
    "trackio": ("trackio", "pip install trackio"),
}

_PROJECT = "fastgist"


def check_trackers(words: str) -> list[str]:
    """The trackers in ``words``; UserError for an unknown one, or one whose package is not installed."""
    names = [word.strip() for word in words.split(",")]
    if names == ["none"]:
        return []
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"--report-to: no tracker is called {name!r}; there are {', '.join(TRACKERS)}, and none alone"
            )
        module, install = TRACKERS[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"--report-to {name} needs the package {module}: {install}")
    return list(dict.fromkeys(names))


@contextmanager
def wandb_settings(folder: Path) -> Iterator[None]:
    """wandb's project and folder for transformers' callback, which takes them from the environment alone (what is set there
    already stays), and an end of the run that it begins and leaves open: the next seed's would go on in it."""
    ours = {"WANDB_PROJECT": _PROJECT, "WANDB_DIR": os.fspath(folder.absolute())}
    mine = {name: value for name, value in ours.items() if name not in os.environ}
    before = _wandb_run()
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
        run = _wandb_run()
        if run is not None and run is not before:
            run.finish()


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


class Tracking:
    """The trackers of one run. Settings are sent when it starts, numbers after each epoch and at the end."""

    def __init__(self, names: list[str], accelerator: Accelerator, config: FinetuneConfig) -> None:
        self.names, self.config, self.accelerator = names, config, accelerator
        self.started = False

    def start(self, step: int) -> None:
        """Begin; a resumed run takes back what was logged after its checkpoint, where the tracker can."""
        if not self.names:
            return
        folder = os.fspath(self.config.output_dir)
        accelerator = self.accelerator
        accelerator.project_configuration.set_directories(folder)
        accelerator.log_with = _known(self.names, folder)
        own: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": step + 1 if step else None},
            "wandb": {"name": self.config.output_dir.name, "dir": folder},
            "trackio": {"name": self.config.output_dir.name},
        }
        accelerator.init_trackers(
            _PROJECT,
            config={name.lstrip("-").replace("-", "_"): _flat(v) for name, v in self.config.trajectory().items()},
            init_kwargs={name: own[name] for name in self.names},
        )
        self.started = True

    def log(self, record: dict[str, float]) -> None:
        """Send the numbers of one epoch, at its step."""
        if self.started:
            numbers = {name: value for name, value in record.items() if name != "step"}
            if numbers:
                self.accelerator.log(numbers, step=int(record["step"]))

    def end(self) -> None:
        if self.started:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.accelerator.trackers = []
            self.started = False


def _known(names: list[str], folder: str) -> list[Any]:
    from accelerate.tracking import filter_trackers

    return filter_trackers(names, folder)


def _flat(value: object) -> bool | int | float | str:
    """What every tracker takes as a setting."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)
