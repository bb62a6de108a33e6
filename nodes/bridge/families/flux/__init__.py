# C latent channels, D width, p patch size
"""FLUX.1 in ComfyUI: core's own network on a deeply compressed latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_detection
import comfy.sd
from torch import Tensor, nn

from .....dcgen.backbones import BACKBONES, Config
from .....dcgen.folder import Release
from ...family import Family
from ...latent_format import ModelInfo
from .text import load_flux_text

# Core's memory estimate counts latent pixels and was tuned for FLUX's patch size of 2.
PATCH_OF_ESTIMATE = 2


class Flux(Family):
    """FLUX.1."""

    backbone = BACKBONES["flux"]
    text_node = "CLIPTextEncode with CLIP-L and T5-XXL"

    def recognises(self, model: comfy.model_base.BaseModel) -> bool:
        network = model.diffusion_model
        return isinstance(network, comfy.ldm.flux.model.Flux) and not network.params.global_modulation

    def config(self, network: nn.Module) -> Config:
        params: Any = network.params
        return {
            "num_attention_heads": params.num_heads,
            "attention_head_dim": params.hidden_size // params.num_heads,
            "num_layers": params.depth,
            "num_single_layers": params.depth_single_blocks,
            "joint_attention_dim": params.context_in_dim,
            "pooled_projection_dim": params.vec_in_dim,
            "guidance_embeds": params.guidance_embed,
            "axes_dims_rope": list(params.axes_dim),
        }

    def model_config(self, shapes: Mapping[str, Tensor], config: Config) -> Any:
        return comfy.model_detection.model_config_from_unet(dict(shapes), "")

    def unet_config(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        heads = config["num_attention_heads"]
        return {
            "num_heads": heads,
            "hidden_size": heads * config["attention_head_dim"],
            "axes_dim": list(config["axes_dims_rope"]),
            "context_in_dim": config["joint_attention_dim"],
            "vec_in_dim": config["pooled_projection_dim"],
            "in_channels": info.space.channels,
            "out_channels": info.space.channels,
            "patch_size": info.patch_size,
        }

    def attributes(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        packed = info.token_channels
        return {"patch_size": info.patch_size, "in_channels": packed, "out_channels": packed}

    def memory_factor(self, model: comfy.model_base.BaseModel, config: Config, info: ModelInfo) -> float:
        return type(model.model_config).memory_usage_factor * PATCH_OF_ESTIMATE**2 / info.patch_size**2

    def text_width(self, config: Config) -> int:
        return config["joint_attention_dim"]

    def renamed(self, part: dict[str, Tensor], model_config: Any) -> dict[str, Tensor]:
        """With core's final renaming of keys (some versions rename a norm's `scale` to `weight`)."""
        return model_config.process_unet_state_dict(part)

    def load_text(self, release: Release, disable_dynamic: bool = False) -> comfy.sd.CLIP:
        return load_flux_text(release, disable_dynamic)


FAMILY = Flux()
