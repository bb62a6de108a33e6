"""The shipped workflows: complete, consistent with their API twins, and alive in the real frontend."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
OTHERS = ("sana", "klein", "zimage")  # families with tests of their own
TOY = [name for name in NAMES if name.startswith("dcgen_toy")]
# Nodes of no known kind; `has_errors` also marks nodes whose files are missing, in newer pages.
UNKNOWN = "app.graph._nodes.filter((node) => !(node.type in LiteGraph.registered_node_types))"
PACK = "ComfyUI-DC-Gen"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# Our nodes are known, the page hears the server, and the graph that it opens by itself is there.
READY = (
    "!!(window.app?.extensionManager?.workflow?.activeWorkflow && app.api.socket?.readyState === 1 &&"
    " LiteGraph.registered_node_types.DCGenApply)"
)


def declared(kind):
    """The inputs of a kind of node, as /object_info has them."""
    return {name: spec for part in kind["input"].values() for name, spec in part.items()}


def bare(api, kinds):
    """An API prompt without titles, which a locale changes, and without what a page adds to core's own nodes."""

    def inputs(node):
        kind = kinds[node["class_type"]]
        if kind["python_module"].endswith(PACK):
            return node["inputs"]
        return {name: value for name, value in node["inputs"].items() if name in declared(kind)}

    return {key: {"class_type": node["class_type"], "inputs": inputs(node)} for key, node in api.items()}


@pytest.mark.parametrize("name", NAMES)
def test_files_fit_together(name):
    ui = json.loads((FOLDER / f"{name}.json").read_text())
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    shown = {str(node["id"]): node["type"] for node in ui["nodes"] if node["type"] != "MarkdownNote"}
    assert {key: node["class_type"] for key, node in api.items()} == shown
    ids = {node["id"] for node in ui["nodes"]}
    assert all(link[1] in ids and link[3] in ids for link in ui["links"])
    notes = [node for node in ui["nodes"] if node["type"] == "MarkdownNote"]
    assert notes, "a workflow says what it needs"
    for node in ui["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["url"].startswith("https://")
            assert model["url"].endswith((".safetensors", ".sft"))
            assert model["name"] in node["widgets_values"]
            assert ("hash" in model) == (model.get("hash_type") == "SHA256")
            assert len(model.get("hash", "0" * 64)) == 64
    boxes = [(node["id"], *node["pos"], *node["size"]) for node in ui["nodes"]]
    for i, (first, x, y, w, h) in enumerate(boxes):
        for second, x2, y2, w2, h2 in boxes[:i]:
            apart = x + w <= x2 or x2 + w2 <= x or y + h <= y2 - 30 or y2 + h2 <= y - 30
            assert apart, f"nodes {first} and {second} overlap"


def small(api, deep, base, adapter, kept=()):
    """An API prompt with tiny random files in place of the weights it names, at a small size; `kept` loaders stay."""
    stand_ins = {"UNETLoader": 0, "NunchakuFluxDiTLoader": 0, "DualCLIPLoader": 1, "VAELoader": 2}
    moved = {
        key: stand_ins[node["class_type"]] for key, node in api.items() if node["class_type"] in {*stand_ins} - {*kept}
    }
    values = {
        "DCGenReleaseLoader": {"release": deep},
        "DCGenModelLoader": {"model_name": deep},
        "DCGenApply": {"adapter_name": adapter},
        "DCAELoader": {"vae_name": "tiny-dcae"},
        "DCGenEmptyLatent": {"width": 96, "height": 64, "batch_size": 1, "size": "width x height"},
        "DCGen4KSampler": {"steps": 2, "size": "width x height", "width": 96, "height": 64},
        "LoadImage": {"image": "tests.png"},
    }
    out = {}
    for key, node in api.items():
        if key in moved:
            out[key] = {"class_type": "DCGenReleaseLoader", "inputs": {"release": base}}
            continue
        inputs = {**node["inputs"], **values.get(node["class_type"], {})}
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in moved:
                inputs[name] = [value[0], moved[value[0]]]
        out[key] = {"class_type": node["class_type"], "inputs": inputs}
    return out


@pytest.fixture(scope="module")
def tiny_files(server, deep_release):
    """A tiny DC-AE by name, and a picture to load."""
    server.install(deep_release[0] / "vae", "vae", "tiny-dcae")
    noise = np.random.default_rng(1).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    (server.base / "input").mkdir(exist_ok=True)
    Image.fromarray(noise, "RGBA").save(server.base / "input" / "tests.png")


@pytest.mark.usefixtures("tiny_files")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in TOY and not any(f in name for f in OTHERS)])
def test_runs_with_tiny_files(server, name, deep_name, base_name, adapter_name):
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    entry = server.queue(small(api, deep_name, base_name, adapter_name))
    saved = [image for images in server.images(entry).values() for image in images]
    shown = [node for node in entry["outputs"].values() if "a_images" in node]
    assert len(saved) == sum(node["class_type"] in ("SaveImage", "PreviewImage") for node in api.values())
    assert len(shown) == sum(node["class_type"] == "DCGenCompare" for node in api.values())
    assert all(image.shape == (64, 96, 3) and image.std() > 3 for image in saved)


