r"""Checkpoints of the code that PETAL's authors released, read into this package's factors and experts.

What such a file holds was read in that code (github.com/melonking32/PETAL at c40bb42, of January 2024: the class
``Blip2T5InstructAurora_MOE``, its Vicuna twin, ``Qformer_PETAL_MOE.py``, and ``_save_checkpoint`` of its runner). No file that
the authors trained was at hand. It is ``torch.save``'s of ``{"model": state_dict, "optimizer", ...}`` whose state_dict
holds the trained parameters, those with "CP" or "Expert" in their name, and the model's buffers. In the names that
:data:`KEYS` lists, the update of a matrix is, (in, out),

.. math:: \Delta W_m = \mathtt{CP\_U}^T\, (\mathtt{CP\_C}\, p_m)\, \mathtt{CP\_V}^T,\quad p_m \in \mathbb{R}^{R \times 1}

with torch's batched matrix product, which contracts the last index of the core: CPFactors' "tucker" form with u = CP_U^T,
v = CP_V, c = CP_C and p_m^T as row m of p.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgist.nn import CPFactors, CPLinear, InstructionMoE
from fastgist.petal.extras import Transformed

__all__ = ["KEYS", "Released", "load_released", "read_released"]

#: group -> (name, shape). D: the Q-Former's width (768), I: the image features' (1408), R: the rank (64), h: an expert's width
#: (64), i: a layer (12), j: an expert (6). Cross-attention stands in every other layer, the four vectors in every one.
KEYS: dict[str, tuple[tuple[str, str], ...]] = {
    "text": (
        ("CP_U.weight", "R, D"),
        ("CP_V.weight", "D, R"),
        ("CP_C", "R, R, R"),
        ("Qformer.bert.encoder.layer.{i}.attention.self.q_CP", "R, 1"),
        ("Qformer.bert.encoder.layer.{i}.attention.self.k_CP", "R, 1"),
        ("Qformer.bert.encoder.layer.{i}.attention.self.v_CP", "R, 1"),
        ("Qformer.bert.encoder.layer.{i}.crossattention.self.q_CP", "R, 1"),
    ),
    "image": (
        ("CP_U_Image.weight", "R, I"),
        ("CP_V_Image.weight", "D, R"),
        ("CP_C_Image", "R, R, R"),
        ("Qformer.bert.encoder.layer.{i}.crossattention.self.k_CP", "R, 1"),
        ("Qformer.bert.encoder.layer.{i}.crossattention.self.v_CP", "R, 1"),
    ),
    "experts": (
        ("Qformer.bert.ExpertA.{j}.weight", "h, D"),
        ("Qformer.bert.ExpertA.{j}.bias", "h"),
        ("Qformer.bert.ExpertB.{j}.weight", "D, h"),
        ("Qformer.bert.ExpertB.{j}.bias", "D"),
    ),
    "transformation": (
        ("Qformer.bert.encoder.layer.{i}.CP_scaleself", "D"),
        ("Qformer.bert.encoder.layer.{i}.CP_shiftself", "D"),
        ("Qformer.bert.encoder.layer.{i}.CP_scalecross", "D"),
        ("Qformer.bert.encoder.layer.{i}.CP_shiftcross", "D"),
    ),
}
#: Those that a checkpoint may be without: files of the code's forms without experts.
OPTIONAL = ("experts", "transformation")
#: Buffers of the frozen model, which its state_dict holds too.
_BUFFER = re.compile(r"(^|\.)(position_ids|inv_freq|relative_position_index)$")
_P_ROW = re.compile(r"\.layer\.(\d+)\.(attention|crossattention)\.self\.([qkv])_CP$")
#: A matrix's place in transformers' models, and in LAVIS's layout ("self" in the second "attention"'s place).
_PLACE = re.compile(
    r"(?:^|\.)encoder\.layer\.(\d+)\.(attention|crossattention)\.(?:attention|self)\.(query|key|value)$"
)
_LETTERS = {"query": "q", "key": "k", "value": "v"}

#: (layer, "attention" or "crossattention", "q", "k" or "v")
Place = tuple[int, str, str]


@dataclass(frozen=True)
class Released:
    """A released checkpoint in this package's terms.

    text, image: ``u`` (in, R), ``v`` (D, R) and ``c`` (R, R, R) of a :class:`fastgist.nn.CPFactors` with core "tucker".
    rows: p's row (R,) of each matrix, by (layer, "attention" or "crossattention", "q", "k" or "v").
    experts: ``down_weight``, ``down_bias``, ``up_weight``, ``up_bias`` of an ``InstructionMoE(gating="uniform")``, or nothing.
    transformation: ``scaleself``, ``shiftself``, ``scalecross``, ``shiftcross`` (layers, D): of 0.1 (a * scaleself +
    shiftself), which the code adds to a layer's output, a being its self-attention's, and a second pair for its
    cross-attention, which it computes with and never adds; or nothing.
    sizes: "R", "D", "I", "layers", "experts" and "h", the last two 0 without experts.
    """

    text: dict[str, Tensor]
    image: dict[str, Tensor]
    rows: dict[Place, Tensor]
    experts: dict[str, Tensor] = field(default_factory=dict)
    transformation: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def group(place: Place) -> str:
        """Which factors a matrix belongs to: "image" for cross-attention's k and v, which read image features."""
        return "image" if place[1] == "crossattention" and place[2] != "q" else "text"


