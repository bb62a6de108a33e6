"""Preview factors: recovered exactly where the truth is linear, and through a DC-AE file into a model file."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dcgen.convert import main
from dcgen.dcae import DCAE, DCAEConfig, load_dcae, save_dcae
from dcgen.latent import LatentSpace
from dcgen.preview import fit_preview, sample_images

SPACE = LatentSpace("linear", 6, 8, 0.5, 0.25)


def linear_encoder(seed: int = 0):
    """Latents that hold the mean colour in a random rotation, beside channels of other things."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q

    def encode(images: torch.Tensor) -> torch.Tensor:
        colour = F.avg_pool2d(images, 8)
        other = F.avg_pool2d(images.square(), 8) - 0.4
        return torch.einsum("ij,bjhw->bihw", mix, torch.cat((colour, other), dim=1)) + 0.25

    return encode


def test_linear_truth_is_found():
    encode = linear_encoder()
    space, explained = fit_preview(encode, SPACE)
    assert explained > 0.999
    images = torch.rand(2, 3, 32, 40) * 2 - 1
    latent = space.normalize(encode(images))
    preview = torch.einsum("bihw,ij->bjhw", latent, torch.tensor(space.rgb_factors))
    preview = preview + torch.tensor(space.rgb_bias)[:, None, None]
    torch.testing.assert_close(preview, F.avg_pool2d(images, 8), rtol=0, atol=0.02)  # the ridge's share


def test_noise_explains_nothing():
    generator = torch.Generator().manual_seed(0)
    _, explained = fit_preview(lambda x: torch.randn(len(x), 6, 8, 8, generator=generator), SPACE)
    assert abs(explained) < 0.1


def test_own_pictures_and_too_few():
    space, explained = fit_preview(linear_encoder(), SPACE, [torch.rand(2, 3, 64, 64) for _ in range(3)])
    assert explained > 0.9
    with pytest.raises(ValueError, match="2 latents cannot determine 7"):
        fit_preview(linear_encoder(), SPACE, [torch.rand(2, 3, 8, 8)])
    assert len(space.rgb_factors) == 6


def test_pictures_are_enough_and_in_range():
    for channels, factor in ((32, 32), (128, 64)):
        space = LatentSpace("x", channels, factor, 1.0)
        batches = list(sample_images(space))
        assert all(batch.shape == (4, 3, 8 * factor, 8 * factor) for batch in batches)
        assert all(batch.abs().max() <= 1 and batch.std() > 0.3 for batch in batches)
        assert sum(len(batch) * 64 for batch in batches) >= 8 * (channels + 1)


def test_into_the_autoencoders_file(tmp_path, capsys):
    torch.manual_seed(0)
    stages = 3
    config = DCAEConfig(
        name="tiny",
        latent_channels=4,
        encoder_block_types=("ResBlock",) * stages,
        decoder_block_types=("ResBlock",) * stages,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        decoder_norm_types=("rms_norm",) * stages,
        decoder_act_fns=("silu",) * stages,
        scaling_factor=0.7,
    )
    save_dcae(DCAE(config), tmp_path / "tiny.safetensors")
    assert load_dcae(tmp_path / "tiny.safetensors").latent_space.rgb_factors is None
    assert main(["preview", str(tmp_path / "tiny.safetensors"), str(tmp_path / "out.safetensors")]) == 0
    assert "of the colours" in capsys.readouterr().out
    found = load_dcae(tmp_path / "out.safetensors").latent_space
    assert (len(found.rgb_factors), len(found.rgb_bias)) == (4, 3)
    assert (found.name, found.scaling_factor) == ("tiny", 0.7)
