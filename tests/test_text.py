"""``fastgist finetune-text``: data, loss, selection, resuming, what is left behind."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

from safetensors.torch import load_file
from texts import few, write_bert, write_csv
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastgist
from fastgist.gist import GistOutput
from fastgist.train import text as run
from fastgist.train.config import Method, UserError
from fastgist.train.stdlib_text import StdlibText
from fastgist.train.text import finetune_text
from fastgist.train.text_config import TextConfig
from fastgist.train.text_data import load_texts
from fastgist.train.text_trainer import GistObjective, Interruptible, complete_checkpoints

CLASSES = 3


@pytest.fixture(scope="module")
def corpus() -> StdlibText:
    return StdlibText.load()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return write_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus) -> Path:
    """train.csv, val.csv and test.csv of docstrings of three packages."""
    root = tmp_path_factory.mktemp("data")
    for (name, part), each in zip(corpus.parts().items(), (12, 8, 8)):
        write_csv(root / f"{name}.csv", ["text", "label"], few(part, CLASSES, each))
    return root


@pytest.fixture
def settings(folder, bert, tmp_path) -> TextConfig:
    return TextConfig(
        data=str(folder), model=str(bert), epochs=2, lr=3e-3, batch_size=8, max_length=24, rank=2,
        output_dir=tmp_path / "run", progress=False, device="cpu",
    )  # fmt: skip


def quiet(config: TextConfig) -> dict:
    return finetune_text(config, say=lambda line: None)


def adapter(config: TextConfig) -> dict[str, torch.Tensor]:
    return load_file(config.output_dir / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# -- the loss --------------------------------------------------------------------------------------------------------


def written_out(z, g, y, alpha, beta, t):
    """Sum over rows of CE + alpha CE_gist + beta J, in float64."""
    z, g = z.double(), g.double()
    p, q = (z / t).softmax(-1), (g / t).softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1) + (q * (q.log() - p.log())).sum(-1)
    rows = torch.arange(len(y))
    return (-z.log_softmax(-1)[rows, y] - alpha * g.log_softmax(-1)[rows, y] + beta * divergence).sum()


def test_the_objective_is_the_formula_over_all_rows_of_a_step():
    z, g, y = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 3])
    loss = GistObjective(0.5, 0.75, 3.0, regression=False)
    expected = written_out(z, g, y, 0.5, 0.75, 3.0)
    torch.testing.assert_close(loss(GistOutput(logits=z, gist_logits=g), y).double(), expected / 5, rtol=1e-6, atol=0)
    scaled = loss(GistOutput(logits=z, gist_logits=g), y, num_items_in_batch=torch.tensor(12))
    torch.testing.assert_close(scaled.double(), expected / 12, rtol=1e-6, atol=0)
    plain = loss({"logits": z}, y)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(z, y))


def test_the_objective_of_a_regression():
    z, g, y = torch.randn(5, 1), torch.randn(5, 1), torch.randn(5)
    loss = GistObjective(0.5, 0.75, 2.0, regression=True)(GistOutput(logits=z, gist_logits=g), y)
    z, g, y = (t.double() for t in (z[:, 0], g[:, 0], y))
    expected = ((z - y) ** 2 + 0.5 * (g - y) ** 2 + 0.75 * (z / 2 - g / 2) ** 2).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gist", [True, False])
def test_accumulated_batches_make_the_step_of_one_large_batch(settings, tmp_path, corpus, gist):
    """20 rows in batches of 8, 8 and 4, dropout off: each row weighs the same as in one batch of 20."""
    model = write_bert(tmp_path / "plain", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    write_csv(tmp_path / "twenty.csv", ["text", "label"], few(corpus.train, 2, 10))
    common = replace(
        settings, data=str(tmp_path / "twenty.csv"), model=str(model), epochs=1, warmup=0.0, val_split=0.0, gist=gist,
        set=["dropout=0"], clip_grad=0.0,
    )  # fmt: skip
    if gist:  # the token has dropout of its own
        common = replace(common, alpha=0.7)
    results = []
    for batch, accumulate in ((20, 1), (8, 3)):
        torch.manual_seed(0)
        config = replace(common, batch_size=batch, accumulate=accumulate, output_dir=tmp_path / f"{batch}-{gist}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastgist.nn.gist_token.GistToken.forward", lambda self, x: self.token.expand(len(x), -1, -1))
            summary = quiet(config)
        assert summary["steps"] == 1
        results.append(adapter(config))
    start = {k for k in results[0] if not torch.equal(results[0][k], torch.zeros_like(results[0][k]))}
    assert start
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key], rtol=0, atol=2e-5)


def test_weight_decay_is_on_matrices_and_the_gist_token(settings, monkeypatch):
    seen = {}

    def look(self, *args, **kwargs):
        self.create_optimizer()
        names = {id(p): n for n, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            seen.update({names[id(p)]: group["weight_decay"] for p in group["params"]})
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.Trainer.train", look)
    with pytest.raises(run.Interrupted):
        quiet(replace(settings, method=Method.BITFIT, rank=None, weight_decay=0.3))
    token = [name for name in seen if name.endswith("token")]
    assert len(token) == 1 and seen[token[0]] == 0.3
    assert {seen[n] for n in seen if n.endswith("bias")} == {0.0}
    assert [seen[n] for n in seen if n.endswith("classifier.weight")] == [0.3]


def test_parts_have_their_rates_and_wrong_ones_are_one_line(settings):
    parts = {"lr_gist": 0.03, "lr_head": 1e-3, "wd_gist": 0.5}
    quiet(replace(settings, epochs=1, **parts))
    lines = (settings.output_dir / "metrics.jsonl").read_text().splitlines()
    (logged,) = [entry for entry in map(json.loads, lines) if "learning_rate_gist" in entry]
    assert logged["learning_rate_gist"] == pytest.approx(10 * logged["learning_rate_peft"])
    assert logged["learning_rate_head"] == pytest.approx(logged["learning_rate_peft"] / 3)
    state = torch.load(settings.output_dir / "checkpoints" / "checkpoint-5" / "optimizer.pt")
    assert {g["part"]: g["weight_decay"] for g in state["param_groups"] if g["weight_decay"]} == {
        "gist": 0.5, "peft": 0.01, "head": 0.01,
    }  # fmt: skip
    other = replace(settings, output_dir=settings.output_dir / "other")
    for changes, words in (
        ({"gist": False, "wd_gist": 0.1}, "--wd-gist is for a gist token, and this run has --no-gist"),
        ({"method": Method.LINEAR_PROBE, "rank": None, "lr_peft": 0.1}, "lrs names 'peft', of which this model trains"),
        ({"lr_head": float("inf")}, "--lr-head must be finite"),
    ):
        with pytest.raises(UserError, match=words):
            quiet(replace(other, **changes))
    assert not other.output_dir.exists()
    with pytest.raises(UserError, match=r"cannot resume from .*--lr-gist = 0.03, this run has None"):
        quiet(replace(settings, epochs=1, lr_head=1e-3, wd_gist=0.5, resume=True))


# -- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_an_adapter_that_gives_what_the_summary_says(settings, folder, bert):
    """Loaded into a fresh model, the predictions computed here, one text at a time, give the summary's numbers."""
    import csv

    lines: list[str] = []
    summary = finetune_text(replace(settings, epochs=3), say=lines.append)
    on_disk = json.loads((settings.output_dir / "summary.json").read_text())
    assert on_disk == json.loads(json.dumps(summary))
    assert summary["texts"] == {"train": 36, "val": 24, "test": 24} and summary["classes"] == ["0", "1", "2"]
    torch.manual_seed(12)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=CLASSES)
    model = fastgist.load_adapter(model, settings.output_dir / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    for name, scores in (("val", summary["val"]), ("test", summary["test"]["test"])):
        rows = list(csv.DictReader(open(folder / f"{name}.csv", newline="")))
        losses, right = [], 0
        for row in rows:
            ids = tokenizer(row["text"], truncation=True, max_length=24, return_tensors="pt")
            with torch.no_grad():
                logits = model(**ids).logits[0].double()
            losses.append(-float(logits.log_softmax(-1)[int(row["label"])]))
            right += int(logits.argmax()) == int(row["label"])
        assert scores["accuracy"] == pytest.approx(right / len(rows), abs=1e-6)
        assert scores["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert summary["selected_by"] == "val accuracy"
    assert any("parameters trained" in line for line in lines) and lines[-1].startswith("adapter saved")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary["trained_parameters"] == trained < summary["all_parameters"] / 4
    epochs = [json.loads(line) for line in (settings.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in epochs if "eval_accuracy" in e] == [1, 2, 3]


def test_the_best_epoch_by_validation_is_kept_and_the_test_split_decides_nothing(settings, tmp_path, corpus):
    """Two test splits, one with every label wrong: the same weights, chosen at the best validation score."""
    results = []
    for turn in (0, 1):
        root = tmp_path / f"data{turn}"
        for (name, part), each in zip(corpus.parts().items(), (12, 8, 8)):
            rows = few(part, CLASSES, each)
            shift = turn if name == "test" else 0
            write_csv(root / f"{name}.csv", ["text", "label"], [(t, (y + shift) % CLASSES) for t, y in rows])
        config = replace(settings, data=str(root), epochs=4, lr=3e-2, output_dir=tmp_path / f"out{turn}")
        summary = quiet(config)
        results.append((adapter(config), summary))
    (one, first), (other, second) = results
    assert same(one, other) and first["val"] == second["val"] and first["test"] != second["test"]
    log = [json.loads(line) for line in (tmp_path / "out0" / "metrics.jsonl").read_text().splitlines()]
    curve = {e["step"]: e["eval_accuracy"] for e in log if "eval_accuracy" in e}
    assert len(curve) == 4 and first["val"]["accuracy"] == max(curve.values()) == curve[first["selected_step"]]
    assert first["selected_step"] == min(step for step, value in curve.items() if value == max(curve.values()))


def test_the_selected_epochs_weights_are_what_is_saved(settings, monkeypatch):
    """With a score that falls from epoch to epoch: the first epoch's, not the last's, and the test is judged by them."""
    scores = iter([0.9, 0.5, 0.4, 0.1])
    monkeypatch.setattr(run, "metrics_function", lambda names, classes: lambda prediction: {"accuracy": next(scores)})
    summary = quiet(replace(settings, epochs=3, keep_checkpoints=3))
    assert (
        summary["selected_step"] == 5
        and summary["val"]["accuracy"] == 0.9
        and summary["test"]["test"]["accuracy"] == 0.1
    )
    folder = settings.output_dir / "checkpoints"
    first, last = (load_file(folder / f"checkpoint-{step}" / "trained.safetensors") for step in (5, 15))
    saved = [t.flatten() for t in adapter(settings).values()]

    def among(tensor):
        return any(tensor.shape == other.shape and torch.equal(tensor, other) for other in saved)

    assert len(first) > 3 and all(among(t.flatten()) for t in first.values())
    assert not any(among(t.flatten()) for t in last.values())


def test_without_anything_to_select_by_the_last_epoch_is_kept(settings, folder):
    summary = quiet(replace(settings, data=str(folder / "train.csv"), val_split=0.0))
    assert summary["selected_by"] == "last epoch" and summary["val"] is None and summary["test"] == {}
    assert summary["selected_step"] == summary["steps"] == 10


def test_a_held_out_part_selects_where_no_split_does(settings, folder):
    lines: list[str] = []
    config = replace(settings, data=str(folder / "train.csv"), val_split=0.25).resolved()
    splits = load_texts(config)
    assert (len(splits.train), len(splits.val)) == (27, 9)
    assert sorted(splits.val["label"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert not set(splits.train["text"]) & set(splits.val["text"])
    again = load_texts(config)
    assert again.val["text"] == splits.val["text"]
    assert load_texts(replace(config, seed=1)).val["text"] != splits.val["text"]
    assert finetune_text(replace(config, epochs=1), say=lines.append)["selected_by"] == "val accuracy"
    assert any("9 of 36 training texts held out" in line for line in lines)


@pytest.mark.parametrize("method", [m for m in Method if m is not Method.LORA])
def test_every_method_runs(settings, method, monkeypatch):
    """One epoch on a handful; what is trained moves, and what is frozen stays, bit by bit."""
    made: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []
    original = run.adapt

    def adapted(*args, **kwargs):
        model = original(*args, **kwargs)
        made.append((model, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return model

    monkeypatch.setattr(run, "adapt", adapted)
    config = replace(
        settings,
        method=method,
        epochs=1,
        rank=4 if method is Method.CP else None,
        val_split=0.0,
        val_name="",
        test_name="",
    )
    summary = quiet(config)
    stored = adapter(config)
    assert summary["steps"] == 5 and stored and all(torch.isfinite(t).all() for t in stored.values())
    model = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=CLASSES)
    loaded = fastgist.load_adapter(model, config.output_dir / "adapter")
    assert loaded.gist.token.shape == (1, 1, 32)
    ((trained, before),) = made
    ours = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    after = trained.state_dict()
    assert before.keys() == after.keys() >= ours and any(name.endswith("gist.token") for name in ours)
    assert [name for name in ours if torch.equal(before[name], after[name])] == []
    assert [name for name in after.keys() - ours if not torch.equal(before[name], after[name])] == []
    assert (after.keys() - ours == set()) is (method is Method.FULL)
    assert [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, after[name])] == []


def test_methods_a_model_cannot_take_are_one_line(settings):
    with pytest.raises(UserError, match="parallel"):
        quiet(replace(settings, method=Method.ADAPTER, rank=None, set=["placement=parallel"]))
    with pytest.raises(UserError, match="--rank is for lora"):
        quiet(replace(settings, method=Method.SSF))
    with pytest.raises(UserError, match="CPConfig: rank must be at most 32, bert.encoder.*, got 64"):  # cp's own
        quiet(replace(settings, method=Method.CP, rank=None))
    with pytest.raises(UserError, match="--set targets=nothing|nothing"):
        quiet(replace(settings, set=["targets=nothing"]))
    assert not settings.output_dir.exists()


# -- interrupted and resumed -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_runs(folder, bert, tmp_path_factory):
    """Method -> (configuration, summary, adapter) of a run of 15 steps, 5 an epoch, that nothing interrupts."""
    found = {}

    def whole(method: Method):
        if method not in found:
            config = TextConfig(
                data=str(folder), model=str(bert), epochs=3, lr=3e-3, batch_size=8, max_length=24, rank=2, method=method,
                set=["dropout=0.2"], output_dir=tmp_path_factory.mktemp("whole"), progress=False, device="cpu",
            )  # fmt: skip
            summary = quiet(config)
            found[method] = (config, summary, adapter(config))
        return found[method]

    return whole


@pytest.mark.parametrize(("stop", "method"), [(3, Method.LORA), (10, Method.LORA), (7, Method.CP)])
def test_a_resumed_run_ends_bitwise_where_an_uninterrupted_one_ends(whole_runs, tmp_path, stop, method, monkeypatch):
    """Killed after ``stop``: within the first epoch, at an epoch's end, and within the second."""
    whole, expected, weights = whole_runs(method)

    class Killed(Exception):
        pass

    def kill(self, args, state, control, **kwargs):
        if state.global_step == stop:
            raise Killed

    cut = replace(whole, checkpoint_every=stop, output_dir=tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(Interruptible, "on_step_begin", kill)
        with pytest.raises(Killed):
            quiet(cut)
    assert complete_checkpoints(cut.output_dir / "checkpoints")[0].name == f"checkpoint-{stop}"
    resumed = quiet(replace(cut, resume=True))
    assert same(weights, adapter(cut))
    for key in ("val", "test", "steps", "selected_step"):
        assert resumed[key] == expected[key]


def test_an_epochs_last_step_is_checkpointed_with_its_evaluation(settings, monkeypatch):
    """Killed while the first epoch is evaluated, with checkpoints every 5 steps and 5 steps an epoch: there is none yet.

    One from before the evaluation would resume in the second epoch, without the first's score.
    """

    def killed(self, *args, **kwargs):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer.evaluate", killed)
        with pytest.raises(SystemExit):
            quiet(replace(settings, checkpoint_every=5))
    assert complete_checkpoints(settings.output_dir / "checkpoints") == []


def test_half_written_checkpoints_are_passed_over(settings, tmp_path):
    whole = replace(settings, epochs=3, checkpoint_every=2, keep_checkpoints=9, output_dir=tmp_path / "whole")
    expected = quiet(whole)
    folder = whole.output_dir / "checkpoints"
    assert [p.name for p in complete_checkpoints(folder)][:3] == ["checkpoint-15", "checkpoint-14", "checkpoint-12"]
    before = adapter(whole)
    (folder / "checkpoint-15" / "trainer_state.json").unlink()
    state = folder / "checkpoint-14" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    again = quiet(replace(whole, resume=True))
    assert same(adapter(whole), before) and again["val"] == expected["val"]
    weights = folder / "checkpoint-15" / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(UserError, match="trained.safetensors is damaged"):
        quiet(replace(whole, resume=True))


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(settings, tmp_path, monkeypatch):
    whole = replace(settings, epochs=2, output_dir=tmp_path / "whole")
    quiet(whole)
    cut = replace(whole, output_dir=tmp_path / "cut")

    def press(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Interruptible, "on_substep_end", press, raising=False)
    monkeypatch.setattr(Interruptible, "on_pre_optimizer_step", press, raising=False)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(run.Interrupted, match=r"checkpoint-4 is complete; the same command with --resume"):
            quiet(cut)
    finally:
        signal.signal(signal.SIGINT, previous)
    monkeypatch.undo()
    quiet(replace(cut, resume=True))
    assert same(adapter(whole), adapter(cut))


def test_a_resumed_run_must_be_the_same_run(settings, folder):
    quiet(settings)
    with pytest.raises(UserError, match="holds a run already"):
        quiet(settings)
    resume = replace(settings, resume=True)
    for change, words in (
        ({"lr": 1e-4}, "--lr = 0.003, this run has 0.0001"),
        ({"method": Method.BITFIT, "rank": None}, "--method"),
        ({"data": str(folder / "train.csv")}, "made with data"),
    ):
        with pytest.raises(UserError, match=f"cannot resume from .*{words}"):
            quiet(replace(resume, **change))
    assert quiet(replace(resume, progress=False, report_to="none"))["steps"] == 10


def test_a_loss_that_is_no_number_stops_the_run(settings):
    with pytest.raises(RuntimeError, match="the loss became .* try an --lr below"):
        quiet(replace(settings, lr=1e30, warmup=0.0, clip_grad=0.0))


def test_reports_go_where_the_trainer_is_told(settings):
    pytest.importorskip("tensorboard")
    quiet(replace(settings, report_to="tensorboard", epochs=1))
    assert list(settings.output_dir.rglob("events.out.tfevents*"))
    with pytest.raises(UserError, match="the Trainer refuses these settings|nowhere"):
        quiet(replace(settings, report_to="nowhere", output_dir=settings.output_dir / "b"))
