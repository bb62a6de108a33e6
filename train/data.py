"""Text-image data sets: where images and captions come from, and how images become a training size."""
# H, W pixels

from __future__ import annotations

import io
import math
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from dcgen.jsons import parse_object
from train.config import Strict
from train.files import digest_json

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_SUFFIXES = (".txt", ".caption", ".json", ".jsonl")


Ratio = Annotated[float, Field(ge=1 / 32, le=32)]


class Source(ABC):
    """Numbered images with captions. Reading one is a pure function of its number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call a sample in messages."""

    @abstractmethod
    def caption(self, index: int) -> str: ...

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """(H, W) that image() will have: the sample's bucket."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """(3,H,W) float32 in -1..1."""

    def identity(self) -> dict[str, Any]:
        """What decides the images: part of a cache's config_hash."""
        names = [[self.name(i), self.caption(i), *self.size(i)] for i in range(len(self))]
        return {"source": type(self).__name__, "samples": len(self), "digest": digest_json(names)}


class ToyData(Strict):
    """Images drawn from toy/data, `variants` of each (subject, colour) pair."""

    type: Literal["toy"]
    path: str = "toy/data"
    split: Literal["train", "held_out", "all"] = "train"
    variants: int = Field(8, ge=1)


class ToyClassData(ToyData):
    """The same images for a class-conditional base: the caption is the subject alone, a class of its id2label."""

    type: Literal["toy-classes"]  # type: ignore[assignment]


class Files(Strict):
    """Shared by the formats which hold image files."""

    path: str
    pixels: int = Field(512, ge=32, le=16384, description="side of the square whose area a training image has")
    multiple: int = Field(64, ge=1, le=4096, description="sides are multiples of this (f * patch of both models)")
    planned: int | None = Field(None, ge=1, description="number of images to expect, for --dry-run alone")
    ratios: tuple[Ratio, ...] = Field((1.0,), min_length=1, description="aspect buckets, H/W; 1.0 alone = squares")


class FolderData(Files):
    """Images in a folder tree; the caption is the .txt beside an image, or a line in metadata.jsonl."""

    type: Literal["folder"]


class TarData(Files):
    """webdataset tars: members NAME.jpg + NAME.txt, or NAME.json with a `caption`."""

    type: Literal["webdataset"]


class ParquetData(Files):
    """Hugging Face parquet files with an image column ({"bytes": ...} or bytes) and a caption column."""

    type: Literal["parquet"]
    image_column: str = "image"
    caption_column: str = "text"


DataConfig = Annotated[ToyData | ToyClassData | FolderData | TarData | ParquetData, Field(discriminator="type")]


def open_source(config: ToyData | FolderData | TarData | ParquetData, path: Path) -> Source:
    """The source a recipe describes, at `path`; a missing or empty path is an error that names it."""
    config = config.model_copy(update={"path": str(path)})
    if isinstance(config, ToyData):
        return ToySource(config)
    kinds: dict[type[Files], Any] = {FolderData: FolderSource, TarData: TarSource, ParquetData: ParquetSource}
    if not path.exists():
        raise FileNotFoundError(f"data path {path} does not exist; set data.path to a folder of {config.type} data")
    source = kinds[type(config)](config)
    if not len(source):
        raise ValueError(f"data path {path} holds no captioned image ({config.type})")
    return source


def data_files(config: ToyData | FolderData | TarData | ParquetData, path: Path) -> list[Path]:
    """The files that images and captions come from, for telling whether they have changed; opens none."""
    if path.is_file():
        return [path]
    if isinstance(config, TarData | ParquetData):
        return sorted(path.rglob("*.tar" if isinstance(config, TarData) else "*.parquet"))
    files = path.rglob("*") if isinstance(config, FolderData) else path.glob("*")
    return sorted(p for p in files if p.name[0] != "." and p.suffix.lower() in (*SUFFIXES, *CAPTION_SUFFIXES))


