"""Metrics beside accuracy, and trackers: numbers against independent ones, files read back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import config
from torch import nn

pytest.importorskip("torchmetrics")

from fastgist.train.config import FinetuneConfig, UserError
from fastgist.train.finetune import finetune
from fastgist.train.metrics import METRICS, Metrics, parse_metrics
from fastgist.train.tracking import check_trackers


class Alone:
    num_processes = 1


def predictions(count: int = 101, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    labels = torch.randint(classes - 1, (count,))  # one class has no image
    return torch.randn(count, classes) + nn.functional.one_hot(labels, classes), labels


def test_metrics_are_scikit_learns() -> None:
    from sklearn import metrics as theirs

    logits, labels = predictions()
    chosen, probabilities = logits.argmax(-1).numpy(), logits.softmax(-1).double().numpy()
    y, every = labels.numpy(), range(7)
    found = Metrics(list(METRICS), 7).of(logits, labels, Alone())
    average = {"average": "macro", "zero_division": 0}
    expected = {
        "top5": theirs.top_k_accuracy_score(y, probabilities, k=5, labels=every),
        # a class that is neither there nor predicted is not averaged over; one that is predicted alone counts as 0
        "macro_f1": theirs.f1_score(y, chosen, **average),
        "macro_precision": theirs.precision_score(y, chosen, **average),
        "macro_recall": theirs.recall_score(y, chosen, labels=sorted({*y, *chosen}), **average),
        "kappa": theirs.cohen_kappa_score(y, chosen),
        "mcc": theirs.matthews_corrcoef(y, chosen),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    bins = (probabilities.max(1) * 15).astype(int).clip(max=14)
    gaps = [
        abs((chosen == y)[bins == b].mean() - probabilities.max(1)[bins == b].mean()) * (bins == b).mean()
        for b in {*bins}
    ]
    assert found["ece"] == pytest.approx(sum(gaps), abs=1e-5)


def test_a_second_evaluation_forgets_the_first() -> None:
    logits, labels = predictions()
    metrics = Metrics(["macro-f1", "ece"], 7)
    first = metrics.of(logits, labels, Alone())
    assert metrics.of(logits[:9], labels[:9], Alone()) != first
    assert metrics.of(logits, labels, Alone()) == first


@pytest.mark.parametrize("mine", [0, 40, 101])
def test_processes_count_every_image_once(mine: int) -> None:
    """Rows of two processes, of which one may have none: as all rows in one."""
    logits, labels = predictions()

    class Pair:
        num_processes, device = 2, torch.device("cpu")

        def pad_across_processes(self, tensor: torch.Tensor, dim: int, pad_index: int) -> torch.Tensor:
            size = max(mine, 101 - mine)
            filler = torch.full((size - len(tensor), *tensor.shape[1:]), pad_index).to(tensor)
            return torch.cat([tensor, filler])

        def gather(self, tensor: torch.Tensor) -> torch.Tensor:
            other = labels[mine:] if tensor.dim() == 1 else logits[mine:]
            return torch.cat([tensor, self.pad_across_processes(other, 0, -1)])

    empty = torch.zeros(0, 0)
    metrics = Metrics(["macro-f1", "top5"], 7)
    found = metrics.of(logits[:mine] if mine else empty, labels[:mine], Pair())
    assert found == metrics.of(logits, labels, Alone())


def test_metric_names() -> None:
    assert parse_metrics("accuracy") == [] and parse_metrics("macro-f1, ece,accuracy,ece") == ["macro-f1", "ece"]
    with pytest.raises(UserError, match="no metric is called 'f1'; there are accuracy, top5, macro-f1"):
        parse_metrics("f1")
    with pytest.raises(UserError, match="--metrics top5: there are only 3 classes"):
        Metrics(["top5"], 3)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(UserError, match=r"needs torchmetrics: pip install 'fastgist\[train\]'"):
        parse_metrics("macro-f1")
    assert parse_metrics("accuracy") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, install in (("tensorboard", r"'fastgist\[tensorboard\]'"), ("wandb", "wandb"), ("trackio", "trackio")):
        with pytest.raises(UserError, match=f"--report-to {name} needs the package {name}: pip install {install}"):
            check_trackers(name)


def test_tracker_names() -> None:
    assert check_trackers("none") == []
    for words in ("mlflow", "none,tensorboard", ""):
        with pytest.raises(UserError, match="no tracker is called .*; there are tensorboard, wandb, trackio"):
            check_trackers(words)


# -- a whole run -----------------------------------------------------------------------------------------------------


def _events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "fastgist")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_what_the_journal_holds(digits: Path, tmp_path: Path) -> None:
    """Written, and read back by TensorBoard's own reader; a resumed run replaces what came after its checkpoint."""
    pytest.importorskip("tensorboard")
    run = config(digits, tmp_path / "out", metrics="macro-f1", report_to="tensorboard", checkpoint_every=6)
    summary = finetune(run, say=lambda line: None)
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = _events(tmp_path / "out")
    for name in ("train_loss", "val_accuracy", "val_loss", "val_macro_f1", "lr"):
        steps, values = zip(*found[name], strict=True)
        assert list(steps) == [3, 6, 9]
        assert values == pytest.approx([record[name] for record in records], rel=1e-6), name
    assert found["test_accuracy"] == [(9, pytest.approx(summary["test_accuracy"]))]
    assert found["test_macro_f1"] == [(9, pytest.approx(summary["test_macro_f1"], rel=1e-6))]
    best = records[summary["selected_epoch"] - 1]
    assert summary["val_macro_f1"] == best["val_macro_f1"] and summary["val_loss"] == best["val_loss"]
    last = tmp_path / "out" / "checkpoints" / "step-00000009.safetensors"
    last.unlink()
    finetune(FinetuneConfig(**{**run.__dict__, "resume": True}), say=lambda line: None)  # goes on after step 6
    again = _events(tmp_path / "out")
    assert [step for step, _ in again["train_loss"]] == [3, 6, 9] and again == found


def test_what_was_not_asked_for_is_not_imported(digits: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['tensorboard', 'wandb', 'trackio', 'torchmetrics', 'onnx']))\n"
        "from pathlib import Path\nfrom fastgist.train.config import FinetuneConfig\n"
        "from fastgist.train.finetune import finetune\n"
        "finetune(FinetuneConfig(data=sys.argv[1], output_dir=Path(sys.argv[2]), model='test_vit', pretrained=False, "
        "image_size=32, epochs=1, batch_size=8, workers=0, device='cpu', progress=False))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(digits), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "val_accuracy" in (tmp_path / "out" / "metrics.jsonl").read_text()
