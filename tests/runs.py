"""Runs of ``fastgist finetune`` of a second or two, on digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

for _package in ("timm", "accelerate", "sklearn"):
    pytest.importorskip(_package)

from fastgist.train.config import FinetuneConfig  # noqa: E402
from fastgist.train.finetune import finetune  # noqa: E402

__all__ = ["adapter_file", "config", "falling", "quiet", "same_files"]


def config(data: Path | str, output_dir: Path, **changes: object) -> FinetuneConfig:
    """A run of a second or two."""
    base = FinetuneConfig(
        data=str(data), output_dir=output_dir, model="test_vit", pretrained=False, image_size=32, epochs=3,
        batch_size=8, workers=0, device="cpu", progress=False, lr=0.01,
    )  # fmt: skip
    return replace(base, **changes)


def quiet(settings: FinetuneConfig) -> dict:
    return finetune(settings, say=lambda line: None)


def falling(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Validation scores fall from epoch to epoch, so that the first is selected; the weights each epoch was judged with."""
    from fastgist.train import engine

    judged: list[dict[str, torch.Tensor]] = []
    original = engine.evaluate

    def evaluate(model: torch.nn.Module, *args: object) -> dict[str, float]:
        judged.append({name: t.detach().clone() for name, t in engine.trained_tensors(model).items()})
        return original(model, *args) | {"accuracy": 1.0 / len(judged)}

    monkeypatch.setattr(engine, "evaluate", evaluate)
    return judged


def same_files(one: Path, other: Path) -> None:
    """Two safetensors files hold the same bits and the same metadata (whose order in the file is random)."""
    import safetensors

    with safetensors.safe_open(one, "pt") as mine, safetensors.safe_open(other, "pt") as theirs:
        assert mine.metadata() == theirs.metadata()  # with the SHA-256 of the tensors
        assert sorted(mine.keys()) == sorted(theirs.keys())
        for name in mine.keys():
            assert torch.equal(mine.get_tensor(name), theirs.get_tensor(name)), name


def adapter_file(folder: Path) -> Path:
    return folder / "adapter" / "adapter_model.safetensors"
