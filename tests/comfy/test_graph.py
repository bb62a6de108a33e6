"""Whole graphs, queued through /prompt as the frontend does, against a plain diffusers loop."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

PROMPT = "a red cat on a blue background"
STEPS, GUIDANCE, SEED = 4, 2.5, 11


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def text_to_image(release, width, height, batch=1, **changes):
    """Release -> text -> empty latent -> SamplerCustomAdvanced with DCGenScheduler -> VAEDecode -> SaveImage."""
    graph = {
        "load": node("DCGenReleaseLoader", release=release),
        "text": node("CLIPTextEncode", clip=["load", 1], text=PROMPT),
        "guide": node("FluxGuidance", conditioning=["text", 0], guidance=GUIDANCE),
        "latent": node("DCGenEmptyLatent", model=["load", 0], width=width, height=height, batch_size=batch),
        "sigmas": node("DCGenScheduler", model=["load", 0], latent=["latent", 0], steps=STEPS, denoise=1.0),
        "guider": node("BasicGuider", model=["load", 0], conditioning=["guide", 0]),
        "noise": node("RandomNoise", noise_seed=SEED),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
        "dump": node("TestDump", images=["decode", 0], name="picture"),
    }
    return {**graph, **changes}


def published_ratio(factor, tokens):
    """r of sigma' = r sigma / (1 + (r - 1) sigma): FLUX.2's rule for the f32 models, FLUX.1's for the f64 ones."""
    if factor == 32:
        return math.sqrt(tokens * 8 / 4096)
    return math.exp((1.15 - 0.5) / (4096 - 256) * (tokens - 256) + 0.5)


def diffusers_loop(pipe, tiny, width, height, batch=1):
    """The published pipeline's arithmetic, written out: encode, Euler over the shifted grid, AutoencoderDC decode."""
    factor = pipe.vae.spatial_compression_ratio
    rows, columns = height // factor, width // factor
    noise = torch.randn((batch, 8, rows, columns), generator=torch.manual_seed(SEED))
    ratio = published_ratio(factor, rows * columns)
    grid = [1 - i / STEPS for i in range(STEPS + 1)]
    sigmas = [ratio * s / (1 + (ratio - 1) * s) for s in grid]
    with torch.no_grad():
        context, pooled, _ = pipe.encode_prompt(PROMPT, PROMPT, max_sequence_length=tiny.t5_tokens)
        x = noise
        for now, then in itertools.pairwise(sigmas):
            case = {
                "x": x,
                "sigma": torch.full((batch,), now),
                "context": context.expand(batch, -1, -1),
                "pooled": pooled.expand(batch, -1),
                "guidance": torch.full((batch,), GUIDANCE),
            }
            x = x + (then - now) * tiny.velocity(pipe.transformer, case, 1)
        pixels = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    return ((pixels.movedim(1, -1) + 1) / 2).clamp(0, 1).numpy()


@pytest.mark.parametrize(
    ("kind", "width", "height", "batch"),
    [
        ("deep", 64, 64, 1),
        ("deep", 96, 64, 2),
        ("deep", 32, 160, 1),
        ("deeper", 128, 128, 1),
        ("deeper", 192, 64, 2),
        ("deeper", 64, 320, 1),
    ],
)
def test_pixels_equal_a_plain_diffusers_loop(server, request, tiny, kind, width, height, batch):
    name, (_, pipe) = (request.getfixturevalue(f"{kind}_{what}") for what in ("name", "release"))
    entry = server.queue(text_to_image(name, width, height, batch))
    wanted = diffusers_loop(pipe, tiny, width, height, batch)
    found = server.dumped("picture")
    assert found.shape == wanted.shape == (batch, height, width, 3)
    assert np.abs(found - wanted).max() < 1e-3
    assert wanted.std() > 0.02, "a flat picture would prove nothing"
    saved = np.stack(server.images(entry)["save"]).astype(np.float32) / 255
    assert np.abs(saved - wanted).max() < 1.5 / 255


