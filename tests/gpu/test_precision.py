"""Every dtype on the card against float64, and float32 products both ways: ieee and tf32. Needs a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from every_op import make

from fastgist.backends import OPS
from fastgist.testing import assert_within_budget

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["highest", "high"])
def precision(request):
    """torch's switch for float32 products: "highest" is ieee float32, "high" allows tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def _check(op: str, dtype: torch.dtype, rows: int) -> None:
    call = make(op, dtype, device="cuda", rows=rows)
    ours, grads = call.run(impl="triton")
    plain, plain_grads = call.run(call.formula, dtype=dtype)
    exact, exact_grads = call.run(call.formula, dtype=torch.float64)
    if dtype != torch.float32 and op in ("cp_linear", "adapter"):  # the formula computes in float32: the peer is eager
        plain, plain_grads = call.run(impl="reference")
    scale = float(exact.abs()) + 1.0 if exact.dim() == 0 else None
    assert_within_budget(ours.to(plain.dtype), plain, exact, what=f"{op} result", scale=scale)
    for leaf, mine, p, e in zip(call.leaves, grads, plain_grads, exact_grads, strict=True):
        assert_within_budget(mine, p, e, what=f"{op} gradient of {leaf}")


@pytest.mark.parametrize("rows", [9, 257])
@pytest.mark.parametrize("op", OPS)
def test_float32_products(op, rows, precision):
    """With tf32 off, against plain torch: tf32's error of 3e-4 is far over the budget. With it on, to tf32's own precision:
    the matrix units cut operands off after ten bits where cuBLAS may round them, and z or x U is cut a second time."""
    if precision == "highest":
        _check(op, torch.float32, rows)
        return
    call = make(op, torch.float32, device="cuda", rows=rows)
    ours, grads = call.run(impl="triton")
    exact, exact_grads = call.run(call.formula, dtype=torch.float64)
    for mine, e in zip((ours, *grads), (exact, *exact_grads), strict=True):
        assert float((mine - e).norm() / e.norm()) < 2 * 2**-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_half_precision(op, dtype):
    _check(op, dtype, 257)


def test_tf32_is_really_used_and_really_not():
    """The switch changes the result of a float32 layer: neither setting is ignored."""
    results = {}
    before = torch.get_float32_matmul_precision()
    for setting in ("highest", "high"):
        torch.set_float32_matmul_precision(setting)
        call = make("cp_linear", device="cuda", rows=257)
        results[setting], _ = call.run(impl="triton")
        exact, _ = call.run(call.formula, dtype=torch.float64)
        error = float((results[setting] - exact).norm() / exact.norm())
        assert error < (1e-6 if setting == "highest" else 2e-3), (setting, error)
    torch.set_float32_matmul_precision(before)
    assert not torch.equal(results["highest"], results["high"])


def test_a_models_mlps_take_our_gelu(monkeypatch):
    """In half precision, within the budget of the same model with torch's; forming hidden units again changes no bit."""
    pytest.importorskip("timm")
    from vits import gradients, stir, vit

    import fastgist as fg
    from fastgist.integrations.timm import blocks

    calls: list = []
    monkeypatch.setattr(blocks, "gelu", lambda x: calls.append(x.dtype) or fg.functional.gelu(x))
    torch.manual_seed(0)
    exact = stir(
        fg.add_gist(fg.get_peft_model(vit(depth=3), fg.AdapterConfig(4, placement="shared")), fg.GistConfig(dropout=0))
    )
    model = copy.deepcopy(exact).to("cuda", torch.bfloat16).train()
    exact = exact.to("cuda", torch.float64).train()
    exact.load_state_dict(model.state_dict())
    x, target = torch.randn(64, 3, 16, 16, device="cuda").bfloat16(), torch.arange(64, device="cuda") % 5

    def step(model, x):
        model.zero_grad()
        loss = fg.nn.GistLoss()(model(x), target)
        loss.backward()
        return torch.cat([g.flatten() for _, g in sorted(gradients(model).items())])

    ours = step(model, x)
    assert calls == [torch.bfloat16] * 2, "the last block runs for the rows that are read"
    model.set_grad_checkpointing("mlp")
    assert torch.equal(step(model, x), ours)
    model.set_grad_checkpointing(False)
    monkeypatch.setattr(blocks, "_in_half_on_gpu", lambda x: False)
    assert_within_budget(ours, step(model, x), step(exact, x.double()))


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("kind", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_attention_with_gradients_for_a_few_rows(kind, length):
    """With each kernel of torch's: its own outputs bit for bit, and gradients by its log-sum-exp."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fastgist.ops import _attention

    packed = torch.randn(4, 198, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(4, 198, 12, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    attend, rows = torch.nn.functional.scaled_dot_product_attention, slice(1, 1 + length)

    def whole(dtype):
        leaves = [t.transpose(1, 2).to(dtype).requires_grad_() for t in packed.unbind(2)]
        out = attend(*leaves)
        return out.detach(), [g[:, :, rows] for g in torch.autograd.grad(out, leaves, grad.to(dtype))]

    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    with sdpa_kernel(getattr(SDPBackend, kind)):
        assert _attention.serves_attention(q, k, v)
        few = tuple(t[:, :, rows].clone().requires_grad_() for t in (q, k, v))
        out = _attention.attention_for_rows(few, (q, k, v), 1)
        ours = torch.autograd.grad(out, few, grad)
        want, plain = whole(torch.bfloat16)
    _, exact = whole(torch.float64)
    assert torch.equal(out, want)
    assert out.stride() == _attention._attention_lse_fake(q, k, v)[0].stride()
    for name, one, other, truth in zip("qkv", ours, plain, exact, strict=True):
        assert_within_budget(one, other, truth, what=f"gradient of {name}")
