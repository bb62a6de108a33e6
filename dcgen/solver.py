# B batch, C latent channels, h w latent rows and columns
"""Samplers of flow models, x_sigma = (1-sigma)*x0 + sigma*noise, that ComfyUI lacks: flow-DPM++ 2M, consistency steps.

Both take `denoise(x, sigma) -> x0` with x (B,C,h,w) and sigma a scalar tensor; denoised() gives x0 for a velocity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
# called with (step, x0, x) after each evaluation of the model
Progress = Callable[[int, Tensor, Tensor], None]


def denoised(x: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """x0 = x - sigma * v, for v = noise - x0."""
    return x - sigma * velocity


def flow_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, progress: Progress | None = None) -> Tensor:
    """DPM-Solver++ of order 2, multistep (arXiv:2211.01095) along a flow: alpha = 1 - sigma, lambda = ln(alpha/sigma).

    SANA's sampler, equal to diffusers' DPMSolverMultistepScheduler with flow sigmas: midpoint form, first step and
    last step (to sigma 0) of order 1. x (B,C,h,w) at sigmas[0]; sigmas (steps+1,) falling in [0,1].
    """
    # float64 on the CPU: the differences of logarithms cancel, and there are only a few values
    levels = sigmas.detach().to("cpu", torch.float64)
    lambdas = (1 - levels).log() - levels.log()
    previous: Tensor | None = None
    for i in range(len(levels) - 1):
        x0 = denoise(x, sigmas[i])
        if progress is not None:
            progress(i, x0, x)
        h = lambdas[i + 1] - lambdas[i]
        step = -torch.expm1(-h)  # 1 - e^-h
        estimate = x0
        if previous is not None and levels[i + 1] > 0:
            ratio = (lambdas[i] - lambdas[i - 1]) / h
            estimate = x0 + float(0.5 / ratio) * (x0 - previous)
        x = float(levels[i + 1] / levels[i]) * x + float((1 - levels[i + 1]) * step) * estimate
        previous = x0
    return x


def consistency(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    progress: Progress | None = None,
) -> Tensor:
    """Few-step sampling of a consistency model: denoise to x0, add new noise up to the next sigma.

    SANA-Sprint's sampler (arXiv:2503.09641), which works on a circle cos(t)*x0 + sin(t)*noise, in flow coordinates:
    sigma = sin t / (sin t + cos t), see dcgen.schedule.sprint_sigmas. noise(x) is called for each step but the last.
    """
    for i in range(len(sigmas) - 1):
        x0 = denoise(x, sigmas[i])
        if progress is not None:
            progress(i, x0, x)
        sigma = sigmas[i + 1]
        x = x0 if sigma == 0 else (1 - sigma) * x0 + sigma * noise(x0)
    return x
