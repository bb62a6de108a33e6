# B batch, C latent channels, h w latent rows and columns, N tokens, T text tokens, D width
"""Pebble in ComfyUI, with the original names: q, k and v in one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import comfy.conds
import comfy.model_base
import comfy.sd
import comfy.supported_models_base
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ....dcgen.backbones import BACKBONES, Config
from ....dcgen.folder import Release
from ..family import Family
from ..latent_format import ModelInfo


class Layer(nn.Module):
    def __init__(self, D: int, operations: Any, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.qkv = operations.Linear(D, 3 * D, **kwargs)
        self.out = operations.Linear(D, D, **kwargs)
        self.mlp = nn.Sequential(
            operations.Linear(D, 2 * D, **kwargs), nn.SiLU(), operations.Linear(2 * D, D, **kwargs)
        )

    def forward(self, x: Tensor, mask: Tensor, heads: int) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:])
        q, k, v = rearrange(self.qkv(normed), "B N (s h d) -> s B h N d", s=3, h=heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(rearrange(mixed, "B h N d -> B N (h d)"))
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class Network(nn.Module):
    def __init__(self, *, config: dict[str, Any], dtype: Any, device: Any, operations: Any, **_: Any) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        kwargs = {"dtype": dtype, "device": device}
        D, p = config["num_attention_heads"] * config["attention_head_dim"], config["patch_size"]
        packed = config["in_channels"] * p * p
        self.embed = nn.ModuleDict({f"{p}x{p}": operations.Linear(packed, D, **kwargs)})
        self.final = nn.ModuleDict({f"{p}x{p}": operations.Linear(D, packed, **kwargs)})
        self.text_in = operations.Linear(config["text_dim"], D, **kwargs)
        self.time = nn.Sequential(operations.Linear(64, D, **kwargs), nn.SiLU(), operations.Linear(D, D, **kwargs))
        self.layers = nn.ModuleList(Layer(D, operations, kwargs) for _ in range(config["num_layers"]))

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        p, heads = self.config["patch_size"], self.config["num_attention_heads"]
        name = f"{p}x{p}"
        image = getattr(self.embed, name)(rearrange(x, "B C (h a) (w b) -> B (h w) (C a b)", a=p, b=p))
        text = self.text_in(context)
        mask = torch.ones(text.shape[:2], device=x.device) if attention_mask is None else attention_mask
        seen = torch.cat([torch.ones(image.shape[:2], device=x.device), mask], 1).bool()[:, None, None]
        angles = timestep[:, None] * torch.exp(torch.arange(32, device=x.device) * (-math.log(1000) / 32))
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))
        tokens = torch.cat([image, text], 1) + time[:, None]
        for layer in self.layers:
            tokens = layer(tokens, seen, heads)
        out = getattr(self.final, name)(F.layer_norm(tokens[:, : image.shape[1]], tokens.shape[-1:]))
        return rearrange(out, "B (h w) (C a b) -> B C (h a) (w b)", h=x.shape[2] // p, a=p, b=p)


class PebbleModel(comfy.model_base.BaseModel):
    def __init__(self, model_config: Any, model_type: Any = comfy.model_base.ModelType.FLOW, device: Any = None):
        super().__init__(model_config, model_type, device=device, unet_model=Network)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        if kwargs.get("attention_mask") is not None:
            out["attention_mask"] = comfy.conds.CONDRegular(kwargs["attention_mask"])
        return out


class PebbleConfig(comfy.supported_models_base.BASE):
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]
    sampling_settings: ClassVar[dict[str, Any]] = {"shift": 2.0}

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.FLOW

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> PebbleModel:
        return PebbleModel(self, device=device)


class Pebble(Family):
    backbone = BACKBONES["pebble"]
    text_node = "a node of the test's"

    def recognises(self, model: comfy.model_base.BaseModel) -> bool:
        return isinstance(model, PebbleModel)

    def config(self, network: nn.Module) -> Config:
        config: Any = network.config
        return dict(config)

    def model_config(self, shapes: Mapping[str, Tensor], config: Config) -> Any:
        return PebbleConfig({"image_model": "pebble"})

    def unet_config(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        return {"image_model": "pebble", "config": dict(config)}

    def attributes(self, config: Config, info: ModelInfo) -> dict[str, Any]:
        return {"config": dict(config)}

    def memory_factor(self, model: comfy.model_base.BaseModel, config: Config, info: ModelInfo) -> float:
        return 1.0 / info.patch_size**2

    def text_width(self, config: Config) -> int:
        return config["text_dim"]

    def load_text(self, release: Release, disable_dynamic: bool = False) -> comfy.sd.CLIP:
        raise ValueError("Pebble reads no text in ComfyUI")


FAMILY = Pebble()
