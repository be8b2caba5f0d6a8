"""Every tensor once in a state_dict, where modules share parameters.

torch lists a parameter under each of its names: CP's and FacT's factors once for every layer that has them. safetensors
refuses that, and with it transformers' Trainer and ``save_pretrained``. Two hooks on the model keep the first name and, when
a state_dict is loaded, fill in the others, so one with every name still loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["hold_once"]

#: The parameters of a module under all their names.
Names = Callable[[Any], Iterable[tuple[str, Tensor]]]


def hold_once(module: nn.Module, names: Names) -> tuple[RemovableHandle, RemovableHandle]:
    """Give ``module`` a state_dict that holds each of ``names(module)``'s tensors once; the handles take that back.

    ``names`` is asked anew each time, and must be a function that pickle finds by name.
    """
    return (
        module.register_state_dict_post_hook(_Drop(names)),
        module.register_load_state_dict_pre_hook(_Fill(names)),
    )


class _Hook:
    def __init__(self, names: Names) -> None:
        self.names = names

    def aliases(self, module: nn.Module, prefix: str) -> list[list[str]]:
        """The keys of each tensor that has several, in order."""
        found: dict[int, list[str]] = {}
        for name, tensor in self.names(module):
            found.setdefault(id(tensor), []).append(prefix + name)
        return [keys for keys in found.values() if len(keys) > 1]


class _Drop(_Hook):
    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        for _, *others in self.aliases(module, prefix):
            for key in others:
                state_dict.pop(key, None)


class _Fill(_Hook):
    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for keys in self.aliases(module, prefix):
            held = next((key for key in keys if key in state_dict), None)
            for key in keys:
                if held is not None:
                    state_dict.setdefault(key, state_dict[held])
