"""FLUX.2: the call against diffusers' own pipeline arithmetic, key maps against diffusers' converter, latents, text."""

from __future__ import annotations

import re

import pytest
import torch

from dcgen.backbones import BACKBONES, detect_backbone
from train.families import FAMILIES

diffusers = pytest.importorskip("diffusers")
flux2, family = BACKBONES["flux2"], FAMILIES["flux2"]
TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 4, 4, 4),
}


def make(seed: int = 0, **config):
    """A random network; every parameter drawn, norms included."""
    torch.manual_seed(seed)
    model = diffusers.Flux2Transformer2DModel(**{**TINY, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.08 if parameter.ndim > 1 else 0.3))
    return model


def pipeline_velocity(model, latents, sigma, text, guidance=None):
    """What Flux2KleinPipeline does around the transformer, with its own static methods."""
    pipeline = diffusers.Flux2KleinPipeline
    ids = pipeline._prepare_latent_ids(latents)
    out = model(
        hidden_states=pipeline._pack_latents(latents),
        timestep=sigma * 1000 / 1000,
        guidance=guidance,
        encoder_hidden_states=text,
        txt_ids=pipeline._prepare_text_ids(text),
        img_ids=ids,
        return_dict=False,
    )[0]
    return pipeline._unpack_latents_with_ids(out, ids, *latents.shape[2:])


@pytest.mark.parametrize(("channels", "size", "batch"), [(16, (3, 5), 2), (32, (4, 2), 1), (128, (2, 2), 3)])
def test_velocity_equals_the_pipelines_call(channels, size, batch):
    model = make(in_channels=channels)
    latents, sigma, text = torch.randn(batch, channels, *size), torch.rand(batch), torch.randn(batch, 7, 20)
    with torch.no_grad():
        found = family.velocity(model, latents, sigma, {"prompt_embeds": text})
        expected = pipeline_velocity(model, latents, sigma, text)
        guided = family.velocity(model, latents, sigma, {"prompt_embeds": text}, torch.full((batch,), 4.0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found, guided), "klein has no guidance embedding"
    with torch.no_grad():  # the comparison can fail: place in image and text, and sigma, matter
        turned = family.velocity(model, latents.flip(-1), sigma, {"prompt_embeds": text}).flip(-1)
        other = family.velocity(model, latents, sigma, {"prompt_embeds": text.flip(1)})
        later = family.velocity(model, latents, sigma * 0.5, {"prompt_embeds": text})
    assert min((one - expected).abs().max() for one in (turned, other, later)) > 1e-3


def test_guidance_of_dev():
    model = make(guidance_embeds=True)
    latents, sigma, text = torch.randn(2, 16, 2, 3), torch.rand(2), torch.randn(2, 4, 20)
    g = torch.tensor([1.0, 4.0])
    with pytest.raises(ValueError, match="pass guidance"):
        family.velocity(model, latents, sigma, {"prompt_embeds": text})
    with torch.no_grad():
        found = family.velocity(model, latents, sigma, {"prompt_embeds": text}, g)
        torch.testing.assert_close(found, pipeline_velocity(model, latents, sigma, text, g), rtol=1e-6, atol=1e-6)


def test_embed_has_no_bias_and_follows_a_replaced_embedder():
    model = make()
    latents = torch.randn(2, 8, 4, 6)
    model.x_embedder = torch.nn.Linear(32, 48, bias=False)
    found = family.embed(model, latents, dict(model.config))
    assert found.shape == (2, 2, 3, 48)
    patch = latents[1, :, 2:4, 4:6].reshape(-1)
    torch.testing.assert_close(found[1, 1, 2], model.x_embedder.weight @ patch, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"guidance_embeds": True, "in_channels": 32},
        {"num_layers": 0, "num_single_layers": 1, "mlp_ratio": 2.0},
        {"num_layers": 1, "num_single_layers": 0, "attention_head_dim": 24, "axes_dims_rope": (6, 6, 6, 6)},
        {"in_channels": 24, "out_channels": 16},
    ],
)
def test_round_trip_and_detection(config):
    model = make(**config)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = {**model.config, "rope_theta": 2000, "eps": 1e-6}
    expected["out_channels"] = expected["out_channels"] or expected["in_channels"]
    native = flux2.to_original(state)
    back = flux2.to_diffusers(native)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert sum(value.numel() for value in native.values()) == sum(value.numel() for value in state.values())
    for names, prefix in ((state, ""), (native, ""), (state, "transformer."), (native, "model.diffusion_model.")):
        backbone, found = detect_backbone({prefix + key: value.to("meta") for key, value in names.items()})
        assert backbone is flux2
        assert found == {key: expected[key] for key in found}
        flux2.check_config(found)


def test_original_names_are_what_diffusers_converts():
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers as convert

    state = make(guidance_embeds=True).state_dict()
    converted = convert({key: value.clone() for key, value in flux2.to_original(state).items()})
    assert set(converted) == set(state)
    assert all(torch.equal(converted[key], state[key]) for key in state)


def test_published_sizes():
    """klein 4B and 9B have the parameters that their names say, and at f64c128 the shapes of the stock network."""
    for name, millions in (("flux.2-klein-4b", 3876), ("flux.2-klein-9b", 9079)):
        config = family.architectures[name].config
        with torch.device("meta"):
            stock = diffusers.Flux2Transformer2DModel(**config)
            moved = diffusers.Flux2Transformer2DModel(**flux2.config_with_latent(dict(stock.config), 128))
        assert round(sum(value.numel() for value in stock.parameters()) / 1e6) == millions
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (stock, moved)]
        assert shapes[0] == shapes[1]


