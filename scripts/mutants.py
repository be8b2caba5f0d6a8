#!/usr/bin/env python3
"""Mutation check: breaks the kernels and formulas one small way at a time and demands that some test notices.

    python scripts/mutants.py                    every mutant
    python scripts/mutants.py --sample 8         a sample, fixed for a given state of the sources
    python scripts/mutants.py --op adapter --list

The mutants are in the files mutants_of_*.py. Each is applied to a private copy
of the tree, where the tests of its operation run until the first failure. A mutant is killed when a test fails on what
was computed; one that does not even run (a name error, a compilation error) or whose text is no longer found is a fault
of the list and fails the check as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parent))
from mutant_list import Mutant
from mutants_of_layers import LAYERS
from mutants_of_losses import LOSSES
from mutants_of_petal import PETAL
from mutants_of_plan import PLAN
from mutants_of_topk import TOPK_KL
from mutants_of_update import CP_UPDATE

T = TypeVar("T")
MUTANTS: list[Mutant] = [*LOSSES, *TOPK_KL, *LAYERS, *PLAN, *CP_UPDATE, *PETAL]
ROOT = Path(__file__).resolve().parents[1]
#: Tests read records, pages and scripts too, so a copy holds all but what runs and tools leave behind, named in .gitignore;
#: of that the built extension comes along.
BUILT = "*.so"
#: Signals by which the tests' process may die of the mutant itself; others came from outside and say nothing.
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
#: Failures that say the mutant itself is wrong, not that a test found it.
BROKEN = re.compile(r"\b(NameError|SyntaxError|IndentationError|ImportError|ModuleNotFoundError|AttributeError|"
                    r"UnboundLocalError|CompilationError|fixture '\w+' not found)\b")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    mutant: str
    op: str
    verdict: str  # killed | survived | broken
    by: str
    seconds: float


def find(mutant: Mutant, root: Path = ROOT) -> str | None:
    """None if the mutant's text stands exactly once in its file, else what is wrong."""
    path = root / mutant.file
    if not path.exists():
        return f"{mutant.name}: {mutant.file} does not exist"
    count = path.read_text().count(mutant.old)
    if count != 1:
        return f"{mutant.name}: its text occurs {count} times in {mutant.file}, want 1: {mutant.old!r}"
    if mutant.old == mutant.new:
        return f"{mutant.name}: changes nothing"
    return None


def tests_of(mutant: Mutant) -> list[str]:
    hard = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"tests/hard/*_{mutant.op}.py"))
    return list(mutant.tests) or [f"tests/test_{mutant.op}.py", *hard]


def copy_files(folder: Path) -> None:
    """The tree into ``folder``, without what .gitignore names, .git and environments."""
    ignored = ROOT / ".gitignore"  # a source distribution has none
    lines = ignored.read_text().split("\n") if ignored.exists() else ["build", "dist", "__pycache__"]
    names = [line.strip().strip("/") for line in lines if line.strip() and not line.startswith("#")]
    left_out = shutil.ignore_patterns(".git", *(name for name in names if name != BUILT))

    def without(at: str, entries: list[str]) -> set[str]:
        environments = {entry for entry in entries if (Path(at) / entry / "pyvenv.cfg").exists()}
        return left_out(at, entries) | environments

    shutil.copytree(ROOT, folder, ignore=without, ignore_dangling_symlinks=True, dirs_exist_ok=True)


def copy_tree(folder: Path) -> Path:
    copy_files(folder)
    # The package that tests import must be the copy's, whatever is installed.
    probe = f"import fastgist; assert fastgist.__file__.startswith({str(folder)!r}), fastgist.__file__"
    subprocess.run([sys.executable, "-c", probe], cwd=folder, env=child_environment(folder, False), check=True)
    return folder


def child_environment(tree: Path, interpret: bool) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels"), str(tree / "tests")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_INTERPRET": "1" if interpret else "0",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "300",
    }


