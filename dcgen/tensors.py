"""Tensors on disk, one at a time: a .safetensors file, a folder of shards, or a .pth, read without mapping it whole."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files
from .files import DTYPES, Entry

INDEX_SUFFIX = ".safetensors.index.json"
# model.safetensors, model.bf16.safetensors, model.safetensors.index.json, model.safetensors.index.bf16.json
_WEIGHTS = re.compile(r".+?(\.(?P<variant>\w+))?\.safetensors(\.index(\.(?P<of_index>\w+))?\.json)?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
PICKLES = (".pth", ".pt", ".bin", ".ckpt")

# (name, first row, last row + 1) -> those rows; None = all
Reader = Callable[[str, int, int | None], Tensor]


class Tensors:
    """The tensors of one model on disk: `entries` by name at once, the values one by one through get()."""

    def __init__(self, path: Path, entries: dict[str, Entry], metadata: dict[str, str], readers: dict[str, Reader]):
        self.path, self.entries, self.metadata = path, entries, metadata
        self._readers = readers

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Tensors:
        """Open a .safetensors file, a folder of them (sharded or not), or a .pth; ValueError names what is wrong."""
        path = Path(path)
        parts = _shards(path) if path.is_dir() else [path]
        opened = [_pickle(part) if part.suffix in PICKLES else _safetensors(part) for part in parts]
        found: dict[str, Entry] = {}
        metadata: dict[str, str] = {}
        readers: dict[str, Reader] = {}
        for part, (entries, notes, reader) in zip(parts, opened, strict=True):
            twice = [entry.name for entry in entries if entry.name in found]
            if twice:
                raise ValueError(f"{part}: tensor {twice[0]} is in two files of {path}; keep one set of weights there")
            found.update({entry.name: entry for entry in entries})
            readers.update({entry.name: reader for entry in entries})
            metadata.update(notes)
        return cls(path, found, metadata, readers)

    def get(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its rows start:stop, read from disk now into memory of its own."""
        return self._readers[name](name, start, stop)

    def meta(self) -> dict[str, Tensor]:
        """All tensors as meta tensors: shapes and types without memory."""
        return files.meta_tensors(self.entries.values())


def _shards(folder: Path) -> list[Path]:
    """The files of one set of weights. Of several precisions (releases call them variants) the unnamed one, as in
    diffusers, else bf16, else fp16.
    """
    sets: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors*")):
        name = _WEIGHTS.fullmatch(file.name)
        if name and not _SHARD.search(file.name):
            sets.setdefault(name["variant"] or name["of_index"] or "", []).append(file)
    preferred: list[str] = ["", "bf16", "fp16"]
    variants = [variant for variant in preferred if variant in sets] or sorted(sets)
    found = sets[variants[0]] if variants else sorted(folder.glob("*.safetensors"))
    indexes = [file for file in found if file.suffix == ".json"]
    if len(indexes) > 1:
        raise ValueError(f"{folder}: {len(indexes)} weight indexes ({', '.join(i.name for i in indexes)}); keep one")
    if indexes:
        names = sorted(set(json.loads(indexes[0].read_text())["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{folder}: {indexes[0].name} names {', '.join(absent)}, not here: download them")
        return [folder / name for name in names]
    if len(found) != 1:
        raise ValueError(
            f"{folder}: expected one .safetensors file or shards with their {INDEX_SUFFIX}, found {len(found)}"
        )
    return found


def _safetensors(path: Path) -> tuple[list[Entry], dict[str, str], Reader]:
    with files.opened(path) as file:  # safetensors checks the header and that no byte is missing
        metadata = file.metadata() or {}
        try:
            entries = files.entries(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    with open(path, "rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        header = json.loads(raw.read(length))
    begins = {entry.name: 8 + length + header[entry.name]["data_offsets"][0] for entry in entries}
    types = {entry.name: entry for entry in entries}

    def read(name: str, start: int, stop: int | None) -> Tensor:
        entry = types[name]
        shape, skipped = _rows(entry, start, stop)
        tensor = torch.empty(shape, dtype=entry.dtype)
        if tensor.numel():
            with open(path, "rb", buffering=0) as raw:
                raw.seek(begins[name] + skipped)
                _fill(raw, tensor, path)
        return tensor

    return entries, metadata, read


def _fill(raw: Any, tensor: Tensor, path: Path) -> None:
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        count = raw.readinto(view[done:])
        if not count:
            raise ValueError(f"{path}: the file ended while it was read")
        done += count


def _pickle(path: Path) -> tuple[list[Entry], dict[str, str], Reader]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        # weights_only: a pickle may otherwise run code; mmap: tensors are read when they are used
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path}: holds more than tensors, or is damaged ({error}). Get a .safetensors file"
        ) from error
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: expected a state dict (or one under 'state_dict'), found {type(loaded).__name__}")
    known = set(DTYPES.values())
    strange = [name for name, tensor in loaded.items() if tensor.dtype not in known]
    if strange:
        raise ValueError(f"{path}: tensor {strange[0]} has type {loaded[strange[0]].dtype}, which safetensors lacks")
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()]

    def read(name: str, start: int, stop: int | None) -> Tensor:
        whole = (start, stop) == (0, None)
        return (loaded[name] if whole else loaded[name][start:stop]).clone()

    return entries, {}, read


def _rows(entry: Entry, start: int, stop: int | None) -> tuple[tuple[int, ...], int]:
    """Shape of rows start:stop and how many bytes come before them."""
    if (start, stop) == (0, None):
        return entry.shape, 0
    rows = range(entry.shape[0])[start:stop]
    per_row = entry.nbytes // max(entry.shape[0], 1)
    return (len(rows), *entry.shape[1:]), rows.start * per_row


def total_bytes(entries: Iterable[Entry]) -> int:
    """Size of these tensors."""
    return sum(entry.nbytes for entry in entries)
