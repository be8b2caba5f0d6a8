"""What each operation keeps for its backward, in bytes, against the least that would do.

Two things are held apart. *Own*: storages that only the graph holds, which are memory that the operation costs. *The
caller's*: tensors that were given and stay alive as long as the graph does; of parameters that costs nothing, of an
activation (x, logits) it costs its size wherever nobody else keeps it. The least, for each operation below, is what no
backward can do without when it may repeat a product of low rank, but not one of full size.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, implementations
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastgist import functional as F

pytestmark = pytest.mark.kernel

M, K, N, R = 48, 64, 96, 8
H, D = 12, 64
HALF_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Kept:
    """own: bytes of each storage that the graph alone holds. given: names of the caller's tensors that it keeps alive."""

    own: list[int] = field(default_factory=list)
    given: set[str] = field(default_factory=set)

    @property
    def bytes(self) -> int:
        return sum(self.own)


def kept(given: dict[str, Tensor | None], run: Callable[[], Tensor | tuple[Tensor, ...]]) -> Kept:
    """What the graph of ``run()`` keeps: what autograd saves, and tensors that a Function put aside by itself."""
    names = {t.untyped_storage().data_ptr(): name for name, t in given.items() if t is not None}
    found, seen = Kept(), {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() == 0 or storage.data_ptr() in seen:
            return t
        seen[storage.data_ptr()] = t.detach()  # held, so that its address is not used again
        if storage.data_ptr() in names:
            found.given.add(names[storage.data_ptr()])
        else:
            found.own.append(storage.nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        results = run()
    for t in results if isinstance(results, tuple) else (results,):
        for node in _nodes(t):
            for value in getattr(node, "__dict__", {}).values():
                for held in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(held, Tensor):
                        note(held)
    return found


def _every(op: str) -> pytest.MarkDecorator:
    """``way``: what there is here, and without a GPU also Triton, its kernels not run: host code decides what is kept."""
    found = implementations(op)
    if DEVICE == "cpu" and "triton" not in found and importlib.util.find_spec("triton"):
        found.append("triton")
    return pytest.mark.parametrize("by", found)


@pytest.fixture
def way(by: str) -> Iterator[str]:
    card: contextlib.AbstractContextManager = contextlib.nullcontext()
    if by == "triton" and DEVICE == "cpu":
        pytest.importorskip("timm")  # a card's blocks are timm's too
        from benchmarks.launches import on_a_card

        card = on_a_card()
    with card:
        yield by


def _nodes(t: Tensor) -> Iterator[object]:
    todo, done = [t.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in done:
            done.add(node)
            yield node
            todo += [following for following, _ in node.next_functions]


def test_the_count_sees_what_is_saved_and_what_is_put_aside():
    class Hoarder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x[:2], x.new_ones(5))
            ctx.aside = x.new_ones(7)
            ctx.others = [x.new_ones(3)]
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    x, w = torch.randn(4, requires_grad=True), torch.randn(4)
    found = kept({"x": x, "w": w}, lambda: Hoarder.apply(x * w))
    assert found.given == {"w"}
    assert sorted(found.own) == [12, 16, 20, 28], "x * w is the Function's own input, kept by it alone"


# -- cp_linear ---------------------------------------------------------------------------------------------------------
#
# dL/dh = drop(s sum_g (dy_g V) * gain_g), dx = dy W + dL/dh U^T, dU = x^T dL/dh, P_g = s dy_g^T h, dV = sum_g P_g * gain_g,
# dgain_g = colsum(P_g * V), dW = dy^T x. So:
#   x           where U or W is trained: the least, for dU and dW are products with it.
#   h (M, R)    where V or the gain is. The least is nothing where x is kept as well: h = drop(x U) could be formed again for
#               2 M K R FLOPs and one more read of x. We keep it: R / K of x, 1 to 8 %, for a pass over x.
#   the seed    8 bytes for the whole mask, where dL/dh is needed and nobody gave one. No mask is kept.
#   y           never, nor dL/dh, nor a merged weight, and for a frozen W nothing at all.


@dataclass(frozen=True)
class Form:
    """folds: of the output. weights: rows of each; of several, together N."""

    folds: int = 1
    weights: tuple[int, ...] = (N,)
    gain: str = "row"  # "row": one for all folds, "fold": one each, "none"
    dropout: float = 0.0
    seed_given: bool = False


FORMS = {
    "plain": Form(),
    "lora": Form(gain="none"),
    "folds": Form(folds=4, gain="fold"),
    "folds, one gain": Form(folds=4),
    "several weights": Form(weights=(32, 48, 16), gain="row"),
    "several weights, folds": Form(folds=3, weights=(32, 64), gain="fold"),
    "dropout": Form(dropout=0.25),
    "dropout, seed given": Form(dropout=0.25, seed_given=True),
}


def _cp(form: Form, dtype: torch.dtype, trained: set[str]) -> tuple[dict[str, Tensor | None], Callable]:
    gain = {"row": (R,), "fold": (form.folds, R), "none": None}[form.gain]
    shapes = {"x": (M, K), "u": (K, R), "v": (N // form.folds, R), "gain": gain}
    shapes |= {f"weight{i}": (rows, K) for i, rows in enumerate(form.weights)}
    shapes |= {f"bias{i}": (rows,) for i, rows in enumerate(form.weights)}
    given = {n: None if s is None else torch.randn(s).to(dtype) for n, s in shapes.items()}
    given["seed"] = torch.tensor([3]) if form.seed_given else None
    for name, t in given.items():
        if t is not None and name.rstrip("0123456789") in trained:
            t.requires_grad_()
    several = len(form.weights) > 1
    weights, biases = ([given[f"{n}{i}"] for i in range(len(form.weights))] for n in ("weight", "bias"))

    def run(impl: str):
        base = (weights, biases) if several else (weights[0], biases[0])
        options = {"dropout_p": form.dropout, "training": True, "seed": given["seed"], "impl": impl}
        return F.cp_linear(given["x"], *base, given["u"], given["v"], given["gain"], **options)

    return given, run


def _subsets(names: tuple[str, ...]) -> Iterator[set[str]]:
    for count in range(1, len(names) + 1):
        yield from map(set, itertools.combinations(names, count))


@_every("cp_linear")
@pytest.mark.parametrize("form", FORMS)
def test_cp_linear_keeps_x_h_and_a_seed(form, way):
    form = FORMS[form]
    names = ("x", "u", "v", "weight", "bias") if form.gain == "none" else ("x", "u", "v", "gain", "weight", "bias")
    for trained in _subsets(names):
        given, run = _cp(form, torch.float32, trained)
        found = kept(given, lambda run=run: run(way))
        needs_h, needs_grad_h = trained & {"v", "gain"}, trained & {"x", "u"}
        own = [M * R * 4] if needs_h else []
        own += [8] if form.dropout and needs_grad_h and not form.seed_given else []
        assert sorted(found.own) == sorted(own), trained
        assert ("x" in found.given) == bool(trained & {"u", "weight"}), trained
        weights = {n for n in found.given if n.startswith("weight")}
        assert weights == ({n for n in given if n.startswith("weight")} if "x" in trained else set()), trained
        least = 0 if "x" in found.given or not needs_h else M * R * 4
        assert sum(own) - 8 * (8 in own) - least == (M * R * 4 if needs_h and "x" in found.given else 0)


@_every("cp_linear")
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_cp_linear_keeps_h_as_wide_as_its_range_asks(dtype, way):
    """x's dtype, but float32 for float16: 2 M R bytes more than the least, because h may pass 65504 where y does not."""
    for name in ("plain", "lora", "folds"):
        trained = {"x", "u", "v"} if name == "lora" else {"x", "u", "v", "gain"}
        given, run = _cp(FORMS[name], dtype, trained)
        found = kept(given, lambda run=run: run(way))
        assert found.own == [M * R * (4 if dtype == torch.float16 else dtype.itemsize)]
        assert "x" in found.given


@_every("cp_linear")
def test_nothing_is_kept_without_gradients(way):
    given, run = _cp(FORMS["dropout"], torch.float32, {"x", "u", "v", "gain"})
    with torch.no_grad():
        assert kept(given, lambda: run(way)) == Kept()
    given, run = _cp(FORMS["dropout"], torch.float32, set())
    assert kept(given, lambda: run(way)) == Kept()


@_every("cp_update")
@pytest.mark.parametrize("inplace", [False, True])
def test_cp_update_keeps_x_and_h_and_nothing_of_y(inplace, way):
    """The same around a layer that can only be called: its result is not kept, so the update may be written over it."""
    for trained in _subsets(("y", "x", "u", "v", "gain")):
        shapes = {"y": (M, N), "x": (M, K), "u": (K, R), "v": (N, R), "gain": (R,)}
        given: dict[str, Tensor | None] = {n: torch.randn(s).requires_grad_(n in trained) for n, s in shapes.items()}

        def run(given=given):
            y = given["y"] * 1.0 if inplace else given["y"]  # a leaf cannot be changed in place
            return F.cp_update(y, *list(given.values())[1:], dropout_p=0.25, training=True, inplace=inplace, impl=way)

        found = kept(given, run)
        own = [M * R * 4] if trained & {"v", "gain"} else []
        assert sorted(found.own) == sorted(own + ([8] if trained & {"x", "u"} else [])), trained
        assert ("x" in found.given) == ("u" in trained), trained
        assert "y" not in found.given, trained


# -- adapter -----------------------------------------------------------------------------------------------------------
#
# dh = s dy U, dz = dh * gate * act'(z), dx = dz D (+ dy), dD = dz^T x, dU = s dy^T (act(z) * gate), dgate from dh * act(z).
#   x           where D is trained: the least, dD is a product with it.
#   z (M, H)    where anything but an output bias is wanted. The least is nothing where x is kept: z = D x + b_d again costs
#               2 M D H FLOPs. Where x is not, z itself is the least, since it is narrower than x.
#   y, residual and branch never, nor act(z). (x again where a norm in front, or dropout, stands in the way: below.)
# Where x is kept the kernels form z again for H <= 64; others keep z.


def _adapter(dtype: torch.dtype, trained: set[str], hidden: int, gate: str, residual: str):
    experts = {"none": None, "gate": 3, "gated bias": 3}[gate]
    shapes = {"x": (M, D), "down": (hidden, D), "down_bias": (hidden,), "up": (D, hidden)}
    shapes |= {"up_bias": (experts, D) if gate == "gated bias" else (D,), "gate": experts and (M, experts)}
    shapes |= {"residual": (M, D) if residual in ("one", "two") else None}
    shapes |= {"branch": (M, D) if residual == "two" else None}
    given = {n: None if s is None else torch.randn(s).to(dtype) for n, s in shapes.items()}
    for name, t in given.items():
        if t is not None and name in trained:
            t.requires_grad_()
    added = {"own": None, "none": False, "one": given["residual"], "two": (given["residual"], given["branch"])}[
        residual
    ]

    def run(impl: str):
        weights = (given[n] for n in ("x", "down", "down_bias", "up", "up_bias"))
        return F.adapter(*weights, gate=given["gate"], residual=added, scale=0.5, impl=impl)

    return given, run


def _keeps_z(impl: str, hidden: int, x_needed: bool) -> bool:
    return impl != "triton" or hidden > 64 or (not x_needed and hidden < D)


@_every("adapter")
@pytest.mark.parametrize("residual", ["own", "none", "one", "two"])
@pytest.mark.parametrize("gate", ["none", "gate", "gated bias"])
@pytest.mark.parametrize("hidden", [H, 72])
def test_adapter_keeps_x_or_z(hidden, gate, residual, way):
    names = ("x", "down", "down_bias", "up", "up_bias") + (("gate",) if gate != "none" else ())
    if hidden == H and residual != "own":  # what is added changes nothing of what is kept: a few subsets show it
        subsets = [set(names), {"x"}, {"up_bias"}, {"residual"}, {"residual", "branch"}]
    else:
        subsets = _subsets(names)
    for trained in subsets:
        given, run = _adapter(torch.float32, trained, hidden, gate, residual)
        if not any(t is not None and t.requires_grad for t in given.values()):
            continue
        found = kept(given, lambda run=run: run(way))
        through_z = trained & {"x", "down", "down_bias", "up", "gate"}
        z = [M * hidden * 4] if through_z and _keeps_z(way, hidden, "down" in trained) else []
        assert found.own == z, trained
        again = through_z and not z
        assert ("x" in found.given) == bool(again or "down" in trained), trained
        assert not found.given & {"residual", "branch"}, trained
        needs_gate = through_z or (gate == "gated bias" and "up_bias" in trained)
        assert ("gate" in found.given) == bool(gate != "none" and needs_gate), trained


@_every("adapter")
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("hidden", [24, 40, 64])
def test_adapter_of_a_frozen_down_weight_keeps_the_narrower_of_x_and_z(hidden, dtype, way):
    given, run = _adapter(dtype, {"x", "up"}, hidden, "none", "own")
    found, width = kept(given, lambda: run(way)), 4 if dtype == torch.float16 else dtype.itemsize
    keeps_z = way != "triton" or hidden * width < D * dtype.itemsize
    assert found.own == ([M * hidden * width] if keeps_z else [])
    assert ("x" in found.given) != keeps_z


@_every("adapter")
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_adapter_keeps_z_as_wide_as_its_range_asks(dtype, way):
    given, run = _adapter(dtype, {"x", "down", "up"}, 72, "none", "own")
    width = 4 if dtype == torch.float16 else dtype.itemsize
    assert kept(given, lambda: run(way)).own == [M * 72 * width]


@_every("adapter")
@pytest.mark.parametrize("seed_given", [False, True])
@pytest.mark.parametrize("hidden", [H, 72])
def test_adapter_with_norm_and_dropout_keeps_statistics_and_a_seed(hidden, seed_given, way):
    """Of a norm two numbers a row, not the M D that came out of it: a = x^ w + b is formed again from x, which the norm's own
    gradient and dx need as well (the least; the statistics could be formed again too, in one more pass over x). Of dropout a
    seed, no mask."""
    names = ("x", "down", "down_bias", "up", "up_bias", "norm_weight", "norm_bias")
    for trained in _subsets(names):
        given, _ = _adapter(torch.float32, trained, hidden, "none", "own")
        given |= {n: torch.randn(D).requires_grad_(n in trained) for n in ("norm_weight", "norm_bias")}
        given["seed"] = torch.tensor([5]) if seed_given else None
        weights = (given[n] for n in ("x", "down", "down_bias", "up", "up_bias"))
        norm = given["norm_weight"], given["norm_bias"], 1e-5

        def run(weights=weights, norm=norm, seed=given["seed"]):
            return F.adapter(*weights, norm=norm, dropout_p=0.3, training=True, seed=seed, impl=way)

        found = kept(given, run)
        through_z = trained - {"up_bias"}
        again = bool(through_z) and not _keeps_z(way, hidden, bool(trained & {"x", "down", "norm_weight"}))
        z = [M * hidden * 4] if through_z and not again else []
        through_norm = again or trained & {"x", "down", "norm_weight", "norm_bias"}
        own = z + ([2 * M * 4] if through_norm else []) + ([8] if through_z and not seed_given else [])
        assert sorted(found.own) == sorted(own), trained
        assert ("x" in found.given) == bool(again or trained & {"x", "down", "norm_weight"}), trained


# -- the losses --------------------------------------------------------------------------------------------------------
#
# A scalar loss hands out gradients that its forward finished: what is kept is what the backward returns, M V of each side
# that is trained, and neither logits nor statistics: the least, 0, beside results. Row losses, whose incoming gradient nobody
# knows yet, and float16 kernels keep both logits and a few numbers a row (the least: none, for a third pass over the
# logits; each costs 1 / V of a side).

V, TOP = 131, 7
ROW_NUMBERS = {"bidirectional_kl": 6, "gist_loss": 9}


def _logits(dtype: torch.dtype, trained: set[str]) -> dict[str, Tensor | None]:
    given: dict[str, Tensor | None] = {n: torch.randn(M, V).to(dtype).requires_grad_(n in trained) for n in ("z", "g")}
    return given | {"target": torch.randint(0, V, (M,))}


def _loss(op: str, given: dict, **options):
    more = (given["target"],) if op == "gist_loss" else ()
    return getattr(F, op)(given["z"], given["g"], *more, temperature=2.0, **options)


def _finishes(impl: str, dtype: torch.dtype, reduction: str) -> bool:
    return impl == "reference" or (reduction == "mean" and dtype != torch.float16)


def _check_loss(op: str, impl: str, reduction: str, dtype: torch.dtype) -> None:
    for trained in ({"z", "g"}, {"z"}, {"g"}):
        given = _logits(dtype, trained)
        found = kept(given, lambda given=given: _loss(op, given, reduction=reduction, impl=impl))
        if _finishes(impl, dtype, reduction):
            width = 4 if dtype == torch.float16 else dtype.itemsize
            assert found.own == [M * V * width] * len(trained)
            assert not found.given & {"z", "g"}
        else:
            assert found.own == [ROW_NUMBERS[op] * M * 4]
            assert {"z", "g"} <= found.given


@_every("bidirectional_kl")
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bidirectional_kl_keeps_gradients_or_six_numbers_a_row(reduction, dtype, way):
    _check_loss("bidirectional_kl", way, reduction, dtype)


@_every("gist_loss")
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gist_loss_keeps_gradients_or_nine_numbers_a_row(reduction, dtype, way):
    _check_loss("gist_loss", way, reduction, dtype)


@pytest.mark.parametrize("op", ["bidirectional_kl", "gist_loss"])
def test_gradients_that_were_kept_are_those_handed_out(op):
    """No copy of them is made where the loss's own gradient is 1."""
    given = _logits(torch.float32, {"z", "g"})
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        loss = _loss(op, given)
    grads = torch.autograd.grad(loss, [given["z"], given["g"]])
    assert [g.data_ptr() for g in grads] == [t.data_ptr() for t in held if t.dim() == 2]


@_every("gist_linear_loss")
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_gist_linear_loss_keeps_gradients_of_hidden_states_and_head(dtype, way):
    """M H of each side, and V H + V of a head that is trained, in its dtype (float32 for float16, whose gradients wait for
    the loss scale); no logits. Row losses keep what they were given alone, and form the logits again."""
    width = 24
    for trained in ({"hidden", "gist", "weight", "bias"}, {"hidden", "gist"}, {"hidden"}, {"weight"}):
        shapes = {"hidden": (M, width), "gist": (M, width), "weight": (V, width), "bias": (V,)}
        given: dict[str, Tensor | None] = {
            n: torch.randn(s).to(dtype).requires_grad_(n in trained) for n, s in shapes.items()
        }
        given["target"] = torch.randint(0, V, (M,))
        found = kept(given, lambda given=given: F.gist_linear_loss(*given.values(), impl=way))
        of_head = 4 if dtype == torch.float16 else dtype.itemsize
        sizes = {"hidden": M * width * dtype.itemsize, "gist": M * width * dtype.itemsize}
        sizes |= {"weight": V * width * of_head, "bias": V * of_head}
        own = [sizes[n] for n in trained]
        scalars = [size for size in found.own if size <= 8]
        assert sorted(size for size in found.own if size > 8) == sorted(own), trained
        assert len(scalars) <= 2, "the scale of the loss"
        assert not found.given
        found = kept(given, lambda given=given: F.gist_linear_loss(*given.values(), reduction="none", impl=way))
        assert found.own == []


@_every("topk_kl")
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_topk_kl_keeps_the_gradient_or_a_few_numbers_a_row(dtype, way):
    """Plain PyTorch: the gradient. A kernel: the logits, and 2 + k numbers and k sorted classes a row; of those the least
    would be the classes alone, which the caller has unsorted."""
    log_probs, indices = torch.randn(M, V).log_softmax(-1).topk(TOP)
    given = {"z": torch.randn(M, V).to(dtype).requires_grad_(), "log_probs": log_probs, "indices": indices}
    found = kept(given, lambda: F.topk_kl(*given.values(), impl=way))
    if way == "reference":
        assert found.own == [M * V * (4 if dtype == torch.float16 else dtype.itemsize)]
        assert "z" not in found.given
    else:
        assert sorted(found.own) == sorted([2 * M * 4, TOP * M * 4, TOP * M * 8])
        assert "z" in found.given


@_every("gelu")
@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_gelu_keeps_x_alone(dtype, way):
    """The least: GELU has no inverse, so y would not do."""
    x = torch.randn(M, D).to(dtype).requires_grad_()
    assert kept({"x": x}, lambda: F.gelu(x, impl=way)) == Kept([], {"x"})
