"""``pytest benchmarks/ --benchmark-only``: collection of bench_*.py, the ``timed`` fixture, and the results as JSON.

FASTGIST_BENCH_DEVICE=cpu times the CPU on a machine with a GPU. ``--save-results DIR`` puts one JSON an op under
DIR/<device>/ (``--save-results benchmarks/results`` are the committed ones); without it nothing is written.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from benchmarks import floors, harness, problems  # noqa: E402
from benchmarks.cases import CASES, directions, is_first  # noqa: E402
from benchmarks.parity import WITHIN, verdict  # noqa: E402
from benchmarks.peers import OTHER_FUNCTION, PEERS, Missing  # noqa: E402

KIND = os.environ.get("FASTGIST_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
DEVICE = torch.device(KIND)
CLOCK = harness.Clock(DEVICE)
KEPT = KIND == "cpu" and harness.keep_freed_memory()
ROWS = pytest.StashKey[list]()
KEPT_ROWS = pytest.StashKey[list]()
#: (op, provider) -> why a peer that is another package was not timed.
ABSENT = pytest.StashKey[dict]()
#: [the run's configuration, when its rows were last written]
_SESSION: list = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", type=Path, metavar="DIR", help="write <device>/<op>.json under DIR")
    parser.addoption("--resume", action="store_true", help="keep the rows that --save-results has, time the others")
    parser.addoption("--first", action="store_true", help="only the rows that benchmarks/cases.py names in FIRST")
    parser.addoption("--seconds", type=float, default=1.0, help="time spent on each row (default 1)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[ABSENT] = {}
    folder = config.getoption("--save-results", default=None)
    config.stash[KEPT_ROWS] = _earlier(folder) if config.getoption("--resume", default=False) and folder else []


def _row_name(row: dict) -> tuple:
    return tuple(row[name] for name in ("op", "case", "dtype", "direction", "provider"))


def _earlier(folder: Path) -> list[dict]:
    files = sorted((folder / slug()).glob("*.json")) if (folder / slug()).is_dir() else []
    found = [json.loads(file.read_text()) for file in files if file.stem in PEERS]
    return [row for results in found for row in results["rows"]]


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    named = parent.session.isinitpath(file_path)  # pytest itself collects a file that the command line names
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases x providers x directions of the module's OP: a case's rows share its reference, a provider's what it compiled.
    A module may have PROVIDERS of its own, and say with ``wanted(case, provider)`` which of them a case is timed with."""
    if "provider" in metafunc.fixturenames:
        op = metafunc.module.OP
        providers = getattr(metafunc.module, "PROVIDERS", None) or PEERS[op]
        wanted = getattr(metafunc.module, "wanted", lambda case, provider: True)
        first = metafunc.config.getoption("--first")
        have = {_row_name(row) for row in metafunc.config.stash[KEPT_ROWS]}

        def asked(case, direction: str, provider: str) -> bool:
            name = op, case.name, str(case.dtype).removeprefix("torch."), direction, provider
            return name not in have and (not first or is_first(op, case, provider, direction))

        rows = [
            pytest.param(
                case,
                direction,
                provider,
                id=f"{case.id}-{direction}-{provider}",
                marks=pytest.mark.benchmark(group=f"{op}-{direction} {case.id}", timer=CLOCK, disable_gc=True),
            )
            for case in CASES[op, KIND]
            for provider in providers
            for direction in directions(op, KIND, case)
            if wanted(case, provider) and asked(case, direction, provider)
        ]
        metafunc.parametrize(("case", "direction", "provider"), rows)


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark):
    """Call with (op, case, direction, provider): parity first, then the time, then the row of the results."""

    def run(op: str, case, direction: str, provider: str) -> None:
        problem = harness.make_problem(op, case, DEVICE)
        try:
            call = _provider(op, case, provider)
        except Missing as e:
            if "not installed" in str(e):
                request.config.stash[ABSENT][op, provider] = str(e)
            pytest.skip(f"{provider}: {e}")
        row = {"op": op, "case": case.name, "dtype": str(case.dtype).removeprefix("torch."), "direction": direction}
        row |= {"provider": provider, **dict(case.sizes), **measured_by()}
        request.config.stash[ROWS].append(row)
        try:
            row["parity"] = _parity(problem, call, provider, direction)
        except torch.OutOfMemoryError:
            row["parity"] = "out of memory"
            pytest.skip(f"{provider}: out of memory")
        if provider.startswith("fastgist") and row["parity"] != WITHIN:
            pytest.fail(f"not timed, its result is wrong: {row['parity']}")

        step = harness.make_step(problem, call, direction)
        floor, how = floors.floor_seconds(problem, direction)
        row |= floors.roofline(op, case, direction, DEVICE)
        row |= {"floor_s": floor, "floor": how, "peak_bytes": harness.peak_bytes(step, DEVICE)}
        rounds = harness.rounds_for(step, CLOCK, request.config.getoption("--seconds"))
        benchmark.pedantic(CLOCK.timed(step), rounds=rounds, iterations=1, warmup_rounds=2)
        if DEVICE.type == "cuda" and provider.startswith("fastgist"):  # what is left once nothing waits for the host
            row["graph_replay_s"] = harness.graph_replay(step, CLOCK)
        if benchmark.stats is not None:  # None under --benchmark-disable
            stats = benchmark.stats.stats
            low, _, high = statistics.quantiles(stats.data, n=4)
            row |= {"median_s": stats.median, "min_s": stats.min, "spread_s": high - low, "rounds": stats.rounds}
            row["ratio_to_floor"] = stats.median / floor
            row["ratio_to_roofline"] = stats.median / row["roofline_s"]
        row["load_average"] = round(os.getloadavg()[0], 2)
        benchmark.extra_info.update({k: v for k, v in row.items() if k not in ("median_s", "min_s", "spread_s")})

    return run


