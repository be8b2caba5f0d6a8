"""The steps of ``scripts/gpu.py``: by stages, or in the order that gives most in a lease of a few minutes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

OPS = ("bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl", "cp_linear", "cp_update", "adapter", "gelu")
STAGES = ("build", "parity", "hard", "bitwise", "sanitizer", "tune", "warm", "bench", "ncu")
#: Under the device's folder, where docs/crossovers.md and the tests of the choice look for it.
FORMS = "cp_linear_forms.json"
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20")
#: Of cp_linear and cp_update beside tests/test_<op>.py: every form, every cut of weights and gradients, dropout's words.
LOW_RANK = ("tests/test_cp_linear_forms.py", "tests/test_cp_pieces.py", "tests/test_philox.py")
LOSSES = ("bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl")


@dataclass
class Step:
    """One command of a stage. ``gate``: the step before it in the stage that must have passed. ``needs``: the tool without
    which it is not run; the command begins with "None" then. In a short run: ``seconds`` it should take and ``limit`` it
    may; ``behind``: it runs while others do, until a step ``after`` it waits for its end."""

    stage: str
    name: str
    command: tuple[str, ...]
    gate: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    behind: bool = False
    after: str = ""


def plan(stages: tuple[str, ...], ops: tuple[str, ...], out: Path, minutes: float, jobs: int = 1) -> Iterator[Step]:
    """The steps, in order. ``out`` is the device's folder; ``jobs``: processes that share the tests (and the device)."""
    python = sys.executable
    tests = (python, *PYTEST, *(("-n", str(jobs)) if jobs > 1 else ()))
    steps = len(ops) == len(OPS)
    for stage in STAGES:
        if stage not in stages:
            continue
        if stage == "build":
            yield Step(stage, "extension", (python, "setup.py", "build_ext", "--inplace"))
        elif stage == "parity":
            yield Step(stage, "operations", (*tests, *(f"tests/test_{op}.py" for op in ops), "-m", "kernel"))
            tiles = ("tests/gpu/test_precision.py", "tests/gpu/test_tiles.py", "tests/gpu/test_forms.py")
            yield Step(stage, "dtypes, tiles and forms", (*tests, *tiles))
            if {"cp_linear", "cp_update"} & set(ops):
                yield Step(stage, "forms, pieces and masks", (*tests, *LOW_RANK, "-m", "kernel or gpu"))
            if "adapter" in ops:
                yield Step(stage, "norm and dropout", (*tests, "tests/test_adapter_norm.py", "-m", "kernel"))
            if {"bidirectional_kl", "gist_loss"} & set(ops):
                ways = "tests/test_loss_gradients.py", "tests/test_finished_losses.py", "-m", "kernel"
                yield Step(stage, "losses' gradients", (*tests, *ways))
                yield Step(stage, "losses in CUDA C++", (*tests, "tests/gpu/test_losses_on_gpu.py"))
            if steps:
                yield Step(stage, "PETAL", (*tests, "tests/gpu/test_petal_on_gpu.py"))
        elif stage == "hard":
            yield Step(stage, "hard cases", (*tests, "tests/hard", "-m", "kernel or gpu"))
            yield Step(stage, "graphs and syncs", (*tests, "tests/gpu/test_graphs.py", "tests/gpu/test_sync.py"))
            yield Step(stage, "compile", (*tests, "tests/test_compile.py"))
        elif stage == "bitwise":
            yield Step(stage, "1000 reruns", (*tests, "tests/gpu/test_bitwise.py"))
        elif stage == "sanitizer":
            yield from _sanitizer(ops)
        elif stage == "tune":
            for op in ops:
                each = str(round(max(1.0, 0.7 * minutes / len(ops)), 1))
                command = (python, "scripts/tune.py", "--op", op, "--minutes", each, "--out", str(out / "tuning" / op))
                command += ("--forms", str(out / FORMS)) if op == "cp_linear" else ()
                yield Step(stage, f"tune {op}", command)
                yield Step(stage, f"recheck {op}", _recheck(op), gate=f"tune {op}")
        elif stage == "warm":  # what torch.compile makes for the peers, by many processes, into its cache
            files = tuple(f"benchmarks/bench_{op}.py" for op in ops)
            yield Step(stage, "compiled peers", (*tests, *files, "--benchmark-disable", "-k", "compiled"))
        elif stage == "bench":  # each row checks its own result before it is timed
            for op in ("train_step", "petal_step") if steps else ():  # compiles by itself
                command = (python, "benchmarks/steps.py", "--op", op, "--out", str(out.parent))
                yield Step(stage, f"time {op}", command)
            for op in (*ops, *(("decode",) if steps else ())):
                yield Step(stage, f"time {op}", (*_bench((op,), out), "--seconds", "0.1"))
            if {"bidirectional_kl", "gist_loss"} & set(ops):
                yield _numerics(out)
        elif stage == "ncu":
            timed = [op for op in ops if op in ("cp_linear", "cp_update", "adapter")]
            for op in timed:
                yield _ncu(op, out, 0.9 * minutes / len(timed))


