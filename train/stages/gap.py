"""Stage `gap`: how far the moved model's representations are from the base's, block by block (paper Fig. 4a)."""
# B batch, C latent channels, h w token rows and columns, N tokens, D width

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dcgen import guidance
from dcgen.adapter import load_adapter, merge
from dcgen.folder import TRANSFORMER
from train.alignment import resample_pair
from train.cache import INDEX, Cache, is_online
from train.conditioning import Cond
from train.config import StageConfig
from train.files import write_atomically
from train.inputs import Read, one_file
from train.models import load_network, load_submodule, moved_network, network_files, network_of, products_in
from train.sample import seeded_noise
from train.stages.base import Stage
from train.stages.denoising import text_of
from train.text_parts import text_files


class GapStage(Stage):
    """For each block: |h_new - pool(h_base)|^2 / |pool(h_base)|^2 over image tokens; gap.csv and gap.png."""

    class Config(StageConfig):
        base: str = Field(description="release folder of the base model")
        cache: str = Field("cache", description="cache stage or folder")
        models: dict[str, str] = Field(
            {"random embedder": "", "aligned embedder": "align", "head": "head", "finetuned": "finetune"},
            description="name -> align, head or finetune stage; empty = random embedder and head",
        )
        samples: int = Field(32, ge=1)
        sigma: float = Field(0.3, gt=0, lt=1, description="noise level at which both models look at an image")
        guidance: float = Field(3.5, ge=0)
        patch_size: int = Field(1, ge=1)

    config: Config

    def reads(self) -> dict[str, Read]:
        base, cache = self.context.resolve(self.config.base), self.context.resolve(self.config.cache)
        files = network_files(base)
        if is_online(cache) and (base / TRANSFORMER / "config.json").is_file():
            files += text_files(base, network_of(base)[0].text_parts)
        reads = {"base": Read(base, tuple(files)), "cache": one_file(cache / INDEX)}
        for name, reference in self.config.models.items():
            if reference:
                path = self.context.resolve(reference) / "adapter.safetensors"
                reads[f"models.{name}"] = one_file(path if path.is_file() else path.with_name("embedder.safetensors"))
        return reads

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        if self.context.rank:
            return {}
        self.base = self.context.resolve(self.config.base)
        self.cache = Cache(self.context.resolve(self.config.cache))
        self.family, self.base_config = network_of(self.base)
        self.dtype: torch.dtype = getattr(torch, self.config.dtype)
        bucket = self.cache.buckets()[0]
        picked = [bucket[k * len(bucket) // self.config.samples] for k in range(self.config.samples)]
        side = self.cache.latents(picked[:1], "student").shape[2:]
        self.grid = (side[0] // self.config.patch_size, side[1] // self.config.patch_size)
        # one model is in memory at a time: the text encoders, the base, then each moved one
        text = self._text(picked)
        where = str(self.base / TRANSFORMER)
        p = self.family.backbone.patch_size(self.base_config, self.cache.spaces["teacher"], where)
        expected = self._representations(load_network(self.base, self.dtype, "cpu"), picked, "teacher", p, text)
        gaps = {}
        for name, reference in self.config.models.items():
            kept = self._representations(self._moved(reference), picked, "student", self.config.patch_size, text)
            gaps[name] = [relative_gap(old, new) for old, new in zip(expected, kept, strict=True)]
        write_atomically(self.folder / "gap.csv", lambda path: _write_csv(path, gaps))
        write_atomically(self.folder / "gap.png", lambda path: _plot(path, gaps))
        return {f"mean gap, {name}": sum(values) / len(values) for name, values in gaps.items()}

    def _text(self, picked: Sequence[int]) -> list[Cond]:
        """Conditioning (1,...) of each sample's caption, on the CPU."""
        online = None
        if not self.cache.has_text:
            online = self.family.text_encoder(self.base, self.device, self.dtype, self.cache.text_tokens)
        rows = [text_of(self.cache, [number], online, self.family) for number in self.cache.caption_numbers(picked)]
        return [{name: value.cpu() for name, value in row.items()} for row in rows]

    def _moved(self, reference: str) -> nn.Module:
        """The base with new ends, and with what a stage wrote in place."""
        channels, p = self.cache.spaces["student"].channels, self.config.patch_size
        model, config = moved_network(self.base, channels, p, self.context.recipe.seed, self.dtype)
        if not reference:
            return model
        folder = self.context.resolve(reference)
        if (folder / "adapter.safetensors").is_file():
            model.load_state_dict(merge(model.state_dict(), load_adapter(folder / "adapter.safetensors")))
            return model
        load_submodule(model, self.family.backbone.ends(config).embedder, folder)
        return model

    def _pooled(self, tokens: Tensor) -> Tensor:
        rows, columns = self.grid
        return resample_pair(tokens, tokens.new_empty(1, rows, columns, 1), "teacher-down")[0]

    @torch.no_grad()
    def _representations(
        self, model: nn.Module, picked: Sequence[int], side: str, p: int, text: Sequence[Cond]
    ) -> list[Tensor]:
        """Image tokens after each block, pooled to the new model's grid (B,h,w,D), float32 on the CPU.

        One sample at a time goes through the model.
        """
        model = model.to(self.device).eval()
        rows = [self._of_sample(model, number, side, p, cond) for number, cond in zip(picked, text, strict=True)]
        return [torch.cat(block) for block in zip(*rows, strict=True)]

    def _of_sample(self, model: nn.Module, number: int, side: str, p: int, text: Cond) -> list[Tensor]:
        """Image tokens of a sample after each block, pooled to the new model's grid (1,h,w,D)."""
        latents, sigma = self.cache.latents([number], side), torch.full((1,), self.config.sigma)
        noised = guidance.interpolate(latents, seeded_noise([number], latents.shape[1:]), sigma).to(self.device)
        cond = text | self.cache.of_samples([number], side)
        cond = {name: value.to(self.device) for name, value in cond.items()}
        grid = (latents.shape[2] // p, latents.shape[3] // p)
        kept: list[Tensor] = []
        keep = _keep(kept, lambda output: self._pooled(self.family.image_tokens(output, grid).float()).cpu())
        hooks = [block.register_forward_hook(keep) for block in self.family.blocks(model)]
        scale = torch.full_like(sigma, self.config.guidance).to(self.device)
        distilled = self.base_config.get("guidance_embeds")
        with products_in(self.dtype, self.device):
            self.family.velocity(model, noised, sigma.to(self.device), cond, scale if distilled else None)
        for hook in hooks:
            hook.remove()
        return kept


def relative_gap(base: Tensor, new: Tensor) -> float:
    """|new - pool(base)|^2 / |pool(base)|^2 of representations (B,h,w,D), (B,h',w',D)."""
    target, moved = resample_pair(base.double(), new.double(), "teacher-down")
    return ((moved - target).square().sum() / target.square().sum()).item()


def _keep(kept: list[Tensor], image_tokens: Callable[[Any], Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(image_tokens(output))

    return hook


def _write_csv(path: Path, gaps: dict[str, list[float]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["block", *gaps])
        writer.writerows([number, *row] for number, row in enumerate(zip(*gaps.values(), strict=True)))


def _plot(path: Path, gaps: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, values in gaps.items():
        axes.plot(values, marker="o", label=name)
    axes.set(xlabel="block", ylabel="relative gap to the base", yscale="log")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
