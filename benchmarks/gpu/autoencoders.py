"""DC-AE decode and encode: ours whole, in strips and with compiled norms, beside diffusers whole and tiled."""

# B batch, C channels, H W rows and columns

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import speed
from benchmarks.dcae import models_of, narrowed
from benchmarks.gpu.correctness import relative
from benchmarks.gpu.device import Device
from benchmarks.gpu.report import Job, Row
from benchmarks.speed import MODELS
from dcgen.dcae import DCAE, VARIANTS, DCAEConfig
from dcgen.dcae.layers import RMSNorm

PART = "autoencoder"
# By importance: what FLUX 2K and 4K and SANA use, then the rest.
NAMES = (
    "dc-ae-1.5-f64c128",
    "dc-ae-f32c32-sana-1.0",
    "dc-ae-lite-f32c32-sana-1.1",
    "dc-ae-f32c32-in-1.0",
    "dc-ae-f64c128-in-1.0",
)
SIZES = (4096, 1024, 2048, 512, 256)
SECONDS = 16  # of a job, expected
# bfloat16 rounds every layer's result, and strips and tiles round at other places
BOUND = 6e-2


def jobs(device: Device) -> list[Job]:
    """Decode at 4096 px, and what a whole image of Tables 2 and 5 needs."""
    if device.small:
        return [_job(NAMES[1], "decode", 256), Job(PART, "FLUX VAE 256 px", SECONDS, lambda at: flux_vae(at, 256))]
    found = [_job(name, "decode", SIZES[0]) for name in NAMES]
    latents = [latent for model in MODELS.values() for latent in (model.base, *model.dcgen.values())]
    names = dict.fromkeys(latent.autoencoder for latent in latents if latent.autoencoder)
    found += [_job(name, "decode", size) for size in (1024, 2048) for name in names]
    vae = [Job(PART, f"FLUX VAE {size} px", SECONDS, _of_size(flux_vae, size)) for size in (1024, 2048, 4096)]
    return found + vae


def further_jobs(device: Device) -> list[Job]:
    """The other sizes and encoding."""
    if device.small:
        return [_job(NAMES[1], "encode", 256)]
    return [_job(name, way, size) for size in SIZES for way in ("encode", "decode") for name in NAMES]


def _of_size(rows: Callable[[Device, int], Iterator[Row]], size: int) -> Callable[[Device], Iterator[Row]]:
    return lambda device: rows(device, size)


def _job(name: str, way: str, size: int) -> Job:
    seconds = SECONDS if size >= 2048 else SECONDS / 2
    return Job(PART, f"{name} {way} {size} px", seconds, _measuring(name, way, size))


@torch.no_grad()
def flux_vae(device: Device, size: int) -> Iterator[Row]:
    """FLUX's own VAE, which its base decodes with; in tiles above 2048 px, for it attends over all latents."""
    latent = MODELS["flux"].base
    model: Any = speed.make(lambda: speed.decoder(latent), torch.device(device.kind), device.dtype)
    if size > 2048:
        model.enable_tiling()
    latents = torch.randn(1, latent.channels, size // latent.factor, size // latent.factor, **device.place)

    def call() -> Tensor:
        return speed.decode(model, latents)

    call()
    ms = device.milliseconds(call, warm=0)
    note = "tiled" if size > 2048 else ""
    yield Row(PART, f"FLUX VAE decode {size} px bfloat16, diffusers", ms=ms, gib=device.peak_gib(call), note=note)


def _measuring(name: str, way: str, size: int) -> Callable[[Device], Iterator[Row]]:
    return lambda device: measured(device, name, way, size)


@torch.no_grad()
def measured(device: Device, name: str, way: str, size: int) -> Iterator[Row]:
    """One row for each way to the same result; ratios are to diffusers' whole, where that fits into the memory."""
    config = narrowed(VARIANTS[name]) if device.small else VARIANTS[name]
    oracle, ours = models_of(config, device.kind, device.dtype)
    x = example(config, way, size).to(**device.place)
    flops = operations(config, way, size)
    times: dict[str, float] = {}
    expected: Tensor | None = None
    for how, call in calls(oracle, ours, x, way, device).items():
        what = f"{name} {way} {size} px bfloat16, {how}"
        try:
            found = call()
            times[how] = device.milliseconds(call, warm=0)
            gib = device.peak_gib(call)
        except torch.OutOfMemoryError:
            yield Row(PART, what, note="out of memory")
            continue
        error = None if expected is None or how == "diffusers tiled" else relative(found, expected)
        expected = found if expected is None else expected
        del found
        yield Row(
            PART, what, ok=error is None or error <= BOUND, ms=times[how], gib=gib,
            ratio=times[how] / times["diffusers whole"] if "diffusers whole" in times else None,
            roof=device.roof(flops, times[how]), error=error, bound=None if error is None else BOUND,
        )  # fmt: skip


def calls(oracle: Any, ours: DCAE, x: Tensor, way: str, device: Device) -> dict[str, Callable[[], Tensor]]:
    """The ways by name, in the order in which they run (the last changes our model)."""

    def diffusers(tiled: bool) -> Tensor:
        oracle.use_tiling = tiled
        out: Tensor = getattr(oracle, way)(x)[0]
        return out

    def with_compiled_norms() -> Tensor:
        compile_norms(ours, "aot_eager" if device.small else "inductor")
        return getattr(ours, way)(x)  # type: ignore[no-any-return]

    return {
        "diffusers whole": lambda: diffusers(False),
        "diffusers tiled": lambda: diffusers(True),
        "ours whole": lambda: getattr(ours, way)(x),
        "ours, strips by free memory": lambda: getattr(ours, way)(x, "auto"),
        "ours, strips of 8 latent rows": lambda: getattr(ours, way)(x, 8),
        "ours whole, norms compiled": with_compiled_norms,
    }


def compile_norms(model: nn.Module, backend: str) -> None:
    """Replace every RMSNorm's call by one fused kernel: mean, root, scale, bias and residual in one pass."""
    fused = torch.compile(_normed, backend=backend, dynamic=True)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = _bound(fused, module)  # type: ignore[method-assign]


def _bound(fused: Callable[..., Tensor], norm: RMSNorm) -> Callable[..., Tensor]:
    def forward(x: Tensor, residual: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        return fused(x, norm.weight, norm.bias, residual, norm.eps if eps is None else eps)

    return forward


def _normed(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float | Tensor) -> Tensor:
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    y = y * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    return (y if residual is None else y + residual).to(x.dtype)


def example(config: DCAEConfig, way: str, size: int) -> Tensor:
    """A random image (1,3,size,size) or latent (1,C,size/f,size/f)."""
    generator = torch.Generator().manual_seed(size)
    if way == "encode":
        return torch.rand((1, 3, size, size), generator=generator) * 2 - 1
    side = size // config.spatial_factor
    return torch.randn((1, config.latent_channels, side, side), generator=generator)


def operations(config: DCAEConfig, way: str, size: int) -> int:
    """Floating-point operations, counted on the meta device."""
    model = DCAE(config, dtype=torch.bfloat16, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        getattr(model, way)(example(config, way, size).to("meta", torch.bfloat16))
    return int(counter.get_total_flops())
