"""transformers' decoders: Llama, Mistral, Qwen2, Qwen3, Gemma and GPT-2, as classifiers and as language models.

Language models take the methods, and no gist token: they predict a token at every place. Their head stays frozen.

In a causal model a token at the front sees nothing, so the gist token comes after the last real token of each row, padded
on the left or on the right, with the position that a further token of the row would have. z is read from the last real
token, which is the one transformers reads, and z_g from the gist, by the same ``score``. No other token sees the gist: z is
the plain model's, and where z_g is not wanted the token is left out.

Positions count from a row's first unmasked token, as transformers' ``generate`` counts them; its classifiers count padding
on the left too, which changes nothing where only distances matter (rotary positions) and changes GPT-2's logits.

Prompts stand before a row's first token (:mod:`.prompts`); a prefix of the attention has no position (:mod:`.attention`).

Our own reconstruction: the paper speaks of language and releases no code for it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist import GistConfig, GistHost, GistInsert
from fastgist.integrations.transformers.attention import attention_site, find_attention
from fastgist.integrations.transformers.blocks import block_forward
from fastgist.integrations.transformers.prompts import count_prompts, merged, order, prompts_in
from fastgist.nn import BlockForward, GistToken, fan
from fastgist.peft.family import AttentionSite, Family, LinearSite, register_family

__all__ = ["Decoder", "DecoderGist"]


@dataclass(frozen=True)
class _Kind:
    """One architecture: its body, its layers, and the ends of the paths of the sublayers that adapters stand behind."""

    body: str
    layers: str
    attention: str
    mlp: str


_LLAMA = _Kind("model", "model.layers", ".self_attn.o_proj", ".mlp")
_GPT2 = _Kind("transformer", "transformer.h", ".attn.c_proj", ".mlp")
_BODIES = {"GPT2": _GPT2} | dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"), _LLAMA)
#: Language models with such a body -> the classifier that takes it.
_LANGUAGE = {f"{name}ForCausalLM": f"{name}ForSequenceClassification" for name in _BODIES if name != "GPT2"}
_LANGUAGE["GPT2LMHeadModel"] = "GPT2ForSequenceClassification"
_KINDS = {f"{name}ForSequenceClassification": kind for name, kind in _BODIES.items()}
_KINDS |= {language: _KINDS[classifier] for language, classifier in _LANGUAGE.items()}
#: The end of a linear layer's path -> the names that targets know it by, in every architecture.
_ALIASES = {
    "self_attn.q_proj": ("q",), "self_attn.k_proj": ("k",), "self_attn.v_proj": ("v",), "self_attn.o_proj": ("proj",),
    "mlp.gate_proj": ("gate", "fc1"), "mlp.up_proj": ("up", "fc1"), "mlp.down_proj": ("down", "fc2"),
    "attn.c_proj": ("proj",), "mlp.c_fc": ("fc1",), "mlp.c_proj": ("fc2",),
}  # fmt: skip
#: Where the gist token's module stands: beside the body and the head, in the way of neither.
GIST_PATH = "fastgist_gist"


class Decoder(Family):
    """Classifiers and language models of transformers with a causal body."""

    name = "transformers Llama, Mistral, Qwen2, Qwen3, Gemma and GPT-2 sequence classifiers and language models"

    def matches(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith("transformers.") and type(model).__name__ in _KINDS

    def head_paths(self, model: Any) -> tuple[str, ...]:
        return () if type(model).__name__ in _LANGUAGE else ("score",)

    def linears(self, model: Any) -> list[LinearSite]:
        layers = _KINDS[type(model).__name__].layers
        sites = []
        for path, module in model.get_submodule(layers).named_modules(prefix=layers):
            if fan(module) is None:
                continue
            if path.endswith(".attn.c_attn"):
                sites.append(LinearSite(path, module, parts=("q", "k", "v")))
            else:
                sites.append(LinearSite(path, module, next((a for e, a in _ALIASES.items() if path.endswith(e)), ())))
        return sites

    def sublayers(self, model: Any) -> dict[str, list[str]]:
        """An adapter after attention stands after its output projection: the layer around it returns a tuple."""
        kind = _KINDS[type(model).__name__]
        paths = [path for path, _ in model.get_submodule(kind.layers).named_modules(prefix=kind.layers)]
        ends = {"mlp": kind.mlp, "attention": kind.attention}
        return {name: [path for path in paths if path.endswith(end)] for name, end in ends.items()}

    def reserved_paths(self, model: Any) -> tuple[str, ...]:
        return (GIST_PATH, "lm_head") if type(model).__name__ in _LANGUAGE else (GIST_PATH,)

    def width(self, model: Any, path: str) -> int:
        return model.config.hidden_size

    def prompt_blocks(self, model: Any) -> list[str]:
        """Prompts go in before the body counts the sequence; the first layer holds them."""
        return [path for path, _ in self._layers(model)]

    def after_change(self, model: Any) -> None:
        kind = _KINDS[type(model).__name__]
        most = model.config.max_position_embeddings if kind is _GPT2 else None
        count_prompts(model.get_submodule(kind.body), kind.layers.rpartition(".")[2], most)

    def residual_blocks(self, model: Any) -> dict[str, BlockForward]:
        return {path: block_forward(layer) for path, layer in self._layers(model)}

    def attentions(self, model: Any) -> dict[str, AttentionSite]:
        paths = [find_attention(layer, path) for path, layer in self._layers(model)]
        return {path: attention_site(model.get_submodule(path)) for path in paths}

    @staticmethod
    def _layers(model: Any) -> list[tuple[str, nn.Module]]:
        path = _KINDS[type(model).__name__].layers
        return [(f"{path}.{name}", layer) for name, layer in model.get_submodule(path).named_children()]

    def example_inputs(self, model: Any) -> tuple[Tensor, ...]:
        ids = torch.randint(model.config.vocab_size - 1, (2, 8), device=model.device)
        pad = model.config.pad_token_id
        if pad is None:
            return (ids[:1],)
        return (torch.where(ids == pad, model.config.vocab_size - 1 if pad == 0 else pad - 1, ids),)

    def gist_host(self, model: Any) -> DecoderGist:
        name = type(model).__name__
        if name in _LANGUAGE:
            body = _KINDS[name].body
            raise TypeError(
                f"add_gist: {name} predicts a token at every place and has no label for a gist token to learn. Wrap a "
                f"{_LANGUAGE[name]}; with the body of this model (classifier.{body} = model.{body}) what is trained there "
                "also generates here"
            )
        return DecoderGist(model)


class _Holder(GistInsert):
    """Carries the gist token, which :class:`DecoderGist` puts into the sequence."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("the gist token's module is not called: the gist model puts the token in")


