"""scripts/ and benchmarks/plot.py, as far as they go without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
OPS = ("bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl", "cp_linear", "cp_update", "adapter", "gelu")


def _load(path: str):
    """A script as a module. It is registered: dataclasses look their module up."""
    name = path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _run(*command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300
    )


# -- gpu.py -----------------------------------------------------------------------------------------------------------


def test_gpu_dry_run_prints_every_stage_and_existing_files(tmp_path):
    gpu = _load("scripts/gpu.py")
    steps = list(gpu.plan(gpu.STAGES, gpu.OPS, tmp_path, 9.5))
    assert {s.stage for s in steps} == set(gpu.STAGES)
    assert tuple(gpu.OPS) == OPS
    for step in steps:
        for word in step.command:
            if word.startswith(("tests/", "benchmarks/bench", "scripts/")):
                assert (ROOT / word).exists(), f"{step.stage} {step.name} names {word}, which does not exist"
    done = _run("scripts/gpu.py", "--dry-run", "--stage", "parity", "--op", "adapter")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 3
    assert "tests/test_adapter.py" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["scripts/gpu.py", "scripts/tune.py"])
def test_without_a_gpu_one_line_and_code_two(script):
    done = _run(script)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "CUDA device" in done.stderr


def test_a_failing_step_is_recorded_and_stops_nothing_but_what_it_gates(tmp_path):
    gpu = _load("scripts/gpu.py")

    def step(name: str, code: str, gate: str | None = None):
        return gpu.Step("bench", name, (sys.executable, "-c", code), gate=gate)

    steps = [
        step("gate a", "raise SystemExit(1)"),
        step("time a", "print('must not run')", gate="gate a"),
        step("gate b", "print('fine')"),
        step("time b", "print('timed')", gate="gate b"),
        step("slow", "import time; time.sleep(60)"),
        step("late", "pass"),
    ]
    results = gpu.run_steps(steps[:4], 1.0, tmp_path)
    assert [r.verdict for r in results] == ["failed", "not run: 'gate a' is not green", "passed", "passed"]
    assert results[3].last_line == "timed"
    assert "raise SystemExit" in (tmp_path / "logs" / results[0].log).read_text()
    results = gpu.run_steps(steps[4:], 0.1, tmp_path)
    assert [r.verdict for r in results] == ["out of time", "out of time"]


def test_the_summary_keeps_earlier_stages_and_the_tar_holds_all(tmp_path):
    gpu = _load("scripts/gpu.py")
    out = tmp_path / "some-gpu"
    out.mkdir()
    first = [gpu.Result("parity", "adapter", "passed", 1.0, "", ""), gpu.Result("hard", "x", "failed", 1.0, "", "")]
    assert json.loads(gpu.write_summary(out, first).read_text())["parity"] == "green"
    again = [gpu.Result("parity", "adapter", "failed", 2.0, "", "")]
    told = json.loads(gpu.write_summary(out, again).read_text())
    assert told["parity"] == "red"
    assert {(s["stage"], s["step"], s["verdict"]) for s in told["steps"]} == {
        ("parity", "adapter", "failed"),
        ("hard", "x", "failed"),
    }
    assert gpu.pack(out).stat().st_size > 0


def test_the_stand_in_for_hypothesis_lets_test_modules_import(tmp_path):
    gpu = _load("scripts/gpu.py")
    (tmp_path / "hypothesis.py").write_text(gpu._STUB)
    (tmp_path / "test_it.py").write_text(
        "from hypothesis import given, settings, strategies as st\n"
        "@settings(max_examples=3, deadline=None)\n@given(a=st.integers(1, 6), b=st.floats(0.0, 2.0))\n"
        "def test_a(a, b):\n    assert False\n\ndef test_b():\n    pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:hypothesispytest",
        "test_it.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 passed, 1 skipped" in done.stdout, done.stdout


# -- tune.py ----------------------------------------------------------------------------------------------------------


def test_tuning_keeps_the_default_within_noise():
    tune = _load("scripts/tune.py")
    trials = [({"BLOCK_M": 1}, 0.99), ({"BLOCK_M": 2}, 0.97)]
    assert tune.decide((1.0, 1.05), trials) is None, "5 % noise hides a gain of 3 %"
    assert tune.decide((1.0, 1.001), trials) == ({"BLOCK_M": 2}, 0.97)
    assert tune.decide((1.0, 1.0), [({"BLOCK_M": 2}, 0.985)]) is None, "a gain under 2 % is never worth an entry"
    assert tune.decide((1.0, 1.0), []) is None


def test_tuning_writes_only_its_entries(tmp_path):
    tune = _load("scripts/tune.py")
    table = tmp_path / "launch_tables.json"
    table.write_text(
        json.dumps({"adapter_fwd": {"sm_80": {"d768": {"BLOCK_M": 64}}, "sm_90": {"d768": {"BLOCK_M": 1}}}})
    )
    tune.write_table({("adapter_fwd", "sm_90", "d768"): {"BLOCK_M": 128}, ("x", "sm_90", "v4"): {"BLOCK_V": 4}}, table)
    assert json.loads(table.read_text()) == {
        "adapter_fwd": {"sm_80": {"d768": {"BLOCK_M": 64}}, "sm_90": {"d768": {"BLOCK_M": 128}}},
        "x": {"sm_90": {"v4": {"BLOCK_V": 4}}},
    }
    before = table.read_text()
    tune.write_table({}, table)
    assert json.loads(table.read_text()) == json.loads(before)


def test_tuning_knows_every_entry_that_a_launcher_asks_for():
    tune = _load("scripts/tune.py")
    sources = "\n".join(p.read_text() for p in sorted((ROOT / "kernels" / "fastgist_kernels").glob("*.py")))
    asked = set(re.findall(r'(?:launch_config|rows_config|_config)\(\s*"(\w+)"', sources))
    assert asked, "the launchers ask for no entry by name: is this test out of date?"
    assert asked <= set(tune.SPACES), f"give scripts/tune.py a search space for {sorted(asked - set(tune.SPACES))}"
    for kernel in tune.SPACES:
        drawn = tune.candidates(kernel, 12)
        assert 0 < len(drawn) <= 12
        assert drawn == tune.candidates(kernel, 12), "the draw is fixed"


# -- mutants.py -------------------------------------------------------------------------------------------------------


def test_every_mutant_finds_its_text_once():
    sys.path.insert(0, str(ROOT / "scripts"))
    mutants = _load("scripts/mutants.py")
    stale = [problem for m in mutants.MUTANTS if (problem := mutants.find(m))]
    assert not stale, "bring scripts/mutants_of_*.py up to date:\n" + "\n".join(stale)
    names = [m.name for m in mutants.MUTANTS]
    assert len(names) == len(set(names))
    assert all((ROOT / test.split("::")[0]).exists() for m in mutants.MUTANTS for test in mutants.tests_of(m))


def test_mutants_are_tried_in_a_copy_of_all_that_tests_may_read(tmp_path):
    """A copy without the committed records failed three tests of each run that named them: of a mutant they said nothing."""
    mutants = _load("scripts/mutants.py")
    mutants.copy_files(tmp_path / "copy")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    files = {name for name in listed if name and (ROOT / name).exists()}
    if not files:  # a source distribution, or a repository around this tree
        folders = (ROOT / name for name in ("benchmarks", "csrc", "docs", "fastgist", "kernels", "scripts", "tests"))
        every = (
            path for folder in folders for path in folder.rglob("*.*") if path.suffix in (".py", ".md", ".json", ".h")
        )
        files = {path.relative_to(ROOT).as_posix() for path in every}
    files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastgist").glob("*.so")}
    assert "benchmarks/results/cpu-amd-epyc/cp_linear_forms.json" in files
    lacking = sorted(name for name in files if not (tmp_path / "copy" / name).exists())
    assert not lacking, f"what .gitignore names is left out of the copy, and these are needed: {lacking}"
    assert not (tmp_path / "copy" / ".git").exists() and not (tmp_path / "copy" / "build").exists()


def test_every_kernel_file_has_mutants_and_five_with_what_it_imports():
    mutants = _load("scripts/mutants.py")
    kernels = ROOT / "kernels" / "fastgist_kernels"
    have = {
        path.stem: sum(m.file == f"kernels/fastgist_kernels/{path.name}" for m in mutants.MUTANTS)
        for path in kernels.glob("*.py")
    }
    for path in sorted(kernels.glob("*.py")):
        source = path.read_text()
        if "@triton.jit" in source and path.stem not in ("common", "philox"):
            parts = set(re.findall(r"^from fastgist_kernels\.(\w+) import", source, re.MULTILINE)) - {
                "common",
                "philox",
            }
            assert have[path.stem] >= 2, f"{path.name} has {have[path.stem]} mutants"
            assert have[path.stem] + sum(have[part] for part in parts) >= 5, f"{path.name} and what it imports have few"


def test_the_sample_is_fixed_and_spread():
    mutants = _load("scripts/mutants.py")
    drawn = mutants.sample(mutants.MUTANTS, 8)
    assert drawn == mutants.sample(mutants.MUTANTS, 8)
    assert len({m.file for m in drawn}) == 8
    assert len(mutants.sample(mutants.MUTANTS, 10**6)) == len(mutants.MUTANTS)


def test_verdicts():
    mutants = _load("scripts/mutants.py")

    def verdict(code: int, out: str = "") -> str:
        return mutants.judge(subprocess.CompletedProcess((), code, stdout=out, stderr=""))[0]

    assert verdict(0, "3 passed") == "survived"
    assert verdict(1, "FAILED tests/test_a.py::test_x[a b] - AssertionError: loss") == "killed"
    assert verdict(1, "FAILED tests/test_a.py::test_x - NameError: name 'y' is not defined") == "broken"
    assert verdict(2, "ERROR collecting") == "broken"
    assert verdict(-11) == "killed"
    assert verdict(-15) == "broken", "ended from outside: nothing was shown"


# -- plot.py ----------------------------------------------------------------------------------------------------------


def test_plot_draws_what_counts_and_names_the_device(tmp_path):
    pytest.importorskip("matplotlib")
    plot = _load("benchmarks/plot.py")
    rows = [
        {"op": "adapter", "case": "M8_d4", "dtype": "float32", "direction": "fwd_bwd", "floor_s": 1e-3, "floor": "why"}
        | {"M": 8, "peak_bytes": 3 << 20}
        | {"provider": provider, "median_s": median, "parity": parity}
        for provider, median, parity in (
            ("fastgist native", 2e-3, "within the budget"),
            ("eager", 4e-3, "within the budget"),
            ("wrong", 1e-3, "result: error"),
        )
    ]
    environment = {"device": "A <CPU>", "threads": 2, "versions": {"torch": "2.0"}, "date": "2026-01-01"}
    (tmp_path / "cpu-a").mkdir()
    (tmp_path / "cpu-a" / "adapter.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    out = tmp_path / "figures"
    assert plot.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    assert [file.name for file in out.iterdir()] == ["benchmark.svg"], "no GPU was measured"
    drawn = (out / "benchmark.svg").read_text()
    assert "A &lt;CPU&gt;, 2 threads" in drawn
    assert "4 k rows/s, 2 ms, 2 x floor" in drawn
    assert "3 MiB" in drawn
    assert ">eager<" in drawn
    assert "wrong" not in drawn
    step = {"graph_replay_s": 1e-3, "parity": "within the budget (as 'fastgist')"}
    (tmp_path / "a-gpu").mkdir()
    (tmp_path / "a-gpu" / "adapter.json").write_text(json.dumps({"environment": environment, "rows": [rows[0] | step]}))
    assert plot.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    assert "2 ms, 2 x floor; 1 ms as a CUDA graph" in (out / "benchmark-gpu.svg").read_text()
    assert (out / "benchmark.svg").read_text() == drawn
    assert plot.main(["--results", str(tmp_path / "none"), "--out", str(out)]) == 1


def test_plot_draws_the_losses_by_their_number_of_classes(tmp_path):
    pytest.importorskip("matplotlib")
    plot = _load("benchmarks/plot.py")
    providers = {"fastgist native": 1e-3, "authors": 9e-3, "authors, compiled": 4e-3, "Liger KL": 2e-3}
    rows = [
        {
            "op": "gist_loss",
            "case": f"M8_V{v}",
            "dtype": "float32",
            "direction": "fwd_bwd",
            "floor_s": 1e-3,
            "floor": "why",
        }
        | {"M": 8, "V": v, "peak_bytes": 64 * v, "bytes": 128 * v, "provider": name, "median_s": seconds}
        | {"parity": "another function, there for its cost" if name == "Liger KL" else "within the budget"}
        for v in (100, 1000, 8000)
        for name, seconds in providers.items()
    ]
    environment = {
        "device": "A CPU",
        "device_slug": "cpu-a",
        "threads": 2,
        "versions": {"torch": "2.0"},
        "date": "today",
    }
    (tmp_path / "cpu-a").mkdir()
    (tmp_path / "cpu-a" / "gist_loss.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    found = plot.by_classes(plot.load(tmp_path, [], cpu=True))
    assert {r["provider"] for r in found["cpu-a"]["gist_loss", plot.measured(environment)]} == {
        "fastgist native",
        "authors, compiled",
    }
    assert plot.main(["--results", str(tmp_path), "--out", str(tmp_path / "figures")]) == 0
    drawn = (tmp_path / "figures" / "losses-cpu-a.svg").read_text()
    assert "authors, compiled" in drawn
    assert "Liger" not in drawn
    two = [r for r in rows if r["V"] != 100]
    assert plot.by_classes([(environment, two)]) == {}, "two points are no curve"
