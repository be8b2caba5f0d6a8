"""Fixtures shared by all tests. One test body serves every implementation:

- the ordinary run takes ``reference`` and, where it is built, ``native`` (CPU);
- the interpreter run (TRITON_INTERPRET=1) takes ``triton`` on CPU tensors;
- on a GPU (FASTGIST_TEST_DEVICE=cuda) it takes ``triton``, ``cuda`` where built, and ``reference``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastgist import backends

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = os.environ.get("FASTGIST_TEST_DEVICE", "cpu")

if DEVICE == "cpu":
    torch.set_num_threads(int(os.environ.get("FASTGIST_TEST_THREADS", "1")))  # two pytest workers share two cores


def implementations(op: str) -> list[str]:
    """The implementations of ``op`` that this run checks."""
    if INTERPRETING:
        return ["triton"]
    wanted = ["reference", "native"] if DEVICE == "cpu" else ["reference", "triton", "cuda"]
    probe = torch.empty(1, device=DEVICE)
    found = []
    for name in wanted:
        try:
            found.append(backends.resolve(op, name, probe))
        except RuntimeError:
            continue
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``impl`` becomes each implementation of the op that the module names as OP (or the test's ``op`` mark)."""
    if "impl" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("op")
        op = mark.args[0] if mark else metafunc.module.OP
        metafunc.parametrize("impl", implementations(op))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes ``impl`` runs kernels: it belongs to the ``kernel`` selection."""
    for item in items:
        if "impl" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.kernel)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three digits in train, val and test folders; a test that changes them takes a copy."""
    pytest.importorskip("sklearn")
    from images import write_digits

    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Fresh numbers for every test, the same on every run (FASTGIST_TEST_SEED shifts them all)."""
    name = request.node.nodeid
    torch.manual_seed(int(os.environ.get("FASTGIST_TEST_SEED", "0")) * 1_000_003 + sum(map(ord, name)))
