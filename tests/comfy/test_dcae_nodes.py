"""A DC-AE in ComfyUI against diffusers: core's VAE nodes, ours, memory, previews, cancel, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dcgen.dcae import load_dcae, save_dcae

ROOT = Path(__file__).resolve().parents[2]
FACTORS = {"f32": 6, "f64": 7, "f128": 8}


def tiny_autoencoder(stages: int, seed: int):
    """Attention in the two deepest stages, widths of a toy, 2^(stages - 1) times smaller latents."""
    import diffusers

    types = ("ResBlock",) * (stages - 2) + ("EfficientViTBlock",) * 2
    ae = diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=(8,) * (stages - 2) + (16, 16),
        decoder_block_out_channels=(8,) * (stages - 2) + (16, 16),
        encoder_layers_per_block=(1,) * stages,
        decoder_layers_per_block=(1,) * stages,
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        scaling_factor=0.37,
    )
    generator = torch.Generator().manual_seed(seed)
    for value in ae.parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.data = noise * 0.3 if value.ndim < 2 else noise / value[0].numel() ** 0.5
    return ae.eval()


@pytest.fixture(scope="module")
@torch.no_grad()
def ran(comfy, tmp_path_factory):
    """(tensors, facts) from ComfyUI, and what diffusers makes of the same inputs."""
    folder = tmp_path_factory.mktemp("dcae")
    inputs, wanted, folders, files = {}, {}, {}, {}
    generator = torch.Generator().manual_seed(1)
    for name, stages in FACTORS.items():
        ae, f = tiny_autoencoder(stages, stages), 2 ** (stages - 1)
        ae.save_pretrained(folder / name)
        folders[name] = str(folder / name)
        files[name] = str(save_dcae(with_factors(folder / name, stages), folder / f"{name}.safetensors"))
        image = torch.rand((2, 3 * f, 2 * f, 3), generator=generator)
        odd = torch.rand((1, 2 * f + f // 2 + 3, 3 * f - 1, 3), generator=generator)
        latent = torch.randn((2, 8, 4, 3), generator=generator)
        inputs |= {f"{name}/image": image, f"{name}/odd": odd, f"{name}/latent": latent}
        top, left = (f // 2 + 3) // 2, (f - 1) // 2
        cropped = odd[:, top : top + 2 * f, left : left + 2 * f]
        wanted[f"{name}/latent"] = ae.encode(image.movedim(-1, 1) * 2 - 1).latent
        wanted[f"{name}/odd"] = ae.encode(cropped.movedim(-1, 1) * 2 - 1).latent
        greyed = image.clone()
        greyed[:, : f // 2] = 0.5
        wanted[f"{name}/inpaint"] = ae.encode(greyed.movedim(-1, 1) * 2 - 1).latent
        wanted[f"{name}/preview"] = drawn(latent, with_factors(folder / name, stages), f)
        wanted[f"{name}/image"] = (ae.decode(latent).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    found, facts = comfy.run(
        "dcae:everything", folder, inputs, {"folders": folders, "files": files}, ("--cpu", "--fp32-vae")
    )
    return found, facts, wanted


def with_factors(folder, seed: int):
    """The autoencoder of a folder with preview factors, as dcgen.convert would have fitted them."""
    model = load_dcae(folder)
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(model.config.latent_channels, 3, generator=generator) * 0.3
    model.rgb_factors, model.rgb_bias = tuple(map(tuple, factors.tolist())), (0.1, -0.2, 0.05)
    return model


def drawn(latent: torch.Tensor, model, f: int) -> torch.Tensor:
    """The preview of the first latent (C,h,w), 8 image pixels a dot: bytes (h * f / 8, w * f / 8, 3)."""
    dots = F.interpolate(latent[:1], scale_factor=f // 8, mode="bilinear")[0].movedim(0, -1)
    rgb = dots @ torch.tensor(model.rgb_factors) + torch.tensor(model.rgb_bias)
    return ((rgb + 1) / 2).clamp(0, 1) * 255


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", FACTORS)
def test_every_vae_node_equals_diffusers(ran, name: str) -> None:
    found, facts, wanted = ran
    assert facts[name]["ratio"] == 2 ** (FACTORS[name] - 1)
    for node in ("VAEEncode", "VAEEncodeTiled", "DCAEEncode"):
        assert far(found[f"{name}/{node}"], wanted[f"{name}/latent"]) < 1e-4, node
    for node in ("VAEDecode", "VAEDecodeTiled", "DCAEDecode"):
        assert far(found[f"{name}/{node}"], wanted[f"{name}/image"]) < 1e-4, node
    assert far(found[f"{name}/odd"], wanted[f"{name}/odd"]) < 1e-4
    # core greys the masked part before encoding
    assert far(found[f"{name}/inpaint"], wanted[f"{name}/inpaint"]) < 1e-4
    assert far(wanted[f"{name}/inpaint"], wanted[f"{name}/latent"]) > 1e-3


@pytest.mark.parametrize("name", FACTORS)
def test_live_preview_is_drawn_with_the_factors_in_the_file(ran, name: str) -> None:
    found, wanted = ran[0][f"{name}/preview"], ran[2][f"{name}/preview"]
    assert found.shape == wanted.shape
    assert wanted.std() > 10
    assert (found.float() - wanted).abs().max() <= 1.01  # bytes are cut off, not rounded


@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize("name", FACTORS)
def test_out_of_memory_halves_the_strip_and_stays_exact(ran, name: str, way: str) -> None:
    oom = ran[1][name]["oom"][way]
    assert oom["tried"][-2:] == [1, 1]  # one row for each of the two pictures
    assert len(oom["tried"]) > 2
    assert oom["difference"] < 1e-4


@pytest.mark.parametrize("name", FACTORS)
def test_progress_preview_and_cancel(ran, name: str) -> None:
    facts = ran[1][name]
    assert facts["progress"]["last"] == [2000, 2000]
    assert facts["progress"]["images"] >= 2
    width, height = facts["progress"]["size"]
    assert (height, width) == (round(min(1, 128 / 2 ** (FACTORS[name] - 1)) * 4 * 2 ** (FACTORS[name] - 1)), width)
    assert facts["cancelled"] == "InterruptProcessingException"


@pytest.mark.parametrize("name", FACTORS)
def test_memory_estimate_is_that_of_a_strip(ran, name: str) -> None:
    # 64x64 latents are 2048 to 8192 pixels; the result alone is 24 to 384 MiB and a strip's share is fixed
    f = ran[1][name]["ratio"]
    result = 3 * (64 * f) ** 2 * 2
    assert result < ran[1][name]["large"] < result + (1 << 30) + (256 << 20)


@pytest.mark.parametrize("name", FACTORS)
def test_memory_estimate_follows_the_real_cost(ran, name: str) -> None:
    for case, (told, peak) in ran[1][name]["memory"].items():
        way, side = case.split()
        # ComfyUI's own copies of the picture, 3 channels in float32, are not the network's
        copies = 3 * int(side) ** 2 * 4 * (3 if way == "decode" else 1)
        assert peak - copies <= told <= 3 * peak, case


@pytest.mark.parametrize("name", FACTORS)
def test_refusals_name_what_is_wrong(ran, name: str) -> None:
    facts = ran[1][name]
    assert "another-ae" in facts["foreign"]
    assert name in facts["foreign"]
    assert facts["own"] == ""
    assert "decodes latents of 8 channels, this one has 4" in facts["channels"]
    assert "smaller than" in facts["small"]
    assert "load one with Load DC-AE" in facts["not_dcae"]


@torch.no_grad()
def test_round_trip_workflow_shows_the_psnr_that_diffusers_gives(server) -> None:
    import diffusers

    # smooth shapes with an edge, 8 bits, and sides that 32 does not divide
    y, x = np.mgrid[0:150, 0:203]
    pixels = np.stack([y, x, 120 + 100 * np.sin(x / 9) * (y > 70)], -1).clip(0, 255).astype(np.uint8)
    (server.base / "input").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(server.base / "input" / "round-trip.png")
    graph = json.loads((ROOT / "workflows" / "api" / "dcae_roundtrip.json").read_text())
    kinds = {node["class_type"]: key for key, node in graph.items()}
    graph[kinds["LoadImage"]]["inputs"]["image"] = "round-trip.png"
    entry = server.queue(graph)
    shown = entry["outputs"][kinds["DCAEDifference"]]["text"][0]

    toy = diffusers.AutoencoderDC.from_pretrained(ROOT / "toy" / "dc-ae-f32", torch_dtype=torch.float32).eval()
    original = torch.from_numpy(pixels[11:139, 5:197]).movedim(-1, 0)[None] / 255  # core's crop to 128 x 192
    again = (toy.decode(toy.encode(original * 2 - 1).latent).sample / 2 + 0.5).clamp(0, 1)
    expected = 10 * np.log10(1 / (original - again).square().mean().item())
    assert expected > 15
    assert float(shown.removeprefix("PSNR").removesuffix("dB")) == pytest.approx(expected, abs=0.02)
    (difference,) = server.images(entry)[kinds["SaveImage"]]
    gained = (4 * (original - again).abs()).clamp(0, 1)[0].movedim(0, -1) * 255
    assert np.abs(difference - gained.numpy()).max() < 4  # PNG bytes, four times the rounding of the picture
