"""A fine-tuning run on the demo's digits with the settings of ``fastgist finetune``: offline, seconds each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastgist.gist import GistConfig
from fastgist.train.checkpoint import write_atomically
from fastgist.train.config import DemoConfig, FinetuneConfig, UserError
from fastgist.train.demo import _base, fresh, one_thread
from fastgist.train.digits import Digits
from fastgist.train.engine import fit, predict
from fastgist.train.measure import commit, trainable_share, versions
from fastgist.train.models import adapt
from fastgist.train.settings import written_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["DigitsBench"]


class DigitsBench:
    """The demo's pre-trained base and data; :meth:`run` adapts a copy to a few-shot draw.

    One seed means one draw, one new head and one order of images, whatever the method. Nothing is selected: the last
    step's weights are judged on the test half, which chose nothing in the demo either.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.data = Digits.load()
        with one_thread(accelerator.device):
            self.base, about = _base(DemoConfig(output_dir=Path()), self.data, accelerator)
        self.words = about["words"]

    @classmethod
    @contextlib.contextmanager
    def opened(cls, config: FinetuneConfig) -> Iterator[DigitsBench]:
        """A bench on the device of ``config``, with one thread on a CPU: results do not depend on how many cores there are."""
        from accelerate import Accelerator

        if config.device not in (None, "cpu", "cuda", "mps"):
            raise UserError(f"--device is cpu, cuda, mps or left out (accelerate decides), got {config.device!r}")
        accelerator = Accelerator(cpu=config.device == "cpu")
        if config.device not in (None, accelerator.device.type):
            raise UserError(f"--device {config.device} is not available: accelerate found {accelerator.device.type}")
        if accelerator.num_processes > 1:
            raise UserError("digits are too small for several processes: run this without accelerate launch")
        with one_thread(accelerator.device):
            yield cls(accelerator)

    def run(self, config: FinetuneConfig) -> dict[str, Any]:
        """Train and judge; returns what is also written to ``summary.json`` in the output folder."""
        if config.shots is None:
            raise UserError("digits need --shots")
        smallest = int(self.data.pool.labels.bincount().min())
        if config.shots > smallest:
            raise UserError(f"--shots {config.shots}: the smallest class of the digits' pool has {smallest} images")
        train, _ = self.data.pool.draw(config.shots, config.seed)
        model: nn.Module = fresh(self.base, len(train.labels.unique()), config.seed)
        token = GistConfig(length=config.gist_length, readout=config.gist_readout.value)
        model = adapt(model, config.method, gist=config.gist, settings=config.set, gist_config=token)
        result = fit(model, train, config, self.accelerator, progress=False, measure_memory=False)
        logits, labels = predict(model, self.data.test, 256, self.accelerator.device)
        trained, everything = trainable_share(model)
        summary = {
            "method": config.method.value, "gist": config.gist, "steps": result.steps,
            "images": {"train": len(train), "test": len(self.data.test)}, "selected_by": "last epoch",
            "test_accuracy": float((logits.argmax(-1) == labels).double().mean()),
            "test_loss": float(nn.functional.cross_entropy(logits, labels)),
            "trained_parameters": trained, "all_parameters": everything, "device": self.accelerator.device.type,
            "versions": versions(), "commit": commit(), "config": written_settings(config),
        }  # fmt: skip
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(config.output_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        return summary
