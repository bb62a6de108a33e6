"""Stages `head` and `finetune`: the moved model on Eq. 2 or Eq. 7. Head alignment is fine-tuning without LoRA."""
# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from dcgen import schedule
from dcgen.adapter import Adapter, load_adapter, save_adapter
from train.alignment import NormalEquations
from train.autoencoders import check_autoencoder, latent_space, load_autoencoder
from train.batches import Batch, BatchPlan
from train.config import Optimizer
from train.ddpm import ddpm_terms, raw_output
from train.lora import lora_pairs
from train.models import base_backbone, load_network, moved_network, read_tensors
from train.objective import Objective, objective_loss, objective_terms
from train.plan import plan_moved
from train.sample import euler, grid, seeded_noise
from train.stages.base import CachedStage, PreviewConfig, complaints
from train.text import TextEncoder, check_text, load_text

FIT_BATCHES = 32  # that a closed-form head is fitted to
KEEP = "base"  # value of `start`: the base already works on this latent


class MovedConfig(PreviewConfig):
    """Shared by head and finetune."""

    base: str = Field(description="release folder of the base model")
    architecture: str = Field("", description="published base that --dry-run assumes while the folder is absent")
    autoencoder: str = Field("", description="folder of the new autoencoder; needed for previews")
    cache: str = Field("cache", description="cache stage or folder")
    objective: Objective = Objective()
    start: str = Field("", description=f"stage to go on from; empty = random ends; {KEEP} = the base's own ends")
    patch_size: int = Field(1, ge=1)
    schedule: dict[str, Any] = Field(
        {"rule": "flux"}, description="sampling schedule written into the adapter and used for previews"
    )
    gradient_checkpointing: bool = Field(False, description="recompute blocks in backward: less memory, 4/3 the time")

    @field_validator("schedule")
    @classmethod
    def _a_schedule(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Used at the first preview and in the finished adapter: too late to find out."""
        schedule.check_schedule(value)
        return value


class MovedStage(CachedStage):
    """A base network whose embedder and head are new. Subclasses say what trains."""

    Config = MovedConfig
    config: MovedConfig
    free_fields = frozenset({"schedule", "autoencoder"})

    def check(self) -> list[str]:
        """What the end and the previews need, too, so that no finished training is lost to a typing error."""
        problems = []
        if self.config.autoencoder and not self.context.pending(self.config.autoencoder):
            problems += complaints(check_autoencoder, self.context.resolve(self.config.autoencoder))
        if self.context.pending(self.config.base):
            return problems
        base = self.context.resolve(self.config.base)
        wrong = complaints(base_backbone, base)
        if not wrong:
            wrong = self.check_objective(base_backbone(base)[0].name)
            if self.config.preview_every and self.config.preview_prompts and self.config.autoencoder:
                wrong += complaints(check_text, base)
        return problems + wrong

    def check_objective(self, base: str) -> list[str]:
        """Problems of the objective with a base of that name."""
        if self.config.objective.loss == "ddpm" and base != "dit":
            return [f"objective.loss: ddpm is DiT's; the base is {base}: use flow or guided"]
        return []

    def describe_plan(self) -> list[str]:
        return plan_moved(self.context, self.config, self.lora_rank())[0]

    def check_plan(self) -> list[str]:
        return plan_moved(self.context, self.config, self.lora_rank())[1]

    def lora_rank(self) -> int:
        """Rank of the LoRA that trains; 0 = none."""
        return 0

    def setup(self) -> nn.Module:
        c = self.config
        self.cache = self.open_cache(c.cache, c.patch_size)
        self.base = self.context.resolve(c.base)
        self.backbone, base_config = base_backbone(self.base)
        self.space = self.cache.spaces["student"]
        self.base_fingerprint = self.backbone.fingerprint(base_config)
        self.distilled = bool(base_config.get("guidance_embeds"))
        self.frozen_dtype = getattr(torch, c.dtype)
        seed = self.context.recipe.seed
        if c.start == KEEP:
            self._check_own_latent()
            self.model, self.moved_config = load_network(self.base, self.frozen_dtype, "cpu"), base_config
            for path in (self.backbone.embedder, self.backbone.head):
                self.model.get_submodule(path).float()
        else:
            place = (self.space.channels, c.patch_size, seed, self.frozen_dtype)
            self.model, self.moved_config = moved_network(self.base, *place)
        self.prepare()
        if c.gradient_checkpointing:
            network: Any = self.model
            network.enable_gradient_checkpointing()
        self.model.train()
        self.text_online: TextEncoder | None = None
        if not self.cache.has_text:
            self.text_online = load_text(self.base, self.device, self.frozen_dtype, self.cache.text_tokens)
        self.empty = {name: value.to(self.device) for name, value in self._text([0]).items()}
        return self.model

    def prepare(self) -> None:
        """Load what earlier stages made, then switch on the gradients of what trains: embedder and head, whole."""
        if self.config.start and self.config.start != KEEP:
            self.load_alignment(self.config.start)
        for path in (self.backbone.embedder, self.backbone.head):
            self.model.get_submodule(path).requires_grad_(True)

    def _check_own_latent(self) -> None:
        own = latent_space(self.base / "vae")
        differing = own.differences(self.space)
        if differing:
            raise ValueError(
                f"start: {KEEP} keeps the base's embedder and head, so the cache must hold its own latents; "
                f"{self.base}/vae differs: {'; '.join(differing)}"
            )

    def shard_units(self) -> Sequence[nn.Module]:
        return self.backbone.blocks(self.model)

    def velocity(self, x: Tensor, sigma: Tensor, cond: dict[str, Tensor], scale: Tensor | None) -> Tensor:
        """Velocity (B,C,h,w) of the moved model."""
        with self._autocast():
            return self.backbone.velocity(self.model, x, sigma, cond, scale)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        latents, text = self._samples(batch)
        return objective_loss(
            self.config.objective, self.velocity, batch, latents, text, self.empty,
            tokens=self._tokens(latents), distilled=self.distilled, raw=self._raw,
        )  # fmt: skip

    def _samples(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents (B,C,h,w) of a batch and their text."""
        latents = self.cache.latents(batch.indices, "student").to(self.device)
        text = self._text(self.cache.caption_numbers(batch.indices))
        return latents, {name: value.to(self.device) for name, value in text.items()}

    def _raw(self, x: Tensor, step: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with self._autocast():
            return raw_output(self.model, x, step, cond)

    def preview(self, step: int) -> dict[str, Tensor]:
        c = self.config
        if not (c.preview_prompts and c.autoencoder):
            return {}
        if not hasattr(self, "previewer"):
            self.previewer = load_autoencoder(self.context.resolve(c.autoencoder), self.device)
            encode = self.text_online or load_text(self.base, self.device, self.frozen_dtype, self.cache.text_tokens)
            self.preview_text = encode(c.preview_prompts)
        like = self.cache.latents([self.cache.buckets()[0][0]], "student")
        noise = seeded_noise([c.preview_seed] * len(c.preview_prompts), like.shape[1:]).to(self.device)
        sigmas = schedule.sigmas(c.preview_steps, tokens=self._tokens(like), channels=self.space.channels, **c.schedule)
        how: dict[str, Any] = {"scale": c.preview_guidance}
        if not self.distilled:
            how = {"empty": self.empty, "w": c.preview_guidance - 1}
        latents = euler(self.velocity, noise, sigmas, self.preview_text, **how)
        return {"samples": grid(self.previewer.decode(self.space.denormalize(latents)), len(noise))}

    def adapter(self, weights: dict[str, Tensor], alpha: float) -> Adapter:
        """The trained weights as a DC-Gen adapter."""
        ends = (f"{self.backbone.embedder}.", f"{self.backbone.head}.")
        tensors = {name: tensor for name, tensor in weights.items() if name.startswith(ends)}
        return Adapter(
            backbone=self.backbone.name,
            tensors=tensors,
            lora=lora_pairs(weights, alpha),
            latent=self.space,
            patch_size=self.config.patch_size,
            base=self.base_fingerprint,
            schedule=dict(self.config.schedule),
            metadata={"modelspec.title": self.context.recipe.name},
        )

    def write_adapter(self, weights: dict[str, Tensor], alpha: float = 1.0) -> Path:
        """Write `adapter.safetensors` into the stage's folder (rank 0)."""
        path = self.folder / "adapter.safetensors"
        if self.context.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_adapter(path, self.adapter(weights, alpha))
        return path

    def load_ends(self, tensors: dict[str, Tensor]) -> None:
        """Copy embedder and/or head tensors (by full name) into the model; every tensor must have its place."""
        state = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name not in state or state[name].shape != tensor.shape:
                    place = tuple(state[name].shape) if name in state else "no such parameter"
                    raise ValueError(f"{name} {tuple(tensor.shape)} does not fit the moved model ({place})")
                state[name].copy_(tensor)

    def load_alignment(self, reference: str) -> None:
        """The embedder that an align stage wrote, or embedder and head of an adapter file's stage."""
        folder = self.context.resolve(reference)
        adapter, embedder = folder / "adapter.safetensors", folder / "embedder.safetensors"
        if adapter.is_file():
            self.load_ends(load_adapter(adapter).tensors)
        elif embedder.is_file():
            prefix = f"{self.backbone.embedder}."
            names = {n for n, _ in self.model.named_parameters() if n.startswith(prefix)}
            self.load_ends(read_tensors(folder, names))
        else:
            raise FileNotFoundError(
                f"{folder} holds neither adapter.safetensors nor embedder.safetensors: run that stage first"
            )

    def _text(self, captions: Sequence[int]) -> dict[str, Tensor]:
        if self.text_online is None:
            return self.cache.text(captions)
        return self.text_online([self.cache.captions[number] for number in captions])

    def _tokens(self, latents: Tensor) -> int:
        return latents.shape[2] * latents.shape[3] // self.config.patch_size**2

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.frozen_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.frozen_dtype)


class HeadStage(MovedStage):
    """Output-head alignment: embedder and head, backbone frozen (paper 3.3, Table 7)."""

    class Config(MovedConfig):
        start: str = Field("align", description="align stage; empty = random embedder (the paper's ablation)")
        steps: int = Field(5_000, ge=1, description="Table 7: FLUX, SANA 5k; DiT 20k")
        batch: int = Field(256, ge=1, description="Table 7: FLUX 256, SANA 1024/256, DiT 1024")
        optimizer: Optimizer = Optimizer(lr=1e-4, clip=0.1)
        head_init: Literal["xavier", "zero", "closed-form"] = Field(
            "xavier",
            description="released code: xavier-uniform; closed-form: least squares of the loss in the head alone",
        )

    config: Config

    def check_objective(self, base: str) -> list[str]:
        problems = super().check_objective(base)
        if self.config.head_init == "closed-form" and self.config.patch_size != 1:
            problems.append(f"head_init: closed-form is for patch_size 1, not {self.config.patch_size}; use xavier")
        if self.config.head_init == "closed-form" and base == "dit" and self.config.objective.loss != "ddpm":
            problems.append("head_init: closed-form on DiT, whose head names the noise, is for objective.loss: ddpm")
        return problems

    def setup(self) -> nn.Module:
        module = super().setup()
        self.fitted: dict[str, float] = {}
        if self.config.head_init == "closed-form":
            self.fitted = self.fit_head()
        return module

    def prepare(self) -> None:
        if self.config.head_init == "zero":
            nn.init.zeros_(self.model.get_parameter(f"{self.backbone.head}.weight"))
        super().prepare()

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        self.write_adapter(weights)
        return {"parameters": sum(t.numel() for t in weights.values()), **self.fitted}

    @torch.no_grad()
    def fit_head(self) -> dict[str, float]:
        """Set the head to the minimiser of the loss over FIT_BATCHES batches, with all else as it is.

        The head is linear, so Eq. 2, Eq. 7 and DDPM's noise error are least squares in it, as Eq. 1 is in the embedder.
        """
        head: Any = self.model.to(self.device).get_submodule(self.backbone.head)
        equations = NormalEquations.empty(head.in_features, self.space.channels, self.device)
        plan = BatchPlan(self.buckets(), self.config.batch, self.context.recipe.seed)
        place = {"rank": self.context.rank, "world": self.context.world, "accumulate": self.config.accumulate}
        for step in range(FIT_BATCHES):
            for batch in plan.micro_batches(step, device=self.device, **place):
                features, target = self.head_terms(batch)
                equations.add(features.movedim(1, -1), target.movedim(1, -1))
        equations.reduce()
        weight, bias = equations.solve()
        head.weight.zero_()
        head.bias.zero_()
        head.weight[: len(weight)].copy_(weight)  # the rest is DiT's variance
        head.bias[: len(bias)].copy_(bias)
        return {"closed_form_loss": equations.loss(weight, bias), "variance": equations.variance()}

    def head_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the loss is in the head: (B,D,h,w) features, guidance corrected where it corrects, and their targets."""
        head = self.model.get_submodule(self.backbone.head)
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

        def features(x: Tensor, *arguments: Any) -> Tensor:
            run = self._raw if self.config.objective.loss == "ddpm" else self.velocity
            run(x, *arguments)
            return seen.pop().float().movedim(-1, 1).unflatten(2, x.shape[2:])

        latents, text = self._samples(batch)
        objective = self.config.objective
        try:
            if objective.loss == "ddpm":
                return ddpm_terms(features, batch, latents, text, self.empty, objective.caption_dropout)[:2]
            return objective_terms(
                objective, features, batch, latents, text, self.empty,
                tokens=self._tokens(latents), distilled=self.distilled,
            )[:2]  # fmt: skip
        finally:
            handle.remove()
