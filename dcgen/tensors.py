"""Reads tensors from disk one at a time: from a .safetensors file, a folder of shards, or a .pth."""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import files
from .fields import shown
from .files import DTYPE_NAMES, SUFFIXES, Entry
from .jsons import parse_object, read_object

INDEX_SUFFIX = ".safetensors.index.json"
# model.safetensors, model.bf16.safetensors, model.safetensors.index.json, model.safetensors.index.bf16.json
_WEIGHTS = re.compile(r"[^.].*?(\.(?P<variant>\w+))?\.(safetensors|sft)(\.index(\.(?P<of_index>\w+))?\.json)?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|sft)$")
# Prefix of torch.compile in the names of a module that it wraps, at any depth.
COMPILED = "_orig_mod."
# Tensors are read in pieces of so many bytes, by so many threads at a time.
READ_BYTES, READERS = 16 << 20, 4
PICKLES = (".pth", ".pt", ".bin", ".ckpt")

# (first row, last row + 1) of a tensor -> these rows; None = to the end
Rows = Callable[[int, "int | None"], Tensor]
# the same with the name of the tensor in its file first
Reader = Callable[[str, int, "int | None"], Tensor]


class Tensors:
    """The tensors of one model on disk: `entries` of all by name, and values one by one through get()."""

    def __init__(
        self,
        path: Path,
        entries: dict[str, Entry],
        metadata: dict[str, str],
        readers: Mapping[str, Rows],
        places: dict[str, tuple[Path, str]],
    ):
        self.path, self.entries, self.metadata = path, entries, metadata
        self.places = places
        """The file that each tensor is in, and its name there."""
        self._readers = readers

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Tensors:
        """Open a .safetensors file, a folder of them (sharded or not), or a .pth; ValueError names the problem."""
        path = Path(path)
        parts = _shards(path) if path.is_dir() else [path]
        opened = [_pickle(part) if part.suffix in PICKLES else _safetensors(part) for part in parts]
        entries: dict[str, Entry] = {}
        metadata: dict[str, str] = {}
        readers: dict[str, Rows] = {}
        places: dict[str, tuple[Path, str]] = {}
        for part, (part_entries, part_metadata, reader) in zip(parts, opened, strict=True):
            for entry in part_entries:
                name = entry.name.replace(COMPILED, "")
                if name in entries:
                    raise ValueError(f"{part}: tensor {name} is twice in {path}; keep one set of weights there")
                entries[name] = replace(entry, name=name)
                readers[name], places[name] = partial(reader, entry.name), (part, entry.name)
            metadata.update(part_metadata)
        return cls(path, entries, metadata, readers, places)

    def under(self, prefix: str) -> Tensors:
        """Only the tensors with this prefix: one model from an all-in-one file."""
        entries = {name: entry for name, entry in self.entries.items() if name.startswith(prefix)}
        return Tensors(self.path, entries, self.metadata, self._readers, self.places)

    def with_values(self, values: Mapping[Path, Mapping[str, Tensor]]) -> Tensors:
        """The same tensors, with the values of another reader's state dict of each file; get() copies nothing."""
        readers = {name: partial(_sliced, values[file][stored]) for name, (file, stored) in self.places.items()}
        return Tensors(self.path, self.entries, self.metadata, readers, self.places)

    def get(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its rows start:stop, read from disk into new memory (except after with_values)."""
        return self._readers[name](start, stop)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most stored values."""
        sizes: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def meta(self) -> dict[str, Tensor]:
        """All tensors as meta tensors, with shapes and dtypes but no memory."""
        return files.meta_tensors(self.entries.values())


def _sliced(tensor: Tensor, start: int, stop: int | None) -> Tensor:
    return tensor if (start, stop) == (0, None) else tensor[start:stop]


def _shards(folder: Path) -> list[Path]:
    """The files of one set of weights. Among several variants (precisions), the one without a suffix as in diffusers,
    else bf16, else fp16.
    """
    sets: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        name = _WEIGHTS.fullmatch(file.name)
        if name and not _SHARD.search(file.name):
            sets.setdefault(name["variant"] or name["of_index"] or "", []).append(file)
    preferred: list[str] = ["", "bf16", "fp16"]
    variants = [variant for variant in preferred if variant in sets] or sorted(sets)
    candidates = sets[variants[0]] if variants else files.weight_files(folder)
    indexes = [file for file in candidates if file.suffix == ".json"]
    if len(indexes) > 1:
        raise ValueError(f"{folder}: {len(indexes)} weight indexes ({', '.join(i.name for i in indexes)}); keep one")
    if indexes:
        names = _indexed(indexes[0])
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder}: {indexes[0].name} names {', '.join(missing)}, not here: download them")
        return [folder / name for name in names]
    if len(candidates) != 1:
        raise ValueError(
            f"{folder}: expected one .safetensors file or shards with their {INDEX_SUFFIX}, found {len(candidates)}"
        )
    return candidates


