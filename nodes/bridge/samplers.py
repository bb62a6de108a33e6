# B batch, C latent channels, h w latent rows and columns
"""The samplers on offer: the core's own, and SANA's, which the core has not: flow-DPM++ and Sprint's consistency steps.

The core's `lcm` takes the same consistency steps; its noise is drawn on the model's device, so that a seed is another
picture on another machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...dcgen import solver

# x0 of (x (B,C,h,w), sigma scalar); x and sigmas; the seed; what to call after each evaluation
Solve = Callable[[solver.Denoise, Tensor, Tensor, int, solver.Callback], Tensor]


def _dpmpp(denoise: solver.Denoise, x: Tensor, sigmas: Tensor, _seed: int, report: solver.Callback) -> Tensor:
    return solver.flow_dpmpp_2m(denoise, x, sigmas, report)


def _consistency(denoise: solver.Denoise, x: Tensor, sigmas: Tensor, seed: int, report: solver.Callback) -> Tensor:
    # Not `seed` itself, which has drawn the noise that sampling starts from.
    generator = torch.Generator().manual_seed((seed + 1) % 2**64)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    return solver.consistency(denoise, x, sigmas, noise, report)


SOLVERS: dict[str, Solve] = {"flow_dpmpp_2m": _dpmpp, "flow_consistency": _consistency}
# A list of our own: the core's stays as it is.
SAMPLER_NAMES: list[str] = [*comfy.samplers.SAMPLER_NAMES, *SOLVERS]


def sampler_object(name: str, model: Any) -> comfy.samplers.Sampler:
    """SAMPLER of a name from SAMPLER_NAMES; ValueError when `model` cannot be sampled with it."""
    if name not in SOLVERS:
        return comfy.samplers.sampler_object(name)
    if not isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST):
        raise ValueError(f"{name} is for flow models (SANA, FLUX); choose another sampler for this model.")
    return comfy.samplers.KSAMPLER(_as_core_calls(SOLVERS[name]))


def _as_core_calls(solve: Solve) -> Callable[..., Tensor]:
    """A solver as the core calls samplers: model(x, sigma (B,), **extra_args) -> x0 (B,C,h,w)."""

    def sampler(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        ones, extra = x.new_ones([x.shape[0]]), extra_args or {}
        with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

            def report(i: int, x0: Tensor, now: Tensor) -> None:
                bar.update()
                if callback is not None:
                    callback({"i": i, "x": now, "denoised": x0, "sigma": sigmas[i], "sigma_hat": sigmas[i]})

            return solve(lambda x, sigma: model(x, sigma * ones, **extra), x, sigmas, extra.get("seed") or 0, report)

    return sampler
