"""Stage `cache`: latents of both autoencoders and text embeddings, in shards."""
# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from train import distributed
from train.autoencoders import autoencoder_identity, latent_space, load_autoencoder
from train.cache import CacheWriter
from train.config import StageConfig
from train.data import DataConfig, open_source
from train.files import digest_json
from train.models import base_backbone
from train.plan import plan_cache
from train.stages.base import Context, Stage, complaints
from train.text import load_text, text_identity


class CacheStage(Stage):
    """Encodes every picture with both autoencoders, and every caption once."""

    class Config(StageConfig):
        base: str = Field(description="release folder of the base model (diffusers layout)")
        architecture: str = Field("", description="published base that --dry-run assumes while the folder is absent")
        autoencoder: str = Field(description="folder of the new autoencoder (student)")
        teacher: str = Field("", description="folder of the base's own autoencoder; default BASE/vae")
        data: DataConfig
        batch: int = Field(16, ge=1, description="pictures or captions encoded at a time")
        shard_size: int = Field(512, ge=1, description="samples in a shard")
        store: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="dtype on disk")
        text: Literal["cache", "online"] = Field("cache", description="embed captions now, or in every training step")
        text_tokens: int | None = Field(
            None, ge=1, description="T5/Gemma length; default the tokenizer's own (FLUX 512)"
        )

    config: Config

    def __init__(self, config: StageConfig, context: Context) -> None:
        super().__init__(config, context)
        self.base = context.resolve(self.config.base)
        self.student = context.resolve(self.config.autoencoder)
        self.teacher = context.resolve(self.config.teacher) if self.config.teacher else self.base / "vae"

    def check(self) -> list[str]:
        problems = []
        if not self.context.pending(self.config.base):
            problems += complaints(base_backbone, self.base) + complaints(latent_space, self.teacher)
        if not self.context.pending(self.config.autoencoder):
            problems += complaints(latent_space, self.student)
        return problems

    def describe_plan(self) -> list[str]:
        return plan_cache(self.context, self.config)

    def setup(self) -> None:
        self.source = open_source(self.config.data, self.context.resolve(self.config.data.path))
        self.parts = {
            "data": {**self.source.identity(), "settings": self.config.data.model_dump()},
            "teacher": autoencoder_identity(self.teacher),
            "student": autoencoder_identity(self.student),
            "text": text_identity(self.base, self.config.text_tokens) if self.config.text == "cache" else "online",
            "store": self.config.store,
        }
        self.writer = CacheWriter(self.folder, digest_json(self.parts))
        self.dtype = getattr(torch, self.config.dtype)

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        captions = ["", *sorted({self.source.caption(i) for i in range(len(self.source))} - {""})]
        jobs = [*self._latent_jobs(), *self._text_jobs(captions)]
        encoders: dict[str, Any] = {}
        mine = jobs[self.context.rank :: self.context.world]
        for name, kind, numbers in tqdm(mine, desc=self.context.name, unit="shard", disable=self.context.rank > 0):
            encode = self._encode_pictures if kind == "latent" else self._encode_captions
            self.writer.shard(name, len(numbers), partial(encode, numbers, captions, encoders))
        distributed.barrier()
        if self.context.rank == 0:
            self._write_index(jobs, captions)
        distributed.barrier()
        return {"samples": len(self.source), "captions": len(captions), "shards": len(jobs)}

    def _latent_jobs(self) -> list[tuple[str, str, Sequence[int]]]:
        sizes: dict[tuple[int, int], list[int]] = {}
        for index in range(len(self.source)):
            sizes.setdefault(self.source.size(index), []).append(index)
        return [
            (f"latent-{size[0]}x{size[1]}-{number:05d}", "latent", part)
            for size in sorted(sizes)
            for number, part in enumerate(_split(sizes[size], self.config.shard_size))
        ]

    def _text_jobs(self, captions: Sequence[str]) -> list[tuple[str, str, Sequence[int]]]:
        if self.config.text == "online":
            return []
        parts = _split(range(len(captions)), self.config.shard_size)
        return [(f"text-{number:05d}", "text", part) for number, part in enumerate(parts)]

    def _encode_pictures(
        self, numbers: Sequence[int], captions: Sequence[str], encoders: dict[str, Any]
    ) -> dict[str, Tensor]:
        if "teacher" not in encoders:
            encoders["teacher"] = load_autoencoder(self.teacher, self.device, self.dtype)
            if self.student != self.teacher:  # the toy's base is trained on one latent only
                encoders["student"] = load_autoencoder(self.student, self.device, self.dtype)
        latents: dict[str, list[Tensor]] = {side: [] for side in ("teacher", "student") if side in encoders}
        for part in _split(numbers, self.config.batch):
            images = torch.stack([self.source.image(index) for index in part])
            for side, rows in latents.items():
                rows.append(encoders[side].encode(images).to("cpu", getattr(torch, self.config.store)))
        found = {side: self._finite(torch.cat(rows), numbers) for side, rows in latents.items()}
        return {"student": found["teacher"].clone(), **found}

    def _encode_captions(
        self, numbers: Sequence[int], captions: Sequence[str], encoders: dict[str, Any]
    ) -> dict[str, Tensor]:
        if "text" not in encoders:
            encoders["text"] = load_text(self.base, self.device, self.dtype, self.config.text_tokens)
        parts = [encoders["text"]([captions[n] for n in part]) for part in _split(numbers, self.config.batch)]
        found = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        store = getattr(torch, self.config.store)
        return {name: value.to(store) if value.is_floating_point() else value for name, value in found.items()}

    def _finite(self, latents: Tensor, numbers: Sequence[int]) -> Tensor:
        bad = [self.source.name(n) for n, row in zip(numbers, latents, strict=True) if not row.isfinite().all()]
        if bad:
            raise ValueError(
                f"latents of {', '.join(bad[:8])} are not finite; mend or remove the pictures, or use dtype: float32"
            )
        return latents

    def _write_index(self, jobs: Sequence[tuple[str, str, Sequence[int]]], captions: Sequence[str]) -> None:
        place = {caption: number for number, caption in enumerate(captions)}
        samples: list[dict[str, Any]] = []
        shards = []
        for name, kind, numbers in jobs:
            record = self.writer.record(name)
            shards.append(record)
            for row, index in enumerate(numbers if kind == "latent" else ()):
                caption = place[self.source.caption(index)]
                sample = {"name": self.source.name(index), "size": self.source.size(index), "caption": caption}
                samples.append({**sample, "shard": record["file"], "row": row})
        spaces = {"teacher": latent_space(self.teacher)}
        spaces["student"] = load_autoencoder(self.student).space
        self.writer.finish(self.parts, spaces, captions, samples, shards)


def _split(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
