"""Which DC-AE some tensors are: the format of their keys, the architecture, and the name and scale of the latent."""

# C latent channels, f spatial factor; stage 0 has the highest resolution

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..fields import shown
from ..files import Entry
from ..jsons import parse_object
from ..kinds import is_quantised, what_it_may_be
from ..latent import METADATA_KEY, LatentSpace
from .config import MAX_STAGES, DCAEConfig, DCAEError
from .keys import OUT, PROJ, listed
from .variants import VARIANTS

T = TypeVar("T")
CONFIG_KEY = "dcgen.dcae"  # of the config in the metadata of a .safetensors file
MARKS = {"diffusers": "decoder.conv_in.weight", "original": "decoder.project_in."}
STAGE_KEY = re.compile(r"(encoder|decoder)\.(?:down_blocks|up_blocks|stages)\.(\d+)\.(?:op_list\.)?(\d+)\.(.+)")
RES_LEAF = {"conv1.weight", "main.conv1.conv.weight"}
OUT_LEAF = {OUT, PROJ}
RESAMPLE_LEAF = {"conv.weight", "main.conv.weight", "main.conv.conv.weight"}
SCALE_LEAF = re.compile(
    r"(?:attn\.to_qkv_multiscale|context_module\.main\.aggreg)\.(\d+)\.(proj_in|proj_out|0|1)\.weight"
)


