"""Run inside ComfyUI: models that other packs load, as stand-ins that behave alike, and DC-Gen on them."""

import json
import logging
from pathlib import Path

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from apply import adapters
from flux import bridge, cases, release_of, velocity
from safetensors.torch import load_file

GROUP = 32
BLOCKS = ("double_blocks.", "single_blocks.")


def everything(pack, tensors, params):
    out, facts = {}, {}
    for part in (gguf, nunchaku, lora):
        found, facts[part.__name__] = part(pack, tensors, params)
        out |= {f"{part.__name__}/{key}": value for key, value in found.items()}
        comfy.model_management.unload_all_models()
    return out, facts


def _load(pack, params, kind="release", options=None, disable_dynamic=False):
    release = __import__(f"{pack}.dcgen.release", fromlist=["open_model"])
    source = release.open_model(release_of(pack, params[kind]))
    return bridge(pack, "loader").load(source, options=options or {}, disable_dynamic=disable_dynamic), source


def _apply(pack, model, file, strength=1.0):
    return bridge(pack, "apply").apply_adapter(model, adapters(pack).load_adapter(file), strength)


def _with_lora(model, file, strength=0.7):
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(file), strength, 0)[0]


# ComfyUI-GGUF: core's Flux on layers whose weight is packed bytes, expanded at each call, patched after that ----------


class Packed(torch.Tensor):
    """Rows of 32 int8 and one float32 scale, which tells its unpacked shape and carries its own patches."""

    @staticmethod
    def __new__(cls, data, shape=None, patches=()):
        return data.as_subclass(cls)

    def __init__(self, data, shape=None, patches=()):
        self.unpacked, self.patches = torch.Size(shape), list(patches)

    def to(self, *args, **kwargs):
        return Packed(super().to(*args, **kwargs).as_subclass(torch.Tensor), self.unpacked, self.patches)

    def clone(self, *args, **kwargs):
        return self

    def detach(self):
        return self

    @property
    def shape(self):
        return self.unpacked if hasattr(self, "unpacked") else self.size()

    @classmethod
    def pack(cls, weight):
        groups = weight.reshape(weight.shape[0], -1, GROUP)
        scale = groups.abs().amax(-1, keepdim=True) / 127
        codes = (groups / scale).round().to(torch.int8)
        data = torch.cat((codes.view(torch.uint8), scale.contiguous().view(torch.uint8)), -1).flatten(1)
        return cls(data, weight.shape)

    def expand_weight(self):
        groups = self.as_subclass(torch.Tensor).reshape(self.unpacked[0], -1, GROUP + 4)
        scale = groups[..., GROUP:].contiguous().view(torch.float32)
        return (groups[..., :GROUP].contiguous().view(torch.int8) * scale).reshape(self.unpacked)


class PackedOps(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *args):
            weight, bias = state_dict[f"{prefix}weight"], state_dict.get(f"{prefix}bias")
            weight = Packed.pack(weight) if weight.shape[1] % GROUP == 0 else weight
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            # The real one, too, saves shapes only, for the estimate of memory.
            for name, value in (("weight", self.weight), ("bias", self.bias)):
                if value is not None:
                    destination[f"{prefix}{name}"] = torch.empty(value.shape, dtype=value.dtype, device="meta")

        def forward_comfy_cast_weights(self, x):
            weight = self.weight
            if isinstance(weight, Packed):
                moved = weight.to(x.device)
                weight = moved.expand_weight().to(x.dtype)
                for patches, key in moved.patches:
                    weight = comfy.lora.calculate_weight(patches, weight, key)
            return torch.nn.functional.linear(x, weight, self.bias)


