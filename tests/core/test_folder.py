"""The one reader of a diffusers folder: what the checkpoint says wins over our tables."""

from __future__ import annotations

import json

import pytest
import torch

from dcgen.folder import autoencoder_space, read_release
from dcgen.release import open_model
from dcgen.schedule import Schedule

DC_AE = {
    "_class_name": "AutoencoderDC",
    "latent_channels": 32,
    "encoder_layers_per_block": [0, 4, 8, 2, 2, 2],
    "decoder_layers_per_block": [0, 5, 10, 2, 2, 2],
}


def write_vae(folder, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("scaling", [0.3189, 0.7])
def test_the_scale_of_a_published_name_is_the_files(tmp_path, scaling):
    """A retrained f32c32-in under its published name, with a scaling factor of its own."""
    write_vae(tmp_path / "dc-ae-f32c32-in-1.0-diffusers", **DC_AE, scaling_factor=scaling)
    space = autoencoder_space(tmp_path / "dc-ae-f32c32-in-1.0-diffusers")
    assert (space.name, space.scaling_factor, space.spatial_factor) == ("dc-ae-f32c32-in-1.0", scaling, 32)


def test_a_folder_called_vae_is_named_by_its_numbers(tmp_path):
    write_vae(tmp_path / "vae", **DC_AE, scaling_factor=0.41407)
    assert autoencoder_space(tmp_path / "vae").name == "dc-ae-f32c32-sana-1.0"
    write_vae(tmp_path / "b" / "vae", **DC_AE, scaling_factor=0.9, _name_or_path="x/y/vae")
    assert autoencoder_space(tmp_path / "b" / "vae").name == ""


def test_nodes_and_training_read_the_same(make_flux, tmp_path):
    """open_model, which reads weights, and read_release, which does not."""
    diffusers = pytest.importorskip("diffusers")
    make_flux(in_channels=64).bfloat16().save_pretrained(tmp_path / "transformer")
    kl = {"_class_name": "AutoencoderKL", "block_out_channels": [1, 1, 1, 1], "latent_channels": 16}
    write_vae(tmp_path / "vae", **kl, scaling_factor=0.3611, shift_factor=0.1159)
    for scheduler, schedule in (
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0), Schedule("static", shift=1.0, sigma_max=1.0)),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), Schedule("flux")),
    ):
        scheduler.save_pretrained(tmp_path / "scheduler")
        release, model = read_release(tmp_path), open_model(tmp_path)
        assert release.schedule == model.schedule == schedule
        assert release.latent == model.latent
        assert release.latent.name == "flux-f8c16"
        assert release.patch_size == model.patch_size == 2
        assert release.signature == model.signature
        assert release.dtype == torch.bfloat16
        assert release.distilled


def test_a_latent_that_cannot_fill_a_token_is_refused(make_flux, tmp_path):
    make_flux(in_channels=64).save_pretrained(tmp_path / "transformer")
    write_vae(tmp_path / "vae", **DC_AE, scaling_factor=0.3189)
    with pytest.raises(ValueError, match=r"64 values per token.*32 channels cannot fill"):
        read_release(tmp_path).patch_size  # noqa: B018
