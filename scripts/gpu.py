#!/usr/bin/env python3
"""Everything that needs a GPU, in stages that each end in time and can be run one by one (``make gpu``).

    python scripts/gpu.py --dry-run                     the plan
    python scripts/gpu.py --stage parity --out results  one stage
    python scripts/gpu.py --stage bench --op adapter    one operation's share of it

It runs on a bare machine with torch, triton and pytest from a plain copy of the repository: nothing is installed and
nothing is fetched. What lacks a package is skipped and says so. Results go to OUT/<gpu>/, one folder a device, with
gpu.json naming device, driver, versions, commit, ceilings measured here and each step's verdict, and to one tar. A step
that fails is recorded and stops nothing; a benchmark row whose result is wrong is not timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPS = ("bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl", "cp_linear", "cp_update", "adapter", "gelu")
STAGES = ("build", "parity", "hard", "bitwise", "sanitizer", "tune", "warm", "bench", "ncu")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20")
TABLE = ROOT / "kernels" / "fastgist_kernels" / "launch_tables.json"

_STUB = '''"""Stands in where hypothesis is not installed: its tests are skipped, their modules still import."""
import pytest

def given(*args, **kwargs):
    def skipped(test):
        def stand_in(): pass
        stand_in.__name__ = test.__name__
        return pytest.mark.skip(reason="hypothesis is not installed")(stand_in)
    return skipped

def settings(*args, **kwargs):
    return lambda test: test

class _Strategies:
    def __getattr__(self, name):
        return lambda *args, **kwargs: self

strategies = _Strategies()
def assume(condition): return condition
def example(*args, **kwargs): return lambda test: test
class HealthCheck:
    def __class_getitem__(cls, item): return item
    too_slow = data_too_large = filter_too_much = function_scoped_fixture = None
'''


@dataclass
class Step:
    """One command of a stage. ``gate``: the step before it in the stage that must have passed. ``needs``: the tool without
    which it is not run; the command begins with "None" then."""

    stage: str
    name: str
    command: tuple[str, ...]
    gate: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    needs: str = ""


@dataclass
class Result:
    stage: str
    step: str
    verdict: str  # passed | failed | out of time | not run: why
    seconds: float
    last_line: str
    log: str


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
            yield Step(stage, "dtypes and tiles", (*tests, "tests/gpu/test_precision.py", "tests/gpu/test_tiles.py"))
            if {"bidirectional_kl", "gist_loss"} & set(ops):
                ways = "tests/test_loss_gradients.py", "tests/test_finished_losses.py", "-m", "kernel"
                yield Step(stage, "losses' gradients", (*tests, *ways))
                yield Step(stage, "losses in CUDA C++", (*tests, "tests/gpu/test_losses_on_gpu.py"))
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
                command = (python, "-m", "pytest", f"benchmarks/bench_{op}.py", "--benchmark-only", "-q", "-rs")
                command += ("-p", "no:cacheprovider", "--seconds", "0.1", "--save-results", str(out.parent))
                yield Step(stage, f"time {op}", command)
        elif stage == "ncu":  # bytes that the device's memory moved
            timed = [op for op in ops if op in ("cp_linear", "cp_update", "adapter")]
            for op in timed:
                command = (python, "scripts/ncu.py", "--op", op, "--out", str(out / "ncu" / f"{op}.json"))
                command += ("--minutes", str(round(0.9 * minutes / len(timed), 1)))
                yield Step(stage, f"ncu {op}", command if _ncu() else ("None", *command), needs="ncu")


def _ncu() -> bool:
    return bool(shutil.which("ncu")) or Path("/usr/local/cuda/bin/ncu").exists()


def _recheck(op: str) -> tuple[str, ...]:
    return (sys.executable, *PYTEST, f"tests/test_{op}.py", "-m", "kernel", "-k", "float64 or layouts or subsets")


def _sanitizer(ops: tuple[str, ...]) -> Iterator[Step]:
    places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
    binary = next((p for p in places if p and Path(p).exists()), None)
    script = (sys.executable, "scripts/gpu.py", "--run-small", *(f"--op={op}" for op in ops))
    yield Step("sanitizer", "plain run", script)
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = (str(binary), "--tool", tool, "--target-processes", "all", "--error-exitcode", "9", *script)
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield Step("sanitizer", tool, command, gate="plain run", env=uncached, needs="compute-sanitizer")


# -- running -----------------------------------------------------------------------------------------------------------


def child_environment(stubs: Path) -> dict[str, str]:
    """For the children: this checkout first, a stand-in for hypothesis where it is missing, tests on the GPU."""
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    if importlib.util.find_spec("hypothesis") is None:
        (stubs / "hypothesis.py").write_text(_STUB)
        path.append(str(stubs))
    if os.environ.get("PYTHONPATH"):
        path.append(os.environ["PYTHONPATH"])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "FASTGIST_TEST_DEVICE": "cuda", "PYTHONUNBUFFERED": "1"}
    env.pop("TRITON_INTERPRET", None)
    return env


def run_step(step: Step, seconds: float, env: dict[str, str], logs: Path) -> Result:
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{step.stage}-{re.sub(r'[^a-z0-9_]+', '-', step.name.lower())}.log"
    started = time.monotonic()
    with log.open("w") as f:
        f.write("$ " + " ".join(step.command) + "\n")
        f.flush()
        try:
            done = subprocess.run(
                step.command,
                cwd=ROOT,
                env=env | step.env,
                stdout=f,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
            verdict = "passed" if done.returncode == 0 else "failed"
            if done.returncode == 5 and "pytest" in step.command:
                verdict = "failed"  # pytest found no test: nothing was shown
        except subprocess.TimeoutExpired:
            verdict = "out of time"
        except OSError as e:
            verdict = f"not run: {e}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Result(step.stage, step.name, verdict, round(time.monotonic() - started, 1), lines[-1][:200], log.name)


def run_steps(steps: list[Step], minutes: float, out: Path) -> list[Result]:
    """Run them all; a stage's steps share its minutes. A step whose gate is not green is not run."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as stubs:
        env = child_environment(Path(stubs))
        ends: dict[str, float] = {}
        for i, step in enumerate(steps):
            left = ends.setdefault(step.stage, time.monotonic() + 60 * minutes) - time.monotonic()
            print(f"[{i + 1}/{len(steps)}] {step.stage}: {step.name} ({max(left, 0):.0f} s left)", flush=True)
            gate = next((r for r in results if (r.stage, r.step) == (step.stage, step.gate)), None)
            if step.gate and (gate is None or gate.verdict != "passed"):
                why = f"not run: '{step.gate}' is not green"
                results.append(Result(step.stage, step.name, why, 0.0, "", ""))
            elif step.command[0] == "None":
                why = f"not run: {step.needs} is not installed"
                results.append(Result(step.stage, step.name, why, 0.0, "", ""))
            elif left < 5:
                results.append(Result(step.stage, step.name, "out of time", 0.0, "", ""))
            else:
                results.append(run_step(step, left, env, out / "logs"))
                if step.name.startswith("recheck ") and results[-1].verdict != "passed":
                    _restore_table(out)
            print(f"    {results[-1].verdict}: {results[-1].last_line}", flush=True)
    return results


