# B batch, C latent channels, D width, N tokens, f spatial factor, p patch size
"""Speed of FLUX and SANA and of DC-Gen on them, as arXiv:2509.25180 Tables 2, 5 and 6 have it, on random weights.

    python -m benchmarks.speed [--models flux sana-1.6b sana-4.8b] [--sizes 1K 2K 4K] [--out runs/speed.json]
    python -m benchmarks.speed --models network     # one step of our SANA network against diffusers' in the same run

Base and DC-Gen have the same blocks; only embedder, head and the number of tokens differ, which is what DC-Gen is
about. FLUX is diffusers' FluxTransformer2DModel, one run a step; SANA is this project's network, two runs a step (with
the prompt and without, as a batch of two). On a GPU everything has its true size. On a CPU it has its true width but
fewer blocks (the column says how many ran; --whole: all), decoding stops at 1K and a step at 20,000 tokens: "-" stands
for what was not run, and nothing is scaled up from less. The clock of a CPU is the process's own seconds a thread,
which other work on the machine slows least. Peak memory: activations of one step and of decoding in bfloat16, counted
on the meta device (so all sizes, on any machine); on a GPU also what CUDA saw, weights included. Left out: CLIP, which
is small, VAE encoding, the sampler's own arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SanaTransformer2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, Gemma2Model, T5Config, T5EncoderModel

from benchmarks.peak_memory import PeakMemory
from dcgen.backbones import BACKBONES
from dcgen.backbones.sana import SanaConfig, SanaNet
from dcgen.dcae import DCAE, VARIANTS
from dcgen.files import replacing

PIXELS = {"1K": 1024, "2K": 2048, "4K": 4096}
# What a CPU does in minutes: tokens of a step (FLUX's attention grows with their square), pixels a side to decode.
CPU_TOKENS, CPU_PIXELS = 20_000, 1024
PROMPT_TOKENS = 50  # of SANA's 300 text positions


@dataclass(frozen=True)
class Latent:
    """What a model is sampled in; autoencoder None is FLUX's own f8 VAE."""

    channels: int
    factor: int
    patch: int = 1
    autoencoder: str | None = None


@dataclass(frozen=True)
class Model:
    """A base model, what a CPU runs of it, and what it and DC-Gen are sampled in.

    blocks: number of blocks by attribute, and on a CPU; text: builds the text encoder of so many layers, and the
    numbers of tokens it reads for one image; paper: base and DC-Gen by size, None where the paper has no such size.
    """

    name: str
    backbone: str
    base: Latent
    dcgen: dict[str, Latent]
    blocks: dict[str, int]
    cpu_blocks: dict[str, int]
    network: Callable[[dict[str, int], Latent], nn.Module]
    inputs: Callable[[int, Latent, Any], dict[str, Any]]
    text: Callable[[int], nn.Module]
    text_layers: int
    cpu_text_layers: int
    text_reads: tuple[int, ...]
    paper: dict[str, dict[str, tuple[float, float]]]

    def tokens(self, size: str, latent: Latent) -> int:
        return BACKBONES[self.backbone].tokens(PIXELS[size], PIXELS[size], latent.factor, latent.patch)


# FLUX -----------------------------------------------------------------------------------------------------------------


def flux(blocks: dict[str, int], latent: Latent, width: int = 3072, head: int = 128) -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=latent.channels * latent.patch**2,
        num_layers=blocks["transformer_blocks"],
        num_single_layers=blocks["single_transformer_blocks"],
        attention_head_dim=head,
        num_attention_heads=width // head,
        guidance_embeds=True,
    )


def flux_inputs(tokens: int, latent: Latent, place: Any, text: int = 512) -> dict[str, Any]:
    """What FluxPipeline hands the network at one step; place: dtype and device."""
    one, device = torch.ones(1, **place), place["device"]
    return {
        "hidden_states": torch.ones(1, tokens, latent.channels * latent.patch**2, **place),
        "encoder_hidden_states": torch.ones(1, text, 4096, **place),
        "pooled_projections": torch.ones(1, 768, **place),
        "timestep": one,
        "guidance": 3.5 * one,
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }


