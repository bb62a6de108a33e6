"""Run inside ComfyUI: files in core's quantized layouts, and the same models with the weights expanded."""

import importlib
import json
from pathlib import Path

import comfy.quant_ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from apply import adapters
from flux import bridge, cases, load_model
from safetensors.torch import save_file
from tamper import any_width

BLOCKS = ("double_blocks.", "single_blocks.")
LAYOUTS = {
    "float8_e4m3fn": "TensorCoreFP8E4M3Layout",
    "float8_e5m2": "TensorCoreFP8E5M2Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
}
if "mxfp8" in comfy.quant_ops.QUANT_ALGOS:  # not in 0.8.0
    LAYOUTS["mxfp8"] = "TensorCoreMXFP8Layout"
PREFIX = "model.diffusion_model."


def pack_weights(weights, name):
    """(weights with `name` layers and their scales, the same expanded, the names of the layers)."""
    file, expanded, layers = dict(weights), dict(weights), []
    for key, tensor in weights.items():
        if not (key.startswith(BLOCKS) and key.endswith(".weight") and tensor.ndim == 2):
            continue
        layer = key.removesuffix(".weight")
        scale = {} if name == "mxfp8" else {"scale": "recalculate"}
        packed = comfy.quant_ops.QuantizedTensor.from_float(tensor, LAYOUTS[name], **scale)
        file[key] = packed._qdata
        if name == "mxfp8":
            file[f"{layer}.weight_scale"] = packed._params.scale.view(torch.uint8)
        elif name == "nvfp4":
            file[f"{layer}.weight_scale_2"] = packed._params.scale.float()
            file[f"{layer}.weight_scale"] = packed._params.block_scale.view(torch.uint8)
        else:
            file[f"{layer}.weight_scale"] = packed._params.scale.float()
        expanded[key] = packed.dequantize().float()
        layers.append(layer)
    return file, expanded, layers


def with_conf(file, layers, **conf):
    """One small JSON tensor beside each layer."""
    note = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    return {**file, **{f"{layer}.comfy_quant": note.clone() for layer in layers}}


def styles(weights):
    """name -> (tensors, extra metadata, the expanded weights): every way in which such files are found."""
    made = {}
    for name in LAYOUTS:
        file, expanded, layers = pack_weights(weights, name)
        made[name] = with_conf(file, layers, format=name), {}, expanded
        if name == "float8_e4m3fn":
            notes = {"format_version": "1.0", "layers": {layer: {"format": name} for layer in layers}}
            made["metadata"] = file, {"_quantization_metadata": json.dumps(notes)}, expanded
            old = {f"{PREFIX}{key.replace('weight_scale', 'scale_weight')}": value for key, value in file.items()}
            old[f"{PREFIX}scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
            made["scaled_fp8"] = old, {}, expanded
            made["prefixed"] = (
                {f"{PREFIX}{key}": value for key, value in file.items()},
                {
                    "_quantization_metadata": json.dumps(
                        {"layers": {f"{PREFIX}{k}": v for k, v in notes["layers"].items()}}
                    )
                },
                expanded,
            )
            cast = {key: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for key, t in weights.items()}
            made["cast"] = cast, {}, {key: t.float() for key, t in cast.items()}
    return made


def save(folder, name, tensors, metadata):
    save_file(
        {key: value.contiguous().clone() for key, value in tensors.items()}, folder / f"{name}.safetensors", metadata
    )


def everything(pack, tensors, params):
    torch.manual_seed(0)
    release, folder = bridge(pack, "release"), Path(params["folder"])
    folder_paths.add_model_folder_path("diffusion_models", str(folder))

    def load(name):
        return release.load_model(f"{name}.safetensors", "default", release.FROM_FILE)

    plain = load_model(pack, params["deep"])
    notes = {**plain.model.dcgen.space.to_metadata(), "dcgen.config": params["config"]}
    weights = {key: value.clone() for key, value in plain.model.diffusion_model.state_dict().items()}
    deep = {key: value for key, value in tensors.items() if key.startswith("deep")}
    out, kinds = cases(deep, plain, "whole-"), {}
    for name, (file, metadata, expanded) in styles(weights).items():
        save(folder, name, file, {**notes, **metadata})
        save(folder, f"{name}-expanded", expanded, notes)
        found, wanted = load(name), load(f"{name}-expanded")
        kinds[name] = type(found.model.diffusion_model.double_blocks[0].img_mlp[0].weight).__name__
        out |= cases(deep, found, f"{name}-") | cases(deep, wanted, f"{name}=")
        if name in LAYOUTS:
            out |= cases(deep, with_lora(found, params), f"{name}-lora-")
            out |= cases(deep, with_lora(wanted, params), f"{name}=lora-")
            out |= cases(deep, found, f"{name}-after-")
    refused = refusals(load, folder, weights, notes)
    found, facts = base_models(pack, tensors, params, load, folder)
    return out | found, {"kinds": kinds, "refused": refused, "known": sorted(comfy.quant_ops.QUANT_ALGOS), **facts}


def with_lora(model, params):
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(params["lora"]), 0.7, 0)[0]


