"""What makes a whole step cheap: the patch embedding as a product, and the ledger that says where memory goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from vits import images, vit

import fastgist as fg
from fastgist.integrations.timm import blocks, patches
from fastgist.train.ledger import saved_tensor_ledger


@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
@pytest.mark.parametrize("shape", [((16, 16), (8, 8)), ((16, 24), (8, 4))])
def test_the_patch_product_is_the_convolution(shape, norm):
    from timm.layers import PatchEmbed

    size, patch = shape
    embed = PatchEmbed(size, patch, 3, 32, norm_layer=norm).double()
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(patches.patch_product(embed, x), embed(x))
    assert patches._is_plain(embed, x)


def test_what_is_no_plain_patch_embedding_is_called(monkeypatch):
    from timm.layers import PatchEmbed

    x = images()
    plain = PatchEmbed(16, 8, 3, 32)
    assert patches._is_plain(plain, x)
    assert not patches._is_plain(plain, x.bfloat16())
    assert not patches._is_plain(plain, torch.randn(1, 3, 24, 24))
    overlapping = PatchEmbed(16, 8, 3, 32)
    overlapping.proj = nn.Conv2d(3, 32, 8, stride=4)
    watched = PatchEmbed(16, 8, 3, 32)
    watched.proj.register_forward_hook(lambda *a: None)
    for embed in (overlapping, watched, nn.Identity(), PatchEmbed(16, 8, 3, 32, flatten=False)):
        assert not patches._is_plain(embed, x)
    monkeypatch.setattr(patches, "patch_product", lambda *a: pytest.fail("a product on a CPU"))
    assert patches.embed_patches(plain, x).shape == (3, 4, 32)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_attention_written_out_is_timms_and_its_gradients_are_put_together_once(fused, wrapped):
    from timm.layers import Attention
    from torch.profiler import ProfilerActivity, profile

    attention = Attention(32, 4, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    attention.fused_attn = fused
    module = fg.nn.AdaptedLayer(attention, fg.nn.Adapter(32, 4, init="paper")) if wrapped else attention
    x, grad = torch.randn(2, 9, 32, requires_grad=True), torch.randn(2, 9, 32)
    found, copies = [], []
    for run in (module, lambda x: blocks.attend(module, x)):
        y = run(x)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            found.append((y, *torch.autograd.grad(y, x, grad)))
        copies.append(sum(e.count for e in seen.key_averages() if e.key == "aten::copy_"))
    for ours, timms in zip(*found, strict=True):
        assert torch.equal(ours, timms)
    assert copies[1] < copies[0] if fused else copies[1] <= copies[0]


def test_gradients_of_q_k_and_v_left_apart_are_their_sum():
    from fastgist.ops._projection import project_to_heads

    torch.manual_seed(0)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(24, 36).double().requires_grad_(False)
    found = []
    for run in (
        lambda: project_to_heads(x, layer.weight, layer.bias, 3),
        lambda: blocks.split_heads(layer(x), 3, 3),
    ):
        parts = run()
        (grad,) = torch.autograd.grad(sum(((i + 1) * part.sin()).sum() for i, part in enumerate(parts)), x)
        found.append((*parts, grad))
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)
    q, _, _ = project_to_heads(x, layer.weight, None, 3)  # k and v without a gradient
    (grad,) = torch.autograd.grad(q.sum(), x)
    torch.testing.assert_close(grad, layer.weight[:12].sum(0).expand_as(x))
    torch.library.opcheck(
        torch.ops.fastgist.sum_of_products.default,
        (*(torch.randn(6, 4) for _ in range(3)), torch.randn(12, 5)),
    )
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(project_to_heads(x, layer.weight, None, 3)[0].sum(), x, create_graph=True)


def test_where_gradients_of_q_k_and_v_are_left_apart(monkeypatch):
    """On a GPU in half precision (here the question is answered for it), behind a frozen plain layer."""
    model = fg.add_gist(fg.get_peft_model(vit(depth=3), fg.AdapterConfig(4, placement="shared"))).double().train()
    loss, x, target = fg.nn.GistLoss(), images().double(), torch.tensor([0, 1, 2])

    def gradients(run=model):
        torch.manual_seed(0)
        return torch.autograd.grad(loss(run(x), target), [p for p in model.parameters() if p.requires_grad])

    expected, calls, run = gradients(), [], blocks.project_to_heads
    monkeypatch.setattr(blocks, "_in_half_on_gpu", lambda t: True)
    monkeypatch.setattr(blocks, "project_to_heads", lambda *a: calls.append(1) or run(*a))
    for ours, whole in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)
    assert len(calls) == 2, "the token's rows of the first block, the second; of the last few are read"
    with torch.no_grad():
        model(x)
    attention = model.model.blocks[1].base_layer.attn
    h = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    for change in (
        lambda: attention.qkv.weight.requires_grad_(True),
        lambda: attention.qkv.bias.requires_grad_(True),
        lambda: attention.qkv.register_forward_hook(lambda *a: None),
        lambda: attention.qkv.float(),
    ):
        undo = change()
        assert not blocks._apart(attention, h)
        undo.remove() if hasattr(undo, "remove") else attention.qkv.double().requires_grad_(False)
    assert blocks._apart(attention, h) and not blocks._apart(attention, h.detach())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, whole in zip(gradients(compiled), expected, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)


def test_a_computed_qkv_weight_gets_its_whole_gradient(monkeypatch):
    """A weight that is a plain tensor (a hypernetwork's, a replica's) is no parameter, and takes a gradient all the same."""
    model = fg.add_gist(fg.get_peft_model(vit(depth=3), fg.LinearProbeConfig())).double().train()
    sources = []
    for block in model.model.blocks[:2]:
        source = block.attn.qkv.weight.detach().clone().requires_grad_()
        del block.attn.qkv.weight
        block.attn.qkv.weight = source * 1.0
        sources.append(source)
    loss, x, target = fg.nn.GistLoss(), images().double(), torch.tensor([0, 1, 2])

    def gradients():
        torch.manual_seed(0)
        return torch.autograd.grad(loss(model(x), target), sources, retain_graph=True)

    monkeypatch.setattr(blocks, "_in_half_on_gpu", lambda t: True)
    ours = gradients()
    monkeypatch.setattr(blocks, "_in_half_on_gpu", lambda t: False)
    monkeypatch.setattr(type(model.host.first), "serves", lambda *a: False)
    for got, want in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_an_adapted_block_with_a_run_of_its_own_runs_it():
    model = fg.add_gist(fg.get_peft_model(vit(depth=3), fg.AdapterConfig(4, placement="shared"))).eval()
    runs, block = [], model.model.blocks[1]
    own = block.run
    block.run = lambda *a, **k: runs.append(1) or own(*a, **k)
    model(images())
    assert len(runs) == 1


def test_global_backward_hooks_see_blocks_and_attention():
    model = fg.add_gist(fg.get_peft_model(vit(depth=3), fg.LinearProbeConfig())).train()
    seen = []
    hook = nn.modules.module.register_module_full_backward_hook(lambda module, *a: seen.append(type(module).__name__))
    try:
        model(images()).logits.sum().backward()
    finally:
        hook.remove()
    assert seen.count("Block") == seen.count("Attention") == 3


def test_a_traced_model_can_be_saved(tmp_path):
    model = fg.add_gist(fg.get_peft_model(vit(depth=3), fg.LinearProbeConfig())).eval()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, return_gist_logits=False).logits

    x = images()
    torch.jit.save(torch.jit.trace(Logits(), (x,)), str(tmp_path / "model.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.pt"))(x), model(x).logits)


def test_attention_that_somebody_watches_or_masks_is_called(monkeypatch):
    from timm.layers import Attention

    monkeypatch.setattr(blocks, "run_attention", lambda *a: pytest.fail("written out"))
    seen, x = [], torch.randn(1, 5, 32)
    watched, masked = Attention(32, 4), Attention(32, 4)
    watched.register_forward_hook(lambda *a: seen.append(a))
    blocks.attend(watched, x)
    assert len(seen) == 1
    blocks.attend(masked, x, attn_mask=torch.ones(5, 5, dtype=torch.bool))
    hook = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        blocks.attend(masked, x)
    finally:
        hook.remove()
    with pytest.raises(pytest.fail.Exception, match="written out"):
        blocks.attend(masked, x)


def test_blocks_without_an_adapter_run_written_out_too(monkeypatch):
    """Of a gist model: LoRA's and a linear probe's blocks are timm's own, and a watched one is called."""
    model, x = fg.add_gist(fg.get_peft_model(vit(), fg.LoraConfig(rank=2))).eval(), images()
    runs, written = [], blocks.run_attention
    monkeypatch.setattr(blocks, "run_attention", lambda *a: runs.append(1) or written(*a))
    expected = model(x)
    assert len(runs) == len(model.model.blocks) - 1, "all but the last, which runs for a few rows"
    seen = []
    model.model.blocks[0].register_forward_hook(lambda *a: seen.append(a))
    again = model(x)
    assert len(seen) == 1 and len(runs) == 2 * len(model.model.blocks) - 3
    assert torch.equal(expected.logits, again.logits)


