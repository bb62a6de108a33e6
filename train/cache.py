"""The cache: latents of both autoencoders and conditioning in safetensors shards, with checksums and a config_hash.

index.json   format, config_hash, latent spaces, ragged text, captions, samples (each with its caption's number, or with
             `captions`, numbers and weights, where it has several), shards (file, sha256, bytes, count),
             text_tokens (length that captions are embedded at in training, where none are stored)
shards/      latent-HxW-00000.safetensors: teacher, student (n,C,h,w) raw latents of samples of one bucket; where the
             family conditions on samples, teacher.NAME and student.NAME (n,...), too. Where both sides have the same
             autoencoder, those of the teacher alone
             text-00000.safetensors: one tensor (n,...) per conditioning name; caption 0 is the empty prompt. Of ragged
             text NAME has the tokens of all captions one after the other (m,D), NAME.lengths (n,) how many each has
"""
# n samples or captions in a shard, m tokens in a shard, C latent channels, h w latent rows and columns

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dcgen.fields import Check, check_fields, items, mapping, optional, shown, text, whole
from dcgen.latent import LatentSpace
from train.conditioning import LENGTHS, Cond, pad
from train.files import read_json, sha256, write_json, write_tensors

FORMAT = 2
READ = (1, 2)  # 1: without ragged text; its config_hash is called fingerprint
INDEX = "index.json"
TEACHER, STUDENT = SIDES = ("teacher", "student")
HASH, OLD_HASH = "config_hash", "fingerprint"
IMAGES = "images"


def _shard_name(name: str, value: Any) -> None:
    """A name that CacheWriter gives: nothing outside of the cache's folder."""
    if not isinstance(value, str) or not re.fullmatch(r"shards/[\w.-]+\.safetensors", value):
        raise ValueError(f"{name} is {shown(value)}, expected shards/NAME.safetensors")


