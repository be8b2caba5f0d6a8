"""The layers of fastgist.nn against small expressions of their formulas, in float64."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from fastgist import functional
from fastgist.gist import GistOutput
from fastgist.nn import (
    AdaptedLayer,
    Adapter,
    BidirectionalKLLoss,
    CPFactors,
    CPLinear,
    GistLoss,
    GistToken,
    LoRALinear,
    TopKKLLoss,
    TunerLinear,
    linear_slice,
)
from fastgist.nn.interactions import INTERACTIONS
from fastgist.testing import assert_within_budget


def filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return module


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def cp(folds: int = 1, core: str = "cp", modes=None, **options) -> CPLinear:
    base = nn.Linear(6, 4 * folds, dtype=torch.float64)
    factors = filled(CPFactors(6, 4, 3, modes=5, core=core, dtype=torch.float64, **options))
    return CPLinear(base, factors, modes if modes is not None else (0 if folds == 1 else tuple(range(folds))))


# -- CP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [2, (1, 2, 3), (3, 0, 4), (0, None, 4)])
def test_cp_linear_is_the_formula(modes) -> None:
    folds = 1 if isinstance(modes, int) else len(modes)
    layer = cp(folds, modes=modes)
    f, x = layer.factors, torch.randn(2, 7, 6, dtype=torch.float64)
    parts = []
    for m in (modes,) if isinstance(modes, int) else modes:
        delta = torch.zeros(6, 4, dtype=torch.float64)
        for r in range(3):
            if m is not None:
                delta += f.lam[r] * f.p[m, r] * torch.outer(f.u[:, r], f.v[:, r])
        parts.append(delta)
    delta = torch.cat(parts, 1)
    close(layer(x), x @ (layer.base_layer.weight.T + delta) + layer.base_layer.bias)
    close(layer.get_delta_weight(), delta.T)


def test_tucker_is_the_formula_and_a_superdiagonal_core_is_cp() -> None:
    layer = cp(3, core="tucker")
    f, x = layer.factors, torch.randn(5, 6, dtype=torch.float64)
    deltas = [f.u @ torch.einsum("abc,c->ab", f.c, f.p[m]) @ f.v.T for m in range(3)]
    close(layer(x), x @ (layer.base_layer.weight.T + torch.cat(deltas, 1)) + layer.base_layer.bias)

    twin = CPLinear(layer.base_layer, CPFactors(6, 4, 3, 5, dtype=torch.float64), (0, 1, 2))
    with torch.no_grad():
        f.c.zero_()
        for r in range(3):
            f.c[r, r, r] = 1.0
        for name in ("u", "v", "p"):
            getattr(twin.factors, name).copy_(getattr(f, name))
    close(layer(x), twin(x))


def test_cp_initialisation() -> None:
    f = CPFactors(64, 32, 8, 100)
    assert (f.v == 0).all()
    assert (f.lam == 1).all()
    assert f.u.abs().max() <= 1 / 8
    assert f.u.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.1)
    assert f.p.abs().max() <= math.sqrt(6 / 108)
    assert f.p.std() > 0.1
    core = CPFactors(64, 32, 8, 4, core="tucker").c
    assert core.shape == (8, 8, 8)
    assert 0 < core.abs().max() <= math.sqrt(6 / 128)
    assert set(dict(CPFactors(4, 4, 2, 3, core="tucker").named_parameters())) == {"u", "v", "p", "c"}


def test_cp_errors_name_what_came_and_what_was_wanted() -> None:
    f = CPFactors(6, 4, 3, 5)
    with pytest.raises(ValueError, match=r"factors.in_features == 7 .*got 6"):
        CPLinear(nn.Linear(7, 8), f, 0)
    with pytest.raises(ValueError, match=r"factors.in_features must divide 7 .*got 6"):
        CPLinear(nn.Linear(7, 4), f, 0)
    with pytest.raises(ValueError, match=r"must divide 10 .*got 4"):
        CPLinear(nn.Linear(6, 10), f, 0)
    with pytest.raises(ValueError, match=r"expected 3 modes.*got 1"):
        CPLinear(nn.Linear(6, 12), f, 1)
    with pytest.raises(ValueError, match=r"mode must be in 0..4.*got 5"):
        CPLinear(nn.Linear(6, 4), f, 5)
    with pytest.raises(ValueError, match="only None"):
        CPLinear(nn.Linear(6, 8), f, (None, None))
    with pytest.raises(TypeError, match="factors must be a CPFactors, got Linear"):
        CPLinear(nn.Linear(6, 4), nn.Linear(2, 2), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="core must be one of cp, tucker, tt, got 'svd'"):
        CPFactors(6, 4, 3, 5, core="svd")
    with pytest.raises(ValueError, match=r"dropout must be a number in \[0, 1\), got 1.0"):
        CPFactors(6, 4, 3, 5, dropout=1.0)


@pytest.mark.parametrize("kind", ["lora", "cp"])
def test_state_dict_is_the_same_merged_or_not(kind) -> None:
    """A merged weight in a state_dict would get its update a second time where it is loaded."""
    base = nn.Linear(6, 4)
    layer = filled(LoRALinear(base, 2) if kind == "lora" else CPLinear(base, CPFactors(6, 4, 2, 1), 0))
    x = torch.randn(3, 6)
    expected, before = layer(x), copy.deepcopy(layer.state_dict())
    fresh = copy.deepcopy(layer)
    layer.merge()
    merged = layer.state_dict()
    assert merged.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in merged.items())
    fresh.load_state_dict(merged)
    torch.testing.assert_close(fresh(x), expected)
    with pytest.raises(RuntimeError, match="is merged: unmerge the model before loading into it"):
        layer.load_state_dict(before)


# -- LoRA ------------------------------------------------------------------------------------------------------------


def test_lora_is_the_formula() -> None:
    layer = filled(LoRALinear(nn.Linear(6, 8, dtype=torch.float64), rank=3, alpha=5))
    x = torch.randn(2, 6, dtype=torch.float64)
    close(layer(x), x @ layer.base_layer.weight.T + layer.base_layer.bias + 5 / 3 * (x @ layer.u) @ layer.v.T)


@pytest.mark.parametrize("parts", [(0, 2), (1,), (0, 1, 2)])
def test_lora_on_parts_of_a_fused_layer_is_one_lora_a_part(parts) -> None:
    base = nn.Linear(6, 12, dtype=torch.float64)
    layer = filled(LoRALinear(base, rank=2, alpha=3, folds=3, parts=parts))
    x = torch.randn(5, 6, dtype=torch.float64)
    exact = base(x).reshape(5, 3, 4).clone()
    for block, part in enumerate(parts):
        rows = slice(2 * block, 2 * block + 2)
        exact[:, part] += 1.5 * (x @ layer.u[:, rows]) @ layer.v[:, rows].T
    close(layer(x), exact.reshape(5, 12))
    assert {n for n, _ in layer.named_parameters()} == {"u", "v", "base_layer.weight", "base_layer.bias"}
    assert "mask" not in layer.state_dict()  # constant
    layer(x).sum().backward()
    idle = set(range(3)) - set(parts)
    for part in idle:  # what is not adapted is the base, bitwise
        assert torch.equal(layer(x).reshape(5, 3, 4)[:, part], base(x).reshape(5, 3, 4)[:, part])


def test_lora_errors() -> None:
    base = nn.Linear(6, 12)
    with pytest.raises(ValueError, match="alpha must be a finite number > 0, got 0"):
        LoRALinear(base, alpha=0)
    with pytest.raises(ValueError, match=r"folds must divide 12 .*got 5"):
        LoRALinear(base, folds=5)
    with pytest.raises(ValueError, match=r"parts must be different numbers in 0..2, got \(0, 3\)"):
        LoRALinear(base, folds=3, parts=(0, 3))
    with pytest.raises(ValueError, match="init must be one of identity, paper, got 'x'"):
        LoRALinear(base, init="x")
    with pytest.raises(ValueError, match="wrapped already, by LoRALinear"):
        LoRALinear(LoRALinear(base))
    with pytest.raises(TypeError, match="must be a linear layer, got GELU"):
        LoRALinear(nn.GELU())


# -- every wrapped linear layer --------------------------------------------------------------------------------------


def wrapped(kind: str, base: nn.Module) -> TunerLinear:
    if kind == "lora":
        layer: TunerLinear = LoRALinear(base, 2, folds=3, parts=(0, 2))
    else:
        weight = base.weight if isinstance(getattr(base, "weight", None), torch.Tensor) else None
        dtype = weight.dtype if weight is not None and weight.is_floating_point() else None
        layer = CPLinear(base, CPFactors(6, 4, 3, 4, core=kind, dtype=dtype), (0, None, 3))
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if not name.startswith("base_layer."):
                p.copy_(torch.randn_like(p) * 0.3)
    return layer


KINDS = ["lora", "cp", "tucker"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [(0, 4), (4, 12), (8, 12), (0, 12), (2, 6)])
def test_forward_slice_is_the_slice_of_forward(kind, cut) -> None:
    layer = wrapped(kind, nn.Linear(6, 12, dtype=torch.float64))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    part = linear_slice(layer, x, *cut)
    if part is None:
        assert cut == (2, 6)
        assert kind != "tucker"
    else:
        close(part, layer(x)[..., slice(*cut)])
    layer.merge()
    close(linear_slice(layer, x, *cut), layer(x)[..., slice(*cut)])


def test_no_slice_where_it_would_not_be_exact() -> None:
    x = torch.randn(2, 6)
    active = LoRALinear(nn.Linear(6, 12), 2, dropout=0.5).train()
    assert linear_slice(active, x, 0, 6) is None
    assert linear_slice(active.eval(), x, 0, 6) is not None
    assert linear_slice(Quantised(6, 12), x, 0, 6) is None
    assert linear_slice(nn.Linear(6, 12, bias=False), x, 0, 6).shape == (2, 6)


class Quantised(nn.Module):
    """As a 4-bit layer looks from outside: sizes, a packed weight, a forward of its own."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.in_features, self.out_features = k, n
        self.weight = nn.Parameter(torch.randint(0, 255, (k * n // 2, 1), dtype=torch.uint8), requires_grad=False)
        self.register_buffer("dense", torch.randn(n, k))

    def forward(self, x):
        return x @ self.dense.T.to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_layers_are_called_and_refuse_merging(kind) -> None:
    base = Quantised(6, 12)
    layer = wrapped(kind, base)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), x @ (base.dense + layer.get_delta_weight()).T)
    with pytest.raises(TypeError, match=r"merge: base_layer is Quantised with a .* of uint8; only a dense"):
        layer.merge()
    assert not layer.merged


def test_hooks_on_the_base_layer_run() -> None:
    base = nn.Linear(6, 12)
    layer = wrapped("lora", base)
    x, seen = torch.randn(4, 6), []
    before = layer(x)
    handle = base.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(x), before)
    assert seen == [1]
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_output_is_within_the_budget_and_unmerge_is_bitwise(kind, dtype) -> None:
    layer = wrapped(kind, nn.Linear(6, 12)).requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    layer.base_layer.to(dtype)
    exact.base_layer.weight.copy_(layer.base_layer.weight)
    exact.base_layer.bias.copy_(layer.base_layer.bias)
    x = torch.randn(9, 6, dtype=dtype)
    original = layer.base_layer.weight.clone()
    layer.merge()
    assert layer.merged
    assert not torch.equal(layer.base_layer.weight, original)
    plain = (x @ (original.double() + exact.get_delta_weight()).to(dtype).T) + layer.base_layer.bias
    assert_within_budget(layer(x), plain, exact(x.double()))
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original)
    assert not layer.merged
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


