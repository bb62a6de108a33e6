"""Run inside ComfyUI: SANA from every kind of file, its text, LoRA, DCGenApply, refusals."""

import importlib

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from flux import bridge, load_model, opened
from tamper import leave_no_room, left_out, note_places, places_of


def everything(pack, tensors, params):
    """In one process, whose start costs more than the work."""
    out, known = models(pack, tensors, params)
    found, known["text"] = text(pack, None, params["text"])
    return out | found, known


def velocities(patcher, cases):
    """The network's velocity through ComfyUI's own apply_model, which gives x0 = x - sigma * v."""
    comfy.model_management.load_models_gpu([patcher])
    out = {}
    for name, of in cases.items():
        conds = {"c_crossattn": of["context"], "attention_mask": of["mask"]}
        if "guidance" in of:
            conds["guidance"] = of["guidance"]
        x0 = patcher.model.apply_model(of["x"], of["sigma"], **conds)
        out[name] = (of["x"] - x0) / of["sigma"].reshape(-1, 1, 1, 1)
    return out


def cases(tensors, prefix):
    """{"prefix/case/tensor": ...} -> {"case": {"tensor": ...}} of one prefix."""
    found = {}
    for key, value in tensors.items():
        first, case, name = key.split("/")
        if first == prefix:
            found.setdefault(case, {})[name] = value
    return found


def named(prefix, tensors):
    return {f"{prefix}/{key}": value for key, value in tensors.items()}


def facts(patcher):
    model = patcher.model
    return {
        "channels": model.latent_format.latent_channels,
        "factor": model.dcgen.space.spatial_factor,
        "scaling": model.latent_format.scale_factor,
        "shift": model.model_sampling.shift,
        "schedule": model.dcgen.schedule.to_dict(),
    }


def models(pack, tensors, params):
    """Velocities of every model file; LoRA and adapter on the first."""
    out, known = {}, {}
    for folder in params["files"]:
        folder_paths.add_model_folder_path("diffusion_models", folder)
    release = bridge(pack, "release")
    for name, (where, dtype) in params["models"].items():
        if "/" in where:
            patcher = load_model(pack, where, dtype)
        else:
            patcher = release.load_model(where, dtype, params["autoencoder"])
        known[name] = facts(patcher)
        out |= named(name, velocities(patcher, cases(tensors, name)))
    base = load_model(pack, params["models"]["f32"][0])
    adapters = importlib.import_module(f"{pack}.dcgen.adapter")
    apply = bridge(pack, "apply").apply_adapter
    adapter = adapters.load_adapter(params["adapter"])
    lora = comfy.utils.load_torch_file(params["lora"])
    with_lora = comfy.sd.load_lora_for_models(base, None, lora, 0.7, 0)[0]
    deep = apply(base, adapter, 1.0)
    known["deep"] = facts(deep)
    turns = {
        "lora": (with_lora, "f32"),
        "deep": (deep, "deep"),
        "again": (base, "f32"),
        "aligned": (apply(base, adapter, 0.0), "deep"),
        "deep-lora": (apply(with_lora, adapter, 1.0), "deep"),
    }
    for name, (patcher, inputs) in turns.items():
        out |= named(name, velocities(patcher, cases(tensors, inputs)))
    known["said"] = refusals(pack, params, base, deep, adapter)
    known["shared"] = shared(base, deep)
    return out, known


def shared(base, deep):
    """Whether every weight but the embedder and head is the base's own memory."""
    ours, theirs = (dict(model.model.diffusion_model.state_dict()) for model in (deep, base))
    own = ("patch_embed.", "proj_out.", "scale_shift_table")
    return all(ours[key].data_ptr() == theirs[key].data_ptr() for key in theirs if not key.startswith(own))


def refusals(pack, params, base, deep, adapter):
    said = {}

    def attempt(name, call):
        try:
            call()
        except ValueError as error:
            said[name] = str(error)

    adapters, apply = importlib.import_module(f"{pack}.dcgen.adapter"), bridge(pack, "apply").apply_adapter
    sampling = bridge(pack, "sampling")
    attempt("f32 latent", lambda: sampling.check_latent(deep, {"samples": torch.zeros(1, 8, 2, 2)}))
    attempt("flux adapter", lambda: apply(base, adapters.load_adapter(params["flux_adapter"]), 1.0))
    attempt("sana adapter on flux", lambda: apply(load_model(pack, params["flux"]), adapter, 1.0))
    attempt("twice", lambda: apply(deep, adapter, 1.0))
    adapter.base = {**adapter.base, "num_layers": 19}
    attempt("base", lambda: apply(base, adapter, 1.0))
    text = {"cross_attn": torch.zeros(1, 300, 24), "attention_mask": torch.ones(1, 300)}
    check = bridge(pack, "guard").check_text
    attempt("not SANA's text", lambda: check({"positive": [text]}, base.model.dcgen))
    wide = {"cross_attn": torch.zeros(1, 77, 768), "dcgen_text": "sana"}
    attempt("other encoder", lambda: check({"negative": [wide]}, base.model.dcgen))
    joined = {**text, "cross_attn": torch.zeros(1, 600, 24), "dcgen_text": "sana"}
    attempt("joined", lambda: check({"positive": [joined]}, base.model.dcgen))
    return said


