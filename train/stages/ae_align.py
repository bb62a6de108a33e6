"""Stage `ae-align`: the paper's rival method, a DC-AE whose latent is pulled towards the base's own (A.9, Table 10)."""
# B batch, C latent channels, f spatial factor

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from train.autoencoders import load_autoencoder
from train.batches import Batch
from train.config import Optimizer, StageConfig
from train.data import DataConfig, data_files, open_source
from train.files import write_folder
from train.inputs import Read, one_part
from train.stages.base import Stage


class Aligned(nn.Module):
    """A DC-AE with a 1x1 map from its latent to the teacher's pooled one; the map is dropped afterwards."""

    def __init__(self, autoencoder: Any, channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.projection = nn.Conv2d(channels, teacher_channels, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (B,3,H,W) and the projected latent (B,C',H/f,W/f)."""
        latent = self.autoencoder.encode(images).latent
        return self.autoencoder.decode(latent).sample, self.projection(latent)


class AEAlignStage(Stage):
    """L1 reconstruction + ratio * MSE(projected latent, average-pooled teacher latent of unit variance).

    The paper gives the ratios (0.1, 1, 10) and not the loss: the projection and the pooling are this project's choice.
    """

    class Config(StageConfig):
        autoencoder: str = Field(description="folder of the DC-AE to fine-tune")
        teacher: str = Field(description="folder of the base's own autoencoder")
        data: DataConfig
        ratio: float = Field(1.0, ge=0, description="weight of the alignment term (Table 10: 0.1, 1, 10)")
        optimizer: Optimizer = Optimizer(lr=1e-5, clip=1.0)

    config: Config

    def reads(self) -> dict[str, Read]:
        data, resolve = self.config.data, self.context.resolve
        return {
            "data.path": Read(resolve(data.path), tuple(data_files(data, resolve(data.path)))),
            "autoencoder": one_part(resolve(self.config.autoencoder)),
            "teacher": one_part(resolve(self.config.teacher)),
        }

    def result_bytes(self, trained: int) -> int:
        return 4 * trained

    def setup(self) -> nn.Module:
        import diffusers

        self.source = open_source(self.config.data, self.context.resolve(self.config.data.path))
        self.teacher = load_autoencoder(self.context.resolve(self.config.teacher), self.device)
        student = diffusers.AutoencoderDC.from_pretrained(self.context.resolve(self.config.autoencoder))
        torch.manual_seed(self.context.recipe.seed)
        channels = student.config.latent_channels
        self.module = Aligned(student.requires_grad_(True), channels, self.teacher.space.channels).to(self.device)
        return self.module

    def buckets(self) -> Sequence[Sequence[int]]:
        groups: dict[tuple[int, int], list[int]] = {}
        for index in range(len(self.source)):
            groups.setdefault(self.source.size(index), []).append(index)
        return [groups[size] for size in sorted(groups)]

    def describe_samples(self, indices: Sequence[int]) -> list[str]:
        return [self.source.name(index) for index in indices]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        images = torch.stack([self.source.image(index) for index in batch.indices]).to(self.device)
        decoded, projected = self.module(images)
        teacher = self.teacher.space.normalize(self.teacher.encode(images))
        pooled = F.adaptive_avg_pool2d(teacher, projected.shape[-2:])
        reconstruction, alignment = F.l1_loss(decoded, images), F.mse_loss(projected, pooled)
        return reconstruction + self.config.ratio * alignment, {"l1": reconstruction, "alignment": alignment}

    @torch.no_grad()
    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        import diffusers

        folder = self.context.resolve(self.config.autoencoder)
        trained = diffusers.AutoencoderDC.from_pretrained(folder)
        prefix = "autoencoder."
        trained.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
        numbers = self._measure(trained.to(self.device).eval())
        trained.register_to_config(scaling_factor=numbers["scaling_factor"])
        if self.context.rank == 0:
            write_folder(self.folder / "model", trained.save_pretrained)
        return numbers

    def _measure(self, model: Any) -> dict[str, Any]:
        """Reconstruction and 1 / RMS of the latent on up to 64 images of one size."""
        indices = self.buckets()[0][:64]
        images = torch.stack([self.source.image(index) for index in indices]).to(self.device)
        latent = model.encode(images).latent
        l1 = F.l1_loss(model.decode(latent).sample, images)
        return {"l1": l1.item(), "scaling_factor": latent.square().mean().rsqrt().item(), "pictures": len(indices)}
