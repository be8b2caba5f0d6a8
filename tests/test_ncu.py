"""scripts/ncu.py, as far as it goes without Nsight Compute."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[1]))

#: Written by hand after the format that ncu's documentation gives for --csv (no card printed it).
SAMPLE = """\
==PROF== Connected to process 4242 (/usr/bin/python3.11)
something that the program printed, "with quotes"
==PROF== Profiling "_adapter_bwd_once_kernel" - 0: 0%....50%....100% - 1 pass
==PROF== Profiling "_adapter_once_reduce_kernel" - 1: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","4242","python3.11","127.0.0.1","_adapter_bwd_once_kernel","1","7","(256, 1, 1)","(132, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes.sum","byte","75,512,832"
"0","4242","python3.11","127.0.0.1","_adapter_bwd_once_kernel","1","7","(256, 1, 1)","(132, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","ns","41,216"
"1","4242","python3.11","127.0.0.1","void at::native::vectorized_elementwise_kernel<4>(int, T1)","1","7","(64, 1, 1)","(97, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes.sum","Mbyte","1.5"
"""  # noqa: E501


@pytest.fixture
def ncu():
    return importlib.import_module("ncu")


def test_bytes_of_each_kernel_are_read(ncu):
    name = "void at::native::vectorized_elementwise_kernel<4>"
    assert ncu.parse(SAMPLE) == [("_adapter_bwd_once_kernel", 75512832.0), (name, 1.5e6)]


def test_what_is_no_profile_says_why(ncu):
    refused = (
        '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters\n"'
    )
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        ncu.parse("==PROF== Connected\n" + refused)
    with pytest.raises(ValueError, match="nothing"):
        ncu.parse("")
    with pytest.raises(ValueError, match="'sector'"):
        ncu.parse(SAMPLE.replace('"byte"', '"sector"'))


def test_a_row_holds_the_bytes_counted_and_those_measured(ncu, monkeypatch, tmp_path):
    """By a stand-in for ncu that prints the sample."""
    fake = tmp_path / "ncu"
    fake.write_text(f"#!{sys.executable}\nprint({SAMPLE!r})\n")
    fake.chmod(0o755)
    monkeypatch.setattr(ncu, "launched", lambda op, index, direction: 80_000_000)
    row = ncu.measure(str(fake), "adapter", 0, "bwd", 60)
    assert row["dram_bytes"] == 75512832 + 1.5e6
    assert row["launched_bytes"] == 80_000_000
    assert "must move 75.5 MB, launches name 80.0, DRAM 77.0 (1.02 x) in 2 kernels" in ncu.line(row)
    fake.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\n")
    row = ncu.measure(str(fake), "adapter", 0, "bwd", 60)
    assert "ERR_NVGPUCTRPERM" in row["error"] and "ERR_NVGPUCTRPERM" in ncu.line(row)


def test_what_launches_name_is_no_less_than_what_must_move(ncu):
    pytest.importorskip("triton")
    pytest.importorskip("timm")
    from benchmarks.cases import CASES, costs

    for direction in ("fwd", "bwd"):
        must, _ = costs("adapter", CASES["adapter", "cuda"][0], direction)
        assert must <= ncu.launched("adapter", 0, direction) <= 2 * must


def test_without_ncu_one_line_and_code_two(ncu, monkeypatch, capsys):
    monkeypatch.setattr(ncu, "find", lambda: None)
    assert ncu.main(["--op", "adapter"]) == 2
    assert "not installed" in capsys.readouterr().err


def test_the_gpu_run_leaves_out_what_is_not_installed(monkeypatch, tmp_path):
    gpu, plan = importlib.import_module("gpu"), importlib.import_module("gpu_plan")
    monkeypatch.setattr(plan, "_tool", lambda name: False)
    steps = list(gpu.plan(("ncu",), gpu.OPS, tmp_path, 9.5))
    assert [s.name for s in steps] == ["ncu cp_linear", "ncu cp_update", "ncu adapter"]
    results = gpu.run_steps(steps, 1.0, tmp_path)
    assert {r.verdict for r in results} == {"not run: ncu is not installed"}
    monkeypatch.setattr(plan, "_tool", lambda name: True)
    (step,) = gpu.plan(("ncu",), ("adapter",), tmp_path, 9.5)
    assert step.command[:2] == (sys.executable, "scripts/ncu.py")
