"""Frozen autoencoders of either kind behind one face: diffusers' AutoencoderKL and our DC-AE."""
# B batch, C latent channels, f spatial factor

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcgen.dcae import load_dcae
from dcgen.dcae.config import DCAEConfig
from dcgen.latent import SPACES, LatentSpace
from train.files import read_json, sha256


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
    config = autoencoder_config(folder)
    _weights(folder)
    if config["_class_name"] == "AutoencoderDC":
        model: nn.Module = load_dcae(folder, dtype=dtype, device=device)
    else:
        import diffusers

        model = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=dtype).to(device)
    space = getattr(model, "latent_space", None) or latent_space(folder)
    return Autoencoder(space, model.eval().requires_grad_(False), folder)


def autoencoder_config(folder: Path) -> dict[str, Any]:
    """config.json of an autoencoder folder; other classes and missing files are errors that name them."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; an autoencoder is a diffusers folder (config.json + safetensors)")
    config = read_json(path)
    if config.get("_class_name") not in ("AutoencoderKL", "AutoencoderDC"):
        raise ValueError(f"{path}: class {config.get('_class_name')!r}; expected AutoencoderKL or AutoencoderDC")
    return config


def latent_space(folder: str | Path) -> LatentSpace:
    """The latent space of an autoencoder folder, from its config.json alone (loads no weights)."""
    folder = Path(folder)
    config = autoencoder_config(folder)
    channels = config["latent_channels"]
    if config["_class_name"] == "AutoencoderDC":
        factor = DCAEConfig.from_diffusers(config).spatial_factor
    else:
        factor = 2 ** (len(config["block_out_channels"]) - 1)
    name = Path(config.get("_name_or_path") or folder.resolve().name).name.removesuffix("-diffusers")
    space = LatentSpace(name, channels, factor, config["scaling_factor"], config.get("shift_factor") or 0.0)
    same = [known for known in SPACES.values() if not replace(known, name="").differences(space)]
    return SPACES.get(name) or (same[0] if len(same) == 1 else space)


def autoencoder_identity(folder: str | Path) -> dict[str, Any]:
    """What decides its latents: part of a cache's fingerprint."""
    files = _weights(Path(folder))
    return {"config": autoencoder_config(Path(folder)), "weights": {file.name: sha256(file) for file in files}}


def _weights(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no .safetensors weights. A release may come without its autoencoder (toy/sana-base does): "
            "name the folder that has it, as `teacher` of a cache stage or `autoencoder` of a Pipeline"
        )
    return files
