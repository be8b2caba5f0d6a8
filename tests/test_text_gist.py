"""``fastgist finetune-text``: the length of the gist token, and schedules of T and beta."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for _package in ("transformers", "datasets", "torchmetrics", "typer"):
    pytest.importorskip(_package)

from safetensors.torch import load_file  # noqa: E402
from texts import few, write_bert, write_csv  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import fastgist  # noqa: E402
from fastgist import cli, functional  # noqa: E402
from fastgist.nn import Cosine, Linear  # noqa: E402
from fastgist.train.config import Readout, UserError  # noqa: E402
from fastgist.train.settings import known_settings, written_settings  # noqa: E402
from fastgist.train.stdlib_text import StdlibText  # noqa: E402
from fastgist.train.text import finetune_text  # noqa: E402
from fastgist.train.text_config import PaddingSide, TextConfig  # noqa: E402
from fastgist.train.text_trainer import GistObjective, Interruptible, MovingNumbers  # noqa: E402

CLASSES = 3


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return write_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """36 texts of three packages to train on, 24 to select by, and no test part."""
    root = tmp_path_factory.mktemp("data")
    corpus = StdlibText.load()
    for name, part, each in (("train", corpus.train, 12), ("val", corpus.val, 8)):
        write_csv(root / f"{name}.csv", ["text", "label"], few(part, CLASSES, each))
    return root


@pytest.fixture
def settings(folder, bert, tmp_path) -> TextConfig:
    """Five steps an epoch."""
    return TextConfig(
        data=str(folder), model=str(bert), epochs=1, lr=3e-3, batch_size=8, max_length=24, rank=2,
        output_dir=tmp_path / "run", progress=False, device="cpu",
    )  # fmt: skip


def quiet(config: TextConfig) -> dict:
    return finetune_text(config, say=lambda line: None)


def adapter(config: TextConfig) -> dict[str, torch.Tensor]:
    return load_file(config.output_dir / "adapter" / "adapter_model.safetensors")


def token(config: TextConfig) -> torch.Tensor:
    (found,) = [tensor for name, tensor in adapter(config).items() if name.endswith("gist.token")]
    return found


# -- the length of the token -----------------------------------------------------------------------------------------


def test_a_token_of_several_rows_is_trained_kept_and_read_as_it_was_asked(settings, bert):
    from transformers import AutoModelForSequenceClassification

    one, three = replace(settings, output_dir=settings.output_dir / "1"), replace(settings, gist_length=3)
    three = replace(three, gist_readout=Readout.MEAN, output_dir=settings.output_dir / "3")
    short, long = quiet(one), quiet(three)
    assert long["trained_parameters"] - short["trained_parameters"] == 2 * 32
    assert (token(one).shape, token(three).shape) == ((1, 1, 32), (1, 3, 32))
    assert (long["config"]["gist_length"], long["config"]["gist_readout"]) == (3, "mean")
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=CLASSES)
    loaded = fastgist.load_adapter(model, three.output_dir / "adapter")
    assert (loaded.gist_config.length, loaded.gist_config.readout) == (3, "mean")
    held = {"model": settings.model, "gist_length": 3, "gist_readout": "mean"}
    identity = json.loads((three.output_dir / "identity.json").read_text())
    assert {name: identity[f"--{name.replace('_', '-')}"] for name in held} == held
    with pytest.raises(UserError, match=r"cannot resume from .*--gist-length = 3, this run has 2"):
        quiet(replace(three, gist_length=2, resume=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gist_length": 0}, "--gist-length must be >= 1, got 0"),
        ({"gist_length": 4, "gist": False}, "--gist-length 4 is for a gist token, and this run has --no-gist"),
        ({"gist_readout": Readout.MEAN}, "--gist-readout mean is for --gist-length 2 and more"),
        ({"temperature": "linear:3:0"}, "--temperature must be finite and > 0, got linear:3:0"),
        ({"temperature": -1.0}, "--temperature must be finite and > 0, got -1"),
        ({"beta": "cosine:-1:1"}, "--beta must be finite and >= 0, got cosine:-1:1"),
        ({"beta": "step:1:2"}, "--beta: expected a finite number, linear:START:END or cosine:START:END"),
        ({"beta": "linear:0:1:0.9:0.1"}, "--beta: .*0.9"),
    ],
)
def test_what_no_run_can_be_is_named_before_anything_is_written(settings, changes, words):
    with pytest.raises(UserError, match=words):
        quiet(replace(settings, **changes))
    assert not settings.output_dir.exists()


def test_a_decoders_token_takes_a_position_a_row_and_is_read_as_a_mean(settings, tmp_path):
    """Its first row does not see the others: they would be trained by nothing, and the error says so."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from fastgist.train.text import length_limit
    from fastgist.train.text_pretrain import train_tokenizer

    tokens = train_tokenizer([t for d in StdlibText.load().documents[:20] for t in d], 300, 40, causal=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    llama = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokens), max_position_embeddings=30, pad_token_id=0, **sizes)
    )
    assert [length_limit(TextConfig(gist_length=n), llama, tokens) for n in (1, 4)] == [29, 26]
    assert length_limit(TextConfig(gist=False), llama, tokens) == 30
    with pytest.raises(UserError, match="--max-length 27: .* takes 26 tokens at most"):
        length_limit(TextConfig(gist_length=4, max_length=27), llama, tokens)
    with pytest.raises(
        UserError,
        match="--gist-length 30: .* takes 30 tokens at most, the gist token's rows and the prompts among them",
    ):
        length_limit(TextConfig(gist_length=30), llama, tokens)
    llama.save_pretrained(tmp_path / "llama")
    tokens.save_pretrained(tmp_path / "llama")
    two = replace(settings, model=str(tmp_path / "llama"), gist_length=2)
    with pytest.raises(UserError, match='the first of 2 gist tokens does not see the others.*take readout="mean"'):
        quiet(two)
    assert not settings.output_dir.exists()
    start = llama.model.embed_tokens.weight.shape[1]
    quiet(replace(two, gist_readout=Readout.MEAN, padding_side=PaddingSide.LEFT))
    assert token(two).shape == (1, 2, start)


