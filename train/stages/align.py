"""Stage `align`: the new patch embedder, arXiv:2509.25180 Eq. 1, by closed form or AdamW."""
# B batch, C latent channels, h w latent rows and columns, D width

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from train.alignment import LinearEmbedder, NormalEquations, alignment_loss
from train.batches import Batch
from train.config import Optimizer, StageConfig
from train.files import write_json, write_tensors
from train.inputs import Read
from train.models import embedder_only, fresh_ends, network_files, network_of, without_blocks
from train.plan import plan_align
from train.stages.base import CachedStage, complaints


class AlignStage(CachedStage):
    """Fits the new embedder to the pooled output of the old one; the base's blocks are never loaded."""

    class Config(StageConfig):
        base: str = Field(description="release folder of the base model")
        architecture: str = Field("", description="published base that --dry-run assumes while the folder is absent")
        cache: str = Field("cache", description="cache stage or folder")
        patch_size: int = Field(1, ge=1, description="of the new model; DC-Gen's is 1")
        solver: Literal["closed-form", "adamw"] = Field("closed-form", description="adamw is what the paper ran")
        resample: Literal["teacher-down", "student-up"] = Field(
            "teacher-down", description="teacher-down: average pool (paper 3.3); student-up: bilinear (released code)"
        )
        ridge: float = Field(0.0, ge=0, description="closed form only, relative to the mean feature power")
        steps: int = Field(20_000, ge=0, description="adamw only (Table 7: 20k, class-conditional 50k)")
        batch: int = Field(64, ge=1, description="Table 7")
        optimizer: Optimizer = Optimizer(lr=1e-4)

    config: Config

    def check(self) -> list[str]:
        if self.context.pending(self.config.base):
            return []
        return complaints(network_of, self.context.resolve(self.config.base))

    def reads(self) -> dict[str, Read]:
        base = self.context.resolve(self.config.base)
        return {"base": Read(base, tuple(network_files(base))), "cache": self.cache_read(self.config.cache)}

    @property
    def trains(self) -> bool:
        return self.config.solver == "adamw"

    def describe_plan(self) -> list[str]:
        return plan_align(self.context, self.config)

    def setup(self) -> nn.Module | None:
        self.cache = self.open_cache(self.config.cache, self.config.patch_size)
        self.family, self.teacher, self.teacher_config = embedder_only(self.context.resolve(self.config.base))
        self.teacher.to(self.device)
        self.student = self._new_student()
        return None if self.config.solver == "closed-form" else self.student

    def _new_student(self) -> nn.Module:
        """A network without blocks whose embedder is fresh, on the new latent."""
        channels, p = self.cache.spaces["student"].channels, self.config.patch_size
        seed = self.context.recipe.seed
        self.student_config, ends = fresh_ends(self.family, self.teacher_config, channels, p, seed)
        self.embedder = self.family.backbone.ends(self.student_config).embedder
        student = without_blocks(self.family, self.student_config).requires_grad_(False)
        parent, _, name = self.embedder.rpartition(".")
        setattr(student.get_submodule(parent), name, ends[self.embedder].requires_grad_(True))
        return student.to(self.device)

    def shard_units(self) -> Sequence[nn.Module]:
        return [self.student.get_submodule(self.embedder)]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        student = self.cache.latents(batch.indices, "student").to(self.device)
        embedded = self.family.embed(self.student, student, self.student_config)
        return alignment_loss(self._teacher(batch.indices), embedded, self.config.resample), {}

    @torch.no_grad()
    def _teacher(self, indices: Sequence[int]) -> Tensor:
        latents = self.cache.latents(indices, "teacher").to(self.device)
        return self.family.embed(self.teacher, latents, self.teacher_config)

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        student = self._new_student()
        linear = LinearEmbedder(self.family, student, self.student_config, self.config.patch_size)
        equations = self._accumulate(linear)
        bias = linear.own_bias is not None
        least = equations.loss(*equations.solve(bias=bias))
        if self.config.solver == "closed-form":
            linear.set(*equations.solve(self.config.ridge, bias))
        else:
            for name, parameter in student.named_parameters():
                if name in weights:
                    parameter.data.copy_(weights[name])
        loss, variance = equations.loss(*linear.flat()), equations.variance()
        numbers: dict[str, object] = {"loss": loss, "least_loss": least, "variance": variance}
        numbers |= {"rows": int(equations.count), "unexplained": loss / variance}
        if self.context.rank == 0:
            prefix = self.embedder
            state = student.get_submodule(prefix).state_dict()
            write_tensors(self.folder / "embedder.safetensors", {f"{prefix}.{name}": t for name, t in state.items()})
            write_json(self.folder / "report.json", numbers)
        return numbers

    def _accumulate(self, linear: LinearEmbedder) -> NormalEquations:
        """One pass over the data, each rank its share."""
        weight, _ = linear.flat()
        equations = NormalEquations.empty(weight.shape[1], weight.shape[0], self.device)
        for bucket in self.cache.buckets():
            mine = bucket[self.context.rank :: self.context.world]
            for start in range(0, len(mine), self.config.batch):
                part = mine[start : start + self.config.batch]
                latents = self.cache.latents(part, "student").to(self.device)
                linear.add_to(equations, self._teacher(part), latents, self.config.resample)
        equations.reduce()
        return equations
