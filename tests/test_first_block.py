"""The first block's attention with gradients for the gist token's rows alone, against the ordinary one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from vits import gradients, images, stir, vit

import fastgist as fg
from fastgist.integrations.timm import first
from fastgist.ops import _attention
from fastgist.testing import assert_within_budget, layouts
from fastgist.train.ledger import saved_tensor_ledger

DEPTH = 3
_ALL_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
TARGET = torch.tensor([0, 1, 2])
SERVED = {
    "shared": fg.AdapterConfig(4, placement="shared"),
    "adaptformer": fg.AdapterConfig(4, placement="adaptformer"),
    "houlsby": fg.AdapterConfig(4, placement="houlsby"),
    "lora on the mlp": fg.LoraConfig(2, targets=("fc1", "fc2"), dropout=0.2),
    "lora on the projection": fg.LoraConfig(2, targets=("proj",)),
    "cp on the mlp": fg.CPConfig(2, targets=("fc1",)),
    "probe": fg.LinearProbeConfig(),
}
ORDINARY = {
    "lora on qkv": fg.LoraConfig(2, targets=("q", "v")),
    "ssf": fg.SSFConfig(),
    "bitfit": fg.BitFitConfig(),
    "prompts": fg.PromptConfig(2, deep=True),
    "prefix": fg.PrefixConfig(2),
    "full": fg.FullConfig(),
}
every_served = pytest.mark.parametrize("config", SERVED.values(), ids=SERVED.keys())


@pytest.fixture
def calls(monkeypatch) -> list:
    """Where the rows stood in each use."""
    seen: list = []
    run = first.attention_for_rows
    monkeypatch.setattr(first, "attention_for_rows", lambda rows, whole, at: seen.append(at) or run(rows, whole, at))
    return seen


def made(config=SERVED["shared"], length: int = 1, dropout: float = 0.1, dtype=torch.float32, **options) -> nn.Module:
    plain = vit(**{"depth": DEPTH} | options)
    return stir(fg.add_gist(fg.get_peft_model(plain, config), fg.GistConfig(length, dropout))).to(dtype).train()


def ordinary(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.host.first = None
    return other


def step(model: nn.Module, dtype=torch.float32, x: Tensor | None = None, run: Callable | None = None):
    """(logits, loss, gradients) of ``model``, or of ``run`` for it, with the same draws on every call."""
    torch.manual_seed(5)
    x = images(dtype=dtype) if x is None else x
    model.zero_grad()
    out = (model if run is None else run)(x)
    loss = fg.nn.GistLoss()(out, TARGET)
    loss.backward()
    return out.logits.detach(), loss.detach(), gradients(model)


def assert_equal_but_for_rounding(ours, want) -> None:
    assert torch.equal(ours[0], want[0]) and torch.equal(ours[1], want[1])
    assert ours[2].keys() == want[2].keys()
    for name, grad in want[2].items():
        if name.endswith("gist.token"):
            torch.testing.assert_close(ours[2][name], grad)
        else:
            assert torch.equal(ours[2][name], grad), name


# -- a model's step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5])
@every_served
def test_a_step_is_the_ordinary_one(config, length, calls):
    """In float64, the token's dropout and all: outputs bit for bit, and every gradient but the token's too."""
    model = made(config, length, dtype=torch.float64)
    ours = step(model, torch.float64)
    assert calls == [1]
    assert_equal_but_for_rounding(ours, step(ordinary(model), torch.float64))
    assert calls == [1]


VARIANTS = {
    "registers": {"reg_tokens": 4},
    "a norm before the blocks": {"pre_norm": True},
    "normed queries and keys": {"qk_norm": True},
    "a normed output": {"scale_attn_norm": True},
    "layer scale": {"init_values": 0.5},
    "no bias": {"qkv_bias": False},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_the_model(options, calls):
    model = made(length=2, dtype=torch.float64, **options)
    ours = step(model, torch.float64)
    assert calls == [1 + options.get("reg_tokens", 0)]
    assert_equal_but_for_rounding(ours, step(ordinary(model), torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_served
def test_gradients_within_the_budget(config, dtype, calls):
    model = made(config, 2, dropout=0.0, dtype=dtype).eval()  # evaluation with gradients: nothing draws
    model.zero_grad()
    found, x = [], images(dtype=dtype)
    for m in (model, ordinary(model), ordinary(model).double()):
        out = m(x.to(m.gist.token.dtype), return_gist_logits=True)
        m.zero_grad()
        fg.nn.GistLoss()(out, TARGET).backward()
        found.append((out.logits.detach(), gradients(m)))
    assert calls == [1]
    (ours, our_grads), (plain, plain_grads), (_, exact) = found
    assert torch.equal(ours, plain)
    for name, grad in our_grads.items():
        assert_within_budget(grad, plain_grads[name], exact[name], what=name)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=["plain", "normed queries and keys"])
def test_autocast(options, length, calls):
    model, x = made(length=length, dropout=0.0, **options), images()
    want = step(ordinary(model).double(), x=x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = step(model, x=x), step(ordinary(model), x=x)
    assert calls == [1]
    assert torch.equal(ours[0], plain[0])
    for name, grad in ours[2].items():
        assert_within_budget(grad, plain[2][name], want[2][name], what=name, dtype=torch.bfloat16)


def test_hidden_units_formed_again_and_a_copy(calls):
    model = made(dtype=torch.float64)
    want = step(ordinary(model), torch.float64)
    model.set_grad_checkpointing("mlp")
    for m in (model, pickle.loads(pickle.dumps(model))):
        assert_equal_but_for_rounding(step(m, torch.float64), want)
    assert calls == [1, 1]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("circumstances", ["plain", "autocast", "without a kernel"])
def test_one_graph(length, circumstances, calls):
    model = made(length=length, dropout=0.0)  # a compiled graph draws otherwise
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=circumstances == "autocast"):
        want = step(model)
        with sdpa_kernel([SDPBackend.MATH] if circumstances == "without a kernel" else list(_ALL_BACKENDS)):
            found = step(model, run=compiled)
    assert calls == [1, 1], "not traced with the rows"
    torch.testing.assert_close(found, want)


def test_a_second_derivative_is_refused():
    model, x = made(SERVED["probe"]), images()
    with pytest.raises(RuntimeError, match=r"attention_for_rows: no second derivative.*sdpa_kernel"):
        torch.autograd.grad(model(x).logits.sum(), model.gist.token, create_graph=True)
    with sdpa_kernel(SDPBackend.MATH):
        (grad,) = torch.autograd.grad(model(x).logits.sum(), model.gist.token, create_graph=True)
        grad.square().sum().backward()
    assert model.gist.token.grad.abs().sum() > 0


def test_a_graph_that_is_kept_gives_the_same_twice():
    model = made(dropout=0.0)
    loss = fg.nn.GistLoss()(model(images()), TARGET)
    one, two = (torch.autograd.grad(loss, model.gist.token, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(one, two)


# -- what it saves -----------------------------------------------------------------------------------------------------


class Sizes(TorchDispatchMode):
    """How many operations had a result of each number of elements; views are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.seen[out.numel()] = self.seen.get(out.numel(), 0) + 1
        return out


