"""What our scripts show in the page, in classic nodes and in Nodes 2.0: the token line, the wipe, previews.

COMFYUI_FRONTENDS: static folders of further frontends to test with this ComfyUI, besides the one it comes with.
"""

import contextlib
import json
import os
import urllib.error
from pathlib import Path

import pytest

pytestmark = pytest.mark.once_per_core
READY = "!!(window.app && window.app.extensionManager && window.LiteGraph.registered_node_types.DCGenApply)"
EMPTY = {"nodes": [], "links": [], "groups": [], "version": 0.4, "last_node_id": 0, "last_link_id": 0}
WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
FRONTENDS = [None, *filter(None, os.environ.get("COMFYUI_FRONTENDS", "").split(os.pathsep))]

# Functions of the page. `made`: the nodes of the graph by their names in a test.
FUNCTIONS = """
window.put = (nodes, links) => {
  window.made = {};
  let x = 80;
  for (const [key, [type, values = {}]] of Object.entries(nodes)) {
    const node = LiteGraph.createNode(type);
    node.pos = [x, 150];
    x += node.size[0] + 60;
    app.graph.add(node);
    made[key] = node;
    for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
  }
  for (const link of links) join(...link);
};
window.join = (from, slot, to, name) =>
  void made[from].connect(slot, made[to], made[to].inputs.findIndex((input) => input.name === name));
// As the page's own widgets do when a user has typed or chosen.
window.choose = (key, name, value) => {
  const widget = made[key].widgets.find((w) => w.name === name);
  widget.value = value;
  widget.callback?.(value, app.canvas, made[key]);
};
window.nest = (...keys) => {
  const { subgraph, node } = app.graph.convertToSubgraph(new Set(keys.map((key) => made[key])));
  made.nested = node;
  for (const key of keys) made[key] = subgraph.nodes.find((n) => n.type === made[key].type);
};
// The element of ours that a user sees on a node, or undefined.
window.seen = (key, css) => {
  const around = LiteGraph.vueNodesMode
    ? [document.querySelector(`[data-node-id="${made[key].id}"]`)]
    : (made[key].widgets ?? []).map((widget) => widget.element?.parentElement);
  const drawn = around.map((element) => element?.querySelector(css)).find((element) => element);
  return drawn?.isConnected && drawn.getBoundingClientRect().width ? drawn : undefined;
};
window.told = (key) => seen(key, ".dcgen-tokens")?.textContent;
window.pictures = (key) => [...(seen(key, ".dcgen-wipe")?.querySelectorAll("img") ?? [])]
  .filter((i) => i.complete && i.naturalWidth).map((i) => new URL(i.src).searchParams.get("filename"));
// Whether an output node of core's shows a picture.
window.pictures_of = (key) => LiteGraph.vueNodesMode
  ? !!document.querySelector(`[data-node-id="${made[key].id}"] img`)?.naturalWidth : !!made[key].imgs?.length;
window.store = (name) => document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia._s.get(name);
"""
# The server remembers both for the pages after this one; the panel lies over a quarter of them.
TIDY = """
await app.extensionManager.setting.set("Comfy.VueNodes.Enabled", false);
if (store("rightSidePanel")?.isOpen) await app.extensionManager.setting.set("Comfy.RightSidePanel.IsOpen", false);
"""


