"""Every shipped template as a user first sees it: opened in each ComfyUI on this machine, in each way of drawing nodes.

One screenshot each, and one image with all of them beside each other. Templates whose weights ship with the pack are
run first, so that their results are on the page too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from train.comfy_client import PACK, ComfyServer
from workflows.build import SELF_CONTAINED, opened, show
from workflows.jobs import JOBS

THUMBNAIL = (400, 250)  # pixels of the contact sheet
LABEL = 22  # rows of pixels for a name
MODES = {"classic": False, "Nodes 2.0": True}
RUN_SECONDS = 180
STATE = """
({
  scale: app.canvas.ds.scale,
  unknown: app.graph._nodes.filter((n) => !LiteGraph.registered_node_types[n.type]).map((n) => n.type),
})
"""


@dataclass(frozen=True)
class View:
    """One template on one page."""

    template: str
    frontend: str
    mode: str
    file: str
    scale: float
    ran: bool
    unknown: list[str]
    errors: list[str]


def walk(comfyuis: list[Path], names: list[str], folder: Path) -> list[View]:
    """Open the templates in each ComfyUI and mode; screenshots go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    views: list[View] = []
    for comfyui in comfyuis:
        with ComfyServer(comfyui) as server:
            _prepare(server.folder, comfyui)
            with opened(server.url) as (page, _):
                frontend = page.js("window.__COMFYUI_FRONTEND_VERSION__ ?? 'unknown'")
                for mode, nodes2 in MODES.items():
                    views += _views(page, frontend, mode, nodes2, names, folder)
    return views


def _prepare(folder: Path, comfyui: Path) -> None:
    """Give a server's own folder what a user has: the example image, and a page that has been opened before."""
    shutil.copytree(comfyui / "input", folder / "input", dirs_exist_ok=True)
    settings = folder / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")


def _views(page: Any, frontend: str, mode: str, nodes2: bool, names: list[str], folder: Path) -> Iterator[View]:
    for name in names:
        graph = json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        page.errors.clear()
        show(page, graph, name, nodes2)
        page.still("[...app.canvas.ds.offset, app.canvas.ds.scale]")
        ran = name in SELF_CONTAINED
        if ran:
            _run(page)
        page.js("new Promise((done) => setTimeout(done, 700))")  # pictures, messages and the view are drawn
        file = folder / f"{name}-{frontend}-{mode.replace(' ', '')}.png"
        page.screenshot(file)
        state = page.js(STATE)
        yield View(name, frontend, mode, file.name, state["scale"], ran, state["unknown"], list(page.errors))
        print(f"  {name}, frontend {frontend}, {mode}", flush=True)


def _run(page: Any) -> None:
    """Press Run, and wait for the end."""
    ended = "fetch('/history').then((r) => r.json()).then((h) => Object.keys(h).length)"
    before = page.js(ended)
    page.js("app.queuePrompt(0, 1).then(() => 0)")
    page.until(f"{ended}.then((now) => now > {before})", RUN_SECONDS)
    page.js("new Promise((done) => setTimeout(done, 3000))")  # until the page has said so, and its message is gone


def contact_sheet(views: list[View], folder: Path, file: Path) -> None:
    """All screenshots in one image: a row for each template, a column for each frontend and mode."""
    columns = list(dict.fromkeys((view.frontend, view.mode) for view in views))
    rows = list(dict.fromkeys(view.template for view in views))
    width, height = THUMBNAIL
    sheet = Image.new("RGB", (width * len(columns), (height + LABEL) * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for view in views:
        x, y = columns.index((view.frontend, view.mode)) * width, rows.index(view.template) * (height + LABEL)
        draw.text((x + 4, y + 2), f"{view.template}: {view.frontend}, {view.mode}", fill="black", font=font)
        shot = Image.open(folder / view.file).convert("RGB").resize(THUMBNAIL, Image.Resampling.LANCZOS)
        sheet.paste(shot, (x, y + LABEL))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, quality=55, method=6)


def table(views: list[View]) -> str:
    """Markdown: one line for each frontend and mode."""
    lines = ["| frontend | nodes | templates opened | run | unknown nodes | page errors |", "|---|---|---|---|---|---|"]
    for frontend, mode in dict.fromkeys((view.frontend, view.mode) for view in views):
        part = [view for view in views if (view.frontend, view.mode) == (frontend, mode)]
        unknown, errors = sum(len(view.unknown) for view in part), sum(len(view.errors) for view in part)
        lines.append(f"| {frontend} | {mode} | {len(part)} | {sum(view.ran for view in part)} | {unknown} | {errors} |")
    return "\n".join(lines)


def names() -> list[str]:
    """All templates, in the order of the template browser."""
    return sorted(JOBS)


def as_json(views: list[View]) -> list[dict[str, Any]]:
    return [asdict(view) for view in views]
