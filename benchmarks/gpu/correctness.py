"""Does the device compute what it should: against float64 on the CPU, on fresh random weights and input."""

# B batch, C latent channels, h w latent rows and columns, f spatial factor

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.dcae import FAMILIES, models_of, narrowed
from benchmarks.gpu.device import Device
from benchmarks.gpu.report import Job, Row
from dcgen.backbones.sana import SanaConfig, SanaNet
from dcgen.dcae import DCAE, VARIANTS

PART = "correct"
# Relative to a float64 reference on unrounded weights: rounding of weights and of every layer's result.
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
INDEX_LIMIT = 2**31


def jobs(device: Device) -> list[Job]:
    names = FAMILIES[:2] if device.small else FAMILIES
    found = [Job(PART, f"DC-AE {name}", 8, lambda at, name=name: autoencoder(at, name)) for name in names]  # type: ignore[misc]
    found += [
        Job(PART, "networks", 15, networks),
        Job(PART, "attention back ends", 5, attention),
        Job(PART, "torch.compile", 60, compiled),
        Job(PART, "more than 2^31 elements", 25, beyond_index_limit),
    ]
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64 on the CPU; NaN where found has one."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def compared(what: str, found: Tensor, expected: Tensor, bound: float, **more: Any) -> Row:
    error = relative(found, expected)
    return Row(PART, what, ok=error <= bound, error=error, bound=bound, **more)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoencoder(device: Device, name: str) -> Iterator[Row]:
    """Both directions of a variant, whole and in strips of one latent row, in three dtypes."""
    torch.manual_seed(len(name))
    config = narrowed(VARIANTS[name]) if device.small else VARIANTS[name]
    oracle, _ = models_of(config, "cpu", torch.float64)
    f = config.spatial_factor
    inputs = {
        "encode": random(1, 1, 3, 2 * f, 2 * f).tanh(),
        "decode": random(2, 1, config.latent_channels, 2, 2),
    }
    with torch.no_grad():
        expected = {way: getattr(oracle, way)(x)[0] for way, x in inputs.items()}
        for dtype, bound in BOUNDS.items():
            model = DCAE(config, dtype=dtype, device="meta").eval().requires_grad_(False)
            state = {key: value.to(device.kind, dtype) for key, value in oracle.state_dict().items()}
            model.load_state_dict(state, assign=True)
            for way, x in inputs.items():
                for strip in (None, 1):
                    found = getattr(model, way)(x.to(device.kind, dtype), strip)
                    how = "in strips" if strip else "whole"
                    what = f"{name} {way} {str(dtype).removeprefix('torch.')} {how}"
                    yield compared(what, found, expected[way], bound)


def networks(device: Device) -> Iterator[Row]:
    """FLUX at patch size 1 (diffusers' class, as training runs it), and this project's SANA against diffusers'."""
    yield from _network(device, "FLUX p1", *_flux())
    yield from _network(device, "SANA", *_sana())


def _flux() -> tuple[nn.Module, nn.Module, dict[str, Any], Callable[[Any], Tensor]]:
    torch.manual_seed(3)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=96, pooled_projection_dim=48, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    ids = torch.zeros(64, 3)
    ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    inputs = {
        "hidden_states": random(4, 2, 64, 32),
        "encoder_hidden_states": random(5, 2, 20, 96),
        "pooled_projections": random(6, 2, 48),
        "timestep": torch.tensor([0.3, 0.9], dtype=torch.float64),
        "guidance": torch.tensor([3.5, 1.0], dtype=torch.float64),
        "img_ids": ids,
        "txt_ids": torch.zeros(20, 3),
        "return_dict": False,
    }
    return model, model, inputs, lambda out: out[0]


