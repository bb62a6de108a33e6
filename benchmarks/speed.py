# B batch, C latent channels, D width, N tokens, f spatial factor, p patch size
"""Speed of DC-Gen FLUX against its base, as arXiv:2509.25180 Tables 5 and 6 have it, on random weights.

    python -m benchmarks.speed [--sizes 1K 2K 4K] [--steps 20] [--quick] [--out runs/speed.json]

One network in diffusers' FluxTransformer2DModel serves both: the blocks are the same, only the embedder, the head and
so the number of tokens change, which is what DC-Gen is about. On a GPU everything has its true size and is run as a
whole in bfloat16. On a CPU one block of each kind (float32, true width; --quick: a quarter of the width, 1K only) is
timed and counted as often as FLUX has it; one layer of T5 likewise; the decoders draw 256 pixels, counted by area. What
was counted so is marked "~"; the clock is the process's own CPU seconds, which other work on the machine slows least.
Beside the measured ratio stand that of the multiplications, at the width that ran and at FLUX's, and the paper's.
Peak memory: activations of one step and of decoding, counted on the meta device (so all sizes, on any machine); on a
GPU also what CUDA saw, weights included. Left out: CLIP (0.1 B), VAE encoding, the sampler's own arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

from benchmarks.peak_memory import PeakMemory
from dcgen.backbones import BACKBONES
from dcgen.dcae import DCAE, VARIANTS
from dcgen.files import replacing

FLUX = BACKBONES["flux"]
PIXELS = {"1K": 1024, "2K": 2048, "4K": 4096}
BLOCKS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
WIDTH, HEAD, TEXT_TOKENS, T5_LAYERS = 3072, 128, 512, 24
PART = 256  # pixels a side that a CPU decodes
# arXiv:2509.25180 Table 5 (H100) and Table 6 (5090, 20 steps, without SVDQuant)
PAPER = {
    "H100 image": {"base": (4.65, 23.76, 213.81), "dcgen": (1.10, 1.41, 4.04)},
    "5090 step": {"base": (0.42, 2.12, 19.22), "dcgen": (0.07, 0.14, 0.42)},
    "5090 image": {"base": (22.33, 56.91, 486.96), "dcgen": (15.17, 16.38, 22.33)},
}


@dataclass(frozen=True)
class Latent:
    """What a model is sampled in; autoencoder None is FLUX's own f8 VAE."""

    channels: int
    factor: int
    patch: int
    autoencoder: str | None = None


BASE = Latent(16, 8, 2)
DCGEN = {
    "1K": Latent(32, 32, 1, "dc-ae-f32c32-in-1.0"),
    "2K": Latent(128, 64, 1, "dc-ae-1.5-f64c128"),
    "4K": Latent(128, 64, 1, "dc-ae-1.5-f64c128"),
}


@dataclass
class Row:
    """One model at one size; seconds on this machine (an image only where all its parts have their width), bytes."""

    method: str
    size: str
    tokens: int
    step_s: float
    text_s: float
    decode_s: float
    image_s: float | None
    step_bytes: int
    decode_bytes: int
    cuda_bytes: int | None
    counted: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Machine:
    """Where and how much of the model is run."""

    device: torch.device
    dtype: torch.dtype
    width: int
    depth: dict[str, int]
    clock: Callable[[], float]

    @property
    def whole(self) -> bool:
        return self.depth == BLOCKS

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def machine(device: str, quick: bool) -> Machine:
    """A GPU runs the true model by the wall clock; a CPU one block of each kind, by its own CPU seconds per thread."""
    if device == "cuda":
        return Machine(torch.device(device), torch.bfloat16, WIDTH, dict(BLOCKS), time.perf_counter)
    threads = torch.get_num_threads()
    width = WIDTH // 4 if quick else WIDTH
    return Machine(
        torch.device(device), torch.float32, width, dict.fromkeys(BLOCKS, 1), lambda: time.process_time() / threads
    )


