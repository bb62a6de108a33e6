"""Frozen autoencoders of either kind behind one face: diffusers' AutoencoderKL and our DC-AE."""
# B batch, C latent channels, f spatial factor

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcgen.dcae import load_dcae
from dcgen.files import weight_files
from dcgen.folder import autoencoder_config, autoencoder_space, open_autoencoder
from dcgen.latent import LatentSpace
from train.files import sha256


@dataclass
class Autoencoder:
    """A frozen autoencoder. encode/decode work on raw latents; `space` scales them for a diffusion model."""

    space: LatentSpace
    model: Any  # a DCAE or diffusers.AutoencoderKL
    folder: Path

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in -1..1 -> raw latent (B,C,H/f,W/f), float32; a variational one gives its mean."""
        first = next(self.model.parameters())
        images = images.to(first.device, first.dtype)
        if hasattr(self.model, "quant_conv"):
            return self.model.encode(images).latent_dist.mode().float()
        return self.model.encode(images).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Raw latent (B,C,h,w) -> (B,3,h*f,w*f) in -1..1, float32."""
        first = next(self.model.parameters())
        latents = latents.to(first.device, first.dtype)
        decoded = self.model.decode(latents)
        return (decoded if isinstance(decoded, Tensor) else decoded.sample).float().clamp(-1, 1)


def load_autoencoder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Autoencoder:
    """Load a diffusers autoencoder folder (AutoencoderKL or AutoencoderDC), frozen and in eval mode."""
    folder = Path(folder)
    opened = open_autoencoder(folder)
    _weights(folder)
    if opened.is_dcae:
        model: nn.Module = load_dcae(opened.dcae_source(), dtype=dtype, device=device)
    else:
        import diffusers

        model = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True).to(device)
    return Autoencoder(opened.latent, model.eval().requires_grad_(False), folder)


def check_autoencoder(folder: str | Path) -> None:
    """An error that names the folder unless it has a config that can be read and weights; loads none."""
    autoencoder_space(folder)
    _weights(Path(folder))


def autoencoder_identity(folder: str | Path, digest: Callable[[Path], str] = sha256) -> dict[str, Any]:
    """What decides its latents: part of a cache's config_hash."""
    files = _weights(Path(folder))
    return {"config": autoencoder_config(Path(folder)), "weights": {file.name: digest(file) for file in files}}


def _weights(folder: Path) -> list[Path]:
    files = weight_files(folder) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no .safetensors weights. A release may come without its autoencoder, as one of the toy's "
            "does: name the folder that has it, as `teacher` of a cache stage or `autoencoder` of a Pipeline"
        )
    return files
