"""Key names of the two published DC-AE file formats, as data, and the way from either to a state dict of ours.

"diffusers" is AutoencoderDC's layout and the state dict of our DCAE; "original" is that of mit-han-lab and dc-ai.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..fields import shown
from ..files import Entry
from .config import DCAEConfig, DCAEError

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
# Batch normalisation's training counter, which some writers drop.
COUNTER = "num_batches_tracked"


def stored_names(
    entries: Mapping[str, Entry | Tensor], format: str, config: DCAEConfig, shapes: Mapping[str, torch.Size]
) -> dict[str, Rename]:
    """Where a file in either format has each tensor of `shapes`, which is what the config's network has.

    entries: what the file has, without wrapper prefix. Raises DCAEError that lists missing, unexpected and misshapen
    tensors in the names of the file.
    """
    table = rename_table(config, list(shapes), format)
    expected = stored_shapes(table, shapes)
    optional = {key for key in expected if key.endswith(COUNTER)}
    missing = sorted(set(expected) - set(entries) - optional)
    unexpected = sorted(set(entries) - set(expected))
    misshapen = [
        f"{key} {tuple(entries[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in entries and entries[key].shape != shape
    ]
    misshapen += [
        f"{key} {entries[key].dtype} instead of floating point"
        for key in expected
        if key in entries and key not in optional and not entries[key].dtype.is_floating_point
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    if missing or unexpected or misshapen:
        details = "; ".join(f"{title}: {listed(keys, 12)}" for title, keys in problems if keys)
        raise DCAEError(
            f"the tensors do not fit {config.name or 'DC-AE'!r} ({format} keys). {details}. The file is damaged, or "
            "its config belongs to another autoencoder"
        )
    return table


def listed(keys: list[str], count: int = 5) -> str:
    """The first `count` keys, for an error."""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(key if len(key) < 200 else shown(key) for key in keys[:count]) + more


@dataclasses.dataclass(frozen=True)
class Rename:
    """Where a file has one tensor of the diffusers format: a key, and for attention the third of its rows."""

    key: str
    third: int | None = None
    linear: bool = False


def rename_table(config: DCAEConfig, keys: list[str], format: str = "original") -> dict[str, Rename]:
    """Map every key of the diffusers state dict of this architecture to where a file of `format` has its values."""
    if format == "diffusers":
        return {key: Rename(key) for key in keys}
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
            diffusers_stage, original_stage = f"{side}.{blocks}.{stage}", f"{side}.stages.{stage}.op_list"
            for index in range(first, first + count):
                names |= _block_names(config, side, stage, f"{diffusers_stage}.{index}.", f"{original_stage}.{index}.")
            if resampled:
                index = 0 if side == "decoder" else count
                wrapped = ".conv" if side == "decoder" or down else ""
                names[f"{diffusers_stage}.{index}.conv"] = f"{original_stage}.{index}.main.conv{wrapped}"
    return names


def _block_names(config: DCAEConfig, side: str, stage: int, block: str, original_block: str) -> dict[str, str]:
    if getattr(config, f"{side}_block_types")[stage] == "ResBlock":
        return {block + leaf: original_block + original_leaf for leaf, original_leaf in RES_BLOCK.items()}
    names = {block: original_block}
    names |= {block + leaf: original_block + original_leaf for leaf, original_leaf in (ATTENTION | GATED_CONV).items()}
    for scale in range(len(getattr(config, f"{side}_qkv_multiscales")[stage])):
        for leaf, original_leaf in ATTENTION_SCALE.items():
            names[block + leaf.format(s=scale)] = original_block + original_leaf.format(s=scale)
    return names


def stored_shapes(table: Mapping[str, Rename], shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Shapes of a file's tensors, of a model whose diffusers shapes are `shapes`."""
    stored: dict[str, torch.Size] = {}
    for key, rename in table.items():
        shape = shapes[key]
        if rename.linear:
            shape = torch.Size((shape[0] * (1 if rename.third is None else 3), shape[1], 1, 1))
        stored[rename.key] = shape
    return stored


def from_stored(state: Mapping[str, Tensor], table: Mapping[str, Rename]) -> dict[str, Tensor]:
    """A file's tensors under diffusers keys; attention weights become (out, in) matrices."""
    tensors = {}
    for key, rename in table.items():
        tensor = state[rename.key] if rename.key in state else torch.tensor(0)  # a COUNTER, of no use here
        if rename.linear:
            tensor = tensor.reshape(tensor.shape[0], tensor.shape[1])
        if rename.third is not None:
            tensor = tensor.chunk(3, 0)[rename.third]
        tensors[key] = tensor
    return tensors


def to_original(state: Mapping[str, Tensor], table: Mapping[str, Rename]) -> dict[str, Tensor]:
    """Inverse of from_stored for the original format, bit for bit."""
    groups: dict[str, list[Tensor]] = {}
    for key, rename in sorted(table.items(), key=lambda item: item[1].third or 0):
        tensor = state[key]
        groups.setdefault(rename.key, []).append(tensor[..., None, None] if rename.linear else tensor)
    return {key: torch.cat(tensors, 0) if len(tensors) > 1 else tensors[0] for key, tensors in groups.items()}
