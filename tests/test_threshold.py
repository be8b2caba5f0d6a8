"""The threshold on mode approximation's updates against dense matrices, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from vits import images, stir, vit

from fastgist import CPConfig, get_peft_model, load_adapter, save_adapter
from fastgist.nn import CPFactors, CPLinear, CPThreshold, Linear, update_thresholds
from fastgist.nn.threshold import delta_norms
from fastgist.testing import assert_within_budget

CORES = ["cp", "tucker", "tt"]
FORMS = [("modes", False), ("modes", True), ("trust", False), ("trust", True)]
K, N, R, M = 6, 4, 3, 5


def factors(core="cp", threshold=None, *, filled=True, dtype=torch.float64, **options) -> CPFactors:
    made = CPFactors(K, N, R, M, core, threshold=threshold, dtype=dtype, **options)
    if filled:
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(torch.randn_like(p))
    return made


def base(folds: int = 1, inward: bool = False, dtype=torch.float64) -> nn.Linear:
    sizes = (K * folds, N) if inward else (K, N * folds)
    return nn.Linear(*sizes, dtype=dtype).requires_grad_(False)


def matrix(f: CPFactors, m: int, drop: int | None = None) -> torch.Tensor:
    """U S_m V^T (K, N), or the part of it that mode ``drop`` adds."""
    if f.core == "cp":
        s = torch.diag(f.p[m] * f.lam)
    elif f.core == "tucker":
        s = sum(f.c[:, :, r] * f.p[m, r] for r in range(R))
    else:
        s = f.s[m]
    keep = torch.ones(R, dtype=s.dtype) if drop is None else torch.eye(R, dtype=s.dtype)[drop]
    return (f.u * keep) @ s @ f.v.T


def by_hand(f: CPFactors, m: int, weight: torch.Tensor) -> torch.Tensor:
    """Matrix m's update (K, N) under the threshold, from dense parts; ``weight`` is (N, K)."""
    t, gamma = f.threshold, f.threshold.gamma_now.item()
    if t.policy == "trust":
        dense = matrix(f, m)
        return dense * min(1.0, gamma * weight.norm().item() / dense.norm().item())
    total = torch.zeros(K, N, dtype=torch.float64)
    for r in range(R):
        part = matrix(f, m, r)
        total = total + part * torch.sigmoid((part.norm() - gamma) / (t.softness * gamma))
    return total


def gamma_of(policy: str) -> float:
    return 0.8 if policy == "modes" else 0.3


def threshold(policy, dynamic, **options) -> CPThreshold:
    return CPThreshold(policy, gamma_of(policy), dynamic, **options)


# -- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
def test_norms_from_gram_matrices_are_the_dense_ones(core) -> None:
    f = factors(core)
    exact = torch.stack([matrix(f, m).norm() for m in range(M)]).detach()
    torch.testing.assert_close(f.delta_norms(), exact, rtol=1e-12, atol=1e-14)
    parts = torch.stack([torch.stack([matrix(f, m, r).norm() for r in range(R)]) for m in range(M)]).detach()
    torch.testing.assert_close(f.mode_energies(), parts, rtol=1e-12, atol=1e-14)
    single = copy.deepcopy(f).float()
    plain = torch.stack([matrix(single, m).norm() for m in range(M)])
    assert_within_budget(single.delta_norms(), plain, exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(single.delta_norms(), copy.deepcopy(single).delta_norms())
        assert_within_budget(single.delta_norms(), plain, exact)


def test_a_norm_that_cancels_is_not_nan() -> None:
    v = torch.randn(40, 1).expand(40, 3).contiguous()
    for _ in range(
        50
    ):  # a sum that is zero but for rounding, which takes its square below zero in about half of the draws
        u = torch.randn(50, 2)
        u = torch.cat((u, u.sum(1, keepdim=True)), 1)
        assert bool(delta_norms(u, v, torch.tensor([[1.0, 1.0, -1.0]])).isfinite().all())


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("policy", "dynamic"), FORMS)
@pytest.mark.parametrize(("modes", "inward"), [((2,), False), ((1, 2), False), ((3, None, 0), False), ((4, 1), True)])
def test_a_layer_is_the_formula(core, policy, dynamic, modes, inward) -> None:
    f = factors(core, threshold(policy, dynamic))
    if dynamic:
        f.update_threshold()
    elif policy == "modes":  # amid the energies, so that it matters
        f.threshold.gamma_now.copy_(f.mode_energies().mean())
    layer = CPLinear(base(len(modes), inward), f, modes)
    weights = layer.base_layer.weight.chunk(len(modes), dim=int(inward))
    folds = [
        torch.zeros(N, K, dtype=torch.float64) if m is None else by_hand(f, m, w).T
        for m, w in zip(modes, weights, strict=True)
    ]
    dense = torch.cat(folds, dim=int(inward))
    torch.testing.assert_close(layer.get_delta_weight(), dense, rtol=1e-9, atol=1e-11)
    free = factors(core)
    free.load_state_dict(f.state_dict(), strict=False)
    assert not torch.allclose(CPLinear(layer.base_layer, free, modes).get_delta_weight(), dense, rtol=1e-3)
    x = torch.randn(7, layer.in_features, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, layer.base_layer(x) + x @ dense.T, rtol=1e-9, atol=1e-11)
    upstream = torch.randn_like(y)
    names, held = zip(*f.named_parameters(), strict=True)
    got = torch.autograd.grad(y, held, upstream, allow_unused=True)
    right = torch.autograd.grad(x @ dense.T, held, upstream, allow_unused=True)
    for name, one, other in zip(names, got, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
    # what is merged is what runs, and evaluation is training
    assert torch.equal(layer.eval()(x), y)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-10, atol=1e-12)
    layer.unmerge()
    assert torch.equal(layer(x), y)


