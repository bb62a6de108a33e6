# C latent channels, p patch size, D width
"""Z-Image (turbo, base): diffusers ZImageTransformer2DModel and the original names, which ComfyUI has too.

diffusers names embedder and final layer by the patch size ("2-1": p 2, one frame), so a model on another patch size has
its final layer's modulation under another name. The original names do not say the patch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..fields import Check, flag, items, optional, real, whole
from ..latent import LatentSpace
from ..schedule import Schedule
from .base import BLOCKS, HEADS, PATCH, SIZE, Backbone, Config, Ends, dimension
from .keymap import KeyMap, Row, count_blocks

WEIGHT = (".weight",)
BASE_CHANNELS, BASE_PATCH = 16, 2  # of the published base, on FLUX.1's f8 latent
SINUSOIDS, TIME_WIDTH, MODULATION = 256, 1024, 256
TOKEN_MULTIPLE = 32  # image and text are padded to this many tokens
# What surrounds a prompt for Qwen3: its chat format.
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEXT_LAYER = -1  # the hidden state that is the input of the last layer
TEXT_TOKENS = 512
KINDS = {"noise": "noise_refiner", "context": "context_refiner", "layer": "layers"}
NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def _block(name: str, modulated: bool) -> tuple[Row, ...]:
    def row(original: str, *parts: str, **kwargs: Any) -> Row:
        names = tuple(f"{name}.{{i}}.{part}" for part in parts or (original,))
        return Row(f"{name}.{{i}}.{original}", names, **{"suffixes": WEIGHT, **kwargs})

    rows = (
        row("attention.qkv", *(f"attention.{part}" for part in ATTENTION[:3])),
        row("attention.out", "attention.to_out.0"),
        row("attention.q_norm", "attention.norm_q"),
        row("attention.k_norm", "attention.norm_k"),
        *(row(f"feed_forward.w{n}") for n in (1, 2, 3)),
        *(row(norm) for norm in NORMS),
    )
    return (
        (*rows, Row(f"{name}.{{i}}.adaLN_modulation.0", (f"{name}.{{i}}.adaLN_modulation.0",))) if modulated else rows
    )


def _keys(p: int) -> KeyMap:
    ends = _ends(p)
    return KeyMap(
        model="Z-Image",
        top=(
            Row("x_embedder", (ends.embedder,)),
            Row("final_layer.linear", (ends.head,)),
            *(Row("final_layer.adaLN_modulation.1", (layer,)) for layer in ends.named),
            *(Row(f"t_embedder.mlp.{n}", (f"t_embedder.mlp.{n}",)) for n in (0, 2)),
            Row("cap_embedder.0", ("cap_embedder.0",), suffixes=WEIGHT),
            Row("cap_embedder.1", ("cap_embedder.1",)),
            *(Row(f"{side}_pad_token", (f"{side}_pad_token",), suffixes=("",)) for side in ("x", "cap")),
        ),
        blocks={kind: _block(name, kind != "context") for kind, name in KINDS.items()},
        dropped=("norm_final.",),  # of Lumina 2, unused
    )


def _ends(p: int) -> Ends:
    final = f"all_final_layer.{p}-1"
    return Ends(f"all_x_embedder.{p}-1", f"{final}.linear", (f"{final}.adaLN_modulation.1",))


class ZImage(Backbone):
    """Z-Image on disk."""

    name = "zimage"
    title = "Z-Image"
    diffusers_class = "ZImageTransformer2DModel"
    modelspec = "z-image"
    keys = _keys(BASE_PATCH)
    original_signature = ("x_pad_token", "x_embedder.weight")
    diffusers_signature = ("x_pad_token", "cap_pad_token", "cap_embedder.0.weight")
    probes: ClassVar[dict[str, tuple[str, str, int]]] = {
        "dim": ("cap_embedder.1.weight", "cap_embedder.1.weight", 0),
        "cap_feat_dim": ("cap_embedder.1.weight", "cap_embedder.1.weight", 1),
    }
    stacks: ClassVar[dict[str, tuple[str, str, str]]] = {
        "noise": ("n_refiner_layers", "noise_refiner", "noise_refiner"),
        "context": ("n_refiner_layers", "context_refiner", "context_refiner"),
        "layer": ("n_layers", "layers", "layers"),
    }
    identity_layers: ClassVar[dict[str, str]] = {"layer": "attention.to_q"}
    modulation: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(("noise", "layer"), ("adaLN_modulation.0",))
    base_spatial_factor = 8
    signature_fields = ("n_layers", "n_refiner_layers", "n_heads", "cap_feat_dim")
    extra_signature_fields = ("axes_dims", "rope_theta")
    fields: ClassVar[dict[str, Check]] = {
        "width": SIZE,
        "dim": SIZE,
        "in_channels": SIZE,
        "all_patch_size": items(PATCH, 1, 1),
        "all_f_patch_size": items(whole(1, 1), 1, 1),
        "n_layers": BLOCKS,
        "n_refiner_layers": BLOCKS,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "cap_feat_dim": SIZE,
        "siglip_feat_dim": optional(SIZE),
        "norm_eps": real(1e-12, 1),
        "qk_norm": flag,
        "rope_theta": real(1, 1e9),
        "t_scale": real(1, 1e6),
        "axes_dims": items(SIZE, 3, 3),
        "axes_lens": items(SIZE, 3, 3),
    }
    needed_fields = ("dim", "in_channels", *signature_fields)

    def ends(self, config: Mapping[str, Any]) -> Ends:
        return _ends(_patch(config))

    def key_map(self, config: Mapping[str, Any]) -> KeyMap:
        return _keys(_patch(config))

    def config_with_latent(self, config: Config, channels: int, patch_size: int = 1) -> Config:
        return {**config, "in_channels": channels, "all_patch_size": [patch_size], "all_f_patch_size": [1]}

    def check_config(self, config: Mapping[str, Any]) -> None:
        super().check_config(config)
        if config.get("siglip_feat_dim") is not None:
            raise ValueError(
                f"siglip_feat_dim is {config['siglip_feat_dim']}: this is the Omni model, whose layers for reference "
                "images are not supported; take Z-Image or Z-Image-Turbo"
            )
        heads, axes = config["n_heads"], _axes(config)
        if config["dim"] % heads or sum(axes) * heads != config["dim"] or any(axis % 2 for axis in axes):
            raise ValueError(f"axes_dims is {axes}, expected even numbers that add up to {config['dim']} / {heads}")
        if config.get("n_kv_heads", heads) != heads or not config.get("qk_norm", True):
            raise ValueError("n_kv_heads differs from n_heads, or qk_norm is off; Z-Image has as many, and norms")

    def width(self, config: Mapping[str, Any]) -> int:
        return int(config["dim"])

    def base_signature(self, config: Config) -> dict[str, Any]:
        rope = {"axes_dims": _axes(config), "rope_theta": float(config.get("rope_theta", 256.0))}
        return {**super().base_signature(config), **rope}

    def packed_channels(self, config: Mapping[str, Any]) -> int:
        return int(config["in_channels"] * _patch(config) ** 2)

    def end_shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return self.latent_shapes({"width": self.width(config)}, config["in_channels"], _patch(config))

    def latent_shapes(self, base: Mapping[str, Any], channels: int, patch_size: int) -> dict[str, tuple[int, ...]]:
        """Also those of the final layer's modulation, whose name depends on the patch size."""
        D, packed, ends = base["width"], channels * patch_size**2, _ends(patch_size)
        modulation = {f"{layer}.weight": (D, min(D, MODULATION)) for layer in ends.named}
        biases = {f"{layer}.bias": (D,) for layer in ends.named}
        return {**self._end_shapes(ends, D, channels, patch_size, packed), **modulation, **biases}

    def embedder_shape(self, width: int, channels: int, p: int) -> tuple[int, ...]:
        """A Linear on packed tokens, channels last within a patch."""
        return width, channels * p * p

    def extra_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {}

    def others(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        D, head = config["dim"], config["dim"] // config["n_heads"]
        top = {"x_pad_token": (1, D), "cap_pad_token": (1, D), "cap_embedder.0.weight": (config["cap_feat_dim"],)}
        norms = {f"{norm}.weight": (D,) for norm in NORMS} | {f"attention.norm_{qk}.weight": (head,) for qk in "qk"}
        return {"": top, **dict.fromkeys(KINDS, norms)}

    def layers(self, base: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        D = base["width"]
        H, A = int(D / 3 * 8), min(D, MODULATION)
        top = {
            "cap_embedder.1": (D, base["cap_feat_dim"]),
            "t_embedder.mlp.0": (TIME_WIDTH, SINUSOIDS),
            "t_embedder.mlp.2": (A, TIME_WIDTH),
        }
        block = {f"attention.{part}": (D, D) for part in ATTENTION}
        block |= {f"feed_forward.w{n}": (D, H) if n == 2 else (H, D) for n in (1, 2, 3)}
        modulated = {**block, "adaLN_modulation.0": (4 * D, A)}
        return {"": top, "noise": modulated, "context": block, "layer": modulated}

    def detect(self, state_dict: Mapping[str, Tensor]) -> Config:
        keys = self.bare_keys(state_dict)
        values = self.read(keys)
        refiners = [count_blocks(keys, f"{name}.") for name in ("noise_refiner", "context_refiner")]
        if refiners[0] != refiners[1]:
            raise ValueError(
                f"{refiners[0]} blocks in noise_refiner, {refiners[1]} in context_refiner: incomplete file"
            )
        p, packed = self._embedder(keys)
        head = dimension(_first_norm(keys, self.is_original(keys)), 0, "the norm of the queries")
        if packed % p**2 or values["dim"] % head:
            raise ValueError(f"{packed} values per token at patch size {p}, width {values['dim']}: not a Z-Image")
        return {
            **values,
            "in_channels": packed // p**2,
            "all_patch_size": [p],
            "all_f_patch_size": [1],
            "n_heads": values["dim"] // head,
            "n_kv_heads": values["dim"] // head,
            "axes_dims": _default_axes(head),
        }

    def _embedder(self, keys: Mapping[str, Tensor]) -> tuple[int, int]:
        """(patch size, values per token); original names have the base's patch size at its number of values, else 1."""
        if self.is_original(keys):
            packed = dimension(keys["x_embedder.weight"], 1, "x_embedder.weight")
            return (BASE_PATCH if packed == BASE_CHANNELS * BASE_PATCH**2 else 1), packed
        names = [key for key in keys if key.startswith("all_x_embedder.") and key.endswith(".weight")]
        if len(names) != 1 or not names[0].removeprefix("all_x_embedder.").removesuffix("-1.weight").isdecimal():
            raise ValueError(f"expected one patch embedder for images, found {', '.join(names) or 'none'}")
        p = int(names[0].removeprefix("all_x_embedder.").removesuffix("-1.weight"))
        PATCH(names[0], p)
        return p, dimension(keys[names[0]], 1, names[0])

    def default_schedule(self, latent: LatentSpace, config: Mapping[str, Any]) -> Schedule:
        """FLUX.2's rule for DC-Gen; turbo's own scheduler has a shift of 3."""
        return Schedule("flux2") if latent.spatial_factor > 8 else Schedule("static", shift=3.0, sigma_max=1.0)


def _patch(config: Mapping[str, Any]) -> int:
    """p of a config, or of a base signature with a patch_size."""
    return int(config["patch_size"] if "patch_size" in config else config.get("all_patch_size", (BASE_PATCH,))[0])


def _default_axes(head: int) -> list[int]:
    """RoPE axes in the published ratio, (32, 48, 48) of 128, as even numbers. No tensor shows them."""
    side = max(2, 2 * round(head * 48 / 128 / 2))
    return [head - 2 * side, side, side]


def _axes(config: Mapping[str, Any]) -> list[int]:
    return list(config.get("axes_dims") or _default_axes(config["dim"] // config["n_heads"]))


def _first_norm(keys: Mapping[str, Tensor], original: bool) -> Tensor:
    for name in KINDS.values():
        key = f"{name}.0.attention.{'q_norm' if original else 'norm_q'}.weight"
        if key in keys:
            return keys[key]
    raise ValueError("this is not a whole Z-Image state dict: no block has a norm of the queries")


BACKBONE = ZImage()
