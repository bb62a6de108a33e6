"""Stage `labels`: a class-conditional DiT release with random weights, whose classes are the toy's subjects."""
# S subjects

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dcgen.backbones import BACKBONES
from train.autoencoders import autoencoder_config, latent_space
from train.config import StageConfig
from train.files import write_folder, write_json
from train.models import network_class
from train.stages.base import Context, Stage, complaints
from train.toy.pictures import ToyPictures


class LabelsStage(Stage):
    """Writes FOLDER/release in the diffusers layout: the given VAE, a DiT as initialised, subjects as id2label."""

    class Config(StageConfig):
        kind: Literal["labels"] = "labels"
        data: str = Field("toy/data", description="folder of captions.json")
        vae: str = Field(description="folder of the autoencoder that the release gets")
        transformer: dict[str, Any] = Field(
            description="arguments of DiTTransformer2DModel, less channels, size and number of classes"
        )
        pixels: int = Field(128, ge=8, description="side of the pictures, which positions refer to")

    config: Config

    def __init__(self, config: StageConfig, context: Context) -> None:
        super().__init__(config, context)
        self.vae = context.resolve(self.config.vae)

    def check(self) -> list[str]:
        return complaints(autoencoder_config, self.vae)

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        subjects = ToyPictures(self.config.data).subjects
        if self.context.rank == 0:
            write_folder(self.folder / "release", lambda folder: self._write_release(folder, subjects))
        return {"classes": len(subjects)}

    def _write_release(self, folder: Path, subjects: list[str]) -> None:
        import diffusers

        space, backbone = latent_space(self.vae), BACKBONES["dit"]
        torch.manual_seed(self.context.recipe.seed)
        network = network_class(backbone)(
            in_channels=space.channels,
            out_channels=2 * space.channels,  # DDPM with a learned variance
            sample_size=self.config.pixels // space.spatial_factor,
            num_embeds_ada_norm=len(subjects),
            norm_type="ada_norm_zero",
            **self.config.transformer,
        )
        network.save_pretrained(folder / "transformer")
        shutil.copytree(self.vae, folder / "vae")
        diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False).save_pretrained(folder / "scheduler")
        index = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__}
        index |= {"transformer": ["diffusers", backbone.diffusers_class]}
        index |= {"vae": ["diffusers", autoencoder_config(self.vae)["_class_name"]]}
        index |= {"scheduler": ["diffusers", "DDIMScheduler"]}
        write_json(folder / "model_index.json", {**index, "id2label": dict(enumerate(subjects))})
