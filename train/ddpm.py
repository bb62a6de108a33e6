"""The DDPM path sqrt(abar)*x0 + sqrt(1-abar)*noise, and the loss along it: noise prediction and learned variance.

arXiv:2212.09748 trains with the hybrid objective of arXiv:2102.09672: mean squared error of the noise plus the
variational bound in bits, whose gradient reaches the variance alone.
"""
# B batch, C latent channels, h w latent rows and columns, t step in 0..999

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from train.batches import Batch, drop_captions, losses_by_caption
from train.conditioning import Cond
from train.family import RawOutput

STEPS = 1000
BETAS = (1e-4, 0.02)  # linear
BIN = 1 / 255  # half width of the last step's bins, as for images in -1..1


@lru_cache(maxsize=1)
def alphas_cumprod() -> Tensor:
    """abar of the steps 0..999, (1000,) float64: linear betas."""
    return (1 - torch.linspace(*BETAS, STEPS, dtype=torch.float64)).cumprod(0)


@lru_cache(maxsize=1)
def flow_sigmas() -> Tensor:
    """sigma of the steps 0..999, (1000,) float32, rising: the flow point with the same ratio of signal and noise."""
    signal, noise = alphas_cumprod().sqrt(), (1 - alphas_cumprod()).sqrt()
    return (noise / (signal + noise)).float()


def step_of(sigma: Tensor) -> Tensor:
    """Fractional step (B,) of sigma (B,) within flow_sigmas: linear between two steps."""
    levels = flow_sigmas().to(sigma.device)
    above = torch.searchsorted(levels, sigma).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return above - 1 + (sigma - low) / (high - low)


def ddpm_loss(
    model: RawOutput,
    batch: Batch,
    latents: Tensor,
    cond: Cond,
    empty: Cond,
    dropout: float,
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """Noise MSE, plus the bound where the model gives a variance, for latents (B,C,h,w) at uniform steps.

    `model(x_t, t, cond)` gives (B,C,h,w) or (B,2C,h,w). Rows whose condition was dropped are logged as loss_uncond.
    """
    output, noise, noised, step, dropped = ddpm_terms(model, batch, latents, cond, empty, dropout)
    channels = latents.shape[1]
    errors = (output[:, :channels] - noise).square().flatten(1).mean(1)
    metrics = losses_by_caption(errors, dropped)
    loss = errors.mean()
    if output.shape[1] == 2 * channels:
        bound = variational_bound(output[:, :channels].detach(), output[:, channels:], latents, noised, step).mean()
        loss, metrics["bound"] = loss + bound, bound.detach()
    return loss, metrics


def ddpm_terms(
    model: RawOutput,
    batch: Batch,
    latents: Tensor,
    cond: Cond,
    empty: Cond,
    dropout: float,
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(the model's output, the noise it should name, the noised latents, their steps (B,), dropped rows (B,)).

    step: (B,) whole steps instead of drawn ones.
    """
    step = batch.integers("step", STEPS) if step is None else step
    noise = batch.normal("noise", latents.shape[1:])
    cond, dropped = drop_captions(batch, cond, empty, dropout)
    level = _at(alphas_cumprod(), step)
    noised = level.sqrt() * latents + (1 - level).sqrt() * noise
    return model(noised, step, cond), noise, noised, step, dropped


def variational_bound(noise: Tensor, variance: Tensor, latents: Tensor, noised: Tensor, step: Tensor) -> Tensor:
    """(B,) bits a value: KL(q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t)), at t = 0 the likelihood of x_0 in bins.

    noise: predicted; variance: in -1..1 between the two bounds of the log-variance (arXiv:2102.09672 Eq. 15).
    """
    bar = alphas_cumprod()
    before = torch.cat([bar.new_ones(1), bar[:-1]])
    beta = 1 - bar / before
    true_log = (beta * (1 - before) / (1 - bar)).clamp_min(1e-300).log()
    true_log[0] = true_log[1]
    level, floor, ceiling = _at(bar, step), _at(true_log, step), _at(beta.log(), step)
    share = (variance + 1) / 2
    log_variance = share * ceiling + (1 - share) * floor
    guess = (noised - (1 - level).sqrt() * noise) / level.sqrt()
    of_x0, of_xt = before.sqrt() * beta / (1 - bar), (1 - beta).sqrt() * (1 - before) / (1 - bar)
    true_mean = _at(of_x0, step) * latents + _at(of_xt, step) * noised
    mean = _at(of_x0, step) * guess + _at(of_xt, step) * noised
    divergence = 0.5 * (
        log_variance - floor + (floor - log_variance).exp() + (true_mean - mean).square() * (-log_variance).exp() - 1
    )
    first = -_log_likelihood(latents, mean, 0.5 * log_variance)
    chosen = torch.where((step == 0).reshape(-1, 1, 1, 1), first, divergence)
    return chosen.flatten(1).mean(1) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log of a Gaussian's mass in the bin around x, open at -1 and 1 as for images."""
    inverse = (-log_scale).exp()
    upper, lower = _cdf(inverse * (x - mean + BIN)), _cdf(inverse * (x - mean - BIN))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp_min(1e-12).log()


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _at(table: Tensor, step: Tensor) -> Tensor:
    """(1000,) at steps (B,) -> (B,1,1,1) float32."""
    return table.to(step.device)[step].float().reshape(-1, 1, 1, 1)
