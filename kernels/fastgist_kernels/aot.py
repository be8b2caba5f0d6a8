"""Ahead-of-time compilation of every kernel, without a GPU or a driver: what the resource gates read.

Each kernel module lists :class:`Spec` entries. ``compile_spec`` compiles one for an architecture; ``Resources`` says
what ptxas made of it. ``python -m fastgist_kernels.aot`` compiles all and prints (or writes) the table.

A row of the table also holds a digest of what it was compiled from (:func:`inputs`). With ``--table`` only rows are compiled
whose digest is another now, or that have none, and a sample of the rest (:func:`drawn`): what is known is not asked again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import json
import math
import multiprocessing
import random
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgist_kernels import aot_gates
from fastgist_kernels.aot_gates import GATES, SHARED_LIMIT, TENSOR_MEMORY_LIMIT, Resources, faults, look, narrow_offsets

__all__ = [
    "ARCHITECTURES",
    "COLUMNS",
    "MODULES",
    "SHARED_LIMIT",
    "TENSOR_MEMORY_LIMIT",
    "Resources",
    "Spec",
    "all_kernels",
    "all_specs",
    "compile_spec",
    "drawn",
    "inputs",
    "seal",
]

ARCHITECTURES = (80, 90, 100)
#: Every module beside this one that may hold kernels.
MODULES = tuple(
    sorted(
        p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in {"__init__", "aot", "aot_gates", "common"}
    )
)
#: Of the rows whose inputs are those of the table, at least this part is compiled all the same.
SAMPLED = 0.1


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


FIGURES = tuple(f.name for f in fields(Resources))
#: Columns of benchmarks/resources.csv; the first three say which row it is, the last two what it was compiled from, and that
#: nobody wrote into it since.
COLUMNS = ("triton", "kernel", "arch", *FIGURES, "inputs", "seal")


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


def _module(spec: Spec, arch: int, integer_strides: str | None = None) -> tuple[Any, Any]:
    """What Triton's front end makes of ``spec`` before any pass, and the options it goes to the passes with."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options(_options(spec))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    return _source(spec, integer_strides).make_ir(target, options, functions, modules, context), options


def written_ir(spec: Spec) -> str:
    """TTIR as the kernel is written (before any pass), with 32-bit strides: what a launch on ordinary tensors passes.

    An offset that is only 64-bit because a stride came as 64-bit shows its 32-bit self here.
    """
    return str(_module(spec, 90, integer_strides="i32")[0])


def inputs(spec: Spec, arch: int) -> str:
    """Digest of all that decides what ``spec`` becomes on ``arch`` and which gates look at it.

    That is the module which Triton's front end makes of the kernel, of every function it calls and every constant they take,
    as text without source locations; the options; the versions of Triton and ptxas; the gates the spec names, and the text of
    aot_gates.py. The same on every machine, in every folder and after edits that change lines or comments alone. (A
    JITFunction's ``cache_key`` has line numbers in it, and of the constants only those marked constexpr.)
    """
    from triton.backends.nvidia.compiler import get_ptxas

    module, options = _module(spec, arch)
    kept = {
        name: value for name, value in vars(options).items() if name != "extern_libs"
    }  # paths, of Triton's own files
    told = (
        Path(aot_gates.__file__).read_text(),
        f"triton {triton.__version__}, ptxas {get_ptxas(arch).version}, sm_{arch}",
        spec.name,
        repr(sorted(kept.items())),
        repr([getattr(spec, gate) for gate in GATES]),
        module.str_nodebug(),
    )
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def seal(row: Mapping[str, Any]) -> str:
    """Digest of a row's other columns as they are written: a figure changed by hand no longer fits it."""
    return hashlib.sha256(",".join(str(row[column]) for column in COLUMNS[:-1]).encode()).hexdigest()[:8]


def _specs(every: bool) -> list[Spec]:
    return every_tile() if every else all_specs()


def _known(task: tuple[bool, int]) -> list[dict[str, Any]]:
    """What can be said of spec ``index`` without compiling: a row an architecture. An index, because a spec does not travel
    between processes."""
    every, index = task
    spec = _specs(every)[index]
    rows = []
    for arch in spec.archs:
        row = {"triton": triton.__version__, "kernel": spec.name, "arch": arch, "inputs": inputs(spec, arch)}
        narrow = narrow_offsets(written_ir(spec)) if arch == spec.archs[0] else []
        gates = [gate for gate in GATES if getattr(spec, gate)]
        rows.append(row | {"matrix": spec.matrix, "gates": gates, "narrow": narrow, "compiled": False, "drawn": False})
    return rows


def _row(task: tuple[bool, int, int]) -> dict[str, Any]:
    """Compile spec ``index`` for ``arch``: what :func:`look` finds."""
    every, index, arch = task
    spec = _specs(every)[index]
    return look(spec, arch, compile_spec(spec, arch)) | {"compiled": True}


