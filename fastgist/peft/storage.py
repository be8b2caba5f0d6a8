"""Adapter files: one safetensors file that carries its configuration and checksum, written whole or not at all.

``adapter_model.safetensors`` holds the tensors and, in its metadata, "fastgist" (JSON: the configurations),
"format_version" and "sha256" (of both and of every tensor's name, dtype, shape and bytes; safetensors itself does not
notice a flipped bit). ``fastgist_config.json`` beside it is a copy for people and is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["CONFIG_NAME", "FORMAT_VERSION", "MODEL_NAME", "read", "write"]

MODEL_NAME = "adapter_model.safetensors"
CONFIG_NAME = "fastgist_config.json"
FORMAT_VERSION = "1"
_STALE_SECONDS = 24 * 3600.0
_KEY = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*")
_MAX_HEADER = 100 << 20


def checksum(config: str, version: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the version, the configuration and every tensor's name, dtype, shape and bytes, in order of name."""
    sha = hashlib.sha256()

    def add(data: bytes) -> None:  # length first: no two different contents run together the same way
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)

    add(version.encode())
    add(config.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        add(name.encode())
        add(str(tensor.dtype).encode())
        add(str(tuple(tensor.shape)).encode())
        add(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def write(folder: str | os.PathLike, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the files into ``folder`` (made if absent). The rename of the safetensors file is the one commit point.

    Raises:
        OSError: the folder cannot be written; what was there stays.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    text = json.dumps(config, sort_keys=True)
    held = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    metadata = {"fastgist": text, "format_version": FORMAT_VERSION, "sha256": checksum(text, FORMAT_VERSION, held)}
    _write_atomically(folder / MODEL_NAME, _canonical(save(held, metadata)))
    _write_atomically(folder / CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _canonical(data: bytes) -> bytes:
    """The same file with its header in one order: safetensors orders metadata differently from call to call."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def read(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors on the CPU) of a folder that :func:`write` wrote, checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not such a file (a pickle, truncated, altered, of an unknown version, unsafe names, a link
            that leaves the folder); the error gives the path.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = _locate(Path(folder))
    data = path.read_bytes()  # once: what is checked is what is used
    metadata = _metadata(path, data)
    version = metadata.get("format_version")
    if "fastgist" not in metadata or version is None or "sha256" not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not one that save_adapter wrote (no fastgist metadata)")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {version!r}; this fastgist reads {FORMAT_VERSION!r}")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: damaged or truncated: {error}") from error
    if checksum(metadata["fastgist"], version, tensors) != metadata["sha256"]:
        raise ValueError(f"{path}: the checksum does not match: the file was damaged or altered after it was saved")
    for name in tensors:
        if not _KEY.fullmatch(name) or ".." in name:
            raise ValueError(f"{path}: tensor name {name!r} is refused: it looks like a path")
    try:
        config = json.loads(metadata["fastgist"])
    except ValueError as error:
        raise ValueError(f"{path}: the configuration in its metadata is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the configuration in its metadata is not a JSON object")
    return config, tensors


def _locate(folder: Path) -> Path:
    """The safetensors file of ``folder``, which must lie in it."""
    if folder.is_file():
        raise ValueError(
            f"{folder}: expected the folder that save_adapter wrote ({MODEL_NAME} in it), got a file; pickles "
            "(.bin, .pt, .pth) are never loaded"
        )
    path = folder / MODEL_NAME
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        pickles = [n for n in found if n.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
        hint = f"; {', '.join(pickles)} looks like a pickle, which is never loaded" if pickles else ""
        raise FileNotFoundError(f"{path}: not found{hint}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path}: a link to {path.resolve()}, outside the folder: refused")
    return path


def _metadata(path: Path, data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of header length, the JSON header, the tensors."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 9 or length > min(_MAX_HEADER, len(data) - 8) or data[8:9] != b"{":
        if data[:4] == b"PK\x03\x04" or data[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise ValueError(f"{path}: a pickle under another name: refused (only safetensors are loaded)")
        raise ValueError(f"{path}: damaged or truncated, or not a safetensors file ({len(data)} bytes)")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:
        raise ValueError(f"{path}: damaged: its header is not JSON ({error})") from error
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: damaged: its metadata is not text by name")
    return metadata


# -- atomic writing --------------------------------------------------------------------------------------------------


def _write_atomically(path: Path, data: bytes) -> None:
    """Temporary file, fsync, rename, fsync of the folder: ``path`` is the old or the new, never between."""
    host = re.sub(r"\W", "-", socket.gethostname())
    temporary = path.with_name(f".{path.name}.{host}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # the umask decides, as for open()
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened for this
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove temporaries that a killed save left: of dead processes of this machine, and any a day old."""
    host = re.sub(r"\W", "-", socket.gethostname())
    for name in (MODEL_NAME, CONFIG_NAME):
        for temporary in folder.glob(f".{name}.*.tmp"):
            fields = temporary.name[len(name) + 2 :].split(".")
            with contextlib.suppress(OSError, ValueError):
                mine = len(fields) == 4 and fields[0] == host
                if (mine and not _alive(int(fields[1]))) or time.time() - temporary.stat().st_mtime > _STALE_SECONDS:
                    temporary.unlink()


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
