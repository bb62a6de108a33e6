"""Run inside ComfyUI: models that other packs and other formats bring, as faithful stand-ins, and DC-Gen on them."""

import copy
import importlib
import json
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.sd
import comfy.supported_models
import torch
from apply import adapters
from flux import bridge, cases, load_model, release_of, velocity
from safetensors.torch import save_file

MODULATED = ("img_attn.qkv", "txt_attn.qkv", "img_mlp.0", "img_mlp.2", "linear1", "linear2")


def everything(pack, tensors, params):
    out, facts = {}, {}
    for part in (gguf, nunchaku, quantized):
        found, said = part(pack, tensors, params)
        out |= found
        facts |= said
        comfy.model_management.unload_all_models()
    return out, facts


# ComfyUI-GGUF: core's Flux with linears whose weight is stored otherwise and expanded at each call


class PackedOps(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        """Weight as 16-bit integers with a scale, as a stand-in for GGML blocks; patches apply after expansion."""

        def _load_from_state_dict(self, state_dict, prefix, *args):
            weight = state_dict[f"{prefix}weight"]
            self.scale = weight.abs().amax().item() / 32767
            self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int16), requires_grad=False)
            self.bias = torch.nn.Parameter(state_dict[f"{prefix}bias"], requires_grad=False)

        def forward(self, x):
            weight = self.weight.to(x.dtype) * self.scale
            for patch in self.weight_function:
                weight = patch(weight)
            return torch.nn.functional.linear(x, weight, self.bias.to(x.dtype))


