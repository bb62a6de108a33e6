# N steps, n tokens, C latent channels
"""Noise levels: which sigmas a model with n tokens should be sampled at, and the maths of the shift."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .fields import Check, check_fields, optional, real, shown, words

RULES = ("flux", "flux2", "static", "sprint")

# FLUX.1's scheduler config: base/max shift at base/max image sequence length.
FLUX_TOKENS = (256, 4096)
FLUX_SHIFTS = (0.5, 1.15)
# What a stored schedule may hold: e^mu = shift is 3 to 6 for the published models.
SCHEDULE_FIELDS: dict[str, Check] = {
    "rule": words(*RULES),
    "mu": optional(real(-20, 20)),
    "shift": optional(real(1e-8, 1e8)),
}
# Latent elements C*h*w at which the FLUX.2-style rule does not shift.
FLUX2_ELEMENTS = 4096
# DPMSolverMultistep's flow grid starts at 1 - 1/1000 (num_train_timesteps), FLUX's at 1.
STATIC_SIGMA_MAX = 0.999
# SANA-Sprint's angle between its two steps.
SPRINT_MIDDLE = 1.3


def flux_mu(tokens: int) -> float:
    """FLUX.1's mu, linear in the number of image tokens: 0.5 at 256, 1.15 at 4096."""
    slope = (FLUX_SHIFTS[1] - FLUX_SHIFTS[0]) / (FLUX_TOKENS[1] - FLUX_TOKENS[0])
    return FLUX_SHIFTS[0] + slope * (tokens - FLUX_TOKENS[0])


def shift_ratio(*, tokens: int, channels: int, rule: str, mu: float | None = None, shift: float | None = None) -> float:
    """The ratio r of sigma' = r*sigma / (1 + (r-1)*sigma) that a rule gives.

    rule "flux": r = e^mu with FLUX.1's mu of the token count; "flux2": r = sqrt(tokens*channels/4096);
    "static": r is `shift` and nothing else (SANA: 3.0, at 4K 6.0); "sprint": r = tan(1.3), with which an even grid of
    two steps is that of SANA-Sprint. `mu` (= ln r) or `shift` (= r) overrides any rule; giving both is a ValueError.
    """
    if rule not in RULES:
        raise ValueError(f"schedule rule {rule!r} is unknown; use one of {', '.join(RULES)}")
    if tokens < 1 or channels < 1:
        raise ValueError(f"a schedule needs at least 1 token and 1 channel, got tokens={tokens}, channels={channels}")
    if mu is not None and shift is not None:
        raise ValueError(f"give mu or shift, not both (got mu={mu}, shift={shift}; shift = e^mu)")
    if mu is not None:
        ratio = math.exp(mu) if mu < 700 else math.inf  # exp of more than 709 overflows
    elif shift is not None:
        ratio = float(shift)
    elif rule == "flux":
        ratio = math.exp(flux_mu(tokens))
    elif rule == "flux2":
        ratio = math.sqrt(tokens * channels / FLUX2_ELEMENTS)
    elif rule == "sprint":
        ratio = math.tan(SPRINT_MIDDLE)
    else:
        raise ValueError('schedule rule "static" needs its shift (SANA: 3.0; SANA 4K: 6.0)')
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"the shift must be finite and above 0, got {ratio}")
    return ratio


def check_schedule(schedule: Mapping[str, Any]) -> None:
    """ValueError unless this is {"rule": ...} with a "mu" or "shift" if any, from which sigmas can be computed."""
    if not isinstance(schedule, Mapping) or set(schedule) - set(SCHEDULE_FIELDS):
        raise ValueError(
            f'schedule must be {{"rule": ...}} with a number "mu" or "shift" if any, got {shown(schedule)}'
        )
    try:
        check_fields(schedule, SCHEDULE_FIELDS, needed=("rule",))
    except ValueError as error:
        raise ValueError(f'schedule must be {{"rule": ...}} with "mu" or "shift" if any: {error}') from error
    shift_ratio(tokens=1, channels=1, **schedule)


def shifted(sigma: Tensor, ratio: float) -> Tensor:
    """sigma in 0..1 -> r*sigma / (1 + (r-1)*sigma); the same as e^mu / (e^mu + 1/sigma - 1) with r = e^mu."""
    return ratio * sigma / (1 + (ratio - 1) * sigma)


def sigmas(
    steps: int,
    *,
    tokens: int,
    channels: int,
    rule: str,
    mu: float | None = None,
    shift: float | None = None,
    sigma_max: float | None = None,
) -> Tensor:
    """Noise levels of `steps` sampling steps, (steps+1,) float32, falling to 0.

    tokens and channels are those of the latent that is sampled; see shift_ratio for the rules. Before the shift the
    grid is even from sigma_max to sigma_max/steps; sigma_max is 1, and 0.999 for "static", where DPMSolverMultistep's
    flow sigmas start. Rule "sprint" is sprint_sigmas, unless mu or shift asks for a shifted grid.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")
    if rule == "sprint" and mu is None and shift is None:
        return sprint_sigmas(steps)
    ratio = shift_ratio(tokens=tokens, channels=channels, rule=rule, mu=mu, shift=shift)
    top = sigma_max if sigma_max is not None else (STATIC_SIGMA_MAX if rule == "static" else 1.0)
    if not 0 < top <= 1:
        raise ValueError(f"sigma_max must be above 0 and at most 1, got {top}")
    grid = top * torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    return shifted(grid, ratio).float()


def sprint_sigmas(steps: int) -> Tensor:
    """SANA-Sprint's noise levels (steps+1,) float32: sigma = sin t / (sin t + cos t) at t = pi/2 ... 0.

    t is 1.3 in the middle for the published 2 steps, else even.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")
    angles = torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)
    if steps == 2:
        angles[1] = SPRINT_MIDDLE
    found = angles.sin() / (angles.sin() + angles.cos())
    found[-1] = 0
    return found.float()
