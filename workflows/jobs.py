"""The workflows and blueprints of this pack; build.py writes their files."""

from __future__ import annotations

from collections.abc import Callable

from graph import Blueprint, Outer, Workflow

PROMPT_4K = "a lighthouse on a cliff at dawn, long grass in the wind, film photograph, fine detail"

# Parts that several jobs share -----------------------------------------------------------------------------------


def prompt_box(w: Workflow, clip, text: str):
    return w.node("CLIPTextEncode", box=(300, 160), clip=clip, text=text)


def save(w: Workflow, samples, vae, prefix: str, decode: str = "DCAEDecode"):
    """Decode and save the image; without a prefix, only show it."""
    strip = {"strip": 0} if decode == "DCAEDecode" else {}
    image = w.node(decode, samples=samples, vae=vae, **strip)
    kind, name = ("SaveImage", {"filename_prefix": prefix}) if prefix else ("PreviewImage", {})
    w.node(kind, box=(320, 380), images=image(), **name)
    return image


def one_sampler(w: Workflow, model, positive, latent, title: str = "", **values):
    """latent: an output, or the name of a size at which the node makes an empty latent."""
    values = {"seed": 42, "steps": 20, "guidance": 3.5, "sampler_name": "euler", "denoise": 1.0, **values}
    start = {"size": latent} if isinstance(latent, str) else {"latent": latent}
    return w.node("DCGen4KSampler", title=title, model=model, positive=positive, **start, **values)


def release_job(title: str, release: str, size: str, prefix: str, extra: str = "") -> Workflow:
    """Text to image from a published release folder."""
    repo = f"dc-ai/{release}"
    w = Workflow(
        title,
        f"## {title}\n\nNeeds the release folder `models/diffusers/{release}`:\n\n"
        f"```\nhf download {repo} --local-dir models/diffusers/{release}\n```\n\n"
        "FLUX.1 Krea [dev] weights are for non-commercial use. Guidance 3.5, 20 steps and euler are the published "
        f"settings; the shift comes from the checkpoint, so do not add ModelSamplingFlux.{extra}",
    )
    load = w.node("DCGenReleaseLoader", release=release)
    text = prompt_box(w, load(1), PROMPT_4K)
    latent = one_sampler(w, load(0), text(), size)
    save(w, latent(), load(2), prefix)
    return w


def toy_loaders(w: Workflow, prompt: str):
    load = w.node("DCGenReleaseLoader", release="toy/flux-base")
    apply = w.node("DCGenApply", model=load(0), adapter_name="toy-flux-dcgen.safetensors", strength=1.0)
    vae = w.node("DCAELoader", vae_name=TOY_VAE)
    text = prompt_box(w, load(1), prompt)
    guide = w.node("FluxGuidance", conditioning=text(), guidance=3.5)
    size = {"width": 128, "height": 128, "batch_size": 4}
    empty = w.node("DCGenEmptyLatent", model=apply(), **size)
    return apply, vae, guide, empty


TOY_VAE = "toy/dc-ae-f32"
TOY_NOTE = (
    "\n\nAll weights ship with the pack: a FLUX-style model small enough for a CPU, trained on emoji on coloured "
    "backgrounds; DC-Gen reduces the 64 tokens per image of its f8 latent to 16. Prompts have the form "
    "`{subject} on a {color} background`. Set the adapter's strength to 0 to see alignment only."
)


def toy() -> Workflow:
    w = Workflow("DC-Gen toy", "## DC-Gen on a toy FLUX, with core's KSampler" + TOY_NOTE)
    apply, vae, guide, empty = toy_loaders(w, "strawberry on a white background")
    values = {"seed": 7, "steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    latent = w.node(
        "KSampler",
        model=apply(),
        positive=guide(),
        negative=guide(),
        latent_image=empty(),
        **values,
    )
    save(w, latent(), vae(), "dcgen/toy", "VAEDecode")
    return w


