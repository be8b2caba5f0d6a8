"""The shapes that are timed, and what each must at least move and compute. No shape stands anywhere else.

Floors on a GPU: max(bytes / measured copy bandwidth, FLOPs / measured matmul rate). On a CPU a floor is work timed in
the same run (harness.py): the copy of the two tensors for the losses, the matrix products alone for the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    name: str
    sizes: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    launch_bound: bool = False
    forward_only: bool = False

    def __getitem__(self, key: str) -> int:
        return dict(self.sizes)[key]

    def get(self, key: str, default: int) -> int:
        return dict(self.sizes).get(key, default)

    @property
    def id(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


def case(dtype: torch.dtype, *, launch_bound: bool = False, forward_only: bool = False, **sizes: int) -> Case:
    name = "_".join(f"{key}{value}" for key, value in sizes.items())
    return Case(name, tuple(sizes.items()), dtype, launch_bound, forward_only)


def _adapter_options(dtype: torch.dtype, **sizes: int) -> list[Case]:
    """LayerNorm in front; a residual that is not x; dropout of the hidden units; six experts of eight units with a gate,
    and an output bias each; the norm with all of them but dropout, which a peer cannot draw alike."""
    wide, experts = sizes | {"H": 64}, sizes | {"H": 48, "E": 6}
    options = [{name: 1} for name in ("norm", "residual", "dropout")]
    return [case(dtype, **wide, **o) for o in options] + [
        case(dtype, **experts),
        case(dtype, **experts, norm=1, residual=1),
    ]


#: (op, device type) -> cases.
CASES: dict[tuple[str, str], list[Case]] = {
    ("bidirectional_kl", "cpu"): [
        case(torch.float32, M=512, V=1000),
        case(torch.float32, M=256, V=32000),
        *(case(torch.float32, M=m, V=v) for m, v in ((8192, 100), (1024, 8000), (64, 128256), (1, 1000000))),
        case(torch.bfloat16, M=256, V=32000),
        # One class in 64 is masked, -inf in both heads, the last class is an odd one, and in the second a row is NaN.
        case(torch.float32, M=256, V=32001, absent=64),
        case(torch.float32, M=256, V=32001, absent=64, nan=1),
        case(torch.float32, M=256, V=32000, detached=1),  # the gist logits are a teacher's: no gradient is wanted
    ],
    ("bidirectional_kl", "cuda"): [
        case(torch.bfloat16, M=64, V=100, launch_bound=True),
        case(torch.bfloat16, M=8192, V=1000),
        case(torch.bfloat16, M=8192, V=32000),
        case(torch.bfloat16, M=8192, V=128256),
        case(torch.float32, M=8192, V=1000),
        case(torch.bfloat16, M=8192, V=32001, absent=64),
        case(torch.bfloat16, M=8192, V=32001, absent=64, nan=1),
        case(torch.bfloat16, M=8192, V=32000, detached=1),
    ],
    ("gist_linear_loss", "cpu"): [
        case(torch.float32, M=256, V=8000, H=256),
        case(torch.float32, M=64, V=128256, H=64),
        case(torch.float32, M=256, V=128256, H=64),  # enough rows for an eighth of the whole logits' memory
    ],
    ("gist_linear_loss", "cuda"): [
        case(torch.bfloat16, M=2048, V=32000, H=1024),
        case(torch.bfloat16, M=8192, V=128256, H=4096),
    ],
    ("cp_linear", "cpu"): [
        case(torch.float32, M=3152, d=768, R=32),
        *(case(torch.float32, M=m, d=2048, R=16) for m in (1, 512)),
        case(torch.float32, M=1576, d=768, R=16, W=3),  # q, k, v: W weights with one input
        case(torch.float32, M=788, d=768, R=16, G=4),  # a feed-forward's first layer: G folds of outputs, a gain each
    ],
    ("cp_linear", "cuda"): [
        *(case(torch.bfloat16, M=16384, d=d, R=r) for d in (768, 1024, 4096) for r in (16, 64)),
        # Of language models. The widths that are above already are not timed twice.
        *(
            case(torch.bfloat16, launch_bound=m == 1, M=m, d=d, R=16)
            for d in (2048, 4096, 5120)
            for m in (1, 512, 4096, 16384)
            if (m, d) != (16384, 4096)
        ),
        # Decoding in small batches; one row is above.
        *(
            case(torch.bfloat16, launch_bound=True, forward_only=True, M=m, d=d, R=16)
            for d in (2048, 4096)
            for m in (16, 64)
        ),
        # q, k, v: W weights with one input; a feed-forward's first layer: G folds of outputs, a gain each.
        *(case(torch.bfloat16, M=16384, d=d, R=16, W=3) for d in (768, 1024, 4096)),
        *(case(torch.bfloat16, M=16384, d=d, R=16, G=4) for d in (768, 1024)),
    ],
    ("adapter", "cpu"): [
        *(case(torch.float32, M=3152, d=768, H=h) for h in (8, 64, 4, 16, 256)),
        case(torch.float32, M=256, d=8192, H=64),
        *_adapter_options(torch.float32, M=3152, d=768),
    ],
    ("adapter", "cuda"): [
        *(case(torch.bfloat16, M=16384, d=d, H=h) for d in (768, 1024, 4096) for h in (8, 64)),
        *(case(torch.bfloat16, M=16384, d=768, H=h) for h in (4, 16, 256)),
        *(case(torch.bfloat16, M=4096, d=8192, H=h) for h in (16, 256)),
        *_adapter_options(torch.bfloat16, M=16384, d=768),
    ],
    ("cp_update", "cpu"): [case(torch.float32, M=3152, d=768, R=32), case(torch.bfloat16, M=512, d=2048, R=16)],
    ("cp_update", "cuda"): [case(torch.bfloat16, M=16384, d=d, R=r) for d in (1024, 4096) for r in (16, 64)],
    ("gelu", "cpu"): [case(torch.float32, M=3152, d=3072)],
    ("gelu", "cuda"): [case(torch.bfloat16, M=m, d=3072) for m in (6336, 50688)],
}
_VITS = {"Ti": {"D": 192, "L": 12}, "B": {"D": 768, "L": 12}, "L": {"D": 1024, "L": 24}}
CASES["train_step", "cpu"] = [case(torch.float32, B=8, S=224, **_VITS["Ti"])]
CASES["train_step", "cuda"] = [
    case(torch.bfloat16, launch_bound=b == 32, B=b, S=224, **_VITS[size])
    for size, batches in (("B", (32, 64, 256)), ("Ti", (32, 256)), ("L", (64,)))
    for b in batches
]
#: PETAL's Q-Former: B images, T words, rank R; width, width and number of the image tokens, layers.
_QFORMER = {"D": 768, "K": 1408, "N": 257, "L": 12}
_ON_A_CPU = ((8, 20, 64), (1, 20, 128), (1, 0, 64), (1, 128, 64), (1, 20, 64))
CASES["petal_step", "cpu"] = [case(torch.float32, B=b, T=t, R=r, **_QFORMER) for b, t, r in _ON_A_CPU]
CASES["petal_step", "cuda"] = [
    case(torch.bfloat16, launch_bound=b <= 16, B=b, T=t, R=r, **_QFORMER)
    for r in (64, 16, 32, 128)
    for t in (20, 0, 128)
    for b in (16, 1, 8, 32, 64)
]
#: One token through a layer, and through a Llama of L layers.
_DECODED = (*({"M": 1, "d": d} for d in (2048, 4096, 5120)), {"M": 1, "d": 1024, "L": 4})
CASES["decode", "cpu"] = [case(dtype, **sizes) for sizes in _DECODED for dtype in (torch.float32, torch.bfloat16)]
CASES["decode", "cuda"] = [case(torch.bfloat16, launch_bound=True, **sizes) for sizes in _DECODED]
CASES["topk_kl", "cpu"] = [case(torch.float32, M=256, V=32000, K=64)]
CASES["topk_kl", "cuda"] = [
    case(torch.bfloat16, M=8192, V=v, K=k)
    for v, k in ((1000, 8), (32000, 64), (128256, 8), (128256, 64), (128256, 256))
]
for _kind in ("cpu", "cuda"):  # a label may be a masked class, and its own logits always have a gradient
    CASES["gist_loss", _kind] = [c for c in CASES["bidirectional_kl", _kind] if set(dict(c.sizes)) == {"M", "V"}]

#: What is timed: forward, backward, both, and both with an incoming gradient that is not 1.
DIRECTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("bidirectional_kl", "cpu"): ("fwd_bwd", "fwd_bwd_scaled"),
    ("bidirectional_kl", "cuda"): ("fwd", "fwd_bwd", "fwd_bwd_scaled"),
    ("gist_loss", "cpu"): ("fwd_bwd", "fwd_bwd_scaled"),
    ("gist_loss", "cuda"): ("fwd", "fwd_bwd", "fwd_bwd_scaled"),
    ("gist_linear_loss", "cpu"): ("fwd_bwd",),
    ("gist_linear_loss", "cuda"): ("fwd_bwd",),
    ("topk_kl", "cpu"): ("fwd_bwd",),
    ("topk_kl", "cuda"): ("fwd", "fwd_bwd"),
    ("cp_linear", "cpu"): ("fwd_bwd",),
    ("cp_linear", "cuda"): ("fwd", "bwd"),
    ("cp_update", "cpu"): ("fwd_bwd",),
    ("cp_update", "cuda"): ("fwd", "bwd"),
    ("adapter", "cpu"): ("fwd_bwd",),
    ("adapter", "cuda"): ("fwd", "bwd"),
    ("gelu", "cpu"): ("fwd_bwd",),
    ("gelu", "cuda"): ("fwd", "bwd"),
    ("train_step", "cpu"): ("step",),
    ("train_step", "cuda"): ("step",),
    ("petal_step", "cpu"): ("step",),
    ("petal_step", "cuda"): ("step",),
    ("decode", "cpu"): ("token",),
    ("decode", "cuda"): ("token",),
}

#: What is timed first where minutes are few: of each operation the cases and providers that its targets are about.
FIRST: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bidirectional_kl": (
        ("M64_V100", "M8192_V1000", "M8192_V32000", "M8192_V128256"), ("authors", "log_softmax", "analytic"),
    ),
    "gist_loss": (("M64_V100", "M8192_V1000", "M8192_V32000", "M8192_V128256"), ("authors", "analytic")),
    "gist_linear_loss": (("M2048_V32000_H1024", "M8192_V128256_H4096"), ("log_softmax",)),
    "topk_kl": (("M8192_V32000_K64",), ("log_softmax",)),
    "cp_linear": (
        (*(f"M16384_d{d}_R{r}" for d, r in ((768, 16), (1024, 64), (4096, 16), (4096, 64))), "M1_d4096_R16",
         "M64_d4096_R16", "M512_d2048_R16", "M16384_d768_R16_W3"),
        ("frozen linear alone", "factored", "released", "dense delta", "PEFT LoRA"),
    ),
    "cp_update": (("M16384_d1024_R16", "M16384_d4096_R64"), ("addmm",)),
    "adapter": (tuple(f"M16384_d{d}_H{h}" for d, h in ((768, 8), (768, 64), (1024, 64), (4096, 64))), ("eager",)),
    "gelu": (("M50688_d3072",), ("eager",)),
}  # fmt: skip


def is_first(op: str, case: Case, provider: str, direction: str) -> bool:
    """Whether a row is one of :data:`FIRST`: in half precision, ours on a GPU beside the named peers."""
    names, peers = FIRST.get(op, ((), ()))
    ours = provider in ("fastgist triton", "fastgist cuda")
    return case.name in names and case.dtype.itemsize == 2 and (ours or provider in peers) and "scaled" not in direction


def square(kind: str) -> list[Case]:
    """cp_linear's cases of one square weight: those that records of its forms hold."""
    return [case for case in CASES["cp_linear", kind] if outputs(case) == 1]


