"""report.html of an evaluation: its table, differences to the first row, and a gallery with the models side by side."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from train.evaluate.images import Drawn
from train.evaluate.table import ARROWS, cell_text
from train.files import write_atomically

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; padding: 0 1.5em; max-width: 1600px; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .35em .9em .35em 0; text-align: left }
th { border-bottom: 1px solid #bbb; vertical-align: bottom } td { border-bottom: 1px solid #eee; vertical-align: top }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap } small { color: #777; display: block }
pre { background: #f4f4f4; padding: .7em; white-space: pre-wrap; overflow-wrap: anywhere }
.pair { margin: 1.6em 0 } .pair p { margin: .2em 0 .4em }
.row { display: grid; gap: 8px; grid-template-columns: repeat(var(--columns), minmax(0, 512px)) }
figure { margin: 0 } figure img { width: 100%; display: block; border-radius: 4px; background: #ddd }
figcaption { color: #777; font-size: .9em }
"""


def write_report(folder: Path, results: Mapping[str, Any], images: Mapping[str, Sequence[Drawn]]) -> Path:
    """Write FOLDER/report.html. Images are linked, not copied; nothing in names or prompts is taken for markup."""
    parts = [
        f"<h1>{_text(results['name'])}</h1><p>{_text(results['about'])}</p>",
        _table(results),
        f"<pre>{_text(results['run']['command'])}</pre>" if results["run"]["command"] else "",
        f"<p>{_text(', '.join(f'{name} {version}' for name, version in results['run']['versions'].items()))}</p>",
        _weights(results),
        _gallery(folder, images, results["gallery"]),
    ]
    head = f"<!doctype html><meta charset=utf-8><title>{_text(results['name'])}</title><style>{STYLE}</style>"
    page = head + "".join(parts) + "\n"
    return write_atomically(folder / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(results: Mapping[str, Any]) -> str:
    columns = results["columns"]
    head = "".join(f"<th>{_text(column['title'] + ARROWS[column['better']])}" for column in columns.values())
    rows = []
    for row in results["rows"]:
        name = f"<td>{_text(row['model'])}<small>{_text(row['about'])}</small>"
        rows.append("<tr>" + name + "".join(_cell(row["cells"].get(key), columns[key]) for key in columns))
    first = _text(results["rows"][0]["model"])
    words = f"<p>In brackets: 95 % bootstrap intervals over prompts. Small: difference to {first}, paired by image.</p>"
    return f"<table><tr><th>model{head}{''.join(rows)}</table>{words}"


def _cell(cell: Mapping[str, Any] | None, column: Mapping[str, Any]) -> str:
    words = [_text(cell_text(cell, column))]
    difference = (cell or {}).get("difference")
    if difference is not None:
        digits = column["digits"]
        interval = ""
        if difference["low"] is not None:
            interval = f" ({difference['low']:+.{digits}f} to {difference['high']:+.{digits}f})"
        words.append(f"<small>{difference['value']:+.{digits}f}{interval}</small>")
    note = (cell or {}).get("note")
    return f"<td class=n>{''.join(words)}" + (f"<small>{_text(note)}</small>" if note else "")


def _weights(results: Mapping[str, Any]) -> str:
    """sha256 of every metric's files."""
    lines = []
    for key, reads in results["rows"][0]["weights"].items():
        for field, read in reads.items():
            files = read.get("files") or {"": read["digest"]}
            lines += [f"{key}.{field} {name}: {digest}" for name, digest in files.items()]
    inside = "\n".join(map(_text, lines))
    return f"<details><summary>sha256 of the metrics' files</summary><pre>{inside}</pre></details>" if lines else ""


def _gallery(folder: Path, images: Mapping[str, Sequence[Drawn]], count: int) -> str:
    """The models' images of the same prompt side by side, of at most `count` prompts spread over the set."""
    first = next(iter(images.values()))
    models = {model: {image.key: image for image in drawn} for model, drawn in images.items()}
    seed = first[0].seed
    chosen = [image for image in first if image.seed == seed]
    if count < len(chosen):
        chosen = [chosen[k * len(chosen) // count] for k in range(count)]
    parts = []
    for image in chosen:
        figures = [_figure(folder, model, found[image.key]) for model, found in models.items() if image.key in found]
        words = f"<p>{_text(image.prompt.text)} <small>{_text(image.prompt.domain)}</small></p>"
        parts.append(f"<div class=pair>{words}<div class=row>{''.join(figures)}</div></div>")
    return f"<h2>Images</h2><div style='--columns: {len(images)}'>{''.join(parts)}</div>" if parts else ""


def _figure(folder: Path, model: str, image: Drawn) -> str:
    place = quote(Path(os.path.relpath(image.path, folder)).as_posix())
    tag = f'<img loading=lazy src="{place}" alt="{_text(model)}">'
    return f'<figure><a href="{place}">{tag}</a><figcaption>{_text(model)}</figcaption></figure>'
