"""Tiny random Z-Image releases, as narrow as core's network can be, and the arithmetic of their pipeline."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

SIZES = {
    "dim": 1056,  # core's time embedding is 1024 wide, and its MLPs have multiples of 256
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 33,
    "n_kv_heads": 33,
    "cap_feat_dim": 16,
    "axes_dims": [8, 12, 12],
    "axes_lens": [1024, 64, 64],
}


def transformer(tiny, channels: int, p: int, seed: int):
    import diffusers

    sizes = {"in_channels": channels, "all_patch_size": [p], "all_f_patch_size": [1], **SIZES}
    return tiny.randomize(diffusers.ZImageTransformer2DModel(**sizes), seed)


def write_release(folder, tiny, qwen, seed: int, vae=None):
    """A release in the diffusers layout: the base on an f8 VAE (patch 2), or a merged DC-Gen on an f32 DC-AE."""
    import diffusers

    tokenizer = qwen.byte_tokenizer()
    deep = vae is not None
    made = SimpleNamespace(
        folder=folder,
        deep=deep,
        tokenizer=tokenizer,
        text_encoder=tiny.randomize(qwen.encoder(len(tokenizer), layers=3).model, seed + 1),
        transformer=transformer(tiny, *((8, 1) if deep else (16, 2)), seed + 2),
        vae=vae if deep else tiny.kl_vae(seed + 3),
        # of the merged one the default, which leaves the rule to the family
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            **({"use_dynamic_shifting": True} if deep else {"shift": 3.0})
        ),
    )
    index = {"_class_name": "ZImagePipeline"}
    for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler"):
        part = getattr(made, name)
        part.save_pretrained(folder / name)
        kind = "PreTrainedTokenizerFast" if name == "tokenizer" else type(part).__name__
        index[name] = ["transformers" if name in ("tokenizer", "text_encoder") else "diffusers", kind]
    (folder / "model_index.json").write_text(json.dumps(index))
    return made


def embeds(made, prompt: str):
    """Text features (T,D) of the pipeline."""
    import diffusers

    parts = {"text_encoder": made.text_encoder, "tokenizer": made.tokenizer}
    pipeline = diffusers.ZImagePipeline(scheduler=None, vae=None, transformer=None, **parts)
    with torch.no_grad():
        return pipeline._encode_prompt(prompt, torch.device("cpu"))[0]


def velocity(network, x, sigma, text):
    """ZImagePipeline's call; text (B,T,D), all of one length."""
    p = network.config.all_patch_size[0]
    with torch.no_grad():
        out = network(list(x.unsqueeze(2).unbind(0)), 1 - sigma, list(text), patch_size=p, return_dict=False)[0]
    return -torch.stack(list(out)).squeeze(2)


def pipeline_image(made, prompt: str, noise, steps: int):
    """The pipeline's loop, by its own scheduler or FLUX.2's rule, and the decode: (B,H,W,3) in 0..1."""
    text = embeds(made, prompt).expand(len(noise), -1, -1)
    if made.deep:
        r = (noise[0].numel() / 4096) ** 0.5
        sigmas = [r * s / (1 + (r - 1) * s) for s in (1 - i / steps for i in range(steps + 1))]
    else:
        made.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist())
        sigmas = made.scheduler.sigmas.tolist()
    x = noise
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * velocity(made.transformer, x, torch.full((len(x),), now), text)
    config = made.vae.config
    with torch.no_grad():
        pixels = made.vae.decode(x / config.scaling_factor + (0 if made.deep else config.shift_factor)).sample
    return ((pixels.movedim(1, -1) + 1) / 2).clamp(0, 1).numpy()


@pytest.fixture(scope="session")
def zimage():
    """The functions of this file."""
    return SimpleNamespace(transformer=transformer, embeds=embeds, velocity=velocity, image=pipeline_image)


@pytest.fixture(scope="session")
def zimage_base(tmp_path_factory, tiny, qwen):
    return write_release(tmp_path_factory.mktemp("zimage") / "tiny-zimage", tiny, qwen, 40)


@pytest.fixture(scope="session")
def zimage_deep(tmp_path_factory, tiny, qwen):
    return write_release(tmp_path_factory.mktemp("zimage") / "tiny-zimage-f32", tiny, qwen, 50, tiny.dcae(51))


@pytest.fixture(scope="session")
def zimage_base_name(server, zimage_base):
    return server.install(zimage_base.folder, "diffusers", "tiny-zimage")


@pytest.fixture(scope="session")
def zimage_deep_name(server, zimage_deep):
    return server.install(zimage_deep.folder, "diffusers", "tiny-zimage-f32")
