"""Writes the workflows of this folder. They are described below once; the real frontend lays out and serializes them.

    python workflows/build.py http://127.0.0.1:8188 [NAME ...]

needs a running ComfyUI with this pack, a Chromium and Pillow. Each job becomes NAME.json (what the template browser
shows), NAME.jpg (its picture there) and api/NAME.json (the same for scripts that POST to /prompt). The picture is what
the graph draws where everything it needs ships with the pack, else the graph itself.

    python workflows/build.py http://127.0.0.1:8188 --nodes

writes the pictures of the nodes on their help pages (web/docs/img).
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
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
HUB = "https://huggingface.co"
PROMPT_4K = "a lighthouse on a cliff at dawn, long grass in the wind, film photograph, fine detail"

# Files that ComfyUI offers to download: name -> (folder below models/, address, sha256 if known).
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
    "ae.safetensors": (
        "vae",
        f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
        "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38",
    ),
}

# Nodes of packs that need not be here to write a graph with them, as /object_info would have them.
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
# By these the frontend and ComfyUI-Manager know which pack to offer.
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


# No node smaller than its widgets ask for; those given room (pictures, prompts, notes) keep it. Then each column is
# pushed down where nodes would touch. 30 is the height of a title bar.
LAY_OUT = """
const columns = {};
for (const node of app.graph._nodes) {
  const need = node.computeSize();
  const tall = node.size[1] > 150 || node.type === "MarkdownNote" ? node.size[1] : 0;
  node.setSize([Math.max(node.size[0], need[0]), Math.max(tall, need[1])]);
  (columns[node.pos[0]] ??= []).push(node);
}
for (const column of Object.values(columns)) {
  let free = -Infinity;
  for (const node of column.sort((a, b) => a.pos[1] - b.pos[1])) {
    node.pos = [node.pos[0], Math.max(node.pos[1], free)];
    free = node.pos[1] + node.size[1] + 30 + 25;
  }
}
"""


# Fits the graph into the free part of the page; the rectangle it then fills.
FRAME = """
const boxes = app.graph._nodes.map((n) => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
const [left, top] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])) - 20);
const [right, bottom] = [2, 3].map((i) => Math.max(...boxes.map((box) => box[i])) + 20);
const scale = Math.min(1480 / (right - left), 740 / (bottom - top));
app.canvas.ds.scale = scale;
app.canvas.ds.offset = [80 / scale - left, 100 / scale - top];
app.canvas.low_quality_zoom_threshold = 0.1;
app.canvas.draw(true, true);
return [80, 100, (right - left) * scale, (bottom - top) * scale];
"""


# One node alone on the canvas; the rectangle it fills on the page.
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


class Workflow:
    """Nodes and links of one graph, placed by hand on a grid of columns."""

    def __init__(self, title: str, note: str):
        self.title, self.nodes, self.links = title, [], []
        self.groups: list[dict] = []
        text = (part for part in note.split("\n") if part.strip("`"))
        height = int(60 + 15.5 * sum(math.ceil(len(part) / 110) + 0.6 for part in text))
        self.node("MarkdownNote", at=(0, -height - 70), box=(660, height), text=note)
        self.nodes[-1]["title"] = title

    def node(self, kind: str, at: tuple[int, int], box: tuple[int, int] | None = None, **inputs) -> Callable:
        """Add a node; inputs are widget values, or outputs of other nodes. box: room beyond its widgets' need.

        Returns output(i), to be given to other nodes as input.
        """
        number = len(self.nodes) + 1
        self.nodes.append({"id": number, "kind": kind, "at": at, "box": box, "inputs": inputs})
        return lambda slot=0: (number, slot)

    def ui(self, kinds: dict) -> dict:
        """As the frontend loads it; `kinds` is /object_info."""
        nodes, links = [], []
        for spec in self.nodes:
            kind = kinds.get(spec["kind"])
            sockets, widgets = [], []
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
                widgets.append(value if name in spec["inputs"] else _default(type_, options))
                if options.get("control_after_generate"):
                    widgets.append("fixed")
            unknown = set(spec["inputs"]) - {name for name, _, _ in names}
            if unknown:
                raise SystemExit(f"{self.title}: {spec['kind']} has no input {sorted(unknown)}")
            node = {"id": spec["id"], "type": spec["kind"], "pos": list(spec["at"]), "flags": {}, "order": spec["id"]}
            node |= {"mode": 0, "inputs": sockets, "widgets_values": widgets, "size": list(spec["box"] or (330, 120))}
            node["outputs"] = [{"name": n, "type": t, "links": []} for n, t in _outputs(kind)] if kind else []
            node["properties"] = {**PACKS.get(spec["kind"], {}), "Node name for S&R": spec["kind"]} if kind else {}
            files = [_download(value) for value in widgets if isinstance(value, str) and value in FILES]
            if files:
                node["properties"]["models"] = files
            if "title" in spec:
                node["title"] = spec["title"]
            nodes.append(node)
        for link in links:
            nodes[link[1] - 1]["outputs"][link[2]]["links"].append(link[0])
        return {
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": self.groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def _download(name: str) -> dict:
    folder, address, digest = FILES[name]
    known = {"hash": digest, "hash_type": "SHA256"} if digest else {}
    return {"name": name, "url": address, "directory": folder, **known}


def _inputs(kind: dict) -> Iterator[tuple[str, str, dict]]:
    for part in ("required", "optional"):
        for name, spec in kind["input"].get(part, {}).items():
            type_ = "COMBO" if isinstance(spec[0], list) else spec[0]
            options = spec[1] if len(spec) > 1 else {}
            if isinstance(spec[0], list):
                options = {**options, "options": spec[0]}
            yield name, type_, options


def _outputs(kind: dict) -> Iterator[tuple[str, str]]:
    return zip(kind["output_name"], kind["output"], strict=True)


def _default(type_: str, options: dict):
    if "default" in options:
        return options["default"]
    return (options.get("options") or [""])[0] if type_ == "COMBO" else {"INT": 0, "FLOAT": 0.0}.get(type_, "")


# The parts that several jobs share -----------------------------------------------------------------------------------


def prompt_box(w: Workflow, clip, text: str, at=(380, 0)):
    return w.node("CLIPTextEncode", at=at, box=(400, 160), clip=clip, text=text)


def save(w: Workflow, samples, vae, at, prefix: str, decode: str = "DCAEDecode", box: tuple[int, int] = (420, 440)):
    """Decoding, and the picture below it; without a prefix it is only shown."""
    strip = {"strip": 0} if decode == "DCAEDecode" else {}
    image = w.node(decode, at=at, samples=samples, vae=vae, **strip)
    kind, name = ("SaveImage", {"filename_prefix": prefix}) if prefix else ("PreviewImage", {})
    w.node(kind, at=(at[0], at[1] + 130), box=box, images=image(), **name)
    return image


def one_sampler(w: Workflow, model, positive, latent, at, **values):
    """latent: an output, or the name of a size, at which the node makes an empty one itself."""
    values = {"seed": 42, "steps": 20, "guidance": 3.5, "sampler_name": "euler", "denoise": 1.0, **values}
    start = {"size": latent} if isinstance(latent, str) else {"latent": latent}
    return w.node("DCGen4KSampler", at=at, model=model, positive=positive, **start, **values)


def release_job(title: str, release: str, size: str, prefix: str, extra: str = "") -> Workflow:
    """Text to image from a published release folder."""
    repo = f"dc-ai/{release}"
    w = Workflow(
        title,
        f"## {title}\n\nNeeds the release folder `models/diffusers/{release}`:\n\n"
        f"```\nhf download {repo} --local-dir models/diffusers/{release}\n```\n\n"
        "FLUX.1 Krea [dev] weights are for non-commercial use. Guidance 3.5, 20 steps and euler are the published "
        f"settings; the shift follows the checkpoint by itself, so no ModelSamplingFlux.{extra}",
    )
    load = w.node("DCGenReleaseLoader", at=(0, 0), release=release)
    text = prompt_box(w, load(1), PROMPT_4K)
    latent = one_sampler(w, load(0), text(), size, (820, 0))
    save(w, latent(), load(2), (1190, 0), prefix)
    return w


def toy_loaders(w: Workflow, prompt: str):
    load = w.node("DCGenReleaseLoader", at=(0, 0), release="toy/flux-base")
    apply = w.node("DCGenApply", at=(0, 160), model=load(0), adapter_name="toy-flux-dcgen.safetensors", strength=1.0)
    vae = w.node("DCAELoader", at=(0, 320), vae_name=TOY_VAE)
    text = prompt_box(w, load(1), prompt)
    guide = w.node("FluxGuidance", at=(380, 210), conditioning=text(), guidance=3.5)
    size = {"width": 128, "height": 128, "batch_size": 4}
    empty = w.node("DCGenEmptyLatent", at=(380, 320), model=apply(), **size)
    return apply, vae, guide, empty


TOY_VAE = "toy/dc-ae-f32"
TOY_NOTE = (
    "\n\nEverything it needs ships with the pack: a FLUX-style model small enough for a CPU, trained on emoji on "
    "coloured backgrounds, its f8 autoencoder's 64 tokens an image brought down to 16. Prompts read "
    "`{subject} on a {color} background`. Set the adapter's strength to 0 to see alignment alone."
)


def toy() -> Workflow:
    w = Workflow("DC-Gen toy", "## DC-Gen on a toy FLUX, with core's KSampler" + TOY_NOTE)
    apply, vae, guide, empty = toy_loaders(w, "strawberry on a white background")
    values = {"seed": 7, "steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    latent = w.node(
        "KSampler",
        at=(820, 0),
        model=apply(),
        positive=guide(),
        negative=guide(),
        latent_image=empty(),
        **values,
    )
    save(w, latent(), vae(), (1190, 0), "dcgen/toy", "VAEDecode")
    return w


def toy_custom() -> Workflow:
    w = Workflow("DC-Gen toy, SamplerCustomAdvanced", "## DC-Gen on a toy FLUX, with SamplerCustomAdvanced" + TOY_NOTE)
    apply, vae, guide, empty = toy_loaders(w, "watermelon on a purple background")
    noise = w.node("RandomNoise", at=(820, 0), noise_seed=7)
    guider = w.node("BasicGuider", at=(820, 130), model=apply(), conditioning=guide())
    euler = w.node("KSamplerSelect", at=(820, 230), sampler_name="euler")
    sigmas = w.node("DCGenScheduler", at=(820, 330), model=apply(), latent=empty(), steps=20, denoise=1.0)
    inputs = {"noise": noise(), "guider": guider(), "sampler": euler(), "sigmas": sigmas()}
    latent = w.node("SamplerCustomAdvanced", at=(1190, 0), latent_image=empty(), **inputs)
    save(w, latent(), vae(), (1190, 200), "dcgen/toy-custom", "VAEDecode")
    return w


KREA_1K, KREA_4K = "DC-Gen-FLUX.1-Krea-Dev-Res1K", "DC-Gen-FLUX.1-Krea-Dev-Res4K"


def krea_base(w: Workflow):
    """Plain FLUX.1 Krea from core's loaders, its text at 512 tokens as DC-Gen was published with."""
    model = w.node("UNETLoader", at=(0, 0), unet_name="flux1-krea-dev_fp8_scaled.safetensors", weight_dtype="default")
    return model, krea_text(w, 140)


