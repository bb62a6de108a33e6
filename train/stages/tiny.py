"""Stage `tiny`: a random release and DC-AE of a few kilobytes, and images, so that a recipe runs in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from dcgen.folder import TRANSFORMER, VAE
from train.config import StageConfig, one_of
from train.families import DEFAULT, FAMILIES
from train.family import Family
from train.files import write_folder, write_json
from train.stages.base import Stage
from train.tiny import COLORS, SIDES, caption, tiny_dcae

PIXELS = 64


class TinyStage(Stage):
    """Writes FOLDER/release (diffusers layout), FOLDER/dc-ae (f16) and FOLDER/pictures, all random from the seed."""

    class Config(StageConfig):
        backbone: str = Field(DEFAULT, description="which base the release is")
        pictures: int = Field(12, ge=1)
        guidance_embeds: bool = Field(True, description="whether the base takes a guidance scale (is distilled)")

        @field_validator("backbone")
        @classmethod
        def _a_family(cls, value: str) -> str:
            return one_of(value, FAMILIES)

    config: Config

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        if self.context.rank == 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.context.recipe.seed)
                family, guided = FAMILIES[self.config.backbone], self.config.guidance_embeds
                write_folder(self.folder / "release", lambda f: write_tiny(f, family, guided))
                write_folder(self.folder / "dc-ae", lambda f: tiny_dcae().save_pretrained(f))
            count, seed = self.config.pictures, self.context.recipe.seed
            write_folder(self.folder / "pictures", lambda f: _write_images(f, count, seed))
        return {"pictures": self.config.pictures}


def write_tiny(folder: Path, family: Family, guidance_embeds: bool = True) -> None:
    """A release of the family with random weights."""
    import diffusers

    tiny = family.tiny(guidance_embeds)
    transformer = family.network_class()(**tiny.config)
    # diffusers' own initialisation leaves modulation near zero: make every path count
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    tiny.settle(transformer)
    scheduler, settings = tiny.scheduler
    parts = {TRANSFORMER: transformer, VAE: tiny.autoencoder(), "scheduler": getattr(diffusers, scheduler)(**settings)}
    index: dict[str, Any] = {"_class_name": tiny.pipeline, "_diffusers_version": "0.36.0"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    for number, (encoder, write) in enumerate(tiny.text.items()):
        end = f"_{number + 1}" if number else ""
        write(folder / f"text_encoder{end}", folder / f"tokenizer{end}")
        index |= {f"text_encoder{end}": ["transformers", encoder]}
        index |= {f"tokenizer{end}": ["transformers", "PreTrainedTokenizerFast"]}
    write_json(folder / "model_index.json", {**index, **tiny.index})


def _write_images(folder: Path, count: int, seed: int) -> None:
    """Coloured squares with captions beside them."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        name = list(COLORS)[number % len(COLORS)]
        side = SIDES[number // len(COLORS) % 2]
        array = rng.integers(0, 60, (PIXELS, PIXELS, 3), dtype=np.uint8) + (0 if number % 2 else 150)
        start = 6 if side == "left" else PIXELS - 30
        array[20:44, start : start + 24] = COLORS[name]
        Image.fromarray(array.astype(np.uint8)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption(name, side), encoding="utf-8")
