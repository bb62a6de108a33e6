"""The overlay: a MODEL with a new embedder and head that shares all other weights with the base's MODEL.

DCGenApply's result has to meet two conditions. Core reads a model's latent format, memory factor and network directly
from `patcher.model`, before and after any patch is applied, so the DC-Gen model needs a BaseModel of its own. And the
shared blocks must be loaded, offloaded and patched by one owner only, or base and DC-Gen would move each other's
weights. So the new BaseModel (the overlay) holds only the new layers, and its network looks everything else up in the
base's network. Its patcher has a clone of the base's patcher as an "additional model": core loads that beside it, and
swaps it with the base by its own rules for clones.

owners.py lists which of the two patchers handles each method and attribute of core's patchers; a test walks the
installed core and fails on a name that is not listed. When core needs a model with weights that nothing else uses
(hooks and torch.compile under dynamic VRAM, training, a second GPU), it gets a copy through `cached_patcher_init`: the
base loaded again with the new layers in place of its own, an ordinary model without sharing.
"""

from __future__ import annotations

import contextlib
import inspect
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
from torch import Tensor, nn

from . import lora
from .loading import is_dynamic
from .owners import ATTRIBUTES, OWNERS

BASE = "dcgen_base"  # key of the base's patcher among the additional models
NETWORK = "diffusion_model."
Ends = Mapping[str, Any]
"""What an overlay has instead of the base, by path in the network: layers, parameters and plain attributes. ABSENT
removes what the base has there: in some families the embedder and head have other names on another latent."""
ABSENT = object()

_own_only: ContextVar[bool] = ContextVar("dcgen_own_only", default=False)


@contextlib.contextmanager
def own_layers_only() -> Iterator[None]:
    """Within this context, iterating over the modules of an overlay gives its own layers only, not the base's."""
    token = _own_only.set(True)
    try:
        yield
    finally:
        _own_only.reset(token)


class Overlay(nn.Module):
    """Mixin: has its own layers, and looks up everything else (modules, buffers, attributes) in the base each time.

    Iterating over modules and parameters gives both. Moving it (`to`) moves its own layers only.
    """

    def __getattr__(self, name: str) -> Any:
        for store in ("_parameters", "_buffers", "_modules"):
            if name in self.__dict__.get(store, ()):
                return self.__dict__[store][name]
        if "_base" not in self.__dict__ or name in self.__dict__["_absent"]:
            raise AttributeError(name)
        return getattr(self.__dict__["_base"], name)

    def named_modules(self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True):
        memo = set() if memo is None else memo
        seen = set()
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            seen.add(name)
            yield name, module
        if _own_only.get():
            return
        for name, module in self._base.named_modules(None, prefix, remove_duplicate):
            if name not in seen and not (remove_duplicate and module in memo) and not self._lacks(name, prefix):
                memo.add(module)
                yield name, module

    def named_children(self):
        yield from super().named_children()
        if not _own_only.get():
            shared = (child for child in self._base.named_children() if not self._lacks(child[0]))
            yield from ((name, module) for name, module in shared if name not in self._modules)

    def _lacks(self, name: str, prefix: str = "") -> bool:
        """Whether a tensor or module of the base, by its path after `prefix`, is ABSENT here."""
        path = name[len(prefix) :].removeprefix(".")
        if path.partition(".")[0] in self._absent:
            return True
        part = self._modules.get(path.partition(".")[0])
        return isinstance(part, Overlay) and part._lacks(path.partition(".")[2])

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        with own_layers_only():
            return super()._apply(*args, **kwargs)

    def state_dict(self, *args: Any, destination: dict | None = None, prefix: str = "", keep_vars: bool = False):
        """All keys, own and shared: LoRA loaders look keys up here, and saving writes the whole model."""
        kwargs: Any = {"destination": destination, "prefix": prefix, "keep_vars": keep_vars}
        own: Any = super().state_dict(*args, **kwargs)
        for key, value in self._base.state_dict(prefix=prefix, keep_vars=keep_vars).items():
            if not self._lacks(key, prefix):
                own.setdefault(key, value)
        return own


