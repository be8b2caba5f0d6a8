"""scripts/gpu.py --budget, the recorder of its tests and what its benchmarks keep, as far as they go without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
gpu = importlib.import_module("gpu")
cases, conftest, peers = (importlib.import_module(f"benchmarks.{name}") for name in ("cases", "conftest", "peers"))
FIRST = cases.FIRST


def _words(steps) -> set[str]:
    return {word for step in steps for word in step.command}


def test_both_plans_run_every_gpu_test_and_every_operations_tests(tmp_path):
    files = {f"tests/gpu/{file.name}" for file in (ROOT / "tests" / "gpu").glob("test_*.py")}
    files |= {f"tests/test_{op}.py" for op in gpu.OPS}
    files |= {f"tests/test_{name}.py" for name in ("cp_linear_forms", "cp_pieces", "philox", "adapter_norm")}
    files |= {"tests/hard", "scripts/numerics.py", "scripts/ncu.py", "scripts/tune.py"}
    for words in (_words(gpu.short_plan(tmp_path)), _words(gpu.plan(gpu.STAGES, gpu.OPS, tmp_path, 9.5))):
        assert files <= words
        assert all((ROOT / word).exists() for word in words if word.startswith(("tests/", "benchmarks/", "scripts/")))


def test_the_short_plan_fits_a_lease_of_a_quarter_of_an_hour(tmp_path):
    """Twelve minutes and a half, in two calls: a machine takes two to start. The first call's nine hold what matters most."""
    steps = list(gpu.short_plan(tmp_path, 15, "90a"))
    assert sum(s.seconds for s in steps if not s.behind) <= 14 * 60
    assert all(0 < s.seconds <= s.limit for s in steps)
    lines = gpu.told_in_advance(steps, 9)
    in_time = [line for line in lines if "in a second call" not in line]
    assert any("bench: train_step" in line for line in in_time)
    assert any("forms of cp_linear" in line for line in in_time)
    (build,) = (s for s in steps if s.behind)
    assert build.env == {"FASTGIST_CUDA_ARCHS": "90a"}
    assert [s.name for s in steps if s.after] == ["losses"]


def test_the_forms_go_where_page_and_tests_look_for_them(tmp_path):
    """docs/crossovers.md and tests/test_cp_linear_plan.py read results/<gpu>/; what --out names lies one folder further."""
    from crossovers import RESULTS

    for steps in (
        list(gpu.short_plan(RESULTS / "nvidia-h200")),
        list(gpu.plan(("tune",), gpu.OPS, RESULTS / "nvidia-h200", 9)),
    ):
        (tuned,) = (s for s in steps if "scripts/tune.py" in s.command and "cp_linear" in s.command)
        file = Path(tuned.command[tuned.command.index("--forms") + 1])
        assert file == RESULTS / "nvidia-h200" / "cp_linear_forms.json"
        assert file.match("nvidia-*/cp_linear_forms.json")


def test_what_stages_measure_beside_the_rows_is_on_the_page(tmp_path):
    rows = importlib.import_module("gpu_rows")
    words = _words(gpu.plan(gpu.STAGES, gpu.OPS, tmp_path, 9.5))
    for file in rows.BESIDE.values():
        written = {str(tmp_path / file), str((tmp_path / file).parent)}
        assert file == "gpu.json" or written & words, file


def test_the_page_of_gpu_rows_is_what_the_script_makes():
    rows = importlib.import_module("gpu_rows")
    text = rows.PAGE.read_text()
    assert text == rows.page(), "run scripts/gpu_rows.py"
    for (op, kind), timed in cases.CASES.items():
        part = text.split(f"## {op}\n", 1)[1].split("\n## ", 1)[0] if kind == "cuda" else ""
        for case in timed if kind == "cuda" else ():
            dtype = str(case.dtype).removeprefix("torch.")
            asked = [line for line in part.splitlines() if line.startswith(f"| {case.name} | {dtype} |")]
            assert len(asked) == len(cases.directions(op, kind, case))
            assert all(rows.NOT_RUN in line or "| run: [" in line for line in asked)


