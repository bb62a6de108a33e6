"""The toy's judge as a metric: the same numbers as Judge.score gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from train.evaluate.images import Drawn, exact
from train.evaluate.judge import Judge
from train.evaluate.measured import Column, Measured, missing_files, seeds_apart
from train.evaluate.spec import JudgeOfToy
from train.inputs import Read, one_part
from train.toy.pictures import Pair, toy_read


class JudgeMetric:
    """Frechet distance on the judge's features, and how often subject and colour are recognised."""

    columns: ClassVar[Mapping[str, Column]] = {
        "frechet": Column("Fréchet distance", "lower", 3),
        "subject": Column("subject", "higher", 3),
        "color": Column("colour", "higher", 3),
        "both": Column("both", "higher", 3),
        "both_held_out": Column("both, unseen pairs", "higher", 3),
    }

    def __init__(self, config: JudgeOfToy) -> None:
        self.config = config

    def reads(self) -> dict[str, Read]:
        return {"evaluator": one_part(Path(self.config.evaluator)), "data": toy_read(self.config.data)}

    def check(self) -> list[str]:
        fields = {"metrics.judge.evaluator": self.config.evaluator, "metrics.judge.data": self.config.data}
        return missing_files(fields, folders=tuple(fields))

    def measure(self, images: Sequence[Drawn], device: torch.device, work: Path) -> dict[str, Measured]:
        if not all({"subject", "color"} <= image.prompt.record.keys() for image in images):
            raise ValueError("the judge knows the toy's captions only: set prompts.kind: toy")
        judge = Judge(self.config.evaluator, self.config.data)
        pairs = [Pair(image.prompt.record["subject"], image.prompt.record["color"]) for image in images]
        drawn = torch.stack([exact(image.path) for image in images])
        found = judge.score(drawn, pairs).as_dict()
        subject, color = judge.recognised(drawn, pairs)
        measured = {name: Measured(value) for name, value in found.items()}
        for name, right in {"subject": subject, "color": color, "both": subject & color}.items():
            measured[name].each = right.double().tolist()
        for seed, places in seeds_apart(images).items():
            apart = judge.score(drawn[places], [pairs[place] for place in places]).as_dict()
            measured["frechet"].by_seed[str(seed)] = apart["frechet"]
        return measured
