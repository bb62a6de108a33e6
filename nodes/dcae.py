"""The deep autoencoder as a VAE."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge import vae_files
from .model import CATEGORY


class DCAELoader(io.ComfyNode):
    """VAE from a DC-AE file or folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCAELoader",
            display_name="Load DC-AE",
            category=CATEGORY,
            description="Loads a deep compression autoencoder as a VAE that every core VAE node works with.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=vae_files.names(),
                    tooltip="A DC-AE in models/vae: a .safetensors file (diffusers or original keys), or a folder with "
                    "its config.json. The variant is found from the file.",
                )
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(vae_files.load(vae_name))