class Page:
    """A page of one frontend in one way of drawing nodes."""

    def __init__(self, browser, url, mode):
        self.browser, self.mode = browser, mode
        browser.open(url)
        browser.until(READY, 120)
        nodes2 = json.dumps(mode == "nodes2")
        # Without the second, the browser asks at the next page whether to leave unsaved work, and waits.
        for name, value in (("VueNodes.Enabled", nodes2), ("Window.UnloadConfirmation", "false")):
            self.js(f"app.extensionManager.setting.set('Comfy.{name}', {value})")
        browser.until(f"!!LiteGraph.vueNodesMode === {nodes2}")
        self.js(FUNCTIONS)

    def js(self, expression):
        return self.browser.js(expression)

    def run(self, statements):
        """Statements whose value is of no interest (nor small enough to be handed out)."""
        self.js(f"(async () => {{ {statements} }})()")

    def until(self, expression, seconds=20):
        return self.browser.until(expression, seconds)

    def load(self, graph, name="test"):
        """Open a graph and wait until its nodes are drawn where they stay."""
        self.js(f"app.loadGraphData({json.dumps(graph)}, true, true, {json.dumps(name)})")
        self.settle()

    def settle(self):
        """Two equal looks at the view, a frame apart: a page that has just opened a graph still moves it."""
        look = (
            "JSON.stringify([app.canvas.ds.offset, app.canvas.ds.scale,"
            "[...document.querySelectorAll('[data-node-id]')]"
            ".map((e) => [e.offsetWidth, e.offsetHeight, e.style.transform])])"
        )
        frames = "new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))"
        self.until(f"(async () => {{ const before = {look}; await {frames}; return before === {look}; }})()")

    def put(self, nodes, links):
        """A new graph: nodes {key: [type, {widget: value}]}, links [(key, output, key, input)]."""
        self.browser.errors.clear()
        self.load(EMPTY)
        self.run(f"put({json.dumps(nodes)}, {json.dumps(links)})")
        self.run("app.canvas.ds.scale = 0.7; app.canvas.ds.offset = [0, 0]; app.canvas.draw(true, true)")

    def away_and_back(self):
        """Open a new tab, and go back to this one."""
        command = "app.extensionManager.command.execute"
        self.run(f"window.mine = store('workflow').activeWorkflow.path; await {command}('Comfy.NewBlankWorkflow')")
        self.until("store('workflow').activeWorkflow.path !== mine && !app.graph.nodes.length")
        self.settle()
        self.run(f"await {command}('Workspace.PreviousOpenedWorkflow')")
        self.until("store('workflow').activeWorkflow.path === mine && app.graph.nodes.length")

    def queue(self):
        """Run the graph; waits for its end.

        Again where all was done before the page knew that it had queued it: other tabs then do not keep what came out.
        """
        before = "fetch('/history').then((r) => r.json()).then((h) => Object.keys(h).length)"
        for _ in range(10):
            count = self.js(before)
            self.run("app.queuePrompt(0, 1)")
            self.until(f"{before}.then((now) => now > {count})", 120)
            with contextlib.suppress(TimeoutError):
                self.until("Object.keys(store('workflow').activeWorkflow.changeTracker.nodeOutputs ?? {}).length", 1)
                return
        raise TimeoutError("the page never kept what its graph gave out")


@pytest.fixture(scope="module", params=FRONTENDS, ids=lambda root: "newer" if root else "pinned")
def site(request, server, comfy, tmp_path_factory):
    """A server with that frontend."""
    if request.param is None:
        yield server
        return
    flags = ("--front-end-root", request.param)
    running = type(server)(comfy, tmp_path_factory.mktemp("frontend") / "base", flags)
    yield running
    running.close()


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def page(request, site, browser):
    opened = Page(browser, site.url, request.param)
    yield opened
    opened.run(TIDY)


BASE, ADAPTER = "toy/flux-base", "toy-flux-dcgen.safetensors"
SIZE = {"width": 128, "height": 128}
CHAIN = {
    "loader": ["DCGenReleaseLoader", {"release": BASE}],
    "apply": ["DCGenApply", {"adapter_name": ADAPTER}],
    "empty": ["DCGenEmptyLatent", SIZE],
    "sampler": ["DCGen4KSampler", {}],
}
LINKS = [("loader", 0, "apply", "model"), ("apply", 0, "empty", "model"), ("apply", 0, "sampler", "model")]
LINKS += [("empty", 0, "sampler", "latent")]
DEEP, FLAT = "128 x 128 = 16 tokens, 4x fewer than f8", "128 x 128 = 64 tokens"
UNKNOWN = "tokens: depends on what is linked"
NO_MODEL = "connect a model to count tokens"
SETTER = """
class Get extends LiteGraph.LGraphNode {
  constructor() { super("Get"); this.isVirtualNode = true; this.addOutput("MODEL", "MODEL"); }
}
if (!LiteGraph.registered_node_types.TestGet) LiteGraph.registerNodeType("TestGet", Get);
made.get = LiteGraph.createNode("TestGet");
app.graph.add(made.get);
join("get", 0, "empty", "model");
"""

