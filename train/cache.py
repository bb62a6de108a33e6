"""The cache: latents of both autoencoders and text embeddings in safetensors shards, with checksums and a fingerprint.

index.json   format, fingerprint, latent spaces, captions, samples, shards (file, sha256, bytes, count)
shards/      latent-HxW-00000.safetensors: teacher, student (n,C,h,w) raw latents of samples of one bucket
             text-00000.safetensors: one tensor (n,...) per conditioning name; caption 0 is the empty prompt
"""
# n samples in a shard, C latent channels, h w latent rows and columns

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dcgen.fields import Check, check_fields, items, mapping, shown, text, whole
from dcgen.latent import LatentSpace
from train.files import read_json, sha256, write_json, write_tensors

FORMAT = 1
SIDES = ("teacher", "student")


def _shard_name(name: str, value: Any) -> None:
    """A name that CacheWriter gives: nothing outside of the cache's folder."""
    if not isinstance(value, str) or not re.fullmatch(r"shards/[\w.-]+\.safetensors", value):
        raise ValueError(f"{name} is {shown(value)}, expected shards/NAME.safetensors")


INDEX_FIELDS: dict[str, Check] = {
    "fingerprint": text(100),
    "made_of": mapping,
    "spaces": mapping,
    "captions": items(text(1 << 20), 1, 1 << 31),
    "samples": items(mapping, 0, 1 << 31),
    "shards": items(mapping, 0, 1 << 24),
}
SHARD_FIELDS: dict[str, Check] = {
    "file": _shard_name,
    "sha256": text(100),
    "bytes": whole(0, 1 << 60),
    "count": whole(0, 1 << 31),
}


class CacheError(RuntimeError):
    """A cache that cannot be trusted; the message names the file, what was found and what to do."""


