"""Exported models: the file gives the model's numbers without fastgist, and does not appear if it does not."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from images import write_digits
from pairs import MERGED, TIMM_BACKBONES, attempt, beit, example, swin
from vits import images, stir, vit

import fastgist as fg
from fastgist.testing import assert_within_budget
from fastgist.train import export as module
from fastgist.train.export import METADATA, as_plain_module, export_model, export_program

pytest.importorskip("timm")

SHAPE = (3, 16, 16)
CONFIGS = {
    "lora": fg.LoraConfig(rank=2, targets=("q", "v", "fc1")),
    "cp": fg.CPConfig(rank=3),
    "ssf": fg.SSFConfig(),
    "bitfit": fg.BitFitConfig(),
    "adapter": fg.AdapterConfig(bottleneck_dim=3, placement="shared", scale=0.7),
    "normed adapter": fg.AdapterConfig(bottleneck_dim=3, placement="adaptformer", norm=True, dropout=0.1),
    "prefix": fg.PrefixConfig(length=2),
    "fact": fg.FacTConfig(rank=3),
    "prompts": fg.PromptConfig(length=2, deep=True),
    "linear probe": fg.LinearProbeConfig(),
    "full": fg.FullConfig(),
}
MERGING = ("lora", "cp", "ssf", "bitfit", "fact")


def adapted(name: str, gist: bool = True):
    torch.manual_seed(1)
    model = fg.get_peft_model(vit(depth=1), CONFIGS[name])
    return stir(fg.add_gist(model) if gist else model)


def logits(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output["logits"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_copy_is_merged_where_it_can_be_and_the_model_left_alone(name: str) -> None:
    model = adapted(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain, merged = as_plain_module(model)
    assert merged == (name in MERGING) and model.training and not plain.training
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    kinds = {type(layer).__name__ for layer in plain.modules()}
    assert not kinds & {"LoRALinear", "CPLinear", "ScaleShift", "BiasShift"}
    assert "GistInsert" in kinds and ("Adapter" in kinds) == name.endswith("adapter")
    x = images(5)
    with torch.no_grad():
        eager = model.eval()
        exact = logits(copy.deepcopy(eager).double()(x.double()))
        assert_within_budget(plain(x), logits(eager(x)), exact, what=name)


def test_a_merged_or_unwrapped_model_is_exported_as_it_is() -> None:
    model = fg.merge(adapted("lora", gist=False))
    plain, merged = as_plain_module(model)
    x = images(2)
    assert merged and torch.equal(plain(x), model.eval()(x))
    fg.unmerge(model)  # the copy was another model
    plain, merged = as_plain_module(vit(depth=1))
    assert not merged and plain(x).shape == (2, 5)


def test_the_graph_holds_no_operator_of_ours_and_any_batch() -> None:
    model = adapted("adapter")
    for unmerged in (model, adapted("cp", gist=False)):
        wrapped = module._Logits(unmerged).eval()
        program = export_program(wrapped, images(2))
        assert not [n for n in program.graph.nodes if "fastgist" in str(n.target)]
        for count in (1, 3):
            x = images(count)
            with torch.no_grad():
                torch.testing.assert_close(program.module()(x), wrapped(x))


def test_an_operator_without_a_plain_expression_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_plain_expressions", dict)
    with pytest.raises(RuntimeError, match=r"fastgist\.adapter_fwd\.default has no plain expression"):
        export_program(module._Logits(adapted("adapter")).eval(), images(2))


def test_a_program_runs_where_fastgist_is_not(tmp_path: Path) -> None:
    """Loaded in a process that cannot import fastgist or timm: the same logits, with a merged update and without."""
    models = {name: adapted(name).train() for name in ("lora", "adapter")}
    x = images(3)
    torch.save(x, tmp_path / "x.pt")
    for name, model in models.items():
        (tmp_path / name).mkdir()
        done = export_model(model, tmp_path / name / "model.pt2", SHAPE, metadata={"classes": ["a", "b"]})
        assert done.merged == (name == "lora") and done.difference <= done.allowed and model.training
        assert [p.name for p in (tmp_path / name).iterdir()] == ["model.pt2"]
    code = (
        "import sys, torch\n"
        "sys.modules.update(dict.fromkeys(['fastgist', 'fastgist_kernels', 'timm', 'transformers']))\n"
        "x = torch.load('x.pt', weights_only=True)\n"
        "for name in ('lora', 'adapter'):\n"
        f"    extra = {{{METADATA!r}: ''}}\n"
        "    program = torch.export.load(f'{name}/model.pt2', extra_files=extra)\n"
        "    with torch.no_grad(): torch.save(program.module()(x), f'{name}/y.pt')\n"
        f"    print(extra[{METADATA!r}])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for (name, model), line in zip(models.items(), ran.stdout.splitlines(), strict=True):
        about = json.loads(line)
        assert about["classes"] == ["a", "b"] and about["merged"] is (name == "lora")
        with torch.no_grad():
            found = torch.load(tmp_path / name / "y.pt", weights_only=True)
            torch.testing.assert_close(found, logits(model.eval()(x)))


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        ("ViT", "FacT-TT"),
        ("ViT", "full"),
        ("DINOv2, registers", "linear probe"),
        ("BEiT", "SSF"),  # q, k and v's biases apart
        ("EVA-02", "VPT, deep"),
        ("Swin V2", "FacT-TK"),
    ],
)
def test_other_backbones_and_methods(backbone: str, method: str, tmp_path: Path) -> None:
    model = stir(attempt(TIMM_BACKBONES[backbone], method))
    done = export_model(model, tmp_path / "model.pt2", example(model)[0].shape)
    assert done.merged == (method in MERGED) and done.difference <= done.allowed
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = example(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(program(x), logits(model.eval()(x)))


@pytest.mark.parametrize("name", ["cp", "adapter"])
def test_onnx_gives_the_models_logits_for_any_batch(name: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnx
    import onnxruntime

    model = adapted(name)
    done = export_model(model, tmp_path / "model.onnx", images(2), metadata={"classes": ["a"]})
    assert done.format == "onnx" and [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    held = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(held[METADATA])["classes"] == ["a"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 4):
        x = images(count)
        (found,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), logits(model.eval()(x)), rtol=1e-5, atol=1e-5)


#: One stage of Swin, plain and shifted; blocks of the others are alike.
SMALL = {
    "Swin": lambda: swin(depths=(2,), num_heads=(2,)),
    "BEiT": lambda: beit(depth=1),
    "EVA-02": lambda: TIMM_BACKBONES["EVA-02"](depth=1),
}


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "method"), [("Swin", "BitFit"), ("BEiT", "VPT"), ("EVA-02", "prefix")])
def test_onnx_of_other_backbones(backbone: str, method: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model = stir(attempt(SMALL[backbone], method)).eval()
    done = export_model(model, tmp_path / "model.onnx", example(model)[0].shape)
    assert done.merged == (method in MERGED) and done.difference <= done.allowed
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = example(model, 3)
    (found,) = session.run(None, {"images": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), logits(model(x)), rtol=1e-5, atol=1e-5)


def test_a_file_that_differs_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight off by a thousandth: the error tells the difference, the old file stays."""
    model, target = adapted("lora"), tmp_path / "model.pt2"
    target.write_bytes(b"old")
    original = module.as_plain_module

    def wrong(model):
        plain, merged = original(model)
        with torch.no_grad():
            plain.model.model.head.bias[0] += 1e-3
        return plain, merged

    monkeypatch.setattr(module, "as_plain_module", wrong)
    with pytest.raises(
        RuntimeError, match=r"largest difference is (1\.0\d*e-03|9\.9\d*e-04) for a batch of 1, where rounding"
    ):
        export_model(model, target, SHAPE)
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_wrong_arguments_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit(depth=1)
    with pytest.raises(ValueError, match=r"format must be one of torch \(\.pt2\), onnx \(\.onnx\), got '\.pth'"):
        export_model(model, tmp_path / "model.pth", SHAPE)
    with pytest.raises(ValueError, match=r"at least two images .* got \(1, 3, 16, 16\)"):
        export_model(model, tmp_path / "model.pt2", images(1))
    if importlib.util.find_spec("onnxruntime"):
        monkeypatch.setattr(module, "ONNX_BYTES", 1000)
        with pytest.raises(ValueError, match="GiB of weights do not fit one ONNX file: take format 'torch'"):
            export_model(model, tmp_path / "model.onnx", SHAPE)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match="onnxscript"):
        export_model(model, tmp_path / "model.onnx", SHAPE)
    assert not list(tmp_path.iterdir())


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of finetune, from random weights of seed 3."""
    for package in ("accelerate", "sklearn", "typer"):
        pytest.importorskip(package)
    from fastgist.train.config import FinetuneConfig
    from fastgist.train.finetune import finetune

    root = tmp_path_factory.mktemp("export")
    settings = FinetuneConfig(
        data=str(write_digits(root / "digits")), output_dir=root / "run", model="test_vit", pretrained=False, seed=3,
        image_size=32, epochs=1, batch_size=8, workers=0, device="cpu", progress=False, lr=0.01,
    )  # fmt: skip
    finetune(settings, say=lambda line: None)
    return root / "run"


def invoke(*arguments: object):
    from typer.testing import CliRunner

    from fastgist import cli

    return CliRunner().invoke(cli.build_app(), ["export", *map(str, arguments)], env={"COLUMNS": "200"})


def test_a_run_is_exported_from_its_folder_alone(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    result = invoke(run)
    assert result.exit_code == 0 and "largest difference to the model" in result.stdout, result.output
    extra = {METADATA: ""}
    program = torch.export.load(run / "model.pt2", extra_files=extra)
    about = json.loads(extra[METADATA])
    assert about["classes"] == ["digit0", "digit1", "digit2"] and about["input_size"] == [3, 32, 32]
    assert len(about["mean"]) == 3 and about["merged"] is False
    import timm

    from fastgist.train.data import load_splits
    from fastgist.train.finetune import _set_transforms

    settings = _config(run)
    splits = load_splits(settings)
    _set_transforms(splits, timm.create_model("test_vit", img_size=32), settings)
    batch, labels = zip(*(splits.test[i] for i in range(len(splits.test))), strict=True)
    with torch.no_grad():
        right = program.module()(torch.stack(batch)).argmax(-1) == torch.tensor(labels)
    assert float(right.double().mean()) == pytest.approx(summary["test_accuracy"])
    again = invoke(run / "adapter")
    assert again.exit_code == 2 and "model.pt2 is there already: pass --overwrite" in again.stderr


def _config(run: Path):
    from fastgist.train.config import FinetuneConfig

    held = json.loads((run / "config.json").read_text())
    return FinetuneConfig(data=held["data"], image_size=32, workers=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "vit_tiny_patch16_224", "--no-pretrained"], "does not fit the model"),
        (["--checkpoint", "absent.safetensors"], "no such file: absent.safetensors"),
        (["--output", "nowhere/model.pt2"], "no such folder as nowhere"),
        (["--model", "vit_tinny"], "timm has no model named 'vit_tinny'"),
    ],
)
def test_what_cannot_be_exported_is_one_line(run: Path, flags: list[str], message: str, tmp_path: Path) -> None:
    output = [] if "--output" in flags else ["--output", tmp_path / "model.pt2"]
    result = invoke(run, *flags, *output)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_other_frozen_weights_and_folders_without_an_adapter_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    output = ["--output", tmp_path / "model.pt2"]
    result = invoke(tmp_path / "adapter", *output)
    assert result.exit_code == 2 and "is not a run's: name its --model" in result.stderr
    result = invoke(tmp_path, "--model", "test_vit", "--no-pretrained", "--image-size", 32, *output)
    assert result.exit_code == 2 and "trained on other frozen weights" in result.stderr  # seed 0's, not seed 3's
    result = invoke(tmp_path / "elsewhere", *output)
    assert result.exit_code == 2 and "no adapter_model.safetensors in" in result.stderr
    (tmp_path / "sweep" / "seed-1" / "adapter").mkdir(parents=True)
    result = invoke(tmp_path / "sweep", *output)
    assert result.exit_code == 2 and "it holds seed-1: export one of them" in " ".join(result.stderr.split())
    assert not (tmp_path / "model.pt2").exists()
