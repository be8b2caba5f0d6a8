"""What a PETAL forward forms, counted at the dispatcher: products for the gains, calls of the experts, no dense update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgist.nn import CPFactors, CPLinear, CPThreshold, InstructionMoE
from fastgist.nn.threshold import delta_norms

CORES = ["cp", "tucker", "tt"]
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "mul", "mul_", "addmv", "mv", "dot")


class Seen(TorchDispatchMode):
    """(operator, its tensors, what it wrote) of every call that makes numbers, those inside an operator of ours too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastgist":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        given, made = ([t for t in tree_leaves(of) if isinstance(t, Tensor)] for of in ((args, kwargs), out))
        if not func.is_view:
            self.calls.append((func._opname, given, made))
        return out

    def products_with(self, size: int) -> list[str]:
        """Those of which an operand has ``size`` numbers."""
        return [n for n, given, _ in self.calls if n in PRODUCTS and any(t.numel() == size for t in given)]

    def products_of(self, tensor: Tensor) -> list[str]:
        """Those of which an operand is ``tensor`` or a view of it."""
        here = tensor.untyped_storage().data_ptr()
        return [
            n
            for n, given, _ in self.calls
            if n in PRODUCTS and any(t.untyped_storage().data_ptr() == here for t in given)
        ]

    def made_of(self, size: int) -> list[str]:
        return [n for n, _, made in self.calls if any(t.numel() >= size for t in made)]


# -- no dense update -----------------------------------------------------------------------------------------------------

K, N, R, M, ROWS = 50, 40, 3, 4, 6


def factors(core: str, threshold: CPThreshold | None = None) -> CPFactors:
    made = CPFactors(K, N, R, M, core, threshold=threshold)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p))
    return made


@pytest.mark.parametrize("core", CORES)
def test_norms_form_no_dense_update(core) -> None:
    f = factors(core)
    with Seen() as seen:
        norms = f.delta_norms()
        delta_norms(f.u, f.v, f._all()).sum().backward()
    assert norms.shape == (M,) and len(seen.calls) > 5
    assert seen.made_of(K * N) == []
    with Seen() as dense:  # what is looked for would be found
        f.u @ f._all()[0].diag().expand(R, R) @ f.v.T if core == "cp" else f.u @ f._all()[0] @ f.v.T
    assert dense.made_of(K * N) == ["mm"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("policy", ["trust", "modes"])
@pytest.mark.parametrize("core", CORES)
def test_a_step_under_a_threshold_forms_no_dense_update(core, policy, dynamic) -> None:
    """Forward, backward and the threshold's own move, of a layer with two folds: nothing as large as one fold's matrix."""
    f = factors(core, CPThreshold(policy, 0.3, dynamic))
    layer = CPLinear(nn.Linear(K, 2 * N).requires_grad_(False), f, (0, 2))
    x = torch.randn(ROWS, K, requires_grad=True)
    with Seen() as seen:
        layer(x).square().sum().backward()
        f.update_threshold()
    assert f.u.grad is not None and bool(f.u.grad.any()) and x.grad is not None
    assert seen.made_of(K * N) == []


# -- gains -------------------------------------------------------------------------------------------------------------

RANK = 7  # whose powers are no other size here


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_all_gains_of_a_model_come_from_one_product_a_group(core, training) -> None:
    """18 matrices in two groups: lambda, or the core, is multiplied twice in a forward."""
    pytest.importorskip("transformers")
    from qformers import inputs, make, quiet, stir

    from fastgist import petal

    config = petal.PetalConfig(rank=RANK, core=core, num_experts=0, dropout=0.1)
    model = quiet(stir(petal.wrap(make(), config, verbose=False))).train(training)
    with Seen() as seen:
        loss = model(**inputs()).loss
    assert sum(isinstance(m, CPLinear) for m in model.modules()) == 18
    groups = {m.factors for m in model.modules() if isinstance(m, CPLinear)}
    assert sorted(f.modes for f in groups) == [4, 14]
    for f in groups:
        if core == "cp":
            assert seen.products_of(f.lam) == ["mul"]
            assert seen.products_of(f.p) == ["mul"]
        else:
            assert seen.products_of(f.p) == ["mm"]
            assert len(seen.products_with(f.modes * RANK**2)) == 1, "V with all S_m of the group"
    assert seen.products_with(RANK**3) == (["mm"] * 2 if core == "tucker" else [])
    if training:
        with Seen() as back:
            loss.backward()
        assert len(back.products_with(RANK**3)) <= 2, "the gradient of p's rows; that of C has its size as a result"


@pytest.mark.parametrize("inward", [False, True])
@pytest.mark.parametrize("core", CORES)
def test_a_list_of_matrices_is_one_product(core, inward) -> None:
    f = factors(core)
    modes = [0, (1, 3), (2, None)]
    with Seen() as seen:
        several = f(modes, inward)
    with Seen() as one:
        f(0, inward)

    def count(s: Seen) -> list[str]:
        return [name for name, _, _ in s.calls if name in PRODUCTS]

    assert len(several) == 3
    assert 1 <= len(count(seen)) == len(count(one))


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gating", "top_k"), [("softmax", None), ("softmax", 2), ("uniform", None)])
def test_all_experts_are_one_call_of_the_adapter(gating, top_k, monkeypatch) -> None:
    """With a gate for each row and an output bias for each expert; the uniform form has 0.6 x by residual_scale."""
    from fastgist.nn import moe

    dim, experts, width = 12, 5, 3
    calls = []
    original = moe.functional.adapter

    def spy(*args, **options):
        calls.append((args, options))
        return original(*args, **options)

    monkeypatch.setattr(moe.functional, "adapter", spy)
    layer = InstructionMoE(dim, experts, width, gating, top_k, init="paper")
    x, instruction = torch.randn(2, 4, dim), torch.randn(2, 3, dim)
    layer(x, instruction)
    (((given, down, down_bias, up, up_bias), options),) = calls
    assert given is x
    assert (down.shape, down_bias.shape) == ((experts * width, dim), (experts * width,))
    assert up.shape == (dim, experts * width)
    if gating == "softmax":
        assert up_bias.shape == (experts, dim)
        gate = layer.get_gate(instruction).weights
        assert torch.equal(options["gate"], gate[:, None].expand(2, 4, experts))
        assert options.get("residual_scale", 1.0) == 1.0 and options.get("scale", 1.0) == 1.0
    else:
        assert options["residual_scale"] == 0.6 and options["scale"] == pytest.approx(0.4 / experts)
        assert "gate" not in options
        torch.testing.assert_close(up_bias, layer.up_bias.sum(0))  # a constant gate: its biases' sum, one row


@pytest.mark.parametrize("gating", ["softmax", "uniform"])
def test_a_model_calls_its_experts_once_a_forward(gating, monkeypatch) -> None:
    pytest.importorskip("transformers")
    from qformers import inputs, make

    from fastgist import petal
    from fastgist.nn import moe

    calls = []
    original = moe.functional.adapter
    monkeypatch.setattr(moe.functional, "adapter", lambda *a, **o: (calls.append(a[1].shape[0]), original(*a, **o))[1])
    config = petal.PetalConfig(rank=4, expert_dim=3, num_experts=5, gating=gating)
    model = petal.wrap(make(), config, verbose=False)
    model.train()(**inputs())
    assert calls == [5 * 3]


# -- the update's FLOPs at the published size -----------------------------------------------------------------------------
