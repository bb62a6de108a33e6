"""Latents in the size of the model they are for."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge.latent_format import empty_latent
from .model import CATEGORY
from .sizes import CUSTOM, SIZES, chosen


class DCGenEmptyLatent(io.ComfyNode):
    """An empty latent for text-to-image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCGenEmptyLatent",
            display_name="Empty Latent (DC-Gen)",
            category=CATEGORY,
            description="An empty latent of the size you want the image to be, in the channels and depth of the model.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample it; only its latent format is read."),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=16384,
                    step=16,
                    tooltip="Image width in pixels: a multiple of 32 for f32 models, 64 for f64. Ignored when `size` "
                    "names a size.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=16384,
                    step=16,
                    tooltip="Image height in pixels, in the same multiples. Ignored when `size` names a size.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many images at once."),
                io.Combo.Input(
                    "size",
                    options=[CUSTOM, *SIZES],
                    optional=True,
                    tooltip="A size the published models were made for: 1K for f32 models, 2K and 4K for f64 ones.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, model, width: int, height: int, batch_size: int, size: str = CUSTOM) -> io.NodeOutput:
        return io.NodeOutput(empty_latent(model, *chosen(size, width, height), batch_size))