def toy_custom() -> Workflow:
    w = Workflow(
        "DC-Gen toy, SamplerCustomAdvanced", "## DC-Gen on a toy FLUX, with SamplerCustomAdvanced" + TOY_NOTE, 240
    )
    apply, vae, guide, empty = toy_loaders(w, "watermelon on a purple background")
    noise = w.node("RandomNoise", noise_seed=7)
    guider = w.node("BasicGuider", model=apply(), conditioning=guide())
    euler = w.node("KSamplerSelect", sampler_name="euler")
    sigmas = w.node("DCGenScheduler", model=apply(), latent=empty(), steps=20, denoise=1.0)
    inputs = {"noise": noise(), "guider": guider(), "sampler": euler(), "sigmas": sigmas()}
    latent = w.node("SamplerCustomAdvanced", latent_image=empty(), **inputs)
    save(w, latent(), vae(), "dcgen/toy-custom", "VAEDecode")
    return w


KREA_1K, KREA_4K = "DC-Gen-FLUX.1-Krea-Dev-Res1K", "DC-Gen-FLUX.1-Krea-Dev-Res4K"


def krea_base(w: Workflow):
    """Plain FLUX.1 Krea from core's loaders, with 512 text tokens as in the published DC-Gen."""
    model = w.node("UNETLoader", unet_name="flux1-krea-dev_fp8_scaled.safetensors", weight_dtype="default")
    return model, krea_text(w)


