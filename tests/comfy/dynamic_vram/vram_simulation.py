"""Runs ComfyUI's "dynamic VRAM" weight loading, its default on NVIDIA cards, on a CPU. No file of core is changed.

`activate()` must run before anything of ComfyUI is imported, in a ComfyUI started with --cpu: ../inside/launch.py does
it. Core's log then has LOG_LINE. The package comfy_aimdo in this folder stands in for the installed one and says what
it cannot show; where nothing is to fit, a test sets its model_vbar.FULL, and each use of a weight fetches it again.

Written for ComfyUI 0.33.0. If a newer core no longer has the place that a patch needs, the import (or the first cast of
a weight) stops with a RuntimeError that names it. For tests on CPU machines only; never part of the node pack.
"""

import dis
import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import logging
import sys
from pathlib import Path

LOG_LINE = "dynamic VRAM on the CPU (test shim)"
SMALL_LAYER = 16 * 1024  # bytes up to which core loads a layer at once, not dynamically: most layers of tiny models
SMALL_TEST_LAYER = 64


def _lost(place):
    return RuntimeError(f"vram_simulation: this ComfyUI has no {place}, or it works in another way there")


def _found(owner, name):
    if not hasattr(owner, name):
        raise _lost(f"{owner.__name__}.{name}")
    return getattr(owner, name)


def _memory_management(module):
    """Core's main.py sets this flag once comfy-aimdo has found a card."""
    _found(module, "aimdo_enabled")
    module.aimdo_enabled = True


def _model_management(module):
    """Core runs models on "cpu:0" now, which passes for a card; "cpu", where tensors say they are, is the RAM."""
    core_device, is_device_cpu = _found(module, "get_torch_device"), _found(module, "is_device_cpu")
    _found(module, "text_encoder_device")
    if core_device().type != "cpu":
        raise RuntimeError("vram_simulation: start ComfyUI with --cpu")
    card = module.torch.device("cpu", 0)

    def get_torch_device():
        return card

    def is_ram(device):
        return is_device_cpu(device) and device.index is None

    module.get_torch_device = module.text_encoder_device = get_torch_device
    module.is_device_cpu = is_ram


def _ops(module):
    """A layer in the card's range is cast on the card: its input cannot say so, as CPU tensors keep no index."""
    cast = _found(module, "cast_bias_weight")
    if list(inspect.signature(cast).parameters)[:4] != ["s", "input", "dtype", "device"]:
        raise _lost("comfy.ops.cast_bias_weight(s, input, dtype, device, ...)")
    vbar = importlib.import_module("comfy_aimdo.model_vbar")

    @functools.wraps(cast)
    def cast_bias_weight(s, input=None, dtype=None, device=None, *args, **kwargs):
        if not hasattr(s, "_v"):
            return cast(s, input, dtype, device, *args, **kwargs)
        made = cast(s, input, dtype, module.comfy.model_management.get_torch_device(), *args, **kwargs)
        if not vbar.FULL and getattr(s, "_v_signature", None) is None:
            raise _lost("path from comfy.ops.cast_bias_weight to comfy_aimdo.model_vbar.vbar_fault")
        return made

    module.cast_bias_weight = cast_bias_weight


def _model_patcher(module):
    """Every model gets the dynamic patcher, and tiny layers are loaded as large ones are."""
    dynamic = _found(module, "ModelPatcherDynamic")
    _found(module, "CoreModelPatcher")
    module.CoreModelPatcher = dynamic
    load = _found(dynamic, "load")
    code = load.__code__
    uses = [step for step in dis.get_instructions(code) if step.opname == "LOAD_CONST" and step.argval == SMALL_LAYER]
    if len(uses) != 1:
        raise _lost(f"single use of {SMALL_LAYER} in comfy.model_patcher.ModelPatcherDynamic.load")
    consts = tuple(SMALL_TEST_LAYER if const == SMALL_LAYER else const for const in code.co_consts)
    load.__code__ = code.replace(co_consts=consts)
    for name in PATCHES:  # one that core no longer has would otherwise go unnoticed
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise _lost(name) from error
    logging.info(LOG_LINE)


PATCHES = {
    "comfy.memory_management": _memory_management,
    "comfy.model_management": _model_management,
    "comfy.ops": _ops,
    "comfy.model_patcher": _model_patcher,
}


class _PatchAfterImport(importlib.abc.MetaPathFinder):
    """Lets Python find these modules as ever, and patches each right after its code has run."""

    def find_spec(self, name, path=None, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = execute_and_patch
        return spec


def activate():
    """From here on ComfyUI's modules are patched as they are imported."""
    if loaded := sorted({"comfy_aimdo", *PATCHES} & set(sys.modules)):
        raise RuntimeError(f"vram_simulation: activate() came after the import of {', '.join(loaded)}")
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.meta_path.insert(0, _PatchAfterImport())