def test_the_ledger_counts_what_autograd_keeps():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    model[2].weight.requires_grad_(False)
    x = torch.randn(5, 8)
    found = saved_tensor_ledger(model, lambda: model(x).sum(), by_block=True)
    # Linear keeps its input for dW where W is trained, GELU its input; the frozen layer keeps nothing.
    assert found == {"0": 5 * 8 * 4, "1": 5 * 16 * 4}
    assert saved_tensor_ledger(model, lambda: model(x).sum()) == {"*": 5 * 8 * 4 + 5 * 16 * 4}
    with torch.no_grad():
        assert saved_tensor_ledger(model, lambda: model(x).sum()) == {}


def test_the_ledger_of_a_gist_model_and_what_is_not_in_it():
    model = fg.add_gist(fg.get_peft_model(vit(), fg.AdapterConfig(4))).train()
    loss, x, target = fg.nn.GistLoss(), images(), torch.tensor([0, 1, 2])
    found = saved_tensor_ledger(model, lambda: loss(model(x), target))
    assert any("mlp" in path for path in found)
    layers = ("fc1", "fc2", "qkv", "proj")  # frozen: no dW, nothing kept
    assert not any(set(layers) & set(path.split(".")) for path in found)
    again = saved_tensor_ledger(model, lambda: loss(model(x), target))
    assert found == again


def test_the_ledger_page(tmp_path):
    """Of a small model: fastgist keeps the least, and less when it forms hidden units again."""
    root = Path(__file__).parents[1]
    out = tmp_path / "ledger.md"
    command = [
        sys.executable,
        str(root / "scripts" / "ledger.py"),
        *"--width 64 --layers 2 --size 32 --out".split(),
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    totals = [float(line.rsplit(" ", 1)[1]) for line in out.read_text().splitlines() if line.startswith("## ")]
    assert len(totals) == 4
    assert 0 < totals[3] < totals[2] < min(totals[:2])


def test_the_shared_adapter_and_the_token_of_the_benchmark_are_the_same_model():
    """benchmarks/train_step.py's model, written independently, against ours: loss and every gradient, in float32."""
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root))
    from benchmarks import train_step
    from benchmarks.cases import case

    small = case(torch.float32, B=4, S=32, D=64, L=2)
    for provider in ("fastgist", "fastgist, hidden units again", "authors"):
        assert train_step.parity(provider, small, torch.device("cpu")) is None
    steps = [train_step.PROVIDERS[p](small, torch.device("cpu"), dropout=0.0) for p in ("fastgist", "plain")]
    for _ in range(3):
        losses = [step() for step in steps]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
