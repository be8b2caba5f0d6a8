"""gist_linear_loss where ranks of a process group hold consecutive rows of the head (tensor parallelism over the vocabulary).

A rank forms the logits of its classes, and from them twelve numbers a row about its own maxima (fastgist/ops/_row_state.py).
The ranks gather these and merge them in one order, so that all have the same bits of the whole head's statistics; from there
on each finishes the gradients of its own logits alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgist.ops._row_state import PartWork
from fastgist.ops.gist_loss import DEBUG, check_targets_in_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["group_named", "row_work", "shard", "sum_over_ranks"]


# -- who holds what ----------------------------------------------------------------------------------------------------


def shard(
    op: str,
    group: ProcessGroup | None,
    start: int | None,
    size: int | None,
    reduce_hidden: bool,
    impl: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    options: tuple,
) -> tuple[str, int, int, bool]:
    """(the group's name, or "" where this rank has the whole head; its first class; all classes; ``reduce_hidden``).

    ``tensors``: hidden, gist_hidden, weight, target. Talks to the other ranks unless ``start`` and ``size`` are given.

    Raises:
        ValueError: arguments that do not fit; ranks that were given other shapes or options than the rest, on all of them.
        RuntimeError: an implementation asked for by name that has no such form.
    """
    mine = tensors[2].shape[0]
    if (start is None) != (size is None):
        raise ValueError(f"{op}: vocab_start and vocab_size belong together; give both or neither")
    if group is None or not torch.distributed.is_available():
        if start is not None and (start, size) != (0, mine):
            raise ValueError(f"{op}: vocab_start and vocab_size describe a group's shares, and there is no group")
        return "", 0, mine, reduce_hidden
    outside = group is torch.distributed.GroupMember.NON_GROUP_MEMBER  # what new_group gives who is not in it
    if not outside and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"{op}: group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if outside or torch.distributed.get_rank(group) < 0:
        raise ValueError(f"{op}: this process is not in the group")
    if impl not in ("auto", "reference"):
        raise RuntimeError(f"{op}: impl={impl!r} cannot run here: with a group there is plain PyTorch alone")
    if start is None or size is None:
        start, size = _agree(op, group, tensors, (*options, reduce_hidden))
    if not 0 <= start <= start + mine <= size:
        raise ValueError(f"{op}: rows {start} to {start + mine} are not within a head of vocab_size {size}")
    return ("" if group.size() == 1 else group.group_name), start, size, reduce_hidden


def _agree(op: str, group: ProcessGroup, tensors: tuple[Tensor, ...], options: tuple) -> tuple[int, int]:
    """This rank's first class and their number, from every rank's share; ValueError if anything else differs."""
    hidden, gist_hidden, weight, target = tensors
    named = {
        "the number of rows": hidden.shape[:-1].numel(),
        "the width": hidden.shape[-1],
        "the dtype": hash_of(hidden.dtype),
        "the kind of target": hash_of(target.dtype),
        "hidden.requires_grad": int(hidden.requires_grad and torch.is_grad_enabled()),
        "gist_hidden.requires_grad": int(gist_hidden.requires_grad and torch.is_grad_enabled()),
        "weight.requires_grad": int(weight.requires_grad and torch.is_grad_enabled()),
        "an option": hash_of(options),
    }
    told = torch.tensor([weight.shape[0], *named.values()], dtype=torch.int64, device=hidden.device)
    shares, *others = _gathered(told, group).t().tolist()
    for name, values in zip(named, others, strict=True):
        if len(set(values)) > 1:
            which = f": {values}" if name in ("the number of rows", "the width") else ""
            raise ValueError(f"{op}: {name} must be the same on all ranks of the group, and is not{which}")
    return sum(shares[: torch.distributed.get_rank(group)]), sum(shares)


def hash_of(value: object) -> int:
    """The same number on every rank for what prints the same (Python's own hash of a string differs between processes)."""
    number = 0
    for byte in repr(value).encode():
        number = (number * 257 + byte) % (2**61 - 1)
    return number


def group_named(name: str) -> ProcessGroup | None:
    if not name:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def _gathered(own: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's ``own``, in the ranks' order: (ranks, ...)."""
    every = own.new_empty(group.size() * own.shape[0], *own.shape[1:])
    torch.distributed.all_gather_into_tensor(every, own, group)
    return every.view(group.size(), *own.shape)


def sum_over_ranks(group: ProcessGroup, *shares: Tensor | None) -> None:
    """Every rank's share of a gradient becomes their sum."""
    pending = [torch.distributed.all_reduce(s, group=group, async_op=True) for s in shares if s is not None]
    for work in pending:
        if work is not None:
            work.wait()


def row_work(op: str, group: ProcessGroup, options: tuple, first: int, classes: int) -> PartWork:
    """What is done to a chunk of this rank's logits. ``first``: this rank's first class of ``classes``."""
    return PartWork(options, first, classes, _Gather(op, group, classes, options[-1]))


class _Gather:
    """Every rank's numbers of a chunk, and its targets beside them. What is wrong with these all ranks find in the same chunk,
    so that none is left waiting: on a CPU they raise; on a device, where a look would synchronise, rows whose targets differ
    are NaN."""

    def __init__(self, op: str, group: ProcessGroup, classes: int, ignore_index: int) -> None:
        self.op, self.group, self.classes, self.ignore_index = op, group, classes, ignore_index
        self.before = 0  # rows of the chunks so far

    def __call__(self, own: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():  # each rank's are of its own classes
            return _gathered(own, self.group)
        every = _gathered(torch.cat((own, target.to(own.dtype)[None])), self.group)
        differ = (every[:, -1] != every[:1, -1]).any(0)
        if target.device.type != "cpu" and not DEBUG:
            return every[:, :-1].masked_fill(differ, torch.nan)
        if bool(differ.any()):
            row = int(differ.nonzero()[0, 0])
            given = [int(x) for x in every[:, -1, row].tolist()]
            raise ValueError(
                f"{self.op}: target must be the same on all ranks of the group, and target[{self.before + row}] is {given}"
            )
        check_targets_in_range(self.op, target, self.classes, self.ignore_index, self.before)
        self.before += len(target)
        return every[:, :-1]


def check_same_states(op: str, group: ProcessGroup, *states: Tensor) -> None:
    """ValueError on all ranks where some hidden states (M, H) are not the same bits on all of them. One more all-gather, and a
    synchronisation: under FASTGIST_DEBUG=1, which all ranks must have or none."""
    narrow = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = torch.stack([s.contiguous().view(narrow[s.element_size()]).sum(-1, dtype=torch.int64) for s in states])
    every = _gathered(sums, group)
    differ = (every != every[:1]).any(0)
    if bool(differ.any()):
        which, row = differ.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: {('hidden', 'gist_hidden')[which]} must be the same on all ranks of the group, and row {row} is not"
        )
