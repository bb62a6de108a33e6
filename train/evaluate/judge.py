"""How good are toy images: Frechet distance on features of a small network, and whether they show their prompt."""
# B images, F features, S subjects, K colours, n images of a set

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgen.fields import check_fields, whole
from dcgen.files import check_finite, naming
from dcgen.tensors import Tensors
from train.files import read_json, write_json, write_tensors
from train.toy.pictures import Pair, ToyPictures

FEATURES = 64
FIRST_UNSEEN = 1000  # variants from here on are in no training set


class Evaluator(nn.Module):
    """A convolutional network that names subject and colour; its pooled activations are the features."""

    def __init__(self, subjects: int, colors: int, features: int = FEATURES) -> None:
        super().__init__()
        widths = (3, 24, 32, 48, features)
        layers: list[nn.Module] = []
        for inside, outside in pairwise(widths):
            layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.GroupNorm(8, outside), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.place = nn.Conv2d(features, features, 3, padding=1)
        self.subject = nn.Linear(features, subjects)
        self.color = nn.Linear(features, colors)

    def features(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in -1..1 -> (B,F), at half the resolution."""
        return F.silu(self.place(self.body(F.avg_pool2d(images, 2)))).mean((2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of subject (B,S) and colour (B,K)."""
        features = self.features(images)
        return self.subject(features), self.color(features)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        config = {"subjects": self.subject.out_features, "colors": self.color.out_features}
        write_json(folder / "config.json", {**config, "features": self.subject.in_features})
        write_tensors(folder / "model.safetensors", self.state_dict())


def load_evaluator(folder: str | Path) -> Evaluator:
    """The evaluator of a folder, frozen."""
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config} not found: train it with `python -m train.run toy-evaluator`")
    sizes = read_json(config)
    with naming(config):
        names = ("subjects", "colors", "features")
        check_fields(sizes, dict.fromkeys(names, whole(1, 1 << 16)), names)
        model = Evaluator(*(sizes[name] for name in names))
    weights = folder / "model.safetensors"
    tensors = Tensors.open(weights)
    try:
        model.load_state_dict({name: check_finite(tensors.get(name), name, weights) for name in tensors.entries})
    except RuntimeError as error:  # torch lists what is missing or of another shape
        raise ValueError(f"{weights} does not fit {config}: {error}") from error
    return model.eval().requires_grad_(False)


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two feature sets (n,F) taken as Gaussians: |m1-m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    float64 throughout; the trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2).
    """
    m1, s1 = _moments(first)
    m2, s2 = _moments(second)
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ s2 @ root).clip(0)
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.sqrt(inner).sum())


@dataclass(frozen=True)
class Score:
    """What evaluate() finds. Rates are fractions of the images."""

    frechet: float
    subject: float
    color: float
    both: float
    both_held_out: float

    def as_dict(self) -> dict[str, float]:
        return {name: round(float(getattr(self, name)), 4) for name in self.__dataclass_fields__}


class Judge:
    """Scores images made for captions of toy/data against real ones of variants that no training saw."""

    def __init__(self, evaluator: str | Path, data: str | Path, variants: int = 4) -> None:
        self.model = load_evaluator(evaluator)
        self.pictures = ToyPictures(data)
        self.held_out = {(p.subject, p.color) for p in self.pictures.pairs("held_out")}
        self.variants = variants
        self._real: dict[tuple[Pair, ...], Tensor] = {}

    def captions(self, pairs: Sequence[Pair]) -> list[str]:
        return [self.pictures.caption(pair) for pair in pairs]

    def score(self, images: Tensor, pairs: Sequence[Pair]) -> Score:
        """images (B,3,H,W) in -1..1, made for the captions of `pairs`, in that order."""
        right_subject, right_color = self.recognised(images, pairs)
        both = (right_subject & right_color).float()
        unseen = torch.tensor([(p.subject, p.color) in self.held_out for p in pairs])
        return Score(
            frechet=frechet(self.features(images), self._real_features(pairs)),
            subject=right_subject.float().mean().item(),
            color=right_color.float().mean().item(),
            both=both.mean().item(),
            both_held_out=both[unseen].mean().item() if unseen.any() else float("nan"),
        )

    def recognised(self, images: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Whether the subject and the colour asked for are seen, (B,) bool each, in images (B,3,H,W) in -1..1."""
        if len(images) != len(pairs):
            raise ValueError(f"{len(images)} images for {len(pairs)} captions")
        subjects, colors = (torch.cat(part) for part in zip(*_chunks(self.model, images), strict=True))
        wanted = torch.tensor([[p.subject, p.color] for p in pairs])
        return subjects.argmax(1) == wanted[:, 0], colors.argmax(1) == wanted[:, 1]

    def features(self, images: Tensor) -> Tensor:
        """(B,F) of images (B,3,H,W) in -1..1, for frechet()."""
        return torch.cat(_chunks(self.model.features, images))

    def _real_features(self, pairs: Sequence[Pair]) -> Tensor:
        key = tuple(pairs)
        if key not in self._real:
            unseen = range(FIRST_UNSEEN, FIRST_UNSEEN + self.variants)
            real = [self.pictures.draw(pair, variant) for pair in dict.fromkeys(pairs) for variant in unseen]
            self._real[key] = self.features(torch.stack(real))
        return self._real[key]


@torch.no_grad()
def _chunks(function: Any, images: Tensor, size: int = 64) -> list[Any]:
    return [function(part) for part in images.float().split(size)]


def _moments(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    array = features.double().numpy()
    if array.ndim != 2 or len(array) < 2:
        raise ValueError(f"features must be (n,F) with n >= 2, got {array.shape}")
    return array.mean(0), np.cov(array, rowvar=False).reshape(array.shape[1], array.shape[1])
