"""Run inside ComfyUI: base and DC-Gen MODEL side by side, in every order, and where their weights are meanwhile."""

import importlib
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from flux import bridge, cases, load_model
from tamper import leave_no_room, left_out, note_places, places_of


def adapters(pack):
    return importlib.import_module(f"{pack}.dcgen.adapter")


def _load(pack, params):
    flux = bridge(pack, "apply")
    base = load_model(pack, params["release"])
    adapter = adapters(pack).load_adapter(params["adapter"])
    return flux, base, adapter


def _with_lora(model, file):
    """As core's LoraLoaderModelOnly does it."""
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(file), 0.7, 0)[0]


def _split(tensors):
    """Inputs for the base (16 channels) and for DC-Gen (8)."""
    return ({k: v for k, v in tensors.items() if k.startswith(kind)} for kind in ("base", "deep"))


def everything(pack, tensors, params):
    """All that needs no tampering with ComfyUI, in one process: the start costs more than the work."""
    out, facts = alternate(pack, tensors, params)
    comfy.model_management.unload_all_models()
    return out, {**facts, "refused": refusals(pack, {}, params)[1], "growth": growth(pack, tensors, params)[1]["seen"]}


def alternate(pack, tensors, params):
    flux, base, adapter = _load(pack, params)
    for_base, for_deep = _split(tensors)
    deep = flux.apply_adapter(base, adapter, 1.0)
    models = {
        "base": (base, for_base),
        "full": (deep, for_deep),
        "aligned": (flux.apply_adapter(base, adapter, 0.0), for_deep),
        "half": (flux.apply_adapter(base, adapter, 0.5), for_deep),
        "lora_after": (_with_lora(deep, params["lora"]), for_deep),
        "lora_before": (flux.apply_adapter(_with_lora(base, params["lora"]), adapter, 1.0), for_deep),
        "base_lora": (_with_lora(base, params["lora"]), for_base),
    }
    # Read before anything is loaded: the preview and the memory estimate are made from these.
    first = {
        "channels": deep.model.latent_format.latent_channels,
        "base_channels": base.model.latent_format.latent_channels,
        "memory": deep.model.memory_usage_factor / base.model.memory_usage_factor,
    }
    out = {}
    for turn, name in enumerate(params["order"]):
        model, inputs = models[name]
        out |= cases(inputs, model, f"{turn}-{name}-")
    weights = [dict(model.model.state_dict()) for model in (deep, base)]
    own = ("diffusion_model.img_in", "diffusion_model.final_layer")
    shared_keys = [key for key in weights[0] if key.startswith("diffusion_model.") and not key.startswith(own)]
    shared = all(weights[0][key].data_ptr() == weights[1][key].data_ptr() for key in shared_keys)
    keys = set(deep.model.state_dict()) == set(base.model.state_dict())
    return out, {
        **first,
        "shared": shared,
        "same_keys": keys,
        "loaded": len(comfy.model_management.current_loaded_models),
    }


def lowvram(pack, tensors, params):
    """The same velocities with no room: every weight stays where it is and is fetched at each call."""
    flux, base, adapter = _load(pack, params)
    for_base, for_deep = _split(tensors)
    leave_no_room()
    deep = _with_lora(flux.apply_adapter(base, adapter, 1.0), params["lora"])
    out, partial = {}, []
    for turn in range(2):
        out |= cases(for_deep, deep, f"{turn}-lora_after-")
        partial.append(left_out(deep.base))
        out |= cases(for_base, base, f"{turn}-base-")
        partial.append(left_out(base))
    return out, {"partial": partial}


def placement(pack, tensors, params):
    """Which device each model's layers were last sent to."""
    gpu = note_places()
    seen = {}
    for strength in (0.0, 1.0):
        for unload in (False, True):
            flux, base, adapter = _load(pack, params)
            base.load_device = gpu
            models = {"base": base, "deep": flux.apply_adapter(base, adapter, strength)}
            seen[f"strength {strength}, unload {unload}"] = [
                _places(models[name], base, unload) for name in params["order"]
            ]
            comfy.model_management.unload_all_models()
    return {}, {"seen": seen, "device": str(gpu)}


def _places(model, base, unload):
    comfy.model_management.load_models_gpu([model])
    network, base_network = model.model.diffusion_model, base.model.diffusion_model
    parts = [network.img_in, network.final_layer.linear, *base_network.double_blocks.modules()]
    parts += [*base_network.single_blocks.modules(), base_network.txt_in]
    found = places_of(parts, [model, base, *model.model_patches_models()])
    if unload:
        comfy.model_management.unload_all_models()
    return found


def growth(pack, tensors, params):
    """Alternate many times; resident memory and the number of live models must not grow."""
    import gc
    import resource

    flux, base, adapter = _load(pack, params)
    for_base, for_deep = _split(tensors)
    seen = []
    for turn in range(params["turns"]):
        cases(for_deep, flux.apply_adapter(base, adapter, 1.0))
        cases(for_base, base)
        if turn in (params["turns"] // 5, params["turns"] - 1):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            alive = sum(isinstance(o, type(base.model)) for o in gc.get_objects() if hasattr(o, "__class__"))
            seen.append((pages * resource.getpagesize(), alive, len(comfy.model_management.current_loaded_models)))
    return {}, {"seen": seen}


def refusals(pack, tensors, params):
    """The messages of wrong pairings, and whether any model was loaded before they came."""
    flux, base, adapter = _load(pack, params)
    said = {}

    def attempt(name, call):
        try:
            call()
        except ValueError as error:
            said[name] = str(error)

    merged = load_model(pack, params["other"])
    deep = flux.apply_adapter(base, adapter, 1.0)
    attempt("merged model", lambda: flux.apply_adapter(merged, adapter, 1.0))
    attempt("twice", lambda: flux.apply_adapter(deep, adapter, 1.0))
    sampling = bridge(pack, "sampling")
    attempt("f8 latent", lambda: sampling.check_latent(deep, {"samples": torch.zeros(1, 16, 8, 8)}))
    attempt("deep latent", lambda: sampling.check_latent(base, {"samples": torch.zeros(1, 8, 8, 8)}))
    attempt("size", lambda: bridge(pack, "model_info").empty_latent(deep, 100, 64, 1))
    wrong = adapters(pack).load_adapter(params["adapter"])
    wrong.base = {**wrong.base, "num_layers": 19}
    attempt("base", lambda: flux.apply_adapter(base, wrong, 1.0))
    return {}, {"said": said, "loaded": len(comfy.model_management.current_loaded_models)}