class Baseline:
    """Which tests pass on the unchanged tree, asked of one test at a time and remembered."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.known: dict[tuple[str, bool], bool] = {}

    def passes(self, test: str, interpret: bool, tree: Path) -> bool:
        key = test, interpret
        if key not in self.known:
            self.known[key] = run_tests(tree, [test], interpret, self.timeout).returncode == 0
        return self.known[key]

    def failing(self) -> list[str]:
        return sorted({test for (test, _), passed in self.known.items() if not passed})


def run_tests(
    tree: Path, tests: list[str], interpret: bool, timeout: float, without: list[str] | None = None
) -> subprocess.CompletedProcess:
    env = child_environment(tree, interpret)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=line"]
    command += [*tests, *(f"--deselect={test}" for test in without or ())]
    return subprocess.run(
        command, cwd=tree, env=env, capture_output=True, text=True, timeout=timeout, check=False, errors="replace"
    )


def judge(done: subprocess.CompletedProcess) -> tuple[str, str, str | None]:
    """(verdict, what decided it, the test that failed) from one run of pytest."""
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", done.stdout, flags=re.MULTILINE)
    if done.returncode == 0:
        return "survived", (done.stdout.strip().splitlines() or [""])[-1], None
    if -done.returncode in CRASHES:
        return "killed", f"the process crashed with signal {-done.returncode}", None
    if done.returncode == 1 and failed:
        test, reason = failed[0]
        if BROKEN.search(reason or ""):
            return "broken", f"{test}: {reason}", None
        return "killed", test.removeprefix("tests/"), test
    return "broken", (done.stdout + done.stderr).strip()[-300:], None


def try_mutant(mutant: Mutant, tree: Path, timeout: float, baseline: Baseline) -> Outcome:
    """Run the mutant's tests until one fails that passes without the mutant."""
    started = time.monotonic()
    path = tree / mutant.file
    original = path.read_text()
    while True:
        try:
            path.write_text(original.replace(mutant.old, mutant.new))
            done = run_tests(tree, tests_of(mutant), mutant.interpret, timeout, baseline.failing())
            verdict, by, test = judge(done)
        except subprocess.TimeoutExpired:
            verdict, by, test = "killed", f"no end within {timeout:.0f} s", None
        finally:
            path.write_text(original)
        if test is None or baseline.passes(test, mutant.interpret, tree):
            return Outcome(mutant.name, mutant.op, verdict, by, round(time.monotonic() - started, 1))


def sample(mutants: list[Mutant], size: int) -> list[Mutant]:
    """``size`` of them, spread over the operations, the same for the same sources."""
    digest = hashlib.sha256()
    for path in sorted({m.file for m in mutants}):
        digest.update((ROOT / path).read_bytes())
    draw = random.Random(digest.hexdigest())
    shuffled = draw.sample(mutants, len(mutants))
    by_file: dict[str, list[Mutant]] = {}
    for mutant in shuffled:
        by_file.setdefault(mutant.file, []).append(mutant)
    taken: list[Mutant] = []
    while len(taken) < min(size, len(mutants)):
        for pending in by_file.values():
            if pending and len(taken) < size:
                taken.append(pending.pop())
    return taken


def check(mutants: list[Mutant], jobs: int, timeout: float, baseline: Baseline) -> list[Outcome]:
    from tqdm import tqdm

    with tempfile.TemporaryDirectory(prefix="fastgist-mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(jobs):
            trees.put(copy_tree(Path(folder) / f"tree{i}"))

        def with_tree(work: Callable[[Path], T]) -> T:
            tree = trees.get()
            try:
                return work(tree)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(jobs) as pool:
            futures = [
                pool.submit(with_tree, lambda tree, m=m: try_mutant(m, tree, timeout, baseline)) for m in mutants
            ]
            done = []
            for future in tqdm(as_completed(futures), total=len(futures), desc="mutants", unit="mutant"):
                done.append(future.result())
                if done[-1].verdict != "killed":
                    tqdm.write(f"{done[-1].verdict}: {done[-1].mutant}")
    order = {m.name: i for i, m in enumerate(mutants)}
    return sorted(done, key=lambda o: order[o.mutant])


def print_table(outcomes: list[Outcome]) -> None:
    width = max(len(o.mutant) for o in outcomes)
    for o in outcomes:
        print(f"{o.verdict:<9} {o.mutant:<{width}} {o.seconds:>6.1f} s  {o.by[:110]}")
    counts = {v: sum(o.verdict == v for o in outcomes) for v in ("killed", "survived", "broken")}
    print(", ".join(f"{n} {v}" for v, n in counts.items()), f"of {len(outcomes)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="try N of them, chosen by a hash of the sources")
    parser.add_argument("--op", action="append", default=[], help="only mutants of this operation (may be repeated)")
    parser.add_argument("--only", default="", help="only mutants whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default 2)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one mutant (default 300)")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file as well")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if (not args.op or m.op in args.op) and args.only in m.name]
    stale = [problem for m in chosen if (problem := find(m))]
    if stale:
        print("stale mutants (bring the list up to date):", *stale, sep="\n  ", file=sys.stderr)
        return 1
    if args.sample:
        chosen = sample(chosen, args.sample)
    if not chosen:
        print("no mutant matches", file=sys.stderr)
        return 2
    if args.list:
        for m in chosen:
            print(f"{m.name:<48} {m.file}: {m.why}")
        return 0
    baseline = Baseline(args.timeout)
    outcomes = check(chosen, args.jobs, args.timeout, baseline)
    print_table(outcomes)
    if broken := baseline.failing():
        print("these tests fail without any mutant, and were left out:", *broken, sep="\n  ", file=sys.stderr)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    return int(bool(broken) or any(o.verdict != "killed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
