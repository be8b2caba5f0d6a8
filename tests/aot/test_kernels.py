"""Every Triton kernel compiled for sm_80, sm_90 and sm_100 without a GPU, under the installed Triton and the oldest
one supported, and what the compiler made of it held against limits and against benchmarks/resources.csv.

The table has a digest of what each row was compiled from (aot.inputs), and none for a row that failed a gate. Compiled are all
rows whose digest is another now, and a sample of the others, which has to give the very figures of the table: it is what says
that the digests leave nothing out. ``AOT_ALL=1`` (``make aot``) compiles everything.

Each Triton compiles in a process of its own (two do not fit in one); what it found is kept in build/ until a kernel or the
table changes, and its cache beside it, so a rerun is quick.
``UPDATE=1 pytest tests/aot`` (``make aot UPDATE=1``) rewrites the table: commit it with the change that moved it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

import triton
import triton.language as tl

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
RESOURCES = ROOT / "benchmarks" / "resources.csv"
OLDEST = "3.6.0"
ALL = os.environ.get("AOT_ALL", "0") not in ("", "0")
REGENERATE = "if this is meant, rewrite the table with 'make aot UPDATE=1' and commit it"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@triton.jit
def _narrow_offset_kernel(x_ptr, stride_xm, BLOCK: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs_m * stride_xm, 0.0)


@triton.jit
def _late_cast_kernel(x_ptr, stride_xm, BLOCK: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + (offs_m * stride_xm).to(tl.int64), 0.0)


@triton.jit
def _wide_offset_kernel(x_ptr, stride_xm, BLOCK: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs_m * stride_xm, 0.0)


@triton.jit
def _adding_kernel(x_ptr, stride_xm, BLOCK: tl.constexpr):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(x_ptr + offs_m % 7 * stride_xm, 1.0)


def _compiled_apart(script: str) -> str:
    """What ``script`` prints in a process of its own: under TRITON_INTERPRET the functions above are not compilable."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_kernels\n{script}"
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _oldest_triton() -> Path:
    """The folder of Triton 3.6.0 unpacked, fetched once. It installs beside any torch: --target keeps it apart."""
    folder = BUILD / f"triton-{OLDEST}"
    if not (folder / "triton" / "backends" / "nvidia" / "bin" / "ptxas").exists():
        new = folder.with_name(f"{folder.name}-{os.getpid()}")
        command = [*"-m pip install -q --no-deps --target".split(), str(new), f"triton=={OLDEST}"]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(new, ignore_errors=True)
            pytest.skip(f"Triton {OLDEST} could not be fetched: {done.stderr.strip().splitlines()[-1:]}")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return folder


def _compile(version: str) -> list[dict]:
    """One row a spec and architecture; kept in build/ until a source or the table changes. One process at a time compiles."""
    BUILD.mkdir(exist_ok=True)
    sources = [*sorted((ROOT / "kernels" / "fastgist_kernels").glob("*.py")), RESOURCES]
    triton_version = OLDEST if version == "oldest" else triton.__version__
    told = [triton_version.encode(), str(ALL).encode(), *(f.read_bytes() for f in sources)]
    key = hashlib.sha256(b"".join(told)).hexdigest()
    out = BUILD / f"aot-{version}.json"
    with (BUILD / f"aot-{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists():
            kept = json.loads(out.read_text())
            if kept["key"] == key:
                return kept["rows"]
        path = [str(ROOT), str(ROOT / "kernels")]
        if version == "oldest":
            path.insert(0, str(_oldest_triton()))
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
            "TRITON_CACHE_DIR": str(BUILD / f"triton-cache-{version}"),
            "OMP_NUM_THREADS": "1",
        }
        env.pop("TRITON_INTERPRET", None)
        fresh = BUILD / f"aot-{version}-new.json"
        command = [sys.executable, "-m", "fastgist_kernels.aot", "--jobs", "2", "--json", str(fresh)]
        command += [] if ALL else ["--table", str(RESOURCES)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"the kernels do not compile under Triton {triton_version}:\n{done.stderr[-4000:]}")
        rows = json.loads(fresh.read_text())
        fresh.unlink()
        out.write_text(json.dumps({"key": key, "rows": rows}))
    return rows


@pytest.fixture(scope="module", params=["installed", "oldest"])
def rows(request) -> list[dict]:
    if request.param == "oldest" and triton.__version__ == OLDEST:
        pytest.skip(f"the installed Triton is {OLDEST} itself")
    found = _compile(request.param)
    if os.environ.get("UPDATE") == "1":
        from fastgist_kernels.aot import update_csv

        with (BUILD / "resources.lock").open("w") as lock:  # several processes may run this
            fcntl.flock(lock, fcntl.LOCK_EX)
            update_csv(RESOURCES, found)
    return found


