"""Run inside ComfyUI: the made-up family's base, adapter, merged file and release, asked for velocities."""

import importlib
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths
import torch


def velocities(pack, tensors, params):
    release = importlib.import_module(f"{pack}.nodes.bridge.release")
    apply = importlib.import_module(f"{pack}.nodes.bridge.apply").apply_adapter
    adapter = importlib.import_module(f"{pack}.dcgen.adapter").load_adapter
    importlib.import_module(f"{pack}.nodes.bridge.lora").register()
    run = Path(params["run"])
    folder_paths.add_model_folder_path("diffusers", str(run / "tiny"))
    folder_paths.add_model_folder_path("diffusers", str(run / "export"))
    load = lambda path: release.load_weights(path, "default", release.FROM_FILE)  # noqa: E731
    known = adapter(run / "export" / "debug-pebble.safetensors")
    base = load(run / "tiny" / "release")
    deep = apply(base, known, 1.0)
    models = {
        "base": base,
        "adapter": deep,
        "single": load(run / "export" / "debug-pebble-merged.safetensors"),
        "release": load(run / "export" / "release"),
        "base again": base,
        "hooked": deep.clone(),
    }
    models = {name: model for name, model in models.items() if name != "base again"} | {"base again": base}
    out = {name: velocity(model, tensors) for name, model in models.items() if name != "base again"}
    out["base again"] = out["base"] if torch.equal(velocity(base, tensors), out["base"]) else out["adapter"]
    aligned = velocity(apply(base, known, 0.0), tensors)
    lora = {f"transformer.{name}.lora_A.weight": pair.A for name, pair in known.lora.items()}
    lora |= {f"transformer.{name}.lora_B.weight": pair.B for name, pair in known.lora.items()}
    user = velocity(comfy.sd.load_lora_for_models(deep, None, lora, 1.0, 0)[0], tensors)
    facts = {
        "family": [model.model.dcgen.family for model in (base, deep)],
        "channels": [model.model.latent_format.latent_channels for model in (base, deep)],
        "aligned": change(aligned, out["adapter"]),
        "lora by transformers' names": change(user, out["adapter"]),
        "ends": ends(deep),
        "twice": error(lambda: apply(deep, known, 1.0)),
    }
    comfy.model_management.unload_all_models()  # LoRA are out of the weights then
    with torch.no_grad():
        base.model.diffusion_model.layers[0].qkv.weight.mul_(1.02)
    facts["other base"] = error(lambda: apply(base, known, 1.0))
    return out, facts


def velocity(patcher, tensors):
    comfy.model_management.load_models_gpu([patcher])
    channels = patcher.model.latent_format.latent_channels
    x, sigma = tensors["base/x" if channels == 4 else "adapter/x"], tensors["sigma"]
    x0 = patcher.model.apply_model(x, sigma, c_crossattn=tensors["text"], attention_mask=tensors["mask"])
    return (x - x0) / sigma.reshape(-1, 1, 1, 1)


def ends(patcher):
    """Layers by patch size among the tensors that would be saved."""
    names = [key.removeprefix("diffusion_model.") for key in patcher.model_state_dict()]
    return sorted({name.rpartition(".")[0] for name in names if name.startswith(("embed.", "final."))})


def change(one, other):
    return float((one - other).norm() / other.norm())


def error(call):
    try:
        call()
    except ValueError as said:
        return str(said)
    return ""
