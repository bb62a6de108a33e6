# C latent channels, r LoRA rank
"""DC-Gen on a nunchaku (SVDQuant 4-bit) FLUX, without importing nunchaku.

Its MODEL is a BaseModel whose network is a `ComfyFluxWrapper` around a transformer with diffusers names, most of it in
C++. The embedder and head are plain layers there; they are exchanged for the length of one forward pass, so the
loader's own MODEL, which shares the transformer, is never changed. LoRA go through nunchaku's list of files.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import comfy.model_patcher
import folder_paths
import torch
from safetensors.torch import save_file

from ...dcgen.adapter import Adapter
from ...dcgen.files import replacing
from .latent_format import ModelInfo
from .shared import borrow, linear

WRAPPER = "ComfyFluxWrapper"
# nunchaku's kernels: ranks in steps of 16, and q, k, v of separate LoRA stack on top of the model's own rank 32.
RANK_STEP, RANK_ROOM, OWN_RANK = 16, 1024, 32


def is_nunchaku(model: comfy.model_patcher.ModelPatcher) -> bool:
    """By class name, as other packs do; importing nunchaku fails on machines without its kernels."""
    return type(model.model.diffusion_model).__name__ == WRAPPER


def base_config(model: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """The diffusers config of the wrapped transformer."""
    config = dict(model.model.diffusion_model.model.config)
    return {**config, "axes_dims_rope": list(config["axes_dims_rope"])}


def network(
    model: comfy.model_patcher.ModelPatcher, adapter: Adapter, info: ModelInfo, strength: float
) -> torch.nn.Module:
    """A wrapper of its own around the same transformer, with the adapter's layers and LoRA."""
    wrapper = model.model.diffusion_model
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        path, _, suffix = key.rpartition(".")
        layers.setdefault(path, {})[suffix] = tensor
    made = {path: linear(weights, wrapper.dtype, model.offload_device) for path, weights in layers.items()}
    before = wrapper.customized_forward

    def forward(transformer: torch.nn.Module, **kwargs: Any) -> Any:
        kept = {path: transformer.get_submodule(path) for path in made}
        try:
            for path, layer in made.items():
                _exchange(transformer, path, layer)
            return (before or _call)(transformer, **kwargs)
        finally:
            for path, layer in kept.items():
                _exchange(transformer, path, layer)

    loras = list(wrapper.loras)
    if strength and adapter.lora:
        loras.append((str(_lora_file(adapter)), strength))
    sizes = {"patch_size": info.patch_size, "in_channels": info.space.channels, "out_channels": info.space.channels}
    return borrow(
        wrapper,
        dcgen_layers=torch.nn.ModuleList(made.values()),
        config={**wrapper.config, **sizes},
        loras=loras,
        customized_forward=forward,
        patch_size=info.patch_size,
        _prev_timestep=None,
        _cache_context=None,
    )


def _call(transformer: torch.nn.Module, **kwargs: Any) -> Any:
    return transformer(**kwargs)


def _exchange(transformer: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(transformer.get_submodule(parent), name, layer)


def _lora_file(adapter: Adapter) -> Path:
    """The adapter's LoRA as a file of its own, which is how nunchaku takes LoRA; alpha/rank is folded into B."""
    ranks = {pair.rank for pair in adapter.lora.values()}
    rank = max(ranks)
    if any(r % RANK_STEP for r in ranks) or 3 * rank + OWN_RANK > RANK_ROOM:
        raise ValueError(
            f"this adapter's LoRA has rank {rank}; nunchaku takes multiples of {RANK_STEP} up to "
            f"{(RANK_ROOM - OWN_RANK) // 3 // RANK_STEP * RANK_STEP}. Extract it anew with a smaller rank "
            "(python -m dcgen.convert extract), or merge it and quantize the merged model."
        )
    tensors = {}
    digest = hashlib.sha256()
    for module, pair in sorted(adapter.lora.items()):
        tensors[f"transformer.{module}.lora_A.weight"] = pair.A.contiguous()
        tensors[f"transformer.{module}.lora_B.weight"] = (pair.B * pair.scale).to(pair.B.dtype).contiguous()
    for key, tensor in tensors.items():
        digest.update(key.encode() + tensor.flatten().view(torch.uint8).numpy().data)
    file = Path(folder_paths.get_temp_directory()) / f"dcgen-lora-{digest.hexdigest()[:16]}.safetensors"
    if not file.exists():
        with replacing(file) as temporary:
            save_file(tensors, temporary)
    return file