def test_lora_targets_are_those_of_published_trainers():
    """DiffSynth-Studio's list for klein: attention and MLP of every block."""
    names = [name for name, module in make().named_modules() if isinstance(module, torch.nn.Linear)]
    found = {re.sub(r"\d+", "N", name, count=1) for name in names if family.is_lora_target(name)}
    parts = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    assert found == {
        *(f"transformer_blocks.N.attn.{part}" for part in parts),
        *(f"transformer_blocks.N.{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out")),
        *(f"single_transformer_blocks.N.attn.{part}" for part in ("to_qkv_mlp_proj", "to_out")),
    }


def test_signature_forgets_the_latent_and_nothing_else():
    base = dict(make().config)
    signature = flux2.base_signature(base)
    assert signature == flux2.base_signature(flux2.config_with_latent(base, 128))
    changes = {"num_layers": 4, "num_single_layers": 9, "joint_attention_dim": 24, "mlp_ratio": 4.0}
    for field, value in {**changes, "guidance_embeds": True, "rope_theta": 10000}.items():
        assert flux2.base_signature({**base, field: value}) != signature, field


def test_refusals_name_the_keys():
    state = make().state_dict()
    lacking = {key: value for key, value in state.items() if key != "single_stream_modulation.linear.weight"}
    with pytest.raises(ValueError, match=r"1 missing: single_stream_modulation.linear.weight"):
        flux2.to_original(lacking)
    with pytest.raises(ValueError, match=r"1 unknown: x_embedder.bias"):
        flux2.to_original({**state, "x_embedder.bias": torch.zeros(48)})
    with pytest.raises(ValueError, match="even numbers that add up to 16"):
        flux2.check_config({**make().config, "axes_dims_rope": [4, 4, 4, 6]})
    with pytest.raises(ValueError, match="timestep_guidance_channels is 128"):
        flux2.check_config({**make().config, "timestep_guidance_channels": 128})


# ---- the packed latent


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    from train.tiny import tiny_packed_kl

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("vae") / "vae"
    tiny_packed_kl().save_pretrained(folder)
    return folder


def test_latents_are_those_of_the_pipeline(vae_folder):
    """Encoded, packed and normalised as the pipeline has it, and back to its image."""
    from train.autoencoders import load_autoencoder

    pipeline = diffusers.Flux2KleinPipeline
    ours = load_autoencoder(vae_folder)
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(vae_folder).eval()
    assert (ours.space.channels, ours.space.spatial_factor, ours.space.packing) == (16, 8, 2)
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        found = ours.space.normalize(ours.encode(image))
        stand_in = type("Pipeline", (), {"vae": vae, "_patchify_latents": staticmethod(pipeline._patchify_latents)})()
        expected = pipeline._encode_vae_image(stand_in, image, None)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        raw = pipeline._unpatchify_latents(expected * std + mean)
        decoded = ours.decode(ours.space.denormalize(found))
        torch.testing.assert_close(decoded, vae.decode(raw).sample.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_a_vae_without_its_statistics_is_refused(vae_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    from dcgen.folder import autoencoder_space

    folder = tmp_path / "vae"
    shutil.copytree(vae_folder, folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({key: value for key, value in state.items() if key != "bn.running_var"}, weights)
    with pytest.raises(ValueError, match=r"vae.*bn.running_var.*found nothing, expected 16"):
        autoencoder_space(folder)
    save_file({**state, "bn.running_mean": torch.zeros(4)}, weights)
    with pytest.raises(ValueError, match=r"bn.running_mean.*found \(4,\), expected 16"):
        autoencoder_space(folder)


def test_a_packed_space_without_statistics_matches_and_other_packing_does_not(vae_folder):
    from dataclasses import replace

    from dcgen.folder import autoencoder_space
    from dcgen.latent import LatentSpace
    from dcgen.spaces import SPACES

    space = autoencoder_space(vae_folder)
    assert LatentSpace.from_metadata(space.to_metadata()) == space
    assert not space.differences(replace(space, mean=None, std=None))
    assert space.differences(replace(space, mean=(9.0,) * 16)) == ["mean of the channels"]
    assert "packing: 2 against 1" in space.differences(replace(space, packing=1))
    deep, own = SPACES["dc-ae-1.5-f64c128"], SPACES["flux2-f16c128"]
    assert any("spatial_factor" in line for line in own.differences(deep))


# ---- text


CHAT = (  # Qwen3's own, for one user message and without thinking
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def test_text_equals_the_pipelines(tmp_path):
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from train.stages.tiny import write_tiny
    from train.text import load_text

    torch.manual_seed(0)
    write_tiny(tmp_path, family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = CHAT
    encoder = Qwen3ForCausalLM.from_pretrained(tmp_path / "text_encoder").eval()
    prompts = ["a red square on the left", "", "a {blue} square"]
    with torch.no_grad():
        expected = diffusers.Flux2KleinPipeline._get_qwen3_prompt_embeds(
            encoder, tokenizer, prompts, max_sequence_length=16
        )
    found = load_text(tmp_path, "cpu", torch.float32)(prompts)["prompt_embeds"]
    assert found.shape == (3, 16, 36)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
