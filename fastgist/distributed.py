"""Several processes: sharding a model whose layers share factors by FSDP2, and means over the tokens of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.nn import CPFactors

__all__ = ["fully_shard", "mean_divisor"]


def fully_shard(model: nn.Module, blocks: Iterable[nn.Module] | None = None, **options: Any) -> nn.Module:
    """Shard ``model`` in place: first every :class:`fastgist.nn.CPFactors`, then its blocks, then the rest.

    Factors belong to many layers: sharded with one of the blocks they would be gone in the next (torch raises), so they are a
    group of their own, gathered at their first use and kept until the backward is over.

    Args:
        model: with adapters in place, on its device. Optimisers are made afterwards.
        blocks: what is gathered and freed as one; None: the items of every ModuleList that is not inside another one.
        options: of torch's fully_shard (``mesh``, ``mp_policy``, ``offload_policy``, ...), for all of them.

    Returns:
        ``model``.
    """
    from torch.distributed.fsdp import fully_shard as shard

    chosen = list(_items(model) if blocks is None else blocks)
    for module in list(model.modules()):
        if isinstance(module, CPFactors):
            shard(module, **options | {"reshard_after_forward": False})
    for block in chosen:
        shard(block, **options)
    shard(model, **options)
    return model


def mean_divisor(count_or_mask: int | Tensor, group: Any = None) -> Tensor:
    """What this process divides its sum of losses by, so that gradients averaged over the processes (DistributedDataParallel,
    FSDP) are those of the mean over all tokens: all processes' tokens over the number of processes.

    A mean of each process's own tokens gives those of a short batch more weight. With gradient accumulation, count the
    tokens of all micro-batches first and use the result for each.

    Args:
        count_or_mask: this process's tokens that count, an int or a 0-dimensional int64 tensor; or their bool mask.
        group: torch.distributed's process group; None: all processes. Without torch.distributed, one process.

    Returns:
        A 0-dimensional float32 tensor, > 0 (no tokens anywhere count as one), on the device of the mask or count; of an
        int, where the group's backend communicates. No gradient; a collective call, but no look at its result.

    Raises:
        TypeError: neither a count nor a bool mask.
        ValueError: an int below 0. (A tensor is not looked at.)
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if isinstance(count_or_mask, Tensor):
        count = count_or_mask.sum() if count_or_mask.dtype == torch.bool else count_or_mask
        if count.dim() or count.dtype != torch.int64:
            raise TypeError(
                "mean_divisor: expected an int, a 0-dimensional int64 tensor or a bool mask (of 0, 1: mask.bool()), got "
                f"{count_or_mask.dtype} of shape {tuple(count_or_mask.shape)}"
            )
        count = count.clone()
    elif isinstance(count_or_mask, Integral) and not isinstance(count_or_mask, bool):
        if count_or_mask < 0:
            raise ValueError(f"mean_divisor: a count of tokens must be at least 0, got {count_or_mask}")
        on_gpu = together and "nccl" in torch.distributed.get_backend(group)
        count = torch.tensor(int(count_or_mask), dtype=torch.int64, device="cuda" if on_gpu else "cpu")
    else:
        raise TypeError(f"mean_divisor: expected an int or a tensor, got {type(count_or_mask).__name__}")
    if not together:
        return count.clamp(min=1).float()
    torch.distributed.all_reduce(count, group=group)
    return count.clamp(min=1).float() / torch.distributed.get_world_size(group)


def _items(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (item for item in child if any(True for _ in item.parameters()))
        else:
            yield from _items(child)