# What a user does to CHAIN, and the lines of `empty` and `sampler` after it. What follows THEN is done once the page
# has drawn what came before, as a hand would.
THEN = "// then: "
LINES = {
    "as built": ("", DEEP, DEEP),
    "a width is typed": ("choose('empty', 'width', 256)", *["256 x 128 = 32 tokens, 4x fewer than f8"] * 2),
    "a width that does not fit": (
        "choose('empty', 'width', 144)",
        *["144 x 128: this model needs multiples of 32"] * 2,
    ),
    "a size is chosen": (
        "choose('empty', 'size', '1K: 1024 x 1024')",
        *["1024 x 1024 = 1,024 tokens, 4x fewer than f8"] * 2,
    ),
    "the model is cut off": ("made.empty.disconnectInput(0); made.sampler.disconnectInput(0)", NO_MODEL, NO_MODEL),
    "another model is connected": ("join('loader', 0, 'empty', 'model')", FLAT, DEEP),
    "the latent is cut off": (
        "made.sampler.disconnectInput(2); choose('sampler', 'width', 128); choose('sampler', 'height', 128);"
        "choose('sampler', 'size', 'width x height')",
        DEEP,
        DEEP,
    ),
    "the adapter is bypassed": ("made.apply.mode = 4; app.graph.change(); captured()", FLAT, FLAT),
    "the adapter is muted": ("made.apply.mode = 2; app.graph.change(); captured()", UNKNOWN, UNKNOWN),
    "the loaders are in a subgraph": ("nest('loader', 'apply'); captured()", DEEP, DEEP),
    "the latent is in a subgraph": ("nest('empty'); captured()", None, DEEP),
    "the loader is outside": (
        "nest('empty', 'sampler'); captured(); // then: app.canvas.setGraph(made.nested.subgraph)",
        DEEP,
        DEEP,
    ),
    "the subgraph is used twice": (
        "nest('empty', 'sampler'); app.graph.add(LiteGraph.createNode(made.nested.type)); captured();"
        "// then: app.canvas.setGraph(made.nested.subgraph)",
        UNKNOWN,
        UNKNOWN,
    ),
    "a reroute is between": (
        "made.way = LiteGraph.createNode('Reroute'); app.graph.add(made.way);"
        "made.apply.connect(0, made.way, 0); made.way.connect(0, made.empty, 0)",
        DEEP,
        DEEP,
    ),
    "a Get node is between": (SETTER, UNKNOWN, DEEP),
    "the width is linked": (
        "made.number = LiteGraph.createNode('PrimitiveInt'); app.graph.add(made.number);"
        "join('number', 0, 'empty', 'width')",
        UNKNOWN,
        UNKNOWN,
    ),
    "a checkpoint of any kind": (
        "made.other = LiteGraph.createNode('CheckpointLoaderSimple'); app.graph.add(made.other);"
        "join('other', 0, 'empty', 'model')",
        UNKNOWN,
        DEEP,
    ),
}
# The page notices what was done without a hand when a mouse button is let go.
CAPTURED = "window.captured = () => window.dispatchEvent(new MouseEvent('mouseup'))"


@pytest.mark.parametrize("case", LINES)
def test_token_line(page, case):
    done, empty, sampler = LINES[case]
    page.put(CHAIN, LINKS)
    page.until(f"told('empty') === {json.dumps(DEEP)} && told('sampler') === {json.dumps(DEEP)}")
    page.js(CAPTURED + "; 0")
    for step in done.split(THEN):
        page.run(step)
        page.settle()
    for key, line in (("empty", empty), ("sampler", sampler)):
        if line is not None:
            assert settled(page, f"told('{key}')", line) == line
    assert page.browser.errors == []


