"""CLIP score and LAION's aesthetic score, on a CLIP model from a folder in transformers' layout."""
# B batch, D embedding width

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcgen.files import check_finite
from dcgen.tensors import Tensors
from train.evaluate.images import Drawn, open_image
from train.evaluate.measured import Column, Measured, batches, missing_files
from train.evaluate.spec import Aesthetic, ClipScore
from train.inputs import PART, Read, one_file

WEIGHTS = (*PART, ".bin")  # older CLIP folders have no .safetensors
LAYER = re.compile(r"layers\.(\d{1,3})\.(?:weight|bias)")


class Clip:
    """A frozen CLIP model with its own preprocessing."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.device = device
        self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self.model.to(device).eval().requires_grad_(False)
        self.prepare: Any = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self.tokenize: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def images(self, images: Sequence[Any]) -> Tensor:
        """Embeddings (B,D) of RGB images, of length 1."""
        pixels = self.prepare(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        return F.normalize(self.model.visual_projection(self.model.vision_model(pixels).pooler_output), dim=1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B,D) of texts, of length 1; a long text is cut to what the model takes."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenize(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return F.normalize(self.model.text_projection(self.model.text_model(**tokens).pooler_output), dim=1)


def clip_files(folder: Path) -> Read:
    """What transformers may read of a CLIP folder."""
    return Read(folder, tuple(sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS)))


class ClipScoreMetric:
    """100 cos(image, text), as torchmetrics counts it (arXiv:2104.08718 has 2.5 max(cos, 0) instead)."""

    columns: ClassVar[Mapping[str, Column]] = {"clip": Column("CLIP Score", "higher")}

    def __init__(self, config: ClipScore) -> None:
        self.config = config

    def reads(self) -> dict[str, Read]:
        return {"model": clip_files(Path(self.config.model))}

    def check(self) -> list[str]:
        return missing_files({"metrics.clip.model": self.config.model}, folders=("metrics.clip.model",))

    def measure(self, images: Sequence[Drawn], device: torch.device, work: Path) -> dict[str, Measured]:
        clip = Clip(Path(self.config.model), device)
        each: list[float] = []
        for part in batches(images, self.config.batch, open_image):
            texts = [image.prompt.text for image in images[len(each) : len(each) + len(part)]]
            each += (100 * (clip.images(part) * clip.texts(texts)).sum(1)).tolist()
        return {"clip": Measured(sum(each) / len(each), each)}


def load_head(path: Path, width: int) -> nn.Sequential:
    """The aesthetic predictor: linear layers without activation (the published `linearMSE`), from (B,D) to (B,1).

    The file names them layers.N.weight and .bias; what lies between is dropout. ValueError where they do not chain.
    """
    tensors = Tensors.open(path)
    places = sorted({int(found[1]) for name in tensors.entries if (found := LAYER.fullmatch(name))})
    layers: list[nn.Module] = []
    for place in places:
        names = (f"layers.{place}.weight", f"layers.{place}.bias")
        if not set(names) <= set(tensors.entries):
            raise ValueError(f"{path}: {names[0]} or {names[1]} is missing; expected sac+logos+ava1-l14-linearMSE.pth")
        weight, bias = (check_finite(tensors.get(name), name, path).float() for name in names)
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError(f"{path}: {names[0]} is {tuple(weight.shape)}, expected a layer that takes {width} values")
        layer = nn.Linear(width, len(weight))
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
        width = len(weight)
    if not layers or width != 1:
        raise ValueError(f"{path}: its layers end in {width} values, expected one; is it an aesthetic predictor?")
    return nn.Sequential(*layers).eval().requires_grad_(False)


class AestheticMetric:
    """LAION's aesthetic score, about 1 to 10."""

    columns: ClassVar[Mapping[str, Column]] = {"aesthetic": Column("Aesthetic Score", "higher")}

    def __init__(self, config: Aesthetic) -> None:
        self.config = config

    def reads(self) -> dict[str, Read]:
        return {"model": clip_files(Path(self.config.model)), "head": one_file(Path(self.config.head))}

    def check(self) -> list[str]:
        fields = {"metrics.aesthetic.model": self.config.model, "metrics.aesthetic.head": self.config.head}
        return missing_files(fields, folders=("metrics.aesthetic.model",))

    @torch.no_grad()
    def measure(self, images: Sequence[Drawn], device: torch.device, work: Path) -> dict[str, Measured]:
        clip = Clip(Path(self.config.model), device)
        head = load_head(Path(self.config.head), clip.model.config.projection_dim).to(device)
        each: list[float] = []
        for part in batches(images, self.config.batch, open_image):
            each += head(clip.images(part)).flatten().tolist()
        return {"aesthetic": Measured(sum(each) / len(each), each)}
