"""The loss of head alignment and fine-tuning: arXiv:2509.25180 Eq. 2 (flow matching) or Eq. 7 (guidance-corrected)."""
# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator
from torch import Tensor

from dcgen import guidance
from dcgen.schedule import LINEAR, RULES, Schedule, shifted
from train.batches import Batch, drop_captions, losses_by_caption
from train.conditioning import Cond, under_empty
from train.config import Strict, one_of
from train.ddpm import STEPS, ddpm_loss, ddpm_terms
from train.family import RawOutput

Velocity = Callable[[Tensor, Tensor, Cond, Tensor | None], Tensor]


class Timesteps(Strict):
    """How sigma (1 = noise) is drawn. The paper does not say; the defaults are those of the released code."""

    distribution: Literal["logit-normal", "uniform"] = Field("logit-normal", description="released code")
    mean: float = Field(0.0, description="of the normal before the sigmoid")
    std: float = Field(1.0, gt=0)
    rule: str = Field(
        LINEAR,
        description="none, or a rule of dcgen.schedule that shifts the draw at the NEW token count; flux = FLUX.1's "
        "calculate_shift (released training guide), flux2 = that of released inference at 512 px and 1K",
    )
    shift: float | None = Field(None, gt=0, description="the ratio itself; needed by rule static, overrides the others")

    @field_validator("rule")
    @classmethod
    def _known(cls, value: str) -> str:
        return one_of(value, ("none", *RULES))

    @model_validator(mode="after")
    def _with_shift(self) -> Timesteps:
        """A rule that lacks its shift is refused when the recipe is read."""
        _ = self.schedule
        return self

    @property
    def schedule(self) -> Schedule | None:
        """The shift of the draw, None for none."""
        return None if self.rule == "none" else Schedule(self.rule, shift=self.shift)

    def draw(self, batch: Batch, tokens: int, channels: int) -> Tensor:
        """(B,) sigma in 0..1."""
        if self.distribution == "uniform":
            sigma = batch.uniform("sigma")
        else:
            sigma = torch.sigmoid(self.mean + self.std * batch.normal("sigma", ()))
        return self._shifted(sigma, tokens, channels)

    def quantiles(self, count: int, tokens: int, channels: int) -> Tensor:
        """(count,) sigma, rising: the middles of equal shares of what draw() draws."""
        share = (torch.arange(count) + 0.5) / count
        if self.distribution == "logit-normal":
            share = torch.sigmoid(self.mean + self.std * torch.special.ndtri(share))
        return self._shifted(share, tokens, channels)

    def _shifted(self, sigma: Tensor, tokens: int, channels: int) -> Tensor:
        if self.schedule is None:
            return sigma
        return shifted(sigma, self.schedule.ratio(tokens=tokens, channels=channels))


class Objective(Strict):
    """Eq. 2 or Eq. 7 and everything in them that the paper leaves open."""

    loss: Literal["guided", "flow", "ddpm"] = Field(
        "guided",
        description="guided = Eq. 7 (distilled bases), flow = Eq. 2, ddpm = noise and variance (bases trained so)",
    )
    w: tuple[float, float] = Field((0.0, 13.0), description="range of w, uniform; released code: g = 1+w in 1..14")
    implicit_w: float | None = Field(
        None,
        gt=0,
        description="for a base that is distilled at one w and has no embedding for it: Eq. 7 at that w (Z-Image's "
        "released code: g = 1+w = 3); None = Eq. 2 for such a base",
    )
    guidance_embed: Literal["1+w", "w"] = Field("1+w", description="what the embedding gets (g = 3.5 is w = 2.5)")
    uncond_embed: Literal["same", "one"] = Field(
        "same", description="same w in the empty branch (Eq. 6); one = released code"
    )
    uncond_grad: bool = Field(
        True, description="gradient through the empty branch: on = Eq. 7 as written, off = released code"
    )
    flow_guidance: float | Literal["w"] = Field(
        1.0, description="guidance fed to a distilled model under loss: flow (1 = no guidance); w = drawn as for guided"
    )
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="captions made empty (released code 0.1); without it Eq. 7 is under-determined"
    )
    timesteps: Timesteps = Timesteps()

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a field that is newer than runs which exist, at its default: their digests stay what they were."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "implicit_w" or value is not None}


