"""Which form cp_linear takes, held against recorded times and never against a clock: on a GPU against
benchmarks/predicted/ and, where scripts/tune.py has run on a card, what it measured; on a CPU against
benchmarks/results/<cpu>/cp_linear_forms.json."""

from __future__ import annotations

import functools
import importlib.util
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastgist.reference import cp_linear as reference
from fastgist_kernels import cp_linear_bwd, cp_linear_forms, cp_linear_project
from fastgist_kernels import cp_linear_cost as model
from fastgist_kernels import cp_linear_plan as plan
from fastgist_kernels.cp_linear_cost import Sizes, card_of

ROOT = Path(__file__).parents[1]
H200 = ("sm_90", "H200", 132)
#: Forms that exist but are not taken before a card has shown them right.
RESERVED = set(plan.MEASURED_ONLY)
#: Nearer than this two times are the same: of q, k, v at d = 4096 the library's form and the chain are predicted 0.5 us of
#: 2,420 apart, both being the library's products and one more pass.
LEVEL = 1e-3


@functools.cache
def _script(name: str):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _as_h200(patch: pytest.MonkeyPatch) -> None:
    """The plan as on an H200, for tensors without memory."""
    patch.setattr(plan, "device_arch", lambda device: "sm_90")
    patch.setattr(plan, "processors", lambda device: 132)
    patch.setattr(plan, "_card_name", lambda device: "NVIDIA H200")
    patch.setattr(cp_linear_forms, "device_arch", lambda device: "sm_90", raising=False)


@pytest.fixture
def h200(monkeypatch):
    _as_h200(monkeypatch)


