# B batch, C latent channels, h w latent rows and columns, T text tokens, D width, p patch size
"""SANA as a MODEL: the network of dcgen.backbones.sana under comfy.ops, and a DC-Gen adapter on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import comfy.conds
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from ...dcgen.adapter import Adapter
from ...dcgen.backbones import BACKBONES
from ...dcgen.backbones.base import patch_size
from ...dcgen.backbones.sana import SanaConfig, SanaNet, network_timestep
from ...dcgen.files import meta_tensors
from ...dcgen.release import Model
from ...dcgen.schedule import STATIC_SIGMA_MAX, shift_ratio
from .flux import image_side, lora_patches
from .flux_loader import by_module, module_of, set_dtype
from .latent_format import ModelInfo, latent_format
from .shared import borrow, borrowing_patcher, copied_config, linear

SANA = BACKBONES["sana"]
TIMESTEPS = 1000
# Key in a CONDITIONING's dict, and its value: made by DCGenSanaTextEncode.
TEXT_KEY = "dcgen_text"
GUIDANCE = 4.5
# Live activations per token at the peak of a block, as this many times D numbers of the computing dtype. Measured
# (tests/core/test_sana_memory.py): 12.6 to 14.1, mostly the feed-forward's 1x1 and 3x3 outputs of 5 D each; less where
# an image has more tokens than the network convolves at a time.
PEAK_WIDTHS = 15
# The core's estimate is latent pixels * dtype size * this * memory_usage_factor.
BYTES_OF_FACTOR = 0.01 * 1024 * 1024


class Network(SanaNet):
    """SanaNet called as the core calls its networks."""

    def __init__(self, *, config: dict[str, Any], dtype: Any, device: Any, operations: Any, **_geometry: Any) -> None:
        super().__init__(SanaConfig.from_diffusers(config), operations=operations, dtype=dtype, device=device)
        self.dtype = dtype

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        guidance: Tensor | None = None,
        **_ignored: Any,
    ) -> Tensor:
        """Velocity (B,C,h,w) at x (B,C,h,w), timestep (B,) = 1000 sigma, context (B,T,Dc), attention_mask (B,T)."""
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        options = dict(transformer_options or {})
        wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._velocity, self, wrappers)
        return executor.execute(x, timestep, context, attention_mask, guidance, options)

    def _velocity(self, x, timestep, context, attention_mask, guidance, _options) -> Tensor:
        sigma = timestep / TIMESTEPS
        if not self.config.guidance_embeds:
            step = network_timestep(sigma, self.config.timestep_scale)
            return super().forward(x, step, context, attention_mask)
        return super().forward(x, sigma, context, attention_mask, guidance * self.config.guidance_embeds_scale)


class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The core's flow sampling, but pure noise at the sigma where SANA's schedule starts (0.9997 at shift 3).

    diffusers begins there with noise alone; the core would scale it by sigma.
    """

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        start = float(comfy.model_sampling.time_snr_shift(self.shift, STATIC_SIGMA_MAX))
        if float(sigma.max()) > start - 1e-6:
            return noise
        return super().noise_scaling(sigma, noise, latent_image, max_denoise)