class OverlaySequence(Overlay):
    """Mixin for nn.Sequential and nn.ModuleList, which are accessed by iteration and index."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self._modules.get(name, module) for name, module in self._base._modules.items()])

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def overlay(base: nn.Module, ends: Ends) -> nn.Module:
    """A module of the base's class with `ends` (by dotted path) in place of the base's parts; it shares the rest."""
    mixin = OverlaySequence if isinstance(base, (nn.Sequential, nn.ModuleList)) else Overlay
    kind: Any = type(type(base).__name__, (mixin, type(base)), {})
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.__dict__["_base"] = base  # not a registered child: the base's own patcher moves it
    module.__dict__["_absent"] = {path for path, value in ends.items() if value is ABSENT}
    inner: dict[str, dict[str, Any]] = {}
    for path, value in ends.items():
        name, _, rest = path.partition(".")
        if rest:
            inner.setdefault(name, {})[rest] = value
        elif name in module._absent:
            continue
        elif isinstance(value, nn.Parameter):  # setattr refuses it: the base has a module or attribute of that name
            module._parameters[name] = value
        else:
            setattr(module, name, value)
    for name, part in inner.items():
        setattr(module, name, overlay(getattr(base, name), part))
    return module.eval()


def replace_ends(network: nn.Module, ends: Ends) -> None:
    """Put `ends` into a network that nothing else shares."""
    for path, value in ends.items():
        parent, _, name = path.rpartition(".")
        if value is ABSENT:
            delattr(network.get_submodule(parent), name)
        else:
            setattr(network.get_submodule(parent), name, value)


class OverlayPatcher(lora.Reporting):
    """Mixin for core's patchers: passes calls to the overlay or to the base, by OWNERS."""

    load_device: Any
    offload_device: Any
    size: int

    @property
    def base(self) -> comfy.model_patcher.ModelPatcher:
        """This patcher's own clone of the base's patcher."""
        return self.get_additional_models_with_key(BASE)[0]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ATTRIBUTES["both"] and self.__dict__.get("additional_models", {}).get(BASE):
            setattr(self.base, name, value)

    def owner(self, name: str) -> comfy.model_patcher.ModelPatcher:
        """The patcher that owns a weight, module or attribute, by its name in the BaseModel."""
        node = self.model
        for part in name.split("."):
            if isinstance(node, Overlay) and not any(part in store for store in _stores(node)):
                # Plain attributes and methods belong to the overlay: setting one must not change the base.
                return self.base if any(part in store for store in _stores(node._base)) else self
            node = getattr(node, part, None)
        return self

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights that are not shared."""
        with own_layers_only():
            return {key: tuple(value.shape) for key, value in self.model.named_parameters()}

    def model_size(self) -> int:
        """Bytes of the new layers."""
        if not self.size:
            with own_layers_only():
                self.size = sum(value.nbytes for value in (*self.model.parameters(), *self.model.buffers()))
        return self.size

    def _add_patches(self, patches: Mapping, *strengths: float) -> list:
        own = {key: value for key, value in patches.items() if self.owner(lora.weight_name(key)) is self}
        shared = {key: value for key, value in patches.items() if key not in own}
        self.patches_uuid = uuid.uuid4()
        added = super()._add_patches(own, *strengths) if own else []
        return added + (self.base.add_patches(shared, *strengths) if shared else [])

    def get_key_patches(self, filter_prefix: str | None = None) -> dict:
        """Weights with their patches, own and shared (model merging and saving read these)."""
        shared = self.base.get_key_patches(filter_prefix)
        own = {key: value for key, value in super().get_key_patches(filter_prefix).items() if self.owner(key) is self}
        return {**shared, **own}

    def set_model_compute_dtype(self, dtype: Any) -> None:
        """As in core; the shared layers must cast their weights too."""
        super().set_model_compute_dtype(dtype)
        self.base.patches_uuid = uuid.uuid4()

    def clone_has_same_weights(self, clone: Any, *args: Any, **kwargs: Any) -> bool | None:
        same = super().clone_has_same_weights(clone, *args, **kwargs)
        other = clone.base if isinstance(clone, OverlayPatcher) else None
        return same and other is not None and self.base.clone_has_same_weights(other, *args, **kwargs)

    def register_load_device(self, device: Any) -> None:
        super().register_load_device(device)
        if self.additional_models.get(BASE):  # not set yet during construction
            self.base.register_load_device(device)

    def use_ejected(self, *args: Any, **kwargs: Any) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(super().use_ejected(*args, **kwargs))
        stack.enter_context(self.base.use_ejected(*args, **kwargs))
        return stack

    def model_patches_models(self) -> list:
        """Models that core loads together with this one, also outside sampling."""
        return [*super().model_patches_models(), self.base]

    def clone(self, *args: Any, **kwargs: Any) -> comfy.model_patcher.ModelPatcher:
        """As in core: on the same base, or (disable_dynamic, force_deepcopy, a given model) a model without sharing."""
        if kwargs.get("force_deepcopy") and self.cached_patcher_init is None:
            raise NoCopyError(self.base)
        clone = super().clone(*args, **kwargs)
        return clone if clone.model is self.model else _standalone(clone, self.base)


class NoCopyError(ValueError, RuntimeError):
    """The base cannot be loaded a second time. Core's nodes catch RuntimeError here."""

    def __init__(self, base: comfy.model_patcher.ModelPatcher) -> None:
        super().__init__(
            "this node needs a copy of the model with weights of its own, and the loader of the base under Apply "
            f"DC-Gen (a {type(base).__name__}) offers no way to load it a second time. Load the base with Load "
            "Diffusion Model, Load Checkpoint or Load Release (DC-Gen)."
        )