def directions(op: str, kind: str, case: Case) -> tuple[str, ...]:
    """Of :data:`DIRECTIONS` those that ``case`` is timed in."""
    return ("fwd",) if case.forward_only else DIRECTIONS[op, kind]


def costs(op: str, case: Case, direction: str) -> tuple[int, int]:
    """(bytes that must move through device memory, FLOPs on the matrix units) of one call."""
    b = case.dtype.itemsize
    fwd, bwd = _COSTS[op](case, b)
    if direction == "fwd":
        return fwd
    if direction == "bwd":
        return bwd
    if op in ("bidirectional_kl", "gist_loss"):  # rows held on chip: read once, gradients written once
        return (4 - case.get("detached", 0)) * case["M"] * case["V"] * b, 0
    if op == "topk_kl":
        return bwd
    return fwd[0] + bwd[0], fwd[1] + bwd[1]


def _logits(case: Case, b: int):
    elements = case["M"] * case["V"]
    return (2 * elements * b, 0), ((4 - case.get("detached", 0)) * elements * b, 0)


def _topk(case: Case, b: int):
    elements, known = case["M"] * case["V"], case["M"] * case["K"]
    return (elements * b + 12 * known, 0), (2 * elements * b + 12 * known, 0)


def _gist_linear(case: Case, b: int):
    m, v, h = case["M"], case["V"], case["H"]
    gemm = 2 * m * h * v
    return ((2 * m * h + v * h) * b, 2 * gemm), ((4 * m * h + 2 * v * h) * b, 4 * gemm)


