"""A gist model given labels: its loss against the formula in float64, fused and not, and in transformers' Trainer."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from vits import images, stir, vit

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from decoders import gpt2, llama, texts
from pairs import distilled, swin
from trainers import bert, rows, settings
from transformers import Trainer

from fastgist import (
    CPConfig,
    GistConfig,
    LinearProbeConfig,
    LoraConfig,
    add_gist,
    disable_adapter,
    functional,
    get_peft_model,
    load_adapter,
    unload,
)
from fastgist.gist import loss as gist_loss_module
from fastgist.integrations.transformers import GistTrainer, gist_loss_func
from fastgist.nn import GistLoss, Linear
from fastgist.testing import assert_within_budget

TARGET = torch.tensor([0, 2, 1])


def still(model: nn.Module, config=None, **gist) -> nn.Module:
    """A gist model in training, without dropout."""
    model = model if config is None else get_peft_model(model, config)
    return stir(add_gist(model, GistConfig(dropout=0.0, **gist))).train()


def given(model: nn.Module) -> dict:
    return texts("left") if hasattr(model.model, "config") else {"x": images()}


def paper(z: Tensor, g: Tensor, target: Tensor, alpha=0.5, beta=0.75, temperature=3.0) -> Tensor:
    """The objective, written out in float64."""
    z, g = z.double(), g.double()
    entropies = [-x.log_softmax(-1)[torch.arange(len(x)), target].mean() for x in (z, g)]
    p, q = (z / temperature).softmax(-1), (g / temperature).softmax(-1)
    divergence = (p * (p / q).log() + q * (q / p).log()).sum(-1).mean()
    return entropies[0] + alpha * entropies[1] + beta * divergence


@pytest.mark.parametrize("make", [vit, bert, llama])
def test_labels_give_the_papers_loss(make) -> None:
    model = still(make(num_classes=3) if make is vit else make(), LoraConfig(rank=2))
    inputs = given(model)
    output = model(**inputs, labels=TARGET)
    assert list(output) == ["loss", "logits", "gist_logits"] and output[0] is output.loss
    torch.testing.assert_close(
        output.loss.double(), paper(output.logits, output.gist_logits, TARGET), rtol=1e-5, atol=0
    )
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.loss = GistLoss(0.1, 2.0, 1.5)
    z, g = output.logits, output.gist_logits
    torch.testing.assert_close(
        model(**inputs, labels=TARGET).loss.double(), paper(z, g, TARGET, 0.1, 2.0, 1.5), rtol=1e-5, atol=0
    )
    assert "loss" not in model.state_dict() and "loss" not in model(**inputs)
    model.eval()
    for ask in (None, True):  # in evaluation the cross-entropy alone, gist logits or not
        output = model(**inputs, labels=TARGET, return_gist_logits=ask)
        torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, TARGET))
        assert list(output)[:2] == ["loss", "logits"]
    assert list(model(**inputs, labels=TARGET, return_logits=False)) == ["loss"]
    with disable_adapter(model):
        output = model.train()(**inputs, labels=TARGET)
        torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, TARGET))


@pytest.mark.parametrize("make", [vit, llama])
def test_labels_in_one_graph(make) -> None:
    model = still(make(num_classes=3) if make is vit else make())
    inputs = given(model)
    for options in ({}, {"return_logits": False, "num_items_in_batch": torch.tensor(3)}):
        torch._dynamo.reset()
        output = torch.compile(model, backend="eager", fullgraph=True)(**inputs, labels=TARGET, **options)
        torch.testing.assert_close(output, model(**inputs, labels=TARGET, **options))


@pytest.mark.parametrize("make", [bert, llama])
def test_labels_by_position_are_refused(make) -> None:
    """They would reach a body that ignores what it does not know."""
    model = still(make())
    names = list(inspect.signature(type(model.model).forward).parameters)[1:]
    places = [None] * names.index("labels")
    with pytest.raises(TypeError, match="labels are given by name"):
        model(texts()["input_ids"], *places[1:], TARGET)


def test_the_kind_of_problem_is_the_configurations() -> None:
    inputs = texts()
    model = still(bert(num_labels=1))  # one output: regression
    y = torch.randn(3)
    output = model(**inputs, labels=y)
    z, g = output.logits[:, 0].double(), output.gist_logits[:, 0].double()
    want = (z - y).square().mean() + 0.5 * (g - y).square().mean() + 0.75 * ((z - g) / 3).square().mean()
    torch.testing.assert_close(output.loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(**inputs, labels=y[:, None]).loss, output.loss)

    model = still(llama())  # floating-point labels: several
    y = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]])
    output = model(**inputs, labels=y)
    torch.testing.assert_close(output.loss, GistLoss(problem_type="multi_label_classification")(output, y))
    model.eval()
    entropy = nn.functional.binary_cross_entropy_with_logits(output.logits, y)
    torch.testing.assert_close(model(**inputs, labels=y).loss, entropy)
    model.config.problem_type = "single_label_classification"  # then they are soft labels
    soft = torch.softmax(y, -1)
    torch.testing.assert_close(model(**inputs, labels=soft).loss, nn.functional.cross_entropy(output.logits, soft))
    column = model(**inputs, labels=TARGET[:, None]).loss
    torch.testing.assert_close(column, model(**inputs, labels=TARGET).loss)
    model = still(vit(num_classes=3))
    output = model(images(), labels=soft)  # timm: soft labels, as a mixup makes them
    torch.testing.assert_close(output.loss, GistLoss()(output, soft))


@pytest.fixture
def calls(monkeypatch) -> list:
    """One entry a call of gist_linear_loss."""
    made: list = []
    op = functional.gist_linear_loss
    monkeypatch.setattr(functional, "gist_linear_loss", lambda *a, **k: (made.append(k), op(*a, **k))[1])
    return made


@pytest.mark.parametrize("make", [vit, llama, gpt2])
@pytest.mark.parametrize("gist", [{}, {"length": 2, "readout": "mean"}], ids=["one", "two"])
@pytest.mark.parametrize("autocast", [False, True])
def test_fused_with_the_head_the_loss_is_the_same(make, gist, autocast, calls, monkeypatch) -> None:
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if make is gpt2 else {}
    model = still(make(num_classes=40) if make is vit else make(num_labels=40, **drop), LoraConfig(rank=2), **gist)
    model.loss = GistLoss(0.3, Linear(1.0, 0.0), 2.0, label_smoothing=0.1, halve=True, t_squared=True)
    model.loss.progress = 0.25
    inputs, target = given(model), torch.tensor([39, -100, 7])
    ours = [p for p in model.parameters() if p.requires_grad]
    results = []
    for logits in (True, False, None):
        if logits is None:
            monkeypatch.setattr(gist_loss_module, "FUSED_CLASSES", 40)
            monkeypatch.setattr(gist_loss_module, "FUSED_BYTES", 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**inputs, labels=target, return_logits=logits, num_items_in_batch=torch.tensor(5))
        assert list(output) == (["loss", "logits", "gist_logits"] if logits else ["loss"])
        results.append((output.loss.detach(), torch.autograd.grad(output.loss, ours)))
    assert len(calls) == 2
    (loss, gradients), *others = results
    close = {"rtol": 0.05, "atol": 0.02} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    for other, its in others:
        torch.testing.assert_close(other, loss, **close)
        for got, want in zip(its, gradients, strict=True):
            torch.testing.assert_close(got, want, **close)


def test_what_is_not_fused(calls, monkeypatch) -> None:
    monkeypatch.setattr(gist_loss_module, "FUSED_CLASSES", 2)
    monkeypatch.setattr(gist_loss_module, "FUSED_BYTES", 0)
    model, inputs = still(llama()), texts()
    assert list(model(**inputs, labels=TARGET)) == ["loss"] and len(calls) == 1

    def logits(**options) -> bool:
        return "logits" in model(**inputs, labels=TARGET, **options)

    assert logits(return_logits=True)
    assert logits(return_gist_logits=True) and logits(return_gist_logits=False)
    hooked = GistLoss()
    hooked.register_forward_hook(lambda *_: None)
    for loss in (GistLoss(interaction="mse"), GistLoss(interaction="jsd"), hooked):
        model.loss = loss
        assert logits()
    model.loss = GistLoss(detach="logits")  # has a fused form
    assert not logits()

    class Mine(GistLoss):
        def forward(self, *args):
            return super().forward(*args) * 2

    model.loss = Mine()
    assert logits()
    model.loss = None
    handle = model.model.score.register_forward_hook(lambda *_: None)
    assert logits()
    handle.remove()
    score = model.model.score
    model.model.score = nn.Sequential(score)
    assert logits()
    model.model.score = score
    model.model.config.problem_type = "multi_label_classification"
    assert "logits" in model(**inputs, labels=torch.rand(3, 3))
    model.model.config.problem_type = None
    assert "logits" in model.eval()(**inputs, labels=TARGET)
    assert len(calls) == 2  # the first one and the detached one
    encoder = still(bert())
    assert "logits" in encoder(**inputs, labels=TARGET)  # what goes into its last layer is not known


def test_where_fusing_pays() -> None:
    """DESIGN.md's measurement, at a head of 768: neither small batches nor few classes."""
    fuses = gist_loss_module.fuses
    assert not fuses(64, 768, 21843) and not fuses(1_000_000, 768, 1000)
    assert fuses(256, 768, 21843) and fuses(64, 768, 131072)
    assert not fuses(256, 768, 131072, torch.bfloat16) and fuses(768, 768, 21843, torch.bfloat16)