def _restore_table(out: Path) -> None:
    shutil.copy2(out / "launch_tables.before.json", TABLE)
    print("    the new launch table gives wrong results: the old one is back", flush=True)


def run_small(ops: list[str]) -> int:
    """Each operation forward and backward at small ragged shapes: what the sanitizers watch."""
    import torch

    from fastgist import functional as F

    torch.manual_seed(0)
    device = "cuda"

    def leaf(*shape: int, dtype=torch.bfloat16):
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    for op in ops or OPS:
        for dtype in (torch.bfloat16, torch.float32):
            if op == "adapter":
                out = F.adapter(
                    *(leaf(*s, dtype=dtype) for s in ((37, 72), (9, 72), (9,), (72, 9), (72,))), impl="triton"
                )
            elif op == "cp_linear":
                args = [leaf(*s, dtype=dtype) for s in ((37, 72), (48, 72), (48,), (72, 5), (24, 5), (2, 5))]
                out = F.cp_linear(*args, dropout_p=0.1, training=True, impl="triton")
            elif op == "cp_update":
                args = [leaf(*s, dtype=dtype) for s in ((37, 48), (37, 72), (72, 5), (24, 5), (2, 5))]
                out = F.cp_update(*args, dropout_p=0.1, training=True, impl="triton")
            elif op == "gelu":
                out = F.gelu(leaf(37, 72, dtype=dtype), impl="triton")
            else:
                target = torch.randint(0, 131, (37,), device=device)
                if op == "bidirectional_kl":
                    out = F.bidirectional_kl(leaf(37, 131, dtype=dtype), leaf(37, 131, dtype=dtype), impl="triton")
                elif op == "gist_loss":
                    out = F.gist_loss(leaf(37, 131, dtype=dtype), leaf(37, 131, dtype=dtype), target, impl="triton")
                elif op == "topk_kl":
                    known = leaf(37, 131, dtype=dtype).detach().float().log_softmax(-1).topk(9)
                    out = F.topk_kl(leaf(37, 131, dtype=dtype), *known, impl="triton")
                else:
                    hidden = [leaf(*s, dtype=dtype) for s in ((37, 24), (37, 24), (131, 24), (131,))]
                    out = F.gist_linear_loss(*hidden, target, impl="triton")
            out.float().sum().backward()
            torch.cuda.synchronize()
            print(op, dtype, float(out.float().sum()))
    return 0


