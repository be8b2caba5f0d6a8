"""The Q-Former's attention with its products shared: the classes of transformers, with a forward of ours.

transformers calls query, key and value one by one, and each cross-attention projects the image tokens anew. Here x U is formed
once for the q, k and v of a layer, and once for the keys and values of all cross-attentions, which see the same image
tokens: those are one product of (B N, 1408) by all their weights. The factors of all matrices come from one product too.

:func:`open_up` gives a module the class of ours that its own class is the base of, and back. Its parameters, its place in the
model, hooks and ``isinstance`` stay as they are. What one forward shares travels as an argument, ``shared``, through the
layers, so that nothing is left behind in a module.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip_2 import modeling_blip_2
from transformers.models.instructblip import modeling_instructblip

from fastgist.nn import CPFactors, CPLinear, Factors, cp_together, is_plain, joint_mode

__all__ = ["open_up"]


@dataclass
class Shared:
    """What the attentions of one forward have in common."""

    #: (layer, kind) -> the factors of "self" (q, k, v), "query" (of a cross-attention) or "image" (its k, v).
    factors: dict[tuple[int, str], Factors] = field(default_factory=dict)
    #: layer -> keys and values of the image tokens, (B, N, D) each.
    image: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    #: Of the one mask on the image tokens' x U.
    seed: Tensor | None = None


class _Encoder:
    """Gives the layers what they share."""

    layer: Any
    training: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(self, _Encoder):  # a bound forward that somebody kept (accelerate), of a module closed since
            return type(self).forward(self, hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs)
        kwargs["shared"] = self._share(encoder_hidden_states)
        return super().forward(hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs)  # type: ignore[misc]

    def _share(self, image: Tensor | None) -> Shared | None:
        recomputed = self.training and any(layer.gradient_checkpointing for layer in self.layer)
        if recomputed and any(_is_reentrant(layer) for layer in self.layer):
            return None  # its backward runs layer by layer, and cannot go through what they share
        shared = Shared()
        units = _units(self.layer, image is not None)
        if image is not None and (recomputed or not self._all_of_image(units, image, shared)):
            shared.seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=image.device)
        by_factors: dict[int, list[tuple[int, str]]] = {}
        for key, layers in units.items():
            by_factors.setdefault(id(layers[0].factors), []).append(key)
        for keys in by_factors.values():
            factors = units[keys[0]][0].factors([joint_mode(units[key]) for key in keys])
            shared.factors |= dict(zip(keys, factors, strict=True))
        return shared

    @staticmethod
    def _all_of_image(units: dict[tuple[int, str], list[CPLinear]], image: Tensor, shared: Shared) -> bool:
        """Keys and values of all cross-attentions at once, where they have the same factors; ``units`` loses them. Not where
        weights are sharded (FSDP2): those of later layers are not here yet."""
        keys = [key for key in units if key[1] == "image"]
        layers = [layer for key in keys for layer in units[key]]
        if len({id(layer.factors) for layer in layers}) != 1 or not all(is_plain(layer.base_layer) for layer in layers):
            return False
        made = cp_together(layers, image)
        for i, key in enumerate(keys):
            shared.image[key[0]] = made[2 * i], made[2 * i + 1]
            del units[key]
        return True


def _units(layers: Any, with_image: bool) -> dict[tuple[int, str], list[CPLinear]]:
    """The projections that share an input and a CPFactors, by layer and kind."""
    found: dict[tuple[int, str], list[CPLinear]] = {}
    for i, layer in enumerate(layers):
        attention = layer.attention.attention
        candidates = {"self": [attention.query, attention.key, attention.value]}
        if with_image and layer.has_cross_attention:
            cross = layer.crossattention.attention
            candidates |= {"query": [cross.query], "image": [cross.key, cross.value]}
        for kind, projections in candidates.items():
            factors = getattr(projections[0], "factors", None)
            if isinstance(factors, CPFactors) and all(
                type(p) is CPLinear and p.factors is factors and not p.inward for p in projections
            ):
                found[i, kind] = projections
    return found


def _is_reentrant(layer: Any) -> bool:
    run = getattr(layer, "_gradient_checkpointing_func", None)
    return not (isinstance(run, functools.partial) and run.keywords.get("use_reentrant") is False)


class _Attention:
    """q, k and v of one input in one product."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    config: Any
    training: bool
    attention_dropout: float
    attention_head_size: int
    scaling: float
    #: transformers' own, which is in no table.
    eager: Any
    #: The layer's number.
    place: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        shared: Shared | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) -> the heads' outputs side by side (B, N, D), and the attention's weights where it has them."""
        if not isinstance(self, _Attention):  # as in _Encoder
            return type(self).forward(
                self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **kwargs
            )
        shared = Shared() if shared is None else shared
        given = {kind: shared.factors.get((self.place, kind)) for kind in ("self", "query", "image")}
        if encoder_hidden_states is None:
            q, k, v = cp_together((self.query, self.key, self.value), hidden_states, given["self"])
        else:
            attention_mask = encoder_attention_mask
            (q,) = cp_together((self.query,), hidden_states, given["query"])
            if self.place in shared.image:
                k, v = shared.image[self.place]
            else:
                k, v = cp_together((self.key, self.value), encoder_hidden_states, given["image"], shared.seed)
        heads = (t.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2) for t in (q, k, v))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, *heads, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return out.flatten(2), weights


def _opened(ours: type, base: type) -> type:
    """``base`` with our forward, under its own name, where pickle finds it."""
    inside: dict[str, Any] = {"__module__": __name__, "__qualname__": base.__name__}
    if ours is _Attention:
        inside["eager"] = staticmethod(sys.modules[base.__module__].eager_attention_forward)
    made = type(base.__name__, (ours, base), inside)
    globals()[base.__name__] = made
    return made


#: A class of transformers -> the one that takes its place.
OPENED: dict[type, type] = {
    base: _opened(ours, base)
    for ours, base in (
        (_Encoder, modeling_instructblip.InstructBlipQFormerEncoder),
        (_Encoder, modeling_blip_2.Blip2QFormerEncoder),
        (_Attention, modeling_instructblip.InstructBlipQFormerMultiHeadAttention),
        (_Attention, modeling_blip_2.Blip2QFormerMultiHeadAttention),
    )
}
_BASES = {ours: base for base, ours in OPENED.items()}


def open_up(encoder: Any) -> None:
    """Let the attentions of a Q-Former's encoder that have CP layers share their products, and leave the others alone."""
    any_open = False
    for i, layer in enumerate(encoder.layer):
        parts = (layer.attention, *([layer.crossattention] if layer.has_cross_attention else []))
        for attention in (part.attention for part in parts):
            wanted = any(isinstance(child, CPLinear) for child in attention.children())
            any_open |= _swap(attention, wanted)
            if wanted:
                attention.place = i
    _swap(encoder, any_open)


def _swap(module: Any, ours: bool) -> bool:
    """Whether the module has a class of ours now; one that we do not know (a subclass, FSDP's) keeps its own."""
    table = OPENED if ours else _BASES
    if type(module) in table:
        module.__class__ = table[type(module)]
    return type(module) in _BASES
