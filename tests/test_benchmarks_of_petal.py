"""benchmarks/petal_step.py and decode.py: providers that must agree do, and what is counted is what was derived by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import decode, petal_step
from benchmarks.cases import case
from benchmarks.harness import against_base
from benchmarks.peers import Missing

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = case(torch.float32, B=2, T=5, R=8, D=64, K=48, N=17, L=4)
EXACT = [
    p for p in petal_step.PROVIDERS if p not in petal_step.OTHER_MODEL and "compiled" not in p and "autocast" not in p
]


@pytest.mark.parametrize("provider", EXACT)
@pytest.mark.parametrize("words", [0, 5])
def test_providers_agree_with_every_matrix_by_itself(provider, words):
    sizes = tuple((dict(TINY.sizes) | {"T": words}).items())
    assert petal_step.parity(provider, case(torch.float32, **dict(sizes)), CPU) is None


def test_parity_finds_a_wrong_update_and_a_missing_gradient(monkeypatch):
    right = petal_step.PROVIDERS["fastgist"]

    def scaled(*args, **options):
        step = right(*args, **options)
        next(m for m in step.model.modules() if hasattr(m, "factors")).scale = 1.01
        return step

    def fewer(*args, **options):
        step = right(*args, **options)
        del step.parameters["image.p"]
        return step

    for wrong, what in ((scaled, "gradient"), (fewer, "no gradients of image.p")):
        petal_step._parity.cache_clear()
        monkeypatch.setitem(petal_step.PROVIDERS, "fastgist", wrong)
        assert what in petal_step.parity("fastgist", TINY, CPU)
    petal_step._parity.cache_clear()


def test_three_steps_of_the_released_form_and_of_ours_are_the_same():
    steps = [petal_step.PROVIDERS[p](TINY, CPU, dropout=0.0) for p in ("released", "fastgist")]
    for _ in range(3):
        losses = [step() for step in steps]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert petal_step.trained(steps[0]) == petal_step.trained(steps[1])


def test_lora_trains_as_many_numbers():
    ours, lora = (petal_step.trained(petal_step.PROVIDERS[p](TINY, CPU)) for p in ("fastgist", "PEFT LoRA"))
    matrices = 4 * 3 * 2 * 64 + 2 * (2 * 64 + 2 * (64 + 48))  # of a rank of one
    assert abs(ours - lora) <= matrices / 2


def test_flops_of_the_updates_are_those_derived_by_hand():
    """Three times the forward, but that nothing flows into the image tokens and what is in front of the experts."""
    rows, queries, image, r, d, k = 2 * 37, 2 * 32, 2 * 17, 8, 64, 48
    modes, crossed = 4 * 3 + 2, 2
    experts = 6 * rows * 4 * d * petal_step.EXPERT_DIM

    def low_rank(inner_products, wide_products, inner, count_x):
        return 2 * r * (inner_products * inner * (2 + count_x) + wide_products * d * 3)

    text = low_rank(3 * 4 * rows + crossed * queries, 3 * 4 * rows + crossed * queries, d, 1)
    pictures = low_rank(2 * crossed * image, 2 * crossed * image, k, 0)
    core = 3 * 2 * r * r * (3 * 4 * rows + crossed * queries + 2 * crossed * image)
    cores = 3 * 2 * r**3 * (modes + 2 * crossed)
    experts = experts * 5 // 2  # in front of them nothing is trained
    found = petal_step.cost_row("released", TINY, CPU)["update_flops"]
    by_hand = text + pictures + core + experts
    assert (
        by_hand <= found <= by_hand + cores + 2 * crossed * 2 * 2 * queries * 17 * d
    )  # what torch does not count may vary
    assert petal_step.cost_row("fastgist cp", TINY, CPU)["update_flops"] < found


def test_operators_of_ours_are_counted_by_what_they_call():
    step = petal_step.PROVIDERS["fastgist, without dropout"](TINY, CPU)
    with petal_step._Calls() as calls:
        step()
    assert not any("fastgist" in name for name in calls.found)
    assert calls.found["aten.addmm_.default"] > 0
    assert not any("view" in name or "aten.t." in name or "matmul" in name for name in calls.found)


@pytest.mark.parametrize("provider", [p for p in decode.LAYERS if p != "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decoded_layer(provider, dtype):
    try:
        assert decode.parity(provider, case(dtype, M=1, d=48), CPU) is None
    except Missing as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("provider", ["fastgist CPLinear", "fastgist LoRALinear", "fastgist CPLinear, merged"])
def test_a_decoded_token_of_a_llama(provider):
    small = case(torch.float32, M=1, d=128, L=2)
    assert decode.parity(provider, small, CPU) is None
    with torch.no_grad():
        logits = [call(*given) for call, given in (decode.build(p, small, CPU) for p in (provider, "base"))]
    assert not torch.allclose(*logits, atol=1e-3), "the adapter does nothing"


def test_against_base_pairs_what_ran_together():
    found = against_base([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert found["over_base"] == 2.0
    assert found["update_s"] == 2.0


def test_steps_py_measures_petal_in_one_call(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "benchmarks/steps.py", "--op", "petal_step", "--device", "cpu", "--only", "autocast"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fastgist, autocast" in done.stdout
    assert "within the budget" in done.stdout


def test_the_plan_covers_the_grid_and_starts_with_the_main_shape():
    from benchmarks import steps

    shapes = steps.cases("petal_step", "cuda")
    assert {(c["B"], c["T"], c["R"]) for c in shapes} == {
        (b, t, r) for b in (1, 8, 16, 32, 64) for t in (0, 20, 128) for r in (16, 32, 64, 128)
    }
    plan = steps.plan("petal_step", "cuda")
    assert all(steps.is_main("petal_step", shapes[numbers[0]]) for _, numbers in plan)
    assert {p for p, numbers in plan if len(numbers) == len(shapes)} == set(petal_step.EVERYWHERE)
    only = steps.plan("petal_step", "cuda", "released", "R64_")
    assert all("released" in p and all(shapes[i]["R"] == 64 for i in numbers) for p, numbers in only)
