"""Comparing two images."""

from __future__ import annotations

from comfy_api.latest import io, ui

from .model import CATEGORY
from .schema import schema


class DCGenCompare(io.ComfyNode):
    """A before/after wipe of two images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGenCompare",
            search_aliases=["image compare", "before after", "wipe", "slider"],
            display_name="Compare Images (DC-Gen)",
            category=CATEGORY,
            description="Lays two images over each other; move the pointer across to wipe from one to the other.",
            inputs=[
                io.Image.Input("image_a", tooltip="Left of the wipe, for example the base model's image."),
                io.Image.Input(
                    "image_b",
                    tooltip="Right of the wipe, for example DC-Gen's. Shown at the size of image_a; batches are "
                    "compared pair by pair.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_a, image_b) -> io.NodeOutput:
        first = {"a_images": ui.PreviewImage(image_a, cls=cls).values}
        return io.NodeOutput(ui={**first, "b_images": ui.PreviewImage(image_b, cls=cls).values})