NUNCHAKU = "dcgen_flux_4k_nunchaku"


@pytest.mark.usefixtures("tiny_files")
def test_nunchakus_own_loader(server, deep_name, base_name, adapter_name):
    """A node of its id and inputs hands out the stand-in of its model: the picture is that of core's FLUX."""
    api = json.loads((FOLDER / "api" / f"{NUNCHAKU}.json").read_text())
    file = server.base / "models" / "diffusion_models" / "svdq-int4_r32-flux.1-krea-dev.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    try:
        found = server.images(server.queue(small(api, deep_name, base_name, adapter_name, {"NunchakuFluxDiTLoader"})))
    finally:
        file.unlink()
    wanted = server.images(server.queue(small(api, deep_name, base_name, adapter_name)))
    ((found,),), ((wanted,),) = found.values(), wanted.values()
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.fixture(scope="module")
def page(server, browser):
    browser.open(server.url)
    browser.until(READY, 120)
    return browser


@pytest.fixture(scope="module")
def kinds(server):
    """Every kind of node, as ComfyUI describes it."""
    return server.get("/object_info")


def load(page, name):
    graph = json.loads((FOLDER / f"{name}.json").read_text())
    page.js(f"app.loadGraphData({json.dumps(graph)}, true, true, {json.dumps(name)})")


@pytest.mark.once_per_core
@pytest.mark.parametrize("name", NAMES)
def test_opens_in_the_frontend(page, kinds, name):
    page.errors.clear()
    load(page, name)
    assert page.js(f"{UNKNOWN}.map((node) => node.type)") == []
    found = page.js("app.graphToPrompt().then((prompt) => prompt.output)")
    assert bare(found, kinds) == bare(json.loads((FOLDER / "api" / f"{name}.json").read_text()), kinds)
    assert page.errors == []
    # The view that opens shows the text of nodes, which the page leaves out below 8 pixels.
    assert page.js("app.canvas.ds.scale") * 14 > 8


@pytest.mark.once_per_core
def test_without_nunchakus_pack(page):
    """The graph still opens whole, names the node that is missing, and tells ComfyUI-Manager which pack has it."""
    page.js("window.kept = LiteGraph.registered_node_types.NunchakuFluxDiTLoader")
    page.js("LiteGraph.unregisterNodeType('NunchakuFluxDiTLoader')")
    try:
        load(page, NUNCHAKU)
        assert page.js(f"{UNKNOWN}.map((node) => node.type)") == ["NunchakuFluxDiTLoader"]
        kept = page.js("app.graph.serialize().nodes.find((node) => node.type === 'NunchakuFluxDiTLoader')")
    finally:
        page.js("LiteGraph.registerNodeType('NunchakuFluxDiTLoader', window.kept)")
    said = kept["properties"]
    assert (said["cnr_id"], said["aux_id"]) == ("ComfyUI-nunchaku", "nunchaku-tech/ComfyUI-nunchaku")
    assert kept["widgets_values"][0].startswith("svdq-int4")


