r"""A model with a gist token (GIST, arXiv 2312.07255).

The token is put once, right after the class token, and stays in the sequence, in inference too: dropping it would
change the outputs. Both logits come from the same final norm and the same head,

.. math::
    z = \mathrm{head}(h_{0}), \qquad z_g = \mathrm{head}(h_{i_g})

with i_g the token's index. The prediction is z; z_g is computed in training only, unless asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.gist.output import GistOutput
from fastgist.nn import GistToken
from fastgist.peft import state as _state

__all__ = ["GistConfig", "GistExtension", "GistHost", "GistInsert", "GistModel", "add_gist"]

READOUTS = ("first", "mean")


@dataclass
class GistConfig:
    """length: how many gist tokens. dropout: on the token, in training. readout: where z_g is read with several tokens,
    "first" (the authors' code) or "mean" (of their final states)."""

    length: int = 1
    dropout: float = 0.1
    readout: str = "first"

    def __post_init__(self) -> None:
        if self.readout not in READOUTS:
            raise ValueError(f"GistConfig: readout must be one of {', '.join(READOUTS)}, got {self.readout!r}")

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
            return self._insert(self.base_layer(*args, **kwargs))
        return self.base_layer(self._insert(*args, **kwargs))

    def _insert(self, x: Tensor) -> Tensor:
        return torch.cat((x[:, : self.index], self.gist(x), x[:, self.index :]), dim=1)

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
    #: Whether the token is in the sequence at present.
    active: bool = False

    @abstractmethod
    def forward(
        self, model: nn.Module, config: GistConfig, want_gist: bool, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(logits, gist logits or None) of the model, into which the token is attached."""

    def make_insert(self, base: nn.Module, gist: GistToken) -> GistInsert:
        """What stands in the place of ``base``, the module at :attr:`path`; a host whose token goes in otherwise returns
        a subclass of :class:`GistInsert`."""
        return GistInsert(base, gist, self.index, self.after)

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
        self.insert.base_layer = model.get_submodule(self.host.path)
        self.insert.train(self.insert.base_layer.training)
        _state.replace_module(model, self.host.path, self.insert)
        self.host.attached(model, self.config.length)
        self.host.active = True

    def detach(self, model: nn.Module) -> None:
        _state.replace_module(model, self.host.path, self.insert.base_layer)
        self.host.detached(model, self.config.length)
        self.host.active = False


class GistModel(_state.Front):
    """``model`` with a gist token. Made by :func:`add_gist`.

    ``forward`` returns a :class:`GistOutput`. ``model`` is the wrapped model itself (the same object, with the token
    attached); its own ``forward`` returns plain logits. For timm models ``forward_features`` and the like are passed
    on, and ``num_prefix_tokens`` counts the gist token, so slicing patches off works as before.

    In ``forward``, hooks on ``model`` itself do not run: its parts are called one by one. Hooks on any part do.
    """

    model: Any

    def __init__(self, model: nn.Module, config: GistConfig, host: GistHost) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.host = host

    @property
    def gist(self) -> GistToken:
        """The gist token's module. Raises RuntimeError while it is detached (disable_adapter, unload)."""
        insert = self.model.get_submodule(self.host.path)
        if not isinstance(insert, GistInsert):
            raise RuntimeError("GistModel: the gist token is detached at present")
        return insert.gist

    def forward(self, *args: Any, return_gist_logits: bool | None = None, **kwargs: Any) -> GistOutput:
        """The wrapped model's arguments; ``return_gist_logits``: None for only while training.

        Returns:
            GistOutput with ``logits`` (B, C) and, if asked for or training, ``gist_logits`` (B, C).
        """
        if not self.host.active:
            if return_gist_logits:
                raise RuntimeError("GistModel: gist logits were asked for while the gist token is detached")
            output = self.model(*args, **kwargs)
            return GistOutput(logits=output if isinstance(output, Tensor) else output["logits"])
        want = self.training if return_gist_logits is None else return_gist_logits
        logits, gist_logits = self.host.forward(self.model, self.config, want, *args, **kwargs)
        return GistOutput(logits=logits, gist_logits=gist_logits)

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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)

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
        return f"{self.config}"


def add_gist(model: nn.Module, config: GistConfig | None = None) -> GistModel:
    """Give ``model`` a gist token and return the :class:`GistModel` around it.

    A plain model is frozen but for its head first; one from :func:`fastgist.get_peft_model` keeps its adapters, each
    named one with a gist token of its own. What is trained then: the adapter, the gist token, the head.

    Raises:
        ValueError: the model has a gist token already, or there is no place for one (no class token, pooling by
            attention); the model is unchanged.
        TypeError: an unknown model family.
    """
    config = GistConfig() if config is None else config
    if not isinstance(config, GistConfig):
        raise TypeError(f"add_gist: config must be a GistConfig, got {type(config).__name__}")
    known = _state.state_of(model)
    if isinstance(model, GistModel) or (known is not None and known.extension is not None):
        raise ValueError("add_gist: the model has a gist token already")
    plain = _state.inner(model)
    state = _state.begin(plain, "add_gist")
    try:
        host: GistHost = state.family.gist_host(plain)
        base = plain.get_submodule(host.path)
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
    return GistModel(plain, config, host).train(plain.training)


def _place(model: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Where the model's first floating-point parameter is, and its dtype, or float32 if that is narrower."""
    for p in model.parameters():
        if p.is_floating_point():
            return p.device, torch.promote_types(p.dtype, torch.float32)
    return None, torch.get_default_dtype()
