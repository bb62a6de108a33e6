"""The toy's pictures: an emoji on a softly graded background, a pure function of (seed, subject, colour, variant)."""
# H, W pixels; S subjects, K colours

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.files import read_json
from train.inputs import Read

SIZE = 128  # pixels, both sides
SUBJECT_PX = (88, 108)  # drawn size of a subject, uniform
SHIFT_PX = 7  # largest shift from the centre, each axis, uniform
SHADE = 0.06  # the background is this much lighter at the top and darker at the bottom


@dataclass(frozen=True)
class Pair:
    """A subject on a colour, by their places in captions.json."""

    subject: int
    color: int


def toy_read(folder: str | Path) -> Read:
    """What ToyPictures reads in a folder."""
    images = sorted(path for path in Path(folder).glob("*") if path.suffix in (".webp", ".png"))
    return Read(Path(folder), (Path(folder) / "captions.json", *images))


class ToyPictures:
    """Reads toy/data and draws its pictures.

    The (subject, colour) pairs in `held_out` take no part in training the base or DC-Gen; the autoencoders see all.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        index = folder / "captions.json"
        if not index.is_file():
            raise FileNotFoundError(f"{index} not found: make it with `python -m train.toy.build_data --out {folder}`")
        described = read_json(index)
        self.template: str = described["template"]
        self.subjects: list[str] = [entry["name"] for entry in described["subjects"]]
        self.colors: list[str] = [entry["name"] for entry in described["colors"]]
        self._rgb = np.array([entry["rgb"] for entry in described["colors"]], dtype=np.float32)
        self._images = [_read_rgba(folder / entry["file"]) for entry in described["subjects"]]
        self._held_out = {(s, c) for s, c in described["held_out"]}

    def pairs(self, split: str = "all") -> list[Pair]:
        """Pairs of a split ("all", "train", "held_out"), ordered by subject, then colour."""
        if split not in ("all", "train", "held_out"):
            raise ValueError(f"split {split!r}: expected all, train or held_out")
        pairs = [Pair(s, c) for s in range(len(self.subjects)) for c in range(len(self.colors))]
        return [p for p in pairs if split == "all" or ((p.subject, p.color) in self._held_out) == (split == "held_out")]

    def caption(self, pair: Pair) -> str:
        """The pair's caption, e.g. "robot on a blue background"."""
        return self.template.format(subject=self.subjects[pair.subject], color=self.colors[pair.color])

    def draw(self, pair: Pair, variant: int, seed: int = 0) -> Tensor:
        """(3,H,W) float32 in -1..1. The variant sets size and place of the subject."""
        rng = np.random.default_rng([seed, pair.subject, pair.color, variant])
        side = int(rng.integers(SUBJECT_PX[0], SUBJECT_PX[1] + 1))
        left, top = (int((SIZE - side) // 2 + rng.integers(-SHIFT_PX, SHIFT_PX + 1)) for _ in range(2))
        shade = np.linspace(1 + SHADE, 1 - SHADE, SIZE, dtype=np.float32)[:, None, None]
        picture = np.clip(self._rgb[pair.color] * shade, 0, 255) * np.ones((1, SIZE, 1), np.float32)
        subject = np.asarray(self._images[pair.subject].resize((side, side), Image.Resampling.BICUBIC), np.float32)
        canvas = picture[top : top + side, left : left + side]
        alpha = subject[..., 3:] / 255
        canvas[...] = canvas * (1 - alpha) + subject[..., :3] * alpha
        return torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1


def _read_rgba(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is named in captions.json but missing; restore it from git")
    with Image.open(path) as image:
        return image.convert("RGBA")
