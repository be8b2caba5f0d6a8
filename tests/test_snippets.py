"""The Python of the pages: what can run without a network runs, and gives what its comments say; the rest is Python at least.

A block stands alone, with imports of its own, unless its first line is a comment with CONTINUES in it, or one that says what
a name is that the block does not make.
"""

from __future__ import annotations

import ast
import builtins
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as nnF

import fastgist.functional as F

ROOT = Path(__file__).parents[1]
CONTINUES = "goes on from"
#: Pages whose blocks are run, all but those with one of these in them: something would be downloaded, or ranks started.
RUN = ("README.md", "docs/losses.md")
APART = ("from_pretrained", "torchrun")
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


def missing(block: str) -> set[str]:
    """Names that are read and that nothing in the block binds."""
    nodes = list(ast.walk(ast.parse(block)))
    names = [n for n in nodes if isinstance(n, ast.Name)]
    bound = {n.id for n in names if not isinstance(n.ctx, ast.Load)} | set(dir(builtins))
    bound |= {
        (a.asname or a.name).split(".")[0] for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
    }
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    return {n.id for n in names if isinstance(n.ctx, ast.Load)} - bound


@pytest.mark.parametrize("page", PAGES)
def test_every_name_is_made_or_said(page) -> None:
    for block in blocks(page):
        first = block.splitlines()[0]
        if not (first.startswith("#") and CONTINUES in first):
            unsaid = {name for name in missing(block) if not re.search(rf"^#.*\b{name}\b", first)}
            assert not unsaid, f"{page}: {unsaid} in\n{block}"


def test_what_is_missing_is_found() -> None:
    assert missing("import a.b as c\nx = [i for i in c]\nf = lambda q: q + x + y\nprint(a)") == {"y", "a"}


@pytest.fixture
def small_models(monkeypatch, tmp_path) -> None:
    """timm's names give a small model, the same each time; a run of 2 classes lies in run/adapter."""
    timm = pytest.importorskip("timm")
    import fastgist

    make = timm.create_model

    def create_model(name: str, pretrained: bool, num_classes: int) -> torch.nn.Module:
        assert name == "vit_base_patch16_224" and pretrained
        torch.manual_seed(0)
        return make("vit_tiny_patch16_224", pretrained=False, num_classes=num_classes, depth=2, embed_dim=48)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    adapted = fastgist.get_peft_model(create_model("vit_base_patch16_224", True, 2), fastgist.AdapterConfig())
    fastgist.save_adapter(adapted, "run/adapter")


@pytest.mark.parametrize("page", RUN)
def test_blocks_run_in_their_order(page, small_models) -> None:
    names: dict[str, Any] = {}
    for block in blocks(page):
        if not any(word in block for word in APART):
            names = run(block, names if CONTINUES in block.splitlines()[0] else None)


def test_the_first_block_trains_and_comes_back(small_models) -> None:
    first, second = blocks("README.md")[:2]
    names = run(first)
    images, target = torch.randn(2, 3, 224, 224), torch.tensor([3, 9])
    names["loss_fn"](names["model"].train()(images), target).backward()
    assert names["model"].gist.token.grad.abs().sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = run(second, names)
    with torch.no_grad():
        torch.testing.assert_close(names["fresh"].eval()(images).logits, names["model"].eval()(images).logits)


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
