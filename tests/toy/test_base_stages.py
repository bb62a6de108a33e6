"""The stages that make the toy's base, on a VAE and a transformer of a few kilobytes."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcgen.folder import read_release
from dcgen.schedule import Schedule
from train.batches import BatchPlan
from train.config import parse_recipe
from train.distributed import Ranks
from train.families import FAMILIES
from train.run import make_stage, run_recipe
from train.tiny import tiny_kl

STEPS = {"steps": 2, "batch": 3}


@pytest.fixture(scope="module")
def recipe(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_kl().save_pretrained(folder / "kl")
    data = str(root / "toy" / "data")
    transformer = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "axes_dims_rope": [4, 6, 6], "guidance_embeds": True,
    }  # fmt: skip
    kl = str(folder / "kl")
    cache = {"base": "text/release", "teacher": kl, "autoencoder": kl, "store": "float32"}
    text = {"data": data, "vae": kl, "width": 32, "layers": 1, "transformer": transformer}
    stages = {
        "text": {**text, "steps": 150, "batch": 64, "optimizer": {"lr": 5e-3}, "log_every": 1},
        "cache": {**cache, "data": {"type": "toy", "path": data, "variants": 1}},
        "pretrain": {**STEPS, "base": "text/release", "autocast": False, "ema": 0.5},
        "distill": {**STEPS, "base": "pretrain/release", "autocast": False},
    }
    made = parse_recipe({"name": "t", "output": str(folder / "run"), "device": "cpu", "stages": stages})
    run_recipe(made)
    return made


@pytest.fixture(scope="module")
def sana_recipe(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sana-base")
    tiny_kl().save_pretrained(folder / "kl")
    data = str(root / "toy" / "data")
    transformer = {
        "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_size": 32, "num_layers": 1,
        "num_attention_heads": 1, "attention_head_dim": 32, "num_cross_attention_heads": 1,
        "cross_attention_head_dim": 32, "cross_attention_dim": 32, "interpolation_scale": 1.0,
    }  # fmt: skip
    text = {"backbone": "sana", "data": data, "vae": str(folder / "kl"), "width": 32, "layers": 1, "flow_shift": 2.0}
    text |= {"transformer": transformer, **STEPS}
    cache = {"base": "text/release", "autoencoder": "text/release/vae", "text_tokens": 16, "store": "float32"}
    prompts = {"preview_prompts": ["star on a red background"], "preview_every": 1, "preview_steps": 2}
    stages = {
        "text": text,
        "cache": {**cache, "data": {"type": "toy", "path": data, "variants": 1}},
        "pretrain": {**STEPS, **prompts, "base": "text/release", "autocast": False},
    }
    made = parse_recipe({"name": "t", "output": str(folder / "run"), "device": "cpu", "stages": stages})
    run_recipe(made)
    return made


def test_text_encoders_tell_captions_apart(recipe):
    last = (recipe.folder / "text" / "log.csv").read_text().splitlines()
    named = dict(zip(last[0].split(","), map(float, last[-1].split(",")), strict=True))
    assert named["clip_right"] == 1
    assert named["t5_right"] == 1


def test_the_sana_release_encodes_as_its_pipeline_does(sana_recipe):
    """300 positions, as in ComfyUI and by default in diffusers, see what 16 see: what lies beyond is masked."""
    release = sana_recipe.folder / "pretrain" / "release"
    short, long = (
        FAMILIES["sana"].text_encoder(release, "cpu", torch.float32, tokens)(["ghost on a red background"])
        for tokens in (16, 300)
    )
    assert int(short["mask"].sum()) == int(long["mask"].sum()) == 1 + 5
    torch.testing.assert_close(short["prompt_embeds"], long["prompt_embeds"][:, :16])
    assert not long["mask"][:, 16:].any()


def test_a_base_without_guidance_embedding_is_sampled_by_true_cfg(sana_recipe):
    assert (sana_recipe.folder / "pretrain" / "previews").is_dir()
    assert read_release(sana_recipe.folder / "pretrain" / "release").schedule == Schedule("static", shift=2.0)


def test_the_release_is_one_that_diffusers_opens(recipe):
    import diffusers

    pipe = diffusers.FluxPipeline.from_pretrained(recipe.folder / "distill" / "release")
    how = {"height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 16, "output_type": "pt"}
    assert pipe("star on a red background", **how).images.shape == (1, 3, 64, 64)
    assert pipe.tokenizer_2.model_max_length == 16


def test_clip_is_written_with_the_names_that_every_transformers_reads(recipe):
    from transformers import CLIPTextModel

    folder = recipe.folder / "text" / "release" / "text_encoder"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118 - no mapping
    _, found = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


def test_an_encoder_with_weights_missing_is_refused(recipe, tmp_path):
    release = tmp_path / "release"
    shutil.copytree(recipe.folder / "text" / "release", release)
    file = release / "text_encoder" / "model.safetensors"
    tensors = {f"other.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of CLIPTextModel missing there, .*random"):
        FAMILIES["flux"].text_encoder(release, "cpu", torch.float32)


def test_pretraining_changes_the_transformer_and_nothing_else(recipe):
    before, after = recipe.folder / "text" / "release", recipe.folder / "pretrain" / "release"
    files = {p.relative_to(before) for p in before.rglob("*") if p.is_file()}
    assert files == {p.relative_to(after) for p in after.rglob("*") if p.is_file()}
    changed = {f.as_posix() for f in files if (before / f).read_bytes() != (after / f).read_bytes()}
    assert "transformer/diffusion_pytorch_model.safetensors" in changed
    assert changed <= {"transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"}


@pytest.mark.parametrize("w", [0.0, 2.5])
def test_distillation_starts_from_the_distance_to_cfg(recipe, w):
    # At its start the student is its teacher. Fed g = 1 (w = 0) it has nothing to learn; fed g = 1 + w its loss is
    # the distance between its own output at g and Eq. 4 of its outputs at g = 1.
    changed = recipe.stages["distill"].model_copy(update={"w": (w, w)})
    stage = make_stage(recipe.model_copy(update={"stages": {**recipe.stages, "distill": changed}}), "distill",
                       Ranks(0, 1, torch.device("cpu")))  # fmt: skip
    model = stage.setup()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh network hardly heeds its text and guidance
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    stage.teacher.load_state_dict(model.state_dict())
    batch = BatchPlan(stage.buckets(), 3, 0).micro_batches(0, rank=0, world=1, accumulate=1, device=stage.device)[0]
    loss, _ = stage.loss(batch)
    if w == 0:
        assert loss.item() < 1e-10
        return
    x0 = stage.cache.latents(batch.indices, "teacher")
    noise = batch.normal("noise", x0.shape[1:])
    sigma = stage.config.objective.timesteps.draw(batch, 256, 4)
    x = x0 + sigma.reshape(-1, 1, 1, 1) * (noise - x0)
    text = stage.cache.text(stage.cache.caption_numbers(batch.indices))
    empty = {name: value.expand(3, *value.shape[1:]) for name, value in stage.cache.text([0]).items()}
    drop = batch.uniform("drop") < stage.config.objective.caption_dropout
    text = {name: torch.stack([e if d else t for d, e, t in zip(drop, empty[name], value, strict=True)])
            for name, value in text.items()}  # fmt: skip

    def v(cond, g):
        return stage.family.velocity(model, x, sigma, cond, torch.full((3,), g))

    with torch.no_grad():
        target = v(empty, 1.0) + (1 + w) * (v(text, 1.0) - v(empty, 1.0))
        expected = (v(text, 1 + w) - target).square().mean()
    assert expected > 1e-4
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=0)
