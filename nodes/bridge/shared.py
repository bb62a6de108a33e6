"""A MODEL that borrows the blocks of another MODEL: new embedder and head, no second copy of the base.

Two things must both be true of DCGenApply's result. The core reads a model's latent format, memory factor and network
straight off `patcher.model`, before and after any patch is applied, so the DC-Gen model needs a BaseModel of its own.
And the blocks must be loaded, offloaded and LoRA-patched by one owner only, or base and DC-Gen would each move the
other's weights away. So the new BaseModel holds only the new layers, its network looks everything else up in the base
network at call time, and its patcher carries a clone of the base's patcher as an "additional model", which the core
loads beside it and which swaps with the base by the core's own rules for clones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
from torch import Tensor, nn

from . import lora

LENDER = "dcgen_lender"
PACKED = "GGUFModelPatcher"  # ComfyUI-GGUF's, known by name


class _Borrower(nn.Module):
    """Mixin: submodules of its own, everything else (modules, buffers, plain attributes) from `_lender`, each time."""

    def __getattr__(self, name: str) -> Any:
        for store in ("_parameters", "_buffers", "_modules"):
            if name in self.__dict__.get(store, ()):
                return self.__dict__[store][name]
        if "_lender" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_lender"], name)

    def state_dict(self, *args: Any, destination: dict | None = None, prefix: str = "", keep_vars: bool = False):
        """All keys, own and borrowed: LoRA keys are looked up here, and saving writes a whole model."""
        own = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key, value in self._lender.state_dict(prefix=prefix, keep_vars=keep_vars).items():
            own.setdefault(key, value)
        return own


def borrow(lender: nn.Module, **own: Any) -> nn.Module:
    """A module of the lender's class: `own` modules and attributes replace the lender's, the rest is the lender's."""
    kind = type(type(lender).__name__, (_Borrower, type(lender)), {})
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.__dict__["_lender"] = lender  # not a registered child: whoever loads the lender moves it
    for name, value in own.items():
        if isinstance(value, nn.Parameter):  # which setattr refuses: the lender has one of that name
            module._parameters[name] = value
        else:
            setattr(module, name, value)
    return module.eval()


class BorrowingPatcher(lora.Reporting, comfy.model_patcher.ModelPatcher):
    """Patcher of a BaseModel made by `borrow`. Patches on borrowed weights go to the lender's patcher."""

    @property
    def lender(self) -> comfy.model_patcher.ModelPatcher:
        """This patcher's own clone of the base's patcher."""
        return self.get_additional_models_with_key(LENDER)[0]

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights that are this model's own."""
        return {key: tuple(value.shape) for key, value in self.model.named_parameters()}

    def _add_patches(self, patches: Mapping, *strengths: float) -> list:
        own = self.latent_shapes()
        ours = {key: value for key, value in patches.items() if (key if isinstance(key, str) else key[0]) in own}
        theirs = {key: value for key, value in patches.items() if key not in ours}
        added = super()._add_patches(ours, *strengths) if ours else []
        return added + self.lender.add_patches(theirs, *strengths)

    def add_hook_patches(
        self, hook: Any, patches: Mapping, strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list:
        """As the core's, which finds borrowed weights here too and puts them back after sampling.

        ValueError for packed weights (GGUF), which the core would take for numbers.
        """
        if type(self.lender).__name__ == PACKED:
            raise ValueError(
                "LoRA hooks cannot change a GGUF model's packed weights. Load it with an ordinary LoRA loader, or "
                "use an fp8 or 16-bit file of the base."
            )
        return super().add_hook_patches(hook, patches, strength_patch, strength_model)

    def model_size(self) -> int:
        """Bytes of the new layers. The state dict lists the borrowed ones too; the lender's patcher counts those."""
        if not self.size:
            self.size = sum(value.nbytes for value in (*self.model.parameters(), *self.model.buffers()))
        return self.size

    def get_key_patches(self, filter_prefix: str | None = None) -> dict:
        """Weights with their patches, own and borrowed (model merging and saving read these)."""
        own = {name for name, _ in self.model.named_parameters()}
        found = self.lender.get_key_patches(filter_prefix)
        found.update({key: value for key, value in super().get_key_patches(filter_prefix).items() if key in own})
        return found

    def model_patches_models(self) -> list:
        """Models the core loads together with this one, also outside sampling."""
        return [*super().model_patches_models(), self.lender]


def borrowing_patcher(base: comfy.model_patcher.ModelPatcher, network: nn.Module, config: Any) -> BorrowingPatcher:
    """Wrap `network` (made by `borrow` from base's) in a BaseModel of the base's class with `config`, and patch it.

    What was set on the base's MODEL before (options, wrappers, a sampling object) carries over.
    """
    old = base.model
    config.unet_config = {**config.unet_config, "disable_unet_model_creation": True}
    model = type(old)(config, model_type=old.model_type, device=base.offload_device)
    config.unet_config = {k: v for k, v in config.unet_config.items() if k != "disable_unet_model_creation"}
    model.model_config = config
    model.diffusion_model = network
    patcher = BorrowingPatcher(model, base.load_device, base.offload_device)
    donor = base.clone()
    patcher.model_options = donor.model_options
    patcher.wrappers = donor.wrappers
    carried = {k: v for k, v in donor.object_patches.items() if k in ("model_sampling", "manual_cast_dtype")}
    patcher.object_patches = carried
    patcher.set_additional_models(LENDER, [donor])
    return patcher


def linear(weights: Mapping[str, Tensor], dtype: Any, device: Any) -> nn.Module:
    """A comfy.ops Linear holding {"weight": (out,in)[, "bias": (out,)]}; it follows its input's device and dtype."""
    out_features, in_features = weights["weight"].shape
    layer = comfy.ops.manual_cast.Linear(in_features, out_features, bias="bias" in weights, dtype=dtype, device=device)
    # load_state_dict, not copy_: newer cores create the parameter only here.
    layer.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()})
    return layer.eval().requires_grad_(False)


def copied_config(config: Any) -> Any:
    """A model_config of its own (its class answers any attribute with None, which confuses copy.copy)."""
    twin = type(config).__new__(type(config))
    twin.__dict__.update(config.__dict__)
    twin.unet_config = dict(config.unet_config)
    return twin