class GGUFModelPatcher(comfy.model_patcher.ModelPatcher):
    """Never bakes a patch into a weight: it hangs it on the layer, as the real one does."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        if key in self.patches:
            layer = comfy.model_patcher.comfy.utils.get_attr(self.model, key.rpartition(".")[0])
            layer.weight_function = [lambda w: comfy.lora.calculate_weight(self.patches[key], w.clone(), key)]


def gguf(pack, tensors, params):
    loader, release = bridge(pack, "flux_loader"), importlib.import_module(f"{pack}.dcgen.release")
    source = release.open_model(release_of(pack, params["release"]))
    plain = loader.load_flux(source, options={"custom_operations": PackedOps})
    model = GGUFModelPatcher(plain.model, plain.load_device, plain.offload_device)
    deep = bridge(pack, "flux").apply_adapter(model, adapters(pack).load_adapter(params["adapter"]), 1.0)
    kinds = [type(deep.lender).__name__, type(deep.model.diffusion_model.img_in).__module__]
    out = cases({k: v for k, v in tensors.items() if k.startswith("deep")}, deep, "gguf-")
    out |= cases({k: v for k, v in tensors.items() if k.startswith("base")}, model, "gguf-")
    return out, {"gguf": kinds}


# ComfyUI-nunchaku: a wrapper with that class name around a transformer with diffusers names


class Answer:
    def __init__(self, sample):
        self.sample = sample


class Transformer(torch.nn.Module):
    """Stand-in for NunchakuFluxTransformer2dModel: real embedder, norm and head, one mixing step for the C++ blocks."""

    def __init__(self, config, weights):
        super().__init__()
        self.config = config
        self.comfy_lora_meta_list = []
        width = config["num_attention_heads"] * config["attention_head_dim"]
        self.x_embedder = torch.nn.Linear(config["in_channels"], width)
        self.proj_out = torch.nn.Linear(width, config["in_channels"])
        self.norm_out = torch.nn.Module()
        self.norm_out.linear = torch.nn.Linear(width, 2 * width)
        self.load_state_dict({k: v for k, v in weights.items() if k in self.state_dict()})

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, guidance, **kwargs):
        x = torch.tanh(self.x_embedder(hidden_states) + encoder_hidden_states.mean() + guidance.reshape(-1, 1, 1))
        scale, shift = self.norm_out.linear(x).chunk(2, dim=-1)
        strength = sum(loras[1] for loras in self.comfy_lora_meta_list)
        return Answer(self.proj_out((1 + strength) * (x * (1 + scale) + shift)))


class ComfyFluxWrapper(torch.nn.Module):
    """What a patch meets of the real wrapper: config read at each call, list of LoRA files, custom forward."""

    def __init__(self, model, config):
        super().__init__()
        self.model, self.config, self.loras = model, config, []
        self.dtype, self.customized_forward, self.forward_kwargs = next(model.parameters()).dtype, None, {}
        self._prev_timestep = None

    def forward(self, x, timestep, context, y, guidance, control=None, transformer_options=None, **kwargs):
        model, p = self.model, self.config.get("patch_size", 2)
        if self.loras != model.comfy_lora_meta_list:
            model.comfy_lora_meta_list = list(self.loras)
        b, c, h, w = x.shape
        tokens = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)
        call = self.customized_forward or (lambda model, **kw: model(**kw))
        given = {"encoder_hidden_states": context, "pooled_projections": y, "guidance": guidance}
        out = call(model, hidden_states=tokens, **given, **self.forward_kwargs).sample
        self._prev_timestep = timestep
        return out.reshape(b, h // p, w // p, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def nunchaku(pack, tensors, params):
    config = json.loads((Path(params["release"]) / "transformer" / "config.json").read_text())
    release = importlib.import_module(f"{pack}.dcgen.release")
    source = release.open_model(release_of(pack, params["release"]))
    head = ("x_embedder.", "proj_out.", "norm_out.")
    transformer = Transformer(config, {k: source.get(k) for k in source.entries if k.startswith(head)})
    unet = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "guidance_embed": True}
    model_config = comfy.supported_models.Flux({**unet, "disable_unet_model_creation": True})
    model_config.set_inference_dtype(torch.float32, None)
    base = comfy.model_base.Flux(model_config, device=torch.device("cpu"))
    base.diffusion_model = ComfyFluxWrapper(transformer, {**unet})
    model = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    adapter = adapters(pack).load_adapter(params["adapter16"])
    deep = bridge(pack, "flux").apply_adapter(model, adapter, 0.5)
    inputs = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith("base4x4/")}
    deep_in = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith("deep4x4/")}

    def run(patcher, of):
        return velocity(patcher, of["x"], of["sigma"], of["context"], of["pooled"], of["guidance"])

    first = run(model, inputs)
    found = run(deep, deep_in)
    again = run(model, inputs)
    # The same by hand: the adapter's layers in a copy of the transformer, with the LoRA's strength.
    other = copy.deepcopy(transformer)
    for path in ("x_embedder", "proj_out", "norm_out.linear"):
        layer = other.get_submodule(path)
        for kind in ("weight", "bias"):
            setattr(layer, kind, torch.nn.Parameter(adapter.tensors[f"{path}.{kind}"], requires_grad=False))
    other.comfy_lora_meta_list = [("by hand", 0.5)]
    of = deep_in
    tokens = of["x"].flatten(2).transpose(1, 2)
    wanted = other(tokens, of["context"], of["pooled"], of["guidance"]).sample.transpose(1, 2).reshape(of["x"].shape)
    refused = ""
    try:
        bridge(pack, "flux").apply_adapter(model, adapters(pack).load_adapter(params["adapter"]), 1.0)
    except ValueError as error:
        refused = str(error)
    facts = {
        "nunchaku base unchanged": torch.equal(first, again),
        "nunchaku lora": [[Path(file).suffix, s] for file, s in deep.model.diffusion_model.loras],
        "nunchaku refused": refused,
        "nunchaku preview channels": deep.model.latent_format.latent_channels,
    }
    return {"nunchaku": found, "nunchaku wanted": wanted}, facts


# Core's own quantized files


def quantized(pack, tensors, params):
    """A merged DC-Gen file with fp8 or nvfp4 layers, against the same model with the expanded weights."""
    plain = load_model(pack, params["deep"])
    weights = {k: v.clone() for k, v in plain.model.diffusion_model.state_dict().items()}
    space = plain.model.dcgen.space
    inputs = {k: v for k, v in tensors.items() if k.startswith("deep")}
    folder = Path(params["folder"])
    release = bridge(pack, "release")
    out, facts = {}, {}
    for name, layout in (("float8_e4m3fn", "TensorCoreFP8Layout"), ("nvfp4", "TensorCoreNVFP4Layout")):
        file, expanded = _quantize(weights, name, layout, ("double_blocks", "single_blocks"))
        save_file(
            file, folder / f"{name}.safetensors", metadata={**space.to_metadata(), "dcgen.config": params["config"]}
        )
        save_file(expanded, folder / f"{name}-plain.safetensors", metadata=space.to_metadata())
        bridge(pack, "toy").folder_paths.add_model_folder_path("diffusion_models", str(folder))
        found = release.load_model(f"{name}.safetensors", "default", release.FROM_FILE)
        out |= cases(inputs, found, f"{name}-")
        out |= cases(inputs, release.load_model(f"{name}-plain.safetensors", "default", release.FROM_FILE), f"{name}=")
        block = found.model.diffusion_model.double_blocks[0].img_mlp[0].weight
        facts[name] = type(block).__name__
    return out, facts


def _quantize(weights, name, layout, parts):
    file, expanded = {}, dict(weights)
    for key, tensor in weights.items():
        file[key] = tensor
        if not (key.startswith(parts) and key.endswith(".weight") and tensor.ndim == 2):
            continue
        packed = comfy.quant_ops.QuantizedTensor.from_float(tensor.to(torch.bfloat16), layout, scale="recalculate")
        stem = key.removesuffix(".weight")
        file[key] = packed._qdata
        if name == "nvfp4":
            file[f"{stem}.weight_scale_2"] = packed._params.scale.float()
            file[f"{stem}.weight_scale"] = packed._params.block_scale.view(torch.uint8)
        else:
            file[f"{stem}.weight_scale"] = packed._params.scale.float()
        conf = json.dumps({"format": name, "full_precision_matrix_mult": True}).encode()
        file[f"{stem}.comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
        expanded[key] = packed.dequantize().to(tensor.dtype)
    return {k: v.contiguous() for k, v in file.items()}, {k: v.contiguous() for k, v in expanded.items()}