def _stores(module: nn.Module) -> tuple[Mapping[str, Any], ...]:
    return module._modules, module._parameters, module._buffers


def _standalone(clone: Any, base: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A patcher whose model owns all its weights, with the state of the overlay's and the base's patchers."""
    core = comfy.model_patcher
    clone.__class__ = core.ModelPatcherDynamic if clone.is_dynamic() else core.ModelPatcher
    lora.with_report(clone)
    clone.size = 0
    clone.remove_additional_models(BASE)
    for key, patches in base.patches.items():
        clone.patches.setdefault(key, []).extend(patches)
    for key, wrappers in base.weight_wrapper_patches.items():
        clone.weight_wrapper_patches.setdefault(key, []).extend(wrappers)
    for name, value in base.object_patches.items():
        if name.startswith(NETWORK):
            clone.object_patches.setdefault(name, value)
    for key, injections in base.injections.items():
        clone.injections.setdefault(key, []).extend(injections)
    return clone


def _of_own_layers(method: Callable) -> Callable:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with own_layers_only():
            return method(self, *args, **kwargs)

    return call


def _of_owner(name: str, method: Callable) -> Callable:
    first = list(inspect.signature(method).parameters)[1]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner(args[0] if args else kwargs[first])
        return method(self, *args, **kwargs) if owner is self else getattr(owner, name)(*args, **kwargs)

    return call


def _of_base(name: str) -> Callable:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.base, name)(*args, **kwargs)

    return call


@cache
def _overlay_kind(kind: type, mixin: type) -> type:
    """Core's patcher class `kind` for an overlay; methods that OverlayPatcher defines itself are not generated."""
    methods: dict[str, Callable] = {}
    for name in OWNERS["own layers"] - {"__del__"} - set(vars(OverlayPatcher)):
        if hasattr(kind, name):
            methods[name] = _of_own_layers(getattr(kind, name))
    methods |= {name: _of_owner(name, getattr(kind, name)) for name in OWNERS["by name"] if hasattr(kind, name)}
    methods |= {name: _of_base(name) for name in OWNERS["base"]}
    return type(f"Overlay{kind.__name__}", (mixin, kind), methods)


def overlay_patcher(
    base: comfy.model_patcher.ModelPatcher, network: nn.Module, config: Any, mixin: type = OverlayPatcher
) -> comfy.model_patcher.ModelPatcher:
    """Wrap `network`, an overlay on the base's, in a BaseModel of the base's class with `config`, and that in a core
    patcher with `mixin` (OverlayPatcher or a subclass).

    Options, wrappers, callbacks and the sampling object that were set on the base's MODEL are taken over.
    """
    core, base_model, shared = comfy.model_patcher, base.model, base.clone()
    config.unet_config = {**config.unet_config, "disable_unet_model_creation": True}
    model = type(base_model)(config, model_type=base_model.model_type, device=base.offload_device)
    config.unet_config = {k: v for k, v in config.unet_config.items() if k != "disable_unet_model_creation"}
    model.model_config = config
    model.diffusion_model = network
    kind = core.ModelPatcherDynamic if is_dynamic(base) else core.ModelPatcher
    patcher = kind(model, base.load_device, base.offload_device)
    patcher.__class__ = _overlay_kind(kind, mixin)
    for name in ATTRIBUTES["carried"]:
        setattr(patcher, name, getattr(shared, name))
    patcher.force_cast_weights = shared.force_cast_weights
    carried = {k: v for k, v in shared.object_patches.items() if k in ("model_sampling", "manual_cast_dtype")}
    patcher.object_patches = carried
    shared.callbacks = comfy.patcher_extension.CallbacksMP.init_callbacks()  # the overlay calls them, once
    shared.remove_additional_models("multigpu")  # copies of the base that the overlay cannot use
    patcher.set_additional_models(BASE, [shared])
    return patcher


def own_layers(tensors: Mapping[str, Tensor], dtype: Any, device: Any) -> dict[str, Any]:
    """Layers of an overlay by path, from tensors by the network's names: Linear, Conv2d over patches (for a weight of
    four dimensions), and parameters outside of layers. They cast to their input's device and dtype.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, end = name.rpartition(".")
        layers.setdefault(path if end in ("weight", "bias") else name, {})[end] = tensor
    return {path: _layer(weights, dtype, device) for path, weights in layers.items()}


def _layer(weights: Mapping[str, Tensor], dtype: Any, device: Any) -> nn.Module | nn.Parameter:
    if "weight" not in weights:
        (tensor,) = weights.values()
        return nn.Parameter(tensor.to(device, dtype), requires_grad=False)
    if weights["weight"].ndim == 2:
        return linear(weights, dtype, device)
    out_channels, in_channels, p, _ = weights["weight"].shape
    options = {"stride": p, "bias": "bias" in weights, "dtype": dtype, "device": device}
    return _filled(comfy.ops.manual_cast.Conv2d(in_channels, out_channels, p, **options), weights, dtype, device)


def linear(weights: Mapping[str, Tensor], dtype: Any, device: Any) -> nn.Module:
    """A comfy.ops Linear with {"weight": (out,in)[, "bias": (out,)]}; it casts to its input's device and dtype."""
    out_features, in_features = weights["weight"].shape
    layer = comfy.ops.manual_cast.Linear(in_features, out_features, bias="bias" in weights, dtype=dtype, device=device)
    return _filled(layer, weights, dtype, device)


def _filled(layer: nn.Module, weights: Mapping[str, Tensor], dtype: Any, device: Any) -> nn.Module:
    # load_state_dict, not copy_: newer versions of ComfyUI create the parameter only here.
    layer.load_state_dict({name: tensor.to(device, dtype, copy=True) for name, tensor in weights.items()})
    return layer.eval().requires_grad_(False)


def copied_config(config: Any) -> Any:
    """A copy of a model_config (its class returns None for any attribute, which breaks copy.copy)."""
    kind: Any = type(config)
    copy = kind.__new__(kind)
    copy.__dict__.update(config.__dict__)
    copy.unet_config = dict(config.unet_config)
    return copy
