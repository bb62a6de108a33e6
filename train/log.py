"""What a run leaves to look at: log.csv, TensorBoard events and preview images."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dcgen.files import naming_file, sync_folder
from train.files import write_atomically


class Log:
    """Rows of numbers by step, in `folder/log.csv` and TensorBoard. Rows after `start` (a resumed step) are dropped."""

    def __init__(self, folder: Path, start: int, enabled: bool) -> None:
        self.folder = folder
        self.path = folder / "log.csv"
        self.enabled = enabled
        self.columns: list[str] = []
        self.writer = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        if self.path.exists():
            self._keep_rows_before(start)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def _keep_rows_before(self, start: int) -> None:
        with open(self.path, newline="", encoding="utf-8") as handle:
            rows = list(csv.reader(handle))
        if not rows:
            return
        self.columns = rows[0]
        # a kill in the middle of a line leaves a short row
        kept = [row for row in rows[1:] if len(row) == len(self.columns) and int(row[0]) <= start]
        write_atomically(self.path, lambda temporary: _write_rows(temporary, [self.columns, *kept]))

    def row(self, step: int, numbers: dict[str, float]) -> None:
        """Add one row. Columns are fixed by the first row; a number that comes later is an error."""
        if not self.enabled:
            return
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
        for key, value in numbers.items():
            if self.writer is not None and math.isfinite(value):
                self.writer.add_scalar(key, value, step)

    def images(self, step: int, images: dict[str, Tensor]) -> None:
        """Save images (3,H,W) in 0..1 as previews/NAME-step.png and to TensorBoard."""
        if self.writer is None:
            return
        for name, image in images.items():
            save_png(self.folder / "previews" / f"{name}-{step:08d}.png", image)
            self.writer.add_image(name, image.clamp(0, 1), step)

    def sync(self) -> None:
        """Flush the rows to disk: a checkpoint relies on those before it."""
        if self.enabled and self.path.is_file():
            with open(self.path, "rb+") as handle:
                os.fsync(handle.fileno())
            sync_folder(self.folder)

    def close(self) -> None:
        """Flush TensorBoard."""
        if self.writer is not None:
            self.writer.close()


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