class CacheWriter:
    """Writes shards one by one. A shard that is already there, whole and of the same fingerprint, is not made again."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint

    def shard(self, name: str, count: int, make: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
        """The record of shard `name` of `count` samples, made by `make` only if needed."""
        path = self.folder / "shards" / f"{name}.safetensors"
        note = path.with_suffix(".json")
        if path.is_file() and note.is_file():
            record = read_json(note)
            same = record.get("fingerprint") == self.fingerprint and record.get("count") == count
            if same and path.stat().st_size == record.get("bytes") and sha256(path) == record.get("sha256"):
                return record
        write_tensors(path, make(), {"fingerprint": self.fingerprint})
        size = path.stat().st_size
        record = {"file": f"shards/{name}.safetensors", "count": count, "bytes": size, "sha256": sha256(path)}
        record["fingerprint"] = self.fingerprint
        write_json(note, record)
        return record

    def record(self, name: str) -> dict[str, Any]:
        """The record of a shard that shard() made, on whatever rank."""
        return read_json(self.folder / "shards" / f"{name}.json")

    def finish(
        self,
        parts: dict[str, Any],
        spaces: dict[str, LatentSpace],
        captions: Sequence[str],
        samples: Sequence[dict[str, Any]],
        shards: Sequence[dict[str, Any]],
    ) -> None:
        """Write index.json: after this the cache is complete. `parts` is what the fingerprint was made of."""
        index = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "made_of": parts,
            "spaces": {side: asdict(space) for side, space in spaces.items()},
            "captions": list(captions),
            "samples": list(samples),
            "shards": list(shards),
        }
        write_json(self.folder / "index.json", index)


class Cache:
    """Reads a cache. Sizes are checked on opening, each shard's sha256 when it is first used."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise CacheError(f"{path} not found: the cache stage has not finished; run it first")
        index = read_json(path)
        if index.get("format") != FORMAT:
            raise CacheError(f"{path} has format {index.get('format')}, this program reads {FORMAT}; make it anew")
        try:
            check_fields(index, INDEX_FIELDS, needed=tuple(INDEX_FIELDS))
            for record in index["shards"]:
                check_fields(record, SHARD_FIELDS, needed=tuple(SHARD_FIELDS))
            counts = {record["file"]: record["count"] for record in index["shards"]}
            for sample in index["samples"]:
                height, width = sample["size"]
                if not (
                    0 <= sample["row"] < counts[sample["shard"]]
                    and 0 <= sample["caption"] < len(index["captions"])
                    and height * width > 0
                ):
                    raise ValueError(f"sample {shown(sample)} has no such place")
            self.spaces = {side: LatentSpace(**index["spaces"][side]) for side in SIDES}
        except (ValueError, TypeError, KeyError) as error:
            raise CacheError(f"{path} is not the index of a cache ({error!r}); make it anew") from error
        self.fingerprint: str = index["fingerprint"]
        self.made_of: dict[str, Any] = index["made_of"]
        self.captions: list[str] = index["captions"]
        self.samples: list[dict[str, Any]] = index["samples"]
        self.shards: dict[str, dict[str, Any]] = {record["file"]: record for record in index["shards"]}
        self._open: dict[str, dict[str, Tensor]] = {}
        for record in self.shards.values():
            self._check_size(record)
        self._caption_place = self._places("text-")

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def has_text(self) -> bool:
        """Whether text embeddings are stored (else they are to be computed online)."""
        return bool(self._caption_place)

    @property
    def text_tokens(self) -> int | None:
        """Length that captions were embedded at; None = what the release says."""
        settings = self.made_of["text"]
        return settings["tokens"] if isinstance(settings, dict) else None

    def buckets(self) -> list[list[int]]:
        """Sample numbers by picture size."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, sample in enumerate(self.samples):
            groups.setdefault(tuple(sample["size"]), []).append(number)
        return [groups[size] for size in sorted(groups)]

    def latents(self, indices: Sequence[int], side: str) -> Tensor:
        """(B,C,h,w) float32 model-space latents of samples of one bucket; side "teacher" or "student"."""
        rows = [self._row(self.samples[i]["shard"], side, self.samples[i]["row"]) for i in indices]
        return self.spaces[side].normalize(torch.stack(rows).float())

    def text(self, captions: Sequence[int]) -> dict[str, Tensor]:
        """Conditioning (B,...), float32 or integer, by name, of captions given by number; 0 is the empty prompt."""
        places = [self._caption_place[number] for number in captions]
        names = self._tensors(places[0][0])
        found = {name: torch.stack([self._row(file, name, row) for file, row in places]) for name in names}
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}

    def caption_numbers(self, indices: Sequence[int]) -> list[int]:
        """Which caption each sample has."""
        return [self.samples[index]["caption"] for index in indices]

    def describe(self, indices: Sequence[int]) -> list[str]:
        """Names of samples, for messages."""
        return [self.samples[index]["name"] for index in indices]

    def _row(self, file: str, name: str, row: int) -> Tensor:
        return self._tensors(file)[name][row]

    def _tensors(self, file: str) -> dict[str, Tensor]:
        if file not in self._open:
            self._check_content(self.shards[file])
            with safe_open(self.folder / file, framework="pt") as shard:  # memory-mapped: pages come and go
                self._open[file] = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        return self._open[file]

    def _check_size(self, record: dict[str, Any]) -> None:
        path = self.folder / record["file"]
        found = path.stat().st_size if path.is_file() else None
        if found != record["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CacheError(
                f"{path} {state}, expected {record['bytes']}; remove {self.folder}/done.json and cache again"
            )

    def _check_content(self, record: dict[str, Any]) -> None:
        path = self.folder / record["file"]
        found = sha256(path)
        if found != record["sha256"]:
            raise CacheError(
                f"{path}: sha256 is {found[:16]}..., index.json says {record['sha256'][:16]}...; the file was damaged "
                f"or replaced: remove it and {self.folder}/done.json, then cache again"
            )
        try:
            with safe_open(path, framework="pt") as shard:
                stamp = (shard.metadata() or {}).get("fingerprint")
        except SafetensorError as error:
            raise CacheError(f"{path} is not readable safetensors ({error}); remove it and cache again") from error
        if stamp != self.fingerprint:
            raise CacheError(
                f"{path} belongs to another cache (fingerprint {str(stamp)[:16]}...); remove it, cache again"
            )

    def _places(self, prefix: str) -> list[tuple[str, int]]:
        places = []
        for file, record in self.shards.items():
            if Path(file).name.startswith(prefix):
                places += [(file, row) for row in range(record["count"])]
        return places
