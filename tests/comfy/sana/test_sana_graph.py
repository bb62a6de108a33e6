"""SANA's graphs, queued through /prompt as the frontend does, against diffusers' SanaPipeline."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dcgen.adapter import Adapter, save_adapter
from dcgen.backbones import BACKBONES
from dcgen.latent import LatentSpace

FOLDER = Path(__file__).resolve().parents[3] / "workflows"
PROMPT, NEGATIVE, SEED, CFG = "a red cat on a blue background", "ugly", 5, 4.5


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(release, width, height, steps, **changes):
    """Release -> two prompts -> empty latent -> DCGen4KSampler -> VAEDecode."""
    nodes = {
        "load": node("DCGenReleaseLoader", release=release),
        "positive": node("DCGenSanaTextEncode", clip=["load", 1], text=PROMPT),
        "negative": node("DCGenSanaTextEncode", clip=["load", 1], text=NEGATIVE, negative=True),
        "latent": node("DCGenEmptyLatent", model=["load", 0], width=width, height=height, batch_size=1),
        "sample": node(
            "DCGen4KSampler",
            model=["load", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent=["latent", 0],
            seed=SEED,
            steps=steps,
            guidance=3.5,
            cfg=CFG,
            sampler_name="flow_dpmpp_2m",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "dump": node("TestDump", images=["decode", 0], name="sana"),
    }
    return {**nodes, **changes}


def noise(pipe, width, height):
    factor, channels = pipe.vae_scale_factor, pipe.transformer.config.in_channels
    return torch.randn((1, channels, height // factor, width // factor), generator=torch.manual_seed(SEED))


def pipeline_picture(pipe, width, height, steps):
    """(B,H,W,3) from SanaPipeline itself."""
    return pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=CFG,
        latents=noise(pipe, width, height),
        use_resolution_binning=False,
        output_type="np",
    ).images


@pytest.fixture(scope="module")
def sana_name(server, sana_release):
    return server.install(sana_release[0], "diffusers", "tiny-sana")


@pytest.fixture(scope="module")
def deep_name(server, deep_sana_release):
    return server.install(deep_sana_release[0], "diffusers", "tiny-dcgen-sana")


@pytest.fixture(scope="module")
def sprint_name(server, sprint_release):
    return server.install(sprint_release[0], "diffusers", "tiny-sprint")


@pytest.mark.parametrize(("deep", "width", "height", "steps"), [(False, 96, 64, 6), (True, 128, 256, 5)])
def test_pixels_equal_the_pipeline(
    server, sana, sana_name, deep_name, sana_release, deep_sana_release, deep, width, height, steps
):
    """Its own solver, guidance, mask and decoder: f32 without positions at shift 3, f64 with positions at shift 6."""
    pipe = (deep_sana_release if deep else sana_release)[1]
    wanted = pipeline_picture(pipe, width, height, steps)
    server.queue(graph(deep_name if deep else sana_name, width, height, steps))
    found = server.dumped("sana")
    assert found.shape == wanted.shape == (1, height, width, 3)
    assert np.abs(found - wanted).max() < 1e-3
    assert wanted.std() > 0.02, "a flat picture would prove nothing"


def sprint_graph(release, steps, guidance):
    nodes = graph(release, 96, 64, steps)
    del nodes["negative"]
    settings = {"guidance": guidance, "cfg": 1.0, "sampler_name": "flow_consistency"}
    nodes["sample"]["inputs"] = {**nodes["sample"]["inputs"], **settings}
    del nodes["sample"]["inputs"]["negative"]
    return nodes


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sprint_pixels_equal_the_pipeline(server, sprint_name, sprint_release, steps):
    """Trigflow arithmetic, SCMScheduler, the guidance embedding, one run a step: SanaSprintPipeline as it is."""
    pipe, guidance = sprint_release[1], 4.5
    wanted = pipe(
        prompt=PROMPT,
        height=64,
        width=96,
        num_inference_steps=steps,
        intermediate_timesteps=1.3 if steps == 2 else None,
        guidance_scale=guidance,
        latents=noise(pipe, 96, 64),
        generator=torch.Generator().manual_seed(SEED + 1),
        use_resolution_binning=False,
        output_type="np",
    ).images
    server.queue(sprint_graph(sprint_name, steps, guidance))
    found = server.dumped("sana")
    assert found.shape == wanted.shape == (1, 64, 96, 3)
    assert np.abs(found - wanted).max() < 1e-3
    assert wanted.std() > 0.02, "a flat picture would prove nothing"
    # The guidance embedding is fed: another scale is another picture.
    server.queue(sprint_graph(sprint_name, steps, 9.0))
    assert np.abs(server.dumped("sana") - wanted).max() > 1e-2


def test_sprint_through_core_nodes(server, sprint_name):
    """SamplerCustom with core's lcm and FluxGuidance along DCGenScheduler; KSampler's simple grid at those levels."""
    graphs = {"ours": sprint_graph(sprint_name, 2, 4.5)}
    links = {"model": ["load", 0], "positive": ["guided", 0], "negative": ["guided", 0]}
    links["latent_image"] = ["latent", 0]
    custom = node("SamplerCustom", add_noise=True, noise_seed=SEED, cfg=1.0, **links)
    custom["inputs"] |= {"sampler": ["lcm", 0], "sigmas": ["sigmas", 0]}
    settings = {"seed": SEED, "steps": 2, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "denoise": 1.0}
    for name, sample in {"custom": custom, "simple": node("KSampler", **settings, **links)}.items():
        graphs[name] = {
            **graphs["ours"],
            "guided": node("FluxGuidance", conditioning=["positive", 0], guidance=4.5),
            "lcm": node("KSamplerSelect", sampler_name="lcm"),
            "sigmas": node("DCGenScheduler", model=["load", 0], latent=["latent", 0], steps=2, denoise=1.0),
            "sample": sample,
        }
    found = {}
    for name, nodes in graphs.items():
        server.queue(nodes)
        found[name] = server.dumped("sana")
    assert np.abs(found["custom"] - found["ours"]).max() < 1e-5
    # The core keeps a thousand levels, of which the nearest to the middle one is 4e-4 away.
    assert np.abs(found["simple"] - found["ours"]).max() < 5e-3


def test_core_sampler_at_the_models_own_shift(server, sana, sana_name, sana_release):
    """Core's KSampler with euler and the simple schedule against the same steps written out with diffusers."""
    steps, pipe = 5, sana_release[1]
    sampler = node(
        "KSampler",
        model=["load", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=SEED,
        steps=steps,
        cfg=CFG,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    server.queue(graph(sana_name, 64, 96, steps, sample=sampler))
    grid = [1 - i / steps for i in range(steps + 1)]
    sigmas = [3 * s / (1 + 2 * s) for s in grid]
    with torch.no_grad():
        embeds, mask, negative, negative_mask = pipe.encode_prompt(
            PROMPT, True, NEGATIVE, complex_human_instruction=sana.instruction()
        )
        x = noise(pipe, 64, 96)
        for now, then in itertools.pairwise(sigmas):
            of = {"x": x, "sigma": torch.tensor([now])}
            positive = sana.velocity(pipe.transformer, {**of, "context": embeds, "mask": mask})
            other = sana.velocity(pipe.transformer, {**of, "context": negative, "mask": negative_mask})
            x = x + (then - now) * (other + CFG * (positive - other))
        pixels = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    wanted = ((pixels.movedim(1, -1) + 1) / 2).clamp(0, 1).numpy()
    assert np.abs(server.dumped("sana") - wanted).max() < 1e-3


def test_refused_before_anything_runs(server, sana_name, deep_name):
    """A latent of the base in the deep model, a prompt through CLIPTextEncode."""
    other = node("DCGenReleaseLoader", release=sana_name)
    small = node("DCGenEmptyLatent", model=["other", 0], width=128, height=128, batch_size=1)
    entry = server.try_queue(graph(deep_name, 128, 128, 2, other=other, latent=small))
    assert "16 channels at f64" in server.error(entry)
    plain = node("CLIPTextEncode", clip=["load", 1], text=PROMPT)
    entry = server.try_queue(graph(sana_name, 64, 64, 2, positive=plain))
    assert "without Gemma's final norm" in server.error(entry)


@pytest.fixture(scope="module")
def adapter_name(server, sana_release, deep_sana_release, tiny):
    """An adapter of the base onto the deep release's latent, random; and that latent's autoencoder by name."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"patch_embed.proj.weight": (64, 16, 1, 1), "patch_embed.proj.bias": (64,)}
    shapes |= {"proj_out.weight": (16, 64), "proj_out.bias": (16,)}
    tensors = {name: torch.randn(shape, generator=draw) * 0.2 for name, shape in shapes.items()}
    base = BACKBONES["sana"].base_signature(dict(sana_release[1].transformer.config))
    space = LatentSpace("", 16, 64, deep_sana_release[1].vae.config.scaling_factor)
    adapter = Adapter("sana", tensors, {}, space, base, {"rule": "static", "shift": 3.0})
    file = server.base / "models" / "model_patches" / "tiny-sana.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(file, adapter)
    server.install(deep_sana_release[0] / "vae", "vae", "tiny-f64")
    return file.name


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*sana*.json")))
def test_workflows_run_with_tiny_files(server, sana_name, deep_name, sprint_name, adapter_name, name):
    """The API twins of the shipped graphs, tiny weights in place of those they name."""
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    adapted = any(node["class_type"] == "DCGenApply" for node in api.values())
    release = sprint_name if "sprint" in name else deep_name if "dcgen" in name and not adapted else sana_name
    values = {
        "DCGenReleaseLoader": {"release": release},
        "DCGenApply": {"adapter_name": adapter_name},
        "DCAELoader": {"vae_name": "tiny-f64"},
        "DCGenEmptyLatent": {"width": 128, "height": 64, "size": "width x height", "batch_size": 1},
        "DCGen4KSampler": {"steps": 2},
    }
    small = {k: {**n, "inputs": {**n["inputs"], **values.get(n["class_type"], {})}} for k, n in api.items()}
    (pictures,) = server.images(server.queue(small)).values()
    assert [picture.shape for picture in pictures] == [(64, 128, 3)]
    assert pictures[0].std() > 3
