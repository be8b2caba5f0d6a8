"""GistLoss beyond the paper's defaults, and the recipes on the same operation, each against its formula written out."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgist import GistOutput
from fastgist.nn import Cosine, GistLoss, Linear
from fastgist.recipes.mutual import (
    mutual_learning,
    r_drop,
    self_distillation,
    sparse_distillation,
    topk_of,
    two_passes,
)


def logits(rows=6, classes=5):
    return [torch.randn(rows, classes, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def divergence(z, g, temperature):
    p, q = (z / temperature).softmax(-1), (g / temperature).softmax(-1)
    return ((p - q) * (p.log() - q.log())).sum(-1).mean()


def same(ours, theirs, leaves) -> None:
    torch.testing.assert_close(ours, theirs)
    mine = torch.autograd.grad(ours, leaves, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(theirs, leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(mine, want, strict=True):
        torch.testing.assert_close(a, b)


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interaction", ["bkld", "mse"])
@pytest.mark.parametrize("detach", [None, "logits", "gist_logits"])
@pytest.mark.parametrize("halve", [False, True])
def test_detached_and_halved(interaction, detach, halve) -> None:
    z, g = logits()
    y = torch.tensor([0, 1, -100, 3, 4, 0])
    keep = y >= 0
    ours = GistLoss(0.4, 0.6, 2.0, interaction, detach=detach, halve=halve, t_squared=True)(z, g, y)
    zi, gi = (z.detach() if detach == "logits" else z)[keep], (g.detach() if detach == "gist_logits" else g)[keep]
    coupling = divergence(zi, gi, 2.0) if interaction == "bkld" else ((zi - gi) / 2).square().mean()
    theirs = F.cross_entropy(z, y) + 0.4 * F.cross_entropy(g, y) + 0.6 * 4 * (0.5 if halve else 1.0) * coupling
    same(ours, theirs, (z, g))


def test_an_interaction_of_ones_own() -> None:
    z, g = logits()
    y = torch.tensor([0, 1, -100, 3, 4, 0])

    def huber(a, b, temperature):
        return F.huber_loss(a / temperature, b / temperature, reduction="none").sum(-1)

    ours = GistLoss(interaction=huber)(z, g, y)
    rows = F.huber_loss(z / 3, g / 3, reduction="none").sum(-1)[y >= 0]
    same(ours, F.cross_entropy(z, y) + 0.5 * F.cross_entropy(g, y) + 0.75 * rows.mean(), (z, g))
    with pytest.raises(ValueError, match=r"must return a number a row, \(6,\), got \(\)"):
        GistLoss(interaction=lambda a, b, t: (a - b).sum())(z, g, y)
    with pytest.raises(ValueError, match=r"must return a number a row, \(6,\), got float"):
        GistLoss(interaction=lambda a, b, t: 1.0)(z, g, y)
    assert "huber" in repr(GistLoss(interaction=huber))


def test_schedules() -> None:
    z, g = logits()
    y = torch.randint(5, (6,))
    loss = GistLoss(beta=Linear(0.0, 1.0, until=0.5), temperature=Cosine(10.0, 2.0))
    for progress, beta, temperature in ((0.0, 0.0, 10.0), (0.25, 0.5, 10 - 8 * (0.5 - 0.5 * 2**-0.5)), (1.0, 1.0, 2.0)):
        loss.progress = progress
        same(loss(z, g, y), GistLoss(beta=beta, temperature=temperature)(z, g, y), (z, g))
    assert pickle.loads(pickle.dumps(loss)).beta == loss.beta
    assert Linear(1.0, 3.0, 0.2, 0.4)(0.0) == 1.0 and Linear(1.0, 3.0, 0.2, 0.4)(0.9) == 3.0
    with pytest.raises(ValueError, match="expected 0 <= since < until <= 1, got 0.5 and 0.5"):
        Linear(0.0, 1.0, 0.5, 0.5)
    with pytest.raises(ValueError, match="temperature must be finite and > 0, got 0.0"):
        GistLoss(temperature=Linear(0.0, 1.0))(z, g, y)


# -- other problems --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interaction", ["bkld", "mse", "cosine"])
def test_several_labels(interaction) -> None:
    z, g = logits()
    y = (torch.rand(6, 5) < 0.4).double()
    ours = GistLoss(interaction=interaction, problem_type="multi_label_classification")(z, g, y)
    p, q = (z / 3).sigmoid(), (g / 3).sigmoid()
    coupling = {
        "bkld": ((p - q) * (p.log() - (1 - p).log() - q.log() + (1 - q).log())).mean(),
        "mse": ((z - g) / 3).square().mean(),
        "cosine": (1 - F.cosine_similarity(z, g, -1)).mean(),
    }[interaction]
    bce = F.binary_cross_entropy_with_logits
    same(ours, bce(z, y) + 0.5 * bce(g, y) + 0.75 * coupling, (z, g))
    loss = GistLoss(problem_type="multi_label_classification")
    same(loss({"logits": z}, y), bce(z, y), (z,))


def test_regression() -> None:
    z, g = logits(classes=1)
    y = torch.randn(6, 1, dtype=torch.float64)
    theirs = F.mse_loss(z, y) + 0.5 * F.mse_loss(g, y) + 0.75 * ((z - g) / 3).square().mean()
    same(GistLoss(problem_type="regression")(z, g, y), theirs, (z, g))
    rows = GistLoss(problem_type="regression", reduction="none")(z, g, y)
    assert rows.shape == (6,)
    with pytest.raises(ValueError, match=r"regression expects target\.shape == \(6, 1\), got \(6,\)"):
        GistLoss(problem_type="regression")(z, g, y[:, 0])
    with pytest.raises(ValueError, match="regression has no distribution for interaction='jsd'; take mse"):
        GistLoss(interaction="jsd", problem_type="regression")
    with pytest.raises(ValueError, match="interaction='jsd' is one label's; for several take bkld"):
        GistLoss(interaction="jsd", problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="label_smoothing is for single_label_classification"):
        GistLoss(label_smoothing=0.1, problem_type="regression")
    with pytest.raises(ValueError, match="detach must be one of None, logits, gist_logits, got 'both'"):
        GistLoss(detach="both")
    with pytest.raises(ValueError, match="problem_type must be one of single_label_classification, .*got 'ranking'"):
        GistLoss(problem_type="ranking")


def test_mixup_and_tokens() -> None:
    """Soft targets of mixed images; a label for every token of a sequence, some of them padding."""
    z, g = logits()
    a, b = torch.randint(5, (6,)), torch.randint(5, (6,))
    soft = 0.3 * F.one_hot(a, 5) + 0.7 * F.one_hot(b, 5).double()
    loss = GistLoss()
    same(loss(z, g, soft), 0.3 * loss(z, g, a) + 0.7 * loss(z, g, b), (z, g))
    tokens = [t.detach().reshape(2, 3, 5).requires_grad_() for t in (z, g)]
    y = torch.tensor([[1, 2, -100], [0, -100, -100]])
    flat = [t.reshape(6, 5) for t in tokens]
    same(loss(*tokens, y), loss(*flat, y.flatten()), tokens)


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_r_drop() -> None:
    z, g = logits()
    y = torch.randint(5, (6,))
    same(r_drop(z, g, y, 4.0), F.cross_entropy(z, y) + F.cross_entropy(g, y) + 2.0 * divergence(z, g, 1.0), (z, g))
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 5))
    first, second = two_passes(model, torch.randn(6, 4))
    assert first.shape == second.shape == (6, 5)
    assert not torch.equal(first, second)
    with pytest.warns(RuntimeWarning, match="this Sequential .* in evaluation mode"):
        first, second = two_passes(model.eval(), torch.randn(6, 4))
    torch.testing.assert_close(first, second)


class Reader(nn.Module):
    """Takes its batch as Hugging Face's models do, or as one dict; remembers what came."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.table, self.dropout, self.head = nn.Embedding(11, 8), nn.Dropout(p), nn.Linear(8, 5)
        self.came: dict = {}

    def forward(self, input_ids=None, attention_mask=None, extra=None):
        self.came = {"input_ids": input_ids, "attention_mask": attention_mask, "extra": extra}
        if isinstance(input_ids, dict):
            input_ids, attention_mask = input_ids["ids"], input_ids["mask"]
        kept = self.dropout(self.table(input_ids)) * attention_mask[..., None]
        return {"loss": None, "logits": self.head(kept.sum(1))}


