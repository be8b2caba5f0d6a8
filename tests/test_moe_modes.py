"""InstructionMoE compiled and in two processes: the gradients are those of eager calls in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import RANKS, on_two_ranks
from torch import Tensor, nn

from fastgist.nn import InstructionMixer, InstructionMoE, load_balance_loss

B, N, L, D, K, H = 4, 5, 3, 12, 6, 3
FORMS = [("softmax", None), ("softmax", 2), ("uniform", None)]


class Stage(nn.Module):
    """Two phrasings of an instruction, a gate that serves queries and text, and the load-balance loss."""

    def __init__(self, gating: str, top_k: int | None) -> None:
        super().__init__()
        self.moe = InstructionMoE(D, K, H, gating, top_k, init="paper", dtype=torch.float64)
        self.mixer = InstructionMixer(2, dtype=torch.float64)

    def forward(self, queries: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        gate = self.mixer([self.moe.get_gate(text, mask), self.moe.get_gate(text.flip(-1), mask)])
        y = self.moe(queries, gate=gate).square().mean() + self.moe(text, gate=gate).tanh().mean()
        return y + self.moe.load_balance_loss()


def batch(rows: int = B) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.ones(rows, L, dtype=torch.int64)
    mask[0, 1:] = 0
    return torch.randn(rows, N, D, dtype=torch.float64), torch.randn(rows, L, D, dtype=torch.float64), mask


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    """A parameter that the loss does not reach (the mixer's, of constant gates) counts as zero."""
    module.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize(("gating", "top_k"), FORMS)
def test_one_graph_at_every_batch_size(gating, top_k) -> None:
    torch._dynamo.reset()
    stage = Stage(gating, top_k)
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    for rows in (4, 7, 3):
        inputs = batch(rows)
        for train in (True, False):
            stage.train(train)
            want, got = stage(*inputs), compiled(*inputs)
            torch.testing.assert_close(got, want)
            for mine, theirs in zip(gradients(stage, got), gradients(stage, want), strict=True):
                torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("gating", ["softmax", "uniform"])
def test_one_graph_under_autocast(gating) -> None:
    torch._dynamo.reset()
    stage = Stage(gating, None).float()
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    queries, text, mask = batch()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (call(queries.float(), text.float(), mask) for call in (stage, compiled))
    torch.testing.assert_close(got, want)


#: (gating, top_k, whether compiled)
CASES = [("softmax", 2, False), ("softmax", None, True), ("uniform", None, False)]


def one_rank(rank: int, states: list[dict], inputs: list) -> dict[str, Any]:
    found = []
    for (gating, top_k, compiled), state in zip(CASES, states):
        stage = Stage(gating, top_k)
        stage.load_state_dict(state)
        called = torch.compile(stage, backend="aot_eager") if compiled else stage
        model = nn.parallel.DistributedDataParallel(called, find_unused_parameters=gating == "uniform")
        found.append(gradients(stage, model(*inputs[rank])))
    return {"gradients": found}


def test_two_processes_average_the_gradients_of_their_samples(tmp_path) -> None:
    stages = [Stage(gating, top_k) for gating, top_k, _ in CASES]
    inputs = [batch() for _ in range(RANKS)]
    found = on_two_ranks(one_rank, tmp_path, [stage.state_dict() for stage in stages], inputs)
    want = [gradients(stage, sum(stage(*own) for own in inputs) / RANKS) for stage in stages]
    assert all(any(bool(t.any()) for t in case) for case in want)
    for rank in found:
        torch.testing.assert_close(rank["gradients"], want)


def test_load_balance_is_each_processs_own() -> None:
    """The mean over processes of a loss that is not linear in the batch: each levels its own samples' gates."""
    stage = Stage("softmax", None)
    _, text, mask = batch(2 * B)
    gates = [stage.moe.get_gate(text[part], mask[part]) for part in (slice(0, B), slice(B, None))]
    parts = sum(map(load_balance_loss, gates)) / 2
    assert not torch.allclose(parts, load_balance_loss(stage.moe.get_gate(text, mask)))
