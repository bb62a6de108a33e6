# C latent channels, p patch size, D width
"""DiT-XL/2 (class-conditional): diffusers DiTTransformer2DModel and the original facebookresearch names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..fields import Check, whole
from ..latent import LatentSpace
from ..schedule import Schedule
from .base import FIELDS, Backbone, Config, Ends
from .keymap import KeyMap, Row

HEAD_DIM = 72
_BLOCK, _ORIGINAL = "transformer_blocks.{i}", "blocks.{i}"


def _row(original: str, *parts: str) -> Row:
    return Row(f"{_ORIGINAL}.{original}", tuple(f"{_BLOCK}.{part}" for part in parts))


KEYS = KeyMap(
    model="DiT",
    top=(
        Row("x_embedder.proj", ("pos_embed.proj",)),
        Row("final_layer.adaLN_modulation.1", ("proj_out_1",)),
        Row("final_layer.linear", ("proj_out_2",)),
    ),
    blocks={
        "block": (
            _row("attn.qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
            _row("attn.proj", "attn1.to_out.0"),
            _row("mlp.fc1", "ff.net.0.proj"),
            _row("mlp.fc2", "ff.net.2"),
            _row("adaLN_modulation.1", "norm1.linear"),
            # diffusers gives every block its own copy of the time and class embedders.
            Row("t_embedder.mlp.0", (f"{_BLOCK}.norm1.emb.timestep_embedder.linear_1",), copied=True),
            Row("t_embedder.mlp.2", (f"{_BLOCK}.norm1.emb.timestep_embedder.linear_2",), copied=True),
            Row(
                "y_embedder.embedding_table",
                (f"{_BLOCK}.norm1.emb.class_embedder.embedding_table",),
                suffixes=(".weight",),
                copied=True,
            ),
        )
    },
    dropped=("pos_embed",),  # fixed sine-cosine positions, computed for each grid
)


class DiT(Backbone):
    """DiT on disk."""

    name = "dit"
    title = "DiT"
    diffusers_class = "DiTTransformer2DModel"
    modelspec = "dit"
    keys = KEYS
    original_signature = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight")
    diffusers_signature = ("pos_embed.proj.weight", "proj_out_2.weight")
    probes: ClassVar[dict[str, tuple[str, str, int]]] = {
        "width": ("pos_embed.proj.weight", "x_embedder.proj.weight", 0),
        "in_channels": ("pos_embed.proj.weight", "x_embedder.proj.weight", 1),
        "patch_size": ("pos_embed.proj.weight", "x_embedder.proj.weight", 2),
        "out_channels": ("proj_out_2.weight", "final_layer.linear.weight", 0),
        "num_embeds_ada_norm": (
            "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
            "y_embedder.embedding_table.weight",
            0,
        ),
    }
    stacks: ClassVar[dict[str, tuple[str, str, str]]] = {"block": ("num_layers", "transformer_blocks", "blocks")}
    identity_layers: ClassVar[dict[str, str]] = {"block": "attn1.to_q"}
    modulation: ClassVar[dict[str, tuple[str, ...]]] = {
        "block": ("norm1.linear", *(f"norm1.emb.timestep_embedder.linear_{n}" for n in (1, 2)))
    }
    base_spatial_factor = 8
    signature_fields = ("num_layers", "num_attention_heads", "num_embeds_ada_norm")
    extra_signature_fields = ("learned_sigma",)
    fields: ClassVar[dict[str, Check]] = {**FIELDS, "num_embeds_ada_norm": whole(0, 1 << 20)}
    needed_fields = ("in_channels", "attention_head_dim", "patch_size", "sample_size", *signature_fields)

    def ends(self, config: Mapping[str, Any]) -> Ends:
        return Ends("pos_embed.proj", "proj_out_2")

    def config_with_latent(self, config: Config, channels: int, patch_size: int = 1) -> Config:
        """The head predicts a variance if it did before. sample_size, which positions refer to, keeps its tokens."""
        size = config["sample_size"] // config["patch_size"] * patch_size
        outputs = channels * (2 if _learned_sigma(config) else 1)
        return {
            **config,
            "in_channels": channels,
            "out_channels": outputs,
            "patch_size": patch_size,
            "sample_size": size,
        }

    def base_signature(self, config: Config) -> dict[str, Any]:
        return {**super().base_signature(config), "learned_sigma": _learned_sigma(config)}

    def extra_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        width = base["width"]
        return {"proj_out_1.weight": (2 * width, width), "proj_out_1.bias": (2 * width,)}

    def layers(self, base: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        D = base["width"]
        block = {
            "norm1.linear": (6 * D, D),
            "norm1.emb.timestep_embedder.linear_1": (D, 256),
            "norm1.emb.timestep_embedder.linear_2": (D, D),
            **{f"attn1.{name}": (D, D) for name in ("to_q", "to_k", "to_v", "to_out.0")},
            "ff.net.0.proj": (4 * D, D),
            "ff.net.2": (D, 4 * D),
        }
        return {"": {"proj_out_1": (2 * D, D)}, "block": block}

    def others(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        table = (config["num_embeds_ada_norm"] + 1, self.width(config))  # the last row is the null class
        return {"block": {"norm1.emb.class_embedder.embedding_table.weight": table}}

    def detect(self, state_dict: Mapping[str, Tensor]) -> Config:
        """No tensor shows the heads (assumed 72 wide as in DiT-XL, else 64) or the size (assumed 256 px at f8)."""
        values = self.read(self.bare_keys(state_dict))
        width, p = values.pop("width"), values["patch_size"]
        head_dim = HEAD_DIM if width % HEAD_DIM == 0 else 64
        if width % head_dim:
            raise ValueError(f"DiT width {width} is a multiple of neither 72 nor 64")
        return {
            **values,
            "out_channels": values["out_channels"] // p**2,
            "num_embeds_ada_norm": values["num_embeds_ada_norm"] - 1,  # the last row is the null class
            "num_attention_heads": width // head_dim,
            "attention_head_dim": head_dim,
            "sample_size": 16 * p,
        }

    def default_schedule(self, latent: LatentSpace, config: Mapping[str, Any]) -> Schedule:
        """DiT was trained on uniform steps: no shift."""
        return Schedule("static", shift=1.0)


def _learned_sigma(config: Mapping[str, Any]) -> bool:
    outputs = config.get("out_channels") or config["in_channels"]
    return bool(outputs == 2 * config["in_channels"])


BACKBONE = DiT()
