"""Runs one function inside ComfyUI's own interpreter. Started by tests/comfy/conftest.py, never imported by it.

The job file (environment variable DCGEN_JOB) says which script, with what. ComfyUI's flags come in sys.argv, as a
user's would.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

job = json.loads(Path(os.environ["DCGEN_JOB"]).read_text())
sys.path.insert(0, job["comfy"])
os.chdir(job["comfy"])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402  picks the device from the flags before anything else can
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)


def module_from(name, path, package=False):
    places = [str(path.parent)] if package else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=places)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Under a name made from a path, as ComfyUI itself does, so that an absolute import inside the pack would fail here too.
pack = module_from("custom_nodes_ComfyUI-DC-Gen".replace("-", "_"), Path(job["pack"]) / "__init__.py", package=True)
sys.path.append(str(Path(job["script"]).parent))
script = module_from("dcgen_inside_script", Path(job["script"]))
work = Path(job["work"])
tensors_in = load_file(work / "in.safetensors") if (work / "in.safetensors").exists() else {}

with torch.inference_mode():
    tensors, data = getattr(script, job["function"])(pack.__name__, tensors_in, job["params"])
save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, work / "out.safetensors")
(work / "out.json").write_text(json.dumps(data))
