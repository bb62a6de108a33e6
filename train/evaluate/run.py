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
from train.config import RecipeError, nearest
from train.distributed import Ranks
from train.evaluate.clip import AestheticMetric, ClipScoreMetric
from train.evaluate.draw import MADE_OF, SPEED, draw, list_images
from train.evaluate.geneval import GenEvalMetric
from train.evaluate.images import Drawn, read_folder
from train.evaluate.inception import FidMetric, InceptionScoreMetric
from train.evaluate.measured import Measured, Metric
from train.evaluate.prompts import Prompt
from train.evaluate.report import write_report
from train.evaluate.spec import Evaluation, Metrics
from train.evaluate.table import Row, results_of, table
from train.evaluate.toy import JudgeMetric
from train.files import digest_json, read_json, write_atomically, write_json
from train.inputs import Digests, identity
from train.lock import locked, sweep
from train.models import read_base

METRICS: dict[str, Any] = {
    "clip": ClipScoreMetric,
    "aesthetic": AestheticMetric,
    "fid": FidMetric,
    "inception_score": InceptionScoreMetric,
    "geneval": GenEvalMetric,
    "judge": JudgeMetric,
}


def evaluate(evaluation: Evaluation, only: Collection[str] = (), command: Sequence[str] = ()) -> dict[str, Any]:
    """Run an evaluation in its folder and return what results.json holds; {} on ranks other than the first.

    only: of its metrics, these. Every rank must call it. RecipeError lists what is missing before anything is drawn.
    """
    metrics = chosen_metrics(evaluation.metrics, only)
    problems = check(evaluation, metrics)
    if problems:
        raise RecipeError("cannot evaluate:\n  " + "\n  ".join(problems))
    prompts = evaluation.prompts.read()
    ranks = distributed.start(evaluation.device)
    with locked(evaluation.folder) if ranks.first else contextlib.nullcontext():
        if ranks.first:
            sweep([evaluation.folder])
        rows = [_row(evaluation, name, prompts, metrics, ranks) for name in evaluation.models]
        if not ranks.first:
            return {}
        columns = {key: column for metric in metrics.values() for key, column in metric.columns.items()}
        results = results_of(evaluation, [row for row in rows if row is not None], columns, len(prompts))
        results["run"] = _origin(command)
        write_json(evaluation.folder / "results.json", results)
        words = table(results)
        write_atomically(evaluation.folder / "table.md", lambda path: path.write_text(words + "\n", encoding="utf-8"))
        write_report(evaluation.folder, results, {row.name: row.images for row in rows if row is not None})
    return results


def chosen_metrics(config: Metrics, only: Collection[str] = ()) -> dict[str, Metric]:
    """The metrics of an evaluation by name, with their settings; RecipeError for one in `only` that it lacks."""
    given = {name: getattr(config, name) for name in METRICS if getattr(config, name) is not None}
    for name in only:
        if name not in METRICS:
            raise RecipeError(f"no metric {name!r}{nearest(name, METRICS)}")
        if name not in given:
            raise RecipeError(f"the table has no settings for metric {name}: set metrics.{name}.FIELD=...")
    return {name: METRICS[name](settings) for name, settings in given.items() if not only or name in only}


def check(evaluation: Evaluation, metrics: dict[str, Metric]) -> list[str]:
    """What is missing, a line each: prompts, models, metrics' files and packages."""
    problems = []
    for name, model in evaluation.models.items():
        for field in ("base", "autoencoder", "images"):
            path = getattr(model, field)
            if path and not Path(path).is_dir():
                problems.append(f"models.{name}.{field} {path} is no folder")
        if model.adapter and not Path(model.adapter).is_file():
            problems.append(f"models.{name}.adapter {model.adapter} is no file")
        if model.base and Path(model.base).is_dir():
            problems += _refused(lambda base=model.base: read_base(base), f"models.{name}.base: ")
    problems += _refused(evaluation.prompts.read, "")
    for metric in metrics.values():
        problems += metric.check()
    return problems


def _refused(read: Any, where: str) -> list[str]:
    try:
        read()
    except (ValueError, OSError) as error:
        return [f"{where}{error}"]
    return []


def _row(
    evaluation: Evaluation, name: str, prompts: Sequence[Prompt], metrics: dict[str, Metric], ranks: Ranks
) -> Row | None:
    """A model's row; None on ranks other than the first."""
    model = evaluation.models[name]
    if model.base:
        draw(evaluation, name, prompts, ranks)
    if not ranks.first:
        return None
    folder = evaluation.folder / name
    if model.base:
        images = list_images(evaluation, folder / "images", prompts)
        made_of, speed = read_json(folder / MADE_OF), None
        if evaluation.speed.images:
            speed = read_json(folder / SPEED)
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


def plan(evaluation: Evaluation, only: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """(what would be done, what is missing), a line each."""
    metrics = chosen_metrics(evaluation.metrics, only)
    problems = check(evaluation, metrics)
    lines = [f"{evaluation.name}: {evaluation.about}", f"  output {evaluation.folder}"]
    prompts = evaluation.prompts.read() if not _refused(evaluation.prompts.read, "") else []
    count = len(prompts) * len(evaluation.seeds)
    lines.append(f"  {len(prompts)} prompts ({evaluation.prompts.kind}), seeds {', '.join(map(str, evaluation.seeds))}")
    for name, model in evaluation.models.items():
        folder = evaluation.folder / name / "images"
        if model.images:
            lines.append(f"  {name}: images of {model.images}")
            continue
        there = sum(image.path.is_file() for image in list_images(evaluation, folder, prompts))
        s = evaluation.sampling_of(name)
        how = f"{s.steps} steps ({s.sampler}) at g = {s.guidance:g}, {s.height}x{s.width}"
        lines.append(f"  {name}: {how}; {there} of {count} images are drawn")
    lines.append(f"  metrics: {', '.join(metrics) or 'none'}; {evaluation.speed.images} images timed")
    return lines, problems
