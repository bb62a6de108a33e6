"""Random adapters, LoRA files and network inputs for the tiny FLUX of conftest. Loaded by path."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from dcgen.adapter import Adapter, LoraPair, save_adapter
from dcgen.backbones import BACKBONES
from dcgen.latent import LatentSpace
from train.families import FAMILIES

FLUX = BACKBONES["flux"]
SPACE = LatentSpace("test-ae", 8, 32, 0.37)
HEADS = ("x_embedder", "proj_out", "norm_out.linear")


def targets(transformer) -> dict[str, torch.nn.Linear]:
    """The layers that LoRA go on."""
    linears = {name: part for name, part in transformer.named_modules() if isinstance(part, torch.nn.Linear)}
    return {name: part for name, part in linears.items() if FAMILIES["flux"].is_lora_target(name)}


def pairs(layers, rank: int, seed: int, size: float = 0.3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random (A, B) of B @ A for each layer."""
    generator = torch.Generator().manual_seed(seed)

    def pair(layer):
        a = torch.randn((rank, layer.in_features), generator=generator) * layer.in_features**-0.5
        return a, torch.randn((layer.out_features, rank), generator=generator) * size

    return {name: pair(layer) for name, layer in layers.items()}


def make_adapter(path: Path, base, new, rank: int = 16, alpha: float = 24.0, layers=None) -> Adapter:
    """Write an adapter for diffusers model `base`: embedder, head and norm of `new`, random LoRA; the adapter back."""
    lora = pairs(targets(base) if layers is None else layers, rank, seed=8)
    adapter = Adapter(
        "flux",
        {f"{name}.{kind}": new.state_dict()[f"{name}.{kind}"].clone() for name in HEADS for kind in ("weight", "bias")},
        {name: LoraPair(a, b, alpha) for name, (a, b) in lora.items()},
        SPACE,
        FLUX.base_signature(dict(base.config)),
        {"rule": "flux"},
    )
    save_adapter(path, adapter)
    return adapter


def make_lora(path: Path, made: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Write an ordinary LoRA with diffusers names."""
    tensors = {f"transformer.{name}.lora_A.weight": a for name, (a, _) in made.items()}
    save_file(tensors | {f"transformer.{name}.lora_B.weight": b for name, (_, b) in made.items()}, path)
    return str(path)


def merged(target, changes: list[tuple[float, dict[str, tuple[torch.Tensor, torch.Tensor]]]], blocks=None):
    """`target` with the blocks of `blocks` (its own if None) and W + s * B @ A of each (s, pairs)."""
    import copy

    model = copy.deepcopy(target)
    state = model.state_dict()
    if blocks is not None:
        own = tuple(f"{name}." for name in HEADS)
        state = {
            key: state[key] if key.startswith(own) else value.clone() for key, value in blocks.state_dict().items()
        }
    for strength, made in changes:
        for name, (a, b) in made.items():
            state[f"{name}.weight"] = state[f"{name}.weight"] + strength * (b @ a)
    model.load_state_dict(state)
    return model.eval()


def cases(seed: int = 4) -> dict[str, torch.Tensor]:
    """Inputs "{base|deep}{rows}x{columns}/{name}": square and batch 1, and neither."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for kind, channels, patch in (("base", 16, 2), ("deep", 8, 1)):
        for rows, columns, batch in ((4, 4, 1), (3, 5, 2)):
            case = {
                "x": torch.randn((batch, channels, rows * patch, columns * patch), generator=generator),
                "sigma": torch.rand(batch, generator=generator) * 0.8 + 0.1,
                "context": torch.randn((batch, 24, 24), generator=generator),
                "pooled": torch.randn((batch, 20), generator=generator),
                "guidance": torch.rand(batch, generator=generator) * 5 + 1,
            }
            found |= {f"{kind}{rows}x{columns}/{key}": value for key, value in case.items()}
    return found


def of(inputs: dict[str, torch.Tensor], kind: str) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs of one kind by case."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in inputs.items():
        case, _, name = key.partition("/")
        if case.startswith(kind):
            found.setdefault(case, {})[name] = value
    return found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((found - wanted).norm() / wanted.norm()).item()
