# C latent channels, D width, p patch size
"""FLUX.2 (klein, dev) in ComfyUI: core's own network on a deeply compressed latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_detection
import comfy.sd
from torch import Tensor, nn

from ....dcgen.backbones import BACKBONES, Config
from ....dcgen.backbones.flux2 import PROMPT, TEXT_LAYERS, TEXT_TOKENS
from ....dcgen.folder import Release
from ....dcgen.latent import LatentSpace
from ....dcgen.schedule import Schedule
from ..family import Family
from ..latent_format import ModelInfo
from ..qwen3 import Reading, load_qwen3

# Core's memory estimate is that of FLUX.1, whose token is 2x2 latent pixels, scaled by the width; it was measured at
# this one.
PATCH_OF_ESTIMATE, WIDTH_OF_ESTIMATE = 2, 2604
READING = Reading(PROMPT, TEXT_LAYERS, TEXT_TOKENS, padded=True)


class Flux2(Family):
    """FLUX.2."""

    backbone = BACKBONES["flux2"]
    text_node = (
        "CLIPTextEncode with Qwen3 from CLIPLoader, type flux2 (ComfyUI 0.9.2 or newer), or Load Release (DC-Gen)"
    )

    def recognises(self, model: comfy.model_base.BaseModel) -> bool:
        network = model.diffusion_model
        return isinstance(network, comfy.ldm.flux.model.Flux) and network.params.global_modulation

    def config(self, network: nn.Module) -> Config:
        params: Any = network.params
        return {
            "num_attention_heads": params.num_heads,
            "attention_head_dim": params.hidden_size // params.num_heads,
            "num_layers": params.depth,
            "num_single_layers": params.depth_single_blocks,
            "joint_attention_dim": params.context_in_dim,
            "mlp_ratio": params.mlp_ratio,
            "guidance_embeds": params.guidance_embed,
            "axes_dims_rope": list(params.axes_dim),
            "rope_theta": params.theta,
        }

    def model_config(self, shapes: Mapping[str, Tensor], config: Config) -> Any:
        return comfy.model_detection.model_config_from_unet(dict(shapes), "")

    def unet_config(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        heads = config["num_attention_heads"]
        axes = config.get("axes_dims_rope") or [config["attention_head_dim"] // 4] * 4
        return {
            "num_heads": heads,  # ComfyUI 0.8 detects dev's for every model
            "hidden_size": heads * config["attention_head_dim"],
            "axes_dim": list(axes),
            "theta": config.get("rope_theta", 2000),
            "mlp_ratio": config["mlp_ratio"],
            "context_in_dim": config["joint_attention_dim"],
            "in_channels": info.space.channels,
            "out_channels": info.space.channels,
            "patch_size": info.patch_size,
        }

    def attributes(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        packed = info.token_channels
        return {"patch_size": info.patch_size, "in_channels": packed, "out_channels": packed}

    def memory_factor(self, model: comfy.model_base.BaseModel, config: Config, info: ModelInfo) -> float:
        of_width = self.backbone.width(config) / WIDTH_OF_ESTIMATE
        return type(model.model_config).memory_usage_factor * PATCH_OF_ESTIMATE**2 / info.patch_size**2 * of_width

    def text_width(self, config: Config) -> int:
        return config["joint_attention_dim"]

    def foreign_schedule(self, space: LatentSpace) -> Schedule:
        """The published rule: core's sampling object has its value for one size and number of steps."""
        return self.backbone.default_schedule(space, {})

    def renamed(self, part: dict[str, Tensor], model_config: Any) -> dict[str, Tensor]:
        """With core's final renaming of keys (some versions rename a norm's `scale` to `weight`)."""
        return model_config.process_unet_state_dict(part)

    def load_text(self, release: Release, disable_dynamic: bool = False) -> comfy.sd.CLIP:
        return load_qwen3(release, READING, disable_dynamic)


FAMILY = Flux2()