@pytest.mark.parametrize(("rows", "fused"), [(256, True), (160, False)])
def test_fused_by_itself_at_imagenet_21ks_classes(rows, fused, calls) -> None:
    """Nothing is set: 256 rows of 21,843 classes take the operation, 160 do not; the loss and gradients are the unfused
    ones', within the budget of error."""
    model = still(vit(num_classes=21843, depth=1), LoraConfig(rank=2))
    x, y = images(rows), torch.randint(21843, (rows,))
    ours = [p for p in model.parameters() if p.requires_grad]
    output = model(x, labels=y)
    assert (len(calls) == 1) == fused and (list(output) == ["loss"]) == fused
    if not fused:
        return
    got = output.loss, *torch.autograd.grad(output.loss, ours)
    plain = model(x, labels=y, return_logits=True)
    assert len(calls) == 1 and plain.logits.shape == (rows, 21843)
    want = plain.loss, *torch.autograd.grad(plain.loss, ours)
    wide = copy.deepcopy(model).double()
    exact = wide(x.double(), return_gist_logits=True)
    loss = paper(exact.logits, exact.gist_logits, y)
    expected = loss, *torch.autograd.grad(loss, [p for p in wide.parameters() if p.requires_grad])
    names = ["loss", *(n for n, p in model.named_parameters() if p.requires_grad)]
    for name, a, b, c in zip(names, got, want, expected, strict=True):
        assert_within_budget(a.detach(), b.detach(), c.detach(), what=name)


