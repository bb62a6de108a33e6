# f spatial factor
"""The pack in a ComfyUI on its default start, on a GPU: does it work, how long, how much memory.

    python -m benchmarks.comfy_gpu [--comfy PATH] [--minutes 10] [--out runs/comfy_gpu]
    python -m benchmarks.comfy_gpu --cpu             # rehearsal: the same jobs at small sizes, without a GPU

Needs PyTorch (with CUDA, unless --cpu) and a ComfyUI tree with its requirements; of those a bare machine may lack the
wheels comfy-aimdo (dynamic VRAM), comfy-kitchen and comfyui-frontend-package in the versions that the tree's
requirements.txt names, av, torchsde, alembic, SQLAlchemy, simpleeval and blake3. The server starts with no memory flag
at all, so that on an NVIDIA card weights come by dynamic VRAM (a job fails if its log does not say so). Weights are
those of the toy, and random ones of the true shape for the 4096-pixel decode. After every job the table is printed and
written to OUT/comfy_gpu.json, so that a run which is cut off is a result too. Seconds are those of the client, from the
post to the history entry; memory is what ComfyUI reports of the device at the end of each job, and the least it had
free during it.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.dcae import narrowed
from dcgen.adapter import load_adapter
from dcgen.backbones import BACKBONES
from dcgen.dcae import DCAE, VARIANTS, save_dcae
from dcgen.files import replacing
from train.comfy_client import PACK, ComfyServer, find_comfyui
from train.families import FAMILIES

TOY = PACK / "toy"
ADAPTER, LORA, DEEP = "toy-flux-dcgen.safetensors", "random.safetensors", "f64-random"
F64 = "dc-ae-1.5-f64c128"
POLL = 0.2  # seconds between two looks at the free memory


@dataclass
class Row:
    """One job's outcome. Memory in GiB."""

    job: str
    ok: bool
    seconds: float
    said: str = ""
    least_free_gib: float | None = None
    torch_gib: float | None = None


class Memory:
    """The least free device memory that the server reports while a job runs."""

    def __init__(self, server: ComfyServer) -> None:
        self.server, self.least, self.torch = server, float("inf"), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL):
            try:
                device = self.server.stats()["devices"][0]
            except (OSError, KeyError, IndexError, ValueError):
                continue  # the server answers again once it is less busy
            self.least = min(self.least, device["vram_free"])
            self.torch = max(self.torch, device["torch_vram_total"])


def nodes(**graph: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """An API-format prompt from name=(class, inputs)."""
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()}


def toy_graph(seed: int, *, deep: bool, hooked: bool = False) -> dict[str, Any]:
    """The toy base, or DC-Gen on it, with or without a LoRA that hangs on the prompt (Create Hook LoRA)."""
    model = ["model", 0] if deep else ["release", 0]
    graph: dict[str, tuple[str, dict[str, Any]]] = {
        "release": ("DCGenReleaseLoader", {"release": "toy/flux-base"}),
        "latent": ("DCGenEmptyLatent", {"model": model, "width": 128, "height": 128, "batch_size": 1}),
        "text": ("CLIPTextEncode", {"text": "strawberry on a white background", "clip": ["release", 1]}),
        "prompt": ("FluxGuidance", {"guidance": 3.5, "conditioning": ["text", 0]}),
    }
    if deep:
        graph["model"] = ("DCGenApply", {"model": ["release", 0], "adapter_name": ADAPTER, "strength": 1.0})
        graph["vae"] = ("DCAELoader", {"vae_name": "toy/dc-ae-f32"})
    if hooked:
        graph["hook"] = ("CreateHookLora", {"lora_name": LORA, "strength_model": 1.0, "strength_clip": 0.0})
        graph["hooked"] = ("ConditioningSetProperties", {"cond_NEW": ["prompt", 0], "strength": 1.0})
        graph["hooked"][1].update(set_cond_area="default", hooks=["hook", 0])
    sampler = {
        **{"model": model, "positive": ["hooked" if hooked else "prompt", 0], "latent": ["latent", 0]},
        **{"seed": seed, "steps": 8, "guidance": 3.5, "sampler_name": "euler", "denoise": 1.0},
    }
    graph["sampled"] = ("DCGen4KSampler", sampler)
    graph["image"] = ("VAEDecode", {"samples": ["sampled", 0], "vae": ["vae", 0] if deep else ["release", 2]})
    graph["save"] = ("SaveImage", {"images": ["image", 0], "filename_prefix": "toy"})
    return nodes(**graph)


def decode_graph(pixels: int) -> dict[str, Any]:
    """An image of noise through the f64 DC-AE and back: encode and decode at that size."""
    return nodes(
        vae=("DCAELoader", {"vae_name": DEEP}),
        image=("EmptyImage", {"width": pixels, "height": pixels, "batch_size": 1, "color": 0x336699}),
        latent=("DCAEEncode", {"image": ["image", 0], "vae": ["vae", 0], "strip": 0}),
        decoded=("DCAEDecode", {"samples": ["latent", 0], "vae": ["vae", 0], "strip": 0}),
        small=("ImageScale", {"image": ["decoded", 0], "upscale_method": "area", "crop": "disabled", **_side(256)}),
        save=("SaveImage", {"images": ["small", 0], "filename_prefix": "decoded"}),
    )


def _side(pixels: int) -> dict[str, int]:
    return {"width": pixels, "height": pixels}


