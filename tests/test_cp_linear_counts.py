"""What the model of cp_linear's forms counts, counted again: the host code's launches at the benchmark's shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import CASES, Case
from benchmarks.launches import HOPPER, Ledger, on_a_card
from benchmarks.peers import PEERS
from fastgist_kernels import cp_linear_bwd, cp_linear_forms
from fastgist_kernels import cp_linear_cost as model
from fastgist_kernels import cp_linear_plan as plan
from fastgist_kernels.cp_linear import cp_linear_fwd

CARD = model.card_of(HOPPER.arch)
SHAPES = CASES["cp_linear", "cuda"]
PROVIDERS = {"factored": "factored", "dense": "dense delta", "chain": "autograd.Function"}


def _sizes(case: Case) -> model.Sizes:
    weights = case.get("W", 1)
    outputs = weights * case.get("G", 1)
    return model.Sizes(case["M"], outputs * case["d"], case["d"], case["R"], outputs, "bfloat16", weights)


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def _tensors(case: Case) -> dict:
    """The benchmark's operands, their numbers being nobody's concern."""
    s, d = _sizes(case), case["d"]
    weights = [_empty(s.out // s.weights, d) for _ in range(s.weights)]
    biases = [_empty(w.shape[0]) for w in weights]
    return {"x": _empty(s.rows, d), "weights": weights, "biases": biases, "u": _empty(d, s.rank)} | {
        "v": _empty(d, s.rank),
        "gain": _empty(s.folds, s.rank),
    }


def _run(form: str, case: Case, forward: bool) -> Ledger:
    """One call in ``form``, all gradients wanted."""
    s, t = _sizes(case), _tensors(case)
    h = _empty(s.rows, s.rank)
    with torch.no_grad(), Ledger(forms_only=True) as ledger:
        if forward:
            y = _empty(s.rows, s.out)
            factors = t["u"], t["v"], t["gain"]
            cp_linear_fwd(t["x"], t["weights"], t["biases"], *factors, None, 1.0, 0.0, False, y, h, form)
        else:
            grads = [_empty(s.rows, w.shape[0]) for w in t["weights"]]
            results = [torch.empty_like(t[name]) for name in ("x", "u", "v", "gain")]
            given = t["x"], t["weights"], t["u"], t["v"], t["gain"], None, h
            cp_linear_bwd.cp_linear_bwd(grads, *given, s.folds, 1.0, 0.0, False, *results, form)
    return ledger


def _forms(case: Case, forward: bool) -> list[str]:
    s, t = _sizes(case), _tensors(case)
    given = t["x"] if forward else _empty(s.rows, s.out)
    able = [f for f in plan.FORMS if cp_linear_forms.can(f, given, t["weights"], s.rank, False, forward=forward)]
    return able if forward else [f for f in able if f in ("fused", "started", "blas")]


@pytest.mark.parametrize("forward", [True, False], ids=["fwd", "bwd"])
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_the_model_counts_the_launches_that_the_host_code_makes(case, forward):
    s = _sizes(case)
    with on_a_card(HOPPER):
        priced = dict(plan.predicted(HOPPER.arch, "H200", HOPPER.processors, s, forward))
        able = _forms(case, forward)
        assert set(priced) == set(able), "what has a price and what can run"
        found = {form: _run(form, case, forward) for form in able}
    for form, ledger in found.items():
        assert priced[form].launches == ledger.total.launches, (form, ledger.found)


@pytest.mark.parametrize("name", model.EAGER)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_no_eager_form_is_charged_for_more_launches_than_it_makes(case, name):
    """Fewer may be: sums that autograd makes of a few numbers are left out, in the eager forms' favour."""
    s, t = _sizes(case), _tensors(case)
    several = s.weights > 1
    gains = t["gain"] if s.folds > 1 else t["gain"][0]
    x, u, v, gain = (tensor.requires_grad_() for tensor in (t["x"], t["u"], t["v"], gains))
    weight, bias = (tuple(t["weights"]), tuple(t["biases"])) if several else (t["weights"][0], t["biases"][0])
    with Ledger(forms_only=True) as forward:
        out = PEERS["cp_linear"][PROVIDERS[name]]({})(x, weight, bias, u, v, gain)
    outs = out if several else (out,)
    with Ledger(forms_only=True) as backward:
        torch.autograd.grad(outs, (x, u, v, gain), [torch.empty_like(y) for y in outs])
    for ledger, direction in ((forward, True), (backward, False)):
        priced = model.eager_cost(name, s, CARD, forward=direction).launches
        assert 0.6 * ledger.total.launches <= priced <= ledger.total.launches, (direction, ledger.found)


