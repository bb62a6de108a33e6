"""Run inside ComfyUI: a GGUF file through the real ComfyUI-GGUF, with DC-Gen's ends on top."""

import importlib.util
import sys
from pathlib import Path

import folder_paths
from apply import adapters
from flux import bridge, cases
from tamper import any_width


def load_pack(folder):
    spec = importlib.util.spec_from_file_location(
        "comfyui_gguf", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = sys.modules["comfyui_gguf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split_form(pack, tensors, params):
    folder, sys.path[:0] = Path(params["folder"]), params["path"]
    module = load_pack(Path(params["pack"]))
    for kind in ("unet", "unet_gguf", "diffusion_models"):
        folder_paths.add_model_folder_path(kind, str(folder))
    out, said = {}, {}
    ends = adapters(pack).load_adapter(folder / "ends.safetensors")
    apply = bridge(pack, "apply").apply_adapter
    release = bridge(pack, "release")
    for name in params["formats"]:
        with any_width():
            loader = module.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()
            blocks, base = (loader.load_unet(f"{kind}-{name}.gguf")[0] for kind in ("blocks", "base"))
        out |= cases(tensors, apply(blocks, ends, 1.0), f"{name}/split/")
        whole = release.load_weights(folder / f"whole-{name}.safetensors", "default", release.FROM_FILE)
        out |= cases(tensors, whole, f"{name}/whole/")
        try:
            apply(base, ends, 1.0)
        except ValueError as error:
            said[name] = str(error)
    return out, said