def _operands(m: int, n: int, k: int, *, forward: bool = True, dtype=torch.bfloat16, pieces: int = 1):
    x = torch.empty(m, k if forward else n, dtype=dtype, device="meta")
    return x, [torch.empty(n // pieces, k, dtype=dtype, device="meta") for _ in range(pieces)]


def _chosen(
    m: int, n: int, k: int, r: int, *, forward: bool = True, dtype=torch.bfloat16, folds: int = 1, pieces: int = 1
) -> str:
    x, weights = _operands(m, n, k, forward=forward, dtype=dtype, pieces=pieces)
    return plan.cp_linear_form(x, weights, n // folds if forward else k, r, False, forward=forward)


# -- the choice on a GPU against the record ----------------------------------------------------------------------------


def _recorded() -> list[dict]:
    """Rows of the benchmark's shapes, each measured if any card has measured it, else predicted."""
    rows = {}
    paths = (
        ROOT / "benchmarks" / "predicted" / "sm_90",
        *sorted((ROOT / "benchmarks" / "results").glob("nvidia-h200")),
    )
    for path in paths:
        if (path / "cp_linear_forms.json").exists():
            for row in json.loads((path / "cp_linear_forms.json").read_text())["rows"]:
                rows[row["case"], row["direction"]] = row
    return list(rows.values())


def _wrong(row: dict, chosen: str) -> str | None:
    """What is wrong with a choice by the recorded times: not the best that may be taken, by more than the record's spread, or
    slower than an eager form."""
    allowed = (
        row["forms"] if row["source"] == "measured" else {f: t for f, t in row["forms"].items() if f not in RESERVED}
    )
    if chosen not in allowed:
        return f"{chosen} is not among the recorded {sorted(allowed)}"
    best = min(allowed.values())
    if allowed[chosen] > best * (1 + row["spread"]):
        return f"{chosen} takes {allowed[chosen]:.3g} s, the best form {best:.3g}"
    eager = min(row["eager"].values())
    if allowed[chosen] > eager * (1 + LEVEL):
        return f"{chosen} takes {allowed[chosen]:.3g} s, an eager form {eager:.3g}"
    return None


def _chosen_for(row: dict) -> str:
    """In a record's row: of W weights or G folds with d rows each."""
    d, weights, folds = row["d"], row.get("W", 1), row.get("G", 1)
    forward, dtype = row["direction"] == "fwd", getattr(torch, row["dtype"])
    sizes = row["M"], weights * folds * d, d, row["R"]
    return _chosen(*sizes, forward=forward, dtype=dtype, folds=weights * folds, pieces=weights)


def test_every_shape_of_the_benchmark_is_recorded():
    from benchmarks.cases import CASES

    recorded = {(row["case"], row["direction"]) for row in _recorded()}
    assert recorded >= {(case.name, d) for case in CASES["cp_linear", "cuda"] for d in ("fwd", "bwd")}
    assert {3, 4} <= {row.get(name) for row in _recorded() for name in ("W", "G")}
    assert all({"factored", "dense", "chain"} <= set(row["eager"]) for row in _predicted_rows())
    assert {row["source"] for row in _recorded()} <= {"predicted", "measured"}
    assert all(row["source"] == "predicted" for row in _predicted_rows()), "no clock has made that file"


def _predicted_rows() -> list[dict]:
    return json.loads((ROOT / "benchmarks" / "predicted" / "sm_90" / "cp_linear_forms.json").read_text())["rows"]


@pytest.mark.parametrize("row", _recorded(), ids=lambda row: f"{row['case']}-{row['direction']}")
def test_the_choice_is_the_best_recorded_and_never_slower_than_eager(h200, row):
    assert _wrong(row, _chosen_for(row)) is None


def test_a_wrong_choice_is_noticed(h200, monkeypatch):
    monkeypatch.setattr(plan, "by_model", lambda *key: ("started",))
    noticed = [row["case"] for row in _recorded() if _wrong(row, _chosen_for(row))]
    assert {"M16384_d768_R16", "M16384_d5120_R16", "M1_d4096_R16"} <= set(noticed)
    row = next(row for row in _recorded() if row["case"] == "M16384_d768_R16" and row["direction"] == "fwd")
    slow = row | {"eager": {"factored": min(row["forms"].values()) / 2}}
    assert "eager" in _wrong(slow, min((f for f in row["forms"] if f not in RESERVED), key=row["forms"].__getitem__))


def test_record_and_page_are_what_the_script_makes():
    script = _script("crossovers")
    assert json.loads(script.RECORD.read_text()) == script.record(), "run scripts/crossovers.py"
    page = (ROOT / "docs" / "crossovers.md").read_text()
    assert script.gpu_page() in page and script.cpu_page() in page, "run scripts/crossovers.py"
    assert "predicted, not yet measured" in page and (ROOT / "docs" / "crossovers.svg").exists()


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_library_s_products_come_out_as_they_were_measured():
    card = card_of(*H200)
    for m, n, k, us in model.READINGS:
        found = model.library_product(card, Sizes(m, n, k, 0)).seconds * 1e6
        assert abs(found / us - 1) <= model.SPREAD, f"{m} {n} {k}: {found:.1f} us for {us}"


_sizes = st.builds(
    Sizes,
    rows=st.one_of(st.integers(1, 128), st.integers(129, 40_000)),
    out=st.integers(1, 256).map(lambda i: 48 * i),
    inner=st.integers(1, 768).map(lambda i: 16 * i),
    rank=st.integers(1, 300),
    folds=st.sampled_from([1, 3]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32", "tf32"]),
    weights=st.sampled_from([1, 3]),
)
_cards = st.sampled_from([card for cards in model.CARDS.values() for card in cards])
_common = settings(max_examples=60, deadline=None)


@_common
@given(_sizes, _cards, st.booleans())
def test_no_form_beats_the_floor(s, card, forward):
    floor = model.roofline(s, card, forward=forward)
    for form in plan.FORMS:
        found = model.cost(form, s, card, (128, 128), forward=forward)
        assert found.seconds >= floor.seconds, form
        assert not found.launches or found.launches >= floor.launches
    for name in model.EAGER if 4 * s.rank <= min(s.out, s.inner) else ():  # beyond, a dense update is less work
        assert model.eager_cost(name, s, card, forward=forward).seconds >= floor.seconds, name


@_common
@given(_sizes, _cards, st.sampled_from(["rows", "out", "inner", "rank"]), st.integers(1, 2000))
def test_more_work_is_never_cheaper(s, card, which, more):
    larger = s._replace(
        **{which: getattr(s, which) + 48 * more if which in ("out", "inner") else getattr(s, which) + more}
    )
    if (s.rows <= cp_linear_forms.FEW_ROWS) != (larger.rows <= cp_linear_forms.FEW_ROWS):
        return  # few rows wait for W from memory, which the others find in L2: two regimes, and a step between them
    for form in ("fused", "started", "blas"):
        small, large = (model.cost(form, sizes, card, (128, 256)) for sizes in (s, larger))
        assert large.seconds >= small.seconds * (1 - 1e-12), form
    assert model.roofline(larger, card).seconds >= model.roofline(s, card).seconds


@_common
@given(_sizes, _cards, st.sampled_from(["copy", "program", "streams", "pointers", "descriptors"]), st.booleans())
def test_a_faster_card_is_never_slower(s, card, which, forward):
    faster = replace(card, **{which: 1.5 * getattr(card, which)})
    for form in plan.FORMS:
        slow, fast = (model.cost(form, s, c, (128, 128), forward=forward).seconds for c in (card, faster))
        assert fast <= slow, form


@_common
@given(_sizes, st.sampled_from(sorted(model.CARDS)), st.booleans())
def test_the_order_is_by_cost_and_holds_no_form_that_does_not_exist(s, arch, forward):
    card = card_of(arch)
    found = plan.predicted(arch, "", card.processors, s, forward)
    seconds = [cost.seconds for _, cost in found]
    assert seconds == sorted(seconds) and seconds[-1] < float("inf")
    forms = [form for form, _ in found]
    assert "started" in forms and ("fused" in forms) == (s.rank <= s.fused_rank)
    assert ("few" in forms) == (forward and s.rows <= cp_linear_forms.FEW_ROWS)
    taken = plan.by_model(arch, "", card.processors, s, forward)
    assert list(taken) == [form for form in forms if form not in RESERVED]


def test_what_is_known_of_the_crossovers():
    """The update inside the loop while R d is small, then its own kernel or the library; few rows read W once."""
    card = card_of(*H200)

    def order(m: int, d: int, r: int) -> list[str]:
        return list(plan.by_model(*H200, Sizes(m, d, d, r), True))

    assert order(16384, 768, 16)[0] == order(16384, 1024, 16)[0] == "fused"
    assert order(16384, 4096, 64)[0] == "blas", "a Triton loop would need 92 % of the library's rate to win"
    assert order(16384, 4096, 64).index("started") < order(16384, 4096, 64).index("fused")
    assert order(1, 4096, 16)[0] == "few"
    assert order(16384, 768, 128)[0] != "fused"
    assert (
        model.dy_pass(card, Sizes(16384, 768, 1, 16), True).seconds
        < model.dy_pass(card, Sizes(16384, 768, 1, 16), False).seconds
    )


def test_cards_are_found_by_name_and_unknown_ones_take_an_older_generation():
    assert card_of("sm_90").name == card_of("sm_90", "NVIDIA H200").name == "H200"
    assert card_of("sm_90", "NVIDIA H100 80GB HBM3").name == "H100"
    assert card_of("sm_103").name == "B200" and card_of("sm_120").name == "B200" and card_of("sm_75").name == "A100"
    assert card_of("sm_90", "", 114).processors == 114
    assert card_of("sm_90").measured and not any(c.measured for c in model.CARDS["sm_100"] + model.CARDS["sm_80"])


# -- dispatch ----------------------------------------------------------------------------------------------------------


@_common
@given(
    st.integers(1, 5000), st.sampled_from([48, 768, 4096]), st.integers(1, 300), st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.sampled_from([1, 3]),
)  # fmt: skip
def test_what_is_chosen_can_run(m, width, r, forward, dtype, pieces):
    with pytest.MonkeyPatch.context() as patch:
        _as_h200(patch)
        x, weights = _operands(m, pieces * width, width, forward=forward, dtype=dtype, pieces=pieces)
        form = plan.cp_linear_form(x, weights, width, r, False, forward=forward)
        assert cp_linear_forms.can(form, x, weights, r, False, forward=forward)


def test_the_table_goes_before_the_model_where_its_form_can_run(h200, monkeypatch):
    asked = []

    def table(kernel: str, arch: str, shape_class: str) -> dict[str, int]:
        asked.append((kernel, arch, shape_class))
        return {"form": plan.FORMS.index("fused")}

    monkeypatch.setattr(plan, "launch_config", table)
    assert _chosen(16384, 4096, 4096, 64) == "fused"
    assert _chosen(16384, 4096, 4096, 65) == "blas", "no such tile: the model's choice"
    assert _chosen(16000, 3072, 768, 10, folds=4, forward=True) == "fused"
    assert asked[-1] == ("cp_linear_form", "sm_90", "bfloat16_m16384_n3072_k768_r16_g4_w1_fwd")
    _chosen(1, 768, 3072, 10, forward=False)
    assert asked[-1] == ("cp_linear_form", "sm_90", "bfloat16_m1_n768_k3072_r16_g1_w1_bwd")
    three = {"folds": 3, "pieces": 3}
    for forward, key in ((True, "g3_w3_fwd"), (False, "g1_w3_bwd")):
        _chosen(16384, 2304, 768, 16, forward=forward, **three)
        assert asked[-1][2].endswith(key), "one qkv of three folds is not three weights"
        s = Sizes(16384, 2304, 768, 16, 3, "bfloat16", 3)
        assert asked[-1][2] == plan.form_class(s, forward) != plan.form_class(s._replace(weights=1), forward)


def test_entries_of_the_committed_table_name_forms():
    table = json.loads((ROOT / "kernels" / "fastgist_kernels" / "launch_tables.json").read_text())
    for classes in table.get("cp_linear_form", {}).values():
        assert all(entry["form"] in range(len(plan.FORMS)) for entry in classes.values())


def test_a_choice_is_kept_by_its_sizes_and_shared_by_lengths_of_one_tile(h200, monkeypatch):
    plan.predicted.cache_clear()
    for rows in (1000, 1001, 1024):
        for _ in range(3):
            _chosen(rows, 768, 768, 16)
    assert plan.predicted.cache_info().misses <= 1
    plan.predicted.cache_clear()
    plan.by_model.cache_clear()
    _chosen(7, 768, 768, 16), _chosen(8, 768, 768, 16)
    assert plan.predicted.cache_info().misses == 2, "few rows are counted one by one"


def test_float16_stays_in_the_kernels(h200):
    """The library would round x U to float16, whose range it may pass."""
    for m in (1, 512, 16384):
        assert _chosen(m, 4096, 4096, 16, dtype=torch.float16) != "blas"
        assert _chosen(m, 4096, 4096, 16, dtype=torch.float16, forward=False) != "blas"
        assert not plan.narrow_by_library(_operands(m, 4096, 4096, dtype=torch.float16)[0], 4096, 16, False)


def test_a_piece_that_cannot_be_fetched_16_bytes_at_a_time_takes_the_ragged_tile(h200):
    (_, weights), tiles = _operands(16384, 2304, 768, pieces=3), plan.TILES["sm_90"]
    whole = torch.empty(16384, 768, dtype=torch.bfloat16, device="meta")
    one = torch.empty(1, dtype=torch.bfloat16, device="meta").expand(16384, 768)
    apart = torch.empty(16384, 768 * 16, dtype=torch.bfloat16, device="meta")[:, ::16]
    odd = torch.empty(16384, 777, dtype=torch.bfloat16, device="meta")[:, :768]
    for last in (whole, one, apart, odd):
        tile = plan.matmul_config([whole, whole, last], weights, 768, 32, False, forward=False)
        ragged = tuple(tile[name] for name in plan.TILE_NAMES) == tiles["ragged"]
        assert ragged == (last is not whole)


def test_who_reads_dy_and_who_forms_x_u(h200):
    def dy(m: int, d: int, dtype=torch.bfloat16) -> tuple[torch.Tensor, int]:
        return torch.empty(m, d, dtype=dtype, device="meta"), d

    assert plan.one_pass(*dy(16384, 768), 16) and not plan.one_pass(*dy(16384, 768), 64)
    assert not plan.one_pass(*dy(16384, 768, torch.float32), 16), "no such tile"
    assert not plan.one_pass(*dy(16384, 768), 32), (
        "its partial sums would be more than an eighth, or its programs too few"
    )
    assert plan.one_pass(*dy(65536, 768), 32)
    assert plan.narrow_by_library(*dy(512, 5120), 16, False), "eight programs would leave the card idle"
    assert not plan.narrow_by_library(*dy(16384, 768), 16, False)


@pytest.mark.parametrize("rank", [1, 8, 16, 32])
@pytest.mark.parametrize("rows", [1, 127, 129, 4096, 16384, 50688, 1_000_001])
def test_parts_of_one_pass_stay_an_eighth_of_dy_and_cover_its_rows(rows, rank):
    programs, blocks = model.dy_programs(rows, rank, 2)
    assert programs == 1 or programs * rank * 4 <= rows * 2 / 8  # times N columns, both
    assert (programs - 1) * blocks * 128 < rows <= programs * blocks * 128
    row_blocks = -(-rows // 128)
    assert programs == 1 or blocks == 1 or -(-row_blocks // (blocks - 1)) * rank * 4 > rows * 2 / 8, "as many as may be"


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("gain_rows", [None, 1, "folds"])
def test_a_narrow_product_by_the_library(monkeypatch, folds, gain_rows, pieces):
    monkeypatch.setattr(cp_linear_project, "narrow_by_library", lambda *sizes: True)
    a, b = (torch.randint(-4, 5, shape).float() for shape in ((37, folds * 24), (24, 5)))  # exact in any order
    gain = None if gain_rows is None else torch.randint(-4, 5, (folds if gain_rows == "folds" else 1, 5)).float()
    h = torch.full((37, 8), float("nan"))[:, :5]
    cp_linear_project.project(a.chunk(pieces, 1), b, gain, None, 0.5, 0.0, False, h)
    factors = torch.ones(1, 5) if gain is None else gain
    assert torch.equal(h, 0.5 * ((a.view(37, folds, 24) @ b) * factors).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_short_x_s_product_by_the_library(monkeypatch, dtype):
    """dU by one product, but for float16, whose dL/dh is float32."""
    asked = []
    monkeypatch.setattr(cp_linear_bwd, "grad_u_by_library", lambda *sizes: True)
    monkeypatch.setattr(cp_linear_bwd, "outer", lambda *tensors, tf32: asked.append(tensors))
    x, low = torch.randint(-4, 5, (37, 24)).to(dtype), torch.randint(-4, 5, (37, 5)).float()
    found = torch.full((24, 5), float("nan"), dtype=dtype)
    rest = (None, None, None, low, 1, 1.0, 0.0, False, low, found, None, None)
    cp_linear_bwd.low_rank_grads([x], x, *rest, known=True)
    assert asked if dtype == torch.float16 else torch.equal(found, x.t() @ low)


def test_dU_takes_one_launch_where_reading_x_takes_less_than_another(h200):
    def short(m: int, d: int, dtype=torch.bfloat16) -> bool:
        return plan.grad_u_by_library(torch.empty(m, d, dtype=dtype, device="meta"), 16, False)

    assert short(1, 4096) and short(512, 5120)
    assert not short(16384, 768) and not short(4096, 2048) and not short(512, 5120, torch.float16)


# -- scripts/tune.py on a clock that is not one ------------------------------------------------------------------------


def test_tuning_writes_the_fastest_right_form_and_the_plan_takes_it(h200, monkeypatch, tmp_path):
    from benchmarks.cases import CASES

    tune = _script("tune")
    case = next(c for c in CASES["cp_linear", "cuda"] if c.name == "M16384_d768_R16")
    seconds = {("fused", "fwd"): 4e-5, ("tma_started", "fwd"): 3e-5, ("few", "fwd"): None, ("started", "bwd"): 7e-5}
    seconds |= {("blas", "bwd"): 6e-5, ("eager factored", "fwd"): 8e-5}

    def timer(name: str, direction: str) -> tuple[float, float] | None:
        found = seconds.get((name, direction))
        return None if found is None else (found, 0.1 * found)

    forward, backward = tune.measure_forms(case, timer)
    assert forward["forms"] == {"fused": 4e-5, "tma_started": 3e-5} and forward["eager"] == {"factored": 8e-5}
    assert backward["forms"] == {"started": 7e-5, "blas": 6e-5} and backward["source"] == "measured"
    assert forward["spread"] == pytest.approx(0.1)
    table = tmp_path / "table.json"
    tune.write_table(tune.form_entries([forward, backward], "sm_90"), table)
    held = json.loads(table.read_text())
    monkeypatch.setattr(
        plan, "launch_config", lambda kernel, arch, key: held.get(kernel, {}).get(arch, {}).get(key, {})
    )
    monkeypatch.setattr(plan, "can", lambda form, *operands, **options: True)
    assert _chosen(16384, 768, 768, 16) == "tma_started"
    assert _chosen(16384, 768, 768, 16, forward=False) == "blas"
    assert _wrong(forward, "tma_started") is None and "fused takes" in _wrong(forward, "fused")


def test_nothing_that_ran_is_no_row():
    from benchmarks.cases import CASES

    tune = _script("tune")
    assert tune.measure_forms(CASES["cp_linear", "cuda"][0], lambda name, direction: None) == []


# -- the choice on a CPU -----------------------------------------------------------------------------------------------


def _cpu_records() -> list[dict]:
    return [
        json.loads(p.read_text()) for p in sorted((ROOT / "benchmarks" / "results").glob("cpu-*/cp_linear_forms.json"))
    ]


#: What one formula for all sizes may miss of a call's time.
MISSED = 0.03


def _cpu_wrong(row: dict, merged: bool) -> str | None:
    """What is wrong with merging or not by a record's quartiles of factored / merged: they lie on the other side of 1, by more
    than MISSED."""
    low, _, high = row["over_merged"]["factored"]
    if merged and high < 1 - MISSED:
        return f"merging takes 1 / {high:.3f} of the factored form's time or more"
    if not merged and low > 1 + MISSED:
        return f"the factored form takes {low:.3f} of the merged one's time or more"
    return None


def _merges(row: dict) -> bool:
    inner, out = _script("crossovers")._inner_out(row)
    return reference.merge_pays(row["M"], inner, out, row["R"], row["direction"] in ("fwd", "bwd"))


def test_a_cpu_was_measured_with_both_forms_and_the_eager_ones():
    from benchmarks.cases import square

    assert _cpu_records()
    for record in _cpu_records():
        assert [row["case"] for row in record["benchmark"]] == [case.name for case in square("cpu")]
        assert all(
            set(row["seconds"]) == {"merged", "factored", "eager factored", "eager dense"}
            for row in record["benchmark"]
        )
        assert {row["direction"] for row in record["grid"]} == {"fwd", "fwd_alone", "bwd", "dx_alone"}


def test_the_choice_on_a_cpu_agrees_with_what_was_measured():
    wrong = [(row["direction"], row["M"], row["N"], row["K"], row["R"], problem) for record in _cpu_records()
             for row in record["grid"] if (problem := _cpu_wrong(row, _merges(row)))]  # fmt: skip
    assert not wrong
    lost = [ratio - 1 if not _merges(row) else 1 / ratio - 1 for record in _cpu_records() for row in record["grid"]
            if (ratio := row["over_merged"]["factored"][1])]  # fmt: skip
    assert statistics.mean(max(0.0, x) for x in lost) < 0.002, "of all sizes measured"


def test_the_benchmark_s_choice_on_a_cpu_agrees_with_what_was_measured():
    """Of the plain form, on one thread. What users get is held against all eager forms in test_committed_readings.py."""
    for record in _cpu_records():
        for row in record["benchmark"]:
            chosen = "merged" if reference.merge_pays(row["M"], row["d"], row["d"], row["R"], True) else "factored"
            assert _cpu_wrong(row, chosen == "merged") is None, row["case"]
            assert row["seconds"][chosen] <= row["seconds"]["eager dense"]


def test_a_wrong_choice_on_a_cpu_is_noticed(monkeypatch):
    rows = [row for record in _cpu_records() for row in record["grid"]]
    for always in (True, False):
        monkeypatch.setattr(reference, "merge_pays", lambda *sizes, merged=always: merged)
        assert sum(_cpu_wrong(row, _merges(row)) is not None for row in rows) > len(rows) // 8


@_common
@given(st.integers(1, 10**5), st.integers(1, 8192), st.integers(1, 8192), st.integers(1, 256), st.booleans())
def test_merging_pays_from_some_number_of_rows_on(rows, inner, out, rank, needed):
    if reference.merge_pays(rows, inner, out, rank, needed):
        assert reference.merge_pays(rows + 1, inner, out, rank, needed)
        assert reference.merge_pays(rows, inner, out, rank, False), "sparing x U as well can only help"
    assert not reference.merge_pays(inner, inner, out, rank, True)
    assert reference.merge_pays(2 * inner, inner, out, rank, needed)
    assert reference.merge_pays(inner, inner, inner, rank, False)
