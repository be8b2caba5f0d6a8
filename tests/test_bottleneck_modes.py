"""InformationBottleneckLoss compiled and in two processes: gradients and state are those of eager calls in one."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from ranks import RANKS, on_two_ranks
from torch import Tensor, nn

from fastgist.nn import InformationBottleneckLoss

WIDTHS: dict[str, Any] = {"z_dim": 12, "x_dim": 10, "y_dim": 20, "bank": 512, "eta": 1.0}
FORMS: list[dict[str, Any]] = [
    {},
    {"compression": "club", "relevance": "mine", "estimator_steps": 2},
    {"compression": "score", "relevance": "mine", "projection": "learned", "degree": 2},
    {"preset": "released"},
]


def loss_of(options: dict[str, Any]) -> InformationBottleneckLoss:
    return InformationBottleneckLoss(**WIDTHS, **options)


def fix_noise(monkeypatch) -> None:
    """A compiled graph may draw in another order than eager code; here every draw depends on its shape alone."""

    def wave(*shape: int, **options: Any) -> Tensor:
        return torch.cos(torch.arange(math.prod(shape), **options) * 1.7).view(shape)

    monkeypatch.setattr(torch, "randn", wave)
    monkeypatch.setattr(torch, "randn_like", lambda t: wave(*t.shape, dtype=t.dtype, device=t.device))
    monkeypatch.setattr(torch, "randint", lambda low, high, shape, device: torch.full(shape, 3, device=device))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_one_graph_with_the_estimators_own_steps(options, tokens, monkeypatch) -> None:
    """Banks are full after two steps, so that scores have gradients; CLUB and MINE learn from the first."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    eager = loss_of(options)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    fix_noise(monkeypatch)
    for step in range(4):
        z, x, y = (torch.rand(300, width, generator=generator) for width in (12, 10, 20))
        y = (y[:, :3] * 20).long() if tokens else y
        for train in (True, False):
            results = []
            for module, call in ((eager, eager), (other, compiled)):
                module.train(train)
                mine = z.clone().requires_grad_()
                value = call(mine, x, y)
                value.backward()
                results.append((value.detach(), mine.grad, dict(module.values)))
            torch.testing.assert_close(results[1], results[0])
            if train and step > 1:
                assert bool(results[0][1].any())
        torch.testing.assert_close(dict(other.named_buffers()), dict(eager.named_buffers()))


def test_a_stray_token_makes_a_compiled_row_nan() -> None:
    torch._dynamo.reset()
    loss = loss_of({"compression": None, "relevance": "mine"}).eval()
    z, y = torch.randn(4, 12), torch.tensor([[1, 2], [20, 3], [4, -100], [5, 6]])
    with pytest.raises(ValueError, match=r"y holds token 20, expected \[0, 20\) or -100"):
        loss(z, None, y)
    assert bool(torch.compile(loss, fullgraph=True, backend="aot_eager")(z, None, y).isnan())


# -- two processes ---------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A model whose pooled output the loss is about; it may hold the loss, too."""

    def __init__(self, loss: InformationBottleneckLoss | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 12)
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.layer(x)
        return z if self.loss is None else self.loss(z, x, y)


STEPS, ROWS = 4, 256
BOUNDS = {"compression": "club", "relevance": "mine"}
#: (options, where the loss is): beside the DDP-wrapped model, within it, or within it without broadcast of buffers.
CASES = [({}, "beside"), (BOUNDS, "beside"), (BOUNDS, "within"), (BOUNDS, "without broadcast")]


def batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(ROWS, 10, generator=generator), torch.randn(ROWS, 20, generator=generator)) for _ in range(STEPS)
    ]


def one_rank(rank: int, starts: list[tuple[dict, dict]]) -> dict[str, Any]:
    return {"cases": [one_case(rank, *case, *start) for case, start in zip(CASES, starts)]}


def one_case(rank: int, options: dict, place: str, weights: dict, state: dict) -> tuple[list[list[Tensor]], dict]:
    """The gradients of each step, and the loss's state in the end."""
    loss = loss_of(options)
    loss.load_state_dict(state)
    encoder = Encoder(None if place == "beside" else loss)
    encoder.layer.load_state_dict(weights)
    model = nn.parallel.DistributedDataParallel(encoder, broadcast_buffers=place == "within")
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    found = []
    for step, (x, y) in enumerate(batches(rank)):
        torch.manual_seed(1000 * rank + step)  # noise of their own
        optimizer.zero_grad()
        output = model(x, y)
        (loss(output, x, y) if place == "beside" else output).backward()
        found.append([p.grad.clone() for p in encoder.parameters()])
        optimizer.step()
    return found, dict(loss.state_dict())


def by_hand(options: dict, place: str, weights: dict, state: dict) -> tuple[list[list[Tensor]], list[dict]]:
    """In one process: an estimator for each one's samples, the mean of the two gradients."""
    encoder, losses = Encoder(), [loss_of(options) for _ in range(RANKS)]
    encoder.layer.load_state_dict(weights)
    for loss in losses:
        loss.load_state_dict(state)
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
    found = []
    for step in range(STEPS):
        if place == "within":  # DDP gives all processes rank 0's buffers before each forward
            losses[1].load_state_dict(losses[0].state_dict())
        mean = [torch.zeros_like(p) for p in encoder.parameters()]
        for rank, loss in enumerate(losses):
            x, y = batches(rank)[step]
            torch.manual_seed(1000 * rank + step)
            encoder.zero_grad()
            loss(encoder(x, y), x, y).backward()
            mean = [m + p.grad / RANKS for m, p in zip(mean, encoder.parameters())]
        for p, m in zip(encoder.parameters(), mean):
            p.grad = m
        found.append(mean)
        optimizer.step()
    return found, [dict(loss.state_dict()) for loss in losses]


def test_two_processes_average_two_estimates(tmp_path) -> None:
    starts = [(Encoder().layer.state_dict(), dict(loss_of(options).state_dict())) for options, _ in CASES]
    found = [rank["cases"] for rank in on_two_ranks(one_rank, tmp_path, starts)]
    for number, (case, start) in enumerate(zip(CASES, starts)):
        want, states = by_hand(*case, *start)
        assert all(bool(t.any()) for t in want[-1])
        for rank in range(RANKS):
            gradients, state = found[rank][number]
            torch.testing.assert_close(gradients, want)
            torch.testing.assert_close(state, states[rank])
        name = "z_bank" if "z_bank" in states[0] else "club.mu_in"
        assert not torch.equal(found[0][number][1][name], found[1][number][1][name])  # each learns from its own samples