def t5(layers: int) -> nn.Module:
    """T5-XXL; a small vocabulary, since looking a word up costs nothing."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": layers}
    return T5EncoderModel(T5Config(vocab_size=32, feed_forward_proj="gated-gelu", **sizes))


# SANA -----------------------------------------------------------------------------------------------------------------


def sana(blocks: dict[str, int], latent: Latent, qk_norm: str | None = None) -> nn.Module:
    channels, layers = latent.channels, blocks["transformer_blocks"]
    return SanaNet(SanaConfig(in_channels=channels, out_channels=channels, num_layers=layers, qk_norm=qk_norm))


def sana_15(blocks: dict[str, int], latent: Latent) -> nn.Module:
    return sana(blocks, latent, "rms_norm_across_heads")


def sana_inputs(tokens: int, latent: Latent, place: Any, batch: int = 2, prompt: int = PROMPT_TOKENS) -> dict[str, Any]:
    """What a sampler with cfg hands the network at one step: 300 text positions, most of them padding."""
    side = round(tokens**0.5)
    positions = 300 if place["device"].type != "meta" else prompt
    mask = torch.ones(batch, positions, device=place["device"])
    mask[:, prompt:] = 0
    return {
        "latents": torch.ones(batch, latent.channels, side, side, **place),
        "timestep": torch.full((batch,), 500.0, device=place["device"]),
        "caption": torch.ones(batch, positions, 2304, **place),
        "caption_mask": mask,
    }


def gemma(layers: int) -> nn.Module:
    """Gemma-2-2B, with a small vocabulary."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    sizes = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": layers, **heads}
    return Gemma2Model(Gemma2Config(vocab_size=32, pad_token_id=0, bos_token_id=2, eos_token_id=1, **sizes))


