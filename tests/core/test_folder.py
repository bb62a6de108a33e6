"""The one reader of a diffusers folder: what the checkpoint says wins over our tables."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dcgen import files, folder, tensors
from dcgen.folder import autoencoder_space, read_release
from dcgen.release import model_of_release, open_model
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


def test_a_release_reads_each_file_once(make_flux, tmp_path, monkeypatch):
    """For training's use of the configs and for the network, from one opened release."""
    make_flux(in_channels=64).save_pretrained(tmp_path / "transformer")
    kl = {"_class_name": "AutoencoderKL", "block_out_channels": [1, 1, 1, 1], "latent_channels": 16}
    write_vae(tmp_path / "vae", **kl, scaling_factor=0.3611, shift_factor=0.1159, sample_size=256)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": 3.0}))
    opened = Counter()
    for module, name in ((folder, "read_object"), (files, "safe_open")):
        original = getattr(module, name)

        def counting(path, *args, original=original, **kwargs):
            opened[Path(path).relative_to(tmp_path).as_posix()] += 1
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, name, counting)
    release = read_release(tmp_path)
    model = model_of_release(release)
    assert (model.latent, model.schedule, model.native_pixels) == (release.latent, release.schedule, 256)
    assert release.dtype == torch.float32
    assert opened == {
        "transformer/config.json": 1,
        "vae/config.json": 1,
        "scheduler/scheduler_config.json": 1,
        "transformer/diffusion_pytorch_model.safetensors": 1,
    }


@pytest.mark.parametrize("piece", [1 << 24, 100, 7])
def test_a_tensor_read_in_pieces_by_several_threads(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tensors, "READ_BYTES", piece)
    state = {"a": torch.randn(37, 5), "b": torch.randn(9).bfloat16(), "c": torch.randint(0, 99, (4, 3))}
    save_file(state, tmp_path / "a.safetensors")
    stored = tensors.Tensors.open(tmp_path / "a.safetensors")
    for name, value in state.items():
        assert torch.equal(stored.get(name), value)
    assert torch.equal(stored.get("a", 3, 30), state["a"][3:30])
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-400])
    with pytest.raises(ValueError, match=r"a\.safetensors: the file ended"):
        [stored.get(name) for name in state]
