# C latent channels, r LoRA rank
"""MODELs of ComfyUI-nunchaku (SVDQuant, 4 bits), without importing nunchaku.

Its network is a wrapper, recognised by its class name, around a transformer with diffusers names, most of it in C++.
The embedder and head are plain layers; they are swapped in for each forward pass and out after it, so the loader's own
MODEL, which shares the transformer, is not changed. LoRA go through nunchaku's list of files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from safetensors.torch import save_file

from ....dcgen.adapter import Adapter, LoraPair, merge_tensor
from ....dcgen.backbones import Config
from ....dcgen.files import replacing
from ....dcgen.tensors import Tensors
from ..families import family_of, family_of_config
from ..family import Family
from ..host import Host, Patcher
from ..latent_format import FamilyInfo
from ..loader import finish
from ..overlay import linear, overlay, overlay_patcher
from .core import deep_config

# nunchaku's kernels take ranks in multiples of 16 up to 1024 and do not check the limit. All LoRA of a layer, and each
# of separate q, k, v, add to the model's own rank 32.
RANK_STEP, MAX_RANK, OWN_RANK, STACKED = 16, 1024, 32, 3
# Layers that are fused in nunchaku's files; its converter fails when a LoRA has only some of them.
FUSED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("ff.net.0.proj", "ff.net.2"),
    ("ff_context.net.0.proj", "ff_context.net.2"),
    ("proj_mlp", "proj_out"),
)
BLOCKS = "transformer_blocks."
WRAPPER = re.compile(r"Comfy[A-Za-z0-9]+Wrapper")  # importing nunchaku fails without its kernels
HINT = " A nunchaku model takes LoRA from nunchaku's own loader only, placed before Apply DC-Gen."


class _NotCopied(dict):
    """nunchaku's later nodes rebuild a MODEL from this dict, which would drop DC-Gen: refuse it."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(
            "nunchaku's LoRA and PuLID nodes rebuild the model, without DC-Gen. Put them between nunchaku's loader "
            "and Apply DC-Gen."
        )


class Nunchaku(Host):
    """ComfyUI-nunchaku."""

    order = 1

    def recognises(self, model: Patcher) -> bool:
        network = model.model.diffusion_model
        return WRAPPER.fullmatch(type(network).__name__) is not None and hasattr(network, "customized_forward")

    def family(self, model: Patcher) -> Family:
        return family_of_config(self._config(model)) or family_of(model.model)

    def config(self, model: Patcher, family: Family) -> Config:
        return self._config(model)

    def _config(self, model: Patcher) -> Config:
        """The diffusers config of the wrapped transformer, with lists for tuples, as in JSON."""
        config = dict(model.model.diffusion_model.model.config)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}

    def weight(self, model: Patcher, family: Family, config: Config, name: str) -> None:
        """None: the weights are packed for nunchaku's kernels."""
        return

    def apply(self, model: Patcher, family: Family, adapter: Adapter, info: FamilyInfo, strength: float) -> Patcher:
        with torch.inference_mode(False):
            patcher = overlay_patcher(model, network(model, adapter, info, strength), deep_config(model, family, info))
        finish(family, patcher.model, info)
        return patcher


def network(model: Patcher, adapter: Adapter, info: FamilyInfo, strength: float) -> torch.nn.Module:
    """A new wrapper around the same transformer, with the adapter's layers and LoRA."""
    wrapper = model.model.diffusion_model
    # merge_tensor returns an adapter's own tensors unchanged; here they are the base that its LoRA is merged into.
    blocks_only = replace(adapter, tensors={})
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        path, _, suffix = key.rpartition(".")
        tensors.setdefault(path, {})[suffix] = merge_tensor(key, tensor, blocks_only, strength)
    layers = {path: linear(weights, wrapper.dtype, model.offload_device) for path, weights in tensors.items()}
    inner_forward = wrapper.customized_forward

    def forward(transformer: torch.nn.Module, **kwargs: Any) -> Any:
        originals = {path: transformer.get_submodule(path) for path in layers}
        try:
            for path, layer in layers.items():
                _exchange(transformer, path, layer)
            return (inner_forward or _call)(transformer, **kwargs)
        finally:
            for path, layer in originals.items():
                _exchange(transformer, path, layer)

    loras, lora = list(wrapper.loras), _completed(adapter)
    if strength and lora:
        _check_ranks(lora, [file for file, _ in loras])
        loras.append((str(_lora_file(lora)), strength))
    sizes = {"patch_size": info.patch_size, "in_channels": info.space.channels, "out_channels": info.space.channels}
    attributes = {
        "dcgen_lora_hint": HINT,
        "dcgen_layers": torch.nn.ModuleList(layers.values()),
        "config": {**wrapper.config, **sizes},
        "loras": loras,
        "customized_forward": forward,
        "ctx_for_copy": _NotCopied(),
        "_prev_timestep": None,
        "_cache_context": None,
    }
    return overlay(wrapper, attributes)