# Widgets of `sampler` that are grey after what a user does to CHAIN, of those that ever are.
SIZES = ["size", "width", "height", "batch_size"]
GREY = {
    "as built": ("", [*SIZES, "cfg"]),
    "the latent is cut off": ("made.sampler.disconnectInput(2)", ["width", "height", "cfg"]),
    "numbers count": (
        "made.sampler.disconnectInput(2); // then: choose('sampler', 'size', 'width x height')",
        ["cfg"],
    ),
    "a negative is connected": (
        "made.text = LiteGraph.createNode('CLIPTextEncode'); app.graph.add(made.text);"
        "join('text', 0, 'sampler', 'negative')",
        SIZES,
    ),
    "a model without guidance": (
        "choose('loader', 'release', 'toy/sana-base'); made.apply.mode = 4; app.graph.change(); captured()",
        [*SIZES, "cfg", "guidance"],
    ),
}
NAMES = "['size', 'width', 'height', 'batch_size', 'cfg', 'guidance', 'steps']"
IS_GREY = f"{NAMES}.filter((name) => made.sampler.widgets.find((w) => w.name === name).disabled)"
WHY = "made.sampler.widgets.filter((w) => w.disabled).every((w) => w.tooltip.startsWith('No effect now: '))"


@pytest.mark.parametrize("case", GREY)
def test_widgets_without_effect_are_grey(page, case):
    done, grey = GREY[case]
    page.put(CHAIN, LINKS)
    page.js(CAPTURED + "; 0")
    page.until(f"told('sampler') === {json.dumps(DEEP)}")
    for step in done.split(THEN):
        page.run(step)
        page.settle()
    assert settled(page, IS_GREY, grey) == grey
    assert page.js(WHY)
    values = page.js("made.sampler.widgets.filter((w) => w.disabled).map((w) => w.value).filter((v) => v == null)")
    assert values == [], "a grey widget keeps its value"
    assert page.browser.errors == []


@pytest.mark.parametrize(
    ("template", "lines"),
    [
        ("dcgen_toy", []),
        (
            "dcgen_flux_4k",
            ["hf download dc-ai/DC-Gen-FLUX.1-Krea-Dev-Res4K --local-dir models/diffusers/DC-Gen-FLUX.1"],
        ),
        (
            "dcgen_flux_4k_adapter",
            ["models/model_patches", "hf download dc-ai/dc-ae-1.5-f64c128-diffusers --local-dir models/vae/dc-ae-1.5"],
        ),
        ("sana_1k", ["hf download Efficient-Large-Model/"]),
    ],
)
def test_missing_models_are_said_when_a_template_is_opened(page, template, lines):
    """With the command that downloads them: not only at Run, as a value that is not in a list."""
    graph = json.loads((WORKFLOWS / f"{template}.json").read_text())
    page.load(EMPTY)
    page.until("!document.body.innerText.includes('not installed')")
    page.load(graph, template)
    said = "[...document.querySelectorAll('.p-toast-detail')].map((e) => e.textContent).join(' ')"
    for line in lines:
        page.until(f"{said}.includes({json.dumps(line)})")
    assert ("not installed" in page.js("document.body.innerText")) is bool(lines)
    assert page.browser.errors == []
    page.load(EMPTY)  # another graph misses nothing
    page.until("!document.body.innerText.includes('not installed')")


def test_missing_models_are_not_said_once_they_are_there(page):
    page.load(json.loads((WORKFLOWS / "dcgen_flux_4k.json").read_text()), "dcgen_flux_4k")
    page.until("document.body.innerText.includes('not installed')")
    page.run(
        "for (const node of app.graph.nodes.filter((n) => n.comfyClass === 'DCGenReleaseLoader'))"
        " node.widgets.find((w) => w.name === 'release').value = 'toy/flux-base'"
    )
    page.run("app.refreshComboInNodes()")
    page.until("!document.body.innerText.includes('not installed')")
    assert page.browser.errors == []


def test_an_image_without_effect_is_said(page):
    page.put({**CHAIN, "image": ["EmptyImage", {}]}, LINKS)
    page.js(CAPTURED + "; 0")
    page.run("join('image', 0, 'sampler', 'image')")
    wanted = "the image has no effect at denoise 1"
    assert settled(page, "told('sampler')", wanted) == wanted
    page.run("choose('sampler', 'denoise', 0.4)")
    assert settled(page, "told('sampler')", DEEP) == DEEP


