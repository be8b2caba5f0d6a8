"""CPConfig(init="weights"): factors from a decomposition of known weights, and a start that is the model itself."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from vits import images, stir, vit

pytest.importorskip("tensorly")

from fastgist import CPConfig, LoraConfig, get_peft_model, load_adapter, save_adapter, unload
from fastgist.integrations.tensorly import init_from_weights
from fastgist.nn import CPFactors, CPLinear

K, N, R, M = 8, 7, 3, 6


def known() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """u (K, R), v (N, R), p (M, R) and the M matrices (K, N) that they make."""
    u, v, p = (torch.randn(size, R, dtype=torch.float64) for size in (K, N, M))
    return u, v, p, [(u * p[m]) @ v.T for m in range(M)]


def layers_of(f: CPFactors, matrices: list[Tensor], inward: bool = False) -> dict[str, CPLinear]:
    """Two layers of two folds and one of three, whose middle fold has no mode and holds what must not be read."""
    stray = torch.full((K, N), 1e6, dtype=torch.float64)
    folds = [matrices[:2], [matrices[2], stray, matrices[3]], matrices[4:]]
    modes = [(0, 1), (2, None, 3), (4, 5)]
    built = {}
    for i, (parts, mode) in enumerate(zip(folds, modes, strict=True)):
        whole = torch.cat(parts, 0 if inward else 1)
        base = nn.Linear(*whole.shape, dtype=torch.float64).requires_grad_(False)
        base.weight.copy_(whole.T)
        built[f"layer{i}"] = CPLinear(base, f, mode)
    return built


def outside(basis: Tensor, vectors: Tensor) -> Tensor:
    """What of ``vectors`` the columns of ``basis`` do not span."""
    q = torch.linalg.qr(basis.detach())[0]
    return vectors - q @ (q.T @ vectors)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return (nn.functional.normalize(a.detach(), dim=0).T @ nn.functional.normalize(b, dim=0)).abs()


@pytest.mark.parametrize("inward", [False, True])
@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_known_weights_give_their_own_directions(core, inward) -> None:
    u, v, p, matrices = known()
    f = CPFactors(K, N, R, M, core, dtype=torch.float64)
    init_from_weights(layers_of(f, matrices, inward))
    assert not f.v.any()
    torch.testing.assert_close(outside(f.u, u), torch.zeros_like(u))
    torch.testing.assert_close(outside(f.p, p), torch.zeros_like(p))
    if core == "cp":  # unique up to order, sign and size
        match = cosines(f.u, u).argmax(0)
        assert sorted(match.tolist()) == [0, 1, 2]
        torch.testing.assert_close(cosines(f.u, u)[match, range(R)], torch.ones(R, dtype=torch.float64))
        torch.testing.assert_close(cosines(f.p, p)[match, range(R)], torch.ones(R, dtype=torch.float64))
        sizes = u.norm(dim=0) * v.norm(dim=0) * p.norm(dim=0)
        torch.testing.assert_close(f.lam.detach()[match], sizes / sizes.square().mean().sqrt())


def test_conv1d_is_read_the_other_way_round() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    u, _, _, matrices = known()
    f = CPFactors(K, N, R, 2, dtype=torch.float64)
    base = conv1d(2 * N, K).double().requires_grad_(False)
    base.weight.copy_(torch.cat(matrices[:2], 1))
    init_from_weights({"c_attn": CPLinear(base, f, (0, 1))})
    torch.testing.assert_close(outside(f.u, u), torch.zeros_like(u))


@torch.no_grad()
def test_tucker_holds_the_weights_up_to_one_factor() -> None:
    """With the decomposition's V in place of 0, U (C x_3 p_m) V^T is proportional to W_m, one factor for all m."""
    _, _, _, matrices = known()
    f = CPFactors(K, N, R, M, "tucker", dtype=torch.float64)
    layers = layers_of(f, matrices)
    init_from_weights(layers)
    cores = torch.einsum("abr,mr->mab", f.c, f.p)
    left = torch.cat([f.u @ s for s in cores])  # (M K, R): one V^T makes all weights of it
    solution = torch.linalg.lstsq(left, torch.cat(matrices)).solution
    torch.testing.assert_close(left @ solution, torch.cat(matrices))


@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_the_scale_is_that_of_a_draw(core) -> None:
    drawn = [CPFactors(40, 30, 12, 20, core) for _ in range(50)]
    f = CPFactors(40, 30, 12, 20, core)
    layers = {str(m): CPLinear(nn.Linear(40, 30), f, m) for m in range(20)}
    init_from_weights(layers)
    for name in ("u", "p", "lam" if core == "cp" else "c"):
        mean = torch.stack([getattr(d, name).detach().square().mean() for d in drawn]).mean()
        ours = getattr(f, name).detach().square().mean()
        assert 0.95 < float(ours / mean) < 1.05  # of 50 draws, whose deviation is 2 % at most


