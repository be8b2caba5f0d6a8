"""Layers around sharded linear layers, in two processes (gloo): FSDP2 and tensor parallelism give the gradients of one."""

from __future__ import annotations

import itertools

import pytest
import torch
from quantised import K, N, dense
from ranks import RANKS, on_two_ranks
from torch import nn

from fastgist import functional
from fastgist.nn import CPFactors, CPLinear, LoRALinear
from fastgist.testing import assert_within_budget

FORMS = {
    "lora": lambda base: LoRALinear(base, 4),
    "cp": lambda base: CPLinear(base, CPFactors(K, N // 3, 5, 3), (2, None, 1)),
}


def prepared(form):
    layer = FORMS[form](dense())
    torch.manual_seed(1)
    for p in layer.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return nn.Sequential(layer)


def batch():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4 * RANKS, K, generator=generator), torch.randn(4 * RANKS, N, generator=generator)


def shard(model, how):
    """``model`` with its base layer sharded over both processes; whether the processes have rows of their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (RANKS,))
    if how.startswith("fsdp"):
        from torch.distributed.fsdp import fully_shard

        if how == "fsdp, the base too":
            fully_shard(model[0].base_layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return True
    style = ColwiseParallel if how == "columns" else RowwiseParallel
    plan = {"0.base_layer": style(input_layouts=Replicate(), output_layouts=Replicate())}
    parallelize_module(model, mesh, plan)
    return False


HOWS = ("fsdp", "fsdp, the base too", "columns", "rows")


def work(rank: int) -> dict[str, torch.Tensor]:
    """Every way and form one after the other: processes take longer to start than to compute."""
    seen = []
    for op in ("cp_linear", "cp_update"):
        original = getattr(functional, op)
        setattr(functional, op, lambda *a, o=op, f=original, **k: (seen.append((o, k.get("inplace"))), f(*a, **k))[1])
    found = {}
    for how, form in itertools.product(HOWS, FORMS):
        seen.clear()
        found |= {f"{how}/{form}/{name}": t for name, t in sharded(rank, how, form).items()}
        assert seen == [("cp_linear", None) if how == "fsdp" else ("cp_update", False)]
    return found


def sharded(rank: int, how: str, form: str) -> dict[str, torch.Tensor]:
    model = prepared(form)
    x, grad = batch()
    if shard(model, how):
        x, grad = (t[4 * rank : 4 * rank + 4] for t in (x, grad))
    weight = model[0].base_layer.weight
    assert type(weight).__name__ == "DTensor" and weight.to_local().numel() == weight.numel() // RANKS
    x.requires_grad_()
    y = model(x)
    y.backward(grad)
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    if how.startswith("fsdp"):
        found = {n: g.full_tensor() * RANKS for n, g in found.items()}  # FSDP2 takes the mean over the processes
    return found | {"y": y.detach(), "x": x.grad}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


def alone(form, dtype):
    model, (x, grad) = prepared(form).to(dtype), (t.to(dtype) for t in batch())
    x.requires_grad_()
    y = model(x)
    y.backward(grad)
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"y": y.detach(), "x": x.grad}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", HOWS)
def test_two_processes_have_the_gradients_of_one(how, form, both):
    plain, exact = alone(form, torch.float32), alone(form, torch.float64)
    prefix = f"{how}/{form}/"
    found = [{n.removeprefix(prefix): t for n, t in f.items() if n.startswith(prefix)} for f in both]
    if how.startswith("fsdp"):  # each has its half of the rows
        found[0] |= {n: torch.cat([f[n] for f in found]) for n in ("y", "x")}
        found = found[:1]
    for mine in found:
        assert mine.keys() == exact.keys()
        for name, want in exact.items():
            assert_within_budget(mine[name], plain[name], want, what=name)
