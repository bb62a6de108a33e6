"""Stage `pretrain`: a toy base, its whole network trained on its own latents by Eq. 2 or DDPM."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dcgen.folder import TRANSFORMER, VAE
from train.autoencoders import check_autoencoder
from train.cache import Cache
from train.files import write_folder
from train.inputs import Read, tree
from train.models import load_network, read_base
from train.objective import Objective
from train.stages.base import complaints
from train.stages.denoising import DenoisingConfig, DenoisingStage
from train.text_parts import check_text


class BaseConfig(DenoisingConfig):
    """Shared by pretrain and distill: a base network trained whole."""

    base: str = Field(description="release folder to start from")
    cache: str = Field("cache", description="cache stage or folder; its `teacher` latents are the base's own")
    objective: Objective = Objective(loss="flow")
    autocast: bool = Field(True, description="bfloat16 matrix products; weights and loss stay float32")


class BaseStage(DenoisingStage):
    """Loads a release, trains its transformer, writes FOLDER/release with the new transformer."""

    Config = BaseConfig
    config: BaseConfig
    side = "teacher"
    preview_columns = 8

    def check(self) -> list[str]:
        if self.context.pending(self.config.base):
            return []
        base = self.context.resolve(self.config.base)
        problems = complaints(read_base, base)
        if not problems and self.config.preview_every and self.config.preview_prompts:
            family, _ = read_base(base)
            problems = complaints(lambda path: check_text(path, family.text_parts), base)
            problems += complaints(check_autoencoder, base / VAE)
        return problems

    free_reads = frozenset({"rest of the base"})

    def reads(self) -> dict[str, Read]:
        base = self.context.resolve(self.config.base)
        return {**super().reads(), "rest of the base": tree(base, without=(TRANSFORMER,))}

    def result_bytes(self, trained: int) -> int:
        return 4 * trained + tree(self.context.resolve(self.config.base), without=(TRANSFORMER,)).size

    def setup(self) -> nn.Module:
        self.base = self.context.resolve(self.config.base)
        self.cache = Cache(self.context.resolve(self.config.cache))
        self.space = self.cache.spaces["teacher"]
        self.family, release = read_base(self.base)
        self.patch_size = self.backbone.patch_size(release.config, self.space, str(self.base / TRANSFORMER))
        self.distilled, self.schedule = release.distilled, release.schedule
        self.model = load_network(self.base, torch.float32, self.device).requires_grad_(True)
        self.prepare_text()
        return self.model

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.config.autocast else None

    def preview_autoencoder(self) -> Path | None:
        return self.base / VAE

    def preview_seeds(self) -> list[int]:
        first = self.config.preview_seed
        return list(range(first, first + len(self.config.preview_prompts)))

    @torch.no_grad()
    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        trained = load_network(self.base, torch.float32, "cpu")  # anew: the one in training may be sharded
        trained.load_state_dict(weights)
        if self.context.rank == 0:
            write_folder(self.folder / "release", lambda folder: self._write_release(folder, trained))
        return {"parameters": sum(t.numel() for t in weights.values())}

    def _write_release(self, folder: Path, network: Any) -> None:
        shutil.copytree(self.base, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(TRANSFORMER))
        network.save_pretrained(folder / TRANSFORMER)


class PretrainStage(BaseStage):
    """Flow matching or DDPM with caption dropout; a guidance embedding, if there is one, gets g = 1 throughout."""

    class Config(BaseConfig):
        kind: Literal["pretrain"] = "pretrain"

    config: Config
    preview_by_embedding = False
