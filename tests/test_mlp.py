"""What a ViT's MLPs run and keep: our GELU between a frozen MLP's layers, and hidden units formed again in the backward."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from pairs import beit, example, swin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vits import eva, gradients, images, stir, vit

import fastgist as fg
from fastgist.integrations.timm import blocks
from fastgist.integrations.timm import vit as vits_of_timm
from fastgist.train.ledger import saved_tensor_ledger

DEPTH = 4
TARGET = torch.tensor([0, 1, 2])
CONFIGS = {
    "shared": fg.AdapterConfig(4, placement="shared"),
    "pfeiffer": fg.AdapterConfig(4, placement="pfeiffer"),
    "parallel": fg.AdapterConfig(4, placement="parallel"),
    "adaptformer": fg.AdapterConfig(4, placement="adaptformer"),
    "lora": fg.LoraConfig(2, targets=("q", "v", "fc1", "fc2"), dropout=0.2),
    "cp": fg.CPConfig(2, targets=("q", "v", "fc1"), dropout=0.2),
    "prompts": fg.PromptConfig(2, deep=True),
    "prefix": fg.PrefixConfig(2),
    "ssf": fg.SSFConfig(),
    "bitfit": fg.BitFitConfig(),
    "probe": fg.LinearProbeConfig(),
}
every_method = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture
def forced(monkeypatch) -> list:
    """Take our GELU on a CPU too; what it was called with is noted."""
    seen: list = []
    monkeypatch.setattr(blocks, "_in_half_on_gpu", lambda x: True)
    monkeypatch.setattr(blocks, "_apart", lambda attention, x: False)  # it sums three products, other bits
    monkeypatch.setattr(blocks, "gelu", lambda x: seen.append(x.shape) or fg.functional.gelu(x))
    return seen


def made(config, dtype=torch.float32, **options) -> nn.Module:
    model = fg.add_gist(fg.get_peft_model(vit(depth=DEPTH, **options), config))
    return stir(model).to(dtype).train()


def step(model, dtype=torch.float32):
    """(loss, gradients) with the same draws on every call."""
    torch.manual_seed(5)
    x = images(dtype=dtype)
    model.zero_grad()
    loss = fg.nn.GistLoss()(model(x), TARGET)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(ours, want) -> None:
    assert torch.equal(ours[0], want[0])
    assert ours[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        assert torch.equal(ours[1][name], grad), name


def mlp(act=nn.GELU, **options):
    from timm.layers import Mlp

    return Mlp(8, 16, act_layer=act, **options)


# -- our GELU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_method
def test_the_same_numbers_with_every_method(config, dtype, forced, monkeypatch):
    """As with blocks that are called whole. PyTorch's own GELU serves ours on a CPU: bit for bit, so nothing else has
    changed. The last block runs for two rows."""
    model = made(config, dtype)
    model.host.first = None  # the first block's attention rounds the token's gradient otherwise
    ours, calls = step(model, dtype), len(forced)
    assert calls == DEPTH - 1
    monkeypatch.undo()
    monkeypatch.setattr(vits_of_timm, "open_block", lambda block, recompute, attention: block)
    assert_same(ours, step(model, dtype))
    assert len(forced) == calls


def test_evaluation_and_autocast(forced, monkeypatch):
    model, x = made(CONFIGS["shared"]).eval(), images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = model(x).logits
        assert len(forced) == DEPTH - 1
        monkeypatch.undo()
        assert torch.equal(model(x).logits, ours)


@pytest.mark.parametrize("build", [beit, eva, swin, lambda: swin(second=True)], ids="beit eva swin swinv2".split())
def test_other_families(build, forced, monkeypatch):
    plain = build()
    x = example(plain)
    model = stir(fg.add_gist(fg.get_peft_model(plain, CONFIGS["adaptformer"]))).eval()
    ours = model(x).logits
    assert forced
    monkeypatch.undo()
    assert torch.equal(model(x).logits, ours)


def test_a_cpu_and_float32_are_left_alone(monkeypatch):
    monkeypatch.setattr(blocks, "gelu", lambda x: pytest.fail("our GELU on a CPU"))
    step(made(CONFIGS["shared"], torch.bfloat16), torch.bfloat16)
    assert not blocks._in_half_on_gpu(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert not blocks._in_half_on_gpu(images())
    assert not blocks._in_half_on_gpu(SimpleNamespace(is_cuda=True, dtype=torch.float32))
    assert blocks._in_half_on_gpu(SimpleNamespace(is_cuda=True, dtype=torch.float16))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert blocks._in_half_on_gpu(SimpleNamespace(is_cuda=True, dtype=torch.float32))
    assert not blocks._in_half_on_gpu(SimpleNamespace(is_cuda=False, dtype=torch.bfloat16))


def test_what_is_no_plain_mlp_is_called(forced):
    class Other(nn.GELU):
        pass

    x = torch.randn(2, 3, 8)
    dropping, resting = mlp(drop=0.5), mlp(drop=0.5).eval()
    assert blocks._is_plain_mlp(mlp()) and blocks._is_plain_mlp(resting)
    refused = [
        dropping,
        mlp(act=nn.ReLU),
        mlp(act=lambda: nn.GELU("tanh")),
        mlp(act=Other),
        mlp(norm_layer=nn.LayerNorm),
    ]
    for part in ("", "act", "drop1", "norm", "drop2"):
        watched = mlp()
        watched.get_submodule(part).register_forward_hook(lambda *a: None)
        refused.append(watched)
    compiled, more = mlp(), mlp()
    compiled.act.compile()
    more.extra = nn.Identity()
    refused += [compiled, more, nn.Sequential(nn.Linear(8, 8))]
    for m in refused:
        assert not blocks._is_plain_mlp(m), m
        blocks.run_mlp(m.eval() if m is dropping else m, x)
    assert len(forced) == 1  # the dropping one, once it rests
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert not blocks._is_plain_mlp(mlp())
    finally:
        handle.remove()


def test_watched_blocks_are_called(forced):
    """A hook on a block, its MLP's activation or its layers sees what it always saw."""
    model = made(CONFIGS["probe"])
    seen = []
    for path in ("blocks.0", "blocks.1.mlp.act", "blocks.2.mlp.fc1"):
        model.model.get_submodule(path).register_forward_hook(lambda module, x, y, path=path: seen.append(path))
    step(model)
    assert seen == ["blocks.0", "blocks.1.mlp.act", "blocks.2.mlp.fc1"]
    assert len(forced) == 1
    model = made(CONFIGS["shared"])
    seen.clear()
    for path in ("blocks.0", "blocks.1.base_layer"):  # the second is never called whole
        model.model.get_submodule(path).register_forward_hook(lambda module, x, y, path=path: seen.append(path))
    step(model)
    assert seen == ["blocks.0"]


