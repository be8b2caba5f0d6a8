#!/usr/bin/env python3
"""Launches and bytes of whole layers, before and after, counted without a GPU: writes docs/layers.md.

python scripts/layers.py                 seconds
python scripts/layers.py --only qkv      one layer, printed and not written

What counts is in benchmarks/launches.py. Layers are those of a ViT-B/16 and of PETAL's Q-Former, in bfloat16 with float32
factors, at full size: host code chooses forms by size. Matrix products are counted and not computed.
"""

from __future__ import annotations

import argparse
import functools
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import petal_step, train_step  # noqa: E402
from benchmarks.cases import case  # noqa: E402
from benchmarks.launches import HOPPER, Count, Ledger, on_a_card  # noqa: E402
from benchmarks.peers import log_softmax_kl  # noqa: E402

CPU = torch.device("cpu")
BATCH, TOKENS, WIDTH, RANK = 64, 197, 768, 32
OURS = "fastgist"
DROPPED = 0.1


@dataclass(frozen=True)
class Both:
    """Of one form of a layer."""

    forward: Count
    backward: Count

    def __sub__(self, other: Both) -> Both:
        return Both(self.forward - other.forward, self.backward - other.backward)


@dataclass(frozen=True)
class Layer:
    """title and about: of the page. forms: name -> what counts it."""

    title: str
    about: str
    forms: dict[str, Callable[[], Both]]


def count(forward: Callable[[], Tensor], wanted: list[Tensor]) -> Both:
    """A forward, and a backward to ``wanted`` from a gradient that is there."""
    with Ledger(forms_only=True) as before:
        out = forward()
    grad = torch.empty_like(out)
    with Ledger(forms_only=True) as after:
        torch.autograd.grad(out, wanted, grad)
    return Both(before.total, after.total)


# -- linear layers with a low-rank update ------------------------------------------------------------------------------


class Plain(nn.Module):
    """Linear layers with mode approximation, a torch call for each step: U and V shared, each fold with a gain of its own.
    ``inward``: folds of the input."""

    def __init__(self, base: nn.Linear, shared: nn.ParameterDict, modes: slice, inward: bool = False) -> None:
        super().__init__()
        self.base, self.shared, self.modes, self.inward = base, shared, modes, inward

    def forward(self, x: Tensor) -> Tensor:
        u, v, gain = (t.to(x.dtype) for t in (self.shared["u"], self.shared["v"], self._gain()))
        if self.inward:
            return self.base(x) + (x.unflatten(-1, (len(gain), -1)) @ u * gain).sum(-2) @ v.T
        if len(gain) == 1:
            return self.base(x) + (x @ u * gain) @ v.T
        return self.base(x) + (((x @ u)[..., None, :] * gain) @ v.T).flatten(-2)

    def _gain(self) -> Tensor:
        return self.shared["p"][self.modes] * self.shared["lam"]


def _linear(inner: int, outer: int) -> nn.Linear:
    return nn.Linear(inner, outer, dtype=torch.bfloat16).requires_grad_(False)


def _shared(modes: int) -> nn.ParameterDict:
    shapes = {"u": (WIDTH, RANK), "v": (WIDTH, RANK), "p": (modes, RANK), "lam": (RANK,)}
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


def _counted(model: nn.Module, run: Callable[[Tensor], Any]) -> Both:
    x = torch.randn(BATCH * TOKENS, WIDTH).to(torch.bfloat16).requires_grad_()

    def forward() -> Tensor:
        out = run(x)
        return out if isinstance(out, Tensor) else _Together.apply(*out)

    return count(forward, [x, *(p for p in model.parameters() if p.requires_grad)])


