"""Stage `distill`: the toy's base learns to give its own CFG output in one pass (Eq. 3-4)."""
# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dcgen import guidance
from train.batches import Batch, drop_captions, losses_by_caption
from train.conditioning import under_empty
from train.stages.pretrain import BaseConfig, BaseStage


class DistillStage(BaseStage):
    """Guidance distillation: the student is fed g = 1 + w and matches Eq. 4 of the frozen model it started from.

    Rows whose caption is dropped match the teacher's unconditional velocity at any w, which is what Eq. 5 assumes.
    """

    class Config(BaseConfig):
        kind: Literal["distill"] = "distill"
        w: tuple[float, float] = Field((0.0, 4.0), description="range of w, uniform; g = 1 + w is fed")

    config: Config
    preview_by_embedding = True

    def setup(self) -> nn.Module:
        student = super().setup()
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)
        return student

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        latents, cond = self.samples(batch)
        objective = self.config.objective
        sigma = objective.timesteps.draw(batch, self.tokens(latents), latents.shape[1])
        noised = guidance.interpolate(latents, batch.normal("noise", latents.shape[1:]), sigma)
        cond, dropped = drop_captions(batch, cond, self.empty, objective.caption_dropout)
        w = self.config.w[0] + (self.config.w[1] - self.config.w[0]) * batch.uniform("w")
        empty = under_empty(cond, self.empty, torch.arange(len(batch), device=self.device))
        with torch.no_grad():
            one = torch.ones_like(w)
            v_cond = self.velocity_of(self.teacher, noised, sigma, cond, one)
            v_uncond = self.velocity_of(self.teacher, noised, sigma, empty, one)
            target = guidance.cfg_velocity(v_cond, v_uncond, w)  # arXiv:2509.25180 Eq. 4
        v_model = self.velocity(noised, sigma, cond, guidance.guidance_scale(w))
        errors = (v_model - target).square().flatten(1).mean(1)  # Eq. 3
        return errors.mean(), losses_by_caption(errors, dropped)