@pytest.mark.parametrize("recompute", [False, True])
def test_one_graph(recompute, monkeypatch):
    monkeypatch.setattr(blocks, "_in_half_on_gpu", lambda x: True)
    monkeypatch.setattr(blocks, "_apart", lambda attention, x: False)  # it sums three products, other bits
    model = made(CONFIGS["shared"])
    model.set_grad_checkpointing("mlp" if recompute else False)
    model.model.norm_pre.gist.dropout.p = 0.0  # a compiled graph draws otherwise
    want = step(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    loss = fg.nn.GistLoss()(compiled(images()), TARGET)
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close((loss.detach(), gradients(model)), want)


def test_our_gelu_keeps_the_first_layers_output_alone(forced):
    model, x = made(CONFIGS["shared"]), images()
    found = saved_tensor_ledger(model, lambda: fg.nn.GistLoss()(model(x), TARGET), by_block=True)
    rows, width = 3 * (1 + 1 + 4), 32
    for i in range(DEPTH - 1):
        kept = {path: size for path, size in found.items() if f"blocks.{i}." in path and "mlp" in path}
        assert kept == {f"model.blocks.{i}.base_layer.mlp.run_mlp": rows * 4 * width * 4}


# -- hidden units formed again -----------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products by the width of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.widths.append(out.shape[1])
        return out


@pytest.mark.parametrize("ours", [False, True])
@every_method
def test_recomputation_changes_nothing(config, ours, request):
    """Loss and every gradient, bit for bit, dropout included."""
    if ours:
        request.getfixturevalue("forced")
    model = made(config)
    want = step(model)
    model.set_grad_checkpointing("mlp")
    assert_same(step(model), want)
    assert_same(step(copy.deepcopy(model)), want)
    model.set_grad_checkpointing(False)
    assert_same(step(model), want)


@pytest.mark.parametrize("where", ["fc1", "fc2", "norm2", "norm and dropout"])
def test_recomputation_draws_what_the_forward_drew(where):
    """Dropout in a hook or beside the norm: the recomputed hidden units see the same mask."""
    model = fg.add_gist(fg.get_peft_model(vit(depth=3), fg.LoraConfig(2, targets=("fc1", "fc2")))).double().train()
    block = model.model.blocks[1]
    drop = torch.nn.Dropout(0.5)
    if where == "fc1":
        block.mlp.fc1.register_forward_hook(lambda module, args, out: drop(out))
    elif where == "fc2":
        block.mlp.fc2.register_forward_pre_hook(lambda module, args: (drop(args[0]),))
    elif where == "norm2":
        block.norm2.register_forward_hook(lambda module, args, out: drop(out))
    else:
        block.norm2 = torch.nn.Sequential(block.norm2, drop)
    loss, x, target = fg.nn.GistLoss(), images().double(), torch.tensor([0, 1, 2])
    found = []
    for checkpointing in (False, "mlp"):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        found.append(torch.autograd.grad(loss(model(x), target), [p for p in model.parameters() if p.requires_grad]))
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-10, atol=1e-12)