def make(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module with small random numbers, repeated: drawing 12 billion of them would take longer than using them."""
    with torch.device("meta"):
        model = build().to(dtype)
    model.to_empty(device=device)
    tile = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).mul(0.02).to(device, dtype)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            flat = value.view(-1)
            for start in range(0, flat.numel(), tile.numel()) if value.is_floating_point() else ():
                part = flat[start : start + tile.numel()]
                part.copy_(tile[: part.numel()])
    return model.eval().requires_grad_(False)


def flux(width: int, depth: dict[str, int]) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=depth["transformer_blocks"],
        num_single_layers=depth["single_transformer_blocks"],
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        guidance_embeds=True,
    )


def set_latent(model: nn.Module, latent: Latent, width: int, device: torch.device, dtype: torch.dtype) -> None:
    """Another embedder and head around the same blocks."""
    packed = latent.channels * latent.patch**2
    model.x_embedder = make(lambda: nn.Linear(packed, width), device, dtype)
    model.proj_out = make(lambda: nn.Linear(width, packed), device, dtype)


def step_inputs(
    tokens: int, latent: Latent, device: torch.device, dtype: torch.dtype, text: int = TEXT_TOKENS
) -> dict[str, torch.Tensor | bool]:
    """What FluxPipeline hands the network at one step."""
    one = torch.ones(1, device=device, dtype=dtype)
    return {
        "hidden_states": torch.ones(1, tokens, latent.channels * latent.patch**2, device=device, dtype=dtype),
        "encoder_hidden_states": torch.ones(1, text, 4096, device=device, dtype=dtype),
        "pooled_projections": torch.ones(1, 768, device=device, dtype=dtype),
        "timestep": one,
        "guidance": 3.5 * one,
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }


class Timed:
    """Seconds spent in each list of blocks while a model runs, by hooks on the blocks."""

    def __init__(self, at: Machine, **lists: nn.ModuleList):
        self.seconds = dict.fromkeys(lists, 0.0)
        self._begin = 0.0

        def before(*_: object) -> None:
            self._begin = at.now()

        def after(name: str) -> Callable[..., None]:
            def add(*_: object) -> None:
                self.seconds[name] += at.now() - self._begin

            return add

        blocks = [(name, block) for name, blocks in lists.items() for block in blocks]
        self._hooks = [block.register_forward_pre_hook(before) for _, block in blocks]
        self._hooks += [block.register_forward_hook(after(name)) for name, block in blocks]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def whole_time(at: Machine, call: Callable[[], object], times: dict[str, tuple[nn.ModuleList, int]]) -> float:
    """Seconds of `call` if each list had its true number of blocks."""
    if at.whole:
        begin = at.now()
        call()
        return at.now() - begin
    timed = Timed(at, **{name: blocks for name, (blocks, _) in times.items()})
    begin = at.now()
    call()
    seconds = at.now() - begin
    timed.remove()
    return seconds + sum(
        timed.seconds[name] * (count / len(blocks) - 1) for name, (blocks, count) in times.items() if len(blocks)
    )


def step_seconds(at: Machine, model: nn.Module, latent: Latent, tokens: int, repeats: int) -> float:
    """The best of `repeats` steps, after one short one."""
    set_latent(model, latent, at.width, at.device, at.dtype)
    lists = {name: (getattr(model, name), count) for name, count in BLOCKS.items()}
    model(**step_inputs(64, latent, at.device, at.dtype, text=64))
    inputs = step_inputs(tokens, latent, at.device, at.dtype)
    return min(whole_time(at, lambda: model(**inputs), lists) for _ in range(repeats))


def text_seconds(at: Machine) -> float:
    """T5-XXL on 512 tokens, once for an image."""
    config = T5Config(
        vocab_size=32128 if at.whole else 32,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_heads=64,
        num_layers=T5_LAYERS if at.whole else 1,
        feed_forward_proj="gated-gelu",
    )
    model = make(lambda: T5EncoderModel(config), at.device, at.dtype)
    ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.long, device=at.device)
    model(ids[:, :8])
    return whole_time(at, lambda: model(ids), {"block": (model.encoder.block, T5_LAYERS)})


def decoder(latent: Latent) -> nn.Module:
    """FLUX's VAE by its published config, or a DC-AE."""
    if latent.autoencoder is not None:
        return DCAE(VARIANTS[latent.autoencoder])
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent.channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=1024,
    )


