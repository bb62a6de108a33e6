"""FLUX.2 klein in ComfyUI: a base from core's own loader and adapters on it, releases, text, VAE, whole graphs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

PROMPTS = ["a red cat on a blue background", "", "a (pear:1.3), {an apple} " * 60]
RANK, ALPHA = 4, 6.0
SEED, STEPS = 11, 4
WORKFLOWS = Path(__file__).resolve().parents[3] / "workflows"


def make_adapter(file, base, new, space, helper, seed=8):
    """An adapter with the ends of `new` and random LoRA over diffusers model `base`: file and merged model."""
    import copy

    from dcgen.adapter import Adapter, LoraPair, save_adapter
    from dcgen.backbones import BACKBONES
    from train.families import FAMILIES

    linears = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = {name: layer for name, layer in linears.items() if FAMILIES["flux2"].is_lora_target(name)}
    lora = helper.pairs(layers, RANK, seed)
    state = new.state_dict()
    ends = {key: state[key].clone() for key in ("x_embedder.weight", "proj_out.weight")}
    signature = BACKBONES["flux2"].base_signature(dict(base.config))
    pairs = {name: LoraPair(a, b, ALPHA) for name, (a, b) in lora.items()}
    save_adapter(file, Adapter("flux2", ends, pairs, space, signature, {"rule": "empirical"}))
    merged = copy.deepcopy(new)
    changed = {**base.state_dict(), **ends}
    changed |= {f"{n}.weight": changed[f"{n}.weight"] + ALPHA / RANK * (b @ a) for n, (a, b) in lora.items()}
    merged.load_state_dict(changed)
    return merged


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny, helper, klein, klein_base, klein_f64):
    """Files for ComfyUI, and the diffusers models that they should be there."""
    from dcgen.backbones import BACKBONES
    from dcgen.latent import LatentSpace

    folder = tmp_path_factory.mktemp("klein-files")
    base = klein_base.transformer
    original = BACKBONES["flux2"].to_original(base.state_dict())
    save_file({key: value.contiguous() for key, value in original.items()}, folder / "klein.safetensors")
    other = klein.transformer(tiny, 128, 99)
    original = BACKBONES["flux2"].to_original(other.state_dict())
    save_file({key: value.contiguous() for key, value in original.items()}, folder / "other.safetensors")
    spaces = {"f32": LatentSpace("test-f32", 8, 32, 0.37), "f64": LatentSpace("test-f64", 128, 64, 0.37)}
    models = {"base": base}
    for name, space in spaces.items():
        new = klein.transformer(tiny, space.channels, 70 + space.channels)
        models[name] = make_adapter(folder / f"{name}.safetensors", base, new, space, helper)
    linears = dict(base.named_modules())
    names = [
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.ff.linear_in",
        "single_transformer_blocks.1.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.0.attn.to_out",
    ]
    user = helper.pairs({name: linears[name] for name in names}, RANK, seed=9)
    helper.make_lora(folder / "user.safetensors", user)
    models["lora"] = helper.merged(models["f64"], [(0.7, user)])
    return folder, models


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    sizes = {"base": (2, 128, 3, 4), "f32": (1, 8, 4, 2), "f64": (2, 128, 2, 3)}
    made = {f"{name}/x": draw(*size) for name, size in sizes.items()}
    made |= {f"{name}/sigma": torch.rand(size[0], generator=generator) * 0.8 + 0.1 for name, size in sizes.items()}
    made |= {f"{name}/context": draw(size[0], 9, 48) for name, size in sizes.items()}
    made["pixels"] = torch.rand((2, 32, 48, 3), generator=generator)
    made["z"] = draw(2, 128, 2, 3)
    return made


@pytest.fixture(scope="module")
def ran(comfy, tmp_path_factory, made, inputs, klein_base, klein_f64, base_release):
    params = {
        "files": str(made[0]),
        "release": str(klein_base.folder),
        "deep": str(klein_f64.folder),
        "flux": str(base_release[0]),
        "prompts": PROMPTS,
    }
    folder = tmp_path_factory.mktemp("klein")
    return comfy.run("klein:everything", folder, inputs, params, ("--cpu", "--fp32-vae"))


def of(inputs, name):
    return tuple(inputs[f"{name}/{key}"] for key in ("x", "sigma", "context"))


def test_a_base_of_cores_loader_and_adapters_on_it(ran, made, inputs, klein, helper):
    """From 0.9.2 on; the core before detects FLUX.2 dev's 48 heads in every model and stops there itself."""
    found, facts = ran
    if "core" in facts["refused"]:
        assert "48" in facts["refused"]["core"] or "positional dim" in facts["refused"]["core"]
        return
    _, models = made
    for name in ("base", "f32", "f64", "base again"):
        which = name.split()[0]
        wanted = klein.velocity(models[which], *of(inputs, which))
        assert helper.relative(found[f"core/{name}"], wanted) < 1e-4, name
    wanted = klein.velocity(models["lora"], *of(inputs, "f64"))
    assert helper.relative(found["core/lora"], wanted) < 1e-4
    assert helper.relative(klein.velocity(models["f64"], *of(inputs, "f64")), wanted) > 1e-2
    assert facts["core"] == {"factor": 16, "channels": 128, "schedule": {"rule": "empirical"}}
    assert facts["memory"] == pytest.approx([3.1 * 4 * 128 / 2604] * 2)