def krea_text(w: Workflow):
    names = {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"}
    clip = w.node("DualCLIPLoader", **names)
    return w.node("T5TokenizerOptions", clip=clip(), min_padding=0, min_length=512)


# Folder names in models/vae, and their download commands for the notes.
VAE_F64, VAE_F32 = "dc-ae-1.5-f64c128", "dc-ae-f32c32-in-1.0"
GET_F64 = f"\n\n```\nhf download dc-ai/{VAE_F64}-diffusers --local-dir models/vae/{VAE_F64}\n```\n\n"
GET_F32 = f"\n\n```\nhf download mit-han-lab/{VAE_F32}-diffusers --local-dir models/vae/{VAE_F32}\n```\n\n"
ADAPTER = (
    "The adapter goes into `models/model_patches`. None is published as a file: extract it from a merged release with "
    "`python -m dcgen.convert extract`, or train one with `python -m train.run`. "
)


# Of the 4K FLUX model; the text is that of benchmarks/memory.py, which a test compares.
MEMORY_4K = (
    "**GPU memory** (computed from shapes with **python -m benchmarks.memory**, not measured): weights in bf16 22.2"
    " GB (of which stay in RAM 12.2 on 12 GB, 8.2 on 16 GB, 0.2 on 24 GB); fp8, int8 11.1 GB (of which stay in "
    "RAM 1.1 on 12 GB); nvfp4 6.2 GB (fits 12 GB); a step 1.0 GB, the decode 0.9 GB. Weights in RAM cost time."
)


def adapted_4k(w: Workflow, model, clip, prefix: str) -> Workflow:
    """The rest of a graph from a base model to a 4K image through an adapter."""
    adapter = "flux1-krea-dcgen-f64c128.safetensors"
    apply = w.node("DCGenApply", model=model(), adapter_name=adapter, strength=1.0)
    vae = w.node("DCAELoader", column=1, vae_name=VAE_F64)
    text = prompt_box(w, clip(), PROMPT_4K)
    latent = one_sampler(w, apply(), text(), "4K: 4096 x 4096")
    save(w, latent(), vae(), prefix)
    return w


def adapter_4k() -> Workflow:
    w = Workflow(
        "FLUX 4K from an adapter",
        f"## 4096 x 4096 from plain FLUX.1 Krea and a DC-Gen adapter\n\n{ADAPTER}Its autoencoder:{GET_F64}"
        f"Any loader works in place of the model's: GGUF, fp8, LoRA before or after the adapter.\n\n{MEMORY_4K}",
    )
    model, clip = krea_base(w)
    return adapted_4k(w, model, clip, "dcgen/flux-4k-adapter")


def nunchaku_4k() -> Workflow:
    w = Workflow(
        "FLUX 4K, nunchaku",
        "## 4096 x 4096 on a 4-bit nunchaku FLUX\n\n**Needs the node pack ComfyUI-nunchaku** and nunchaku itself: "
        "ComfyUI-Manager offers it under Install Missing Custom Nodes, then run its wheel installer. NVIDIA 20 to 50 "
        "series only; on the 50 series use the `svdq-fp4_r32-flux.1-krea-dev` file from the same repository.\n\n"
        f"{ADAPTER}Extract it with `--rank 256`; nunchaku takes multiples of 16 up to 320. Its autoencoder:{GET_F64}"
        "Nunchaku's LoRA nodes go between its loader and Apply DC-Gen; core's LoRA loaders have no effect here. Its "
        "4-bit weights were calibrated on f8 latents, so this is not the quantized DC-Gen model of the paper.",
    )
    file = "svdq-int4_r32-flux.1-krea-dev.safetensors"
    # If its pack is missing, the page draws it with a field for each value, which needs more space.
    model = w.node("NunchakuFluxDiTLoader", box=(270, 400), model_path=file)
    return adapted_4k(w, model, krea_text(w), "dcgen/flux-4k-nunchaku")


def image_to_image() -> Workflow:
    w = Workflow(
        "FLUX 4K image to image",
        "## 4K image to image\n\nThe image is scaled to the sampler's size and encoded; less denoise keeps more of it. "
        f"Needs `models/diffusers/{KREA_4K}`.\n\n{MEMORY_4K}",
    )
    load = w.node("DCGenReleaseLoader", release=KREA_4K)
    image = w.node("LoadImage", box=(270, 330), image="example.png")
    text = prompt_box(w, load(1), PROMPT_4K)
    latent = one_sampler(w, load(0), text(), "4K: 4096 x 4096", denoise=0.6, image=image(), vae=load(2))
    save(w, latent(), load(2), "dcgen/flux-4k-img2img")
    return w


def refine() -> Workflow:
    w = Workflow(
        "FLUX 1K to 4K refine",
        "## Generate at 1K, refine at 4K\n\nThe 1K model generates the image; the 4K model refines it at 4096 x 4096 "
        f"with denoise 0.45. Needs `models/diffusers/{KREA_1K}` and `{KREA_4K}`."
        f"\n\n{MEMORY_4K}",
        width=240,
    )
    small = w.node("DCGenReleaseLoader", title="Load Release: 1K", release=KREA_1K)
    large = w.node("DCGenReleaseLoader", title="Load Release: 4K", release=KREA_4K)
    text = w.node("CLIPTextEncode", box=(280, 160), clip=small(1), text=PROMPT_4K)
    latent = one_sampler(w, small(0), text(), "1K: 1024 x 1024", "Sampler: 1K")
    image = w.node("DCAEDecode", samples=latent(), vae=small(2), strip=0)
    w.node("PreviewImage", box=(240, 260), images=image())
    size, title = "4K: 4096 x 4096", "Sampler: refine at 4K"
    refined = one_sampler(w, large(0), text(), size, title, denoise=0.45, image=image(), vae=large(2))
    save(w, refined(), large(2), "dcgen/refine-4k")
    return w


def inpaint() -> Workflow:
    w = Workflow(
        "FLUX inpaint",
        "## Inpaint on a deep latent\n\nPaint the mask in LoadImage's mask editor. A mask pixel of the latent is 32 "
        "(f32) or 64 (f64) image pixels wide, so paint generously; the image sides must be multiples of that. "
        f"Needs `models/diffusers/{KREA_1K}`.",
    )
    load = w.node("DCGenReleaseLoader", release=KREA_1K)
    image = w.node("LoadImage", box=(270, 330), image="example.png")
    text = prompt_box(w, load(1), PROMPT_4K)
    encoded = w.node("DCAEEncode", image=image(), vae=load(2), strip=0)
    masked = w.node("SetLatentNoiseMask", samples=encoded(), mask=image(1))
    latent = one_sampler(w, load(0), text(), masked(), denoise=0.9)
    save(w, latent(), load(2), "dcgen/flux-inpaint")
    return w


def side_by_side() -> Workflow:
    w = Workflow(
        "FLUX base and DC-Gen side by side",
        "## One base, two latents\n\nBoth samplers use the same loaded FLUX: once on its own f8 latent, once through a "
        f"DC-Gen adapter. No weight is loaded twice. The wipe at the end compares the two images.\n\n{ADAPTER}"
        f"Its autoencoder:{GET_F32}",
    )
    model, clip = krea_base(w)
    adapter = "flux1-krea-dcgen-f32c32.safetensors"
    text = prompt_box(w, clip(), PROMPT_4K)
    apply = w.node("DCGenApply", model=model(), adapter_name=adapter, strength=1.0)
    plain = w.node("VAELoader", vae_name="ae.safetensors")
    deep = w.node("DCAELoader", vae_name=VAE_F32)
    size = {"width": 1024, "height": 1024}
    empty = w.node("DCGenEmptyLatent", title="Empty Latent: base", model=model(), **size)
    empty_deep = w.node("DCGenEmptyLatent", title="Empty Latent: DC-Gen", model=apply(), **size)
    base = one_sampler(w, model(), text(), empty(), "Sampler: base")
    dcgen = one_sampler(w, apply(), text(), empty_deep(), "Sampler: DC-Gen")
    first = w.node("VAEDecode", samples=base(), vae=plain())
    second = w.node("DCAEDecode", samples=dcgen(), vae=deep(), strip=0)
    w.node("DCGenCompare", box=(440, 560), image_a=first(), image_b=second())
    return w


def four_bit() -> Workflow:
    w = Workflow(
        "FLUX 4K, 4-bit",
        "## 4K from one 4-bit or 8-bit file\n\nOne .safetensors in `models/diffusion_models`. None is published; in "
        "this pack's folder, `python -m dcgen.quantize RELEASE --format nvfp4 -o OUT` makes it from a release folder. "
        "`nvfp4` multiplies in 4 bits on Blackwell GPUs; `int8` and `w4a8` (8 and 4 bits) run on every RTX card, from "
        f"ComfyUI 0.33 on. Its autoencoder:{GET_F64}{MEMORY_4K}",
    )
    name = "dcgen-flux1-krea-4k-nvfp4.safetensors"
    model = w.node("DCGenModelLoader", model_name=name, weight_dtype="default")
    clip = krea_text(w)
    vae = w.node("DCAELoader", vae_name=VAE_F64)
    text = prompt_box(w, clip(), PROMPT_4K)
    latent = one_sampler(w, model(), text(), "4K: 4096 x 4096")
    save(w, latent(), vae(), "dcgen/flux-4k-4bit")
    return w


def round_trip() -> Workflow:
    w = Workflow(
        "DC-AE round trip",
        "## What does a DC-AE lose?\n\nThe image is encoded and decoded; the wipe, the difference (brightened) and the "
        "PSNR show the loss. `toy/dc-ae-f32` ships with the pack but was trained on emoji only: put a published one "
        "into `models/vae` and select it, for example `dc-ai/dc-ae-1.5-f64c128` or the `vae` folder of "
        "`Efficient-Large-Model/Sana_1600M_1024px_diffusers`. Sides are cropped to multiples of 32, 64 or 128 pixels.",
    )
    image = w.node("LoadImage", box=(270, 330), image="example.png")
    vae = w.node("DCAELoader", vae_name=TOY_VAE)
    latent = w.node("DCAEEncode", image=image(), vae=vae(), strip=0)
    decoded = w.node("DCAEDecode", samples=latent(), vae=vae(), strip=0)
    difference = w.node("DCAEDifference", image_a=image(), image_b=decoded(), gain=4.0)
    w.node("PreviewAny", source=difference(1))
    w.node("DCGenCompare", box=(440, 560), image_a=image(), image_b=decoded())
    w.node("SaveImage", box=(320, 380), images=difference(), filename_prefix="dcgen/round-trip-difference")
    return w


KLEIN = "flux-2-klein-4b.safetensors"


def klein(adapter: str, vae_name: str, get_vae: str, recipe: str, size: str) -> Workflow:
    """FLUX.2 klein from core's loaders and an adapter."""
    pixels = size.partition(": ")[2]
    w = Workflow(
        f"FLUX.2 klein {size[:2]}",
        f"## {pixels} from FLUX.2 klein 4B in four steps\n\nklein is Apache-2.0, distilled to 4 steps without CFG: "
        "leave `cfg` at 1; `guidance` is ignored, it has no embedding for it. The adapter goes into "
        f"`models/model_patches`; none is published: train it with `python -m train.run {recipe}`. Its autoencoder:"
        f"{get_vae}**Needs ComfyUI 0.9.2 or newer** for core's loaders of klein and its text encoder (Qwen3, type "
        "flux2). On older versions put `black-forest-labs/FLUX.2-klein-4B` into `models/diffusers` and take Load "
        "Release (DC-Gen) in "
        "place of both loaders.",
    )
    return on_core(w, (KLEIN, "flux2", adapter, vae_name), size, 4, "dcgen/klein")


def on_core(w: Workflow, files: tuple[str, str, str, str], size: str, steps: int, prefix: str) -> Workflow:
    """An adapter on a base with Qwen3-4B, both from core's loaders; without guidance.

    files: the base, CLIPLoader's type, the adapter, the autoencoder.
    """
    base, text, adapter, vae_name = files
    model = w.node("UNETLoader", unet_name=base, weight_dtype="default")
    clip = w.node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type=text, device="default")
    apply = w.node("DCGenApply", model=model(), adapter_name=adapter, strength=1.0)
    vae = w.node("DCAELoader", column=1, vae_name=vae_name)
    prompt = prompt_box(w, clip(), PROMPT_4K)
    latent = one_sampler(w, apply(), prompt(), size, steps=steps, guidance=1.0)
    save(w, latent(), vae(), f"{prefix}-{size[:2].lower()}")
    return w


