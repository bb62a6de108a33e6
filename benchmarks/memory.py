"""What a model takes on a GPU, computed from shapes: weights, activations of a step, DC-AE decode. Nothing is measured.

python -m benchmarks.memory [--json FILE]

Weights: every tensor of the network at the bytes of the format; norms, biases and the two ends stay at 16 bits.
Activations: the estimate that ComfyUI plans with, for one image of the size, without classifier-free guidance.
Decode: the strip that the node chooses, by dcgen.dcae's own memory model (it runs after the sampler, not beside it).
A GPU that cannot hold weights and activations keeps the rest of the weights in RAM, at the cost of speed.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dcgen.backbones import Backbone, Config
from dcgen.dcae import VARIANTS, choose_strip, peak_bytes
from train.families import ARCHITECTURES

GIB = 1 << 30
# Bytes of a value: nvfp4 has one scale byte for 16 values of 4 bits.
FORMATS = {"bf16": 2.0, "fp8, int8": 1.0, "nvfp4": 0.5625}
CARDS = (12, 16, 24)
RESERVE = 1.0  # GiB for CUDA, the desktop and what PyTorch's allocator keeps
WORKING_BYTES = 512 << 20  # of a strip, as nodes/bridge/vae.py asks for
# Name of the architecture -> (title, autoencoder, side in pixels, memory per latent pixel as ComfyUI counts it: bytes).
MODELS = {
    "dc-gen-flux-f32": ("DC-Gen FLUX 1K", "dc-ae-f32c32-in-1.0", 1024),
    "dc-gen-flux-f64": ("DC-Gen FLUX 4K", "dc-ae-1.5-f64c128", 4096),
    "dc-gen-klein-4b-f32": ("DC-Gen klein 4B 1K", "dc-ae-f32c32-in-1.0", 1024),
    "dc-gen-klein-4b-f64": ("DC-Gen klein 4B 4K", "dc-ae-1.5-f64c128", 4096),
    "dc-gen-z-image-f32": ("DC-Gen Z-Image 1K", "dc-ae-f32c32-in-1.0", 1024),
    "dc-gen-z-image-f64": ("DC-Gen Z-Image 4K", "dc-ae-1.5-f64c128", 4096),
    "sana-1.5-1.6b": ("SANA 1.6B 1K", "dc-ae-f32c32-sana-1.1", 1024),
    "sana-1.5-4.8b": ("SANA 4.8B 1K", "dc-ae-f32c32-sana-1.1", 1024),
}
# ComfyUI: MiB = latent pixels * bytes of a value * 0.01 * factor; FLUX's factor 3.1 is for patches of 2. FLUX.2's is
# the same in proportion to the width.
FLUX_FACTOR, PATCHES = 3.1, 4
WIDTH_OF_ESTIMATE = {"flux2": 2604}
ZIMAGE_FACTOR = 2.8  # of ComfyUI 0.33; 2.0 in 0.8
SANA_WIDTHS = 15  # values per token at the peak of a block, in widths (nodes/bridge/families/sana)


@dataclass(frozen=True)
class Need:
    """Memory of one model in one format, in GiB."""

    model: str
    format: str
    pixels: int
    weights: float
    step: float
    decode: float

    def on_card(self, size: int) -> float:
        """GiB of weights that a card of `size` GiB leaves in RAM."""
        return max(0.0, self.weights + self.step + RESERVE - size)


def needs() -> list[Need]:
    """One row for each model and format."""
    rows = []
    for name, (title, autoencoder, pixels) in MODELS.items():
        family, architecture = ARCHITECTURES[name]
        shapes = family.backbone.shapes({"patch_size": 1, **architecture.config})
        tokens = (pixels // VARIANTS[autoencoder].spatial_factor) ** 2
        for format, size in FORMATS.items():
            matrices, others = _split(shapes, family.backbone.ends({"patch_size": 1}).prefixes)
            weights = (matrices * size + others * 2) / GIB
            step = _step(family.backbone, architecture.config, tokens)
            rows.append(Need(title, format, pixels, weights, step, _decode(autoencoder, pixels)))
    return rows


def _split(shapes: dict[str, tuple[int, ...]], ends: tuple[str, ...]) -> tuple[int, int]:
    """Values in weight matrices of the blocks, and in everything else."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    inside = [name for name in sizes if len(shapes[name]) > 1 and not name.startswith(ends)]
    matrices = {name: sizes[name] for name in inside if name.endswith(".weight")}
    return sum(matrices.values()), sum(sizes.values()) - sum(matrices.values())


def _step(backbone: Backbone, config: Config, tokens: int) -> float:
    if backbone.name in ("flux", "flux2"):
        width = backbone.width(config)
        scale = width / WIDTH_OF_ESTIMATE.get(backbone.name, width)
        return tokens * 2 * 0.01 * FLUX_FACTOR * PATCHES * scale / 1024
    if backbone.name == "zimage":
        return tokens * 2 * 0.01 * ZIMAGE_FACTOR * PATCHES / 1024
    return tokens * 2 * SANA_WIDTHS * backbone.width(config) / GIB


def _decode(autoencoder: str, pixels: int) -> float:
    config = VARIANTS[autoencoder]
    side = pixels // config.spatial_factor
    strip = choose_strip(config, side, side, torch.bfloat16, 1 << 50, "decode", WORKING_BYTES)
    return peak_bytes(config, side, side, torch.bfloat16, strip, "decode") / GIB


def table(rows: list[Need]) -> str:
    """Markdown: weights, step and decode in GiB, and what each card leaves in RAM."""
    head = ["model", "format", "weights", "step", "decode", *(f"{size} GB card" for size in CARDS)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cards = [f"{left:.1f} in RAM" if (left := row.on_card(size)) else "fits" for size in CARDS]
        lines.append([row.model, row.format, f"{row.weights:.1f}", f"{row.step:.1f}", f"{row.decode:.1f}", *cards])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def note(model: str) -> str:
    """One paragraph on a model, for the note of a template."""
    parts = []
    for row in needs():
        if row.model == model:
            cards = [f"{left:.1f} on {size} GB" for size in CARDS if (left := row.on_card(size)) >= 0.1]
            rest = f"of which stay in RAM {', '.join(cards)}" if cards else f"fits {CARDS[0]} GB"
            parts.append(f"{row.format} {row.weights:.1f} GB ({rest})")
    step = next(row for row in needs() if row.model == model)
    return (
        f"**GPU memory** (computed from shapes with **python -m benchmarks.memory**, not measured): weights in "
        f"{'; '.join(parts)}; a step {step.step:.1f} GB, the decode {step.decode:.1f} GB. Weights in RAM cost time."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    rows = needs()
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
