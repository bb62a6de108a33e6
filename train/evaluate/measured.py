"""What every metric shares: its columns, its results, and batches of images."""
# B batch, H W pixels

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from train.evaluate.images import Drawn
from train.inputs import Read


@dataclass(frozen=True)
class Column:
    """A column of the table. better: "lower", "higher", or "" where it is neither."""

    title: str
    better: str = ""
    digits: int = 2
    scale: float = 1.0


@dataclass
class Measured:
    """A column's value over all images; `each` image's, where it is a mean of those; by seed, where it is not."""

    value: float | None
    each: list[float] | None = None
    by_seed: dict[str, float] = field(default_factory=dict)
    note: str = ""


class Metric(Protocol):
    """A metric with its settings. Making one reads no weights."""

    columns: Mapping[str, Column]

    def reads(self) -> dict[str, Read]:
        """The files that decide its values, by field: their sha256 is stated with the result."""
        ...

    def check(self) -> list[str]:
        """What is missing: packages, files."""
        ...

    def measure(self, images: Sequence[Drawn], device: torch.device, work: Path) -> dict[str, Measured]:
        """Its columns for a model's images; `work` is a folder of the model's for what the metric writes."""
        ...


def batches(images: Sequence[Drawn], size: int, load: Callable[[Path], Any]) -> Iterator[list[Any]]:
    """`load` of each image, in lists of at most `size` whose images have one shape."""
    batch: list[Any] = []
    for image in images:
        loaded = load(image.path)
        shape = getattr(loaded, "shape", None) or loaded.size
        if batch and (len(batch) == size or (getattr(batch[0], "shape", None) or batch[0].size) != shape):
            yield batch
            batch = []
        batch.append(loaded)
    if batch:
        yield batch


def seeds_apart(images: Sequence[Drawn]) -> dict[int, list[int]]:
    """Places of the images of each seed; nothing where there is one seed only."""
    places: dict[int, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.seed, []).append(place)
    return places if len(places) > 1 else {}


def missing_files(fields: Mapping[str, str], folders: Sequence[str] = ()) -> list[str]:
    """A line for each field whose file (or folder, for `folders`) is not there."""
    return [
        f"{name} {path or '(not set)'} is no {'folder' if name in folders else 'file'}"
        for name, path in fields.items()
        if not path or not (Path(path).is_dir() if name in folders else Path(path).is_file())
    ]
