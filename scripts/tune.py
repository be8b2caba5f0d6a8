#!/usr/bin/env python3
"""Measures launch parameters on this GPU and writes them to kernels/fastgist_kernels/launch_tables.json.

    python scripts/tune.py --op bidirectional_kl          tune what its benchmark cases launch
    python scripts/tune.py --minutes 9 --out results/     stop in time; the measurements go to results/tuning.json
    python scripts/tune.py --op cp_linear                 first every form of cp_linear at every shape of its benchmark

For each case of benchmarks/cases.py it notes which entries of the table the kernels ask for, then tries candidates for
one entry after the other: a candidate must pass the parity check, and replaces the default only if it is faster by more
than the spread between two timings of the default. Entries of other architectures and shapes are kept.

The forms of cp_linear, forward and backward, are timed beside the eager ones; the fastest that is right becomes the table's
entry, and all times go to cp_linear_forms.json (--forms), which is committed as benchmarks/results/<gpu>/, where
docs/crossovers.md and tests/test_cp_linear_plan.py look for it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgist_kernels.cp_linear_cost import Sizes

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
TABLE = ROOT / "kernels" / "fastgist_kernels" / "launch_tables.json"

Config = dict[str, int]
Key = tuple[str, str, str]  # kernel, architecture, shape class

_ROWS = {"BLOCK_V": (256, 512, 1024, 2048, 4096, 8192), "BLOCK_M": (1, 2, 4, 8), "num_warps": (2, 4, 8, 16)}
#: Rows that stand in one tile keep its width; long ones are one a program.
_WHOLE = {"BLOCK_M": (1, 2, 4), "num_warps": (1, 2, 4, 8, 16)}
_LONG = {"BLOCK_V": (512, 1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)}
_TILE = {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
_ADAPTER = {"BLOCK_M": (16, 32, 64, 128), "BLOCK_D": (32, 64, 128), "BLOCK_N": (32, 64, 128)} | _TILE
_FLAT = {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)}
#: What may vary in each entry. Every kernel name that the launchers ask the table for has a line here (tested).
SPACES: dict[str, dict[str, tuple[int, ...]]] = {
    "bidirectional_kl_fwd": _ROWS,
    "bidirectional_kl_bwd": _ROWS,
    "bidirectional_kl_whole": _WHOLE,
    "bidirectional_kl_rows": _LONG,
    "bidirectional_kl_split": _LONG,
    "gist_loss_fwd": _ROWS,
    "gist_loss_bwd": _ROWS,
    "gist_loss_whole": _WHOLE,
    "gist_loss_rows": _LONG,
    "gist_loss_split": _LONG,
    "scale_unless_one": _FLAT,
    "gist_linear_loss_chunk": _ROWS | {"num_warps": (2, 4, 8)},  # sixteen spill under Triton 3.6
    "gist_linear_loss_classes": _ROWS,
    "topk_kl_fwd": {name: values for name, values in _ROWS.items() if name != "BLOCK_M"},
    "topk_kl_bwd_rest": _ROWS,
    "outer_partial": {"BLOCK_M": (32, 64, 128), "BLOCK_C": (64, 128, 256)} | _TILE,
    "cp_linear_form": {"form": (0, 1, 2, 3, 4, 5)},  # positions in cp_linear_forms.FORMS
    "cp_linear_one_pass": {"one_pass": (0, 1)},
    "cp_linear_fwd": {"BLOCK_M": (64, 128), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64, 128), "GROUP_M": (8,)}
    | _TILE,
    "cp_linear_project": {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128)} | _TILE,
    "cp_linear_few": {"BLOCK_N": (32, 64, 128), "BLOCK_K": (32, 64, 128), "num_warps": (4,), "num_stages": (3, 4, 5)},
    "cp_linear_tma": {"BLOCK_M": (64, 128), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64, 128), "GROUP_M": (8,)}
    | _TILE,
    "cp_update_fwd": {"BLOCK_M": (32, 64, 128), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64, 128)} | _TILE,
    "adapter_fwd": _ADAPTER,
    "adapter_bwd": _ADAPTER,
    "gelu_fwd": _FLAT,
    "gelu_bwd": _FLAT,
    "adapter_bwd_once": {"BLOCK_M": (16, 32), "BLOCK_C": (16, 32), "PROGRAMS": (1, 2)}
    | {"num_warps": (8, 16), "num_stages": (2, 3, 4)},
}
#: A tile of a row kernel holds at most this many elements of one tensor.
MOST_ELEMENTS = 8192


@dataclass(frozen=True)
class Trial:
    kernel: str
    arch: str
    shape_class: str
    case: str
    config: Config
    seconds: float | None
    verdict: str  # "default", "kept", "slower", "within noise", or why it does not count


def candidates(kernel: str, limit: int, seed: int = 0) -> list[Config]:
    """Configurations to try for ``kernel``: the whole space where it is small, else a fixed draw from it."""
    space = SPACES[kernel]
    every = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    every = [c for c in every if c.get("BLOCK_V", 1) * c.get("BLOCK_M", 1) <= MOST_ELEMENTS or "BLOCK_V" not in c]
    return every if len(every) <= limit else random.Random(f"{kernel}{seed}").sample(every, limit)


def decide(default: tuple[float, float], trials: list[tuple[Config, float]]) -> tuple[Config, float] | None:
    """The fastest trial if it beats both timings of the default by more than they differ from each other, else None."""
    if not trials:
        return None
    best = min(trials, key=lambda t: t[1])
    noise = abs(default[0] - default[1])
    return best if best[1] < min(default) - max(noise, 0.02 * min(default)) else None


def merge(table: dict, found: dict[Key, Config]) -> dict:
    """``table`` with the entries of ``found`` put in; sorted, so that a diff shows only what changed."""
    merged = json.loads(json.dumps(table))
    for (kernel, arch, shape_class), config in found.items():
        merged.setdefault(kernel, {}).setdefault(arch, {})[shape_class] = dict(config)
    return {k: {a: dict(sorted(c.items())) for a, c in sorted(v.items())} for k, v in sorted(merged.items())}


def write_table(found: dict[Key, Config], path: Path = TABLE) -> None:
    table = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merge(table, found), indent=1) + "\n")


class Overrides:
    """Stands in for ``launch_config`` in every kernel module: notes what is asked and answers with ``active`` first."""

    def __init__(self) -> None:
        from fastgist_kernels import aot, common

        self.asked: set[Key] = set()
        self.active: dict[Key, Config] = {}
        self._table = common.launch_config
        common._smaller = lambda config: None  # a candidate that does not fit is one that does not count
        for name in ("common", *aot.MODULES):
            module = importlib.import_module(f"fastgist_kernels.{name}")
            if hasattr(module, "launch_config"):
                module.launch_config = self

    def forget(self) -> None:
        """Read the table again."""
        self._table.cache_clear()

    def __call__(self, kernel: str, arch: str, shape_class: str) -> Config:
        key = kernel, arch, shape_class
        self.asked.add(key)
        return self.active.get(key, self._table(kernel, arch, shape_class))


def tune_case(op: str, case, device, overrides: Overrides, deadline: float, limit: int) -> Iterator[Trial]:
    from benchmarks import harness
    from benchmarks.peers import PEERS

    problem = harness.make_problem(op, case, device)
    provider = PEERS[op]["fastgist triton"](harness.given(problem, problem.tensors))
    overrides.asked.clear()
    if wrong := harness.parity(problem, provider):
        raise RuntimeError(f"{op} {case.id}: not tuned, its result is wrong: {wrong}")
    step = harness.make_step(problem, provider, "fwd_bwd")
    clock = harness.Clock(device)

    def measure() -> float:
        """As a graph's replay: the host's launches take longer than many of these kernels."""
        replay = harness.graph_replay(step, clock)
        if replay is None:
            raise RuntimeError("the step cannot be captured in a graph")
        return replay

    for key in sorted(overrides.asked):
        default = (measure(), measure())
        yield Trial(*key, case.id, {}, min(default), "default")
        good: list[tuple[Config, float]] = []
        for config in candidates(key[0], limit):
            if time.monotonic() > deadline:
                break
            overrides.active[key] = config
            seconds, verdict = _try(functools.partial(harness.parity, problem, provider), measure)
            overrides.active.pop(key)
            if seconds is not None:
                good.append((config, seconds))
            yield Trial(*key, case.id, config, seconds, verdict)
        chosen = decide(default, good)
        if chosen is not None:
            overrides.active[key] = chosen[0]
            yield Trial(*key, case.id, chosen[0], chosen[1], "kept")


# -- the forms of cp_linear --------------------------------------------------------------------------------------------

#: How a form is timed: (name, direction) -> (seconds, spread of a timing), or None where it cannot run or is wrong there.
#: Names are the forms and "eager <peer>".
Timer = Callable[[str, str], tuple[float, float] | None]
REPLAYS = 40
#: The eager forms' providers in benchmarks/peers.py.
EAGER = {"factored": "factored", "dense": "dense delta", "chain": "autograd.Function"}


def sizes_of(sizes: Mapping[str, int], dtype: str) -> Sizes:
    """Of a case or a row of cp_linear_forms.json: M, d and R, W weights or G folds of d rows each."""
    from fastgist_kernels.cp_linear_cost import Sizes

    weights = sizes.get("W", 1)
    outputs = weights * sizes.get("G", 1)
    return Sizes(sizes["M"], outputs * sizes["d"], sizes["d"], sizes["R"], outputs, dtype, weights)


def measure_forms(case, timer: Timer) -> list[dict[str, object]]:
    """Rows of cp_linear_forms.json for ``case``: seconds of each form that is right, forward and backward."""
    from fastgist_kernels.cp_linear_forms import FORMS

    rows: list[dict[str, object]] = []
    for direction in ("fwd", "bwd"):
        times = {form: timer(form, direction) for form in FORMS}
        eager = {name: timer(f"eager {name}", direction) for name in EAGER}
        found = {form: t for form, t in times.items() if t is not None}
        if not found:
            continue
        row: dict[str, object] = {"case": case.name, "direction": direction, **dict(case.sizes)}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "source": "measured"}
        row["spread"] = max(spread / seconds for seconds, spread in found.values())
        row["forms"] = {form: seconds for form, (seconds, _) in found.items()}
        row["eager"] = {name: t[0] for name, t in eager.items() if t is not None}
        rows.append(row)
    return rows


def form_entries(rows: list[dict], arch: str) -> dict[Key, Config]:
    """The launch table's entries: the fastest form of each row."""
    from fastgist_kernels.cp_linear_forms import FORMS
    from fastgist_kernels.cp_linear_plan import form_class

    found: dict[Key, Config] = {}
    for row in rows:
        fastest = min(row["forms"], key=row["forms"].__getitem__)
        found["cp_linear_form", arch, form_class(sizes_of(row, row["dtype"]), row["direction"] == "fwd")] = {
            "form": FORMS.index(fastest)
        }
    return found


