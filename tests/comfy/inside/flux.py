"""Run inside ComfyUI: our loaders and DCGenApply, asked for plain tensors."""

import importlib
from pathlib import Path

import comfy.model_management
import folder_paths


def bridge(pack, name):
    return importlib.import_module(f"{pack}.nodes.bridge.{name}")


def release_of(pack, folder):
    folder = Path(folder)
    folder_paths.add_model_folder_path("diffusers", str(folder.parent))
    return folder


def opened(pack, folder):
    return bridge(pack, "release").Release(release_of(pack, folder))


def load_model(pack, folder, weight_dtype="default"):
    release = bridge(pack, "release")
    return release.load_model(release_of(pack, folder).name, weight_dtype, release.FROM_FILE)


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


def everything(pack, tensors, params):
    """Text, velocities and the f8 autoencoder of several releases in one process, whose start costs the most."""
    out, facts = {}, {}
    for name, folder in params["releases"].items():
        found = text(pack, folder, params["prompts"])
        inputs = {key.split("/", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        patcher = load_model(pack, folder)
        found |= cases({key: value for key, value in inputs.items() if "/" in key}, patcher)
        info = patcher.model.dcgen
        facts[name] = {
            "channels": patcher.model.latent_format.latent_channels,
            "factor": info.space.spatial_factor,
            "scaling": patcher.model.latent_format.scale_factor,
            "memory": patcher.model.memory_usage_factor,
            "schedule": info.schedule.to_dict(),
        }
        if "z" in inputs:
            vae = bridge(pack, "release").load_vae(opened(pack, folder))
            found |= {"image": vae.decode(inputs["z"]), "z": vae.encode(inputs["pixels"])}
        out |= {f"{name}/{key}": value for key, value in found.items()}
    return out, facts


def text(pack, folder, prompts):
    """Embeddings of each prompt from the release's CLIP, as core's CLIPTextEncode makes them."""
    clip = bridge(pack, "families.flux.text").load_flux_text(opened(pack, folder))
    out = {}
    for i, prompt in enumerate(prompts):
        ((cond, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        out[f"context{i}"], out[f"pooled{i}"] = cond, extra["pooled_output"]
    return out
