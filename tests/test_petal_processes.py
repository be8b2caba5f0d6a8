"""PETAL's shared factors in two processes (gloo): DistributedDataParallel and FSDP2 give the gradients of one process, and
with every part of PETAL the mean of what each process has by itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from qformers import inputs, make, quiet, stir
from ranks import RANKS, on_two_ranks

from fastgist import petal
from fastgist.distributed import fully_shard
from fastgist.nn import CPThreshold, InformationBottleneckLoss, update_thresholds

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


# -- every part --------------------------------------------------------------------------------------------------------

#: What is changed of SETTINGS. Terms that are about a batch (gates' balance, a bottleneck's bank) are a process's own.
PARTS = {
    "tucker, uniform": {"core": "tucker", "gating": "uniform"},
    "dropout, tucker": {"dropout": 0.4, "core": "tucker"},
    "gist": {"gist": {"dropout": 0.0}},
    "bottleneck": {"bottleneck": {"compression": "club", "relevance": "mine", "eta": 0.5}},
    "dynamic threshold": {"threshold": {"policy": "trust", "dynamic": True, "gamma": 0.5}},
    "two phrasings": {"num_instructions": 2},
    "load balance of two mixtures": {"instruct_llm": True, "load_balance": 0.5},
}
STEPS = 2


def built(part: str):
    model = petal.wrap(make(), petal.PetalConfig(**SETTINGS | PARTS[part]), verbose=False)
    torch.manual_seed(9)
    for module in model.modules():
        if isinstance(module, InformationBottleneckLoss):
            module.reset_parameters()
    return quiet(stir(model)).train()


def loss_of(part: str, run, model, rank: int, step: int):
    """Of a process's half; dropout's masks are of its own."""
    given = {k: v[2 * rank : 2 * rank + 2] for k, v in batch().items()}
    torch.manual_seed(100 * rank + step)
    if part != "two phrasings":
        return run(**given).loss
    ids, mask = given["qformer_input_ids"], given["qformer_attention_mask"]
    gates = [petal.instruction_gate(model, words, mask) for words in (ids, ids.flip(1))]
    with petal.instructed(model, gates):
        return run(**given).loss


def state(model):
    """Of the thresholds."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, CPThreshold)}
    return {f"{n}.{b}": t.clone() for n, m in found.items() for b, t in m.named_buffers()}


def every_part(rank: int) -> dict:
    found = {}
    for part in PARTS:
        model = built(part)
        run = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        steps = []
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(part, run, model, rank, step).backward()
            steps.append({name: g.clone() for name, g in gradients(model).items()})
            optimizer.step()
            update_thresholds(model)
        found[part] = steps, state(model)
    return found


def alone(part: str):
    """Both halves in one process, each with a model of its own that takes the mean gradient's step."""
    models = [built(part) for _ in range(RANKS)]
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.05) for m in models]
    steps = []
    for step in range(STEPS):
        for rank, model in enumerate(models):
            model.zero_grad()
            loss_of(part, model, model, rank, step).backward()
        both = [gradients(model) for model in models]
        mean = {name: sum(g[name] for g in both) / RANKS for name in both[0]}
        steps.append(mean)
        for model, optimizer in zip(models, optimizers, strict=True):
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.grad = mean[name].clone()
            optimizer.step()
            update_thresholds(model)
    return steps, state(models[0])


def test_hard_30_every_part_in_two_processes(tmp_path):
    ranks = on_two_ranks(every_part, tmp_path)
    for part in PARTS:
        want, thresholds = alone(part)
        assert all(bool(g.any()) for g in want[-1].values()), (
            f"{part}: {[n for n, g in want[-1].items() if not g.any()]}"
        )
        assert bool(thresholds) is part.startswith("dynamic")
        for found, held in (rank[part] for rank in ranks):
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6, msg=lambda text, p=part: f"{p}: {text}")
            torch.testing.assert_close(held, thresholds, rtol=1e-4, atol=1e-6)
            assert all(int(t) == STEPS for n, t in held.items() if n.endswith("updates"))
