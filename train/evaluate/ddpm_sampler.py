"""DDPM ancestral sampling on a part of the steps, with a learned variance: how Table 1's images are drawn.

arXiv:2102.09672 (spaced steps, Eq. 15 for the variance), as arXiv:2212.09748 samples DiT with 250 steps.
"""
# B batch, C latent channels, h w latent rows and columns, t step in 0..999, S sampling steps

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from train.conditioning import Cond, under_empty
from train.ddpm import STEPS, alphas_cumprod
from train.family import RawOutput


def spaced_steps(count: int) -> Tensor:
    """(S,) int64, falling: `count` of the steps 0..999, evenly, both ends among them."""
    if not 1 < count <= STEPS:
        raise ValueError(f"{count} sampling steps: a DDPM of {STEPS} steps is sampled with 2 to {STEPS}")
    return (torch.arange(count, dtype=torch.float64) * (STEPS - 1) / (count - 1)).round().long().flip(0)


@torch.no_grad()
def ddpm_sample(
    model: RawOutput,
    seeds: Sequence[int],
    shape: Sequence[int],
    cond: Cond,
    *,
    steps: int = 250,
    empty: Cond | None = None,
    guidance: float = 1.0,
    guided_channels: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Latents (B,C,h,w) of `shape` (C,h,w) from one noise generator a seed, on the CPU: the same on every device.

    `model(x, t, cond)` gives the noise, or noise and variance. `guidance` g > 1 needs `empty`: the noise is
    e_empty + g (e - e_empty) in the first `guided_channels` channels (None = all), the rest is that of the condition.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = _normal(generators, shape).to(device)
    rows = torch.arange(len(x), device=x.device)
    guided = shape[0] if guided_channels is None else guided_channels
    visited = spaced_steps(steps).tolist()
    bars = alphas_cumprod()
    for place, t in enumerate(visited):
        step = torch.full((len(x),), t, device=x.device)
        output = model(x, step, cond).float()
        if empty is not None and guidance != 1.0:
            other = model(x, step, under_empty(cond, empty, rows)).float()
            mixed = other + guidance * (output - other)
            output = torch.cat([mixed[:, :guided], output[:, guided:]], dim=1)
        before = bars[visited[place + 1]].item() if place + 1 < len(visited) else 1.0
        noise = _normal(generators, shape).to(x) if place + 1 < len(visited) else torch.zeros_like(x)
        x = _previous(x, output, bars[t].item(), before, noise)
    return x


def _previous(x: Tensor, output: Tensor, bar: float, before: float, noise: Tensor) -> Tensor:
    """x at the step before: a draw from p(x_before | x) with abar `before` there and `bar` here (1 = no noise left)."""
    channels = x.shape[1]
    beta = 1 - bar / before
    guess = (x - (1 - bar) ** 0.5 * output[:, :channels]) / bar**0.5
    mean = before**0.5 * beta / (1 - bar) * guess + (1 - beta) ** 0.5 * (1 - before) / (1 - bar) * x
    log_beta = torch.tensor(beta, dtype=torch.float64).log().item()
    floor = torch.tensor(max(beta * (1 - before) / (1 - bar), 1e-20), dtype=torch.float64).log().item()
    if output.shape[1] == channels:
        log_variance = torch.full_like(mean, log_beta)
    else:
        share = (output[:, channels:] + 1) / 2
        log_variance = share * log_beta + (1 - share) * floor
    return mean + (0.5 * log_variance).exp() * noise


def _normal(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
