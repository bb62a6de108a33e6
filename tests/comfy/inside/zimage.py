"""Run inside ComfyUI: Z-Image as another loader makes it and as ours does, adapters on it, its text, and refusals."""

import importlib
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.text_encoders.z_image
import comfy.utils
import folder_paths
import torch
from flux import bridge, load_model, release_of


def everything(pack, tensors, params):
    files = Path(params["files"])
    folder_paths.add_model_folder_path("diffusion_models", str(files))
    apply = bridge(pack, "apply").apply_adapter
    adapter = importlib.import_module(f"{pack}.dcgen.adapter").load_adapter(files / "deep.safetensors")
    out, facts = {}, {}
    base = foreign(pack, files / "zimage.safetensors", params)
    info = bridge(pack, "model_info").info_of(base)
    facts["core"] = {
        "factor": info.space.spatial_factor,
        "channels": info.space.channels,
        "schedule": info.schedule.to_dict(),
    }
    out["core/base"] = velocity(base, tensors, "base")
    deep = apply(base, adapter, 1.0)
    facts["memory"] = deep.model.memory_usage_factor / base.model.memory_usage_factor
    out["core/deep"] = velocity(deep, tensors, "deep")
    lora = comfy.utils.load_torch_file(str(files / "user.safetensors"))
    out["core/lora"] = velocity(comfy.sd.load_lora_for_models(deep, None, lora, 0.7, 0)[0], tensors, "deep")
    out["core/base again"] = velocity(base, tensors, "base")
    ours = load_model(pack, params["release"])
    out["release/base"] = velocity(ours, tensors, "base")
    out["release/deep"] = velocity(apply(ours, adapter, 1.0), tensors, "deep")
    single = bridge(pack, "release").load_model("zimage.safetensors", "default", "flux-f8c16")
    out["single/base"] = velocity(single, tensors, "base")
    merged = load_model(pack, params["deep"])
    out["merged"], facts["merged"] = velocity(merged, tensors, "deep"), merged.model.dcgen.schedule.to_dict()
    facts["refused"] = refusals(pack, params, base, deep, merged, adapter)
    release = bridge(pack, "release")
    clip = release.load_text(release.Release(release_of(pack, params["release"])))
    for i, prompt in enumerate(params["prompts"]):
        ((out[f"text{i}"], _),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    facts["template"] = comfy.text_encoders.z_image.ZImageTokenizer().llama_template
    facts["ours"] = importlib.import_module(f"{pack}.dcgen.backbones.zimage").PROMPT
    return out, facts


def foreign(pack, file, params):
    """A MODEL without anything of ours, in core's classes: its own loader takes one width for granted."""
    network = load_model(pack, params["release"]).model
    config = comfy.supported_models.ZImage(dict(network.model_config.unet_config))
    config.set_inference_dtype(torch.float32, None)
    state = comfy.utils.load_torch_file(str(file))
    model = config.get_model(state, "")
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    patcher = kind(model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device())
    dynamic = {"assign": True} if getattr(patcher, "is_dynamic", bool)() else {}
    model.load_model_weights(dict(state), "", **dynamic)
    return patcher


def velocity(patcher, tensors, name):
    comfy.model_management.load_models_gpu([patcher])
    x, sigma, context = (tensors[f"{name}/{key}"] for key in ("x", "sigma", "context"))
    x0 = patcher.model.apply_model(x, sigma, c_crossattn=context, num_tokens=context.shape[1])
    return (x - x0) / sigma.reshape(-1, 1, 1, 1)


def refusals(pack, params, base, deep, merged, adapter):
    said = {}

    def attempt(name, call):
        try:
            call()
        except ValueError as error:
            said[name] = str(error)

    apply = bridge(pack, "apply").apply_adapter
    read = importlib.import_module(f"{pack}.dcgen.adapter").load_adapter
    other = read(Path(params["files"]) / "deep.safetensors")
    other.backbone = "flux"
    attempt("adapter of FLUX.1", lambda: apply(base, other, 1.0))
    attempt("adapter of Z-Image on FLUX.1", lambda: apply(load_model(pack, params["flux"]), adapter, 1.0))
    attempt("twice", lambda: apply(deep, adapter, 1.0))
    attempt("merged", lambda: apply(merged, adapter, 1.0))
    check_latent = bridge(pack, "sampling").check_latent
    attempt("latent of the base", lambda: check_latent(deep, {"samples": torch.zeros(1, 16, 4, 4)}))
    conds = {"positive": [{"cross_attn": torch.zeros(1, 4, 7680)}]}
    attempt("text of klein", lambda: bridge(pack, "guard").check_text(conds, deep.model.dcgen))
    return said
