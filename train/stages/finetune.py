"""Stage `finetune`: LoRA on the backbone with embedder and head trained whole (paper 3.3, 3.4)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from train.config import Optimizer
from train.lora import inject_lora
from train.stages.head import MovedConfig, MovedStage


class FinetuneStage(MovedStage):
    """End-to-end fine-tuning."""

    class Config(MovedConfig):
        start: str = Field("head", description="head (or align) stage to go on from; empty = random embedder and head")
        rank: int = Field(256, ge=1, description="LoRA rank (paper 4.1)")
        alpha: float = Field(256.0, gt=0, description="LoRA alpha (paper 4.1)")
        steps: int = Field(10_000, ge=1, description="Table 7: FLUX 10k, SANA 150k/50k, DiT 100k/500k")
        batch: int = Field(256, ge=1, description="Table 7")
        ema: float | None = Field(0.999, gt=0, lt=1, description="Table 7")
        optimizer: Optimizer = Optimizer(lr=1e-4, weight_decay=1e-3, warmup=2000)

    config: Config

    def lora_rank(self) -> int:
        return self.config.rank

    def prepare(self) -> None:
        # first: peft freezes everything but its own matrices
        inject_lora(self.model, self.backbone, self.config.rank, self.config.alpha, self.context.recipe.seed)
        super().prepare()

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        self.write_adapter(weights, self.config.alpha)
        return {"parameters": sum(t.numel() for t in weights.values())}
