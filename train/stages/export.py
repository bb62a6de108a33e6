"""Stage `export`: the adapter, the merged model as one ComfyUI file, and the merged model as a release folder."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dcgen.adapter import Adapter, load_adapter, save_adapter
from dcgen.convert import merge_file
from dcgen.release import open_model
from train.autoencoders import check_autoencoder
from train.config import Name, StageConfig
from train.models import base_backbone
from train.release import check_parts, write_release
from train.stages.base import Stage, complaints

Form = Literal["adapter", "single", "release"]


class ExportStage(Stage):
    """Writes NAME.safetensors (adapter), NAME-merged.safetensors (single) and release/ (diffusers layout).

    `release/` is also how training goes on: as the base of the next resolution or of the next autoencoder.
    """

    class Config(StageConfig):
        adapter: str = Field("finetune", description="stage whose adapter is exported")
        base: str = Field("", description="release folder the adapter is for; needed by single and release")
        autoencoder: str = Field("", description="folder of the new autoencoder, release/vae; needed by release")
        forms: tuple[Form, ...] = Field(("adapter",), min_length=1)
        name: Name | Literal[""] = Field("", description="file name without ending; default the recipe's name")
        store: Literal["float32", "bfloat16", "float16", "as base"] = Field(
            "as base", description="dtype of merged weights"
        )
        metadata: dict[str, str] = Field({}, description="e.g. modelspec.author, modelspec.license")

    config: Config

    def check(self) -> list[str]:
        c = self.config
        problems = []
        if {"single", "release"} & set(c.forms) and not c.base:
            problems.append("forms single and release need `base`")
        if "release" in c.forms and not c.autoencoder:
            problems.append("form release needs `autoencoder`")
        if {"single", "release"} & set(c.forms) and c.base and not self.context.pending(c.base):
            base = self.context.resolve(c.base)
            problems += complaints(base_backbone, base)
            problems += complaints(check_parts, base) if "release" in c.forms else []
        if "release" in c.forms and c.autoencoder and not self.context.pending(c.autoencoder):
            problems += complaints(check_autoencoder, self.context.resolve(c.autoencoder))
        path = self.context.resolve(c.adapter) / "adapter.safetensors"
        if not self.context.pending(c.adapter) and not path.is_file():
            problems.append(f"{path} not found; `adapter` names a stage of this recipe or a stage folder")
        return problems

    def describe_plan(self) -> list[str]:
        return [f"writes {', '.join(self.config.forms)}"]

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        source = self.context.resolve(self.config.adapter) / "adapter.safetensors"
        adapter = load_adapter(source)
        adapter.metadata = {**adapter.metadata, "modelspec.title": self.context.recipe.name, **self.config.metadata}
        if self.context.rank == 0:
            self._write(adapter)
        return {"megabytes": round(source.stat().st_size / 1e6, 3), "lora_layers": len(adapter.lora)}

    def _write(self, adapter: Adapter) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.config.name or self.context.recipe.name
        if "adapter" in self.config.forms:
            save_adapter(self.folder / f"{name}.safetensors", adapter)
        if self.config.forms == ("adapter",):
            return
        dtype = None if self.config.store == "as base" else getattr(torch, self.config.store)
        base = self.context.resolve(self.config.base)
        merged = merge_file(open_model(base), adapter, self.folder / f"{name}-merged.safetensors", dtype=dtype)
        if "release" in self.config.forms:
            vae = self.context.resolve(self.config.autoencoder)
            write_release(self.folder / "release", merged, base, vae, adapter)
        if "single" not in self.config.forms:
            merged.unlink()