@every_served
def test_one_attention_less_in_the_backward(config):
    """And nothing as large as q, k and v together for the first block: not their gradients, not the layer's."""
    model = made(config)
    packed = 3 * 6 * 3 * 32
    backwards, sizes = [], []
    for m in (model, ordinary(model)):
        loss = fg.nn.GistLoss()(m(images()), TARGET)
        with Sizes() as seen:
            loss.backward(retain_graph=True)
        with profile(activities=[ProfilerActivity.CPU]) as events:
            loss.backward()
        names = [e.key for e in events.key_averages() for _ in range(e.count)]
        backwards.append(names.count("aten::_scaled_dot_product_flash_attention_for_cpu_backward"))
        sizes.append(seen.seen.get(packed, 0))
    assert backwards == [DEPTH - 1, DEPTH]
    inner = DEPTH - 1  # the last block has few queries
    assert sizes[1] > 0 and sizes[0] * inner == sizes[1] * (inner - 1)


@every_served
def test_no_more_is_kept(config):
    model, x = made(config), images()
    ours, plain = (saved_tensor_ledger(m, lambda m=m: fg.nn.GistLoss()(m(x), TARGET)) for m in (model, ordinary(model)))
    token, x_of_norm, statistics = (3 * n for n in (4 * 32, 4 * 6 * 32, 4 * 2))
    less = 6 * statistics - token - statistics  # norm1 keeps mean and deviation of the token's row alone, and that row
    if config not in (SERVED["shared"],):  # its adapter keeps x too
        less += x_of_norm
    assert sum(ours.values()) == sum(plain.values()) - less


# -- where it does not serve -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ORDINARY.values(), ids=ORDINARY.keys())
def test_methods_with_more_to_train_there(config, calls):
    step(made(config))
    assert calls == []


def _inner(model: nn.Module):
    return model.model.blocks[0].base_layer


def _hook(path: str) -> Callable[[nn.Module], object]:
    return lambda model: model.model.get_submodule(path).register_forward_hook(lambda *a: None)


def _trained(path: str) -> Callable[[nn.Module], object]:
    return lambda model: model.model.get_parameter(path).requires_grad_(True)


