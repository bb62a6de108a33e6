"""A DC-AE in ComfyUI against diffusers: core's VAE nodes, ours, memory, previews, cancel, refusals."""

from __future__ import annotations

import pytest
import torch

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
    inputs, wanted, folders = {}, {}, {}
    generator = torch.Generator().manual_seed(1)
    for name, stages in FACTORS.items():
        ae, f = tiny_autoencoder(stages, stages), 2 ** (stages - 1)
        ae.save_pretrained(folder / name)
        folders[name] = str(folder / name)
        image = torch.rand((2, 3 * f, 2 * f, 3), generator=generator)
        odd = torch.rand((1, 2 * f + f // 2 + 3, 3 * f - 1, 3), generator=generator)
        latent = torch.randn((2, 8, 4, 3), generator=generator)
        inputs |= {f"{name}/image": image, f"{name}/odd": odd, f"{name}/latent": latent}
        top, left = (f // 2 + 3) // 2, (f - 1) // 2
        cropped = odd[:, top : top + 2 * f, left : left + 2 * f]
        wanted[f"{name}/latent"] = ae.encode(image.movedim(-1, 1) * 2 - 1).latent
        wanted[f"{name}/odd"] = ae.encode(cropped.movedim(-1, 1) * 2 - 1).latent
        wanted[f"{name}/image"] = (ae.decode(latent).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    found, facts = comfy.run("dcae:everything", folder, inputs, {"folders": folders}, ("--cpu", "--fp32-vae"))
    return found, facts, wanted


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
    assert found[f"{name}/inpaint"].shape == wanted[f"{name}/latent"].shape
    # the masked part is greyed before encoding, so the latent differs from the plain one
    assert far(found[f"{name}/inpaint"], wanted[f"{name}/latent"]) > 1e-3


@pytest.mark.parametrize("name", FACTORS)
def test_out_of_memory_halves_the_strip_and_stays_exact(ran, name: str) -> None:
    oom = ran[1][name]["oom"]
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
    assert result < ran[1][name]["memory"] < result + (1 << 30) + (256 << 20)


@pytest.mark.parametrize("name", FACTORS)
def test_refusals_name_what_is_wrong(ran, name: str) -> None:
    facts = ran[1][name]
    assert "another-ae" in facts["foreign"]
    assert name in facts["foreign"]
    assert facts["own"] == ""
    assert "decodes latents of 8 channels, this one has 4" in facts["channels"]
    assert "smaller than" in facts["small"]
    assert "load one with DCAELoader" in facts["not_dcae"]
