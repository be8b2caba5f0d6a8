#!/usr/bin/env python3
"""Everything that needs a GPU, in stages that each end in time and can be run one by one (``make gpu``).

    python scripts/gpu.py --dry-run                     the plan
    python scripts/gpu.py --stage parity --out results  one stage
    python scripts/gpu.py --stage bench --op adapter    one operation's share of it
    python scripts/gpu.py --budget 9 --pack DIR         a lease of minutes: the newest first, within 9 minutes in all

With --budget each step has a limit of its own, each test and row is written as it comes, and a second call goes on where the
first one ended: what has passed is not repeated.

It runs on a bare machine with torch, triton and pytest from a plain copy of the repository: nothing is installed and
nothing is fetched. What lacks a package is skipped and says so. Results go to OUT/<gpu>/, one folder a device, with
gpu.json naming device, driver, versions, commit, ceilings measured here and each step's verdict, and to one tar. A step
that fails is recorded and stops nothing; a benchmark row whose result is wrong is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "scripts") not in sys.path:
    sys.path.insert(0, str(ROOT / "scripts"))

from gpu_plan import OPS, STAGES, Step, plan, short_plan  # noqa: E402

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
class Result:
    stage: str
    step: str
    verdict: str  # passed | failed | out of time | not run: why
    seconds: float
    last_line: str
    log: str


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


def start(step: Step, env: dict[str, str], log: Path) -> subprocess.Popen:
    """Begin a step in a process group of its own: pytest's processes then end with it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as f:
        f.write("$ " + " ".join(step.command) + "\n")
        f.flush()
        return subprocess.Popen(
            step.command, cwd=ROOT, env=env | step.env, stdout=f, stderr=subprocess.STDOUT, process_group=0
        )


def finish(step: Step, process: subprocess.Popen, started: float, seconds: float, log: Path) -> Result:
    """Wait for a step, for so many seconds."""
    try:
        verdict = "passed" if process.wait(max(seconds, 0.1)) == 0 else "failed"  # pytest's 5: no test, nothing shown
    except subprocess.TimeoutExpired:
        verdict = "out of time"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Result(step.stage, step.name, verdict, round(time.monotonic() - started, 1), lines[-1][:200], log.name)


def run_step(step: Step, seconds: float, env: dict[str, str], logs: Path) -> Result:
    log, started = _log(step, logs), time.monotonic()
    try:
        process = start(step, env, log)
    except OSError as e:
        return Result(step.stage, step.name, f"not run: {e}", 0.0, "", "")
    return finish(step, process, started, seconds, log)


def _log(step: Step, logs: Path) -> Path:
    return logs / f"{step.stage}-{re.sub(r'[^a-z0-9_]+', '-', step.name.lower())}.log"


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


def run_short(steps: list[Step], minutes: float, out: Path, packed: Path | None = None) -> list[Result]:
    """Run what has not passed yet, each step within its limit and all within ``minutes``; the summary (and the tar under
    ``packed``) is written after each. Tests that have passed are left out of a step that runs again."""
    ends = time.monotonic() + 60 * minutes
    results: list[Result] = []
    behind: dict[str, tuple[Step, subprocess.Popen, float, Path]] = {}
    passed = {(s["stage"], s["step"]) for s in _summary(out).get("steps", []) if s["verdict"] == "passed"}
    passed -= {(s.stage, s.name) for s in steps if s.stage == "build"}  # quick where nothing changed, and needed

    def told(result: Result) -> None:
        results.append(result)
        print(f"    {result.step}: {result.verdict} after {result.seconds:.0f} s: {result.last_line}", flush=True)
        write_summary(out, results)
        if packed is not None:
            pack(out, packed)

    def await_behind(name: str) -> None:
        step, process, started, log = behind.pop(name)
        left = min(started + step.limit, ends) - time.monotonic()
        told(finish(step, process, started, left, log))

    with tempfile.TemporaryDirectory() as stubs:
        env = child_environment(Path(stubs))
        for i, step in enumerate(steps):
            if (step.stage, step.name) in passed:
                continue
            if step.after in behind:
                await_behind(step.after)
            gate = [r.verdict for r in results if (r.stage, r.step) == (step.stage, step.gate)]
            left = ends - time.monotonic()
            print(f"[{i + 1}/{len(steps)}] {step.stage}: {step.name} ({left:.0f} s left)", flush=True)
            if gate and gate != ["passed"]:
                told(Result(step.stage, step.name, f"not run: '{step.gate}' is not green", 0.0, "", ""))
            elif step.command[0] == "None":
                told(Result(step.stage, step.name, f"not run: {step.needs} is not installed", 0.0, "", ""))
            elif left < min(20.0, step.limit):
                told(Result(step.stage, step.name, "out of time", 0.0, "", ""))
            elif step.behind:
                log = _log(step, out / "logs")
                behind[step.name] = step, start(step, env, log), time.monotonic(), log
            else:
                _note_done(out)
                told(run_step(step, min(step.limit, left), env, out / "logs"))
        for name in list(behind):
            await_behind(name)
    return results


