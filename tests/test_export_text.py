"""Exported text classifiers: batch and length are free, the file gives the model's numbers, a run is exported by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from hf_models import TRANSFORMERS_BACKBONES, example_inputs
from pairs import DECODER_BACKBONES, METHODS
from test_export import invoke
from texts import few, write_bert, write_csv
from vits import stir

import fastgist as fg
from fastgist.train.export import METADATA, as_plain_module, export_model
from fastgist.train.stdlib_text import StdlibText
from fastgist.train.text import build_classifier, collator, finetune_text, tokenize
from fastgist.train.text_config import PaddingSide, TextConfig
from fastgist.train.text_data import load_texts

BACKBONES = TRANSFORMERS_BACKBONES | DECODER_BACKBONES
ONNX = ("onnx", "onnxscript", "onnxruntime")


def adapted(name: str, method: str, gist: bool = True) -> nn.Module:
    torch.manual_seed(1)
    model = fg.get_peft_model(BACKBONES[name](), METHODS[method])
    return stir(fg.add_gist(model) if gist else model).eval()


def inputs(model: nn.Module, *sizes: int) -> dict[str, torch.Tensor]:
    return example_inputs(getattr(model, "model", model) if hasattr(model, "gist") else model, *sizes)


@pytest.mark.parametrize(
    ("name", "method", "merged"),
    [
        ("bert", "LoRA", True),
        ("roberta", "VPT, deep", False),
        ("distilbert", "full", False),
        ("deberta-v2", "FacT-TT", True),
        ("modernbert", "adapter, shared", False),
        ("t5-encoder", "SSF", False),  # a shift has no place in an RMS norm
        ("llama", "CP", True),
        ("gpt2", "LoRA", True),
        ("qwen3", "linear probe", False),
    ],
)
def test_any_batch_and_length(name: str, method: str, merged: bool, tmp_path: Path) -> None:
    model = adapted(name, method)
    done = export_model(model, tmp_path / "model.pt2", inputs(model))
    assert done.merged == merged and done.difference <= done.allowed
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch, length in ((1, 5), (4, 11), (3, 7)):
        given = inputs(model, batch, length)
        with torch.no_grad():
            torch.testing.assert_close(program(**given), model(**given)["logits"])


@pytest.mark.parametrize(
    ("name", "method"), [("bert", "LoRA"), ("t5-encoder", "prefix"), ("llama", "adapter, pfeiffer")]
)
def test_onnx(name: str, method: str, tmp_path: Path) -> None:
    for package in ONNX:
        pytest.importorskip(package)
    import onnxruntime

    model = adapted(name, method)
    export_model(model, tmp_path / "model.onnx", inputs(model))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((1, 5), (4, 11)):
        given = inputs(model, batch, length)
        (found,) = session.run(None, {key: t.numpy() for key, t in given.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(**given)["logits"], rtol=1e-5, atol=1e-5)


def test_a_decoder_is_exported_without_its_token_and_for_both_sides_of_padding(tmp_path: Path) -> None:
    """GPT-2 has a table of positions: on the left, padding would shift them."""
    model = adapted("gpt2", "LoRA")
    keys = set(model.state_dict())
    plain, _ = as_plain_module(model)
    assert not any("gist" in name for name in plain.state_dict()) and set(model.state_dict()) == keys
    export_model(model, tmp_path / "model.pt2", inputs(model))
    program = torch.export.load(tmp_path / "model.pt2").module()
    given = inputs(model, 3, 7)
    left = {}
    for key, fill in (("input_ids", 0), ("attention_mask", 0)):
        rows = [row[mask.bool()] for row, mask in zip(given[key], given["attention_mask"], strict=True)]
        left[key] = torch.stack([torch.cat((row.new_full((7 - len(row),), fill), row)) for row in rows])
    with torch.no_grad():
        want = model(**given)["logits"]
        torch.testing.assert_close(program(**given), want)
        torch.testing.assert_close(program(**left), want)


def test_examples_of_other_names_and_one_row_are_refused(tmp_path: Path) -> None:
    model = adapted("bert", "LoRA", gist=False)
    given = inputs(model)
    with pytest.raises(ValueError, match="token_type_ids; got input_ids$"):
        export_model(model, tmp_path / "model.pt2", {"input_ids": given["input_ids"]})
    with pytest.raises(ValueError, match=r"at least two texts .* got \(1, 7\)"):
        export_model(model, tmp_path / "model.pt2", {k: t[:1] for k, t in given.items()})
    assert not list(tmp_path.iterdir())


def test_a_length_that_the_trace_refuses_is_said(tmp_path: Path) -> None:
    """Traced beyond Mistral's window of five tokens, a text of few is another case for torch.export."""
    model = fg.get_peft_model(BACKBONES["mistral"](), METHODS["LoRA"])
    with pytest.raises(RuntimeError, match=r"would not take inputs of shape \(1, 3\): .*; nothing was written"):
        export_model(model, tmp_path / "model.pt2", inputs(model))
    assert not list(tmp_path.iterdir())
    model = fg.get_peft_model(BACKBONES["mistral"](sliding_window=20), METHODS["LoRA"])
    assert export_model(model, tmp_path / "model.pt2", inputs(model)).merged


