"""distributed.mean_divisor: gradients averaged over processes are those of the mean over the tokens of all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import RANKS, on_two_ranks
from torch import nn

from fastgist import functional as F
from fastgist.distributed import mean_divisor
from fastgist.recipes.mutual import sparse_distillation, topk_of

LOSSES = ("sparse_distillation", "bidirectional_kl", "gist_loss", "gist_linear_loss")
#: Tokens that count on each rank, of 24: very unequal, and none at all.
COUNTS = {"unequal": (2, 19), "one rank has none": (0, 7), "none": (0, 0)}


def batch(count: int, rank: int):
    """(states (24, 8), the teacher's classes, targets of which ``count`` are not ignored)."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(24, 8, generator=generator)
    y = torch.randint(11, (24,), generator=generator)
    y[count:] = -100
    return x, topk_of(torch.randn(24, 11, generator=generator), 3), y


class Student(nn.Module):
    """A loss of two heads on the same states, or of a shared one: what DistributedDataParallel wraps."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.loss = loss
        self.head = nn.Linear(8, 11)
        if loss != "sparse_distillation":
            self.gist = nn.Linear(8, 8 if loss == "gist_linear_loss" else 11)

    def forward(self, x, known, y, divisor) -> torch.Tensor:
        if self.loss == "sparse_distillation":
            return sparse_distillation(self.head(x), *known, y, 0.5, divisor=divisor)
        if self.loss == "bidirectional_kl":
            return F.bidirectional_kl(self.head(x), self.gist(x), mask=y != -100, temperature=2.0, divisor=divisor)
        if self.loss == "gist_loss":
            return F.gist_loss(self.head(x), self.gist(x), y, divisor=divisor)
        return F.gist_linear_loss(x, self.gist(x), self.head.weight, self.head.bias, y, chunk_rows=7, divisor=divisor)


def model(loss: str) -> nn.Module:
    torch.manual_seed(5)
    return Student(loss)


def gradients(net: nn.Module, x, known, y, divisor) -> dict[str, torch.Tensor]:
    loss = net(x, known, y, divisor)
    loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters()} | {"loss": loss.detach()}


def work(rank: int, name: str) -> dict:
    x, known, y = batch(COUNTS[name][rank], rank)
    divisor = mean_divisor(y != -100)
    same = mean_divisor(COUNTS[name][rank]), mean_divisor(torch.tensor(COUNTS[name][rank]))
    ddp = nn.parallel.DistributedDataParallel
    found = {loss: gradients(ddp(model(loss)), x, known, y, divisor) for loss in LOSSES}
    return found | {"divisor": divisor, "same": torch.stack(same)}


@pytest.mark.parametrize("name", COUNTS)
def test_two_processes_have_the_gradients_of_one(name, tmp_path):
    """Every loss that has a divisor: the mean over the tokens of all ranks, however unequal their counts."""
    parts = [batch(count, rank) for rank, count in enumerate(COUNTS[name])]
    x, y = (torch.cat([part[n] for part in parts]) for n in (0, 2))
    known = [torch.cat([part[1][n] for part in parts]) for n in (0, 1)]
    ranks = on_two_ranks(work, tmp_path, name)
    for found in ranks:
        assert found["divisor"].dtype == torch.float32 and found["divisor"].dim() == 0
        assert float(found["divisor"]) == max(sum(COUNTS[name]), 1) / RANKS
        assert bool((found["same"] == found["divisor"]).all())
    for loss in LOSSES:
        want = gradients(model(loss), x, known, y, None)
        assert sum(COUNTS[name]) == 0 or all(bool(g.any()) for g in want.values()), loss
        for found in ranks:
            for parameter, exact in want.items():
                if parameter == "loss":
                    continue
                exact = exact if sum(COUNTS[name]) else torch.zeros_like(exact)
                torch.testing.assert_close(found[loss][parameter], exact, msg=f"{loss}: {parameter}")
        if sum(COUNTS[name]):
            torch.testing.assert_close(torch.stack([found[loss]["loss"] for found in ranks]).mean(), want["loss"])


def test_one_process():
    assert float(mean_divisor(torch.tensor([[True, False], [True, True]]))) == 3.0
    assert float(mean_divisor(0)) == 1.0 and mean_divisor(5).dtype == torch.float32
    count = torch.tensor(7)
    assert float(mean_divisor(count)) == 7.0 and int(count) == 7
    for wrong, message in (
        (2.5, "expected an int or a tensor, got float"),
        (True, "got bool"),
        (torch.tensor([3, 4]), r"torch.int64 of shape \(2,\)"),
        (torch.tensor(3.0), "torch.float32"),
    ):
        with pytest.raises(TypeError, match=f"mean_divisor: .*{message}"):
            mean_divisor(wrong)
    assert float(mean_divisor(np.int64(6))) == 6.0
    with pytest.raises(ValueError, match="mean_divisor: a count of tokens must be at least 0, got -5"):
        mean_divisor(-5)