def _cp_linear(case: Case, b: int):
    """W weights (d, d) with one input, or one of G d rows: U and V (d, R) are shared, V's product is as wide as the output."""
    m, d, r = case["M"], case["d"], case["R"]
    n = d * outputs(case)
    forward = (m * d + m * n + d * n + 2 * d * r) * b, 2 * m * (d * n + d * r + n * r)
    backward = (2 * m * d + m * n + d * n + 2 * d * r + m * r) * b, 2 * m * d * n + 4 * m * r * (d + n)
    return forward, backward


def _cp_update(case: Case, b: int):
    m, d, r = case["M"], case["d"], case["R"]
    return ((3 * m * d + 2 * d * r) * b, 4 * m * d * r), ((3 * m * d + 4 * d * r + m * r) * b, 8 * m * d * r)


def outputs(case: Case) -> int:
    """Of cp_linear: how often the d outputs there are, as weights or as folds."""
    return case.get("W", 1) * case.get("G", 1)


def _adapter(case: Case, b: int):
    """FLOPs without forming z again. A residual that is not x is read, and its gradient is the incoming one itself; a gate
    (M, E) is read, and read and written; norm and dropout move nothing of that size."""
    m, d, h = case["M"], case["d"], case["H"]
    gate = m * case.get("E", 0)
    forward = ((2 + case.get("residual", 0)) * m * d + 2 * d * h + gate) * b, 4 * m * d * h
    return forward, ((3 * m * d + 4 * d * h + 2 * gate) * b, 8 * m * d * h)


def _gelu(case: Case, b: int):
    elements = case["M"] * case["d"]
    return (2 * elements * b, 0), (3 * elements * b, 0)


_COSTS = {
    "bidirectional_kl": _logits,
    "gist_loss": _logits,
    "gist_linear_loss": _gist_linear,
    "topk_kl": _topk,
    "cp_linear": _cp_linear,
    "cp_update": _cp_update,
    "adapter": _adapter,
    "gelu": _gelu,
}
