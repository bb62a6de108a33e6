"""Sampling along a network's velocity by Euler or DPM-Solver++, guidance through the embedding or by true CFG."""
# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dcgen import guidance
from dcgen.fields import shown
from dcgen.folder import SCHEDULER
from train.conditioning import Cond, under_empty
from train.files import read_json
from train.objective import Velocity

# The DPMSolverMultistepScheduler that dpm_solver() is; these are diffusers' defaults.
SECOND_ORDER = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(B, *shape) standard normal from one CPU generator per seed: the same on every device and batch size."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def solver_of(base: Path) -> str:
    """The solver that a release's scheduler_config.json names: a key of SOLVERS; ValueError for another one."""
    config = read_json(base / SCHEDULER)
    name = config.get("_class_name")
    if name == "FlowMatchEulerDiscreteScheduler":
        return EULER
    kind = {key: config.get(key, value) for key, value in SECOND_ORDER.items()}
    if name == "DPMSolverMultistepScheduler" and config.get("use_flow_sigmas") and kind == SECOND_ORDER:
        return DPM_SOLVER
    raise ValueError(
        f"{base / SCHEDULER}: {shown(name)} is not known here as a solver of a flow (known: Euler, and "
        f"DPMSolverMultistepScheduler with {SECOND_ORDER}); name one of {', '.join(SOLVERS)}"
    )


@torch.no_grad()
def euler(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    cond: Cond,
    *,
    scale: float | None = None,
    empty: Cond | None = None,
    w: float = 0.0,
) -> Tensor:
    """Model-space latents (B,C,h,w) from noise at sigmas[0] = 1 down to 0.

    `scale`: guidance embedding g = 1 + w, None for models without. `empty` with `w` > 0: true classifier-free
    guidance of arXiv:2509.25180 Eq. 4, two passes a step.
    """
    latents = noise
    for sigma, following in pairwise(sigmas):
        v = _guided(velocity, latents, sigma, cond, scale, empty, w)
        latents = latents + (following - sigma).to(latents) * v
    return latents


@torch.no_grad()
def dpm_solver(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    cond: Cond,
    *,
    scale: float | None = None,
    empty: Cond | None = None,
    w: float = 0.0,
) -> Tensor:
    """As euler(), by DPM-Solver++(2M) (arXiv:2211.01095 algorithm 2), its first and last steps of first order.

    Along x = (1 - sigma) x0 + sigma noise, with lambda = log((1 - sigma)/sigma) and the model's x0 = x - sigma v.
    """
    latents, previous, width = noise, None, math.nan  # the last x0, and the last step in lambda
    for sigma, following in pairwise(sigmas):
        x0 = latents - sigma.to(latents) * _guided(velocity, latents, sigma, cond, scale, empty, w)
        step = _log_snr(following) - _log_snr(sigma)
        estimate = x0
        if previous is not None and following > 0:
            estimate = x0 + step / (2 * width) * (x0 - previous)
        share = float(following / sigma)
        latents = share * latents + (1 - float(following)) * -math.expm1(-step) * estimate
        previous, width = x0, step
    return latents


def _log_snr(sigma: Tensor) -> float:
    level = float(sigma)
    if not 0 < level < 1:
        return -math.inf if level else math.inf
    return math.log((1 - level) / level)


def _guided(
    velocity: Velocity, x: Tensor, sigma: Tensor, cond: Cond, scale: float | None, empty: Cond | None, w: float
) -> Tensor:
    """Velocity (B,C,h,w) at one sigma (), by Eq. 4 where there is an empty prompt and w > 0."""
    now = sigma.to(x).expand(len(x))
    g = None if scale is None else torch.full_like(now, scale)
    v = velocity(x, now, cond, g)
    if empty is None or w <= 0:
        return v
    rows = torch.arange(len(x), device=x.device)
    return guidance.cfg_velocity(v, velocity(x, now, under_empty(cond, empty, rows), g), w)


EULER, DPM_SOLVER = "euler", "dpm-solver++"
SOLVERS = {EULER: euler, DPM_SOLVER: dpm_solver}


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """(B,3,H,W) in -1..1 -> one image (3,H',W') in 0..1, white between."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image.float().cpu() / 2 + 0.5
    return sheet.clamp(0, 1)