def objective_loss(
    objective: Objective,
    velocity: Velocity,
    batch: Batch,
    latents: Tensor,
    text: Cond,
    empty: Cond,
    *,
    tokens: int,
    distilled: bool,
    raw: RawOutput | None = None,
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """Loss and what to log, for model-space latents (B,C,h,w) with their text and the empty prompt (1,...).

    `velocity(x, sigma, cond, guidance)`; `distilled`: the model has a guidance embedding; `raw`: for loss ddpm, the
    network itself. The loss of the rows whose caption was dropped is logged apart as loss_uncond: only it shows an
    unconditional branch gone astray.
    """
    if objective.loss == "ddpm":
        if raw is None:
            raise ValueError("objective.loss: ddpm needs a network that predicts noise at whole steps")
        return ddpm_loss(raw, batch, latents, text, empty, objective.caption_dropout)
    corrected, target, dropped = objective_terms(
        objective, velocity, batch, latents, text, empty, tokens=tokens, distilled=distilled
    )
    errors = (corrected.float() - target).square().flatten(1).mean(1)  # Eq. 2, Eq. 7
    return errors.mean(), losses_by_caption(errors, dropped)


@torch.no_grad()
def objective_errors(
    objective: Objective,
    velocity: Velocity,
    batch: Batch,
    latents: Tensor,
    text: Cond,
    empty: Cond,
    *,
    tokens: int,
    distilled: bool,
    raw: RawOutput | None = None,
    levels: int,
    level: int,
) -> Tensor:
    """(B,) the loss of each row at one of `levels` fixed noise levels, no caption dropped: for validation.

    Of loss ddpm the error of the noise alone, at fixed steps.
    """
    objective = objective.model_copy(update={"caption_dropout": 0.0})
    if objective.loss == "ddpm" and raw is not None:
        at = torch.full((len(batch),), int((level + 0.5) / levels * STEPS), device=latents.device)
        output, noise, *_ = ddpm_terms(raw, batch, latents, text, empty, 0.0, at)
        return (output[:, : latents.shape[1]] - noise).square().flatten(1).mean(1)
    sigma = objective.timesteps.quantiles(levels, tokens, latents.shape[1])[level].to(latents).expand(len(batch))
    corrected, target, _ = objective_terms(
        objective, velocity, batch, latents, text, empty, tokens=tokens, distilled=distilled, sigma=sigma
    )
    return (corrected.float() - target).square().flatten(1).mean(1)


def objective_terms(
    objective: Objective,
    velocity: Velocity,
    batch: Batch,
    latents: Tensor,
    text: Cond,
    empty: Cond,
    *,
    tokens: int,
    distilled: bool,
    sigma: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What Eq. 2 or Eq. 7 compare: (the model's corrected velocity, noise - data (B,C,h,w), dropped rows (B,)).

    sigma: (B,) noise levels instead of drawn ones.
    The correction is linear in what `velocity` gives, so that may as well be (B,D,h,w) features under a linear head.
    """
    noise = batch.normal("noise", latents.shape[1:])
    if sigma is None:
        sigma = objective.timesteps.draw(batch, tokens, latents.shape[1])
    text, dropped = drop_captions(batch, text, empty, objective.caption_dropout)
    noised = guidance.interpolate(latents, noise, sigma)
    target = guidance.velocity_target(latents, noise)
    if objective.loss == "flow" or not (distilled or objective.implicit_w):
        corrected = velocity(noised, sigma, text, _flow_scale(objective, batch) if distilled else None)
    else:
        w, scale = _draw_w(objective, batch) if distilled else (_implicit_w(objective, batch), None)
        corrected = _corrected(objective, velocity, noised, sigma, text, empty, dropped, w, scale)
    return corrected, target, dropped


def _corrected(
    objective: Objective,
    velocity: Velocity,
    noised: Tensor,
    sigma: Tensor,
    text: Cond,
    empty: Cond,
    dropped: Tensor,
    w: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Eq. 6 on the rows that kept their caption; a dropped row is its own empty branch, so v_hat = v there.

    w (B,); scale (B,): what the guidance embedding gets for it, None without one.
    """
    v_cond = velocity(noised, sigma, text, scale)
    kept = torch.nonzero(~dropped).flatten()
    if not len(kept):
        kept = torch.zeros(1, dtype=torch.long, device=noised.device)  # every rank must make the same forward calls
    other = None if scale is None else scale[kept]
    if other is not None and objective.uncond_embed == "one":
        other = torch.ones_like(other)
    with contextlib.nullcontext() if objective.uncond_grad else torch.no_grad():
        v_uncond = velocity(noised[kept], sigma[kept], under_empty(text, empty, kept), other)
    raw = guidance.raw_velocity(v_cond[kept].float(), v_uncond.float(), w[kept])  # Eq. 6
    return torch.where(_rows(dropped, v_cond), v_cond.float(), v_cond.float().index_copy(0, kept, raw))


def _draw_w(objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    """w (B,) and what the embedding gets for it."""
    low, high = objective.w
    w = low + (high - low) * batch.uniform("w")
    return w, torch.as_tensor(guidance.guidance_scale(w)) if objective.guidance_embed == "1+w" else w


def _implicit_w(objective: Objective, batch: Batch) -> Tensor:
    """(B,) the one w of a base without an embedding."""
    return torch.full((len(batch),), float(objective.implicit_w or 0), device=batch.device)


def _flow_scale(objective: Objective, batch: Batch) -> Tensor:
    """(B,) guidance that Eq. 2 feeds to a distilled model."""
    if objective.flow_guidance == "w":
        return _draw_w(objective, batch)[1]
    return torch.full((len(batch),), float(objective.flow_guidance), device=batch.device)


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))
