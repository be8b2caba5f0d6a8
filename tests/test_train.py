"""fastgist finetune: data, the loop, resuming, several processes, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from images import write_digits

from fastgist.train.config import FinetuneConfig, Method, MixedPrecision, UserError
from fastgist.train.data import Draw, EpochBatches, derive_seed

pytest.importorskip("timm")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from fastgist.train import finetune as run
from fastgist.train.finetune import finetune


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def config(data: Path | str, output_dir: Path, **changes: object) -> FinetuneConfig:
    """A run of a second or two."""
    base = FinetuneConfig(
        data=str(data), output_dir=output_dir, model="test_vit", pretrained=False, image_size=32, epochs=3,
        batch_size=8, workers=0, device="cpu", progress=False, lr=0.01,
    )  # fmt: skip
    return replace(base, **changes)


def quiet(settings: FinetuneConfig) -> dict:
    return finetune(settings, say=lambda line: None)


# -- order and seeds -------------------------------------------------------------------------------------------------


def test_processes_share_out_every_batch() -> None:
    alone = EpochBatches(22, 8, seed=3)
    pair = [EpochBatches(22, 4, seed=3, rank=rank, world=2) for rank in range(2)]
    for epoch in range(3):
        for sampler in (alone, *pair):
            sampler.seek(epoch, 0)
        whole = list(alone)
        assert len(whole) == 2 and all(len(batch) == 8 for batch in whole)
        halves = [list(sampler) for sampler in pair]
        for batch, one, other in zip(whole, *halves, strict=True):
            assert sorted(batch) == sorted(one + other) and len(one) == len(other) == 4
    seen = [draw.row for batch in whole for draw in batch]
    assert len(set(seen)) == len(seen) == 16


def test_any_position_of_an_epoch_can_be_taken_up() -> None:
    sampler = EpochBatches(40, 4, seed=0)
    sampler.seek(5, 0)
    whole = list(sampler)
    sampler.seek(5, 7)
    assert list(sampler) == whole[7:]
    sampler.seek(6, 0)
    assert list(sampler) != whole


@pytest.mark.parametrize(("size", "world"), [(1, 4), (3, 2), (5, 8), (7, 8)])
def test_too_few_images_for_a_batch_still_give_equal_shares(size: int, world: int) -> None:
    batches = [list(EpochBatches(size, 8, seed=0, rank=rank, world=world)) for rank in range(world)]
    assert {len(b) for b in batches} == {1}
    assert len({len(b[0]) for b in batches}) == 1
    assert {draw.row for b in batches for draw in b[0]} == set(range(size))


def test_derived_seeds_do_not_collide() -> None:
    seeds = {derive_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3


# -- whole runs ------------------------------------------------------------------------------------------------------


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


# -- resuming --------------------------------------------------------------------------------------------------------


def _same(one: Path, other: Path) -> None:
    """Two safetensors files hold the same bits and the same metadata (whose order in the file is random)."""
    import safetensors

    with safetensors.safe_open(one, "pt") as mine, safetensors.safe_open(other, "pt") as theirs:
        assert mine.metadata() == theirs.metadata()  # with the SHA-256 of the tensors
        assert sorted(mine.keys()) == sorted(theirs.keys())
        for name in mine.keys():
            assert torch.equal(mine.get_tensor(name), theirs.get_tensor(name)), name


def _adapter(folder: Path) -> Path:
    return folder / "adapter" / "adapter_model.safetensors"


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
    _same(_adapter(out), _adapter(whole))
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    last = sorted((whole / "checkpoints").iterdir())[-1]
    _same(out / "checkpoints" / last.name, last)  # the last weights, the best, the optimiser, all numbers


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


def test_sixteen_bits_orientation_and_unknown_ranges(tmp_path: Path) -> None:
    """Pillow alone clips 16 bits to white and ignores the camera's orientation."""
    import numpy as np
    from PIL import Image

    from fastgist.train.data import to_rgb

    ramp = np.arange(256, dtype=np.uint16)[None].repeat(4, 0) * 257
    Image.fromarray(ramp).save(tmp_path / "16.png")
    with Image.open(tmp_path / "16.png") as picture:
        assert np.array_equal(np.asarray(to_rgb(picture))[:, :, 1], ramp >> 8)
    turned = Image.new("RGB", (60, 40))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as picture:
        assert to_rgb(picture).size == (40, 60)
    with pytest.raises(ValueError, match="floating-point pixels"):
        to_rgb(Image.fromarray(np.zeros((2, 2), np.float32)))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


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
    _same(_adapter(settings.output_dir), _adapter(uninterrupted.output_dir))


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
    _same(_adapter(settings.output_dir), _adapter(uninterrupted.output_dir))


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


