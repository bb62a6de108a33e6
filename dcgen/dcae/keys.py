"""Key names of the two published DC-AE file formats, as data, and what tensors alone tell about the architecture.

"diffusers" is AutoencoderDC's layout and the state dict of our DCAE; "original" is that of mit-han-lab and dc-ai.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..fields import shown
from .config import MAX_STAGES, DCAEConfig, DCAEError
from .variants import VARIANTS

FORMATS = ("diffusers", "original")

# leaf in diffusers -> leaf in the original, per kind of block
RES_BLOCK = {"conv1": "main.conv1.conv", "conv2": "main.conv2.conv", "norm": "main.conv2.norm"}
ATTENTION = {"attn.norm_out": "context_module.main.proj.norm"}
ATTENTION_SCALE = {
    "attn.to_qkv_multiscale.{s}.proj_in": "context_module.main.aggreg.{s}.0",
    "attn.to_qkv_multiscale.{s}.proj_out": "context_module.main.aggreg.{s}.1",
}
GATED_CONV = {
    "conv_out.conv_inverted": "local_module.main.inverted_conv.conv",
    "conv_out.conv_depth": "local_module.main.depth_conv.conv",
    "conv_out.conv_point": "local_module.main.point_conv.conv",
    "conv_out.norm": "local_module.main.point_conv.norm",
}
# 1x1 convolutions there, linear layers here; to_q / to_k / to_v are thirds of one tensor
QKV, PROJ = "context_module.main.qkv.conv.weight", "context_module.main.proj.conv.weight"
THIRDS = ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight")
OUT = "attn.to_out.weight"


@dataclasses.dataclass(frozen=True)
class Rename:
    """Where one diffusers tensor lives in the original: a key, and for attention the third of its rows."""

    key: str
    third: int | None = None
    linear: bool = False


def rename_table(config: DCAEConfig, keys: list[str]) -> dict[str, Rename]:
    """Map every key of the diffusers state dict of this architecture to where its values are in the original format."""
    modules = _module_names(config)
    table = {}
    for key in keys:
        stage = re.match(r"(encoder\.down_blocks|decoder\.up_blocks)\.(\d+)\.(\d+)\.", key)
        if stage and key.endswith((*THIRDS, OUT)):
            base = modules[stage.group(0)]
            leaf = key[stage.end() :]
            third = THIRDS.index(leaf) if leaf in THIRDS else None
            table[key] = Rename(base + (PROJ if third is None else QKV), third, linear=True)
        else:
            module, _, leaf = key.rpartition(".")
            table[key] = Rename(f"{modules[module]}.{leaf}")
    return table


def _module_names(config: DCAEConfig) -> dict[str, str]:
    """Diffusers module path (or block prefix ending in a dot) -> original module path."""
    down = config.downsample_block_type == "pixel_unshuffle"
    enc_in = ".conv" if config.encoder_layers_per_block[0] == 0 else ""
    dec_out = ".conv" if config.decoder_layers_per_block[0] == 0 else ""
    # a strided conv is a bare layer; the other resamplers wrap their conv once more
    names = {
        f"encoder.conv_in{enc_in}": f"encoder.project_in.conv{enc_in if down else ''}",
        "encoder.conv_out": f"encoder.project_out{'.main' * config.encoder_out_shortcut}.op_list.0.conv",
        "decoder.conv_in": f"decoder.project_in{'.main' * config.decoder_in_shortcut}.conv",
        "decoder.norm_out": "decoder.project_out.op_list.0",
        f"decoder.conv_out{dec_out}": f"decoder.project_out.op_list.2.conv{dec_out}",
    }
    for side, blocks in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        widths, layers = getattr(config, f"{side}_block_out_channels"), getattr(config, f"{side}_layers_per_block")
        for stage, count in enumerate(layers):
            resampled = count > 0 and stage < len(widths) - 1
            first = 1 if side == "decoder" and resampled else 0
            here, there = f"{side}.{blocks}.{stage}", f"{side}.stages.{stage}.op_list"
            for index in range(first, first + count):
                names |= _block_names(config, side, stage, f"{here}.{index}.", f"{there}.{index}.")
            if resampled:
                index = 0 if side == "decoder" else count
                wrapped = ".conv" if side == "decoder" or down else ""
                names[f"{here}.{index}.conv"] = f"{there}.{index}.main.conv{wrapped}"
    return names


def _block_names(config: DCAEConfig, side: str, stage: int, here: str, there: str) -> dict[str, str]:
    if getattr(config, f"{side}_block_types")[stage] == "ResBlock":
        return {here + ours: there + theirs for ours, theirs in RES_BLOCK.items()}
    names = {here: there}
    names |= {here + ours: there + theirs for ours, theirs in (ATTENTION | GATED_CONV).items()}
    for scale in range(len(getattr(config, f"{side}_qkv_multiscales")[stage])):
        for ours, theirs in ATTENTION_SCALE.items():
            names[here + ours.format(s=scale)] = there + theirs.format(s=scale)
    return names


def original_shapes(table: Mapping[str, Rename], shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Shapes that the original format has for a model whose diffusers shapes are `shapes`."""
    original: dict[str, torch.Size] = {}
    for key, rename in table.items():
        shape = shapes[key]
        if rename.linear:
            shape = torch.Size((shape[0] * (1 if rename.third is None else 3), shape[1], 1, 1))
        original[rename.key] = shape
    return original