# Of the core's classes, QwenImage is the one whose LoRA files are looked up by the network's own names, bare and behind
# `transformer.` and `lycoris_` (comfy.lora.model_lora_keys_unet asks for the class). Those of SANA are named like that
# too. Nothing else of it is used.
class SanaModel(comfy.model_base.QwenImage):
    """SANA as the core's BaseModel."""

    def __init__(self, model_config: Any, model_type: Any = comfy.model_base.ModelType.FLOW, device: Any = None):
        comfy.model_base.BaseModel.__init__(self, model_config, model_type, device=device, unet_model=Network)
        self.model_sampling = Sampling(model_config)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Text, its mask and Sprint's guidance. ValueError for a text that is not SANA's; nothing has run by then."""
        out = comfy.model_base.BaseModel.extra_conds(self, **kwargs)
        text, mask = kwargs.get("cross_attn"), kwargs.get("attention_mask")
        if text is None:
            return out
        config = self.diffusion_model.config
        _check_text(text, mask, kwargs.get(TEXT_KEY), config)
        out["c_crossattn"] = comfy.conds.CONDRegular(text)
        if mask is not None:
            out["attention_mask"] = comfy.conds.CONDRegular(mask)
        if config.guidance_embeds:
            out["guidance"] = comfy.conds.CONDRegular(torch.tensor([float(kwargs.get("guidance", GUIDANCE))]))
        return out

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        return {}


def _check_text(text: Tensor, mask: Tensor | None, made_by: Any, config: SanaConfig) -> None:
    if text.shape[-1] != config.caption_channels:
        raise ValueError(
            f"SANA reads text features of {config.caption_channels} channels (Gemma-2-2B-it); this conditioning has "
            f"{text.shape[-1]}, from another text encoder. Encode the prompt with DCGenSanaTextEncode."
        )
    if made_by != SANA.name:
        raise ValueError(
            "this conditioning was encoded without Gemma's final norm and SANA's instruction, which SANA was trained "
            "with. Use DCGenSanaTextEncode in place of CLIPTextEncode, for the negative prompt too."
        )
    if mask is not None and mask.shape[-1] != text.shape[1]:
        raise ValueError(
            f"the conditioning has {text.shape[1]} text tokens and a mask of {mask.shape[-1]}: conditionings of SANA "
            "cannot be joined by ConditioningConcat. Write both texts into one prompt."
        )


class SanaModelConfig(comfy.supported_models_base.BASE):
    """What the core keeps beside a model: dtypes, memory, schedule, latent."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    sampling_settings: ClassVar[dict[str, Any]] = {"shift": 3.0}

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.FLOW

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> SanaModel:
        return SanaModel(self, device=device)


def load_sana(source: Model, options: Mapping[str, Any] | None = None) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from SANA weights in either naming, read a block at a time.

    source: its latent must be known; options: dtype, fp8_optimizations, custom_operations as in
    comfy.sd.load_diffusion_model. ValueError names what does not fit.
    """
    path = str(source.tensors.path)
    size = patch_size(SANA.packed_channels(source.config), source.latent.channels, path)
    info = ModelInfo(source.latent, size, dict(source.schedule))
    entries = source.entries
    config = SanaModelConfig(_geometry(asdict(SanaConfig.from_diffusers(source.config))))
    config.latent_format = latent_format(info.space)
    set_dtype(config, meta_tensors(entries.values()), dict(options or {}))
    model = config.get_model({}).to(comfy.model_management.unet_offload_device())
    _keep_tables_exact(model)
    for keys in by_module(entries, str):
        _fill(model.diffusion_model, {key: source.get(key) for key in keys}, path)
    finish(model, info)
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    load_device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    return kind(model, load_device=load_device, offload_device=offload)


def _geometry(config: dict[str, Any]) -> dict[str, Any]:
    """The core's unet_config of a diffusers config."""
    channels = {name: config[name] for name in ("in_channels", "out_channels", "patch_size")}
    return {"image_model": SANA.name, **channels, "config": config}


def _keep_tables_exact(model: SanaModel) -> None:
    """Modulation tables, which are a few numbers, in 16 bits where the weights are fp8."""
    if model.get_dtype().itemsize > 1:
        return
    for module in model.diffusion_model.modules():
        table = getattr(module, "scale_shift_table", None)
        if table is not None:
            module.scale_shift_table = nn.Parameter(table.to(torch.bfloat16), requires_grad=False)


def _fill(network: nn.Module, part: dict[str, Tensor], path: str) -> None:
    """Load one module of the network, strictly, or the one parameter that stands beside the modules."""
    name = module_of(next(iter(part)))
    try:
        target = network.get_parameter(name) if name in part else network.get_submodule(name)
        if isinstance(target, nn.Parameter):
            _copy(target, part[name])
        else:
            target.load_state_dict({key[len(name) + 1 :]: value for key, value in part.items()})
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: the weights of {name} do not fit this SANA: {error}") from error


