r"""What the released code does beside the paper, off unless asked for. Each stands around a layer of the Q-Former.

Let a be a layer's self-attention output and c its cross-attention's. Behind every cross-attention the code adds to query 0

.. math:: c_0 \mathrel{+}= 0.1\; \mathrm{mean}_{batch}(a_0),

and to every layer's output, queries and text alike, 0.1 (a * s + b) with trained vectors s and b, ~ N(0, 2e-4) at the start.
(It has a second such pair for c, which nothing reads.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgist.petal.calls import PerThread

__all__ = ["CrossOutput", "QueryTransformation", "Transformed"]

#: The released code's factor of the query transformation, and its spread (standard deviation) at the start.
SCALE, STD = 0.1, 2e-4


class QueryTransformation(nn.Module):
    """a (B, N, D) -> 0.1 (a * s + b)."""

    def __init__(self, dim: int, **place: Any) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.empty(dim, **place))
        self.b = nn.Parameter(torch.empty(dim, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.s, std=STD)
        nn.init.normal_(self.b, std=STD)

    def forward(self, a: Tensor) -> Tensor:
        return SCALE * (a * self.s + self.b)


class Transformed(nn.Module):
    """Around the output layer of a feed-forward part, whose second argument is the attention's output: adds the
    transformation of a. Where a cross-attention came between, its :class:`CrossOutput` has left a here."""

    def __init__(self, base_layer: nn.Module, transformation: QueryTransformation) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.transformation = transformation
        self._now = PerThread(before=None)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        before, self._now["before"] = self._now["before"], None
        y = self.base_layer(hidden_states, input_tensor)
        return y + self.transformation(input_tensor if before is None else before).to(y.dtype)


class CrossOutput(nn.Module):
    """Around a cross-attention's output layer, whose second argument is a: query 0 gets ``factor`` times the batch's mean of
    a_0, and the layer's :class:`Transformed` learns of a."""

    def __init__(self, base_layer: nn.Module, factor: float, transformed: Transformed | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.factor = factor
        self.__dict__["transformed"] = transformed  # not a submodule: it stands elsewhere in the layer

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y = self.base_layer(hidden_states, input_tensor)
        if self.transformed is not None:
            self.transformed._now["before"] = input_tensor
        if not self.factor:
            return y
        mean = input_tensor[:, :1].mean(0, keepdim=True)
        return torch.cat((y[:, :1] + (self.factor * mean).to(y.dtype), y[:, 1:]), dim=1)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"
