"""Ahead-of-time compilation of every kernel, without a GPU or a driver: what the resource gates read.

Each kernel module lists :class:`Spec` entries. ``compile_spec`` compiles one for an architecture; ``Resources`` says
what ptxas made of it. ``python -m fastgist_kernels.aot`` compiles all and prints (or writes) the table.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = [
    "ARCHITECTURES",
    "MODULES",
    "SHARED_LIMIT",
    "TENSOR_MEMORY_LIMIT",
    "Resources",
    "Spec",
    "all_kernels",
    "all_specs",
    "compile_spec",
]

ARCHITECTURES = (80, 90, 100)
#: Shared memory a block may take, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: Columns of Blackwell's tensor memory. A kernel that asks for more compiles to next to nothing, without an error.
TENSOR_MEMORY_LIMIT = 512
#: Every module beside this one that may hold kernels.
MODULES = tuple(
    sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in {"__init__", "aot", "common"})
)


@dataclass(frozen=True)
class Spec:
    """One compilation of a kernel: argument types, constexprs (unit strides too), launch options.

    Every pointer and stride counts as a multiple of 16, as the launcher's specialisation finds them on ordinary
    tensors, but for those named in ``unaligned``; so do the sizes named in ``aligned``. ``archs``:
    the architectures whose launches use this tile. ``matrix``: the kernel
    multiplies tiles of >= 64 rows, so Hopper's SASS must show HGMMA. ``table``: its entry in the launch tables, where that
    is not the kernel's name. ``wide``: it only streams, so all its accesses to
    global memory must be of 16 bytes, but for as many loads as it reads ``numbers`` and stores as it writes ``results``.
    ``accesses``: how many of 16 bytes there must be at least, where rows share a tile and what is read of each is no fixed
    number.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 2
    matrix: bool = False
    wide: bool = False
    numbers: int = 0
    results: int = 0
    accesses: int = 0
    unaligned: tuple[str, ...] = field(default=())
    aligned: tuple[str, ...] = field(default=())
    archs: tuple[int, ...] = ARCHITECTURES
    table: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__name__}[{self.label}]"


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    spill_loads: int
    spill_stores: int
    shared: int
    hgmma: int


#: Columns of benchmarks/resources.csv; the first three say which row it is.
COLUMNS = ("triton", "kernel", "arch", *(f.name for f in fields(Resources)))


def all_specs() -> list[Spec]:
    return [spec for module in _modules() for spec in getattr(module, "SPECS", ())]


def every_tile() -> list[Spec]:
    """What modules that choose their tiles by shape can launch at all: many more than :func:`all_specs`."""
    return [spec for module in _modules() if hasattr(module, "every_tile") for spec in module.every_tile()]


def all_kernels() -> list[object]:
    """Every ``*_kernel`` of every module: the meta-test holds this against :func:`all_specs`."""
    named = (value for module in _modules() for name, value in vars(module).items() if name.endswith("_kernel"))
    return [value for value in named if hasattr(value, "arg_names")]  # not functions of the host


def _modules() -> list:
    return [importlib.import_module(f"fastgist_kernels.{name}") for name in MODULES]


def _source(spec: Spec, integer_strides: str | None = None) -> ASTSource:
    names = spec.kernel.arg_names
    missing = set(names) - set(spec.signature) - set(spec.constexprs)
    if missing:
        raise ValueError(f"{spec.name}: no type or value for {', '.join(sorted(missing))}")
    signature = {n: "constexpr" if n in spec.constexprs else spec.signature[n] for n in names}
    if integer_strides:
        signature |= {n: integer_strides for n in names if n.startswith("stride_") and signature[n] != "constexpr"}
    constexprs = {(names.index(n),): value for n, value in spec.constexprs.items()}
    aligned = [
        n
        for n in names
        if signature[n] != "constexpr"
        and n not in spec.unaligned
        and (signature[n].startswith("*") or n.startswith("stride_") or n in spec.aligned)
    ]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    return ASTSource(spec.kernel, signature, constexprs, attrs)


def _options(spec: Spec) -> dict[str, Any]:
    return {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}


def compile_spec(spec: Spec, arch: int):
    """The compiled kernel (``.asm`` with ttir, ptx, cubin; ``.metadata``) for compute capability ``arch``."""
    return triton.compile(_source(spec), target=GPUTarget("cuda", arch, 32), options=_options(spec))


