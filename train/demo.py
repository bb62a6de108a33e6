"""`python -m train.demo`: DC-Gen on the toy from end to end, and an image of what it does. Minutes on a CPU.

Runs a recipe of the toy (cache, align, head, finetune, export), draws prompts with the base, with DC-Gen after
alignment only and after fine-tuning, and writes grid.png and demo.json. Where a ComfyUI is found, the shipped toy
workflow runs in it with the adapter just made. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.threads import choose_threads  # isort: skip - before torch

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from train.comfy_client import ComfyServer, find_comfyui
from train.config import Recipe, load_recipe
from train.files import read_json, write_atomically, write_json
from train.generate import Pipeline
from train.report import write_report
from train.run import exit_code, run_recipe
from train.toy.demos import DEMOS
from train.toy.pictures import ToyPictures

COPY = "demo-adapter.safetensors"
PIXELS = 128
STEPS = 20
SEED = 11
NO_COMFYUI = "no ComfyUI found (set COMFYUI_PATH to its folder)"
DRAWING = 230  # what it costs, as Demo counts
SCALE = 2  # the grid shows each image this many times as large


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when the grid is there."""
    options = _parser().parse_args(arguments)
    return exit_code(lambda: _demo(options))


def _demo(options: argparse.Namespace) -> int:
    begin = time.perf_counter()
    output = options.output or Path(DEMOS[options.recipe].output)
    recipe = load_recipe(options.recipe, [f"output={output}/train", *options.overrides])
    comfyui = find_comfyui() if options.comfyui else None
    _announce(recipe, comfyui, options.comfyui)
    print("1/3 training: cache, align, head, finetune, export", flush=True)
    numbers = run_recipe(recipe)
    print("2/3 drawing", flush=True)
    prompts = options.prompt or demo_prompts(recipe)
    columns = [draw(name, pipeline, prompts, options.guidance) for name, pipeline in pipelines(recipe)]
    report: dict[str, Any] = {
        "prompts": list(prompts),
        "pixels": PIXELS,
        "steps": STEPS,
        "guidance": options.guidance,
        "seed": SEED,
        "columns": [{key: value for key, value in column.items() if key != "images"} for column in columns],
        "stages": {name: _stage_record(recipe, name, numbers[name]) for name in recipe.stages},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
    }
    print("3/3 ComfyUI", flush=True)
    if comfyui is None:
        report["comfyui"] = {"ran": False, "why": NO_COMFYUI if options.comfyui else "switched off"}
    else:
        report["comfyui"] = in_comfyui(recipe, output, prompts[0], comfyui)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    save_grid(output / "grid.png", prompts, columns)
    save_grid(recipe.folder / "grid.png", prompts, columns)
    write_report(recipe.folder)
    write_json(output / "demo.json", report)
    print(made(recipe, output, report))
    return 0


def _announce(recipe: Recipe, comfyui: Path | None, wanted: bool) -> None:
    """Say how long it will take and which part is left out, before anything begins."""
    threads, seconds = choose_threads()
    minutes = seconds * rounds(recipe) / 60
    about = "less than a minute" if minutes < 1 else f"about {minutes:.0f} min"
    if recipe.device == "cpu" or not torch.cuda.is_available():
        print(f"{threads} CPU thread(s): {about} at the speed this machine has now; Ctrl-C stops, the same goes on")
    if comfyui:
        print(f"part 3 runs in {comfyui}")
    else:
        print("part 3 is left out: " + (NO_COMFYUI if wanted else "--no-comfyui"))


def rounds(recipe: Recipe) -> float:
    """What is still to do, in rounds of `choose_threads`."""
    left = [name for name in recipe.stages if not (recipe.folder / name / "done.json").is_file()]
    demo = DEMOS[recipe.name]
    steps = sum(recipe.stages[name].steps for name in left if name in ("head", "finetune"))
    return demo.step * steps + (demo.fixed if "cache" in left else 0) + DRAWING


def made(recipe: Recipe, output: Path, report: dict[str, Any]) -> str:
    """What is there now, and how it is used."""
    adapter = _exported(recipe)
    ran = report["comfyui"]
    image = f"{output / ran['image']}  the template's image, drawn in ComfyUI" if ran["ran"] else ran["why"]
    return "\n".join(
        [
            f"done after {report['seconds']:.0f} s:",
            f"  {output / 'grid.png'}  base, DC-Gen after alignment, DC-Gen after finetuning",
            f"  {output / 'demo.json'}  the figures",
            f"  ComfyUI: {image}",
            f"  {adapter}  the adapter",
            "To use the adapter, put it in ComfyUI/models/model_patches, open the template "
            f"{Path(DEMOS[recipe.name].workflow).stem} and choose it in Apply DC-Gen.",
        ]
    )


def _exported(recipe: Recipe) -> Path:
    return next((recipe.folder / "export").glob("*.safetensors"))


