"""Images from a release folder, as it is or moved by a DC-Gen adapter: what demo, benchmarks and synthesis share."""
# B batch, C latent channels, h w latent rows and columns, f spatial factor

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgen.adapter import check_model, load_adapter, merge
from dcgen.folder import VAE
from dcgen.release import open_model
from train.autoencoders import Autoencoder, load_autoencoder
from train.conditioning import Cond, of_samples, trim
from train.models import load_network, moved_network, products_in, read_base
from train.sample import EULER, SOLVERS, seeded_noise
from train.text import load_text


class Pipeline:
    """A base model with its autoencoder and text encoders, ready to draw.

    With `adapter` (and the new autoencoder's folder) it is the DC-Gen model; `strength` scales its LoRA, 0 = alignment
    only. The network is merged once, so an image costs what the deployed model costs. A release that does not bring
    its own autoencoder needs `autoencoder` too.
    """

    def __init__(
        self,
        base: str | Path,
        *,
        adapter: str | Path | None = None,
        autoencoder: str | Path | None = None,
        strength: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        text_tokens: int | None = None,
    ) -> None:
        base = Path(base)
        if adapter is not None and autoencoder is None:
            raise ValueError("a moved model needs both adapter= and autoencoder=")
        self.family, self.release = read_base(base)
        if names := of_samples(self.family.fields):
            raise ValueError(f"{self.family.backbone.title} also takes {', '.join(names)}, which prompts do not say")
        self.distilled = self.release.distilled
        self.dtype = dtype
        self.autoencoder: Autoencoder = load_autoencoder(autoencoder or base / VAE, device, dtype)
        if adapter is None:
            self._check_own_latent(base)
        self.schedule, self.patch_size = self.release.schedule, self.release.patch_size
        self.model = (
            load_network(base, dtype, device) if adapter is None else self._moved(base, Path(adapter), strength)
        )
        self.model.to(device).eval()
        self.encode = load_text(base, device, dtype, text_tokens)
        self.device = device

    def _check_own_latent(self, base: Path) -> None:
        space = self.autoencoder.space
        differing = self.release.latent.differences(space)
        if differing:
            raise ValueError(f"{self.autoencoder.folder} is not the autoencoder of {base}: {'; '.join(differing)}")

    def _moved(self, base: Path, path: Path, strength: float) -> torch.nn.Module:
        adapter = load_adapter(path)
        check_model(adapter, open_model(base))
        adapter.check_latent(self.autoencoder.space, str(self.autoencoder.folder))
        self.schedule, self.patch_size = adapter.schedule, adapter.patch_size
        model, _ = moved_network(base, adapter.latent.channels, adapter.patch_size, 0, self.dtype)
        model.load_state_dict(merge(model.state_dict(), adapter, strength))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return model

    def tokens(self, height: int, width: int) -> int:
        """Tokens of an image of that size in pixels."""
        return self.family.backbone.tokens(height, width, self.autoencoder.space.spatial_factor, self.patch_size)

    def text(self, prompts: Sequence[str]) -> Cond:
        """Conditioning (B,...) of prompts."""
        return trim(self.encode(prompts), self.family.ragged)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, scale: Tensor | None) -> Tensor:
        """The network's velocity (B,C,h,w) in model space, float32, computed as in training."""
        with products_in(self.dtype, self.device):
            return self.family.velocity(self.model, x, sigma, cond, scale).float()

    @torch.no_grad()
    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], height: int, width: int, *, steps: int, guidance: float,
        cfg_w: float = 0.0, solver: str = EULER,
    ) -> Tensor:  # fmt: skip
        """Model-space latents (B,C,h,w). guidance: g = 1 + w of the embedding; cfg_w > 0: true CFG (Eq. 4) on top.

        solver: a key of train.sample.SOLVERS.
        """
        space = self.autoencoder.space
        shape = (space.channels, *space.latent_size(height, width))
        sigmas = self.schedule.sigmas(steps, tokens=self.tokens(height, width), channels=shape[0])
        noise = seeded_noise(seeds, shape).to(self.device)
        scale = guidance if self.distilled else None
        empty = self.text([""]) if cfg_w > 0 else None
        return SOLVERS[solver](self.velocity, noise, sigmas, self.text(prompts), scale=scale, empty=empty, w=cfg_w)

    @torch.no_grad()
    def images(
        self, prompts: Sequence[str], seeds: Sequence[int], height: int, width: int, *, steps: int, guidance: float,
        cfg_w: float = 0.0, solver: str = EULER,
    ) -> Tensor:  # fmt: skip
        """(B,3,H,W) in -1..1; one prompt and one seed per image; the rest as for latents()."""
        how: dict[str, Any] = {"steps": steps, "guidance": guidance, "cfg_w": cfg_w, "solver": solver}
        latents = self.latents(prompts, seeds, height, width, **how)
        return self.autoencoder.decode(self.autoencoder.space.denormalize(latents))
