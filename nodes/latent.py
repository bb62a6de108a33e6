"""Latents in the format of a model."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs
from .bridge.fit import composite
from .bridge.model_info import empty_latent
from .model import CATEGORY
from .schema import schema
from .sizes import CUSTOM, size_of


class DCGenEmptyLatent(io.ComfyNode):
    """An empty latent for text-to-image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGenEmptyLatent",
            search_aliases=["empty latent image", "image size", "resolution"],
            display_name="Empty Latent (DC-Gen)",
            category=CATEGORY,
            description="An empty latent for an image of this size, in the model's own latent format.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will sample the latent; only its latent format is read."
                ),
                *inputs.pixels("Ignored when `size` names a size."),
                inputs.size("A size that the published models were trained for: 1K for f32 models, 2K and 4K for f64."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, model, width: int, height: int, batch_size: int, size: str = CUSTOM) -> io.NodeOutput:
        return io.NodeOutput(empty_latent(model, *size_of(size, width, height), batch_size))


class DCGenLatentComposite(io.ComfyNode):
    """Pastes one latent into another, at a position in image pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGenLatentComposite",
            search_aliases=["latent composite", "latent composite masked", "paste latent"],
            display_name="Latent Composite (DC-Gen)",
            category=CATEGORY,
            description="Pastes a latent into another of the same autoencoder, at a position in image pixels. Core's "
            "LatentComposite nodes assume 8 pixels per latent pixel, which is wrong for deep latents.",
            inputs=[
                io.Latent.Input(
                    "destination", tooltip="The latent to paste into, from a node that tags it with its autoencoder."
                ),
                io.Latent.Input("source", tooltip="The latent to paste, cropped to the destination."),
                io.Int.Input("x", default=0, min=0, max=16384, step=32, tooltip=_position("Left edge")),
                io.Int.Input("y", default=0, min=0, max=16384, step=32, tooltip=_position("Upper edge")),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the source is pasted; scaled to the source. Without it, all is pasted.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, destination, source, x: int, y: int, mask=None) -> io.NodeOutput:
        return io.NodeOutput(composite(destination, source, x, y, mask))


def _position(edge: str) -> str:
    return f"{edge} of the source in image pixels: a multiple of 32 at f32, of 64 at f64."
