"""Run inside ComfyUI: what core nodes do to a DC-Gen model, and to the same model without sharing (merged weights)."""

import importlib
import logging
import os
import traceback
from pathlib import Path

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch
from flux import bridge
from safetensors.torch import save_file
from tamper import any_width

STRENGTH = 0.8
COMPILER = "eager"  # captures the same graph as inductor, which takes minutes to compile it


def found(module, name):
    """A core node by the name of its class, wherever this core has it."""
    return getattr(importlib.import_module(f"comfy_extras.{module}"), name)


def call(node, *args, **kwargs):
    """A node of either API; what it returns as a tuple."""
    if hasattr(node, "execute"):
        return node.execute(*args, **kwargs).result
    made = node()
    return getattr(made, node.FUNCTION)(*args, **kwargs)


class Setting:
    """One family's models and inputs."""

    def __init__(self, pack, params, tensors):
        self.pack, self.params = pack, params
        self.x, self.noise = tensors["x"], tensors["noise"]
        self.release, self.apply = bridge(pack, "release"), bridge(pack, "apply").apply_adapter
        self.adapter = importlib.import_module(f"{pack}.dcgen.adapter").load_adapter(params["adapter"])
        self.extra = {key: tensors[key] for key in ("pooled_output", "attention_mask") if key in tensors}
        self.context = tensors["context"]
        if "attention_mask" in self.extra:
            self.extra["dcgen_text"] = "sana"
        for kind, folder in params["folders"].items():
            folder_paths.add_model_folder_path(kind, folder)

    def ours(self):
        return self.release.load_weights(Path(self.params["base"]), "default", self.release.FROM_FILE)

    def core(self):
        with any_width():
            return comfy.sd.load_diffusion_model(self.params["core"])

    def merged(self):
        return self.release.load_weights(Path(self.params["merged"]), "default", self.release.FROM_FILE)

    def over(self, base, strength=1.0):
        return self.apply(base, self.adapter, strength)

    def cond(self, hooks=None):
        cond = [[self.context, {"guidance": 3.5, **self.extra}]]
        return cond if hooks is None else comfy.hooks.set_hooks_for_conditioning(cond, hooks)

    def sample(self, model, hooks=None, steps=2):
        """As the core's samplers do it; (B,C,h,w)."""
        base = model.model.latent_format.latent_channels != self.noise.shape[1]
        noise = self.x if base else self.noise
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": self.cond(hooks)})
        sigmas = torch.linspace(1, 0, steps + 1)
        return guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
        )


# Operations: (setting, model) -> tensors by name. What they give on both models of a pair must be equal.


def plain(s, model):
    return {"": s.sample(model)}


def lora(s, model):
    return {"": s.sample(_with_lora(s, model))}


def _with_lora(s, model):
    file = comfy.utils.load_torch_file(s.params["lora"])
    return comfy.sd.load_lora_for_models(model, None, file, STRENGTH, 0)[0]


def _hook(s, strength=STRENGTH):
    return call(found("nodes_hooks", "CreateHookLora"), Path(s.params["lora"]).name, strength, 0.0)[0]


def hook_lora(s, model):
    """Equal to the ordinary LoRA, gone afterwards, and no model is harmed by another one's hooks."""
    before = s.sample(model)
    hooked = s.sample(model, _hook(s))
    return {"hooked": hooked, "after": s.sample(model), "before": before, "again": s.sample(model, _hook(s))}


def hook_on_lora(s, model):
    return {"": s.sample(_with_lora(s, model), _hook(s, 0.5))}


def keyframes(s, model):
    """Strength 0 in the first half, 1 in the second."""
    hooks = _hook(s)
    frames = None
    for multiplier, start in ((0.0, 0.0), (1.0, 0.5)):
        kwargs = {"prev_hook_kf": frames} if frames is not None else {}
        frames = call(found("nodes_hooks", "CreateHookKeyframe"), multiplier, start, **kwargs)[0]
    hooks = call(found("nodes_hooks", "SetHookKeyframes"), hooks, frames)[0]
    return {"": s.sample(model, hooks, steps=4)}


