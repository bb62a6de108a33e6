"""One evaluation from beginning to end: check, draw, measure, write the table. What is done is not done again."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from train import distributed
from train.config import RecipeError
from train.evaluate.check import problems_of
from train.evaluate.draw import MADE_OF, SPEED, draw, list_images
from train.evaluate.images import Drawn, read_folder
from train.evaluate.measured import Measured, Metric
from train.evaluate.metrics import chosen_metrics
from train.evaluate.prompts import Prompt
from train.evaluate.report import write_report
from train.evaluate.spec import Evaluation
from train.evaluate.table import Row, results_of, table
from train.files import digest_json, read_json, write_atomically, write_json
from train.inputs import Digests, identity
from train.lock import locked, sweep


def evaluate(evaluation: Evaluation, only: Collection[str] = (), command: Sequence[str] = ()) -> dict[str, Any]:
    """Run an evaluation in its folder and return what results.json holds; {} on ranks other than the first.

    only: of its metrics, these. Every rank must call it. RecipeError lists what is missing before anything is drawn.
    """
    metrics = chosen_metrics(evaluation.metrics, only)
    problems = problems_of(evaluation, metrics)
    if problems:
        raise RecipeError("cannot evaluate:\n  " + "\n  ".join(problems))
    prompts = evaluation.prompts.read()
    ranks = distributed.start(evaluation.device)
    with locked(evaluation.folder) if ranks.first else contextlib.nullcontext():
        if ranks.first:
            sweep([evaluation.folder])
        for name, model in evaluation.models.items():
            if model.base:
                draw(evaluation, name, prompts, ranks)
        if not ranks.first:  # the first rank measures, and none waits for it
            return {}
        rows = [_row(evaluation, name, prompts, metrics) for name in evaluation.models]
        columns = {key: column for metric in metrics.values() for key, column in metric.columns.items()}
        results = results_of(evaluation, rows, columns, len(prompts))
        results["run"] = _origin(command)
        write_json(evaluation.folder / "results.json", results)
        words = table(results)
        write_atomically(evaluation.folder / "table.md", lambda path: path.write_text(words + "\n", encoding="utf-8"))
        write_report(evaluation.folder, results, {row.name: row.images for row in rows})
    return results


def _row(evaluation: Evaluation, name: str, prompts: Sequence[Prompt], metrics: dict[str, Metric]) -> Row:
    """A model's row, from its images."""
    model, folder = evaluation.models[name], evaluation.folder / name
    if model.base:
        images = list_images(evaluation, folder / "images", prompts)
        made_of = read_json(folder / MADE_OF)
        speed = read_json(folder / SPEED) if evaluation.speed.images else None
    else:
        images = read_folder(Path(model.images), prompts)
        made_of, speed = {"images": digest_json([_stamp(image) for image in images])}, None
    measured: dict[str, Measured] = {}
    weights: dict[str, Any] = {}
    for key, metric in metrics.items():
        values, weights[key] = measure(key, metric, images, evaluation, folder, made_of)
        measured |= values
    return Row(name, images, measured, speed, made_of, weights)


def _stamp(image: Drawn) -> list[Any]:
    status = image.path.stat()
    return [image.path.name, status.st_size, status.st_mtime_ns, image.prompt.text]


def measure(
    key: str, metric: Metric, images: Sequence[Drawn], evaluation: Evaluation, folder: Path, made_of: dict[str, Any]
) -> tuple[dict[str, Measured], dict[str, Any]]:
    """A metric's columns and the sha256 of its files: from scores/KEY.json where it was measured on the same images."""
    digests = Digests(evaluation.folder)
    weights = identity(metric.reads(), digests)
    digests.save()
    names = [[image.path.name, image.prompt.text] for image in images]
    settings = digest_json([key, weights, names, made_of, getattr(evaluation.metrics, key).model_dump(mode="json")])
    path = folder / "scores" / f"{key}.json"
    if path.is_file() and (found := read_json(path)).get("settings") == settings:
        return {name: Measured(**values) for name, values in found["columns"].items()}, weights
    device = torch.device("cuda") if evaluation.device != "cpu" and torch.cuda.is_available() else distributed.CPU
    measured = metric.measure(images, device, folder)
    for values in measured.values():
        if values.value is not None and not math.isfinite(values.value):
            values.value = None
    columns = {name: vars(values) for name, values in measured.items()}
    write_json(path, {"settings": settings, "weights": weights, "columns": columns})
    return measured, weights


def _origin(command: Sequence[str]) -> dict[str, Any]:
    """How the results came about: the command and the versions of what decides them."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "torchmetrics", "torch-fidelity"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"command": shlex.join(command), "versions": versions}
