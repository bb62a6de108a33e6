"""Prompt sets as files: the public benchmarks in their own formats, and plain lists. Nothing is downloaded."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dcgen.fields import shown
from train.captions import captions_of, captions_of_object, read_bounded, read_lines, rows, text_of
from train.config import Strict
from train.files import read_json
from train.samples import printable, sample
from train.toy.pictures import ToyPictures

SAMPLE = Path(__file__).with_name("sample_prompts.jsonl")
Kind = Literal["text", "jsonl", "mjhq-30k", "aesthetic-4k", "geneval", "partiprompts", "classes", "toy"]


@dataclass(frozen=True)
class Prompt:
    """A prompt, the domain or category that results are also given for, and what its set says of it besides."""

    text: str
    domain: str = ""
    record: dict[str, Any] = field(default_factory=dict)


class PromptSet(Strict):
    """Where prompts come from. `path` is the file of the set, in the format in which it is published."""

    kind: Kind = "jsonl"
    path: str = Field("", description="file of the set; default: the sample of 20 prompts that comes with this project")
    first: int | None = Field(None, ge=1, description="only so many; with `spread`, evenly from the whole set")
    spread: bool = True
    classes: int = Field(1000, ge=1, le=1 << 20, description="kind classes: 0..classes-1")
    per_class: int = Field(50, ge=1, le=1 << 20, description="kind classes: prompts of each")

    def read(self) -> list[Prompt]:
        """The prompts in the order of the file. Errors name the file and the row."""
        if self.kind == "classes":
            prompts = [Prompt(str(n % self.classes)) for n in range(self.classes * self.per_class)]
        elif self.kind == "toy":
            prompts = _toy(Path(self.path or "toy/data").expanduser())
        else:
            prompts = _of_file(self.kind, Path(self.path).expanduser() if self.path else SAMPLE)
        if self.first is None or self.first >= len(prompts):
            return prompts
        if not self.spread:
            return prompts[: self.first]
        return [prompts[k * len(prompts) // self.first] for k in range(self.first)]


def _of_file(kind: str, path: Path) -> list[Prompt]:
    if not path.is_file():
        raise FileNotFoundError(f"prompts.path {path} is no file; docs/evaluation.md says where {kind} comes from")
    prompts = READERS[kind](path)
    if not prompts:
        raise ValueError(f"{path} holds no prompt of the format {kind}")
    return prompts


def _lines(path: Path) -> list[Prompt]:
    """One prompt a line."""
    return [Prompt(line) for line in read_lines(path)]


def _records(path: Path) -> list[Prompt]:
    """JSON lines with `prompt` (or `caption`, `text`), and `domain` (or `category`) where there is one."""
    found = []
    for number, row in rows(path):
        with sample(f"{printable(str(path))}, line {number}"):
            texts = captions_of(row.get("prompt")) or captions_of_object(row)
            if not texts:
                raise ValueError(f"no prompt, caption or text among its fields ({', '.join(sorted(row))})")
            found.append(Prompt(texts[0], str(row.get("domain") or row.get("category") or ""), row))
    return found


def _mjhq(path: Path) -> list[Prompt]:
    """MJHQ-30K's meta_data.json: {image id: {"category", "prompt"}}; the id is the name of its reference image."""
    found = []
    for name, row in read_json(path).items():
        with sample(f"{printable(str(path))}, {printable(name)}"):
            if not isinstance(row, dict) or not captions_of(row.get("prompt")):
                raise ValueError(f"is {shown(row)}, expected an object with `prompt` and `category`")
            found.append(Prompt(captions_of(row["prompt"])[0], str(row.get("category", "")), {"id": name}))
    return found


def _geneval(path: Path) -> list[Prompt]:
    """GenEval's evaluation_metadata.jsonl: its scorer wants each line back as it is; the task is the domain."""
    found = _records(path)
    for number, prompt in enumerate(found, start=1):
        if not isinstance(prompt.record.get("tag"), str):
            raise ValueError(f"{path}, entry {number}: no `tag`; expected GenEval's evaluation_metadata.jsonl")
    return [Prompt(prompt.text, prompt.record["tag"], prompt.record) for prompt in found]


def _parti(path: Path) -> list[Prompt]:
    """PartiPrompts.tsv: tab-separated with the columns Prompt, Category and Challenge."""
    with sample(printable(str(path))), open(path, "rb") as file:
        table = csv.DictReader(io.StringIO(text_of(read_bounded(file))), delimiter="\t", quoting=csv.QUOTE_NONE)
        if not {"Prompt", "Category"} <= set(table.fieldnames or ()):
            raise ValueError(f"columns are {shown(table.fieldnames)}, expected Prompt, Category and Challenge")
        found = [(captions_of(row["Prompt"]), row) for row in table]
    return [
        Prompt(texts[0], row["Category"] or "", {"challenge": row.get("Challenge")}) for texts, row in found if texts
    ]


def _toy(folder: Path) -> list[Prompt]:
    """The toy's captions, with the subject and colour that the judge looks for."""
    pictures = ToyPictures(folder)
    return [
        Prompt(pictures.caption(pair), "", {"subject": pair.subject, "color": pair.color}) for pair in pictures.pairs()
    ]


READERS: dict[str, Callable[[Path], list[Prompt]]] = {
    "text": _lines,
    "jsonl": _records,
    "aesthetic-4k": _records,
    "mjhq-30k": _mjhq,
    "geneval": _geneval,
    "partiprompts": _parti,
}