def z_image(adapter: str, vae_name: str, get_vae: str, recipe: str, size: str) -> Workflow:
    """Z-Image-Turbo from core's loaders and an adapter."""
    pixels = size.partition(": ")[2]
    w = Workflow(
        f"Z-Image {size[:2]}",
        f"## {pixels} from Z-Image-Turbo in nine steps\n\nTurbo is Apache-2.0 and distilled without CFG: leave `cfg` "
        "at 1; `guidance` is ignored, it has no embedding for it. The adapter goes into `models/model_patches`; none "
        f"is published: train it with `python -m train.run {recipe}`. Its autoencoder:{get_vae}A LoRA for Z-Image "
        "works before or after the adapter.",
    )
    return on_core(w, ("z_image_turbo_bf16.safetensors", "lumina2", adapter, vae_name), size, 9, "dcgen/z-image")


SANA = "Sana_1600M_{}_BF16_diffusers"
SANA_PROMPT = "a lighthouse on a cliff at dawn, long grass in the wind, film photograph, fine detail"


def sana_parts(
    w: Workflow, model, clip, vae, size: str | dict, prefix: str, text: str = SANA_PROMPT, **values
) -> Workflow:
    """Both prompts, the latent, SANA's published settings (or other values), and the image."""
    positive = w.node("DCGenSanaTextEncode", box=(300, 190), clip=clip, text=text, negative=False)
    negative = w.node("DCGenSanaTextEncode", box=(300, 190), clip=clip, text="", negative=True)
    empty = w.node("DCGenEmptyLatent", column=2, model=model, **({"size": size} if isinstance(size, str) else size))
    values = {"cfg": 4.5, "sampler_name": "flow_dpmpp_2m", **values}
    latent = one_sampler(w, model, positive(), empty(), negative=negative(), **values)
    save(w, latent(), vae, prefix)
    return w


