"""Stage `pretrain`: the toy's base, a whole FLUX, SANA or DiT trained on its own f8 latents by Eq. 2 or DDPM."""
# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dcgen import schedule
from train.autoencoders import check_autoencoder, load_autoencoder
from train.batches import Batch
from train.cache import Cache
from train.ddpm import raw_output
from train.files import write_folder
from train.generate import base_schedule
from train.models import base_backbone, base_patch_size, load_network
from train.objective import Objective, objective_loss
from train.sample import euler, grid, seeded_noise
from train.stages.base import CachedStage, PreviewConfig, complaints
from train.text import check_text, load_text


class BaseConfig(PreviewConfig):
    """Shared by pretrain and distill: a base network trained whole."""

    base: str = Field(description="release folder to start from")
    cache: str = Field("cache", description="cache stage or folder; its `teacher` latents are the base's own")
    objective: Objective = Objective(loss="flow")
    autocast: bool = Field(True, description="bfloat16 matrix products; weights and loss stay float32")


class BaseStage(CachedStage):
    """Loads a release, trains its transformer, writes FOLDER/release with the new transformer."""

    Config = BaseConfig
    config: BaseConfig
    preview_by_embedding = True  # guidance through the embedding; False = true CFG, two passes a step

    def check(self) -> list[str]:
        if self.context.pending(self.config.base):
            return []
        base = self.context.resolve(self.config.base)
        problems = complaints(base_backbone, base)
        if not problems and self.config.preview_every and self.config.preview_prompts:
            problems = complaints(base_schedule, base) + complaints(check_text, base)
            problems += complaints(check_autoencoder, base / "vae")
        return problems

    def setup(self) -> nn.Module:
        self.base = self.context.resolve(self.config.base)
        self.cache = Cache(self.context.resolve(self.config.cache))
        self.space = self.cache.spaces["teacher"]
        self.backbone, config = base_backbone(self.base)
        self.patch = base_patch_size(config, self.space.channels)
        self.distilled = bool(config.get("guidance_embeds"))
        self.model = load_network(self.base, torch.float32, self.device).requires_grad_(True)
        self.empty = {name: value.to(self.device) for name, value in self.cache.text([0]).items()}
        return self.model

    def shard_units(self) -> Sequence[nn.Module]:
        return self.backbone.blocks(self.model)

    def velocity(self, x: Tensor, sigma: Tensor, cond: dict[str, Tensor], scale: Tensor | None) -> Tensor:
        """Velocity (B,C,h,w) of the network in training."""
        return self.velocity_of(self.model, x, sigma, cond, scale)

    def velocity_of(
        self, model: nn.Module, x: Tensor, sigma: Tensor, cond: dict[str, Tensor], scale: Tensor | None
    ) -> Tensor:
        """Velocity (B,C,h,w) of a network, float32."""
        with self._autocast():
            return self.backbone.velocity(model, x, sigma, cond, scale).float()

    def _raw(self, x: Tensor, step: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with self._autocast():
            return raw_output(self.model, x, step, cond)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.config.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def samples(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (B,C,h,w) of a batch and their text."""
        latents = self.cache.latents(batch.indices, "teacher").to(self.device)
        text = self.cache.text(self.cache.caption_numbers(batch.indices))
        return latents, {name: value.to(self.device) for name, value in text.items()}

    def tokens(self, latents: Tensor) -> int:
        """Image tokens of latents (B,C,h,w)."""
        return latents.shape[2] * latents.shape[3] // self.patch**2

    def preview(self, step: int) -> dict[str, Tensor]:
        c = self.config
        if not c.preview_prompts:
            return {}
        if not hasattr(self, "decoder"):
            self.decoder = load_autoencoder(self.base / "vae", self.device)
            encode = load_text(self.base, self.device, torch.float32, self.cache.text_tokens)
            self.preview_text = encode(c.preview_prompts)
        like = self.cache.latents([self.cache.buckets()[0][0]], "teacher")
        seeds = range(c.preview_seed, c.preview_seed + len(c.preview_prompts))
        noise = seeded_noise(seeds, like.shape[1:]).to(self.device)
        rule = base_schedule(self.base)
        sigmas = schedule.sigmas(c.preview_steps, tokens=self.tokens(like), channels=self.space.channels, **rule)
        how: dict[str, Any] = {"scale": c.preview_guidance}
        if not self.preview_by_embedding:
            how = {"scale": 1.0 if self.distilled else None, "empty": self.empty, "w": c.preview_guidance - 1}
        latents = euler(self.velocity, noise, sigmas, self.preview_text, **how)
        return {"samples": grid(self.decoder.decode(self.space.denormalize(latents)), 8)}

    @torch.no_grad()
    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        trained = load_network(self.base, torch.float32, "cpu")  # anew: the one in training may be sharded
        trained.load_state_dict(weights)
        if self.context.rank == 0:
            write_folder(self.folder / "release", lambda folder: self._write_release(folder, trained))
        return {"parameters": sum(t.numel() for t in weights.values())}

    def _write_release(self, folder: Path, network: Any) -> None:
        shutil.copytree(self.base, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
        network.save_pretrained(folder / "transformer")


class PretrainStage(BaseStage):
    """Flow matching or DDPM with caption dropout; a guidance embedding, if there is one, gets g = 1 throughout."""

    class Config(BaseConfig):
        kind: Literal["pretrain"] = "pretrain"

    config: Config
    preview_by_embedding = False

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        latents, text = self.samples(batch)
        return objective_loss(
            self.config.objective, self.velocity, batch, latents, text, self.empty,
            tokens=self.tokens(latents), distilled=self.distilled, raw=self._raw,
        )  # fmt: skip
