# B batch, C latent channels, f spatial factor
"""An f8 AutoencoderKL in the diffusers layout (vae/ of a base release) as ComfyUI's own VAE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import comfy.sd
import torch
from torch import Tensor

from ...dcgen.backbones.keymap import KeyMap, Row
from ...dcgen.files import naming
from ...dcgen.folder import Autoencoder

_GROUPS = 32
# Names of releases before 2023 -> today's.
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_kl_vae(source: Autoencoder) -> comfy.sd.VAE:
    """VAE from a folder with an AutoencoderKL."""
    folder, config, weights = source.path, source.config, source.stored()
    widths = config["block_out_channels"]
    if any(width % _GROUPS or width % widths[0] for width in widths):
        raise ValueError(
            f"{folder}: ComfyUI's f8 VAE takes widths in multiples of {_GROUPS} and of the first, found {widths}"
        )
    layers = config.get("layers_per_block", 2)
    with naming(folder):
        tensors = original_keys({name: weights.get(name) for name in weights.entries}, len(widths), layers)
    channels, dtype = config["latent_channels"], tensors["encoder.conv_in.weight"].dtype
    for name, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        # FLUX's VAE has neither; ComfyUI's class has both, so they become the identity.
        tensors.setdefault(f"{name}.weight", torch.eye(size, dtype=dtype).reshape(size, size, 1, 1))
        tensors.setdefault(f"{name}.bias", torch.zeros(size, dtype=dtype))
    sizes = {
        "double_z": True,
        "z_channels": channels,
        "resolution": config.get("sample_size", 256),
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": layers,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    vae = comfy.sd.VAE(sd=tensors, config={"params": {"ddconfig": sizes, "embed_dim": channels}})
    _check(vae, tensors, folder)
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = config.get("norm_num_groups", _GROUPS)
    vae.latent_channels = channels
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(widths) - 1)
    return vae


def original_keys(tensors: Mapping[str, Tensor], levels: int, layers: int) -> dict[str, Tensor]:
    """diffusers' AutoencoderKL names -> the original ones; attention linears become 1x1 convolutions.

    ValueError lists missing and unknown keys.
    """
    renamed = key_map(levels, layers).to_original({_today(key): value for key, value in tensors.items()}, {})
    return {
        key: value.reshape(*value.shape, 1, 1) if ".attn_1." in key and value.ndim == 2 else value
        for key, value in renamed.items()
    }


def key_map(levels: int, layers: int) -> KeyMap:
    """Rows of an AutoencoderKL with so many levels, and residual blocks in a level of the encoder."""
    rows = [Row(name, (name,), optional=name) for name in ("quant_conv", "post_quant_conv")]
    for side, path, count, resample in (("encoder", "down", layers, "down"), ("decoder", "up", layers + 1, "up")):
        rows += [Row(f"{side}.{name}", (f"{side}.{name}",)) for name in ("conv_in", "conv_out")]
        rows += [Row(f"{side}.norm_out", (f"{side}.conv_norm_out",))]
        rows += _attention(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
        for i in range(2):
            rows += _residual(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}")
        for level in range(levels):
            ours = level if side == "encoder" else levels - 1 - level  # diffusers counts the decoder from the deepest
            theirs = f"{side}.{path}_blocks.{level}"
            for i in range(count):
                rows += _residual(f"{side}.{path}.{ours}.block.{i}", f"{theirs}.resnets.{i}")
            original, name = f"{side}.{path}.{ours}.{resample}sample.conv", f"{theirs}.{resample}samplers.0.conv"
            rows += [Row(original, (name,), optional=original)]
    return KeyMap("AutoencoderKL", tuple(rows), {})


def _residual(original: str, name: str) -> list[Row]:
    rows = [Row(f"{original}.{part}", (f"{name}.{part}",)) for part in ("norm1", "conv1", "norm2", "conv2")]
    shortcut = f"{original}.nin_shortcut"  # where the width changes
    return [*rows, Row(shortcut, (f"{name}.conv_shortcut",), optional=shortcut)]


def _attention(original: str, name: str) -> list[Row]:
    parts = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    return [Row(f"{original}.{ours}", (f"{name}.{theirs}",), optional=original) for ours, theirs in parts.items()]


def _today(key: str) -> str:
    module, _, end = key.rpartition(".")
    path, _, last = module.rpartition(".")
    return f"{path}.{_FORMER[last]}.{end}" if last in _FORMER else key


def _check(vae: comfy.sd.VAE, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = set(vae.first_stage_model.state_dict())
    missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unknown:
        raise ValueError(f"{folder}: missing {missing[:8]}, unknown {unknown[:8]}")
