# B batch, C latent channels, h w latent rows and columns, p patch size, D width, t DDPM step
"""DiT (class-conditional): how the network is called and trained, class labels, tiny and toy releases.

DiT predicts noise along the DDPM path sqrt(abar)*x0 + sqrt(1-abar)*noise. A flow's x_sigma is the same point up to
its length, so velocity() finds the step with the same ratio of signal and noise and turns the noise into a velocity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dcgen.backbones import BACKBONES, Config
from dcgen.fields import shown
from dcgen.folder import TRANSFORMER, network_config, part
from train.conditioning import Cond, CondField, Role
from train.ddpm import flow_sigmas, step_of
from train.family import Architecture, Family, TextEncoder, TinyRelease, child, model_config
from train.files import read_json
from train.tiny import COLORS, SIDES, caption, tiny_kl
from train.toy.releases import ToyLabels

_CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "sample_size": 32,
    "patch_size": 2,
}


class DiT(Family):
    """DiT. cond: labels (B,) int64, num_embeds_ada_norm (1000) for none; guidance is not for this model."""

    backbone = BACKBONES["dit"]
    lora_targets = (r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",)
    fields: ClassVar[dict[str, CondField]] = {"labels": CondField(Role.LABEL)}
    token_layers: ClassVar[dict[str, str]] = {"sample": r"transformer_blocks\.\d+\.norm1\..+|proj_out_1"}
    architectures: ClassVar[dict[str, Architecture]] = {
        "dit-xl-2-256": Architecture(_CONFIG, "sd-f8c4", 2),
        "dit-xl-2-512": Architecture({**_CONFIG, "sample_size": 64}, "sd-f8c4", 2),
    }
    toy_labels = ToyLabels(
        "DiTPipeline",
        config=lambda space, pixels, classes: {
            "in_channels": space.channels,
            "out_channels": 2 * space.channels,  # DDPM with a learned variance
            "sample_size": pixels // space.spatial_factor,
            "num_embeds_ada_norm": classes,
            "norm_type": "ada_norm_zero",
        },
        scheduler="DDIMScheduler",
        settings={"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False},
    )

    def embed(self, model: nn.Module, latents: Tensor, config: Config) -> Tensor:
        """With positions, as the released recipe compares them."""
        p = config["patch_size"]
        return child(model, "pos_embed")(latents).unflatten(1, (latents.shape[2] // p, latents.shape[3] // p))

    def velocity(
        self,
        model: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        """noise - x0 by way of the noise; sigma is held within what DDPM's steps reach (0.0099 to 0.9937)."""
        levels = flow_sigmas().to(sigma.device)
        held = sigma.float().clamp(levels[0], levels[-1])
        level = held[:, None, None, None].to(latents.dtype)
        length = ((1 - level).square() + level.square()).sqrt()
        noise = self.predict_noise(model, latents / length, step_of(held), cond)
        return (noise - latents) / (1 - level)

    def predict_noise(self, model: nn.Module, latents: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Noise (B,C,h,w) in DDPM latents sqrt(abar)*x0 + sqrt(1-abar)*noise at step (B,) in 0..999."""
        config = model_config(model)
        if latents.shape[1] != config["in_channels"] or latents.shape[2] != latents.shape[3]:
            raise ValueError(
                f"this DiT takes square latents of {config['in_channels']} channels, got {tuple(latents.shape[1:])}"
            )
        output = model(latents, timestep=timestep, class_labels=cond["labels"], return_dict=False)[0]
        return output[:, : latents.shape[1]]  # a learned variance follows the noise

    def raw_output(self, model: nn.Module, x: Tensor, step: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Noise, then its variance if that was learned, float32."""
        return model(x, timestep=step, class_labels=cond["labels"], return_dict=False)[0].float()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Switch off the class dropout inside diffusers: it draws anew in every block, and not from the batch's
        numbers. Dropping the condition is the objective's work (caption_dropout).
        """
        for module in model.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0  # type: ignore[assignment]
        return model

    def text_encoder(
        self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None = None
    ) -> TextEncoder:
        return ClassLabels(base, device)

    def tiny(self, guidance_embeds: bool) -> TinyRelease:
        """One 64-wide head, two blocks, a learned variance; 8 classes, named by the captions."""
        captions = [caption(color, side) for side in SIDES for color in COLORS]
        return TinyRelease(
            "DiTPipeline",
            {
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 2,
                "num_attention_heads": 1,
                "attention_head_dim": 64,
                "num_embeds_ada_norm": 8,
                "sample_size": 16,
                "patch_size": 2,
                "norm_type": "ada_norm_zero",
            },
            tiny_kl,
            ("DDIMScheduler", {"beta_end": 0.02, "beta_start": 0.0001, "clip_sample": False}),
            index={"id2label": {str(number): name for number, name in enumerate(captions)}},
            settle=_share_embedders,
        )


def _share_embedders(network: nn.Module) -> None:
    """One time and class embedder, of which diffusers keeps a copy in every block."""
    blocks: Any = network.transformer_blocks
    shared = blocks[0].norm1.emb.state_dict()
    for block in blocks:
        block.norm1.emb.load_state_dict(shared)


class ClassLabels:
    """DiT's conditioning: captions are class numbers, or names out of the release's id2label; "" is no class."""

    def __init__(self, base: Path, device: torch.device | str) -> None:
        self.none: int = network_config(part(base, TRANSFORMER))[1]["num_embeds_ada_norm"]
        self.numbers = _classes(base / "model_index.json")
        self.device = device

    def __call__(self, captions: Sequence[str]) -> Cond:
        """labels (B,) int64."""
        return {"labels": torch.tensor([self._number(name) for name in captions], device=self.device)}

    def _number(self, name: str) -> int:
        if not name:
            return self.none
        number = int(name) if name.isdecimal() else self.numbers.get(name)
        if number is None or number >= self.none:
            raise ValueError(f"caption {name!r} is no class: a number below {self.none} or a name of id2label")
        return number


def _classes(index: Path) -> dict[str, int]:
    """Class number by name, from a release's id2label, where a class may have several names with commas between."""
    labels = read_json(index).get("id2label", {})
    if not isinstance(labels, dict) or not all(n.isdecimal() and isinstance(names, str) for n, names in labels.items()):
        raise ValueError(f"{index}: id2label is {shown(labels)}, expected class numbers and their names")
    return {name.strip(): int(n) for n, names in labels.items() for name in [names, *names.split(",")]}


FAMILY = DiT()