def text(pack, _tensors, params):
    """Conditioning of each prompt from the release's Gemma and from core's CLIP."""
    out, said = {}, {}
    sana_text = bridge(pack, "families.sana.text")
    clips = {"release": sana_text.load_sana_text(opened(pack, params["release"]))}
    sizes = {"gemma2_2b_model_config": {**params["sizes"], "vocab_size": 340}}
    kind = comfy.sd.CLIPType.LUMINA2
    clips["core"] = comfy.sd.load_clip([params["file"]], clip_type=kind, model_options=sizes)
    for name, clip in clips.items():
        for i, (prompt, instruction) in enumerate(params["prompts"]):
            ((cond, extra),) = sana_text.encode(
                clip, prompt, sana_text.INSTRUCTION if instruction is None else instruction
            )
            out |= {f"{name}/{i}/context": cond, f"{name}/{i}/mask": extra["attention_mask"]}
        plain = clip.encode_from_tokens(clip.tokenize("a red cat"), return_dict=True)["cond"]
        out[f"{name}/plain"] = plain
    for name in ("no_norm", "flux"):
        try:
            other = opened(pack, params[name])
            if name == "flux":
                flux = bridge(pack, "families.flux.text").load_flux_text(other)
                sana_text.encode(flux, "a red cat", "")
            else:
                sana_text.load_sana_text(other)
        except ValueError as error:
            said[name] = str(error)
    return out, {"said": said, "instruction": sana_text.INSTRUCTION}


def _base_and_deep(pack, params, dtype="default"):
    base = load_model(pack, params["release"], dtype)
    adapter = importlib.import_module(f"{pack}.dcgen.adapter").load_adapter(params["adapter"])
    return base, bridge(pack, "apply").apply_adapter(base, adapter, 1.0)


def constrained(pack, tensors, params):
    """torch.compile, then no room for weights: both in one process, in which the second cannot be undone."""
    out, known = compiled(pack, tensors, params)
    comfy.model_management.unload_all_models()
    found, known["partial"] = lowvram(pack, tensors, params)
    return out | found, known


def lowvram(pack, tensors, params):
    """Base and DC-Gen with a LoRA in turns, in float32 and in fp8, with every weight left offloaded."""
    lora = comfy.utils.load_torch_file(params["lora"])
    leave_no_room()
    out, partial = {}, []
    for dtype in ("default", "fp8_e4m3fn"):
        base, deep = _base_and_deep(pack, params, dtype)
        deep = comfy.sd.load_lora_for_models(deep, None, lora, 0.7, 0)[0]
        for turn in range(2):
            for name, patcher, owner in (("deep", deep, deep.base), ("base", base, base)):
                out |= named(f"{dtype}/{turn}/{name}", velocities(patcher, cases(tensors, name)))
                partial.append(left_out(owner))
    return out, partial


def placement(pack, tensors, params):
    """Where the layers of base and DC-Gen are while either has been loaded."""
    gpu, seen = note_places(), []
    base, deep = _base_and_deep(pack, params)
    base.load_device = gpu
    deep.load_device = deep.base.load_device = gpu
    for name in params["order"]:
        comfy.model_management.load_models_gpu([{"base": base, "deep": deep}[name]])
        own = [deep.model.diffusion_model.patch_embed.proj, deep.model.diffusion_model.proj_out]
        parts = [*base.model.diffusion_model.modules(), *(own if name == "deep" else ())]
        seen.append(places_of(parts, [deep, base, deep.base]))
    return {}, {"seen": seen, "device": str(gpu)}


def compiled(pack, tensors, params):
    """Sampled latents of base and DC-Gen as they are and through the core's torch.compile wrapper."""
    from torch._dynamo.utils import counters

    sampling, out, known = bridge(pack, "sampling"), {}, {}
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    for name, patcher in zip(("base", "deep"), _base_and_deep(pack, params), strict=True):
        of = cases(tensors, name)["square"]
        text = [[of["context"][:1], {"attention_mask": of["mask"][:1], "dcgen_text": "sana"}]]
        fast = patcher.clone()
        set_torch_compile_wrapper(model=fast, backend=params["backend"])
        for kind, model in (("plain", patcher), ("compiled", fast)):
            counters.clear()
            latent = {"samples": torch.zeros_like(of["x"][:1])}
            out[f"{kind}/{name}"] = sampling.sample(model, latent, sigmas, 3, "euler", text)["samples"]
            graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
            known[f"{kind}/{name}"] = {"graphs": graphs, "breaks": breaks}
    return out, {"compiled": known}
