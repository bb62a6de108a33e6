"""A workflow as described in jobs.py: nodes and links, without positions or sizes."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

HUB = "https://huggingface.co"

# Files that ComfyUI offers to download: name -> (folder in models/, URL, sha256 if known).
FILES = {
    "flux1-krea-dev_fp8_scaled.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/FLUX.1-Krea-dev_ComfyUI/resolve/main/split_files/diffusion_models/"
        "flux1-krea-dev_fp8_scaled.safetensors",
        "b17a8c21703c4d6ffb0e300dd920eff3cfd35c9a72a1abaf107e3788e408b8d8",
    ),
    "svdq-int4_r32-flux.1-krea-dev.safetensors": (
        "diffusion_models",
        f"{HUB}/nunchaku-tech/nunchaku-flux.1-krea-dev/resolve/main/svdq-int4_r32-flux.1-krea-dev.safetensors",
        None,
    ),
    "clip_l.safetensors": (
        "text_encoders",
        f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors",
        "660c6f5b1abae9dc498ac2d21e1347d2abdb0cf6c0c0c8576cd796491d9a6cdd",
    ),
    "t5xxl_fp16.safetensors": (
        "text_encoders",
        f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
        "6e480b09fae049a72d2a8c5fbccb8d3e92febeb233bbe9dfe7256958a9167635",
    ),
    "flux-2-klein-4b.safetensors": (
        "diffusion_models",
        f"{HUB}/black-forest-labs/FLUX.2-klein-4B/resolve/main/flux-2-klein-4b.safetensors",
        None,
    ),
    "z_image_turbo_bf16.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files/diffusion_models/z_image_turbo_bf16.safetensors",
        None,
    ),
    "qwen_3_4b.safetensors": (
        "text_encoders",
        f"{HUB}/Comfy-Org/vae-text-encorder-for-flux-klein-4b/resolve/main/split_files/text_encoders/"
        "qwen_3_4b.safetensors",
        None,
    ),
    "ae.safetensors": (
        "vae",
        f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
        "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38",
    ),
}

# Nodes of other packs as in /object_info, so that graphs with them can be written without the pack.
FOREIGN = {
    "NunchakuFluxDiTLoader": {
        "input": {
            "required": {
                "model_path": [["svdq-int4_r32-flux.1-krea-dev.safetensors"], {}],
                "cache_threshold": ["FLOAT", {"default": 0, "min": 0, "max": 1, "step": 0.001}],
                "attention": [["nunchaku-fp16", "flash-attention2"], {"default": "nunchaku-fp16"}],
                "cpu_offload": [["auto", "enable", "disable"], {"default": "auto"}],
                "device_id": ["INT", {"default": 0, "min": 0, "max": 0}],
                "data_type": [["bfloat16", "float16"], {"default": "bfloat16"}],
            },
            "optional": {"i2f_mode": [["enabled", "always"], {"default": "enabled"}]},
        },
        "name": "NunchakuFluxDiTLoader",
        "display_name": "Nunchaku FLUX DiT Loader",
        "description": "",
        "category": "Nunchaku",
        "output": ["MODEL"],
        "output_is_list": [False],
        "output_name": ["MODEL"],
        "output_node": False,
        "python_module": "custom_nodes.ComfyUI-nunchaku",
    }
}
# The pack that the frontend and ComfyUI-Manager offer for a missing node.
PACKS = {"NunchakuFluxDiTLoader": {"cnr_id": "ComfyUI-nunchaku", "aux_id": "nunchaku-tech/ComfyUI-nunchaku"}}
SOCKETS = {
    "MODEL",
    "CLIP",
    "VAE",
    "CONDITIONING",
    "LATENT",
    "IMAGE",
    "MASK",
    "SIGMAS",
    "GUIDER",
    "NOISE",
    "SAMPLER",
    "*",
}

WIDTH = 270  # default of a node
NARROW = 230  # of a node with little text
NOTE = 860
ACROSS = 40  # between columns
DOWN = 80  # between nodes of one column: a title bar, and what Nodes 2.0 shows below a node
TALLEST = 1080  # what the page can show at a readable size
INSIDE, OUTSIDE = -10, -20  # node ids of a subgraph's inputs and outputs, in links


@dataclass(frozen=True)
class Outer:
    """An input of a blueprint that an inner node takes; value: the default of its widget."""

    name: str
    value: object = None


def legible(note: str) -> str:
    """A note's Markdown with bold in place of code within a line: on a note's background Nodes 2.0 draws code in a blue
    that nobody can read. Blocks of code stay.
    """
    return re.sub(r"(?<!`)`([^`\n]+)`(?!`)", r"**\1**", note)


class Workflow:
    """Nodes and links of one graph. A node is placed in the first column to the right of all its sources."""

    def __init__(self, title: str, note: str = "", width: int = WIDTH):
        self.title, self.width = title, width
        self.nodes: list[dict] = []
        if note:
            self.node("MarkdownNote", box=(NOTE, 0), title=title, text=legible(note))

    def node(
        self, kind: str, box: tuple[int, int] | None = None, column: int = 0, title: str = "", **inputs
    ) -> Callable:
        """Add a node; inputs are widget values or outputs of other nodes. box: its minimum width and height; column:
        the leftmost column for it; title: instead of the kind's, to tell two of a kind apart.

        Returns output(slot), the input value for other nodes.
        """
        number = len(self.nodes) + 1
        feeding = [self.nodes[value[0] - 1]["column"] for value in inputs.values() if isinstance(value, tuple)]
        column = max(column, *(before + 1 for before in feeding)) if feeding else column
        box = box or (NARROW if kind.endswith("Decode") else self.width, 0)
        spec = {"id": number, "kind": kind, "column": column, "box": box, "inputs": inputs}
        self.nodes.append({**spec, "title": title} if title else spec)
        return lambda slot=0: (number, slot)

    def places(self, heights: dict[int, float]) -> dict[int, tuple[list[int], list[int]]]:
        """{node id: (position, size)}: columns from left to right, with their nodes below each other; the note on top.

        When that is too tall, the columns to the right of the note start at its top.
        """
        for spec in self.nodes:
            spec["size"] = [spec["box"][0], round(max(spec["box"][1], heights[spec["id"]]))]
        notes = [spec for spec in self.nodes if spec["kind"] == "MarkdownNote"]
        above = max((spec["size"][1] + DOWN for spec in notes), default=0)
        columns = self._columns()
        tall = above - DOWN + max(sum(spec["size"][1] + DOWN for spec in column) for column in columns) > TALLEST
        places, x = {spec["id"]: ([0, -above], spec["size"]) for spec in notes}, 0
        for column in columns:
            y = -above if tall and notes and x >= NOTE + ACROSS else 0
            for spec in column:
                places[spec["id"]] = ([x, y], spec["size"])
                y += spec["size"][1] + DOWN
            x += max(spec["size"][0] for spec in column) + ACROSS
        return places

    def _columns(self) -> list[list[dict]]:
        drawn = [spec for spec in self.nodes if spec["kind"] != "MarkdownNote"]
        last = max((spec["column"] for spec in drawn), default=-1)
        return [[spec for spec in drawn if spec["column"] == column] for column in range(last + 1)]

    def ui(self, kinds: dict, places: dict[int, tuple[list[int], list[int]]] | None = None) -> dict:
        """The graph for the page; `kinds` is /object_info. Without places the nodes are far apart, to measure them."""
        nodes: list[dict] = []
        links: list[list] = []
        for spec in self.nodes:
            node = _node(self.title, spec, kinds.get(spec["kind"]), links)
            far = ([800 * spec["column"], 1500 * spec["id"]], [spec["box"][0], 10])
            node["pos"], node["size"] = (places or {}).get(spec["id"], far)
            nodes.append(node)
        for link in links:
            nodes[link[1] - 1]["outputs"][link[2]]["links"].append(link[0])
        ends = {"last_node_id": len(nodes), "last_link_id": len(links), "groups": [], "config": {}, "extra": {}}
        return {"nodes": nodes, "links": links, "version": 0.4, **ends}


def _node(title: str, spec: dict, kind: dict | None, links: list) -> dict:
    """A node for the frontend, without a position; adds its input links to `links`."""
    sockets: list[dict] = []
    widgets: list = []
    names = list(_inputs(kind)) if kind else [("text", "STRING", {})]
    for name, type_, options in names:
        value = spec["inputs"].get(name)
        if type_ in SOCKETS:
            link = None
            if isinstance(value, tuple):
                link = len(links) + 1
                links.append([link, value[0], value[1], spec["id"], len(sockets), type_])
            sockets.append({"name": name, "type": type_, "link": link})
            continue
        value = value.value if isinstance(value, Outer) else value
        widgets.append(_default(type_, options) if value is None else value)
        if options.get("control_after_generate"):
            widgets.append("fixed")
    unknown = set(spec["inputs"]) - {name for name, _, _ in names}
    if unknown:
        raise SystemExit(f"{title}: {spec['kind']} has no input {sorted(unknown)}")
    node = {"id": spec["id"], "type": spec["kind"], "flags": {}, "order": spec["id"], "mode": 0}
    node |= {"inputs": sockets, "widgets_values": widgets}
    node["outputs"] = [{"name": n, "type": t, "links": []} for n, t in _outputs(kind)] if kind else []
    node["properties"] = {**PACKS.get(spec["kind"], {}), "Node name for S&R": spec["kind"]} if kind else {}
    files = [_download(value) for value in widgets if isinstance(value, str) and value in FILES]
    if files:
        node["properties"]["models"] = files
    if "title" in spec:
        node["title"] = spec["title"]
    return node


class Blueprint(Workflow):
    """A graph that can be inserted into another as one node (a subgraph)."""

    def __init__(self, title: str, description: str):
        super().__init__(title)
        self.description = description
        self.results: list[tuple[str, tuple[int, int]]] = []

    def result(self, name: str, output: tuple[int, int]) -> None:
        """Add an output of the blueprint."""
        self.results.append((name, output))

    def file(self, kinds: dict, places: dict) -> dict:
        """The file that ComfyUI lists: a graph of one subgraph node, and the subgraph's definition."""
        name = str(uuid.uuid5(uuid.NAMESPACE_URL, self.title))
        inner = self.ui(kinds, places)
        inputs, outputs = self._inputs_of(inner, kinds), self._outputs_of(inner)
        links = [dict(zip(_LINK, link, strict=True)) for link in inner["links"]]
        right = max(pos[0] + size[0] for pos, size in places.values())
        state = {"lastGroupId": 0, "lastNodeId": len(self.nodes), "lastLinkId": len(links), "lastRerouteId": 0}
        subgraph = {"id": name, "version": 1, "state": state, "revision": 0, "config": {}, "name": self.title}
        subgraph |= {"inputNode": {"id": INSIDE, "bounding": [-240, 0, 130, 40 + 20 * len(inputs)]}}
        subgraph |= {"outputNode": {"id": OUTSIDE, "bounding": [right + 100, 0, 130, 40 + 20 * len(outputs)]}}
        subgraph |= {"inputs": inputs, "outputs": outputs, "widgets": [], "nodes": inner["nodes"], "groups": []}
        subgraph |= {"links": links, "extra": {}, "category": "DC-Gen", "description": self.description}
        return {
            "revision": 0,
            "last_node_id": 1,
            "last_link_id": 0,
            "nodes": [self._host(name, inputs, outputs)],
            "links": [],
            "version": 0.4,
            "definitions": {"subgraphs": [subgraph]},
            "extra": {"BlueprintDescription": self.description},
        }

    def _host(self, name: str, inputs: list, outputs: list) -> dict:
        sockets = [
            {"name": i["name"], "type": i["type"], "link": None}
            | ({} if i["type"] in SOCKETS else {"widget": {"name": i["name"]}})
            for i in inputs
        ]
        return {
            "id": 1,
            "type": name,
            "pos": [0, 0],
            "size": [400, 100],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": sockets,
            "outputs": [{"name": o["name"], "type": o["type"], "links": []} for o in outputs],
            "properties": {},
            "widgets_values": [],
            "title": self.title,
        }

    def _inputs_of(self, inner: dict, kinds: dict) -> list[dict]:
        """Inputs in the order of the nodes that take them; adds their links to `inner`."""
        inputs: dict[str, dict] = {}
        for spec, node in zip(self.nodes, inner["nodes"], strict=True):
            node["inputs"] = _all_sockets(node, kinds[spec["kind"]])
            for slot, socket in enumerate(node["inputs"]):
                if socket["link"]:
                    inner["links"][socket["link"] - 1][4] = slot
                value = spec["inputs"].get(socket["name"])
                if isinstance(value, Outer):
                    entry = inputs.setdefault(value.name, _end(self.title, value.name, socket["type"]))
                    link = [len(inner["links"]) + 1, INSIDE, list(inputs).index(value.name), node["id"], slot]
                    inner["links"].append([*link, socket["type"]])
                    entry["linkIds"].append(link[0])
                    socket["link"] = link[0]
        return [entry | {"pos": [-140, 20 + 20 * i]} for i, entry in enumerate(inputs.values())]

    def _outputs_of(self, inner: dict) -> list[dict]:
        outputs = []
        for i, (name, (number, slot)) in enumerate(self.results):
            socket = inner["nodes"][number - 1]["outputs"][slot]
            link = len(inner["links"]) + 1
            inner["links"].append([link, number, slot, OUTSIDE, i, socket["type"]])
            socket["links"].append(link)
            outputs.append(_end(self.title, name, socket["type"]) | {"linkIds": [link], "pos": [0, 20 + 20 * i]})
        return outputs


_LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")


def _end(title: str, name: str, type_: str) -> dict:
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{title}/{name}")), "name": name, "type": type_, "linkIds": []}


def _all_sockets(node: dict, kind: dict) -> list[dict]:
    """A node's input sockets as the frontend numbers them: widgets have one too."""
    linked = {socket["name"]: socket for socket in node["inputs"]}
    return [
        linked.get(name) or {"name": name, "type": type_, "widget": {"name": name}, "link": None}
        for name, type_, _ in _inputs(kind)
    ]


def _download(name: str) -> dict:
    folder, url, digest = FILES[name]
    checksum = {"hash": digest, "hash_type": "SHA256"} if digest else {}
    return {"name": name, "url": url, "directory": folder, **checksum}


def _inputs(kind: dict) -> Iterator[tuple[str, str, dict]]:
    for part in ("required", "optional"):
        for name, spec in kind["input"].get(part, {}).items():
            type_ = "COMBO" if isinstance(spec[0], list) else spec[0]
            options = spec[1] if len(spec) > 1 else {}
            if isinstance(spec[0], list):
                options = {**options, "options": spec[0]}
            yield name, type_, options


def has_widgets(kind: dict) -> bool:
    return any(type_ not in SOCKETS for _, type_, _ in _inputs(kind))


def _outputs(kind: dict) -> Iterator[tuple[str, str]]:
    return zip(kind["output_name"], kind["output"], strict=True)


def _default(type_: str, options: dict):
    if "default" in options:
        return options["default"]
    return (options.get("options") or [""])[0] if type_ == "COMBO" else {"INT": 0, "FLOAT": 0.0}.get(type_, "")