def settled(page, expression, wanted):
    """The expression's value once it is what is wanted, else what it is after the wait."""
    with contextlib.suppress(TimeoutError):
        page.until(f"JSON.stringify({expression}) === JSON.stringify({json.dumps(wanted)})", 6)
    return page.js(expression)


PAIR = {
    "one": ["EmptyImage", {"width": 64, "height": 48, "batch_size": 1, "color": 255}],
    "three": ["EmptyImage", {"width": 64, "height": 48, "batch_size": 3, "color": 65280}],
    "compare": ["DCGenCompare", {}],
}
PAIR_LINKS = [("one", 0, "compare", "image_a"), ("three", 0, "compare", "image_b")]
BOTH_SHOWN = "pictures('compare').length === 2"
BACK = "seen('compare', '.dcgen-wipe button')"


@pytest.fixture
def compared(page):
    """The page with a comparison of one image with a batch of three, run."""
    page.put(PAIR, PAIR_LINKS)
    page.js(CAPTURED + "; 0")
    page.run("choose('one', 'color', Math.floor(Math.random() * 1e6))")  # nothing is run that was run before
    page.queue()
    page.until(BOTH_SHOWN)
    yield page
    assert page.browser.errors == []


def test_wipe_shows_every_pair(compared):
    first = compared.js("pictures('compare')")
    seen = []
    for number in (1, 2, 3):
        assert compared.js(f"{BACK}.textContent") == f"{number} / 3"
        seen.append(compared.js("pictures('compare')"))
        compared.run(f"{BACK}.click()")
        before = f"JSON.stringify({json.dumps(seen[-1])})"
        compared.until(f"{BOTH_SHOWN} && JSON.stringify(pictures('compare')) !== {before}")
    assert compared.js("pictures('compare')") == first, "after the last pair comes the first"
    (upper, lower) = zip(*[(a, b) for b, a in seen], strict=True)
    assert len(set(upper)) == 1, "the single image stands against each of the batch"
    assert len(set(lower)) == 3


def test_wipe_follows_the_pointer(compared):
    box = "seen('compare', '.dcgen-wipe')"
    for share in (0.25, 0.75):
        compared.browser.mouse("mouseMoved", *compared.browser.reach(box, [share]))
        compared.until(f"Math.abs({box}.getAttribute('aria-valuenow') - {100 * share}) <= 1")
        cut = compared.js(f"getComputedStyle({box}.querySelectorAll('img')[1]).clipPath")
        assert abs(float(cut.split()[1].rstrip("%")) - (100 - 100 * share)) < 1.5, cut


@pytest.mark.parametrize("size", [(360, 380), (520, 700)])
def test_wipe_fills_its_node(compared, size):
    """Below the sockets, down to the node's lower edge but for a margin and, in Nodes 2.0, the pack's badge."""
    if compared.mode == "nodes2" and compared.js("window.__COMFYUI_FRONTEND_VERSION__ < '1.4'"):
        pytest.skip("Nodes 2.0 of the first frontends gives an element its least height, whatever the node's")
    compared.run(f"made.compare.setSize({list(size)}); app.canvas.draw(true, true)")
    compared.settle()
    box = compared.js(
        "(() => { const r = seen('compare', '.dcgen-wipe').getBoundingClientRect(), s = app.canvas.ds.scale;"
        "return [r.width / s, r.height / s]; })()"
    )
    real = compared.js("[...made.compare.size]")
    assert box[0] > real[0] - 50, (box, real)
    assert box[1] > real[1] - 130, (box, real)


def test_wipe_after_undo(compared):
    pictures = compared.js("pictures('compare')")
    compared.run("captured(); made.one.pos = [90, 400]; captured()")
    compared.run("made.compare = null; await app.extensionManager.command.execute('Comfy.Undo')")
    compared.until("!!(made.compare = app.graph.nodes.find((n) => n.type === 'DCGenCompare'))")
    assert settled(compared, "pictures('compare')", pictures) == pictures


