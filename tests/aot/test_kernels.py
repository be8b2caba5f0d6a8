"""Every Triton kernel compiled for sm_80, sm_90 and sm_100 without a GPU, under the installed Triton and the oldest
one supported, and what the compiler made of it held against limits and against benchmarks/resources.csv.

Each Triton compiles in a process of its own (two do not fit in one); what it found is kept in build/ until a kernel
changes, and its cache beside it, so a rerun is quick.
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
#: Registers may grow this much before the table must be looked at and rewritten.
REGISTER_SLACK = 1.10
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
    """One row a spec and architecture; kept in build/ until a kernel source changes. One process at a time compiles."""
    BUILD.mkdir(exist_ok=True)
    sources = sorted((ROOT / "kernels" / "fastgist_kernels").glob("*.py"))
    triton_version = OLDEST if version == "oldest" else triton.__version__
    key = hashlib.sha256(b"".join([triton_version.encode(), *(f.read_bytes() for f in sources)])).hexdigest()
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
    launched = {spec.name for spec in aot.every_tile()}
    sampled = {spec.name for spec in specs if any(spec.kernel is tile.kernel for tile in aot.every_tile())}
    assert sampled <= launched, f"tiles that no launch takes: {sorted(sampled - launched)}"
    # Found by their name alone, so a kernel under another name would escape: every jit function says which it is.
    for module in aot.MODULES:
        source = (ROOT / "kernels" / "fastgist_kernels" / f"{module}.py").read_text()
        launched = {line.split("[")[0].strip() for line in source.splitlines() if "_kernel[" in line}
        assert launched <= have, f"{module} launches {launched - have}, which have no spec"


def test_all_were_compiled(rows):
    from fastgist_kernels import aot

    assert {(r["kernel"], r["arch"]) for r in rows} == {(s.name, a) for s in aot.all_specs() for a in s.archs}


def test_shared_memory_fits(rows):
    _fail(
        [
            f"{_label(row)} asks {row['shared']} bytes of shared memory, a block may have {SHARED_LIMIT[row['arch']]}"
            for row in rows
            if row["shared"] > SHARED_LIMIT[row["arch"]]
        ]
    )


def test_tensor_memory_fits(rows):
    """Triton 3.6 doubles the accumulators of a persistent kernel: one tile of 128 x 256 and h were 528 columns, of 512 that
    are there, and became a kernel of four registers."""
    _fail(
        [
            f"{_label(row)} asks {row['tensor_memory']} columns of tensor memory, {row['registers']} registers"
            for row in rows
            if row["tensor_memory"] > 512 or row["registers"] < 8
        ]
    )
    assert any(row["tensor_memory"] for row in rows), "no kernel was looked at"


def test_nothing_spills(rows):
    """Not even where the table says it did: a kernel that spills wants a smaller tile."""
    _fail(
        [
            f"{_label(row)}: {column} {row[column]}"
            for row in rows
            for column in ("stack", "spill_loads", "spill_stores")
            if row[column]
        ]
    )


def test_registers_against_the_table(rows):
    from fastgist_kernels import aot

    table = {(r["triton"], r["kernel"], int(r["arch"])): r for r in aot.read_csv(RESOURCES)}
    if not any(version == rows[0]["triton"] for version, _, _ in table):
        pytest.skip(f"the table has no rows of Triton {rows[0]['triton']}")
    problems = []
    for row in rows:
        was = table.get((row["triton"], row["kernel"], row["arch"]))
        if was is None:
            problems.append(f"{_label(row)} is not in {RESOURCES.name}: {REGENERATE}")
        elif row["registers"] > int(was["registers"]) * REGISTER_SLACK:
            problems.append(
                f"{_label(row)}: {row['registers']} registers, the table has {was['registers']}: {REGENERATE}"
            )
    _fail(problems)


def test_matrix_kernels_use_hopper_instructions(rows):
    _fail([f"{_label(r)}: no HGMMA in its SASS" for r in rows if r["matrix"] and r["arch"] == 90 and not r["hgmma"]])


def test_streaming_kernels_move_16_bytes_at_a_time(rows):
    _fail([f"{_label(r)}: {' '.join(r['narrow_accesses'])}" for r in rows if r.get("narrow_accesses")])
    _fail(
        [
            f"{_label(r)}: {r['wide_accesses'][0]} accesses of 16 bytes, {r['wide_accesses'][1]} are due"
            for r in rows
            if "wide_accesses" in r and r["wide_accesses"][0] < r["wide_accesses"][1]
        ]
    )
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
    from fastgist_kernels.aot import narrow_accesses, wide_accesses

    sass = "LDG.E.128 R4, desc[UR4][R2.64] ;\nSTG.E.U16 desc[UR4][R2.64], R4 ;\nLDG.E R5, desc[UR4][R2.64] ;\n"
    assert narrow_accesses(sass) == ["STG.E.U16", "LDG.E"]
    assert wide_accesses(sass) == 1
    assert wide_accesses("LDG.E.EF.128.CONSTANT R4 ;\nSTG.E.ENL2.256 desc ;\nLDG.E.64 R2 ;\nLDS.128 R4 ;") == 3


def test_no_uniform_register_is_read_before_it_is_written(rows):
    """ptxas 12.8 builds matrix descriptors on such registers: wrong results on the card, and nowhere else to be seen."""
    _fail([f"{_label(row)}: {line}" for row in rows for line in row["undefined"]])


def test_nothing_is_added_up_by_atomics(rows):
    """Programs that add to one place do so in whatever order they come: another result at each run."""
    _fail([f"{_label(row)}: {' '.join(row['atomics'])}" for row in rows if row["atomics"]])
    kernels = {row["kernel"].split("[")[0] for row in rows if row["arch"] == 90}
    for layer, at_least in (("_cp_linear", 8), ("_cp_update", 1), ("_adapter", 7), ("_outer", 2)):
        assert sum(name.startswith(layer) for name in kernels) >= at_least, layer


@pytest.mark.parametrize(("kernel", "caught"), [("_adding_kernel", True), ("_wide_offset_kernel", False)])
def test_the_atomics_check_catches_a_sum_of_many_programs(kernel, caught):
    script = (
        "from fastgist_kernels.aot import Spec, compile_spec, atomic_sums, resources\n"
        f"spec = Spec(test_kernels.{kernel}, 'x', {{'x_ptr': '*fp32', 'stride_xm': 'i64'}}, {{'BLOCK': 128}})\n"
        "print(*(bool(atomic_sums(resources(compile_spec(spec, arch))[1])) for arch in (80, 90, 100)))\n"
    )
    assert _compiled_apart(script) == " ".join([str(caught)] * 3)


def test_bits_in_shared_memory_are_no_sum():
    from fastgist_kernels.aot import atomic_sums

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
    from fastgist_kernels.aot import undefined_uniform

    assert undefined_uniform(_SASS.format(base="UR6")) == []
    assert undefined_uniform(_SASS.format(base="UR14")) == ["UIADD3 UR14, UP0, UR14, 0x20, URZ"]
    later = _SASS.format(base="UR6").replace("gdesc[UR4], R24, gsb0", "gdesc[UR12], R24, gsb0")
    assert len(undefined_uniform(later)) == 2, "a descriptor is four registers, or the last two"


def test_pointer_arithmetic_is_64_bit(rows):
    _fail([f"{_label(row)}: 32-bit pointer arithmetic: {line}" for row in rows for line in row.get("narrow", ())])


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
    from fastgist_kernels import aot

    checked = 0
    for arch, spec in _table_specs():
        found, sass = aot.resources(aot.compile_spec(spec, arch))
        assert found.shared <= SHARED_LIMIT[arch], (spec.name, found)
        assert (found.stack, found.spill_loads, found.spill_stores) == (0, 0, 0), (spec.name, found)
        assert arch != 90 or aot.undefined_uniform(sass) == [], spec.name
        checked += 1
    assert checked, "the table is empty: nothing was shown"
