# C latent channels, p patch size, D width
"""FLUX.1 (dev, Krea, schnell): diffusers FluxTransformer2DModel and the original BFL/ComfyUI names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..fields import Check, items
from ..latent import LatentSpace
from ..schedule import Schedule
from .base import BLOCKS, FIELDS, SIZE, Backbone, Config, Ends, NunchakuLayer, dimension
from .keymap import REST, KeyMap, Row

_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def _block(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{{i}}.{name}" for name in names)


def _norm(original: str, part: str) -> Row:
    # ComfyUI renamed the norms' `scale` to `weight` in 2026; we read both and write `scale`.
    return Row(f"{original}.scale", (f"{part}.weight",), suffixes=("",), alias=f"{original}.weight")


def _double(original: str, *parts: str) -> Row:
    return Row(f"double_blocks.{{i}}.{original}", _block("transformer_blocks", *parts))


def _mlp(original: str, part: str, **kwargs: Any) -> tuple[Row, ...]:
    return tuple(
        Row(f"{original}.{layer}", (f"time_text_embed.{part}.linear_{n}",), **kwargs)
        for n, layer in ((1, "in_layer"), (2, "out_layer"))
    )


KEYS = KeyMap(
    model="FLUX.1",
    top=(
        Row("img_in", ("x_embedder",)),
        Row("txt_in", ("context_embedder",)),
        *_mlp("time_in", "timestep_embedder"),
        *_mlp("vector_in", "text_embedder"),
        *_mlp("guidance_in", "guidance_embedder", optional="guidance"),
        Row("final_layer.linear", ("proj_out",)),
        # BFL splits the output of this layer into (shift, scale), diffusers into (scale, shift).
        Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True),
    ),
    blocks={
        "double": (
            _double("img_mod.lin", "norm1.linear"),
            _double("txt_mod.lin", "norm1_context.linear"),
            _double("img_attn.qkv", *(f"attn.{name}" for name in _QKV)),
            _double("txt_attn.qkv", *(f"attn.{name}" for name in _ADDED_QKV)),
            _double("img_attn.proj", "attn.to_out.0"),
            _double("txt_attn.proj", "attn.to_add_out"),
            *(
                _norm(f"double_blocks.{{i}}.{side}_attn.norm.{qk}_norm", f"transformer_blocks.{{i}}.attn.{part}")
                for side, qk, part in (
                    ("img", "query", "norm_q"),
                    ("img", "key", "norm_k"),
                    ("txt", "query", "norm_added_q"),
                    ("txt", "key", "norm_added_k"),
                )
            ),
            _double("img_mlp.0", "ff.net.0.proj"),
            _double("img_mlp.2", "ff.net.2"),
            _double("txt_mlp.0", "ff_context.net.0.proj"),
            _double("txt_mlp.2", "ff_context.net.2"),
        ),
        "single": (
            Row("single_blocks.{i}.modulation.lin", _block("single_transformer_blocks", "norm.linear")),
            Row(
                "single_blocks.{i}.linear1",
                _block("single_transformer_blocks", *(f"attn.{name}" for name in _QKV), "proj_mlp"),
                sizes=(1, 1, 1, REST),
            ),
            Row("single_blocks.{i}.linear2", _block("single_transformer_blocks", "proj_out")),
            *(
                _norm(f"single_blocks.{{i}}.norm.{qk}_norm", f"single_transformer_blocks.{{i}}.attn.norm_{qk[0]}")
                for qk in ("query", "key")
            ),
        ),
    },
)


class Flux(Backbone):
    """FLUX.1 on disk."""

    name = "flux"
    title = "FLUX.1"
    diffusers_class = "FluxTransformer2DModel"
    modelspec = "flux-1-dev"
    keys = KEYS
    original_signature = ("img_in.weight", "vector_in.in_layer.weight")
    diffusers_signature = ("x_embedder.weight", "time_text_embed.text_embedder.linear_1.weight")
    probes: ClassVar[dict[str, tuple[str, str, int]]] = {
        "width": ("x_embedder.weight", "img_in.weight", 0),
        "in_channels": ("x_embedder.weight", "img_in.weight", 1),
        "out_channels": ("proj_out.weight", "final_layer.linear.weight", 0),
        "joint_attention_dim": ("context_embedder.weight", "txt_in.weight", 1),
        "pooled_projection_dim": ("time_text_embed.text_embedder.linear_1.weight", "vector_in.in_layer.weight", 1),
    }
    stacks: ClassVar[dict[str, tuple[str, str, str]]] = {
        "double": ("num_layers", "transformer_blocks", "double_blocks"),
        "single": ("num_single_layers", "single_transformer_blocks", "single_blocks"),
    }
    identity_layers: ClassVar[dict[str, str]] = {"double": "attn.to_q", "single": "attn.to_q"}
    modulation: ClassVar[dict[str, tuple[str, ...]]] = {
        "double": ("norm1.linear", "norm1_context.linear"),
        "single": ("norm.linear",),
    }
    nunchaku: ClassVar[dict[str, tuple[NunchakuLayer, ...]]] = {
        "double": (
            NunchakuLayer("norm1.linear", ("norm1.linear",), splits=6),
            NunchakuLayer("norm1_context.linear", ("norm1_context.linear",), splits=6),
            NunchakuLayer("qkv_proj", tuple(f"attn.{name}" for name in _QKV)),
            NunchakuLayer("qkv_proj_context", tuple(f"attn.{name}" for name in _ADDED_QKV)),
            NunchakuLayer("out_proj", ("attn.to_out.0",)),
            NunchakuLayer("out_proj_context", ("attn.to_add_out",)),
            NunchakuLayer("mlp_fc1", ("ff.net.0.proj",)),
            NunchakuLayer("mlp_fc2", ("ff.net.2",), shifted=True),
            NunchakuLayer("mlp_context_fc1", ("ff_context.net.0.proj",)),
            NunchakuLayer("mlp_context_fc2", ("ff_context.net.2",), shifted=True),
        ),
        "single": (
            NunchakuLayer("norm.linear", ("norm.linear",), splits=3),
            NunchakuLayer("qkv_proj", tuple(f"attn.{name}" for name in _QKV)),
            NunchakuLayer("out_proj", ("proj_out",), columns=(0, 1), bias=False),
            NunchakuLayer("mlp_fc1", ("proj_mlp",)),
            NunchakuLayer("mlp_fc2", ("proj_out",), columns=(1, None), shifted=True),
        ),
    }
    nunchaku_class = "NunchakuFluxTransformer2dModel"
    gguf_architecture = "flux"
    base_spatial_factor = 8
    signature_fields = (
        "num_attention_heads",
        "num_layers",
        "num_single_layers",
        "joint_attention_dim",
        "pooled_projection_dim",
        "guidance_embeds",
    )
    extra_signature_fields = ("axes_dims_rope",)
    fields: ClassVar[dict[str, Check]] = {
        **FIELDS,
        "num_single_layers": BLOCKS,
        "joint_attention_dim": SIZE,
        "pooled_projection_dim": SIZE,
        "axes_dims_rope": items(SIZE, 3, 3),
    }
    needed_fields = ("in_channels", "attention_head_dim", *signature_fields)

    def ends(self, config: Mapping[str, Any]) -> Ends:
        return Ends("x_embedder", "proj_out")

    def config_with_latent(self, config: Config, channels: int, patch_size: int = 1) -> Config:
        """The diffusers class takes packed tokens, so its own patch_size stays 1."""
        packed = channels * patch_size * patch_size
        return {**config, "in_channels": packed, "out_channels": packed, "patch_size": 1}

    def check_config(self, config: Mapping[str, Any]) -> None:
        super().check_config(config)
        axes, head_dim = _axes(config), config["attention_head_dim"]
        if sum(axes) != head_dim or any(axis % 2 for axis in axes):
            raise ValueError(f"axes_dims_rope is {list(axes)}, expected even numbers that add up to {head_dim}")

    def embedder_shape(self, width: int, channels: int, p: int) -> tuple[int, ...]:
        """A Linear on packed tokens."""
        return width, channels * p * p

    def others(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        norm = (config["attention_head_dim"],)
        names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        return {
            "double": {f"attn.{name}.weight": norm for name in names},
            "single": {f"attn.{name}.weight": norm for name in names[:2]},
        }

    def base_signature(self, config: Config) -> dict[str, Any]:
        return {**super().base_signature(config), "axes_dims_rope": list(_axes(config))}

    def extra_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        width = base["width"]
        return {"norm_out.linear.weight": (2 * width, width), "norm_out.linear.bias": (2 * width,)}

    def layers(self, base: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        D = base["width"]
        top = {
            "context_embedder": (D, base["joint_attention_dim"]),
            "norm_out.linear": (2 * D, D),
            **_embedder_linears("timestep_embedder", D, 256),
            **_embedder_linears("text_embedder", D, base["pooled_projection_dim"]),
            **(_embedder_linears("guidance_embedder", D, 256) if base["guidance_embeds"] else {}),
        }
        double = {
            "norm1.linear": (6 * D, D),
            "norm1_context.linear": (6 * D, D),
            **{f"attn.{name}": (D, D) for name in (*_QKV, *_ADDED_QKV, "to_out.0", "to_add_out")},
            **{f"{ff}.net.0.proj": (4 * D, D) for ff in ("ff", "ff_context")},
            **{f"{ff}.net.2": (D, 4 * D) for ff in ("ff", "ff_context")},
        }
        single = {
            "norm.linear": (3 * D, D),
            **{f"attn.{name}": (D, D) for name in _QKV},
            "proj_mlp": (4 * D, D),
            "proj_out": (D, 5 * D),
        }
        return {"": top, "double": double, "single": single}

    def detect(self, state_dict: Mapping[str, Tensor]) -> Config:
        keys = self.bare_keys(state_dict)
        values = self.read(keys)
        width = values.pop("width")
        head_dim = _head_dim(keys)
        if width % head_dim:
            raise ValueError(f"FLUX.1 width {width} is not a multiple of its head dimension {head_dim}")
        guidance = ("time_text_embed.guidance_embedder.linear_1.weight", "guidance_in.in_layer.weight")
        return {
            "patch_size": 1,
            **values,
            "attention_head_dim": head_dim,
            "num_attention_heads": width // head_dim,
            "guidance_embeds": any(key in keys for key in guidance),
            "axes_dims_rope": rope_axes(head_dim),
        }

    def comfy_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        patch = 2  # of every base
        model_config = {
            "image_model": "flux",
            "in_channels": config["in_channels"] // patch**2,
            "out_channels": config["in_channels"] // patch**2,
            "patch_size": patch,
            "vec_in_dim": config["pooled_projection_dim"],
            "context_in_dim": config["joint_attention_dim"],
            "hidden_size": self.width(config),
            "num_heads": config["num_attention_heads"],
            "depth": config["num_layers"],
            "depth_single_blocks": config["num_single_layers"],
            "axes_dim": list(_axes(config)),
            "mlp_ratio": 4.0,
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": bool(config["guidance_embeds"]),
            "disable_unet_model_creation": True,
        }
        return {"model_class": "Flux" if config["guidance_embeds"] else "FluxSchnell", "model_config": model_config}

    def packed_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"])

    def default_schedule(self, latent: LatentSpace, config: Mapping[str, Any]) -> Schedule:
        """FLUX.2's rule for DC-Gen's f32 models, FLUX.1's for its f64 models and for FLUX itself."""
        return Schedule("flux2" if latent.spatial_factor == 32 else "flux")


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """RoPE axes in FLUX.1's ratio, (16, 56, 56) of 128 = 1 : 3.5 : 3.5, as even numbers for any head dimension.

    No tensor shows the axes; a model with another ratio needs its config.json.
    """
    text = max(2, 2 * round(head_dim / 16))
    text += (head_dim - text) % 4
    side = (head_dim - text) // 2
    if side < 2 or head_dim % 2:
        raise ValueError(f"head dimension {head_dim} has no room for three RoPE axes of even size")
    return text, side, side


def _axes(config: Mapping[str, Any]) -> Sequence[int]:
    """RoPE axes of a config; the config.json of FLUX.1 itself omits them."""
    return config.get("axes_dims_rope") or rope_axes(config["attention_head_dim"])


def _embedder_linears(name: str, width: int, inputs: int) -> dict[str, tuple[int, int]]:
    prefix = f"time_text_embed.{name}.linear_"
    return {f"{prefix}1": (width, inputs), f"{prefix}2": (width, width)}


def _head_dim(keys: Mapping[str, Tensor]) -> int:
    for key in (
        "transformer_blocks.0.attn.norm_q.weight",
        "single_transformer_blocks.0.attn.norm_q.weight",
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "double_blocks.0.img_attn.norm.query_norm.weight",
        "single_blocks.0.norm.query_norm.scale",
        "single_blocks.0.norm.query_norm.weight",
    ):
        if key in keys:
            return dimension(keys[key], 0, key)
    raise ValueError("this is not a FLUX.1 state dict: no block has a query norm")


BACKBONE = Flux()
