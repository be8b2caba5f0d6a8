"""PETAL's shared factors in two processes (gloo): DistributedDataParallel and FSDP2 give the gradients of one process."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from qformers import inputs, make, quiet, stir
from ranks import RANKS, on_two_ranks

from fastgist import petal
from fastgist.distributed import fully_shard

SETTINGS = {"rank": 4, "expert_dim": 3, "num_experts": 2, "dropout": 0.0, "load_balance": 0.0}


def prepared():
    return quiet(stir(petal.wrap(make(), petal.PetalConfig(**SETTINGS), verbose=False))).train()


def batch():
    """Four samples with as many words each, so that the mean over two halves is that over all."""
    given = inputs(batch=2 * RANKS)
    given["qformer_attention_mask"] = torch.ones_like(given["qformer_attention_mask"])
    return given


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def work(rank: int, how: str) -> dict[str, torch.Tensor]:
    model = prepared()
    half = {k: v[2 * rank : 2 * rank + 2] for k, v in batch().items()}
    if how == "checkpointed reentrant":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh

        run = fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    else:
        run = torch.nn.parallel.DistributedDataParallel(model, static_graph=how == "checkpointed reentrant")
    run(**half).loss.backward()
    found = gradients(model)
    return {name: g.full_tensor() for name, g in found.items()} if how == "fsdp" else found


@pytest.mark.parametrize("how", ["ddp", "checkpointed reentrant", "fsdp"])
def test_hard_30_two_processes_have_the_gradients_of_one(how, tmp_path):
    model = prepared()
    model(**batch()).loss.backward()
    want = gradients(model)
    for found in on_two_ranks(work, tmp_path, how):
        assert found.keys() == want.keys()
        for name, grad in want.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)
        assert sum(name.endswith("factors.u") for name in found) == 2
