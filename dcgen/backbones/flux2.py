# C latent channels, p patch size, D width
"""FLUX.2 (klein, dev): diffusers Flux2Transformer2DModel and the original BFL/ComfyUI names.

Its own latent is that of its VAE (f8, 32 channels) packed 2x2, so the network takes 128 channels at f16, patch size 1.
DC-AE's f64c128 has as many: there embedder and head keep their shapes. No layer has a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..fields import Check, items, real
from ..latent import LatentSpace
from ..schedule import Schedule
from .base import BLOCKS, FIELDS, SIZE, Backbone, Config, Ends, dimension
from .keymap import KeyMap, Row

WEIGHT = (".weight",)
AXES = 4  # of RoPE: time, row, column, place in the text
SINUSOIDS = 256
# What surrounds a prompt for Qwen3: its chat format, with the empty thoughts that answer at once.
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
# The hidden states of Qwen3 that make the text features, side by side: the inputs of these layers.
TEXT_LAYERS = (9, 18, 27)
TEXT_TOKENS = 512


def _row(original: str, *parts: str, **kwargs: Any) -> Row:
    return Row(original, parts, suffixes=WEIGHT, **kwargs)


def _norm(original: str, part: str) -> Row:
    # ComfyUI renamed the norms' `scale` to `weight` in 2026; we read both and write `scale`.
    return Row(f"{original}.scale", (f"{part}.weight",), suffixes=("",), alias=f"{original}.weight")


def _double(original: str, *parts: str) -> Row:
    return _row(f"double_blocks.{{i}}.{original}", *(f"transformer_blocks.{{i}}.{part}" for part in parts))


def _single(original: str, part: str) -> Row:
    return _row(f"single_blocks.{{i}}.{original}", f"single_transformer_blocks.{{i}}.{part}")


def _mlp(original: str, part: str, **kwargs: Any) -> tuple[Row, ...]:
    return tuple(
        _row(f"{original}.{layer}", f"time_guidance_embed.{part}.linear_{n}", **kwargs)
        for n, layer in ((1, "in_layer"), (2, "out_layer"))
    )


MODULATIONS = {"double_stream_modulation_img": 6, "double_stream_modulation_txt": 6, "single_stream_modulation": 3}
KEYS = KeyMap(
    model="FLUX.2",
    top=(
        _row("img_in", "x_embedder"),
        _row("txt_in", "context_embedder"),
        *_mlp("time_in", "timestep_embedder"),
        *_mlp("guidance_in", "guidance_embedder", optional="guidance"),
        *(_row(f"{name}.lin", f"{name}.linear") for name in MODULATIONS),
        _row("final_layer.linear", "proj_out"),
        # BFL splits the output of this layer into (shift, scale), diffusers into (scale, shift).
        _row("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True),
    ),
    blocks={
        "double": (
            _double("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
            _double("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
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
            *(
                _double(f"{side}_mlp.{n}", f"{part}.{layer}")
                for side, part in (("img", "ff"), ("txt", "ff_context"))
                for n, layer in ((0, "linear_in"), (2, "linear_out"))
            ),
        ),
        "single": (
            _single("linear1", "attn.to_qkv_mlp_proj"),
            _single("linear2", "attn.to_out"),
            *(
                _norm(f"single_blocks.{{i}}.norm.{qk}_norm", f"single_transformer_blocks.{{i}}.attn.norm_{qk[0]}")
                for qk in ("query", "key")
            ),
        ),
    },
)


class Flux2(Backbone):
    """FLUX.2 on disk."""

    name = "flux2"
    title = "FLUX.2"
    diffusers_class = "Flux2Transformer2DModel"
    modelspec = "flux-2"
    keys = KEYS
    original_signature = ("img_in.weight", "double_stream_modulation_img.lin.weight")
    diffusers_signature = ("x_embedder.weight", "double_stream_modulation_img.linear.weight")
    probes: ClassVar[dict[str, tuple[str, str, int]]] = {
        "width": ("x_embedder.weight", "img_in.weight", 0),
        "in_channels": ("x_embedder.weight", "img_in.weight", 1),
        "out_channels": ("proj_out.weight", "final_layer.linear.weight", 0),
        "joint_attention_dim": ("context_embedder.weight", "txt_in.weight", 1),
        "timestep_guidance_channels": (
            "time_guidance_embed.timestep_embedder.linear_1.weight",
            "time_in.in_layer.weight",
            1,
        ),
    }
    stacks: ClassVar[dict[str, tuple[str, str, str]]] = {
        "double": ("num_layers", "transformer_blocks", "double_blocks"),
        "single": ("num_single_layers", "single_transformer_blocks", "single_blocks"),
    }
    identity_layers: ClassVar[dict[str, str]] = {"double": "attn.to_q", "single": "attn.to_qkv_mlp_proj"}
    base_spatial_factor = 16
    end_bias = False
    signature_fields = (
        "num_attention_heads",
        "num_layers",
        "num_single_layers",
        "joint_attention_dim",
        "mlp_ratio",
        "guidance_embeds",
    )
    extra_signature_fields = ("axes_dims_rope", "rope_theta")
    fields: ClassVar[dict[str, Check]] = {
        **FIELDS,
        "num_single_layers": BLOCKS,
        "joint_attention_dim": SIZE,
        "timestep_guidance_channels": SIZE,
        "mlp_ratio": real(0.01, 64),
        "axes_dims_rope": items(SIZE, AXES, AXES),
        "rope_theta": real(1, 1e9),
        "eps": real(1e-12, 1),
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
            raise ValueError(f"axes_dims_rope is {axes}, expected {AXES} even numbers that add up to {head_dim}")
        if config.get("timestep_guidance_channels", SINUSOIDS) != SINUSOIDS:
            raise ValueError(f"timestep_guidance_channels is {config['timestep_guidance_channels']}, not {SINUSOIDS}")

    def shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in super().shapes(config).items() if not name.endswith(".bias")}

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
        rope = {"axes_dims_rope": _axes(config), "rope_theta": float(config.get("rope_theta", 2000))}
        return {**super().base_signature(config), "mlp_ratio": float(config["mlp_ratio"]), **rope}

    def extra_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        width = base["width"]
        return {"norm_out.linear.weight": (2 * width, width)}

    def layers(self, base: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        D = base["width"]
        M = int(D * base["mlp_ratio"])  # inner width of the gated MLP
        attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
        top = {
            "context_embedder": (D, base["joint_attention_dim"]),
            "norm_out.linear": (2 * D, D),
            **{f"{name}.linear": (parts * D, D) for name, parts in MODULATIONS.items()},
            **_embedder_linears("timestep_embedder", D),
            **(_embedder_linears("guidance_embedder", D) if base["guidance_embeds"] else {}),
        }
        double = {
            **{f"attn.{name}": (D, D) for name in attention},
            **{f"{ff}.linear_in": (2 * M, D) for ff in ("ff", "ff_context")},
            **{f"{ff}.linear_out": (D, M) for ff in ("ff", "ff_context")},
        }
        single = {"attn.to_qkv_mlp_proj": (3 * D + 2 * M, D), "attn.to_out": (D, D + M)}
        return {"": top, "double": double, "single": single}

    def detect(self, state_dict: Mapping[str, Tensor]) -> Config:
        keys = self.bare_keys(state_dict)
        values = self.read(keys)
        width, head_dim = values.pop("width"), _head_dim(keys)
        if width % head_dim or head_dim % (2 * AXES):
            raise ValueError(
                f"FLUX.2 width {width} with head dimension {head_dim}: expected a multiple of it, and it one of "
                f"{2 * AXES}, for {AXES} equal RoPE axes"
            )
        guidance = ("time_guidance_embed.guidance_embedder.linear_1.weight", "guidance_in.in_layer.weight")
        return {
            "patch_size": 1,
            **values,
            "attention_head_dim": head_dim,
            "num_attention_heads": width // head_dim,
            "mlp_ratio": _mlp_width(keys, width) / width,
            "guidance_embeds": any(key in keys for key in guidance),
            "axes_dims_rope": (head_dim // AXES,) * AXES,
        }

    def packed_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"])

    def default_schedule(self, latent: LatentSpace, config: Mapping[str, Any]) -> Schedule:
        """The published models' own rule, at the tokens of the latent."""
        return Schedule("empirical")


