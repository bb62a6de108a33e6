"""Stage `cache`: latents of both autoencoders and conditioning, in shards."""
# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from dcgen.folder import TRANSFORMER, VAE, autoencoder_space
from train import distributed
from train.autoencoders import autoencoder_identity, load_autoencoder, same_autoencoder
from train.cache import CacheWriter
from train.captions import weight_of
from train.conditioning import Cond, of_samples, pack
from train.config import StageConfig
from train.data import DataConfig, data_files, open_source
from train.files import digest_json
from train.inputs import Digests, Read, one_part
from train.models import network_of
from train.plan import plan_cache
from train.stages.base import Context, Stage, complaints
from train.text_parts import check_text, text_files, text_identity


class CacheStage(Stage):
    """Encodes every image with both autoencoders, and every caption once."""

    class Config(StageConfig):
        base: str = Field(description="release folder of the base model (diffusers layout)")
        architecture: str = Field("", description="published base that --dry-run assumes while the folder is absent")
        autoencoder: str = Field(description="folder of the new autoencoder (student)")
        teacher: str = Field("", description="folder of the base's own autoencoder; default BASE/vae")
        data: DataConfig
        batch: int = Field(16, ge=1, description="images or captions encoded at a time")
        shard_size: int = Field(512, ge=1, description="samples in a shard")
        store: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="dtype on disk")
        text: Literal["cache", "online"] = Field("cache", description="embed captions now, or in every training step")
        text_tokens: int | None = Field(None, ge=1, description="length of the text; default the tokenizer's own")

    config: Config

    def __init__(self, config: StageConfig, context: Context) -> None:
        super().__init__(config, context)
        self.base = context.resolve(self.config.base)
        self.student = context.resolve(self.config.autoencoder)
        self.teacher = context.resolve(self.config.teacher) if self.config.teacher else self.base / VAE

    def check(self) -> list[str]:
        problems = []
        if not self.context.pending(self.config.base):
            problems += complaints(network_of, self.base) + complaints(autoencoder_space, self.teacher)
            if not problems and self.config.text == "cache":
                parts = network_of(self.base)[0].text_parts
                problems += complaints(lambda base: check_text(base, parts), self.base)
        if not self.context.pending(self.config.autoencoder):
            problems += complaints(autoencoder_space, self.student)
        return problems

    def reads(self) -> dict[str, Read]:
        base = [self.base / TRANSFORMER / "config.json"]
        if self.config.text == "cache" and base[0].is_file():
            base += text_files(self.base, network_of(self.base)[0].text_parts)
        data = self.context.resolve(self.config.data.path)
        return {
            "base": Read(self.base, tuple(base)),
            "data.path": Read(data, tuple(data_files(self.config.data, data))),
            "teacher": one_part(self.teacher),
            "autoencoder": one_part(self.student),
        }

    def describe_plan(self) -> list[str]:
        return plan_cache(self.context, self.config)

    def setup(self) -> None:
        self.source = open_source(self.config.data, self.context.resolve(self.config.data.path))
        self.family, _ = network_of(self.base)
        parts, tokens = self.family.text_parts, self.config.text_tokens
        digest = Digests(self.context.recipe.folder).sha256
        self.parts: dict[str, Any] = {
            "data": {**self.source.identity(), "settings": self.config.data.model_dump()},
            "teacher": autoencoder_identity(self.teacher, digest),
            "student": autoencoder_identity(self.student, digest),
            "text": text_identity(self.base, parts, tokens, digest) if self.config.text == "cache" else "online",
            "store": self.config.store,
        }
        if self.family.ragged:
            self.parts["ragged"] = dict(self.family.ragged)
        images = self.inputs["reads"].get("data.path", {}).get("digest", "")
        self.writer = CacheWriter(self.folder, digest_json(self.parts), images)
        self.dtype = getattr(torch, self.config.dtype)

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        every = {str(text) for i in range(len(self.source)) for text in self.source.captions(i)}
        captions = ["", *sorted(every - {""})]
        jobs = [*self._latent_jobs(), *self._text_jobs(captions)]
        encoders: dict[str, Any] = {}
        mine = jobs[self.context.rank :: self.context.world]
        for name, kind, numbers in tqdm(mine, desc=self.context.name, unit="shard", disable=self.context.rank > 0):
            encode = self._encode_images if kind == "latent" else self._encode_captions
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

    def _encode_images(self, numbers: Sequence[int], captions: Sequence[str], encoders: dict[str, Any]) -> Cond:
        """Latents of both sides, and what belongs to a sample beside them, as train.cache names it."""
        if "teacher" not in encoders:
            encoders["teacher"] = load_autoencoder(self.teacher, self.device, self.dtype)
            if not same_autoencoder(self.teacher, self.student):  # a base that keeps its latent is trained on one only
                encoders["student"] = load_autoencoder(self.student, self.device, self.dtype)
        sides = [side for side in ("teacher", "student") if side in encoders]
        parts: list[Cond] = []
        for part in _split(numbers, self.config.batch):
            images = torch.stack([self.source.image(index) for index in part])
            parts.append({})
            for side in sides:
                parts[-1][side] = encoders[side].encode(images)
                own = self._of_samples(images, encoders[side])
                parts[-1] |= {f"{side}.{name}": value for name, value in own.items()}
        return {name: self._finite(value, numbers) for name, value in self._stored(parts).items()}

    def _of_samples(self, images: Tensor, autoencoder: Any) -> Cond:
        own, fields = self.family.sample_conditioning(images, autoencoder), of_samples(self.family.fields)
        if set(own) != set(fields):
            title = self.family.backbone.title
            raise ValueError(f"{title}: a sample's conditioning is {sorted(own)}, its fields say {sorted(fields)}")
        return own

    def _encode_captions(self, numbers: Sequence[int], captions: Sequence[str], encoders: dict[str, Any]) -> Cond:
        """Conditioning of captions, as train.cache names it."""
        if "text" not in encoders:
            tokens = self.config.text_tokens
            encoders["text"] = self.family.text_encoder(self.base, self.device, self.dtype, tokens)
        batches = _split(numbers, self.config.batch)
        return self._stored(
            [pack(encoders["text"]([captions[n] for n in part]), self.family.ragged) for part in batches]
        )

    def _stored(self, parts: Sequence[Cond]) -> Cond:
        """All parts as one, on the CPU, floating values in the type of the cache."""
        store = getattr(torch, self.config.store)
        whole = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        return {name: value.to(store) if value.is_floating_point() else value for name, value in whole.items()}

    def _finite(self, latents: Tensor, numbers: Sequence[int]) -> Tensor:
        """The latents (n,...) of these samples; ValueError that names those which are not finite."""
        bad = [self.source.name(n) for n, row in zip(numbers, latents, strict=True) if not row.isfinite().all()]
        if bad:
            raise ValueError(
                f"latents of {', '.join(bad[:8])} are not finite; mend or remove the images, or use dtype: float32"
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
                if len(several := self.source.captions(index)) > 1:
                    sample["captions"] = [[place[text], weight_of(text)] for text in several]
                samples.append({**sample, "shard": record["file"], "row": row})
        spaces = {"teacher": autoencoder_space(self.teacher), "student": autoencoder_space(self.student)}
        tokens = self.config.text_tokens if self.config.text == "online" else None
        self.writer.finish(self.parts, spaces, captions, samples, shards, self.family.ragged, tokens)


def _split(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