def test_two_passes_of_batches_by_name() -> None:
    ids, mask = torch.randint(11, (3, 7)), torch.rand(3, 7) < 0.8
    batch = UserDict({"input_ids": ids, "attention_mask": mask})  # what a tokenizer gives
    model = Reader(0.0).eval()
    with pytest.warns(RuntimeWarning):
        want = two_passes(model, ids, mask)
    for found in (two_passes(model, batch), two_passes(model, **batch), two_passes(model, {"ids": ids, "mask": mask})):
        assert [z.shape for z in found] == [(3, 5)] * 2
        torch.testing.assert_close(found, want)
    nested = {"a": [ids, (mask, None)], "positions": torch.arange(7)[None], "scale": torch.tensor(2.0), "name": "x"}
    two_passes(model, ids, mask, extra=nested)
    came = model.came["extra"]
    assert torch.equal(came["a"][0], torch.cat((ids, ids))) and torch.equal(came["a"][1][0], torch.cat((mask, mask)))
    assert came["a"][1][1] is None and came["name"] == "x" and came["scale"].dim() == 0
    assert came["positions"].shape == (1, 7)  # the same for every row
    assert two_passes(nn.Dropout(0.5), ids[:1].float())[0].shape == (1, 7)


def test_two_passes_says_what_came() -> None:
    with pytest.raises(TypeError, match="expected tensors .*got none"):
        two_passes(Reader(), "text")
    with pytest.raises(TypeError, match="must return logits or an output that holds 'logits', got tuple"):
        two_passes(nn.LSTM(4, 4), torch.randn(3, 2, 4))
    with pytest.raises(ValueError, match=r"expected logits of 6 rows, two for each that came, got \(3, 4\)"):
        two_passes(nn.Sequential(nn.Unflatten(0, (2, 3)), nn.Flatten(0, 0), Sum()), torch.randn(3, 4))


