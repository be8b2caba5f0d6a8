"""An adapted model as one file for other runtimes: a ``torch.export`` program (.pt2) or ONNX.

What merges (LoRA, CP, FacT, SSF, BitFit) is merged; adapters, prompts, prefixes and the gist token stay in the graph.
fastgist's own operators are traded for the plain expressions of :mod:`fastgist.reference`, so that a runtime without
fastgist reads the graph. The batch is dynamic. The file is read back and compared with the eager model on random inputs
before it takes its name.
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


def as_plain_module(model: nn.Module) -> tuple[nn.Module, bool]:
    """A copy of ``model`` in evaluation mode that returns logits, merged where that can be, and whether it is.

    ``model`` itself is left alone. An adapter that is merged already, or whose base layers cannot take it (quantised),
    stays as it is.
    """
    model = copy.deepcopy(_front(model)).eval()
    state = _state.state_of(model)
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
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from fastgist.reference.cp_linear import cp_linear

    weight, bias = torch.cat(list(weights)), torch.cat(list(biases)) if biases else None
    return cp_linear(x, weight, bias, u, v, gain, scale=scale), x.new_empty(0)


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


def export_program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """``model`` (from :func:`as_plain_module`) as a torch.export program of standard operators, its batch dynamic.

    Raises:
        RuntimeError: an operator of fastgist is left in the graph.
    """
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False)
        program = program.run_decompositions(_plain_expressions())
    ours = sorted({str(n.target) for n in program.graph.nodes if str(n.target).startswith("fastgist")})
    if ours:
        raise RuntimeError(f"export_program: {', '.join(ours)} has no plain expression here")
    return program


# -- files -----------------------------------------------------------------------------------------------------------


def export_model(
    model: nn.Module,
    path: str | os.PathLike,
    images: Tensor | Sequence[int],
    *,
    format: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write ``model`` to ``path`` for inference, checked against the model itself.

    Args:
        model: any model that takes an image batch and returns logits or a mapping with "logits", adapted or not.
        path: where to; its folder must exist. The file appears by a rename, once it has been checked.
        images: an example batch (at least two images), or the shape of one image such as (3, 224, 224).
        format: "torch" (.pt2, torch.export.save) or "onnx" (needs onnx, onnxscript and onnxruntime); by the suffix of
            ``path`` if None.
        metadata: JSON values to keep in the file under :data:`METADATA`.

    Raises:
        ValueError: an unknown format, an example of one image, more weights than one ONNX file holds.
        ModuleNotFoundError: a package that the format needs.
        RuntimeError: the file's results differ from the model's by more than rounding: the error tells by how much,
            and nothing is written.
    """
    path = Path(path)
    kind = format or next((name for name, suffix in FORMATS.items() if path.suffix == suffix), None)
    if kind not in FORMATS:
        known = ", ".join(f"{name} ({suffix})" for name, suffix in FORMATS.items())
        raise ValueError(f"export_model: format must be one of {known}, got {format or path.suffix!r}")
    if kind == "onnx":
        _need_onnx()
    if not isinstance(images, Tensor):
        images = torch.randn(2, *images)
    if images.shape[0] < 2:
        raise ValueError(
            f"export_model: the example needs at least two images (a batch of one is traced as the only one), got "
            f"{tuple(images.shape)}"
        )
    own = next(model.parameters(), None)
    images = images.to(own) if own is not None else images
    plain, merged = as_plain_module(model)
    held = sum(t.numel() * t.element_size() for t in [*plain.parameters(), *plain.buffers()])
    if kind == "onnx" and held > ONNX_BYTES:
        raise ValueError(
            f"export_model: {held / 2**30:.1f} GiB of weights do not fit one ONNX file: take format 'torch'"
        )
    about = {**(metadata or {}), "merged": merged, "input": "images (batch, channels, height, width), normalised"}
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}{FORMATS[kind]}")
    try:
        program = export_program(plain, images)
        write, read = _WRITERS[kind], _READERS[kind]
        write(program, temporary, json.dumps(about))
        difference, allowed = _check(_Logits(_front(model)), read(temporary), images, path)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, kind, merged, difference, allowed)


def _check(eager: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, path: Path) -> tuple[float, float]:
    """(largest difference, what rounding allows) between the file and the model, whose mode is put back."""
    generator = torch.Generator().manual_seed(0)
    modes = {module: module.training for module in eager.modules()}
    worst, allowed = 0.0, float("inf")
    try:
        eager.eval()
        exact_model = copy.deepcopy(eager).double()
        for count in BATCHES:
            random = torch.randn(count, *images.shape[1:], generator=generator).to(images)
            with torch.no_grad():
                expected, exact = eager(random), exact_model(random.double())
            found = run(random)
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


def _write_torch(program: torch.export.ExportedProgram, path: Path, about: str) -> None:
    torch.export.save(program, path, extra_files={METADATA: about})


def _read_torch(path: Path) -> Callable[[Tensor], Tensor]:
    module: Any = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return run


def _write_onnx(program: torch.export.ExportedProgram, path: Path, about: str) -> None:
    result: Any = torch.onnx.export(
        program, input_names=["images"], output_names=["logits"], dynamo=True, external_data=False, verbose=False
    )
    result.model.metadata_props[METADATA] = about
    result.save(path, external_data=False)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.cpu().numpy()})
        return torch.from_numpy(logits)

    return run


_WRITERS = {"torch": _write_torch, "onnx": _write_onnx}
_READERS = {"torch": _read_torch, "onnx": _read_onnx}
