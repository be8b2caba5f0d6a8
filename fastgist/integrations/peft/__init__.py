"""Hugging Face PEFT: a gist token in a ``PeftModel``, and PETAL's CP factors as a method of PEFT's own (:func:`register`)."""

from __future__ import annotations

from fastgist.integrations.peft.gist import check, head_path, kinds, prefix, trained

__all__ = ["check", "head_path", "kinds", "prefix", "register", "trained"]


def register() -> type:
    """Make CP mode approximation a method of Hugging Face PEFT, of type "FASTGIST_CP", and return its configuration class.

    ``peft.get_peft_model(model, register()(r=64, target_modules=["q_proj", "v_proj"]))`` then works, with saving (shared
    factors once), loading and merging. Nothing of it happens on import: a PEFT type is added to PEFT's enumeration. Who
    loads such an adapter must have called this too, or gets a KeyError from PEFT; say so in the model card.
    """
    from fastgist.integrations.peft.cp import register

    return register()