def _indexed(index: Path) -> list[str]:
    """The files named in a weight index, which must be in the same folder."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is not an object of tensor names and file names; fetch the index again")
    for name in weight_map.values():
        if not isinstance(name, str) or not name.endswith(SUFFIXES) or re.search(r"[/\\:\0]", name):
            raise ValueError(
                f"{index}: names {shown(name)} as a file of weights, expected the name of a .safetensors file beside it"
            )
    return sorted(set(weight_map.values()))


def _safetensors(path: Path) -> tuple[list[Entry], dict[str, str], Reader]:
    with files.opened(path) as file:  # safetensors checks the header and the file size
        metadata = file.metadata() or {}
        with files.naming(path):
            entries = files.entries(file)
    with open(path, "rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        header = parse_object(raw.read(length), f"{path}: header")
    begins = {entry.name: 8 + length + header[entry.name]["data_offsets"][0] for entry in entries}
    by_name = {entry.name: entry for entry in entries}

    def read(name: str, start: int, stop: int | None) -> Tensor:
        entry = by_name[name]
        shape, skipped = _rows(entry, start, stop)
        tensor = torch.empty(shape, dtype=entry.dtype)
        if tensor.numel():
            _fill(tensor, path, begins[name] + skipped)
        return tensor

    return entries, metadata, read


def _fill(tensor: Tensor, path: Path, begin: int) -> None:
    """Read a tensor from `begin` on; a large one by several threads, which a disk and new memory both serve faster."""
    view = tensor.reshape(-1).view(torch.uint8).numpy().data

    def read(start: int) -> None:
        part = view[start : start + READ_BYTES]
        with open(path, "rb", buffering=0) as raw:
            raw.seek(begin + start)
            while len(part):
                count = raw.readinto(part)
                if not count:
                    raise ValueError(f"{path}: the file ended while it was read")
                part = part[count:]

    starts = range(0, len(view), READ_BYTES)
    if len(starts) == 1:
        read(0)
        return
    with ThreadPoolExecutor(READERS) as threads:
        list(threads.map(read, starts))


def _pickle(path: Path) -> tuple[list[Entry], dict[str, str], Reader]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        # weights_only: other pickles can run code; mmap: tensors are read on demand
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises anything for a damaged pickle
        raise ValueError(
            f"{path}: holds more than tensors, or is damaged ({shown(str(error))}). Get a .safetensors file"
        ) from error
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: expected a state dict (or one under 'state_dict'), found {type(loaded).__name__}")
    for name, tensor in loaded.items():
        _check_pickled(path, name, tensor)
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()]

    def read(name: str, start: int, stop: int | None) -> Tensor:
        tensor: Tensor = loaded[name]
        return (tensor if (start, stop) == (0, None) else tensor[start:stop]).clone()

    return entries, {}, read


def _check_pickled(path: Path, name: Any, tensor: Tensor) -> None:
    """ValueError for keys, layouts and shapes that are possible in a pickle but not in a state dict."""
    if not isinstance(name, str):
        raise ValueError(f"{path}: expected names of tensors, found {shown(name)}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{path}: tensor {name} is a {tensor.layout} tensor on {tensor.device}, expected plain values")
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"{path}: tensor {name} has type {tensor.dtype}, which safetensors lacks")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: tensor {name} is larger than the values stored for it; the file is damaged")


def _rows(entry: Entry, start: int, stop: int | None) -> tuple[tuple[int, ...], int]:
    """Shape of rows start:stop, and the number of bytes before them."""
    if (start, stop) == (0, None):
        return entry.shape, 0
    rows = range(entry.shape[0])[start:stop]
    per_row = entry.nbytes // max(entry.shape[0], 1)
    return (len(rows), *entry.shape[1:]), rows.start * per_row


def total_bytes(entries: Iterable[Entry]) -> int:
    """Total size of these tensors in bytes."""
    return sum(entry.nbytes for entry in entries)