class DecoderGist(GistHost):
    """A gist token in a causal classifier: after the last real token of each row.

    Raises:
        ValueError: in :meth:`make_insert`, several tokens of which the first is read: it would not see the others.
    """

    path = GIST_PATH
    index = -1
    last = "score"
    takes_prefix = True

    behind = True

    def __init__(self, model: Any) -> None:
        self.kind = _KINDS[type(model).__name__]
        self.dim = model.config.hidden_size
        #: Names of the classifier's arguments, for those that come by position.
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]

    # -- in and out --------------------------------------------------------------------------------------------------
    def base(self, model: nn.Module) -> nn.Module:
        return nn.Identity()

    def make_insert(self, base: nn.Module, gist: GistToken) -> GistInsert:
        return _Holder(base, gist, self.index, self.after)

    def check(self, model: Any, config: GistConfig) -> None:
        if config.length > 1 and config.readout == "first":
            raise ValueError(
                f"add_gist: in {type(model).__name__}, a causal model, the first of {config.length} gist tokens does not "
                'see the others, which would never be trained: take readout="mean" or length=1'
            )

    def detached(self, model: Any, length: int) -> None:
        delattr(model, GIST_PATH)

    # -- forward -----------------------------------------------------------------------------------------------------
    def forward(
        self, model: Any, config: GistConfig, want_gist: bool, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The classifier's arguments -> logits (B, C) and gist logits (B, C) or None."""
        logits = model.score(self.rows(model, config, *args, want_gist=want_gist, **kwargs))
        half = len(logits) // 2
        return (logits[:half], logits[half:]) if want_gist else (logits, None)

    def rows(self, model: Any, config: GistConfig, *args: Any, want_gist: bool = True, **kwargs: Any) -> Tensor:
        """The classifier's arguments -> (2 B, D), or (B, D) for the prediction alone: what goes into ``score``."""
        given = dict(zip(self.names, args)) | kwargs
        if given.pop("labels", None) is not None:
            raise TypeError("GistModel: labels are given by name, labels=...")
        if given.pop("past_key_values", None) is not None or given.pop("use_cache", None):
            raise ValueError("GistModel: a classifier with a gist token keeps no keys and values: leave use_cache out")
        ids, states = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        if (ids is None) == (states is None):
            raise ValueError("GistModel: expected either input_ids or inputs_embeds")
        body = model.get_submodule(self.kind.body)
        if states is None:
            states = body.get_input_embeddings()(ids)
        batch, number = states.shape[:2]
        cache, before = self._prefix(body, given.pop("prefix", None), batch)
        last = self._last(model, ids, batch, number, states.device)
        mask = given.pop("attention_mask", None)
        if mask is not None and mask.shape != (batch, number):
            raise ValueError(
                f"GistModel: expected attention_mask of shape ({batch}, {number}), got {tuple(mask.shape)}"
            )
        positions = given.pop("position_ids", None)
        prompts = prompts_in(model.get_submodule(self.kind.layers))
        most = model.config.max_position_embeddings
        full = before + prompts + number + config.length > most
        if (full or before) and mask is None:  # positions are said then, and without a mask would mean packed sequences
            mask = torch.ones((batch, number), dtype=torch.long, device=states.device)
        explicit = positions is not None or mask is not None
        if positions is None:
            positions = torch.arange(number, device=states.device).expand(batch, -1)
            if mask is not None:
                padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
                positions = (positions - padding).clamp(min=0) + before
        positions = positions.expand(batch, -1)
        if full:
            last = self._with_room(model, config, positions, prompts, last, want_gist)
            if config.full_length == "truncate":  # what is behind the last token has no position, and is read by nobody
                positions = positions.clamp(max=most - 1 - prompts)
        at = last[:, None]
        if want_gist:
            index = order(at + 1, number, config.length)
            steps = torch.arange(config.length, device=at.device)
            states = merged(states, self._token(model, states), index)
            positions = merged(positions, positions.gather(1, at) + 1 + steps, index)
            if mask is not None:
                mask = merged(mask, mask.new_ones(batch, config.length), index)
            types = given.get("token_type_ids")
            if types is not None:
                given["token_type_ids"] = merged(types, types.gather(1, at).expand(-1, config.length), index)
        if before:
            mask = torch.cat((mask.new_ones(batch, before), mask), dim=1)
        given |= {"attention_mask": mask, "position_ids": positions if explicit else None, "past_key_values": cache}
        out = body(inputs_embeds=states, use_cache=False, return_dict=True, **given).last_hidden_state
        each = torch.arange(batch, device=out.device)
        z = out[each, last]
        if not want_gist:
            return z
        gist = torch.stack([out[each, last + 1 + i] for i in range(config.rows)])
        return torch.cat((z, gist.mean(0) if config.rows > 1 else gist[0]))

    @staticmethod
    def _prefix(body: Any, peft_model: Any, batch: int) -> tuple[Any, int]:
        """Keys and values that PEFT's prefix tuning puts first, and how many rows they are; (None, 0) without it."""
        if peft_model is None:
            return None, 0
        from fastgist.integrations import peft

        found = peft.prefix(peft_model, batch)
        if found is not None and body.training and getattr(body, "gradient_checkpointing", False):
            raise ValueError(
                "GistModel: recomputed layers would not see the prefix: no checkpointing with prefix tuning"
            )
        return (None, 0) if found is None else found

    def _token(self, model: Any, states: Tensor) -> Tensor:
        return model.get_submodule(self.path).gist(states)

    def _last(self, model: Any, ids: Tensor | None, batch: int, number: int, device: torch.device) -> Tensor:
        """(B,): the token that transformers' classifier reads: the rightmost that is not ``pad_token_id``, or the last
        where tokens or padding are not known."""
        pad = model.config.get_text_config().pad_token_id
        if pad is None and batch != 1:
            raise ValueError(
                f"GistModel: {type(model).__name__} has no config.pad_token_id, without which it cannot tell a batch of "
                f"{batch} where rows end"
            )
        if pad is None or ids is None:
            return torch.full((batch,), number - 1, device=device)
        real = (ids != pad).to(torch.int32)
        return (torch.arange(number, dtype=torch.int32, device=device) * real).argmax(-1)

    def _with_room(
        self, model: Any, config: GistConfig, positions: Tensor, prompts: int, last: Tensor, want_gist: bool
    ) -> Tensor:
        """``last`` such that the gist token behind it has a position, or an error."""
        most = model.config.max_position_embeddings
        over = positions.gather(1, last[:, None])[:, 0] + 1 + config.length + prompts - most
        if config.full_length == "truncate":
            return (last - over.clamp(min=0)).clamp(min=0)
        if want_gist:
            theirs = f", {prompts} of them the prompts'" if prompts else ""
            text = (
                f"GistModel: a row is as long as {type(model).__name__}'s {most} positions{theirs}, which leaves none for the "
                f'gist token; shorten it by {config.length}, or take GistConfig(full_length="truncate")'
            )
            if torch.compiler.is_compiling():
                torch._assert_async((over <= 0).all(), text)
            elif bool((over > 0).any()):
                raise ValueError(text)
        return last


register_family(Decoder())
