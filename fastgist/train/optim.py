"""The optimiser's side of a run: parameter groups for token, adapter and head, and numbers that follow a schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastgist.nn import Cosine, Linear
from fastgist.peft import state as _state
from fastgist.train.config import UserError

__all__ = ["PARTS", "check_schedules", "groups_of", "parameter_groups", "parse_schedule", "to_schedule"]

#: What a trained parameter can belong to. "model" is everything else: the backbone in full fine-tuning.
PARTS = ("gist", "peft", "head", "model")


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    lrs: Mapping[str, float | None] | None = None,
    weight_decays: Mapping[str, float | None] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimiser: gist token, PEFT layers, head and the rest of the model.

    Every trained parameter is in exactly one group; a shared one counts once. Biases, other vectors (norms, scales)
    and what the model's own ``no_weight_decay()`` names take no weight decay. The gist token takes it, as in the GIST
    paper (arXiv 2312.07255). Groups without parameters are left out.

    Args:
        model: from :func:`fastgist.get_peft_model` or :func:`fastgist.add_gist`, or any module, whose trained parameters
            are all "model" then. Fronts such as DistributedDataParallel or torch.compile's are looked through.
        lr, weight_decay: for every part not named below.
        lrs, weight_decays: numbers for single parts, by name ("gist", "peft", "head", "model"); None counts as absent.

    Returns:
        Dicts with "params", "lr", "weight_decay", "part" and "name" ("head", "head, no decay", ...).

    Raises:
        ValueError: nothing is trained; a number is not finite or negative; an unknown part, or one that this model does
            not train.
    """
    plain = _state.inner(model)
    part_of = _parts(plain)
    exempt = set(plain.no_weight_decay()) if hasattr(plain, "no_weight_decay") else set()
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            part = part_of.get(id(parameter), "model")
            decays = part == "gist" or not (parameter.ndim <= 1 or name.endswith("bias") or name in exempt)
            groups.setdefault((part, decays), []).append(parameter)
    if not groups:
        raise ValueError(f"parameter_groups: no parameter of {type(plain).__name__} is trained")
    trained = {part for part, _ in groups}
    rates = _numbers("lrs", lr, lrs, trained)
    decay = _numbers("weight_decays", weight_decay, weight_decays, trained)
    return [
        {
            "params": groups[part, decays],
            "lr": rates[part],
            "weight_decay": decay[part] if decays else 0.0,
            "part": part,
            "name": part if decays else f"{part}, no decay",
        }
        for part in PARTS
        for decays in (True, False)
        if (part, decays) in groups
    ]


def groups_of(model: nn.Module, recipe: Any) -> list[dict[str, Any]]:
    """:func:`parameter_groups` by a run's settings (``lr``, ``weight_decay`` and :class:`fastgist.recipes.PartRates`).

    Raises:
        UserError: a number out of range, or one for a part that this model does not train.
    """
    try:
        return parameter_groups(
            model, recipe.lr, recipe.weight_decay, lrs=recipe.lrs, weight_decays=recipe.weight_decays
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _parts(plain: nn.Module) -> dict[int, str]:
    """The part of every parameter that an adaptation owns, by id."""
    state = _state.state_of(plain)
    if state is None:
        return {}
    names = {"adapter": "peft"}
    found: dict[int, str] = {}
    for name, tensor in _state.owned_tensors(plain, state).items():
        section = name.split(".", 1)[0]
        found.setdefault(id(tensor), names.get(section, section))
    return found


def _numbers(
    argument: str, common: float, given: Mapping[str, float | None] | None, trained: set[str]
) -> dict[str, float]:
    """The number of every part."""
    chosen = {part: value for part, value in (given or {}).items() if value is not None}
    for part, value in [("all", common), *chosen.items()]:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"parameter_groups: {argument} must be finite and >= 0, got {value} for {part}")
    for part in chosen:
        if part not in PARTS:
            raise ValueError(f"parameter_groups: {argument} has no part {part!r}; there are {', '.join(PARTS)}")
        if part not in trained:
            raise ValueError(
                f"parameter_groups: {argument} names {part!r}, of which this model trains nothing "
                f"(it trains {', '.join(p for p in PARTS if p in trained)})"
            )
    return {part: chosen.get(part, common) for part in PARTS}


# -- numbers over the run --------------------------------------------------------------------------------------------

_SHAPES = {"linear": Linear, "cosine": Cosine}


def to_schedule(value: float | str) -> float | Linear:
    """A number as it is; "linear:START:END[:SINCE:UNTIL]" or "cosine:..." as a schedule over the run's progress.

    Raises:
        ValueError: neither; a number that is not finite; SINCE and UNTIL not in order within [0, 1].
    """
    words = str(value).split(":")
    shape = _SHAPES.get(words[0])
    try:
        numbers = [float(word) for word in (words if shape is None else words[1:])]
    except ValueError:
        numbers = []
    wrong = len(numbers) != 1 if shape is None else len(numbers) not in (2, 4)
    if wrong or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"expected a finite number, linear:START:END or cosine:START:END (then perhaps :SINCE:UNTIL in [0, 1]), "
            f"got {value!r}"
        )
    return numbers[0] if shape is None else shape(*numbers)


def parse_schedule(value: float | str) -> float | str:
    """The number, or the words of a schedule once they have been understood: what settings hold and files can."""
    found = to_schedule(value)
    return found if isinstance(found, float) else str(value)


def check_schedules(config: Any) -> None:
    """UserError unless the settings temperature and beta, number or schedule, are > 0 and >= 0 at both their ends."""
    for name, least, words in (("temperature", 0.0, "> 0"), ("beta", -math.ulp(0.0), ">= 0")):
        try:
            schedule = to_schedule(getattr(config, name))
        except ValueError as error:
            raise UserError(f"--{name}: {error}") from error
        ends = (schedule.start, schedule.end) if isinstance(schedule, Linear) else (schedule,)
        if any(not end > least for end in ends):
            raise UserError(f"--{name} must be finite and {words}, got {getattr(config, name)}")
