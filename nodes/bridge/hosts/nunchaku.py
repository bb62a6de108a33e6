# C latent channels, r LoRA rank
"""A MODEL of ComfyUI-nunchaku (SVDQuant, 4 bits), without importing nunchaku.

Its network is a wrapper, known by the name of its class, around a transformer with diffusers names, most of it in
C++. The embedder and head are plain layers there; they are exchanged for the length of one forward pass, so the
loader's own MODEL, which shares the transformer, is never changed. LoRA go through nunchaku's list of files.
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

# nunchaku's kernels take ranks in steps of 16 up to 1024, unchecked above; all LoRA of a layer, and each of separate
# q, k, v, stack on top of the model's own rank 32.
RANK_STEP, RANK_ROOM, OWN_RANK, STACKED = 16, 1024, 32, 3
# Layers that are one layer in nunchaku's files; its converter fails when a LoRA has only some of them.
TOGETHER = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("ff.net.0.proj", "ff.net.2"),
    ("ff_context.net.0.proj", "ff_context.net.2"),
    ("proj_mlp", "proj_out"),
)
BLOCKS = "transformer_blocks."
WRAPPER = re.compile(r"Comfy[A-Za-z0-9]+Wrapper")  # importing nunchaku fails on machines without its kernels
HINT = " A nunchaku model takes LoRA from nunchaku's own loader only, placed before Apply DC-Gen."


class _NotCopied(dict):
    """What nunchaku's later nodes rebuild a MODEL from, and would lose DC-Gen by it."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(
            "nunchaku's LoRA and PuLID nodes build the model anew, without DC-Gen. Put them between nunchaku's loader "
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
        """The diffusers config of the wrapped transformer; tuples as lists, as JSON has them."""
        config = dict(model.model.diffusion_model.model.config)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}

    def weight(self, model: Patcher, family: Family, config: Config, name: str) -> None:
        """None: the blocks are packed for its kernels."""
        return

    def apply(self, model: Patcher, family: Family, adapter: Adapter, info: FamilyInfo, strength: float) -> Patcher:
        with torch.inference_mode(False):
            patcher = overlay_patcher(model, network(model, adapter, info, strength), deep_config(model, family, info))
        finish(family, patcher.model, info)
        return patcher


def network(model: Patcher, adapter: Adapter, info: FamilyInfo, strength: float) -> torch.nn.Module:
    """A wrapper of its own around the same transformer, with the adapter's layers and LoRA."""
    wrapper = model.model.diffusion_model
    # merge_tensor gives an adapter's own tensors back as they are: here they are the base, and its LoRA goes on them.
    blocks_only = replace(adapter, tensors={})
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        path, _, suffix = key.rpartition(".")
        layers.setdefault(path, {})[suffix] = merge_tensor(key, tensor, blocks_only, strength)
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

    loras, lora = list(wrapper.loras), _completed(adapter)
    if strength and lora:
        _check_ranks(lora, [file for file, _ in loras])
        loras.append((str(_lora_file(lora)), strength))
    sizes = {"patch_size": info.patch_size, "in_channels": info.space.channels, "out_channels": info.space.channels}
    own = {
        "dcgen_lora_hint": HINT,
        "dcgen_layers": torch.nn.ModuleList(made.values()),
        "config": {**wrapper.config, **sizes},
        "loras": loras,
        "customized_forward": forward,
        "ctx_for_copy": _NotCopied(),
        "_prev_timestep": None,
        "_cache_context": None,
    }
    return overlay(wrapper, own)


def _call(transformer: torch.nn.Module, **kwargs: Any) -> Any:
    return transformer(**kwargs)


def _exchange(transformer: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(transformer.get_submodule(parent), name, layer)


def _check_ranks(lora: Mapping[str, LoraPair], others: list[str]) -> None:
    """ValueError when the LoRA stacked on one layer are more than nunchaku's kernels have room for."""
    ranks = {pair.rank for pair in lora.values()}
    room = RANK_ROOM - OWN_RANK
    if any(rank % RANK_STEP for rank in ranks) or STACKED * max(ranks) > room:
        raise ValueError(
            f"this adapter's LoRA has rank {max(ranks)}; nunchaku takes multiples of {RANK_STEP} up to "
            f"{room // STACKED // RANK_STEP * RANK_STEP}. Extract it anew with a smaller rank "
            "(python -m dcgen.convert extract), or merge it and quantize the merged model."
        )
    stacked = {file: STACKED * _rank(file) for file in others}
    if STACKED * max(ranks) + sum(stacked.values()) > room:
        raise ValueError(
            f"too many LoRA for nunchaku: the adapter's rank {max(ranks)} and "
            f"{', '.join(f'{Path(file).name} (rank {rank // STACKED})' for file, rank in stacked.items())} may add up "
            f"to {room // STACKED} (its kernels take {RANK_ROOM} in all, with q, k and v apart). Leave one out, or "
            "extract the adapter with a smaller rank (python -m dcgen.convert extract)."
        )


def _rank(file: str) -> int:
    """The largest rank in a LoRA file, as nunchaku pads it."""
    downs = (".lora_A.weight", ".lora_down.weight", ".lora_A", ".lora.down.weight")
    ranks = [entry.shape[0] for key, entry in Tensors.open(file).entries.items() if key.endswith(downs)]
    return -(-max(ranks, default=0) // RANK_STEP) * RANK_STEP


def _completed(adapter: Adapter) -> dict[str, LoraPair]:
    """The LoRA without the layers that the adapter brings whole, with zeros where nunchaku needs a partner."""
    whole = {key.rpartition(".")[0] for key in adapter.tensors}
    lora = {path: pair for path, pair in adapter.lora.items() if path not in whole}
    shapes = adapter.model.linears(adapter.base)
    for path, pair in list(lora.items()):
        for group in TOGETHER:
            own = next((name for name in group if BLOCKS in path and path.endswith(f".{name}")), "")
            for name in group if own else ():
                partner = path.removesuffix(own) + name
                if partner in shapes and partner not in lora:
                    out, width = shapes[partner][:2]
                    zeros = pair.A.new_zeros(pair.rank, width), pair.B.new_zeros(out, pair.rank)
                    lora[partner] = LoraPair(*zeros, pair.alpha)
    return lora


def _lora_file(lora: Mapping[str, LoraPair]) -> Path:
    """LoRA as a file of its own, which is how nunchaku takes LoRA; alpha/rank is folded into B."""
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
