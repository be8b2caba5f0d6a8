"""An adapted model as one file for other runtimes: a ``torch.export`` program (.pt2) or ONNX.

What merges (LoRA, CP, FacT, SSF, BitFit) is merged; adapters, prompts, prefixes and the gist token stay in the graph.
fastgist's own operators are traded for the plain expressions of :mod:`fastgist.reference`, so that a runtime without
fastgist reads the graph. The batch is dynamic, and of texts their length. The file is read back and compared with the eager
model on random inputs before it takes its name.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.peft import state as _state
from fastgist.peft.method import method_of
from fastgist.testing import error_floor

__all__ = ["FORMATS", "METADATA", "Exported", "as_plain_module", "export_model", "export_program"]

FORMATS = {"torch": ".pt2", "onnx": ".onnx"}

#: Name of the JSON text in the file: of a .pt2's extra file, of ONNX's metadata property.
METADATA = "fastgist.json"

#: How many times the eager model's own rounding error an exported one may be off: another runtime sums in another order
#: in every layer, and a merged weight rounds once more.
SLACK = 8.0

#: What one ONNX file can hold (a protobuf message), less the graph.
ONNX_BYTES = 2**31 - 2**20

#: Batches that a file is checked with. Two is the one it was traced with.
BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class Exported:
    """What :func:`export_model` wrote. ``difference``: the largest against the eager model, over all checked inputs."""

    path: Path
    format: str
    merged: bool
    difference: float
    allowed: float


class _Logits(nn.Module):
    """A model whose output is its prediction's logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return output if isinstance(output, Tensor) else output["logits"]