def test_a_base_of_our_loader_and_adapters_on_it(ran, made, inputs, klein, helper):
    """In every version: release folder and single file with original names, whose latent the user chooses."""
    found, facts = ran
    _, models = made
    for name in ("release/base", "single/base", "release/f32", "single/f64", "release/lora"):
        which = name.split("/")[1]
        wanted = klein.velocity(models[which], *of(inputs, "f64" if which == "lora" else which))
        assert helper.relative(found[name], wanted) < 1e-4, name
    assert facts["release"]["factor"] == 16
    assert facts["release"]["schedule"] == {"rule": "empirical"}


def test_merged_release_on_stock_shapes(ran, inputs, klein, klein_f64, helper):
    wanted = klein.velocity(klein_f64.transformer, *of(inputs, "f64"))
    assert helper.relative(ran[0]["merged"], wanted) < 1e-4


def test_wrong_pairings_are_refused_by_name(ran):
    said = ran[1]["refused"]
    wanted = {
        "adapter of FLUX.1": ["'flux' models", "FLUX.2"],
        "klein's adapter on FLUX.1": ["'flux2' models", "FLUX.1"],
        "twice": ["already runs on test-f64"],
        "merged": ["already runs on"],
        "latent of the base": ["made by flux2-f16c128", "spatial_factor: 16 against 64"],
        "latent of f8": ["16, 4, 4", "128 channels at f64"],
        "size": ["100x64", "multiples of 64", "128x64"],
        "text of another encoder": ["2560 channels", "48", "type flux2"],
        "text of FLUX.1": ["another text encoder"],
    }
    for name, parts in wanted.items():
        assert all(part in said.get(name, "") for part in parts), (name, said.get(name))
    assert set(said) - set(wanted) <= {"core"}


def test_text_equals_the_pipeline(ran, klein, klein_base, helper):
    for i, prompt in enumerate(PROMPTS):
        wanted = klein.embeds(klein_base, prompt)
        assert ran[0][f"text{i}"].shape == wanted.shape == (1, 512, 48)
        assert helper.relative(ran[0][f"text{i}"], wanted) < 1e-4


def test_the_template_is_that_of_cores_own_text_encoder(ran):
    facts = ran[1]
    if facts["klein text"] is None:
        assert facts["version"] < [0, 9, 2]
    else:
        assert facts["klein text"] == [facts["ours"], [9, 18, 27]]


def test_vae_equals_diffusers(ran, inputs, klein_base, helper):
    from diffusers import Flux2KleinPipeline as Pipeline

    vae = klein_base.vae
    mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
    std = torch.sqrt(variance + vae.config.batch_norm_eps)
    with torch.no_grad():
        latent = vae.encode(inputs["pixels"].movedim(-1, 1) * 2 - 1).latent_dist.mode()
        wanted = (Pipeline._patchify_latents(latent) - mean) / std
        pixels = vae.decode(Pipeline._unpatchify_latents(inputs["z"] * std + mean)).sample.movedim(1, -1)
    assert helper.relative(ran[0]["encoded"], wanted) < 1e-4
    assert (ran[0]["decoded"] - ((pixels + 1) / 2).clamp(0, 1)).abs().max() < 1e-4
    assert ran[1]["vae"] == {"channels": 128, "factor": 16}


