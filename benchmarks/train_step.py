"""Whole training steps: a timm ViT with GIST's shared adapter and a gist token, by fastgist and by what it replaces.

:class:`PlainViT` is the same model written independently of fastgist and of timm's forward, on the same frozen weights:
an adapter of four torch calls beside each branch, two head calls, every block for every token. With ``materialised``
it is what the paper's own code does (attention weights in memory, softmax().log() losses); without, the best of plain
PyTorch (scaled_dot_product_attention, log_softmax losses), which torch.compile may then improve on.

In half precision the frozen weights and the head are bfloat16, what is trained beside them is float32 and cast where it
meets an activation. The providers named "autocast" train the way that most scripts do instead, which needs no change to a
model: every weight float32, torch.autocast around forward and loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.peers import ALPHA, BETA, Missing, _need, authors_kl, log_softmax_kl

BOTTLENECK, SCALE = 4, 0.1  # GIST's adapter
CLASSES = 1000


@dataclass
class Step:
    """One provider's training step; ``loss`` computes it, ``parameters`` are those trained, by a common name."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    images: Tensor
    target: Tensor

    def __call__(self) -> Tensor:
        loss = self.loss(self.images, self.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, gradients), without a step."""
        loss = self.loss(self.images, self.target)
        found = torch.autograd.grad(loss, list(self.parameters.values()))
        return loss.detach(), dict(zip(self.parameters, found, strict=True))


class PlainViT(nn.Module):
    """The forward of a timm VisionTransformer with shared adapters and a gist token, in plain PyTorch.

    ``vit`` gives the frozen modules; ``trained`` the adapters' and the token's parameters.
    """

    def __init__(self, vit: Any, trained: dict[str, Tensor], materialised: bool, dropout: float) -> None:
        super().__init__()
        self.vit, self.materialised = vit, materialised
        self.adapters = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(trained[f"{i}.{name}"].clone()) for name in _ADAPTER})
            for i in range(len(vit.blocks))
        )
        self.token = nn.Parameter(trained["token"].clone())
        self.dropout = nn.Dropout(dropout)

    def _adapter(self, p: Any, x: Tensor) -> Tensor:
        low = F.gelu(F.linear(x, p["down_weight"].to(x.dtype), p["down_bias"].to(x.dtype)))
        return F.linear(low, p["up_weight"].to(x.dtype), p["up_bias"].to(x.dtype)) * SCALE

    def _attention(self, attn: Any, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.materialised:
            weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return attn.proj(out.transpose(1, 2).reshape(batch, tokens, width))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, S, S) -> logits and gist logits, (B, C) each."""
        vit = self.vit
        x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], 1) + vit.pos_embed
        token = self.dropout(self.token.to(x.dtype).expand(len(x), -1, -1))
        x = torch.cat([x[:, :1], token, x[:, 1:]], 1)
        for block, p in zip(vit.blocks, self.adapters, strict=True):
            x = x + self._attention(block.attn, block.norm1(x)) + self._adapter(p, x)
            hidden = F.gelu(block.mlp.fc1(block.norm2(x)))
            x = x + block.mlp.fc2(hidden) + self._adapter(p, x)
        x = vit.norm(x)
        return vit.head(x[:, 0]), vit.head(x[:, 1])


_ADAPTER = ("down_weight", "down_bias", "up_weight", "up_bias")


