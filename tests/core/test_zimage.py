"""Z-Image: the call against diffusers' pipeline, key maps against its converter, ends by patch size, text."""

from __future__ import annotations

import re

import pytest
import torch

from dcgen.adapter import merge
from dcgen.backbones import BACKBONES, detect_backbone
from train.families import FAMILIES

diffusers = pytest.importorskip("diffusers")
zimage, family = BACKBONES["zimage"], FAMILIES["zimage"]
TINY = {
    "in_channels": 16,
    "dim": 96,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 20,
    "axes_dims": [8, 12, 12],
    "axes_lens": [1024, 64, 64],
}


def make(seed: int = 0, **config):
    """A random network; every parameter drawn, norms and pad tokens included."""
    torch.manual_seed(seed)
    model = diffusers.ZImageTransformer2DModel(**{**TINY, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.08 if parameter.ndim > 1 else 0.3))
    return model


def on(channels, p):
    return zimage.config_with_latent({}, channels, p)


def texts(*lengths):
    return [torch.randn(length, 20) for length in lengths]


def padded(rows):
    from train.conditioning import pad

    text, mask = pad(rows)
    return {"prompt_embeds": text, "mask": mask}


@pytest.mark.parametrize(
    ("channels", "p", "size", "lengths"),
    [(16, 2, (6, 10), (7, 40)), (32, 1, (3, 5), (33,)), (128, 1, (4, 8), (5, 5, 64))],
)
def test_velocity_equals_the_pipelines_loop(channels, p, size, lengths):
    """One Euler step of ZImagePipeline itself with given embeddings, against ours."""
    model = make(**on(channels, p))
    rows = texts(*lengths)
    latents = torch.randn(len(rows), channels, *size)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[0.8, 0.4])
    now, then = scheduler.sigmas[:2].tolist()
    sigma = torch.full((len(rows),), now)
    with torch.no_grad():
        found = latents + (then - now) * family.velocity(model, latents, sigma, padded(rows))
        # the loop's body: pipeline_z_image.py, "6. Denoising loop"
        timestep = (1000 - scheduler.timesteps[0].expand(len(rows))) / 1000
        out = model(list(latents.unsqueeze(2).unbind(0)), timestep, rows, patch_size=p, return_dict=False)[0]
        noise = -torch.stack([one.float() for one in out]).squeeze(2)
        expected = scheduler.step(noise, scheduler.timesteps[0], latents, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the comparison can fail: place, text and sigma matter, and so does what the mask leaves out
        flipped = family.velocity(model, latents.flip(-1), sigma, padded(rows)).flip(-1)
        other = family.velocity(model, latents, sigma, padded([row.flip(0) for row in rows]))
        later = family.velocity(model, latents, sigma / 2, padded(rows))
        wanted = family.velocity(model, latents, sigma, padded(rows))
    assert min((one - wanted).abs().max() for one in (flipped, other, later)) > 1e-3


def test_embed_takes_channels_last():
    model = make()
    latents = torch.randn(2, 16, 4, 6)
    found = family.embed(model, latents, dict(model.config))
    patch = latents[1, :, 2:4, 4:6].permute(1, 2, 0).reshape(-1)
    torch.testing.assert_close(found[1, 1, 2], model.all_x_embedder["2-1"](patch), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="another autoencoder"):
        family.embed(model, torch.randn(1, 32, 4, 4), dict(model.config))
    with pytest.raises(ValueError, match="does not divide"):
        family.embed(model, torch.randn(1, 16, 5, 4), dict(model.config))


@pytest.mark.parametrize(
    "config",
    [{}, on(32, 1), on(128, 1), {"n_layers": 0, "n_refiner_layers": 2}, {"n_layers": 1, "n_refiner_layers": 0}],
)
def test_round_trip_and_detection(config):
    model = make(**config)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()}
    native = zimage.to_original(state)
    back = zimage.to_diffusers(native)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert not any("-1." in key for key in native)
    for names, prefix in ((state, ""), (native, ""), (state, "transformer."), (native, "model.diffusion_model.")):
        backbone, found = detect_backbone({prefix + key: value.to("meta") for key, value in names.items()})
        assert backbone is zimage
        assert found == {key: expected[key] for key in found}
        zimage.check_config(found)


def test_original_names_are_what_diffusers_converts():
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers as convert

    state = make().state_dict()
    converted = convert({key: value.clone() for key, value in zimage.to_original(state).items()})
    assert set(converted) == set(state)
    assert all(torch.equal(converted[key], state[key]) for key in state)
    with_unused = {**zimage.to_original(state), "norm_final.weight": torch.zeros(96)}
    assert set(zimage.to_diffusers(with_unused)) == set(state)


