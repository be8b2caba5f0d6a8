"""What is read off a compiled kernel, and what of it is a fault.

The whole text of this file enters the digest of every row of benchmarks/resources.csv (:func:`fastgist_kernels.aot.inputs`): a
row that passed other gates than these counts as one that was never compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

__all__ = [
    "GATES",
    "SHARED_LIMIT",
    "TENSOR_MEMORY_LIMIT",
    "Resources",
    "atomic_sums",
    "faults",
    "look",
    "narrow_accesses",
    "narrow_offsets",
    "resources",
    "undefined_uniform",
    "wide_accesses",
]

#: Shared memory a block may take, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: Columns of Blackwell's tensor memory. A kernel that asks for more compiles to next to nothing, without an error.
TENSOR_MEMORY_LIMIT = 512
#: Fields of a Spec that say which gates beyond everyone's its kernel has to pass.
GATES = ("matrix", "wide", "numbers", "results", "accesses")


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    spill_loads: int
    spill_stores: int
    shared: int
    hgmma: int


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


def look(spec: Any, arch: int, compiled: Any) -> dict[str, Any]:
    """All that the gates ask of ``compiled``, which is ``spec`` (:class:`fastgist_kernels.aot.Spec`) for ``arch``."""
    found, sass = resources(compiled)
    row = asdict(found) | {
        "tensor_memory": int(getattr(compiled.metadata, "tmem_size", 0) or 0),
        "atomics": atomic_sums(sass),
        "undefined": undefined_uniform(sass) if arch == 90 else [],  # Blackwell's reads otherwise
    }
    if spec.wide:
        narrow = narrow_accesses(sass)
        loads = [access for access in narrow if access.startswith("LDG")]
        stores = [access for access in narrow if access not in loads]
        row["narrow_accesses"] = loads[spec.numbers :] + stores[spec.results :]
    if spec.accesses:
        row["wide_accesses"] = [wide_accesses(sass), spec.accesses]  # found, at least
    return row


def faults(row: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with ``row``: the gate's name and what it found, nothing where all pass.

    Of a row that was not compiled now (``row["compiled"]`` is False) only what the table holds can be looked at again; the
    rest it passed when it was recorded, or it would have no digest (:func:`fastgist_kernels.aot.update_csv`).
    """
    found = {}
    if row["shared"] > SHARED_LIMIT[row["arch"]]:
        found["shared"] = f"asks {row['shared']} bytes of shared memory, a block may have {SHARED_LIMIT[row['arch']]}"
    if spilled := [f"{column} {row[column]}" for column in ("stack", "spill_loads", "spill_stores") if row[column]]:
        found["spills"] = ", ".join(spilled)
    if row["registers"] < 8:
        found["tensor_memory"] = f"{row['registers']} registers"
    if row["matrix"] and row["arch"] == 90 and not row["hgmma"]:
        found["matrix"] = "no HGMMA in its SASS"
    if row["narrow"]:
        found["narrow"] = "32-bit pointer arithmetic: " + "; ".join(row["narrow"])
    if not row["compiled"]:
        return found
    if row["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        found["tensor_memory"] = f"{row['tensor_memory']} columns of tensor memory, {row['registers']} registers"
    if row["atomics"]:
        found["atomics"] = " ".join(row["atomics"])
    if row["undefined"]:
        found["undefined"] = "; ".join(row["undefined"])
    if row.get("narrow_accesses"):
        found["accesses"] = " ".join(row["narrow_accesses"])
    if "wide_accesses" in row and row["wide_accesses"][0] < row["wide_accesses"][1]:
        found["accesses"] = f"{row['wide_accesses'][0]} accesses of 16 bytes, {row['wide_accesses'][1]} are due"
    return found
