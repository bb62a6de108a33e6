"""Rows of a run that is bounded in time: each is on screen and on disk before the next begins."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import Device
from dcgen.files import replacing

COLUMNS = f"{'part':12}{'what':66}{'ms':>10}{'GiB':>8}{'vs':>7}{'roof':>6}{'error':>9}  note"


@dataclass(frozen=True)
class Row:
    """One measurement; None for what does not apply.

    ms: milliseconds; gib: peak of allocated device memory over what was allocated before; ratio: ms over those of the
    row that it is compared with; roof: the time that the device's measured matrix rate needs for the row's operations,
    over ms; error: relative to the reference, with the bound that makes it ok.
    """

    part: str
    what: str
    ok: bool = True
    ms: float | None = None
    gib: float | None = None
    ratio: float | None = None
    roof: float | None = None
    error: float | None = None
    bound: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Job:
    """A part of the run that gives rows. seconds: what it is expected to take; it does not begin with less left."""

    part: str
    name: str
    seconds: float
    rows: Callable[[Device], Iterable[Row]]


class Report:
    """Runs jobs until the time is up, and keeps their rows in OUT/gpu.json. What that file has is not run again."""

    def __init__(self, device: Device, file: Path, minutes: float) -> None:
        self.device, self.file = device, file
        self.deadline = time.monotonic() + 60 * minutes
        self.facts: dict[str, Any] = device.facts()
        self.done: list[str] = []
        self.rows: list[Row] = []
        if file.is_file():
            self._resume(json.loads(file.read_text(encoding="utf-8")))

    def _resume(self, before: dict[str, Any]) -> None:
        card = ("name", "torch", "small")
        if all(before["facts"].get(key) == self.facts[key] for key in card):
            self.facts = before["facts"]
            self.done, self.rows = before["done"], [Row(**row) for row in before["rows"]]

    def run(self, job: Job) -> None:
        """The rows of a job; one that fails gives a row that says why, and the next goes on."""
        if job.name in self.done:
            return
        left = self.deadline - time.monotonic()
        if left < job.seconds:
            print(f"{job.part:12}{job.name}: not run, {left:.0f} s are left and it takes about {job.seconds:.0f}")
            return
        try:
            for row in job.rows(self.device):
                self.add(row)
        except Exception as error:  # any: this run on a lent card is the only one, and the other rows count
            self.add(Row(job.part, job.name, ok=False, note=f"{type(error).__name__}: {error}"[:400]))
        self.done.append(job.name)
        self.save()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def add(self, row: Row) -> None:
        """Show and save a row."""
        self.rows.append(row)
        print(line(row), flush=True)
        self.save()

    def save(self) -> None:
        """The result so far, whole or not at all."""
        found = {"facts": self.facts, "done": self.done, "rows": [asdict(row) for row in self.rows]}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as temporary:
            Path(temporary).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def line(row: Row) -> str:
    """A row as a line under COLUMNS."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = f"{number(row.ms, '.3f'):>10}{number(row.gib, '.2f'):>8}{number(row.ratio, '.2f'):>7}"
    cells += f"{number(row.roof, '.0%'):>6}{number(row.error, '.1e'):>9}"
    return f"{row.part:12}{row.what:66}{cells}  {'' if row.ok else 'FAILED '}{row.note}"
