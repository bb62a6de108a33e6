"""Walks a user's first hour: what the README says, every template on the page, and what happens on a mistake.

    python -m benchmarks.walk                            # templates and mistakes, in every ComfyUI on this machine
    python -m benchmarks.walk setup demo test            # the README's commands in a fresh clone with an empty home
    python -m benchmarks.walk templates --only dcgen_toy --comfy PATH [PATH ...]

Prints a table of each part and writes OUT/walk.json. Parts are kept there until they are walked again. `templates`
saves a screenshot of each template in each frontend and way of drawing nodes to OUT/templates, and docs/templates.webp
with all of them; `mistakes` writes docs/mistakes.md. Look at the screenshots: no test sees what a person sees.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any

from benchmarks.walk import commands, mistakes, templates
from train.comfy_client import PACK, find_comfyui
from train.files import read_json, write_json

DOCS = PACK / "docs"
PARTS = (*commands.STEPS, "templates", "mistakes")


def main() -> None:
    options = _parser().parse_args()
    comfyuis = options.comfy or [place for place in (find_comfyui(),) if place]
    for part in dict.fromkeys(options.parts):
        if part in commands.STEPS:
            rows = list(commands.walk([part], options.out))
            print(commands.table(rows), flush=True)
            record(options.out, part, commands.as_json(rows))
        elif part == "templates":
            shots = options.out / "templates"
            views = templates.walk(comfyuis, options.only or templates.names(), shots)
            print(templates.table(views), flush=True)
            record(options.out, part, templates.as_json(views))
            if not options.only:
                templates.contact_sheet(views, shots, DOCS / "templates.webp")
        else:
            outcomes = mistakes.walk(comfyuis[0] if comfyuis else None)
            print(mistakes.table(outcomes), flush=True)
            record(options.out, part, mistakes.as_json(outcomes))
            (DOCS / "mistakes.md").write_text(mistakes.page(outcomes), encoding="utf-8")


def record(out: Path, part: str, rows: list[dict[str, Any]]) -> None:
    """Keep one part's rows in OUT/walk.json, beside those of other parts."""
    path = out / "walk.json"
    known = read_json(path) if path.is_file() else {}
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {**known, "machine": f"{platform.system()} {platform.machine()}", part: rows})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.walk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["templates", "mistakes"], choices=PARTS, metavar="PART")
    parser.add_argument("--comfy", nargs="+", type=Path, help="ComfyUI folders; mistakes are made in the first")
    parser.add_argument("--only", nargs="+", choices=templates.names(), metavar="TEMPLATE", help="these templates")
    parser.add_argument("--out", type=Path, default=PACK / "runs" / "walk", help="results (default: runs/walk)")
    return parser


if __name__ == "__main__":
    main()