@pytest.mark.parametrize("core", ["cp", "tucker"])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_ranks_other_than_the_weights(core, rank) -> None:
    """Fewer than they hold, more than they hold, more than either width and than matrices."""
    u, _, _, matrices = known()
    f = CPFactors(K, N, rank, M, core, dtype=torch.float64)
    layers = layers_of(f, matrices)
    init_from_weights(layers)
    assert all(bool(t.isfinite().all()) for t in f.parameters())
    assert bool(f.u.any(0).all())
    assert bool(f.p.any(0).all())
    if rank == 5:
        torch.testing.assert_close(outside(torch.linalg.svd(f.u)[0][:, :rank], u), torch.zeros_like(u))
    for layer in layers.values():
        assert not layer.get_delta_weight().any()
    x = torch.randn(4, K, dtype=torch.float64)
    layers["layer0"](x).square().sum().backward()
    assert bool(f.v.grad.isfinite().all())
    assert bool(f.v.grad.any(0).all())  # every mode can leave zero


def test_equal_seeds_give_equal_factors() -> None:
    _, _, _, matrices = known()
    found = []
    for seed in (0, 0, 1):
        f = CPFactors(K, N, 2, M, dtype=torch.float64)
        torch.manual_seed(seed)
        init_from_weights(
            layers_of(f, [m + 0.1 * torch.sin(torch.arange(N) * (1 + i)) for i, m in enumerate(matrices)])
        )
        found.append(f.u.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("core", ["cp", "tucker"])
@pytest.mark.parametrize("targets", [("q", "v"), ("q", "k", "v", "proj", "fc1", "fc2")])
def test_in_a_model_the_start_is_the_model(core, targets) -> None:
    plain = vit()
    x = images()
    before, weights = plain.eval()(x), {k: v.clone() for k, v in plain.state_dict().items()}
    model = get_peft_model(copy.deepcopy(plain), CPConfig(4, core, targets, dropout=0.0, init="weights")).eval()
    assert torch.equal(model(x), before)
    (f,) = {m.factors for m in model.modules() if isinstance(m, CPLinear)}
    parts = {"q": 0, "k": 1, "v": 2}
    square = [  # every matrix that is adapted, (in, out)
        block.attn.qkv.weight.chunk(3)[parts[t]].T for block in plain.blocks for t in targets if t in parts
    ]
    if "fc2" in targets:
        for block in plain.blocks:
            square += [block.attn.proj.weight.T]
            square += [w.T for w in block.mlp.fc1.weight.chunk(4)] + [w.T for w in block.mlp.fc2.weight.chunk(4, 1)]
    assert f.modes == len(square)
    leading = torch.linalg.svd(torch.cat([w.double() for w in square], 1), full_matrices=False)[0][:, :4]
    torch.testing.assert_close(outside(leading, f.u.double()).float(), torch.zeros_like(f.u))
    stir(model)
    assert not torch.equal(model(x), before)
    taken = unload(model, keep_head=False)
    assert all(torch.equal(v, weights[k]) for k, v in taken.state_dict().items())


def test_a_file_is_loaded_without_tensorly_and_without_a_decomposition(tmp_path, monkeypatch) -> None:
    plain = vit()
    model = get_peft_model(copy.deepcopy(plain), CPConfig(4, init="weights"))
    stir(model).eval()
    save_adapter(model, tmp_path)
    monkeypatch.setitem(sys.modules, "fastgist.integrations.tensorly", None)
    monkeypatch.setitem(sys.modules, "tensorly", None)
    other = load_adapter(copy.deepcopy(plain), tmp_path).eval()
    x = images()
    assert torch.equal(other(x), model(x))


def test_without_tensorly_the_error_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "fastgist.integrations.tensorly")
    monkeypatch.setitem(sys.modules, "tensorly", None)
    model = vit()
    names = set(model.state_dict())
    with pytest.raises(ImportError, match=r"init='weights' needs tensorly: pip install 'fastgist\[tensorly\]'"):
        get_peft_model(model, CPConfig(4, init="weights"))
    assert set(model.state_dict()) == names
    get_peft_model(model, LoraConfig(2))  # nothing of it is left


def test_errors_name_the_layer() -> None:
    _, _, _, matrices = known()

    def layers(core: str = "cp") -> dict[str, CPLinear]:
        return layers_of(CPFactors(K, N, R, M, core, dtype=torch.float64), matrices)

    with pytest.raises(ValueError, match="core must be one of cp, tucker, got 'tt'"):
        init_from_weights(layers("tt"))
    broken = layers()
    broken["layer1"].base_layer.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer1: its weight is not finite"):
        init_from_weights(broken)
    empty = layers()
    for layer in empty.values():
        layer.base_layer.weight.zero_()
    with pytest.raises(ValueError, match="weights of layer0, layer1, layer2 are all zero"):
        init_from_weights(empty)
    absent = layers()
    absent["layer2"].base_layer.to("meta")
    with pytest.raises(ValueError, match="layer2: its weight is on the meta device"):
        init_from_weights(absent)
    quantised = layers()
    quantised["layer0"].base_layer.weight = nn.Parameter(torch.zeros(2 * N, K, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"layer0: expected a dense floating-point weight of shape \(14, 8\).*, got Linear"
    ):
        init_from_weights(quantised)
    with pytest.raises(ValueError, match="CPConfig: init must be one of identity, weights, got 'paper'"):
        CPConfig(init="paper")