def krea_text(w: Workflow, y: int):
    names = {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"}
    clip = w.node("DualCLIPLoader", at=(0, y), **names)
    return w.node("T5TokenizerOptions", at=(0, y + 190), clip=clip(), min_padding=0, min_length=512)


# A folder below models/vae: what the notes have the user download.
VAE_F64, VAE_F32 = "dc-ae-1.5-f64c128", "dc-ae-f32c32-in-1.0"
GET_F64 = f"\n\n```\nhf download dc-ai/{VAE_F64}-diffusers --local-dir models/vae/{VAE_F64}\n```\n\n"
GET_F32 = f"\n\n```\nhf download mit-han-lab/{VAE_F32}-diffusers --local-dir models/vae/{VAE_F32}\n```\n\n"
ADAPTER = (
    "The adapter goes into `models/model_patches`. None is published as a file: take it out of a merged release with "
    "`python -m dcgen.convert extract`, or train one with `python -m train.run`. "
)


def adapted_4k(w: Workflow, model, clip, prefix: str) -> Workflow:
    """The rest of a graph from a base model to a 4K picture through an adapter."""
    adapter = "flux1-krea-dcgen-f64c128.safetensors"
    apply = w.node("DCGenApply", at=(380, 230), model=model(), adapter_name=adapter, strength=1.0)
    vae = w.node("DCAELoader", at=(380, 380), vae_name=VAE_F64)
    text = prompt_box(w, clip(), PROMPT_4K)
    latent = one_sampler(w, apply(), text(), "4K: 4096 x 4096", (820, 0))
    save(w, latent(), vae(), (1190, 0), prefix)
    return w


def adapter_4k() -> Workflow:
    w = Workflow(
        "FLUX 4K from an adapter",
        f"## 4096 x 4096 from plain FLUX.1 Krea and a DC-Gen adapter\n\n{ADAPTER}Its autoencoder:{GET_F64}"
        "Any loader may stand in for the model's: GGUF, fp8, LoRA before or after the adapter.",
    )
    model, clip = krea_base(w)
    return adapted_4k(w, model, clip, "dcgen/flux-4k-adapter")


def nunchaku_4k() -> Workflow:
    w = Workflow(
        "FLUX 4K, nunchaku",
        "## 4096 x 4096 on a 4-bit nunchaku FLUX\n\n**Needs the node pack ComfyUI-nunchaku** and nunchaku itself: "
        "ComfyUI-Manager offers it under Install Missing Custom Nodes, then run its wheel installer. NVIDIA 20 to 50 "
        "series only; on the 50 series choose the `svdq-fp4_r32-flux.1-krea-dev` file of the same place.\n\n"
        f"{ADAPTER}Extract it with `--rank 256`; nunchaku takes multiples of 16 up to 320. Its autoencoder:{GET_F64}"
        "Nunchaku's LoRA nodes go between its loader and Apply DC-Gen; core's LoRA loaders do nothing here. Its 4-bit "
        "weights were calibrated on f8 latents, so this is not the quantized DC-Gen model of the paper.",
    )
    file = "svdq-int4_r32-flux.1-krea-dev.safetensors"
    model = w.node("NunchakuFluxDiTLoader", at=(0, 0), model_path=file)
    return adapted_4k(w, model, krea_text(w, 260), "dcgen/flux-4k-nunchaku")


def image_to_image() -> Workflow:
    w = Workflow(
        "FLUX 4K image to image",
        "## 4K image to image\n\nThe picture is scaled to the sampler's size, encoded, and kept by 1 - denoise. "
        f"Needs `models/diffusers/{KREA_4K}`.",
    )
    load = w.node("DCGenReleaseLoader", at=(0, 0), release=KREA_4K)
    image = w.node("LoadImage", at=(0, 160), box=(330, 330), image="example.png")
    text = prompt_box(w, load(1), PROMPT_4K)
    latent = one_sampler(w, load(0), text(), "4K: 4096 x 4096", (820, 0), denoise=0.6, image=image(), vae=load(2))
    save(w, latent(), load(2), (1190, 0), "dcgen/flux-4k-img2img")
    return w


def refine() -> Workflow:
    w = Workflow(
        "FLUX 1K to 4K refine",
        "## Compose at 1K, refine at 4K\n\nThe 1K model draws the picture; the 4K model redraws it at 4096 x 4096 with "
        f"denoise 0.45. Needs `models/diffusers/{KREA_1K}` and `{KREA_4K}`.",
    )
    small = w.node("DCGenReleaseLoader", at=(0, 0), release=KREA_1K)
    large = w.node("DCGenReleaseLoader", at=(0, 160), release=KREA_4K)
    text = prompt_box(w, small(1), PROMPT_4K)
    drawn = one_sampler(w, small(0), text(), "1K: 1024 x 1024", (820, 0))
    image = w.node("DCAEDecode", at=(820, 520), samples=drawn(), vae=small(2), strip=0)
    w.node("PreviewImage", at=(380, 230), box=(400, 380), images=image())
    start = {"denoise": 0.45, "image": image(), "vae": large(2)}
    detailed = one_sampler(w, large(0), text(), "4K: 4096 x 4096", (1190, 0), **start)
    save(w, detailed(), large(2), (1560, 0), "dcgen/refine-4k")
    return w


def inpaint() -> Workflow:
    w = Workflow(
        "FLUX inpaint",
        "## Inpaint on a deep latent\n\nPaint the mask in LoadImage's mask editor. A mask pixel of the latent is 32 "
        "(f32) or 64 (f64) image pixels wide, so paint generously; the picture's sides must be multiples of that. "
        f"Needs `models/diffusers/{KREA_1K}`.",
    )
    load = w.node("DCGenReleaseLoader", at=(0, 0), release=KREA_1K)
    image = w.node("LoadImage", at=(0, 160), box=(330, 330), image="example.png")
    text = prompt_box(w, load(1), PROMPT_4K)
    encoded = w.node("DCAEEncode", at=(380, 220), image=image(), vae=load(2), strip=0)
    masked = w.node("SetLatentNoiseMask", at=(380, 340), samples=encoded(), mask=image(1))
    latent = one_sampler(w, load(0), text(), masked(), (820, 0), denoise=0.9)
    save(w, latent(), load(2), (1190, 0), "dcgen/flux-inpaint")
    return w


def side_by_side() -> Workflow:
    w = Workflow(
        "FLUX base and DC-Gen side by side",
        "## One base, two latents\n\nBoth samplers use the same loaded FLUX: once on its own f8 latent, once through a "
        f"DC-Gen adapter. No weight is loaded twice. The wipe at the end compares the two pictures.\n\n{ADAPTER}"
        f"Its autoencoder:{GET_F32}",
    )
    model, clip = krea_base(w)
    adapter = "flux1-krea-dcgen-f32c32.safetensors"
    text = prompt_box(w, clip(), PROMPT_4K)
    apply = w.node("DCGenApply", at=(380, 230), model=model(), adapter_name=adapter, strength=1.0)
    plain = w.node("VAELoader", at=(0, 450), vae_name="ae.safetensors")
    deep = w.node("DCAELoader", at=(0, 560), vae_name=VAE_F32)
    size = {"width": 1024, "height": 1024}
    empty = w.node("DCGenEmptyLatent", at=(380, 380), model=model(), **size)
    empty_deep = w.node("DCGenEmptyLatent", at=(380, 580), model=apply(), **size)
    base = one_sampler(w, model(), text(), empty(), (820, 0))
    dcgen = one_sampler(w, apply(), text(), empty_deep(), (1190, 0))
    first = w.node("VAEDecode", at=(820, 520), samples=base(), vae=plain())
    second = w.node("DCAEDecode", at=(1190, 520), samples=dcgen(), vae=deep(), strip=0)
    w.node("DCGenCompare", at=(1560, 0), box=(440, 560), image_a=first(), image_b=second())
    return w


def four_bit() -> Workflow:
    w = Workflow(
        "FLUX 4K, 4-bit",
        "## 4K from one 4-bit file\n\nOne .safetensors in `models/diffusion_models` with core's nvfp4 layout (or "
        "fp8); native 4-bit speed needs a Blackwell GPU, other devices compute in 16 bit. None is published: quantize "
        f"a merged file (`python -m dcgen.convert pack`). Its autoencoder:{GET_F64}For nunchaku's 4-bit files there is "
        "a workflow of its own.",
    )
    name = "dcgen-flux1-krea-4k-nvfp4.safetensors"
    model = w.node("DCGenModelLoader", at=(0, 0), model_name=name, weight_dtype="default")
    clip = krea_text(w, 170)
    vae = w.node("DCAELoader", at=(0, 480), vae_name=VAE_F64)
    text = prompt_box(w, clip(), PROMPT_4K)
    latent = one_sampler(w, model(), text(), "4K: 4096 x 4096", (820, 0))
    save(w, latent(), vae(), (1190, 0), "dcgen/flux-4k-4bit")
    return w


def round_trip() -> Workflow:
    w = Workflow(
        "DC-AE round trip",
        "## What does a DC-AE lose?\n\nThe picture goes through the autoencoder and back; the wipe, the difference "
        "(brightened) and the PSNR show what it costs. `toy/dc-ae-f32` ships with the pack and knows emoji only: put a "
        "published one into `models/vae` and choose it, for example `dc-ai/dc-ae-1.5-f64c128` or the `vae` folder of "
        "`Efficient-Large-Model/Sana_1600M_1024px_diffusers`. Sides are cropped to multiples of 32, 64 or 128 pixels.",
    )
    image = w.node("LoadImage", at=(0, 0), box=(330, 330), image="example.png")
    vae = w.node("DCAELoader", at=(0, 400), vae_name=TOY_VAE)
    latent = w.node("DCAEEncode", at=(400, 0), image=image(), vae=vae(), strip=0)
    again = w.node("DCAEDecode", at=(400, 160), samples=latent(), vae=vae(), strip=0)
    lost = w.node("DCAEDifference", at=(400, 320), image_a=image(), image_b=again(), gain=4.0)
    w.node("PreviewAny", at=(400, 480), source=lost(1))
    w.node("DCGenCompare", at=(800, 0), box=(520, 600), image_a=image(), image_b=again())
    w.node("SaveImage", at=(1360, 0), box=(420, 460), images=lost(), filename_prefix="dcgen/round-trip-difference")
    return w


SANA = "Sana_1600M_{}_BF16_diffusers"
SANA_PROMPT = "a lighthouse on a cliff at dawn, long grass in the wind, film photograph, fine detail"


def sana_parts(
    w: Workflow, model, clip, vae, size: str | dict, prefix: str, text: str = SANA_PROMPT, **values
) -> Workflow:
    """Both prompts, the latent, SANA's published settings (or other values), and the picture."""
    positive = w.node("DCGenSanaTextEncode", at=(380, 0), box=(430, 330), clip=clip, text=text, negative=False)
    negative = w.node("DCGenSanaTextEncode", at=(380, 380), box=(430, 330), clip=clip, text="", negative=True)
    empty = w.node("DCGenEmptyLatent", at=(0, 460), model=model, **({"size": size} if isinstance(size, str) else size))
    values = {"cfg": 4.5, "sampler_name": "flow_dpmpp_2m", **values}
    latent = one_sampler(w, model, positive(), empty(), (850, 0), negative=negative(), **values)
    save(w, latent(), vae, (1220, 0), prefix)
    return w


def sana(pixels: str, size: str, prefix: str) -> Workflow:
    """Text to image from a published SANA release folder."""
    release = SANA.format(pixels)
    w = Workflow(
        f"SANA {size[:2]}",
        f"## SANA {size[:2]}\n\nNeeds the release folder `models/diffusers/{release}`:\n\n```\n"
        f"hf download Efficient-Large-Model/{release} --local-dir models/diffusers/{release}\n```\n\n"
        "Published settings: flow_dpmpp_2m, 20 steps, cfg 4.5; the shift (3, at 4K 6) comes from the release. Prompts "
        "go through SANA Text Encode, the negative one too. `guidance` is ignored: SANA has no guidance embedding.",
    )
    load = w.node("DCGenReleaseLoader", at=(0, 0), release=release)
    return sana_parts(w, load(0), load(1), load(2), size, prefix)


def sana_sprint() -> Workflow:
    """One or two steps, no negative prompt."""
    release = "Sana_Sprint_1.6B_1024px_diffusers"
    w = Workflow(
        "SANA-Sprint 1K",
        f"## SANA-Sprint 1K: two steps\n\nNeeds the release folder `models/diffusers/{release}`:\n\n```\n"
        f"hf download Efficient-Large-Model/{release} --local-dir models/diffusers/{release}\n```\n\n"
        "Published settings: 2 steps (1 works too) of flow_consistency, guidance 4.5, cfg 1: the model has its "
        "guidance built in, so there is no negative prompt and a step is one run. The noise levels come from "
        "the release.",
    )
    load = w.node("DCGenReleaseLoader", at=(0, 0), release=release)
    text = w.node("DCGenSanaTextEncode", at=(380, 0), box=(430, 330), clip=load(1), text=SANA_PROMPT, negative=False)
    empty = w.node("DCGenEmptyLatent", at=(0, 160), model=load(0), size="1K: 1024 x 1024")
    settings = {"steps": 2, "guidance": 4.5, "sampler_name": "flow_consistency"}
    latent = one_sampler(w, load(0), text(), empty(), (850, 0), **settings)
    save(w, latent(), load(2), (1220, 0), "dcgen/sana-sprint-1k")
    return w


def deep_sana_adapter() -> Workflow:
    """DC-Gen-SANA as an adapter on the published base."""
    release = SANA.format("1024px")
    w = Workflow(
        "DC-Gen-SANA 1K",
        "## SANA on an f64 latent: 256 tokens at 1K in place of 1,024\n\n"
        f"Base: `models/diffusers/{release}`. Adapter: in `models/model_patches`; none is published, train one with "
        "`python -m train.run` (the paper's recipe for SANA is among `--list`). Autoencoder: the f64 one it was "
        "trained with, in `models/vae`. Text and sampler settings are the base's.",
    )
    load = w.node("DCGenReleaseLoader", at=(0, 0), release=release)
    adapter = "sana-1.6b-dcgen-f64c128.safetensors"
    apply = w.node("DCGenApply", at=(0, 150), model=load(0), adapter_name=adapter, strength=1.0)
    vae = w.node("DCAELoader", at=(0, 310), vae_name="dc-ae-1.5-f64c128.safetensors")
    return sana_parts(w, apply(), load(1), vae(), "1K: 1024 x 1024", "dcgen/dcgen-sana-1k")


def deep_sana() -> Workflow:
    """A merged DC-Gen-SANA release at 4K."""
    release = "DC-Gen-SANA-1.6B-f64c128"
    w = Workflow(
        "DC-Gen-SANA 4K",
        "## 4096 x 4096 from 4,096 tokens\n\n"
        f"Needs a merged release in `models/diffusers/{release}`. None is published: train it with "
        "`python -m train.run` and export the release. Sampler settings are SANA's.",
    )
    load = w.node("DCGenReleaseLoader", at=(0, 0), release=release)
    return sana_parts(w, load(0), load(1), load(2), "4K: 4096 x 4096", "dcgen/dcgen-sana-4k")


def toy_sana() -> Workflow:
    """DC-Gen-SANA as an adapter on the toy SANA."""
    w = Workflow(
        "DC-Gen toy SANA",
        "## DC-Gen on a toy SANA\n\nEverything it needs ships with the pack: a SANA-style model small enough for a CPU "
        "(0.7 million parameters, its own little Gemma), trained on emoji on coloured backgrounds, its f8 latent's 64 "
        "tokens an image brought down to 16. Prompts read `{subject} on a {color} background`. SANA is not distilled: "
        "it takes two passes a step, guided by `cfg`. Set the adapter's strength to 0 to see alignment alone.",
    )
    load = w.node("DCGenReleaseLoader", at=(0, 0), release="toy/sana-base")
    adapter = "toy-sana-dcgen.safetensors"
    apply = w.node("DCGenApply", at=(0, 150), model=load(0), adapter_name=adapter, strength=1.0)
    vae = w.node("DCAELoader", at=(0, 310), vae_name=TOY_VAE)
    size, text = {"width": 128, "height": 128, "batch_size": 4}, "panda on a green background"
    return sana_parts(w, apply(), load(1), vae(), size, "dcgen/toy-sana", text, seed=7, cfg=2.5)


JOBS: dict[str, Callable[[], Workflow]] = {
    "dcae_roundtrip": round_trip,
    "dcgen_toy": toy,
    "dcgen_toy_custom": toy_custom,
    "dcgen_toy_sana": toy_sana,
    "dcgen_flux_1k": lambda: release_job("FLUX 1K", KREA_1K, "1K: 1024 x 1024", "dcgen/flux-1k"),
    "dcgen_flux_2k": lambda: release_job("FLUX 2K", KREA_4K, "2K: 2048 x 2048", "dcgen/flux-2k"),
    "dcgen_flux_4k": lambda: release_job("FLUX 4K", KREA_4K, "4K: 4096 x 4096", "dcgen/flux-4k"),
    "dcgen_flux_4k_adapter": adapter_4k,
    "dcgen_flux_4k_img2img": image_to_image,
    "dcgen_flux_1k_to_4k_refine": refine,
    "dcgen_flux_inpaint": inpaint,
    "dcgen_flux_side_by_side": side_by_side,
    "dcgen_flux_4k_4bit": four_bit,
    "dcgen_flux_4k_nunchaku": nunchaku_4k,
    "sana_1k": lambda: sana("1024px", "1K: 1024 x 1024", "dcgen/sana-1k"),
    "sana_2k": lambda: sana("2Kpx", "2K: 2048 x 2048", "dcgen/sana-2k"),
    "sana_4k": lambda: sana("4Kpx", "4K: 4096 x 4096", "dcgen/sana-4k"),
    "sana_sprint_1k": sana_sprint,
    "dcgen_sana_1k": deep_sana_adapter,
    "dcgen_sana_4k": deep_sana,
}


# Jobs whose weights ship with the pack, so that their pictures can be drawn anywhere.
SELF_CONTAINED = ("dcgen_toy", "dcgen_toy_custom", "dcgen_toy_sana", "dcae_roundtrip")


def _browser():
    path = HERE.parent / "tests" / "comfy" / "browser.py"
    spec = importlib.util.spec_from_file_location("browser", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["browser"] = module
    spec.loader.exec_module(module)
    return module


def _graph_picture(page, file: Path) -> None:
    """The graph as a JPEG of 640 pixels' width."""
    for _ in range(2):  # the page moves the view once more after loading a graph
        x, y, width, height = page.js(f"(() => {{ {FRAME} }})()")
        page.js("new Promise((done) => setTimeout(done, 600))")
    clip = {"x": x, "y": y, "width": width, "height": height, "scale": 640 / width}
    found = page.call("Page.captureScreenshot", format="jpeg", quality=82, clip=clip)
    file.write_bytes(base64.b64decode(found["data"]))


def _drawn_picture(url: str, api: dict, file: Path) -> None:
    """What the graph draws: its pictures side by side, or in two columns, as a JPEG of 640 pixels' width."""
    from PIL import Image

    entry = _run(url, api)
    shown = [
        image
        for output in entry["outputs"].values()
        for part in ("a_images", "b_images", "images")
        for image in output.get(part, [])
    ]
    pictures = []
    for image in shown:
        with urllib.request.urlopen(f"{url}/view?{urllib.parse.urlencode(image)}") as answer:
            pictures.append(Image.open(io.BytesIO(answer.read())).convert("RGB"))
    columns = len(pictures) if len(pictures) < 4 else 2
    side = 640 // columns
    height = round(side * pictures[0].height / pictures[0].width)
    sheet = Image.new("RGB", (side * columns, height * math.ceil(len(pictures) / columns)))
    for i, picture in enumerate(pictures):
        sheet.paste(
            picture.resize((side, height), Image.Resampling.LANCZOS), (i % columns * side, i // columns * height)
        )
    sheet.save(file, quality=88)


def _post(address: str, body: dict) -> bytes:
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), headers)) as answer:
        return answer.read()