# -- schedules -------------------------------------------------------------------------------------------------------


def test_a_schedule_follows_the_steps_whatever_is_accumulated(settings, monkeypatch):
    """T and beta as the operation gets them: 5 batches an epoch in 3 steps, the last of one batch; 6 steps in all."""
    called: list[tuple[float, float]] = []
    original = functional.gist_loss

    def spy(*args, **kwargs):
        called.append((kwargs["temperature"], kwargs["beta"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "gist_loss", spy)
    quiet(replace(settings, epochs=2, accumulate=2, temperature="linear:10:4", beta="linear:1:0:0.5:1"))
    steps = [(10.0, 1.0), (9.0, 1.0), (8.0, 1.0), (7.0, 1.0), (6.0, 2 / 3), (5.0, 1 / 3)]
    batches = [2, 2, 1, 2, 2, 1]
    expected = [step for step, count in zip(steps, batches) for _ in range(count)]
    assert [pytest.approx(pair) for pair in expected] == called


def test_the_objective_asks_its_schedules_at_the_share_that_is_done():
    z, g, y = torch.randn(5, 4).double(), torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 3, 3])
    moving = GistObjective(0.5, Linear(0.0, 2.0), Cosine(10.0, 1.0), regression=False)
    callback = MovingNumbers(moving.loss)

    class State:
        global_step, max_steps = 3, 12

    callback.on_step_begin(None, State, None)
    numbers = GistObjective(0.5, 0.5, 5.5 + 4.5 * 2**-0.5, regression=False)
    output = {"logits": z, "gist_logits": g}
    torch.testing.assert_close(moving(output, y), numbers(output, y), rtol=1e-12, atol=0)


