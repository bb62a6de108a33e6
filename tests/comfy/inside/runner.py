"""Does jobs inside ComfyUI's own interpreter. Started by ../core.py, never imported by it.

Each line of stdin names a job's folder: job.json says which script, with what. The answer is a line too, "done", or
"changed ..." with what is no longer core's own. ComfyUI's flags come in sys.argv, as a user's would.
"""

import copy
import gc
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

# What anything prints belongs to the log; stdout is for answers.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

sys.path.insert(0, os.environ["DCGEN_COMFY"])
os.chdir(os.environ["DCGEN_COMFY"])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402  picks the device from the flags before anything else can
import folder_paths  # noqa: E402
import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
CORE = ("comfy", "comfy_extras", "execution", "folder_paths", "latent_preview", "nodes", "torch.nn.modules.module")


def check_mode(wanted):
    management = sys.modules.get("comfy.memory_management")
    found = "dynamic" if getattr(management, "aimdo_enabled", False) else "legacy"
    if found != wanted:
        raise RuntimeError(f"ComfyUI runs in mode {found!r}, the tests asked for {wanted!r}")


def module_from(name, path, package=False):
    places = [str(path.parent)] if package else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=places)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def replaceable():
    """Every function, class and switch of core's, and what its classes hold, by name."""
    found = {}
    for name in [name for name in sys.modules if name.startswith(CORE)]:
        for key, value in list(vars(sys.modules[name]).items()):
            if callable(value) or isinstance(value, bool):
                found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{k}": v for k, v in vars(value).items() if callable(v)}
    return found


def do(work):
    job = json.loads((work / "job.json").read_text())
    script = module_from("dcgen_inside_script", Path(job["script"]))
    tensors = load_file(work / "in.safetensors") if (work / "in.safetensors").exists() else {}
    torch.manual_seed(0)
    with torch.inference_mode():
        out, data = getattr(script, job["function"])(pack.__name__, tensors, job["params"])
    save_file({name: tensor.contiguous().clone() for name, tensor in out.items()}, work / "out.safetensors")
    (work / "out.json").write_text(json.dumps(data))


def forget(paths, flags):
    """What a job leaves behind must not meet the next one: loaded models, folders, flags."""
    comfy.model_management.unload_all_models()
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(copy.deepcopy(paths))
    folder_paths.filename_list_cache.clear()
    vars(args).update(flags)
    gc.collect()


check_mode(os.environ["DCGEN_MODE"])
# Under a name made from a path, as ComfyUI itself does, so that an absolute import inside the pack would fail here too.
pack = module_from("custom_nodes_ComfyUI_DC_Gen", Path(os.environ["DCGEN_PACK"]) / "__init__.py", package=True)
importlib.import_module(f"{pack.__name__}.nodes.bridge.lora").register()  # as at the start of a server
sys.path.append(str(Path(__file__).resolve().parent))
at_first = copy.deepcopy(folder_paths.folder_names_and_paths), dict(vars(args))
for line in sys.stdin:
    before = replaceable()
    try:
        do(Path(line.strip()))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # whatever it left half done must not meet the next job
    now = replaceable()
    changed = sorted(name for name, value in before.items() if now.get(name) is not value)
    print(f"changed {', '.join(changed)}" if changed else "done", file=answers, flush=True)
    if changed:
        break
    forget(*at_first)