def test_trust_counts_the_layers_scale() -> None:
    f = factors(threshold=threshold("trust", False))
    layer = CPLinear(base(), f, 2, scale=-4.0)
    held = 0.3 * layer.base_layer.weight.norm()
    assert float(4 * f.delta_norms()[2]) > float(held)
    torch.testing.assert_close(layer.get_delta_weight().norm(), held)


def test_trust_reads_the_folds_of_a_layer_stored_the_other_way_round() -> None:
    class Conv1D(nn.Module):  # as transformers has it: (in, out)
        def __init__(self, nx, nf) -> None:
            super().__init__()
            self.nx, self.nf = nx, nf
            self.weight = nn.Parameter(torch.randn(nx, nf, dtype=torch.float64))

        def forward(self, x):
            return x @ self.weight

    f = factors(threshold=threshold("trust", False))
    out = CPLinear(Conv1D(K, 2 * N), f, (0, 3))
    into = CPLinear(Conv1D(2 * K, N), f, (1, 4))
    halves = [*out.base_layer.weight.split(N, 1), *into.base_layer.weight.split(K, 0)]
    expected = torch.stack([half.norm() for half in halves])
    torch.testing.assert_close(f.threshold.weight_norms[[0, 3, 1, 4]], expected.detach())
    assert f.threshold.weight_norms[2].item() == math.inf


@pytest.mark.parametrize("policy", ["modes", "trust"])
def test_float32_factors_hold_a_half_precision_layer(policy) -> None:
    f = factors(threshold=threshold(policy, False), dtype=torch.float32)
    layer = CPLinear(base(dtype=torch.bfloat16), f, 1)
    x = torch.randn(7, K).bfloat16()
    exact = x.double() @ (layer.base_layer.weight.double().T + layer.get_delta_weight().double().T)
    exact = exact + layer.base_layer.bias.double()
    plain = layer.base_layer(x) + x @ layer.get_delta_weight().bfloat16().T
    assert_within_budget(layer(x), plain, exact.detach())
    assert f.threshold.weight_norms.dtype == torch.float32


def test_trust_leaves_small_updates_alone() -> None:
    f = factors(threshold=threshold("trust", False))
    with torch.no_grad():
        f.v.mul_(1e-4)
    layer, free = CPLinear(base(), f, 2), factors()
    free.load_state_dict(f.state_dict(), strict=False)
    assert torch.equal(layer.get_delta_weight(), CPLinear(layer.base_layer, free, 2).get_delta_weight())