def _note_done(out: Path) -> None:
    """The tests that need not run again: done.txt."""
    verdicts = _verdicts(out)
    done = [test for test, row in verdicts.items() if row["outcome"] != "failed"]
    (out / "done.txt").write_text("".join(f"{test}\n" for test in done))


def _verdicts(out: Path) -> dict[str, dict]:
    """The last line of tests.jsonl for each test; a line that was cut off is none."""
    path, found = out / "tests.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            found[row["test"]] = row
    return found


def _restore_table(out: Path) -> None:
    shutil.copy2(out / "launch_tables.before.json", TABLE)
    print("    the new launch table gives wrong results: the old one is back", flush=True)


def run_small(ops: list[str]) -> int:
    """Each operation forward and backward at small ragged shapes: what the sanitizers watch."""
    import torch

    from fastgist import _extension
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
            print(op, dtype, float(out.detach().float().sum()))
            for classes in (131, 33_000, 300_000) if op in ("bidirectional_kl", "gist_loss") else ():
                if _extension.has_cuda():  # a warp, a cluster, and rows that are read twice
                    pair = leaf(5, classes, dtype=dtype), leaf(5, classes, dtype=dtype)
                    more = (torch.randint(0, classes, (5,), device=device),) if op == "gist_loss" else ()
                    out = getattr(F, op)(*pair, *more, impl="cuda")
                    out.backward()
                    torch.cuda.synchronize()
                    print(op, dtype, "in CUDA C++", classes, float(out.detach()))
    return 0


def describe() -> int:
    """Print the device, its driver, the versions and the ceilings measured now, as JSON."""
    os.environ["FASTGIST_BENCH_DEVICE"] = "cuda"
    from benchmarks.conftest import environment

    print(json.dumps(environment()))
    return 0


def gpu_name() -> tuple[str, str] | None:
    """The first GPU's name and architecture as setup.py names it ("90a"), or None. Asked of a child, so that this process
    never holds the device."""
    script = "import torch; c = torch.cuda\nif c.is_available(): print(c.get_device_name(), *c.get_device_capability())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        return None
    name, major, minor = done.stdout.strip().rsplit(" ", 2)
    return name, f"{major}{minor}" + ("a" if int(major) >= 9 else "")


def _summary(out: Path) -> dict:
    path = out / "gpu.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _described(old: dict) -> dict:
    """What the device is; measured once for a folder of results."""
    if "device" in old.get("environment", {}):
        return old["environment"]
    with tempfile.TemporaryDirectory() as stubs:
        command = [sys.executable, "scripts/gpu.py", "--describe"]
        env = child_environment(Path(stubs))
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-2000:]}


def write_summary(out: Path, results: list[Result]) -> Path:
    """gpu.json: what ran where. Steps of earlier invocations stay unless they ran again. Beside them, where a short run has
    recorded tests, how many passed of each file and which failed."""
    path, old = out / "gpu.json", _summary(out)
    again = {(r.stage, r.step) for r in results}
    steps = [s for s in old.get("steps", []) if (s["stage"], s["step"]) not in again] + [asdict(r) for r in results]
    parity = [s["verdict"] for s in steps if s["stage"] == "parity"]
    verdict = "not run" if not parity else "green" if set(parity) == {"passed"} else "red"
    summary = {"environment": _described(old), "parity": verdict, "steps": steps}
    if verdicts := _verdicts(out):
        files: dict[str, Counter[str]] = {}
        for test, row in verdicts.items():
            files.setdefault(test.split("::")[0], Counter())[row["outcome"]] += 1
        summary["tests"] = {name: dict(counted) for name, counted in sorted(files.items())}
        summary["failed"] = [test for test, row in verdicts.items() if row["outcome"] == "failed"]
    path.write_text(json.dumps(summary, indent=1) + "\n")
    return path


