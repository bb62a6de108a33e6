"""What a DC-AE looks like, as data: the fields of diffusers' AutoencoderDC config.json plus a name.

Sources: arXiv:2410.10733 (DC-AE), arXiv:2508.00413 (DC-AE 1.5), mit-han-lab/efficientvit and dc-ai model zoos.
"""

# C latent channels, f spatial factor; stage 0 has the highest resolution

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..fields import Check, check_fields, flag, items, optional, real, shown, text, whole, words

BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
NORM_TYPES = ("rms_norm", "batch_norm")
ACTIVATIONS = ("silu", "relu", "relu6", "gelu", "mish")


# f128 has 8 stages, the deepest published one 10 layers, the widest 2048 channels.
MAX_STAGES, MAX_LAYERS, MAX_CHANNELS = 12, 64, 1 << 14


class DCAEError(ValueError):
    """A file, config or tensor which is not what a DC-AE needs. The message says what to do."""


@dataclasses.dataclass(frozen=True)
class DCAEConfig:
    """Architecture and latent scale of one DC-AE.

    Field names and meanings are those of diffusers' ``AutoencoderDC``; per-stage fields always hold one entry per
    stage (stage 0 is the one at full resolution; 0 layers there means that the first conv already halves the size).
    ``scaling_factor`` is 1 / RMS of the raw latent and is *not* applied by ``DCAE.encode`` / ``decode``; None where
    no published figure exists.
    """

    name: str = ""
    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = ("ResBlock",) * 6
    decoder_block_types: tuple[str, ...] = ("ResBlock",) * 6
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: tuple[str, ...] = ("rms_norm",) * 6
    decoder_act_fns: tuple[str, ...] = ("silu",) * 6
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float | None = 1.0

    def __post_init__(self) -> None:
        try:
            check_fields(vars(self), CONFIG_FIELDS)
            for side in ("encoder", "decoder"):
                self._check_stages(side)
        except ValueError as error:
            raise DCAEError(f"DC-AE config {shown(self.name)}: {error}") from error
        if _factor(self.encoder_layers_per_block) != _factor(self.decoder_layers_per_block):
            raise DCAEError(
                f"DC-AE config {self.name!r}: the encoder shrinks {_factor(self.encoder_layers_per_block)}x, the "
                f"decoder grows {_factor(self.decoder_layers_per_block)}x; layers_per_block must agree"
            )

    def _check_stages(self, side: str) -> None:
        widths = getattr(self, f"{side}_block_out_channels")
        for field in (*PER_STAGE[side], f"{side}_layers_per_block"):
            if len(getattr(self, field)) != len(widths):
                raise ValueError(
                    f"{field} has {len(getattr(self, field))} entries, but {side}_block_out_channels has "
                    f"{len(widths)} stages; give one entry per stage"
                )

    @property
    def spatial_factor(self) -> int:
        """f: image pixels per latent pixel along each axis."""
        return _factor(self.encoder_layers_per_block)

    @property
    def has_attention(self) -> bool:
        """Whether any stage attends globally (then plain tiling changes the image)."""
        return "EfficientViTBlock" in _used(self.encoder_block_types, self.encoder_layers_per_block) or (
            "EfficientViTBlock" in _used(self.decoder_block_types, self.decoder_layers_per_block)
        )

    @property
    def architecture(self) -> tuple[Any, ...]:
        """Everything that tensors can tell: equal for files which differ only in name, scale or unused fields."""
        values = dataclasses.asdict(dataclasses.replace(self, name="", scaling_factor=None))
        for side in ("encoder", "decoder"):
            for stage, layers in enumerate(values[f"{side}_layers_per_block"]):
                is_res_block = values[f"{side}_block_types"][stage] == "ResBlock"
                unused = (f"{side}_qkv_multiscales",) if is_res_block else ("decoder_act_fns",) * (side == "decoder")
                for field in PER_STAGE[side] if layers == 0 else unused:
                    values[field] = (*values[field][:stage], None, *values[field][stage + 1 :])
        if not self.has_attention:
            values["attention_head_dim"] = None
        values["downsample_block_type"] = self.downsample_block_type == "pixel_unshuffle"
        values["upsample_block_type"] = self.upsample_block_type == "interpolate"
        return tuple(sorted((key, _frozen(value)) for key, value in values.items()))

    def to_diffusers(self) -> dict[str, Any]:
        """The config.json that diffusers' AutoencoderDC reads."""
        if self.scaling_factor is None:
            raise DCAEError(f"DC-AE {self.name!r} has no known scaling_factor; pass scaling_factor= when loading it")
        values = dataclasses.asdict(self)
        name = values.pop("name")
        lists = {key: _thawed(value) for key, value in values.items()}
        return {"_class_name": "AutoencoderDC", "_name_or_path": name, **lists}

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], name: str = "") -> DCAEConfig:
        """Read a diffusers AutoencoderDC config (unlisted fields take that class's defaults).

        Raises DCAEError for a config of another class or with values that no DC-AE has; logs fields it does not know.
        """
        class_name = values.get("_class_name", "AutoencoderDC")
        if class_name != "AutoencoderDC":
            raise DCAEError(f"config.json describes a {shown(class_name)}, expected an AutoencoderDC (DC-AE)")
        given = {key: value for key, value in values.items() if not key.startswith("_")}
        known = {field.name for field in dataclasses.fields(cls)} - {"name"}
        unknown = sorted(set(given) - known)
        if unknown:  # as diffusers does: what shapes the network is checked against the tensors anyway
            logging.warning("AutoencoderDC config: ignored fields that are not known here: %s", shown(unknown))
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        merged = {key: given.get(key, defaults[key]) for key in known}
        for side in ("encoder", "decoder"):
            widths = f"{side}_block_out_channels"
            try:
                check_fields(merged, {widths: CONFIG_FIELDS[widths]})
            except ValueError as error:
                raise DCAEError(f"AutoencoderDC config: {error}") from error
            stages = len(merged[widths])
            # diffusers' defaults of these fields are single words; ours are spelled out for six stages
            for field in PER_STAGE[side]:
                if isinstance(merged[field], str):
                    merged[field] = (merged[field],) * stages
                elif field not in given and not field.endswith(("out_channels", "layers_per_block", "multiscales")):
                    merged[field] = (merged[field][0],) * stages
        frozen = {key: _frozen(value) for key, value in merged.items()}
        return cls(name=name or values.get("_name_or_path") or "", **frozen)


