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
from train import distributed
from train.autoencoders import load_autoencoder
from train.batches import Batch
from train.cache import Cache, is_online
from train.conditioning import Cond, trim
from train.config import StageConfig
from train.distributed import Ranks
from train.family import Family, RawOutput, TextEncoder
from train.inputs import Read
from train.models import network_files, network_of, products_in
from train.objective import Objective, objective_errors, objective_loss
from train.sample import euler, grid, seeded_noise
from train.stages.base import CachedStage
from train.text_parts import text_files

LEVELS = 8  # noise levels of validation
VALIDATION_SEED = 20_250_929  # of its noise and guidance, apart from any run's
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
    validation_samples: int = Field(
        0, ge=0, description="samples of the cache held out from training, on which the loss is measured; 0 = none"
    )
    preview_prompts: tuple[str, ...] = ()
    preview_guidance: float = Field(3.5, ge=0, description="g of preview images; by true CFG without an embedding")
    preview_steps: int = Field(20, ge=1)
    preview_seed: int = 0

    later_fields: ClassVar[tuple[str, ...]] = ("validation_samples",)


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
    def recomputes(self) -> bool:
        """Whether the backward pass computes blocks again."""
        return False

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
        with products_in(self.autocast_dtype, self.device), self._attention(x):
            return self.family.velocity(model, x, sigma, cond, scale).float()

    @property
    def raw(self) -> RawOutput | None:
        """What the network itself gives, for loss ddpm; None for a family that was not trained by it."""
        return self._raw_output if self.family.denoises else None

    def _raw_output(self, x: Tensor, step: Tensor, cond: Cond) -> Tensor:
        with products_in(self.autocast_dtype, self.device), self._attention(x):
            return self.family.raw_output(self.model, x, step, cond)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        latents, cond = self.samples(batch)
        return objective_loss(
            self.config.objective, self.velocity, batch, latents, cond, self.empty,
            tokens=self.tokens(latents), distilled=self.distilled, raw=self.raw,
        )  # fmt: skip

    # ---- validation

    def buckets(self) -> Sequence[Sequence[int]]:
        """What trains: the cache without what is held out."""
        held = set(self.held_out())
        return [[number for number in bucket if number not in held] for bucket in self.cache.buckets()]

    def held_out(self) -> list[int]:
        """Numbers of the samples that do not train, evenly spread over the cache; ValueError for more than half."""
        count, samples = self.config.validation_samples, len(self.cache)
        if 2 * count > samples:
            raise ValueError(f"validation_samples: {count} is more than half of the {samples} samples; hold out fewer")
        return [number * samples // count for number in range(count)]

    @property
    def validates(self) -> bool:
        return self.config.validation_samples > 0

    def validate(self) -> dict[str, float]:
        """The loss at LEVELS fixed noise levels, quantiles of those that training draws, and their mean.

        Noise, guidance and captions are those of the sample and the level, the same at every step; nothing is dropped.
        """
        training = self.model.training
        self.model.eval()
        sums = torch.zeros(LEVELS, dtype=torch.float64)
        total = 0.0
        held, world = set(self.held_out()), self.context.world
        rows = max(1, self.config.batch // (world * self.config.accumulate))
        for bucket in self.cache.buckets():
            kept = [number for number in bucket if number in held]
            for start in range(0, len(kept), rows * world):
                part = kept[start : start + rows * world][self.context.rank :: world]
                # every rank makes the same forward calls; what pads a part does not count
                weight = torch.tensor([1.0] * len(part) or [0.0], dtype=torch.float64)
                indices = tuple(part or kept[:1])
                total += float(weight.sum())
                for level in range(LEVELS):
                    batch = Batch(VALIDATION_SEED, level, indices, indices, self.device)
                    sums[level] += (weight * self._errors(batch, level).double().cpu()).sum()
        self.model.train(training)
        ranks = Ranks(self.context.rank, world, self.device)
        *means, total = distributed.mean([*sums.tolist(), total], ranks)
        by_level = [value / total for value in means]
        return {"loss": sum(by_level) / LEVELS, **{f"loss_{number}": value for number, value in enumerate(by_level)}}

    def _errors(self, batch: Batch, level: int) -> Tensor:
        latents, cond = self.samples(batch)
        return objective_errors(
            self.config.objective, self.velocity, batch, latents, cond, self.empty,
            tokens=self.tokens(latents), distilled=self.distilled, raw=self.raw, levels=LEVELS, level=level,
        )  # fmt: skip

    def samples(self, batch: Batch) -> tuple[Tensor, Cond]:
        """Latents (B,C,h,w) of a batch and their conditioning."""
        latents = self.cache.latents(batch.indices, self.side).to(self.device)
        text = self._text(self.cache.drawn_captions(batch.indices, batch.uniform("caption")))
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

    def _attention(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        """On the CPU, plain attention for short sequences: flash attention in bfloat16 takes 5x longer back.

        Not where blocks are computed again in the backward pass, which happens outside of this context.
        """
        if self.device.type == "cpu" and self.tokens(x) <= PLAIN_ATTENTION_TOKENS and not self.recomputes:
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()
