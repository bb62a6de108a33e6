"""Latents in the size of the model they are for."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs
from .bridge.fit import composite
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


class DCGenLatentComposite(io.ComfyNode):
    """One latent pasted into another, at a place in image pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGenLatentComposite",
            search_aliases=["latent composite", "latent composite masked", "paste latent"],
            display_name="Latent Composite (DC-Gen)",
            category=CATEGORY,
            description="Pastes a latent into another of the same autoencoder, at a place in image pixels. Core's "
            "LatentComposite nodes count 8 pixels to a latent pixel, which is wrong for deep latents.",
            inputs=[
                io.Latent.Input("destination", tooltip="What is pasted into; it says which autoencoder it is of."),
                io.Latent.Input("source", tooltip="What is pasted. What sticks out of the destination is cut."),
                io.Int.Input("x", default=0, min=0, max=16384, step=32, tooltip=_place("Left edge")),
                io.Int.Input("y", default=0, min=0, max=16384, step=32, tooltip=_place("Upper edge")),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the source is pasted; scaled to the source. Without one, all of it is.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, destination, source, x: int, y: int, mask=None) -> io.NodeOutput:
        return io.NodeOutput(composite(destination, source, x, y, mask))


def _place(edge: str) -> str:
    return f"{edge} of the source in pixels of the image: a multiple of 32 at f32, of 64 at f64."
