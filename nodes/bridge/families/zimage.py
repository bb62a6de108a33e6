# C latent channels, D width, p patch size
"""Z-Image in ComfyUI: core's own network (NextDiT) on a deeply compressed latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_base
import comfy.sd
import comfy.supported_models
import comfy.utils
from torch import Tensor, nn

from ....dcgen.backbones import BACKBONES, Config
from ....dcgen.backbones.zimage import PROMPT, TEXT_LAYER, TEXT_TOKENS, TOKEN_MULTIPLE
from ....dcgen.folder import Release
from ..family import Family
from ..latent_format import ModelInfo
from ..qwen3 import Reading, load_qwen3

PATCH_OF_ESTIMATE = 2  # core's memory estimate counts latent pixels, for the base's patch size
READING = Reading(PROMPT, (TEXT_LAYER,), TEXT_TOKENS, padded=False)


class ZImage(Family):
    """Z-Image and Z-Image-Turbo."""

    backbone = BACKBONES["zimage"]
    text_node = "CLIPTextEncode with Qwen3-4B from CLIPLoader (type lumina2), or Load Release (DC-Gen)"

    def recognises(self, model: comfy.model_base.BaseModel) -> bool:
        """Core has the class of the network and of the model in common with Lumina 2."""
        network: Any = model.diffusion_model
        kind = comfy.supported_models.ZImage
        return (
            type(model) is comfy.model_base.Lumina2
            and isinstance(model.model_config, kind)
            and network.pad_tokens_multiple == TOKEN_MULTIPLE
            and getattr(network, "siglip_embedder", None) is None
        )

    def config(self, network: nn.Module) -> Config:
        net: Any = network
        return {
            "dim": net.dim,
            "n_layers": len(net.layers),
            "n_refiner_layers": len(net.noise_refiner),
            "n_heads": net.n_heads,
            "n_kv_heads": net.n_heads,
            "cap_feat_dim": net.cap_embedder[1].in_features,
            "axes_dims": list(net.axes_dims),
            "rope_theta": net.rope_embedder.theta,
            "in_channels": net.in_channels,
            "all_patch_size": [net.patch_size],
        }

    def model_config(self, shapes: Mapping[str, Tensor], config: Config) -> Any:
        """Not detected: core takes patch size 2, 16 channels and one width for granted."""
        model_config = comfy.supported_models.ZImage({"image_model": "lumina2"})
        model_config.quant_config = comfy.utils.detect_layer_quantization(dict(shapes), "")
        return model_config

    def unet_config(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        head = config["dim"] // config["n_heads"]
        return {
            "image_model": "lumina2",
            "patch_size": info.patch_size,
            "in_channels": info.space.channels,
            "dim": config["dim"],
            "cap_feat_dim": config["cap_feat_dim"],
            "n_layers": config["n_layers"],
            "n_refiner_layers": config["n_refiner_layers"],
            "n_heads": config["n_heads"],
            "n_kv_heads": config["n_heads"],
            "axes_dims": list(config.get("axes_dims") or (head - 2 * (3 * head // 8), 3 * head // 8, 3 * head // 8)),
            "rope_theta": config.get("rope_theta", 256.0),
            "time_scale": config.get("t_scale", 1000.0),
            "norm_eps": config.get("norm_eps", 1e-5),
            "qk_norm": True,
            "ffn_dim_multiplier": 8.0 / 3.0,
            "z_image_modulation": True,
            "pad_tokens_multiple": TOKEN_MULTIPLE,
        }

    def attributes(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        channels = info.space.channels
        return {"patch_size": info.patch_size, "in_channels": channels, "out_channels": channels}

    def memory_factor(self, model: comfy.model_base.BaseModel, config: Config, info: ModelInfo) -> float:
        return type(model.model_config).memory_usage_factor * PATCH_OF_ESTIMATE**2 / info.patch_size**2

    def text_width(self, config: Config) -> int:
        return config["cap_feat_dim"]

    def load_text(self, release: Release, disable_dynamic: bool = False) -> comfy.sd.CLIP:
        return load_qwen3(release, READING, disable_dynamic)


FAMILY = ZImage()
