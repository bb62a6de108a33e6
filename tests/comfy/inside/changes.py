"""Run inside ComfyUI: LoRA of every kind on the ends, damaged releases, the VAE through core's nodes."""

import logging
import shutil
from pathlib import Path

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from core_nodes import Setting, call, found
from flux import bridge
from safetensors.torch import load_file, save_file

# LoRA of every kind --------------------------------------------------------------------------------------------


def kinds(name, rows, columns, convolution, generator):
    """The layer's change by each algorithm that core reads, as its file has it: weights (rows, columns[, 1, 1])."""

    def noise(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    rest = [1, 1] if convolution else []
    pair = {f"{name}.lora_A.weight": noise(4, columns), f"{name}.lora_B.weight": noise(rows, 4)}
    half = {f"{name}.hada_w{i}_{side}": noise(*shape) for i in (1, 2) for side, shape in _hada(rows, columns).items()}
    return {
        "lora": pair,
        "dora": {**pair, f"{name}.dora_scale": noise(rows, 1, *rest) + 2},
        "loha": half,
        "lokr": {f"{name}.lokr_w1": noise(2, 2), f"{name}.lokr_w2": noise(rows // 2, columns // 2)},
        "diff": {f"{name}.diff": noise(rows, columns, *rest)},
    }


def _hada(rows, columns):
    return {"a": (rows, 4), "b": (4, columns)}


def lora_kinds(pack, tensors, params):
    """{family/layer/kind/fitting: [what the log said, warnings while sampling, relative change of the sample]}."""
    out = {}
    for family, of in params["families"].items():
        s = Setting(pack, of, {k.split("/")[1]: v for k, v in tensors.items() if k.startswith(f"{family}/")})
        deep = s.over(s.ours())
        plain = s.sample(deep)
        generator = torch.Generator().manual_seed(0)
        for layer, shapes in of["ends"].items():
            for fitting, shape in shapes.items():
                for kind, file in kinds(f"transformer.{layer}", *shape, "patch_embed" in layer, generator).items():
                    (twin, _), said = _heard(comfy.sd.load_lora_for_models, deep, None, file, 1.0, 0)
                    sample, warnings = _heard(s.sample, twin)
                    change = ((sample - plain).norm() / plain.norm()).item()
                    out[f"{family}/{layer}/{kind}/{fitting}"] = [said, warnings, change]
    return {}, out


def _heard(run, *args):
    """(what `run` gives, warnings and LoRA reports in the log meanwhile)."""
    lines = []

    class Ears(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING or "LoRA on" in record.getMessage():
                lines.append(record.getMessage())

    ears, log = Ears(), logging.getLogger()
    level = log.level
    log.addHandler(ears)
    log.setLevel(logging.INFO)
    try:
        return run(*args), lines
    finally:
        log.removeHandler(ears)
        log.setLevel(level)


# Damaged releases ----------------------------------------------------------------------------------------------


def damaged(pack, _tensors, params):
    """What is said of releases with one tensor missing, one too many, or one of another shape, in each part."""
    release, work, said = bridge(pack, "release"), Path(params["work"]), {}
    bridge(pack, "toy").register()
    for family, folder in params["releases"].items():
        for part, name in params["parts"][family].items():
            for damage in ("missing", "extra", "shape"):
                copy = work / f"{family}-{part}-{damage}"
                shutil.copytree(folder, copy)
                (file,) = (copy / part).glob("*.safetensors")
                state = load_file(file)
                assert name in state, sorted(state)[:40]
                if damage == "missing":
                    del state[name]
                elif damage == "extra":
                    state[name.replace(".weight", ".other")] = state[name].clone()
                else:
                    state[name] = torch.cat((state[name], state[name][:1]))
                save_file(state, file, {"format": "pt"})
                try:
                    if part == "transformer":
                        release.load_weights(copy, "default", release.FROM_FILE)
                    elif part == "vae":
                        release.load_vae(release.Release(copy))
                    else:
                        release.load_text(release.Release(copy))
                    said[f"{family}/{part}/{damage}"] = ""
                except Exception as error:
                    said[f"{family}/{part}/{damage}"] = f"{type(error).__name__}: {error}"
                shutil.rmtree(copy)
    return {}, {"said": said, "loaded": len(comfy.model_management.current_loaded_models)}


# The VAE -------------------------------------------------------------------------------------------------------


def vae(pack, tensors, params):
    """The DC-AE's patcher, copies of it, and files that core's nodes write of it."""
    bridge(pack, "toy").register()
    files = bridge(pack, "vae_files")
    ours = files.load("toy/dc-ae-f32")
    out = {"plain": ours.decode(tensors["z"]).clone()}
    facts = {"dynamic": bool(getattr(ours.patcher, "is_dynamic", bool)())}
    save_file(ours.get_sd(), Path(params["work"]) / "state.safetensors")
    save_file(ours.first_stage_model.cpu().state_dict() if facts["dynamic"] else ours.get_sd(), _next(params))
    call(found("nodes_model_merging", "VAESave"), ours, "vae/saved")
    (written,) = Path(folder_paths.get_output_directory(), "vae").glob("saved*.safetensors")
    again = bridge(pack, "vae").make_vae(written, ours.space.scaling_factor)
    out["saved"] = again.decode(tensors["z"]).clone()
    if hasattr(ours.patcher, "deepclone_multigpu"):
        import copy

        twin = copy.copy(ours)
        twin.patcher = ours.patcher.deepclone_multigpu(new_load_device=ours.patcher.load_device)
        twin.first_stage_model = twin.patcher.model
        assert twin.dcae is not ours.dcae
        out["copy"] = twin.decode(tensors["z"]).clone()
        out["not dynamic"] = ours.decode(tensors["z"]).clone()
    if hasattr(ours.patcher, "get_free_memory"):
        rows = []
        for free in (1 << 20, 1 << 40):  # what the patcher says is free, whatever else fills the device
            ours.patcher.get_free_memory = lambda device, free=free: free
            rows.append(ours._strip("decode", 64, 64, 0, None).rows or 64)
        facts["rows"] = rows
    error = getattr(torch, "AcceleratorError", None)
    if error is not None and hasattr(comfy.model_management, "is_oom"):
        facts["oom"] = bridge(pack, "vae").out_of_memory(error("CUDA error: out of memory"))
    facts["cancel"] = bridge(pack, "vae").out_of_memory(comfy.model_management.InterruptProcessingException())
    return out, facts


def _next(params):
    return Path(params["work"]) / "state-2.safetensors"
