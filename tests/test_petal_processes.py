"""PETAL's shared factors in two processes (gloo): DistributedDataParallel and FSDP2 give the gradients of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from qformers import inputs, make, quiet, stir

from fastgist import petal
from fastgist.distributed import fully_shard

HERE = Path(__file__)


def prepared(**config):
    model = petal.wrap(
        make(),
        petal.PetalConfig(rank=4, expert_dim=3, num_experts=2, dropout=0.0, load_balance=0.0, **config),
        verbose=False,
    )
    return quiet(stir(model)).train()


def batch():
    """Four samples with as many words each, so that the mean over two halves is that over all."""
    given = inputs(batch=4)
    given["qformer_attention_mask"] = torch.ones_like(given["qformer_attention_mask"])
    return given


def gradients(model):
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}


def work(how: str, rank: int, port: int, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = prepared()
    half = {k: v[2 * rank : 2 * rank + 2] for k, v in batch().items()}
    if how.startswith("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": how.endswith("reentrant")})
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh

        run = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        run = torch.nn.parallel.DistributedDataParallel(model, static_graph=how == "checkpointed reentrant")
    run(**half).loss.backward()
    found = gradients(model)
    if how == "fsdp":
        found = {name: g.full_tensor() for name, g in found.items()}
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "checkpointed reentrant", "fsdp"])
def test_hard_30_two_processes_have_the_gradients_of_one(how, tmp_path):
    model = prepared()
    model(**batch()).loss.backward()
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    path = os.pathsep.join([str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE), how, "{}", str(port), str(tmp_path / "grads")]
    processes = [
        subprocess.Popen([*command[:3], str(rank), *command[4:]], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [p.communicate(timeout=240)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    found = torch.load(tmp_path / "grads")
    want = gradients(model)
    assert found.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    assert sum(name.endswith("factors.u") for name in found) == 2


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
