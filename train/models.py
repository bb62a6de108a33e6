"""Base models on disk: the network of a release, and that network moved to another latent."""
# D width

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcgen.backbones import Config
from dcgen.files import check_finite
from dcgen.folder import TRANSFORMER, VAE, Release, network_config, part, read_release
from dcgen.tensors import Tensors
from train.families import family_of
from train.family import Family
from train.inputs import part_files


def network_of(base: str | Path) -> tuple[Family, Config]:
    """The family of a release and its network's config, from transformer/config.json alone, checked."""
    backbone, config = network_config(part(base, TRANSFORMER))
    return family_of(backbone), config


def read_base(base: str | Path) -> tuple[Family, Release]:
    """The family of a release, and all that its JSON files say."""
    release = read_release(base)
    return family_of(release.backbone), release


def network_files(base: Path) -> list[Path]:
    """Config and weights of a release's network, and the config of its latent; those that are there."""
    return [*part_files(base / TRANSFORMER), base / VAE / "config.json"]


def network_bytes(base: Path) -> tuple[int, int]:
    """(number of values, bytes) of the weights of a release's network, by their headers; 0, 0 where it is absent."""
    if not (base / TRANSFORMER).is_dir():
        return 0, 0
    stored = Tensors.open(base / TRANSFORMER).entries.values()
    return sum(entry.nbytes // entry.dtype.itemsize for entry in stored), sum(entry.nbytes for entry in stored)


def load_network(base: str | Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The frozen diffusers network of a release."""
    family, _ = network_of(base)
    folder = part(base, TRANSFORMER)
    model = family.network_class().from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    return family.prepare(model).to(device).requires_grad_(False)


def products_in(dtype: torch.dtype | None, device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
    """Where a network of such weights is called with float32 inputs: its matrix products are computed in `dtype`.

    None and float32 change nothing. What a family computes around the network (time steps, the path of DDPM) stays
    float32, which a cast of all inputs would lose.
    """
    if dtype is None or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


def embedder_only(base: str | Path) -> tuple[Family, nn.Module, Config]:
    """A network without blocks whose embedder holds the release's weights: all that Eq. 1 needs, without the base."""
    family, config = network_of(base)
    model = without_blocks(family, config).eval().requires_grad_(False)
    load_submodule(model, family.backbone.ends(config).embedder, part(base, TRANSFORMER))
    return family, model, config


def load_submodule(model: nn.Module, path: str, folder: Path) -> None:
    """Fill a submodule from a folder's safetensors files, in float32."""
    module = model.get_submodule(path)
    tensors = read_tensors(folder, {f"{path}.{name}" for name in module.state_dict()})
    module.load_state_dict({name.removeprefix(f"{path}."): tensor.float() for name, tensor in tensors.items()})


def without_blocks(family: Family, config: Mapping[str, Any]) -> nn.Module:
    """The network of a config with no repeated block, as initialised."""
    none = {field: 0 for field, _, _ in family.backbone.stacks.values()}
    return family.network_class().from_config({**config, **none})


def read_tensors(folder: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The named tensors of a folder of weights, however they are sharded; missing ones are an error."""
    stored = Tensors.open(folder)
    if wanted - set(stored.entries):
        raise ValueError(f"{folder}: tensors {sorted(wanted - set(stored.entries))} are in none of its weights")
    return {name: check_finite(stored.get(name), name, folder) for name in sorted(wanted)}


def fresh_ends(
    family: Family, config: Config, channels: int, patch_size: int, seed: int
) -> tuple[Config, dict[str, nn.Module]]:
    """(config on the new latent, embedder and head by module path), both newly initialised in float32.

    Weights xavier-uniform, biases 0, as the released recipe does; the seed decides them.
    """
    backbone = family.backbone
    moved = backbone.config_with_latent(config, channels, patch_size)
    model = without_blocks(family, moved)
    generator = torch.Generator().manual_seed(seed)
    ends = {path: model.get_submodule(path).float() for path in backbone.ends(moved)}
    for end in ends.values():
        for name, parameter in end.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                else:
                    nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1), generator=generator)
    return moved, ends


def moved_network(
    base: str | Path, channels: int, patch_size: int, seed: int, dtype: torch.dtype
) -> tuple[nn.Module, Config]:
    """(the base's frozen network on a new latent, its config): fresh float32 ends, everything else the base's own.

    The network is built anew because patch size and positions live in more places than the two ends.
    """
    from accelerate import init_empty_weights

    family, config = network_of(base)
    moved, ends = fresh_ends(family, config, channels, patch_size, seed)
    old_ends, new_ends = family.backbone.ends(config), family.backbone.ends(moved)
    stored = {name: parameter.data for name, parameter in load_network(base, dtype, "cpu").named_parameters()}
    weights = {name: value for name, value in stored.items() if not name.startswith(old_ends.prefixes)}
    for old, new in zip(old_ends.named, new_ends.named, strict=True):
        of_layer = {name: value for name, value in stored.items() if name.startswith(f"{old}.")}
        weights |= {f"{new}{name.removeprefix(old)}": value for name, value in of_layer.items()}
    for path, end in ends.items():
        weights |= {f"{path}.{name}": parameter.data for name, parameter in end.named_parameters()}
    with init_empty_weights(include_buffers=False):
        model = family.network_class().from_config(moved)
    expected = {name for name, _ in model.named_parameters()}
    if expected != set(weights):
        raise ValueError(
            f"{base}: the network on the new latent has other weights: {sorted(expected ^ set(weights))[:6]}"
        )
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{base}: {name} is {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weights[name], requires_grad=False))
    return family.prepare(model), moved
