"""Writes the workflows of this folder and the blueprints in subgraphs/, as described in jobs.py.

    python workflows/build.py http://127.0.0.1:8188 [NAME ...]

needs a running ComfyUI with this pack, Chromium and Pillow. Each job becomes NAME.json (for the template browser),
NAME.jpg (its thumbnail) and api/NAME.json (the same graph for scripts that POST to /prompt). The thumbnail shows the
graph's output if all its weights ship with the pack, else a diagram (thumbnail.py). Nodes are placed by their size on
the page, the larger of classic rendering and Nodes 2.0.

    python workflows/build.py http://127.0.0.1:8188 --nodes
    python workflows/build.py http://127.0.0.1:8188 --blueprints

write the node images of the help pages (web/docs/img), and the blueprints.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import math
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # a test loads this file by its path

from graph import FOREIGN, Workflow, has_widgets  # noqa: E402
from jobs import BLUEPRINTS, JOBS  # noqa: E402
from thumbnail import draw  # noqa: E402

VUE_NODES = "Comfy.VueNodes.Enabled"

# The height that each node needs, without its title bar, by id.
NEEDED = """
const NOTE_MARGIN = 1.2; // frontends differ in font size
const element = (node) => document.querySelector(`[data-node-id="${node.id}"]`);
const notes = (node) => {
  const text = (LiteGraph.vueNodesMode ? element(node) : node.widgets[0].element).querySelector("h2").parentElement;
  const style = getComputedStyle(text), edges = [...text.children].map((e) => e.offsetTop + e.offsetHeight);
  return (Math.max(...edges) - text.children[0].offsetTop + parseFloat(style.fontSize)) * NOTE_MARGIN + 40;
};
const drawn = (node) => element(node).offsetHeight - LiteGraph.NODE_TITLE_HEIGHT;
const height = (node) => {
  if (node.type === "MarkdownNote") return notes(node);
  return LiteGraph.vueNodesMode ? drawn(node) : node.computeSize()[1];
};
return app.graph.nodes.map((node) => [node.id, height(node)]);
"""

# Whether the page has settled: the same nodes in the same sizes, twice in a row.
STILL = """
const nodes = () => [...document.querySelectorAll("[data-node-id]")];
const look = () => JSON.stringify(nodes().map((e) => [e.offsetWidth, e.offsetHeight]));
const before = look();
return new Promise((done) => setTimeout(() => done(before === look()), 300));
"""


# One node alone on the canvas; returns its rectangle on the page.
ONE_NODE = """
app.graph.clear();
const node = LiteGraph.createNode(name);
node.pos = [500, 200];  // clear of the page's own menus
app.graph.add(node);
const need = node.computeSize();
node.setSize([Math.max(320, need[0]), Math.max(node.size[1], need[1])]);
app.canvas.ds.scale = 1;
app.canvas.ds.offset = [0, 0];
app.canvas.draw(true, true);
const area = app.canvas.canvas.getBoundingClientRect();
return [area.left + 480, area.top + 150, node.size[0] + 40, node.size[1] + 70];
"""


# Jobs whose weights ship with the pack, so that they run anywhere.
SELF_CONTAINED = ("dcgen_toy", "dcgen_toy_custom", "dcgen_toy_sana", "dcae_roundtrip")


def _browser():
    path = HERE.parent / "tests" / "comfy" / "browser.py"
    spec = importlib.util.spec_from_file_location("browser", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["browser"] = module
    spec.loader.exec_module(module)
    return module


def _output_image(url: str, api: dict, file: Path) -> None:
    """Write the graph's output images side by side, or in two columns, as a JPEG 640 pixels wide."""
    from PIL import Image

    entry = _run(url, api)
    outputs = [
        image
        for output in entry["outputs"].values()
        for part in ("a_images", "b_images", "images")
        for image in output.get(part, [])
    ]
    images = []
    for image in outputs:
        with urllib.request.urlopen(f"{url}/view?{urllib.parse.urlencode(image)}") as response:
            images.append(Image.open(io.BytesIO(response.read())).convert("RGB"))
    columns = len(images) if len(images) < 4 else 2
    side = 640 // columns
    height = round(side * images[0].height / images[0].width)
    sheet = Image.new("RGB", (side * columns, height * math.ceil(len(images) / columns)))
    for i, image in enumerate(images):
        sheet.paste(image.resize((side, height), Image.Resampling.LANCZOS), (i % columns * side, i // columns * height))
    sheet.save(file, quality=88)


def _post(address: str, body: dict) -> bytes:
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers)) as response:
        return response.read()