OTHERWISE: dict[str, Callable[[nn.Module], object]] = {
    "the token is frozen": lambda model: model.gist.token.requires_grad_(False),
    "recomputed blocks": lambda model: model.set_grad_checkpointing(True),
    "attention in memory": lambda model: setattr(_inner(model).attn, "fused_attn", False),
    "dropout on the weights": lambda model: setattr(_inner(model).attn.attn_drop, "p", 0.5),
    "another norm": lambda model: setattr(_inner(model), "norm1", nn.Sequential(nn.Identity())),
    "a layer that is no nn.Linear": lambda model: setattr(_inner(model).attn, "qkv", _Other(32, 96)),
    "an adapter beside the attention": lambda model: setattr(
        _inner(model), "attn", fg.nn.AdaptedLayer(_inner(model).attn, fg.nn.Adapter(32, 4), "parallel")
    ),
    "a gate on what the attention reads": lambda model: setattr(_inner(model).attn, "gate", nn.Linear(32, 32)),
    "more than timm's block": lambda model: _inner(model).add_module("more", nn.Identity()),
    "more than timm's attention": lambda model: _inner(model).attn.add_module("more", nn.Identity()),
    "compiled": lambda model: setattr(_inner(model).norm1, "_compiled_call_impl", _inner(model).norm1.forward),
    **{
        f"{path} trained": _trained(path)
        for path in (
            "pos_embed",
            "cls_token",
            "patch_embed.proj.weight",
            "norm_pre.base_layer.weight",
            "blocks.0.base_layer.norm1.weight",
            "blocks.0.base_layer.attn.qkv.bias",
            "blocks.0.base_layer.attn.q_norm.weight",
            "blocks.0.base_layer.attn.k_norm.bias",
        )
    },
    **{
        f"{path} watched": _hook(path)
        for path in (
            "norm_pre",
            "norm_pre.base_layer",
            "blocks.0",
            "blocks.0.base_layer",
            "blocks.0.base_layer.norm1",
            "blocks.0.base_layer.attn",
            "blocks.0.base_layer.attn.qkv",
            "blocks.0.base_layer.attn.q_norm",
        )
    },
}


class _Other(nn.Linear):
    pass


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE.keys())
def test_where_the_ordinary_way_is_taken(change, calls):
    model = made(pre_norm=True, qk_norm=True)
    step(model)
    assert calls.pop() == 1
    change(model)
    step(model)
    assert calls == []


def test_circumstances_in_which_the_ordinary_way_is_taken(calls):
    model, x = made(), images()
    with torch.no_grad():
        model(x)
    step(model, x=x.clone().requires_grad_())
    assert model.host.first.serves(model.model, x)
    single = made(depth=1)  # its only block is the last
    assert not single.host.first.serves(single.model, x)
    step(single)
    step(made(global_pool="avg"))
    hook = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        step(model)
    finally:
        hook.remove()
    for dtype in (torch.float32, torch.bfloat16):
        with sdpa_kernel(SDPBackend.MATH):
            m = copy.deepcopy(model).to(dtype)
            out = m(x.to(dtype))
            out.logits.sum().backward()
        assert m.gist.token.grad is not None
    assert calls == []


def test_function_transforms(calls):
    model, x = made(SERVED["probe"]).eval(), images()
    name = "model.norm_pre.gist.token"

    def total(token: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: token}, (x,)).logits.sum()

    token = model.gist.token.detach()
    torch.testing.assert_close(
        torch.func.grad(total)(token), torch.autograd.grad(total(model.gist.token), model.gist.token)[0]
    )
    assert calls == [1], "the second alone"


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_holds_torchs_own_attention(strict):
    model = made(SERVED["probe"]).eval()
    # Strict tracing looks like torch.compile from inside; a program is for inference, and then there are no gradients.
    with torch.set_grad_enabled(not strict):
        exported = torch.export.export(model, (images(),), strict=strict)
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.aten.scaled_dot_product_attention.default) == DEPTH


# -- the operation -----------------------------------------------------------------------------------------------------


def operands(dtype=torch.float64, rows: int = 7, width: int = 8) -> list[Tensor]:
    """q, k, v and a gradient of the output, (2, 3, rows, width)."""
    return [torch.randn(2, 3, rows, width, dtype=dtype) for _ in range(4)]


def both(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, at: int, length: int):
    """(out, gradients of the rows) of our operation, and of torch's, whose other gradients are dropped."""
    rows = [t[:, :, at : at + length].detach().clone().requires_grad_() for t in (q, k, v)]
    out = _attention.attention_for_rows(tuple(rows), (q, k, v), at)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    want = nn.functional.scaled_dot_product_attention(*leaves)
    expected = [g[:, :, at : at + length] for g in torch.autograd.grad(want, leaves, grad)]
    return (out.detach(), torch.autograd.grad(out, rows, grad)), (want.detach(), expected)