INDEX_FIELDS: dict[str, Check] = {
    HASH: text(100),
    "made_of": mapping,
    "spaces": mapping,
    "ragged": mapping,
    "captions": items(text(1 << 20), 1, 1 << 31),
    "text_tokens": optional(whole(1, 1 << 20)),
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
    """Writes shards one by one. A shard that is already there, whole and of the same config_hash, is not made again."""

    def __init__(self, folder: Path, config_hash: str, images: str = "") -> None:
        """images: digest of the image files, so that a shard of latents of others is not kept."""
        self.folder = folder
        self.config_hash = config_hash
        self.images = images

    def shard(self, name: str, count: int, make: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
        """The record of shard `name` of `count` samples, made by `make` only if needed."""
        path = self.folder / "shards" / f"{name}.safetensors"
        note = path.with_suffix(".json")
        made_of = {IMAGES: self.images} if self.images and name.startswith("latent-") else {}
        if path.is_file() and note.is_file():
            record = read_json(note)
            same = _stored_hash(record) == self.config_hash and record.get("count") == count
            same = same and all(record.get(key, value) == value for key, value in made_of.items())  # absent: older
            if same and path.stat().st_size == record.get("bytes") and sha256(path) == record.get("sha256"):
                return record
        write_tensors(path, make(), {HASH: self.config_hash})
        size = path.stat().st_size
        record = {"file": f"shards/{name}.safetensors", "count": count, "bytes": size, "sha256": sha256(path)}
        record |= {HASH: self.config_hash, **made_of}
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
        ragged: Mapping[str, str],
        text_tokens: int | None = None,
    ) -> None:
        """Write index.json: after this the cache is complete.

        parts: what the config_hash was made of; ragged: text field -> its mask, see train.conditioning; text_tokens:
        length of text that is embedded in training (that of stored text is in `parts`).
        """
        index = {
            "format": FORMAT,
            HASH: self.config_hash,
            "made_of": parts,
            "spaces": {side: asdict(space) for side, space in spaces.items()},
            "ragged": dict(ragged),
            "captions": list(captions),
            "samples": list(samples),
            "shards": list(shards),
            **({} if text_tokens is None else {"text_tokens": text_tokens}),
        }
        write_json(self.folder / INDEX, index)


class Cache:
    """Reads a cache. Sizes are checked on opening, each shard's sha256 when it is first used."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            raise CacheError(f"{path} not found: the cache stage has not finished; run it first")
        index = read_json(path)
        if index.get("format") not in READ:
            raise CacheError(f"{path} has format {index.get('format')}, this program reads {READ}; make it anew")
        if index["format"] == 1:
            index = {HASH: index.get(OLD_HASH), "ragged": {}, **index}
        try:
            check_fields(index, INDEX_FIELDS, needed=tuple(set(INDEX_FIELDS) - {"text_tokens"}))
            for name, mask in index["ragged"].items():
                text(100)(f"ragged.{name}", mask)
            for record in index["shards"]:
                check_fields(record, SHARD_FIELDS, needed=tuple(SHARD_FIELDS))
            counts = {record["file"]: record["count"] for record in index["shards"]}
            for sample in index["samples"]:
                height, width = sample["size"]
                if not (
                    0 <= sample["row"] < counts[sample["shard"]]
                    and 0 <= sample["caption"] < len(index["captions"])
                    and all(0 <= n < len(index["captions"]) and w > 0 for n, w in sample.get("captions", ()))
                    and height * width > 0
                ):
                    raise ValueError(f"sample {shown(sample)} has no such place")
            self.spaces = {side: LatentSpace(**index["spaces"][side]) for side in SIDES}
        except (ValueError, TypeError, KeyError) as error:
            raise CacheError(f"{path} is not the index of a cache ({error!r}); make it anew") from error
        self.config_hash: str = index[HASH]
        self.ragged: dict[str, str] = index["ragged"]
        self.made_of: dict[str, Any] = index["made_of"]
        self._online_tokens: int | None = index.get("text_tokens")
        self.captions: list[str] = index["captions"]
        self.samples: list[dict[str, Any]] = index["samples"]
        self.shards: dict[str, dict[str, Any]] = {record["file"]: record for record in index["shards"]}
        self._open: dict[str, dict[str, Tensor]] = {}
        self._starts: dict[tuple[str, str], list[int]] = {}
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
        """Length that captions were embedded at, or are to be in training; None = what the release says."""
        settings = self.made_of["text"]
        return settings["tokens"] if isinstance(settings, dict) else self._online_tokens

    def buckets(self) -> list[list[int]]:
        """Sample numbers by image size."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, sample in enumerate(self.samples):
            groups.setdefault(tuple(sample["size"]), []).append(number)
        return [groups[size] for size in sorted(groups)]

    def latents(self, indices: Sequence[int], side: str) -> Tensor:
        """(B,C,h,w) float32 model-space latents of samples of one bucket; side "teacher" or "student"."""
        rows = [self._latent(self.samples[i]["shard"], side)[self.samples[i]["row"]] for i in indices]
        return self.spaces[side].normalize(torch.stack(rows).float())

    def text(self, captions: Sequence[int]) -> Cond:
        """Conditioning (B,...), float32 or integer, by name, of captions given by number; 0 is the empty prompt.

        Ragged text is as long as the longest of these captions.
        """
        places = [self._caption_place[number] for number in captions]
        names = [name for name in self._tensors(places[0][0]) if not name.endswith(LENGTHS)]
        fixed = [name for name in names if name not in self.ragged]
        cond = {name: torch.stack([self._row(file, name, row) for file, row in places]) for name in fixed}
        for name, mask in self.ragged.items():
            cond[name], cond[mask] = pad([self._tokens(file, name, row) for file, row in places])
        return {name: _floats(value) for name, value in cond.items()}

    def of_samples(self, indices: Sequence[int], side: str) -> Cond:
        """Conditioning (B,...) that belongs to samples, as the model on that side takes it; {} where there is none."""
        places = [(self.samples[index]["shard"], self.samples[index]["row"]) for index in indices]
        prefix = f"{self._stored_side(places[0][0], side)}."
        names = [name for name in self._tensors(places[0][0]) if name.startswith(prefix)]
        cond = {name: torch.stack([self._row(file, name, row) for file, row in places]) for name in names}
        return {name.removeprefix(prefix): _floats(value) for name, value in cond.items()}

    def caption_numbers(self, indices: Sequence[int]) -> list[int]:
        """Which caption each sample has."""
        return [self.samples[index]["caption"] for index in indices]

    def drawn_captions(self, indices: Sequence[int], shares: Tensor) -> list[int]:
        """The caption that each sample takes: of several one by their weights, at a share (B,) in 0..1 of their sum."""
        return [self._drawn(self.samples[index], float(share)) for index, share in zip(indices, shares, strict=True)]

    @staticmethod
    def _drawn(sample: dict[str, Any], share: float) -> int:
        left = share * sum(weight for _, weight in sample.get("captions", ()))
        for number, weight in sample.get("captions", ()):
            left -= weight
            if left < 0:
                return int(number)
        return int(sample["caption"])

    def describe(self, indices: Sequence[int]) -> list[str]:
        """Names of samples, for messages."""
        return [self.samples[index]["name"] for index in indices]

    def _latent(self, file: str, side: str) -> Tensor:
        """(n,C,h,w): the raw latents of one side in a shard."""
        return self._tensors(file)[self._stored_side(file, side)]

    def _stored_side(self, file: str, side: str) -> str:
        """Under which side a shard has a side's latents: the teacher's where both are by one autoencoder."""
        if side in self._tensors(file) or self.spaces[side] != self.spaces[TEACHER]:
            return side
        return TEACHER

    def _row(self, file: str, name: str, row: int) -> Tensor:
        return self._tensors(file)[name][row]

    def _tokens(self, file: str, name: str, row: int) -> Tensor:
        """(t,D): ragged text of one caption of a shard."""
        stored = self._tensors(file)
        if (file, name) not in self._starts:
            lengths = stored[f"{name}{LENGTHS}"]
            if lengths.min() < 0 or lengths.sum() != len(stored[name]):
                raise CacheError(f"{self.folder / file}: {name} has {len(stored[name])} tokens, its lengths say others")
            self._starts[file, name] = [0, *lengths.cumsum(0).tolist()]
        start, stop = self._starts[file, name][row : row + 2]
        return stored[name][start:stop]

    def _tensors(self, file: str) -> dict[str, Tensor]:
        if file not in self._open:
            self._check_content(self.shards[file])
            with safe_open(self.folder / file, framework="pt") as shard:  # memory-mapped: pages come and go
                self._open[file] = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        return self._open[file]

    def _check_size(self, record: dict[str, Any]) -> None:
        path = self.folder / record["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != record["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes"
            raise CacheError(
                f"{path} {state}, expected {record['bytes']}; remove {self.folder}/done.json and cache again"
            )

    def _check_content(self, record: dict[str, Any]) -> None:
        path = self.folder / record["file"]
        digest = sha256(path)
        if digest != record["sha256"]:
            raise CacheError(
                f"{path}: sha256 is {digest[:16]}..., index.json says {record['sha256'][:16]}...; the file was damaged "
                f"or replaced: remove it and {self.folder}/done.json, then cache again"
            )
        try:
            with safe_open(path, framework="pt") as shard:
                stamp = _stored_hash(shard.metadata() or {})
        except SafetensorError as error:
            raise CacheError(f"{path} is not readable safetensors ({error}); remove it and cache again") from error
        if stamp != self.config_hash:
            raise CacheError(
                f"{path} belongs to another cache (config_hash {str(stamp)[:16]}...); remove it, cache again"
            )

    def _places(self, prefix: str) -> list[tuple[str, int]]:
        places = []
        for file, record in self.shards.items():
            if Path(file).name.startswith(prefix):
                places += [(file, row) for row in range(record["count"])]
        return places


def is_online(folder: Path) -> bool:
    """Whether a finished cache leaves text to be embedded in training; False where there is no cache."""
    path = folder / INDEX
    made_of = read_json(path).get("made_of") if path.is_file() else None
    return isinstance(made_of, dict) and made_of.get("text") == "online"


def _stored_hash(record: Mapping[str, Any]) -> Any:
    """The config_hash of a record or a shard's metadata, which older ones call fingerprint."""
    return record.get(HASH, record.get(OLD_HASH))


def _floats(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