@pytest.mark.once_per_core
@pytest.mark.parametrize("name", ["dcae_roundtrip", "dcgen_flux_4k", NUNCHAKU])
def test_a_rebuild_writes_the_same_files(page, kinds, name):
    """workflows/build.py and what is committed are one: nothing has been mended by hand."""
    spec = importlib.util.spec_from_file_location("workflows_build", FOLDER / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    ui, api = build.written(page, {**kinds, **build.FOREIGN}, name)
    assert comparable(ui, kinds) == comparable(json.loads((FOLDER / f"{name}.json").read_text()), kinds)
    assert bare(api, kinds) == bare(json.loads((FOLDER / "api" / f"{name}.json").read_text()), kinds)


def comparable(graph, kinds):
    """A graph without what depends on the page's language, fonts and version, and on the version of core's nodes."""
    if isinstance(graph, list):
        return [comparable(value, kinds) for value in graph]
    if not isinstance(graph, dict):
        return graph
    kind = kinds.get(graph.get("type"))
    loose = {"size", "pos", "localized_name", "title", "widgets_values_named"}
    if kind and not kind["python_module"].endswith(PACK):
        graph = {**graph, "outputs": [output for output in graph["outputs"] if output["links"]]}
        if not any(isinstance(spec[0], list) or spec[0] in WIDGETS for spec in declared(kind).values()):
            loose.add("widgets_values")  # of the page's own making
    return {key: comparable(value, kinds) for key, value in graph.items() if key not in loose}


@pytest.mark.once_per_core
def test_template_browser_lists_them_with_pictures(server):
    listed = server.get("/workflow_templates")["ComfyUI-DC-Gen"]
    assert sorted(listed) == NAMES
    for name in NAMES:
        assert server.raw(f"/api/workflow_templates/ComfyUI-DC-Gen/{name}.jpg")[:2] == b"\xff\xd8"


@pytest.mark.parametrize("name", TOY)
def test_toy_runs_from_the_browser(server, page, name):
    load(page, name)
    before = set(server.get("/history"))
    page.js("app.queuePrompt(0, 1)")
    page.until(f"fetch('/history').then((r) => r.json()).then((h) => Object.keys(h).length > {len(before)})", 120)
    (key,) = set(server.get("/history")) - before
    entry = server.entry(key)
    assert not server.error(entry), server.error(entry)
    pictures = [image for images in server.images(entry).values() for image in images]
    assert len(pictures) == 4
    assert all(picture.shape == (128, 128, 3) and picture.std() > 5 for picture in pictures)
    # The picture also reaches the page: SaveImage shows it on the node.
    page.until("app.graph._nodes.some((node) => node.type === 'SaveImage' && node.imgs && node.imgs.length === 4)", 30)


class Hand:
    """A user's hands on the page: nodes dragged out of the library, links drawn, values typed, the run button."""

    SEARCH = "document.querySelector('.comfy-vue-side-bar-container input[placeholder^=Search]')"
    LEAVES = "[...document.querySelectorAll('.tree-leaf, [role=treeitem][draggable=true]')]"
    DIALOG = "document.querySelector('.p-dialog-mask')"
    LIBRARY = "app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library')"

    def __init__(self, page):
        self.page = page
        empty = {"nodes": [], "links": [], "groups": [], "version": 0.4, "last_node_id": 0, "last_link_id": 0}
        page.js(f"app.loadGraphData({json.dumps(empty)}, true, true, 'hand')")
        if page.js(f"!!{self.DIALOG}"):  # older pages tell in one what an earlier graph missed
            page.keys("", "Escape")
            page.until(f"!{self.DIALOG}", 30)
        page.js(self.LIBRARY)
        page.until(f"!!{self.SEARCH}", 60)
        page.still("[...app.canvas.ds.offset, app.canvas.ds.scale]")  # the page moves the view after loading a graph
        page.js("app.canvas.ds.scale = 0.6; app.canvas.ds.offset = [0, 0]; app.canvas.draw(true, true)")

    def still(self, element):
        """A point of an element that no longer moves: the library is laid out anew while it filters."""
        self.page.still(f"(() => {{ const r = {element}.getBoundingClientRect(); return [r.x, r.y]; }})()")
        return self.page.reach(element)

    def canvas(self, *points):
        """The first of some places on the graph, as JavaScript, that the pointer reaches there."""
        return self.page.reach("app.canvas.canvas", points=f"[{', '.join(points)}]")

    def click(self, place):
        self.page.mouse("mouseMoved", *place)
        self.page.mouse("mousePressed", *place, held=True)
        self.page.mouse("mouseReleased", *place)

    def put(self, title, x, y):
        """Find a node in the library and drag it to a place; a JavaScript name for it."""
        page, count = self.page, self.page.js("app.graph._nodes.length")
        page.js(f"{self.SEARCH}.focus(); {self.SEARCH}.select()")
        page.keys(title)
        leaf = f"{self.LEAVES}.find((e) => e.textContent.trim() === {json.dumps(title)})"
        page.until(f"!!({leaf})", 60)
        page.drop(lambda: self.still(f"({leaf})"), self.canvas(f"[{x}, {y}]"))
        page.until(f"app.graph._nodes.length === {count + 1}", 30)
        return f"app.graph.getNodeById({page.js('app.graph._nodes.at(-1).id')})"

    def link(self, source, slot, target, name):
        """Draw a link from an output to an input."""
        place = (
            "(node, input, slot) => { const area = app.canvas.canvas.getBoundingClientRect(), view = app.canvas.ds;"
            "const [x, y] = node.getConnectionPos(input, slot);"
            "return [(x + view.offset[0]) * view.scale + area.x, (y + view.offset[1]) * view.scale + area.y]; }"
        )
        to = f"{target}.findInputSlot({json.dumps(name)})"
        start = self.canvas(f"({place})({source}, false, {slot})")
        self.page.drag(start, self.canvas(f"({place})({target}, true, {to})"))
        self.page.until(f"{target}.getInputNode({to}) === {source}", 30)

    def widget(self, node, name):
        """Click on a widget, between the arrows at its ends."""
        place = (
            "((node, name, share) => { const area = app.canvas.canvas.getBoundingClientRect(), view = app.canvas.ds;"
            "const y = node.widgets.find((widget) => widget.name === name).y + 10;"
            "return [(node.pos[0] + share * node.size[0] + view.offset[0]) * view.scale + area.x,"
            " (node.pos[1] + y + view.offset[1]) * view.scale + area.y]; })"
        )
        self.click(self.canvas(*(f"{place}({node}, {json.dumps(name)}, {share})" for share in (0.5, 0.35, 0.65))))

    def type(self, node, name, text):
        """Type a number into a widget."""
        self.widget(node, name)
        field = "document.querySelector('.graphdialog input')"
        self.page.until(f"!!{field}", 30)
        self.page.js(f"{field}.select()")
        self.page.keys(text, "Enter")
        self.page.until(f"String({node}.widgets.find((w) => w.name === {json.dumps(name)}).value) === '{text}'", 30)

    def choose(self, node, name, text):
        """Choose from a widget's list."""
        self.widget(node, name)
        entry = f"[...document.querySelectorAll('.litemenu-entry')].find((e) => e.textContent.trim() === '{text}')"
        self.page.until(f"!!({entry})", 30)
        self.page.js(f"({entry}).scrollIntoView({{ block: 'nearest' }})")
        self.click(self.page.reach(f"({entry})"))
        self.page.until(f"{node}.widgets.find((w) => w.name === {json.dumps(name)}).value === '{text}'", 30)


@pytest.mark.once_per_core
def test_built_by_hand(server, page, base_name):
    """Nodes dragged in, linked, a size typed while the badge counts, run, the picture on the page, wiped."""
    page.js("app.refreshComboInNodes()")
    page.errors.clear()
    hand = Hand(page)
    try:
        load_ = hand.put("Load Release (DC-Gen)", 400, 130)
        text = hand.put("CLIP Text Encode (Prompt)", 640, 130)
        empty = hand.put("Empty Latent (DC-Gen)", 640, 330)
        sampler = hand.put("Sampler 4K (DC-Gen)", 900, 130)
        decode = hand.put("VAE Decode", 1130, 130)
        save = hand.put("Save Image", 1130, 230)
        compare = hand.put("Compare Images (DC-Gen)", 1360, 130)
    finally:
        page.js(Hand.LIBRARY)
    hand.choose(load_, "release", base_name)
    links = [(load_, 1, text, "clip"), (load_, 0, empty, "model"), (load_, 0, sampler, "model")]
    links += [(text, 0, sampler, "positive"), (empty, 0, sampler, "latent"), (sampler, 0, decode, "samples")]
    links += [(load_, 2, decode, "vae"), (decode, 0, save, "images")]
    links += [(decode, 0, compare, "image_a"), (decode, 0, compare, "image_b")]
    for one in links:
        hand.link(*one)
    said = "[...document.querySelectorAll('.dcgen-tokens')].map((e) => e.textContent)"
    hand.type(empty, "width", "96")
    page.until(f"{said}.every((line) => line.startsWith('96 x 1024 = 384 tokens'))", 30)
    hand.type(empty, "height", "64")
    page.until(f"{said}.every((line) => line.startsWith('96 x 64 = 24 tokens'))", 30)
    hand.type(sampler, "steps", "2")
    hand.click(page.reach("[...document.querySelectorAll('button')].find((e) => e.textContent.trim() === 'Run')"))
    page.until(f"{save}.imgs?.length === 1 && {save}.imgs[0].naturalWidth === 96", 120)
    page.until(
        "document.querySelectorAll('.dcgen-wipe img').length === 2 &&"
        "[...document.querySelectorAll('.dcgen-wipe img')].every((i) => i.complete && i.naturalWidth === 96)",
        60,
    )
    wipe = "document.querySelector('.dcgen-wipe')"
    assert page.js(f"{wipe}.getAttribute('aria-valuenow')") == "50"
    x, y = page.reach(wipe, (0.3, 0.25, 0.2, 0.35))
    page.mouse("mouseMoved", x, y)
    page.until(
        f"(() => {{ const r = {wipe}.getBoundingClientRect(), now = {wipe}.getAttribute('aria-valuenow');"
        f"return now < 50 && Math.abs(now - 100 * ({x} - r.x) / r.width) <= 1; }})()",
        30,
    )
    assert page.errors == []
