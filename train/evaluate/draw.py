"""The images of an evaluation: each model draws what is not there yet, shared out over ranks, and is timed."""
# B batch, H W pixels

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from train import distributed
from train.config import RecipeError
from train.distributed import Ranks
from train.evaluate.ddpm_sampler import ddpm_sample
from train.evaluate.images import EXACT, Drawn, file_name, write_index
from train.evaluate.prompts import Prompt
from train.evaluate.spec import SEED_STEP, Evaluation, Model, Sampling
from train.files import digest_json, read_json, write_json, write_tensors
from train.generate import Pipeline
from train.inputs import PART, Digests, Read, identity, one_file, one_part, tree
from train.log import save_png

MADE_OF = "made_of.json"
SPEED = "speed.json"


class ImageGenerator:
    """A model of an evaluation, loaded when it is first needed."""

    def __init__(self, evaluation: Evaluation, name: str, device: torch.device) -> None:
        self.evaluation, self.name, self.device = evaluation, name, device
        self.sampling = evaluation.sampling_of(name)
        self._pipeline: Pipeline | None = None

    @property
    def pipeline(self) -> Pipeline:
        if self._pipeline is None:
            model = self.evaluation.models[self.name]
            dtype = getattr(torch, self.evaluation.dtype)
            self._pipeline = Pipeline(
                model.base,
                adapter=model.adapter or None,
                autoencoder=model.autoencoder or None,
                strength=model.strength,
                device=self.device,
                dtype=dtype,
                text_tokens=model.text_tokens,
            )
        return self._pipeline

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(B,3,H,W) in -1..1; `seeds` are those of the noise."""
        s = self.sampling
        space = self.pipeline.autoencoder.space
        with self.products():
            latents = self._latents(prompts, seeds, s)
        return self.pipeline.autoencoder.decode(space.denormalize(latents))

    def _latents(self, prompts: Sequence[str], seeds: Sequence[int], s: Sampling) -> Tensor:
        if s.sampler == "flow":
            return self.pipeline.latents(prompts, seeds, s.height, s.width, steps=s.steps, **guidance(self.pipeline, s))
        pipeline = self.pipeline
        space = pipeline.autoencoder.space
        shape = (space.channels, *space.latent_size(s.height, s.width))

        def output(x: Tensor, step: Tensor, cond: Any) -> Tensor:
            return pipeline.family.raw_output(pipeline.model, x, step, cond)

        return ddpm_sample(
            output,
            seeds,
            shape,
            pipeline.text(prompts),
            steps=s.steps,
            empty=pipeline.text([""]),
            guidance=s.guidance,
            guided_channels=s.guided_channels,
            device=self.device,
        )

    def step(self, prompts: Sequence[str]) -> Callable[[], Tensor]:
        """One pass of the network at batch 1, as a sampling step makes it."""
        pipeline, s = self.pipeline, self.sampling
        space = pipeline.autoencoder.space
        x = torch.zeros(1, space.channels, *space.latent_size(s.height, s.width), device=self.device)
        cond = pipeline.text(prompts[:1])
        sigma = torch.full((1,), 0.5, device=self.device)
        scale = torch.full_like(sigma, s.guidance) if pipeline.distilled else None

        def work() -> Tensor:
            with torch.no_grad(), self.products():
                return pipeline.velocity(x, sigma, cond, scale)

        return work

    def products(self) -> contextlib.AbstractContextManager[Any]:
        """Latents and times stay float32; the network's matrix products are computed in the evaluation's dtype."""
        if self.pipeline.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.pipeline.dtype)

    def compile(self) -> None:
        """Compile the network."""
        self.pipeline.model = torch.compile(self.pipeline.model)  # type: ignore[assignment]


def guidance(pipeline: Pipeline, sampling: Sampling) -> dict[str, Any]:
    """Arguments of Pipeline.latents for a guidance g: the embedding's where there is one, else true CFG (Eq. 4)."""
    if pipeline.distilled:
        return {"guidance": sampling.guidance}
    return {"guidance": 1.0, "cfg_w": max(sampling.guidance - 1, 0.0)}


def draw(evaluation: Evaluation, name: str, prompts: Sequence[Prompt], ranks: Ranks) -> Path:
    """Draw what is missing of a model's images and time it; the folder of the images. Every rank must call it.

    ValueError where the folder holds images of other weights, settings or prompts.
    """
    folder = evaluation.folder / name / "images"
    if ranks.first:
        _settle(evaluation, name, prompts)
    todo = distributed.from_first(_missing(evaluation, folder, prompts) if ranks.first else None, ranks)
    generator = ImageGenerator(evaluation, name, ranks.device)
    mine = todo[ranks.rank :: ranks.world]
    bar = tqdm(total=len(mine), desc=name, unit="image", disable=not ranks.first or not mine)
    for start in range(0, len(mine), evaluation.batch):
        _draw_batch(generator, folder, mine[start : start + evaluation.batch], prompts)
        bar.update(min(evaluation.batch, len(mine) - start))
    bar.close()
    if ranks.first:
        _time(generator, folder.parent / SPEED, [prompt.text for prompt in prompts])
    distributed.barrier()
    if ranks.first:
        write_index(folder, list_images(evaluation, folder, prompts))
    if ranks.device.type == "cuda":  # of this model, for the next one and the metrics
        del generator
        torch.cuda.empty_cache()
    return folder