class GGUFModelPatcher(comfy.model_patcher.ModelPatcher):
    """A patch on a packed weight is hung on the tensor, never baked in; clones are of this class whatever they were."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        weight = comfy.utils.get_attr(self.model, key)
        if not isinstance(weight, Packed):
            return super().patch_weight_to_device(key, device_to, inplace_update)
        if key in self.patches:
            moved = weight.to(device_to)
            moved.patches = [(self.patches[key], key)]
            comfy.utils.set_attr_param(self.model, key, moved)
        return None

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for weight in self.model.parameters() if unpatch_weights else ():
            if isinstance(weight, Packed):
                weight.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        return super().load(*args, force_patch_weights=True, **kwargs)

    def clone(self, *args, **kwargs):
        kind, self.__class__ = self.__class__, GGUFModelPatcher
        twin = super().clone(*args, **kwargs)
        self.__class__ = kind
        return twin


def gguf(pack, tensors, params):
    # A plain patcher writes into the weights, which are read-only in a dynamic one's.
    plain, _ = _load(pack, params, options={"custom_operations": PackedOps}, disable_dynamic=True)
    model = GGUFModelPatcher(plain.model, plain.load_device, plain.offload_device)
    # The same weights, expanded, under core's own layers.
    other, _ = _load(pack, params)
    packed = {
        name: part for name, part in model.model.named_modules() if isinstance(getattr(part, "weight", 0), Packed)
    }
    for name, part in packed.items():
        comfy.utils.set_attr_param(other.model, f"{name}.weight", part.weight.expand_weight())
    of = {kind: {k: v for k, v in tensors.items() if k.startswith(kind)} for kind in ("base", "deep")}
    out = {}
    for prefix, base in (("packed-", model), ("expanded-", other)):
        deep = _apply(pack, base, params["adapter"])
        models = {
            "base": (base, of["base"]),
            "deep": (deep, of["deep"]),
            "lora": (_with_lora(deep, params["lora"]), of["deep"]),
            "before": (_apply(pack, _with_lora(base, params["lora"]), params["adapter"]), of["deep"]),
            "aligned": (_apply(pack, base, params["adapter"], 0.0), of["deep"]),
        }
        for turn, name in enumerate(("deep", "base", "lora", "aligned", "before", "base")):
            found, inputs = models[name]
            out |= cases(inputs, found, f"{prefix}{turn}-{name}-")
        base_patchers = type(deep.base).__name__, type(deep.clone().base).__name__
        if base is model:
            _attempt(said := {}, "hook", lambda: deep.clone().add_hook_patches(None, {}))  # noqa: B023
            still = sum(_is_packed(model, name) for name in packed)
            facts = {"said": said, "base_patchers": base_patchers, "packed": len(packed), "still": still}
    return out, facts


def _is_packed(model, name):
    return isinstance(model.model.get_submodule(name).weight, Packed)


# ComfyUI-nunchaku: a wrapper with that class name around a transformer with diffusers names ------------------------


class Answer:
    def __init__(self, sample):
        self.sample = sample


class Tail(torch.nn.Module):
    def forward(self, x, vec):
        self.vec = vec
        return x


class Transformer(torch.nn.Module):
    """Embedder, last norm and head are plain layers; the blocks (C++ there) are core's, out of sight.

    LoRA: blocks by rank concatenation there, by core's arithmetic on the blocks' own weights here, whatever core's
    patchers do; ranks and groups are checked as the real converter's asserts would. config never changes; in_channels
    is not read by forward.
    """

    def __init__(self, config, weights, hidden):
        super().__init__()
        self.config = config
        self.comfy_lora_meta_list, self.comfy_lora_sd_list, self.composed = [], [], 0
        self.unpatched = {}
        width = config["num_attention_heads"] * config["attention_head_dim"]
        self.x_embedder = torch.nn.Linear(config["in_channels"], width)
        self.proj_out = torch.nn.Linear(width, config["in_channels"])
        self.norm_out = torch.nn.Module()
        self.norm_out.linear = torch.nn.Linear(width, 2 * width)
        self.load_state_dict(weights)
        self.__dict__["hidden"] = hidden
        hidden.model.diffusion_model.img_in = torch.nn.Identity()
        hidden.model.diffusion_model.final_layer = Tail()

    def update_lora_params(self, composed):
        self.composed += 1
        for key, weight in self.unpatched.items():
            comfy.utils.set_attr_param(self.hidden.model, key, weight)
        patched = self.hidden.clone()
        keys = comfy.lora.model_lora_keys_unet(patched.model, {})
        patched.add_patches(comfy.lora.load_lora({f"transformer.{k}": v for k, v in composed.items()}, keys))
        self.unpatched = {key: comfy.utils.get_attr(patched.model, key) for key in patched.patches}
        for key, weight in self.unpatched.items():
            changed = comfy.lora.calculate_weight(patched.patches[key], weight.clone(), key)
            comfy.utils.set_attr_param(patched.model, key, changed)

    def forward(
        self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance, **_
    ):
        core = self.hidden.model.diffusion_model
        x = self.x_embedder(hidden_states)
        text = encoder_hidden_states, txt_ids
        x = core.forward_orig(x, img_ids, *text, timestep, pooled_projections, guidance)
        scale, shift = self.norm_out.linear(torch.nn.functional.silu(core.final_layer.vec)).chunk(2, dim=-1)
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return Answer(self.proj_out(x))


def compose(loras):
    """Files with strengths into one set of names; refuses what the real converter refuses."""
    composed = {}
    for tensors, strength in loras:
        assert all(key.startswith("transformer.") for key in tensors), "0 layers, silently"
        pairs = {key.removeprefix("transformer."): value for key, value in tensors.items()}
        for key, value in pairs.items():
            module = key.rpartition(".lora_")[0]
            for one, rest in (("to_q", ("to_k", "to_v")), ("net.2", ("net.0.proj",)), ("proj_out", ("proj_mlp",))):
                for other in rest if module.endswith(one) else ():
                    partner = module.removesuffix(one) + other
                    if f"{partner}.lora_A.weight" not in pairs:
                        raise KeyError(f"{partner} is missing beside {module}")
            assert min(value.shape) % 16 == 0 or "lora" not in key, f"rank of {key}"
            kept = composed.get(key)
            if key.endswith("lora_B.weight"):
                value = value * strength
            composed[key] = value if kept is None else torch.cat((kept, value), int(key.endswith("lora_B.weight")))
    return composed


class ComfyFluxWrapper(torch.nn.Module):
    """What a patch meets of the real wrapper: config read at each call, list of LoRA files, custom forward, context."""

    def __init__(self, model, config, ctx_for_copy):
        super().__init__()
        self.model, self.config, self.loras, self.ctx_for_copy = model, config, [], ctx_for_copy
        self.dtype = next(model.parameters()).dtype
        self.pulid_pipeline, self.customized_forward, self.forward_kwargs = None, None, {}
        self._prev_timestep = self._cache_context = None

    def forward(self, x, timestep, context, y, guidance, control=None, transformer_options=None, **kwargs):
        model, p = self.model, self.config.get("patch_size", 2)
        assert isinstance(model, Transformer)
        b, c, h, w = x.shape
        rows, columns = (h + p // 2) // p, (w + p // 2) // p
        tokens = x.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
        if self.loras != model.comfy_lora_meta_list:
            model.comfy_lora_meta_list = list(self.loras)
            model.comfy_lora_sd_list = [load_file(file) for file, _ in self.loras]
            strengths = [strength for _, strength in self.loras]
            model.update_lora_params(compose(list(zip(model.comfy_lora_sd_list, strengths, strict=True))))
        given = {
            "hidden_states": tokens,
            "encoder_hidden_states": context,
            "pooled_projections": y,
            "timestep": timestep,
            "img_ids": ids.expand(b, -1, -1),
            "txt_ids": torch.zeros(b, context.shape[1], 3),
            "guidance": guidance if self.config["guidance_embed"] else None,
            "controlnet_block_samples": None,
            "controlnet_single_block_samples": None,
        }
        call = self.customized_forward
        out = (model(**given) if call is None else call(model, **given, **self.forward_kwargs)).sample
        self._prev_timestep = timestep.flatten()[0].item()
        return out.reshape(b, rows, columns, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def rebuilt(model, lora, strength):
    """As nunchaku's LoRA node: a new wrapper and patcher out of the wrapper's context."""
    wrapper = model.model.diffusion_model
    assert isinstance(wrapper, ComfyFluxWrapper)
    context = wrapper.ctx_for_copy
    fresh = ComfyFluxWrapper(wrapper.model, dict(context["comfy_config"]["model_config"]), context)
    base = context["model_config"].get_model({})
    base.diffusion_model = fresh
    fresh.loras = [*wrapper.loras, (lora, strength)]
    return comfy.model_patcher.ModelPatcher(base, context["device"], context["device"])


def nunchaku_model(pack, params):
    """A MODEL as nunchaku's loader gives it, of the tiny release in `params`."""
    hidden, source = _load(pack, params)
    config = json.loads((Path(params["release"]) / "transformer" / "config.json").read_text())
    head = ("x_embedder.", "proj_out.", "norm_out.")
    transformer = Transformer(config, {k: source.get(k) for k in source.entries if k.startswith(head)}, hidden)
    unet = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "guidance_embed": True}
    unet |= {"depth": 2, "depth_single_blocks": 2, "hidden_size": 32, "disable_unet_model_creation": True}
    model_config = comfy.supported_models.Flux(dict(unet))
    model_config.set_inference_dtype(torch.float32, None)
    model_config.custom_operations = None
    context = {"comfy_config": {"model_config": unet}, "model_config": model_config, "device": torch.device("cpu")}
    base = model_config.get_model({})
    base.diffusion_model = ComfyFluxWrapper(transformer, dict(unet), context)
    return comfy.model_patcher.ModelPatcher(base, context["device"], context["device"])