def test_a_row_counts_as_run_by_a_result_of_its_own_alone(tmp_path, monkeypatch):
    rows = importlib.import_module("gpu_rows")
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    timed = {"op": "gelu", "case": "M8_d4", "dtype": "bfloat16", "direction": "fwd", "median_s": 1.0}
    for folder, provider in (
        ("nvidia-a", "eager"),
        ("nvidia-a/first-run", "fastgist triton"),
        ("cpu-b", "fastgist auto"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        given = {"environment": {"commit": "0123456789"}, "rows": [timed | {"provider": provider}]}
        (tmp_path / folder / "gelu.json").write_text(json.dumps(given))
    case = cases.case(rows.CASES["gelu", "cuda"][0].dtype, M=8, d=4)
    known = rows.results()
    assert rows.status("gelu", case, "fwd", known).startswith(f"{rows.NOT_RUN} (earlier kernels: [0123456]")
    assert rows.status("gelu", case, "bwd", known) == rows.NOT_RUN
    given = {"environment": {"commit": "0123456789"}, "rows": [timed | {"provider": "fastgist triton"}]}
    (tmp_path / "nvidia-a" / "gelu.json").write_text(json.dumps(given))
    assert rows.status("gelu", case, "fwd", rows.results()).startswith("run: [0123456]")


def test_what_is_timed_first_exists():
    for op, (names, providers) in FIRST.items():
        assert set(names) <= {case.name for case in cases.CASES[op, "cuda"]}
        assert set(providers) <= peers.PEERS[op].keys()
    assert FIRST.keys() == set(gpu.OPS)


def _step(name: str, code: str, **more):
    more = {"seconds": 1.0, "limit": 30.0} | more
    return gpu.Step(more.pop("stage", "bench"), name, (sys.executable, "-c", code), **more)


def _described(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "_described", lambda old: {"device": "none"})


def test_a_short_run_goes_on_where_it_ended(tmp_path, monkeypatch):
    _described(monkeypatch)
    out, packed = tmp_path / "device", tmp_path / "packed"
    out.mkdir()
    packed.mkdir()
    flag = tmp_path / "flag"
    steps = [
        _step("built", f"import time; time.sleep(1); open({str(flag)!r}, 'w').close()", stage="build", behind=True),
        _step("first", "print('one')"),
        _step("needs it", f"import os; raise SystemExit(not os.path.exists({str(flag)!r}))", after="built"),
        _step("long", "import time; time.sleep(60)", limit=1.0),
        _step("fails", "raise SystemExit(1)"),
        _step("gated", "print('must not run')", gate="fails"),
    ]
    found = {r.step: r.verdict for r in gpu.run_short(steps, 5.0, out, packed)}
    assert found == {
        "built": "passed", "first": "passed", "needs it": "passed", "long": "out of time", "fails": "failed",
        "gated": "not run: 'fails' is not green",
    }  # fmt: skip
    with tarfile.open(packed / "fastgist-device.tar.gz") as tar:
        assert "device/gpu.json" in tar.getnames()
    again = {r.step for r in gpu.run_short(steps, 5.0, out)}
    assert again == {"built", "long", "fails", "gated"}
    told = {s["step"]: s["verdict"] for s in json.loads((out / "gpu.json").read_text())["steps"]}
    assert told == found
    late = gpu.run_short([_step("late", "pass", limit=60.0)], 0.1, out)
    assert [r.verdict for r in late] == ["out of time"]


def test_what_a_step_began_ends_with_it(tmp_path):
    """pytest's processes must not go on beside what is timed next."""
    child = f"import time; time.sleep(3); open({str(tmp_path / 'lives')!r}, 'w').close()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    result = gpu.run_step(_step("parent", code), 1.0, dict(os.environ), tmp_path)
    assert result.verdict == "out of time"
    time.sleep(4)
    assert not (tmp_path / "lives").exists()


def _pytest(folder: Path, *options: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{folder}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_record", *options]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_tests_that_passed_are_left_out_of_the_next_run(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    record, done = tmp_path / "tests.jsonl", tmp_path / "done.txt"
    options = ("--record", str(record), "--done", str(done))
    assert _pytest(tmp_path, *options).returncode == 1
    with record.open("a") as f:
        f.write('{"test": "cut o')
    verdicts = {test.split("::")[1]: row["outcome"] for test, row in gpu._verdicts(tmp_path).items()}
    assert verdicts == {"test_a": "passed", "test_b": "failed", "test_c": "skipped"}
    assert "assert False" in gpu._verdicts(tmp_path)["test_it.py::test_b"]["said"]
    gpu._note_done(tmp_path)
    assert "1 failed, 2 deselected" in _pytest(tmp_path, *options).stdout
    done.write_text("\n".join(f"test_it.py::test_{n}" for n in "abc"))
    assert _pytest(tmp_path, *options).returncode == 0, "nothing was left to run"


def test_a_process_without_a_device_gives_way_to_another(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text("import gpu_record\ngpu_record._context_is_broken = lambda: True\n")
    (tmp_path / "test_it.py").write_text(
        "import os\nimport pytest\n\nbroken = False\n\n@pytest.mark.parametrize('i', range(8))\ndef test_a(i):\n"
        "    global broken\n    broken = broken or i == 2\n"
        "    if broken:\n        raise RuntimeError('CUDA error: an illegal memory access')\n"
    )
    record = tmp_path / "tests.jsonl"
    done = _pytest(tmp_path, "--record", str(record), "-n", "1")
    verdicts = {test.split("::")[1]: row for test, row in gpu._verdicts(tmp_path).items()}
    failed = {name for name, row in verdicts.items() if row["outcome"] == "failed"}
    assert len(verdicts) == 8, done.stdout
    assert failed == {"test_a[2]", "test_a[3]"}, "the fault's own test, and the one that its process was to run next"
    assert "crashed" in verdicts["test_a[3]"]["said"]


def test_rows_that_were_timed_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "environment", lambda: {"device_slug": conftest.slug()})

    def row(provider: str, **more) -> dict:
        names = {"op": "gelu", "case": "M8_d4", "dtype": "float32", "direction": "fwd", "provider": provider}
        return names | {"parity": "within the budget", "median_s": 1.0} | more

    def run(*rows: dict, resume: bool) -> dict[str, float]:
        config = SimpleNamespace(stash={}, getoption=lambda name, default=None: options.get(name, default))
        options = {"--save-results": tmp_path, "--resume": resume}
        conftest.pytest_configure(config)
        config.stash[conftest.ROWS] = list(rows)
        conftest.save(config)
        (file,) = tmp_path.glob("*/*.json")
        return {row["provider"]: row["median_s"] for row in json.loads(file.read_text())["rows"]}

    assert run(row("a"), row("b"), {"op": "gelu", "case": "just begun"}, resume=False) == {"a": 1.0, "b": 1.0}
    assert run(row("b", median_s=2.0), row("c"), resume=True) == {"a": 1.0, "b": 2.0, "c": 1.0}
    assert run(row("c"), resume=False) == {"c": 1.0}


def test_the_first_rows_are_ours_and_the_named_peers():
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_adapter.py", "--co", "-q", "--first"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "FASTGIST_BENCH_DEVICE": "cuda"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    asked = [line for line in done.stdout.splitlines() if "::" in line]
    names, providers = FIRST["adapter"]
    assert len(asked) == len(names) * (len(providers) + 2) * 2