PER_STAGE = {
    "encoder": ("encoder_block_types", "encoder_block_out_channels", "encoder_qkv_multiscales"),
    "decoder": (
        "decoder_block_types",
        "decoder_block_out_channels",
        "decoder_qkv_multiscales",
        "decoder_norm_types",
        "decoder_act_fns",
    ),
}


_CHANNELS = items(whole(1, MAX_CHANNELS), 1, MAX_STAGES)
_LAYERS = items(whole(0, MAX_LAYERS), 1, MAX_STAGES)
_KINDS = items(words(*BLOCK_TYPES), 1, MAX_STAGES)
_SCALES = items(items(whole(1, 63), 0, 8), 1, MAX_STAGES)
CONFIG_FIELDS: dict[str, Check] = {
    "name": text(4096),
    "in_channels": whole(1, 64),
    "latent_channels": whole(1, 4096),
    "attention_head_dim": whole(1, 1024),
    "encoder_block_types": _KINDS,
    "decoder_block_types": _KINDS,
    "encoder_block_out_channels": _CHANNELS,
    "decoder_block_out_channels": _CHANNELS,
    "encoder_layers_per_block": _LAYERS,
    "decoder_layers_per_block": _LAYERS,
    "encoder_qkv_multiscales": _SCALES,
    "decoder_qkv_multiscales": _SCALES,
    "upsample_block_type": text(64),
    "downsample_block_type": text(64),
    "decoder_norm_types": items(words(*NORM_TYPES), 1, MAX_STAGES),
    "decoder_act_fns": items(words(*ACTIVATIONS), 1, MAX_STAGES),
    "encoder_out_shortcut": flag,
    "decoder_in_shortcut": flag,
    "decoder_conv_act_fn": words(*ACTIVATIONS),
    "scaling_factor": optional(real(1e-6, 1e6)),
}


def _factor(layers: Sequence[int]) -> int:
    # an empty stage 0 still halves (in the first conv); an empty later stage has no resampling block at all
    halvings = (layers[0] == 0) + sum(count > 0 for count in layers[:-1])
    return 1 << halvings


def _used(words: Sequence[str], layers: Sequence[int]) -> tuple[str, ...]:
    return tuple(word for word, count in zip(words, layers, strict=True) if count)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value
