#!/usr/bin/env python3
"""How good the estimators of :class:`fastgist.nn.InformationBottleneckLoss` are at which size, against Gaussians of known
information.

    python scripts/bottleneck_study.py              docs/bottleneck.md and docs/studies-bottleneck.json (two minutes)
    python scripts/bottleneck_study.py --page       the page again, from the JSON that is there

No clock is in it: on one machine and one PyTorch the figures are the same every time. x is 1408 wide and z 768, as in an
InstructBLIP; z = mu(x) + sigma eps with sigma = 0.5, the default; everything else has its default too where nothing is said.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastgist.nn import InformationBottleneckLoss  # noqa: E402
from fastgist.nn._estimators import Club, Mine, stein_score  # noqa: E402

X, Z, Y, SIGMA = 1408, 768, 1000, 0.5
SEEDS = (0, 1, 2)
#: Rows of a call that only fills the bank.
FILL = 256
#: What else x moves of z, beside eight directions: the standard deviation of each of all 768.
LITTLE = 0.1


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / (a.norm() * b.norm()))


def mixing(little: float = 0.0) -> Tensor:
    """(X, Z) of rank 8, so that x gives each of z's entries a variance of 1 in the mean; and ``little`` in all directions."""
    mix = torch.randn(X, 8) @ torch.randn(8, Z) / (8 * X) ** 0.5
    return mix + little * torch.randn(X, Z) / X**0.5 if little else mix


def covariance(mix: Tensor) -> Tensor:
    """Of z, (Z, Z) in float64."""
    mix = mix.double()
    return mix.T @ mix + SIGMA**2 * torch.eye(Z, dtype=torch.float64)


# -- gradients by scores -----------------------------------------------------------------------------------------------