def _run(url: str, api: dict) -> dict:
    """Queue a graph, wait for it, and return its history entry."""
    _post(f"{url}/free", {"free_memory": True})  # else cached outputs are not returned again
    prompt_id = json.loads(_post(f"{url}/prompt", {"prompt": api}))["prompt_id"]
    while True:
        with urllib.request.urlopen(f"{url}/history/{prompt_id}") as response:
            entry = json.loads(response.read()).get(prompt_id)
        if entry:
            if entry["status"]["status_str"] != "success":
                raise SystemExit(f"the graph failed: {entry['status']['messages'][-1]}")
            return entry
        time.sleep(0.5)


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple]:
    """(page with ComfyUI, /object_info with the nodes of FOREIGN)."""
    with urllib.request.urlopen(f"{url}/object_info") as response:
        kinds = {**json.loads(response.read()), **FOREIGN}
    module = _browser()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = module.Browser(module.find_chromium(), Path(folder))
        try:
            page.open(url)
            ready = "window.app && window.app.extensionManager && window.LiteGraph.registered_node_types.DCGenApply"
            page.until(f"!!({ready})", 180)
            for setting in ("Comfy.Minimap.Visible", "Comfy.Workflow.ShowMissingModelsWarning"):
                page.js(f"app.extensionManager.setting.set('{setting}', false)")
            _close_dialogs(page)
            for name, kind in FOREIGN.items():
                page.js(f"app.registerNodeDef({json.dumps(name)}, {json.dumps(kind)})")
            yield page, kinds
        finally:
            page.close()


def _close_dialogs(page) -> None:
    """A new user's page opens the template browser over the graph, some time after it is ready."""
    page.js("app.extensionManager.setting.set('Comfy.TutorialCompleted', true)")
    for _ in range(20):
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape", windowsVirtualKeyCode=27)
        page.call("Input.dispatchKeyEvent", type="keyUp", key="Escape", code="Escape", windowsVirtualKeyCode=27)
        time.sleep(0.25)
    if page.js("!!document.querySelector('[role=dialog]')?.offsetParent"):
        raise SystemExit(
            "a dialog lies over the graph, which cannot be measured then; close it in the page and try again"
        )


def show(page, graph: dict, name: str, nodes2: bool) -> None:
    """Open a graph in the page, with classic nodes or Nodes 2.0."""
    page.js(f"app.extensionManager.setting.set('{VUE_NODES}', {json.dumps(nodes2)})")
    page.until(f"!!LiteGraph.vueNodesMode === {json.dumps(nodes2)}")
    page.js(f"app.loadGraphData({json.dumps(graph)}, true, true, {json.dumps(name)})")
    if nodes2:
        page.until(f"document.querySelectorAll('[data-node-id]').length === {len(graph['nodes'])}")
    page.until(f"(() => {{ {STILL} }})()")


def heights_of(page, workflow: Workflow, kinds: dict) -> dict[int, float]:
    """The height of each node, the larger of both renderings; leaves the page in classic rendering."""
    heights: dict[int, float] = {}
    for nodes2 in (True, False):
        show(page, workflow.ui(kinds), workflow.title, nodes2)
        for number, height in page.js(f"(() => {{ {NEEDED} }})()"):
            heights[int(number)] = max(height, heights.get(int(number), 0))
    return heights


