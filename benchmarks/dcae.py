"""DC-AE against diffusers' AutoencoderDC (whole and tiled): time and peak activation memory, encode and decode.

    python benchmarks/dcae.py [--quick] [--variants NAME ...] [--sizes 512 1024] [--device cpu] [--dtype float32]

All ways run in turn in one process on the same random weights and input; times are the best of `--repeats`, given as
ratios to whole diffusers, because other work on the machine slows all of them (`--clock cpu` counts this process's CPU
seconds, which it slows least). Memory is the peak of live tensors (weights and input left out), counted on the meta
device, where it is the same number as on any other; on a GPU what the allocator held is measured, too. Rows of 4096
pixels are counted in bfloat16 only.

Every row goes into the JSON of `--out` as soon as it is there; a run that is started again skips the rows which that
file has. --quick: two variants at 512 pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from diffusers.utils import logging as diffusers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.peak_memory import PeakMemory
from dcgen.dcae import DCAE, VARIANTS, DCAEConfig, Strip, choose_strip, peak_bytes

# one of each network; the others are these under another name
FAMILIES = (
    "dc-ae-f32c32-sana-1.0",
    "dc-ae-lite-f32c32-sana-1.1",
    "dc-ae-f32c32-in-1.0",
    "dc-ae-f64c128-in-1.0",
    "dc-ae-f128c512-in-1.0",
    "dc-ae-1.5-f32c128",
    "dc-ae-1.5-f64c128",
)
QUICK = ("dc-ae-f32c32-sana-1.0", "dc-ae-1.5-f64c128")
WAYS = ("diffusers", "tiled", "strip")
LARGE = 4096
LARGE_BYTES = 2 << 30
COUNTED = {"device": "meta", "dtype": "bfloat16"}  # settings of the rows at LARGE
SETTINGS = ("device", "dtype", "threads", "clock", "strip")
COLUMNS = "{:28} {:6} {:>5} {:>9} {:>7} {:>7} {:>7} {:>9} {:>7} {:>7} {:>8}"
HEADER = ("variant", "", "size", "diff. s", "tiled", "strip", "err", "diff. MiB", "tiled", "strip", "formula")

Row = dict[str, Any]
Models = tuple[AutoencoderDC, DCAE]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    diffusers_logging.set_verbosity_error()
    settings = {key: getattr(args, key) for key in SETTINGS}
    table = Table(args.out)
    print(f"torch {torch.__version__}, {machine(args.device)}, load {os.getloadavg()[0]:.1f}, {settings}")
    print(COLUMNS.format(*HEADER))
    for name in args.variants:
        plan = [(direction, size) for direction in args.directions for size in args.sizes]
        todo = [step for step in plan if not table.has(name, *step, settings)]
        if todo:
            pair, meta = models(name, args.device, args.dtype), models(name, "meta", args.dtype)
            for direction, size in todo:
                table.add(compare(name, pair, meta, direction, size, args) | settings)
            del pair, meta
        for direction in args.directions:
            if not table.has(name, direction, LARGE, COUNTED):
                table.add(count(name, models(name, "meta", "bfloat16"), direction) | COUNTED)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS))
    parser.add_argument("--directions", nargs="+", choices=("encode", "decode"), default=("encode", "decode"))
    parser.add_argument("--sizes", nargs="+", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="diffusers is always among them")
    parser.add_argument("--strip", type=int, default=1, help="latent rows at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", type=Path, help="JSON of all figures, kept up to date row by row")
    args = parser.parse_args()
    args.variants = args.variants or (QUICK if args.quick else FAMILIES)
    args.ways = tuple(way for way in WAYS if way == WAYS[0] or way in args.ways)
    args.sizes = args.sizes or ((512,) if args.quick else (512, 1024, 2048))
    args.repeats = args.repeats or (1 if args.quick else 2)
    return args


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} with {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"


class Table:
    """The rows so far, on screen and in a JSON file that is whole at any moment."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if path and path.is_file() else []

    def has(self, name: str, direction: str, size: int, settings: dict[str, Any]) -> bool:
        wanted = {"variant": name, "direction": direction, "size": size, **settings}
        return any(wanted.items() <= found.items() for found in self.plain())

    def plain(self) -> list[Row]:
        return [{k: v for k, v in found.items() if not isinstance(v, dict)} for found in self.rows]

    def add(self, found: Row) -> None:
        self.rows.append(found | {"load": round(os.getloadavg()[0], 2)})
        show(found)
        if self.path:
            facts = {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps(facts | {"rows": self.rows}, indent=1) + "\n")
            os.replace(part, self.path)


def models(name: str, device: str, dtype_name: str) -> Models:
    """Both models of a variant on the same random weights."""
    return models_of(VARIANTS[name], device, getattr(torch, dtype_name))


