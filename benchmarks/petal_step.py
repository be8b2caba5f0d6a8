"""Training steps of PETAL's Q-Former (InstructBLIP's, transformers' own), by fastgist and by what it replaces.

"released" is the released code's form, written independently: every adapted matrix is a module by itself that adds
dropout(x U) S_m V^T to the frozen layer's output, S_m = C x_3 p_m formed for it alone, and the experts run one by one. "dense
delta" forms W + dW for every matrix (CaRA). "fastgist" is :func:`fastgist.petal.wrap` with core "tucker" and uniform gating,
which is the same mathematics; "fastgist cp" is its default, the paper's core with a gate. All of them stand on the same
frozen Q-Former and are trained by the mean square of the queries' states against a target, so that neither image encoder
nor language model is in the time. "base" is that Q-Former with its first norm trained: what a step costs before any update
is added.

In half precision the frozen weights are bfloat16, what is trained is float32 and cast where it meets an activation;
"autocast": every weight float32 under torch.autocast.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import Case
from benchmarks.peers import Missing, _need
from benchmarks.train_step import PLAIN, Recipe, kernels

QUERIES, EXPERTS, EXPERT_DIM, DROPOUT = 32, 6, 64, 0.1  # as released
KINDS = ("text", "image")


@dataclass
class Step:
    """One provider's training step. ``parameters``: the trained ones by a common name, with how those of one name that are
    several tensors here are put together."""

    model: nn.Module
    loss: Callable[..., Tensor]
    given: tuple[Tensor, ...]
    parameters: dict[str, tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]]
    optimizer: torch.optim.Optimizer

    def __call__(self) -> Tensor:
        loss = self.loss(*self.given)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, gradients), without a step."""
        loss = self.loss(*self.given)
        found = iter(torch.autograd.grad(loss, [p for many, _ in self.parameters.values() for p in many]))
        return loss.detach(), {n: join([next(found) for _ in many]) for n, (many, join) in self.parameters.items()}


