"""A gist token in a Hugging Face ``PeftModel``: ``add_gist(peft_model)``.

The model inside (``peft_model.get_base_model()``) takes the token as it would without PEFT. Trained are PEFT's own parameters,
as PEFT has them, the token and the head. The head is the copy that ``modules_to_save`` made, where there is one.

Two files in two folders hold the whole, because both libraries call theirs ``adapter_model.safetensors``:

- ``peft_model.save_pretrained(a)`` writes PEFT's part (with ``modules_to_save`` the head too);
- ``fastgist.save_adapter(gist_model, b)`` writes token and head.

``load_adapter(PeftModel.from_pretrained(plain, a), b)`` puts them together again, and warns where PEFT's part is not the one
that the token was trained beside.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["check", "head_path", "kinds", "prefix"]


def kinds(model: Any) -> list[str]:
    """The kinds of PEFT's active adapters: ["LORA"]."""
    return sorted(str(getattr(model.peft_config[name].peft_type, "value", "?")) for name in _active(model))


def _active(model: Any) -> list[str]:
    active = model.active_adapter
    return [active] if isinstance(active, str) else list(active)


def check(model: Any, takes_prefix: bool) -> None:
    """Raise ValueError if a gist token cannot stand beside what ``model`` holds."""
    config = model.active_peft_config
    if not config.is_prompt_learning:
        return
    (kind,) = kinds(model)
    if kind != "PREFIX_TUNING":
        raise ValueError(
            f"add_gist: {kind} puts tokens of its own into the sequence, which only PEFT's own forward knows of; fastgist's "
            "PromptConfig puts prompts in beside a gist token"
        )
    if not takes_prefix:
        raise ValueError(
            f"add_gist: PEFT's prefix tuning of a {type(model.get_base_model()).__name__} is not served (of decoders it "
            "is); fastgist's PrefixConfig may be"
        )


def head_path(model: nn.Module, path: str) -> str:
    """The path of the head's trained module: of the active copy, where PEFT's ``modules_to_save`` wraps the head.

    Raises:
        ValueError: the head is one of the layers that PEFT adapts.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    head = model.get_submodule(path)
    if isinstance(head, ModulesToSaveWrapper):
        return f"{path}.modules_to_save.{head.active_adapters[0]}"
    if any(isinstance(module, BaseTunerLayer) for module in head.modules()):
        raise ValueError(
            f"add_gist: PEFT adapts the head ({path}), which is trained whole beside a gist token; name it in "
            "modules_to_save, not in target_modules"
        )
    return path


def prefix(model: Any, batch: int) -> tuple[Any, int] | None:
    """PEFT's prefix as a cache of keys and values for ``batch`` rows, and its length; None without prefix tuning."""
    config = model.active_peft_config
    if not config.is_prompt_learning:
        return None
    return model.get_prompt(batch), config.num_virtual_tokens


def trained(model: nn.Module) -> set[int]:
    """Which parameters PEFT trains, by identity."""
    return {id(p) for p in model.parameters() if p.requires_grad and isinstance(p, Tensor)}