def _copy(target: nn.Parameter, value: Tensor) -> None:
    if target.shape != value.shape:
        raise RuntimeError(f"shape {tuple(value.shape)}, expected {tuple(target.shape)}")
    target.data.copy_(value)


def finish(model: SanaModel, info: ModelInfo) -> None:
    """What the latent decides on a BaseModel beyond its network: memory per latent pixel, shift, and its own info."""
    width = model.diffusion_model.config.width
    model.memory_usage_factor = PEAK_WIDTHS * width / BYTES_OF_FACTOR / info.patch_size**2
    model.dcgen = info
    tokens, channels = info.native_tokens, info.token_channels
    model.model_sampling.set_parameters(shift=shift_ratio(tokens=tokens, channels=channels, **info.schedule))


def is_sana(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether a MODEL is a SANA of ours."""
    return isinstance(model.model, SanaModel)


def check_adapter(adapter: Adapter, model: comfy.model_patcher.ModelPatcher, name: str) -> None:
    """ValueError unless the adapter was made for this SANA; nothing has been computed by then."""
    if adapter.backbone != SANA.name:
        raise ValueError(
            f"{name} is an adapter for {adapter.backbone!r} models, and DCGenApply was given SANA. "
            "Choose an adapter made for SANA."
        )
    known: ModelInfo = model.model.dcgen
    if not known.space.differences(adapter.latent):
        raise ValueError(
            f"this MODEL already runs on {known.space.name or 'that latent'}; {name} belongs on the base model. "
            "Connect the base's loader to DCGenApply."
        )
    config = asdict(model.model.diffusion_model.config)
    adapter.check_base(SANA.fingerprint(config), f"the MODEL given to DCGenApply with {name}")


def apply_adapter(
    model: comfy.model_patcher.ModelPatcher, adapter: Adapter, strength: float, name: str = "the adapter"
) -> comfy.model_patcher.ModelPatcher:
    """The DC-Gen MODEL: `model`'s blocks with the adapter's embedder and head, and its LoRA at `strength`.

    `model` is not changed and shares its weights with the result. strength 0 = alignment only.
    """
    check_adapter(adapter, model, name)
    info = ModelInfo(adapter.latent, adapter.patch_size, dict(adapter.schedule), image_side(adapter))
    base = model.model
    geometry = SANA.config_with_latent(asdict(base.diffusion_model.config), info.space.channels, info.patch_size)
    config = copied_config(base.model_config)
    config.unet_config.update(_geometry(geometry))
    config.latent_format = latent_format(info.space)
    patcher = borrowing_patcher(model, _network(model, adapter, geometry), config)
    finish(patcher.model, info)
    if strength and adapter.lora:
        patcher.add_patches(lora_patches(adapter, patcher), strength)
    return patcher


def _network(model: comfy.model_patcher.ModelPatcher, adapter: Adapter, geometry: dict[str, Any]) -> nn.Module:
    dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    tensors, device = adapter.tensors, model.offload_device
    parts = [{end: tensors[f"{name}.{end}"] for end in ("weight", "bias")} for name in (SANA.embedder, SANA.head)]
    embedder: Any = nn.Module()
    embedder.proj = _convolution(parts[0], dtype, device)
    own: dict[str, Any] = {"patch_embed": embedder, "proj_out": linear(parts[1], dtype, device)}
    if "scale_shift_table" in tensors:
        own["scale_shift_table"] = nn.Parameter(tensors["scale_shift_table"].to(device, dtype), requires_grad=False)
    # _positions: the table made for one grid is not that of another.
    return borrow(model.model.diffusion_model, config=SanaConfig.from_diffusers(geometry), _positions=None, **own)


def _convolution(weights: Mapping[str, Tensor], dtype: Any, device: Any) -> nn.Module:
    """A comfy.ops Conv2d over patches, following its input's device and dtype."""
    width, channels, p, _ = weights["weight"].shape
    layer = comfy.ops.manual_cast.Conv2d(channels, width, p, stride=p, dtype=dtype, device=device)
    layer.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()})
    return layer.eval().requires_grad_(False)
