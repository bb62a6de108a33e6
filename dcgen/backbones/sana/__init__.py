# C latent channels, p patch size, D width
"""SANA (0.6B, 1.6B, SANA-1.5, Sprint): diffusers SanaTransformer2DModel, the original .pth names, and the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor

from ...fields import Check, flag, optional, real, words
from ...latent import LatentSpace
from ...schedule import Schedule
from ..base import FIELDS, HEADS, SIZE, Backbone, Config, Ends
from ..keymap import KeyMap
from .keys import KEYS, SPRINT_KEYS
from .network import QK_NORM, SanaConfig, SanaNet

TIMESTEPS = 1000
# No tensor shows the number of cross-attention heads; these are the published models', by width.
CROSS_HEADS = {1152: 16, 2240: 20}
HEAD_DIM = 32
POSITIONS = "pos_embed"


class Sana(Backbone):
    """SANA on disk."""

    name = "sana"
    title = "SANA"
    diffusers_class = "SanaTransformer2DModel"
    modelspec = "sana"
    keys = KEYS
    extras = ("y_embedder.y_embedding",)  # the null caption of SANA's own caption dropout
    original_signature = ("x_embedder.proj.weight", "attention_y_norm.weight")
    diffusers_signature = ("patch_embed.proj.weight", "caption_norm.weight")
    probes: ClassVar[dict[str, tuple[str, str, int]]] = {
        "width": ("patch_embed.proj.weight", "x_embedder.proj.weight", 0),
        "in_channels": ("patch_embed.proj.weight", "x_embedder.proj.weight", 1),
        "patch_size": ("patch_embed.proj.weight", "x_embedder.proj.weight", 2),
        "out_channels": ("proj_out.weight", "final_layer.linear.weight", 0),
        "caption_channels": ("caption_projection.linear_1.weight", "y_embedder.y_proj.fc1.weight", 1),
        "hidden": ("transformer_blocks.0.ff.conv_point.weight", "blocks.0.mlp.point_conv.conv.weight", 1),
    }
    stacks: ClassVar[dict[str, tuple[str, str, str]]] = {"block": ("num_layers", "transformer_blocks", "blocks")}
    identity_layers: ClassVar[dict[str, str]] = {"block": "attn1.to_q"}
    original_network = False
    signature_fields = (
        "num_layers",
        "num_attention_heads",
        "num_cross_attention_heads",
        "caption_channels",
        "mlp_ratio",
        "qk_norm",
        "guidance_embeds",
    )
    fields: ClassVar[dict[str, Check]] = {
        **FIELDS,
        "num_cross_attention_heads": HEADS,
        "cross_attention_head_dim": SIZE,
        "cross_attention_dim": optional(SIZE),
        "caption_channels": SIZE,
        "mlp_ratio": real(0.01, 64),
        "interpolation_scale": optional(real(1e-3, 1e3)),
        "qk_norm": optional(words(QK_NORM)),
        "norm_elementwise_affine": flag,
        "guidance_embeds_scale": real(1e-6, 1e6),
        "timestep_scale": real(1e-6, 1e6),
    }
    needed_fields = ("in_channels", "out_channels", "patch_size", "num_layers", "num_attention_heads")

    def check_config(self, config: Mapping[str, Any]) -> None:
        super().check_config(config)
        SanaConfig.from_diffusers(config)

    def others(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        values = SanaConfig.from_diffusers(config)
        D, hidden = values.width, int(values.mlp_ratio * values.width)
        norms = {f"attn{n}.norm_{part}.weight": (D,) for n in (1, 2) for part in "qk"} if values.qk_norm else {}
        block = {
            "scale_shift_table": (6, D),
            "ff.conv_depth.weight": (2 * hidden, 1, 3, 3),
            "ff.conv_depth.bias": (2 * hidden,),
            **norms,
        }
        return {"": {"scale_shift_table": (2, D), "caption_norm.weight": (D,)}, "block": block}

    def key_map(self, config: Mapping[str, Any]) -> KeyMap:
        return SPRINT_KEYS if config.get("guidance_embeds") else KEYS

    def ends(self, config: Mapping[str, Any]) -> Ends:
        return Ends("patch_embed.proj", "proj_out")

    def config_with_latent(self, config: Config, channels: int, patch_size: int = 1) -> Config:
        """sample_size, which positions refer to, keeps its tokens: the new grid spans the same range."""
        old = config.get("patch_size", 1)
        size = config.get("sample_size", 32) // old * patch_size
        return {
            **config,
            "in_channels": channels,
            "out_channels": channels,
            "patch_size": patch_size,
            "sample_size": size,
        }

    def base_signature(self, config: Config) -> dict[str, Any]:
        return super().base_signature(asdict(SanaConfig.from_diffusers(config)))

    def extra_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"scale_shift_table": (2, base["width"])}

    def layers(self, base: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        D = base["width"]
        hidden = int(base["mlp_ratio"] * D)
        guided = base["guidance_embeds"]
        time = [f"{name}_embedder" for name in (("timestep", "guidance") if guided else ("emb.timestep",))]
        block = {
            **{f"attn{n}.{name}": (D, D) for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")},
            "ff.conv_inverted": (2 * hidden, D, 1, 1),
            "ff.conv_point": (D, hidden, 1, 1),
        }
        top = {
            "caption_projection.linear_1": (D, base["caption_channels"]),
            "caption_projection.linear_2": (D, D),
            "time_embed.linear": (6 * D, D),
            **{f"time_embed.{name}.linear_1": (D, 256) for name in time},
            **{f"time_embed.{name}.linear_2": (D, D) for name in time},
        }
        return {"": top, "block": block}

    def detect(self, state_dict: Mapping[str, Tensor]) -> Config:
        """No shape shows the positions (interpolation_scale, sample_size; see read_values) or, for unpublished widths,
        the cross-attention heads. Assumed are SANA-1K's (no positions) and one head per 32; other models need their
        config.json.
        """
        keys = self.bare_keys(state_dict)
        original = self.is_original(keys)
        values = self.read(keys)
        width, hidden = values.pop("width"), values.pop("hidden")
        if width % HEAD_DIM:
            raise ValueError(f"SANA width {width} is not a multiple of its head dimension {HEAD_DIM}")
        values["out_channels"] //= values["patch_size"] ** 2
        cross = CROSS_HEADS.get(width, width // HEAD_DIM)
        normed = ("blocks.0.attn.q_norm.weight" if original else "transformer_blocks.0.attn1.norm_q.weight") in keys
        guided = ("cfg_embedder.mlp.0.weight" if original else "time_embed.guidance_embedder.linear_1.weight") in keys
        return {
            **values,
            "num_attention_heads": width // HEAD_DIM,
            "attention_head_dim": HEAD_DIM,
            "num_cross_attention_heads": cross,
            "cross_attention_head_dim": width // cross,
            "cross_attention_dim": width,
            "mlp_ratio": hidden / width,
            "sample_size": 32,
            "interpolation_scale": None,
            "qk_norm": QK_NORM if normed else None,
            "guidance_embeds": guided,
        }

    def read_values(self, names: Mapping[str, Any], get: Callable[[str], Tensor]) -> Config:
        """The positions, from the table in every original file; it is zero if the model has none."""
        if POSITIONS not in names:
            return {}
        table = get(POSITIONS)
        if table.ndim != 3 or not table.shape[0] or not table.shape[2] or not table.is_floating_point():
            raise ValueError(f"{POSITIONS} is {table.dtype} {tuple(table.shape)}, expected one row of positions")
        table = table[0]
        side = math.isqrt(len(table))
        if side < 2 or side * side != len(table):
            raise ValueError(f"{POSITIONS} has {len(table)} positions, which is not a square")
        # The first value of a position is the sine of its column, in steps of 1 / interpolation_scale.
        first = float(table[1, 0])
        if not table.any():
            return {"sample_size": side, "interpolation_scale": None}
        if not 0 < first <= 1:
            raise ValueError(
                f"{POSITIONS} has {first} as the first value of its second position, expected a sine in (0, 1]"
            )
        return {"sample_size": side, "interpolation_scale": round(1 / math.asin(first), 1)}

    def width(self, config: Mapping[str, Any]) -> int:
        return SanaConfig.from_diffusers(config).width

    def default_schedule(self, latent: LatentSpace, config: Mapping[str, Any]) -> Schedule:
        """Shift 3; the 4K model (positions at half steps) was trained at 6; Sprint has its own one or two steps."""
        if config.get("guidance_embeds"):
            return Schedule("sprint")
        return Schedule("static", shift=6.0 if config.get("interpolation_scale") == 2.0 else 3.0)

    def network(self, config: Mapping[str, Any], **kwargs: Any) -> SanaNet:
        """The network of a diffusers config; kwargs operations, dtype, device as in SanaNet."""
        return SanaNet(SanaConfig.from_diffusers(config), **kwargs)


def network_timestep(sigma: Tensor, scale: float = 1.0) -> Tensor:
    """sigma (B,) in 0..1 -> the network's timestep: whole steps of 1/1000, times the config's timestep_scale."""
    return (sigma * TIMESTEPS).floor() * scale


BACKBONE = Sana()

__all__ = ["BACKBONE", "KEYS", "SPRINT_KEYS", "Sana", "SanaConfig", "SanaNet", "network_timestep"]
