"""Train a small autoencoder (f8 KL or f32 DC-AE) on the toy's images, in the diffusers layout."""
# B batch, C latent channels, f spatial factor, H W pixels

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from train.batches import Batch
from train.config import StageConfig
from train.files import write_folder
from train.inputs import Read, one_part
from train.stages.base import Stage
from train.toy.pictures import ToyPictures, toy_read

SAMPLES_PER_PAIR = 64  # variants (size and place) of each pair that training sees; the next ones measure
MEASURED_PER_PAIR = 1


class AutoencoderConfig(StageConfig):
    """An autoencoder on toy/data."""

    kind: Literal["autoencoder"] = "autoencoder"
    data: str = Field("toy/data", description="folder of captions.json")
    architecture: Literal["AutoencoderKL", "AutoencoderDC"] = Field(description="diffusers class")
    model: dict[str, Any] = Field({}, description="arguments of that class; scaling and shift are measured, not given")
    start: str = Field("", description="autoencoder folder to go on from (STAGE/model); empty = random weights")
    kl: float = Field(2e-4, ge=0, description="AutoencoderKL: weight of the KL term, mean over latent elements")
    noise: float = Field(0.1, ge=0, description="AutoencoderDC: noise on the latent while training, unit: its spread")
    edges: float = Field(1.0, ge=0, description="weight of the L1 of neighbour differences")
    autocast: bool = Field(True, description="bfloat16 convolutions; weights, norms and loss stay float32")


class AutoencoderStage(Stage):
    """L1 at four scales + L1 of edges; writes config.json and diffusion_pytorch_model.safetensors."""

    Config = AutoencoderConfig
    config: AutoencoderConfig

    def reads(self) -> dict[str, Read]:
        reads = {"data": toy_read(self.config.data)}
        return {**reads, "start": one_part(self.context.resolve(self.config.start))} if self.config.start else reads

    def result_bytes(self, trained: int) -> int:
        return 4 * trained

    def setup(self) -> nn.Module:
        import diffusers

        self.pictures = ToyPictures(self.config.data)
        self.pairs = self.pictures.pairs("all")
        torch.manual_seed(self.context.recipe.seed)
        architecture = getattr(diffusers, self.config.architecture)
        if self.config.start:
            self.model = architecture.from_pretrained(self.context.resolve(self.config.start))
            return self.model.train().to(self.device)
        self.model = architecture(**self.config.model)
        if self.config.architecture == "AutoencoderKL":
            # Start with little noise on the latent: log-variances of -4 instead of 0.
            nn.init.constant_(self.model.encoder.conv_out.bias[self.config.model["latent_channels"] :], -4.0)
        else:
            # A residual branch ends in its norm, so it starts at RMS 1 however small its weights: calm it.
            for name, parameter in self.model.named_parameters():
                if name.endswith((".norm.weight", ".norm_out.weight")) and "_blocks." in name:
                    nn.init.constant_(parameter, 0.1)
        return self.model.to(self.device)

    def buckets(self) -> list[range]:
        return [range(len(self.pairs) * SAMPLES_PER_PAIR)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        x = torch.stack([self._draw(index) for index in batch.indices]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast):
            z, posterior = self._encode(x)
            noise = batch.normal("latent", z.shape[1:])
            if posterior is None:
                kl = z.new_zeros(())
                spread = (
                    z.detach().var(dim=(0, 2, 3)).mean().sqrt()
                )  # around each channel's mean, which carries nothing
                z = z + self.config.noise * spread * noise
            else:
                logvar = posterior.logvar.float()
                kl = 0.5 * (z.square() + logvar.exp() - 1 - logvar).mean()
                z = z + (0.5 * logvar).exp() * noise
            y = self.model.decode(z).sample.float()
        l1 = torch.stack([F.l1_loss(F.avg_pool2d(y, s), F.avg_pool2d(x, s)) for s in (1, 2, 4, 8)]).mean()
        edges = F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + F.l1_loss(y.diff(dim=3), x.diff(dim=3))
        total = l1 + self.config.edges * edges + self.config.kl * kl
        return total, {"l1": l1.detach(), "edges": edges.detach(), "kl": kl.detach(), "psnr": psnr(x, y)}

    def _draw(self, index: int) -> Tensor:
        pair, variant = divmod(index, SAMPLES_PER_PAIR)
        return self.pictures.draw(self.pairs[pair], variant)

    def _encode(self, x: Tensor) -> tuple[Tensor, Any]:
        """Latent and, for the KL autoencoder, its distribution."""
        encoded = self.model.encode(x)
        if self.config.architecture == "AutoencoderDC":
            return encoded.latent.float(), None
        return encoded.latent_dist.mode().float(), encoded.latent_dist

    @torch.no_grad()
    def preview(self, step: int) -> dict[str, Tensor]:
        x = self._measured(self.pairs[:: len(self.pairs) // 16][:16])
        y = self._reconstruct(x)[0]
        rows = torch.stack([x, y]).reshape(2, 2, 8, *x.shape[1:]).permute(1, 0, 2, 3, 4, 5)  # image above its copy
        grid = rows.reshape(4, 8, *x.shape[1:]).permute(2, 0, 3, 1, 4)
        return {"reconstruction": (grid.reshape(3, 4 * x.shape[2], 8 * x.shape[3]) + 1).div(2).clamp(0, 1)}

    def _measured(self, pairs: list[Any]) -> Tensor:
        return torch.stack([self.pictures.draw(pair, SAMPLES_PER_PAIR) for pair in pairs]).to(self.device)

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, _ = self._encode(x)
        return self.model.decode(z).sample, z

    @torch.no_grad()
    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        """Measure PSNR and the latent's statistics on unseen variants; write `model/` (float32)."""
        self.model.load_state_dict({**self.model.state_dict(), **weights})
        self.model.eval()
        x = self._measured(self.pairs)
        parts = [self._reconstruct(chunk) for chunk in x.split(32)]
        y, z = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if self.config.architecture == "AutoencoderDC":
            measured = {"scaling_factor": 1 / z.square().mean().sqrt().item()}
        else:
            measured = {"scaling_factor": 1 / z.std().item(), "shift_factor": z.mean().item()}
        self.model.register_to_config(**measured)
        if self.context.rank == 0:
            write_folder(self.folder / "model", self.model.save_pretrained)
        count = sum(p.numel() for p in self.model.parameters())
        return {"psnr": float(psnr(x, y)), "parameters": count, "pictures_measured": len(x), **measured}


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of 10 log10(4 / MSE) for images in -1..1, in dB."""
    mse = (x - y.detach().clamp(-1, 1)).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse)).mean()
