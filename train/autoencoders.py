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
from dcgen.fields import check_fields, optional, shown, text
from dcgen.files import naming, weight_files
from dcgen.latent import LatentSpace
from dcgen.release import kl_space
from dcgen.spaces import SPACES
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

        model = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True).to(device)
    space = getattr(model, "latent_space", None) or latent_space(folder)
    return Autoencoder(space, model.eval().requires_grad_(False), folder)


def autoencoder_config(folder: Path) -> dict[str, Any]:
    """config.json of an autoencoder folder; other classes and missing files are errors that name them."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; an autoencoder is a diffusers folder (config.json + safetensors)")
    config = read_json(path)
    if config.get("_class_name") not in ("AutoencoderKL", "AutoencoderDC"):
        raise ValueError(f"{path}: class {shown(config.get('_class_name'))}; expected AutoencoderKL or AutoencoderDC")
    with naming(path):
        check_fields(config, {"_name_or_path": optional(text(4096))})
        _space(config)
    return config


def _space(config: dict[str, Any]) -> LatentSpace:
    """Latent space, without a name, that a (class-checked) config describes."""
    if config["_class_name"] == "AutoencoderKL":
        return kl_space(config)
    dcae = DCAEConfig.from_diffusers(config)
    if dcae.scaling_factor is None:
        raise ValueError("scaling_factor is missing")
    return LatentSpace("", dcae.latent_channels, dcae.spatial_factor, dcae.scaling_factor)


def latent_space(folder: str | Path) -> LatentSpace:
    """The latent space of an autoencoder folder, from its config.json alone (loads no weights)."""
    folder = Path(folder)
    config = autoencoder_config(folder)
    name = Path(config.get("_name_or_path") or folder.resolve().name).name.removesuffix("-diffusers")
    space = replace(_space(config), name=name)
    same = [known for known in SPACES.values() if not replace(known, name="").differences(space)]
    return SPACES.get(name) or (same[0] if len(same) == 1 else space)


def check_autoencoder(folder: str | Path) -> None:
    """An error that names the folder unless it has a config that can be read and weights; loads none."""
    latent_space(folder)
    _weights(Path(folder))


def autoencoder_identity(folder: str | Path) -> dict[str, Any]:
    """What decides its latents: part of a cache's fingerprint."""
    files = _weights(Path(folder))
    return {"config": autoencoder_config(Path(folder)), "weights": {file.name: sha256(file) for file in files}}


def _weights(folder: Path) -> list[Path]:
    files = weight_files(folder) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no .safetensors weights. A release may come without its autoencoder (toy/sana-base does): "
            "name the folder that has it, as `teacher` of a cache stage or `autoencoder` of a Pipeline"
        )
    return files