def list_images(evaluation: Evaluation, folder: Path, prompts: Sequence[Prompt]) -> list[Drawn]:
    """The images that an evaluation wants of a model, seed by seed."""
    return [
        Drawn(folder / file_name(index, seed), prompt, index, seed)
        for seed in evaluation.seeds
        for index, prompt in enumerate(prompts)
    ]


def _missing(evaluation: Evaluation, folder: Path, prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """(index, seed) of the images that are not there."""
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    images = list_images(evaluation, folder, prompts)
    return [(image.index, image.seed) for image in images if image.path.name not in there]


def _draw_batch(
    generator: ImageGenerator, folder: Path, batch: Sequence[tuple[int, int]], prompts: Sequence[Prompt]
) -> None:
    noise = [SEED_STEP * (seed + 1) + index for index, seed in batch]
    images = generator.images([prompts[index].text for index, _ in batch], noise)
    for (index, seed), image in zip(batch, images, strict=True):
        path = folder / file_name(index, seed)
        if generator.evaluation.exact:
            write_tensors(path.with_suffix(EXACT), {"image": image.float()})
        save_png(path, image / 2 + 0.5)


def made_of(evaluation: Evaluation, name: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What decides a model's images, with the sha256 of every file of weights."""
    model = evaluation.models[name]
    digests = Digests(evaluation.folder)
    record = {
        "files": identity(model_files(model), digests),
        "sampling": evaluation.sampling_of(name).model_dump(mode="json"),
        "model": {"strength": model.strength, "text_tokens": model.text_tokens},
        "dtype": evaluation.dtype,
        "exact": evaluation.exact,
        "prompts": digest_json([prompt.text for prompt in prompts]),
    }
    digests.save()
    return record


def model_files(model: Model) -> dict[str, Read]:
    """The files of a model, by field."""
    base = tree(Path(model.base))
    reads = {"base": Read(base.root, tuple(file for file in base.files if file.suffix in PART))}
    if model.adapter:
        reads["adapter"] = one_file(Path(model.adapter))
    if model.autoencoder:
        reads["autoencoder"] = one_part(Path(model.autoencoder))
    return reads


def _settle(evaluation: Evaluation, name: str, prompts: Sequence[Prompt]) -> None:
    """Refuse to mix images of two settings in one folder."""
    path = evaluation.folder / name / MADE_OF
    record = made_of(evaluation, name, prompts)
    if not path.is_file():
        write_json(path, record)
        return
    older = read_json(path)
    differing = [key for key in record if older.get(key) != record[key]]
    if differing:
        raise RecipeError(
            f"{path.parent} holds images of another {', '.join(differing)}; remove the folder, or name another output="
        )


def _time(generator: ImageGenerator, path: Path, prompts: Sequence[str]) -> None:
    """Write speed.json, unless it is there with the same settings, or nothing is to be timed."""
    settings = generator.evaluation.speed.model_dump(mode="json")
    if not generator.evaluation.speed.images or (path.is_file() and read_json(path).get("settings") == settings):
        return
    write_json(path, {"settings": settings, **time_model(generator, prompts)})


def time_model(generator: ImageGenerator, prompts: Sequence[str]) -> dict[str, Any]:
    """Seconds of an image and of a network pass at batch 1, images a minute at speed.batch, and peak memory in GiB.

    An image is text encoding, sampling and decoding. Every time is kept; peak memory is CUDA's own count of its
    allocations at batch 1, None on other devices.
    """
    speed, device = generator.evaluation.speed, generator.device
    if speed.compile:
        generator.compile()

    def image(count: int = 1) -> None:
        texts = [prompts[number % len(prompts)] for number in range(count)]
        generator.images(texts, list(range(count)))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _times(image, speed.images, speed.warmup, device)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    steps = _times(generator.step(prompts), speed.images, speed.warmup, device)
    batches = seconds if speed.batch == 1 else _times(lambda: image(speed.batch), speed.images, speed.warmup, device)
    return {
        "seconds": seconds,
        "step_seconds": steps,
        "images_per_minute": 60 * speed.batch / statistics.median(batches),
        "batch": speed.batch,
        "peak_gib": peak,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "compiled": speed.compile,
        "tokens": generator.pipeline.tokens(generator.sampling.height, generator.sampling.width),
    }


def _times(work: Callable[[], object], count: int, warmup: int, device: torch.device) -> list[float]:
    """Seconds of each of `count` calls, after `warmup` others."""
    found = []
    for number in range(warmup + count):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warmup:
            found.append(time.perf_counter() - begin)
    return found