def demo_prompts(recipe: Recipe) -> list[str]:
    """Six captions: four that training saw and two whose pair of subject and colour it never did."""
    toy = ToyPictures(recipe.stages["cache"].data.path)
    seen, unseen = toy.pairs("train"), toy.pairs("held_out")
    chosen = [seen[len(seen) * k // 4 + 5 * k] for k in range(4)] + [unseen[len(unseen) // 3], unseen[-3]]
    return [toy.caption(pair) for pair in chosen]


def pipelines(recipe: Recipe) -> list[tuple[str, Pipeline]]:
    """What the columns of the grid are drawn with."""
    cache = recipe.stages["cache"]
    adapters = {"DC-Gen, aligned only": "head", "DC-Gen, finetuned": "finetune"}
    columns: dict[str, dict[str, Any]] = {"base": {"autoencoder": cache.teacher or None}}
    for name, stage in adapters.items():
        columns[name] = {"autoencoder": cache.autoencoder, "adapter": recipe.folder / stage / "adapter.safetensors"}
    return [(name, Pipeline(cache.base, text_tokens=cache.text_tokens, **parts)) for name, parts in columns.items()]


def draw(name: str, pipeline: Pipeline, prompts: Sequence[str], guidance: float) -> dict[str, Any]:
    """A column: images, tokens, and seconds an image (network and autoencoder; one image at a time, best of 3).

    guidance g is true CFG for a model without guidance embedding.
    """
    seeds = [SEED + number for number in range(len(prompts))]
    cfg_w = 0.0 if pipeline.distilled else guidance - 1

    def images_of(count: int) -> Tensor:
        size = (PIXELS, PIXELS)
        return pipeline.images(prompts[:count], seeds[:count], *size, steps=STEPS, guidance=guidance, cfg_w=cfg_w)

    images = images_of(len(prompts))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        images_of(1)
        seconds.append(time.perf_counter() - start)
    space = pipeline.autoencoder.space
    layout = f"f{space.spatial_factor}p{pipeline.patch_size}"
    return {
        "name": name,
        "layout": layout,
        "tokens": pipeline.tokens(PIXELS, PIXELS),
        "seconds_per_picture": round(min(seconds), 4),
        "images": images,
    }


def in_comfyui(recipe: Recipe, output: Path, prompt: str, comfyui: Path) -> dict[str, Any]:
    """Run the shipped workflow with the adapter just trained; {"ran": bool, ...} says what became of it."""
    workflow = Path(DEMOS[recipe.name].workflow)
    if not workflow.is_file():
        return {"ran": False, "why": f"{workflow} is missing"}
    graph = with_prompt(read_json(workflow), prompt, COPY)  # a name of its own: the shipped adapter has the recipe's
    try:
        with ComfyServer(comfyui) as server:
            target = server.folder / "models" / "model_patches" / COPY
            target.write_bytes(_exported(recipe).read_bytes())
            result = server.run(graph)
    except (RuntimeError, TimeoutError, OSError) as error:
        print(f"ComfyUI did not run the workflow: {error}", file=sys.stderr)
        return {"ran": False, "why": str(error)[:500]}
    image = result["images"][0]
    write_atomically(output / "comfyui.png", lambda temporary: temporary.write_bytes(image))
    return {"ran": True, "image": "comfyui.png", "prompt": prompt, "seconds": round(result["seconds"], 2)}


def with_prompt(graph: dict[str, Any], prompt: str, adapter: str) -> dict[str, Any]:
    """The workflow with another prompt in its first text encoder, and this adapter; an unfit graph is an error."""
    graph = json.loads(json.dumps(graph))
    encoders = [node for node in graph.values() if node["class_type"].endswith("TextEncode")]
    texts = [node for node in encoders if node["inputs"].get("text")]
    patches = [node for node in graph.values() if node["class_type"] == "DCGenApply"]
    if not texts or not patches:
        raise RuntimeError("the workflow has no text encoder with a text, or no DCGenApply")
    texts[0]["inputs"]["text"] = prompt
    for node in patches:
        node["inputs"]["adapter_name"] = adapter
    return graph


def save_grid(path: Path, prompts: Sequence[str], columns: Sequence[dict[str, Any]]) -> Path:
    """Rows of prompts, columns of models, with captions, tokens and seconds."""
    side, gap, left, top = PIXELS * SCALE, 10, 230, 54
    font, small = ImageFont.load_default(17), ImageFont.load_default(15)
    sheet = Image.new("RGB", (left + len(columns) * (side + gap), top + len(prompts) * (side + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        x = left + number * (side + gap)
        pen.text((x, 6), column["name"], "black", font)
        line = f"{column['layout']}, {column['tokens']} tokens, {column['seconds_per_picture']:.2f} s"
        pen.text((x, 29), line, "dimgray", small)
        for row, image in enumerate(column["images"]):
            sheet.paste(_scaled(image, side), (x, top + row * (side + gap)))
    for row, prompt in enumerate(prompts):
        pen.multiline_text((8, top + row * (side + gap) + side // 2 - 20), _wrap(prompt, 26), "black", small)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _scaled(image: Tensor, side: int) -> Image.Image:
    array = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST)


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _stage_record(recipe: Recipe, name: str, numbers: dict[str, Any]) -> dict[str, Any]:
    return {"seconds": read_json(recipe.folder / name / "done.json")["seconds"], **numbers}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed to the recipe")
    parser.add_argument("--recipe", choices=list(DEMOS), default=next(iter(DEMOS)))
    parser.add_argument("--output", type=Path, help=f"default {', '.join(demo.output for demo in DEMOS.values())}")
    parser.add_argument("--prompt", action="append", help="draw this instead of the six defaults (may be repeated)")
    parser.add_argument("--guidance", type=float, default=3.5, help="g = 1 + w, of the guidance embedding or true CFG")
    parser.add_argument("--no-comfyui", dest="comfyui", action="store_false", help="do not look for a ComfyUI")
    return parser


if __name__ == "__main__":
    sys.exit(main())
