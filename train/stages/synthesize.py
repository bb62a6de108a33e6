"""Stage `synthesize`: training images drawn by the base model itself, as the paper does (section 4.1)."""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from dcgen.files import weight_files
from dcgen.folder import TRANSFORMER
from train import distributed
from train.captions import read_lines
from train.config import RecipeError, StageConfig
from train.data import bucket_sizes
from train.files import digest_json, read_json, write_atomically, write_json
from train.generate import Pipeline
from train.inputs import Digests, Read, changes, check_record
from train.models import read_base
from train.release import release_files
from train.sample import solver_of
from train.stages.base import Stage, complaints

AS_BASE = "as base"  # value of `solver`


class SynthesizeStage(Stage):
    """Writes pictures/NNNNN.tar (webdataset: PNG, caption, and JSON with the seed). Shards are shared out over ranks.

    A shard is there whole or not at all, and is a pure function of the settings, so a stopped run goes on where it was.
    """

    class Config(StageConfig):
        base: str = Field(description="release folder of the base model")
        prompts: str = Field(description="text file, one prompt a line")
        per_prompt: int = Field(1, ge=1, description="images of each prompt, with different seeds")
        pixels: int = Field(512, ge=32, description="side of the square whose area an image has")
        multiple: int = Field(64, ge=1)
        ratios: tuple[float, ...] = Field((1.0,), min_length=1, description="aspect ratios H/W, taken in turns")
        sampling_steps: int = Field(20, ge=1)
        guidance: float = Field(
            3.5, ge=0, description="g of the guidance embedding, or of true CFG where there is none"
        )
        solver: Literal["euler", "dpm-solver++", "as base"] = Field(
            "euler", description="as base: the one of the release's scheduler_config.json"
        )
        batch: int = Field(4, ge=1)
        shard_size: int = Field(256, ge=1, description="images in a tar")

        later_fields = ("solver",)

    config: Config

    def check(self) -> list[str]:
        problems = []
        if not self.context.pending(self.config.base):
            problems += complaints(read_base, self.context.resolve(self.config.base))
            if self.config.solver == AS_BASE:
                problems += complaints(solver_of, self.context.resolve(self.config.base))
        path = self.context.resolve(self.config.prompts)
        if not self.context.pending(self.config.prompts) and not path.is_file():
            problems.append(f"{path} not found; `prompts` is a text file with one prompt a line")
        return problems

    def describe_plan(self) -> list[str]:
        c = self.config
        sizes = ", ".join(f"{h}x{w}" for h, w in bucket_sizes(c.pixels, c.multiple, c.ratios))
        lines = [
            f"{c.sampling_steps} steps ({c.solver}) at g = {c.guidance:g}, {sizes} px, {c.shard_size} images a tar"
        ]
        path = self.context.resolve(c.prompts)
        if path.is_file() and (count := len(read_lines(path)) * c.per_prompt):
            # PNG of a photograph: about 1.5 bytes a pixel
            size = 1.5e-9 * count * c.pixels**2
            lines.append(f"{count} images in {-(-count // c.shard_size)} tars, about {size:.3g} GB")
        return lines

    def reads(self) -> dict[str, Read]:
        prompts = self.context.resolve(self.config.prompts)
        return {
            "base": release_files(self.context.resolve(self.config.base)),
            "prompts": Read(prompts, (prompts,)),
        }

    def setup(self) -> None:
        c = self.config
        path = self.context.resolve(c.prompts)
        self.prompts = read_lines(path)
        if not self.prompts:
            raise ValueError(f"{path} holds no prompt; write one a line")
        self.sizes = bucket_sizes(c.pixels, c.multiple, c.ratios)
        self.solver = solver_of(self.context.resolve(c.base)) if c.solver == AS_BASE else c.solver
        self.count = len(self.prompts) * c.per_prompt
        digests = Digests(self.context.recipe.folder)
        network = weight_files(self.context.resolve(c.base) / TRANSFORMER)
        parts = {
            "settings": c.settings(without=("batch", "log_every", "shard")),
            "prompts": digest_json(self.prompts),
            "network": {file.name: digests.sha256(file) for file in network},
            "seed": self.context.recipe.seed,
        }
        self._settle(digest_json(parts))

    def _settle(self, config_hash: str) -> None:
        """Refuse to mix shards of two settings in one folder."""
        folder = self.folder / "pictures"
        for key in ("config_hash", "fingerprint"):  # the second is that of older runs
            note = folder / f"{key}.json"
            if not note.is_file():
                continue
            if read_json(note).get(key) != config_hash:
                raise RecipeError(f"{folder} holds images of other settings, prompts or base; remove it or use --redo")
            record = read_json(note).get("inputs")
            changed = changes(check_record(record), self.inputs) if record is not None else []
            if changed:
                raise RecipeError(f"{folder} holds images of other inputs ({'; '.join(changed)}); use --redo")
            return
        if self.context.rank == 0:
            write_json(folder / "config_hash.json", {"config_hash": config_hash, "inputs": self.inputs})

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        shards = range(-(-self.count // self.config.shard_size))
        mine = [s for s in shards if s % self.context.world == self.context.rank and not self._path(s).is_file()]
        if mine:
            dtype = getattr(torch, self.config.dtype)
            pipeline = Pipeline(self.context.resolve(self.config.base), device=self.device, dtype=dtype)
            for shard in tqdm(mine, desc=self.context.name, unit="shard", disable=self.context.rank > 0):
                write_atomically(self._path(shard), partial(self._write, shard, pipeline))
        distributed.barrier()
        return {"pictures": self.count, "shards": len(shards)}

    def _path(self, shard: int) -> Path:
        return self.folder / "pictures" / f"{shard:05d}.tar"

    def sample(self, index: int) -> dict[str, Any]:
        """What image `index` is: prompt, seed and size."""
        seed = self.context.recipe.seed * 1_000_003 + index
        return {
            "caption": self.prompts[index // self.config.per_prompt],
            "seed": seed,
            "size": self.sizes[index % len(self.sizes)],
        }

    def _write(self, shard: int, pipeline: Pipeline, path: Path) -> None:
        start = shard * self.config.shard_size
        indices = range(start, min(start + self.config.shard_size, self.count))
        with tarfile.open(path, "w") as tar:
            for size in self.sizes:
                same = [i for i in indices if self.sample(i)["size"] == size]
                for first in range(0, len(same), self.config.batch):
                    self._draw(tar, same[first : first + self.config.batch], size, pipeline)

    def _draw(self, tar: tarfile.TarFile, indices: list[int], size: tuple[int, int], pipeline: Pipeline) -> None:
        samples = [self.sample(index) for index in indices]
        c = self.config
        cfg_w = 0.0 if pipeline.distilled else max(c.guidance - 1, 0.0)
        prompts, seeds = [s["caption"] for s in samples], [s["seed"] for s in samples]
        how: dict[str, Any] = {"steps": c.sampling_steps, "guidance": c.guidance, "cfg_w": cfg_w, "solver": self.solver}
        images = pipeline.images(prompts, seeds, *size, **how)
        for index, sample, image in zip(indices, samples, images, strict=True):
            array = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, format="PNG")
            record = {**sample, "steps": c.sampling_steps, "guidance": c.guidance}
            _add(tar, f"{index:09d}.png", buffer.getvalue())
            _add(tar, f"{index:09d}.txt", sample["caption"].encode())
            _add(tar, f"{index:09d}.json", json.dumps(record).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the same images make the same file
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
