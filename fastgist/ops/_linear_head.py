"""The gradient of gist_linear_loss's head, in one of two ways.

As a sum over chunks of rows, six products in all: each chunk adds its own, in float32, and what is summed is narrowed at the
end. Beside a bfloat16 head's gradient that sum is twice as large, and every chunk reads and writes it. Or by blocks of classes
in a second pass, eight products: the first pass leaves a few numbers a row, with which a block's logits, formed again for all
rows, become its gradients, and the head's gradient at these classes is one product, written once in its own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgist.ops._linear_chunks import RowWork, padded
from fastgist.reference._numerics import row_blocks

__all__ = ["States", "Sum", "add_rows", "added_at_a_time", "by_classes", "logits"]

#: Elements of the head's gradient that a chunk adds at a time, at most, where the sum is wider than the product: what lies
#: between them is this large, not as large as the head.
_MOST_ADDED, _MOST_ADDED_ON_CPU = 2**24, 2**22
#: What that takes of a budget: a sixteenth.
_SHARE_ADDED = 16


def added_at_a_time(room: int, device: torch.device, itemsize: int) -> tuple[int, int]:
    """(elements of a product of ``itemsize`` that a wider sum is given at a time, the bytes that they take): a share of
    ``room`` bytes where that is given, not 0. On a CPU torch makes a float32 copy of the product."""
    most, each = (_MOST_ADDED_ON_CPU, itemsize + 4) if device.type == "cpu" else (_MOST_ADDED, itemsize)
    elements = max(1, min(most, room // _SHARE_ADDED // each)) if room else most
    return elements, elements * each


class States:
    """The hidden states (M, H) of both heads. ``clear``: rows that are ignored are stacked as zeros, since 0 times what they
    hold is not 0 in the head's gradient if it is NaN."""

    def __init__(self, hidden: Tensor, gist_hidden: Tensor, target: Tensor, ignore_index: int, clear: bool) -> None:
        self.hidden, self.gist_hidden, self.target, self.ignore_index = hidden, gist_hidden, target, ignore_index
        self.clear = clear and not target.is_floating_point()

    def stacked(self, rows: slice) -> Tensor:
        """A copy (2 m, H) of some rows: rows i and m + i are a pair."""
        both = torch.cat((self.hidden[rows], self.gist_hidden[rows]))
        if self.clear:
            ignored = self.target[rows] == self.ignore_index
            both.masked_fill_(torch.cat((ignored, ignored))[:, None], 0.0)
        return both


def logits(states: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(states, weight.t(), out=out)
    return torch.addmm(bias, states, weight.t(), out=out)


def add_rows(total: Tensor, grad_logits: Tensor) -> None:
    """Add up the rows of (n, V) in ``total`` (V,), which is wider."""
    # A CPU widens what it sums: by blocks. Of many classes a block is a row or two, whose sums one after the other err more.
    for rows in [slice(None)] if grad_logits.dtype == total.dtype else row_blocks(grad_logits):
        total.add_(grad_logits[rows].sum(0, dtype=total.dtype))


class Sum:
    """The gradient (V, H) of the head, summed over ``chunks`` in ``dtype``: in bfloat16 the later ones would be rounded away.

    It comes as ``kept``. The gradient of one chunk alone is written in it at once; of several, ``elements`` are added at a
    time where the sum is wider.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, kept: torch.dtype, chunks: int, elements: int) -> None:
        self.kept, self.elements = kept, elements
        make = torch.empty if chunks else torch.zeros
        self.sum = make(weight.shape, dtype=kept if chunks == 1 else dtype, device=weight.device)
        self.begun = False

    def add(self, grad_logits: Tensor, states: Tensor) -> None:
        """(n, V) gradients of logits and the (n, H) states that made them."""
        total, beta = self.sum, 1.0 if self.begun else 0.0
        if total.dtype == states.dtype:
            total.addmm_(grad_logits.t(), states, beta=beta)
        else:
            step = max(1, self.elements // max(states.shape[1], 1))
            for start in range(0, len(total), step):
                classes = slice(start, start + step)
                part = torch.mm(grad_logits[:, classes].t(), states)
                if self.begun:
                    total[classes] += part
                else:
                    total[classes] = part
        self.begun = True

    def result(self) -> Tensor:
        return self.sum.to(self.kept)


def by_classes(
    work: RowWork,
    states: States,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    block: int,
    silent: bool,
    grad_bias: Tensor | None,
) -> Tensor:
    """The gradient (V, H) of the head in its own dtype, ``block`` classes at a time, from what the first pass left of all
    rows, ``stats`` (n, M); that of the bias is added up in ``grad_bias``. ``silent``: the gist token's logits have no
    gradient."""
    rows, classes = len(row_scale), len(weight)
    both = states.stacked(slice(0, rows))
    used = rows if silent else 2 * rows
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    buffer = torch.empty(2 * rows, padded(block), dtype=weight.dtype, device=weight.device)
    for start in range(0, classes, block):
        part = slice(start, min(start + block, classes))
        at = logits(both, weight[part], None if bias is None else bias[part], buffer[:, : part.stop - start])
        work.classes(at, target, row_scale, stats, start, not silent)
        torch.mm(at[:used].t(), both[:used], out=grad[part])
        if grad_bias is not None:
            add_rows(grad_bias[part], at[:used])
    return grad