@functools.lru_cache(maxsize=1)
def _provider(op: str, case, provider: str):
    """Built once for all directions of a case: torch.compile's work is not done again."""
    problem = harness.make_problem(op, case, DEVICE)
    return PEERS[op][provider](harness.given(problem, problem.tensors))


def _parity(problem: problems.Problem, call, provider: str, direction: str) -> str:
    if provider in OTHER_FUNCTION:
        harness.run(problem, call)
        return "another function, there for its cost"
    return verdict(problem, call, PEERS[problem.op][provider], provider.startswith("fastgist"), direction)


# -- results -----------------------------------------------------------------------------------------------------------


def pytest_runtest_logfinish() -> None:
    """The rows so far, twice a minute at most: a run may be cut off."""
    if _SESSION and time.monotonic() > _SESSION[1] + 30:
        save(_SESSION[0])
        _SESSION[1] = time.monotonic()


def pytest_sessionstart(session: pytest.Session) -> None:
    _SESSION[:] = [session.config, time.monotonic()]


def pytest_sessionfinish(session: pytest.Session) -> None:
    save(session.config)


def save(config: pytest.Config) -> None:
    """Write the rows of this run, and those it was told to keep, a file an operation."""
    folder = config.getoption("--save-results", default=None)
    known = [row for row in config.stash[ROWS] if "parity" in row]  # the last may just have begun
    rows = [row for row in known if "median_s" in row or row["parity"] != WITHIN]
    if folder is None or not rows:
        return
    described = environment()
    for op in {row["op"] for row in rows}:
        path = folder / described["device_slug"] / f"{op}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = [row for row in rows if row["op"] == op]
        again = {_row_name(row) for row in mine}
        mine = [r for r in config.stash[KEPT_ROWS] if r["op"] == op and _row_name(r) not in again] + mine
        unfinished = path.with_suffix(".part")
        absent = {name: why for (of, name), why in config.stash[ABSENT].items() if of == op}
        unfinished.write_text(json.dumps({"environment": described, "absent": absent, "rows": mine}, indent=1) + "\n")
        unfinished.replace(path)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = [row for row in config.stash[ROWS] if "roofline_s" in row and "median_s" in row]
    if rows:
        terminalreporter.section("rows beside their rooflines")
        for line in table(rows):
            terminalreporter.write_line(line)
    for (op, provider), why in config.stash[ABSENT].items():
        terminalreporter.write_line(f"{op}: {provider} was not timed: {why}")


def table(rows: list[dict]) -> list[str]:
    """A line a row: time, floor, and the roofline by bytes and by FLOPs, with the ratios to both."""
    head = (
        "op",
        "case",
        "direction",
        "provider",
        "ms",
        "floor",
        "x",
        "MB",
        "bytes ms",
        "GFLOP",
        "FLOPs ms",
        "x",
        "parity",
    )
    cells = [head]
    for r in rows:
        times = [f"{1e3 * r[name]:.4g}" for name in ("median_s", "floor_s", "bytes_s", "flops_s")]
        said = "ok" if r["parity"].startswith(WITHIN) else r["parity"].split(":")[0][:24]
        what = r["op"], f"{r['case']} {r['dtype']}", r["direction"], r["provider"]
        least = (
            f"{r['bytes'] / 1e6:.4g}",
            times[2],
            f"{r['flops'] / 1e9:.4g}",
            times[3],
            f"{r['ratio_to_roofline']:.2f}",
        )
        cells.append((*what, *times[:2], f"{r['ratio_to_floor']:.2f}", *least, said))
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    left = (0, 1, 2, 3, 12)
    return [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str:
    """The commit measured, marked where files differ from it; FASTGIST_COMMIT names it where there is no git."""
    if name := os.environ.get("FASTGIST_COMMIT"):
        return name
    head = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", "fastgist", "kernels", "csrc", "benchmarks/*.py")
    return "unknown" if head is None else head + ("-modified" if changed else "")


@functools.cache
def measured_by() -> dict[str, str]:
    """What stands in each row, since a file keeps rows of several runs."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"commit": commit(), "date": today, "torch": torch.__version__}


def slug() -> str:
    """The device's folder."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu {_cpu_model()}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def environment() -> dict[str, object]:
    found: dict[str, object] = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit()}
    if DEVICE.type == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {"device": torch.cuda.get_device_name(), "driver": driver, "ceilings": floors.ceilings(DEVICE)}
        found |= {"timing": "CUDA events, L2 flushed before each call, median"}
    else:
        found |= {"device": _cpu_model(), "threads": torch.get_num_threads(), "cpu_capability": _capability()}
        allocator = "freed memory kept by malloc (mallopt)" if KEPT else "malloc as it comes"
        found["ceilings"] = floors.cpu_ceilings()
        found |= {"timing": f"CPU wall clock, median; {allocator}; load_average stands beside each row"}
    found["device_slug"] = slug()
    found["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("fastgist", "triton", "liger_kernel", "peft"):
        try:
            found["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()
