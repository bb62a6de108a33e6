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
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor, nn

from ...dcgen.adapter import Adapter
from ...dcgen.backbones import BACKBONES
from ...dcgen.backbones.base import patch_size
from ...dcgen.backbones.sana import SanaConfig, SanaNet, network_timestep
from ...dcgen.files import meta_tensors
from ...dcgen.release import Model
from ...dcgen.schedule import STATIC_SIGMA_MAX, shift_ratio
from . import lora
from .guard import TEXT_KEY, guarded
from .latent_format import ModelInfo, latent_format
from .loading import Parts, by_layer, fill, is_dynamic, new_patcher, renamed, set_dtype
from .overlay import Ends, convolution, copied_config, linear

SANA = BACKBONE = BACKBONES["sana"]
LATENT_LAYERS = (SANA.embedder, SANA.head)
TIMESTEPS = 1000
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


@torch.inference_mode(False)  # inference tensors could not be trained through (TrainLoraNode)
def load_sana(
    source: Model, options: Mapping[str, Any] | None = None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from SANA weights in either naming, read a layer at a time.

    source: its latent must be known; options: dtype, fp8_optimizations, custom_operations as in
    comfy.sd.load_diffusion_model. ValueError names what does not fit.
    """
    path = source.tensors.path
    size = patch_size(SANA.packed_channels(source.config), source.latent.channels, str(path))
    info = ModelInfo(source.latent, size, dict(source.schedule), latent_layers=LATENT_LAYERS)
    parts = ({key: source.get(key) for key in keys} for keys in by_layer(source.entries))
    shapes = meta_tensors(source.entries.values())
    return build(shapes, parts, source.config, info, path, options or {}, disable_dynamic)


def build(
    shapes: Mapping[str, Tensor],
    parts: Parts,
    config: Mapping[str, Any],
    info: ModelInfo,
    path: Any,
    options: Mapping[str, Any],
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """The BaseModel and its patcher. shapes: every key (meta tensors do); parts: the weights by layer."""
    model_config = SanaModelConfig(_geometry(asdict(SanaConfig.from_diffusers(config))))
    model_config.latent_format = latent_format(info.space)
    model_config.quant_config = comfy.utils.detect_layer_quantization(shapes, "")
    set_dtype(model_config, shapes, options)
    model = model_config.get_model({}).to(comfy.model_management.unet_offload_device())
    _keep_tables_exact(model)
    patcher = new_patcher(model, disable_dynamic)
    fill(model.diffusion_model, renamed(parts, _as_linear), path, assign=is_dynamic(patcher))
    finish(model, info)
    return guarded(lora.reported(patcher))


def _as_linear(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """1x1 convolutions of the files as the Linear layers that the network has for them."""
    pointwise = (".conv_inverted.weight", ".conv_point.weight")
    return {name: value.flatten(1) if name.endswith(pointwise) else value for name, value in part.items()}


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


def finish(model: SanaModel, info: ModelInfo) -> None:
    """What the latent decides on a BaseModel beyond its network: memory per latent pixel, shift, and its own info."""
    width = model.diffusion_model.config.width
    model.memory_usage_factor = PEAK_WIDTHS * width / BYTES_OF_FACTOR / info.patch_size**2
    model.dcgen, model.dcgen_family = info, SANA.name
    tokens, channels = info.native_tokens, info.token_channels
    model.model_sampling.set_parameters(shift=shift_ratio(tokens=tokens, channels=channels, **info.schedule))


def is_sana(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether a MODEL is a SANA of ours."""
    return isinstance(model.model, SanaModel)


def base_config(model: comfy.model_patcher.ModelPatcher) -> dict[str, Any]:
    """The config of a MODEL's network, as diffusers names it."""
    return asdict(model.model.diffusion_model.config)


def check_base(model: comfy.model_patcher.ModelPatcher, adapter: Adapter, name: str) -> None:
    """ValueError when this MODEL already runs on the adapter's latent. name: of the adapter."""
    known: ModelInfo = model.model.dcgen
    if not known.space.differences(adapter.latent):
        raise ValueError(
            f"this MODEL already runs on {known.space.name or 'that latent'}; {name} belongs on the base model. "
            "Connect the base's loader to DCGenApply."
        )


def ends(model: comfy.model_patcher.ModelPatcher, adapter: Adapter, info: ModelInfo) -> Ends:
    """What the DC-Gen network has in place of the base's, by path: the adapter's layers, and sizes."""
    dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    tensors, device = adapter.tensors, model.offload_device
    embedder, head = (
        {end: tensors[f"{name}.{end}"] for end in ("weight", "bias")} for name in (SANA.embedder, SANA.head)
    )
    own: dict[str, Any] = {
        SANA.embedder: convolution(embedder, dtype, device),
        SANA.head: linear(head, dtype, device),
        "config": SanaConfig.from_diffusers(_deep_geometry(model, info)),
        "_positions": None,  # the table made for one grid is not that of another
    }
    if "scale_shift_table" in tensors:
        own["scale_shift_table"] = nn.Parameter(tensors["scale_shift_table"].to(device, dtype), requires_grad=False)
    return own


def deep_config(model: comfy.model_patcher.ModelPatcher, _adapter: Adapter, info: ModelInfo) -> Any:
    """The core's model_config of the DC-Gen model."""
    config = copied_config(model.model.model_config)
    config.unet_config.update(_geometry(_deep_geometry(model, info)))
    config.latent_format = latent_format(info.space)
    return config


def _deep_geometry(model: comfy.model_patcher.ModelPatcher, info: ModelInfo) -> dict[str, Any]:
    return SANA.config_with_latent(base_config(model), info.space.channels, info.patch_size)