def fillings(bank: int, more: int = 0) -> list[int]:
    """Rows of the calls that fill a bank: few large ones, which takes the estimator less than many of a batch each."""
    return [FILL] * (-(-bank // FILL) + more)


def compression(seed: int, rows: int = 16, little: float = 0.0, more: int = 0, **options: Any) -> dict[str, float]:
    """Cosines of the gradient of I(z; x) once the bank is full: with the analytic one of I(W^T z; x), and of I(z; x).
    ``more``: calls before it (a learned projection takes one power iteration in each)."""
    torch.manual_seed(seed)
    mix = mixing(little)
    loss = InformationBottleneckLoss(Z, compression="score", relevance=None, eta=1.0, **options)
    for count in fillings(loss.bank, more):
        loss(torch.randn(count, X) @ mix)
    z = (torch.randn(rows, X) @ mix).requires_grad_()
    loss(z).backward()
    basis, whole = loss.z_projection.double(), covariance(mix)
    mu = z.detach().double()
    projected = mu @ basis @ torch.linalg.inv(basis.T @ whole @ basis) @ basis.T
    return {"projected": cosine(z.grad, projected), "whole": cosine(z.grad, mu @ torch.linalg.inv(whole))}


def relevance(seed: int, rho: float, rows: int = 16) -> dict[str, float]:
    """Of I(W^T z; P^T y), z and y depending on four directions of which each pair correlates by ``rho``: its value in
    nats, and cosine and norm of the estimated gradient."""
    torch.manual_seed(seed)
    to_z, to_y = torch.randn(4, Z) / 2, torch.randn(4, Y)
    loss = InformationBottleneckLoss(Z, y_dim=Y, compression=None, relevance="score", eta=1.0)
    for count in (*fillings(loss.bank), rows):
        n = torch.randn(count, 4)
        h = rho * n + math.sqrt(1 - rho**2) * torch.randn(count, 4)
        z, y = (n @ to_z).requires_grad_(), h @ to_y
        value = loss(z, None, y)
    value.backward()
    basis = loss.z_projection[:, :4].double()
    a, b = to_z.double() @ basis, to_y.double() @ loss.y_projection.double()
    marginal = a.T @ a + SIGMA**2 * torch.eye(4, dtype=torch.float64)
    back = torch.linalg.solve(b.T @ b, rho * b.T @ a)  # E[u | q] = q back
    conditional = marginal - rho * a.T @ b @ back
    u, q = z.detach().double() @ basis, y.double() @ loss.y_projection.double()
    score = -(u - q @ back) @ torch.linalg.inv(conditional) + u @ torch.linalg.inv(marginal)
    found = {
        "nats": float((torch.logdet(marginal) - torch.logdet(conditional)) / 2),
        "norm": float(z.grad.norm()) * rows,
    }
    return found | ({"cosine": cosine(z.grad, -score @ basis.T)} if rho else {})


def clusters(seed: int, degree: int, place: float = 2.0, spread: float = 0.3) -> dict[str, float]:
    """The score of two clusters in one dimension, from 512 samples at 512 fresh points: cosine with the analytic one."""
    torch.manual_seed(seed)

    def drawn() -> Tensor:
        return place * (2.0 * torch.randint(0, 2, (512, 1)) - 1) + spread * torch.randn(512, 1)

    samples, at = drawn(), drawn()
    exact = (place * torch.tanh(at * place / spread**2) - at) / spread**2
    return {"cosine": cosine(stein_score(samples, at, degree), exact)}


def unprojected(seed: int, rows: int = 16) -> dict[str, float]:
    """The spectral Stein estimator as published (eigh, median bandwidth) on z itself, from one batch; it is not offered."""
    torch.manual_seed(seed)
    mix = mixing(LITTLE)
    mu = torch.randn(rows, X) @ mix
    samples = mu + SIGMA * torch.randn(rows, Z)
    at = mu + SIGMA * torch.randn(rows, Z)
    distances = torch.cdist(samples.double(), samples.double())
    width = float(distances[~torch.eye(rows, dtype=torch.bool)].median()) ** 2
    gram, cross = (torch.exp(-(torch.cdist(t.double(), samples.double()) ** 2) / (2 * width)) for t in (samples, at))
    gradients = (samples.double() * gram.sum(1, keepdim=True) - gram @ samples.double()) / width
    values, vectors = torch.linalg.eigh(gram)
    kept = (values.flip(0).cumsum(0) / values.sum() < 0.95).sum() + 1  # as much as 95 % of the spectrum takes
    values, vectors = values[-kept:], vectors[:, -kept:]
    score = -cross @ vectors @ ((vectors.T @ gradients) / values[:, None] ** 2)
    return {"cosine": cosine(score, -at.double() @ torch.linalg.inv(covariance(mix)))}


# -- values by bounds --------------------------------------------------------------------------------------------------


def bounds(seed: int, kind: str, steps: int, rows: int = 16) -> dict[str, float]:
    """CLUB's and MINE's reading of I(z; x) at full width, mean and standard deviation of the last 100 steps, and the mean
    cosine of their gradients with the analytic one over those. ``truth``: what an exact one would read."""
    torch.manual_seed(seed)
    mix = mixing()
    inverse = torch.linalg.inv(covariance(mix))
    exact = float(torch.logdet(covariance(mix)) - Z * math.log(SIGMA**2)) / 2
    if kind == "club":
        loss = InformationBottleneckLoss(Z, X, compression="club", relevance=None, eta=1.0)
    else:  # MINE's bound is of (z, y): give it x for y, and its sign is that of a relevance
        loss = InformationBottleneckLoss(Z, y_dim=X, compression=None, relevance="mine", eta=1.0)
    read, cosines, exactly = [], [], []
    for step in range(steps):
        x = torch.randn(rows, X)
        z = (x @ mix).requires_grad_()
        (loss(z, x) if kind == "club" else -loss(z, None, x)).backward()
        if step >= steps - 100:
            read.append(float(loss.values["compression" if kind == "club" else "relevance"]))
            cosines.append(cosine(z.grad, z.detach().double() @ inverse))
            mu, noisy = z.detach(), z.detach() + SIGMA * torch.randn(rows, Z)
            own, other = ((t - mu).square().sum(-1) for t in (noisy, noisy.roll(1, 0)))
            exactly.append(float((other - own).mean() / (2 * SIGMA**2)))
    truth = mean(exactly) if kind == "club" else exact
    return {"read": mean(read), "std": stdev(read), "truth": truth, "nats": exact, "cosine": mean(cosines)}


def small_bounds(seed: int, kind: str, rows: int) -> dict[str, float]:
    """The same of two correlated pairs, two and two wide, rho 0.5 for CLUB and 0.8 for MINE: the last 150 of 500 steps."""
    torch.manual_seed(seed)
    rho = 0.5 if kind == "club" else 0.8
    estimator = Club(2, 2, 32, 1e-2, 1) if kind == "club" else Mine(2, 2, 64, 5e-3, 1)
    read = []
    for _ in range(500):
        left = torch.randn(rows, 2)
        right = rho * left + math.sqrt(1 - rho**2) * torch.randn(rows, 2)
        shift = (torch.randint(1, rows, (1,)),) if kind == "club" else ()
        read.append(float(estimator(left, right, *shift)))
        estimator.fit(left, right)
    nats = -math.log(1 - rho**2)
    truth = 2 * rho**2 / (1 - rho**2) if kind == "club" else nats
    return {"read": mean(read[-150:]), "std": stdev(read[-150:]), "truth": truth, "nats": nats}


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One line of the page, measured for every seed."""

    table: str
    name: str
    run: Callable[..., dict[str, float]]
    options: dict[str, Any] = field(default_factory=dict)


I_X, I_Y, BOUNDS, OTHERS = (
    "Gradient of I(z; x) by scores",
    "Gradient of I(z; y) by scores",
    "Values by bounds",
    "What is not resolved",
)
LEARNED, PUBLISHED = "learned projection, 20 steps on", "the published estimator on z, one batch of 16"
CELLS = (
    Cell(I_X, "bank 512", compression, {"bank": 512}),
    Cell(I_X, "bank 512, degree 2", compression, {"bank": 512, "degree": 2}),
    Cell(I_X, "bank 1024", compression),
    Cell(I_X, "bank 1024, degree 2", compression, {"degree": 2}),
    Cell(I_X, "bank 512, B = 2", compression, {"bank": 512, "rows": 2}),
    Cell(I_X, LEARNED, compression, {"projection": "learned", "more": 20}),
    Cell(I_X, "x moves all of z a little", compression, {"little": LITTLE}),
    Cell(
        I_X,
        "the same, learned projection, 20 steps on",
        compression,
        {"little": LITTLE, "projection": "learned", "more": 20},
    ),
    *(Cell(I_Y, f"rho {rho:g}", relevance, {"rho": rho}) for rho in (0.9, 0.5, 0.3, 0.0)),
    Cell(BOUNDS, "CLUB of (x, z), 400 steps", bounds, {"kind": "club", "steps": 400}),
    Cell(BOUNDS, "MINE of (x, z), 800 steps", bounds, {"kind": "mine", "steps": 800}),
    *(
        Cell(BOUNDS, f"{kind.upper()}, two wide, B = {rows}", small_bounds, {"kind": kind, "rows": rows})
        for rows in (64, 2)
        for kind in ("club", "mine")
    ),
    Cell(OTHERS, "two clusters, degree 1", clusters, {"degree": 1}),
    Cell(OTHERS, "two clusters, degree 2", clusters, {"degree": 2}),
    Cell(OTHERS, PUBLISHED, unprojected),
)


def measure(cells: Sequence[Cell] = CELLS, seeds: Sequence[int] = SEEDS, progress: bool = True) -> dict[str, Any]:
    """Every cell for every seed: rows with a list of values by name, in the order of ``seeds``."""
    from tqdm import tqdm

    from fastgist.train.measure import commit, versions

    rows, about = [], {"versions": versions(), "commit": commit(), "device": "cpu"}
    for cell in tqdm(cells, desc="estimators", unit="cell", disable=not progress):
        found = [cell.run(seed, **cell.options) for seed in seeds]
        values = {name: [one[name] for one in found] for name in found[0]}
        rows.append({"table": cell.table, "name": cell.name, "options": cell.options, "values": values})
    return {"rows": rows, "seeds": list(seeds)} | about


def of(found: dict[str, Any], name: str, value: str) -> list[float]:
    """A cell's values, by seed."""
    (row,) = (row for row in found["rows"] if row["name"] == name)
    return row["values"][value]


def between(values: Sequence[float], digits: int) -> str:
    """``0.97 to 0.99``, or one number where both are the same."""
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    low, high = (v.removeprefix("-") if not float(v) else v for v in (low, high))
    return low if low == high else f"{low} to {high}"


def claims(found: dict[str, Any]) -> Iterator[str]:
    """What is said of the sizes in the class's docstring, each as it stands there."""

    def say(name: str, value: str, digits: int) -> str:
        return between(of(found, name, value), digits)

    for bank, digits, above in ((512, 2, "at bank 512"), (1024, 3, "at 1024")):
        second = say(f"bank {bank}, degree 2", "projected", digits)
        yield f"{say(f'bank {bank}', 'projected', 3)} {above} (degree 2: {second})"
    yield f"at B = 2 and bank 512, {say('bank 512, B = 2', 'projected', 3)}"
    fixed, learned = "x moves all of z a little", f"the same, {LEARNED}"
    yield f"{say(LEARNED, 'whole', 3)} for a learned projection where x moves 8 directions of z and no more"
    yield f"{say(fixed, 'whole', 2)} for a fixed and {say(learned, 'whole', 2)} for a learned one"
    for rho in (0.9, 0.5, 0.3):
        yield f"{say(f'rho {rho:g}', 'cosine', 2)} at {say(f'rho {rho:g}', 'nats', 2)} nats"
    nats, norm = say("rho 0.5", "nats", 2), say("rho 0.5", "norm", 1)
    yield f"for independent y the norm is {say('rho 0', 'norm', 1)}, where the {nats} nats have {norm}"
    first, second = (say(f"two clusters, degree {degree}", "cosine", 2) for degree in (1, 2))
    yield f"the cosine is {first} (degree 2: {second})"
    club, mine = "CLUB of (x, z), 400 steps", "MINE of (x, z), 800 steps"
    yield f"MINE read {say(mine, 'read', 1)} nats of {say(mine, 'truth', 1)} after 800 steps"
    yield f"cosine of its gradient {say(mine, 'cosine', 2)}"
    yield f"CLUB, after 400, {say(club, 'read', 0)} of the {say(club, 'truth', 0)} that an exact q has"
    yield f"standard deviation {say(club, 'std', 0)}, cosine {say(club, 'cosine', 2)}"
    for rows, words in ((64, "At widths of 2 and B = 64"), (2, "at B = 2 they are finite, and read")):
        lower, upper = (f"{kind}, two wide, B = {rows}" for kind in ("MINE", "CLUB"))
        if rows == 64:
            yield f"{words} they read {say(lower, 'read', 2)} of {say(lower, 'truth', 2)} nats"
            yield f"{say(upper, 'read', 2)} of the {say(upper, 'truth', 2)} of an exact q"
            yield f"(a bound of {say(upper, 'nats', 2)} nats)"
        else:
            yield f"{words} {say(lower, 'read', 2)} and {say(upper, 'read', 2)}"
    yield f"the published estimator on z itself, from one batch of 16, {say(PUBLISHED, 'cosine', 2)}"


HEADS = {
    "projected": ("cosine with the gradient of I(W^T z; x)", 3),
    "whole": ("cosine with that of I(z; x)", 3),
    "nats": ("information, nats", 2),
    "cosine": ("cosine of the gradient", 2),
    "norm": ("norm of the gradient", 2),
    "read": ("reads, nats", 2),
    "truth": ("an exact one reads", 2),
    "std": ("standard deviation over steps", 2),
}
WORDS = {
    I_X: "x moves eight directions of z, by a variance of 1 an entry in the mean. \"A little\": and all of its directions, by "
    f"a standard deviation of {LITTLE}. B = 16 where nothing else is said.",
    I_Y: "y is 1000 wide; z and y depend on four directions, of which each pair correlates by rho. Bank 1024, B = 16. At "
    "rho 0 the gradient is zero, and all of its norm is noise.",
    BOUNDS: "CLUB's value is to be compared with what it would read with an exact q, which is more than the information. The "
    "last 100 steps at full width (B = 16, the module's own Adam), of the small ones the last 150 of 500.",
    OTHERS: "Two clusters in one dimension, at +-2 with a standard deviation of 0.3, 512 samples. The published estimator "
    "(eigenvectors of 95 % of the spectrum, the median bandwidth) is of z itself, 768 wide, and of the marginal score.",
}  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """The committed page."""
    lines = ["# How good the bottleneck's estimators are at which size", ""]
    seeds = ", ".join(map(str, found["seeds"]))
    lines += [
        f"Made by `python scripts/bottleneck_study.py`; least and greatest of seeds {seeds}, on a CPU, "
        f" PyTorch {found['versions']['torch']}. x 1408 wide, z 768, sigma 0.5, every other option of "
        "`fastgist.nn.InformationBottleneckLoss` at its default where none is named. A cosine of 1 is the right direction, of "
        "0 noise.",
        "",
    ]
    for table in dict.fromkeys(row["table"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["table"] == table]
        columns = [name for name in HEADS if any(name in row["values"] for row in rows)]
        lines += [f"## {table}", "", WORDS[table], ""]
        lines += ["| | " + " | ".join(HEADS[name][0] for name in columns) + " |", "|---" * (1 + len(columns)) + "|"]
        for row in rows:
            values = row["values"]
            cells = [between(values[name], HEADS[name][1]) if name in values else "" for name in columns]
            lines.append("| " + " | ".join([row["name"], *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    kept = options.out / "studies-bottleneck.json"
    if options.page:
        found = json.loads(kept.read_text())
    else:
        torch.set_num_threads(1)
        found = measure()
        options.out.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=2) + "\n")
    (options.out / "bottleneck.md").write_text(page(found))
    for claim in claims(found):
        print(claim)


if __name__ == "__main__":
    main()
