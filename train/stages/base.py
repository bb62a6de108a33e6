"""What a stage is: something to train (or nothing), a loss on a batch, and files to write at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from train.batches import Batch
from train.cache import INDEX, Cache
from train.config import Recipe, StageConfig
from train.inputs import Read, Record, one_file


def stage_of(reference: str, recipe: Recipe) -> str | None:
    """The stage that a reference (`STAGE` or `STAGE/path`) names, if it names one."""
    first = reference.split("/")[0]
    return first if first in recipe.stages else None


def complaints(check: Callable[[Path], object], path: Path) -> list[str]:
    """The problem that `check(path)` raises, as a list; empty when there is none."""
    try:
        check(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


@dataclass(frozen=True)
class Context:
    """Where a stage runs: its recipe, its own folder, the device, and its place among the ranks."""

    recipe: Recipe
    name: str
    folder: Path
    device: torch.device
    rank: int = 0
    world: int = 1

    def resolve(self, reference: str) -> Path:
        """`STAGE` or `STAGE/...` means that stage's folder (or what is in it); anything else is a path."""
        if stage_of(reference, self.recipe) is not None:
            return self.recipe.folder / reference
        return Path(reference).expanduser()

    def pending(self, reference: str) -> bool:
        """Whether `reference` lies in a stage of this recipe that is not done yet."""
        stage = stage_of(reference, self.recipe)
        return stage is not None and not (self.recipe.folder / stage / "done.json").is_file()


class Stage:
    """One step of a recipe. Subclasses set `Config` and override what they need; the loop knows nothing else.

    Life of a stage: `__init__` (cheap: checks paths and config) -> `setup()` (loads) -> `loss()` for each
    micro-batch -> `finish(weights)`. A stage that trains nothing returns None from `setup()` and does its
    work in `finish({})`.
    """

    Config: ClassVar[type[StageConfig]] = StageConfig
    free_fields: ClassVar[frozenset[str]] = frozenset()  # beside FREE_FIELDS: change what is written, not what trains
    free_reads: ClassVar[frozenset[str]] = frozenset()  # names of reads() that only decide what finish() writes
    forward_methods: ClassVar[tuple[str, ...]] = ()  # calls other than forward() that use the module's own weights

    def __init__(self, config: StageConfig, context: Context) -> None:
        self.config = config
        self.context = context
        self.folder = context.folder
        self.device = context.device
        self.inputs: Record = {"reads": {}, "stages": {}}  # what reads() names, as it was when the stage began
        self.later_bytes = 0  # that stages after this one will write

    def reads(self) -> dict[str, Read]:
        """The files that decide the result, by the setting that leads to them. Called when input stages are done.

        A missing file is no error here: what is not there is not compared.
        """
        return {}

    def result_bytes(self, trained: int) -> int:
        """About how many bytes finish() writes, with so many parameters trained. Loads nothing."""
        return 0

    def check(self) -> list[str]:
        """Problems that can be seen without computing (missing files, wrong geometry); empty = fine."""
        return []

    def check_plan(self) -> list[str]:
        """What --dry-run refuses on top of check(): settings that cannot fit in memory. Loads no weights."""
        return []

    def describe_plan(self) -> list[str]:
        """Lines for --dry-run: token counts, what trains and how much, disk and memory. Loads no weights."""
        return []

    @classmethod
    def has_loss(cls) -> bool:
        """Whether the stage can train: `defaults.steps` is for those that can."""
        return cls.loss is not Stage.loss

    @property
    def trains(self) -> bool:
        """Whether optimizer steps are taken."""
        return self.config.steps > 0

    def setup(self) -> nn.Module | None:
        """Load everything; return the module whose parameters with requires_grad=True are to be trained."""
        return None

    def shard_units(self) -> Sequence[nn.Module]:
        """Submodules that FSDP2 shards one by one (transformer blocks), before the root."""
        return ()

    def buckets(self) -> Sequence[Sequence[int]]:
        """Sample numbers grouped by shape; one batch never mixes groups."""
        raise NotImplementedError(f"{type(self).__name__} trains but names no samples")

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Scalar loss (mean over the batch's slots) and numbers to log. Randomness only through `batch`."""
        raise NotImplementedError(f"{type(self).__name__} trains but has no loss")

    def before_step(self, step: int) -> None:
        """Called before the micro-batches of a step (schedules such as a growing LoRA alpha)."""

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of one parameter."""
        return 1.0

    def describe_samples(self, indices: Sequence[int]) -> list[str]:
        """Names of samples for an error message."""
        return [str(index) for index in indices]

    @property
    def validates(self) -> bool:
        """Whether validate() has something to measure."""
        return False

    def validate(self) -> dict[str, float]:
        """The loss on what is held out from training, by name; each rank computes its share, all get the result."""
        return {}

    def preview(self, step: int) -> dict[str, Tensor]:
        """Images (3,H,W) in 0..1 to save every `preview_every` steps, by name."""
        return {}

    def finish(self, weights: dict[str, Tensor]) -> dict[str, object]:
        """Write the stage's results into `self.folder`, atomically. Runs on every rank; only rank 0 writes.

        `weights`: trained parameters by module path, float32 on the CPU, the EMA's where there is one.
        Returned numbers go into done.json.
        """
        return {}


class CachedStage(Stage):
    """A stage that trains on a cache, which its setup() opens as self.cache."""

    cache: Cache

    def cache_read(self, reference: str) -> Read:
        """The index of a cache, which has the sha256 of every shard."""
        return one_file(self.context.resolve(reference) / INDEX)

    def open_cache(self, reference: str, patch_size: int) -> Cache:
        """The cache of a stage or folder; ValueError when its latents do not divide into such patches."""
        cache = Cache(self.context.resolve(reference))
        f = cache.spaces["student"].spatial_factor
        for height, width in sorted({tuple(sample["size"]) for sample in cache.samples}):
            if height // f % patch_size or width // f % patch_size:
                raise ValueError(
                    f"patch_size {patch_size} does not divide the latents of {cache.folder}: images of "
                    f"{width}x{height} have {width // f}x{height // f} latent pixels; take a patch_size that does, "
                    "or cache other sizes"
                )
        return cache

    def buckets(self) -> Sequence[Sequence[int]]:
        return self.cache.buckets()

    def describe_samples(self, indices: Sequence[int]) -> list[str]:
        return self.cache.describe(indices)