class _TextLogits(nn.Module):
    """The same of a text classifier. A decoder's positions count a row's own tokens, on whichever side it is padded."""

    def __init__(self, model: nn.Module, positions: bool = False) -> None:
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        if self.positions:
            given["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.model(**given)["logits"]


def as_plain_module(model: nn.Module) -> tuple[nn.Module, bool]:
    """A copy of ``model`` in evaluation mode that returns logits, merged where that can be, and whether it is.

    ``model`` itself is left alone. An adapter that is merged already, or whose base layers cannot take it (quantised),
    stays as it is. A gist token that predictions do not see (a decoder's) is left out.
    """
    model = copy.deepcopy(_front(model)).eval()
    state = _state.state_of(model)
    extension: Any = None if state is None or state.foreign else state.extension
    if getattr(getattr(extension, "host", None), "behind", False):
        plain = _state.inner(model)
        extension.detach(plain)
        model = plain
    record = None if state is None else state.record()
    merged = False
    if record is not None and method_of(record.config).can_merge(record.config) and record.sites:
        plain = _state.inner(model)
        for layer in record.sites.values():
            if not layer.merged:
                try:
                    layer.check_mergeable()
                except TypeError:
                    return _Logits(model), False
        for path, layer in record.sites.items():
            if not layer.merged:
                layer.merge()
            _state.replace_module(plain, path, layer.base_layer)
        merged = True
    return _Logits(model).eval(), merged


def _front(model: nn.Module) -> nn.Module:
    """``model`` without torch.compile's and DistributedDataParallel's wrappers, a gist model kept."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


# -- plain expressions for our operators ------------------------------------------------------------------------------


def _adapter_fwd(
    x: Tensor, down: Tensor, down_bias: Tensor | None, up: Tensor, up_bias: Tensor | None, residual: Tensor | None,
    branch: Tensor | None, gate: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    seed: Tensor | None, activation: str, scale: float, residual_scale: float, norm_eps: float | None, dropout_p: float,
    need_z: bool, x_kept: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from fastgist.reference.adapter import adapter

    added = False if residual is None else residual if branch is None else (residual, branch)
    y = adapter(
        x, down, down_bias, up, up_bias, activation=activation, scale=scale, residual=added,
        residual_scale=residual_scale, gate=gate,
        norm=None if norm_eps is None else (norm_weight, norm_bias, norm_eps),
    )  # fmt: skip
    return y, x.new_empty(0), x.new_empty(0)


def _cp_linear_fwd(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], u: Tensor, v: Tensor, gain: Tensor | None,
    seed: Tensor | None, scale: float, dropout_p: float, need_h: bool, impl: str,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    from fastgist import backends
    from fastgist.reference.cp_linear import cp_linear

    weight, bias = torch.cat(list(weights)), torch.cat(list(biases)) if biases else None
    y = cp_linear(x, weight, bias, u, v, gain, scale=scale)
    whole = backends.resolve("cp_linear", impl, x) == "triton"  # as the operator's own results
    return [y] if whole else list(y.split([w.shape[0] for w in weights], 1)), x.new_empty(0)


def _cp_update_fwd(
    y: Tensor, x: Tensor, u: Tensor, v: Tensor, gain: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
    need_h: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastgist.reference.cp_update import cp_update

    return cp_update(y, x, u, v, gain, scale=scale), x.new_empty(0)


def _gelu_fwd(x: Tensor, impl: str) -> Tensor:
    return nn.functional.gelu(x)


def _plain_expressions() -> dict[Any, Callable[..., Any]]:
    import fastgist.functional  # noqa: F401 - defines the operators

    ops = torch.ops.fastgist
    found = {ops.adapter_fwd.default: _adapter_fwd, ops.cp_linear_fwd.default: _cp_linear_fwd}
    return found | {ops.cp_update_fwd.default: _cp_update_fwd, ops.gelu_fwd.default: _gelu_fwd}


def export_program(model: nn.Module, example: Tensor | Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """``model`` (from :func:`as_plain_module`) as a torch.export program of standard operators, its batch dynamic, and the
    length where ``example`` is of texts.

    Raises:
        RuntimeError: torch.export cannot trace the model, or an operator of fastgist is left in the graph.
    """
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = ({0: batch},)
    args: tuple[Any, ...] = (example,)
    if not isinstance(example, Tensor):
        args, shapes = (), {name: {0: batch, 1: torch.export.Dim.DYNAMIC} for name in example}
    named = {} if isinstance(example, Tensor) else dict(example)
    with torch.no_grad():
        try:
            program = torch.export.export(model, args, named, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            kind = type(getattr(model, "model", model)).__name__
            reason = " ".join(str(error).split())[:300]
            raise RuntimeError(f"export_program: torch.export cannot trace this {kind}: {reason}") from error
        program = program.run_decompositions(_plain_expressions())
    ours = sorted({str(n.target) for n in program.graph.nodes if str(n.target).startswith("fastgist")})
    if ours:
        raise RuntimeError(f"export_program: {', '.join(ours)} has no plain expression here")
    return program


# -- files -----------------------------------------------------------------------------------------------------------


def export_model(
    model: nn.Module,
    path: str | os.PathLike,
    example: Tensor | Sequence[int] | Mapping[str, Tensor],
    *,
    format: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write ``model`` to ``path`` for inference, checked against the model itself.

    Args:
        model: any model that takes an image batch and returns logits or a mapping with "logits", or a sequence classifier
            of transformers, adapted or not.
        path: where to; its folder must exist. The file appears by a rename, once it has been checked.
        example: a batch of at least two images, or the shape of one image such as (3, 224, 224); of a text model its
            ``input_ids`` and ``attention_mask``, and ``token_type_ids`` if it is to take them, (B, N) int64.
        format: "torch" (.pt2, torch.export.save) or "onnx" (needs onnx, onnxscript and onnxruntime); by the suffix of
            ``path`` if None.
        metadata: JSON values to keep in the file under :data:`METADATA`.

    Raises:
        ValueError: an unknown format, an example of one row or of other names, more weights than one ONNX file holds.
        ModuleNotFoundError: a package that the format needs.
        RuntimeError: torch.export cannot trace the model or torch.onnx not write it, or the file's results differ from
            the model's by more than rounding: the error tells by how much, and nothing is written.
    """
    path = Path(path)
    kind = format or next((name for name, suffix in FORMATS.items() if path.suffix == suffix), None)
    if kind not in FORMATS:
        known = ", ".join(f"{name} ({suffix})" for name, suffix in FORMATS.items())
        raise ValueError(f"export_model: format must be one of {known}, got {format or path.suffix!r}")
    if kind == "onnx":
        _need_onnx()
    if not isinstance(example, (Tensor, Mapping)):
        example = torch.randn(2, *example)
    text = isinstance(example, Mapping)
    rows = _check_words(example) if isinstance(example, Mapping) else example
    if rows.shape[0] < 2:
        raise ValueError(
            f"export_model: the example needs at least two {'texts' if text else 'images'} (a batch of one is traced as the "
            f"only one), got {tuple(rows.shape)}"
        )
    own = next(model.parameters(), None)
    if isinstance(example, Mapping):
        example = {name: t if own is None else t.to(own.device) for name, t in example.items()}
    else:
        example = example.to(own) if own is not None else example
    plain, merged = as_plain_module(model)
    if text:
        from fastgist.train.text import is_decoder

        plain = _TextLogits(plain.model, positions=is_decoder(_state.inner(plain.model))).eval()
    held = sum(t.numel() * t.element_size() for t in [*plain.parameters(), *plain.buffers()])
    if kind == "onnx" and held > ONNX_BYTES:
        raise ValueError(
            f"export_model: {held / 2**30:.1f} GiB of weights do not fit one ONNX file: take format 'torch'"
        )
    taken = f"{', '.join(example)} (batch, length)" if text else "images (batch, channels, height, width), normalised"
    about = {**(metadata or {}), "merged": merged, "input": taken}
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}{FORMATS[kind]}")
    try:
        program = export_program(plain, example)
        write, read = _WRITERS[kind], _READERS[kind]
        write(program, temporary, json.dumps(about), list(example) if text else ["images"])
        eager = _TextLogits(_front(model)) if text else _Logits(_front(model))
        difference, allowed = _check(eager, read(temporary), example, path)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, kind, merged, difference, allowed)


