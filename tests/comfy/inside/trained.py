"""Run inside ComfyUI: what training exported, in each of its three forms, asked for velocities."""

import importlib
from pathlib import Path

import comfy.model_management
import folder_paths
from flux import bridge, load_model


def forms(pack, tensors, params):
    """Velocities of every recipe's adapter on its base, its merged release folder and its single file."""
    out = {}
    for kind, files in params.items():
        cond = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{kind}/")}
        x, sigma = cond.pop("x"), cond.pop("sigma")
        for form, model in models(pack, files).items():
            comfy.model_management.load_models_gpu([model])
            x0 = model.model.apply_model(x, sigma, **cond)  # x0 = x - sigma * v
            out[f"{kind}/{form}"] = (x - x0) / sigma.reshape(-1, 1, 1, 1)
    return out, {}


def models(pack, files):
    release = bridge(pack, "release")
    single = Path(files["single"])
    folder_paths.add_model_folder_path("diffusion_models", str(single.parent))
    adapter = importlib.import_module(f"{pack}.dcgen.adapter").load_adapter(files["adapter"])
    base = load_model(pack, files["base"])
    return {
        "adapter": bridge(pack, "apply").apply_adapter(base, adapter, 1.0),
        "release": load_model(pack, files["release"]),
        "single": release.load_model(single.name, "default", release.FROM_FILE),
    }