# -- several processes -----------------------------------------------------------------------------------------------

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


# -- data sets -------------------------------------------------------------------------------------------------------


def _table(digits: Path, split: str, names: bool = False):
    import datasets

    paths = sorted((digits / split).glob("*/*.png"))
    labels: list = [p.parent.name for p in paths]
    if not names:
        labels = [int(label.removeprefix("digit")) for label in labels]
    label = datasets.Value("string") if names else datasets.ClassLabel(names=["zero", "one", "two"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    data = {"image": [{"bytes": p.read_bytes(), "path": None} for p in paths], "label": labels}
    return datasets.Dataset.from_dict(data, features=features)


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.mark.usefixtures("datasets_cache")
def test_a_folder_of_parquet_files_is_loaded_as_a_data_set(digits: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / "data" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        _table(digits, split).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    summary = quiet(config(tmp_path / "data", tmp_path / "out", epochs=1))
    assert summary["classes"] == ["zero", "one", "two"]
    assert summary["images"] == {"train": 18, "val": 6, "test": 12}


@pytest.mark.usefixtures("datasets_cache")
def test_a_saved_data_set_with_names_for_labels_and_a_bad_image(digits: Path, tmp_path: Path) -> None:
    import datasets

    table = _table(digits, "train", names=True)
    bad = table.cast_column("image", datasets.Image(decode=False)).to_dict()
    bad["image"][5]["bytes"] = bad["image"][5]["bytes"][:60]
    tables = datasets.DatasetDict(train=datasets.Dataset.from_dict(bad, features=table.features))
    tables.save_to_disk(str(tmp_path / "data"))
    settings = config(tmp_path / "data", tmp_path / "out", epochs=1)
    with pytest.raises(UserError, match=r"cannot read image train\[5\]"):
        quiet(settings)
    assert not settings.output_dir.exists()
    summary = quiet(replace(settings, skip_unreadable=True))
    assert summary["classes"] == ["digit0", "digit1", "digit2"] and summary["images"] == {"train": 18, "val": 5}
    with pytest.raises(UserError, match=r"no column 'picture' \(it has image, label\)"):
        quiet(replace(settings, image_column="picture", output_dir=tmp_path / "other"))


@pytest.mark.usefixtures("datasets_cache")
def test_a_data_set_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def absent(name: str, subset: str | None) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        UserError, match="digitz is no folder here and could not be loaded as a data set: .* on the Hub"
    ):
        quiet(config("digitz", tmp_path / "out"))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_: datasets.DatasetDict(test=datasets.Dataset.from_dict({"a": [1]}))
    )
    with pytest.raises(UserError, match=r"data set digitz has no train split \(it has test\)"):
        quiet(config("digitz", tmp_path / "out"))


# -- what is wrong, in one line --------------------------------------------------------------------------------------


def _break(data: Path, how: str) -> None:
    """Damage a copy of the digits."""
    if how == "no train":
        shutil.rmtree(data / "train")
    elif how == "no classes":
        for split in ("train", "val", "test"):
            shutil.rmtree(data / split)
    elif how == "one class":
        for c in (1, 2):
            shutil.rmtree(data / "train" / f"digit{c}")
    elif how == "empty class":
        for path in (data / "train" / "digit1").iterdir():
            path.rename(path.with_suffix(".txt"))
    elif how == "other classes":
        (data / "val" / "digit1").rename(data / "val" / "digitl")
    elif how == "too few":
        shutil.rmtree(data / "val")
        for path in sorted((data / "train" / "digit2").iterdir())[1:]:
            path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no train", r"has test/ but no train/ folder|has val/ but no train/ folder"),
        ("no classes", r"holds no train/ folder and no class folders"),
        ("one class", r"at least two class folders are needed in .*train, found only 'digit0'"),
        ("empty class", r"no images in class folder .*train/digit1 \(looked for \.jpg"),
        ("other classes", r"val has class 'digitl' that .*train does not have \(3 classes: digit0, digit1, digit2\)"),
        ("too few", r"too few images: class 'digit2' has 1 and one must be held out"),
    ],
)
def test_a_wrong_layout_is_named(digits: Path, tmp_path: Path, how: str, message: str) -> None:
    shutil.copytree(digits, tmp_path / "data")
    _break(tmp_path / "data", how)
    with pytest.raises(UserError, match=message):
        quiet(config(tmp_path / "data", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_unreadable_images_are_named_before_training_and_can_be_skipped(digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_digits(data, suffix=".jpg")
    broken = sorted((data / "train" / "digit1").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:-200])  # a truncated JPEG still opens and verifies
    settings = config(data, tmp_path / "out", epochs=1)
    with pytest.raises(UserError, match=f"cannot read image {broken} .*--skip-unreadable"):
        quiet(settings)
    (data / "test" / "digit0" / "words.png").write_text("no picture")
    with pytest.raises(UserError, match="2 images cannot be read, the first is"):
        quiet(settings)
    assert not settings.output_dir.exists()
    lines: list[str] = []
    summary = finetune(replace(settings, skip_unreadable=True), say=lines.append)
    assert summary["images"] == {"train": 23, "val": 12, "test": 12}
    assert any("left out 2 unreadable images" in line for line in lines)
    for path in (data / "train" / "digit1").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no readable training image of class 'digit1'"):
        quiet(replace(settings, skip_unreadable=True, output_dir=tmp_path / "other"))
    with pytest.raises(RuntimeError, match=f"cannot read image {data / 'train' / 'digit1'}"):
        quiet(replace(settings, verify=False, output_dir=tmp_path / "unverified"))


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


# -- the loop --------------------------------------------------------------------------------------------------------


def _tiny(**changes: object):
    from accelerate import Accelerator

    from fastgist.recipes import Recipe
    from fastgist.train.digits import Digits

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(64, 5))
    return model, Digits.load().old_train, replace(Recipe(epochs=2, lr=0.01), **changes), Accelerator(cpu=True)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    from fastgist.train.engine import fit

    model, data, recipe, accelerator = _tiny()
    with pytest.raises(RuntimeError, match="the loss became nan in epoch 1"):
        fit(model, data, recipe, accelerator, objective=lambda out, y: out.sum() * float("nan"), progress=False)


def test_the_learning_rate_warms_up_from_the_recipes_first_value_and_ends_at_its_last() -> None:
    from fastgist.train.digits import DigitImages
    from fastgist.train.engine import fit

    model, data, recipe, accelerator = _tiny(epochs=10, min_lr=1e-5)
    rates: list[float] = []
    fit(model, data, recipe, accelerator, on_epoch=lambda record: rates.append(record["lr"]), progress=False)
    assert max(rates) == pytest.approx(0.01, rel=0.05) and rates.index(max(rates)) <= 1
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5, rel=0.1)
    model, data, recipe, accelerator = _tiny(epochs=1, warmup_epochs=0.9, lr=1.0, warmup_lr=1e-7)
    before = model[2].weight.detach().clone()
    fit(model, DigitImages(data.images[:32], data.labels[:32]), recipe, accelerator, progress=False)  # one step
    assert float((model[2].weight - before).detach().abs().max()) == pytest.approx(
        1e-7, rel=0.3
    )  # AdamW's first step is the rate


def test_the_memory_of_a_step_is_at_least_what_it_must_allocate() -> None:
    from fastgist.train.measure import StepMemory

    model = torch.nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = StepMemory(torch.device("cpu"))
    with memory.measure(model, optimizer):
        loss = model(torch.randn(128, 256)).sum()
        loss.backward()
        optimizer.step()
    weight, activation = 4 * 256 * 256, 4 * 128 * 256
    least = 2 * weight + 2 * activation  # parameters, gradient, input, output
    assert memory.peak_bytes is not None and least <= memory.peak_bytes <= least + 2 * weight


def test_draws_are_what_loaders_ask_for() -> None:
    _, data, _, _ = _tiny()
    image, label = data[Draw(3, 1)]
    assert image.shape == (1, 8, 8) and label == data.labels[3]
