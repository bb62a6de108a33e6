"""The shipped workflows: complete, consistent with their API twins, and alive in the real frontend."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
TOY = [name for name in NAMES if name.startswith("dcgen_toy")]
READY = "!!(window.app && window.app.extensionManager && window.LiteGraph.registered_node_types.DCGenApply)"


def bare(api):
    """An API prompt without titles, which a locale changes."""
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in api.items()}


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
    vae = server.base / "models" / "vae" / "tiny-dcae"
    vae.parent.mkdir(parents=True, exist_ok=True)
    if not vae.exists():
        vae.symlink_to(deep_release[0] / "vae", target_is_directory=True)
    noise = np.random.default_rng(1).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    (server.base / "input").mkdir(exist_ok=True)
    Image.fromarray(noise, "RGBA").save(server.base / "input" / "tests.png")


@pytest.mark.usefixtures("tiny_files")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in TOY and "sana" not in name])
def test_runs_with_tiny_files(server, name, deep_name, base_name, adapter_name):
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    entry = server.queue(small(api, deep_name, base_name, adapter_name))
    saved = [image for images in server.images(entry).values() for image in images]
    shown = [node for node in entry["outputs"].values() if "a_images" in node]
    assert len(saved) == sum(node["class_type"] == "SaveImage" for node in api.values())
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


def load(page, name):
    graph = json.loads((FOLDER / f"{name}.json").read_text())
    page.js(f"app.loadGraphData({json.dumps(graph)}, true, true, {json.dumps(name)})")


@pytest.mark.parametrize("name", NAMES)
def test_opens_in_the_frontend(page, name):
    page.errors.clear()
    load(page, name)
    assert page.js("app.graph._nodes.filter((node) => node.has_errors).map((node) => node.type)") == []
    found = page.js("app.graphToPrompt().then((prompt) => prompt.output)")
    assert bare(found) == bare(json.loads((FOLDER / "api" / f"{name}.json").read_text()))
    assert page.errors == []
    # The view that opens shows the text of nodes, which the page leaves out below 8 pixels.
    assert page.js("app.canvas.ds.scale") * 14 > 8


def test_without_nunchakus_pack(page):
    """The graph still opens whole, names the node that is missing, and tells ComfyUI-Manager which pack has it."""
    page.js("window.kept = LiteGraph.registered_node_types.NunchakuFluxDiTLoader")
    page.js("LiteGraph.unregisterNodeType('NunchakuFluxDiTLoader')")
    try:
        load(page, NUNCHAKU)
        missing = "app.graph._nodes.filter((node) => node.has_errors)"
        assert page.js(f"{missing}.map((node) => node.type)") == ["NunchakuFluxDiTLoader"]
        said = page.js(f"{missing}[0].properties")
        kept = page.js("app.graph.serialize().nodes.find((node) => node.type === 'NunchakuFluxDiTLoader')")
    finally:
        page.js("LiteGraph.registerNodeType('NunchakuFluxDiTLoader', window.kept)")
    assert (said["cnr_id"], said["aux_id"]) == ("ComfyUI-nunchaku", "nunchaku-tech/ComfyUI-nunchaku")
    assert kept["widgets_values"][0].startswith("svdq-int4")


@pytest.mark.parametrize("name", ["dcae_roundtrip", "dcgen_flux_4k", NUNCHAKU])
def test_a_rebuild_writes_the_same_files(server, page, name):
    """workflows/build.py and what is committed are one: nothing has been mended by hand."""
    spec = importlib.util.spec_from_file_location("workflows_build", FOLDER / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    kinds = {**server.get("/object_info"), **build.FOREIGN}
    ui, api = build.written(page, kinds, name)
    for found, file in ((ui, FOLDER / f"{name}.json"), (api, FOLDER / "api" / f"{name}.json")):
        assert comparable(found) == comparable(json.loads(file.read_text()))


def comparable(graph):
    """A graph without what depends on the page's language and fonts."""
    if isinstance(graph, dict):
        loose = ("size", "pos", "localized_name", "_meta", "title")
        return {key: comparable(value) for key, value in graph.items() if key not in loose}
    return [comparable(value) for value in graph] if isinstance(graph, list) else graph


def test_template_browser_lists_them_with_pictures(server):
    listed = server.get("/workflow_templates")["ComfyUI-DC-Gen"]
    assert sorted(listed) == NAMES
    for name in NAMES:
        assert server.raw(f"/api/workflow_templates/ComfyUI-DC-Gen/{name}.jpg")[:2] == b"\xff\xd8"


def toy_adapter(server, tiny_files):
    """The shipped toy adapter, or a random one of the same shape where it has not been trained."""
    listed = server.get("/object_info/DCGenApply")["DCGenApply"]["input"]["required"]["adapter_name"][1]["options"]
    if "toy-flux-dcgen.safetensors" not in listed:
        pytest.skip("toy/adapter/toy-flux-dcgen.safetensors has not been trained")