def sana(pixels: str, size: str, prefix: str) -> Workflow:
    """Text to image from a published SANA release folder."""
    release = SANA.format(pixels)
    w = Workflow(
        f"SANA {size[:2]}",
        f"## SANA {size[:2]}\n\nNeeds the release folder `models/diffusers/{release}`:\n\n```\n"
        f"hf download Efficient-Large-Model/{release} --local-dir models/diffusers/{release}\n```\n\n"
        "Published settings: flow_dpmpp_2m, 20 steps, cfg 4.5; the shift (3, at 4K 6) comes from the release. Encode "
        "both prompts with SANA Text Encode. `guidance` is ignored: SANA has no guidance embedding.",
    )
    load = w.node("DCGenReleaseLoader", release=release)
    return sana_parts(w, load(0), load(1), load(2), size, prefix)


def sana_sprint() -> Workflow:
    """One or two steps, no negative prompt."""
    release = "Sana_Sprint_1.6B_1024px_diffusers"
    w = Workflow(
        "SANA-Sprint 1K",
        f"## SANA-Sprint 1K: two steps\n\nNeeds the release folder `models/diffusers/{release}`:\n\n```\n"
        f"hf download Efficient-Large-Model/{release} --local-dir models/diffusers/{release}\n```\n\n"
        "Published settings: 2 steps (1 works too) of flow_consistency, guidance 4.5, cfg 1: the model is "
        "guidance-distilled, so it has no negative prompt and runs once per step. The sigmas come from "
        "the release.",
    )
    load = w.node("DCGenReleaseLoader", release=release)
    text = w.node("DCGenSanaTextEncode", box=(300, 190), clip=load(1), text=SANA_PROMPT, negative=False)
    empty = w.node("DCGenEmptyLatent", model=load(0), size="1K: 1024 x 1024")
    sampler = "flow_consistency"
    latent = one_sampler(w, load(0), text(), empty(), steps=2, guidance=4.5, sampler_name=sampler)
    save(w, latent(), load(2), "dcgen/sana-sprint-1k")
    return w