def read_released(source: str | os.PathLike | Mapping[str, Tensor]) -> Released:
    """A released checkpoint, checked.

    Args:
        source: a file (``.safetensors``, or torch's, of which nothing but tensors and plain data is ever unpickled), or the
            state_dict itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read so, or names or shapes other than :data:`KEYS` says; all are listed.
    """
    state, where = _open(source)
    sizes, wanted = _expected(state, where)
    problems = [
        f"{title}: {_listed(names)}"
        for title, names in (
            ("missing", [name for name in wanted if name not in state]),
            ("unexpected", [name for name in state if name not in wanted and not _BUFFER.search(name)]),
            (
                "wrong shape",
                [
                    f"{name}: expected {shape}, got {tuple(state[name].shape)}"
                    for name, shape in wanted.items()
                    if name in state and tuple(state[name].shape) != shape
                ],
            ),
            ("not floating point", [n for n in wanted if n in state and not state[n].is_floating_point()]),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{where}: is not a checkpoint of PETAL's released code; {'; '.join(problems)}")
    factors = {
        group: {
            "u": state[f"CP_U{suffix}.weight"].T,
            "v": state[f"CP_V{suffix}.weight"],
            "c": state[f"CP_C{suffix}"],
        }
        for group, suffix in (("text", ""), ("image", "_Image"))
    }
    rows: dict[Place, Tensor] = {}
    for name in wanted:
        found = _P_ROW.search(name)
        if found is not None:
            rows[int(found[1]), found[2], found[3]] = state[name][:, 0]
    return Released(
        factors["text"], factors["image"], rows, _experts(state, sizes), _transformation(state, wanted, sizes), sizes
    )


@torch.no_grad()
def load_released(
    model: nn.Module, source: str | os.PathLike | Mapping[str, Tensor] | Released, *, skip: Collection[str] = ()
) -> Released:
    """Load a released checkpoint into a wrapped model. Everything is checked first; on an error the model is as it was.

    The model's Q-Former has a :class:`fastgist.nn.CPLinear` for the query, key and value of every self-attention and every
    cross-attention, with core "tucker" and the factors of two groups, text and image; and one
    ``InstructionMoE(gating="uniform")``, if the checkpoint has experts.

    Outputs are the released model's only if its frozen parts are too: the checkpoint holds none of them. Nor does it say
    that the code adds 0.1 times the batch's mean to query 0 (``PetalConfig(batch_mean=0.1)``), and that in a decoding step
    with a cache its k and v lack their update, which here they have.

    Args:
        model: holds one such Q-Former, in transformers' or LAVIS's layout.
        source: as :func:`read_released`'s, or what that returned.
        skip: of "experts" and "transformation", what the checkpoint holds and the model shall not have. The query
            transformation is in every file of that code: ``PetalConfig(gated_query=True)`` has a place for it.

    Returns:
        The checkpoint, with what was skipped.

    Raises:
        FileNotFoundError, ValueError: as read_released.
        ValueError: the checkpoint is of another size, or the model has no place for what it holds; every difference is listed.
        RuntimeError: a layer is merged.
    """
    skip = (skip,) if isinstance(skip, str) else skip
    unknown = sorted(set(skip) - set(OPTIONAL))
    if unknown:
        raise ValueError(f"load_released: skip may name {', '.join(OPTIONAL)}, got {', '.join(map(repr, unknown))}")
    released = source if isinstance(source, Released) else read_released(source)
    copies, problems = _factor_copies(model, released)
    for more, wrong in (_expert_copies(model, released, skip), _transformation_copies(model, released, skip)):
        copies += more
        problems += wrong
    problems += [
        f"{name}: expected {tuple(target.shape)}, got {tuple(value.shape)}"
        for name, target, value in copies
        if target.shape != value.shape
    ]
    if problems:
        raise ValueError(f"load_released: the checkpoint does not fit the model; {_listed(problems, '; ')}")
    for _, target, value in copies:
        target.copy_(value)
    return released


# -- the file --------------------------------------------------------------------------------------------------------


def _open(source: str | os.PathLike | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state_dict by name, and what an error calls it."""
    if isinstance(source, Mapping):
        found: object = source
        where = "read_released"
    else:
        path = Path(source)
        where = str(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found")
        found = _read(path)
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{where}: holds no state_dict (tensors by name, alone or under 'model')")
    return {str(name): value for name, value in found.items()}, where


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"{path}: damaged, or not a safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: of zip, of pickle, of torch
        raise ValueError(f"{path}: cannot be read as tensors and plain data alone: {error}") from error


def _expected(state: Mapping[str, Tensor], where: str) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """The sizes that ``state`` seems to have, and the name and shape of everything that such a checkpoint holds."""
    ranks = [name for name in ("CP_U.weight", "CP_U_Image.weight") if name not in state or state[name].dim() != 2]
    if ranks:
        raise ValueError(f"{where}: is not a checkpoint of PETAL's released code; missing: matrices {', '.join(ranks)}")
    sizes = {
        "R": len(state["CP_U.weight"]),
        "D": state["CP_U.weight"].shape[1],
        "I": state["CP_U_Image.weight"].shape[1],
    }
    layers = {int(found[1]) for name in state if (found := re.match(r"Qformer\.bert\.encoder\.layer\.(\d+)\.", name))}
    crossed = {int(found[1]) for name in state if (found := _P_ROW.search(name)) and found[2] == "crossattention"}
    experts = {int(found[1]) for name in state if (found := re.match(r"Qformer\.bert\.Expert[AB]\.(\d+)\.", name))}
    first = state.get("Qformer.bert.ExpertA.0.weight")
    sizes |= {"layers": _run(layers), "experts": _run(experts)}
    sizes["h"] = len(first) if experts and first is not None and first.dim() else 0
    wanted: dict[str, tuple[int, ...]] = {}
    for group, keys in KEYS.items():
        if group in OPTIONAL and not any(_matches(pattern, name) for pattern, _ in keys for name in state):
            continue
        for pattern, shape in keys:
            numbers: Collection[int] = (0,)
            if "{j}" in pattern:
                numbers = range(sizes["experts"])
            elif "{i}" in pattern:
                numbers = sorted(crossed) if ".crossattention." in pattern else range(sizes["layers"])
            for number in numbers:
                wanted[pattern.format(i=number, j=number)] = tuple(
                    sizes[letter] if letter in sizes else int(letter) for letter in shape.split(", ")
                )
    return sizes, wanted


def _run(numbers: Collection[int]) -> int:
    """How many of 0, 1, 2, ... are there; what comes after a gap is not counted, however high a file's numbers go."""
    return next(n for n in range(len(numbers) + 1) if n not in numbers)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"\d+").replace(r"\{j\}", r"\d+"), name) is not None


def _experts(state: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """K experts as one adapter of width K h: InstructionMoE's parameters."""
    count = sizes["experts"]
    if count == 0:
        return {}
    (down, down_bias), (up, up_bias) = (
        [[state[f"Qformer.bert.Expert{side}.{j}.{kind}"] for j in range(count)] for kind in ("weight", "bias")]
        for side in "AB"
    )
    return {
        "down_weight": torch.cat(down),
        "down_bias": torch.cat(down_bias),
        "up_weight": torch.cat(up, 1),
        "up_bias": torch.stack(up_bias),
    }


def _transformation(
    state: Mapping[str, Tensor], wanted: Collection[str], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    found = {}
    for pattern, _ in KEYS["transformation"]:
        names = [pattern.format(i=i) for i in range(sizes["layers"])]
        if names[0] in wanted:
            found[pattern.rsplit("CP_", 1)[1]] = torch.stack([state[name] for name in names])
    return found


# -- the model -------------------------------------------------------------------------------------------------------

#: What is copied where, and its name in an error.
Copy = tuple[str, Tensor, Tensor]


def _matrices(model: nn.Module) -> Iterator[tuple[Place, str, CPLinear]]:
    for path, module in model.named_modules():
        found = _PLACE.search(path)
        if found is not None and isinstance(module, CPLinear):
            yield (int(found[1]), found[2], _LETTERS[found[3]]), path, module


def _factor_copies(model: nn.Module, released: Released) -> tuple[list[Copy], list[str]]:
    layers: dict[Place, tuple[str, CPLinear]] = {}
    for place, path, layer in _matrices(model):
        if place in layers:
            raise ValueError(f"load_released: the model has two Q-Formers, with {layers[place][0]} and {path}")
        layers[place] = path, layer
    if not layers:
        raise ValueError(
            "load_released: the model has no CPLinear at encoder.layer.<i>.attention.attention.query or the like; wrap its "
            'Q-Former first, with core="tucker"'
        )
    problems = [f"no CPLinear for {_name(place)}" for place in released.rows if place not in layers]
    problems += [
        f"{path} has no row in the checkpoint" for place, (path, _) in layers.items() if place not in released.rows
    ]
    copies: list[Copy] = []
    owners: dict[str, CPFactors] = {}
    rows: dict[str, set[int]] = {"text": set(), "image": set()}
    for place, row in released.rows.items():
        if place not in layers:
            continue
        path, layer = layers[place]
        group, factors, mode = released.group(place), layer.factors, layer.mode
        if layer.merged:
            raise RuntimeError(f"load_released: {path} is merged; unmerge it first")
        if owners.setdefault(group, factors) is not factors:
            problems.append(f"{path} does not share the {group} group's factors")
        elif not isinstance(mode, int):
            problems.append(f"{path} has the modes {mode}, expected a single one")
        elif layer.scale != 1.0:
            problems.append(f"{path} has scale {layer.scale}, expected 1.0")
        elif factors.core == "tucker":
            rows[group].add(mode)
            copies.append((f"p of {path}", factors.p[mode], row))
    for group, factors in owners.items():
        if factors.core != "tucker":
            problems.append(f"the {group} group's core is {factors.core!r}, expected 'tucker'")
            continue
        count = sum(released.group(place) == group for place in released.rows)
        if factors.modes != count or (not problems and len(rows[group]) != count):
            problems.append(
                f"the {group} group: expected {count} matrices with a row of p each, got {len(rows[group])} rows in use of "
                f"{factors.modes}"
            )
        ours = [(f"{name} of the {group} group", getattr(factors, name), t) for name, t in _group(released, group)]
        copies = ours + copies  # first, so that an error about sizes begins with them
    if len({id(f) for f in owners.values()}) < len(owners):
        problems.append("text and image share factors, where the checkpoint has two groups")
    return copies, problems


def _group(released: Released, group: str) -> Iterator[tuple[str, Tensor]]:
    yield from (released.text if group == "text" else released.image).items()


def _name(place: Place) -> str:
    word = next(word for word, letter in _LETTERS.items() if letter == place[2])
    return f"encoder.layer.{place[0]}.{place[1]}.*.{word}"


def _expert_copies(model: nn.Module, released: Released, skip: Collection[str]) -> tuple[list[Copy], list[str]]:
    found = [(p, m) for p, m in model.named_modules() if isinstance(m, InstructionMoE)]
    if not released.experts or "experts" in skip:
        if found and "experts" not in skip:
            return [], [f"{found[0][0]} is an InstructionMoE, and the checkpoint has no experts"]
        return [], []
    if len(found) != 1:
        return [], [f"the checkpoint has {released.sizes['experts']} experts, the model {len(found)} InstructionMoE"]
    path, moe = found[0]
    if moe.gating != "uniform" or moe.activation != "identity":
        return [], [
            f"{path} has gating {moe.gating!r} and activation {moe.activation!r}, expected 'uniform' and 'identity'"
        ]
    size, ours = (released.sizes["experts"], released.sizes["h"]), (moe.num_experts, moe.bottleneck_dim)
    if size != ours:
        return [], [f"{path} has {ours[0]} experts {ours[1]} wide, the checkpoint {size[0]}, {size[1]} wide"]
    return [(f"{path}.{name}", getattr(moe, name), value) for name, value in released.experts.items()], []


def _transformation_copies(model: nn.Module, released: Released, skip: Collection[str]) -> tuple[list[Copy], list[str]]:
    """s and b of each layer; the pair of the cross-attention, which the code never reads, has no place."""
    if not released.transformation or "transformation" in skip:
        return [], []
    found = {
        int(place[1]): module.transformation
        for path, module in model.named_modules()
        if isinstance(module, Transformed) and (place := re.search(r"\.layer\.(\d+)\.output_query$", path))
    }
    if sorted(found) != list(range(released.sizes["layers"])):
        return [], [
            "the checkpoint has a query transformation in each of "
            f"{released.sizes['layers']} layers, the model in {len(found)} (PetalConfig(gated_query=True)); "
            "skip=('transformation',) leaves it out, and the outputs then differ from the released model's"
        ]
    return [
        (f"{ours} of layer {i}'s query transformation", getattr(module, ours), released.transformation[theirs][i])
        for i, module in found.items()
        for ours, theirs in (("s", "scaleself"), ("b", "shiftself"))
    ], []


def _listed(names: list[str], between: str = ", ", most: int = 6) -> str:
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