@pytest.mark.parametrize("name", TOY)
def test_toy_runs_from_the_browser(server, page, name, tmp_path):
    toy_adapter(server, tmp_path)
    load(page, name)
    before = set(server.get("/history"))
    page.js("app.queuePrompt(0, 1)")
    page.until(f"fetch('/history').then((r) => r.json()).then((h) => Object.keys(h).length > {len(before)})", 120)
    (key,) = set(server.get("/history")) - before
    entry = server.wait(key)
    assert not server.error(entry), server.error(entry)
    pictures = [image for images in server.images(entry).values() for image in images]
    assert len(pictures) == 4
    assert all(picture.shape == (128, 128, 3) and picture.std() > 5 for picture in pictures)
    # The picture also reaches the page: SaveImage shows it on the node.
    page.until("app.graph._nodes.some((node) => node.type === 'SaveImage' && node.imgs && node.imgs.length === 4)", 30)


def test_built_by_hand(server, page, base_release):
    """A user's way: put nodes down, drag a link between them, type a size, read the tokens, run, wipe."""
    target = server.base / "models" / "diffusers" / "tiny-hand"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        target.symlink_to(base_release[0], target_is_directory=True)
    page.js("app.refreshComboInNodes()")
    page.js(
        """(async () => {
          const empty = { nodes: [], links: [], groups: [], version: 0.4, last_node_id: 0, last_link_id: 0 };
          await app.loadGraphData(empty, true, true, "hand");
          const put = (kind, x, y) => {
            const node = LiteGraph.createNode(kind);
            node.pos = [x, y];
            app.graph.add(node);
            return node;
          };
          window.hand = { load: put("DCGenReleaseLoader", 100, 150), empty: put("DCGenEmptyLatent", 600, 150) };
          hand.load.widgets[0].value = "tiny-hand";
          await new Promise((done) => setTimeout(done, 1000)); // the page moves the view after loading a graph
          app.canvas.ds.scale = 1;
          app.canvas.ds.offset = [0, 0];
          app.canvas.draw(true, true);
        })()"""
    )
    at = (
        "(() => { const r = app.canvas.canvas.getBoundingClientRect();"
        "const a = hand.load.getConnectionPos(false, 0); const b = hand.empty.getConnectionPos(true, 0);"
        "return [a[0] + r.left, a[1] + r.top, b[0] + r.left, b[1] + r.top]; })()"
    )
    x1, y1, x2, y2 = page.js(at)
    page.drag((x1, y1), (x2, y2))
    page.until("hand.empty.getInputNode(0) === hand.load", 10)
    page.js("hand.empty.widgets.find((w) => w.name === 'width').value = 96")
    page.js("hand.empty.widgets.find((w) => w.name === 'height').value = 64; app.canvas.draw(true, true)")
    page.until("[...document.querySelectorAll('.dcgen-tokens')].some((e) => e.textContent.includes('24 tokens'))", 20)
    page.js(
        """(() => {
          const put = (kind, x, y) => {
            const node = LiteGraph.createNode(kind);
            node.pos = [x, y];
            app.graph.add(node);
            return node;
          };
          const into = (from, slot, to, name) => from.connect(slot, to, to.findInputSlot(name));
          const text = put("CLIPTextEncode", 600, 500);
          const sampler = put("DCGen4KSampler", 1000, 150);
          const decode = put("VAEDecode", 1400, 150);
          const compare = put("DCGenCompare", 1400, 350);
          into(hand.load, 1, text, "clip");
          into(hand.load, 0, sampler, "model");
          into(text, 0, sampler, "positive");
          into(hand.empty, 0, sampler, "latent");
          into(sampler, 0, decode, "samples");
          into(hand.load, 2, decode, "vae");
          into(decode, 0, compare, "image_a");
          into(decode, 0, compare, "image_b");
          sampler.widgets.find((w) => w.name === "steps").value = 2;
          hand.compare = compare;
        })()"""
    )
    page.js("app.queuePrompt(0, 1)")
    page.until("document.querySelectorAll('.dcgen-wipe img').length === 2", 60)
    page.until(
        "[...document.querySelectorAll('.dcgen-wipe img')].every((i) => i.complete && i.naturalWidth === 96)", 60
    )
    cut = "document.querySelectorAll('.dcgen-wipe img')[1].style.clipPath"
    before = page.js(cut)
    area = "document.querySelector('.dcgen-wipe').getBoundingClientRect()"
    box = page.js(f"[{area}.left, {area}.top, {area}.width]")
    page.mouse("mouseMoved", box[0] + 0.25 * box[2], box[1] + 40)
    page.until(f"{cut} !== {json.dumps(before)}", 10)
    assert page.errors == []