# ---- whole graphs


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def text_to_image(release, width, height, batch):
    size = {"size": "width x height", "width": width, "height": height, "batch_size": batch}
    sampling = {"seed": SEED, "steps": STEPS, "guidance": 1.0, "sampler_name": "euler", "denoise": 1.0}
    return {
        "load": node("DCGenReleaseLoader", release=release),
        "text": node("CLIPTextEncode", clip=["load", 1], text=PROMPTS[0]),
        "sample": node("DCGen4KSampler", model=["load", 0], positive=["text", 0], **sampling, **size),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "dump": node("TestDump", images=["decode", 0], name="picture"),
    }


@pytest.mark.parametrize(
    ("kind", "width", "height", "batch"),
    [("base", 64, 96, 2), ("f64", 128, 128, 1), ("f64", 192, 64, 2)],
)
def test_pixels_equal_a_plain_diffusers_loop(server, request, klein, kind, width, height, batch):
    made, name = (request.getfixturevalue(f"klein_{kind}{end}") for end in ("", "_name"))
    server.queue(text_to_image(name, width, height, batch))
    found = server.dumped("picture")
    factor = 16 if kind == "base" else 64
    noise = torch.randn((batch, 128, height // factor, width // factor), generator=torch.manual_seed(SEED))
    wanted = klein.image(made, PROMPTS[0], noise, STEPS)
    assert found.shape == wanted.shape == (batch, height, width, 3)
    assert np.abs(found - wanted).max() < 1e-3
    assert wanted.std() > 0.02, "a flat picture would prove nothing"


@pytest.fixture(scope="module")
def installed(server, made, klein_base_name, klein_f64):
    """The tiny base for core's loader, its adapters, and the f64 DC-AE, in the server's folders."""
    folder, _ = made
    places = {"klein.safetensors": "diffusion_models", "f32.safetensors": "model_patches"}
    for name, place in {**places, "f64.safetensors": "model_patches"}.items():
        target = server.base / "models" / place / f"tiny-klein-{name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(folder / name)
    server.install(klein_f64.folder / "vae", "vae", "test-f64")
    return klein_base_name


@pytest.fixture(scope="module")
def f32_vae(server, tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("klein-vae") / "vae"
    tiny.dcae(61).save_pretrained(folder)
    return server.install(folder, "vae", "test-f32")


@pytest.mark.once_per_core
@pytest.mark.parametrize(("name", "kind", "side"), [("dcgen_klein_1k", "f32", 32), ("dcgen_klein_4k", "f64", 64)])
def test_template_runs_with_tiny_files(server, installed, f32_vae, name, kind, side):
    """With core's own loader of the base where it has one, else with the release, as the note says."""
    graph = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    by_kind = {one["class_type"]: key for key, one in graph.items()}
    release = node("DCGenReleaseLoader", release=installed)
    graph["release"] = release
    version = [int(part) for part in server.get("/system_stats")["system"]["comfyui_version"].split(".")]
    unet, clip = by_kind["UNETLoader"], by_kind["CLIPLoader"]
    graph[unet]["inputs"]["unet_name"] = "tiny-klein-klein.safetensors"
    replaced = {clip: ["release", 1], **({unet: ["release", 0]} if version < [0, 9, 2] else {})}
    for key in replaced:
        del graph[key]
    for one in graph.values():
        links = {k: replaced[v[0]] for k, v in one["inputs"].items() if isinstance(v, list) and v[0] in replaced}
        one["inputs"] |= links
    graph[by_kind["DCGenApply"]]["inputs"]["adapter_name"] = f"tiny-klein-{kind}.safetensors"
    graph[by_kind["DCAELoader"]]["inputs"]["vae_name"] = f"test-{kind}"
    size = {"size": "width x height", "width": 2 * side, "height": side}
    graph[by_kind["DCGen4KSampler"]]["inputs"] |= size
    assert graph[by_kind["DCGen4KSampler"]]["inputs"]["steps"] == 4
    (image,) = server.images(server.queue(graph))[by_kind["SaveImage"]]
    assert image.shape == (side, 2 * side, 3)
    assert image.std() > 3