def _run(url: str, api: dict) -> dict:
    """Queue a graph and wait; its history entry."""
    _post(f"{url}/free", {"free_memory": True})  # else nothing is drawn that was drawn before
    number = json.loads(_post(f"{url}/prompt", {"prompt": api}))["prompt_id"]
    while True:
        with urllib.request.urlopen(f"{url}/history/{number}") as answer:
            entry = json.loads(answer.read()).get(number)
        if entry:
            if entry["status"]["status_str"] != "success":
                raise SystemExit(f"the graph failed: {entry['status']['messages'][-1]}")
            return entry
        time.sleep(0.5)


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple]:
    """(page with ComfyUI in it, /object_info and the nodes of FOREIGN)."""
    with urllib.request.urlopen(f"{url}/object_info") as answer:
        kinds = {**json.loads(answer.read()), **FOREIGN}
    module = _browser()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = module.Browser(module.find_chromium(), Path(folder))
        try:
            page.open(url)
            ready = "window.app && window.app.extensionManager && window.LiteGraph.registered_node_types.DCGenApply"
            page.until(f"!!({ready})", 180)
            for setting in ("Comfy.Minimap.Visible", "Comfy.Workflow.ShowMissingModelsWarning"):
                page.js(f"app.extensionManager.setting.set('{setting}', false)")
            for name, kind in FOREIGN.items():
                page.js(f"app.registerNodeDef({json.dumps(name)}, {json.dumps(kind)})")
            yield page, kinds
        finally:
            page.close()