class Sum(nn.Module):
    def forward(self, x):
        return x.sum(0)


class Noisy(nn.Module):
    """Draws by no layer that says so."""

    def forward(self, x):
        return x * torch.rand_like(x)


def test_equal_passes_are_one_warning(recwarn) -> None:
    x = torch.randn(3, 4)
    plain, dropped = nn.Linear(4, 5), nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5))
    for _ in range(2):
        two_passes(plain, x)
        two_passes(dropped, x)
        two_passes(Noisy().eval(), x)
    (one,) = recwarn.list
    assert one.category is RuntimeWarning and one.filename == __file__
    assert "this Linear give the same logits: no dropout in it is active" in str(one.message)
    two_passes(dropped.eval(), x)
    (_, two) = recwarn.list
    assert "it is in evaluation mode (call model.train())" in str(two.message)


def test_two_passes_of_a_transformers_classifier() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=12, num_labels=3, **sizes)
    model = transformers.BertForSequenceClassification(config).train()
    batch = transformers.BatchEncoding({"input_ids": torch.randint(20, (4, 6)), "labels": torch.randint(3, (4,))})
    first, second = two_passes(model, batch)
    assert first.shape == (4, 3) and not torch.equal(first, second)
    r_drop(first, second, batch["labels"]).backward()
    assert model.classifier.weight.grad.abs().sum() > 0


def test_mutual_learning() -> None:
    peers = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    y = torch.randint(5, (6,))
    theirs = sum(F.cross_entropy(z, y) for z in peers)
    for k, own in enumerate(peers):
        theirs = theirs + 0.8 / 2 * sum(divergence(own, o.detach(), 2.0) for j, o in enumerate(peers) if j != k)
    same(mutual_learning(peers, y, 0.8, 2.0), theirs, peers)
    with pytest.raises(ValueError, match="at least 2 networks, got 1"):
        mutual_learning(peers[:1], y)
    with pytest.raises(
        TypeError, match=r"a list of the networks' logits, \[z_1, z_2\], .*got one tensor of shape \(6, 5\)"
    ):
        mutual_learning(peers[0], y)
    with pytest.raises(TypeError, match=r"target must be a tensor of classes, got list"):
        mutual_learning(peers[0:2], [1, 2])
    with pytest.raises(TypeError, match="network 1 gave dict"):
        mutual_learning([peers[0], {"logits": peers[1]}], y)


def test_arguments_in_the_wrong_order() -> None:
    z, g = logits()
    y = torch.randint(5, (6,))
    loss = GistLoss()
    with pytest.raises(TypeError, match=r"target must be a Tensor, got GistOutput; called as \(output, target\)"):
        loss(y, GistOutput(logits=z, gist_logits=g))
    with pytest.raises(TypeError, match=r"\(output, target\), got torch.int64 of shape \(6,\) as the output"):
        loss(y, z)
    with pytest.raises(TypeError, match=r"got logits of shape \(6, 5\), which require grad, as the target"):
        loss(z, g)
    loss(z, g.detach().softmax(-1)).backward()


def test_self_distillation() -> None:
    z, teacher = logits()
    y = torch.randint(5, (6,))
    same(
        self_distillation(z, teacher, y, 0.5, 4.0),
        F.cross_entropy(z, y) + 8 * divergence(z, teacher.detach(), 4.0),
        (z, teacher),
    )


