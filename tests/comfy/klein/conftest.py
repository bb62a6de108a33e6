"""Tiny random FLUX.2 klein releases, in sizes that core's own loader detects, and the arithmetic of their pipeline."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

SIZES = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 128,  # core takes it for granted
    "num_attention_heads": 1,
    "joint_attention_dim": 48,
    "guidance_embeds": False,
}


def transformer(tiny, channels: int, seed: int, **changes):
    """A random network on packed tokens of so many channels."""
    import diffusers

    return tiny.randomize(diffusers.Flux2Transformer2DModel(in_channels=channels, **{**SIZES, **changes}), seed)


def packed_vae(tiny, seed: int):
    """A VAE with the real one's latent (32 channels at f8, packed to 128 at f16) and statistics of its own."""
    import diffusers

    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8)
    vae = tiny.randomize(vae, seed)
    draw = torch.Generator().manual_seed(seed)
    vae.bn.running_mean.copy_(0.2 * torch.randn(128, generator=draw))
    vae.bn.running_var.copy_(0.3 + torch.rand(128, generator=draw))
    return vae


def write_release(folder, tiny, qwen, seed: int, vae=None, channels: int = 128):
    """A release in the diffusers layout: the base on its own VAE, or a merged DC-Gen on the DC-AE `vae`."""
    import diffusers

    tokenizer = qwen.byte_tokenizer()
    made = SimpleNamespace(
        folder=folder,
        tokenizer=tokenizer,
        text_encoder=tiny.randomize(qwen.encoder(len(tokenizer), layers=29), seed + 1),
        transformer=transformer(tiny, channels, seed + 2),
        vae=packed_vae(tiny, seed + 3) if vae is None else vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": True}
    for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler"):
        part = getattr(made, name)
        part.save_pretrained(folder / name)
        kind = "PreTrainedTokenizerFast" if name == "tokenizer" else type(part).__name__
        index[name] = ["transformers" if name.startswith("t") and name != "transformer" else "diffusers", kind]
    (folder / "model_index.json").write_text(json.dumps(index))
    return made


def embeds(made, prompt: str):
    """Text features of the pipeline."""
    from diffusers import Flux2KleinPipeline

    with torch.no_grad():
        return Flux2KleinPipeline._get_qwen3_prompt_embeds(made.text_encoder, made.tokenizer, prompt)


def velocity(network, x, sigma, text):
    """Flux2KleinPipeline's call, with its own static methods."""
    from diffusers import Flux2KleinPipeline as Pipeline

    ids = Pipeline._prepare_latent_ids(x)
    with torch.no_grad():
        out = network(
            hidden_states=Pipeline._pack_latents(x),
            timestep=sigma,
            encoder_hidden_states=text,
            txt_ids=Pipeline._prepare_text_ids(text),
            img_ids=ids,
            return_dict=False,
        )[0]
    return Pipeline._unpack_latents_with_ids(out, ids, *x.shape[2:])


def pipeline_image(made, prompt: str, noise, steps: int):
    """The pipeline's loop over its own scheduler, and the decode of a packed VAE or a DC-AE: (B,H,W,3) in 0..1."""
    from diffusers import Flux2KleinPipeline as Pipeline
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    text = embeds(made, prompt).expand(len(noise), -1, -1)
    grid = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    made.scheduler.set_timesteps(sigmas=grid, mu=compute_empirical_mu(noise.shape[2] * noise.shape[3], steps))
    x = noise
    for now, then in itertools.pairwise(made.scheduler.sigmas.tolist()):
        x = x + (then - now) * velocity(made.transformer, x, torch.full((len(x),), now), text)
    with torch.no_grad():
        if hasattr(made.vae, "bn"):
            mean, variance = (value.view(1, -1, 1, 1) for value in (made.vae.bn.running_mean, made.vae.bn.running_var))
            x = Pipeline._unpatchify_latents(x * torch.sqrt(variance + made.vae.config.batch_norm_eps) + mean)
        else:
            x = x / made.vae.config.scaling_factor
        pixels = made.vae.decode(x).sample
    return ((pixels.movedim(1, -1) + 1) / 2).clamp(0, 1).numpy()


@pytest.fixture(scope="session")
def klein():
    """The functions of this file."""
    return SimpleNamespace(transformer=transformer, embeds=embeds, velocity=velocity, image=pipeline_image)


@pytest.fixture(scope="session")
def klein_base(tmp_path_factory, tiny, qwen):
    """A tiny klein on its own VAE."""
    return write_release(tmp_path_factory.mktemp("klein") / "tiny-klein", tiny, qwen, 40)


@pytest.fixture(scope="session")
def klein_f64(tmp_path_factory, tiny, qwen):
    """A tiny merged DC-Gen-klein on an f64 DC-AE of 128 channels: the stock shapes."""
    folder = tmp_path_factory.mktemp("klein") / "tiny-klein-f64"
    return write_release(folder, tiny, qwen, 50, tiny.dcae(51, channels=128, factor=64, deepest=128))


@pytest.fixture(scope="session")
def klein_base_name(server, klein_base):
    return server.install(klein_base.folder, "diffusers", "tiny-klein")


@pytest.fixture(scope="session")
def klein_f64_name(server, klein_f64):
    return server.install(klein_f64.folder, "diffusers", "tiny-klein-f64")