def deep_sana_adapter() -> Workflow:
    """DC-Gen-SANA as an adapter on the published base."""
    release = SANA.format("1024px")
    w = Workflow(
        "DC-Gen-SANA 1K",
        "## SANA on an f64 latent: 256 tokens at 1K instead of 1,024\n\n"
        f"Base: `models/diffusers/{release}`. Adapter: in `models/model_patches`; none is published, train one with "
        "`python -m train.run` (the paper's recipe for SANA is among `--list`). Autoencoder: the f64 one it was "
        "trained with, in `models/vae`. Text encoding and sampler settings are the same as for the base.",
    )
    load = w.node("DCGenReleaseLoader", release=release)
    adapter = "sana-1.6b-dcgen-f64c128.safetensors"
    apply = w.node("DCGenApply", model=load(0), adapter_name=adapter, strength=1.0)
    vae = w.node("DCAELoader", vae_name=VAE_F64)
    return sana_parts(w, apply(), load(1), vae(), "1K: 1024 x 1024", "dcgen/dcgen-sana-1k")


def deep_sana() -> Workflow:
    """A merged DC-Gen-SANA release at 4K."""
    release = "DC-Gen-SANA-1.6B-f64c128"
    w = Workflow(
        "DC-Gen-SANA 4K",
        "## 4096 x 4096 from 4,096 tokens\n\n"
        f"Needs a merged release in `models/diffusers/{release}`. None is published: train it with "
        "`python -m train.run` and export the release. Sampler settings are the same as for SANA.",
    )
    load = w.node("DCGenReleaseLoader", release=release)
    return sana_parts(w, load(0), load(1), load(2), "4K: 4096 x 4096", "dcgen/dcgen-sana-4k")


def toy_sana() -> Workflow:
    """DC-Gen-SANA as an adapter on the toy SANA."""
    w = Workflow(
        "DC-Gen toy SANA",
        "## DC-Gen on a toy SANA\n\nAll weights ship with the pack: a SANA-style model small enough for a CPU (0.7 "
        "million parameters, with a tiny Gemma), trained on emoji on coloured backgrounds; DC-Gen reduces the 64 "
        "tokens per image of its f8 latent to 16. Prompts have the form `{subject} on a {color} background`. SANA is "
        "not distilled: it needs two passes per step, with `cfg`. Set the adapter's strength to 0 to see alignment "
        "only.",
    )
    load = w.node("DCGenReleaseLoader", release="toy/sana-base")
    adapter = "toy-sana-dcgen.safetensors"
    apply = w.node("DCGenApply", model=load(0), adapter_name=adapter, strength=1.0)
    vae = w.node("DCAELoader", vae_name=TOY_VAE)
    size, text = {"width": 128, "height": 128, "batch_size": 4}, "panda on a green background"
    return sana_parts(w, apply(), load(1), vae(), size, "dcgen/toy-sana", text, seed=7, cfg=2.5)


