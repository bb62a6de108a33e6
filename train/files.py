"""Files written whole or not at all: a temporary neighbour first, then one rename."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dcgen.files import replacing, replacing_folder
from dcgen.jsons import read_object

JSON_BYTES = 4 << 30
MARKER = ".dcgen"  # the file in a folder that says that we made it and may remove it


def mark(folder: Path) -> Path:
    """Make `folder` one of ours: with MARKER in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder


def remove_marked(folder: Path, within: Path) -> None:
    """Remove a folder of ours, if it is there; ValueError for one without a marker or not inside of `within`."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir() or folder.resolve().parent != within.resolve():
        raise ValueError(f"{folder} is not a folder in {within}: not removed; remove it yourself")
    # what ran before there were markers left a record
    if not any((folder / name).exists() for name in (MARKER, "done.json", "checkpoints")):
        raise ValueError(f"{folder} was not made by a stage ({MARKER} is not in it): not removed; remove it yourself")
    shutil.rmtree(folder)


def write_atomically(path: Path | str, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it to `path`."""
    with replacing(path) as temporary:
        write(temporary)
    return Path(path)


def write_folder(path: Path | str, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary folder beside `path`, then rename it to `path` (an older one is replaced)."""
    with replacing_folder(path) as temporary:
        write(temporary)
    return Path(path)


def write_json(path: Path | str, value: Any) -> Path:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object; anything else is an error which names the file. An index of millions of samples is read."""
    return read_object(path, limit=JSON_BYTES)


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write tensors as safetensors, atomically. Tensors are made contiguous and moved to the CPU first."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=metadata))


def sha256(path: Path | str) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for chunk in iter(lambda: handle.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