SCHEDULES = {"temperature": "linear:10:1", "beta": "cosine:0:2:0:0.5"}


@pytest.fixture(scope="module")
def moving(folder, bert, tmp_path_factory) -> tuple[TextConfig, dict]:
    """A run of ten steps with schedules, and its summary."""
    config = TextConfig(
        data=str(folder), model=str(bert), epochs=2, lr=3e-3, batch_size=8, max_length=24, rank=2, gist_length=2,
        output_dir=tmp_path_factory.mktemp("moving"), progress=False, device="cpu", **SCHEDULES,
    )  # fmt: skip
    return config, quiet(config)


@pytest.mark.parametrize("stop", [3, 7])
def test_a_resumed_run_follows_the_schedules_as_one_that_nothing_stops(moving, tmp_path, stop, monkeypatch):
    """Killed within the first of two epochs and within the second: bitwise the same adapter."""
    whole, expected = moving
    cut = replace(whole, checkpoint_every=stop, output_dir=tmp_path / "cut")

    class Killed(Exception):
        pass

    def kill(self, args, state, control, **kwargs):
        if state.global_step == stop:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Interruptible, "on_step_begin", kill)
        with pytest.raises(Killed):
            quiet(cut)
    with pytest.raises(UserError, match=r"cannot resume from .*--beta = 'cosine:0:2:0:0.5', this run has 0.75"):
        quiet(replace(cut, beta=0.75, resume=True))
    resumed = quiet(replace(cut, resume=True))
    one, other = adapter(whole), adapter(cut)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert resumed["val"] == expected["val"]


def test_the_schedules_decide_what_comes_out(settings, tmp_path):
    found = []
    for name, changes in (("moving", SCHEDULES), ("still", {"temperature": 10.0, "beta": 0.0})):
        config = replace(settings, output_dir=tmp_path / name, **changes)
        quiet(config)
        found.append(token(config))
    assert not torch.equal(*found)


# -- flags and files -------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> list[TextConfig]:
    from fastgist.train import text

    got: list[TextConfig] = []
    monkeypatch.setattr(text, "finetune_text", got.append)
    return got


def invoke(*arguments: object):
    return CliRunner().invoke(cli.build_app(), ["finetune-text", *map(str, arguments)], env={"COLUMNS": "200"})


YAML = "data: words\ngist-length: 4\ngist_readout: mean\ntemperature: linear:10:1\nbeta: 0.5\n"


def test_flags_and_a_file_say_the_same(tmp_path, seen):
    expected = TextConfig(data="words", gist_length=4, gist_readout=Readout.MEAN, temperature="linear:10:1", beta=0.5)
    flags = ["--gist-length", 4, "--gist-readout", "mean", "--temperature", "linear:10:1", "--beta", 0.5]
    assert invoke("words", *flags).exit_code == 0 and seen.pop() == expected
    (tmp_path / "run.yaml").write_text(YAML)
    assert invoke("--config", tmp_path / "run.yaml").exit_code == 0 and seen.pop() == expected
    assert invoke("--config", tmp_path / "run.yaml", "--beta", "cosine:0:1", "--gist-length", 2).exit_code == 0
    assert seen.pop() == replace(expected, beta="cosine:0:1", gist_length=2)
    (tmp_path / "config.json").write_text(json.dumps(written_settings(expected)))
    assert invoke("--config", tmp_path / "config.json").exit_code == 0 and seen.pop() == expected
    assert {"gist_length", "gist_readout", "beta", "temperature"} <= set(known_settings(TextConfig))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature", "step:1:2"), "expected a finite number, linear:START:END or cosine:START:END"),
        (("--gist-length", 0), "Invalid value for '--gist-length'"),
        (("--gist-readout", "last"), "'last' is not one of 'first', 'mean'"),
    ],
)
def test_a_wrong_flag_is_refused(flags, words, seen):
    done = invoke("words", *flags)
    assert done.exit_code == 2 and words in " ".join(done.stderr.replace("│", " ").split()) and not seen
