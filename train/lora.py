"""LoRA on a base network through peft, and its way into the adapter file."""
# r rank

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dcgen.adapter import LoraPair
from train.family import Family

ADAPTER = "default"  # peft's name for the one set of matrices


def inject_lora(model: nn.Module, family: Family, rank: int, alpha: float, seed: int) -> None:
    """Add trainable float32 LoRA to the family's target layers, in place; A random from the seed, B zero."""
    from peft import LoraConfig, inject_adapter_in_model

    pattern = "|".join(f"(?:{target})" for target in family.lora_targets)
    strength: Any = alpha  # peft's hint says int, any number works
    config = LoraConfig(r=rank, lora_alpha=strength, target_modules=pattern, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            # products run under autocast: a cast to float32 before it changes no bit and takes memory and time
            layer.cast_input_dtype_enabled = False
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def scale_lora(model: nn.Module, factor: float) -> None:
    """Multiply the strength alpha/r of every LoRA layer (a growing alpha, or 0 to switch it off)."""
    layer: Any
    for layer in model.modules():
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, dict) and ADAPTER in scaling:
            scaling[ADAPTER] = factor * layer.lora_alpha[ADAPTER] / layer.r[ADAPTER]


def lora_pairs(weights: dict[str, Tensor], alpha: float) -> dict[str, LoraPair]:
    """Trained peft parameters by module path -> LoraPair by the diffusers path of the layer."""
    pairs = {}
    suffix = f".lora_A.{ADAPTER}.weight"
    for name, a in weights.items():
        if name.endswith(suffix):
            path = name.removesuffix(suffix)
            pairs[path] = LoraPair(a, weights[f"{path}.lora_B.{ADAPTER}.weight"], alpha)
    return pairs


def load_lora(model: nn.Module, pairs: dict[str, LoraPair]) -> None:
    """Copy pairs into an injected model; layers without a pair, or pairs without a layer, are an error."""
    parameters = dict(model.named_parameters())
    layers = {
        name.removesuffix(f".lora_A.{ADAPTER}.weight")
        for name in parameters
        if name.endswith(f"lora_A.{ADAPTER}.weight")
    }
    if layers != set(pairs):
        raise ValueError(
            f"LoRA does not fit the model: only in the file {sorted(set(pairs) - layers)[:3]}, "
            f"only in the model {sorted(layers - set(pairs))[:3]}"
        )
    with torch.no_grad():
        for path, pair in pairs.items():
            parameters[f"{path}.lora_A.{ADAPTER}.weight"].copy_(pair.A)
            parameters[f"{path}.lora_B.{ADAPTER}.weight"].copy_(pair.B)
