"""Run inside ComfyUI: FLUX.2 klein from core's loader and ours, adapters on it, its text, its VAE, and refusals."""

import importlib
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.text_encoders.flux
import comfy.utils
import comfyui_version
import folder_paths
import torch
from flux import bridge, load_model, release_of


def everything(pack, tensors, params):
    files = Path(params["files"])
    folder_paths.add_model_folder_path("diffusion_models", str(files))
    apply = bridge(pack, "apply").apply_adapter
    read = importlib.import_module(f"{pack}.dcgen.adapter").load_adapter
    adapters = {name: read(files / f"{name}.safetensors") for name in ("f32", "f64")}
    out, facts = {}, {"refused": {}, "version": version()}
    core(pack, files, adapters, tensors, out, facts)
    base = load_model(pack, params["release"])
    single = bridge(pack, "release").load_model("klein.safetensors", "default", "flux2-f16c128")
    info = bridge(pack, "model_info").info_of
    facts["release"] = {"factor": info(base).space.spatial_factor, "schedule": info(base).schedule.to_dict()}
    out["release/base"], out["single/base"] = velocity(base, tensors, "base"), velocity(single, tensors, "base")
    out["release/f32"] = velocity(apply(base, adapters["f32"], 1.0), tensors, "f32")
    deep = apply(single, adapters["f64"], 1.0)
    out["single/f64"] = velocity(deep, tensors, "f64")
    out["release/lora"] = velocity(with_lora(apply(base, adapters["f64"], 1.0), files), tensors, "f64")
    merged = load_model(pack, params["deep"])
    out["merged"] = velocity(merged, tensors, "f64")
    facts["refused"] |= refusals(pack, params, base, deep, merged, adapters)
    text_and_vae(pack, tensors, params, out, facts)
    return out, facts


def core(pack, files, adapters, tensors, out, facts):
    """The base from core's own loader, and adapters on it."""
    apply = bridge(pack, "apply").apply_adapter
    try:
        base = comfy.sd.load_diffusion_model(str(files / "klein.safetensors"))
    except ValueError as error:
        facts["refused"]["core"] = str(error)
        return
    info = bridge(pack, "model_info").info_of(base)
    facts["core"] = {
        "factor": info.space.spatial_factor,
        "channels": info.space.channels,
        "schedule": info.schedule.to_dict(),
    }
    out["core/base"] = velocity(base, tensors, "base")
    deep = apply(base, adapters["f64"], 1.0)
    facts["memory"] = [model.model.memory_usage_factor for model in (base, deep)]
    out["core/f64"] = velocity(deep, tensors, "f64")
    out["core/f32"] = velocity(apply(base, adapters["f32"], 1.0), tensors, "f32")
    out["core/lora"] = velocity(with_lora(deep, files), tensors, "f64")
    out["core/base again"] = velocity(base, tensors, "base")


def with_lora(model, files):
    lora = comfy.utils.load_torch_file(str(files / "user.safetensors"))
    return comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0]


def velocity(patcher, tensors, name):
    comfy.model_management.load_models_gpu([patcher])
    x, sigma, context = (tensors[f"{name}/{key}"] for key in ("x", "sigma", "context"))
    x0 = patcher.model.apply_model(x, sigma, c_crossattn=context)
    return (x - x0) / sigma.reshape(-1, 1, 1, 1)


def refusals(pack, params, base, deep, merged, adapters):
    said = {}

    def attempt(name, call):
        try:
            call()
        except ValueError as error:
            said[name] = str(error)

    apply = bridge(pack, "apply").apply_adapter
    flux = load_model(pack, params["flux"])
    for_flux = importlib.import_module(f"{pack}.dcgen.adapter").load_adapter(Path(params["files"]) / "f64.safetensors")
    for_flux.backbone = "flux"
    attempt("adapter of FLUX.1", lambda: apply(base, for_flux, 1.0))
    attempt("klein's adapter on FLUX.1", lambda: apply(flux, adapters["f64"], 1.0))
    attempt("twice", lambda: apply(deep, adapters["f64"], 1.0))
    attempt("merged", lambda: apply(merged, adapters["f32"], 1.0))
    sampling, model_info = bridge(pack, "sampling"), bridge(pack, "model_info")
    latent = model_info.empty_latent(base, 64, 64, 1)
    attempt("latent of the base", lambda: sampling.check_latent(deep, latent))
    attempt("latent of f8", lambda: sampling.check_latent(deep, {"samples": torch.zeros(1, 16, 4, 4)}))
    attempt("size", lambda: model_info.empty_latent(deep, 100, 64, 1))
    check_text = bridge(pack, "guard").check_text

    def text(width, **more):
        return {"positive": [{"cross_attn": torch.zeros(1, 4, width), **more}]}

    attempt("text of another encoder", lambda: check_text(text(2560), deep.model.dcgen))
    attempt("text of FLUX.1", lambda: check_text(text(4096), deep.model.dcgen))
    return said


def text_and_vae(pack, tensors, params, out, facts):
    release, folder = bridge(pack, "release"), release_of(pack, params["release"])
    clip = release.load_text(release.Release(folder))
    for i, prompt in enumerate(params["prompts"]):
        ((out[f"text{i}"], _),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    vae = release.load_vae(release.Release(folder))
    out["decoded"], out["encoded"] = vae.decode(tensors["z"]), vae.encode(tensors["pixels"])
    facts["vae"] = {"channels": vae.latent_channels, "factor": vae.spacial_compression_decode()}
    facts["ours"] = importlib.import_module(f"{pack}.dcgen.backbones.flux2").PROMPT
    theirs = getattr(comfy.text_encoders.flux, "KleinTokenizer", None)
    facts["klein text"] = None
    if theirs is not None:
        layers = comfy.text_encoders.flux.Qwen3_4BModel.__init__.__defaults__
        facts["klein text"] = [theirs().llama_template, next(value for value in layers if isinstance(value, list))]


def version():
    return [int(part) for part in comfyui_version.__version__.split(".")]