def _label(row: dict) -> str:
    return f"{row['kernel']} sm_{row['arch']}, Triton {row['triton']}"


def _fail(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems))


def _hold(rows: list[dict], gate: str) -> None:
    """None of ``rows`` has a fault of this gate."""
    from fastgist_kernels.aot_gates import faults

    _fail([f"{_label(row)}: {found[gate]}" for row in rows if gate in (found := faults(row))])


def test_every_kernel_has_a_spec():
    from fastgist_kernels import aot

    assert aot.SHARED_LIMIT == SHARED_LIMIT
    assert aot.ARCHITECTURES == (80, 90, 100)
    specs = aot.all_specs()
    have = {spec.kernel.fn.__qualname__ for spec in specs}
    missing = [kernel.fn.__qualname__ for kernel in aot.all_kernels() if kernel.fn.__qualname__ not in have]
    assert not missing, f"kernels without an ahead-of-time spec: {missing}"
    names = [spec.name for spec in specs]
    assert len(names) == len(set(names)), "two specs share a name"
    tiles = aot.every_tile()
    launched, chosen = {tile.name for tile in tiles}, {id(tile.kernel) for tile in tiles}
    sampled = {spec.name for spec in specs if id(spec.kernel) in chosen}
    assert sampled <= launched, f"tiles that no launch takes: {sorted(sampled - launched)}"
    # Found by their name alone, so a kernel under another name would escape: every jit function says which it is.
    for module in aot.MODULES:
        source = (ROOT / "kernels" / "fastgist_kernels" / f"{module}.py").read_text()
        launched = {line.split("[")[0].strip() for line in source.splitlines() if "_kernel[" in line}
        assert launched <= have, f"{module} launches {launched - have}, which have no spec"


def test_all_are_there_and_enough_were_compiled(rows):
    from fastgist_kernels import aot

    want = [(s.name, a) for s in aot.all_specs() for a in s.archs]
    assert [(r["kernel"], r["arch"]) for r in rows] == want
    assert all(r["compiled"] for r in rows if r["drawn"])
    kept = [r for r in rows if not r["compiled"]]
    assert sum(r["drawn"] for r in rows) >= aot.SAMPLED * (len(kept) + sum(r["drawn"] for r in rows))
    compiled = {(r["kernel"].split("[")[0], r["arch"]) for r in rows if r["compiled"]}
    assert compiled == {(name.split("[")[0], arch) for name, arch in want}, "every kernel, on every architecture it has"
    assert not (ALL and kept)


def test_shared_memory_fits(rows):
    _hold(rows, "shared")


def test_tensor_memory_fits(rows):
    """Triton 3.6 doubles the accumulators of a persistent kernel: one tile of 128 x 256 and h were 528 columns, of 512 that
    are there, and became a kernel of four registers."""
    _hold(rows, "tensor_memory")
    assert any(row.get("tensor_memory") for row in rows), "no kernel was looked at"


def test_nothing_spills(rows):
    """Not even where the table says it did: a kernel that spills wants a smaller tile."""
    _hold(rows, "spills")


def _unlike(rows: list[dict], table: list[dict[str, str]]) -> list[str]:
    """Where ``table`` says of ``rows``, all those of one Triton, what they are not."""
    from fastgist_kernels import aot

    known = {(r["kernel"], int(r["arch"])): r for r in table if r["triton"] == rows[0]["triton"]}
    problems = []
    for row in rows:
        was = known.pop((row["kernel"], row["arch"]), None)
        if was is None:
            problems.append(f"{_label(row)} is not in {RESOURCES.name}: {REGENERATE}")
        elif moved := [f"{f} {row[f]}, the table has {was[f]}" for f in aot.FIGURES if str(row[f]) != was[f]]:
            what = f"{_label(row)}: {', '.join(moved)}"
            problems.append(
                f"{what}, of the same digest: aot.inputs lacks it" if row["drawn"] else f"{what}: {REGENERATE}"
            )
    problems += [f"{kernel} sm_{arch} is in {RESOURCES.name} and no spec: {REGENERATE}" for kernel, arch in known]
    return problems


