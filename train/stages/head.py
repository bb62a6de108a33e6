"""Stages `head` and `finetune`: the moved model on Eq. 2 or Eq. 7. Head alignment is fine-tuning without LoRA."""
# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dcgen.adapter import Adapter, load_adapter, save_adapter
from dcgen.files import weight_files
from dcgen.folder import VAE
from dcgen.release import open_model
from dcgen.schedule import LINEAR, Schedule
from train.alignment import NormalEquations
from train.autoencoders import check_autoencoder
from train.batches import Batch, BatchPlan
from train.compilation import Backend, compile_blocks
from train.conditioning import Cond, of_samples
from train.config import Optimizer, ScheduleField
from train.ddpm import ddpm_terms
from train.family import Family
from train.frozen import fetch_ahead, freeze_linears
from train.generate import Pipeline
from train.inputs import Read, one_file
from train.log import save_png
from train.lora import lora_pairs
from train.models import load_network, moved_network, read_base, read_tensors
from train.objective import objective_terms
from train.plan import plan_moved
from train.sample import grid
from train.stages.base import complaints
from train.stages.denoising import DenoisingConfig, DenoisingStage
from train.text_parts import check_text

FIT_BATCHES = 32  # that a closed-form head is fitted to
KEEP = "base"  # value of `start`: the base already works on this latent


class MovedConfig(DenoisingConfig):
    """Shared by head and finetune."""

    architecture: str = Field("", description="published base that --dry-run assumes while the folder is absent")
    autoencoder: str = Field("", description="folder of the new autoencoder; needed for previews")
    start: str = Field("", description=f"stage to go on from; empty = random ends; {KEEP} = the base's own ends")
    patch_size: int = Field(1, ge=1)
    schedule: ScheduleField = Field(
        Schedule(LINEAR), description="sampling schedule written into the adapter and used for previews"
    )
    gradient_checkpointing: bool = Field(False, description="recompute blocks in backward: less memory, 4/3 the time")
    preview_base: bool = Field(
        True,
        description="also draw the previews once with the base, before the first step; at a quarter of the tokens for "
        "the moved model this takes the time of 4 to 10 of its previews",
    )
    compile: bool = Field(False, description="torch.compile each block; the first steps take minutes")
    compile_backend: Backend = Field("inductor", description="aot_eager checks on a CPU what would be compiled")

    frozen_store: Literal["as dtype", "int8"] = Field(
        "as dtype", description="linear layers of the frozen blocks; int8 halves bfloat16, rows have a scale each"
    )
    offload_blocks: int = Field(
        0, ge=0, description="blocks, from the last, whose frozen weights stay in RAM (block swap)"
    )
    offload_activations: bool = Field(False, description="keep what recomputation starts from in RAM")

    later_fields: ClassVar[tuple[str, ...]] = (
        "preview_base", "compile", "compile_backend", "frozen_store", "offload_blocks", "offload_activations",
    )  # fmt: skip