def test_recomputation_keeps_no_hidden_units_and_makes_one_product_again():
    model, x, loss = made(CONFIGS["shared"]), images(), fg.nn.GistLoss()
    widths, kept = {}, {}
    for how in (False, "mlp", True):
        model.set_grad_checkpointing(how)
        kept[how] = sum(saved_tensor_ledger(model, lambda: loss(model(x), TARGET)).values())
        with Products() as seen:
            loss(model(x), TARGET).backward()
        widths[how] = seen.widths
    hidden, inner = 3 * 6 * 128 * 4, DEPTH - 1
    norms = 3 * 6 * 4 * 2  # mean and deviation of every row, formed again too
    assert kept[False] - kept["mlp"] == inner * (hidden + norms)
    assert kept[True] < kept["mlp"]
    assert widths["mlp"].count(128) == widths[False].count(128) + inner
    assert len(widths["mlp"]) == len(widths[False]) + inner, "fc2's product is not made again"


def test_evaluation_with_recomputation():
    model, x = made(CONFIGS["shared"]).eval(), images()
    want = model(x).logits
    model.set_grad_checkpointing("mlp")
    with torch.no_grad():
        assert torch.equal(model(x).logits, want)
    assert torch.equal(model(x).logits, want)


def test_where_hidden_units_are_not_formed_again():
    with pytest.raises(ValueError, match="True, False or \"mlp\", got 'attention'"):
        made(CONFIGS["shared"]).set_grad_checkpointing("attention")
    pooled = made(CONFIGS["shared"], global_pool="avg")
    with pytest.raises(ValueError, match="read by 'avg'"):
        pooled.set_grad_checkpointing("mlp")
    assert not pooled.host.recompute_mlp
    other = fg.add_gist(fg.get_peft_model(swin(), CONFIGS["shared"]))
    with pytest.raises(ValueError, match="for timm's VisionTransformer, got SwinTransformer"):
        other.set_grad_checkpointing("mlp")
    for model in (pooled, other):
        model.set_grad_checkpointing(True)
        model.set_grad_checkpointing(False)