def test_figures_are_those_of_the_table(rows):
    """Of all that was compiled, to the last register. What was drawn though nothing changed shows that digests say enough."""
    from fastgist_kernels import aot

    table = aot.read_csv(RESOURCES)
    if all(row["triton"] != rows[0]["triton"] for row in table):
        pytest.skip(f"the table has no rows of Triton {rows[0]['triton']}")
    _fail(_unlike(rows, table))
    changed = [row for row in rows if row["compiled"] and not row["drawn"]]
    if changed and not ALL:
        warnings.warn(
            f"{len(changed)} rows of other inputs than the table's were compiled, and have its figures: "
            "'make aot UPDATE=1' spares the next run that", stacklevel=1,
        )  # fmt: skip


def test_another_figure_is_noticed():
    from fastgist_kernels import aot

    table = [{"triton": "0.0", "kernel": name, "arch": "80", **dict.fromkeys(aot.FIGURES, "1")} for name in "abc"]
    rows = [row | dict.fromkeys(aot.FIGURES, 1) | {"arch": 80, "drawn": row["kernel"] == "a"} for row in table]
    assert _unlike(rows, table) == []
    rows[0]["registers"], rows[1]["shared"] = 2, 0
    assert [("digest" in p, "UPDATE=1" in p) for p in _unlike(rows, table)] == [(True, False), (False, True)]
    assert "not in" in _unlike(rows[2:], [])[0] and "no spec" in _unlike(rows[2:], table[1:])[0]


def test_matrix_kernels_use_hopper_instructions(rows):
    _hold(rows, "matrix")
    assert any(row["matrix"] and row["arch"] == 90 and row["compiled"] for row in rows)


def test_streaming_kernels_move_16_bytes_at_a_time(rows):
    _hold(rows, "accesses")
    for kernel in ("_bidirectional_kl", "_gist_loss", "_topk_kl_bwd_rest", "_scale_unless_one"):
        for dtype in ("bf16", "fp16", "fp32"):
            looked = [
                r
                for r in rows
                if r["kernel"].startswith(kernel)
                and {"narrow_accesses", "wide_accesses"} & r.keys()
                and dtype in r["kernel"]
            ]
            assert looked, f"no {kernel} of {dtype} was looked at"
    assert any("wide_accesses" in r and "_topk_kl_fwd" in r["kernel"] for r in rows)


def test_the_width_check_finds_a_narrow_access():
    from fastgist_kernels.aot_gates import narrow_accesses, wide_accesses

    sass = "LDG.E.128 R4, desc[UR4][R2.64] ;\nSTG.E.U16 desc[UR4][R2.64], R4 ;\nLDG.E R5, desc[UR4][R2.64] ;\n"
    assert narrow_accesses(sass) == ["STG.E.U16", "LDG.E"]
    assert wide_accesses(sass) == 1
    assert wide_accesses("LDG.E.EF.128.CONSTANT R4 ;\nSTG.E.ENL2.256 desc ;\nLDG.E.64 R2 ;\nLDS.128 R4 ;") == 3


def test_no_uniform_register_is_read_before_it_is_written(rows):
    """ptxas 12.8 builds matrix descriptors on such registers: wrong results on the card, and nowhere else to be seen."""
    _hold(rows, "undefined")


def test_nothing_is_added_up_by_atomics(rows):
    """Programs that add to one place do so in whatever order they come: another result at each run."""
    _hold(rows, "atomics")
    kernels = {row["kernel"].split("[")[0] for row in rows if row["arch"] == 90 and row["compiled"]}
    for layer, at_least in (("_cp_linear", 8), ("_cp_update", 1), ("_adapter", 7), ("_outer", 2)):
        assert sum(name.startswith(layer) for name in kernels) >= at_least, layer


@pytest.mark.parametrize(("kernel", "caught"), [("_adding_kernel", True), ("_wide_offset_kernel", False)])
def test_the_atomics_check_catches_a_sum_of_many_programs(kernel, caught):
    script = (
        "from fastgist_kernels.aot import Spec, compile_spec\nfrom fastgist_kernels.aot_gates import atomic_sums, resources\n"
        f"spec = Spec(test_kernels.{kernel}, 'x', {{'x_ptr': '*fp32', 'stride_xm': 'i64'}}, {{'BLOCK': 128}})\n"
        "print(*(bool(atomic_sums(resources(compile_spec(spec, arch))[1])) for arch in (80, 90, 100)))\n"
    )
    assert _compiled_apart(script) == " ".join([str(caught)] * 3)