# -- reads of dy and of anything as long as M --------------------------------------------------------------------------


class _Readers(Ledger):
    """Notes which launches take one of ``watched``, or (none given) anything with ``rows`` rows."""

    def __init__(self, rows: int, watched: list[Tensor] = ()) -> None:
        super().__init__(forms_only=True)
        self.rows, self.places = rows, {t.untyped_storage().data_ptr() for t in watched}
        self.readers: list[str] = []

    def _add(self, name: str, tensors: list[Tensor], again: int = 0) -> None:
        super()._add(name, tensors, again)
        long = [t for t in tensors if t.dim() == 2 and self.rows in t.shape]
        if any(t.untyped_storage().data_ptr() in self.places for t in tensors) if self.places else long:
            self.readers.append(name)


def _backward(case: Case, form: str | None, *, watch_dy: bool, gain: bool = True) -> _Readers:
    s, t = _sizes(case), _tensors(case)
    h = _empty(s.rows, s.rank)
    grads = [_empty(s.rows, w.shape[0]) for w in t["weights"]]
    results = [torch.empty_like(t[name]) for name in ("x", "u", "v")] + [torch.empty_like(t["gain"]) if gain else None]
    given = t["x"], t["weights"], t["u"], t["v"], t["gain"], None, h
    with on_a_card(HOPPER), torch.no_grad(), _Readers(s.rows, grads if watch_dy else []) as ledger:
        cp_linear_bwd.cp_linear_bwd(grads, *given, s.folds, 1.0, 0.0, False, *results, form)
    return ledger


#: Launches that read dy: dx's product, and beside it those of dy V' and dV'.
TOGETHER = ["_cp_linear_bwd_dy_kernel"]
TWICE = (64, 512, 4096)
APART = ["_cp_linear_project_kernel", "_outer_partial_kernel"]


@pytest.mark.parametrize("form", ["fused", "started", "blas"])
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_dy_is_read_once_beside_dx_s_product_but_where_it_is_documented(case, form):
    """Fused, dy V' comes out of dx's product and dV' reads dy once more; else one kernel takes both from one read, but at a
    rank of 64 and where a few hundred or thousand rows are too few programs for a card (DESIGN.md)."""
    s = _sizes(case)
    of_product = {"fused": ["_cp_linear_dx_kernel"], "started": ["_cp_linear_dx_kernel"], "blas": ["mm", "addmm_"]}[
        form
    ]
    readers = _backward(case, form, watch_dy=True).readers
    for name in of_product[:1] + of_product[1:] * (s.weights - 1):
        readers.remove(name)
    if form == "fused":
        assert readers == APART[1:]
        return
    with on_a_card(HOPPER):
        one = plan.one_pass(_empty(s.rows, s.out // s.weights), s.out, s.rank)
    assert one == (s.rank == 16 and s.rows not in TWICE)
    if not one and "mm" in readers:  # dy V' by the library
        assert sorted(readers) == sorted(["mm", *APART[1:]])
    else:
        assert readers == (TOGETHER if one else APART)


@pytest.mark.parametrize("form", ["fused", "started", "blas"])
@pytest.mark.parametrize("case", [c for c in SHAPES if c["M"] >= 512], ids=lambda case: case.name)
def test_training_the_gain_reads_nothing_as_long_as_m(case, form):
    """dgain_g = colsum(P_g * V): it comes out of the partial sums that dV is made of."""
    with_gain, without = (_backward(case, form, watch_dy=False, gain=gain) for gain in (True, False))
    assert with_gain.readers == without.readers and with_gain.readers
    more = with_gain.found - without.found
    assert more == {"_outer_reduce_kernel": 1}
    assert not without.found - with_gain.found
