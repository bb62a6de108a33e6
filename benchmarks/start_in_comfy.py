"""One part of benchmarks.start, run by ComfyUI's own Python: PART PACK WORK. Prints a line of JSON last.

Runs in a process of its own, since only the first import counts. Never imported.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

part, pack, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
# In bfloat16, as on a GPU: on a CPU core would expand all weights to float32, and the time of that would be measured.
sys.argv = [sys.argv[0], "--cpu", "--bf16-unet", "--bf16-vae", "--base-directory", str(work / "base")]
sys.path.insert(0, os.getcwd())

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

importlib.import_module("utils.extra_config")  # first, as in main.py: custom packages have a module of that name
importlib.import_module("comfy.sd")
folder_paths: Any = importlib.import_module("folder_paths")
nodes: Any = importlib.import_module("nodes")
server: Any = importlib.import_module("server")

import torch  # noqa: E402

torch.set_num_threads(1)
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
server.PromptServer(loop)


def milliseconds(call: Callable[[], object], times: int) -> float:
    """The fastest of some calls."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return 1000 * min(taken)


def load_pack(folder: Path) -> float:
    """Milliseconds of this process that ComfyUI takes to load a custom node pack."""
    begin = time.process_time()
    if not loop.run_until_complete(nodes.load_custom_node(str(folder), module_parent="custom_nodes")):
        raise RuntimeError(f"ComfyUI could not load {folder}")
    return 1000 * (time.process_time() - begin)


def bridge(name: str) -> Any:
    """A module of nodes/bridge in the loaded pack, whatever ComfyUI called it."""
    (module,) = [key for key in sys.modules if key.endswith(".nodes.bridge.release")]
    return importlib.import_module(f"{module.removesuffix('release')}{name}")


def starting() -> dict[str, Any]:
    """Milliseconds to load the pack and an empty one, and which large libraries it imported."""
    before = set(sys.modules)
    return {
        "pack, ms": load_pack(pack),
        "imported": sorted({"transformers", "diffusers", "torchvision"} & (set(sys.modules) - before)),
        "empty pack, ms": load_pack(work / "empty_pack"),
    }


def listing() -> dict[str, Any]:
    """Milliseconds to list the releases, and to make the schema of the loaders that list them."""
    load_pack(pack)
    folder_paths.add_model_folder_path("diffusers", str(work / "many"))
    release = bridge("release")
    loader = nodes.NODE_CLASS_MAPPINGS["DCGenReleaseLoader"]
    return {
        "releases": len(release.release_names()),
        "list, ms": milliseconds(release.release_names, 20),
        "find one, ms": milliseconds(lambda: release.find_release("release-250"), 20),
        "schema of DCGenReleaseLoader, ms": milliseconds(loader.define_schema, 20),
    }


def loading() -> dict[str, Any]:
    """GB/s of loading each file of weights, of only reading it into new memory, and of core's own loader."""
    load_pack(pack)
    release, vae = bridge("release"), bridge("vae")
    loaders = {
        "network, original names": (release.load_weights, ("network.safetensors", "default", release.FROM_FILE)),
        "network, diffusers names": (release.load_weights, ("diffusers.safetensors", "default", release.FROM_FILE)),
        "DC-AE": (vae.make_vae, ("dcae.safetensors",)),
        "DC-AE with a checksum": (vae.make_vae, ("checksum.safetensors",)),
    }
    rates = {}
    for name, (load, (file, *rest)) in loaders.items():
        path, gigabytes = work / file, (work / file).stat().st_size / 1e9
        for what, call in (("read", partial(read, path)), ("load", partial(load, path, *rest))):
            rates[f"{name}: {what}, GB/s"] = 1000 * gigabytes / milliseconds(call, 3)
    return rates


def read(path: Path) -> None:
    """A file into new memory, by one thread."""
    tensor = torch.empty(path.stat().st_size, dtype=torch.uint8)
    view, done = tensor.numpy().data, 0
    with open(path, "rb", buffering=0) as file:
        while done < len(view):
            done += file.readinto(view[done:])


PARTS = {"starting": starting, "listing": listing, "loading": loading}
print(f"\n{json.dumps(PARTS[part]())}")