def _sana() -> tuple[nn.Module, nn.Module, dict[str, Any], Callable[[Any], Tensor]]:
    torch.manual_seed(7)
    sizes: dict[str, Any] = {"in_channels": 32, "out_channels": 32, "num_layers": 2, "num_attention_heads": 4}
    sizes |= {"attention_head_dim": 32, "num_cross_attention_heads": 4, "cross_attention_head_dim": 32}
    sizes |= {"caption_channels": 96}
    theirs = SanaTransformer2DModel(**sizes, cross_attention_dim=128).double()
    ours = SanaNet(SanaConfig(**sizes), device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    mask = torch.ones(2, 20, dtype=torch.float64)
    mask[1, 11:] = 0
    inputs = {
        "hidden_states": random(8, 2, 32, 8, 8),
        "encoder_hidden_states": random(9, 2, 20, 96),
        "encoder_attention_mask": mask,
        "timestep": torch.tensor([300.0, 900.0], dtype=torch.float64),
        "return_dict": False,
    }
    return theirs, ours, inputs, lambda out: out[0]


_SANA_NAMES = {"hidden_states": "latents", "encoder_hidden_states": "caption", "encoder_attention_mask": "caption_mask"}


def _network(
    device: Device,
    name: str,
    oracle: nn.Module,
    ours: nn.Module,
    inputs: dict[str, Any],
    out: Callable[[Any], Tensor],
) -> Iterator[Row]:
    with torch.no_grad():
        expected = out(oracle.double().cpu()(**inputs)).clone()
        state = {key: value.clone() for key, value in ours.state_dict().items()}
        for dtype, bound in BOUNDS.items():
            if dtype == torch.float16:
                continue  # neither model is trained or run in it
            model = ours.to(device.kind, dtype)
            given = {key: _moved(value, device.kind, dtype) for key, value in inputs.items()}
            if ours is not oracle:
                given = {_SANA_NAMES.get(key, key): value for key, value in given.items() if key != "return_dict"}
            result = model(**given)
            yield compared(
                f"{name} {str(dtype).removeprefix('torch.')}",
                result if isinstance(result, Tensor) else out(result), expected, bound,
            )  # fmt: skip
            ours.double().cpu().load_state_dict(state)


def _moved(value: Any, kind: str, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(kind, dtype if value.is_floating_point() else None)


def attention(device: Device) -> Iterator[Row]:
    """torch's attention back ends at FLUX's head size, each against float64."""
    heads, tokens = (2, 64) if device.small else (24, 1536)
    q, k, v = (random(seed, 1, heads, tokens, 128) for seed in (10, 11, 12))
    expected = torch.softmax(q @ k.mT / 128**0.5, -1) @ v
    q, k, v = (x.to(device.kind, device.dtype) for x in (q, k, v))
    back_ends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if device.cuda:
        back_ends += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for back_end in back_ends:
        with sdpa_kernel(back_end):
            found = F.scaled_dot_product_attention(q, k, v)
        yield compared(f"attention {back_end.name.lower()} bfloat16", found, expected, 1e-2)


def compiled(device: Device) -> Iterator[Row]:
    """A FLUX block by torch.compile, forward and backward, against the same eagerly."""
    network, _, inputs, out = _flux()
    model: Any = network.to(device.kind).float()
    given = {key: _moved(value, device.kind, torch.float32) for key, value in inputs.items()}
    eager = out(model(**given))
    eager.square().mean().backward()
    gradient = model.x_embedder.weight.grad.clone()
    model.zero_grad()
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.compile(backend="aot_eager" if device.small else "inductor", fullgraph=True)
    again = out(model(**given))
    again.square().mean().backward()
    yield compared("FLUX p1 compiled by block, output", again, eager, 1e-4)
    yield compared("FLUX p1 compiled by block, gradient", model.x_embedder.weight.grad, gradient, 1e-3)


@torch.no_grad()
def beyond_index_limit(device: Device) -> Iterator[Row]:
    """A layer of more than 2^31 elements: the whole image in one call, against strips that stay below."""
    name = "dc-ae-f32c32-sana-1.0"
    config = narrowed(VARIANTS[name]) if device.small else VARIANTS[name]
    _, model = models_of(config, device.kind, torch.bfloat16)
    width = config.decoder_block_out_channels[0]
    h, w = (4, 8) if device.small else (128, 160)  # 4096 x 5120 pixels
    elements = width * h * w * config.spatial_factor**2
    latent = random(13, 1, config.latent_channels, h, w).to(device.kind, torch.bfloat16)
    expected = model.decode(latent, 2)
    found = model.decode(latent)
    note = f"{elements / INDEX_LIMIT:.2f} x 2^31 elements in the widest layer"
    yield compared(f"{name} decode {h * 32} x {w * 32} px, whole against strips", found, expected, 2e-2, note=note)
