"""The base's images beside the previews of a run: what they show, when they are drawn, and that they change nothing."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from train.config import load_recipe
from train.run import run_recipe
from train.sample import seeded_noise
from train.text import load_text

PROMPTS = ["a red square on the left", "a blue square on the right"]


@pytest.fixture
def rerun(debug_run, tmp_path):
    """Runs the finetune stage of the debug recipe again, with the earlier stages of a finished run."""

    def run(name, *overrides):
        tiny = debug_run / "tiny"
        places = [f"output={tmp_path / name}", f"base={tiny}/release", f"autoencoder={tiny}/dc-ae"]
        places += [f"finetune.cache={debug_run}/cache", f"finetune.start={debug_run}/head"]
        recipe = load_recipe("debug", [*places, *overrides])
        for other in set(recipe.stages) - {"finetune"}:
            recipe.stages.pop(other)
        run_recipe(recipe)
        return recipe.folder / "finetune"

    return run


def test_the_base_draws_the_prompts_on_its_own_latent(debug_run):
    """Against diffusers' network in the paper's Euler steps, with the seeds and the guidance of the previews."""
    release, steps = debug_run / "tiny" / "release", 2
    model = diffusers.FluxTransformer2DModel.from_pretrained(release / "transformer")
    vae = diffusers.AutoencoderKL.from_pretrained(release / "vae")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(release / "scheduler")
    f, c = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
    side = 64 // f
    x = seeded_noise([0, 0], (c, side, side))
    tokens = (side // 2) ** 2
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    text = load_text(release, "cpu", torch.float32)(PROMPTS)
    rows, columns = torch.meshgrid(torch.arange(side // 2), torch.arange(side // 2), indexing="ij")
    ids = torch.stack([torch.zeros(tokens), rows.reshape(-1), columns.reshape(-1)], -1)
    with torch.no_grad():
        for t in scheduler.timesteps:
            packed = x.reshape(2, c, side // 2, 2, side // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, tokens, 4 * c)
            out = model(
                hidden_states=packed,
                timestep=t.expand(2) / 1000,
                guidance=torch.full((2,), 3.5) if model.config.guidance_embeds else None,
                pooled_projections=text["pooled"],
                encoder_hidden_states=text["prompt_embeds"],
                txt_ids=torch.zeros(text["prompt_embeds"].shape[1], 3),
                img_ids=ids,
            ).sample
            v = out.reshape(2, side // 2, side // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, c, side, side)
            x = scheduler.step(v, t, x).prev_sample
        images = vae.decode(x / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample
    expected = (images.clamp(-1, 1) / 2 + 0.5) * 255
    found = torch.from_numpy(np.array(Image.open(debug_run / "finetune" / "previews" / "base.png"))).permute(2, 0, 1)
    assert found.shape == (3, 64, 2 * 64 + 2)
    for number, left in enumerate((0, 66)):
        assert (found[:, :, left : left + 64] - expected[number]).abs().max() < 1
    assert expected.std() > 2


def test_it_changes_nothing_of_the_training_and_can_be_switched_off(rerun):
    with_base, without = rerun("on"), rerun("off", "finetune.preview_base=false")
    assert (with_base / "previews" / "base.png").is_file()
    assert not (without / "previews" / "base.png").exists()
    first, second = (load_file(folder / "adapter.safetensors") for folder in (with_base, without))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_device_without_room_for_the_base_trains_without(rerun, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("train.stages.head.Pipeline", full)
    folder = rerun("full")
    assert "base's previews need more memory" in capsys.readouterr().err
    assert not (folder / "previews" / "base.png").exists()
    assert (folder / "adapter.safetensors").is_file()


@pytest.mark.parametrize("name", ["debug", "debug-sana"])
def test_in_bfloat16(name, tmp_path, request):
    """As published recipes train: the image of float32, but for rounding."""
    done = request.getfixturevalue("debug_run" if name == "debug" else "debug_sana")
    overrides = [f"output={tmp_path}", f"base={done}/tiny/release", f"autoencoder={done}/tiny/dc-ae"]
    overrides += [f"finetune.cache={done}/cache", f"finetune.start={done}/head", "finetune.preview_every=6"]
    overrides += ["finetune.preview_prompts=[a, b]", "finetune.preview_steps=2", "finetune.steps=1"]
    pixels = []
    for dtype in ("float32", "bfloat16"):
        recipe = load_recipe(name, [*overrides, f"output={tmp_path}/{dtype}", f"finetune.dtype={dtype}"])
        for other in set(recipe.stages) - {"finetune"}:
            recipe.stages.pop(other)
        run_recipe(recipe)
        image = Image.open(recipe.folder / "finetune" / "previews" / "base.png")
        pixels.append(np.asarray(image, dtype=float))
    assert pixels[0].std() > 2
    assert np.corrcoef(*(image.ravel() for image in pixels))[0, 1] > 0.85  # random weights amplify rounding


def test_it_is_drawn_once(rerun):
    folder = rerun("run")
    drawn = (folder / "previews" / "base.png").stat().st_mtime_ns
    assert rerun("run", "finetune.steps=8") == folder
    assert (folder / "previews" / "base.png").stat().st_mtime_ns == drawn


def test_nothing_is_drawn_where_nobody_looks_or_the_base_is_on_this_latent(rerun, debug_run):
    assert not (rerun("none", "finetune.preview_every=0") / "previews").exists()
    tiny = debug_run / "tiny" / "release"
    own = ["finetune.start=base", f"autoencoder={tiny}/vae", "finetune.patch_size=2"]
    cached = load_recipe("debug", [f"output={debug_run.parent}/own", f"base={tiny}", f"autoencoder={tiny}/vae",
                                   f"cache.data.path={debug_run}/tiny/pictures"])  # fmt: skip
    run_recipe(cached, only="cache")
    folder = rerun("own", *own, f"finetune.cache={debug_run.parent}/own/cache")
    assert not (folder / "previews" / "base.png").exists()
    assert list((folder / "previews").glob("samples-*.png"))