def test_bits_in_shared_memory_are_no_sum():
    from fastgist_kernels.aot_gates import atomic_sums

    sass = "ATOMS.OR RZ, [UR4], R2 ;\nATOMS.AND RZ, [UR4], R2 ;\nREDUX.SUM UR4, R2 ;\nRED.E.ADD.F32 [R2], R4 ;\n"
    assert atomic_sums(sass) == ["RED.E.ADD.F32"]
    assert atomic_sums("ATOMG.E.ADD.F32 PT, R1, [R2], R4 ;\nATOMS.ADD R1, [UR4], R2 ;\nATOMS.CAST.SPIN R1, [R2] ;") == [
        "ATOMG.E.ADD.F32", "ATOMS.ADD", "ATOMS.CAST.SPIN",
    ]  # fmt: skip


_SASS = """
        /*0010*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0020*/                   UMOV UR6, 0x400 ;
        /*0030*/                   UIADD3 UR7, UP0, UR6, 0x20, URZ ;
        /*0040*/                   UIADD3 {base}, UP0, {base}, 0x20, URZ ;
        /*0050*/              @P6 LDG.E.U16 R170, desc[UR4][R166.64] ;
        /*0060*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0070*/                   HGMMA.64x16x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0 ;
"""


def test_the_uniform_check_finds_what_ptxas_did():
    """The instructions are those of the kernel that gave wrong results on an H200."""
    from fastgist_kernels.aot_gates import undefined_uniform

    assert undefined_uniform(_SASS.format(base="UR6")) == []
    assert undefined_uniform(_SASS.format(base="UR14")) == ["UIADD3 UR14, UP0, UR14, 0x20, URZ"]
    later = _SASS.format(base="UR6").replace("gdesc[UR4], R24, gsb0", "gdesc[UR12], R24, gsb0")
    assert len(undefined_uniform(later)) == 2, "a descriptor is four registers, or the last two"


def test_pointer_arithmetic_is_64_bit(rows):
    _hold(rows, "narrow")


@pytest.mark.parametrize(
    ("kernel", "caught"), [("_narrow_offset_kernel", True), ("_late_cast_kernel", True), ("_wide_offset_kernel", False)]
)
def test_the_pointer_check_catches_narrow_offsets(kernel, caught):
    script = (
        "from fastgist_kernels.aot import Spec, narrow_offsets, written_ir\n"
        f"spec = Spec(test_kernels.{kernel}, 'x', {{'x_ptr': '*fp32', 'stride_xm': 'i64'}}, {{'BLOCK': 128}})\n"
        "print(len(narrow_offsets(written_ir(spec))))\n"
    )
    assert (int(_compiled_apart(script)) > 0) == caught


def test_constexprs_end_every_kernel():
    """A launch passes positional arguments and appends the constexprs in the kernel's order."""
    from fastgist_kernels import aot

    for kernel in aot.all_kernels():
        kinds = [parameter.is_constexpr for parameter in kernel.params]
        assert kinds == sorted(kinds), kernel.fn.__name__


def _table_specs():
    """A Spec for every entry of the launch tables, made of the kernel's first bfloat16 one."""
    import dataclasses

    from fastgist_kernels import aot

    table = json.loads((ROOT / "kernels" / "fastgist_kernels" / "launch_tables.json").read_text())
    for name, archs in table.items():
        for arch, classes in archs.items():
            for shape_class, config in classes.items():
                if "num_warps" not in config:  # a choice between kernels, not a tile of one
                    continue
                known = (s for s in aot.all_specs() if "bf16" in s.label)
                base = next(s for s in known if (s.table or s.kernel.fn.__name__[1:].removesuffix("_kernel")) == name)
                tile = {k: v for k, v in config.items() if k.startswith("BLOCK_")}
                if "PARTS" in base.constexprs:  # as many as warps
                    tile["PARTS"] = config["num_warps"]
                assert set(tile) <= set(base.constexprs), f"{name} {shape_class}: {tile} are not tiles of the kernel"
                yield (
                    int(arch.removeprefix("sm_")),
                    dataclasses.replace(
                        base,
                        label=f"table {shape_class}",
                        constexprs=base.constexprs | tile,
                        num_warps=config["num_warps"],
                        num_stages=config["num_stages"],
                    ),
                )


def test_measured_tiles_pass_the_gates_too():
    """What a card timed is launched as well: it fits, spills nothing and reads no register that nothing writes."""
    from fastgist_kernels import aot, aot_gates

    checked = 0
    for arch, spec in _table_specs():
        found, sass = aot_gates.resources(aot.compile_spec(spec, arch))
        assert found.shared <= SHARED_LIMIT[arch], (spec.name, found)
        assert (found.stack, found.spill_loads, found.spill_stores) == (0, 0, 0), (spec.name, found)
        assert arch != 90 or aot_gates.undefined_uniform(sass) == [], spec.name
        checked += 1
    assert checked, "the table is empty: nothing was shown"