def written(page, kinds: dict, name: str) -> tuple[dict, dict]:
    """(UI graph, API graph) of a job, as the page lays it out and serializes it. The page goes on showing it."""
    graph = JOBS[name]().ui(kinds)
    page.js(f"app.loadGraphData({json.dumps(graph)}, true, true, {json.dumps(name)})")
    missing = page.js("app.graph._nodes.filter(n => n.has_errors).map(n => n.type)")
    if missing:
        raise SystemExit(f"{name}: unknown nodes {missing}")
    page.js(f"(() => {{ {LAY_OUT} }})()")
    # The page draws a number; one made of the name lets two runs write the same file.
    ui = {**page.js("app.graph.serialize()"), "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)), "extra": {}}
    for node in ui["nodes"]:
        # Switches that were never set; the page would show them as set when it reads null.
        values = node.get("widgets_values", [])
        node["widgets_values"] = [False if value is None else value for value in values]
    return ui, page.js("app.graphToPrompt().then(p => p.output)")


def as_text(graph: dict) -> str:
    return json.dumps(graph, indent=1, ensure_ascii=False) + "\n"


def build(url: str, names: list[str]) -> None:
    with opened(url) as (page, kinds):
        for name in names:
            ui, api = written(page, kinds, name)
            (HERE / f"{name}.json").write_text(as_text(ui))
            (HERE / "api" / f"{name}.json").write_text(as_text(api))
            if name in SELF_CONTAINED:
                _drawn_picture(url, api, HERE / f"{name}.jpg")
            else:
                _graph_picture(page, HERE / f"{name}.jpg")
            print(name, len(ui["nodes"]), "nodes")


def build_nodes(url: str) -> None:
    """Pictures of our nodes, each alone with its links' ends, at twice the size they have on the canvas."""
    with opened(url) as (page, kinds):
        page.js(f"app.loadGraphData({json.dumps(Workflow('', '').ui(kinds))}, true, true, 'nodes')")
        for name in (name for name, kind in kinds.items() if kind["category"] == "DC-Gen"):
            x, y, width, height = page.js(f"(() => {{ const name = {json.dumps(name)}; {ONE_NODE} }})()")
            page.js("new Promise((done) => setTimeout(done, 500))")
            clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
            found = page.call("Page.captureScreenshot", format="png", clip=clip)
            (HERE.parent / "web" / "docs" / "img" / f"{name}.png").write_bytes(base64.b64decode(found["data"]))
            print(name)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    if sys.argv[2:] == ["--nodes"]:
        build_nodes(sys.argv[1].rstrip("/"))
    else:
        build(sys.argv[1].rstrip("/"), sys.argv[2:] or list(JOBS))