def from_original(state: Mapping[str, Tensor], table: Mapping[str, Rename]) -> dict[str, Tensor]:
    """Original tensors under diffusers keys; attention weights become (out, in) matrices."""
    tensors = {}
    for key, rename in table.items():
        tensor = state[rename.key]
        if rename.linear:
            tensor = tensor.reshape(tensor.shape[0], tensor.shape[1])
        if rename.third is not None:
            tensor = tensor.chunk(3, 0)[rename.third]
        tensors[key] = tensor
    return tensors


def to_original(state: Mapping[str, Tensor], table: Mapping[str, Rename]) -> dict[str, Tensor]:
    """Inverse of from_original, bit for bit."""
    groups: dict[str, list[Tensor]] = {}
    for key, rename in sorted(table.items(), key=lambda item: item[1].third or 0):
        tensor = state[key]
        groups.setdefault(rename.key, []).append(tensor[..., None, None] if rename.linear else tensor)
    return {key: torch.cat(tensors, 0) if len(tensors) > 1 else tensors[0] for key, tensors in groups.items()}


STAGE_KEY = re.compile(r"(encoder|decoder)\.(?:down_blocks|up_blocks|stages)\.(\d+)\.(?:op_list\.)?(\d+)\.(.+)")
RES_LEAF = {"conv1.weight", "main.conv1.conv.weight"}
OUT_LEAF = {OUT, PROJ}
RESAMPLE_LEAF = {"conv.weight", "main.conv.weight", "main.conv.conv.weight"}
SCALE_LEAF = re.compile(
    r"(?:attn\.to_qkv_multiscale|context_module\.main\.aggreg)\.(\d+)\.(proj_in|proj_out|0|1)\.weight"
)
MARKS = {"diffusers": "decoder.conv_in.weight", "original": "decoder.project_in."}


def find_format(keys: list[str]) -> tuple[str, str] | None:
    """(format, wrapper prefix) of a DC-AE state dict, None when it is something else."""
    for kind, mark in MARKS.items():
        for key in keys:
            start = key.find(mark)
            if start < 0 or (start > 0 and key[start - 1] != "."):
                continue
            prefix = key[:start]
            stages = "decoder.up_blocks." if kind == "diffusers" else "decoder.stages."
            if any(other.startswith(prefix + stages) for other in keys):
                return kind, prefix
    return None


@dataclasses.dataclass
class _Stage:
    kinds: dict[int, str]
    width: int = 0
    scales: dict[int, int] = dataclasses.field(default_factory=dict)
    head_dim: int | None = None
    batch_norm: bool = False
    conv: torch.Size | None = None  # of the resampling convolution


def infer_config(shapes: Mapping[str, torch.Size], kind: str) -> DCAEConfig:
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
    return _config_of(sides, shapes, kind)


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


def _config_of(sides: dict[str, dict[int, _Stage]], shapes: Mapping[str, torch.Size], kind: str) -> DCAEConfig:
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
    if kind == "original":
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


def candidates(config: DCAEConfig) -> list[DCAEConfig]:
    """The published variants with exactly this architecture."""
    return [variant for variant in VARIANTS.values() if variant.architecture == config.architecture]
