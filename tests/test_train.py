"""fastgist finetune: whole runs, several processes, and what it says of wrong settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from images import write_digits
from runs import adapter_file, config, falling, quiet

from fastgist.train import finetune as run
from fastgist.train.config import Method, MixedPrecision, UserError
from fastgist.train.finetune import finetune

# -- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_says(digits: Path, tmp_path: Path) -> None:
    from fastgist import load_adapter
    from fastgist.train.data import load_splits
    from fastgist.train.engine import predict
    from fastgist.train.models import build_backbone

    settings = config(digits, tmp_path / "out", bottleneck_dim=4)
    lines: list[str] = []
    summary = finetune(settings, say=lines.append)
    out = settings.output_dir
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert [r["step"] for r in records] == [3, 6, 9]
    best = max(records, key=lambda r: (r["val_accuracy"], -r["val_loss"]))
    assert summary["val_accuracy"] == best["val_accuracy"] and summary["selected_epoch"] == best["epoch"]
    assert summary["selected_by"] == "val accuracy" and summary["classes"] == ["digit0", "digit1", "digit2"]
    assert summary["images"] == {"train": 24, "val": 12, "test": 12}
    assert 0 < summary["trained_parameters"] < summary["all_parameters"]
    assert summary["peak_memory_bytes"] > 4 * summary["all_parameters"] and summary["images_per_second"] > 0
    assert json.loads((out / "summary.json").read_text())["test_accuracy"] == summary["test_accuracy"]
    assert any("adapter + GIST" in line and "parameters trained" in line for line in lines)

    run.images.seed_everything(settings.seed)  # the same random backbone; a new head, adapter and gist token follow
    model = load_adapter(build_backbone(settings, 3), out / "adapter")
    splits = load_splits(settings)
    run._set_transforms(splits, model, settings)
    logits, labels = predict(model, splits.test, 8, torch.device("cpu"))
    assert float((logits.argmax(-1) == labels).double().mean()) == pytest.approx(summary["test_accuracy"])


def test_the_selected_epochs_weights_are_what_is_saved(digits: Path, tmp_path: Path, monkeypatch) -> None:
    """With a score that falls from epoch to epoch: the first epoch's, not the last's, and the test is judged by them."""
    from safetensors.torch import load_file

    from fastgist.train.engine import trained_tensors

    judged, tested = falling(monkeypatch), []
    original = run.evaluate

    def at_the_end(model, *args):
        tested.append({name: t.detach().clone() for name, t in trained_tensors(model).items()})
        return original(model, *args)

    monkeypatch.setattr(run, "evaluate", at_the_end)
    settings = config(digits, tmp_path / "out", method=Method.LORA, rank=2)
    summary = quiet(settings)
    assert len(judged) == 3 and summary["selected_epoch"] == 1 and summary["val_accuracy"] == 1.0
    (weights,) = tested
    first, last = judged[0], judged[-1]
    assert len(first) > 3 and weights.keys() == first.keys()
    assert all(torch.equal(weights[name], t) for name, t in first.items())
    saved = list(load_file(adapter_file(settings.output_dir)).values())

    def among(tensor: torch.Tensor) -> bool:
        return any(tensor.shape == other.shape and torch.equal(tensor, other) for other in saved)

    assert all(map(among, first.values())) and not any(map(among, last.values()))


@pytest.mark.parametrize(
    ("method", "gist", "changes"),
    [(Method.LINEAR_PROBE, False, {}), (Method.LORA, True, {"rank": 2}), (Method.CP, False, {"rank": 4})],
)
def test_every_method_runs(digits: Path, tmp_path: Path, method: Method, gist: bool, changes: dict) -> None:
    summary = quiet(config(digits, tmp_path / "out", method=method, gist=gist, epochs=1, **changes))
    assert summary["method"] == method.value and summary["steps"] == 3


def test_a_single_folder_is_split_and_test_images_choose_nothing(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data", {"": 10})
    lines: list[str] = []
    summary = finetune(config(data, tmp_path / "out", epochs=1), say=lines.append)
    assert summary["images"] == {"train": 24, "val": 6} and "test_accuracy" not in summary
    assert any("held out" in line for line in lines)
    summary = quiet(config(data, tmp_path / "none", epochs=2, val_split=0.0))
    assert summary["images"] == {"train": 30} and summary["selected_by"] == "last epoch"
    assert summary["val_accuracy"] is None and summary["selected_epoch"] == 2


def test_half_precision(digits: Path, tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps one precision a process
    try:
        summary = quiet(config(digits, tmp_path / "out", epochs=1, mixed_precision=MixedPrecision.BF16))
        assert summary["mixed_precision"] == "bf16"
        with pytest.raises(UserError, match="accelerate refuses these settings"):
            quiet(config(digits, tmp_path / "other", mixed_precision=MixedPrecision.NO))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("method", Method)
def test_every_method_from_the_command_line(method: Method, digits: Path, tmp_path: Path) -> None:
    settings = {
        Method.ADAPTER: ["placement=shared", "scale=0.1", "init=paper"],
        Method.LORA: ["targets=q,fc1", "alpha=4"],
        Method.PROMPT: ["deep=true", "length=2"],
    }
    summary = quiet(config(digits, tmp_path / "out", method=method, epochs=1, set=settings.get(method, [])))
    assert summary["method"] == method.value and 0 <= summary["test_accuracy"] <= 1
    saved = json.loads((tmp_path / "out" / "adapter" / "fastgist_config.json").read_text())["adapter"]
    assert saved["method"] == method.value.replace("-", "_")
    if method is Method.ADAPTER:
        assert (saved["placement"], saved["scale"], saved["init"]) == ("shared", 0.1, "paper")
    if method is Method.LORA:
        assert (saved["targets"], saved["alpha"]) == (["q", "fc1"], 4)
    if method is Method.PROMPT:
        assert (saved["deep"], saved["length"]) == (True, 2)


# -- several processes ------------------------------------------------------------------------------------------------

FLAGS = "--model test_vit --no-pretrained --image-size 32 --workers 0 --no-progress --lr 0.01".split()


def _process(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.slow
def test_two_processes_do_what_one_does(digits: Path, tmp_path: Path) -> None:
    """The same global batches without dropout and augmentation: the same weights, up to the order of sums; the same
    metrics, of an odd number of val images."""
    from safetensors.torch import load_file

    pytest.importorskip("torchmetrics")
    digits = Path(shutil.copytree(digits, tmp_path / "digits"))
    next((digits / "val" / "digit1").iterdir()).unlink()
    plain = {"method": Method.ADAPTER, "gist": False, "augment": False, "drop_path": 0.0, "epochs": 2}
    plain["metrics"] = "macro-f1,ece"
    quiet(config(digits, tmp_path / "one", **plain))
    flags = [
        "--method",
        "adapter",
        "--no-gist",
        "--no-augment",
        "--drop-path",
        "0",
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--metrics",
        "macro-f1,ece",
    ]
    # --multi_gpu is how accelerate starts several processes on one machine; --device cpu makes them talk through gloo.
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [
        sys.executable,
        "-m",
        *launch.split(),
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "fastgist",
    ]
    flags += ["--device", "cpu", "--output-dir", str(tmp_path / "two")]
    done = _process([*command, "finetune", str(digits), *FLAGS, *flags])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter saved") == 1
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    journals = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert "val_macro_f1" in journals[0][0]
    for mine, theirs in zip(*journals, strict=True):
        assert json.loads(mine) == pytest.approx(json.loads(theirs), rel=1e-3)


# -- what is wrong, in one line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": float("inf")}, "--alpha must be finite, got inf"),
        ({"model": "resnet18"}, r"resnet18 is a ResNet: only timm's Vision Transformers"),
        ({"model": "vit_bse_patch16_224"}, r"no model named 'vit_bse_patch16_224': did you mean vit_base_patch16_224"),
        ({"model": "resnet18"}, "resnet|ResNet"),
        ({"checkpoint": Path("nowhere.safetensors")}, "no such file: nowhere.safetensors"),
        ({"epochs": 2, "warmup_epochs": 2.0}, "--warmup-epochs 2 must be less than --epochs 2"),
        ({"rank": 3}, "--rank is for lora, cp and fact, not for adapter"),
        ({"method": Method.CP, "bottleneck_dim": 3}, "--bottleneck-dim is for adapter, not for cp"),
        ({"set": ["placement"]}, "--set placement: expected field=value; AdapterConfig has bottleneck_dim, placement,"),
        ({"set": ["scale=big"]}, "--set scale=big: 'big' is no float"),
        ({"set": ["placement=nowhere"]}, "placement must be one of pfeiffer, .*got 'nowhere'"),
        (
            {"method": Method.BITFIT, "set": ["rank=3"]},
            "--set rank=3: BitFitConfig has no .rank.; it has no settings",
        ),
        ({"temperature": float("nan")}, "--temperature must be finite"),
        ({"device": "cuda:99"}, "--device is cpu, cuda, mps"),
        ({"image_size": 33}, "test_vit does not take images of 3 x 33 x 33: "),
    ],
)
def test_wrong_settings_are_named(digits: Path, tmp_path: Path, changes: dict, message: str) -> None:
    changes = {"image_size": None if changes.get("model") == "resnet18" else 32} | changes
    with pytest.raises(UserError, match=message):
        quiet(config(digits, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_to_be_had_are_one_line_that_says_what_helps(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With HF_HUB_OFFLINE and an empty cache, at once."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    started = time.perf_counter()
    with pytest.raises(
        UserError, match=r"could not get pre-trained weights of vit_tiny_patch16_224: .*HF_HUB_OFFLINE=1"
    ):
        quiet(config(digits, tmp_path / "out", model="vit_tiny_patch16_224", pretrained=True, image_size=None))
    assert time.perf_counter() - started < 20  # huggingface_hub's own waits are 23 s a file
    assert not (tmp_path / "out").exists()


def test_starting_weights_come_from_safetensors_that_fit(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    from fastgist.train.models import load_weights

    source = timm.create_model("test_vit", img_size=32, num_classes=7)
    save_file(source.state_dict(), tmp_path / "good.safetensors")
    torch.save(source.state_dict(), tmp_path / "pickle.safetensors")
    partial = {k: v for k, v in source.state_dict().items() if "blocks.1.mlp" not in k}
    save_file(partial, tmp_path / "partial.safetensors")

    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    head = model.head.weight.clone()
    load_weights(model, tmp_path / "good.safetensors")
    assert torch.equal(model.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    assert torch.equal(model.head.weight, head)  # of other classes: stays as it was drawn
    load_weights(timm.create_model("test_vit", img_size=64, num_classes=3), tmp_path / "good.safetensors")  # resampled
    for name, message in (
        ("pickle", "is not a complete safetensors file"),
        ("partial", r"does not fit the model: it lacks blocks\.1\.mlp.* and \d more"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(model, tmp_path / f"{name}.safetensors")
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