def test_wipe_after_another_tab(compared):
    pictures = compared.js("pictures('compare')")
    compared.away_and_back()
    compared.until("!!(made.compare = app.graph.nodes.find((n) => n.type === 'DCGenCompare'))")
    assert settled(compared, "pictures('compare')", pictures) == pictures


def test_wipe_of_a_job_from_the_history(compared):
    pictures = compared.js("pictures('compare')")
    compared.load(EMPTY, "other")
    compared.run("await store('queue').update()")
    compared.run("await store('queue').historyTasks[0].loadWorkflow(app)")
    compared.until("!!(made.compare = app.graph.nodes.find((n) => n.type === 'DCGenCompare'))")
    assert settled(compared, "pictures('compare')", pictures) == pictures


def test_wipe_in_a_subgraph(page):
    page.put(PAIR, PAIR_LINKS)
    page.js(CAPTURED + "; 0")
    page.run("choose('one', 'color', Math.floor(Math.random() * 1e6)); nest('one', 'compare')")
    page.queue()
    page.run("app.canvas.openSubgraph(made.nested.subgraph, made.nested); app.canvas.ds.scale = 0.7")
    assert settled(page, BOTH_SHOWN, True)
    page.run("app.canvas.setGraph(app.rootGraph ?? app.graph)")
    page.away_and_back()
    page.run(
        "const node = app.graph.nodes.find((n) => n.subgraph); app.canvas.openSubgraph(node.subgraph, node);"
        "made.compare = node.subgraph.nodes.find((n) => n.type === 'DCGenCompare'); app.canvas.ds.scale = 0.7"
    )
    assert settled(page, BOTH_SHOWN, True)
    assert page.browser.errors == []


FOLDER = Path(__file__).resolve().parents[2] / "workflows"
TEMPLATES = sorted(file.stem for file in FOLDER.glob("*.json"))
# [id, type, left, top, right, bottom] of every node as it is drawn, in the graph's units. Titles are part of a node.
BOXES = """
(() => {
  const view = app.canvas.ds, area = app.canvas.canvas.getBoundingClientRect();
  return app.graph.nodes.map((node) => {
    if (!LiteGraph.vueNodesMode) {
      const [x, y, width, height] = node.getBounding();
      return [node.id, node.type, x, y, x + width, y + height];
    }
    const r = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect();
    const x = (r.left - area.left) / view.scale - view.offset[0], y = (r.top - area.top) / view.scale - view.offset[1];
    return [node.id, node.type, x, y, x + r.width / view.scale, y + r.height / view.scale];
  });
})()
"""
LINKS_OF = "[...app.graph.links.values()].map((link) => [link.origin_id, link.target_id])"
# How far the text of each note reaches below what is shown of it.
HIDDEN = """
app.graph.nodes.filter((node) => node.type === "MarkdownNote").map((node) => {
  const root = LiteGraph.vueNodesMode ? document.querySelector(`[data-node-id="${node.id}"]`) : node.widgets[0].element;
  const box = root.querySelector("h2").parentElement;
  return box.scrollHeight - box.clientHeight;
})
"""


@pytest.mark.parametrize("name", TEMPLATES)
def test_template(page, name):
    """Every node is known, none lies on another, links lead to the right, the note is whole, sizes are kept."""
    graph = json.loads((FOLDER / f"{name}.json").read_text())
    page.browser.errors.clear()
    page.load(graph, name)
    assert page.js("app.graph.nodes.filter((n) => !LiteGraph.registered_node_types[n.type]).map((n) => n.type)") == []
    boxes = page.js(BOXES)
    for i, (number, kind, *box) in enumerate(boxes):
        for other, other_kind, *that in boxes[:i]:
            apart = box[0] >= that[2] or that[0] >= box[2] or box[1] >= that[3] or that[1] >= box[3]
            assert apart, f"{kind} {number} and {other_kind} {other}: {box}, {that}"
    place = {str(number): box for number, _, *box in boxes}
    for start, end in page.js(LINKS_OF):
        assert place[str(start)][2] < place[str(end)][0], f"the link from {start} to {end} goes back"
    assert all(more <= 1 for more in page.js(HIDDEN)), "text of a note is hidden"
    if page.mode == "classic":
        kept = page.js("app.graph.serialize().nodes.map((n) => [n.id, ...n.size])")
        wanted = {node["id"]: list(node["size"]) for node in graph["nodes"]}
        assert {number: [*size] for number, *size in kept} == wanted
    assert page.browser.errors == []