# -- the frozen model --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _frozen(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Any:
    try:
        from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration
    except ImportError as e:
        raise Missing("transformers is not installed") from e
    width, image_width, layers = sizes
    vision = {"hidden_size": image_width, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    text = {"model_type": "opt", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 32}
    config = InstructBlipConfig(
        vision_config=vision | {"image_size": 28},
        qformer_config={
            "vocab_size": 1000, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
            "intermediate_size": 4 * width, "encoder_hidden_size": image_width,
        },
        text_config=text | {"num_attention_heads": 2, "word_embed_proj_dim": 32},
        num_query_tokens=QUERIES,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = InstructBlipForConditionalGeneration(config)
        nn.init.normal_(model.query_tokens, std=0.5)
    return model.to(device, dtype).requires_grad_(False)


def backbone(case: Case, device: torch.device, dtype: torch.dtype, dropout: float) -> Any:
    """An InstructBLIP with random weights, of which only the Q-Former matters; its weights are the same tensors every time."""
    frozen = _frozen((case["D"], case["K"], case["L"]), device, dtype)
    shared = {id(t): t for t in (*frozen.parameters(), *frozen.buffers())}
    model = copy.deepcopy(frozen, shared)
    for module in model.qformer.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def matrices(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(kind, the module that has it, its name) of the adapted matrices, in the order of a forward."""
    for layer in model.qformer.encoder.layer:
        for name in ("query", "key", "value"):
            yield "text", layer.attention.attention, name
        if layer.has_cross_attention:
            for kind, name in (("text", "query"), ("image", "key"), ("image", "value")):
                yield kind, layer.crossattention.attention, name


def initial(case: Case, device: torch.device, core: str, gating: str) -> dict[str, Tensor]:
    """Values of what is trained, away from zero: float32 (float64 in a float64 case)."""
    wide = torch.promote_types(case.dtype, torch.float32)
    generator = torch.Generator().manual_seed(1)
    d, r, layers = case["D"], case["R"], case["L"]
    crossed = (layers + 1) // 2
    shapes: dict[str, tuple[tuple[int, ...], float]] = {}
    for kind, inner, modes in (("text", d, 3 * layers + crossed), ("image", case["K"], 2 * crossed)):
        shapes |= {f"{kind}.u": ((inner, r), inner**-0.5), f"{kind}.v": ((d, r), 0.05)}
        shapes |= {f"{kind}.p": ((modes, r), 0.3)}
        shapes |= {f"{kind}.c": ((r, r, r), 1 / r)} if core == "tucker" else {f"{kind}.lam": ((r,), 1.0)}
    hidden = EXPERTS * EXPERT_DIM
    shapes |= {"experts.down_weight": ((hidden, d), d**-0.5), "experts.down_bias": ((hidden,), 0.1)}
    shapes |= {"experts.up_weight": ((d, hidden), EXPERT_DIM**-0.5), "experts.up_bias": ((EXPERTS, d), 0.1)}
    if gating == "softmax":
        shapes |= {"experts.gate_weight": ((EXPERTS, d), d**-0.5), "experts.gate_bias": ((EXPERTS,), 0.1)}
    values = {n: torch.randn(*s, generator=generator, dtype=torch.float64) * std for n, (s, std) in shapes.items()}
    return {name: value.to(device, wide) for name, value in values.items()}


# -- the released form -------------------------------------------------------------------------------------------------


class Updated(nn.Module):
    """A frozen layer and its own update. ``factors``: the kind's u, v and core, which its matrices share."""

    def __init__(self, base: nn.Linear, factors: nn.ParameterDict, p: Tensor, dropout: float, dense: bool) -> None:
        super().__init__()
        self.base, self.factors, self.p, self.dense = base, factors, nn.Parameter(p.clone()), dense
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        u, v, p = (t.to(x.dtype) for t in (self.factors["u"], self.factors["v"], self.p))
        if "c" in self.factors:
            core = torch.einsum("r,str->st", p, self.factors["c"].to(x.dtype))
        else:
            core = torch.diag(self.factors["lam"].to(x.dtype) * p)
        if self.dense:
            return F.linear(x, self.base.weight + v @ core.T @ u.T, self.base.bias)
        return self.base(x) + (self.dropout(x @ u) @ core) @ v.T


class Experts(nn.Module):
    """K experts one by one behind the embeddings' last layer: their mean as released, or by a gate."""

    def __init__(self, base: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.base = base
        parts = [values[f"experts.{name}"] for name in ("down_weight", "down_bias", "up_weight", "up_bias")]
        down, down_bias, up = (t.chunk(EXPERTS, dim) for t, dim in zip(parts, (0, 0, 1), strict=False))
        self.each = nn.ModuleList(
            nn.ParameterDict({"a": down[k], "a_bias": down_bias[k], "b": up[k], "b_bias": parts[3][k]})
            for k in range(EXPERTS)
        )
        for experts in self.each:
            for name, value in experts.items():
                experts[name] = nn.Parameter(value.detach().clone().contiguous())
        self.gate = nn.ParameterDict(
            {n: nn.Parameter(values[f"experts.{n}"].clone()) for n in ("gate_weight", "gate_bias") if f"experts.{n}" in values}
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x)
        outs = []
        for e in self.each:
            a, a_bias, b, b_bias = (e[name].to(x.dtype) for name in ("a", "a_bias", "b", "b_bias"))
            outs.append(F.linear(F.linear(x, a, a_bias), b, b_bias))
        if not self.gate:
            return 0.6 * x + 0.4 * torch.stack(outs).mean(0)
        of_gate = x if x.shape[1] == QUERIES else x[:, QUERIES:]
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(of_gate.to(wide).mean(1), self.gate["gate_weight"], self.gate["gate_bias"])
        gate = torch.softmax(logits, -1).to(x.dtype)
        return x + sum(gate[:, k, None, None] * out for k, out in enumerate(outs))


# -- providers ---------------------------------------------------------------------------------------------------------


def _only(many: list[Tensor]) -> Tensor:
    return many[0]


def _step(case: Case, device: torch.device, model: Any, parameters: Any, recipe: Recipe) -> Step:
    def loss(image: Tensor, ids: Tensor | None, mask: Tensor, image_mask: Tensor, target: Tensor) -> Tensor:
        out = model.qformer(
            input_ids=ids,
            query_embeds=model.query_tokens.expand(len(image), -1, -1),
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=image_mask,
        )
        states = out.last_hidden_state[:, :QUERIES]
        return F.mse_loss(states.to(target.dtype), target)

    if recipe.compiled:
        torch._dynamo.reset()
        loss = torch.compile(loss, dynamic=False)
    if recipe.autocast:
        loss = torch.autocast(device.type, case.dtype)(loss)
    model.train()
    trained = [p for many, _ in parameters.values() for p in many]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.05, fused=True, capturable=device.type == "cuda")
    return Step(model, loss, batch(case, device, recipe.dtype(case)), parameters, optimizer)


def batch(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Image tokens (B, N, K), ids (B, T) or None, both masks, and the target (B, queries, D)."""
    generator = torch.Generator(device).manual_seed(2)
    b, words = case["B"], case["T"]
    image = torch.randn(b, case["N"], case["K"], generator=generator, device=device).to(dtype)
    ids = torch.randint(3, 1000, (b, words), generator=generator, device=device) if words else None
    masks = (torch.ones(b, n, dtype=torch.long, device=device) for n in (QUERIES + words, case["N"]))
    target = torch.randn(b, QUERIES, case["D"], generator=generator, device=device)
    return image, ids, *masks, target.to(torch.promote_types(dtype, torch.float32))


def _written_out(
    core: str = "tucker", gating: str = "uniform", dense: bool = False, recipe: Recipe = PLAIN, own_dropout: bool = True
) -> Callable[..., Step]:
    def build(case: Case, device: torch.device, dropout: float = DROPOUT) -> Step:
        model = backbone(case, device, recipe.dtype(case), dropout)
        values = initial(case, device, core, gating)
        shared = {
            kind: nn.ParameterDict(
                {n: nn.Parameter(values[f"{kind}.{n}"].clone()) for n in ("u", "v", "c", "lam") if f"{kind}.{n}" in values}
            )
            for kind in KINDS
        }  # fmt: skip
        parameters: dict[str, Any] = {f"{k}.{n}": ([p], _only) for k, of in shared.items() for n, p in of.items()}
        seen: Counter[str] = Counter()
        for kind, place, name in list(matrices(model)):
            p = values[f"{kind}.p"][seen[kind]]
            seen[kind] += 1
            updated = Updated(getattr(place, name), shared[kind], p, dropout if own_dropout else 0.0, dense)
            setattr(place, name, updated)
            parameters.setdefault(f"{kind}.p", ([], torch.stack))[0].append(updated.p)
        experts = Experts(model.qformer.embeddings.dropout, values)
        model.qformer.embeddings.dropout = experts
        joins: dict[str, Callable[..., Tensor]] = {
            "down_weight": torch.cat, "down_bias": torch.cat, "up_weight": functools.partial(torch.cat, dim=1),
            "up_bias": torch.stack,
        }  # fmt: skip
        for name, own in (("down_weight", "a"), ("down_bias", "a_bias"), ("up_weight", "b"), ("up_bias", "b_bias")):
            parameters[f"experts.{name}"] = [e[own] for e in experts.each], joins[name]
        parameters |= {f"experts.{n}": ([p], _only) for n, p in experts.gate.items()}
        return _step(case, device, model, parameters, recipe)

    return build


def _fastgist(
    core: str = "tucker", gating: str = "uniform", recipe: Recipe = PLAIN, own_dropout: bool = True
) -> Callable[..., Step]:
    def build(case: Case, device: torch.device, dropout: float = DROPOUT) -> Step:
        from fastgist import nn as layers
        from fastgist import petal

        model = backbone(case, device, recipe.dtype(case), dropout)
        config = petal.PetalConfig(
            rank=case["R"], core=core, dropout=dropout if own_dropout else 0.0, num_experts=EXPERTS,
            expert_dim=EXPERT_DIM, gating=gating,
        )  # fmt: skip
        petal.wrap(model, config, verbose=False)
        parts: dict[str, nn.Module] = {"experts": petal.experts_of(model)}
        for kind, place, name in matrices(model):
            layer = getattr(place, name)
            assert isinstance(layer, layers.CPLinear)
            parts[kind] = layer.factors
        parameters = {f"{kind}.{n}": ([p], _only) for kind, part in parts.items() for n, p in part.named_parameters()}
        values = initial(case, device, core, gating)
        with torch.no_grad():
            for name, ((p,), _) in parameters.items():
                p.copy_(values[name])
        return _step(case, device, model, parameters, recipe)

    return build


def _peft_lora(recipe: Recipe = PLAIN) -> Callable[..., Step]:
    """On the same matrices, at the rank that trains as many numbers as "fastgist" does."""

    def build(case: Case, device: torch.device, dropout: float = DROPOUT) -> Step:
        _need("peft")
        from peft import LoraConfig, get_peft_model

        model = backbone(case, device, recipe.dtype(case), dropout)
        one = sum(case["D"] + (case["D"] if kind == "text" else case["K"]) for kind, *_ in matrices(model))
        wanted = sum(value.numel() for value in initial(case, device, "tucker", "uniform").values())
        rank = max(1, round(wanted / one))
        where = r".*qformer\.encoder\..*\.attention\.(query|key|value)"
        get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=where))
        trained = {name: ([p], _only) for name, p in model.named_parameters() if p.requires_grad}
        if len(trained) != 2 * len(list(matrices(model))):
            raise AssertionError(f"PEFT adapted {len(trained) // 2} matrices")
        return _step(case, device, model, trained, recipe)

    return build


def _base(recipe: Recipe = PLAIN) -> Callable[..., Step]:
    def build(case: Case, device: torch.device, dropout: float = DROPOUT) -> Step:
        model = backbone(case, device, recipe.dtype(case), dropout)
        norm = model.qformer.embeddings.layernorm
        for name, p in list(norm.named_parameters()):
            setattr(norm, name, nn.Parameter(p.clone()))
        parameters = {name: ([p], _only) for name, p in norm.named_parameters()}
        return _step(case, device, model, parameters, recipe)

    return build


_FORMS: dict[str, Callable[..., Callable[..., Step]]] = {
    "base": _base,
    "released": _written_out,
    "dense delta": functools.partial(_written_out, dense=True),
    "PEFT LoRA": _peft_lora,
    "fastgist": _fastgist,
    "fastgist cp": functools.partial(_fastgist, "cp", "softmax"),
}
#: provider -> builder(case, device, dropout). "without dropout": of the updates; the Q-Former keeps its own.
PROVIDERS: dict[str, Callable[..., Step]] = {name: form() for name, form in _FORMS.items()}
PROVIDERS |= {
    f"{name}, without dropout": _FORMS[name](own_dropout=False) for name in ("released", "fastgist", "fastgist cp")
}
PROVIDERS |= {f"{name}, autocast": _FORMS[name](recipe=Recipe(autocast=True)) for name in ("released", "fastgist")}
PROVIDERS |= {f"{name}, compiled": form(recipe=Recipe(compiled=True)) for name, form in _FORMS.items()}
#: Steps of another model, there for their cost.
OTHER_MODEL = {"base", "PEFT LoRA", "base, compiled", "PEFT LoRA, compiled"}
#: Timed at every shape; the others at those of :func:`is_main`.
EVERYWHERE = ("base", "released", "fastgist", "fastgist cp")


def is_main(case: Case) -> bool:
    return (case["B"], case["T"], case["R"]) == (1 if case.dtype == torch.float32 else 16, 20, 64)


# -- parity, and what a step costs -------------------------------------------------------------------------------------


def parity(provider: str, case: Case, device: torch.device) -> str | None:
    """:func:`_parity` at a batch of two, once for all batches of a model."""
    two = tuple((dict(case.sizes) | {"B": 2}).items())
    return _parity(provider.replace(", compiled", ""), Case("two", two, case.dtype), device)


@functools.cache
def _parity(provider: str, case: Case, device: torch.device) -> str | None:
    """None if loss and gradients are as near to float64 as those of every matrix by itself, else what is not."""
    from fastgist.testing import within_budget

    core, gating = ("cp", "softmax") if provider.startswith("fastgist cp") else ("tucker", "uniform")
    ours, grads = PROVIDERS[provider](case, device, dropout=0.0).gradients()
    plain, plain_grads, exact, exact_grads = _by_itself(core, gating, case, device)
    wrong = within_budget(ours.float(), plain.float(), exact, scale=float(exact) + 1.0, dtype=case.dtype)
    if wrong:
        return f"loss: {wrong}"
    if missing := set(exact_grads) - set(grads):
        return f"no gradients of {', '.join(sorted(missing))}"
    for what, names in _together(exact_grads).items():
        joined = (torch.cat([g[name].flatten() for name in names]) for g in (grads, plain_grads, exact_grads))
        found, near, true = joined
        wrong = within_budget(found.to(near.dtype), near, true, dtype=case.dtype)
        if wrong:
            return f"gradient of {what}: {wrong}"
    return None


def _together(names: Iterable[str]) -> dict[str, list[str]]:
    """Small parameters with one of their kind: the error of a handful of elements is a matter of luck."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.replace(".lam", ".p").replace("gate_bias", "gate_weight"), []).append(name)
    return found


@functools.cache
def _by_itself(core: str, gating: str, case: Case, device: torch.device) -> tuple[Any, ...]:
    """Loss and gradients of the form written out, in the case's dtype and in float64."""
    build = _written_out(core, gating)
    exact = build(Case(case.name, case.sizes, torch.float64), device, dropout=0.0).gradients()
    return *build(case, device, dropout=0.0).gradients(), *exact


class _Calls(TorchDispatchMode):
    """Counts operator calls that compute something; of an operator of ours, or one of torch's that is made of others, what it
    calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastgist":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        if func.namespace == "aten" and not (func.is_view or func._opname in _NOTHING or "empty" in func._opname):
            self.found[str(func)] += 1
        return func(*args, **kwargs)


#: Operators that only name, or read.
_NOTHING = ("_unsafe_view", "_local_scalar_dense", "promote_types")


@dataclass(frozen=True)
class Counts:
    """Of one step. flops: of its matrix products. operators: calls that compute, those inside an operator of ours too. It
    stands for launches where there are none; on a GPU an operator of ours is a kernel or a few."""

    flops: int
    operators: int


def counts(step: Step) -> Counts:
    with FlopCounterMode(display=False) as flops:
        step()
    with _Calls() as calls:
        step()
    return Counts(flops.get_total_flops(), sum(calls.found.values()))


def eager(provider: str) -> str:
    return provider.replace(", compiled", "")


@functools.cache
def counted(provider: str, case: Case, device: torch.device) -> Counts:
    """:func:`counts` of the eager form: a compiled step's operators are its own affair, its products are the same."""
    return counts(PROVIDERS[eager(provider)](case, device))


def cost_row(provider: str, case: Case, device: torch.device) -> dict[str, object]:
    found, base = counted(eager(provider), case, device), counted("base", case, device)
    row: dict[str, object] = {"flops": found.flops, "update_flops": found.flops - base.flops}
    if provider == eager(provider):
        row |= {"operators": found.operators, "update_operators": found.operators - base.operators}
    return row


def least_bytes(case: Case) -> int:
    """What a step must move: the frozen weights, once forward and once for the input gradients, the image tokens for every
    layer that crosses, and the stream of queries and words into and out of each layer, forward, and its gradient
    likewise. What stays inside a layer is taken to stay on chip."""
    d, k, layers, b = case["D"], case["K"], case["L"], case.dtype.itemsize
    crossed, rows = layers // 2, QUERIES + case["T"]
    weights = layers * (4 + 8 + (8 if case["T"] else 0)) * d * d + crossed * (2 * d * d + 2 * k * d)
    image = crossed * case["B"] * case["N"] * k
    return (2 * weights + 2 * image + 4 * layers * case["B"] * rows * d) * b


def describe(case: Case) -> str:
    return (
        f"Q-Former, {case['L']} layers of {case['D']}, {QUERIES} queries and {case['T']} words, {case['N']} x {case['K']} "
        f"image tokens, rank {case['R']}"
    )


def trained(step: Step) -> int:
    return sum(math.prod(p.shape) for many, _ in step.parameters.values() for p in many)


__all__ = [
    "EVERYWHERE",
    "OTHER_MODEL",
    "PROVIDERS",
    "Counts",
    "Step",
    "cost_row",
    "counts",
    "describe",
    "is_main",
    "kernels",
    "least_bytes",
    "parity",
    "trained",
]
