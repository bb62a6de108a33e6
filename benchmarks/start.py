"""What a user waits for before the first step: starting the pack, listing releases, loading weights.

    python -m benchmarks.start [--comfy PATH ...] [--rounds 5] [--out runs/start.json]

Measured in each ComfyUI (default: those that the tests use) by its own Python, on the CPU, in processes of their own.
Starting: the process's own time that ComfyUI's loader of custom nodes takes for this pack beyond what it takes for an
empty one, the median of the rounds. Listing: the names of 500 release folders, warm. Loading: a FLUX-shaped network of
1 GB in bfloat16 and the DC-AE f32c32 (0.6 GB), random weights, from the page cache; beside it the rate of one thread
that only reads the same file into new memory, which is what the machine gives without a memory map. With dynamic VRAM
(the default on NVIDIA GPUs) the network stays in a memory map. JSON is written after every ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.dcae import machine
from dcgen.backbones import BACKBONES
from dcgen.convert import pack as pack_model
from dcgen.dcae import DCAE, VARIANTS, save_dcae
from dcgen.files import replacing
from dcgen.release import open_model
from train.comfy_client import PACK, find_comfyui, interpreter

RELEASES = 500
DCAE_NAME, LATENT = "dc-ae-f32c32-sana-1.1", "dc-ae-f64c128-in-1.0"
EMPTY = """from comfy_api.latest import ComfyExtension
class Empty(ComfyExtension):
    async def get_node_list(self):
        return []
async def comfy_entrypoint():
    return Empty()
"""


def main() -> None:
    """Measure every ComfyUI, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfy", type=Path, nargs="*", help="folders of ComfyUI; default: the first that is found")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=PACK / "runs" / "start.json")
    options = parser.parse_args()
    first = find_comfyui()
    rows: dict[str, Any] = {"machine": machine("cpu"), "results": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = prepared(Path(folder))
        for comfyui in options.comfy or ([first] if first else []):
            found = rows["results"][version(comfyui)] = {}
            rounds = [measured(comfyui, "starting", work) for _ in range(options.rounds)]
            found["starting"] = {
                "pack beyond an empty one, ms": statistics.median(r["pack, ms"] - r["empty pack, ms"] for r in rounds),
                "imported": rounds[0]["imported"],
            }
            found["listing"] = measured(comfyui, "listing", work)
            found["loading"] = measured(comfyui, "loading", work)
            if (comfyui / "comfy" / "memory_management.py").is_file():
                found["loading, dynamic VRAM"] = measured(comfyui, "loading", work, dynamic=True)
            write(options.out, rows)
    print("| ComfyUI | part | what | |", "|---|---|---|---|", sep="\n")
    for name, found in rows["results"].items():
        for part, values in found.items():
            for what, value in values.items():
                shown = f"{value:.2f}" if isinstance(value, float) else value
                print(f"| {name} | {part} | {what} | {shown} |")


def version(comfyui: Path) -> str:
    """The version that a ComfyUI folder says it is."""
    text = (comfyui / "comfyui_version.py").read_text()
    return text.partition('__version__ = "')[2].partition('"')[0]


def write(out: Path, rows: dict[str, Any]) -> None:
    """The results so far."""
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n")


def measured(comfyui: Path, part: str, work: Path, dynamic: bool = False) -> dict[str, Any]:
    """A part of start_in_comfy.py in a ComfyUI; dynamic: with dynamic VRAM as the tests simulate it on a CPU."""
    script = [str(Path(__file__).with_name("start_in_comfy.py")), part, str(PACK), str(work)]
    launch = [str(PACK / "tests" / "comfy" / "inside" / "launch.py"), "dynamic"] if dynamic else []
    done = subprocess.run([interpreter(comfyui), *launch, *script], cwd=comfyui, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{part} in {comfyui} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def prepared(work: Path) -> Path:
    """A folder with an empty pack, many releases and files of random weights."""
    (work / "empty_pack").mkdir()
    (work / "empty_pack" / "__init__.py").write_text(EMPTY)
    (work / "base" / "custom_nodes").mkdir(parents=True)
    for i in range(RELEASES):
        folder = work / "many" / f"release-{i:03}"
        for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
            (folder / part).mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
    write_network(work)
    dcae = DCAE(VARIANTS[DCAE_NAME]).bfloat16()
    save_dcae(dcae, work / "checksum.safetensors")
    save_file(load_file(work / "checksum.safetensors"), work / "dcae.safetensors")
    (work / "dcae.json").write_text(json.dumps(dcae.config.to_diffusers()))
    return work


def write_network(work: Path) -> None:
    """A FLUX of full width with few blocks, in both namings."""
    flux = BACKBONES["flux"]
    config: dict[str, Any] = {
        **{"_class_name": flux.diffusers_class, "in_channels": 128, "patch_size": 1, "guidance_embeds": True},
        **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 24},
        **{"joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56]},
    }
    release = work / "release"
    for name, values in (("transformer", config), ("vae", VARIANTS[LATENT].to_diffusers())):
        (release / name).mkdir(parents=True)
        (release / name / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC", **values}))
    state = {key: torch.randn(shape).bfloat16() for key, shape in flux.shapes(config).items()}
    save_file(state, release / "transformer" / "diffusion_pytorch_model.safetensors")
    pack_model(open_model(release), work / "network.safetensors")
    pack_model(open_model(release), work / "diffusers.safetensors", names="diffusers")


if __name__ == "__main__":
    main()
