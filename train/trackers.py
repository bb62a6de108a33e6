"""Trackers beside TensorBoard: Weights & Biases, where the recipe names a project (`wandb:`). Off by default."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from train.config import Recipe, RecipeError
from train.files import read_json, write_json

if TYPE_CHECKING:
    from train.stages.base import Stage

RUN = "wandb.json"  # the run's id, in the stage's folder: a resumed stage goes on in the same run
EXTRA = "pip install -r train/requirements-optional.txt"


class Tracker(Protocol):
    """What the log passes its numbers on to."""

    def numbers(self, step: int, numbers: dict[str, float]) -> None: ...

    def image(self, step: int, name: str, image: Tensor) -> None:
        """image: (3,H,W) in 0..1."""

    def close(self) -> None: ...


def check_trackers(recipe: Recipe) -> None:
    """RecipeError where a tracker is asked for that is not installed."""
    if recipe.wandb and importlib.util.find_spec("wandb") is None:
        raise RecipeError(f"wandb: {recipe.wandb} needs the package wandb: {EXTRA}, or leave `wandb` out")


def tracker_of(stage: Stage) -> Tracker | None:
    """The tracker of a stage that trains; None where the recipe names none."""
    recipe = stage.context.recipe
    if not recipe.wandb:
        return None
    check_trackers(recipe)
    return Wandb(recipe.wandb, f"{recipe.name}/{stage.context.name}", stage.folder, stage.config.settings())


class Wandb:
    """A run of Weights & Biases. Where it is sent, and whether at all, is said by its own settings (WANDB_MODE)."""

    def __init__(self, project: str, name: str, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        known = read_json(folder / RUN)["id"] if (folder / RUN).is_file() else None
        self.wandb: Any = wandb
        self.run = wandb.init(
            project=project, name=name, id=known, resume="allow", dir=str(folder), config=settings, reinit=True
        )
        write_json(folder / RUN, {"id": self.run.id, "project": project})

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers of a step, as a row of its own."""
        self.run.log({**numbers, "step": step})

    def image(self, step: int, name: str, image: Tensor) -> None:
        """An image (3,H,W) in 0..1."""
        array = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        self.run.log({name: self.wandb.Image(np.ascontiguousarray(array)), "step": step})

    def close(self) -> None:
        """End the run."""
        self.run.finish()
