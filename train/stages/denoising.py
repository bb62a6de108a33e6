"""What the stages share that train a denoising network: its call, its loss on a batch, and previews."""
# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcgen.backbones import Backbone
from dcgen.folder import TRANSFORMER
from dcgen.latent import LatentSpace
from dcgen.schedule import Schedule
from train.autoencoders import load_autoencoder
from train.batches import Batch
from train.cache import Cache, is_online
from train.conditioning import Cond, trim
from train.config import StageConfig
from train.family import Family, RawOutput, TextEncoder
from train.inputs import Read
from train.models import network_files, network_of
from train.objective import Objective, objective_loss
from train.sample import euler, grid, seeded_noise
from train.stages.base import CachedStage
from train.text_parts import text_files

PLAIN_ATTENTION_TOKENS = 64  # of the image; at 256 with the text's, flash attention is faster again


def text_of(cache: Cache, numbers: Sequence[int], online: TextEncoder | None, family: Family) -> Cond:
    """Conditioning (B,...) of captions of a cache by number: as stored, or by an encoder where it stores none."""
    if online is None:
        return cache.text(numbers)
    return trim(online([cache.captions[number] for number in numbers]), family.ragged)


class DenoisingConfig(StageConfig):
    """Fields of a stage that trains a denoising network, and draws images with it meanwhile."""

    base: str = Field(description="release folder of the base model")
    cache: str = Field("cache", description="cache stage or folder")
    objective: Objective = Objective()
    preview_prompts: tuple[str, ...] = ()
    preview_guidance: float = Field(3.5, ge=0, description="g of preview images; by true CFG without an embedding")
    preview_steps: int = Field(20, ge=1)
    preview_seed: int = 0


class DenoisingStage(CachedStage):
    """A network of a family on one side of a cache. setup() of a subclass sets what is declared here."""

    Config = DenoisingConfig
    config: DenoisingConfig
    side: ClassVar[str]
    """Whose latents of the cache train: "teacher", the base's own, or "student"."""

    family: Family
    base: Path
    model: nn.Module
    space: LatentSpace
    patch_size: int
    distilled: bool
    schedule: Schedule
    """Of previews."""

    def reads(self) -> dict[str, Read]:
        """The base's network, its text side where captions are embedded in training, and the cache."""
        base = self.context.resolve(self.config.base)
        files = network_files(base)
        if is_online(self.context.resolve(self.config.cache)) and (base / TRANSFORMER / "config.json").is_file():
            files += text_files(base, network_of(base)[0].text_parts)
        return {"base": Read(base, tuple(files)), "cache": self.cache_read(self.config.cache)}

    @property
    def backbone(self) -> Backbone:
        return self.family.backbone

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type that matrix products are computed in; None = that of the weights."""
        raise NotImplementedError

    @property
    def text_dtype(self) -> torch.dtype:
        """The type that text encoders run in."""
        return torch.float32

    def prepare_text(self) -> None:
        """The empty prompt, and the text encoders where the cache has no text."""
        self.text_online: TextEncoder | None = None if self.cache.has_text else self._text_encoder()
        self.empty = self._to_device(self._text([0]))

    def shard_units(self) -> Sequence[nn.Module]:
        return self.family.blocks(self.model)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, scale: Tensor | None) -> Tensor:
        """Velocity (B,C,h,w) of the network in training, float32."""
        return self.velocity_of(self.model, x, sigma, cond, scale)

    def velocity_of(self, model: nn.Module, x: Tensor, sigma: Tensor, cond: Cond, scale: Tensor | None) -> Tensor:
        """Velocity (B,C,h,w) of a network of the family, float32."""
        with self._autocast(), self._attention(x):
            return self.family.velocity(model, x, sigma, cond, scale).float()

    @property
    def raw(self) -> RawOutput | None:
        """What the network itself gives, for loss ddpm; None for a family that was not trained by it."""
        return self._raw_output if self.family.denoises else None

    def _raw_output(self, x: Tensor, step: Tensor, cond: Cond) -> Tensor:
        with self._autocast(), self._attention(x):
            return self.family.raw_output(self.model, x, step, cond)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        latents, cond = self.samples(batch)
        return objective_loss(
            self.config.objective, self.velocity, batch, latents, cond, self.empty,
            tokens=self.tokens(latents), distilled=self.distilled, raw=self.raw,
        )  # fmt: skip

    def samples(self, batch: Batch) -> tuple[Tensor, Cond]:
        """Latents (B,C,h,w) of a batch and their conditioning."""
        latents = self.cache.latents(batch.indices, self.side).to(self.device)
        text = self._text(self.cache.caption_numbers(batch.indices))
        return latents, self._to_device(text | self.cache.of_samples(batch.indices, self.side))

    def tokens(self, latents: Tensor) -> int:
        """Image tokens of latents (B,C,h,w)."""
        return latents.shape[2] * latents.shape[3] // self.patch_size**2

    def _text(self, captions: Sequence[int]) -> Cond:
        return text_of(self.cache, captions, self.text_online, self.family)

    def _text_encoder(self) -> TextEncoder:
        return self.family.text_encoder(self.base, self.device, self.text_dtype, self.cache.text_tokens)

    # ---- previews

    def preview_autoencoder(self) -> Path | None:
        """Folder of the autoencoder that decodes previews; None = there are none."""
        raise NotImplementedError

    def preview_seeds(self) -> list[int]:
        """A seed for each preview prompt."""
        raise NotImplementedError

    @property
    def preview_columns(self) -> int:
        """Images in a row."""
        return len(self.config.preview_prompts)

    @property
    def preview_by_embedding(self) -> bool:
        """Whether previews are guided through the embedding; False = true CFG, two passes a step."""
        return self.distilled

    def preview(self, step: int) -> dict[str, Tensor]:
        folder, c = self.preview_autoencoder(), self.config
        if not c.preview_prompts or folder is None:
            return {}
        if not hasattr(self, "decoder"):
            self.decoder = load_autoencoder(folder, self.device)
            encode = self.text_online or self._text_encoder()
            self.preview_text = trim(encode(c.preview_prompts), self.family.ragged)
        sample = self.cache.buckets()[0][0]
        latents, seeds = self.cache.latents([sample], self.side), self.preview_seeds()
        noise = seeded_noise(seeds, latents.shape[1:]).to(self.device)
        sigmas = self.schedule.sigmas(c.preview_steps, tokens=self.tokens(latents), channels=self.space.channels)
        cond = self.preview_text | self._to_device(self.cache.of_samples([sample] * len(seeds), self.side))
        guided: dict[str, Any] = {"scale": c.preview_guidance}
        if not self.preview_by_embedding:
            guided = {"scale": 1.0 if self.distilled else None, "empty": self.empty, "w": c.preview_guidance - 1}
        images = self.decoder.decode(self.space.denormalize(euler(self.velocity, noise, sigmas, cond, **guided)))
        return {"samples": grid(images, self.preview_columns)}

    def _to_device(self, cond: Cond) -> Cond:
        return {name: value.to(self.device) for name, value in cond.items()}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def _attention(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        """On the CPU, plain attention for short sequences: flash attention in bfloat16 takes 5x longer back."""
        if self.device.type == "cpu" and self.tokens(x) <= PLAIN_ATTENTION_TOKENS:
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()
