"""Stage `labels`: a class-conditional release with random weights, whose classes are the toy's subjects."""
# S subjects

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from dcgen.folder import TRANSFORMER, VAE, autoencoder_config, autoencoder_space
from train.config import StageConfig, one_of
from train.families import FAMILIES
from train.files import write_folder, write_json
from train.inputs import Read, one_file, tree
from train.stages.base import Context, Stage, complaints
from train.toy.pictures import ToyPictures

LABELLED = {name: family.toy_labels for name, family in FAMILIES.items() if family.toy_labels is not None}


class LabelsStage(Stage):
    """Writes FOLDER/release in the diffusers layout: the given VAE, a network as initialised, subjects as id2label."""

    class Config(StageConfig):
        kind: Literal["labels"] = "labels"
        backbone: str = Field(next(iter(LABELLED)), description="which base the release is")
        data: str = Field("toy/data", description="folder of captions.json")
        vae: str = Field(description="folder of the autoencoder that the release gets")
        transformer: dict[str, Any] = Field(
            description="arguments of the diffusers class, less channels, size and number of classes"
        )
        pixels: int = Field(128, ge=8, description="side of the images, which positions refer to")

        later_fields = ("backbone",)

        @field_validator("backbone")
        @classmethod
        def _a_family(cls, value: str) -> str:
            return one_of(value, LABELLED)

    config: Config

    def __init__(self, config: StageConfig, context: Context) -> None:
        super().__init__(config, context)
        self.vae = context.resolve(self.config.vae)

    def check(self) -> list[str]:
        return complaints(autoencoder_config, self.vae)

    def reads(self) -> dict[str, Read]:
        return {"data": one_file(Path(self.config.data) / "captions.json"), "vae": tree(self.vae)}

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        subjects = ToyPictures(self.config.data).subjects
        if self.context.rank == 0:
            write_folder(self.folder / "release", lambda folder: self._write_release(folder, subjects))
        return {"classes": len(subjects)}

    def _write_release(self, folder: Path, subjects: list[str]) -> None:
        import diffusers

        family, toy = FAMILIES[self.config.backbone], LABELLED[self.config.backbone]
        torch.manual_seed(self.context.recipe.seed)
        config = toy.config(autoencoder_space(self.vae), self.config.pixels, len(subjects))
        family.network_class()(**config, **self.config.transformer).save_pretrained(folder / TRANSFORMER)
        shutil.copytree(self.vae, folder / VAE)
        getattr(diffusers, toy.scheduler)(**toy.settings).save_pretrained(folder / "scheduler")
        index = {"_class_name": toy.pipeline, "_diffusers_version": diffusers.__version__}
        index |= {TRANSFORMER: ["diffusers", family.backbone.diffusers_class]}
        index |= {VAE: ["diffusers", autoencoder_config(self.vae)["_class_name"]]}
        index |= {"scheduler": ["diffusers", toy.scheduler]}
        write_json(folder / "model_index.json", {**index, "id2label": dict(enumerate(subjects))})
