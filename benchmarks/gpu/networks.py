"""One step of FLUX 12B and SANA at their true shapes on random weights: base against DC-Gen, in 16 and 8 bit."""

# N image tokens, T text tokens, D width

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import speed
from benchmarks.gpu.correctness import relative
from benchmarks.gpu.device import Device
from benchmarks.gpu.report import Job, Report, Row
from benchmarks.speed import MODELS, PIXELS, Latent, Model
from dcgen.backbones.sana import SanaConfig, SanaNet

PART = "network"
STEPS = 20  # of the paper's images
FP8_MAX, INT8_MAX = 448.0, 127.0
SMALL_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One network: a model on a latent, and the sizes that it is stepped at."""

    model: str
    method: str
    latent: Latent
    sizes: tuple[str, ...]
    quantized: bool = False

    def title(self, size: str) -> str:
        return f"{MODELS[self.model].name} {size} {self.method}"


def cases() -> list[Case]:
    """By importance; each network is built once for all of its sizes."""
    flux, sana, large = MODELS["flux"], MODELS["sana-1.6b"], MODELS["sana-4.8b"]
    return [
        Case("flux", "DC-Gen", flux.dcgen["4K"], ("4K", "2K"), quantized=True),
        Case("flux", "DC-Gen", flux.dcgen["1K"], ("1K",)),
        Case("flux", "base", flux.base, ("1K", "2K")),
        Case("sana-1.6b", "DC-Gen", sana.dcgen["4K"], ("1K", "2K", "4K"), quantized=True),
        Case("sana-1.6b", "base", sana.base, ("1K", "2K", "4K")),
        Case("sana-4.8b", "DC-Gen", large.dcgen["4K"], ("1K", "4K")),
        Case("sana-4.8b", "base", large.base, ("1K", "4K")),
        Case("flux", "base", flux.base, ("4K",)),
    ]


def jobs(device: Device) -> list[Job]:
    """Steps of every case, SANA's network against diffusers', then text encoders (for seconds an image)."""
    chosen = [case for case in cases() if case.quantized or not device.small]
    found = [Job(PART, _name(case), 20 + 12 * len(case.sizes), _stepping(case)) for case in chosen]
    found.insert(2, Job(PART, "text encoders", 20, text_encoders))
    found.append(Job(PART, "SANA against diffusers", 15, against_diffusers))
    return found


def _name(case: Case) -> str:
    return f"{case.model} {case.method} {' '.join(case.sizes)}"


def _stepping(case: Case) -> Callable[[Device], Iterator[Row]]:
    return lambda device: steps(device, case)


def blocks(device: Device, model: Model) -> dict[str, int]:
    return dict.fromkeys(model.blocks, 1) if device.small else model.blocks


def network_of(device: Device, model: Model, latent: Latent) -> nn.Module:
    """The network on random weights; in the rehearsal one block of each kind, narrow."""
    if not device.small:
        return speed.make(lambda: model.network(model.blocks, latent), torch.device(device.kind), device.dtype)
    counts = blocks(device, model)
    if model.backbone == "sana":
        config = SanaConfig(
            in_channels=latent.channels, out_channels=latent.channels, num_layers=1, num_attention_heads=4,
            num_cross_attention_heads=2, cross_attention_head_dim=64,
        )  # fmt: skip
        return speed.make(lambda: SanaNet(config), torch.device(device.kind), device.dtype)
    return speed.make(lambda: speed.flux(counts, latent, width=256), torch.device(device.kind), device.dtype)


@torch.inference_mode()
def steps(device: Device, case: Case) -> Iterator[Row]:
    """Milliseconds of a step in bfloat16, eager and compiled, and with 8-bit Linear layers, compiled."""
    model = MODELS[case.model]
    network = network_of(device, model, case.latent)
    yield from _at_sizes(device, case, network, "bfloat16")
    compile_blocks(network, device)
    yield from _at_sizes(device, case, network, "bfloat16, compiled")
    if not case.quantized:
        return
    for kind in (Int8Linear, Fp8Linear):
        if not kind.works(device):
            yield Row(PART, f"{case.title(case.sizes[0])} step, {kind.name}", note="the device has no such product")
            continue
        network = network_of(device, model, case.latent)
        quantize_blocks(network, kind)
        compile_blocks(network, device)
        yield from _at_sizes(device, case, network, f"{kind.name}, compiled")


def _at_sizes(device: Device, case: Case, network: nn.Module, how: str) -> Iterator[Row]:
    model = MODELS[case.model]
    for size in case.sizes[: 1 if device.small else None]:
        tokens = SMALL_TOKENS if device.small else model.tokens(size, case.latent)
        inputs = _random(model.inputs(tokens, case.latent, device.place))

        def call(inputs: dict[str, Any] = inputs) -> Any:
            return network(**inputs)

        out = call()
        finite = bool(torch.isfinite(out[0] if isinstance(out, tuple) else out).all())
        ms, gib = device.milliseconds(call), device.peak_gib(call)
        yield Row(
            PART, f"{case.title(size)} step, {how}", ok=finite, ms=ms, gib=gib,
            roof=device.roof(operations(device, model, case.latent, tokens), ms),
            note=f"{tokens} tokens" + ("" if finite else "; not finite"),
        )  # fmt: skip


def _random(inputs: dict[str, Any]) -> dict[str, Any]:
    """Noise for every wide input: products of constants can run faster than those of data."""
    wide = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.ndim >= 3}
    return inputs | {key: torch.randn_like(value) for key, value in wide.items()}


def operations(device: Device, model: Model, latent: Latent, tokens: int) -> int:
    """Operations of a step of the full-width network, counted on the meta device; 0 in the rehearsal."""
    if device.small:
        return 0
    with torch.device("meta"):
        network = model.network(model.blocks, latent).to(torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        network(**model.inputs(tokens, latent, {"device": torch.device("meta"), "dtype": torch.bfloat16}))
    return int(counter.get_total_flops())


def _blocks_of(network: nn.Module) -> list[nn.Module]:
    lists = (getattr(network, name, ()) for name in ("transformer_blocks", "single_transformer_blocks"))
    return [block for part in lists for block in part]


def compile_blocks(network: nn.Module, device: Device) -> None:
    """torch.compile of every block: one compilation a kind of block and size."""
    for block in _blocks_of(network):
        block.compile(backend="aot_eager" if device.small else "inductor", dynamic=False)


class Int8Linear(nn.Module):
    """int8 weights with a scale a row, int8 activations with a scale a token; torch._int_mm."""

    name = "int8"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / INT8_MAX
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.T.contiguous(), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-8) / INT8_MAX
        quantized = (rows / scale).round().to(torch.int8)
        y = (torch._int_mm(quantized, self.weight.T) * scale * self.scale).to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])

    @classmethod
    def works(cls, device: Device) -> bool:
        return _runs(cls, device)


class Fp8Linear(nn.Module):
    """float8 e4m3 weights and activations, a scale a tensor; torch._scaled_mm."""

    name = "fp8"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.abs().max().float().clamp(min=1e-8) / FP8_MAX
        self.weight = nn.Parameter((layer.weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = rows.abs().max().float().clamp(min=1e-8) / FP8_MAX
        quantized = (rows / scale).to(torch.float8_e4m3fn)
        y: Tensor = torch._scaled_mm(
            quantized, self.weight.T, scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=x.dtype
        )
        return y.unflatten(0, x.shape[:-1])

    @classmethod
    def works(cls, device: Device) -> bool:
        return _runs(cls, device)


def _runs(kind: type[Int8Linear] | type[Fp8Linear], device: Device) -> bool:
    """Whether the device has the product of a kind, and it is right to the format's rounding."""
    layer = nn.Linear(64, 64, **device.place)
    x = torch.randn(32, 64, **device.place)
    try:
        return relative(kind(layer)(x), F.linear(x, layer.weight, layer.bias)) < 0.1
    except (RuntimeError, NotImplementedError):
        return False


