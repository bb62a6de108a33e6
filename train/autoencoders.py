"""Frozen autoencoders of each kind behind one face: diffusers' AutoencoderKL, that of FLUX.2, and our DC-AE."""
# B batch, C latent channels, f spatial factor

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
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
    model: Any  # a DCAE, or a variational autoencoder of diffusers
    folder: Path

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in -1..1 -> raw latent (B,C,H/f,W/f), float32; a variational one gives its mean."""
        first = next(self.model.parameters())
        images = images.to(first.device, first.dtype)
        encoded = self.model.encode(images)
        latents = encoded if isinstance(encoded, Tensor) else encoded.latent_dist.mode()
        return packed(latents.float(), self.space.packing)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Raw latent (B,C,h,w) -> (B,3,h*f,w*f) in -1..1, float32."""
        first = next(self.model.parameters())
        latents = unpacked(latents, self.space.packing).to(first.device, first.dtype)
        decoded = self.model.decode(latents)
        return (decoded if isinstance(decoded, Tensor) else decoded.sample).float().clamp(-1, 1)


def load_autoencoder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Autoencoder:
    """Load a diffusers autoencoder folder of one of the AUTOENCODERS classes, frozen and in eval mode."""
    folder = Path(folder)
    opened = open_autoencoder(folder)
    _weights(folder)
    if opened.is_dcae:
        model: nn.Module = load_dcae(opened.dcae_source(), dtype=dtype, device=device)
    else:
        import diffusers

        kind = getattr(diffusers, opened.config["_class_name"])
        model = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True).to(device)
    return Autoencoder(opened.latent, model.eval().requires_grad_(False), folder)


def packed(latents: Tensor, p: int) -> Tensor:
    """The autoencoder's own latents (B,c,h*p,w*p) -> (B,c*p*p,h,w), channel-major as FLUX.2's pipelines pack them."""
    return rearrange(latents, "B c (h ph) (w pw) -> B (c ph pw) h w", ph=p, pw=p)


def unpacked(latents: Tensor, p: int) -> Tensor:
    """Inverse of packed."""
    return rearrange(latents, "B (c ph pw) h w -> B c (h ph) (w pw)", ph=p, pw=p)


def check_autoencoder(folder: str | Path) -> None:
    """An error that names the folder unless it has a config that can be read and weights; loads none."""
    autoencoder_space(folder)
    _weights(Path(folder))


def same_autoencoder(teacher: Path, student: Path) -> bool:
    """Whether both sides of a cache are one autoencoder, whose latents are stored once; the folders may be absent."""
    return teacher.resolve() == student.resolve()


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