SANA_F32 = Latent(32, 32, 1, "dc-ae-f32c32-sana-1.0")
F64 = Latent(128, 64, 1, "dc-ae-1.5-f64c128")
_SANA: dict[str, Any] = {
    "backbone": "sana",
    "base": SANA_F32,
    "dcgen": dict.fromkeys(PIXELS, F64),
    "cpu_blocks": {"transformer_blocks": 4},
    "inputs": sana_inputs,
    "text": gemma,
    "text_layers": 26,
    "cpu_text_layers": 2,
    "text_reads": (500, 300),  # the instruction (about 200) and 300 positions; the negative prompt has no instruction
}
MODELS = {
    "flux": Model(
        name="FLUX",
        backbone="flux",
        base=Latent(16, 8, 2),
        dcgen={"1K": Latent(32, 32, 1, "dc-ae-f32c32-in-1.0"), "2K": F64, "4K": F64},
        blocks={"transformer_blocks": 19, "single_transformer_blocks": 38},
        cpu_blocks={"transformer_blocks": 1, "single_transformer_blocks": 2},
        network=flux,
        inputs=flux_inputs,
        text=t5,
        text_layers=24,
        cpu_text_layers=1,
        text_reads=(512,),
        paper={  # Tables 5 (H100) and 6 (5090, 20 steps, without SVDQuant), seconds, and 2, images a minute
            "H100 image": {"1K": (4.65, 1.10), "2K": (23.76, 1.41), "4K": (213.81, 4.04)},
            "5090 step": {"1K": (0.42, 0.07), "2K": (2.12, 0.14), "4K": (19.22, 0.42)},
            "5090 image": {"1K": (22.33, 15.17), "2K": (56.91, 16.38), "4K": (486.96, 22.33)},
            "H100 throughput": {"1K": (60 / 16.82, 60 / 69.37)},
        },
    ),
    # Table 2
    "sana-1.6b": Model(
        name="SANA 1.6B",
        blocks={"transformer_blocks": 20},
        network=sana,
        paper={"H100 throughput": {"1K": (60 / 110.70, 60 / 435.68)}},
        **_SANA,
    ),
    "sana-4.8b": Model(
        name="SANA 4.8B",
        blocks={"transformer_blocks": 60},
        network=sana_15,
        paper={"H100 throughput": {"1K": (60 / 37.68, 60 / 146.23)}},
        **_SANA,
    ),
}


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One model at one size: seconds on this machine, None for what was not run, and bytes.

    step_s and text_s are those of the blocks and layers that ran; image_s only where all of them did.
    """

    model: str
    size: str
    method: str
    tokens: int
    blocks: str
    step_s: float | None
    text_s: float | None
    decode_s: float | None
    image_s: float | None
    step_flops: int
    step_bytes: int
    decode_bytes: int
    cuda_bytes: int | None


@dataclass(frozen=True)
class Machine:
    """Where it is run, in what, how much of it, and by which clock."""

    device: torch.device
    dtype: torch.dtype
    whole: bool
    clock: Callable[[], float]

    @property
    def place(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}

    def blocks(self, model: Model) -> dict[str, int]:
        return model.blocks if self.whole else model.cpu_blocks

    def can(self, tokens: int = 0, pixels: int = 0) -> bool:
        return self.device.type == "cuda" or (tokens <= CPU_TOKENS and pixels <= CPU_PIXELS)

    def seconds(self, call: Callable[[], object], repeats: int = 1) -> float:
        """The best of `repeats` calls."""
        return min(self._once(call) for _ in range(repeats))

    def _once(self, call: Callable[[], object]) -> float:
        begin = self._now()
        call()
        return self._now() - begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def machine(device: str, dtype: str | None, whole: bool) -> Machine:
    """A GPU runs all of a model by the wall clock; a CPU some of it, by its own CPU seconds per thread."""
    if device == "cuda":
        return Machine(torch.device(device), getattr(torch, dtype or "bfloat16"), True, time.perf_counter)
    threads = torch.get_num_threads()
    kind = getattr(torch, dtype or "float32")
    return Machine(torch.device(device), kind, whole, lambda: time.process_time() / threads)


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


def step_seconds(at: Machine, model: Model, latent: Latent, tokens: int, repeats: int) -> float | None:
    """One step, after a short one."""
    if not at.can(tokens):
        return None
    network = make(lambda: model.network(at.blocks(model), latent), at.device, at.dtype)
    network(**model.inputs(64, latent, at.place))
    inputs = model.inputs(tokens, latent, at.place)
    return at.seconds(lambda: network(**inputs), repeats)


def text_seconds(at: Machine, model: Model) -> float:
    """The text of one image."""
    encoder = make(lambda: model.text(model.text_layers if at.whole else model.cpu_text_layers), at.device, at.dtype)
    texts = [torch.zeros(1, length, dtype=torch.long, device=at.device) for length in model.text_reads]
    encoder(texts[0][:, :8])
    return at.seconds(lambda: [encoder(ids) for ids in texts])


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


def decode(model: Any, latents: torch.Tensor) -> torch.Tensor:
    out = model.decode(latents)
    return out if isinstance(out, torch.Tensor) else out.sample


def decode_seconds(at: Machine, latent: Latent, pixels: int) -> float | None:
    """One image. FLUX's own VAE goes by tiles above 2K, as it must: its attention is over all latents."""
    if not at.can(pixels=pixels):
        return None
    model = make(lambda: decoder(latent), at.device, at.dtype)
    if latent.autoencoder is None and pixels > PIXELS["2K"]:
        cast(AutoencoderKL, model).enable_tiling()
    side = pixels // latent.factor
    decode(model, torch.zeros(1, latent.channels, 2, 2, **at.place))
    latents = torch.zeros(1, latent.channels, side, side, **at.place)
    return at.seconds(lambda: decode(model, latents))


