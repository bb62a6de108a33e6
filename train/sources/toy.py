"""The toy's images as a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from train.config import Strict
from train.files import digest_json, sha256
from train.samples import Skipped, files_under
from train.sources.base import Source


class ToyData(Strict):
    """Images drawn from toy/data, `variants` of each (subject, colour) pair."""

    type: Literal["toy"]
    path: str = "toy/data"
    split: Literal["train", "held_out", "all"] = "train"
    variants: int = Field(8, ge=1)


class ToyClassData(ToyData):
    """The same images for a class-conditional base: the caption is the subject alone, a class of its id2label."""

    type: Literal["toy-classes"]  # type: ignore[assignment]


class ToySource(Source):
    """The toy's images as a Source."""

    def __init__(self, config: ToyData) -> None:
        from train.toy.pictures import SIZE, ToyPictures

        self.config = config
        self.side = SIZE
        self.pictures = ToyPictures(config.path)
        self.pairs = self.pictures.pairs(config.split)
        self.classes = isinstance(config, ToyClassData)
        self.skipped = Skipped()

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

    def identity(self) -> dict[str, Any]:
        """With the bytes of all files of the toy, which are few."""
        files = files_under(Path(self.config.path), Skipped())
        return {**super().identity(), "files": digest_json([[file.name, sha256(file.path)] for file in files])}
