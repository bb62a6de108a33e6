"""AdamW with its moments in float32 or in 8 bit (torchao), and its state as plain tensors for a checkpoint."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from train.config import Optimizer, Recipe, RecipeError
from train.distributed import whole

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = ("codes", "scale")  # of a moment in 8 bit: a byte a value, and a float32 for each block of 256


def check_optimizers(recipe: Recipe) -> None:
    """RecipeError where a stage asks for an optimizer that is not installed."""
    asking = [name for name, config in recipe.stages.items() if config.optimizer.state == "8bit"]
    if asking and importlib.util.find_spec("torchao") is None:
        raise RecipeError(
            f"{asking[0]}.optimizer.state: 8bit needs the package torchao: "
            "pip install -r train/requirements-optional.txt, or set state: 32bit"
        )


def make_optimizer(groups: list[dict[str, Any]], settings: Optimizer, world: int) -> torch.optim.Optimizer:
    """AdamW over these parameter groups. ValueError for 8 bit on several ranks."""
    how: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    how["weight_decay"] = settings.weight_decay
    if settings.state == "32bit":
        return torch.optim.AdamW(groups, fused=True, **how)
    if world > 1:
        raise ValueError("optimizer.state: 8bit is for one rank; on several, shard: 0 divides the moments: set 32bit")
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, **how)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of a rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao compiles its step
            group["lr"].fill_(rate * group["scale"])
        else:
            group["lr"] = rate * group["scale"]


def stored_moments(name: str, slot: dict[str, Any]) -> dict[str, Tensor]:
    """The moments of one parameter as whole plain tensors by name (every rank must call it)."""
    return {key: whole(value) for key, value in _parts(name, slot).items()}


def empty_slot(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, step: float) -> dict[str, Any]:
    """The state of a parameter after so many steps, its moments zero."""
    eight_bit: Any = optimizer
    if hasattr(eight_bit, "_new_buffer"):
        moments = [eight_bit._new_buffer(parameter, signed) for signed in (True, False)]
        return {"step": torch.tensor(step), **dict(zip(MOMENTS, moments, strict=True))}
    count = torch.tensor(step, dtype=torch.float32, device=parameter.device)
    return {"step": count, **{moment: torch.zeros_like(parameter) for moment in MOMENTS}}


def targets(name: str, slot: dict[str, Any]) -> dict[str, Tensor]:
    """Where stored_moments() of a parameter are to be copied to, by the same names."""
    return _parts(name, slot)


def _parts(name: str, slot: dict[str, Any]) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    for moment in MOMENTS:
        value = slot[moment]
        if hasattr(value, "codes"):
            parts |= {f"{name}.{moment}.{part}": getattr(value, part) for part in PARTS}
        else:
            parts[f"{name}.{moment}"] = value
    return parts
