"""What a module's own call does around its forward, for a forward written out here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["opened"]

#: (module, what is left open, *args, **kwargs) -> output
Run = Callable[..., Any]


def opened(run: Run) -> Run:
    """``run`` with the module's forward hooks (transformers records hidden states and attentions with them) and under its
    gradient checkpointing, both of which are around the forward that is not called."""

    @functools.wraps(run)
    def running(module: Any, left_open: Any, *args: Any, **kwargs: Any) -> Any:
        for key, hook in module._forward_pre_hooks.items():
            if key in module._forward_pre_hooks_with_kwargs:
                changed = hook(module, args, kwargs)
                args, kwargs = (args, kwargs) if changed is None else changed
            else:
                changed = hook(module, args)
                args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
        if getattr(module, "gradient_checkpointing", False) and module.training and hasattr(module, _CHECKPOINT):
            kwargs |= {name: _WITHOUT_CACHE[name] for name in _WITHOUT_CACHE.keys() & kwargs.keys()}
            output = getattr(module, _CHECKPOINT)(functools.partial(run, module, left_open, **kwargs), *args)
        else:
            output = run(module, left_open, *args, **kwargs)
        for key, hook in module._forward_hooks.items():
            if key in module._forward_hooks_with_kwargs:
                changed = hook(module, args, kwargs, output)
            else:
                changed = hook(module, args, output)
            output = output if changed is None else changed
        return output

    return running


_CHECKPOINT = "_gradient_checkpointing_func"
#: What a layer that will run again in the backward gets instead: it would add its keys to a cache twice.
_WITHOUT_CACHE = {"past_key_values": None, "use_cache": False}