def nunchaku(pack, tensors, params):
    model = nunchaku_model(pack, params)
    transformer = model.model.diffusion_model.model
    own = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    user = rebuilt(model, params["lora"], 0.7)
    models = {
        "base": model,
        "half": _apply(pack, model, params["adapter"], 0.5),
        "aligned": _apply(pack, model, params["adapter"], 0.0),
        "user": user,
        "before": _apply(pack, user, params["adapter"], 1.0),
        "partial": _apply(pack, model, params["partial"], 1.0),
    }
    # The same partial adapter under core's own layers: it also has LoRA on the layer that it brings whole.
    other, _ = _load(pack, params)
    models["partial core"] = _apply(pack, other, params["partial"], 1.0)
    out = {}
    for turn, name in enumerate(
        ("half", "base", "aligned", "user", "before", "base", "partial", "partial core", "base")
    ):
        kind = "base" if name in ("base", "user") else "deep"
        of = {k: v for k, v in tensors.items() if k.startswith(kind)}
        out |= cases(of, models[name], f"{turn}-{name}-")
    model.model.diffusion_model.customized_forward = _stop
    broken = _apply(pack, model, params["adapter"], 0.5)
    model.model.diffusion_model.customized_forward = None
    said = {}
    of = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith("deep4x4/")}
    _attempt(
        said,
        "failing forward",
        lambda: velocity(broken, of["x"], of["sigma"], of["context"], of["pooled"], of["guidance"]),
    )
    _attempt(said, "lora after", lambda: rebuilt(models["half"], params["lora"], 1.0))
    for name in ("odd", "large"):
        _attempt(said, name, lambda file=params[name]: _apply(pack, model, file))
    _attempt(said, "crowded", lambda: _apply(pack, rebuilt(model, params["user80"], 1.0), params["rank256"]))
    deep = models["half"]
    return out, {
        "said": said,
        "kept": all(transformer.get_submodule(name) is layer for name, layer in own.items()),
        "base config": [model.model.diffusion_model.config[key] for key in ("patch_size", "in_channels")],
        "latent": [
            deep.model.latent_format.latent_channels,
            deep.model.memory_usage_factor / model.model.memory_usage_factor,
        ],
        "lora": [[Path(file).suffix, strength] for file, strength in models["before"].model.diffusion_model.loras],
        "core lora": _said(lambda: _with_lora(deep, params["lora"])),
        "composed": transformer.composed,
    }