def compiled(s, model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    if model.model.latent_format.latent_channels != s.noise.shape[1]:
        return {}  # bases are core's business, and compiling takes seconds
    twin = model.clone(disable_dynamic=True) if hasattr(model, "is_dynamic") else model.clone()
    twin = _with_lora(s, twin)
    set_torch_compile_wrapper(model=twin, backend=COMPILER)
    torch._dynamo.reset()
    return {"": s.sample(twin, steps=1)}


def not_dynamic(s, model):
    if not hasattr(model, "is_dynamic"):
        return {"": s.sample(model.clone())}
    twin = _with_lora(s, model).clone(disable_dynamic=True)
    assert not twin.is_dynamic()
    return {"": s.sample(twin), "clone": s.sample(twin.clone()), "more": s.sample(_with_lora(s, twin))}


def second_device(s, model):
    if not hasattr(model, "deepclone_multigpu"):
        return {"": s.sample(model)}
    twin = _with_lora(s, model).deepclone_multigpu(new_load_device=model.load_device)
    assert twin.model is not model.model
    return {"": s.sample(twin), "original": s.sample(model)}


def compute_dtype(s, model):
    node = found("nodes_model_advanced", "ModelComputeDtype")
    return {dtype: s.sample(call(node, model, dtype)[0]) for dtype in ("fp32", "bf16", "default")}


def chosen_device(s, model):
    try:
        node = found("nodes_multigpu", "SelectModelDeviceNode")
    except ImportError:
        return {"": s.sample(model)}
    return {"": s.sample(call(node, model, "cpu")[0]), "default": s.sample(call(node, model, "default")[0])}


def saved(s, model):
    """Model Save, and the file loaded again."""
    from comfy_extras.nodes_model_merging import save_checkpoint

    out = {}
    for name, one in (("", model), ("with LoRA", _with_lora(s, model))):
        prefix = f"saved/{id(one)}"
        save_checkpoint(one, filename_prefix=prefix, output_dir=folder_paths.get_output_directory())
        (file,) = Path(folder_paths.get_output_directory(), "saved").glob(f"{id(one)}_*.safetensors")
        # The core's file does not say whose latents they are; the user chooses.
        importlib.import_module(f"{s.pack}.dcgen.spaces").SPACES["chosen"] = (
            bridge(s.pack, "latent_format").info_of(one).space
        )
        out[name] = s.sample(s.release.load_weights(file, "default", "chosen"))
    return out


def merge(s, model):
    """Half of the model, half of it with a LoRA: half of the LoRA."""
    node = found("nodes_model_merging", "ModelMergeSimple")
    return {"": s.sample(call(node, model, _with_lora(s, model), 0.5)[0])}


def subtract_add(s, model):
    minus, plus = (found("nodes_model_merging", name) for name in ("ModelSubtract", "ModelAdd"))
    difference = call(minus, _with_lora(s, model), model, 1.0)[0]
    return {"": s.sample(call(plus, model, difference)[0])}


def train(s, model):
    """Two steps of Train LoRA: what it learns, put on the model."""
    latent = {
        "samples": torch.ones_like(s.noise if model.model.latent_format.latent_channels == s.noise.shape[1] else s.x)
    }
    node = found("nodes_train", "TrainLoraNode")
    import inspect

    given = {
        "latents": [latent],
        "positive": [s.cond()],
        "batch_size": [1],
        "steps": [2],
        "grad_accumulation_steps": [1],
        "learning_rate": [0.01],
        "rank": [4],
        "optimizer": ["SGD"],
        "loss_function": ["MSE"],
        "seed": [0],
        "training_dtype": ["fp32"],
        "lora_dtype": ["fp32"],
        "algorithm": ["LoRA"],
        "gradient_checkpointing": [True],
        "existing_lora": ["[None]"],
        "bucket_mode": [False],
        "bypass_mode": [False],
        "offloading": [False],
        "quantized_backward": [False],
        "checkpoint_depth": [1],
    }
    names = set(inspect.signature(node.execute).parameters)
    torch.manual_seed(0)
    result = call(node, [model], **{key: value for key, value in given.items() if key in names})
    learnt = next(item for item in result if isinstance(item, dict) and "loss" not in item)
    names = sorted(learnt)
    return {
        "": s.sample(model),
        "loss": torch.tensor(next(i for i in result if isinstance(i, dict) and "loss" in i)["loss"]),
    }, names


def object_patch(s, model):
    """A module of a shared block exchanged, as packs do it; the base is untouched afterwards."""
    path = s.params["block"]
    twin = model.clone()

    class Halved(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = [inner]

        def forward(self, *args, **kwargs):
            return self.inner[0](*args, **kwargs) * 0.5

    inner = twin.get_model_object(path)
    twin.add_object_patch(path, Halved(inner))
    assert isinstance(twin.get_model_object(path), Halved)
    return {"patched": s.sample(twin), "after": s.sample(model)}


def weight_wrapper(s, model):
    twin = model.clone()
    twin.add_weight_wrapper(f"{s.params['block']}.weight", lambda weight: weight * 0.5)
    return {"wrapped": s.sample(twin), "after": s.sample(model)}


def injection(s, model):
    """A module's forward exchanged while the model is loaded."""
    from comfy.patcher_extension import PatcherInjection

    twin = model.clone()
    module = twin.get_model_object(s.params["block"])
    forward = module.forward

    def inject(_patcher):
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 0.5

    def eject(_patcher):
        module.forward = forward

    twin.set_injections("test", [PatcherInjection(inject, eject)])
    return {"injected": s.sample(twin), "after": s.sample(model)}


def bypass(s, model):
    load = getattr(comfy.sd, "load_bypass_lora_for_models", None)
    if load is None:
        return {"": s.sample(model)}
    twin = load(model, None, comfy.utils.load_torch_file(s.params["lora"]), STRENGTH, 0)[0]
    return {"bypassed": s.sample(twin), "after": s.sample(model)}


def walk(s, model):
    """Names of all modules and parameters, as packs read them off the network."""
    network = model.model.diffusion_model
    return {}, sorted({name for name, _ in network.named_modules()} | {name for name, _ in network.named_parameters()})


OPERATIONS = {
    function.__name__: function
    for function in (
        plain,
        lora,
        hook_lora,
        hook_on_lora,
        keyframes,
        not_dynamic,
        second_device,
        chosen_device,
        compute_dtype,
        saved,
        merge,
        subtract_add,
        train,
        object_patch,
        weight_wrapper,
        injection,
        bypass,
        walk,
        compiled,
    )
}


def everything(pack, tensors, params):
    """Every operation on every model; errors as text."""
    out, facts, said = {}, {}, {}
    for family, of in params["families"].items():
        s = Setting(pack, of, {k.split("/")[1]: v for k, v in tensors.items() if k.startswith(f"{family}/")})
        bases = {"ours": s.ours()} | ({"core": s.core()} if "core" in of else {})
        models = {f"{family}-{name}": base for name, base in bases.items()}
        models |= {f"{family}-over {name}": s.over(base) for name, base in bases.items()}
        models[f"{family}-merged"] = s.merged()
        for name, model in models.items():
            facts[name] = {"dynamic": bool(getattr(model, "is_dynamic", bool)())}
            for operation, function in OPERATIONS.items():
                if params.get("only") and operation not in params["only"]:
                    continue
                try:
                    made = function(s, model)
                except Exception:
                    said[f"{name}/{operation}"] = traceback.format_exc()[-1500:]
                    logging.error("%s of %s:\n%s", operation, name, traceback.format_exc())
                    continue
                if isinstance(made, tuple):
                    made, facts[name][operation] = made
                out |= {f"{name}/{operation}/{key}": value.clone() for key, value in made.items()}
    return out, {"facts": facts, "said": said}


def text_encoders(pack, _tensors, params):
    """A LoRA on the text encoders: as an ordinary one, and as hooks, which come and go."""
    release, out = bridge(pack, "release"), {}
    folder_paths.add_model_folder_path("loras", params["loras"])
    for name, folder in params["releases"].items():
        clip = release.load_text(release.Release(Path(folder)))
        weights = {
            key: value
            for key, value in clip.cond_stage_model.state_dict().items()
            if key.endswith((".q_proj.weight", ".SelfAttention.q.weight"))
        }
        lora, generator = {}, torch.Generator().manual_seed(0)
        for key, weight in weights.items():
            path = f"text_encoders.{key.removesuffix('.weight')}"
            lora[f"{path}.lora_A.weight"] = torch.randn((4, weight.shape[1]), generator=generator) * 0.3
            lora[f"{path}.lora_B.weight"] = torch.randn((weight.shape[0], 4), generator=generator) * 0.3
        file = Path(params["loras"]) / f"{name}-text.safetensors"
        save_file(lora, file)
        encode = params["encoders"][name]

        def run(clip, encode=encode):
            if encode == "sana":
                ((cond, _),) = bridge(pack, "families.sana.text").encode(clip, "a red cat", "instruction ")
            else:
                ((cond, _),) = clip.encode_from_tokens_scheduled(clip.tokenize("a red cat"))
            return cond.float()

        hooks = call(found("nodes_hooks", "CreateHookLora"), file.name, 0.0, STRENGTH)[0]
        hooked = call(found("nodes_hooks", "SetClipHooks"), clip, False, False, hooks)[0]
        with_lora = comfy.sd.load_lora_for_models(None, clip, dict(lora), 0, STRENGTH)[1]
        for turn, one in {"plain": clip, "hooked": hooked, "lora": with_lora, "after": clip, "again": hooked}.items():
            out[f"{name}/{turn}"] = run(one).clone()
    return out, {}


def stray_paths(pack, _tensors, params):
    """What loaders open of paths that are on no list, absolute and relative, and whether a listed one opens."""
    nodes = importlib.import_module(f"{pack}.nodes")
    bridge(pack, "toy").register()
    folder = Path(params["folder"])
    release = bridge(pack, "release")
    finders = {
        "release": (release.find_release, "elsewhere"),
        "model": (release.model_path, "elsewhere"),
        "autoencoder": (bridge(pack, "vae_files").path_of, "ae"),
        "adapter": (importlib.import_module(f"{pack}.nodes.model")._adapter_path, "mine.safetensors"),
    }
    opened = []
    for kind, (find, name) in finders.items():
        root = Path(folder_paths.models_dir, "diffusers")
        relative = Path(os.path.relpath(folder / name, root)).as_posix()
        for stray in (str(folder / name), relative, f"toy/../{relative}"):
            try:
                opened.append([kind, stray, str(find(stray))])
            except (ValueError, FileNotFoundError):
                continue
    good = str(release.find_release("toy/flux-base"))
    return {}, {"opened": opened, "good": good, "nodes": len(nodes.NODES)}


def surface(pack, _tensors, _params):
    """Methods and attributes of the installed core's patchers that overlay.py's tables do not name, or name twice."""
    from comfy.model_patcher import ModelPatcher

    owners = importlib.import_module(f"{pack}.nodes.bridge.owners")
    kinds = [ModelPatcher, getattr(comfy.model_patcher, "ModelPatcherDynamic", ModelPatcher)]
    plain = set(vars(type("Empty", (), {}))) | {"__annotations__"}
    methods = {name for kind in kinds for name in vars(kind)} - plain
    model = torch.nn.Linear(1, 1)
    device = comfy.model_management.get_torch_device()
    attributes = {name for kind in kinds for name in vars(kind(model, device, torch.device("cpu")))}
    out = {}
    for title, names, table in (
        ("methods", methods, owners.OWNERS),
        ("attributes", attributes, owners.ATTRIBUTES),
    ):
        groups = list(table.values())
        decided = set().union(*groups)
        twice = sorted(name for name in decided if sum(name in group for group in groups) > 1)
        out[title] = {"undecided": sorted(names - decided), "twice": twice, "count": len(names)}
    return {}, out
