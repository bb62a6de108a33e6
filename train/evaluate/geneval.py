"""GenEval (arXiv:2310.11513): its folder of images, and its own scorer where there is one.

The scorer needs mmdet and a GPU, in an environment of its own; what it writes is read here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch

from dcgen.fields import check_fields, flag, text
from train.captions import rows
from train.evaluate.images import Drawn
from train.evaluate.measured import Column, Measured, missing_files
from train.evaluate.spec import GenEval
from train.files import write_folder
from train.inputs import Read, one_file
from train.samples import sample


def write_images(images: Sequence[Drawn], folder: Path) -> Path:
    """FOLDER/00000/metadata.jsonl and FOLDER/00000/samples/0000.png, ...: a folder a prompt, an image a seed.

    Images are hard links where the disk has them, else copies. ValueError for prompts that are not GenEval's.
    """
    by_prompt: dict[int, list[Drawn]] = defaultdict(list)
    for image in images:
        if "tag" not in image.prompt.record:
            raise ValueError("the prompts are not GenEval's: set prompts.kind: geneval and prompts.path")
        by_prompt[image.index].append(image)

    def write(temporary: Path) -> None:
        for index, drawn in by_prompt.items():
            place = temporary / f"{index:05d}" / "samples"
            place.mkdir(parents=True)
            record = json.dumps(drawn[0].prompt.record, ensure_ascii=False)
            (place.parent / "metadata.jsonl").write_text(record, encoding="utf-8")
            for number, image in enumerate(drawn):
                _link(image.path, place / f"{number:04d}.png")

    return write_folder(folder, write)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def read_results(path: Path, images: Sequence[Drawn]) -> list[float]:
    """1 or 0 for each image, from the scorer's lines {"filename": ".../00000/samples/0000.png", "correct": ...}."""
    correct: dict[str, bool] = {}
    for number, row in rows(path):
        with sample(f"{path}, line {number}"):
            check_fields(row, {"filename": text(4096), "correct": flag}, needed=("filename", "correct"))
            correct["/".join(Path(row["filename"]).parts[-3:])] = row["correct"]
    found, seen = [], dict[int, int]()
    for image in images:
        number = seen.get(image.index, 0)
        seen[image.index] = number + 1
        name = f"{image.index:05d}/samples/{number:04d}.png"
        if name not in correct:
            raise ValueError(f"{path} has no line for {name}; remove it, so that the scorer runs again")
        found.append(float(correct[name]))
    return found


def score(images: Sequence[Drawn], correct: Sequence[float]) -> dict[str, float]:
    """The share of right images of each task, and `overall`, the mean of the tasks, which GenEval reports."""
    tasks: dict[str, list[float]] = defaultdict(list)
    for image, right in zip(images, correct, strict=True):
        tasks[image.prompt.record["tag"]].append(right)
    found = {task: sum(values) / len(values) for task, values in tasks.items()}
    return {**found, "overall": sum(found.values()) / len(found)}


class GenEvalMetric:
    """Writes GenEval's folder, runs its scorer, and takes the mean of the tasks."""

    columns: ClassVar[Mapping[str, Column]] = {"geneval": Column("GenEval", "higher")}

    def __init__(self, config: GenEval) -> None:
        self.config = config

    def reads(self) -> dict[str, Read]:
        return {"scorer": one_file(Path(self.config.scorer))} if self.config.scorer else {}

    def check(self) -> list[str]:
        if not self.config.scorer:
            return []
        found = missing_files({"metrics.geneval.scorer": self.config.scorer})
        folder = {"metrics.geneval.detector": self.config.detector}
        return found + missing_files(folder, folders=tuple(folder))

    def measure(self, images: Sequence[Drawn], device: torch.device, work: Path) -> dict[str, Measured]:
        folder = write_images(images, work / "geneval")
        if not self.config.scorer:
            note = f"not scored: set metrics.geneval.scorer; the images are in {folder}"
            return {"geneval": Measured(None, note=note)}
        results = work / "geneval.jsonl"
        self._run(folder, results)
        correct = read_results(results, images)
        found = score(images, correct)
        tasks = ", ".join(f"{task} {value:.2f}" for task, value in found.items() if task != "overall")
        return {"geneval": Measured(found["overall"], note=tasks)}

    def _run(self, folder: Path, results: Path) -> None:
        python = self.config.python or sys.executable
        scorer = Path(self.config.scorer).resolve()
        command = [python, str(scorer), str(folder.resolve()), "--outfile", str(results.resolve())]
        command += ["--model-path", str(Path(self.config.detector).resolve())]
        done = subprocess.run(command, cwd=scorer.parent, check=False)
        if done.returncode or not results.is_file():
            raise ValueError(f"GenEval's scorer ended with {done.returncode}; it was: {' '.join(command)}")
