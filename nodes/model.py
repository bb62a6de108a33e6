"""Loaders: release folders, merged DC-Gen models, and DC-Gen adapters on a base model."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io

from ..dcgen.adapter import load_adapter
from .bridge import release as releases
from .bridge.apply import apply_adapter
from .checks import numbers, state_of
from .schema import schema

CATEGORY = "DC-Gen"


def _weight_dtype(note: str, optional: bool = False) -> io.Combo.Input:
    return io.Combo.Input(
        "weight_dtype",
        options=list(releases.WEIGHT_DTYPES),
        optional=optional,
        tooltip="default keeps the file's dtype if the device can compute in it. The fp8 choices halve the memory of "
        f"the diffusion model's 16-bit weights at some loss of quality. {note}",
    )


class DCGenReleaseLoader(io.ComfyNode):
    """Loads MODEL, CLIP and VAE from one release folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGenReleaseLoader",
            search_aliases=["diffusers loader", "flux 4k", "sana loader", "load checkpoint"],
            display_name="Load Release (DC-Gen)",
            category=CATEGORY,
            description="Loads model, text encoders and autoencoder from one release folder in the diffusers layout: "
            "DC-Gen FLUX, Z-Image or SANA, or the base for an adapter.",
            inputs=[
                io.Combo.Input(
                    "release",
                    options=releases.release_names(),
                    tooltip="A folder with a model_index.json in models/diffusers (or an extra path of that kind). "
                    "Latent channels, scaling, patch size and text length are read from it.",
                ),
                _weight_dtype("The text encoders keep the dtype of their files.", optional=True),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, release: str | None = None, **_: Any) -> str:
        return state_of(releases.find_release, release)

    @classmethod
    def execute(cls, release: str, weight_dtype: str = "default") -> io.NodeOutput:
        return io.NodeOutput(*releases.load_release(release, weight_dtype))


class DCGenModelLoader(io.ComfyNode):
    """Loads a MODEL from a merged DC-Gen FLUX or SANA (or a base SANA), folder or single file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGenModelLoader",
            search_aliases=["unet loader", "load diffusion model", "flux 4k", "sana loader"],
            display_name="Load Model (DC-Gen)",
            category=CATEGORY,
            description="Loads a merged DC-Gen FLUX or Z-Image, or any SANA: a release folder, or one file with "
            "diffusers or original key names. The latent (f32c32, f64c128) is detected from the file.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=releases.model_names(),
                    tooltip="Release folders from models/diffusers, then files from models/diffusion_models.",
                ),
                _weight_dtype("Ignored for quantized files."),
                io.Combo.Input(
                    "autoencoder",
                    options=releases.autoencoder_names(),
                    optional=True,
                    tooltip="The autoencoder of the model's latents. Ignored when the file or folder names it, as "
                    "releases and files written by dcgen.convert do.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str | None = None, **_: Any) -> str:
        return state_of(releases.model_path, model_name)

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str, autoencoder: str = releases.FROM_FILE) -> io.NodeOutput:
        return io.NodeOutput(releases.load_model(model_name, weight_dtype, autoencoder))


class DCGenApply(io.ComfyNode):
    """Applies a DC-Gen adapter to a base MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGenApply",
            search_aliases=["model patch", "dc-gen adapter", "deep latent", "fewer tokens", "flux 4k"],
            display_name="Apply DC-Gen",
            category=CATEGORY,
            description="Moves a base FLUX, Z-Image or SANA to a deep latent: the adapter replaces embedder and head "
            "and adds its LoRA to the base's blocks. The base MODEL stays usable, and its weights are shared, not "
            "copied.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The base: FLUX or Z-Image from any loader, or SANA; with or without LoRA."
                ),
                io.Combo.Input(
                    "adapter_name",
                    options=folder_paths.get_filename_list("model_patches"),
                    tooltip="A DC-Gen adapter (.safetensors) from models/model_patches, made for this base.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Strength of the adapter's LoRA. 0 = alignment only: the new embedder and head without "
                    "finetuned blocks. The embedder and head are always applied in full.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None = None, **_: Any) -> str:
        return state_of(_adapter_path, adapter_name)

    @classmethod
    def execute(cls, model, adapter_name: str, strength: float) -> io.NodeOutput:
        numbers(strength=strength)
        adapter = load_adapter(_adapter_path(adapter_name))
        return io.NodeOutput(apply_adapter(model, adapter, strength, adapter_name))


def _adapter_path(name: str) -> str:
    return folder_paths.get_full_path_or_raise("model_patches", name)
