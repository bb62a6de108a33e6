# B batch, C latent channels, h w latent rows and columns
"""Flow matching for guidance-distilled models: arXiv:2509.25180 Eq. 2-7.

Sign: x_sigma = (1-sigma)*x0 + sigma*noise and v = noise - x0, as diffusers and ComfyUI have it. The paper writes
t = 1-sigma and v = x1 - x0 with x1 the data, which is the same line with the opposite sign on v; Eq. 3-7 hold for both.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Scale = TypeVar("Scale", Tensor, float)


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noised sample x_sigma = (1-sigma)*x0 + sigma*noise; x0 and noise (B,...), sigma (B,) in 0..1."""
    level = _per_sample(sigma, x0)
    return (1 - level) * x0 + level * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """v = d x_sigma / d sigma = noise - x0 (the paper's v_t with the opposite sign)."""
    return noise - x0


def guidance_scale(w: Scale) -> Scale:
    """What the guidance embedding of a distilled model takes for the paper's w: g = 1 + w (FLUX's 3.5 is w = 2.5)."""
    return 1 + w


def cfg_velocity(v_cond: Tensor, v_uncond: Tensor, w: Tensor | float) -> Tensor:
    """(1+w)*v_cond - w*v_uncond: the target of guidance distillation. arXiv:2509.25180 Eq. 4.

    v_cond, v_uncond (B,...); w >= 0 a number or (B,).
    """
    scale = _per_sample(w, v_cond)
    return (1 + scale) * v_cond - scale * v_uncond


def raw_velocity(v_cond: Tensor, v_uncond: Tensor, w: Tensor | float) -> Tensor:
    """(v_cond + w*v_uncond) / (1+w): the velocity under the guidance. arXiv:2509.25180 Eq. 6.

    v_cond and v_uncond (B,...) are both outputs of the distilled model at scale w, a number or (B,), w > -1.
    Inverse of cfg_velocity in its first argument.
    """
    scale = _per_sample(w, v_cond)
    return (v_cond + scale * v_uncond) / (1 + scale)


def _per_sample(value: Tensor | float, like: Tensor) -> Tensor | float:
    """(B,) -> (B,1,...) in the dtype of `like`; numbers and scalars pass through."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.shape != like.shape[:1]:
        raise ValueError(f"expected one value for each of the {like.shape[0]} samples, got shape {tuple(value.shape)}")
    return value.to(like).reshape(-1, *[1] * (like.ndim - 1))