def counted(model: Model, latent: Latent, tokens: int, pixels: int, blocks: dict[str, int]) -> tuple[int, int, int]:
    """Without running: operations of one step of so many blocks, peak bytes of a step and of decoding in bfloat16.

    Weights are left out, and decoding is whole, without tiles.
    """
    place: dict[str, Any] = {"device": torch.device("meta"), "dtype": torch.bfloat16}
    with torch.device("meta"):
        network = model.network(blocks, latent).to(torch.bfloat16).eval()
        ae = decoder(latent).to(torch.bfloat16).eval()
    inputs = model.inputs(tokens, latent, place)
    with FlopCounterMode(display=False) as operations:
        network(**inputs)
    with PeakMemory(*network.parameters()) as step:
        network(**inputs)
    latents = torch.zeros(1, latent.channels, pixels // latent.factor, pixels // latent.factor, **place)
    with PeakMemory(*ae.parameters(), *ae.buffers()) as drawing:
        decode(ae, latents)
    return operations.get_total_flops(), step.peak, drawing.peak


def _together(text: float, steps: int, step: float | None, drawing: float | None) -> float | None:
    """Seconds of one image, if each part was measured."""
    return None if step is None or drawing is None else text + steps * step + drawing


def measure(at: Machine, model: Model, sizes: Sequence[str], steps: int, repeats: int) -> list[Row]:
    """Base and DC-Gen at every size."""
    print(HEADER, flush=True)
    text, blocks = text_seconds(at, model), at.blocks(model)
    rows = []
    for size in sizes:
        for method, latent in (("base", model.base), ("DC-Gen", model.dcgen[size])):
            tokens = model.tokens(size, latent)
            if at.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step = step_seconds(at, model, latent, tokens, repeats)
            drawing = decode_seconds(at, latent, PIXELS[size])
            flops, step_bytes, decode_bytes = counted(model, latent, tokens, PIXELS[size], blocks)
            rows.append(
                Row(
                    model=model.name,
                    size=size,
                    method=method,
                    tokens=tokens,
                    blocks="+".join(map(str, blocks.values())) + " of " + "+".join(map(str, model.blocks.values())),
                    step_s=step,
                    text_s=text,
                    decode_s=drawing,
                    image_s=_together(text, steps, step, drawing) if at.whole else None,
                    step_flops=flops,
                    step_bytes=step_bytes,
                    decode_bytes=decode_bytes,
                    cuda_bytes=torch.cuda.max_memory_allocated() if at.device.type == "cuda" else None,
                )
            )
            print(line(rows[-1]), flush=True)
    return rows


def ratios(model: Model, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Base over DC-Gen by size: what was measured, by operations counted, and the paper's."""
    found = {}
    for base, dcgen in zip(rows[::2], rows[1::2], strict=True):
        parts = {"step": "step_s", "step, operations": "step_flops", "decode": "decode_s", "image": "image_s"}
        both = {name: (getattr(base, part), getattr(dcgen, part)) for name, part in parts.items()}
        both = {"tokens": (base.tokens, dcgen.tokens), **both}
        both |= {f"paper, {name}": values[base.size] for name, values in model.paper.items() if base.size in values}
        found[base.size] = {name: one / other for name, (one, other) in both.items() if one and other}
    return found


# The SANA network against diffusers' ----------------------------------------------------------------------------------


@dataclass
class Contest:
    """One step of SANA 1.6B's network of some blocks in float32: seconds (best of `repeats`) and bytes at the peak."""

    tokens: int
    prompt: int
    blocks: int
    ours_s: float
    diffusers_s: float
    ours_bytes: int
    diffusers_bytes: int
    error: float


def contest(at: Machine, tokens: int, prompt: int, repeats: int, blocks: int = 2, **sizes: Any) -> Contest:
    """The same weights and inputs through both networks, in turns. sizes: fields of SanaConfig."""
    config = SanaConfig(num_layers=blocks, **sizes)
    known = {k: v for k, v in asdict(config).items() if k != "interpolation_scale"}
    theirs = make(lambda: SanaTransformer2DModel(**known, cross_attention_dim=config.width), at.device, torch.float32)
    ours = SanaNet(config, device="meta").eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    latent = Latent(config.in_channels, 32)
    inputs = sana_inputs(tokens, latent, {"device": at.device, "dtype": torch.float32}, batch=1, prompt=prompt)
    generator = torch.Generator().manual_seed(0)
    inputs["latents"] = torch.randn(inputs["latents"].shape, generator=generator).to(at.device)
    inputs["caption"] = torch.randn(1, 300, config.caption_channels, generator=generator).to(at.device)
    renamed = {
        "hidden_states": inputs["latents"],
        "encoder_hidden_states": inputs["caption"],
        "encoder_attention_mask": inputs["caption_mask"],
        "timestep": inputs["timestep"],
        "return_dict": False,
    }
    calls = (lambda: ours(**inputs), lambda: theirs(**renamed)[0])
    found, expected = (call() for call in calls)
    times = [[at.seconds(call) for call in calls] for _ in range(repeats)]
    peaks = []
    for call in calls:
        with PeakMemory(*theirs.parameters(), *inputs.values()) as memory:
            call()
        peaks.append(memory.peak)
    ours_s, diffusers_s = (min(column) for column in zip(*times, strict=True))
    error = ((found - expected).norm() / expected.norm()).item()
    return Contest(tokens, prompt, blocks, ours_s, diffusers_s, peaks[0], peaks[1], error)


def contests(at: Machine, repeats: int) -> list[Contest]:
    """At 1K on f32 (1,024 tokens) and f64 (256), with a prompt of usual length and one that fills all positions."""
    print(f"{'SANA 1.6B':12}{'tokens':>7}{'prompt':>8}{'ours':>10}{'diffusers':>11}{'time':>7}{'memory':>8}")
    found = []
    for tokens in (1024, 256):
        for prompt in (PROMPT_TOKENS, 300):
            one = contest(at, tokens, prompt, repeats)
            print(
                f"{f'{one.blocks} blocks':12}{tokens:>7}{prompt:>8}{one.ours_s:>9.3f}s{one.diffusers_s:>10.3f}s"
                f"{one.ours_s / one.diffusers_s:>6.2f}x{one.ours_bytes / one.diffusers_bytes:>7.2f}x",
                flush=True,
            )
            found.append(one)
    return found


# Telling --------------------------------------------------------------------------------------------------------------


HEADER = (
    f"{'model':10}{'size':5}{'method':8}{'tokens':>7}{'blocks':>16}{'step':>9}{'text':>9}{'decode':>9}{'image':>9}"
    f"{'images/min':>12}{'step GiB':>10}{'decode GiB':>12}"
)


def line(row: Row) -> str:
    def number(value: float | None, unit: str = "s") -> str:
        return "-" if value is None else f"{value:.3g}{unit}"

    seconds = "".join(f"{number(value):>9}" for value in (row.step_s, row.text_s, row.decode_s, row.image_s))
    minute = number(None if row.image_s is None else 60 / row.image_s, "")
    memory = f"{row.step_bytes / 2**30:>10.2f}{row.decode_bytes / 2**30:>12.2f}"
    cuda = "" if row.cuda_bytes is None else f"  CUDA {row.cuda_bytes / 2**30:.2f}"
    return f"{row.model:10}{row.size:5}{row.method:8}{row.tokens:>7}{row.blocks:>16}{seconds}{minute:>12}{memory}{cuda}"


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Ratios of all models: a line for each quantity, a column for each size."""
    lines = [f"{'base / DC-Gen':32}" + "".join(f"{size:>9}" for size in PIXELS)]
    for model, sizes in found.items():
        names = dict.fromkeys(name for row in sizes.values() for name in row)
        for name in names:
            cells = (sizes.get(size, {}).get(name) for size in PIXELS)
            lines.append(
                f"{f'{model}: {name}':32}" + "".join(f"{f'{cell:.2f}x' if cell else '-':>9}" for cell in cells)
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    diffusers.utils.logging.set_verbosity_error()  # it warns of a cast that changes nothing here
    at = machine(options.device, options.dtype, options.whole)
    name = torch.cuda.get_device_name() if at.device.type == "cuda" else f"{platform.machine()} CPU"
    threads = "" if at.device.type == "cuda" else f", {options.threads} of {os.cpu_count()} cores"
    print(f"{name}{threads}, torch {torch.__version__}, {str(at.dtype).removeprefix('torch.')}", flush=True)
    result: dict[str, Any] = {
        "machine": {"name": name, "torch": torch.__version__, "threads": options.threads, "dtype": str(at.dtype)},
        "steps": options.steps,
        "rows": [],
        "ratios": {},
    }
    with torch.inference_mode():
        for name in options.models:
            if name == "network":
                result["network"] = [asdict(one) for one in contests(at, max(3, options.repeats))]
            else:
                rows = measure(at, MODELS[name], options.sizes, options.steps, options.repeats)
                result["rows"] += [asdict(row) for row in rows]
                result["ratios"][MODELS[name].name] = ratios(MODELS[name], rows)
            save(result, options.out)
    if result["ratios"]:
        print(table(result["ratios"]))
    print(f"wrote {options.out}")


def save(result: dict[str, Any], file: Path) -> None:
    """The results so far, whole or not at all."""
    with replacing(file) as temporary:
        Path(temporary).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*MODELS, "network"]
    parser.add_argument("--models", nargs="+", choices=names, default=["flux", "sana-1.6b", "network"])
    parser.add_argument("--sizes", nargs="+", choices=list(PIXELS), default=list(PIXELS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many steps counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of a CPU")
    parser.add_argument("--whole", action="store_true", help="all blocks and layers on a CPU too")
    parser.add_argument("--out", type=Path, default=Path("runs/speed.json"))
    return parser


if __name__ == "__main__":
    main()