@pytest.mark.parametrize("recipe", ["r_drop", "mutual_learning", "self_distillation"])
def test_recipes_train_a_small_network_on_digits(recipe) -> None:
    """A few steps on real handwritten digits lower the loss of the task itself, on images that were not trained on."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)

    def network():
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))

    models = [network() for _ in range(2 if recipe == "mutual_learning" else 1)]
    teacher = copy.deepcopy(models[0])
    optimizer = torch.optim.Adam([p for m in models for p in m.parameters()], 3e-3)
    for step in range(40):
        rows = torch.randint(1200, (64,), generator=torch.Generator().manual_seed(step))
        if recipe == "r_drop":
            loss = r_drop(*two_passes(models[0], x[rows]), y[rows])
        elif recipe == "mutual_learning":
            loss = mutual_learning([m(x[rows]) for m in models], y[rows])
        else:
            loss = self_distillation(models[0](x[rows]), teacher(x[rows]), y[rows], weight=0.1)
            with torch.no_grad():  # the teacher is an average of the student
                for mean, p in zip(teacher.parameters(), models[0].parameters(), strict=True):
                    mean.lerp_(p, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for model in models:
        accuracy = (model.eval()(x[1200:]).argmax(-1) == y[1200:]).float().mean()
        assert accuracy > 0.75, f"chance is 0.1, got {accuracy}"


def test_topk_of() -> None:
    z = torch.randn(2, 3, 20).bfloat16() * 4
    t, i = topk_of(z, 5, temperature=2.0)
    want = (z.double() / 2).log_softmax(-1)
    assert t.dtype == torch.float32 and torch.equal(i[..., 0], z.argmax(-1))
    torch.testing.assert_close(t.double(), want.gather(-1, i), rtol=1e-6, atol=1e-6)
    sure = torch.tensor([[0.0, 25.0, 1.0, -3.0]])  # a float32 log_softmax says 0 here
    t, i = topk_of(sure + 64.0, 1)
    assert int(i) == 1 and float(sure.log_softmax(-1).amax()) == 0.0
    others = (sure.double()[:, [0, 2, 3]] - 25).exp().sum(-1, keepdim=True)
    torch.testing.assert_close(t.double(), -others.log1p(), rtol=1e-6, atol=0)
    for k, temperature, message in (
        (0, 1.0, "k must be 1 to 4"),
        (5, 1.0, "got 5"),
        (1, 0.0, "finite and > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            topk_of(sure, k, temperature)
    assert not topk_of(sure.requires_grad_(), 2)[0].requires_grad


@pytest.mark.parametrize("ignored", [False, True])
def test_sparse_distillation(ignored) -> None:
    """Of all classes but the least likely it is the dense divergence; ignored rows leave both, whatever the teacher says."""
    z, teacher = logits()
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    kept = torch.ones(6, dtype=torch.bool)
    if ignored:
        y[2], kept[2] = -100, False
    q = (teacher.detach() / 2).softmax(-1)
    known = topk_of(teacher, 4, temperature=2.0)
    if ignored:
        known[0][2], known[1][2] = torch.nan, 1000
    for divisor in (None, torch.tensor(11.0)):
        n = int(kept.sum()) if divisor is None else 11
        kl = (q * (q.log() - (z / 2).log_softmax(-1))).sum(-1)
        ours = sparse_distillation(z, *known, y, 0.7, 2.0, divisor=divisor)
        same(ours, (F.cross_entropy(z, y, reduction="sum") + 0.7 * 4 * kl[kept].sum()) / n, (z,))


def test_hard_15_without_gist_logits_an_ignored_row_may_hold_anything():
    logits = torch.randn(4, 7)
    target = torch.tensor([1, -100, 3, -100])
    logits[1], logits[3] = torch.nan, torch.inf
    logits.requires_grad_()
    loss = GistLoss(label_smoothing=0.1)(logits, target)
    loss.backward()
    clean = logits.detach()[[0, 2]].requires_grad_()
    want = torch.nn.functional.cross_entropy(clean, target[[0, 2]], label_smoothing=0.1)
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(logits.grad[[0, 2]], clean.grad)
    assert not logits.grad[[1, 3]].any()


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("divisor", [0, -1.0, float("nan"), float("inf"), torch.ones(2)])
def test_what_a_mean_divides_by_is_checked_without_gist_logits_too(problem, divisor):
    logits, target = torch.randn(4, 7), torch.zeros(4, dtype=torch.int64)
    if problem != "single_label_classification":
        target = torch.rand(4, 7)
    loss = GistLoss(problem_type=problem)
    with pytest.raises(ValueError, match="divisor must be"):
        loss(logits, target, divisor=divisor)
    assert loss(logits, target, divisor=8) == loss(logits, target, divisor=torch.tensor(8)) == loss(logits, target) / 2
    assert loss(logits.new_zeros(0, 7), target[:0], divisor=torch.tensor(0)) == 0
