"""One HTML page per run: what ran, with which numbers, curves and images. `python -m train.report RUN_FOLDER`."""

from __future__ import annotations

import argparse
import base64
import csv
import html
import inspect
import io
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dcgen.fields import check_fields, items, mapping, real, shown, text
from dcgen.files import naming
from train.config import NAME, NAME_RULE, stage_class
from train.cost import number
from train.files import read_json, write_atomically

LAST = ("loss", "grad_norm")  # columns of the log whose last row stands in the table
WORDS = {
    "grad_norm": "gradient norm",
    "loss_cond": "loss with the caption",
    "loss_uncond": "loss without a caption",
    "least_loss": "least possible loss",
    "variance": "variance of the target",
    "unexplained": "loss / variance",
    "parameters": "trained parameters",
    "both": "subject and colour right",
}

PREVIEWS = 8  # of a stage; more are left out evenly
BASE = "base"  # name of the preview that the base draws
RESULT_KINDS = ("head", "finetune", "export")
# Of a result: ending of its name, folder of ComfyUI that it goes to, node that loads it.
USES = (
    ("-merged.safetensors", "models/diffusion_models", "Load Model (DC-Gen)"),
    (".safetensors", "models/model_patches", "Apply DC-Gen"),
    ("/", "models/diffusers", "Load Release (DC-Gen)"),
)

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .25em .9em .25em 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } th { border-bottom: 1px solid #bbb }
pre { background: #f4f4f4; padding: .7em; white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 100% } h2 { margin-top: 1.6em }
"""


def write_report(run: Path) -> Path:
    """Write RUN/report.html from recipe.json and what the stages left; curves also go to each stage's folder as PNG.

    The folder may be someone else's: nothing in it is taken for markup, and no name in it leads out of it.
    """
    recipe = read_json(run / "recipe.json")
    with naming(run / "recipe.json"):
        check_fields(recipe, {"stages": mapping}, needed=("name", "about", "seed", "stages"))
        for name, config in recipe["stages"].items():
            check_fields({"stage": name, name: config}, {"stage": _stage_name, name: mapping})
            check_fields(config, {}, needed=("kind", "steps"))
    parts = [
        f"<h1>{_text(recipe['name'])}</h1><p>{_text(recipe['about'])}</p>",
        _origin(run),
        _stage_table(run, recipe),
        _results(run, recipe),
        _samples(run, recipe),
    ]
    for name, config in recipe["stages"].items():
        parts.append(_stage_section(run / name, name, config))
    title = _text(recipe["name"])
    page = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>{''.join(parts)}\n"
    return write_atomically(run / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def _stage_name(field: str, value: Any) -> None:
    if not re.fullmatch(NAME, value):
        raise ValueError(f"{field} {shown(value)}: {NAME_RULE}")


def _text(value: Any) -> str:
    """Any value as text of the page."""
    return html.escape(str(value))


def _done(folder: Path) -> dict[str, Any] | None:
    """A stage's record, None while it is not done."""
    path = folder / "done.json"
    if not path.is_file():
        return None
    record = read_json(path)
    with naming(path):
        check_fields(record, {"seconds": real(0, 1e12), "numbers": mapping}, needed=("seconds", "numbers"))
    return record


def _stage_table(run: Path, recipe: dict[str, Any]) -> str:
    rows = []
    for name, config in recipe["stages"].items():
        record = _done(run / name)
        seconds = f"{record['seconds']:.1f}" if record else "not done"
        steps = config["steps"] if (run / name / "log.csv").is_file() else ""
        cells = f"<td>{_text(name)}<td>{_text(config['kind'])}<td class=n>{_text(steps)}<td class=n>{_text(seconds)}"
        rows.append(f"<tr>{cells}")
    table = f"<tr><th>stage<th>kind<th>steps<th>seconds{''.join(rows)}"
    return f"<table>{table}</table><p>seed {_text(recipe['seed'])}</p>"


def _origin(run: Path) -> str:
    """The command of the last `train.run` in this folder and the versions that it ran with."""
    path = run / "run.json"
    if not path.is_file():
        return ""
    record = read_json(path)
    with naming(path):
        check_fields(record, {"command": items(text(10_000), 1, 1000), "versions": mapping}, needed=("command",))
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    return f"<pre>{_text(shlex.join(record['command']))}</pre><p>{_text(versions)}</p>"


def _results(run: Path, recipe: dict[str, Any]) -> str:
    """Links to what the stages wrote for use: adapters, merged files and release folders."""
    rows = []
    for name, config in recipe["stages"].items():
        if config["kind"] not in RESULT_KINDS:
            continue
        files = sorted((run / name).glob("*.safetensors"))
        folders = [run / name / "release"] if (run / name / "release" / "model_index.json").is_file() else []
        for path in [*files, *folders]:
            place = path.relative_to(run).as_posix() + ("/" if path.is_dir() else "")
            _, folder, node = next(use for use in USES if place.endswith(use[0]))
            size = f"{number(path.stat().st_size / 1e6)} MB" if path.is_file() else "folder"
            link = f'<a href="{_text(quote(place))}">{_text(place)}</a>'
            rows.append(f"<tr><td>{link}<td class=n>{size}<td>{folder}<td><i>{_text(node)}</i>")
    head = "<tr><th>file<th>size<th>goes to ComfyUI's folder<th>loaded by"
    return f"<h2>Results</h2><table>{head}{''.join(rows)}</table>" if rows else ""


def _samples(run: Path, recipe: dict[str, Any]) -> str:
    """Images of the whole run, then the previews of each stage: the base's, DC-Gen's in the order of its steps."""
    parts = [_image(path.read_bytes(), path.stem) for path in sorted(run.glob("*.png"))]
    for name, config in recipe["stages"].items():
        previews = sorted((run / name / "previews").glob("*.png"))
        prompts = config.get("preview_prompts")
        if previews:
            words = " | ".join(map(str, prompts)) if isinstance(prompts, list) else ""
            parts.append(f"<h3>{_text(name)}</h3><p>{_text(words)}</p>")
        first = [path for path in previews if path.stem == BASE]
        parts += [
            f"<p>{_text(_caption(path.stem))}</p>{_image(path.read_bytes(), f'{name}, {path.stem}')}"
            for path in [*first, *_spread([path for path in previews if path not in first], PREVIEWS)]
        ]
    return f"<h2>Samples</h2>{''.join(parts)}" if parts else ""


def _caption(stem: str) -> str:
    """The name of a preview file in words: NAME-00000250 -> NAME, step 250."""
    if stem == BASE:
        return "the base itself on its own latent: the same prompts, seeds and steps"
    name, _, step = stem.rpartition("-")
    return f"{name}, step {int(step)}" if re.fullmatch(r"[0-9]{1,18}", step) else stem


def _stage_section(folder: Path, name: str, config: dict[str, Any]) -> str:
    parts = [f"<h2>{_text(name)}</h2><p>{_text(_purpose(config['kind']))}</p>"]
    log = _log(folder)
    numbers = dict((_done(folder) or {}).get("numbers", {}))
    numbers |= {f"{WORDS.get(key, key)}, last logged": values[-1] for key, values in log.items() if key in LAST}
    cells = {key: _text(WORDS.get(key, key.replace("_", " "))) for key in numbers}
    rows = "".join(f"<tr><td>{cells[key]}<td class=n>{_number(value)}" for key, value in numbers.items())
    parts.append(f"<table>{rows}</table>" if rows else "")
    curves = _curves(folder, log)
    if curves:
        parts.append(_image(curves, f"curves of {name}"))
    parts += [
        _image(path.read_bytes(), path.stem) for path in sorted(folder.glob("*.png")) if path.name != "curves.png"
    ]
    settings = _text(json.dumps(config, indent=1, ensure_ascii=False))
    parts.append(f"<details><summary>settings</summary><pre>{settings}</pre></details>")
    return "".join(parts)


def _purpose(kind: str) -> str:
    """What a stage of this kind does: the first paragraph of its own description."""
    text = inspect.getdoc(stage_class(kind, "recipe.json")) or ""
    return " ".join(text.split("\n\n")[0].split())


def _log(folder: Path) -> dict[str, list[float]]:
    """Columns of log.csv; nothing where nothing was logged."""
    table = folder / "log.csv"
    if not table.is_file():
        return {}
    with open(table, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    try:
        return {key: [float(row[key]) for row in rows] for key in rows[0]} if rows else {}
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{table}: not a table of numbers ({error}); remove it") from error


def _curves(folder: Path, log: dict[str, list[float]]) -> bytes | None:
    """PNG of losses, gradient norm (Fig. 19) and speed over the steps; also kept as curves.png."""
    if not log:
        return None
    from matplotlib.figure import Figure

    columns = dict(log)
    steps = columns.pop("step")
    losses = [key for key in columns if key not in ("grad_norm", "lr", "images_per_s")]
    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = (("loss", losses), ("gradient norm", ["grad_norm"]), ("images / s", ["images_per_s"]))
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels, strict=True):
        for key in keys:
            axes.plot(steps, columns[key], label=WORDS.get(key, key), linewidth=1, marker="." if len(steps) < 3 else "")
        axes.set(title=title, xlabel="step")
        if keys == ["images_per_s"]:
            axes.set_ylim(bottom=0)
        elif min(min(columns[key]) for key in keys) > 0:
            axes.set_yscale("log")
        if len(keys) > 1:
            axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(folder / "curves.png", lambda path: path.write_bytes(buffer.getvalue()))
    return buffer.getvalue()


def _image(data: bytes, name: str) -> str:
    return f'<p><img alt="{_text(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'


def _spread(items: list[Path], count: int) -> list[Path]:
    """At most `count` of the items, evenly, the last one among them."""
    if len(items) <= count:
        return items
    return [items[(k + 1) * len(items) // count - 1] for k in range(count)]


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else _text(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's output folder")
    run = parser.parse_args(arguments).run
    if not (run / "recipe.json").is_file():
        print(f"error: {run}/recipe.json not found; name the output folder of a run", file=sys.stderr)
        return 1
    try:
        print(write_report(run))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
