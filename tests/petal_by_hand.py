"""PETAL on a model with a Q-Former written out: every matrix by itself, experts one by one. Parameters are those of a
wrapped model, so that gradients arrive in the same places."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn import CPLinear
from fastgist.peft import state


class Updated(nn.Module):
    """y = W x + b + (U S V^T)^T x, S in full."""

    def __init__(self, base: nn.Linear, ours: CPLinear) -> None:
        super().__init__()
        self.base, self.ours = base, [ours]

    def forward(self, x: Tensor) -> Tensor:
        factors, mode = self.ours[0].factors, self.ours[0].mode
        if factors.core == "cp":
            core = torch.diag(factors.lam * factors.p[mode])
        else:
            core = torch.einsum("r,str->st", factors.p[mode], factors.c)
        return self.base(x) + x @ (factors.u @ core @ factors.v.T)


class Experts(nn.Module):
    """The experts behind the embeddings of InstructBLIP, where the instruction has no padding but what ``mask`` says."""

    def __init__(self, base: nn.Module, ours: Any, queries: int, mask: Tensor) -> None:
        super().__init__()
        self.base, self.ours, self.queries, self.mask = base, [ours], queries, mask

    def forward(self, x: Tensor) -> Tensor:
        e = self.ours[0]
        x = self.base(x)
        h = e.bottleneck_dim
        outs = []
        for k in range(e.num_experts):
            rows = slice(k * h, (k + 1) * h)
            hidden = nn.functional.linear(x, e.down_weight[rows], e.down_bias[rows])
            outs.append(nn.functional.linear(hidden, e.up_weight[:, rows], e.up_bias[k]))
        if e.gating == "uniform":
            return 0.6 * x + 0.4 * torch.stack(outs).mean(0)
        pooled = torch.stack([row[self.queries :][m.bool()].mean(0) for row, m in zip(x, self.mask, strict=True)])
        gate = torch.softmax(pooled @ e.gate_weight.T + e.gate_bias, -1)
        return x + sum(gate[:, k, None, None] * out for k, out in enumerate(outs))


def by_hand(wrapped: Any, plain: Any, mask: Tensor | None) -> Any:
    """``plain``, the model before wrapping, with the updates of ``wrapped``."""
    model = copy.deepcopy(plain)
    for path, site in state.state_of(wrapped).record().sites.items():
        if isinstance(site, CPLinear):
            state.replace_module(model, path, Updated(model.get_submodule(path), site))
        elif site.experts is not None:
            base = model.get_submodule(path)
            state.replace_module(model, path, Experts(base, site.experts, model.query_tokens.shape[1], mask))
    return model