def form_timer(case, device, overrides: Overrides) -> Timer:
    """Times on this card, as a graph's replay, each form behind its parity check."""
    from benchmarks import harness
    from benchmarks.peers import PEERS
    from fastgist_kernels import cp_linear_plan as plan
    from fastgist_kernels.cp_linear_forms import FORMS

    problem = harness.make_problem("cp_linear", case, device)
    tensors = harness.given(problem, problem.tensors)
    weights = [tensors["weight"]] if case.get("W", 1) == 1 else tensors["weight"]
    sizes = sizes_of(dict(case.sizes), str(case.dtype).removeprefix("torch."))
    clock = harness.Clock(device)

    def timer(name: str, direction: str) -> tuple[float, float] | None:
        eager = name.removeprefix("eager ")
        provider = PEERS["cp_linear"][EAGER.get(eager, "fastgist triton")](tensors)
        forward = direction == "fwd"
        if name in FORMS:
            given = tensors["x"] if forward else tensors["x"].new_empty(case["M"], sizes.out)
            if not plan.can(name, given, weights, case["R"], False, forward=forward):
                return None
            key = "cp_linear_form", plan.device_arch(device), plan.form_class(sizes, forward)
            overrides.active[key] = {"form": FORMS.index(name)}
        try:
            step = harness.make_step(problem, provider, direction)
            check = functools.partial(harness.parity, problem, provider) if name in FORMS else lambda: None
            replay = functools.partial(harness.graph_replay, step, clock, REPLAYS)
            seconds, verdict = _try(check, lambda: min(replay() or 1e9 for _ in range(2)))
            again = replay() if seconds is not None else None
        finally:
            overrides.active.clear()
        if seconds is None or again is None or seconds > 1e8:
            print(f"{case.id} {direction} {name}: {verdict}", file=sys.stderr)
            return None
        return seconds, abs(again - seconds)

    return timer