def short_plan(out: Path, jobs: int = 1, arch: str = "") -> Iterator[Step]:
    """For a lease of a few minutes: what nobody knows yet first, each step with its limit. ``arch``: what is built for, as
    setup.py names it. The extension is compiled behind the tests that do not need it."""
    python = sys.executable
    done = ("-p", "gpu_record", "--record", str(out / "tests.jsonl"), "--done", str(out / "done.txt"))
    tests = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=400", *done)
    tests += ("-n", str(jobs), "--dist", "worksteal") if jobs > 1 else ()
    build = {"FASTGIST_CUDA_ARCHS": arch} if arch else {}
    command = (python, "setup.py", "build_ext", "--inplace")
    yield Step("build", "extension", command, env=build, seconds=35, limit=150, behind=True)
    layers = [f"tests/test_{op}.py" for op in ("cp_linear", "cp_update", "adapter", "adapter_norm", "gelu")]
    layers += [*LOW_RANK, *(f"tests/gpu/test_{name}.py" for name in ("forms", "tiles", "petal_on_gpu", "precision"))]
    yield Step("parity", "layers", (*tests, *layers, "-m", "kernel or gpu"), seconds=95, limit=160)
    losses = [f"tests/test_{op}.py" for op in (*LOSSES, "loss_gradients", "finished_losses")]
    losses += ["tests/gpu/test_losses_on_gpu.py"]
    yield Step("parity", "losses", (*tests, *losses, "-m", "kernel or gpu"), seconds=75, limit=130, after="extension")
    first = (
        "cp_linear",
        "bidirectional_kl",
        "gist_loss",
        "adapter",
        "gist_linear_loss",
        "cp_update",
        "topk_kl",
        "gelu",
    )
    command = (*_bench(first, out), "--first", "--resume", "--seconds", "0.05")
    yield Step("bench", "main rows", command, seconds=110, limit=150)
    step = (python, "benchmarks/steps.py", "--out", str(out.parent), "--resume", "--compile-seconds", "90", "--op")
    command = (*step, "train_step", "--like", "B256_S224_D768")
    yield Step("bench", "train_step", command, seconds=100, limit=150)
    found = out / "tuning" / "cp_linear"
    command = (python, "scripts/tune.py", "--op", "cp_linear", "--forms-only", "--minutes", "1.3", "--out", str(found))
    command += ("--table", str(found / "found.json"), "--forms", str(out / FORMS))
    yield Step("tune", "forms of cp_linear", command, seconds=80, limit=100)
    whole = ["tests/gpu/test_graphs.py", "tests/gpu/test_sync.py", "tests/hard", "tests/gpu/test_bitwise.py"]
    whole += ["tests/test_compile.py"]
    yield Step("hard", "graphs, hard cases, reruns", (*tests, *whole, "-m", "kernel or gpu"), seconds=80, limit=120)
    command = (*step, "petal_step", "--like", "B16_T20_R64_")
    yield Step("bench", "petal_step", command, seconds=90, limit=130)
    small = tuple(_sanitizer(("bidirectional_kl", "gist_loss", "cp_linear")))
    for step_of, seconds in zip((s for s in small if s.name != "initcheck"), (15, 30, 30)):
        yield _timed(step_of, seconds, 2 * seconds)
    for op in ("cp_linear", "adapter"):
        yield _timed(_ncu(op, out, 0.4), 24, 40)
    yield _timed(_numerics(out, "--no-compile"), 20, 60)
    for op in ("bidirectional_kl", "adapter", "cp_update"):
        to = out / "tuning" / op
        command = (python, "scripts/tune.py", "--op", op, "--minutes", "0.25", "--candidates", "8", "--out", str(to))
        yield Step("tune", f"tune {op}", (*command, "--table", str(to / "found.json")), seconds=22, limit=40)


def _timed(step: Step, seconds: float, limit: float) -> Step:
    step.seconds, step.limit = seconds, limit
    return step


def _numerics(out: Path, *options: str) -> Step:
    """Errors against float64 on the device."""
    command = (sys.executable, "scripts/numerics.py", "--out", str(out / "numerics"), "--no-progress", *options)
    return Step("bench", "errors against float64", command, env={"FASTGIST_DEVICE": "cuda"})


def _ncu(op: str, out: Path, minutes: float) -> Step:
    """Bytes that the device's memory moved."""
    command = (sys.executable, "scripts/ncu.py", "--op", op, "--out", str(out / "ncu" / f"{op}.json"))
    command += ("--minutes", str(round(minutes, 1)))
    return Step("ncu", f"ncu {op}", command if _tool("ncu") else ("None", *command), needs="ncu")


def _bench(ops: tuple[str, ...], out: Path) -> tuple[str, ...]:
    command = (
        sys.executable,
        "-m",
        "pytest",
        *(f"benchmarks/bench_{op}.py" for op in ops),
        "--benchmark-only",
        "-q",
        "-rs",
    )
    return (*command, "-p", "no:cacheprovider", "--save-results", str(out.parent))


def _tool(name: str) -> str | None:
    usual = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(usual) if usual.exists() and os.access(usual, os.X_OK) else None)


def _recheck(op: str) -> tuple[str, ...]:
    return (sys.executable, *PYTEST, f"tests/test_{op}.py", "-m", "kernel", "-k", "float64 or layouts or subsets")


def _sanitizer(ops: tuple[str, ...]) -> Iterator[Step]:
    binary = _tool("compute-sanitizer")
    script = (sys.executable, "scripts/gpu.py", "--run-small", *(f"--op={op}" for op in ops))
    yield Step("sanitizer", "plain run", script)
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = (str(binary), "--tool", tool, "--target-processes", "all", "--error-exitcode", "9", *script)
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield Step("sanitizer", tool, command, gate="plain run", env=uncached, needs="compute-sanitizer")
