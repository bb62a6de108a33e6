# B batch, C latent channels, h w latent rows and columns
"""The available samplers: core's own, and SANA's, which core lacks: flow-DPM++ 2M and Sprint's consistency steps.

Core's `lcm` takes the same consistency steps, but draws noise on the model's device, so that a seed gives different
images on different devices.
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

# (denoise, x (B,C,h,w), sigmas, seed, progress) -> x0
Solve = Callable[[solver.Denoise, Tensor, Tensor, int, solver.Progress], Tensor]


def _dpmpp(denoise: solver.Denoise, x: Tensor, sigmas: Tensor, _seed: int, progress: solver.Progress) -> Tensor:
    return solver.flow_dpmpp_2m(denoise, x, sigmas, progress)


def _consistency(denoise: solver.Denoise, x: Tensor, sigmas: Tensor, seed: int, progress: solver.Progress) -> Tensor:
    # Not `seed` itself, which was used for the initial noise.
    generator = torch.Generator().manual_seed((seed + 1) % 2**64)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    return solver.consistency(denoise, x, sigmas, noise, progress)


SOLVERS: dict[str, Solve] = {"flow_dpmpp_2m": _dpmpp, "flow_consistency": _consistency}
# A separate list: core's is not changed.
SAMPLER_NAMES: list[str] = [*comfy.samplers.SAMPLER_NAMES, *SOLVERS]


def sampler_object(name: str, model: Any) -> comfy.samplers.Sampler:
    """SAMPLER of a name from SAMPLER_NAMES; ValueError when `model` cannot be sampled with it."""
    if name not in SOLVERS:
        return comfy.samplers.sampler_object(name)
    if not isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST):
        raise ValueError(f"{name} is for flow models (SANA, FLUX); choose another sampler for this model.")
    return comfy.samplers.KSAMPLER(_as_core_calls(SOLVERS[name]))


def _as_core_calls(solve: Solve) -> Callable[..., Tensor]:
    """A solver with the signature of core's samplers, where model(x, sigma (B,), **extra_args) -> x0 (B,C,h,w)."""

    def sampler(
        model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        ones, extra = x.new_ones([x.shape[0]]), extra_args or {}
        with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

            def progress(i: int, x0: Tensor, x: Tensor) -> None:
                bar.update()
                if callback is not None:
                    callback({"i": i, "x": x, "denoised": x0, "sigma": sigmas[i], "sigma_hat": sigmas[i]})

            return solve(lambda x, sigma: model(x, sigma * ones, **extra), x, sigmas, extra.get("seed") or 0, progress)

    return sampler