ROUND_TRIP = {
    "image": ["EmptyImage", {"width": 64, "height": 2048, "batch_size": 1, "color": 255}],
    "vae": ["DCAELoader", {"vae_name": "toy/dc-ae-f32"}],
    "encode": ["DCAEEncode", {}],
    "decode": ["DCAEDecode", {"strip": 4}],
    "shown": ["PreviewImage", {}],
}
ROUND_TRIP_LINKS = [("image", 0, "encode", "image"), ("vae", 0, "encode", "vae"), ("encode", 0, "decode", "samples")]
ROUND_TRIP_LINKS += [("vae", 0, "decode", "vae"), ("decode", 0, "shown", "images")]
PREVIEWED = "made.decode.imgs?.length"


def test_preview_of_decoding_goes_away(page):
    """It is shown while the node works, and leaves no trace: neither a picture nor a taller node."""
    if page.mode == "nodes2":
        pytest.skip("here the frontend keeps a preview until the node runs again, and offers no way to take it away")
    page.put(ROUND_TRIP, ROUND_TRIP_LINKS)
    page.run("choose('image', 'color', Math.floor(Math.random() * 1e6))")
    size = page.js("[...made.decode.size]")
    page.run(f"window.had = 0; window.watched = setInterval(() => {{ if ({PREVIEWED}) had++; }}, 5)")
    try:
        page.queue()
        page.until("pictures_of('shown')")
        page.until(f"!({PREVIEWED})", 10)
    finally:
        page.run("clearInterval(watched)")
    assert page.js("had") > 0, "no preview was shown"
    assert page.js("[...made.decode.size]") == size
    assert page.js("made.decode.widgets.map((w) => w.name)") == ["strip"]
    assert page.browser.errors == []


BLUEPRINTS = sorted((FOLDER.parent / "subgraphs").glob("*.json"))


@pytest.fixture
def listed(site):
    """The blueprints of this pack that the server lists: {name: id}. Older cores list none."""
    try:
        found = site.get("/global_subgraphs")
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI has no blueprints")
    mine = {key: entry for key, entry in found.items() if entry["info"]["node_pack"].endswith("ComfyUI-DC-Gen")}
    return {entry["name"]: key for key, entry in mine.items()}


def dropped(page, site, key):
    """Add a blueprint to an empty graph, as the page does when it is dropped out of the library: `made.nested`."""
    page.browser.errors.clear()
    page.load(EMPTY)
    data = json.loads(site.get(f"/global_subgraphs/{key}")["data"])
    items = {"nodes": data["nodes"], "subgraphs": data["definitions"]["subgraphs"], "links": []}
    items |= {"groups": [], "reroutes": []}
    page.run(f"app.canvas._deserializeItems({json.dumps(items)}, {{ position: [100, 150] }})")
    page.until("app.graph.nodes.length === 1")
    page.run("window.made = { nested: app.graph.nodes[0] }")
    for kind, name in {"DCGenApply": "apply", "DCAELoader": "vae", "DCGen4KSampler": "sampler"}.items():
        page.run(f"made.{name} = made.nested.subgraph.nodes.find((n) => n.type === '{kind}')")