def _call(transformer: torch.nn.Module, **kwargs: Any) -> Any:
    return transformer(**kwargs)


def _exchange(transformer: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(transformer.get_submodule(parent), name, layer)


def _check_ranks(lora: Mapping[str, LoraPair], others: list[str]) -> None:
    """ValueError when the LoRA on one layer exceed the rank that nunchaku's kernels take."""
    ranks = {pair.rank for pair in lora.values()}
    limit = MAX_RANK - OWN_RANK
    if any(rank % RANK_STEP for rank in ranks) or STACKED * max(ranks) > limit:
        raise ValueError(
            f"this adapter's LoRA has rank {max(ranks)}; nunchaku takes multiples of {RANK_STEP} up to "
            f"{limit // STACKED // RANK_STEP * RANK_STEP}. Extract it again with a smaller rank "
            "(python -m dcgen.convert extract), or merge it and quantize the merged model."
        )
    stacked = {file: STACKED * _rank(file) for file in others}
    if STACKED * max(ranks) + sum(stacked.values()) > limit:
        raise ValueError(
            f"too many LoRA for nunchaku: the adapter's rank {max(ranks)} and "
            f"{', '.join(f'{Path(file).name} (rank {rank // STACKED})' for file, rank in stacked.items())} may add up "
            f"to {limit // STACKED} (its kernels take {MAX_RANK} in all, with q, k and v apart). Leave one out, or "
            "extract the adapter with a smaller rank (python -m dcgen.convert extract)."
        )


def _rank(file: str) -> int:
    """The largest rank in a LoRA file, padded as nunchaku does."""
    suffixes = (".lora_A.weight", ".lora_down.weight", ".lora_A", ".lora.down.weight")
    ranks = [entry.shape[0] for key, entry in Tensors.open(file).entries.items() if key.endswith(suffixes)]
    return -(-max(ranks, default=0) // RANK_STEP) * RANK_STEP


def _completed(adapter: Adapter) -> dict[str, LoraPair]:
    """The LoRA without the layers that the adapter replaces, and with zeros for missing layers of a fused group."""
    replaced = {key.rpartition(".")[0] for key in adapter.tensors}
    lora = {path: pair for path, pair in adapter.lora.items() if path not in replaced}
    shapes = adapter.model.linears(adapter.base)
    for path, pair in list(lora.items()):
        for group in FUSED:
            member = next((name for name in group if BLOCKS in path and path.endswith(f".{name}")), "")
            for name in group if member else ():
                partner = path.removesuffix(member) + name
                if partner in shapes and partner not in lora:
                    out, width = shapes[partner][:2]
                    zeros = pair.A.new_zeros(pair.rank, width), pair.B.new_zeros(out, pair.rank)
                    lora[partner] = LoraPair(*zeros, pair.alpha)
    return lora


def _lora_file(lora: Mapping[str, LoraPair]) -> Path:
    """The LoRA as a file, the only form that nunchaku takes; alpha/rank is folded into B."""
    tensors = {}
    digest = hashlib.sha256()
    for module, pair in sorted(lora.items()):
        tensors[f"transformer.{module}.lora_A.weight"] = pair.A.contiguous()
        tensors[f"transformer.{module}.lora_B.weight"] = (pair.B * pair.scale).to(pair.B.dtype).contiguous()
    for key, tensor in tensors.items():
        digest.update(key.encode() + tensor.flatten().view(torch.uint8).numpy().data)
    file = Path(folder_paths.get_temp_directory()) / f"dcgen-lora-{digest.hexdigest()[:16]}.safetensors"
    if not file.exists():
        with replacing(file) as temporary:
            save_file(tensors, temporary)
    return file


HOST = Nunchaku()