def written_ir(spec: Spec) -> str:
    """TTIR as the kernel is written (before any pass), with 32-bit strides: what a launch on ordinary tensors passes.

    An offset that is only 64-bit because a stride came as 64-bit shows its 32-bit self here.
    """
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options(_options(spec))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(_source(spec, integer_strides="i32").make_ir(target, options, functions, modules, context))


_VALUE = r"%[\w$.#-]+"
_LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")


def narrow_offsets(ir_text: str) -> list[str]:
    """Lines of TTIR whose pointer arithmetic could wrap at 2^31: a 32-bit offset, or a 32-bit product with a stride."""
    found = []
    strides: set[str] = set()
    for line in ir_text.splitlines():
        line = _LOCATION.sub("", line).strip()
        if line.startswith("tt.func"):
            strides = set(re.findall(r"(%(?:\w+\.)?stride_\w+): i32", line))
        elif "tt.addptr" in line:
            if re.search(r",\s*(tensor<[\dx]+xi32>|i32)\s*$", line):
                found.append(line)
        elif m := re.match(rf"({_VALUE}) = (?:tt\.splat|tt\.broadcast|tt\.expand_dims) ({_VALUE})", line):
            if m[2] in strides:
                strides.add(m[1])
        elif re.search(r"arith\.muli .*(?:i32|xi32>)\s*$", line) and strides & set(re.findall(_VALUE, line)):
            found.append(line)
    return found


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


_UNIFORM = re.compile(r"\bUR(\d+)\b")
#: Instructions that write the uniform register they name first: the uniform datapath's, and moves into it.
_WRITES_UNIFORM = re.compile(r"^(?:U[A-Z0-9]+|R2UR|S2UR|REDUX|CREDUX|LDCU|VOTEU|SYNCS|ELECT)\b")


def undefined_uniform(sass: str) -> list[str]:
    """Instructions of ``nvdisasm -c`` output that read a uniform register which nothing before them writes.

    ptxas 12.8, which Triton 3.6 bundles, builds one of cp_linear's HGMMA descriptors on such a register where no load of
    the loop is asynchronous: wrong results or an illegal address, and nothing else to see before a launch.
    """
    written: set[int] = set()
    found = []
    for line in sass.splitlines():
        m = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?);", line)
        if not m:
            continue
        opcode, operands = m[1], m[2].split(",")
        first = _UNIFORM.fullmatch(operands[0].strip()) if _WRITES_UNIFORM.match(opcode) else None
        reads = {int(n) for operand in operands[1 if first else 0 :] for n in _UNIFORM.findall(operand)}
        if descriptor := re.search(r"gdesc\[UR(\d+)\]", m[2]):  # A's descriptor, then B's; A may be in registers
            at = int(descriptor[1])
            reads = {at + 2, at + 3} if re.match(r"\s*R\d+", ",".join(operands[1:])) else {at, at + 1, at + 2, at + 3}
        if reads - written:
            found.append(f"{opcode} {m[2].strip()}")
        if first:
            at = int(first[1])
            wide = ".64" in opcode or ".WIDE" in opcode or opcode.startswith(("ULDC.128", "LDCU.128"))
            written |= set(range(at, at + (4 if "128" in opcode else 2 if wide else 1)))
    return found


def atomic_sums(sass: str) -> list[str]:
    """Instructions of ``nvdisasm -c`` output by which threads or programs add to one place, in whatever order they come: ATOM,
    ATOMG and RED of global memory, ATOMS of shared memory, the copy engine's reductions. Not REDUX, which adds up a warp's
    registers, nor bits set and cleared in shared memory (Blackwell's tensor memory is handed out that way): of any order."""
    found = re.findall(r"\b(?:U?ATOM[GS]?|U?RED[GS]?|UTMAREDG|UBLKRED)\b[A-Z0-9_.]*", sass)
    return [name for name in found if not re.match(r"ATOMS\.(?:OR|AND)\b", name)]


def narrow_accesses(sass: str) -> list[str]:
    """Loads and stores of global memory in ``nvdisasm -c`` output that move less than 16 bytes a thread."""
    accesses = re.findall(r"\b((?:LDG|STG)\.[A-Z0-9.]+)", sass)
    return [access for access in accesses if not re.search(r"\.(?:128|256)\b", access)]


