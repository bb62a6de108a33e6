# B batch, C latent channels, h w latent rows and columns, T text tokens, D width, p patch size
"""SANA in ComfyUI, which has no SANA of its own: the network of dcgen.backbones.sana on comfy.ops layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import comfy.conds
import comfy.model_base
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor, nn

from .....dcgen.backbones import BACKBONES, Config
from .....dcgen.backbones.sana import SanaConfig, SanaNet, network_timestep
from .....dcgen.folder import Release
from .....dcgen.schedule import STATIC_SIGMA_MAX
from ...family import Family
from ...latent_format import ModelInfo
from .text import load_sana_text

TIMESTEPS = 1000
GUIDANCE = 4.5
# Live activations per token at the peak of a block, in multiples of D values of the compute dtype. Measured
# (tests/core/test_sana_memory.py): 12.6 to 14.1, mostly the feed-forward's 1x1 and 3x3 outputs of 5 D each; less when
# an image has more tokens than the network convolves at a time.
PEAK_WIDTHS = 15
# Core's estimate is latent pixels * dtype size * this * memory_usage_factor.
BYTES_OF_FACTOR = 0.01 * 1024 * 1024
POINTWISE = (".conv_inverted.weight", ".conv_point.weight")


class Network(SanaNet):
    """SanaNet with the call signature of core's networks."""

    def __init__(self, *, config: dict[str, Any], dtype: Any, device: Any, operations: Any, **_geometry: Any) -> None:
        super().__init__(SanaConfig.from_diffusers(config), operations=operations, dtype=dtype, device=device)
        self.dtype = dtype

    def forward(  # type: ignore[override]
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
    """Core's flow sampling, but with pure noise at the first sigma of SANA's schedule (0.9997 at shift 3).

    diffusers starts there from unscaled noise; core would scale it by sigma.
    """

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        start = float(comfy.model_sampling.time_snr_shift(self.shift, STATIC_SIGMA_MAX))
        if float(sigma.max()) > start - 1e-6:
            return noise
        return super().noise_scaling(sigma, noise, latent_image, max_denoise)


class SanaModel(comfy.model_base.BaseModel):
    """SANA as a BaseModel of core."""

    def __init__(self, model_config: Any, model_type: Any = comfy.model_base.ModelType.FLOW, device: Any = None):
        super().__init__(model_config, model_type, device=device, unet_model=Network)
        self.model_sampling = Sampling(model_config)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Text features, their mask and Sprint's guidance."""
        out = super().extra_conds(**kwargs)
        text, mask = kwargs.get("cross_attn"), kwargs.get("attention_mask")
        if text is None:
            return out
        out["c_crossattn"] = comfy.conds.CONDRegular(text)
        if mask is not None:
            out["attention_mask"] = comfy.conds.CONDRegular(mask)
        if self.diffusion_model.config.guidance_embeds:
            out["guidance"] = comfy.conds.CONDRegular(torch.tensor([float(kwargs.get("guidance", GUIDANCE))]))
        return out

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        return {}


class SanaModelConfig(comfy.supported_models_base.BASE):
    """Core's model_config: dtypes, memory, schedule, latent format."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    sampling_settings: ClassVar[dict[str, Any]] = {"shift": 3.0}

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.FLOW

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> SanaModel:
        return SanaModel(self, device=device)


class Sana(Family):
    """SANA, SANA-1.5 and SANA-Sprint."""

    backbone = BACKBONES["sana"]
    text_node = "DCGenSanaTextEncode"

    def recognises(self, model: comfy.model_base.BaseModel) -> bool:
        return isinstance(model, SanaModel)

    def config(self, network: nn.Module) -> Config:
        config: Any = network.config
        return asdict(config)

    def model_config(self, shapes: Mapping[str, Tensor], config: Config) -> Any:
        model_config = SanaModelConfig({"image_model": self.backbone.name})
        model_config.quant_config = comfy.utils.detect_layer_quantization(shapes, "")
        return model_config

    def unet_config(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        values = asdict(SanaConfig.from_diffusers(config))
        sizes = {name: values[name] for name in ("in_channels", "out_channels", "patch_size")}
        return {"image_model": self.backbone.name, **sizes, "config": values}

    def attributes(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        # The cached position table is for one grid only.
        return {"config": SanaConfig.from_diffusers(config), "_positions": None}

    def memory_factor(self, model: comfy.model_base.BaseModel, config: Config, info: ModelInfo) -> float:
        return PEAK_WIDTHS * self.backbone.width(config) / BYTES_OF_FACTOR / info.patch_size**2

    def text_width(self, config: Config) -> int:
        return config["caption_channels"]

    def renamed(self, part: dict[str, Tensor], model_config: Any) -> dict[str, Tensor]:
        """1x1 convolutions of the files, reshaped to the network's Linear layers."""
        return {name: value.flatten(1) if name.endswith(POINTWISE) else value for name, value in part.items()}

    def prepare(self, model: comfy.model_base.BaseModel) -> None:
        """Keep the modulation tables, which are small, in bfloat16 when the weights are fp8."""
        if model.get_dtype().itemsize > 1:
            return
        for module in model.diffusion_model.modules():
            table = getattr(module, "scale_shift_table", None)
            if table is not None:
                module.scale_shift_table = nn.Parameter(table.to(torch.bfloat16), requires_grad=False)

    def check_text(self, text: Tensor, cond: Mapping[str, Any], made_by: str | None, config: Config) -> None:
        if text.shape[-1] != self.text_width(config):
            raise ValueError(
                f"SANA reads text features of {self.text_width(config)} channels (Gemma-2-2B-it); this conditioning "
                f"has {text.shape[-1]}, from another text encoder. Encode the prompt with DCGenSanaTextEncode."
            )
        super().check_text(text, cond, made_by, config)
        if made_by is None:
            raise ValueError(
                "this conditioning was encoded without Gemma's final norm and SANA's instruction, which SANA was "
                "trained with. Use DCGenSanaTextEncode in place of CLIPTextEncode, for the negative prompt too."
            )
        mask = cond.get("attention_mask")
        if mask is not None and mask.shape[-1] != text.shape[1]:
            raise ValueError(
                f"the conditioning has {text.shape[1]} text tokens and a mask of {mask.shape[-1]}: conditionings of "
                "SANA cannot be joined by ConditioningConcat. Write both texts into one prompt."
            )

    def load_text(self, release: Release, disable_dynamic: bool = False) -> comfy.sd.CLIP:
        return load_sana_text(release, disable_dynamic)


FAMILY = Sana()
