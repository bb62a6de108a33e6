"""Stage `export`: the adapter file that the nodes read."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from dcgen.adapter import load_adapter, save_adapter
from train.config import StageConfig
from train.stages.base import Stage


class ExportStage(Stage):
    """Writes NAME.safetensors with the metadata that a reader wants to see."""

    class Config(StageConfig):
        adapter: str = Field("finetune", description="stage whose adapter is exported")
        name: str = Field("", description="file name without ending; default the recipe's name")
        metadata: dict[str, str] = Field({}, description="e.g. modelspec.author, modelspec.license")

    config: Config

    def check(self) -> list[str]:
        path = self.context.resolve(self.config.adapter)
        if self.config.adapter in self.context.recipe.stages or (path / "adapter.safetensors").is_file():
            return []
        return [f"{path}/adapter.safetensors not found; `adapter` names a stage of this recipe or a stage folder"]

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        source = self.context.resolve(self.config.adapter) / "adapter.safetensors"
        adapter = load_adapter(source)
        adapter.metadata = {**adapter.metadata, "modelspec.title": self.context.recipe.name, **self.config.metadata}
        path = self.folder / f"{self.config.name or self.context.recipe.name}.safetensors"
        if self.context.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_adapter(path, adapter)
        return {"megabytes": round(source.stat().st_size / 1e6, 3), "lora_layers": len(adapter.lora)}