def describe() -> int:
    """Print the device, its driver, the versions and the ceilings measured now, as JSON."""
    os.environ["FASTGIST_BENCH_DEVICE"] = "cuda"
    from benchmarks.conftest import environment

    print(json.dumps(environment()))
    return 0


def gpu_name() -> str | None:
    """The first GPU's name, or None. Asked of a child, so that this process never holds the device."""
    script = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def write_summary(out: Path, results: list[Result]) -> Path:
    """gpu.json: what ran where. Steps of earlier invocations stay unless they ran again."""
    path = out / "gpu.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as stubs:
        command = [sys.executable, "scripts/gpu.py", "--describe"]
        env = child_environment(Path(stubs))
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    described = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-2000:]}
    again = {(r.stage, r.step) for r in results}
    steps = [s for s in old.get("steps", []) if (s["stage"], s["step"]) not in again] + [asdict(r) for r in results]
    parity = [s["verdict"] for s in steps if s["stage"] == "parity"]
    verdict = "not run" if not parity else "green" if set(parity) == {"passed"} else "red"
    path.write_text(json.dumps({"environment": described, "parity": verdict, "steps": steps}, indent=1) + "\n")
    return path


def pack(out: Path) -> Path:
    tar = out.parent / f"fastgist-{out.name}.tar.gz"
    with tarfile.open(tar, "w:gz") as f:
        f.add(out, arcname=out.name)
    return tar


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=(*STAGES, "all"), default=[], help="default: all")
    parser.add_argument("--op", action="append", choices=OPS, default=[], help="only this operation (may be repeated)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="default: benchmarks/results")
    parser.add_argument("--budget-minutes", type=float, default=9.5, help="for each stage (default 9.5)")
    jobs = min(os.cpu_count() or 1, 15) if importlib.util.find_spec("xdist") else 1
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes for the tests (default {jobs})")
    parser.add_argument("--commit", help="the commit that this copy is, where it has no git")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--run-small", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    if args.run_small:
        return run_small(args.op)
    if args.describe:
        return describe()
    stages = STAGES if not args.stage or "all" in args.stage else tuple(args.stage)
    ops = tuple(args.op) or OPS
    if args.dry_run:
        for step in plan(stages, ops, args.out / "<gpu>", args.budget_minutes, args.jobs):
            print(f"{step.stage:<10} {step.name:<24} {' '.join(step.command)}")
        return 0
    name = gpu_name()
    if name is None:
        print("make gpu: no CUDA device here (see --dry-run for what it would do)", file=sys.stderr)
        return 2
    if args.commit:
        os.environ["FASTGIST_COMMIT"] = args.commit
    out = args.out.resolve() / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy2(TABLE, out / "launch_tables.before.json")
    results = run_steps(list(plan(stages, ops, out, args.budget_minutes, args.jobs)), args.budget_minutes, out)
    if "tune" in stages:
        shutil.copy2(TABLE, out / "launch_tables.json")
    (out / "launch_tables.before.json").unlink()
    summary = write_summary(out, results)
    tar = pack(out)
    width = max(len(f"{r.stage}: {r.step}") for r in results)
    for r in results:
        print(f"{f'{r.stage}: {r.step}':<{width}}  {r.verdict:<12} {r.seconds:>7.1f} s  {r.last_line[:90]}")
    print(f"{summary}\n{tar}")
    return int(any(r.verdict != "passed" for r in results if r.stage not in ("build", "ncu")))


if __name__ == "__main__":
    sys.exit(main())