def quantize_blocks(network: nn.Module, kind: type[Int8Linear] | type[Fp8Linear]) -> None:
    """Replace the wide Linear layers of every block; those of the modulation stay (one row of activations)."""
    for block in _blocks_of(network):
        for name, layer in list(block.named_modules()):
            wide = isinstance(layer, nn.Linear) and not layer.in_features % 16 and not layer.out_features % 16
            if wide and not name.startswith("norm"):
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, kind(layer))


@torch.inference_mode()
def text_encoders(device: Device) -> Iterator[Row]:
    """T5-XXL and Gemma 2 for the prompt (and the negative one, where there is guidance) of one image."""
    for key in ("flux", "sana-1.6b"):
        model = MODELS[key]
        layers = 1 if device.small else model.text_layers
        if device.small:
            model = replace(model, text_reads=(8,))
        encoder = speed.make(lambda m=model, n=layers: m.text(n), torch.device(device.kind), device.dtype)  # type: ignore[misc]
        texts = [torch.zeros(1, length, dtype=torch.long, device=device.kind) for length in model.text_reads]
        ms = device.milliseconds(lambda e=encoder, t=texts: [e(ids) for ids in t])  # type: ignore[misc]
        yield Row(PART, f"{model.name} text encoder", ms=ms, note=f"{sum(model.text_reads)} tokens")
        del encoder