class _Together(torch.autograd.Function):
    """Several results as one whose gradient reaches each, without a launch."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.shapes = [p.shape for p in parts]
        return parts[0].new_empty(sum(p.numel() for p in parts))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(
            g.view(shape) for g, shape in zip(grad.split([s.numel() for s in ctx.shapes]), ctx.shapes, strict=True)
        )


def _lora(model: Callable[[], nn.Module], names: list[str], run: Callable[[Any, Tensor], Any]) -> dict[str, Any]:
    """PEFT's LoRA as it sets itself up, factors in float32, and with factors in the layer's dtype."""

    def of(wide: bool) -> Both:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
        tuned: Any = get_peft_model(model(), config, autocast_adapter_dtype=wide)
        return _counted(tuned, functools.partial(run, tuned.base_model.model))

    return {"PEFT LoRA": lambda: of(True), "PEFT LoRA, bfloat16 factors": lambda: of(False)}


def _factors(modes: int) -> Any:
    from fastgist.nn import CPFactors

    return CPFactors(WIDTH, WIDTH, RANK, modes)


def _qkv() -> dict[str, Callable[[], Both]]:
    from fastgist.nn import CPLinear

    def frozen() -> Both:
        return _counted(base := _linear(WIDTH, 3 * WIDTH), base)

    def plain() -> Both:
        model = Plain(_linear(WIDTH, 3 * WIDTH), _shared(3), slice(0, 3))
        return _counted(model, model)

    def ours() -> Both:
        model = CPLinear(_linear(WIDTH, 3 * WIDTH), _factors(3), (0, 1, 2))
        return _counted(model, model)

    lora = _lora(lambda: nn.ModuleDict({"qkv": _linear(WIDTH, 3 * WIDTH)}), ["qkv"], lambda m, x: m["qkv"](x))
    return {"frozen layer alone": frozen, "plain PyTorch": plain, **lora, OURS: ours}


def _q_k_v() -> dict[str, Callable[[], Both]]:
    from fastgist.nn import CPLinear, cp_together

    names = ["q", "k", "v"]

    def bases() -> dict[str, nn.Linear]:
        return {name: _linear(WIDTH, WIDTH) for name in names}

    def each(model: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(model[name](x) for name in names)

    def frozen() -> Both:
        return _counted(model := nn.ModuleDict(bases()), functools.partial(each, model))

    def plain() -> Both:
        shared = _shared(3)
        parts = {name: Plain(base, shared, slice(i, i + 1)) for i, (name, base) in enumerate(bases().items())}
        return _counted(model := nn.ModuleDict(parts), functools.partial(each, model))

    def ours(run: Callable[..., Any]) -> Both:
        factors = _factors(3)
        layers = nn.ModuleDict({name: CPLinear(base, factors, i) for i, (name, base) in enumerate(bases().items())})
        return _counted(layers, functools.partial(run, layers))

    return {
        "frozen layers alone": frozen,
        "plain PyTorch": plain,
        **_lora(lambda: nn.ModuleDict(bases()), names, each),
        f"{OURS}, layer by layer": functools.partial(ours, each),
        f"{OURS}, `cp_together`": lambda: ours(lambda layers, x: cp_together(list(layers.values()), x)),
    }


def _ffn() -> dict[str, Callable[[], Both]]:
    from fastgist.nn import CPLinear

    def bases() -> tuple[nn.Linear, nn.Linear]:
        return _linear(WIDTH, 4 * WIDTH), _linear(4 * WIDTH, WIDTH)

    def run(model: Any, x: Tensor) -> Tensor:
        return model["down"](F.gelu(model["up"](x)))

    def of(up: nn.Module, down: nn.Module) -> Both:
        return _counted(model := nn.ModuleDict({"up": up, "down": down}), functools.partial(run, model))

    def plain() -> Both:
        (up, down), shared = bases(), _shared(8)
        return of(Plain(up, shared, slice(0, 4)), Plain(down, shared, slice(4, 8), inward=True))

    def ours() -> Both:
        (up, down), factors = bases(), _factors(8)
        return of(CPLinear(up, factors, (0, 1, 2, 3)), CPLinear(down, factors, (4, 5, 6, 7)))

    lora = _lora(lambda: nn.ModuleDict(zip(("up", "down"), bases(), strict=True)), ["up", "down"], run)
    return {"frozen layers alone": lambda: of(*bases()), "plain PyTorch": plain, **lora, OURS: ours}


# -- blocks of models: a model of some layers less one of fewer -------------------------------------------------------


def _step(step: Any) -> Both:
    given = (step.images, step.target) if isinstance(step, train_step.Step) else step.given
    wanted = [p for found in step.parameters.values() for p in ([found] if isinstance(found, Tensor) else found[0])]
    return count(lambda: step.loss(*given), wanted)


def _vit(provider: str) -> Both:
    def of(layers: int) -> Both:
        shape = case(torch.bfloat16, B=BATCH, S=224, D=WIDTH, L=layers)
        return _step(train_step.PROVIDERS[provider](shape, CPU, dropout=0.0))

    return of(4) - of(3)


class PlainBlocks(train_step.PlainViT):
    """The plain ViT with CP on every qkv, and adapters behind a LayerNorm of their own with dropout."""

    def __init__(self, vit: Any, trained: dict[str, Tensor], layers: int) -> None:
        super().__init__(vit, trained, False, DROPPED)
        ones = {"weight": torch.ones(WIDTH), "bias": torch.zeros(WIDTH)}
        self.norms = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(t.clone()) for name, t in ones.items()}) for _ in range(layers)
        )
        self.shared = _shared(3 * layers)
        for i, block in enumerate(vit.blocks):
            block.attn.qkv = Plain(block.attn.qkv, self.shared, slice(3 * i, 3 * i + 3))

    def _adapter(self, p: Any, x: Tensor) -> Tensor:
        norm = self.norms[[q is p for q in self.adapters].index(True)]
        a = F.layer_norm(x, x.shape[-1:], norm["weight"].to(x.dtype), norm["bias"].to(x.dtype))
        low = F.gelu(F.linear(a, p["down_weight"].to(x.dtype), p["down_bias"].to(x.dtype)))
        up = F.linear(F.dropout(low, DROPPED), p["up_weight"].to(x.dtype), p["up_bias"].to(x.dtype))
        return up * train_step.SCALE


def _everything(ours: bool) -> Both:
    """A block with CP on qkv, an adapter with a norm and dropout beside both branches, and a gist token, by the gist loss."""

    def of(layers: int) -> Both:
        shape = case(torch.bfloat16, B=BATCH, S=224, D=WIDTH, L=layers)
        model, loss = (_our_blocks if ours else _plain_blocks)(shape)
        images, target = train_step.batch(shape, CPU, torch.bfloat16)
        return count(lambda: loss(model(images), target), [p for p in model.parameters() if p.requires_grad])

    return of(4) - of(3)


def _plain_blocks(shape: Any) -> tuple[nn.Module, Callable[..., Tensor]]:
    vit = train_step.backbone(shape, CPU)
    vit.head.requires_grad_(True)

    def loss(logits: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        z, g = (t.float() for t in logits)
        return F.cross_entropy(z, target) + F.cross_entropy(g, target) + log_softmax_kl(z, g)

    return PlainBlocks(vit, train_step.initial(shape, CPU), shape["L"]).train(), loss


def _our_blocks(shape: Any) -> tuple[nn.Module, Callable[..., Tensor]]:
    import fastgist as fg

    vit, factors = train_step.backbone(shape, CPU), _factors(3 * shape["L"])
    adapters = {"placement": "shared", "scale": train_step.SCALE, "norm": True, "dropout": DROPPED}
    fg.get_peft_model(vit, fg.AdapterConfig(train_step.BOTTLENECK, **adapters))
    for i, block in enumerate(vit.blocks):
        attn = block.base_layer.attn
        attn.qkv = fg.nn.CPLinear(attn.qkv, factors, (3 * i, 3 * i + 1, 3 * i + 2))
    return fg.add_gist(vit, fg.GistConfig(dropout=DROPPED)).train(), fg.nn.GistLoss()


def _qformer(provider: str) -> Both:
    def of(layers: int) -> Both:
        shape = case(torch.bfloat16, B=16, T=20, R=64, D=WIDTH, K=1408, N=257, L=layers)
        return _step(petal_step.PROVIDERS[provider](shape, CPU))

    return of(4) - of(2)


LAYERS = {
    "qkv": Layer(
        "A fused qkv with a gain for each projection",
        f"{WIDTH} -> {3 * WIDTH}, three folds that share U and V, rank {RANK}; {BATCH} x {TOKENS} rows. LoRA of the same "
        "rank has one pair of factors, 2304 wide, and no gains.",
        _qkv(),
    ),
    "q_k_v": Layer(
        "q, k and v as three layers with one input",
        f"{WIDTH} -> {WIDTH} each, one U and V, a gain each, rank {RANK}; {BATCH} x {TOKENS} rows. "
        "fastgist.nn.cp_together calls the three layers as one.",
        _q_k_v(),
    ),
    "ffn": Layer(
        "A feed-forward with folds",
        f"{WIDTH} -> {4 * WIDTH} -> {WIDTH}: four folds of outputs, four of inputs, torch's GELU between; one U and V for "
        f"all, rank {RANK}; {BATCH} x {TOKENS} rows.",
        _ffn(),
    ),
    "vit": Layer(
        "A block of ViT-B/16 with GIST's shared adapter and a gist token",
        f"The step of benchmarks/train_step.py with four layers less that with three, batch {BATCH}: a block in the middle, "
        f"{TOKENS + 1} tokens, bottleneck {train_step.BOTTLENECK}. PEFT LoRA is another model, on qkv, without gist token.",
        {p: functools.partial(_vit, p) for p in ("authors", "plain", "PEFT LoRA", "fastgist")},
    ),
    "block": Layer(
        "The same block with everything on",
        f"CP on the fused qkv (rank {RANK}, a gain for each projection), the adapter behind a LayerNorm of its own with "
        "dropout, beside both branches, and the gist token; batch, tokens and difference as above.",
        {
            "plain": lambda: _everything(False),
            "PEFT LoRA": lambda: _vit("PEFT LoRA"),
            "fastgist": lambda: _everything(True),
        },
    ),
    "qformer": Layer(
        "Two layers of PETAL's Q-Former with everything on",
        "The step of benchmarks/petal_step.py with four layers less that with two, batch 16: self-attention of 52 tokens "
        "twice, cross-attention to 257 image tokens once, updates of rank 64 with dropout on query, key and value of both. "
        "What is done once for all layers (the experts, the image's x U, the head) is in neither. base: the frozen Q-Former.",
        {p: functools.partial(_qformer, p) for p in ("base", "released", "PEFT LoRA", "fastgist", "fastgist cp")},
    ),
}


# -- the page ----------------------------------------------------------------------------------------------------------


def counted(name: str, forms: list[str] | None = None) -> dict[str, Both]:
    """Of the forms of one layer (all by default)."""
    with on_a_card():
        torch.manual_seed(0)
        return {form: of() for form, of in LAYERS[name].forms.items() if forms is None or form in forms}


def table(found: dict[str, Both]) -> list[str]:
    lines = [
        "| | launches forward | backward | MB forward | backward | bytes beside the first row's |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(found.values()))
    for form, both in found.items():
        sums = [sum(c.bytes for c in (b.forward, b.backward)) for b in (both, first)]
        cells = [form, both.forward.launches, both.backward.launches]
        cells += [f"{both.forward.bytes / 1e6:.1f}", f"{both.backward.bytes / 1e6:.1f}", f"{sums[0] / sums[1]:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def where_peft_is_less(rows: list[str]) -> str:
    """In words, from a table's rows: where one of PEFT's, another model with other things trained, takes fewer launches than
    ours, the last one. Empty where none does."""
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows[2:]]
    ours, found = cells[-1], []
    for theirs in (row for row in cells if row[0].startswith("PEFT")):
        fewer = [
            f"{theirs[at]} {way} where {ours[0]} takes {ours[at]}"
            for at, way in ((1, "forward"), (2, "backward"))
            if int(theirs[at]) < int(ours[at])
        ]
        found += [f"{theirs[0]} {' and '.join(fewer)}"] if fewer else []
    return f"Fewer launches: {'; '.join(found)}." if found else ""


_RULES = (
    f"Counted without a GPU, as for {HOPPER.name}: **nothing here has run on a card.** Written by `python scripts/layers.py`; "
    "bfloat16, what is trained is float32. An operator of PyTorch that computes is one launch, as is one of Triton; bytes are "
    "each launch's operands and results, once. A library's kernel that needs more than one launch counts as one, and what a "
    "kernel reads twice counts once, in every row alike (benchmarks/launches.py). Launches of the backward include the sums "
    "of gradients that reach a tensor on several ways, not the optimiser."
)


def page(found: dict[str, dict[str, Both]]) -> str:
    lines = [
        "# Launches and bytes of whole layers",
        "",
        textwrap.fill(_RULES, 120),
        "",
    ]
    for name, rows in found.items():
        counted_rows = table(rows)
        lines += [f"## {LAYERS[name].title}", "", textwrap.fill(LAYERS[name].about, 120), "", *counted_rows, ""]
        if note := where_peft_is_less(counted_rows):
            lines += [textwrap.fill(note, 120), ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(LAYERS), help="print this one")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "layers.md")
    args = parser.parse_args(argv)
    if args.only:
        print("\n".join(table(counted(args.only))))
        return 0
    args.out.write_text(page({name: counted(name) for name in LAYERS}))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