def _try(check: Callable[[], str | None], measure: Callable[[], float]) -> tuple[float | None, str]:
    import torch
    from triton.runtime.errors import OutOfResources

    try:
        if wrong := check():
            return None, f"wrong: {wrong}"
        return measure(), "timed"
    except (OutOfResources, torch.OutOfMemoryError) as e:
        return None, f"does not fit: {e}"
    except Exception as e:  # a candidate that the compiler refuses is one that does not count, not the end of tuning
        return None, f"fails: {type(e).__name__}: {e}"


def _forms_of_all(overrides: Overrides, deadline: float, args: argparse.Namespace) -> None:
    """Write the table's entries and, under ``args.out``, cp_linear_forms.json, after each case. Cases that the file has
    already are not timed again."""
    import torch

    from benchmarks.cases import CASES
    from fastgist_kernels import common

    device = torch.device("cuda", torch.cuda.current_device())
    arch = common.device_arch(device)
    file = args.forms or (args.out / "cp_linear_forms.json" if args.out else None)
    rows: list[dict[str, object]] = json.loads(file.read_text())["rows"] if file and file.exists() else []
    known = {row["case"] for row in rows}
    for case in CASES["cp_linear", "cuda"]:
        if case.name in known or time.monotonic() > deadline:
            continue
        rows += measure_forms(case, form_timer(case, device, overrides))
        write_table(form_entries(rows, arch), args.table)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            found = {"device": torch.cuda.get_device_name(device), "arch": arch, "rows": rows}
            file.write_text(json.dumps(found, indent=1) + "\n")
    common._tables.cache_clear()  # what is tuned next runs in the forms just found
    overrides.forget()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[], help="tune this operation (may be repeated; default all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after this long (default 9)")
    parser.add_argument("--candidates", type=int, default=12, help="configurations tried for an entry (default 12)")
    parser.add_argument("--out", type=Path, help="folder for the measurements, tuning.json")
    parser.add_argument(
        "--forms", type=Path, metavar="FILE", help="cp_linear's forms (default: cp_linear_forms.json in --out)"
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to bring up to date")
    parser.add_argument("--forms-only", action="store_true", help="of cp_linear its forms and no tiles")
    parser.add_argument("--dry-run", action="store_true", help="print what would be tried and stop")
    args = parser.parse_args(argv)
    from benchmarks.cases import CASES

    ops = args.op or sorted({op for op, _ in CASES})
    if args.dry_run:
        for op in ops:
            print(op, *(case.id for case in CASES[op, "cuda"]))
        for kernel in SPACES:
            print(f"{kernel}: {len(candidates(kernel, args.candidates))} candidates of {SPACES[kernel]}")
        return 0
    import torch
    from tqdm import tqdm

    if not torch.cuda.is_available():
        print("tune: needs a CUDA device", file=sys.stderr)
        return 2
    overrides = Overrides()
    deadline = time.monotonic() + 60 * args.minutes
    trials: list[Trial] = []
    failures: list[str] = []
    if "cp_linear" in ops:
        _forms_of_all(overrides, deadline, args)
    work = [(op, case) for op in ops if not args.forms_only for case in CASES[op, "cuda"]]
    for op, case in tqdm(work, desc="cases", unit="case"):
        if time.monotonic() > deadline:
            tqdm.write(f"out of time before {op} {case.id}")
            break
        try:
            for trial in tune_case(op, case, torch.device("cuda"), overrides, deadline, args.candidates):
                trials.append(trial)
        except Exception as e:  # the other cases are still worth tuning
            failures.append(f"{op} {case.id}: {type(e).__name__}: {e}")
            tqdm.write(failures[-1])
    found = {(t.kernel, t.arch, t.shape_class): t.config for t in trials if t.verdict == "kept"}
    write_table(found, args.table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        measured = {"device": torch.cuda.get_device_name(), "trials": [asdict(t) for t in trials], "failures": failures}
        (args.out / "tuning.json").write_text(json.dumps(measured, indent=1) + "\n")
    for key, config in found.items():
        print(*key, config)
    print(f"{len(trials)} timings, {len(found)} entries changed, {len(failures)} cases failed")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