def test_modes_damps_the_weak_and_passes_the_strong() -> None:
    f = factors(threshold=CPThreshold("modes", 1.0), filled=False)
    with torch.no_grad():
        f.u.copy_(torch.eye(K, R))
        f.v.copy_(torch.eye(N, R))
        f.p.copy_(torch.tensor([1e-6, 1.0, 10.0]).expand(M, R))
    gain = f(0).gain / f.p[0]
    expected = torch.tensor([[1 / (1 + math.exp(4)), 0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(gain.detach(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("policy", "dynamic"), FORMS)
@pytest.mark.parametrize("updated", [False, True])
def test_finite_at_zero_and_it_leaves_zero(core, policy, dynamic, updated) -> None:
    f = factors(core, threshold(policy, dynamic), filled=False, dtype=torch.float32)
    layer = CPLinear(base(dtype=torch.float32), f, 0)
    if updated:
        f.update_threshold()
    x = torch.randn(7, K)
    optimiser = torch.optim.SGD(f.parameters(), 0.1)
    for step in range(3):
        y = layer(x)
        assert step or torch.equal(y, layer.base_layer(x))
        (y - 1).square().sum().backward()
        for name, p in f.named_parameters():
            assert bool(p.grad.isfinite().all()), name
        assert bool(f.v.grad.any())
        optimiser.step()
        f.zero_grad()
        assert update_thresholds(layer) == 1
    assert bool(f.v.any())


# -- Gamma over a training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("policy", ["modes", "trust"])
def test_dynamic_gamma_follows_the_factors(core, policy) -> None:
    f = factors(core, CPThreshold(policy, Linear(1.0, 3.0), True, decay=0.75, floor=1e-3))
    layers = [CPLinear(base(), f, m) for m in (0, 2, 3)]
    t, mean = f.threshold, None
    assert float(t.gamma_now) == (0.0 if policy == "modes" else pytest.approx(1e-3))
    for step in range(4):
        if policy == "modes":
            level = sum(float(matrix(f, m, r).detach().norm()) for m in range(M) for r in range(R)) / (M * R)
        else:  # of modes whose weight is known
            known = zip((0, 2, 3), layers, strict=True)
            level = sum(float(matrix(f, m).detach().norm() / x.base_layer.weight.norm()) for m, x in known) / 3
        mean = level if mean is None else 0.75 * mean + 0.25 * level
        f.update_threshold(progress=step / 4)
        assert float(t.average) == pytest.approx(mean, rel=1e-9)
        assert float(t.gamma_now) == pytest.approx((1 + step / 2) * mean, rel=1e-9)
        assert int(t.updates) == step + 1
        before = float(t.gamma_now)
        for layer in layers:  # forwards move nothing: a recomputed one sees what the first saw
            layer.train()(torch.randn(3, K, dtype=torch.float64)).sum().backward()
        assert float(t.gamma_now) == before
        with torch.no_grad():
            f.v.mul_(1.5)
    with torch.no_grad():
        f.v.mul_(0)
    for _ in range(100):
        f.update_threshold()
    assert float(t.gamma_now) == (pytest.approx(0.0, abs=1e-9) if policy == "modes" else pytest.approx(1e-3))
    f.reset_parameters()
    assert int(t.updates) == 0
    assert float(t.average) == 0.0
    assert t.weight_norms.isfinite().tolist() == [policy == "trust" and m in (0, 2, 3) for m in range(M)]


def test_static_gamma_may_be_a_schedule() -> None:
    f = factors(threshold=CPThreshold("modes", Linear(2.0, 4.0)))
    assert float(f.threshold.gamma_now) == 2.0
    f.update_threshold(0.5)
    assert float(f.threshold.gamma_now) == 3.0
    assert float(f.threshold.average) == 0.0


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("policy", "dynamic"), FORMS)
def test_a_resumed_training_goes_on_alike(core, policy, dynamic) -> None:
    def made() -> nn.Sequential:
        f = factors(core, threshold(policy, dynamic), filled=False)
        return nn.Sequential(CPLinear(base(), f, 0), nn.Linear(N, K, dtype=torch.float64), CPLinear(base(), f, 1))

    def train(model, seed) -> None:
        optimiser = torch.optim.SGD(model.parameters(), 0.05)
        optimiser.register_step_post_hook(lambda *_: update_thresholds(model))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            x = torch.randn(5, K, dtype=torch.float64, generator=generator)
            model(x).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()

    model, other = made(), made()
    train(model, 0)
    assert int(model[0].factors.threshold.updates) == 3
    other.load_state_dict(model.state_dict())
    train(model, 1)
    train(other, 1)
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    clone = copy.deepcopy(model)
    assert clone[0].factors.threshold is clone[2].factors.threshold


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("policy", "dynamic"), FORMS)
def test_nothing_is_read_back_to_the_host(core, policy, dynamic) -> None:
    """On the meta device a number that is read raises."""
    f = CPFactors(K, N, R, M, core, threshold=threshold(policy, dynamic), device="meta")
    layer = CPLinear(nn.Linear(K, 2 * N, device="meta"), f, (0, 3))
    for _ in range(2):
        layer(torch.empty(3, K, device="meta")).sum().backward()
        f.update_threshold(0.5)


@pytest.mark.parametrize(("policy", "dynamic"), FORMS)
def test_compiles_whole(policy, dynamic) -> None:
    f = factors("cp", threshold(policy, dynamic))
    layer = CPLinear(base(2), f, (0, 3))
    f.update_threshold()
    x = torch.randn(3, K, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        f.v.mul_(3)
    f.update_threshold()
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-10, atol=1e-12)
    compiled(x).sum().backward()


# -- in a model ------------------------------------------------------------------------------------------------------


def test_shared_state_is_held_once_and_saved(tmp_path) -> None:
    def made(plain):
        model = get_peft_model(plain, CPConfig(rank=3, dropout=0.0))
        for f in {m.factors for m in model.modules() if isinstance(m, CPLinear)}:
            f.threshold = CPThreshold("modes", 0.5, True)
            f.threshold.bind(f.modes, f.u.device, f.u.dtype)
        return model

    plain = vit()
    model, other, third = (made(copy.deepcopy(plain)) for _ in range(3))
    stir(model).eval()
    assert update_thresholds(model) > 0
    state = model.state_dict()
    gammas = [name for name in state if name.endswith("gamma_now")]
    assert len(gammas) == len({m for m in model.modules() if isinstance(m, CPThreshold)})
    save_file(state, tmp_path / "model.safetensors")  # refuses tensors that share memory
    other.eval().load_state_dict(state)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(third.eval(), tmp_path / "adapter")
    x = images()
    for twin in (other, third):
        assert [float(twin.state_dict()[n]) for n in gammas] == [float(state[n]) for n in gammas]
        torch.testing.assert_close(twin(x), model(x))
    assert all(float(state[n]) > 0 for n in gammas)


def test_without_a_threshold_nothing_changes() -> None:
    f = factors()
    assert f.threshold is None
    assert set(f.state_dict()) == {"u", "v", "p", "lam"}
    assert torch.equal(f(2).gain, (f.p[2] * f.lam)[None])
    assert update_thresholds(nn.Sequential(CPLinear(base(), f, 0))) == 0
    with pytest.raises(RuntimeError, match="these factors have no threshold"):
        f.update_threshold()


def test_errors_name_what_came_and_what_was_wanted() -> None:
    for options, match in (
        ({"policy": "hard"}, "policy must be one of modes, trust, got 'hard'"),
        ({"gamma": 0.0}, "gamma must be a finite number > 0, got 0.0"),
        ({"gamma": math.nan}, "gamma must be a finite number > 0, got nan"),
        ({"gamma": Linear(0.0, 1.0)}, "gamma must be a finite number > 0, got 0.0"),
        ({"decay": 1.0}, r"decay must be a number in \[0, 1\), got 1.0"),
        ({"softness": -1.0}, "softness must be a finite number > 0, got -1.0"),
        ({"floor": 0.0}, "floor must be a finite number > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=f"CPThreshold: {match}"):
            CPThreshold(**options)
    mine = CPThreshold()
    factors(threshold=mine)
    with pytest.raises(ValueError, match="belongs to a CPFactors already"):
        factors(threshold=mine)
    with pytest.raises(TypeError, match="threshold must be a CPThreshold or None, got float"):
        factors(threshold=0.5)
    f = factors(threshold=CPThreshold("trust"))
    quantised = base()
    quantised.weight = nn.Parameter(torch.zeros(N, K, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"dense floating-point weight of shape \(4, 6\), got Linear"):
        CPLinear(quantised, f, 0)
    assert "policy='trust', gamma=0.5, dynamic=False" in repr(f)
