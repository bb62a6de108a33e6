"""Weights on disk, single file or shards: every shape known before a byte is read, and read a few tensors at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...dcgen import files as safetensors_files


class Weights:
    """The tensors of one model in one or several .safetensors files.

    `shapes` maps every key to a meta tensor; `read` loads some of them. A missing shard, a truncated file or an index
    that names a key its shard does not hold is a ValueError that says which file.
    """

    def __init__(self, files: Iterable[Path], index: Mapping[str, str] | None = None):
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, Tensor] = {}
        self._file: dict[str, Path] = {}
        self._prefix = ""
        for file in files:
            self._scan(file)
        lost = sorted(set(index or ()) - set(self.shapes))
        if lost:
            raise ValueError(
                f"{(index or {})[lost[0]]}: the index promises {lost[0]} (and {len(lost) - 1} more), which no shard "
                "holds. Download the release again."
            )

    def _scan(self, file: Path) -> None:
        try:
            with safetensors_files.opened(file) as opened:
                self.metadata.update(opened.metadata() or {})
                found = safetensors_files.meta_tensors(safetensors_files.entries(opened))
        except FileNotFoundError as error:
            raise ValueError(f"{file} is missing; the index beside it names it. Download it again.") from error
        self.shapes.update(found)
        self._file.update(dict.fromkeys(found, file))

    @classmethod
    def of_file(cls, file: Path) -> Weights:
        return cls([file])

    @classmethod
    def of_folder(cls, folder: Path) -> Weights:
        """The model in a diffusers or transformers folder: by its index when it has one, else its only file."""
        indexes = sorted(folder.glob("*.safetensors.index.json"))
        if indexes:
            index: dict[str, str] = json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"]
            return cls([folder / name for name in sorted(set(index.values()))], index)
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(
                f"{folder} holds {len(files)} .safetensors files and no index; expected one file, or shards with "
                "their *.safetensors.index.json."
            )
        return cls(files)

    def without_prefix(self, prefixes: Iterable[str]) -> Weights:
        """The same weights with the first of `prefixes` that every key starts with left off the names."""
        fits = [prefix for prefix in prefixes if all(key.startswith(prefix) for key in self.shapes)]
        if not fits:
            return self
        twin = Weights([])
        twin.metadata, twin._file, twin._prefix = self.metadata, self._file, self._prefix + fits[0]
        twin.shapes = {key.removeprefix(fits[0]): value for key, value in self.shapes.items()}
        return twin

    def read(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The named tensors (all by default), copied out of the files; no file stays open."""
        by_file: dict[Path, list[str]] = {}
        for key in self.shapes if keys is None else keys:
            by_file.setdefault(self._file[self._prefix + key], []).append(key)
        found: dict[str, Tensor] = {}
        for file, names in by_file.items():
            with safetensors_files.opened(file) as opened:
                found.update({name: opened.get_tensor(self._prefix + name) for name in names})
        return found

    def dtype(self) -> torch.dtype:
        """The dtype most numbers are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.shapes.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        return max(sizes, key=lambda dtype: sizes[dtype])