def write_files(models: Path, small: bool) -> None:
    """A random LoRA for the toy, and a DC-AE f64 in bf16 with random weights: of the true shape, or narrow if small."""
    known = load_adapter(TOY / "adapter" / ADAPTER)
    backbone, generator = BACKBONES["flux"], torch.Generator().manual_seed(0)
    lora = {}
    for name, (rows, columns) in backbone.linears(known.base).items():
        if FAMILIES["flux"].is_lora_target(name):
            lora[f"transformer.{name}.lora_A.weight"] = torch.randn((4, columns), generator=generator) * columns**-0.5
            lora[f"transformer.{name}.lora_B.weight"] = torch.randn((rows, 4), generator=generator) * 0.2
    (models / "loras").mkdir(parents=True, exist_ok=True)
    save_file(lora, models / "loras" / LORA)
    (models / "vae").mkdir(exist_ok=True)
    torch.manual_seed(0)
    config = narrowed(VARIANTS[F64]) if small else VARIANTS[F64]
    save_dcae(DCAE(config, dtype=torch.bfloat16), models / "vae" / DEEP)


def jobs(small: bool, turns: int) -> dict[str, Callable[[ComfyServer], list[bytes]]]:
    """What is run, in this order; each gives images, and raises when something is wrong."""
    pixels = 512 if small else 4096
    return {
        "toy base": lambda server: server.run(toy_graph(1, deep=False))["images"],
        "toy DC-Gen": lambda server: server.run(toy_graph(1, deep=True))["images"],
        "hook LoRA": hook_lora,
        f"DC-AE f64, bf16, {pixels} px, first": lambda server: server.run(decode_graph(pixels))["images"],
        f"DC-AE f64, bf16, {pixels * 3 // 4} px": lambda server: server.run(decode_graph(pixels * 3 // 4))["images"],
        f"base and DC-Gen alternating, {turns} times": lambda server: alternating(server, turns),
    }


def hook_lora(server: ComfyServer) -> list[bytes]:
    """A LoRA that hangs on the prompt changes the image, and leaves nothing behind."""
    before = server.run(toy_graph(2, deep=True))["images"][0]
    server.forget()  # or the core answers from its cache
    hooked = server.run(toy_graph(2, deep=True, hooked=True))["images"][0]
    after = server.run(toy_graph(2, deep=True))["images"][0]
    if hooked == before:
        raise RuntimeError("the hook had no effect")
    if after != before:
        raise RuntimeError("the hook was still there afterwards")
    return [before, hooked]


def alternating(server: ComfyServer, turns: int) -> list[bytes]:
    """Images of both models, first of one after the other and then by turns, are the same."""
    seeds = range(10, 10 + turns)
    wanted = {(deep, seed): _image(server, seed, deep) for deep in (False, True) for seed in seeds}
    server.forget()
    for seed in seeds:
        for deep in (False, True):
            if _image(server, seed, deep) != wanted[deep, seed]:
                raise RuntimeError(f"seed {seed}, {'DC-Gen' if deep else 'base'}: the image changed")
    return [wanted[False, 10], wanted[True, 10]]


def _image(server: ComfyServer, seed: int, deep: bool) -> bytes:
    return server.run(toy_graph(seed, deep=deep))["images"][0]


def run(server: ComfyServer, name: str, job: Callable[[ComfyServer], list[bytes]], out: Path) -> Row:
    started = time.perf_counter()
    with Memory(server) as memory:
        try:
            images, said = job(server), ""
        except (RuntimeError, TimeoutError, OSError) as error:
            images, said = [], str(error)[:2000]
    seconds = time.perf_counter() - started
    for number, image in enumerate(images):
        (out / f"{name.replace(' ', '-').replace(',', '')}-{number}.png").write_bytes(image)
    seen = memory.least != float("inf")
    gib = (round(memory.least / 2**30, 3), round(memory.torch / 2**30, 3)) if seen else (None, None)
    return Row(name, not said and bool(images), round(seconds, 2), said, *gib)


def main() -> None:
    parser = argparse.ArgumentParser(description="The pack in a ComfyUI on its default start.")
    parser.add_argument("--comfy", type=Path, default=None, help="a ComfyUI folder (default: as the tests find one)")
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU, at small sizes")
    parser.add_argument("--minutes", type=float, default=10.0, help="no job starts after this time")
    parser.add_argument("--turns", type=int, default=10, help="how often base and DC-Gen alternate")
    parser.add_argument("--out", type=Path, default=Path("runs/comfy_gpu"))
    given = parser.parse_args()
    comfy = given.comfy or find_comfyui()
    if comfy is None:
        raise SystemExit("no ComfyUI found: name one with --comfy, or set COMFYUI_PATH")
    if not given.cpu and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device; --cpu rehearses without one")
    given.out.mkdir(parents=True, exist_ok=True)
    started, rows = time.monotonic(), []
    with ComfyServer(comfy, cpu=given.cpu) as server:
        write_files(server.folder / "models", given.cpu)
        system = server.stats()
        dynamic = "dynamic vram" in server.log.read_text(errors="replace").lower()
        rows.append(Row("dynamic VRAM is on", dynamic or given.cpu, 0.0, "" if dynamic else "its log does not say so"))
        for name, job in jobs(given.cpu, given.turns).items():
            if time.monotonic() - started > given.minutes * 60:
                break
            rows.append(run(server, name, job, given.out))
            report = {"system": system["system"], "device": system["devices"][0], "rows": [asdict(row) for row in rows]}
            with replacing(given.out / "comfy_gpu.json") as temporary:
                temporary.write_text(json.dumps(report, indent=2), encoding="utf-8")
            print_row(rows[-1])
    raise SystemExit(0 if all(row.ok for row in rows) else 1)


def print_row(row: Row) -> None:
    free = "-" if row.least_free_gib is None else f"{row.least_free_gib:.2f}"
    print(
        f"{'ok  ' if row.ok else 'FAIL'} {row.job:44s} {row.seconds:8.2f} s   least free {free} GiB  {row.said}",
        flush=True,
    )


if __name__ == "__main__":
    main()