def test_releases_below_a_folder(server, deep_release):
    """Two releases in one repository, as they were first published."""
    folder = server.base / "models" / "diffusers" / "DC-Gen-FLUX.1-Krea-Dev"
    folder.mkdir(parents=True)
    (folder / "DC-Gen-FLUX.1-Krea-Dev-v1.0-Res1K").symlink_to(deep_release[0], target_is_directory=True)
    name = "DC-Gen-FLUX.1-Krea-Dev/DC-Gen-FLUX.1-Krea-Dev-v1.0-Res1K"
    for kind, field in (("DCGenReleaseLoader", "release"), ("DCGenModelLoader", "model_name")):
        assert name in server.options(kind, field)
    server.queue(text_to_image(name, 64, 64))


def both(base_name, adapter_name, deep_name, seed):
    """Base and DC-Gen from one loaded base in one graph, each with core's KSampler."""

    def ksampler(model, latent):
        return node(
            "KSampler",
            model=[model, 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=[latent, 0],
            seed=seed,
            steps=3,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )

    return {
        "load": node("DCGenReleaseLoader", release=base_name),
        "other": node("DCGenReleaseLoader", release=deep_name),
        "apply": node("DCGenApply", model=["load", 0], adapter_name=adapter_name, strength=1.0),
        "text": node("CLIPTextEncode", clip=["load", 1], text=PROMPT),
        "empty_base": node("DCGenEmptyLatent", model=["load", 0], width=64, height=96, batch_size=1),
        "empty_deep": node("DCGenEmptyLatent", model=["apply", 0], width=64, height=96, batch_size=1),
        "sample_base": ksampler("load", "empty_base"),
        "sample_deep": ksampler("apply", "empty_deep"),
        "decode_base": node("VAEDecode", samples=["sample_base", 0], vae=["load", 2]),
        "decode_deep": node("VAEDecode", samples=["sample_deep", 0], vae=["other", 2]),
        "save_base": node("SaveImage", images=["decode_base", 0], filename_prefix="base"),
        "save_deep": node("SaveImage", images=["decode_deep", 0], filename_prefix="deep"),
    }


def test_base_and_dcgen_in_one_graph_with_previews(server, base_name, adapter_name, deep_name):
    """Repeatedly and from a fresh start, whichever runs first; a picture never depends on what ran before it."""
    graph = both(base_name, adapter_name, deep_name, 3)
    only = {
        "base": {k: v for k, v in graph.items() if not k.endswith("_deep")},
        "deep": {k: v for k, v in graph.items() if not k.endswith("_base")},
    }
    reference = {}
    for first in ("deep", "base"):
        server.free(unload_models=True, free_memory=True)
        with server.listening() as listener:
            entry = server.queue(only[first])
        reference[first] = server.images(entry)[f"save_{first}"][0]
        # f8 latents of an unknown autoencoder have no preview; the adapter's file brings its own.
        assert len(listener.previews) == (3 if first == "deep" else 0)
    assert listener.messages
    for seed in (4, 3, 5, 3):
        with server.listening() as listener:
            pictures = server.images(server.queue(both(base_name, adapter_name, deep_name, seed)))
        assert len(listener.previews) == 3
        same = [(pictures[f"save_{kind}"][0] == reference[kind]).all() for kind in reference]
        assert same == [seed == 3] * 2


def lora_file(server, base_release):
    """A user's LoRA made for plain FLUX: two layers of the blocks, and the embedder and head of the f8 latent."""
    layers = dict(base_release[1].transformer.named_modules())
    names = ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.proj_mlp", "x_embedder", "proj_out")
    draw, tensors = torch.Generator().manual_seed(2), {}
    for name in names:
        for part, shape in (("A", (4, layers[name].in_features)), ("B", (layers[name].out_features, 4))):
            tensors[f"transformer.{name}.lora_{part}.weight"] = torch.randn(shape, generator=draw)
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "user.safetensors")
    return "user.safetensors"


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_lora_hook_on_a_conditioning(server, base_name, adapter_name, deep_name, base_release, kind):
    """Core swaps a hook's LoRA in while it samples. It changes the picture as an ordinary LoRA does, says what it
    cannot change, and leaves the weights, which base and DC-Gen share, as they were."""
    file, model = lora_file(server, base_release), "apply" if kind == "adapter" else "other"
    graph = both(base_name, adapter_name, deep_name, 6)
    for deep in ("empty_deep", "sample_deep"):
        graph[deep]["inputs"]["model"] = [model, 0]
    graph["save_deep"] = node("TestDump", images=["decode_deep", 0], name="deep")
    graph["save_base"] = node("TestDump", images=["decode_base", 0], name="base")
    ordinary = node("LoraLoaderModelOnly", model=[model, 0], lora_name=file, strength_model=0.7)
    hook = node("CreateHookLora", lora_name=file, strength_model=0.7, strength_clip=0.0)
    hooked = {"strength": 1.0, "set_cond_area": "default", "cond_NEW": ["text", 0], "hooks": ["hook", 0]}

    def run(model=None, positive=None, **more):
        graphs = {
            **graph,
            **more,
            "sample_deep": {**graph["sample_deep"], "inputs": dict(graph["sample_deep"]["inputs"])},
        }
        graphs["sample_deep"]["inputs"] |= {"model": model} if model else {}
        graphs["sample_deep"]["inputs"] |= {"positive": positive} if positive else {}
        said = len(server.log())
        server.queue(graphs)
        return server.dumped("deep"), server.dumped("base"), server.log()[said:]

    plain, base, _ = run()
    wanted, _, told = run(model=["lora", 0], lora=ordinary)
    found, _, heard = run(positive=["hooked", 0], hook=hook, hooked=node("ConditioningSetProperties", **hooked))
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(found - plain).max() > 1e-2
    for text in (told, heard):
        assert "LoRA on a DC-Gen model: 2 of 4 changes applied" in text
        assert "final_layer.linear (proj_out), img_in (x_embedder)" in text
        assert "SHAPE MISMATCH" not in text
        assert "ERROR lora" not in text
    server.free(free_memory=True)  # the results, not the models
    again = run()
    assert np.abs(again[0] - plain).max() < 1e-6
    assert np.abs(again[1] - base).max() < 1e-6


