"""Z-Image in ComfyUI: a base of another loader and adapters on it, releases, text, whole graphs."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

PROMPTS = ["a red cat on a blue background", "", "a (pear:1.3), {an apple} " * 60]
RANK, ALPHA = 4, 6.0
SEED, STEPS = 11, 3
WORKFLOWS = Path(__file__).resolve().parents[3] / "workflows"


def make_adapter(file, base, new, space, helper):
    """An adapter with the ends of `new` and random LoRA over diffusers model `base`: file and merged model."""
    from dcgen.adapter import Adapter, LoraPair, save_adapter
    from dcgen.backbones import BACKBONES
    from train.families import FAMILIES

    backbone = BACKBONES["zimage"]
    linears = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    lora = helper.pairs({n: m for n, m in linears.items() if FAMILIES["zimage"].is_lora_target(n)}, RANK, 8)
    ends = backbone.ends({"patch_size": 1})
    own = {key: value.clone() for key, value in new.state_dict().items() if key.startswith(ends.prefixes)}
    pairs = {name: LoraPair(a, b, ALPHA) for name, (a, b) in lora.items()}
    signature = backbone.base_signature(dict(base.config))
    save_adapter(file, Adapter("zimage", own, pairs, space, signature, {"rule": "flux2"}))
    old = backbone.ends(dict(base.config)).prefixes
    state = {key: value for key, value in base.state_dict().items() if not key.startswith(old)} | own
    state |= {f"{n}.weight": state[f"{n}.weight"] + ALPHA / RANK * (b @ a) for n, (a, b) in lora.items()}
    merged = copy.deepcopy(new)
    merged.load_state_dict(state)
    return merged


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny, helper, zimage, zimage_base):
    """Files for ComfyUI, and the diffusers models that they should be there."""
    from dcgen.backbones import BACKBONES
    from dcgen.latent import LatentSpace

    folder, base = tmp_path_factory.mktemp("zimage-files"), zimage_base.transformer
    original = BACKBONES["zimage"].to_original(base.state_dict())
    save_file({key: value.contiguous() for key, value in original.items()}, folder / "zimage.safetensors")
    new = zimage.transformer(tiny, 8, 1, 77)
    deep = make_adapter(folder / "deep.safetensors", base, new, LatentSpace("test-f32", 8, 32, 0.37), helper)
    linears = dict(base.named_modules())
    names = ["layers.0.attention.to_k", "noise_refiner.0.feed_forward.w2", "context_refiner.0.attention.to_out.0"]
    user = helper.pairs({name: linears[name] for name in names}, RANK, seed=9)
    helper.make_lora(folder / "user.safetensors", user)
    return folder, {"base": base, "deep": deep, "lora": helper.merged(deep, [(0.7, user)])}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(4)
    sizes = {"base": (2, 16, 6, 8), "deep": (1, 8, 3, 5)}
    made = {f"{name}/x": torch.randn(size, generator=generator) for name, size in sizes.items()}
    made |= {f"{name}/sigma": torch.rand(size[0], generator=generator) * 0.8 + 0.1 for name, size in sizes.items()}
    return made | {f"{name}/context": torch.randn(size[0], 39, 16, generator=generator) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def ran(comfy, tmp_path_factory, made, inputs, zimage_base, zimage_deep, base_release):
    params = {
        "files": str(made[0]),
        "release": str(zimage_base.folder),
        "deep": str(zimage_deep.folder),
        "flux": str(base_release[0]),
        "prompts": PROMPTS,
    }
    return comfy.run("zimage:everything", tmp_path_factory.mktemp("zimage"), inputs, params)


def of(inputs, name):
    return tuple(inputs[f"{name}/{key}"] for key in ("x", "sigma", "context"))


CASES = ["core/base", "core/deep", "core/lora", "core/base again", "release/base", "release/deep", "single/base"]


def test_base_and_adapters_of_either_loader(ran, made, inputs, zimage, helper):
    found, facts = ran
    _, models = made
    for name in CASES:
        which = name.split("/")[1].split()[0]
        wanted = zimage.velocity(models[which], *of(inputs, "base" if which == "base" else "deep"))
        assert helper.relative(found[name], wanted) < 1e-4, name
    lora, plain = (zimage.velocity(models[name], *of(inputs, "deep")) for name in ("lora", "deep"))
    assert helper.relative(plain, lora) > 1e-2
    assert facts["core"] == {
        "factor": 8,
        "channels": 16,
        "schedule": {"rule": "static", "shift": 3.0, "sigma_max": 1.0},
    }
    assert facts["memory"] == pytest.approx(4)


def test_merged_release(ran, inputs, zimage, zimage_deep, helper):
    wanted = zimage.velocity(zimage_deep.transformer, *of(inputs, "deep"))
    assert helper.relative(ran[0]["merged"], wanted) < 1e-4
    assert ran[1]["merged"] == {"rule": "flux2"}


def test_wrong_pairings_are_refused_by_name(ran):
    wanted = {
        "adapter of FLUX.1": ["'flux' models", "Z-Image"],
        "adapter of Z-Image on FLUX.1": ["'zimage' models", "FLUX.1"],
        "twice": ["already runs on test-f32"],
        "merged": ["already runs on"],
        "latent of the base": ["16 channels", "8 channels at f32"],
        "text of klein": ["7680 channels", "16", "Qwen3-4B"],
    }
    said = ran[1]["refused"]
    assert set(said) == set(wanted)
    for name, parts in wanted.items():
        if name == "latent of the base":
            assert "8 channels at f32" in said[name]
            continue
        assert all(part in said[name] for part in parts), (name, said[name])


def test_text_equals_the_pipeline(ran, zimage, zimage_base, helper):
    for i, prompt in enumerate(PROMPTS):
        wanted = zimage.embeds(zimage_base, prompt)
        assert ran[0][f"text{i}"].shape == (1, *wanted.shape)
        assert helper.relative(ran[0][f"text{i}"][0], wanted) < 1e-4
    assert ran[1]["template"] == ran[1]["ours"]


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


@pytest.mark.once_per_core
@pytest.mark.parametrize(("kind", "width", "height", "batch"), [("base", 96, 64, 2), ("deep", 96, 160, 1)])
def test_pixels_equal_a_plain_diffusers_loop(server, request, zimage, kind, width, height, batch):
    made, name = (request.getfixturevalue(f"zimage_{kind}{end}") for end in ("", "_name"))
    size = {"size": "width x height", "width": width, "height": height, "batch_size": batch}
    sampling = {"seed": SEED, "steps": STEPS, "guidance": 1.0, "sampler_name": "euler", "denoise": 1.0}
    graph = {
        "load": node("DCGenReleaseLoader", release=name),
        "text": node("CLIPTextEncode", clip=["load", 1], text=PROMPTS[0]),
        "sample": node("DCGen4KSampler", model=["load", 0], positive=["text", 0], **sampling, **size),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "dump": node("TestDump", images=["decode", 0], name="picture"),
    }
    server.queue(graph)
    found = server.dumped("picture")
    channels, factor = (16, 8) if kind == "base" else (8, 32)
    noise = torch.randn((batch, channels, height // factor, width // factor), generator=torch.manual_seed(SEED))
    wanted = zimage.image(made, PROMPTS[0], noise, STEPS)
    assert found.shape == wanted.shape == (batch, height, width, 3)
    assert np.abs(found - wanted).max() < 1e-3
    assert wanted.std() > 0.02, "a flat picture would prove nothing"


@pytest.fixture(scope="module")
def installed(server, made, zimage_base_name, zimage_deep):
    """The tiny base's release, its adapter and the DC-AE in the server's folders."""
    target = server.base / "models" / "model_patches" / "tiny-zimage.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(made[0] / "deep.safetensors")
    server.install(zimage_deep.folder / "vae", "vae", "test-f32")
    return zimage_base_name


@pytest.mark.once_per_core
@pytest.mark.parametrize("name", ["dcgen_zimage_1k", "dcgen_zimage_4k"])
def test_template_runs_with_tiny_files(server, installed, name):
    """With the release in place of core's loaders, which take the real model's width for granted."""
    graph = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    by_kind = {one["class_type"]: key for key, one in graph.items()}
    graph["release"] = node("DCGenReleaseLoader", release=installed)
    replaced = {by_kind["UNETLoader"]: ["release", 0], by_kind["CLIPLoader"]: ["release", 1]}
    for key in replaced:
        del graph[key]
    for one in graph.values():
        links = {k: replaced[v[0]] for k, v in one["inputs"].items() if isinstance(v, list) and v[0] in replaced}
        one["inputs"] |= links
    graph[by_kind["DCGenApply"]]["inputs"]["adapter_name"] = "tiny-zimage.safetensors"
    graph[by_kind["DCAELoader"]]["inputs"]["vae_name"] = "test-f32"
    sampler = graph[by_kind["DCGen4KSampler"]]["inputs"]
    assert sampler["steps"] == 9
    sampler |= {"size": "width x height", "width": 64, "height": 32, "steps": 2}
    (image,) = server.images(server.queue(graph))[by_kind["SaveImage"]]
    assert image.shape == (32, 64, 3)
    assert image.std() > 3