class MovedStage(DenoisingStage):
    """A base network whose embedder and head are new. Subclasses say what trains."""

    Config = MovedConfig
    config: MovedConfig
    free_fields = frozenset({"schedule", "autoencoder"})
    side = "student"

    def check(self) -> list[str]:
        """What the end and the previews need, too, so that no finished training is lost to a typing error."""
        problems = self.check_memory_settings()
        if self.config.autoencoder and not self.context.pending(self.config.autoencoder):
            problems += complaints(check_autoencoder, self.context.resolve(self.config.autoencoder))
        if self.context.pending(self.config.base):
            return problems
        base = self.context.resolve(self.config.base)
        wrong = complaints(read_base, base)
        if not wrong:
            family, _ = read_base(base)
            wrong = self.check_objective(family)
            if self.config.preview_every and self.config.preview_prompts and self.config.autoencoder:
                wrong += complaints(lambda path: check_text(path, family.text_parts), base)
        return problems + wrong

    def check_memory_settings(self) -> list[str]:
        """Settings of memory that do not go together."""
        c, problems = self.config, []
        if c.offload_blocks and c.compile:
            problems.append(
                "offload_blocks copies weights while a block runs, which is not compiled: set compile: false"
            )
        if c.offload_activations and not c.gradient_checkpointing:
            problems.append(
                "offload_activations moves what recomputation starts from: set gradient_checkpointing: true"
            )
        return problems

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond, scale: Tensor | None) -> Tensor:
        if not (self.config.offload_activations and torch.is_grad_enabled()):
            return super().velocity(x, sigma, cond, scale)
        with torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda"):
            return super().velocity(x, sigma, cond, scale)

    def reads(self) -> dict[str, Read]:
        reads, start = super().reads(), self.config.start
        if start and start != KEEP:
            path = self.context.resolve(start) / "adapter.safetensors"
            reads["start"] = one_file(path if path.is_file() else path.with_name("embedder.safetensors"))
        return reads

    def result_bytes(self, trained: int) -> int:
        return 4 * trained

    def check_objective(self, family: Family) -> list[str]:
        """Problems of the objective with a base of that family."""
        if self.config.objective.loss == "ddpm" and not family.denoises:
            return [
                f"objective.loss: ddpm is for a base trained by it, not for {family.backbone.title}: use flow or guided"
            ]
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
        self.family, self.release = read_base(self.base)
        self.space, self.patch_size, self.schedule = self.cache.spaces["student"], c.patch_size, c.schedule
        self.distilled = self.release.distilled
        self.base_weights = open_model(self.base).identity()
        self.frozen_dtype: torch.dtype = getattr(torch, c.dtype)
        self._preview_base()
        if c.start == KEEP:
            self._check_own_latent()
            self.model, self.moved_config = load_network(self.base, self.frozen_dtype, "cpu"), self.release.config
        else:
            place = (self.space.channels, c.patch_size, self.context.recipe.seed, self.frozen_dtype)
            self.model, self.moved_config = moved_network(self.base, *place)
        self.ends = self.backbone.ends(self.moved_config)
        for path in self.ends.trained:
            self.model.get_submodule(path).float()
        self.prepare()
        blocks = self.family.blocks(self.model)
        if c.frozen_store == "int8" or c.offload_blocks:
            freeze_linears(blocks, int8=c.frozen_store == "int8", offloaded=c.offload_blocks)
            fetch_ahead(blocks, self.device)
        if c.gradient_checkpointing:
            network: Any = self.model
            network.enable_gradient_checkpointing()
        if c.compile:
            compile_blocks(blocks, c.compile_backend)
        self.model.train()
        self.prepare_text()
        return self.model

    def prepare(self) -> None:
        """Load what earlier stages made, then switch on the gradients of what trains: embedder and head, whole."""
        if self.config.start and self.config.start != KEEP:
            self.load_alignment(self.config.start)
        for path in self.ends.trained:
            self.model.get_submodule(path).requires_grad_(True)

    def _check_own_latent(self) -> None:
        differing = self.release.latent.differences(self.space)
        if differing:
            raise ValueError(
                f"start: {KEEP} keeps the base's embedder and head, so the cache must hold its own latents; "
                f"{self.base / VAE} differs: {'; '.join(differing)}"
            )

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.frozen_dtype == torch.float32 else self.frozen_dtype

    @property
    def recomputes(self) -> bool:
        return self.config.gradient_checkpointing

    @property
    def text_dtype(self) -> torch.dtype:
        return self.frozen_dtype

    def preview_autoencoder(self) -> Path | None:
        return self.context.resolve(self.config.autoencoder) if self.config.autoencoder else None

    def preview_seeds(self) -> list[int]:
        """The same for all: prompts differ in nothing else."""
        return [self.config.preview_seed] * len(self.config.preview_prompts)

    def _preview_base(self) -> None:
        """Write previews/base.png, the base's images of the preview prompts, unless it is there or not wanted (rank 0).

        A base that already works on this latent has none, and one that takes more than prompts cannot be asked; one
        that came without its autoencoder takes the cache's.
        """
        c, file = self.config, self.folder / "previews" / "base.png"
        wanted = c.preview_base and c.preview_every and c.preview_prompts and c.autoencoder and c.start != KEEP
        if self.context.rank or not wanted or of_samples(self.family.fields) or file.is_file():
            return
        autoencoder = self._base_autoencoder()
        if autoencoder is None:
            return
        try:
            save_png(file, grid(self._base_images(autoencoder), self.preview_columns))
        except torch.OutOfMemoryError:  # the training may fit all the same: its ranks can share the weights
            print("the base's previews need more memory than this device has; going on without", file=sys.stderr)

    def _base_autoencoder(self) -> Path | None:
        """The base's own autoencoder: of its release, or the one that the recipe's cache stage names."""
        if (self.base / VAE).is_dir() and weight_files(self.base / VAE):
            return self.base / VAE
        teacher = getattr(self.context.recipe.stages.get(self.config.cache), "teacher", "")
        return self.context.resolve(teacher) if teacher else None

    def _base_images(self, autoencoder: Path) -> Tensor:
        """(B,3,H,W) in -1..1. The base is gone again before the moved network is loaded: memory holds one of them."""
        c, prompts = self.config, list(self.config.preview_prompts)
        settings: dict[str, Any] = {"device": self.device, "dtype": self.frozen_dtype}
        pipeline = Pipeline(self.base, autoencoder=autoencoder, **settings, text_tokens=self.cache.text_tokens)
        height, width = self.cache.samples[self.cache.buckets()[0][0]]["size"]
        narrow = self.frozen_dtype != torch.float32
        with torch.autocast(self.device.type, self.frozen_dtype if narrow else None, enabled=narrow):
            return pipeline.images(
                prompts, self.preview_seeds(), height, width, steps=c.preview_steps, guidance=c.preview_guidance,
                cfg_w=0.0 if self.distilled else c.preview_guidance - 1,
            )  # fmt: skip

    def adapter(self, weights: dict[str, Tensor], alpha: float) -> Adapter:
        """The trained weights as a DC-Gen adapter."""
        return Adapter(
            backbone=self.backbone.name,
            tensors={name: tensor for name, tensor in weights.items() if name.startswith(self.ends.prefixes)},
            lora=lora_pairs(weights, alpha),
            latent=self.space,
            patch_size=self.config.patch_size,
            base=self.release.signature,
            schedule=self.config.schedule,
            metadata={"modelspec.title": self.context.recipe.name},
            base_weights=self.base_weights,
            base_latent=self.release.latent,
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
            prefix = f"{self.ends.embedder}."
            names = {n for n, _ in self.model.named_parameters() if n.startswith(prefix)}
            self.load_ends(read_tensors(folder, names))
        else:
            raise FileNotFoundError(
                f"{folder} holds neither adapter.safetensors nor embedder.safetensors: run that stage first"
            )


class HeadStage(MovedStage):
    """Output-head alignment: embedder and head, backbone frozen (paper 3.3, Table 7)."""

    class Config(MovedConfig):
        start: str = Field("align", description="align stage; empty = random embedder (the paper's ablation)")
        steps: int = Field(5_000, ge=1, description="Table 7; class-conditional 20k")
        batch: int = Field(256, ge=1, description="Table 7: 256 or 1024, by model")
        optimizer: Optimizer = Optimizer(lr=1e-4, clip=0.1)
        head_init: Literal["xavier", "zero", "closed-form"] = Field(
            "xavier",
            description="released code: xavier-uniform; closed-form: least squares of the loss in the head alone",
        )

    config: Config

    def check_objective(self, family: Family) -> list[str]:
        problems = super().check_objective(family)
        if self.config.head_init == "closed-form" and self.config.patch_size != 1:
            problems.append(f"head_init: closed-form is for patch_size 1, not {self.config.patch_size}; use xavier")
        if self.config.head_init == "closed-form" and family.denoises and self.config.objective.loss != "ddpm":
            problems.append("head_init: closed-form of a head that names the noise is for objective.loss: ddpm")
        return problems

    def setup(self) -> nn.Module:
        module = super().setup()
        self.fitted: dict[str, float] = {}
        if self.config.head_init == "closed-form":
            self.fitted = self.fit_head()
        return module

    def prepare(self) -> None:
        if self.config.head_init == "zero":
            nn.init.zeros_(self.model.get_parameter(f"{self.ends.head}.weight"))
        super().prepare()

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        self.write_adapter(weights)
        return {"parameters": sum(t.numel() for t in weights.values()), **self.fitted}

    @torch.no_grad()
    def fit_head(self) -> dict[str, float]:
        """Set the head to the minimiser of the loss over FIT_BATCHES batches, with all else as it is.

        The head is linear, so Eq. 2, Eq. 7 and DDPM's noise error are least squares in it, as Eq. 1 is in the embedder.
        """
        head: Any = self.model.to(self.device).get_submodule(self.ends.head)
        equations = NormalEquations.empty(head.in_features, self.space.channels, self.device)
        plan = BatchPlan(self.buckets(), self.config.batch, self.context.recipe.seed)
        place = {"rank": self.context.rank, "world": self.context.world, "accumulate": self.config.accumulate}
        for step in range(FIT_BATCHES):
            for batch in plan.micro_batches(step, device=self.device, **place):
                features, target = self.head_terms(batch)
                equations.add(features.movedim(1, -1), self.family.output_sign * target.movedim(1, -1))
        equations.reduce()
        weight, bias = equations.solve(bias=head.bias is not None)
        for parameter, values in ((head.weight, weight), (head.bias, bias)):
            if parameter is not None:
                parameter.zero_()
                parameter[: len(values)].copy_(values)  # the rest is a learned variance
        return {"closed_form_loss": equations.loss(weight, bias), "variance": equations.variance()}

    def head_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the loss is in the head: (B,D,h,w) features, guidance corrected where it corrects, and their targets."""
        head = self.model.get_submodule(self.ends.head)
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

        def taken(x: Tensor) -> Tensor:
            return self.family.image_tokens(seen.pop().float(), (x.shape[2], x.shape[3])).movedim(-1, 1)

        def of_velocity(x: Tensor, sigma: Tensor, cond: Cond, scale: Tensor | None) -> Tensor:
            self.velocity(x, sigma, cond, scale)
            return taken(x)

        def of_output(x: Tensor, step: Tensor, cond: Cond) -> Tensor:
            self._raw_output(x, step, cond)
            return taken(x)

        latents, cond = self.samples(batch)
        objective = self.config.objective
        try:
            if objective.loss == "ddpm":
                return ddpm_terms(of_output, batch, latents, cond, self.empty, objective.caption_dropout)[:2]
            return objective_terms(
                objective, of_velocity, batch, latents, cond, self.empty,
                tokens=self.tokens(latents), distilled=self.distilled,
            )[:2]  # fmt: skip
        finally:
            handle.remove()