def decode(model: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    out = model.decode(latents)
    return out if isinstance(out, torch.Tensor) else out.sample


def decode_seconds(at: Machine, latent: Latent, pixels: int) -> float:
    """One image. FLUX's own VAE goes by tiles above 2K, as it must: its attention is over all latents."""
    model = make(lambda: decoder(latent), at.device, at.dtype)
    side = pixels if at.whole else PART
    if latent.autoencoder is None and side > PIXELS["2K"]:
        model.enable_tiling()
    shape = (1, latent.channels, side // latent.factor, side // latent.factor)
    decode(model, torch.zeros(1, latent.channels, 2, 2, device=at.device, dtype=at.dtype))
    begin = at.now()
    decode(model, torch.zeros(shape, device=at.device, dtype=at.dtype))
    return (at.now() - begin) * (pixels / side) ** 2


def activation_bytes(latent: Latent, pixels: int) -> tuple[int, int]:
    """Peak of one step and of decoding in bfloat16, weights left out; whole, without tiles."""
    meta, dtype = torch.device("meta"), torch.bfloat16
    with meta:
        model = flux(WIDTH, dict.fromkeys(BLOCKS, 1)).to(dtype).eval()
        set_latent(model, latent, WIDTH, meta, dtype)
        ae = decoder(latent).to(dtype).eval()
    inputs = step_inputs(FLUX.tokens(pixels, pixels, latent.factor, latent.patch), latent, meta, dtype)
    with PeakMemory(*model.parameters()) as step:
        model(**inputs)
    latents = torch.zeros(
        1, latent.channels, pixels // latent.factor, pixels // latent.factor, device=meta, dtype=dtype
    )
    with PeakMemory(*ae.parameters(), *ae.buffers()) as drawing:
        decode(ae, latents)
    return step.peak, drawing.peak


def multiplications(tokens: int, width: int = WIDTH, depth: int = sum(BLOCKS.values())) -> int:
    """Of one step: 12 D^2 a token in the linear layers of a block of either kind, 2 N D in its attention."""
    n = tokens + TEXT_TOKENS
    return depth * n * (12 * width**2 + 2 * n * width)


def measure(at: Machine, sizes: Sequence[str], steps: int, repeats: int) -> list[Row]:
    """Base and DC-Gen at every size."""
    text = text_seconds(at)
    model = make(lambda: flux(at.width, at.depth), at.device, at.dtype)
    rows = []
    for size in sizes:
        for method, latent in (("base", BASE), ("dcgen", DCGEN[size])):
            tokens = FLUX.tokens(PIXELS[size], PIXELS[size], latent.factor, latent.patch)
            if at.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step = step_seconds(at, model, latent, tokens, repeats)
            drawing = decode_seconds(at, latent, PIXELS[size])
            rows.append(
                Row(
                    method=method,
                    size=size,
                    tokens=tokens,
                    step_s=step,
                    text_s=text,
                    decode_s=drawing,
                    image_s=text + steps * step + drawing if at.width == WIDTH else None,
                    step_bytes=(peaks := activation_bytes(latent, PIXELS[size]))[0],
                    decode_bytes=peaks[1],
                    cuda_bytes=torch.cuda.max_memory_allocated() if at.device.type == "cuda" else None,
                    counted=[] if at.whole else ["step", "text", "decode"],
                )
            )
            print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    about = "~" if row.counted else " "
    parts = (row.step_s, row.text_s, row.decode_s, row.image_s)
    seconds = "".join(f"{'-' if value is None else about + format(value, '.3g'):>11}" for value in parts)
    memory = "".join(f"{value / 2**30:>11.2f}" for value in (row.step_bytes, row.decode_bytes))
    cuda = "" if row.cuda_bytes is None else f"{row.cuda_bytes / 2**30:>11.2f}"
    return f"{row.size:4}{row.method:7}{row.tokens:>7}{seconds}{memory}{cuda}"


HEADER = (
    f"{'':11}{'tokens':>7}{'s/step':>11}{'text s':>11}{'decode s':>11}{'s/image':>11}{'step GiB':>11}{'decode GiB':>11}"
)


def ratios(rows: Sequence[Row], width: int) -> dict[str, dict[str, float]]:
    """Base over DC-Gen by size: measured, by multiplications at the measured and the true width, and the paper's."""
    found = {}
    for base, dcgen in zip(rows[::2], rows[1::2], strict=True):
        paper = {
            name: both["base"][i] / both["dcgen"][i]
            for i in [list(PIXELS).index(base.size)]
            for name, both in PAPER.items()
        }
        found[base.size] = {
            "tokens": base.tokens / dcgen.tokens,
            "step": base.step_s / dcgen.step_s,
            "step, multiplications at this width": multiplications(base.tokens, width)
            / multiplications(dcgen.tokens, width),
            "step, multiplications at FLUX's width": multiplications(base.tokens) / multiplications(dcgen.tokens),
            **({"image": base.image_s / dcgen.image_s} if base.image_s and dcgen.image_s else {}),
            **{f"paper, {name}": value for name, value in paper.items()},
        }
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(found.values())))
    wide = max(map(len, names)) + 2
    lines = [f"{'base / DC-Gen':{wide}}" + "".join(f"{size:>9}" for size in found)]
    lines += [f"{name:{wide}}" + "".join(f"{row[name]:>8.2f}x" for row in found.values()) for name in names]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    diffusers.utils.logging.set_verbosity_error()  # it warns of a cast that changes nothing here
    at = machine(options.device, options.quick)
    sizes = options.sizes or (["1K"] if options.quick else list(PIXELS) if at.whole else ["1K", "2K"])
    name = torch.cuda.get_device_name() if at.device.type == "cuda" else f"{platform.machine()} CPU"
    depth = "whole" if at.whole else f"one block of each kind, width {at.width}"
    print(f"{name}, torch {torch.__version__}, {str(at.dtype).removeprefix('torch.')}, {depth}\n{HEADER}", flush=True)
    with torch.inference_mode():
        rows = measure(at, sizes, options.steps, options.repeats)
    found = ratios(rows, at.width)
    print(table(found))
    result = {
        "machine": {"name": name, "torch": torch.__version__, "threads": options.threads, "dtype": str(at.dtype)},
        "width": at.width,
        "blocks": at.depth,
        "steps": options.steps,
        "rows": [asdict(row) for row in rows],
        "ratios": found,
    }
    with replacing(options.out) as temporary:
        Path(temporary).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(PIXELS), help="default: all on a GPU, 1K 2K on a CPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many steps counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a quarter of the width, 1K only (CPU)")
    parser.add_argument("--out", type=Path, default=Path("runs/speed.json"))
    return parser


if __name__ == "__main__":
    main()