def _stop(model, **kwargs):
    raise ValueError(f"stopped with {model.x_embedder.in_features} channels")


def _attempt(said, name, call):
    try:
        call()
    except ValueError as error:
        said[name] = str(error)


# A user's LoRA through core's loader ---------------------------------------------------------------------------


class _Ears(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append([record.levelname, record.getMessage()])


def _said(call):
    """Lines about LoRA, and errors, in the log while `call` runs."""
    ears, log = _Ears(), logging.getLogger()
    level = log.level
    log.addHandler(ears)
    log.setLevel(logging.INFO)
    call()
    log.removeHandler(ears)
    log.setLevel(level)
    return [line for line in ears.lines if line[1].startswith("LoRA") or line[0] == "ERROR"]


def lora(pack, tensors, params):
    base, _ = _load(pack, params)
    models = {"adapter": _apply(pack, base, params["adapter"]), "merged": _load(pack, params, "deep")[0]}
    size = models["adapter"].model_size(), base.model_size()
    of = {k: v for k, v in tensors.items() if k.startswith("deep")}
    out, said = {}, {}
    for model_name, model in models.items():
        for file in ("lora", "ends"):
            name = f"{model_name}-{file}"
            said[name] = _said(lambda: out.update(cases(of, _with_lora(model, params[file]), f"{name}-")))  # noqa: B023
        out |= cases(of, model, f"{model_name}-none-")
    return out, {"said": said, "size": size}
