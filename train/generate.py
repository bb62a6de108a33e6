"""Pictures from a release folder, as it is or moved by a DC-Gen adapter: what previews, demo and evaluation share."""
# B batch, C latent channels, h w latent rows and columns, f spatial factor

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgen import schedule
from dcgen.adapter import load_adapter, merge
from dcgen.files import naming
from dcgen.release import SCHEDULE_FIELD
from dcgen.schedule import check_schedule
from train.autoencoders import Autoencoder, latent_space, load_autoencoder
from train.files import read_json
from train.models import base_backbone, base_patch_size, load_network, moved_network
from train.sample import euler, seeded_noise
from train.text import load_text


class Pipeline:
    """A base model with its autoencoder and text encoders, ready to draw.

    With `adapter` (and the new autoencoder's folder) it is the DC-Gen model; `strength` scales its LoRA, 0 = alignment
    only. The network is merged once, so a picture costs what the deployed model costs. A release that does not bring
    its own autoencoder needs `autoencoder` too.
    """

    def __init__(
        self,
        base: str | Path,
        *,
        adapter: str | Path | None = None,
        autoencoder: str | Path | None = None,
        strength: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        text_tokens: int | None = None,
    ) -> None:
        base = Path(base)
        if adapter is not None and autoencoder is None:
            raise ValueError("a moved model needs both adapter= and autoencoder=")
        self.backbone, config = base_backbone(base)
        self.distilled = bool(config.get("guidance_embeds"))
        self.dtype = dtype
        self.autoencoder: Autoencoder = load_autoencoder(autoencoder or base / "vae", device, dtype)
        if adapter is None:
            self._check_own_latent(base)
        self.schedule = base_schedule(base)
        self.patch_size = base_patch_size(config, self.autoencoder.space.channels)
        self.model = (
            load_network(base, dtype, device) if adapter is None else self._moved(base, Path(adapter), strength)
        )
        self.model.to(device).eval()
        self.text = load_text(base, device, dtype, text_tokens)
        self.device = device

    def _check_own_latent(self, base: Path) -> None:
        space = self.autoencoder.space
        differing = latent_space(base / "vae").differences(space)
        if differing:
            raise ValueError(f"{self.autoencoder.folder} is not the autoencoder of {base}: {'; '.join(differing)}")

    def _moved(self, base: Path, path: Path, strength: float) -> torch.nn.Module:
        adapter = load_adapter(path)
        adapter.check_base(self.backbone.fingerprint(base_backbone(base)[1]), str(base))
        adapter.check_latent(self.autoencoder.space, str(self.autoencoder.folder))
        self.schedule, self.patch_size = dict(adapter.schedule), adapter.patch_size
        model, _ = moved_network(base, adapter.latent.channels, adapter.patch_size, 0, self.dtype)
        model.load_state_dict(merge(model.state_dict(), adapter, strength))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return model

    def tokens(self, height: int, width: int) -> int:
        """Image tokens of a picture of that size in pixels."""
        return self.backbone.tokens(height, width, self.autoencoder.space.spatial_factor, self.patch_size)

    def velocity(self, x: Tensor, sigma: Tensor, cond: dict[str, Tensor], scale: Tensor | None) -> Tensor:
        """The network's velocity in model space."""
        return self.backbone.velocity(self.model, x, sigma, cond, scale)

    @torch.no_grad()
    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], height: int, width: int, *, steps: int, guidance: float,
        cfg_w: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Model-space latents (B,C,h,w). guidance: g = 1 + w of the embedding; cfg_w > 0: true CFG (Eq. 4) on top."""
        space = self.autoencoder.space
        shape = (space.channels, *space.latent_size(height, width))
        sigmas = schedule.sigmas(steps, tokens=self.tokens(height, width), channels=shape[0], **self.schedule)
        noise = seeded_noise(seeds, shape).to(self.device)
        scale = guidance if self.distilled else None
        empty = self.text([""]) if cfg_w > 0 else None
        return euler(self.velocity, noise, sigmas, self.text(prompts), scale=scale, empty=empty, w=cfg_w)

    @torch.no_grad()
    def images(self, prompts: Sequence[str], seeds: Sequence[int], height: int, width: int, **how: Any) -> Tensor:
        """(B,3,H,W) in -1..1; one prompt and one seed per picture; `how` as for latents()."""
        latents = self.latents(prompts, seeds, height, width, **how)
        return self.autoencoder.decode(self.autoencoder.space.denormalize(latents))


def base_schedule(base: Path) -> dict[str, Any]:
    """The sampling schedule of a release's scheduler config, as dcgen.schedule takes it."""
    path = base / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; a release says there how it is sampled")
    config = read_json(path)
    found: Any = None
    if SCHEDULE_FIELD in config:  # a DC-Gen release: the base of a next step
        found = config[SCHEDULE_FIELD]
    elif not config.get("use_dynamic_shifting"):
        found = {"rule": "static", "shift": config.get("shift", config.get("flow_shift", 1.0))}
    if SCHEDULE_FIELD in config or found:
        with naming(path):
            check_schedule(found)
        return dict(found)
    expected = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    other = {key: config[key] for key, value in expected.items() if config.get(key, value) != value}
    if other:
        raise ValueError(f"{path}: {other} differ from FLUX.1's {expected}; such a shift rule is not supported")
    return {"rule": "flux"}