def test_one_node_sampler_is_the_same_bit_for_bit(server, deep_name):
    """DCGen4KSampler, SamplerCustomAdvanced and core's KSampler-style path with the same sigmas: the same files."""
    one = node(
        "DCGen4KSampler",
        model=["load", 0],
        positive=["text", 0],
        latent=["latent", 0],
        seed=SEED,
        steps=STEPS,
        guidance=GUIDANCE,
        sampler_name="euler",
        denoise=1.0,
    )
    core = node(
        "SamplerCustom",
        model=["load", 0],
        add_noise=True,
        noise_seed=SEED,
        cfg=1.0,
        positive=["guide", 0],
        negative=["guide", 0],
        sampler=["euler", 0],
        sigmas=["sigmas", 0],
        latent_image=["latent", 0],
    )
    pictures = []
    for changes in ({}, {"sample": one}, {"sample": core}):
        pictures.append(server.images(server.queue(text_to_image(deep_name, 96, 64, **changes)))["save"][0])
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] == pictures[2]).all()


def test_sampler_makes_its_own_latent(server, deep_name):
    """Without a latent its size inputs are those of DCGenEmptyLatent; with one they do not count."""
    wanted = server.queue(text_to_image(deep_name, 96, 64, 2))
    pictures = server.images(wanted)["save"]
    size = {"size": "width x height", "width": 96, "height": 64, "batch_size": 2}
    sampler = {"seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "sampler_name": "euler", "denoise": 1.0}
    links = {"model": ["load", 0], "positive": ["text", 0]}
    for given in (size, {"latent": ["latent", 0], "size": "1K: 1024 x 1024"}):
        graph = text_to_image(deep_name, 96, 64, 2, sample=node("DCGen4KSampler", **links, **sampler, **given))
        found = server.images(server.queue(graph))["save"]
        assert all((one == other).all() for one, other in zip(found, pictures, strict=True))
    wrong = node("DCGen4KSampler", **links, **sampler, **{**size, "width": 80})
    assert "multiples of 32" in server.error(server.try_queue(text_to_image(deep_name, 96, 64, sample=wrong)))


def test_shift_can_be_overridden(server, deep_name):
    """FLUX.1's own shift, on an f32 model that would take FLUX.2's: as with core's scheduler at that shift."""
    ratio = math.exp(1.15)
    graph = text_to_image(deep_name, 96, 64)
    plain = server.images(server.queue(graph))["save"][0]
    graph["sigmas"]["inputs"]["shift"] = ratio
    found = server.images(server.queue(graph))["save"][0]
    flow = node("ModelSamplingSD3", model=["load", 0], shift=ratio)
    sigmas = node("BasicScheduler", model=["flow", 0], scheduler="simple", steps=STEPS, denoise=1.0)
    wanted = server.images(server.queue({**graph, "flow": flow, "sigmas": sigmas}))["save"][0]
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert np.abs(found.astype(int) - plain).max() > 3


def test_wrong_sizes_and_latents_are_refused(server, deep_name):
    entry = server.try_queue(text_to_image(deep_name, 80, 64))
    assert "multiples of 32" in server.error(entry)
    f8 = node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    entry = server.try_queue(text_to_image(deep_name, 64, 64, latent=f8))
    assert "8 channels at f32" in server.error(entry)


def image_to_image(release, denoise, **changes):
    """A picture of the release's own, encoded, and sampled again from `denoise`."""
    first = text_to_image(release, 96, 64)
    del first["save"], first["dump"]
    graph = {
        **first,
        "encode": node("DCAEEncode", image=["decode", 0], vae=["load", 2], strip=0),
        "again": node(
            "DCGen4KSampler",
            model=["load", 0],
            positive=["text", 0],
            latent=["encode", 0],
            seed=SEED + 1,
            steps=STEPS,
            guidance=GUIDANCE,
            sampler_name="euler",
            denoise=denoise,
        ),
        "shown": node("VAEDecode", samples=["again", 0], vae=["load", 2]),
        "dump": node("TestDump", images=["shown", 0], name="again"),
        "start": node("TestDump", images=["decode", 0], name="start"),
    }
    return {**graph, **changes}


def noised_loop(pipe, tiny, start, denoise):
    """Image to image as the maths has it: the encoded picture and the noise are mixed in the model's own space."""
    scale = pipe.vae.config.scaling_factor
    total = int(STEPS / denoise)
    ratio = math.sqrt(2 * 3 * 8 / 4096)
    grid = [1 - i / total for i in range(total + 1)][-(STEPS + 1) :]
    sigmas = [ratio * s / (1 + (ratio - 1) * s) for s in grid]
    with torch.no_grad():
        clean = pipe.vae.encode(torch.from_numpy(start).movedim(-1, 1) * 2 - 1).latent * scale
        noise = torch.randn(clean.shape, generator=torch.manual_seed(SEED + 1))
        context, pooled, _ = pipe.encode_prompt(PROMPT, PROMPT, max_sequence_length=tiny.t5_tokens)
        x = sigmas[0] * noise + (1 - sigmas[0]) * clean
        for now, then in itertools.pairwise(sigmas):
            case = {"x": x, "sigma": torch.tensor([now]), "context": context, "pooled": pooled}
            velocity = tiny.velocity(pipe.transformer, {**case, "guidance": torch.tensor([GUIDANCE])}, 1)
            x = x + (then - now) * velocity
        pixels = pipe.vae.decode(x / scale).sample
    return ((pixels.movedim(1, -1) + 1) / 2).clamp(0, 1).numpy()


@pytest.mark.parametrize("denoise", [0.3, 0.5, 0.8])
def test_image_to_image_mixes_noise_in_model_space(server, deep_name, deep_release, tiny, denoise):
    server.queue(image_to_image(deep_name, denoise))
    wanted = noised_loop(deep_release[1], tiny, server.dumped("start"), denoise)
    assert np.abs(server.dumped("again") - wanted).max() < 1e-3


def test_image_input_refines_like_an_encoded_latent(server, deep_name):
    """The sampler's own image input scales to the latent's size, encodes, and samples as a latent would be."""
    graph = image_to_image(deep_name, 0.5)
    server.queue(graph)
    by_latent = server.dumped("again")
    graph["again"]["inputs"] |= {"latent": ["latent", 0], "image": ["decode", 0], "vae": ["load", 2]}
    server.queue(graph)
    assert np.abs(server.dumped("again") - by_latent).max() < 1e-5
    graph["latent"]["inputs"] |= {"width": 192, "height": 128}
    server.queue(graph)
    assert server.dumped("again").shape == (1, 128, 192, 3)


def test_zero_denoise_returns_the_picture(server, deep_name):
    server.queue(image_to_image(deep_name, 0.0))
    reconstructed = image_to_image(deep_name, 0.0)
    reconstructed["shown"]["inputs"]["samples"] = ["encode", 0]
    kept = server.dumped("again")
    server.queue(reconstructed)
    assert np.abs(server.dumped("again") - kept).max() < 1e-6


def test_negative_is_true_guidance(server, deep_name, deep_release, tiny):
    """x0 guided by cfg from two prompts, against the sum written out; cfg 1 never runs the negative."""
    graph = text_to_image(deep_name, 64, 64)
    graph["no"] = node("CLIPTextEncode", clip=["load", 1], text="an apple, a pear")
    sampler = {"seed": SEED, "steps": 1, "guidance": GUIDANCE, "sampler_name": "euler", "denoise": 1.0}
    links = {"model": ["load", 0], "positive": ["text", 0], "latent": ["latent", 0], "negative": ["no", 0]}
    found = {}
    for cfg in (1.0, 2.5):
        graph["sample"] = node("DCGen4KSampler", **sampler, **links, cfg=cfg)
        server.queue(graph)
        found[cfg] = server.dumped("picture")
    pipe = deep_release[1]
    noise = torch.randn((1, 8, 2, 2), generator=torch.manual_seed(SEED))
    velocities = []
    for prompt in (PROMPT, "an apple, a pear"):
        with torch.no_grad():
            context, pooled, _ = pipe.encode_prompt(prompt, prompt, max_sequence_length=tiny.t5_tokens)
        case = {"x": noise, "sigma": torch.ones(1), "context": context, "pooled": pooled}
        velocities.append(tiny.velocity(pipe.transformer, {**case, "guidance": torch.tensor([GUIDANCE])}, 1))
    for cfg, pixels in found.items():
        x0 = noise - (velocities[1] + cfg * (velocities[0] - velocities[1]))
        with torch.no_grad():
            wanted = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample
        assert np.abs(pixels - ((wanted.movedim(1, -1) + 1) / 2).clamp(0, 1).numpy()).max() < 1e-3
    assert np.abs(found[1.0] - found[2.5]).max() > 1e-3


def test_a_vae_of_another_model_is_refused(server, deep_name, base_name):
    graph = image_to_image(deep_name, 0.5, other=node("DCGenReleaseLoader", release=base_name))
    graph["again"]["inputs"] |= {"latent": ["latent", 0], "image": ["decode", 0], "vae": ["other", 2]}
    assert "does not belong to the model" in server.error(server.try_queue(graph))
    del graph["again"]["inputs"]["vae"]
    assert "connect the autoencoder" in server.error(server.try_queue(graph))


def damaged(server, release, name, harm):
    """A copy of a release with one thing wrong with it, in the server's models/diffusers."""
    folder = server.base / "models" / "diffusers" / name
    shutil.copytree(release[0], folder)
    harm(folder)
    return name


def cut(folder):
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def lose(folder):
    sorted((folder / "transformer").glob("*.safetensors"))[0].unlink()


def mix(folder):
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "latent_channels": 12}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, ["-00002-of-", "truncated"]),
        (lose, ["-00001-of-", "download"]),
        (mix, ["takes 8 values per token", "12 channels"]),
    ],
)
def test_damaged_releases_are_refused_by_name(server, deep_release, harm, said):
    name = damaged(server, deep_release, f"tiny-{harm.__name__}", harm)
    error = server.error(server.try_queue(text_to_image(name, 64, 64)))
    assert name in error
    for part in said:
        assert part in error


@pytest.mark.parametrize(("stage", "side", "steps"), [("sample", 512, 1000), ("decode", 3072, 1)])
def test_cancel_leaves_comfyui_usable(server, deep_name, stage, side, steps):
    """Interrupted once the node has said how far it is; the next graph runs as ever."""
    graph = text_to_image(deep_name, side, side)
    graph["sigmas"]["inputs"]["steps"] = steps
    graph["decode"] = node("DCAEDecode", samples=["sample", 0], vae=["load", 2], strip=1)
    with server.listening() as listener:
        prompt_id = server.start(graph)
        listener.until(lambda message: message["type"] == "progress" and message["data"]["node"] == stage, 120)
        server.raw("/interrupt", {})
        entry = server.wait(prompt_id, 60)
    (where,) = (data["node_id"] for kind, data in entry["status"]["messages"] if kind == "execution_interrupted")
    assert where == stage
    server.queue(text_to_image(deep_name, 64, 64))
