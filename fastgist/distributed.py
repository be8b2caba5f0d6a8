"""Sharding a model whose layers share factors, by FSDP2 (torch.distributed.fsdp.fully_shard)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fastgist.nn import CPFactors

__all__ = ["fully_shard"]


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


def _items(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (item for item in child if any(True for _ in item.parameters()))
        else:
            yield from _items(child)
