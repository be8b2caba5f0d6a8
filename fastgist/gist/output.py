"""What a gist model returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["GistOutput"]

_FIELDS = ("loss", "logits", "gist_logits")


class GistOutput(dict):
    """A mapping of ``loss``, ``logits`` and ``gist_logits``, in that order, holding those that are not None.

    As a Hugging Face model output it can be read as ``output["logits"]``, ``output.logits`` (None where absent) and by
    position, ``output[0]``. It is a pytree, passes through torch.compile, and can be built from a mapping or from
    pairs.

    Args:
        loss: a scalar or None (a mapping, or pairs, as the only argument fill all fields).
        logits: (B, C), the prediction.
        gist_logits: (B, C), the gist token's; training only.
    """

    def __init__(
        self,
        loss: Tensor | Mapping[str, Any] | Iterable | None = None,
        logits: Tensor | None = None,
        gist_logits: Tensor | None = None,
    ) -> None:
        super().__init__()
        if loss is not None and not isinstance(loss, Tensor) and logits is None and gist_logits is None:
            given = dict(loss)
            unknown = [k for k in given if k not in _FIELDS]
            if unknown:
                raise TypeError(f"GistOutput: fields are {', '.join(_FIELDS)}, got {', '.join(map(str, unknown))}")
            loss, logits, gist_logits = given.get("loss"), given.get("logits"), given.get("gist_logits")
        if loss is not None:
            super().__setitem__("loss", loss)
        if logits is not None:
            super().__setitem__("logits", logits)
        if gist_logits is not None:
            super().__setitem__("gist_logits", gist_logits)

    def __getattr__(self, name: str) -> Any:
        if name in _FIELDS:
            return self.get(name)
        raise AttributeError(f"GistOutput has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in _FIELDS:
            raise KeyError(f"GistOutput: fields are {', '.join(_FIELDS)}, got {name!r}")
        fields = {field: value if field == name else self.get(field) for field in _FIELDS}
        self.clear()
        self.update({field: value for field, value in fields.items() if value is not None})

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, (int, slice)):
            return self.to_tuple()[key]
        return super().__getitem__(key)

    def to_tuple(self) -> tuple:
        """The values that are there, in order."""
        return tuple(self.values())

    def __reduce__(self) -> tuple:
        return GistOutput, (dict(self),)


def _unflatten(values: Iterable, names: tuple[str, ...]) -> GistOutput:
    out = GistOutput()
    for name, value in zip(names, values, strict=True):
        dict.__setitem__(out, name, value)  # a pytree's leaves may be anything, None included
    return out


pytree.register_pytree_node(
    GistOutput,
    lambda out: (list(out.values()), tuple(out.keys())),
    _unflatten,
    serialized_type_name="fastgist.GistOutput",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda out: ([(pytree.MappingKey(k), v) for k, v in out.items()], tuple(out.keys())),
)
