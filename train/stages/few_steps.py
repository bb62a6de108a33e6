"""Stage `few-steps`: a LoRA with which few steps of sampling go where many went before.

For each interval between two of the few steps the teacher, the base as it is, goes from a noised latent through its own
steps in between; the student learns the velocity that leads to the same place in one.
"""
# B batch, C latent channels, h w latent rows and columns, k interval

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dcgen import guidance
from train.batches import Batch
from train.conditioning import Cond, under_empty
from train.config import Optimizer
from train.files import write_tensors
from train.lora import inject_lora, lora_pairs, scale_lora
from train.stages.finetune import FinetuneStage, depths

LORA = "lora.safetensors"


class FewStepsStage(FinetuneStage):
    """Trains LoRA alone, over a merged model on its own latent; writes lora.safetensors, for any LoRA loader."""

    class Config(FinetuneStage.Config):
        kind: Literal["few-steps"] = "few-steps"
        start: Literal["base"] = Field("base", description="the base's own embedder and head, which do not train")
        train: Literal["lora"] = "lora"
        few: int = Field(4, ge=1, le=100, description="steps of the student")
        teacher_steps: int = Field(20, ge=1, le=1000, description="of the teacher over all; a multiple of `few`")
        g: tuple[float, float] = Field(
            (3.5, 3.5), description="guidance scale, uniform; by true CFG where not embedded"
        )
        rank: int = Field(32, ge=1)
        alpha: float = Field(32.0, gt=0)
        steps: int = Field(2_000, ge=1)
        batch: int = Field(64, ge=1)
        optimizer: Optimizer = Optimizer(lr=1e-4, warmup=100, clip=1.0)

    config: Config

    def check(self) -> list[str]:
        problems, c = super().check(), self.config
        if c.teacher_steps % c.few:
            problems.append(f"teacher_steps: {c.teacher_steps} is no multiple of few: {c.few}")
        if c.compile:
            problems.append("the teacher is the network without its LoRA, which is not compiled: set compile: false")
        return problems

    def describe_plan(self) -> list[str]:
        c, lines = self.config, super().describe_plan()
        extra = (
            f"{c.few} steps for {c.teacher_steps}: {c.teacher_steps // c.few} passes without gradient a sample beside"
        )
        return [*(line for line in lines if "GPU-hours" not in line), extra]

    def prepare(self) -> None:
        inject_lora(self.model, self.family, self.config.rank, self.config.alpha, self.context.recipe.seed)
        self.depth = depths(self.model, self.family.blocks(self.model))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        c = self.config
        latents, cond = self.samples(batch)
        tokens, channels = self.tokens(latents), latents.shape[1]
        sigmas = c.schedule.sigmas(c.teacher_steps, tokens=tokens, channels=channels).to(self.device)
        between = c.teacher_steps // c.few
        first = between * batch.integers("interval", c.few)
        start = guidance.interpolate(latents, batch.normal("noise", latents.shape[1:]), sigmas[first])
        g = c.g[0] + (c.g[1] - c.g[0]) * batch.uniform("g")
        end = self._teacher(start, sigmas, first, between, cond, g)
        target = (end - start) / _rows(sigmas[first + between] - sigmas[first])
        errors = (self.velocity(start, sigmas[first], cond, g if self.distilled else None) - target).square()
        return errors.mean(), {}

    @torch.no_grad()
    def _teacher(self, x: Tensor, sigmas: Tensor, first: Tensor, steps: int, cond: Cond, g: Tensor) -> Tensor:
        """(B,C,h,w) after `steps` Euler steps of the base from number first (B,) of the sigmas."""
        scale_lora(self.model, 0.0)
        rows = torch.arange(len(x), device=self.device)
        for step in range(steps):
            now, then = sigmas[first + step], sigmas[first + step + 1]
            v = self.velocity(x, now, cond, g if self.distilled else None)
            if not self.distilled:
                v_uncond = self.velocity(x, now, under_empty(cond, self.empty, rows), None)
                v = guidance.cfg_velocity(v, v_uncond, g - 1)  # arXiv:2509.25180 Eq. 4
            x = x + _rows(then - now) * v
        scale_lora(self.model, 1.0)
        return x

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        tensors: dict[str, Tensor] = {}
        for path, pair in lora_pairs(weights, self.config.alpha).items():
            names = {"lora_A.weight": pair.A, "lora_B.weight": pair.B, "alpha": torch.tensor(float(pair.alpha))}
            tensors |= {f"transformer.{path}.{name}": tensor for name, tensor in names.items()}
        if self.context.rank == 0:
            title = f"{self.context.recipe.name}, {self.config.few} steps"
            write_tensors(self.folder / LORA, tensors, {"modelspec.title": title, "dcgen.steps": str(self.config.few)})
        return {"parameters": sum(t.numel() for t in weights.values())}


def _rows(values: Tensor) -> Tensor:
    return values[:, None, None, None]
