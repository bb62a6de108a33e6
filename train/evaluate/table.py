"""The table of an evaluation, as data and as Markdown: values with bootstrap intervals, speed and memory in one row."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.evaluate.images import Drawn
from train.evaluate.measured import Column, Measured
from train.evaluate.spec import Evaluation
from train.evaluate.statistics import cluster_bootstrap

SPEED_COLUMNS = {
    "seconds": Column("Latency (s)", "lower"),
    "step_seconds": Column("Network pass (s)", "lower", 3),
    "images_per_minute": Column("Throughput (images/min)", "higher"),
    "peak_gib": Column("Peak memory (GiB)", "lower", 1),
}
ARROWS = {"lower": " ↓", "higher": " ↑", "": ""}


@dataclass
class Row:
    """What was found of a model: its images, columns by name, times, what its images are made of, metrics' files."""

    name: str
    images: list[Drawn]
    measured: dict[str, Measured]
    speed: dict[str, Any] | None
    made_of: dict[str, Any]
    weights: dict[str, Any]


def results_of(
    evaluation: Evaluation, rows: Sequence[Row], columns: Mapping[str, Column], prompts: int
) -> dict[str, Any]:
    """results.json: settings, columns, and a row for each model with its values, intervals and differences.

    A difference is to the first row, paired by image, with an interval over prompts. A column without `each` image's
    value (FID, Inception score, Frechet distance) has no bootstrap interval: resampled images repeat, which biases such
    a distance upwards. It has its values by seed instead, where there are several.
    """
    timed = any(row.speed for row in rows)
    shown = {**columns, **(SPEED_COLUMNS if timed else {})}
    return {
        "name": evaluation.name,
        "about": evaluation.about,
        "prompts": {"count": prompts, **evaluation.prompts.model_dump(mode="json")},
        "seeds": list(evaluation.seeds),
        "gallery": evaluation.gallery,
        "dtype": evaluation.dtype,
        "columns": {key: asdict(column) for key, column in shown.items()},
        "rows": [_result(evaluation, row, rows[0]) for row in rows],
    }


def _result(evaluation: Evaluation, row: Row, first: Row) -> dict[str, Any]:
    model = evaluation.models[row.name]
    cells = {key: _cell(evaluation, row, values) for key, values in row.measured.items()}
    if row is not first:
        for key, cell in cells.items():
            cell["difference"] = _difference(evaluation, key, row, first)
    return {
        "model": row.name,
        "about": model.about,
        "sampling": evaluation.sampling_of(row.name).model_dump(mode="json") if model.base else None,
        "images": len(row.images),
        "cells": {**cells, **_speed_cells(evaluation, row.speed)},
        "speed": row.speed,
        "made_of": row.made_of,
        "weights": row.weights,
    }


def _cell(evaluation: Evaluation, row: Row, values: Measured) -> dict[str, Any]:
    cell: dict[str, Any] = {"value": values.value, "low": None, "high": None, "note": values.note}
    if values.by_seed:
        cell["by_seed"] = values.by_seed
    if values.each is None:
        return cell
    prompts = [image.index for image in row.images]
    estimate = cluster_bootstrap(values.each, prompts, resamples=evaluation.resamples).as_dict()
    domains: dict[str, list[float]] = {}
    for image, value in zip(row.images, values.each, strict=True):
        domains.setdefault(image.prompt.domain, []).append(value)
    if len(domains) > 1:
        cell["by_domain"] = {domain: statistics.fmean(found) for domain, found in domains.items()}
    return {**cell, "low": estimate["low"], "high": estimate["high"]}


def _difference(evaluation: Evaluation, key: str, row: Row, first: Row) -> dict[str, Any] | None:
    """The mean of this row's value less the first row's, over images of the same prompt and seed."""
    own, other = row.measured[key].each, first.measured[key].each if key in first.measured else None
    if own is None or other is None:
        return None
    values = {image.key: value for image, value in zip(first.images, other, strict=True)}
    pairs = [(image, value) for image, value in zip(row.images, own, strict=True) if image.key in values]
    if not pairs:
        return None
    differences = [value - values[image.key] for image, value in pairs]
    prompts = [image.index for image, _ in pairs]
    return cluster_bootstrap(differences, prompts, resamples=evaluation.resamples).as_dict()


def _speed_cells(evaluation: Evaluation, speed: dict[str, Any] | None) -> dict[str, Any]:
    """Medians with the interval of the mean over the timed images, and single values."""
    cells: dict[str, Any] = {}
    for key in SPEED_COLUMNS if speed else ():
        value, low, high = (speed or {})[key], None, None
        if isinstance(value, list):
            estimate = cluster_bootstrap(value, range(len(value)), resamples=evaluation.resamples).as_dict()
            value, low, high = statistics.median(value), estimate["low"], estimate["high"]
        cells[key] = {"value": value, "low": low, "high": high, "note": ""}
    return cells


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: a value with its 95 % interval in a cell."""
    columns = results["columns"]
    about = any(row["about"] for row in results["rows"])
    heads = [
        "Model",
        *(["About"] if about else []),
        *(c["title"] + ARROWS[c["better"]] for c in columns.values()),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in results["rows"]:
        cells = [row["model"], *([row["about"]] if about else [])]
        cells += [cell_text(row["cells"].get(key), column) for key, column in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_notes(results)])


def cell_text(cell: Mapping[str, Any] | None, column: Mapping[str, Any]) -> str:
    """A cell in words: value and interval, or - where there is none."""
    if cell is None or cell["value"] is None:
        return "-"
    digits = column["digits"]
    text = f"{cell['value']:.{digits}f}"
    return text if cell["low"] is None else f"{text} ({cell['low']:.{digits}f} to {cell['high']:.{digits}f})"


def _notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know: how many images, on what, and the cells' notes."""
    seeds = ", ".join(map(str, results["seeds"]))
    lines = [
        f"{results['prompts']['count']} prompts ({results['prompts']['kind']}), seeds {seeds}; intervals are 95 % "
        "bootstraps over prompts, those of times over the timed images."
    ]
    speeds = [row["speed"] for row in results["rows"] if row["speed"]]
    if speeds:
        batches = ", ".join(map(str, sorted({speed["batch"] for speed in speeds})))
        devices = ", ".join(sorted({f"{speed['device']} ({speed['threads']} CPU threads)" for speed in speeds}))
        lines.append(
            f"Times: {devices}, {results['dtype']}; latency at batch 1 (median), throughput at batch {batches}."
        )
    for row in results["rows"]:
        lines += [f"{row['model']}, {key}: {cell['note']}." for key, cell in row["cells"].items() if cell["note"]]
        for key, cell in row["cells"].items():
            if cell.get("by_seed"):
                values = ", ".join(f"{value:.3f}" for value in cell["by_seed"].values())
                lines.append(f"{row['model']}, {key} by seed: {values}.")
    return [f"- {line}" for line in lines]