def wide_accesses(sass: str) -> int:
    """How many accesses of 16 bytes a thread there are; one of 32 counts for two."""
    return sum(int(bits) // 128 for bits in re.findall(r"\b(?:LDG|STG)\.(?:[A-Z0-9]+\.)*(128|256)\b", sass))


def resources(compiled) -> tuple[Resources, str]:
    """Registers, stack and shared memory as ``cuobjdump -res-usage`` reports them; spills and HGMMA from the SASS, which
    is returned too."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([_tool("nvdisasm"), "-c", f.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource line in cuobjdump's output:\n{usage}")
    registers, stack, _ = map(int, found.groups())
    found_there = Resources(
        registers=registers,
        stack=stack,
        spill_loads=len(re.findall(r"\bLDL\b", sass)),
        spill_stores=len(re.findall(r"\bSTL\b", sass)),
        shared=int(compiled.metadata.shared),
        hgmma=len(re.findall(r"\bHGMMA\b", sass)),
    )
    return found_there, sass


def _row(task: tuple[bool, int, int]) -> dict[str, Any]:
    """Compile spec ``index`` for ``arch``. Takes an index because a spec does not travel between processes."""
    every, index, arch = task
    spec = (every_tile if every else all_specs)()[index]
    row: dict[str, Any] = {"triton": triton.__version__, "kernel": spec.name, "arch": arch, "matrix": spec.matrix}
    compiled = compile_spec(spec, arch)
    found, sass = resources(compiled)
    row["tensor_memory"] = int(getattr(compiled.metadata, "tmem_size", 0) or 0)
    row["atomics"] = atomic_sums(sass)
    row |= asdict(found) | {"undefined": undefined_uniform(sass) if arch == 90 else []}  # Blackwell's reads otherwise
    if spec.wide:
        narrow = narrow_accesses(sass)
        loads = [access for access in narrow if access.startswith("LDG")]
        stores = [access for access in narrow if access not in loads]
        row["narrow_accesses"] = loads[spec.numbers :] + stores[spec.results :]
    if spec.accesses:
        row["wide_accesses"] = [wide_accesses(sass), spec.accesses]  # found, at least
    if arch == spec.archs[0]:
        row["narrow"] = narrow_offsets(written_ir(spec))
    return row


def compile_all(only: str = "", jobs: int = 1, every: bool = False) -> list[dict[str, Any]]:
    """One row for every spec (``every``: of :func:`every_tile`) whose name contains ``only`` and architecture, in order."""
    specs = every_tile() if every else all_specs()
    tasks = [(every, i, arch) for i, spec in enumerate(specs) if only in spec.name for arch in spec.archs]
    if jobs == 1:
        return [_row(task) for task in tasks]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_row, tasks, chunksize=len(ARCHITECTURES)))


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def update_csv(path: Path, rows: list[dict[str, Any]], only: str = "") -> None:
    """Replace the rows of the Triton versions that ``rows`` come from, of kernels whose name contains ``only``; keep the
    others, and all in the order of :func:`all_specs`."""
    versions = {row["triton"] for row in rows}
    before = read_csv(path)
    order = {name: at for at, name in enumerate(dict.fromkeys(row["triton"] for row in [*before, *rows]))}
    kept = [row for row in before if row["triton"] not in versions or only not in row["kernel"]]
    place = {spec.name: at for at, spec in enumerate(all_specs())}
    table = [*kept, *rows]
    table.sort(key=lambda row: (order[row["triton"]], place.get(row["kernel"], len(place)), int(row["arch"])))
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel for every architecture and print resources.")
    parser.add_argument("--csv", type=Path, help="replace this Triton version's rows of these kernels in that table")
    parser.add_argument("--json", type=Path, help="write all that was found to that file")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--every-tile", action="store_true", help="all tiles that launches choose from: half an hour")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args(argv)
    rows = compile_all(args.only, args.jobs, args.every_tile)
    for row in rows:
        print(*(row[c] for c in COLUMNS), *row.get("narrow", ()), *row["undefined"], sep="\t")
    if args.csv:
        update_csv(args.csv, rows, args.only)
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
