"""Stage `export`: the adapter, the merged model as one ComfyUI file, and the merged model as a release folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dcgen.adapter import Adapter, check_model, load_adapter, save_adapter
from dcgen.convert import merge_file, pack
from dcgen.extract import extract
from dcgen.folder import TRANSFORMER, VAE
from dcgen.merge import merged_model, split
from dcgen.release import open_model
from train.autoencoders import check_autoencoder
from train.config import Name, StageConfig
from train.inputs import Read, one_file, one_part
from train.models import network_bytes, network_files, read_base
from train.release import check_parts, release_files, write_release
from train.stages.base import Stage, complaints

Form = Literal["adapter", "single", "release", "split"]


class ExportStage(Stage):
    """Writes NAME.safetensors (adapter), NAME-merged.safetensors (single), release/ (diffusers layout), and
    NAME-blocks.safetensors with NAME-ends.safetensors (split: merged blocks in the base's shape, and an adapter of the
    embedder and head for them).

    `release/` is also how training goes on: as the base of the next resolution or of the next autoencoder. The adapter
    of such a step is for that release alone; with `original` NAME-over-original.safetensors does all steps at once.
    """

    class Config(StageConfig):
        adapter: str = Field("finetune", description="stage whose adapter is exported")
        base: str = Field(
            "", description="release folder the adapter is for; needed by single, release, split and original"
        )
        autoencoder: str = Field("", description="folder of the new autoencoder, release/vae; needed by release")
        forms: tuple[Form, ...] = Field(("adapter",), min_length=1)
        name: Name | Literal[""] = Field("", description="file name without ending; default the recipe's name")
        store: Literal["float32", "bfloat16", "float16", "as base"] = Field(
            "as base", description="dtype of merged weights"
        )
        metadata: dict[str, str] = Field({}, description="e.g. modelspec.author, modelspec.license")
        original: str = Field(
            "",
            description="the base that the first of several steps started from; the adapter is extracted against it "
            "as well",
        )
        original_rank: int = Field(
            1024, ge=1, le=1 << 13, description="the most a layer of it has: all steps' together"
        )

        later_fields = ("original", "original_rank")

    config: Config

    def check(self) -> list[str]:
        c = self.config
        problems = []
        if {"single", "release", "split"} & set(c.forms) and not c.base:
            problems.append("forms single, release and split need `base`")
        if c.original and not c.base:
            problems.append("`original` needs `base`: the model is merged before it is compared with the original")
        if "release" in c.forms and not c.autoencoder:
            problems.append("form release needs `autoencoder`")
        for folder in (c.base, c.original):
            if folder and not self.context.pending(folder):
                problems += complaints(read_base, self.context.resolve(folder))
        if "release" in c.forms and c.base and not self.context.pending(c.base):
            problems += complaints(check_parts, self.context.resolve(c.base))
        if "release" in c.forms and c.autoencoder and not self.context.pending(c.autoencoder):
            problems += complaints(check_autoencoder, self.context.resolve(c.autoencoder))
        path = self.context.resolve(c.adapter) / "adapter.safetensors"
        if not self.context.pending(c.adapter) and not path.is_file():
            problems.append(f"{path} not found; `adapter` names a stage of this recipe or a stage folder")
        return problems

    def reads(self) -> dict[str, Read]:
        c, resolve = self.config, self.context.resolve
        reads = {"adapter": one_file(resolve(c.adapter) / "adapter.safetensors")}
        if c.base:
            base = resolve(c.base)
            whole = "release" in c.forms
            reads["base"] = release_files(base, without=(VAE,)) if whole else Read(base, tuple(network_files(base)))
        if "release" in c.forms and c.autoencoder:
            reads["autoencoder"] = one_part(resolve(c.autoencoder))
        if c.original:
            reads["original"] = Read(resolve(c.original), tuple(network_files(resolve(c.original))))
        return reads

    def result_bytes(self, trained: int) -> int:
        c = self.config
        size = self.context.resolve(c.adapter) / "adapter.safetensors"
        adapter = size.stat().st_size if size.is_file() else 0
        if not c.base or (c.forms == ("adapter",) and not c.original):
            return adapter
        base = self.context.resolve(c.base)
        values, stored = network_bytes(base)
        merged = stored if c.store == "as base" else values * getattr(torch, c.store).itemsize
        total = adapter + (merged if self._merges() else 0)
        total += merged if "split" in c.forms else 0
        if "release" in c.forms and c.autoencoder:
            total += (
                merged
                + release_files(base, without=(TRANSFORMER, VAE)).size
                + one_part(self.context.resolve(c.autoencoder)).size
            )
        return total

    def describe_plan(self) -> list[str]:
        forms = [*self.config.forms, *(["adapter over the original base"] if self.config.original else [])]
        return [f"writes {', '.join(forms)}"]

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        source = self.context.resolve(self.config.adapter) / "adapter.safetensors"
        adapter = load_adapter(source)
        adapter.metadata = {**adapter.metadata, "modelspec.title": self.context.recipe.name, **self.config.metadata}
        numbers: dict[str, object] = {"megabytes": round(source.stat().st_size / 1e6, 3)}
        numbers["lora_layers"] = len(adapter.lora)
        if self.context.rank == 0:
            numbers |= self._write(adapter)
        return numbers

    def _write(self, adapter: Adapter) -> dict[str, object]:
        c = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        name = c.name or self.context.recipe.name
        base = self.context.resolve(c.base) if c.base else None
        if base is not None:
            check_model(adapter, open_model(base))
        if "adapter" in c.forms:
            save_adapter(self.folder / f"{name}.safetensors", adapter)
        dtype = None if c.store == "as base" else getattr(torch, c.store)
        if base is not None and "split" in c.forms:
            blocks, ends = split(merged_model(open_model(base), adapter))
            pack(blocks, self.folder / f"{name}-blocks.safetensors", dtype=dtype)
            save_adapter(self.folder / f"{name}-ends.safetensors", ends)
        if base is None or not self._merges():
            return {}
        merged = merge_file(open_model(base), adapter, self.folder / f"{name}-merged.safetensors", dtype=dtype)
        if "release" in c.forms:
            vae = self.context.resolve(c.autoencoder)
            write_release(self.folder / "release", merged, base, vae, adapter)
        numbers = self._write_over_original(merged, adapter, name) if c.original else {}
        if "single" not in c.forms:
            merged.unlink()
        return numbers

    def _merges(self) -> bool:
        """Whether the merged model is written, for good or on the way to another form."""
        return bool({"single", "release"} & set(self.config.forms) or self.config.original)

    def _write_over_original(self, merged: Path, adapter: Adapter, name: str) -> dict[str, object]:
        """The merged model as an adapter of the base that the first step started from."""
        original = open_model(self.context.resolve(self.config.original))
        rank, device = self.config.original_rank, self.device
        over, kept = extract(open_model(merged), original, rank=rank, latent=adapter.latent, device=device)
        over.metadata = {**adapter.metadata, **over.metadata}
        save_adapter(self.folder / f"{name}-over-original.safetensors", over)
        return {"least_share_kept": min((layer.energy for layer in kept), default=1.0)}
