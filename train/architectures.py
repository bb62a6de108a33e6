"""Published base models as data, for planning a run before anything is downloaded. Sources: their config.json files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Backbone, config.json fields that shape the network, own latent space, text tokens and their values each."""

    backbone: str
    config: dict[str, Any]
    latent: str
    patch_size: int
    text: tuple[int, int]  # tokens, width


_FLUX: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
_SANA: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 20,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "patch_size": 1,
    "qk_norm": "rms_norm_across_heads",
}

_DIT: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "sample_size": 32,
    "patch_size": 2,
}

ARCHITECTURES: dict[str, Architecture] = {
    "flux.1": Architecture("flux", _FLUX, "flux-f8c16", 2, (512, 4096)),
    "dc-gen-flux-f32": Architecture("flux", {**_FLUX, "in_channels": 32}, "dc-ae-f32c32-in-1.0", 1, (512, 4096)),
    "dc-gen-flux-f64": Architecture("flux", {**_FLUX, "in_channels": 128}, "dc-ae-1.5-f64c128", 1, (512, 4096)),
    "sana-1.5-1.6b": Architecture("sana", _SANA, "dc-ae-f32c32-sana-1.0", 1, (300, 2304)),
    "sana-1.5-4.8b": Architecture("sana", {**_SANA, "num_layers": 60}, "dc-ae-f32c32-sana-1.0", 1, (300, 2304)),
    "dit-xl-2-256": Architecture("dit", _DIT, "sd-f8c4", 2, (0, 0)),
    "dit-xl-2-512": Architecture("dit", {**_DIT, "sample_size": 64}, "sd-f8c4", 2, (0, 0)),
}
