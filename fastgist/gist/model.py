r"""A model with a gist token (GIST, arXiv 2312.07255).

The token is put once, right after the class token, and stays in the sequence, in inference too: dropping it would
change the outputs. Both logits come from the same final norm and the same head,

.. math::
    z = \mathrm{head}(h_{0}), \qquad z_g = \mathrm{head}(h_{i_g})

with i_g the token's index. The prediction is z; z_g is computed in training only, unless asked for. In a causal model the
token stands after the last token instead, z does not depend on it, and it is left out where z_g is not wanted.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from fastgist.gist.loss import WITHOUT_GIST, default_loss, divided, fuses, hooked_everywhere, loss_of, shaped
from fastgist.gist.output import GistOutput
from fastgist.nn import GistLoss, GistToken, is_hooked, is_plain
from fastgist.nn._checks import check_dropout, check_module, check_one_of, check_positive, shown
from fastgist.peft import state as _state
from fastgist.peft.once import hold_once

__all__ = ["GistConfig", "GistExtension", "GistHost", "GistInsert", "GistModel", "add_gist"]

READOUTS = ("first", "mean")
FULL = ("refuse", "truncate")


@dataclass
class GistConfig:
    """length: how many gist tokens. dropout: on the token, in training. readout: where z_g is read with several tokens,
    "first" (the authors' code) or "mean" (of their final states). full_length: in a causal model, what to do with a row
    that is as long as the model's positions and leaves the token none: "refuse", or "truncate", which drops the row's last
    tokens, in evaluation too."""

    length: int = 1
    dropout: float = 0.1
    readout: str = "first"
    full_length: str = "refuse"

    def __post_init__(self) -> None:
        self.length = check_positive("GistConfig", "length", self.length)
        check_dropout("GistConfig", self.dropout)
        for name, known in (("readout", READOUTS), ("full_length", FULL)):
            check_one_of("GistConfig", name, getattr(self, name), known)

    @property
    def rows(self) -> int:
        """How many of the token's rows are read."""
        return self.length if self.readout == "mean" else 1


class GistInsert(nn.Module):
    """Stands where a sequence passes through ``base_layer`` (or comes out of it: ``after``) and puts the gist token in at
    ``index``."""

    def __init__(self, base_layer: nn.Module, gist: GistToken, index: int, after: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gist = gist
        self.index = index
        self.after = after

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x: (B, N, D) -> (B, N + length, D); ``after``: ``base_layer``'s arguments."""
        if self.after:
            return self.place(self.base_layer(*args, **kwargs))
        return self.base_layer(self.place(*args, **kwargs))

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Hugging Face PEFT's merge_and_unload asks every module that has a ``base_layer``.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "a gist token cannot be merged: take it out first with fastgist.unload(model) (predictions change), then merge"
        )

    def place(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x (B, N, D) with the token's rows (B, length, D) at ``index``, made here if they are not given."""
        rows = self.gist(x) if rows is None else rows
        return torch.cat((x[:, : self.index], rows, x[:, self.index :]), dim=1)

    def extra_repr(self) -> str:
        return f"index={self.index}"


class GistHost(ABC):
    """How the gist token goes into one family of models. Hosts hold no modules."""

    #: Path of the module that a :class:`GistInsert` replaces.
    path: str
    #: The token's index in the sequence.
    index: int
    #: Whether the sequence is what comes out of the module at ``path``, not what goes in.
    after: bool = False
    #: The model's width.
    dim: int
    #: Whether the token comes behind all that a prediction reads, which then is the plain model's.
    behind: bool = False
    #: Whether the token is in the sequence at present.
    active: bool = False
    #: Whether :meth:`forward` and :meth:`rows` take ``prefix``, a Hugging Face PeftModel whose keys and values come first.
    takes_prefix: bool = False
    #: Path of the linear layer whose outputs for :meth:`rows` are the logits; None: :meth:`rows` is not there.
    last: str | None = None

    @abstractmethod
    def forward(
        self, model: nn.Module, config: GistConfig, want_gist: bool, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(logits, gist logits or None) of the model, into which the token is attached."""

    def rows(self, model: nn.Module, config: GistConfig, *args: Any, **kwargs: Any) -> Tensor:
        """(2 B, H): what goes into the layer at :attr:`last`, first for the prediction, then for the gist logits."""
        raise NotImplementedError

    def base(self, model: nn.Module) -> nn.Module:
        """The module at :attr:`path`; a host that needs a place of its own makes one up."""
        return model.get_submodule(self.path)

    def check(self, model: nn.Module, config: GistConfig) -> None:  # noqa: B027 - optional
        """Raise ValueError if a token of this configuration has no place in the model."""

    def make_insert(self, base: nn.Module, gist: GistToken) -> GistInsert:
        """What stands in the place of ``base``, the module at :attr:`path`; a host whose token goes in otherwise returns
        a subclass of :class:`GistInsert`."""
        return GistInsert(base, gist, self.index, self.after)

    def recompute_mlps(self, model: nn.Module, enable: bool) -> None:
        """Whether :meth:`forward` and :meth:`rows` form the MLPs' hidden units again in the backward.

        Raises:
            ValueError: it is asked for and not known how.
        """
        if enable:
            raise ValueError(
                f'GistModel: checkpointing "mlp" is for timm\'s VisionTransformer, got {type(model).__name__}'
            )

    def attached(self, model: nn.Module, length: int) -> None:  # noqa: B027 - optional
        """Called after the token went in: adapt what counts tokens."""

    def detached(self, model: nn.Module, length: int) -> None:  # noqa: B027 - optional
        """Called after it went out: undo that."""


class GistExtension(_state.Extension):
    """The gist token as part of an adaptation."""

    name = "gist"
    title = "the gist token (GistConfig)"

    def __init__(self, config: GistConfig, host: GistHost, insert: GistInsert) -> None:
        self.config, self.host, self.insert = config, host, insert

    def module(self) -> GistToken:
        return self.insert.gist

    def set_module(self, module: nn.Module) -> None:
        assert isinstance(module, GistToken)
        self.insert.gist = module

    def fresh(self) -> GistToken:
        token = self.insert.gist.token
        return GistToken(self.host.dim, self.config.length, self.config.dropout, device=token.device, dtype=token.dtype)

    def attach(self, model: nn.Module) -> None:
        self.insert.base_layer = self.host.base(model)
        self.insert.train(self.insert.base_layer.training)
        _state.replace_module(model, self.host.path, self.insert)
        self.host.attached(model, self.config.length)
        self.host.active = True
        _ignore_at_inference(model, True)

    def detach(self, model: nn.Module) -> None:
        _state.replace_module(model, self.host.path, self.insert.base_layer)
        self.host.detached(model, self.config.length)
        self.host.active = False
        _ignore_at_inference(model, False)


class GistModel(_state.Front):
    """``model`` with a gist token. Made by :func:`add_gist`.

    ``forward`` returns a :class:`GistOutput`. ``model`` is the wrapped model itself (the same object, with the token
    attached); its own ``forward`` returns plain logits. For timm models ``forward_features`` and the like are passed
    on, and ``num_prefix_tokens`` counts the gist token, so slicing patches off works as before.

    In ``forward``, hooks on ``model`` itself do not run: its parts are called one by one. Hooks on any part do.

    Attributes:
        loss: what ``forward`` computes where it is given labels; settable. None: the paper's ``GistLoss()``, of the kind
            of problem that ``config.problem_type``, the number of outputs and the labels say, as in transformers.
        gist_config: the :class:`GistConfig`.
        config: the wrapped model's own where it has one (transformers), else the :class:`GistConfig`.
        peft_model: the Hugging Face PeftModel that was given to add_gist, or None.
    """

    model: Any
    loss: Any
    #: transformers' Trainer passes ``num_items_in_batch``.
    accepts_loss_kwargs = True
    #: Whether a loss that Trainer took of the outputs has been seen in a backward.
    _watched = False

    def __init__(
        self, model: nn.Module, config: GistConfig, host: GistHost, peft_model: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.__dict__["peft_model"] = peft_model  # not a submodule: its parameters are the model's
        if peft_model is not None and getattr(peft_model, "prompt_encoder", None) is not None:
            self.prompt_encoder = peft_model.prompt_encoder  # these are not
        self.gist_config = config
        self.host = host
        self.loss = None
        hold_once(self, _every_name)

    @property
    def config(self) -> Any:
        return getattr(self.model, "config", self.gist_config)

    @property
    def gist(self) -> GistToken:
        """The gist token's module. Raises RuntimeError while it is detached (disable_adapter, unload)."""
        if not self.host.active:
            raise RuntimeError("GistModel: the gist token is detached at present")
        return self.model.get_submodule(self.host.path).gist

    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        return_gist_logits: bool | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        x: Any = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        pixel_values: Any = None,
        **kwargs: Any,
    ) -> GistOutput:
        """The wrapped model's arguments, by position or name. Those that have a name here are passed on where they are not
        None; transformers' Trainer keeps the columns of a data set that it finds among the names.

        Args:
            labels: adds :attr:`loss` to the output: (B,) classes, or what :class:`fastgist.nn.GistLoss` takes for other
                kinds of problem. In evaluation it is the task's loss of the logits alone.
            return_gist_logits: None for only while training.
            return_logits: None: but where training takes a large head and the loss in one operation, which makes no
                logits (:func:`fastgist.gist.loss.fuses`); True: always; False: with labels the loss alone, in one
                operation wherever it can be.
            num_items_in_batch: the loss is a sum divided by this number of labels instead of a mean: Trainer's way to
                weigh accumulated batches.

        Returns:
            GistOutput with, in this order, ``loss`` if there were labels, ``logits`` (B, C) and, if asked for or training,
            ``gist_logits`` (B, C).
        """
        named = {
            "x": x,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
        }
        kwargs |= {name: value for name, value in named.items() if value is not None}
        for what, given in (("its input", args[0] if args else x), ("labels", labels)):
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(f"GistModel: {what} must be a Tensor, got {shown(given)}")
        if labels is not None and labels.dim() == 0:
            raise ValueError("GistModel: labels must have a row for each sample, got one number")
        want = self.training if return_gist_logits is None else return_gist_logits
        value = None
        if self.peft_model is not None and self.host.takes_prefix:
            kwargs["prefix"] = self.peft_model
        if not self.host.active:
            if return_gist_logits:
                raise RuntimeError("GistModel: gist logits were asked for while the gist token is detached")
            output = (self.model if self.peft_model is None else self.peft_model)(*args, **kwargs)
            logits, gist_logits = output if isinstance(output, Tensor) else output["logits"], None
        elif labels is not None and self.training and return_gist_logits is None and self._fuses(labels, return_logits):
            logits = gist_logits = None
            head = self.model.get_submodule(self.host.last)
            loss = self._loss(labels, head.out_features)
            rows = self.host.rows(self.model, self.gist_config, *args, **kwargs)
            half = len(rows) // 2
            labels = shaped(loss, labels, half, head.out_features)
            value = loss.of_linear(rows[:half], rows[half:], head.weight, head.bias, labels)
        else:
            logits, gist_logits = self.host.forward(self.model, self.gist_config, want, *args, **kwargs)
        if labels is None:
            if num_items_in_batch is not None and self.training and not torch.compiler.is_compiling():
                self._watch(logits, gist_logits)
            return GistOutput(logits=logits, gist_logits=gist_logits)
        if value is None:
            loss = self._loss(labels, logits.shape[-1])
            value = loss_of(loss, logits, gist_logits if self.training else None, labels)
        if num_items_in_batch is not None:
            value = divided(loss, value, labels, num_items_in_batch)
        if return_logits is False:
            logits = gist_logits = None
        return GistOutput(value, logits, gist_logits)

    def _watch(self, logits: Tensor, gist_logits: Tensor | None) -> None:
        """Trainer counts labels and keeps them: the loss is its own. Warn if the first backward passes the gist logits by."""
        if self._watched or gist_logits is None or not (logits.requires_grad and gist_logits.requires_grad):
            return

        def look(gradients: Sequence[Tensor | None]) -> None:
            first, self._watched = not self._watched, True
            if first and gradients[0] is not None and gradients[1] is None:
                warnings.warn(WITHOUT_GIST, UserWarning, stacklevel=2)

        register_multi_grad_hook((logits, gist_logits), look)

    def _loss(self, labels: Tensor, width: int) -> GistLoss:
        return default_loss(self.config, labels, width) if self.loss is None else self.loss

    def _fuses(self, labels: Tensor, return_logits: bool | None) -> bool:
        """Whether head and loss are taken in one operation: see :func:`fastgist.gist.loss.fuses`."""
        if return_logits is True or self.host.last is None:
            return False
        head = self.model.get_submodule(self.host.last)
        if not is_plain(head) or is_hooked(head) or hooked_everywhere():
            return False
        shape = labels.shape[0], head.in_features, head.out_features
        if return_logits is None and not fuses(*shape, head.weight.dtype):
            return False
        loss = self._loss(labels, head.out_features)
        return type(loss) is GistLoss and not is_hooked(loss) and loss.has_linear

    # -- the wrapped model's interface -------------------------------------------------------------------------------
    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's, all tokens; the gist token stands after the other prefix tokens."""
        return self.model.forward_features(*args, **kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's; the gist token is among the prefix tokens."""
        return self.model.forward_intermediates(*args, **kwargs)

    def forward_head(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's: the prediction's logits from ``forward_features``'s output."""
        return self.model.forward_head(*args, **kwargs)

    def get_classifier(self) -> nn.Module:
        return self.model.get_classifier()

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """The wrapped model's: a new, trainable head, which serves both logits."""
        self.model.reset_classifier(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """transformers' name for it; older versions have :meth:`gradient_checkpointing_enable`, timm's models
        :meth:`set_grad_checkpointing`."""
        self.model.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        self.model.activation_checkpointing_disable()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing_disable()

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        """timm's: True runs every block again in the backward, which keeps the least. "mlp" forms only the hidden units of
        the MLPs again, the largest thing that a block keeps (4 of 10 widths a token where all but adapters is frozen), for
        one more of a block's matrix products; for timm's VisionTransformer read at its class token, while the gist token
        is attached.

        Raises:
            ValueError: "mlp" for another model; another word.
        """
        if isinstance(enable, str) and enable != "mlp":
            raise ValueError(f'GistModel: checkpointing is True, False or "mlp", got {enable!r}')
        self.host.recompute_mlps(self.model, enable == "mlp")
        self.model.set_grad_checkpointing(enable is not False and enable != "mlp")

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        self.model.set_input_size(*args, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """The wrapped model's parameters without weight decay, under their names here; the gist token has decay."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def num_features(self) -> int:
        return self.model.num_features

    @property
    def head_hidden_size(self) -> int:
        return self.model.head_hidden_size

    @property
    def embed_dim(self) -> int:
        return self.model.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """Rows before the patches in ``forward_features``'s output, the gist token included."""
        return self.model.num_prefix_tokens

    @property
    def pretrained_cfg(self) -> Any:
        return self.model.pretrained_cfg

    @property
    def default_cfg(self) -> Any:
        return self.model.default_cfg

    def extra_repr(self) -> str:
        return f"{self.gist_config}"


def _every_name(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return model.named_parameters(remove_duplicate=False)


def add_gist(model: nn.Module, config: GistConfig | None = None) -> GistModel:
    """Give ``model`` a gist token and return the :class:`GistModel` around it.

    A plain model is frozen but for its head first; one from :func:`fastgist.get_peft_model` keeps its adapters, each
    named one with a gist token of its own. What is trained then: the adapter, the gist token, the head. A Hugging Face
    PeftModel goes on training what PEFT trains (:mod:`fastgist.integrations.peft`).

    Raises:
        ValueError: the model has a gist token already, or there is no place for one (no class token, pooling by
            attention); the model is unchanged.
        TypeError: an unknown model family.
    """
    config = GistConfig() if config is None else config
    check_module("add_gist", "model", model)
    if not isinstance(config, GistConfig):
        raise TypeError(f"add_gist: config must be a GistConfig, got {shown(config)}")
    known = _state.state_of(model)
    if isinstance(model, GistModel) or (known is not None and known.extension is not None):
        raise ValueError("add_gist: the model has a gist token already")
    plain, outer = _state.inner(model), model if _state.is_foreign(model) else None
    state = _state.begin(model, "add_gist")
    try:
        host: GistHost = state.family.gist_host(plain)
        if outer is not None:
            from fastgist.integrations import peft as hf_peft

            hf_peft.check(outer, host.takes_prefix)
        host.check(plain, config)
        base = host.base(plain)
        device, dtype = _place(plain)
        token = GistToken(host.dim, config.length, config.dropout, device=device, dtype=dtype)
        extension = GistExtension(config, host, host.make_insert(base, token))
    except Exception:
        if known is None:
            _state.end(plain, state)
        raise
    state.extension = extension
    for record in state.records.values():
        if record.name != state.active:
            record.extra = extension.fresh()
    extension.attach(plain)
    return GistModel(plain, config, host, outer).train(plain.training)


def _ignore_at_inference(model: nn.Module, ignored: bool) -> None:
    """Tell transformers' Trainer, by the model's configuration, that gist logits are no predictions to gather."""
    config, name = getattr(model, "config", None), "keys_to_ignore_at_inference"
    if not any(base.__module__.startswith("transformers.") for base in type(config).__mro__):
        return
    usual = getattr(type(config), name, ["past_key_values"])  # Trainer's own, where a configuration says nothing
    keys = [key for key in getattr(config, name, usual) if key != "gist_logits"]
    if ignored:
        setattr(config, name, [*keys, "gist_logits"])
    elif keys == usual:
        vars(config).pop(name, None)
    else:
        setattr(config, name, keys)


def _place(model: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Where the model's first floating-point parameter is, and its dtype, or float32 if that is narrower."""
    for p in model.parameters():
        if p.is_floating_point():
            return p.device, torch.promote_types(p.dtype, torch.float32)
    return None, torch.get_default_dtype()