def written(page, kinds: dict, name: str) -> tuple[dict, dict]:
    """(UI graph, API graph) of a job, as the page lays it out and serializes it. Leaves it open in the page."""
    workflow = JOBS[name]()
    places = workflow.places(heights_of(page, workflow, kinds))
    show(page, workflow.ui(kinds, places), name, nodes2=False)
    missing = page.js("app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)")
    if missing:
        raise SystemExit(f"{name}: unknown nodes {missing}")
    # The page makes a random id; one derived from the name gives the same file each time.
    ui = {**page.js("app.graph.serialize()"), "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)), "extra": {}}
    for node in ui["nodes"]:
        _plain(node, kinds.get(node["type"]))
    return ui, _known_inputs(page.js("app.graphToPrompt().then(p => p.output)"), kinds)


def _plain(node: dict, kind: dict | None) -> None:
    """Remove what depends on the versions of frontend and core from a node."""
    node.pop("widgets_values_named", None)  # newer frontends write the values twice
    if kind and node["outputs"] and not any(output["links"] for output in node["outputs"]):
        node["outputs"] = []  # newer cores give output nodes outputs; the page adds them
    # Booleans that were never set are null; the page would show those as on.
    values = [False if value is None else value for value in node.get("widgets_values", [])]
    node["widgets_values"] = [] if kind and not has_widgets(kind) else values


def _known_inputs(api: dict, kinds: dict) -> dict:
    """The graph without values of the frontend's own widgets."""
    for node in api.values():
        names = {name for part in kinds[node["class_type"]]["input"].values() for name in part}
        node["inputs"] = {name: value for name, value in node["inputs"].items() if name in names}
    return api


def blueprint(page, kinds: dict, workflow) -> dict:
    """The file of a blueprint."""
    return workflow.file(kinds, workflow.places(heights_of(page, workflow, kinds)))


def build_blueprints(url: str) -> None:
    folder = HERE.parent / "subgraphs"
    folder.mkdir(exist_ok=True)
    with opened(url) as (page, kinds):
        for job in BLUEPRINTS:
            workflow = job()
            (folder / f"{workflow.title}.json").write_text(as_text(blueprint(page, kinds, workflow)), encoding="utf-8")
            print(workflow.title)


def as_text(graph: dict) -> str:
    return json.dumps(graph, indent=1, ensure_ascii=False) + "\n"


def build(url: str, names: list[str]) -> None:
    with opened(url) as (page, kinds):
        for name in names:
            ui, api = written(page, kinds, name)
            (HERE / f"{name}.json").write_text(as_text(ui), encoding="utf-8")
            (HERE / "api" / f"{name}.json").write_text(as_text(api), encoding="utf-8")
            if name in SELF_CONTAINED:
                _output_image(url, api, HERE / f"{name}.jpg")
            else:
                draw(name)
            print(name, len(ui["nodes"]), "nodes")


def build_nodes(url: str) -> None:
    """Write an image of each of our nodes."""
    with opened(url) as (page, kinds):
        page.js(f"app.loadGraphData({json.dumps(Workflow('').ui(kinds))}, true, true, 'nodes')")
        for name in (name for name, kind in kinds.items() if kind["category"] == "DC-Gen"):
            x, y, width, height = page.js(f"(() => {{ const name = {json.dumps(name)}; {ONE_NODE} }})()")
            page.js("new Promise((done) => setTimeout(done, 500))")
            clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
            screenshot = page.call("Page.captureScreenshot", format="png", clip=clip)
            (HERE.parent / "web" / "docs" / "img" / f"{name}.png").write_bytes(base64.b64decode(screenshot["data"]))
            print(name)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    if sys.argv[2:] == ["--nodes"]:
        build_nodes(sys.argv[1].rstrip("/"))
    elif sys.argv[2:] == ["--blueprints"]:
        build_blueprints(sys.argv[1].rstrip("/"))
    else:
        build(sys.argv[1].rstrip("/"), sys.argv[2:] or list(JOBS))
