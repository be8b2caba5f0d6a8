"""Checkpoints of a training run: one safetensors file each, of which the newest complete one wins.

A checkpoint holds the trained parameters, the optimiser's tensors, the best weights so far, and in the file's metadata
a JSON object with the step and everything else that is a number, plus a SHA-256 over the tensors. It is written to a
temporary file, flushed, and renamed: the rename is the commit point and the final name the mark of completeness, so
a run killed at any moment leaves the previous checkpoint, or this one, and never a mixture. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgist.train.config import UserError

__all__ = ["Checkpoints", "write_atomically"]

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_TEMPORARY = ".tmp-"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: the old file or the new one is there at every moment, also after a power cut."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


class Checkpoints:
    """The checkpoints in a folder. Only one process may write."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def __iter__(self):
        """Paths by falling step. A file that is not named like a checkpoint is not one."""
        found = [(int(m[1]), p) for p in self.folder.glob("step-*") if (m := _NAME.fullmatch(p.name))]
        return iter([path for _, path in sorted(found, reverse=True)])

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step``, then remove those beyond ``keep``."""
        import safetensors.torch

        self.folder.mkdir(parents=True, exist_ok=True)
        # Copied: safetensors wants contiguous tensors that share no memory, and a snapshot must not move under it.
        tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        metadata = {
            "format_version": str(FORMAT),
            "sha256": digest(tensors),
            "state": json.dumps({**state, "step": step}, sort_keys=True),
        }
        path = self.folder / f"step-{step:08d}.safetensors"
        write_atomically(path, safetensors.torch.save(tensors, metadata))
        for old in list(self)[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def latest(self) -> tuple[Path, dict[str, Tensor], dict[str, Any], list[str]] | None:
        """The newest complete checkpoint (path, tensors, state, complaints about newer damaged ones), or None."""
        complaints: list[str] = []
        for path in self:
            try:
                tensors, state = self._read(path)
            except UserError:
                raise
            except Exception as error:
                complaints.append(f"{path.name} is damaged ({error})")
                continue
            return path, tensors, state, complaints
        if complaints:
            raise UserError(f"no complete checkpoint in {self.folder}: {'; '.join(complaints)}")
        return None

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        import safetensors

        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            version = int(metadata.get("format_version", 0))
            if version > FORMAT:
                raise UserError(f"{path} has format {version}; this version of fastgist reads up to {FORMAT}")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # not a view of the file
        if digest(tensors) != metadata.get("sha256"):
            raise ValueError("its checksum does not match")
        return tensors, json.loads(metadata["state"])

    def sweep(self) -> None:
        """Remove what a killed run left half-written."""
        for stale in self.folder.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                stale.unlink()