@pytest.mark.parametrize(("at", "length"), [(0, 1), (3, 2), (6, 1), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operation(dtype, at, length):
    q, k, v, grad = operands(dtype)
    (out, ours), (want, plain) = both(q, k, v, grad, at, length)
    _, (_, exact) = both(*(t.double() for t in (q, k, v, grad)), at, length)
    assert torch.equal(out, want)
    for name, one, other, truth in zip("qkv", ours, plain, exact, strict=True):
        assert one.dtype == dtype
        assert_within_budget(one, other, truth, what=name)


def test_the_operation_in_every_layout():
    q, k, v, grad = operands()
    want = both(q, k, v, grad, 2, 2)[1]
    for _, g in layouts(grad):
        for kind in ("contiguous", "slice of a cat", "transposed"):
            laid = [dict(layouts(t))[kind] for t in (q, k, v)]
            torch.testing.assert_close(both(*laid, g, 2, 2)[0], tuple(want) if isinstance(want, tuple) else want)


def test_large_scores():
    """exp(score - lse) where either alone would overflow."""
    q, k, v, grad = operands()
    ours, want = both(q * 60, k * 60, v, grad, 2, 2)
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_out_and_log_sum_exp(dtype, monkeypatch):
    """As promised to a compiler, with a kernel and without one; out comes without a copy where there is one."""
    q, k, v = (t.transpose(1, 2) for t in torch.randn(2, 7, 3, 3, 8, dtype=dtype).unbind(2))
    raw = torch.ops.fastgist.attention_lse.default
    torch.library.opcheck(raw, (q, k, v))
    exact = (q.double() @ k.double().transpose(-2, -1) / 8**0.5).logsumexp(-1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as events:
        _, with_kernel = raw(q, k, v)
    copied = [e.input_shapes[0] for e in events.events() if e.name == "aten::copy_"]
    assert [2, 7, 3, 8] not in copied and [2, 3, 7, 8] not in copied
    with sdpa_kernel(SDPBackend.MATH):
        assert not _attention.serves_attention(q, k, v)
        torch.library.opcheck(raw, (q, k, v))
        _, without = raw(q, k, v)
    for lse in (with_kernel, without):
        assert_within_budget(lse, exact.to(lse.dtype), exact, dtype=dtype)
    assert _attention.serves_attention(q, k, v)
    assert not _attention.serves_attention(q.float(), k.double(), v)
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert not _attention.serves_attention(q, k, v)


@pytest.mark.parametrize("length", [1, 3])
def test_a_backward_under_autocast_sums_in_float32(length):
    q, k, v, grad = operands(torch.float32)
    rows = tuple(t[:, :, 2 : 2 + length].clone().requires_grad_() for t in (q, k, v))
    out = _attention.attention_for_rows(rows, (q, k, v), 2)
    want = torch.autograd.grad(out, rows, grad, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, torch.autograd.grad(out, rows, grad), want))


def test_the_raw_op_names_where_gradients_are():
    q, k, v, _ = operands()
    out, _ = torch.ops.fastgist.attention_lse(q.requires_grad_(), k, v)
    with pytest.raises(RuntimeError, match=r"call torch\.nn\.functional\.scaled_dot_product_attention for gradients"):
        out.sum().backward()


def test_operators_that_have_changed_are_left_alone(monkeypatch):
    known = _attention._runs()
    assert ("cpu", 1) in known and {kind for _, kind in known} == {1, 2, 3}
    _attention._runs.cache_clear()
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", torch.ops.aten.mul)
    try:
        assert ("cpu", 1) not in _attention._runs()
        assert not _attention.serves_attention(*operands()[:3])
    finally:
        _attention._runs.cache_clear()


@pytest.mark.parametrize("kind", [1, 2, 3], ids=["flash", "efficient", "cudnn"])
def test_the_operators_of_a_gpu_by_their_shapes(kind, monkeypatch):
    """Without a GPU: they take what they are given, and padded rows or a dimension more become what we promise."""
    q, k, v = (t.transpose(1, 2) for t in torch.empty(2, 50, 3, 4, 64, dtype=torch.bfloat16, device="meta").unbind(2))
    monkeypatch.setattr(_attention, "_run_for", lambda *a: _attention._runs()["cuda", kind])
    found, promised = _attention._attention_lse(q, k, v), _attention._attention_lse_fake(q, k, v)
    for ours, fake in zip(found, promised, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (fake.shape, fake.stride(), fake.dtype)
