# B batch, C latent channels, f spatial factor
"""An f8 AutoencoderKL in the diffusers layout (vae/ of a base release) as ComfyUI's own VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ...dcgen.tensors import Tensors

_GROUPS = 32
# Releases before 2023 have the names query, key, value and proj_attn.
_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def load_kl_vae(folder: Path, config: dict[str, Any]) -> comfy.sd.VAE:
    """VAE from a folder with an AutoencoderKL config.json and its weights."""
    widths = config["block_out_channels"]
    if any(width % _GROUPS or width % widths[0] for width in widths):
        raise ValueError(
            f"{folder}: ComfyUI's f8 VAE takes widths in multiples of {_GROUPS} and of the first, found {widths}"
        )
    weights = Tensors.open(folder)
    layers = config.get("layers_per_block", 2)
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


def original_keys(tensors: dict[str, Tensor], levels: int, layers: int) -> dict[str, Tensor]:
    """diffusers' AutoencoderKL names -> the original ones; attention linears become 1x1 convolutions."""
    heads = {"conv_norm_out": "norm_out", "quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    names: dict[str, str] = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
    names |= {f"mid_block.attentions.0.{old}": f"mid.attn_1.{new}" for old, new in _ATTENTION.items()}
    for level in range(levels):
        mirror = levels - 1 - level  # diffusers counts the decoder from the deepest level
        names |= {f"down_blocks.{level}.resnets.{i}": f"down.{level}.block.{i}" for i in range(layers)}
        names |= {f"up_blocks.{level}.resnets.{i}": f"up.{mirror}.block.{i}" for i in range(layers + 1)}
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"down.{level}.downsample.conv"
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"up.{mirror}.upsample.conv"
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        side, _, rest = key.partition(".")
        module = rest.rpartition(".")[0]
        stem = next((old for old in names if module == old or module.startswith(f"{old}.")), None)
        if side not in ("encoder", "decoder"):
            renamed[key] = tensor
            continue
        tail = rest if stem is None else names[stem] + rest[len(stem) :]
        for old, new in heads.items():
            tail = tail.replace(old, new) if tail.startswith(old) else tail
        if ".attn_1." in tail and tail.endswith(".weight") and tensor.ndim == 2:
            tensor = tensor.reshape(*tensor.shape, 1, 1)
        renamed[f"{side}.{tail.replace('conv_shortcut', 'nin_shortcut')}"] = tensor
    return renamed


def _check(vae: comfy.sd.VAE, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = set(vae.first_stage_model.state_dict())
    missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unknown:
        raise ValueError(f"{folder}: missing {missing[:8]}, unknown {unknown[:8]}")