def _axes(config: Mapping[str, Any]) -> list[int]:
    """RoPE axes of a config: equal ones if it omits them. No tensor shows them."""
    return list(config.get("axes_dims_rope") or [config["attention_head_dim"] // AXES] * AXES)


def _embedder_linears(name: str, width: int) -> dict[str, tuple[int, int]]:
    prefix = f"time_guidance_embed.{name}.linear_"
    return {f"{prefix}1": (width, SINUSOIDS), f"{prefix}2": (width, width)}


def _first(keys: Mapping[str, Tensor], names: tuple[str, ...], what: str) -> Tensor:
    found = next((keys[name] for name in names if name in keys), None)
    if found is None:
        raise ValueError(f"this is not a whole FLUX.2 state dict: no block shows its {what} ({names[0]} is absent)")
    return found


def _head_dim(keys: Mapping[str, Tensor]) -> int:
    names = [f"{block}.0.attn.norm_q.weight" for block in ("transformer_blocks", "single_transformer_blocks")]
    for norm in ("double_blocks.0.img_attn.norm.query_norm", "single_blocks.0.norm.query_norm"):
        names += [f"{norm}.scale", f"{norm}.weight"]
    return dimension(_first(keys, tuple(names), "head dimension"), 0, "the norm of the queries")


def _mlp_width(keys: Mapping[str, Tensor], width: int) -> int:
    """Inner width of the gated MLP: the second layer's inputs, in single blocks behind those of attention."""
    names = ("transformer_blocks.0.ff.linear_out.weight", "double_blocks.0.img_mlp.2.weight")
    joined = ("single_transformer_blocks.0.attn.to_out.weight", "single_blocks.0.linear2.weight")
    layer = _first(keys, names + joined, "MLP")
    inputs = dimension(layer, 1, "the second layer of the MLP")
    return inputs if any(name in keys for name in names) else inputs - width


BACKBONE = Flux2()