def narrowed(config: DCAEConfig) -> DCAEConfig:
    """The same network an eighth as wide, for trying a script out."""
    sides = ("encoder_block_out_channels", "decoder_block_out_channels")
    widths: dict[str, Any] = {side: tuple(width // 8 for width in getattr(config, side)) for side in sides}
    return dataclasses.replace(config, name="narrow", **widths)


def models_of(config: DCAEConfig, device: str, dtype: torch.dtype) -> Models:
    """Both models of a config on the same random weights."""
    config = dataclasses.replace(config, scaling_factor=1.0)
    with torch.device(device):
        oracle = AutoencoderDC.from_config(config.to_diffusers()).eval().requires_grad_(False).to(dtype)
    model = DCAE(config, dtype=dtype, device="meta").eval().requires_grad_(False)
    state = oracle.state_dict()
    model.load_state_dict(
        {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()},
        assign=True,
    )
    return oracle, model


def calls(pair: Models, x: torch.Tensor, direction: str, strip: int | None) -> dict[str, Callable[[], torch.Tensor]]:
    """The three WAYS to the same picture."""
    oracle, model = pair

    def diffusers(tiled: bool) -> torch.Tensor:
        oracle.use_tiling = tiled
        return getattr(oracle, direction)(x)[0]

    return {
        "diffusers": lambda: diffusers(False),
        "tiled": lambda: diffusers(True),
        "strip": lambda: getattr(model, direction)(x, strip),
    }


@torch.no_grad()
def compare(name: str, pair: Models, meta: Models, direction: str, size: int, args: argparse.Namespace) -> Row:
    """Time and peak memory of whole diffusers, tiled diffusers and our strips."""
    model = pair[1]
    x = example(model, direction, size).to(args.device, model.dtype)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {}
    results: dict[str, torch.Tensor] = {}
    held: dict[str, int] = {}
    todo = calls(pair, x, direction, args.strip)
    if x.device.type == "cuda":  # the first call loads and chooses kernels
        for way in args.ways:
            todo[way]()
    for _ in range(args.repeats):  # in turn, so that a busy moment does not hit one of them only
        for way in args.ways:
            results.pop(way, None)
            before = start_memory(x.device)
            start = clock()
            results[way] = todo[way]()
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
                held[way] = torch.cuda.max_memory_allocated(x.device) - before
            seconds.setdefault(way, []).append(clock() - start)
    scale = results["diffusers"].abs().max()
    error = {way: ((results[way] - results["diffusers"]).abs().max() / scale).item() for way in args.ways[1:]}
    best = {way: min(times) for way, times in seconds.items()}
    memory = peaks(meta, x.to("meta"), direction, args.strip)
    found = row(name, direction, size, best, memory, error, args.strip, model)
    return found | ({"cuda_bytes": held} if held else {}) | {"repeats": args.repeats}


def start_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


@torch.no_grad()
def count(name: str, meta: Models, direction: str) -> Row:
    """Peak memory at 4096 pixels in bfloat16; the strip is chosen for 2 GiB."""
    model = meta[1]
    side = LARGE // model.config.spatial_factor
    strip = choose_strip(model.config, side, side, torch.bfloat16, LARGE_BYTES, direction).rows
    f = model.config.spatial_factor
    shape = (1, 3, LARGE, LARGE) if direction == "encode" else (1, model.config.latent_channels, LARGE // f, LARGE // f)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return row(name, direction, LARGE, {}, peaks(meta, x, direction, strip), {}, strip, model)


def example(model: DCAE, direction: str, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    if direction == "encode":
        return torch.rand((1, 3, size, size), generator=generator) * 2 - 1
    side = size // model.config.spatial_factor
    return torch.randn((1, model.config.latent_channels, side, side), generator=generator)


def peaks(meta: Models, x: torch.Tensor, direction: str, strip: int | None) -> dict[str, int]:
    """Peak bytes of live tensors of each way, without weights and input."""
    weights = [value for module in meta for value in (*module.parameters(), *module.buffers())]
    found = {}
    for way, call in calls(meta, x, direction, strip).items():
        with PeakMemory(x, *weights) as counter:
            call()
        found[way] = counter.peak
    return found


def row(
    name: str,
    direction: str,
    size: int,
    seconds: dict[str, float],
    memory: dict[str, int],
    error: dict[str, float],
    strip: int | None,
    model: DCAE,
) -> Row:
    side = size // model.config.spatial_factor
    formula = peak_bytes(model.config, side, side, model.dtype, Strip(strip), direction)
    return {
        **{"variant": name, "direction": direction, "size": size, "strip": strip, "seconds": seconds},
        **{"peak_bytes": memory, "relative_error": error, "formula_bytes": formula},
    }


def show(found: Row) -> None:
    seconds, memory, error = found["seconds"], found["peak_bytes"], found["relative_error"]
    whole = seconds.get("diffusers")
    times = [f"{seconds[way] / whole:.2f}x" if whole and way in seconds else "-" for way in WAYS[1:]]
    shares = [f"{memory[way] / memory['diffusers']:.2f}x" for way in WAYS[1:]]
    cells = [found["variant"], found["direction"], found["size"], f"{whole:.2f}" if whole else "-", *times]
    cells += [f"{error['strip']:.0e}" if "strip" in error else "-", memory["diffusers"] >> 20, *shares]
    print(COLUMNS.format(*cells, found["formula_bytes"] >> 20), flush=True)


if __name__ == "__main__":
    main()
