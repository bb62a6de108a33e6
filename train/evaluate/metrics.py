"""The metrics by the name that a table gives them. A new one: its settings in spec.py, a class, and an entry here."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from train.config import RecipeError, nearest
from train.evaluate.clip import AestheticMetric, ClipScoreMetric
from train.evaluate.geneval import GenEvalMetric
from train.evaluate.inception import FidMetric, InceptionScoreMetric
from train.evaluate.measured import Metric
from train.evaluate.spec import Metrics
from train.evaluate.toy import JudgeMetric

METRICS: dict[str, Any] = {
    "clip": ClipScoreMetric,
    "aesthetic": AestheticMetric,
    "fid": FidMetric,
    "inception_score": InceptionScoreMetric,
    "geneval": GenEvalMetric,
    "judge": JudgeMetric,
}


def chosen_metrics(config: Metrics, only: Collection[str] = ()) -> dict[str, Metric]:
    """The metrics of an evaluation by name, with their settings; RecipeError for one in `only` that it lacks."""
    given = {name: getattr(config, name) for name in METRICS if getattr(config, name) is not None}
    for name in only:
        if name not in METRICS:
            raise RecipeError(f"no metric {name!r}{nearest(name, METRICS)}")
        if name not in given:
            raise RecipeError(f"the table has no settings for metric {name}: set metrics.{name}.FIELD=...")
    return {name: METRICS[name](settings) for name, settings in given.items() if not only or name in only}