def test_lora_targets_are_those_of_the_released_code():
    names = [name for name, module in make().named_modules() if isinstance(module, torch.nn.Linear)]
    found = {re.sub(r"\d+", "N", name, count=1) for name in names if family.is_lora_target(name)}
    parts = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
    parts += [f"feed_forward.w{n}" for n in (1, 2, 3)]
    assert found == {f"{stack}.N.{part}" for stack in ("layers", "noise_refiner", "context_refiner") for part in parts}


def test_published_size():
    with torch.device("meta"):
        model = diffusers.ZImageTransformer2DModel(**family.architectures["z-image"].config)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6) == 6155
    shapes = zimage.shapes(dict(model.config))
    assert {key: shapes[key] for key in model.state_dict()} == {
        k: tuple(v.shape) for k, v in model.state_dict().items()
    }


def test_the_final_modulation_goes_with_the_head(tmp_path):
    """Its name depends on the patch size: an adapter carries it, and the base's own leaves with the old ends."""
    from dcgen.adapter import Adapter, load_adapter, save_adapter
    from dcgen.latent import LatentSpace

    base, new = make(), make(1, **on(8, 1))
    ends = zimage.ends({"patch_size": 1})
    tensors = {name: value for name, value in new.state_dict().items() if name.startswith(ends.prefixes)}
    assert len(tensors) == 6
    space, signature = LatentSpace("a", 8, 32, 0.4), zimage.base_signature(dict(base.config))
    save_adapter(tmp_path / "a.safetensors", Adapter("zimage", tensors, {}, space, signature, {"rule": "flux2"}))
    merged = merge(base.state_dict(), load_adapter(tmp_path / "a.safetensors"))
    assert set(merged) == set(new.state_dict())
    assert all(torch.equal(merged[key], tensors.get(key, base.state_dict().get(key))) for key in merged)
    modulation = "all_final_layer.1-1.adaLN_modulation.1.weight"
    without = {name: value for name, value in tensors.items() if name != modulation}
    with pytest.raises(ValueError, match=re.escape(f"1 missing: {modulation}")):
        Adapter("zimage", without, {}, space, signature, {"rule": "flux2"}).check()


def test_moved_network_keeps_the_bases_modulation(tmp_path):
    from train.models import moved_network
    from train.stages.tiny import write_tiny

    torch.manual_seed(0)
    write_tiny(tmp_path, family)
    base = diffusers.ZImageTransformer2DModel.from_pretrained(tmp_path / "transformer")
    moved, config = moved_network(tmp_path, 8, 1, 0, torch.float32)
    assert config["all_patch_size"] == [1]
    old, new = (dict(model.state_dict()) for model in (base, moved))
    for kind in ("weight", "bias"):
        names = [f"all_final_layer.{p}-1.adaLN_modulation.1.{kind}" for p in (2, 1)]
        assert torch.equal(new[names[1]], old[names[0]])


def test_refusals():
    state = make().state_dict()
    lacking = {key: value for key, value in state.items() if key != "layers.1.feed_forward.w3.weight"}
    with pytest.raises(ValueError, match=r"1 missing: layers.1.feed_forward.w3.weight"):
        zimage.to_original(lacking)
    twice = {**state, "all_x_embedder.1-1.weight": torch.zeros(96, 16)}
    with pytest.raises(ValueError, match="one patch embedder"):
        zimage.detect(twice)
    with pytest.raises(ValueError, match="Omni model"):
        zimage.check_config({**make().config, "siglip_feat_dim": 8})
    with pytest.raises(ValueError, match=r"add up to 96 / 3"):
        zimage.check_config({**make().config, "axes_dims": [8, 8, 8]})
    with pytest.raises(ValueError, match="1 blocks in noise_refiner, 0 in context_refiner"):
        zimage.detect({key: value for key, value in state.items() if not key.startswith("context_refiner")})


CHAT = (  # Qwen3's own, for one user message with thinking
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def test_text_equals_the_pipelines(tmp_path):
    from transformers import AutoTokenizer, Qwen3Model

    from train.stages.tiny import write_tiny
    from train.text import load_text

    torch.manual_seed(0)
    write_tiny(tmp_path, family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = CHAT
    encoder = Qwen3Model.from_pretrained(tmp_path / "text_encoder").eval()
    prompts = ["red", "", "a {blue} square"]
    pipeline = diffusers.ZImagePipeline(
        scheduler=None, vae=None, transformer=None, text_encoder=encoder, tokenizer=tokenizer
    )
    with torch.no_grad():
        expected = pipeline._encode_prompt(list(prompts), torch.device("cpu"), max_sequence_length=16)
    found = load_text(tmp_path, "cpu", torch.float32)(prompts)
    for row, mask, wanted in zip(found["prompt_embeds"], found["mask"], expected, strict=True):
        torch.testing.assert_close(row[mask > 0], wanted, rtol=1e-5, atol=1e-5)