@pytest.mark.parametrize("file", BLUEPRINTS, ids=lambda file: file.stem)
def test_blueprint(page, site, listed, file):
    """Listed by the server; in the page all its nodes are known, and its widgets say what the file says."""
    dropped(page, site, listed[file.stem])
    inside = json.loads(file.read_text())["definitions"]["subgraphs"][0]
    types = page.js("made.nested.subgraph.nodes.map((n) => n.type)")
    assert types == [node["type"] for node in inside["nodes"]]
    assert page.js(f"{json.dumps(types)}.filter((type) => !LiteGraph.registered_node_types[type])") == []
    assert page.js("made.nested.inputs.map((i) => i.name)") == [one["name"] for one in inside["inputs"]]
    assert page.js("made.nested.outputs.map((o) => o.name)") == [one["name"] for one in inside["outputs"]]
    assert page.js("made.nested.title") == file.stem
    widgets = page.js("Object.fromEntries(made.nested.widgets.map((w) => [w.name, w.value]))")
    for one in inside["inputs"]:
        (link,) = (link for link in inside["links"] if link["id"] == one["linkIds"][0])
        target = next(node for node in inside["nodes"] if node["id"] == link["target_id"])
        if "widget" in target["inputs"][link["target_slot"]]:
            assert widgets[one["name"]] in target["widgets_values"]
    assert page.browser.errors == []


def test_blueprint_of_the_round_trip_runs(page, site, listed):
    dropped(page, site, listed["DC-AE round trip"])
    page.run(
        "for (const [name, type] of [['image', 'EmptyImage'], ['shown', 'PreviewImage']])"
        "{ made[name] = LiteGraph.createNode(type); app.graph.add(made[name]); }"
        "choose('image', 'color', Math.floor(Math.random() * 1e6)); choose('image', 'width', 96);"
        "choose('image', 'height', 64); join('image', 0, 'nested', 'image'); join('nested', 0, 'shown', 'images')"
    )
    page.queue()
    page.until("pictures_of('shown')")
    assert page.browser.errors == []


def test_blueprint_of_the_adapter_runs(page, site, listed):
    """On the toy, whose sizes the line inside it tells."""
    dropped(page, site, listed["FLUX to 4K (adapter)"])
    values = {"adapter_name": ADAPTER, "vae_name": "toy/dc-ae-f32", "size": "width x height", "steps": 2, **SIZE}
    page.run(
        "for (const [name, type] of [['loader', 'DCGenReleaseLoader'], ['shown', 'PreviewImage']])"
        "{ made[name] = LiteGraph.createNode(type); app.graph.add(made[name]); }"
        f"choose('loader', 'release', '{BASE}'); join('loader', 0, 'nested', 'model');"
        "join('loader', 1, 'nested', 'clip'); join('nested', 0, 'shown', 'images');"
        f"for (const [name, value] of Object.entries({json.dumps(values)})) choose('nested', name, value)"
    )
    page.queue()
    page.until("pictures_of('shown')")
    assert page.browser.errors == []


HELP = sorted((FOLDER.parent / "web" / "docs").glob("*.md"))
OPEN_HELP = """
app.graph.clear();
const node = LiteGraph.createNode(NAME);
node.pos = [300, 200];
app.graph.add(node);
app.canvas.selectNode(node);
if (store("nodeHelp")) {  // older frontends: a page of the node library
  if (store("sidebarTab").activeSidebarTabId !== "node-library")
    await app.extensionManager.command.execute("Workspace.ToggleSidebarTab.node-library");
  store("nodeHelp").openHelp(store("nodeDef").nodeDefsByName[NAME]);
} else store("rightSidePanel").openPanel("info");
"""
HELPED = """
(() => {
  const page = document.querySelector(".node-help-content") ?? document.querySelector(".markdown-content");
  const images = [...(page?.querySelectorAll("img") ?? [])];
  return page?.textContent.includes(TITLE) && images.length && images.every((i) => i.complete && i.naturalWidth);
})()
"""


@pytest.mark.parametrize("file", HELP, ids=lambda file: file.stem)
def test_help_page(page, file):
    """It opens in the page's own panel, with its picture."""
    page.browser.errors.clear()
    page.load(EMPTY)  # a page that has just come up would close the panel again
    title = file.read_text().splitlines()[0].removeprefix("# ")
    page.run(OPEN_HELP.replace("NAME", json.dumps(file.stem)))
    page.until(HELPED.replace("TITLE", json.dumps(title)))
    assert page.browser.errors == []