@pytest.mark.parametrize("kind", ["single", "ignored", "soft", "several", "regression"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_accumulated_batches_weigh_as_one(kind, reduction) -> None:
    """Two batches of 3 and 2 rows, each divided by the number of labels of both, sum to the mean of all five."""
    problem = {"several": "multi_label_classification", "regression": "regression"}.get(
        kind, "single_label_classification"
    )
    loss, whole = GistLoss(problem_type=problem, reduction=reduction), GistLoss(problem_type=problem)
    z, g = torch.randn(2, 5, 4)
    y = {"single": torch.randint(4, (5,)), "soft": torch.rand(5, 4).softmax(-1)}.get(kind, torch.rand(5, 4))
    if kind == "ignored":
        y = torch.tensor([1, -100, 3, -100, 0])
    number = y.ne(-100).sum()
    func = gist_loss_func(loss)
    parts = [{"logits": z[part], "gist_logits": g[part]} for part in (slice(3), slice(3, 5))]
    got = sum(
        func(out, y[part], count) for out, part, count in zip(parts, (slice(3), slice(3, 5)), (number, int(number)))
    )
    torch.testing.assert_close(got, whole(z, g, y))


def test_loss_func_alone() -> None:
    z, g = torch.randn(2, 3, 4)
    y = torch.tensor([0, 3, 1])
    torch.testing.assert_close(gist_loss_func()({"logits": z, "gist_logits": g}, y), GistLoss()(z, g, y))
    torch.testing.assert_close(gist_loss_func()({"logits": z}, y), nn.functional.cross_entropy(z, y))
    with pytest.raises(TypeError, match="outputs must be a gist model's, with 'logits', got Tensor"):
        gist_loss_func()(z, y)


@pytest.mark.parametrize("make", [bert, llama])
def test_configurations(make) -> None:
    model = make()
    config, before = model.config, copy.deepcopy(vars(model.config))
    gist = add_gist(model, GistConfig(dropout=0.3))
    assert gist.config is config and gist.gist_config == GistConfig(dropout=0.3)
    assert config.keys_to_ignore_at_inference == ["past_key_values", "gist_logits"]
    with disable_adapter(gist):
        assert vars(config) == before
    assert config.keys_to_ignore_at_inference == ["past_key_values", "gist_logits"]
    config.keys_to_ignore_at_inference += ["mine"]
    with pytest.warns(UserWarning, match="leaves the sequence"):
        unload(gist)
    assert config.keys_to_ignore_at_inference == ["past_key_values", "mine"]
    timm_model = add_gist(vit(), GistConfig(dropout=0.3))  # timm's have no configuration of their own
    assert timm_model.config is timm_model.gist_config and timm_model.gist_config.dropout == 0.3


# -- transformers' Trainer -------------------------------------------------------------------------------------------
def stepped(model: nn.Module, batch: list[dict], loss: GistLoss) -> nn.Module:
    """One SGD step by hand on all rows at once."""
    model = copy.deepcopy(model).train()
    inputs = {k: torch.stack([row[k] for row in batch]) for k in ("input_ids", "attention_mask")}
    loss(model(**inputs), torch.tensor([row["labels"] for row in batch])).backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)
    return model


@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("how", ["plain", "compute_loss_func", "checkpointing"])
def test_a_trainers_step_is_the_step_by_hand(make, how, tmp_path) -> None:
    """Two batches of two rows, accumulated, change the parameters as one batch of four does."""
    model, data = still(make(), LoraConfig(rank=2)), rows(4)
    loss = GistLoss(0.3, 0.9, 2.0)
    want = stepped(model, data, loss)
    options: dict = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
    }
    if how == "checkpointing":
        options["gradient_checkpointing"] = True
    if how != "compute_loss_func":
        model.loss = loss
    func = gist_loss_func(loss) if how == "compute_loss_func" else None
    trainer = Trainer(model, settings(tmp_path, **options), train_dataset=data, compute_loss_func=func)
    trainer.train()
    torch.testing.assert_close(dict(model.named_parameters()), dict(want.named_parameters()))
    prediction = trainer.predict(data[:3])
    model.eval()
    inputs = {k: torch.stack([row[k] for row in data[:3]]) for k in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), logits)  # an array: gist logits are not in it
    entropy = nn.functional.cross_entropy(logits, torch.tensor([row["labels"] for row in data[:3]]))
    assert math.isclose(prediction.metrics["test_loss"], entropy.item(), rel_tol=1e-5)