@dataclasses.dataclass(frozen=True)
class Identity:
    """Format of the keys ("diffusers" or "original"), the prefix that a wrapper put before each, and the config.

    stored_space: the latent space in the file's metadata, which has the preview factors; None without one.
    """

    format: str
    prefix: str
    config: DCAEConfig
    stored_space: LatentSpace | None

    def bare(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Tensors of the file, or anything by their names, without the prefix."""
        return {key.removeprefix(self.prefix): tensor for key, tensor in tensors.items()}


def identify(
    tensors: Mapping[str, Entry | Tensor],
    metadata: Mapping[str, str],
    config_json: Mapping[str, Any] | None,
    stem: str,
    scaling_factor: float | None = None,
) -> Identity:
    """What the tensors of a file are, from them, its metadata and the config.json beside it; reads no values.

    stem: name of the file, which tells variants of one architecture apart and names an unpublished one.
    Raises DCAEError for what is not a DC-AE or leaves the scale open.
    """
    format, prefix = _format(list(tensors))
    if is_quantised(tensors):
        raise DCAEError("a quantised DC-AE (its weights have scales beside them): take the plain one")
    shapes = {key.removeprefix(prefix): torch.Size(tensor.shape) for key, tensor in tensors.items()}
    video = [key for key, shape in shapes.items() if len(shape) == 5]
    if video:
        raise DCAEError(f"a video autoencoder (DC-AE-V): {listed(video)} have 5 dimensions; this reads images")
    try:
        inferred = infer_config(shapes, format)
    except (KeyError, IndexError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise DCAEError(f"the tensors do not form a DC-AE: {error}. Fetch the file again") from error
    given = _given_config(metadata, config_json)
    config = given or inferred
    variants = candidates(config)
    scale = scaling_factor
    if scale is None:
        scale = given.scaling_factor if given else _common_scale(variants)
    if scale is None:
        raise DCAEError(_ambiguity(variants))
    name = config.name if config.name in VARIANTS else _name(config, variants, scale, stem)
    config = dataclasses.replace(config, name=name, scaling_factor=float(scale))
    return Identity(format, prefix, config, _stored_space(metadata, config))


def _stored_space(metadata: Mapping[str, str], config: DCAEConfig) -> LatentSpace | None:
    """The latent space that the file's metadata holds, if it does."""
    if METADATA_KEY not in metadata:
        return None
    try:
        space = LatentSpace.from_metadata(metadata)
    except ValueError as error:
        raise DCAEError(str(error)) from error
    if space.channels != config.latent_channels:
        raise DCAEError(
            f"its metadata speaks of {space.channels} latent channels, its config of {config.latent_channels}; fetch "
            "it again"
        )
    return space


def _format(keys: list[str]) -> tuple[str, str]:
    """Format and wrapper prefix of the keys of a DC-AE."""
    for format, mark in MARKS.items():
        for key in keys:
            start = key.find(mark)
            if start < 0 or (start > 0 and key[start - 1] != "."):
                continue
            prefix = key[:start]
            stages = "decoder.up_blocks." if format == "diffusers" else "decoder.stages."
            if any(other.startswith(prefix + stages) for other in keys):
                return format, prefix
    raise DCAEError(
        "not a DC-AE. Expected keys like 'decoder.stages.*' (original) or 'decoder.up_blocks.*' (diffusers), found "
        f"{listed(keys)}. {what_it_may_be(keys, '')}"
    )


def _given_config(metadata: Mapping[str, str], config_json: Mapping[str, Any] | None) -> DCAEConfig | None:
    """The config in the file's metadata or else in the config.json, if there is one."""
    if CONFIG_KEY in metadata:
        try:
            return DCAEConfig.from_diffusers(parse_object(metadata[CONFIG_KEY], CONFIG_KEY))
        except ValueError as error:
            raise DCAEError(f"metadata {CONFIG_KEY!r} is not a DC-AE config ({error})") from error
    if config_json is None:
        return None
    name = config_json.get("model_name", "")
    if not isinstance(name, str):
        raise DCAEError(f"config.json: model_name is {shown(name)}, expected text")
    if name and "encoder_block_out_channels" not in config_json:  # mit-han-lab / dc-ai repositories
        if name not in VARIANTS:
            raise DCAEError(f"config.json names {shown(name)}; known are {', '.join(VARIANTS)}")
        return VARIANTS[name]
    config = DCAEConfig.from_diffusers(config_json)
    # diffusers leaves the path of whoever saved it there; only the last part can be a name
    return dataclasses.replace(config, name=Path(config.name).name.removesuffix("-diffusers"))


def candidates(config: DCAEConfig) -> list[DCAEConfig]:
    """The published variants with exactly this architecture."""
    return [variant for variant in VARIANTS.values() if variant.architecture == config.architecture]


def _common_scale(variants: list[DCAEConfig]) -> float | None:
    scales = {variant.scaling_factor for variant in variants}
    return scales.pop() if len(scales) == 1 else None


def _name(config: DCAEConfig, variants: list[DCAEConfig], scale: float, stem: str) -> str:
    """The published name of this architecture and scale (the one in the file's name, if several), else its own."""
    published = [variant.name for variant in variants if variant.scaling_factor == scale]
    in_stem = [name for name in published if name in stem]
    return (in_stem or published or [""])[0] or config.name or stem


def _ambiguity(variants: list[DCAEConfig]) -> str:
    if not variants:
        return (
            "a DC-AE of no published architecture and no config.json beside it; "
            "put its config.json there or pass scaling_factor= (1 / RMS of its raw latents)"
        )
    names = " or ".join(f"{fit.name} (scaling_factor={fit.scaling_factor or 'unpublished'})" for fit in variants)
    return (
        f"the tensors alone do not tell {names}. Put its config.json beside the file, or pass the scaling_factor= of "
        "the right one"
    )


@dataclasses.dataclass
class _Stage:
    kinds: dict[int, str]
    width: int = 0
    scales: dict[int, int] = dataclasses.field(default_factory=dict)
    head_dim: int | None = None
    batch_norm: bool = False
    conv: torch.Size | None = None  # of the resampling convolution


def infer_config(shapes: Mapping[str, torch.Size], format: str) -> DCAEConfig:
    """Read the architecture off the tensors (without wrapper prefix); name and scaling_factor stay open (None).

    Diffusers keys do not show the outer shortcuts and activations: those follow the published families.
    """
    sides: dict[str, dict[int, _Stage]] = {"encoder": {}, "decoder": {}}
    for key, shape in shapes.items():
        match = STAGE_KEY.fullmatch(key)
        if match:
            side, stage, index, leaf = match.groups()
            if len(stage) > 2 or int(stage) >= MAX_STAGES or len(index) > 3:
                raise DCAEError(f"{shown(key)} is in a stage or block that no DC-AE has")
            if not shape.numel():
                raise DCAEError(f"{shown(key)} has shape {tuple(shape)}, which holds nothing")
            _record(sides[side].setdefault(int(stage), _Stage({})), int(index), leaf, shape)
    for side, stages in sides.items():
        if not stages or any(stage.width == 0 for stage in stages.values()):
            raise DCAEError(f"the DC-AE {side} has stages without a readable block; the file is not complete")
    return _config_of(sides, shapes, format)


def _record(stage: _Stage, index: int, leaf: str, shape: torch.Size) -> None:
    if leaf in RES_LEAF or leaf in OUT_LEAF:
        stage.kinds[index] = "ResBlock" if leaf in RES_LEAF else "EfficientViTBlock"
        stage.width = shape[0]
    elif leaf in RESAMPLE_LEAF:
        stage.conv = shape
    elif leaf.endswith("running_mean"):
        stage.batch_norm = True
    elif scale := SCALE_LEAF.fullmatch(leaf):
        if scale.group(2) in ("proj_in", "0"):
            stage.scales[int(scale.group(1))] = shape[-1]
        else:
            stage.head_dim = shape[1]


def _config_of(sides: dict[str, dict[int, _Stage]], shapes: Mapping[str, torch.Size], format: str) -> DCAEConfig:
    values: dict[str, Any] = {}
    for side, stages in sides.items():
        count = max(stages) + 1
        listed = [stages.get(index) for index in range(count)]
        widths = [stage.width if stage else 0 for stage in listed]
        # the width of an empty stage 0 leaves no trace and has no effect; published files have half of stage 1
        values[f"{side}_block_out_channels"] = tuple(
            width or widths[min(index + 1, count - 1)] // 2 for index, width in enumerate(widths)
        )
        values[f"{side}_layers_per_block"] = tuple(len(stage.kinds) if stage else 0 for stage in listed)
        values[f"{side}_block_types"] = tuple(_kind(stage) for stage in listed)
        values[f"{side}_qkv_multiscales"] = tuple(
            tuple(stage.scales[s] for s in sorted(stage.scales)) if stage else () for stage in listed
        )
        if side == "decoder":
            norms = [bool(stage and stage.batch_norm) for stage in listed]
            norms[0] = norms[0] or (listed[0] is None and len(norms) > 1 and norms[1])
            values["decoder_norm_types"] = tuple("batch_norm" if norm else "rms_norm" for norm in norms)
            values["decoder_act_fns"] = tuple("relu" if norm else "silu" for norm in norms)
    head_dims = [stage.head_dim for stages in sides.values() for stage in stages.values() if stage.head_dim]
    attends = {
        side: any("EfficientViTBlock" in stage.kinds.values() for stage in stages.values())
        for side, stages in sides.items()
    }
    enc, dec = sides["encoder"], sides["decoder"]
    first, conv = min((index, stage.conv) for index, stage in enc.items() if stage.conv is not None)
    values["downsample_block_type"] = "pixel_unshuffle" if conv[0] * 4 == enc[first + 1].width else "Conv"
    first, conv = min((index, stage.conv) for index, stage in dec.items() if stage.conv is not None)
    values["upsample_block_type"] = "interpolate" if conv[0] == dec[first].width else "pixel_shuffle"
    if format == "original":
        shortcuts = ("encoder.project_out.main.op_list.0.conv.weight", "decoder.project_in.main.conv.weight")
        values["encoder_out_shortcut"], values["decoder_in_shortcut"] = (key in shapes for key in shortcuts)
    else:
        values["encoder_out_shortcut"] = values["decoder_in_shortcut"] = attends["encoder"]
    return DCAEConfig(
        in_channels=_inputs(shapes, "encoder"),
        latent_channels=_inputs(shapes, "decoder"),
        attention_head_dim=head_dims[0] if head_dims else 32,
        decoder_conv_act_fn="relu" if attends["decoder"] else "silu",
        scaling_factor=None,
        **values,
    )


def _kind(stage: _Stage | None) -> str:
    return next(iter(stage.kinds.values())) if stage else "ResBlock"


def _inputs(shapes: Mapping[str, torch.Size], side: str) -> int:
    first = (f"{side}.project_in.", f"{side}.conv_in.")
    for key, shape in shapes.items():
        if key.startswith(first) and key.endswith("weight") and len(shape) > 1:
            return shape[1]
    raise DCAEError(f"no tensor of {' or '.join(first)}* tells how many channels the {side} takes")