def test_what_torch_cannot_trace_is_said(tmp_path: Path) -> None:
    model = adapted("bert", "LoRA", gist=False)

    def asks(module, args, output):
        if float(output.sum()) > 0:  # decided by the data
            return output
        return -output

    model.classifier.register_forward_hook(asks)
    with pytest.raises(RuntimeError, match="torch.export cannot trace this BertForSequenceClassification: "):
        export_model(model, tmp_path / "model.pt2", inputs(model))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for (name, part), each in zip(StdlibText.load().parts().items(), (8, 6, 6)):
        write_csv(root / "data" / f"{name}.csv", ["text", "label"], few(part, 3, each))
    settings = TextConfig(
        data=str(root / "data"), model=str(write_bert(root / "bert")), epochs=1, lr=3e-3, batch_size=8, max_length=24,
        rank=2, output_dir=root / "run", progress=False, device="cpu",
    )  # fmt: skip
    finetune_text(settings, say=lambda line: None)
    return root / "run"


def test_a_run_is_exported_from_its_folder_alone(run: Path) -> None:
    result = invoke(run)
    assert result.exit_code == 0 and "merged into the weights; largest difference" in result.stdout, result.output
    extra = {METADATA: ""}
    program = torch.export.load(run / "model.pt2", extra_files=extra).module()
    about, summary = json.loads(extra[METADATA]), json.loads((run / "summary.json").read_text())
    assert about["classes"] == summary["classes"] and about["max_length"] == 24 and about["merged"]
    assert about["input"] == "input_ids, attention_mask, token_type_ids (batch, length)"
    batch, labels = _test_texts(run, summary["classes"])
    with torch.no_grad():
        right = program(**batch).argmax(-1) == labels
    assert float(right.double().mean()) == pytest.approx(summary["test"]["test"]["accuracy"])
    again = invoke(run)
    assert again.exit_code == 2 and "pass --overwrite" in again.stderr


def _test_texts(run: Path, classes: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    held = json.loads((run / "config.json").read_text())
    settings = TextConfig(data=held["data"], model=held["model"], max_length=24, progress=False)
    _, tokenizer, _ = build_classifier(settings, classes)
    table = tokenize(load_texts(settings.resolved()).tests["test"], tokenizer, 24)
    batch = collator(tokenizer, PaddingSide.RIGHT)(list(table))
    return batch, batch.pop("labels")


@pytest.mark.slow
def test_a_run_is_exported_to_onnx(run: Path, tmp_path: Path) -> None:
    """By the command; the file judges the run's test texts as the run did."""
    for package in ONNX:
        pytest.importorskip(package)
    import onnx
    import onnxruntime

    target, summary = tmp_path / "model.onnx", json.loads((run / "summary.json").read_text())
    result = invoke(run, "--format", "onnx", "--output", target)
    assert result.exit_code == 0 and "merged into the weights; largest difference" in result.stdout, result.output
    held = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert json.loads(held[METADATA])["classes"] == summary["classes"]
    batch, labels = _test_texts(run, summary["classes"])
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {key: t.numpy() for key, t in batch.items()})
    right = torch.from_numpy(found).argmax(-1) == labels
    assert float(right.double().mean()) == pytest.approx(summary["test"]["test"]["accuracy"])
    again = invoke(run, "--format", "onnx", "--output", target)
    assert again.exit_code == 2 and "pass --overwrite" in again.stderr


def test_what_is_for_images_and_a_run_without_an_end(run: Path, tmp_path: Path) -> None:
    result = invoke(run, "--image-size", 32, "--output", tmp_path / "model.pt2")
    assert result.exit_code == 2 and "--image-size is for images" in result.stderr
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "summary.json", "model.pt2"))
    result = invoke(tmp_path / "run")
    assert result.exit_code == 2 and "a run that has not ended" in result.stderr
    assert not (tmp_path / "run" / "model.pt2").exists()
