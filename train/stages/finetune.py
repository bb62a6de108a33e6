"""Stage `finetune`: LoRA on the backbone with embedder and head trained whole (paper 3.3, 3.4).

The paper's comparison strategies are switches here: `start: ""` (no alignment, Table 8), `train: full` (Fig. 5),
`objective.loss: flow` on a distilled base (Fig. 6), `layer_lr_ratio` and `alpha_warmup` (Table 9). Freeze-backbone-
then-end-to-end (Table 9) is a head stage with `start: ""` before this one.
"""
# L blocks

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from dcgen.folder import TRANSFORMER, VAE
from train.config import Optimizer
from train.files import write_folder
from train.inputs import Read, one_part
from train.lora import inject_lora, scale_lora
from train.plan import plan_moved
from train.release import check_parts, release_files, release_parts
from train.stages.base import complaints
from train.stages.head import MovedConfig, MovedStage


class FinetuneStage(MovedStage):
    """End-to-end fine-tuning."""

    class Config(MovedConfig):
        start: str = Field("head", description="head (or align) stage to go on from; empty = random embedder and head")
        train: Literal["lora", "full"] = Field("lora", description="full = every weight in float32 (Fig. 5)")
        rank: int = Field(256, ge=1, description="LoRA rank (paper 4.1)")
        alpha: float = Field(256.0, gt=0, description="LoRA alpha (paper 4.1)")
        alpha_warmup: int = Field(0, ge=0, description="steps over which alpha grows from 0 (Table 9, gradual LoRA)")
        layer_lr_ratio: float = Field(
            1.0, ge=1, description="last block's learning rate over the first's, mean kept (Table 9: 3)"
        )
        steps: int = Field(10_000, ge=1, description="Table 7: 10k to 500k, by model")
        batch: int = Field(256, ge=1, description="Table 7")
        ema: float | None = Field(0.999, gt=0, lt=1, description="Table 7")
        optimizer: Optimizer = Optimizer(lr=1e-4, weight_decay=1e-3, warmup=2000)

    config: Config

    def lora_rank(self) -> int:
        return self.config.rank if self.config.train == "lora" else 0

    def describe_plan(self) -> list[str]:
        return plan_moved(self.context, self.config, self.lora_rank(), self.config.train == "full")[0]

    def check_plan(self) -> list[str]:
        return plan_moved(self.context, self.config, self.lora_rank(), self.config.train == "full")[1]

    def check(self) -> list[str]:
        problems = super().check()
        if self.config.train == "full" and not self.config.autoencoder:
            problems.append("train: full writes a release and needs `autoencoder`")
        if self.config.train == "full" and not self.context.pending(self.config.base):
            problems += complaints(check_parts, self.context.resolve(self.config.base))
        if self.config.train == "full" and (self.config.frozen_store == "int8" or self.config.offload_blocks):
            problems.append("train: full has no frozen weights: leave out frozen_store and offload_blocks")
        if self.config.alpha_warmup and self.config.compile:
            problems.append("alpha_warmup changes what is compiled in each step: set compile: false")
        if self.config.alpha_warmup > self.config.steps:
            problems.append(f"alpha_warmup {self.config.alpha_warmup} is longer than the {self.config.steps} steps")
        return problems

    free_reads = frozenset({"autoencoder", "rest of the base"})

    def reads(self) -> dict[str, Read]:
        reads = super().reads()
        if self.config.train == "full" and self.config.autoencoder:
            reads["autoencoder"] = one_part(self.context.resolve(self.config.autoencoder))
            reads["rest of the base"] = release_files(
                self.context.resolve(self.config.base), without=(TRANSFORMER, VAE)
            )
        return reads

    def result_bytes(self, trained: int) -> int:
        copied = (self.reads().get(name) for name in self.free_reads)
        return 4 * trained + sum(read.size for read in copied if read is not None)

    def prepare(self) -> None:
        if self.config.train == "lora":
            # first: peft freezes everything but its own matrices
            inject_lora(self.model, self.family, self.config.rank, self.config.alpha, self.context.recipe.seed)
        super().prepare()
        if self.config.train == "full":
            self.model.float().requires_grad_(True)
        self.depth = depths(self.model, self.family.blocks(self.model))

    def before_step(self, step: int) -> None:
        if self.config.alpha_warmup:
            scale_lora(self.model, min(1.0, (step + 1) / self.config.alpha_warmup))

    def lr_scale(self, name: str) -> float:
        """Linear in depth from 2/(1+r) to 2r/(1+r), mean 1; the embedder as the first block, the head as the last."""
        ratio = self.config.layer_lr_ratio
        low, high = 2 / (1 + ratio), 2 * ratio / (1 + ratio)
        last = max(self.depth.values())
        depth = next((depth for prefix, depth in self.depth.items() if name.startswith(prefix)), None)
        if depth is None:
            depth = last if name.startswith(self.ends.head) else 0
        return low + (high - low) * (depth / last if last else 0.5)

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        if self.config.train == "lora":
            self.write_adapter(weights, self.config.alpha)
        elif self.context.rank == 0:
            network = self.family.network_class().from_config(dict(self.moved_config))
            network.load_state_dict(weights)
            vae = self.context.resolve(self.config.autoencoder)
            write_folder(self.folder / "release", lambda folder: self._write_release(folder, network, vae))
        return {"parameters": sum(t.numel() for t in weights.values())}

    def _write_release(self, folder: Path, network: Any, vae: Path) -> None:
        release_parts(folder, self.base, vae, self.space.name, self.config.schedule)
        network.save_pretrained(folder / TRANSFORMER)


def depths(model: nn.Module, blocks: list[nn.Module]) -> dict[str, int]:
    """Name prefix of each block -> its place."""
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(block)]}.": place for place, block in enumerate(blocks)}
