"""The Python of the pages: what can run without a network runs, and gives what its comments say; the rest is Python at least.

A block stands alone, with imports of its own, unless its first line is a comment with CONTINUES in it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as nnF

import fastgist.functional as F

ROOT = Path(__file__).parents[1]
CONTINUES = "goes on from"
#: Page -> whose blocks are run. Of the others a model or data would have to be downloaded.
RUN = ("docs/losses.md",)
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def containing(page: str, text: str) -> str:
    (found,) = [block for block in blocks(page) if text in block]
    return found


def run(code: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    names = {} if names is None else names
    exec(compile(code, "<snippet>", "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_python(page) -> None:
    for block in blocks(page):
        compile(block, page, "exec")


@pytest.mark.parametrize("page", RUN)
def test_blocks_run_in_their_order(page) -> None:
    names: dict[str, Any] = {}
    for block in blocks(page):
        if "torchrun" not in block:
            names = run(block, names if CONTINUES in block.splitlines()[0] else None)


def kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    q = (teacher / temperature).log_softmax(-1)
    return (q.exp() * (q - (student / temperature).log_softmax(-1))).sum(-1)


def test_distillation_is_one_directions_divergence() -> None:
    got = run(containing("docs/losses.md", "interaction="))
    student, teacher, y = got["student"].detach(), got["teacher"], got["y"]
    want = nnF.cross_entropy(student, y) + 0.9 * 4 * kl(teacher, student, 2.0).mean()
    torch.testing.assert_close(got["loss"](student, teacher, y), want)
    got = run(containing("docs/losses.md", "all_of_it"))
    student, teacher, dense = got["student"].detach(), got["teacher"], got["all_of_it"]
    options = {"temperature": 2.0, "direction": "forward", "t_squared": True}
    torch.testing.assert_close(F.topk_kl(student, *dense, **options), 4 * kl(teacher, student, 2.0).mean())


def test_r_drop_with_a_head_is_r_drop() -> None:
    from fastgist.recipes.mutual import r_drop

    got = run(containing("docs/losses.md", "of two passes"))
    z, other = (got["head"](got[name]).detach() for name in ("hidden", "other_hidden"))
    torch.testing.assert_close(got["loss"].detach(), r_drop(z, other, got["y"], got["weight"]))
    both = nnF.cross_entropy(z, got["y"]) + nnF.cross_entropy(other, got["y"])
    want = both + got["weight"] * F.bidirectional_kl(z, other) / 2
    torch.testing.assert_close(got["loss"].detach(), want)


@pytest.mark.slow
def test_a_shared_head_on_two_ranks(tmp_path) -> None:
    (tmp_path / "head.py").write_text(containing("docs/losses.md", "torchrun"))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "head.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op", ["bidirectional_kl", "gist_loss", "gist_linear_loss", "topk_kl"])
def test_what_the_page_says_is_refused(op) -> None:
    z, other, y = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5), torch.randint(5, (6,))
    head, top = torch.randn(7, 5), other.log_softmax(-1).topk(2)
    call = {
        "bidirectional_kl": lambda z: F.bidirectional_kl(z, other),
        "gist_loss": lambda z: F.gist_loss(z, other, y),
        "gist_linear_loss": lambda z: F.gist_linear_loss(z, other, head, None, y),
        "topk_kl": lambda z: F.topk_kl(z, top.values, top.indices),
    }[op]
    with pytest.raises(RuntimeError, match=r"second derivative.*fastgist\.reference"):
        torch.autograd.grad(call(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="transforms"):
        torch.func.grad(call)(z.detach())


def test_a_mask_of_integers_gets_the_hint() -> None:
    from fastgist.distributed import mean_divisor

    z, other, mask = torch.randn(6, 5), torch.randn(6, 5), torch.ones(6, dtype=torch.int64)
    top = other.log_softmax(-1).topk(2)
    calls = (
        lambda: F.bidirectional_kl(z, other, mask=mask),
        lambda: F.topk_kl(z, top.values, top.indices, mask=mask),
        lambda: mean_divisor(mask),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"bool .*mask\.bool\(\).*got torch.int64"):
            call()