class ToySource(Source):
    """The toy's images as a Source."""

    def __init__(self, config: ToyData) -> None:
        from train.toy.pictures import SIZE, ToyPictures

        self.config = config
        self.side = SIZE
        self.pictures = ToyPictures(config.path)
        self.pairs = self.pictures.pairs(config.split)
        self.classes = isinstance(config, ToyClassData)

    def __len__(self) -> int:
        return len(self.pairs) * self.config.variants

    def name(self, index: int) -> str:
        return f"{self.caption(index)} #{index // len(self.pairs)}"

    def caption(self, index: int) -> str:
        pair = self.pairs[index % len(self.pairs)]
        return self.pictures.subjects[pair.subject] if self.classes else self.pictures.caption(pair)

    def size(self, index: int) -> tuple[int, int]:
        return self.side, self.side

    def image(self, index: int) -> Tensor:
        return self.pictures.draw(self.pairs[index % len(self.pairs)], index // len(self.pairs))


class FileSource(Source):
    """Image files: subclasses list (name, caption, width, height) and give the bytes."""

    def __init__(self, config: Files) -> None:
        self.config = config
        self.buckets = bucket_sizes(config.pixels, config.multiple, config.ratios)
        self.entries = self.scan(Path(config.path))

    @abstractmethod
    def scan(self, path: Path) -> list[tuple[str, str, tuple[int, int]]]:
        """(name, caption, (H, W) of the file) of every sample, in a fixed order."""

    @abstractmethod
    def read(self, index: int) -> bytes: ...

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return self.entries[index][0]

    def caption(self, index: int) -> str:
        return self.entries[index][1]

    def size(self, index: int) -> tuple[int, int]:
        return nearest_bucket(self.entries[index][2], self.buckets)

    def image(self, index: int) -> Tensor:
        with Image.open(io.BytesIO(self.read(index))) as image:
            return fit(image, self.size(index))


class FolderSource(FileSource):
    """Images in a folder tree."""

    def scan(self, path: Path) -> list[tuple[str, str, tuple[int, int]]]:
        captions = {}
        for table in sorted(path.rglob("metadata.jsonl")):
            for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
                row = parse_object(line, f"{table}, line {number}")
                captions[table.parent / row["file_name"]] = row.get("text", row.get("caption"))
        entries = []
        for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES):
            text = file.with_suffix(".txt")
            caption = text.read_text(encoding="utf-8").strip() if text.is_file() else captions.get(file)
            if caption is not None:
                entries.append((str(file.relative_to(path)), caption, _size_of(file)))
        return entries

    def read(self, index: int) -> bytes:
        return (Path(self.config.path) / self.entries[index][0]).read_bytes()


class TarSource(FileSource):
    """webdataset tars, indexed once (offset and length of every member) and then read at random."""

    def scan(self, path: Path) -> list[tuple[str, str, tuple[int, int]]]:
        entries, self.places = [], []
        for tar_path in [path] if path.is_file() else sorted(path.rglob("*.tar")):
            groups: dict[str, dict[str, tarfile.TarInfo]] = {}
            with tarfile.open(tar_path) as tar:
                for member in tar:
                    stem, dot, suffix = member.name.rpartition(".")
                    if member.isfile() and dot:
                        groups.setdefault(stem, {})[f".{suffix.lower()}"] = member
                for stem, members in groups.items():
                    image = next((m for suffix, m in members.items() if suffix in SUFFIXES), None)
                    caption = _tar_caption(tar, members)
                    if image is None or caption is None:
                        continue
                    size = _size_of(io.BytesIO(_bytes_of(tar, image)))
                    entries.append((f"{tar_path.name}:{stem}", caption, size))
                    self.places.append((tar_path, image.offset_data, image.size))
        return entries

    def read(self, index: int) -> bytes:
        path, offset, length = self.places[index]
        with open(path, "rb") as handle:
            handle.seek(offset)
            return handle.read(length)


class ParquetSource(FileSource):
    """Parquet files of a Hugging Face image data set (needs pyarrow)."""

    config: ParquetData

    def scan(self, path: Path) -> list[tuple[str, str, tuple[int, int]]]:
        import pyarrow.parquet as parquet

        entries, self.tables = [], []
        for file in [path] if path.is_file() else sorted(path.rglob("*.parquet")):
            names = parquet.read_schema(file).names
            for column in (self.config.image_column, self.config.caption_column):
                if column not in names:
                    raise ValueError(f"{file} has no column {column!r}; it has {', '.join(names)}")
            table = parquet.read_table(
                file, columns=[self.config.image_column, self.config.caption_column], memory_map=True
            )
            for row, caption in enumerate(table.column(self.config.caption_column).to_pylist()):
                self.tables.append((table, row))
                entries.append((f"{file.name}:{row}", caption, _size_of(io.BytesIO(self.read(len(self.tables) - 1)))))
        return entries

    def read(self, index: int) -> bytes:
        table, row = self.tables[index]
        value = table.column(self.config.image_column)[row].as_py()
        return value["bytes"] if isinstance(value, dict) else value


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


def fit(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Composite on white, scale to cover (H, W), crop the centre; (3,H,W) float32 in -1..1."""
    if image.mode in ("RGBA", "LA", "P", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    height, width = size
    scale = max(height / image.height, width / image.width)
    across, down = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize((across, down), Image.Resampling.LANCZOS)
    left, top = (across - width) // 2, (down - height) // 2
    array = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()


def _bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    handle = tar.extractfile(member)
    if handle is None:
        raise ValueError(f"{tar.name!s}: {member.name} is not a file")
    return handle.read()


def _tar_caption(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> str | None:
    if ".txt" in members:
        return _bytes_of(tar, members[".txt"]).decode("utf-8").strip()
    if ".json" in members:
        member = members[".json"]
        value = parse_object(_bytes_of(tar, member), f"{tar.name!s}: {member.name}")
        return value.get("caption", value.get("text"))
    return None


def _size_of(file: Any) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.height, image.width