def drawn(rows: Sequence[dict[str, Any]], seed: str) -> list[dict[str, Any]]:
    """Of ``rows`` (kernel, arch, gates) those to compile though nothing changed: at least :data:`SAMPLED` of them, the same
    for the same seed. Among them every kernel on every architecture, with every set of gates it has there, and with each of
    its dtypes.
    """
    shuffled = random.Random(seed).sample(rows, len(rows))
    seen: set[tuple] = set()
    first: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for row in shuffled:
        name, gates = row["kernel"].split("[")[0], tuple(row["gates"])
        kinds = {(name, row["arch"], gates), (name, gates, *re.findall("bf16|fp16|fp32", row["kernel"]))}
        (others if kinds <= seen else first).append(row)
        seen |= kinds
    return first + others[: max(0, math.ceil(SAMPLED * len(rows)) - len(first))]


def sources_digest() -> str:
    """Of the text of every file beside this one: what the sample is drawn with."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _settle(rows: list[dict[str, Any]], table: Sequence[Mapping[str, str]]) -> None:
    """Give those of ``rows`` that need no compiling their figures from ``table``; mark the sample of them as drawn."""
    before = {(r["triton"], r["kernel"], int(r["arch"])): r for r in table}
    unchanged = []
    for row in rows:
        was = before.get((row["triton"], row["kernel"], row["arch"]))
        if was is not None and was["inputs"] == row["inputs"] and was["seal"] == seal(was):
            row |= {figure: int(was[figure]) for figure in FIGURES}
            unchanged.append(row)
    for row in drawn(unchanged, f"{sources_digest()} {triton.__version__}"):
        row["drawn"] = True


def compile_all(
    only: str = "", jobs: int = 1, every: bool = False, table: Path | None = None, plan: bool = False
) -> list[dict[str, Any]]:
    """One row for every spec (``every``: of :func:`every_tile`) whose name contains ``only`` and architecture, in order.

    With ``table`` the figures of rows that it has of the same inputs are taken from there, but for a sample;
    ``row["compiled"]`` says whether they come from a compiler. With ``plan`` nothing is compiled: rows that would be have no
    figures, or are ``drawn``.
    """
    picked = [i for i, spec in enumerate(_specs(every)) if only in spec.name]
    if jobs == 1:
        return _compile_all(map, every, picked, table, plan)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return _compile_all(pool.map, every, picked, table, plan)


def _compile_all(run: Any, every: bool, picked: list[int], table: Path | None, plan: bool) -> list[dict[str, Any]]:
    known = list(run(_known, [(every, i) for i in picked]))
    rows = [row for of_spec in known for row in of_spec]
    if table is not None:
        _settle(rows, read_csv(table))
    if not plan:
        indices = [i for i, of_spec in zip(picked, known, strict=True) for _ in of_spec]
        wanted = [(row, i) for row, i in zip(rows, indices, strict=True) if row["drawn"] or "registers" not in row]
        for (row, _), found in zip(wanted, run(_row, [(every, i, row["arch"]) for row, i in wanted]), strict=True):
            row |= found
    return rows


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def update_csv(path: Path, rows: list[dict[str, Any]], only: str = "") -> None:
    """Replace the rows of the Triton versions that ``rows`` come from, of kernels whose name contains ``only``; keep the
    others, and all in the order of :func:`all_specs`. A row that fails a gate gets no digest: it will be compiled, and fail,
    every time."""
    versions = {row["triton"] for row in rows}
    before = read_csv(path)
    order = {name: at for at, name in enumerate(dict.fromkeys(row["triton"] for row in [*before, *rows]))}
    kept = [row for row in before if row["triton"] not in versions or only not in row["kernel"]]
    place = {spec.name: at for at, spec in enumerate(all_specs())}
    new = [row | {"inputs": "" if faults(row) else row["inputs"]} for row in rows]
    table = [*kept, *(row | {"seal": seal(row)} for row in new)]
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
    parser.add_argument("--table", type=Path, help="compile what is not in that table with these inputs, and a sample")
    parser.add_argument("--plan", action="store_true", help="compile nothing: say which rows would be, and why")
    args = parser.parse_args(argv)
    if args.plan and args.csv:
        parser.error("--plan compiles nothing, so it has nothing for --csv")
    rows = compile_all(args.only, args.jobs, args.every_tile, args.table, args.plan)
    for row in rows:
        why = "drawn" if row["drawn"] else "compiled" if "registers" not in row or row["compiled"] else "as recorded"
        figures = (row.get(c, "") for c in COLUMNS[:-1])
        print(*figures, why, *row["narrow"], *row.get("undefined", ()), sep="\t")
    if args.csv:
        update_csv(args.csv, rows, args.only)
    if args.json:
        args.json.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
