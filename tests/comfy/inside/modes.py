"""Run inside ComfyUI: which mode it is in, and what the tests' own process makes of jobs."""

import os

import comfy.model_management
from flux import load_model
from tamper import leave_no_room


def dynamic(pack, tensors, params):
    """How the weights of the pack's MODEL are held once it has been loaded."""
    model = load_model(pack, params["release"])
    comfy.model_management.load_models_gpu([model])
    layers = list(model.model.diffusion_model.modules())
    return {}, {
        "is_dynamic": getattr(model, "is_dynamic", lambda: False)(),
        "ranged": sum(hasattr(layer, "_v") for layer in layers),
    }


def process(pack, tensors, params):
    return {}, {"pid": os.getpid(), "free": comfy.model_management.get_free_memory.__module__}


def tampering(pack, tensors, params):
    leave_no_room()
    return process(pack, tensors, params)


def failing(pack, tensors, params):
    raise ArithmeticError(f"of {params['what']}")
