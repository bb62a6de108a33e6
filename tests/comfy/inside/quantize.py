"""Run inside ComfyUI: files of `python -m dcgen.quantize`, and the same files with the weights expanded."""

from pathlib import Path

import comfy.quant_ops
import comfy.sd
import comfy.utils
from apply import adapters
from flux import bridge, velocity
from sana import velocities
from tamper import any_width

FORMATS = {"int8": "int8_tensorwise", "w4a8": "asym_w4a8_int8", "fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}


def everything(pack, tensors, params):
    """The merged models, bases under DCGenApply, and the split form, of each family in each format."""
    out, said = {}, {}
    for family, folder in params["families"].items():
        runs = Runs(pack, family, Path(folder), tensors)
        out |= runs.merged("whole", "whole")
        for name in params["formats"]:
            try:
                out |= runs.merged(name, name) | runs.merged(f"{name}-expanded", f"{name}=")
            except ValueError as error:
                said[f"{family} {name}"] = str(error)
                continue
            out |= runs.applied(name, name) | runs.applied(f"{name}-expanded", f"{name}=")
            out |= runs.split(name)
            said[f"{family} {name} unmerged"] = runs.refusal(name)
    return out, said


class Runs:
    def __init__(self, pack, family, folder, tensors):
        self.release, self.apply, self.adapters = bridge(pack, "release"), bridge(pack, "apply"), adapters(pack)
        self.family, self.folder = family, folder
        self.inputs = {
            kind: {
                key.rpartition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{family}/{kind}/")
            }
            for kind in ("base", "deep")
        }

    def load(self, name):
        return self.release.load_weights(self.folder / f"{name}.safetensors", "default", self.release.FROM_FILE)

    def adapter(self, name="adapter"):
        return self.adapters.load_adapter(self.folder / f"{name}.safetensors")

    def run(self, model, kind, name):
        of = self.inputs[kind]
        if self.family == "flux":
            found = velocity(model, of["x"], of["sigma"], of["context"], of["pooled"], of["guidance"])
        else:
            found = velocities(model, {"": of})[""]
        return {f"{self.family}/{name}": found}

    def with_lora(self, model):
        lora = comfy.utils.load_torch_file(str(self.folder / "lora.safetensors"))
        return comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0]

    def merged(self, file, name):
        model = self.load(f"merged-{file}")
        return self.run(model, "deep", f"{name}/merged") | self.run(self.with_lora(model), "deep", f"{name}/lora")

    def applied(self, file, name):
        model = self.load(f"base-{file}")
        adapter = self.adapter()
        if file.endswith("expanded"):
            adapter.base_weights = None  # in float32 these are rightly refused as other weights
        deep = self.apply.apply_adapter(model, adapter, 1.0)
        return self.run(deep, "deep", f"{name}/applied") | self.run(model, "base", f"{name}/base")

    def split(self, file, loader=None):
        """Blocks from our loader or another, with the ends on top: what the merged model gives."""
        blocks = (loader or self.load)(f"blocks-{file}")
        return self.run(self.apply.apply_adapter(blocks, self.adapter("ends"), 1.0), "deep", f"{file}/split")

    def load_by_core(self, name):
        with any_width():
            return comfy.sd.load_diffusion_model(str(self.folder / f"{name}.safetensors"))

    def refusal(self, file):
        """What is said when the ends are applied to blocks without the merged LoRA."""
        try:
            self.apply.apply_adapter(self.load(f"base-{file}"), self.adapter("ends"), 1.0)
        except ValueError as error:
            return str(error)
        return ""


def core_blocks(pack, tensors, params):
    """The split form, with core's own loader for the blocks."""
    runs = Runs(pack, "flux", Path(params["folder"]), tensors)
    out = {}
    for name in params["formats"]:
        if FORMATS[name] in comfy.quant_ops.QUANT_ALGOS:
            out |= runs.split(name, runs.load_by_core)
            out |= runs.run(runs.load(f"merged-{name}"), "deep", f"{name}/merged")
    return out, {}


def release(pack, _tensors, params):
    """A release folder whose transformer is one quantized file."""
    module = bridge(pack, "release")
    model = module.load_weights(Path(params["release"]), "default", module.FROM_FILE)
    weight = model.model.diffusion_model.double_blocks[0].img_mlp[0].weight
    return {}, {"kind": type(weight).__name__, "channels": model.model.latent_format.latent_channels}