def backbone(case: Case, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A timm VisionTransformer with random weights, the same at every call, in ``dtype`` or the case's."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as e:
        raise Missing("timm is not installed") from e
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        vit = VisionTransformer(
            img_size=case["S"], patch_size=16, embed_dim=case["D"], depth=case["L"], num_heads=case["D"] // 64,
            num_classes=CLASSES,
        )  # fmt: skip
    return vit.to(device, dtype or case.dtype).requires_grad_(False)


def initial(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Values of what is trained beside the head, away from zero: float32 (float64 in a float64 case)."""
    wide = torch.promote_types(case.dtype, torch.float32)
    generator = torch.Generator().manual_seed(1)
    d, shapes = case["D"], {}
    for i in range(case["L"]):
        shapes |= {f"{i}.down_weight": (BOTTLENECK, d), f"{i}.down_bias": (BOTTLENECK,)}
        shapes |= {f"{i}.up_weight": (d, BOTTLENECK), f"{i}.up_bias": (d,)}
    values = {n: torch.randn(*s, generator=generator, dtype=torch.float64) * 0.05 for n, s in shapes.items()}
    values["token"] = torch.rand(1, 1, d, generator=generator, dtype=torch.float64) - 0.5
    return {name: value.to(device, wide) for name, value in values.items()}


def batch(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(2)
    images = torch.randn(case["B"], 3, case["S"], case["S"], generator=generator, device=device).to(dtype)
    return images, torch.randint(0, CLASSES, (case["B"],), generator=generator, device=device)


# -- providers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What providers of one model differ in. ``autocast``: weights in float32, torch.autocast in the case's dtype."""

    compiled: bool = False
    autocast: bool = False

    def dtype(self, case: Case) -> torch.dtype:
        """Of weights and images."""
        if not self.autocast:
            return case.dtype
        if case.dtype.itemsize != 2:
            raise Missing("autocast is for half precision")
        return torch.float32


PLAIN = Recipe()


def _step(
    case: Case, device: torch.device, model: nn.Module, loss: Any, parameters: dict[str, Tensor], recipe: Recipe
) -> Step:
    images, target = batch(case, device, recipe.dtype(case))
    if recipe.compiled:
        torch._dynamo.reset()
        loss = torch.compile(loss, dynamic=False)
    if recipe.autocast:
        loss = torch.autocast(device.type, case.dtype)(loss)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=5e-5, fused=fused, capturable=fused)
    return Step(model, loss, parameters, optimizer, images, target)


def _plain(materialised: bool, recipe: Recipe = PLAIN) -> Callable[..., Step]:
    def build(case: Case, device: torch.device, dropout: float = 0.1) -> Step:
        vit = backbone(case, device, recipe.dtype(case))
        vit.head.requires_grad_(True)
        model = PlainViT(vit, initial(case, device), materialised, dropout).train()
        kl = authors_kl if materialised else log_softmax_kl

        def loss(images: Tensor, target: Tensor) -> Tensor:
            z, g = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in model(images))
            return F.cross_entropy(z, target) + ALPHA * F.cross_entropy(g, target) + BETA * kl(z, g)

        parameters = {f"{i}.{n}": p for i, a in enumerate(model.adapters) for n, p in a.items()}
        parameters |= {"token": model.token, "head.weight": vit.head.weight, "head.bias": vit.head.bias}
        return _step(case, device, model, loss, parameters, recipe)

    return build


def _fastgist(gist: bool = True, recipe: Recipe = PLAIN, recompute: bool = False) -> Callable[..., Step]:
    def build(case: Case, device: torch.device, dropout: float = 0.1) -> Step:
        import fastgist as fg

        vit = backbone(case, device, recipe.dtype(case))
        fg.get_peft_model(vit, fg.AdapterConfig(BOTTLENECK, placement="shared", scale=SCALE))
        values = initial(case, device)
        model = fg.add_gist(vit, fg.GistConfig(dropout=dropout)) if gist else vit
        if recompute:
            model.set_grad_checkpointing("mlp")
        model.train()
        parameters = {f"{i}.{n}": getattr(b.adapter, n) for i, b in enumerate(vit.blocks) for n in _ADAPTER}
        if gist:
            parameters["token"] = model.gist.token
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(values[name])
        parameters |= {"head.weight": vit.head.weight, "head.bias": vit.head.bias}
        loss_fn = fg.nn.GistLoss()

        def loss(images: Tensor, target: Tensor) -> Tensor:
            return loss_fn(model(images), target)

        return _step(case, device, model, loss, parameters, recipe)

    return build