JOBS: dict[str, Callable[[], Workflow]] = {
    "dcae_roundtrip": round_trip,
    "dcgen_toy": toy,
    "dcgen_toy_custom": toy_custom,
    "dcgen_toy_sana": toy_sana,
    "dcgen_flux_1k": lambda: release_job("FLUX 1K", KREA_1K, "1K: 1024 x 1024", "dcgen/flux-1k"),
    "dcgen_flux_2k": lambda: release_job("FLUX 2K", KREA_4K, "2K: 2048 x 2048", "dcgen/flux-2k"),
    "dcgen_flux_4k": lambda: release_job("FLUX 4K", KREA_4K, "4K: 4096 x 4096", "dcgen/flux-4k", f"\n\n{MEMORY_4K}"),
    "dcgen_flux_4k_adapter": adapter_4k,
    "dcgen_flux_4k_img2img": image_to_image,
    "dcgen_flux_1k_to_4k_refine": refine,
    "dcgen_flux_inpaint": inpaint,
    "dcgen_flux_side_by_side": side_by_side,
    "dcgen_flux_4k_4bit": four_bit,
    "dcgen_flux_4k_nunchaku": nunchaku_4k,
    "dcgen_klein_1k": lambda: klein(
        "flux2-klein-4b-dcgen-f32c32.safetensors", VAE_F32, GET_F32, "klein-1k", "1K: 1024 x 1024"
    ),
    "dcgen_klein_4k": lambda: klein(
        "flux2-klein-4b-dcgen-f64c128.safetensors", VAE_F64, GET_F64, "klein-4k", "4K: 4096 x 4096"
    ),
    "dcgen_zimage_1k": lambda: z_image(
        "z-image-turbo-dcgen-f32c32.safetensors", VAE_F32, GET_F32, "z-image-1k", "1K: 1024 x 1024"
    ),
    "dcgen_zimage_4k": lambda: z_image(
        "z-image-turbo-dcgen-f64c128.safetensors", VAE_F64, GET_F64, "z-image-4k", "4K: 4096 x 4096"
    ),
    "sana_1k": lambda: sana("1024px", "1K: 1024 x 1024", "dcgen/sana-1k"),
    "sana_2k": lambda: sana("2Kpx", "2K: 2048 x 2048", "dcgen/sana-2k"),
    "sana_4k": lambda: sana("4Kpx", "4K: 4096 x 4096", "dcgen/sana-4k"),
    "sana_sprint_1k": sana_sprint,
    "dcgen_sana_1k": deep_sana_adapter,
    "dcgen_sana_4k": deep_sana,
}

# Blueprints: parts of a graph as one node ---------------------------------------------------------------------------


def adapter_blueprint() -> Blueprint:
    w = Blueprint(
        "FLUX to 4K (adapter)", "A DC-Gen adapter on any FLUX: an image of up to 4096 x 4096 from its MODEL and CLIP."
    )
    apply = w.node(
        "DCGenApply", model=Outer("model"), adapter_name=Outer("adapter_name", "flux1-krea-dcgen-f64c128.safetensors")
    )
    text = w.node("CLIPTextEncode", box=(300, 160), clip=Outer("clip"), text=Outer("text", PROMPT_4K))
    values = {"seed": Outer("seed"), "steps": Outer("steps"), "size": Outer("size", "4K: 4096 x 4096"), "guidance": 3.5}
    values |= {"width": Outer("width"), "height": Outer("height")}
    latent = w.node("DCGen4KSampler", model=apply(), positive=text(), **values)
    vae = w.node("DCAELoader", vae_name=Outer("vae_name", VAE_F64))
    w.result("IMAGE", w.node("DCAEDecode", samples=latent(), vae=vae())())
    return w


def round_trip_blueprint() -> Blueprint:
    w = Blueprint(
        "DC-AE round trip",
        "Encodes and decodes an image with a DC-AE; also gives the difference (brightened) and the PSNR.",
    )
    vae = w.node("DCAELoader", vae_name=Outer("vae_name", TOY_VAE))
    latent = w.node("DCAEEncode", image=Outer("image"), vae=vae())
    decoded = w.node("DCAEDecode", samples=latent(), vae=vae())
    difference = w.node("DCAEDifference", image_a=Outer("image"), image_b=decoded(), gain=Outer("gain"))
    w.result("IMAGE", decoded())
    w.result("difference", difference(0))
    w.result("PSNR", difference(1))
    return w


def refine_blueprint() -> Blueprint:
    w = Blueprint(
        "Refine 1K to 4K",
        "Refines an image at the size of a 4K DC-Gen model, with that model's MODEL, CLIP and VAE.",
    )
    text = w.node("CLIPTextEncode", box=(300, 160), clip=Outer("clip"), text=Outer("text", PROMPT_4K))
    values = {
        "seed": Outer("seed"),
        "denoise": Outer("denoise", 0.45),
        "size": Outer("size", "4K: 4096 x 4096"),
        "guidance": 3.5,
    }
    values |= {"width": Outer("width"), "height": Outer("height")}
    start = {"image": Outer("image"), "vae": Outer("vae")}
    latent = w.node("DCGen4KSampler", model=Outer("model"), positive=text(), **start, **values)
    w.result("IMAGE", w.node("DCAEDecode", samples=latent(), vae=Outer("vae"))())
    return w


BLUEPRINTS: list[Callable[[], Blueprint]] = [adapter_blueprint, round_trip_blueprint, refine_blueprint]