def base_models(pack, tensors, params, load, folder):
    """DCGenApply on a quantized base, which stays usable beside it."""
    flux, adapter = bridge(pack, "apply"), adapters(pack).load_adapter(params["adapter"])
    plain = load_model(pack, params["release"])
    space = importlib.import_module(f"{pack}.dcgen.spaces").SPACES["flux-f8c16"]
    notes = {**space.to_metadata(), "dcgen.config": params["base_config"]}
    weights = {key: value.clone() for key, value in plain.model.diffusion_model.state_dict().items()}
    of = {kind: {k: v for k, v in tensors.items() if k.startswith(kind)} for kind in ("base", "deep")}
    out, kept = {}, {}
    for name in ("float8_e4m3fn", "nvfp4"):
        file, expanded, layers = pack_weights(weights, name)
        save(folder, f"base-{name}", with_conf(file, layers, format=name), notes)
        save(folder, f"base-{name}-expanded", expanded, notes)
        base, reference = load(f"base-{name}"), load(f"base-{name}-expanded")
        before = base.model.diffusion_model.double_blocks[0].img_mlp[0].weight.data_ptr()
        for strength in (0.0, 1.0):
            out |= cases(of["deep"], flux.apply_adapter(base, adapter, strength), f"{name}-applied{strength:g}-")
            out |= cases(of["deep"], flux.apply_adapter(reference, adapter, strength), f"{name}=applied{strength:g}-")
        out |= cases(of["base"], base, f"{name}-base-") | cases(of["base"], reference, f"{name}=base-")
        kept[name] = base.model.diffusion_model.double_blocks[0].img_mlp[0].weight.data_ptr() == before
    return out, {"kept": kept}


def refusals(load, folder, weights, notes):
    """What is said of files that this ComfyUI cannot read."""
    file, _, layers = pack_weights(weights, "float8_e4m3fn")
    bad = {
        "format": with_conf(file, layers, format="zfp7"),
        "diffusers names": {"transformer_blocks.0.x.weight": weights["img_in.weight"], "a.comfy_quant": torch.zeros(1)},
        "smoothed": {**with_conf(file, layers, format="float8_e4m3fn"), f"{layers[0]}.pre_quant_scale": torch.ones(32)},
    }
    if "mxfp8" not in LAYOUTS:
        LAYOUTS["mxfp8"] = "TensorCoreMXFP8Layout"  # comfy-kitchen has it before the core does
        bad["mxfp8"] = with_conf(pack_weights(weights, "mxfp8")[0], layers, format=LAYOUTS.popitem()[0])
    said = {}
    for name, tensors in bad.items():
        save(folder, f"bad-{name}", tensors, notes)
        try:
            load(f"bad-{name}")
        except ValueError as error:
            said[name] = str(error)
    return said


