"""Run inside ComfyUI: our loaders and DCGenApply, asked for plain tensors."""

import importlib
from pathlib import Path

import comfy.model_management
import folder_paths
import torch


def bridge(pack, name):
    return importlib.import_module(f"{pack}.nodes.bridge.{name}")


def release_of(pack, folder):
    folder = Path(folder)
    folder_paths.add_model_folder_path("diffusers", str(folder.parent))
    return bridge(pack, "release").open_release(folder.name)


def velocity(patcher, x, sigma, context, pooled, guidance):
    """The network's velocity through ComfyUI's own apply_model, which gives x0 = x - sigma * v."""
    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model
    conds = {"c_crossattn": context, "y": pooled}
    if guidance is not None:
        conds["guidance"] = guidance
    x0 = model.apply_model(x, sigma, **conds)
    return (x - x0) / sigma.reshape(-1, 1, 1, 1)


def cases(tensors, patcher, prefix=""):
    out = {}
    for name in sorted({key.split("/")[0] for key in tensors}):
        of = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        out[f"{prefix}{name}"] = velocity(
            patcher, of["x"], of["sigma"], of["context"], of["pooled"], of.get("guidance")
        )
    return out


def text(pack, tensors, params):
    """Embeddings of each prompt from the release's CLIP, as core's CLIPTextEncode makes them."""
    release = release_of(pack, params["release"])
    clip = bridge(pack, "text").load_flux_text(release.path, release.index)
    out = {}
    for i, prompt in enumerate(params["prompts"]):
        ((cond, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        out[f"{i}/context"], out[f"{i}/pooled"] = cond, extra["pooled_output"]
    return out, {}


def release_velocity(pack, tensors, params):
    patcher = bridge(pack, "release").load_model(release_of(pack, params["release"]))
    fmt = patcher.model.latent_format
    return cases(tensors, patcher), {
        "channels": fmt.latent_channels,
        "factor": patcher.model.dcgen.space.spatial_factor,
        "scaling": fmt.scale_factor,
        "memory": patcher.model.memory_usage_factor,
    }


def kl_vae(pack, tensors, params):
    vae = bridge(pack, "release").load_vae(release_of(pack, params["release"]))
    return {"image": vae.decode(tensors["z"]), "z": vae.encode(tensors["image"])}, {"device": str(torch.device("cpu"))}