@torch.inference_mode()
def against_diffusers(device: Device) -> Iterator[Row]:
    """Our SANA network and diffusers' on the same weights: 4 blocks at full width, batch 2, bfloat16 and float16."""
    sizes: dict[str, Any] = {"num_layers": 1 if device.small else 4}
    if device.small:
        sizes |= {"num_attention_heads": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 64}
    config = SanaConfig(**sizes)
    for dtype in (torch.bfloat16, torch.float16):
        theirs = speed.make(
            lambda: SanaTransformer2DModel(
                **sizes, cross_attention_dim=config.width, in_channels=32, out_channels=32
            ),
            torch.device(device.kind), dtype,
        )  # fmt: skip
        ours = SanaNet(config, device="meta").eval()
        ours.load_state_dict(theirs.state_dict(), assign=True)
        for tokens in (SMALL_TOKENS,) if device.small else (256, 1024, 4096):
            given = _random(
                speed.sana_inputs(tokens, Latent(32, 32), {"device": torch.device(device.kind), "dtype": dtype})
            )
            renamed = {
                "hidden_states": given["latents"], "encoder_hidden_states": given["caption"],
                "encoder_attention_mask": given["caption_mask"], "timestep": given["timestep"], "return_dict": False,
            }  # fmt: skip
            both = (lambda g=given, n=ours: n(**g), lambda r=renamed, n=theirs: n(**r)[0])  # type: ignore[misc]
            error = relative(both[0](), both[1]())
            ms = [device.milliseconds(call) for call in both]
            name = str(dtype).removeprefix("torch.")
            yield Row(
                PART, f"SANA 1.6B, 4 blocks, {name}, ours / diffusers", ok=error < 6e-2, ms=ms[0],
                ratio=ms[0] / ms[1], error=error, bound=6e-2, note=f"{tokens} tokens, batch 2",
            )  # fmt: skip


def tables(report: Report) -> list[str]:
    """Tables 5, 6 and 2 of the paper beside what this run measured: seconds an image, a step, images a minute."""
    ms = {row.what: row.ms for row in report.rows if row.ms is not None}
    lines = [f"{'':34}{'base':>10}{'DC-Gen':>10}{'ratio':>8}{'paper':>20}"]
    for key, model in MODELS.items():
        for size in PIXELS:
            for how in ("bfloat16", "bfloat16, compiled"):
                pair = [_image(ms, key, size, method, how) for method in ("base", "DC-Gen")]
                known = model.paper.get("H100 image", model.paper.get("H100 throughput", {})).get(size)
                lines.append(_table_line(f"{model.name} {size} image, {how}", pair, known))
    return [text for text in lines if text]


def _image(ms: dict[str, float], key: str, size: str, method: str, how: str) -> float | None:
    """Seconds of an image: text, STEPS steps, decode; None when one of them was not measured."""
    model = MODELS[key]
    latent = model.base if method == "base" else model.dcgen[size]
    step = ms.get(f"{model.name} {size} {method} step, {how}")
    text = ms.get(f"{MODELS['flux' if key == 'flux' else 'sana-1.6b'].name} text encoder")
    decode = ms.get(f"{latent.autoencoder} decode {PIXELS[size]} px bfloat16, ours, strips by free memory")
    if latent.autoencoder is None:
        decode = ms.get(f"FLUX VAE decode {PIXELS[size]} px bfloat16, diffusers")
    parts = (text, step, decode)
    return None if None in parts else (text + STEPS * step + decode) / 1000  # type: ignore[operator]


def _table_line(name: str, pair: list[float | None], known: tuple[float, float] | None) -> str:
    if pair == [None, None]:
        return ""
    cells = "".join(f"{'-' if value is None else f'{value:.2f} s':>10}" for value in pair)
    ratio = f"{pair[0] / pair[1]:.2f}x" if pair[0] and pair[1] else "-"
    paper = f"{known[0]:.2f} / {known[1]:.2f} s" if known else "-"
    return f"{name:34}{cells}{ratio:>8}{paper:>20}"