def test_merging_an_overflow_is_refused() -> None:
    layer = LoRALinear(nn.Linear(6, 12, dtype=torch.float16), 2)
    with torch.no_grad():
        layer.u.fill_(1e3)
        layer.v.fill_(1e3)
    original = layer.base_layer.weight.clone()
    with pytest.raises(RuntimeError, match="not finite in float16"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, original)
    assert not layer.merged


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_factors_and_not_the_frozen_base(kind) -> None:
    layer = wrapped(kind, nn.Linear(6, 12, dtype=torch.float64).requires_grad_(False)).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(3, 12, dtype=torch.float64)
    ours = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    got = torch.autograd.grad((layer(x) * probe).sum(), [x, *ours.values()])
    weight = layer.base_layer.weight + layer.get_delta_weight()
    want = torch.autograd.grad(((x @ weight.T + layer.base_layer.bias) * probe).sum(), [x, *ours.values()])
    for g, w in zip(got, want, strict=True):
        close(g, w)
    assert not any(n.startswith("base_layer") for n in ours)


def test_float32_factors_serve_a_half_precision_layer() -> None:
    layer = LoRALinear(nn.Linear(6, 12, dtype=torch.bfloat16).requires_grad_(False), 2)
    assert layer.u.dtype == torch.float32
    y = layer(torch.randn(3, 6, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.v.grad.dtype == torch.float32
    with pytest.raises(TypeError, match="bfloat16"):
        layer(torch.randn(3, 6))
    assert LoRALinear(nn.Linear(6, 12), 2, dtype=torch.float64).u.dtype == torch.float64
    assert LoRALinear(nn.Linear(6, 12), 2, device="meta").v.device.type == "meta"


def test_autocast_as_nn_linear() -> None:
    layer = LoRALinear(nn.Linear(6, 12), 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 6))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.v.grad.dtype == torch.float32


def test_dropout_is_active_in_training_only() -> None:
    layer = wrapped("cp", nn.Linear(6, 12))
    layer.factors.dropout = 0.5
    x = torch.randn(64, 6)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    assert not torch.equal(first, layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_deepcopy_pickle_and_repr(kind) -> None:
    layer = wrapped(kind, nn.Linear(6, 12))
    x = torch.randn(3, 6)
    other = wrapped(kind, nn.Linear(6, 12))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))
    assert "in_features=6, out_features=12" in repr(layer)
    assert "merged=False" in repr(layer)
    layer.reset_parameters()
    assert torch.equal(layer.get_delta_weight(), torch.zeros(12, 6))
    assert not hasattr(layer, "weight")  # code that reads past the layer must fail, not lose the update


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind) -> None:
    torch._dynamo.reset()
    layer = wrapped(kind, nn.Linear(6, 12))
    x = torch.randn(3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()


# -- adapters --------------------------------------------------------------------------------------------------------


def test_adapter_is_the_formula() -> None:
    layer = filled(Adapter(6, 3, "relu", 0.1, dtype=torch.float64))
    x, r = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    inner = torch.relu(x @ layer.down_weight.T + layer.down_bias) @ layer.up_weight.T + layer.up_bias
    close(layer(x), x + 0.1 * inner)
    close(layer(x, residual=r), r + 0.1 * inner)
    close(layer(x, residual=False), 0.1 * inner)


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_adapted_layer(placement) -> None:
    base = nn.Linear(6, 6, dtype=torch.float64)
    layer = AdaptedLayer(base, filled(Adapter(6, 3, dtype=torch.float64)), placement)
    x = torch.randn(4, 6, dtype=torch.float64)
    a = layer.adapter
    source = base(x) if placement == "sequential" else x
    inner = nn.functional.gelu(source @ a.down_weight.T + a.down_bias) @ a.up_weight.T + a.up_bias
    close(layer(x), base(x) + inner)


def test_adapter_initialisations() -> None:
    x = torch.randn(4, 64)
    assert torch.equal(Adapter(64, 8)(x), x)
    paper = Adapter(64, 8, init="paper")
    assert paper.up_weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert paper.down_weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert (paper.up_bias == 0).all()
    assert (paper.down_bias == 0).all()


def test_adapter_errors() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of gelu, .*got 'tanh'"):
        Adapter(6, 3, "tanh")
    with pytest.raises(ValueError, match="init must be one of"):
        Adapter(6, 3, init="zero")
    with pytest.raises(ValueError, match="scale must be a finite number, got"):
        Adapter(6, 3, scale=math.inf)
    with pytest.raises(ValueError, match="placement must be one of sequential, parallel, got 'inside'"):
        AdaptedLayer(nn.Linear(6, 6), Adapter(6, 3), "inside")


def test_float32_adapter_in_a_half_precision_model() -> None:
    layer = filled(Adapter(6, 3))
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    layer(x).sum().backward()
    assert layer.up_weight.grad.dtype == torch.float32


# -- the gist token --------------------------------------------------------------------------------------------------


def test_gist_token() -> None:
    token = GistToken(512, length=4, dropout=0.1)
    assert token.token.shape == (1, 4, 512)
    assert token.token.abs().max() <= 0.5
    assert token.token.std().item() == pytest.approx(1 / math.sqrt(12), rel=0.1)
    x = torch.zeros(300, 2, dtype=torch.bfloat16)
    out = token.train()(x)
    assert out.shape == (300, 4, 512)
    assert out.dtype == torch.bfloat16
    dropped = out == 0
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not torch.equal(dropped[0], dropped[1])  # a mask of its own for each sample
    assert torch.equal(token.eval()(x)[7], token.token[0].to(torch.bfloat16))


# -- losses ----------------------------------------------------------------------------------------------------------


def cross_entropy(z, y):
    return -torch.log_softmax(z, -1).gather(-1, y[:, None]).mean()


def interaction(name, z, g, t):
    p, q = torch.softmax(z / t, -1), torch.softmax(g / t, -1)
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    m = (p + q) / 2
    cosine = (z * g).sum(-1) / (z.square().sum(-1) * g.square().sum(-1)).sqrt()
    rows = {
        "bkld": kl(p, q) + kl(q, p),
        "kl_forward": kl(p, q),
        "kl_reverse": kl(q, p),
        "jsd": (kl(p, m) + kl(q, m)) / 2,
        "mse": ((z - g) / t).square().mean(-1),
        "cosine": 1 - cosine,
    }[name]
    return rows.mean()


@pytest.mark.parametrize("name", ["bkld", "kl_forward", "kl_reverse", "jsd", "mse", "cosine"])
@pytest.mark.parametrize("t_squared", [False, True])
def test_gist_loss_is_the_formula(name, t_squared) -> None:
    z, g = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.randint(5, (6,))
    loss = GistLoss(0.3, 0.7, 2.0, name, t_squared=t_squared)
    factor = 0.7 * (4.0 if t_squared else 1.0)
    exact = cross_entropy(z, y) + 0.3 * cross_entropy(g, y) + factor * interaction(name, z, g, 2.0)
    for ours in (loss(z, g, y), loss(GistOutput(logits=z, gist_logits=g), y), loss({"logits": z, "gist_logits": g}, y)):
        close(ours, exact)
        for a, b in zip(
            torch.autograd.grad(ours, (z, g)), torch.autograd.grad(exact, (z, g), retain_graph=True), strict=True
        ):
            close(a, b)


@pytest.mark.parametrize("name", ["bkld", "jsd", "mse"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_count_nowhere(name, reduction) -> None:
    z, g = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    y = torch.tensor([1, -100, 3, 0, -100, 2])
    kept = y >= 0
    z[1], g[4] = math.nan, math.nan
    z.requires_grad_(True)
    loss = GistLoss(interaction=name, reduction=reduction)
    ours, exact = loss(z, g, y), loss(z[kept], g[kept], y[kept])
    close(ours[kept] if reduction == "none" else ours, exact)
    (grad,) = torch.autograd.grad(ours.sum(), z)
    assert (grad[~kept] == 0).all()
    assert grad.isfinite().all()
    nothing = loss(z, g, torch.full((6,), -100))
    assert (nothing == 0).all()


def test_without_gist_logits_the_loss_is_plain_cross_entropy() -> None:
    z, y = torch.randn(6, 5), torch.tensor([1, -100, 3, 0, 4, 2])
    loss = GistLoss(label_smoothing=0.1)
    exact = nn.functional.cross_entropy(z, y, label_smoothing=0.1)
    for ours in (loss(z, y), loss(z, None, y), loss(GistOutput(logits=z), y)):
        torch.testing.assert_close(ours, exact)
    soft = torch.softmax(torch.randn(6, 5), -1)
    torch.testing.assert_close(GistLoss()(z, soft), nn.functional.cross_entropy(z, soft))
    sequence, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    torch.testing.assert_close(
        GistLoss()(sequence, targets), nn.functional.cross_entropy(sequence.transpose(1, 2), targets)
    )
    assert GistLoss()(z.bfloat16(), y).dtype == torch.float32
    assert GistLoss()(z[:0], y[:0]) == 0


def test_loss_errors() -> None:
    z, y = torch.randn(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"interaction must be one of bkld, .*got 'kl'"):
        GistLoss(interaction="kl")
    for module in (GistLoss, BidirectionalKLLoss):
        with pytest.raises(ValueError, match=f"{module.__name__}: temperature must be a finite number > 0, got 0"):
            module(temperature=0.0)
    with pytest.raises(ValueError, match="reduction must be one of"):
        GistLoss(reduction="median")
    with pytest.raises(TypeError, match="output must hold 'logits', it holds loss"):
        GistLoss()({"loss": z}, y)
    with pytest.raises(TypeError, match="got int"):
        GistLoss()(3, y)
    with pytest.raises(TypeError, match="got 1 arguments"):
        GistLoss()(z)


def test_bidirectional_kl_loss() -> None:
    z, g = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    close(BidirectionalKLLoss(2.0)(z, g), interaction("bkld", z, g, 2.0))
    mask = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
    close(BidirectionalKLLoss(2.0)(z, g, mask), interaction("bkld", z[mask], g[mask], 2.0))
    close(
        BidirectionalKLLoss(2.0, "none", True)(z, g),
        functional.bidirectional_kl(z, g, temperature=2.0, reduction="none", t_squared=True),
    )
    assert "temperature=2.0" in repr(BidirectionalKLLoss(2.0))


def test_topk_kl_loss() -> None:
    z, other = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    t, i = other.div(2).log_softmax(-1).topk(5)
    close(TopKKLLoss(2.0)(z, t, i), interaction("bkld", z, other, 2.0))
    mask, divisor = torch.arange(6) != 3, torch.tensor(4.0)
    close(
        TopKKLLoss(2.0, "forward", t_squared=True)(z, t[:, :2], i[:, :2], mask, divisor),
        functional.topk_kl(
            z, t[:, :2], i[:, :2], temperature=2.0, direction="forward", mask=mask, t_squared=True, divisor=divisor
        ),
    )
    assert TopKKLLoss(reduction="none")(z, t, i).shape == (6,)
    assert (
        repr(TopKKLLoss(2.0)) == "TopKKLLoss(temperature=2.0, direction='both', reduction='batchmean', t_squared=False)"
    )
    with pytest.raises(ValueError, match="TopKKLLoss: direction must be one of both, forward, reverse, got 'up'"):
        TopKKLLoss(direction="up")


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_absent_classes_leave_every_interaction(interaction) -> None:
    """A class at -inf in both heads (masked) is as if it were not there, in loss and gradients."""
    z, g, y = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64), torch.arange(4)
    loss = GistLoss(interaction=interaction)
    few = [t.clone().requires_grad_() for t in (z, g)]
    want = torch.autograd.grad(loss(*few, y), few)
    padded = [nn.functional.pad(t, (0, 2), value=-torch.inf).requires_grad_() for t in (z, g)]
    torch.testing.assert_close(loss(*padded, y), loss(*few, y))
    for got, w in zip(torch.autograd.grad(loss(*padded, y), padded), want, strict=True):
        torch.testing.assert_close(got[:, :6], w)
        assert bool((got[:, 6:] == 0).all())


def test_evaluation_on_soft_targets_with_an_absent_class() -> None:
    z, soft = torch.randn(3, 4), torch.rand(3, 4).softmax(-1)
    padded, targets = nn.functional.pad(z, (0, 1), value=-torch.inf), nn.functional.pad(soft, (0, 1))
    for reduction in ("mean", "none"):
        want = nn.functional.cross_entropy(z, soft, reduction=reduction)
        torch.testing.assert_close(GistLoss(reduction=reduction)(padded, targets), want)
