"""What a source is, and what all sources of image files share: scanning, aspect buckets, skipped samples, identity."""
# H, W pixels

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from train import captions, images
from train.captions import Encoding
from train.config import Strict
from train.files import digest_json
from train.samples import SHOWN, SampleError, Skipped, Stamp, first_names, sample

Ratio = Annotated[float, Field(ge=1 / 32, le=32)]
PREPROCESSING = 2  # what images.decode and images.fit make of the same bytes; part of identity()


class Source(ABC):
    """Numbered images with captions. Reading one is a pure function of its number."""

    skipped: Skipped
    """What is left out, or not taken as it is, and why."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call a sample in messages."""

    @abstractmethod
    def caption(self, index: int) -> str: ...

    def captions(self, index: int) -> list[str]:
        """All captions that training may take for a sample, their weights by train.captions.weight_of."""
        return [self.caption(index)]

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """(H, W) that image() will have: the sample's bucket."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """(3,H,W) float32 in -1..1."""

    def identity(self) -> dict[str, Any]:
        """What decides the images, as JSON: part of a cache's config_hash. It is cheap: no image is read for it."""
        names = [[self.name(i), self.caption(i), *self.size(i)] for i in range(len(self))]
        return {"source": type(self).__name__, "samples": len(self), "digest": digest_json(names)}


class Files(Strict):
    """Shared by the formats which hold image files."""

    path: str
    pixels: int = Field(512, ge=32, le=16384, description="side of the square whose area a training image has")
    multiple: int = Field(64, ge=1, le=4096, description="sides are multiples of this (f * patch of both models)")
    planned: int | None = Field(None, ge=1, description="number of images to expect, for --dry-run alone")
    ratios: tuple[Ratio, ...] = Field((1.0,), min_length=1, description="aspect buckets, H/W; 1.0 alone = squares")
    unreadable: Literal["stop", "skip"] = Field(
        "stop", description="samples whose image or caption is damaged; skip decodes every image once to find them"
    )
    text_encoding: Encoding = Field("utf-8", description="of caption files without a byte-order mark")
    captions: Literal["first", "all"] = Field(
        "first", description="of an image with several: the first, or in each step one of all by their weights"
    )

    @model_serializer(mode="wrap")
    def _without_new_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Fields that are newer than runs which exist are no part of their settings at their default."""
        new = {"unreadable": "stop", "text_encoding": "utf-8", "captions": "first"}
        return {name: value for name, value in serialize(self).items() if new.get(name, ...) != value}


@dataclass(frozen=True, slots=True)
class Found:
    """A sample as scan() finds it; the callables are used before the next one is asked for.

    name: as in messages; where: its file, and member or row; captions: its alternatives, [] where there is none;
    open: the image's bytes, None where there are none; place: what FileSource.open takes; stamp: of the file that the
    image is in, shared by all samples in it.
    """

    name: str
    where: str
    captions: Callable[[], list[str]]
    open: Callable[[], AbstractContextManager[BinaryIO]] | None
    place: Any
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample of a FileSource; size is (H, W) of its upright image."""

    name: str
    where: str
    captions: tuple[str, ...]  # that training may take: the first alone, or all
    size: tuple[int, int]
    place: Any
    stamp: Stamp


class FileSource(Source):
    """Image files: subclasses find samples and open the bytes of one.

    Every sample is opened once when the source is made, for its size and caption. A sample without a caption or an
    image is counted in `skipped`; one that is damaged is a SampleError, or counted too with `unreadable: skip`.
    """

    def __init__(self, config: Files) -> None:
        self.config = config
        self.buckets = bucket_sizes(config.pixels, config.multiple, config.ratios)
        self.skipped = Skipped()
        self.entries: list[Entry] = []
        damaged = 0
        errors: list[str] = []
        for found in self.scan(Path(config.path)):
            try:
                with sample(found.where):
                    self._take(found)
            except SampleError as error:
                damaged += 1
                if config.unreadable == "skip":
                    self.skipped.add("damaged samples", str(error))
                elif len(errors) < SHOWN:
                    errors.append(str(error))
        if errors:
            raise SampleError(
                f"{damaged} samples of {config.path} cannot be read; mend or remove them, or set data.unreadable=skip: "
                + first_names(errors, damaged, "; ")
            )

    @abstractmethod
    def scan(self, root: Path) -> Iterator[Found]:
        """Every sample, in a fixed order."""

    def text(self, file: BinaryIO) -> list[str]:
        """The captions in a text file: one, which may be empty."""
        remedy = "save it as UTF-8, or set data.text_encoding"
        data = captions.read_bounded(file)
        return captions.captions_of(captions.text_of(data, self.config.text_encoding, remedy))

    @abstractmethod
    def open(self, place: Any) -> AbstractContextManager[BinaryIO]:
        """The bytes of the image at a Found's place, as a seekable file."""

    def _take(self, found: Found) -> None:
        if found.open is None:
            self.skipped.add("samples without an image", found.name)
            return
        alternatives = found.captions()
        if not alternatives:
            self.skipped.add("images without a caption", found.name)
            return
        with found.open() as file:
            size = images.image_size(file)
            if self.config.unreadable == "skip":
                images.decode(file)
        if self.config.captions == "first" and len(alternatives) > 1:
            self.skipped.add("samples with several captions, of which the first is used", found.name)
        used = tuple(alternatives if self.config.captions == "all" else alternatives[:1])
        if not all(used):
            self.skipped.add("samples whose caption is empty, which are used", found.name)
        self.entries.append(Entry(found.name, found.where, used, size, found.place, found.stamp))

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return self.entries[index].name

    def caption(self, index: int) -> str:
        return self.entries[index].captions[0]

    def captions(self, index: int) -> list[str]:
        return list(self.entries[index].captions)

    def size(self, index: int) -> tuple[int, int]:
        return nearest_bucket(self.entries[index].size, self.buckets)

    def image(self, index: int) -> Tensor:
        """As Source's; a SampleError names file, and member or row, of what cannot be decoded."""
        entry = self.entries[index]
        with sample(entry.where), self.open(entry.place) as file:
            return images.fit(images.decode(file), self.size(index))

    def identity(self) -> dict[str, Any]:
        """Beside names, captions and sizes, `files` changes with the size or time of change of any image's file."""
        stamps = digest_json([entry.stamp for entry in self.entries])
        parts = {**super().identity(), "files": stamps, "preprocessing": PREPROCESSING}
        if self.config.captions == "all":
            weighted = [[[text, captions.weight_of(text)] for text in entry.captions] for entry in self.entries]
            parts["captions"] = digest_json(weighted)
        return parts

    def content_digest(self) -> str:
        """SHA-256 of the bytes of all images, with their names and captions. Reads everything."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(digest_json([entry.name, *entry.captions]).encode())
            with sample(entry.where), self.open(entry.place) as file:
                content = hashlib.sha256()
                while block := file.read(1 << 20):
                    content.update(block)
            digest.update(content.digest())
        return digest.hexdigest()


def bucket_sizes(pixels: int, multiple: int, ratios: Sequence[float]) -> list[tuple[int, int]]:
    """(H, W) of each aspect ratio H/W: area near pixels^2, both sides multiples of `multiple`."""
    sizes = set()
    for ratio in ratios:
        height = max(multiple, round(pixels * math.sqrt(ratio) / multiple) * multiple)
        width = max(multiple, round(pixels / math.sqrt(ratio) / multiple) * multiple)
        sizes.add((height, width))
    return sorted(sizes)


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest in log scale."""
    ratio = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: (abs(math.log(bucket[0] / bucket[1]) - ratio), bucket))
