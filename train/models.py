"""Base models on disk: which backbone a release is, its network, and that network moved to another latent."""
# D width

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcgen.backbones import BACKBONES, Backbone
from dcgen.fields import check_fields, shown
from dcgen.files import check_finite, naming, opened, weight_files
from train.files import read_json


def release_part(base: str | Path, part: str) -> Path:
    """Folder of one part of a release; a missing one is an error that names it."""
    folder = Path(base) / part
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} not found; {base} should be a release folder in the diffusers layout")
    return folder


def base_backbone(base: str | Path) -> tuple[Backbone, dict[str, Any]]:
    """The backbone of a release and its network's config, from transformer/config.json alone."""
    path = release_part(base, "transformer") / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; a release's network is config.json + safetensors")
    config = read_json(path)
    found = config.get("_class_name")
    for backbone in BACKBONES.values():
        if backbone.diffusers_class == found:
            with naming(path):
                check_fields(config, backbone.fields)
            return backbone, {key: value for key, value in config.items() if not key.startswith("_")}
    known = ", ".join(backbone.diffusers_class for backbone in BACKBONES.values())
    raise ValueError(f"{path}: class {shown(found)} is no backbone known here; known: {known}")


def base_patch_size(config: dict[str, Any], channels: int) -> int:
    """Patch size of a base network on its own latent, from the width of its embedder's input."""
    packed = config["in_channels"] // channels
    return round(packed**0.5) if packed > 1 else int(config.get("patch_size", 1))


def load_network(base: str | Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The frozen diffusers network of a release."""
    backbone, _ = base_backbone(base)
    cls = network_class(backbone)
    model = cls.from_pretrained(release_part(base, "transformer"), torch_dtype=dtype, use_safetensors=True)
    return _without_own_dropout(model).to(device).requires_grad_(False)


def _without_own_dropout(model: nn.Module) -> Any:
    """Switch off DiT's class dropout inside diffusers: it draws anew in every block, and not from the batch's numbers.

    Dropping the condition is the objective's work (caption_dropout).
    """
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = 0.0  # type: ignore[assignment]
    return model


def network_class(backbone: Backbone) -> Any:
    """The diffusers class that a backbone names."""
    import diffusers

    return getattr(diffusers, backbone.diffusers_class)


def embedder_only(base: str | Path) -> tuple[Backbone, nn.Module, dict[str, Any]]:
    """A network without blocks whose embedder holds the release's weights: all that Eq. 1 needs, without the base."""
    backbone, config = base_backbone(base)
    model = network_class(backbone).from_config(without_blocks(config)).eval().requires_grad_(False)
    embedder = model.get_submodule(backbone.embedder)
    wanted = {f"{backbone.embedder}.{name}" for name in embedder.state_dict()}
    tensors = read_tensors(release_part(base, "transformer"), wanted)
    embedder.load_state_dict({name.removeprefix(f"{backbone.embedder}."): t.float() for name, t in tensors.items()})
    return backbone, model, config


def without_blocks(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with no repeated block."""
    return {key: 0 if key in ("num_layers", "num_single_layers") else value for key, value in config.items()}


def read_tensors(folder: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The named tensors out of a folder's safetensors files, however they are sharded; missing ones are an error."""
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with opened(file) as tensors:
            for name in wanted & set(tensors.keys()):
                found[name] = check_finite(tensors.get_tensor(name), name, file)
    if wanted - set(found):
        raise ValueError(f"{folder}: tensors {sorted(wanted - set(found))} are in none of its safetensors files")
    return found


def fresh_ends(
    backbone: Backbone, config: dict[str, Any], channels: int, patch_size: int, seed: int
) -> tuple[dict[str, Any], nn.Module, nn.Module]:
    """(config on the new latent, embedder, head), both newly initialised in float32.

    Weights xavier-uniform, biases 0, as the released recipe does; the seed decides them.
    """
    moved = backbone.config_with_latent(config, channels, patch_size)
    model = network_class(backbone).from_config(without_blocks(moved))
    generator = torch.Generator().manual_seed(seed)
    ends = [model.get_submodule(path).float() for path in (backbone.embedder, backbone.head)]
    for end in ends:
        for name, parameter in end.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                else:
                    nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1), generator=generator)
    return moved, ends[0], ends[1]


def moved_network(
    base: str | Path, channels: int, patch_size: int, seed: int, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """(the base's frozen network on a new latent, its config): fresh float32 ends, everything else the base's own.

    The network is built anew because patch size and positions live in more places than the two ends.
    """
    from accelerate import init_empty_weights

    backbone, config = base_backbone(base)
    moved, embedder, head = fresh_ends(backbone, config, channels, patch_size, seed)
    weights = {name: p.data for name, p in load_network(base, dtype, "cpu").named_parameters()}
    for path, end in ((backbone.embedder, embedder), (backbone.head, head)):
        weights |= {f"{path}.{name}": p.data for name, p in end.named_parameters()}
    with init_empty_weights(include_buffers=False):
        model = network_class(backbone).from_config(moved)
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
    return _without_own_dropout(model), moved
