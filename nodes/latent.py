"""Latents in the size of the model they are for."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs
from .bridge.latent_format import empty_latent
from .model import CATEGORY
from .schema import schema
from .sizes import CUSTOM, chosen


class DCGenEmptyLatent(io.ComfyNode):
    """An empty latent for text-to-image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGenEmptyLatent",
            search_aliases=["empty latent image", "image size", "resolution"],
            display_name="Empty Latent (DC-Gen)",
            category=CATEGORY,
            description="An empty latent of the size you want the image to be, in the channels and depth of the model.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample it; only its latent format is read."),
                *inputs.pixels("Ignored when `size` names a size."),
                inputs.size("A size the published models were made for: 1K for f32 models, 2K and 4K for f64 ones."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, model, width: int, height: int, batch_size: int, size: str = CUSTOM) -> io.NodeOutput:
        return io.NodeOutput(empty_latent(model, *chosen(size, width, height), batch_size))
