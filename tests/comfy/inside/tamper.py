"""Run inside ComfyUI: the only places where tests replace something of core's, or look at how it keeps weights.

Each function says what holds from then on, in a process that is of no use for anything else afterwards. What is
replaced must be there: a core that has moved it stops the test instead of letting it pass untested. `any_width` alone
puts back what it replaces.
"""

import contextlib
import sys

import comfy.model_detection
import comfy.model_management as mm
import torch

DYNAMIC = getattr(sys.modules.get("comfy.memory_management"), "aimdo_enabled", False)


def _replace(owner, name, value):
    if not hasattr(owner, name):
        raise RuntimeError(f"this ComfyUI has no {owner.__name__}.{name} for tests/comfy/inside/tamper.py to replace")
    setattr(owner, name, value)


def _figures(one, each_of_two):
    """A get_free_memory: attention asks for two figures, the weights ask for one."""
    return lambda device=None, torch_free_too=False: (each_of_two, each_of_two) if torch_free_too else one


def leave_no_room():
    """ComfyUI has a device on which no weight fits: each is fetched when it is used."""
    if DYNAMIC:
        import comfy_aimdo.model_vbar

        _replace(comfy_aimdo.model_vbar, "FULL", True)  # of the tests' own stand-in
        return
    _replace(mm, "is_device_cpu", lambda device: False)
    _replace(mm, "vram_state", mm.VRAMState.LOW_VRAM)
    _replace(
        mm, "get_free_memory", lambda device=None, torch_free_too=False: (1 << 33, 1 << 33) if torch_free_too else 1
    )
    _replace(mm, "minimum_inference_memory", lambda: 0)
    _replace(mm, "MIN_WEIGHT_MEMORY_RATIO", 0.0)


def left_out(patcher):
    """Whether weights of a model that has run stayed off the device."""
    if not DYNAMIC:
        return patcher.model.model_lowvram
    ranged = [module for module in patcher.model.modules() if hasattr(module, "_v")]
    return bool(ranged) and all(module._v_signature is None for module in ranged)


def note_places():
    """Modules note where they are sent, and stay. Returns the device that is not the RAM."""
    _replace(torch.nn.Module, "to", _note_place)
    if DYNAMIC:
        return mm.get_torch_device()  # "cpu:0", where the RAM is "cpu"
    _replace(
        mm,
        "get_free_memory",
        lambda device=None, torch_free_too=False: (1 << 40, 1 << 40) if torch_free_too else 1 << 40,
    )
    _replace(mm, "cast_to_device", lambda tensor, device, dtype, copy=False: tensor.to(dtype, copy=copy))
    return torch.device("meta")  # has no data


def _note_place(module, device=None, *args, **kwargs):
    for part in module.modules():
        part._at = str(device)
    return module


def places_of(modules, patchers):
    """Where those of the modules that have weights are for core, once the patchers' models have been loaded."""
    at_once = {}
    for patcher in patchers:
        names = {name.rpartition(".")[0] for name in patcher.backup}
        for name, part in patcher.model.named_modules():
            # Weights beside further layers: dynamic loading sends those of a model's tree along and keeps no note.
            if name in names or any(True for _ in part.children()):
                at_once[id(part)] = str(patcher.load_device)

    def place(module):
        if hasattr(module, "_v"):  # a place in the range of addresses of a device, filled when it is used
            return f"{mm.get_torch_device().type}:{module._v[0].device}"
        if DYNAMIC and id(module) in at_once:
            return at_once[id(module)]
        return getattr(module, "_at", "never moved")

    return sorted({place(module) for module in modules if any(True for _ in module.parameters(recurse=False))})


@contextlib.contextmanager
def any_width():
    """0.8.0 takes every FLUX for one of 24 heads; later cores read the number off the width, as is done here."""
    detect = comfy.model_detection.detect_unet_config

    def by_width(*args, **kwargs):
        config = detect(*args, **kwargs)
        config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
        return config

    comfy.model_detection.detect_unet_config = by_width
    try:
        yield
    finally:
        comfy.model_detection.detect_unet_config = detect