@pytest.mark.parametrize("make", [llama, bert, partial(vit, num_classes=3), partial(swin, num_classes=3), distilled])
def test_a_trainer_that_smooths_labels_itself_is_told_of(make, tmp_path) -> None:
    """It keeps the labels and takes a loss without the gist logits: known at the first backward, and said once."""
    model = still(make(), LoraConfig(rank=2))
    size = model.model.patch_embed.img_size[0] if hasattr(model.model, "patch_embed") else 0
    data = [{"x": x, "labels": i % 3} for i, x in enumerate(images(8, size))] if size else rows(8)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = Trainer(model, settings(tmp_path, label_smoothing_factor=0.1, **options), train_dataset=data)
    with pytest.warns(UserWarning, match="does not read its gist logits.*label_smoothing_factor") as caught:
        trainer.train()
    assert sum("gist logits" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("loss", [GistLoss(), GistLoss(0.0, 0.0), GistLoss(label_smoothing=0.2)], ids=repr)
@pytest.mark.parametrize("func", [False, True])
def test_a_trainer_that_takes_the_gist_loss_is_not_warned_of(loss, func, tmp_path) -> None:
    """Nor where schedules have taken alpha and beta to 0 for a time."""
    model = still(bert(), LoraConfig(rank=2))
    model.loss = None if func else loss
    args = settings(tmp_path, max_steps=2)
    trainer = Trainer(model, args, train_dataset=rows(8), compute_loss_func=gist_loss_func(loss) if func else None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gist logits")
        trainer.train()
        model(**given(model)).logits.sum().backward()  # a loop of one's own, where no number of labels is given


def test_a_loss_without_gist_logits_is_seen_in_the_first_backward() -> None:
    model = still(bert(), LoraConfig(rank=2))
    with torch.no_grad():  # nothing to watch
        assert model(**given(model), num_items_in_batch=3).gist_logits is not None
    output = model(**given(model), num_items_in_batch=3)
    with pytest.warns(UserWarning, match="does not read its gist logits"):
        nn.functional.cross_entropy(output.logits, TARGET).backward()


def test_a_trainer_takes_timm_models(tmp_path) -> None:
    model = still(vit(num_classes=3), LoraConfig(rank=2))
    before = copy.deepcopy(model.gist.token.detach())
    data = [{"x": x, "labels": i % 3} for i, x in enumerate(images(4))]
    trainer = Trainer(model, settings(tmp_path), train_dataset=data)
    trainer.train()
    assert not torch.equal(model.gist.token, before)
    assert trainer.predict(data).predictions.shape == (4, 3)


def test_gist_trainer(tmp_path) -> None:
    """Schedules see the progress; checkpoints are adapters; a run that is resumed ends where one in one go ends."""
    data, base = rows(8), llama()
    seen: list[float] = []

    class Watched(GistLoss):
        def forward(self, *args):
            seen.append(self.progress)
            return super().forward(*args)

    def run(folder: str, steps: int, resume: str | None = None) -> nn.Module:
        torch.manual_seed(2)
        model = add_gist(get_peft_model(copy.deepcopy(base), CPConfig(rank=2, dropout=0.0)), GistConfig(dropout=0.0))
        model.loss = Watched(beta=Linear(1.0, 0.0))
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": steps, "per_device_train_batch_size": 2}
        args = settings(tmp_path / folder, optim="adamw_torch", **options)
        trainer = GistTrainer(model, args, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("a", 2)
    assert seen == [0.0, 0.25, 0.5, 0.75]
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    again = run("b", 4, resume=str(checkpoint))
    for (name, got), want in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want), name
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "a" / "checkpoint-4")
    given = texts("left")
    torch.testing.assert_close(loaded.eval()(**given).logits, whole.eval()(**given).logits)


def test_gist_trainer_keeps_the_best_and_refuses_the_rest(tmp_path) -> None:
    data = rows(4)
    model = still(llama(), LinearProbeConfig())
    options = {
        "max_steps": 3,
        "learning_rate": 30.0,
        "save_steps": 1,
        "eval_steps": 1,
        "per_device_train_batch_size": 4,
    }
    options |= {"save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True}
    trainer = GistTrainer(model, settings(tmp_path, **options), train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = min(losses)
    assert losses[-1] > best * 1.01, "the last is the best: nothing was loaded"
    assert math.isclose(trainer.evaluate()["eval_loss"], best, rel_tol=1e-5)
    with pytest.raises(TypeError, match="model must be a GistModel .*got LlamaForSequenceClassification"):
        GistTrainer(llama(), settings(tmp_path))
    with pytest.raises(ValueError, match="label_smoothing_factor replaces the model's loss"):
        GistTrainer(model, settings(tmp_path, label_smoothing_factor=0.1))


@pytest.mark.parametrize("number", [0, torch.tensor(0), torch.tensor(0.0)])
def test_a_step_of_ignored_labels_alone_is_zero(number) -> None:
    """Trainer counts no label then; the loss is 0 and so are its gradients, not NaN."""
    model = add_gist(bert()).train()
    ids = torch.randint(3, 50, (3, 6))
    loss = model(input_ids=ids, labels=torch.full((3,), -100), num_items_in_batch=number).loss
    loss.backward()
    assert float(loss) == 0
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(bool((g == 0).all()) for g in grads)
