"""What a run leaves to look at: tables, TensorBoard events, one file of events, and preview images."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dcgen.files import naming_file, sync_folder
from train.files import write_atomically
from train.trackers import Tracker


class Log:
    """Numbers by step: log.csv (training) and validation.csv, TensorBoard, all of it in events.jsonl, and a tracker.

    What is later than `start`, the step that is resumed, is dropped.
    """

    def __init__(self, folder: Path, start: int, enabled: bool, tracker: Tracker | None = None) -> None:
        self.folder = folder
        self.enabled = enabled
        self.tracker = tracker
        self.writer = None
        self.table = Table(folder / "log.csv")
        self.validations = Table(folder / "validation.csv")
        self.events = folder / "events.jsonl"
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        for table in (self.table, self.validations):
            table.resume(start)
        self._resume_events(start)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def row(self, step: int, numbers: dict[str, float]) -> None:
        """Add a row of training. Columns are fixed by the first row; a number that comes later is an error."""
        self._add(self.table, step, numbers, "")

    def validation(self, step: int, numbers: dict[str, float]) -> None:
        """Add a row of validation, with columns of its own."""
        self._add(self.validations, step, numbers, "validation/")

    def images(self, step: int, images: dict[str, Tensor]) -> None:
        """Save images (3,H,W) in 0..1 as previews/NAME-step.png and to TensorBoard."""
        if self.writer is None:
            return
        for name, image in images.items():
            file = save_png(self.folder / "previews" / f"{name}-{step:08d}.png", image)
            self.writer.add_image(name, image.clamp(0, 1), step)
            self._event(step, {f"image/{name}": file.relative_to(self.folder).as_posix()})
            if self.tracker is not None:
                self.tracker.image(step, name, image)

    def sync(self) -> None:
        """Flush the rows to disk: a checkpoint relies on those before it."""
        if not self.enabled:
            return
        for path in (self.table.path, self.validations.path, self.events):
            if path.is_file():
                with open(path, "rb+") as handle:
                    os.fsync(handle.fileno())
        if self.table.path.is_file():
            sync_folder(self.folder)

    def close(self) -> None:
        """Flush TensorBoard, end the tracker's run."""
        if self.writer is not None:
            self.writer.close()
        if self.tracker is not None:
            self.tracker.close()

    def _add(self, table: Table, step: int, numbers: dict[str, float], prefix: str) -> None:
        if not self.enabled:
            return
        table.add(step, numbers)
        finite = {f"{prefix}{key}": value for key, value in numbers.items() if math.isfinite(value)}
        for key, value in finite.items():
            if self.writer is not None:
                self.writer.add_scalar(key, value, step)
        self._event(step, finite)
        if self.tracker is not None:
            self.tracker.numbers(step, finite)

    def _event(self, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values})
        with naming_file(self.events), open(self.events, "a", encoding="utf-8") as handle:
            handle.write(line + "\n")

    def _resume_events(self, start: int) -> None:
        if not self.events.is_file():
            return
        kept = []
        for line in self.events.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # a kill in the middle of a line
        write_atomically(self.events, lambda path: path.write_text("".join(kept), encoding="utf-8"))


class Table:
    """A CSV file with a row for each step that has one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []

    def resume(self, start: int) -> None:
        """Drop the rows after a step."""
        if not self.path.exists():
            return
        with open(self.path, newline="", encoding="utf-8") as handle:
            rows = list(csv.reader(handle))
        if not rows:
            return
        self.columns = rows[0]
        # a kill in the middle of a line leaves a short row
        kept = [row for row in rows[1:] if len(row) == len(self.columns) and int(row[0]) <= start]
        write_atomically(self.path, lambda temporary: _write_rows(temporary, [self.columns, *kept]))

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Add a row; ValueError for a number that the first row did not have."""
        if not self.columns:
            self.columns = ["step", *numbers]
            _write_rows(self.path, [self.columns])
        unknown = set(numbers) - set(self.columns)
        if unknown:
            raise ValueError(
                f"{self.path}: new columns {sorted(unknown)} after the first row; "
                "log them from the start (NaN where absent)"
            )
        values = {"step": step, **numbers}
        with naming_file(self.path), open(self.path, "a", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerow([_text(values.get(column, math.nan)) for column in self.columns])


def save_png(path: Path | str, image: Tensor) -> Path:
    """Write a (3,H,W) image with values 0..1 as PNG, atomically."""
    array = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    png = Image.fromarray(np.ascontiguousarray(array))
    return write_atomically(path, lambda temporary: png.save(temporary, format="PNG"))


def _write_rows(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(rows)


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.8g}"
