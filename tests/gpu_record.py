"""A pytest plug-in for runs that may be cut off (``scripts/gpu.py --budget``): ``-p gpu_record --record FILE``.

Each test's verdict is a line of FILE as soon as it is known. ``--done FILE`` names tests, one a line, that are left out: those
that an earlier run showed to pass. A process of pytest-xdist whose GPU context is broken (an illegal access breaks it for
good) ends before its next test, and another takes its place: else every test behind the fault would fail with it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

BROKEN = "CUDA error"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="append a JSON line for each test to this file")
    parser.addoption("--done", type=Path, help="leave out the tests that this file names")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Record(config), "gpu_record_of_this_run")


class _Record:
    def __init__(self, config: pytest.Config) -> None:
        self.is_worker = hasattr(config, "workerinput")
        self.file = None if self.is_worker else config.getoption("--record")
        done = config.getoption("--done")
        self.done = set(done.read_text().splitlines()) if done is not None and done.exists() else set()
        self.left_out = 0
        self.broken = False

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        out = [item for item in items if item.nodeid in self.done]
        items[:] = [item for item in items if item.nodeid not in self.done]
        self.left_out = len(out)
        if out:
            config.hook.pytest_deselected(items=out)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> None:
        if self.broken:
            sys.stderr.flush()
            os._exit(3)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.is_worker:
            self.broken = self.broken or (report.failed and BROKEN in report.longreprtext and _context_is_broken())
        elif self.file is not None and (report.when == "call" or report.outcome != "passed"):
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.failed:
                row["said"] = report.longreprtext[-1500:]
            with self.file.open("a") as f:
                f.write(json.dumps(row) + "\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.left_out:
            session.exitstatus = pytest.ExitCode.OK  # all of them have passed before


def _context_is_broken() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
