# B batch, C latent channels, h w latent rows and columns
"""The samplers on offer: the core's own, and SANA's flow-DPM++, which the core has not."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import comfy.samplers
from torch import Tensor
from tqdm.auto import tqdm

from ...dcgen.solver import flow_dpmpp_2m

FLOW_DPMPP = "flow_dpmpp_2m"
# A list of our own: the core's stays as it is.
SAMPLER_NAMES: list[str] = [*comfy.samplers.SAMPLER_NAMES, FLOW_DPMPP]


def sampler_object(name: str, model: Any) -> comfy.samplers.Sampler:
    """SAMPLER of a name from SAMPLER_NAMES; ValueError when `model` cannot be sampled with it."""
    if name != FLOW_DPMPP:
        return comfy.samplers.sampler_object(name)
    if not isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST):
        raise ValueError(f"{FLOW_DPMPP} is for flow models (SANA, FLUX); choose another sampler for this model.")
    return comfy.samplers.KSAMPLER(_flow_dpmpp_2m)


def _flow_dpmpp_2m(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback: Any = None, disable: Any = None
) -> Tensor:
    """dcgen.solver.flow_dpmpp_2m as the core calls samplers: model(x, sigma (B,), **extra_args) -> x0 (B,C,h,w)."""
    ones = x.new_ones([x.shape[0]])
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def report(i: int, x0: Tensor, now: Tensor) -> None:
            bar.update()
            if callback is not None:
                callback({"i": i, "x": now, "denoised": x0, "sigma": sigmas[i], "sigma_hat": sigmas[i]})

        return flow_dpmpp_2m(lambda x, sigma: model(x, sigma * ones, **(extra_args or {})), x, sigmas, report)