# Formats of newer cores ------------------------------------------------------------------------------------------

NEWER = {
    "int8_tensorwise": ("TensorWiseINT8Layout", {"per_channel": True}, {}),
    "int8_tensorwise convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}, {"convrot": True}),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {}, {}),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", {}, {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {"scale": "recalculate"}, {}),
    "float8_e4m3fn": ("TensorCoreFP8E4M3Layout", {"scale": "recalculate"}, {}),
}


def written(weights, name, chosen):
    """(the tensors of a file with these layers in a format, the same expanded), as core's own tensors write them."""
    layout, options, conf = NEWER[name]
    file, expanded = dict(weights), dict(weights)
    note = torch.tensor(list(json.dumps({"format": name.split()[0], **conf}).encode()), dtype=torch.uint8)
    for key, tensor in weights.items():
        if not chosen(key, tensor):
            continue
        packed = comfy.quant_ops.QuantizedTensor.from_float(tensor, layout, **options)
        file.pop(key)
        # As published files have them: core's own reader under dynamic VRAM does not know the type of mxfp8's scales.
        kept = packed.state_dict(key)
        file |= {
            name: t.view(torch.uint8) if t.dtype.itemsize == 1 and "e8m0" in str(t.dtype) else t
            for name, t in kept.items()
        }
        file[f"{key.removesuffix('.weight')}.comfy_quant"] = note.clone()
        expanded[key] = packed.dequantize().float()
    return file, expanded


def newer(pack, tensors, params):
    """Every format that this core knows: a base through core's own loader and ours, deep models through ours."""
    torch.manual_seed(0)
    release, folder = bridge(pack, "release"), Path(params["folder"])
    known = {name for name in NEWER if name.split()[0] in comfy.quant_ops.QUANT_ALGOS}
    out = {}
    for family, of in params["families"].items():
        chosen = FLUX_BLOCKS if family == "flux" else SANA_BLOCKS
        plain = {kind: release.load_weights(Path(of[kind]), "default", release.FROM_FILE) for kind in ("base", "deep")}
        for kind, model in plain.items():
            inputs = {k: v for k, v in tensors.items() if k.startswith(f"{family}-{kind}")}
            run = cases if family == "flux" else sana_cases
            notes = {**model.model.dcgen.space.to_metadata(), "dcgen.config": of[f"{kind}_config"]}
            weights = {key: value.clone().float() for key, value in model.model.diffusion_model.state_dict().items()}
            out |= run(inputs, model, "whole/")
            for name in sorted(known):
                file, expanded = written(weights, name, chosen)
                save(folder, f"{family}-{kind}-{name}", file, notes)
                save(folder, f"{family}-{kind}-expanded", expanded, notes)
                path = folder / f"{family}-{kind}-{name}.safetensors"
                found = release.load_weights(path, "default", release.FROM_FILE)
                out |= run(inputs, found, f"{name}/ours/")
                wanted = release.load_weights(
                    folder / f"{family}-{kind}-expanded.safetensors", "default", "from the file"
                )
                out |= run(inputs, wanted, f"{name}/expanded/")
                if (family, kind) == ("flux", "base") and params["core"]:
                    with any_width():
                        out |= run(inputs, comfy.sd.load_diffusion_model(str(path)), f"{name}/core/")
    return out, {"known": sorted(known)}


def FLUX_BLOCKS(key, tensor):
    return key.startswith(BLOCKS) and key.endswith(".weight") and tensor.ndim == 2


def SANA_BLOCKS(key, tensor):
    return key.startswith("transformer_blocks.") and key.endswith(".weight") and tensor.ndim == 2


def sana_cases(tensors, patcher, prefix=""):
    from sana import velocities

    of = {key.partition("/")[2]: value for key, value in tensors.items()}
    name = next(iter(tensors)).partition("/")[0]
    return {f"{prefix}{name}": velocities(patcher, {"": of})[""]}