def pack(out: Path, folder: Path | None = None) -> Path:
    """A tar of the device's folder, beside it or in ``folder``; whole at any time."""
    tar = (folder or out.parent) / f"fastgist-{out.name}.tar.gz"
    unfinished = tar.with_suffix(".part")
    with tarfile.open(unfinished, "w:gz") as f:
        f.add(out, arcname=out.name)
    unfinished.replace(tar)
    return tar


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", choices=(*STAGES, "all"), default=[], help="default: all")
    parser.add_argument("--op", action="append", choices=OPS, default=[], help="only this operation (may be repeated)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="default: benchmarks/results")
    parser.add_argument("--budget-minutes", type=float, default=9.5, help="for each stage (default 9.5)")
    parser.add_argument("--budget", type=float, metavar="MIN", help="the short plan, within so many minutes in all")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="with --budget: put the tar there, after each step")
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
    if args.dry_run and args.budget:
        for line in told_in_advance(list(short_plan(args.out / "<gpu>", args.jobs)), args.budget):
            print(line)
        return 0
    if args.dry_run:
        for step in plan(stages, ops, args.out / "<gpu>", args.budget_minutes, args.jobs):
            print(f"{step.stage:<10} {step.name:<24} {' '.join(step.command)}")
        return 0
    found = gpu_name()
    if found is None:
        print("make gpu: no CUDA device here (see --dry-run for what it would do)", file=sys.stderr)
        return 2
    name, arch = found
    if args.commit:
        os.environ["FASTGIST_COMMIT"] = args.commit
    out = args.out.resolve() / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    if args.budget:
        started = time.monotonic()
        write_summary(out, [])  # the device's ceilings, before anything else runs
        left = args.budget - (time.monotonic() - started) / 60
        results = run_short(list(short_plan(out, args.jobs, arch)), left, out, args.pack)
        return _report(out, results, write_summary(out, results), pack(out, args.pack))
    shutil.copy2(TABLE, out / "launch_tables.before.json")
    results = run_steps(list(plan(stages, ops, out, args.budget_minutes, args.jobs)), args.budget_minutes, out)
    if "tune" in stages:
        shutil.copy2(TABLE, out / "launch_tables.json")
    (out / "launch_tables.before.json").unlink()
    return _report(out, results, write_summary(out, results), pack(out))


def _report(out: Path, results: list[Result], summary: Path, tar: Path) -> int:
    failed = _summary(out).get("failed", [])
    for test in failed[:40]:
        print(f"failed: {test}")
    if len(failed) > 40:
        print(f"... and {len(failed) - 40} more, see {out / 'tests.jsonl'}")
    width = max((len(f"{r.stage}: {r.step}") for r in results), default=0)
    for r in results:
        print(f"{f'{r.stage}: {r.step}':<{width}}  {r.verdict:<12} {r.seconds:>7.1f} s  {r.last_line[:90]}")
    print(f"{summary}\n{tar}")
    return int(any(r.verdict != "passed" for r in results if r.stage not in ("build", "ncu")))


def told_in_advance(steps: list[Step], minutes: float) -> list[str]:
    """The short plan with the second at which each step should begin, what it should take and what it may."""
    at, lines = 10.0, [f"{'at':>5} {'takes':>6} {'at most':>8}  step"]  # ten: the device is described
    for step in steps:
        late = "" if at + step.seconds <= 60 * minutes else "  (in a second call)"
        what = f"{step.stage}: {step.name}" + (", behind the next" if step.behind else "")
        lines.append(f"{at:>5.0f} {step.seconds:>6.0f} {step.limit:>8.0f}  {what}{late}")
        lines.append(f"{'':>22} {' '.join(step.command)}")
        at += 0 if step.behind else step.seconds
    return lines


if __name__ == "__main__":
    sys.exit(main())