def _peft_lora(recipe: Recipe = PLAIN) -> Callable[..., Step]:
    def build(case: Case, device: torch.device, dropout: float = 0.1) -> Step:
        _need("peft")
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=16, target_modules=["qkv"], modules_to_save=["head"])
        model = get_peft_model(backbone(case, device, recipe.dtype(case)), config).train()
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def loss(images: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(model(images).float(), target)

        return _step(case, device, model, loss, parameters, recipe)

    return build


#: provider -> builder(case, device, dropout of the gist token).
PROVIDERS: dict[str, Callable[..., Step]] = {
    "fastgist": _fastgist(),
    "fastgist, compiled": _fastgist(recipe=Recipe(compiled=True)),
    "fastgist, autocast": _fastgist(recipe=Recipe(autocast=True)),
    "fastgist, hidden units again": _fastgist(recompute=True),
    "fastgist, hidden units again, compiled": _fastgist(recipe=Recipe(compiled=True), recompute=True),
    "fastgist without gist": _fastgist(gist=False),
    "authors": _plain(materialised=True),
    "authors, autocast": _plain(materialised=True, recipe=Recipe(autocast=True)),
    "plain": _plain(materialised=False),
    "plain, compiled": _plain(materialised=False, recipe=Recipe(compiled=True)),
    "plain, compiled, autocast": _plain(materialised=False, recipe=Recipe(compiled=True, autocast=True)),
    "PEFT LoRA": _peft_lora(),
    "PEFT LoRA, autocast": _peft_lora(Recipe(autocast=True)),
}
#: Steps of another model, there for their cost.
OTHER_MODEL = {"fastgist without gist", "PEFT LoRA", "PEFT LoRA, autocast"}


# -- parity, and what a step costs -------------------------------------------------------------------------------------


def parity(provider: str, case: Case, device: torch.device) -> str | None:
    """:func:`_parity` at a batch of four, once for all batches of a model."""
    return _parity(provider, Case("four", tuple((dict(case.sizes) | {"B": 4}).items()), case.dtype), device)


@functools.cache
def _parity(provider: str, case: Case, device: torch.device) -> str | None:
    """None if loss and gradients are as near to float64 as those of plain PyTorch, else what is not."""
    from fastgist.testing import within_budget

    at = {dtype: Case(case.name, case.sizes, dtype) for dtype in (case.dtype, torch.float64)}
    ours, grads = PROVIDERS[provider](at[case.dtype], device, dropout=0.0).gradients()
    plain, plain_grads = PROVIDERS["plain"](at[case.dtype], device, dropout=0.0).gradients()
    grads = {name: g.to(plain_grads[name].dtype) for name, g in grads.items()}  # under autocast the head is float32
    exact, exact_grads = PROVIDERS["plain"](at[torch.float64], device, dropout=0.0).gradients()
    # Loss and gradients may be float32 numbers, but what they are made of is in the case's dtype: so is the floor.
    wrong = within_budget(ours.float(), plain.float(), exact, scale=float(exact) + 1.0, dtype=case.dtype)
    if wrong:
        return f"loss: {wrong}"
    kinds = {name.rpartition(".")[2] if name[0].isdigit() else name for name in grads}
    for kind in sorted(kinds):  # of all blocks together: the error of one block's four biases is a matter of luck
        names = [name for name in grads if name == kind or (name[0].isdigit() and name.endswith(f".{kind}"))]
        joined = (torch.cat([g[name].flatten() for name in names]) for g in (grads, plain_grads, exact_grads))
        wrong = within_budget(*joined, dtype=case.dtype)
        if wrong:
            return f"gradients of {kind}: {wrong}"
    return None


def flops(case: Case) -> int:
    """Matrix-unit FLOPs of a step: forward and input gradients, no weight gradients; adapters and head are negligible."""
    d, tokens, layers = case["D"], (case["S"] // 16) ** 2 + 2, case["L"]
    linear, attention = 24 * d * d * tokens, 4 * tokens * tokens * d
    return case["B"] * (layers * (2 * linear + 3 * attention) + 2 * 768 * d * (tokens - 2))


def least_bytes(case: Case) -> int:
    """What a step must move: the frozen weights, once forward and once for the input gradients, the images, and the stream of
    tokens into and out of each block, forward, and its gradient likewise. What stays inside a block stays on chip."""
    d, tokens, layers, b = case["D"], (case["S"] // 16) ** 2 + 2, case["L"], case.dtype.itemsize
    weights = layers * 12 * d * d + 768 * d + CLASSES * d
    images = case["B"] * 3 * case["S"] ** 2
    return (2 * weights + images + 4 * layers * case["B"] * tokens * d) * b


def cost_row(provider: str, case: Case, device: torch.device) -> dict[str, object]:
    return {"flops": flops(case)}


def kernels(step: Callable[[], object]) -> tuple[list[list[object]], int]:
    """The kernels that a step spends most time in, [times launched, microseconds in all, name], and how many it launches."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count, spent = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, spent + event.time_range.elapsed_us()
    top = sorted(found.items(), key=lambda item: -item[1][1])[:20]
    launched = sum(count for name, (count, _) in found.items() if not name.startswith(("Memset", "Memcpy")))
    return [[count, round(spent), name[:90]] for name, (count, spent) in top], launched


def describe(case: Case) -> str:
    name = {192: "ViT-Ti/16", 384: "ViT-S/16", 768: "ViT-B/16", 1024: "ViT-L/16"}.get(
        case["D"], f"ViT width {case['D']}"
    )
    return f"{name}, {case['L']} blocks, {case['S']} px"


__all__ = [
    "OTHER_MODEL",
    "PROVIDERS",
    "PlainViT",
    "Step",
    "cost_row",
    "describe",
    "flops",
    "kernels",
    "least_bytes",
    "parity",
]
