"""benchmarks/resources.csv says of each row what it was compiled from, so that ``make test`` need not compile it again. Here:
a row is compiled whenever it could come out otherwise, and the table cannot say what no compiler said."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from fastgist_kernels import aot, aot_gates

ROOT = Path(__file__).parents[2]
RESOURCES = ROOT / "benchmarks" / "resources.csv"


# -- digests ----------------------------------------------------------------------------------------------------------


def _inputs(kernels: Path, out: Path, hash_seed: int) -> dict[tuple[str, int], str]:
    """Digests of topk_kl's rows, of the sources in ``kernels``, found by a process of its own."""
    env = os.environ | {"PYTHONPATH": str(kernels), "PYTHONHASHSEED": str(hash_seed)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "fastgist_kernels.aot", "--plan", "--only", "_topk_kl", "--json", str(out)]
    done = subprocess.run(command, env=env, cwd=out.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {(row["kernel"], row["arch"]): row["inputs"] for row in json.loads(out.read_text())}


def _edit(kernels: Path, file: str, old: str, new: str) -> None:
    path = kernels / "fastgist_kernels" / file
    text = path.read_text()
    assert text.count(old) == 1, (file, old)
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> dict[tuple[str, int], str]:
    return _inputs(ROOT / "kernels", tmp_path_factory.mktemp("here") / "rows.json", 1)


@pytest.fixture
def copy(tmp_path) -> Path:
    shutil.copytree(ROOT / "kernels", tmp_path / "elsewhere", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "elsewhere"


def test_lines_comments_and_folders_change_no_digest(here, copy, tmp_path):
    """Or every row would be compiled after every edit, and on every machine."""
    for file in ("common.py", "pair_rows.py", "topk_kl.py"):
        _edit(
            copy, file, "from __future__ import annotations\n", "from __future__ import annotations\n\n# longer\n\n\n"
        )
    _edit(copy, "topk_kl.py", "    largest = tl.full", "    # of all tiles\n\n    largest = tl.full")
    assert _inputs(copy, tmp_path / "rows.json", 2) == here
    assert len(set(here.values())) == len(here) >= 50, "two rows have one digest"


def test_a_changed_helper_changes_the_digests_of_all_that_call_it(here, copy, tmp_path):
    """finite_max stands in another file, and the forward calls it itself and by way of rest_of_row."""
    _edit(
        copy,
        "pair_rows.py",
        'return tl.where(m == float("-inf"), 0.0, m)',
        'return tl.where(m == float("-inf"), 1.0, m)',
    )
    found = _inputs(copy, tmp_path / "rows.json", 1)
    assert found.keys() == here.keys()
    changed = {key for key, digest in found.items() if digest != here[key]}
    assert changed == {key for key in here if key[0].startswith("_topk_kl_fwd_kernel")}


def test_a_changed_constant_changes_the_digests_of_all_that_take_it(here, copy, tmp_path):
    _edit(copy, "common.py", "tl.constexpr(1.4426950408889634)", "tl.constexpr(1.5)")
    found = _inputs(copy, tmp_path / "rows.json", 1)
    takes = ("_topk_kl_fwd_kernel", "_topk_kl_bwd_rest_kernel")
    assert {key for key, digest in found.items() if digest != here[key]} == {
        key for key in here if key[0].startswith(takes)
    }


def test_all_that_decides_is_in_a_digest(monkeypatch, tmp_path):
    spec = next(s for s in aot.all_specs() if s.kernel.fn.__name__ == "_scale_unless_one_kernel")
    other = next(s for s in aot.all_specs() if s.kernel is spec.kernel and s.label != spec.label)
    known = aot.inputs(spec, 90)
    assert aot.inputs(spec, 90) == known
    assert aot.inputs(spec, 80) != known != aot.inputs(other, 90)
    for change in (
        {"num_warps": 2 * spec.num_warps},
        {"num_stages": spec.num_stages + 1},
        {"matrix": not spec.matrix},
        {"wide": not spec.wide},
        {"numbers": spec.numbers + 1},
        {"results": spec.results + 1},
        {"accesses": spec.accesses + 1},
        {"unaligned": tuple(name for name, kind in spec.signature.items() if kind.startswith("*"))[:1]},
        {"constexprs": {name: 2 * value for name, value in spec.constexprs.items() if name.startswith("BLOCK")}
         | {name: value for name, value in spec.constexprs.items() if not name.startswith("BLOCK")}},
    ):  # fmt: skip
        assert aot.inputs(dataclasses.replace(spec, **change), 90) != known, change
    with monkeypatch.context() as patch:
        patch.setattr(aot.triton, "__version__", "0.0.0")
        assert aot.inputs(spec, 90) != known
    gates = tmp_path / "aot_gates.py"
    gates.write_text(
        Path(aot_gates.__file__).read_text().replace("TENSOR_MEMORY_LIMIT = 512", "TENSOR_MEMORY_LIMIT = 511")
    )
    monkeypatch.setattr(aot_gates, "__file__", str(gates))
    assert aot.inputs(spec, 90) != known, "rows that passed other gates"


# -- the table --------------------------------------------------------------------------------------------------------


def _broken(table: list[dict[str, str]]) -> list[str]:
    """Rows that no compiler wrote as they stand."""
    return [
        f"{row['kernel']} sm_{row['arch']}, Triton {row['triton']}" for row in table if row["seal"] != aot.seal(row)
    ]


def test_the_table_stands_as_it_was_written():
    table = aot.read_csv(RESOURCES)
    assert table and tuple(table[0]) == aot.COLUMNS
    assert _broken(table) == [], "edited by hand: 'make aot UPDATE=1' writes what a compiler says"
    assert not [row["kernel"] for row in table if not row["inputs"]], "recorded though they fail a gate"


def _figures(**changes: int) -> dict[str, int]:
    return dict.fromkeys(aot.FIGURES, 0) | {"registers": 32} | changes


def _written(tmp_path: Path, rows: list[dict]) -> Path:
    path = tmp_path / "resources.csv"
    aot.update_csv(path, rows)
    return path


def _row(kernel: str, arch: int, inputs: str = "0123456789abcdef", **more) -> dict:
    row = {
        "triton": "0.0",
        "kernel": kernel,
        "arch": arch,
        "inputs": inputs,
        "matrix": False,
        "gates": [],
        "narrow": [],
    }
    return row | {"compiled": False, "drawn": False} | more


LOOKED = {"compiled": True, "tensor_memory": 0, "atomics": [], "undefined": []}


def _compiled(kernel: str, arch: int, **more) -> dict:
    return _row(kernel, arch, **_figures(), **LOOKED) | more


NAMES = [(f"_{letter}_kernel[bf16]", arch) for letter in "abcdefgh" for arch in (80, 90)]


def _to_compile(path: Path, rows: list[dict]) -> set[tuple[str, int]]:
    """What compile_all would compile of ``rows`` for the table's sake alone."""
    aot._settle(rows, aot.read_csv(path))
    return {(row["kernel"], row["arch"]) for row in rows if "registers" not in row}


def test_rows_of_other_inputs_are_compiled_and_those_that_the_table_lacks(tmp_path):
    path = _written(tmp_path, [_compiled(*name) for name in NAMES])
    assert _to_compile(path, [_row(*name) for name in NAMES]) == set()
    rows = [_row(*name) for name in NAMES]
    rows[3]["inputs"] = "another"
    rows.append(_row("_new_kernel[bf16]", 80))
    assert _to_compile(path, rows) == {NAMES[3], ("_new_kernel[bf16]", 80)}
    assert all(row["registers"] == 32 for row in rows if row["inputs"] != "another" and "new" not in row["kernel"])
    for row in rows:
        row["triton"] = "0.1"
        row.pop("registers", None)
    assert len(_to_compile(path, rows)) == len(rows), "another Triton"


@pytest.mark.parametrize(
    ("old", "new"), [(",32,", ",31,"), ("0123456789abcdef", "fedcba9876543210"), (",80,", ",100,")]
)
def test_a_row_changed_by_hand_is_noticed_and_compiled(tmp_path, old, new):
    path = _written(tmp_path, [_compiled(*name) for name in NAMES])
    assert _broken(aot.read_csv(path)) == []
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("0.0,_c_kernel[bf16],80"))
    lines[at] = lines[at].replace(old, new)
    path.write_text("\n".join(lines) + "\n")
    assert len(_broken(aot.read_csv(path))) == 1
    assert _to_compile(path, [_row(*name) for name in NAMES]) == {("_c_kernel[bf16]", 80)}


FAULTS = {
    "shared": {"shared": 164 * 1024},
    "spills": {"spill_stores": 1},
    "tensor_memory": {"tensor_memory": 513},
    "atomics": {"atomics": ["RED.E.ADD.F32"]},
    "undefined": {"undefined": ["UIADD3 UR14, UP0, UR14, 0x20, URZ"]},
    "narrow": {"narrow": ["tt.addptr"]},
    "accesses": {"wide_accesses": [1, 2]},
    "matrix": {"matrix": True, "arch": 90},
}


@pytest.mark.parametrize("gate", FAULTS)
def test_a_row_that_fails_a_gate_is_compiled_every_time(tmp_path, gate):
    """Else it would fail once, in the run that writes it down, and never be looked at again."""
    row = _compiled("_a_kernel[bf16]", 80) | FAULTS[gate]
    assert set(aot_gates.faults(row)) == {gate}
    path = _written(tmp_path, [row, _compiled("_b_kernel[bf16]", 80)])
    assert {was["kernel"]: was["inputs"] != "" for was in aot.read_csv(path)} == {
        "_a_kernel[bf16]": False,
        "_b_kernel[bf16]": True,
    }
    assert _to_compile(path, [_row(row["kernel"], row["arch"]), _row("_b_kernel[bf16]", 80)]) == {
        (row["kernel"], row["arch"])
    }


def test_two_accesses_of_too_few_bytes_are_a_fault():
    assert aot_gates.faults(_compiled("_a_kernel[bf16]", 80, narrow_accesses=["LDG.E.64"]))["accesses"] == "LDG.E.64"
    assert aot_gates.faults(_compiled("_a_kernel[bf16]", 80, narrow_accesses=[], wide_accesses=[2, 2])) == {}
    assert "tensor_memory" in aot_gates.faults(_compiled("_a_kernel[bf16]", 100, registers=4))


# -- the sample -------------------------------------------------------------------------------------------------------


def test_the_sample_is_fixed_large_enough_and_of_every_kind():
    rows = [
        _row(f"_{letter}_kernel[{dtype}_{tile}]", arch, gates=["wide"] if tile % 2 else [])
        for letter in "abc" for dtype in ("bf16", "fp32") for tile in range(60) for arch in (80, 90, 100)
    ]  # fmt: skip
    taken = aot.drawn(rows, "seed")
    assert taken == aot.drawn(rows, "seed") and len(taken) == len({(r["kernel"], r["arch"]) for r in taken})
    assert len(taken) == len(rows) // 10
    assert {(r["kernel"], r["arch"]) for r in taken} != {(r["kernel"], r["arch"]) for r in aot.drawn(rows, "another")}
    for kind in (lambda r: (r["kernel"][:3], r["arch"], *r["gates"]), lambda r: (r["kernel"][:15], *r["gates"])):
        assert {str(kind(r)) for r in taken} == {str(kind(r)) for r in rows}
    assert aot.drawn([], "seed") == []


def test_another_text_is_another_seed(monkeypatch, copy):
    seed = aot.sources_digest()
    monkeypatch.setattr(aot, "__file__", str(copy / "fastgist_kernels" / "aot.py"))
    assert aot.sources_digest() == seed
    _edit(copy, "pieces.py", '"""Up to three', '"""Up  to three')
    assert aot.sources_digest() != seed