def _check_words(example: Mapping[str, Tensor]) -> Tensor:
    names, needed = set(example), {"input_ids", "attention_mask"}
    if not needed <= names <= {*needed, "token_type_ids"}:
        raise ValueError(
            "export_model: the example of a text model holds input_ids, attention_mask and, if it takes them, "
            f"token_type_ids; got {', '.join(map(str, example)) or 'nothing'}"
        )
    return example["input_ids"]


def _random_like(
    example: Tensor | Mapping[str, Tensor], model: nn.Module, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """A batch of ``count`` random rows. Texts are as long as the example, or half of it, and padded on the right."""
    if isinstance(example, Tensor):
        return {"images": torch.randn(count, *example.shape[1:], generator=generator).to(example)}
    ids = example["input_ids"]
    config: Any = _state.inner(model).config
    length, pad = ids.shape[1] if count % 2 == 0 else max(1, ids.shape[1] // 2), config.pad_token_id
    words = torch.randint(config.vocab_size, (count, length), generator=generator)
    words[words == pad] = 0 if pad else 1
    lengths = (length - torch.arange(count) % 4).clamp(min=1) if pad is not None else torch.full((count,), length)
    mask = torch.arange(length) < lengths[:, None]
    found = {"input_ids": words.where(mask, 0 if pad is None else pad), "attention_mask": mask.to(torch.int64)}
    if "token_type_ids" in example:  # a second text from the middle on
        found["token_type_ids"] = ((torch.arange(length) >= length // 2) & mask).to(torch.int64)
    return {name: found[name].to(ids.device) for name in example}


def _check(
    eager: nn.Module, run: Callable[..., Tensor], example: Tensor | Mapping[str, Tensor], path: Path
) -> tuple[float, float]:
    """(largest difference, what rounding allows) between the file and the model, whose mode is put back."""
    generator = torch.Generator().manual_seed(0)
    modes = {module: module.training for module in eager.modules()}
    worst, allowed = 0.0, float("inf")
    try:
        eager.eval()
        exact_model = copy.deepcopy(eager).double()
        for count in BATCHES:
            random = _random_like(example, eager.model, count, generator)
            wide = {name: t.double() if t.is_floating_point() else t for name, t in random.items()}
            with torch.no_grad():
                expected, exact = eager(**random), exact_model(**wide)
            try:
                found = run(random)
            except Exception as error:  # a size that the trace has taken for granted
                shape, reason = tuple(next(iter(random.values())).shape), " ".join(str(error).split())[:300]
                raise RuntimeError(
                    f"export_model: {path} would not take inputs of shape {shape}: {reason}; nothing was written"
                ) from error
            rounding = float((expected.double() - exact).abs().max())
            bound = SLACK * rounding + error_floor(exact, expected.dtype)
            difference = (found.to(expected).double() - expected.double()).abs().max().item()
            if found.shape != expected.shape or not difference <= bound:
                raise RuntimeError(
                    f"export_model: {path} would differ from the model: the largest difference is {difference:.3e} for a "
                    f"batch of {count}, where rounding explains {bound:.3e}; nothing was written"
                )
            worst, allowed = max(worst, difference), min(allowed, bound)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return worst, allowed


def _need_onnx() -> None:
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401


def _write_torch(program: torch.export.ExportedProgram, path: Path, about: str, names: list[str]) -> None:
    torch.export.save(program, path, extra_files={METADATA: about})


def _read_torch(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    module: Any = torch.export.load(path).module()

    def run(given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return module(given["images"]) if "images" in given else module(**given)

    return run


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: str, names: list[str]) -> None:
    try:
        result: Any = torch.onnx.export(
            program, input_names=names, output_names=["logits"], dynamo=True, external_data=False, verbose=False
        )
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise RuntimeError(
            f"export_model: torch.onnx.export cannot write this model; take format 'torch': {reason}"
        ) from error
    result.model.metadata_props[METADATA] = about
    result.save(path, external_data=False)


def _read_onnx(path: Path) -> Callable[[dict[str, Tensor]], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(given: dict[str, Tensor]) -> Tensor:
        (logits,) = session.run(["logits"], {name: t.cpu().numpy() for name, t in given.items()})
        return torch.from_numpy(logits)

    return run


_WRITERS = {"torch": _write_torch, "onnx": _write_onnx}
_READERS = {"torch": _read_torch, "onnx": _read_onnx}
