"""The deep compression autoencoder (DC-AE): load, encode, decode."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..dcgen.dcae.quality import common_part, psnr
from .bridge import vae_files
from .bridge.fit import FITS, fitted, original_size, with_size
from .bridge.latent_format import check_tag, tagged
from .bridge.vae import as_dcae
from .checks import numbers, state_of
from .model import CATEGORY
from .schema import schema

STRIP_TIP = (
    "Latent rows computed at a time; limits memory and never changes the result. 0 = as many as free memory allows. "
    "Halved automatically after an out-of-memory error."
)


def _vae_and_strip() -> list[io.Input]:
    return [
        io.Vae.Input("vae", tooltip="A DC-AE, from Load DC-AE or a release."),
        io.Int.Input("strip", default=0, min=0, max=4096, tooltip=STRIP_TIP),
    ]


class DCAELoader(io.ComfyNode):
    """Loads a VAE from a DC-AE file or folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCAELoader",
            search_aliases=["deep compression autoencoder", "vae loader", "load vae", "sana vae"],
            display_name="Load DC-AE",
            category=CATEGORY,
            description="Loads a deep compression autoencoder (f32, f64, f128) as a VAE. All of core's VAE nodes work "
            "with it, and the tiled ones give the exact result too.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=vae_files.names(),
                    tooltip="Folders with a DC-AE config.json, then files, from models/vae, with original or "
                    "diffusers key names.",
                ),
                io.Float.Input(
                    "scaling_factor",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.0001,
                    optional=True,
                    tooltip="0 = from the file or its config.json. Needed only for a single file that fits several "
                    "published autoencoders; the error then lists them with their factors.",
                ),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str | None = None, **_: Any) -> str:
        return state_of(vae_files.path_of, vae_name)

    @classmethod
    def execute(cls, vae_name: str, scaling_factor: float = 0.0) -> io.NodeOutput:
        numbers(scaling_factor=scaling_factor)
        return io.NodeOutput(vae_files.load(vae_name, scaling_factor or None))


class DCAEEncode(io.ComfyNode):
    """IMAGE to LATENT in exact strips."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCAEEncode",
            search_aliases=["vae encode", "deep compression autoencoder"],
            display_name="DC-AE Encode",
            category=CATEGORY,
            description="Encodes an image with a DC-AE, in strips: memory is constant at any size. `fit` makes the "
            "sides multiples of the autoencoder's spatial factor.",
            inputs=[
                io.Image.Input("image", tooltip="Any size from one latent pixel (32, 64 or 128 pixels) up."),
                *_vae_and_strip(),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default="crop",
                    optional=True,
                    tooltip="What to do with sides that are not multiples of the autoencoder's spatial factor. crop: "
                    "center crop. pad: repeat the border; DC-AE Decode restores the original size. resize: to the "
                    "nearest multiples. Ignored when both sides are multiples.",
                ),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, image, vae, strip: int, fit: str = "crop") -> io.NodeOutput:
        vae = as_dcae(vae, "VAE Encode")
        samples = vae.encode_strips(fitted(image, vae.downscale_ratio, fit), strip)
        latent = {"samples": samples, "downscale_ratio_spacial": vae.downscale_ratio}
        latent = with_size(latent, image) if fit == "pad" else latent
        return io.NodeOutput(tagged(latent, vae.space))


class DCAEDecode(io.ComfyNode):
    """LATENT to IMAGE in exact strips, with a live preview."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCAEDecode",
            search_aliases=["vae decode", "vae decode tiled", "deep compression autoencoder"],
            display_name="DC-AE Decode",
            category=CATEGORY,
            description="Decodes a latent with a DC-AE, in strips of constant memory: no tiles, no seams, 4096x4096 in "
            "less than 2 GB besides the weights. The preview fills from the top while decoding.",
            inputs=[
                io.Latent.Input("samples", tooltip="A latent of this autoencoder; a latent of another one is refused."),
                *_vae_and_strip(),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples, vae, strip: int) -> io.NodeOutput:
        vae = as_dcae(vae, "VAE Decode")
        check_tag(samples, vae.space, "this autoencoder")
        image = vae.decode_strips(samples["samples"], strip, preview=True)
        return io.NodeOutput(original_size(samples, image, vae.downscale_ratio))


class DCAEDifference(io.ComfyNode):
    """The difference of two images, such as before and after an autoencoder round trip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCAEDifference",
            search_aliases=["psnr", "image difference", "image quality"],
            display_name="Difference and PSNR (DC-Gen)",
            category=CATEGORY,
            description="The absolute difference of two images and their PSNR in dB (higher is closer; differences are "
            "hard to see from 30 on). Images of different sizes are center-cropped to their common size.",
            inputs=[
                io.Image.Input("image_a", tooltip="For example the original."),
                io.Image.Input(
                    "image_b", tooltip="For example the autoencoder's reconstruction. As many images as in image_a."
                ),
                io.Float.Input(
                    "gain",
                    default=4.0,
                    min=1.0,
                    max=100.0,
                    step=0.5,
                    tooltip="Brightens the difference image; has no effect on the PSNR.",
                ),
            ],
            outputs=[io.Image.Output("difference"), io.Float.Output("psnr")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_a, image_b, gain: float) -> io.NodeOutput:
        numbers(gain=gain)
        first, second = common_part(image_a, image_b)
        if first.shape != second.shape:
            raise ValueError(f"cannot compare {image_a.shape[0]} image(s) with {image_b.shape[0]}")
        value = round(psnr(first, second), 2)
        difference = ((first - second).abs() * gain).clamp(0, 1)
        return io.NodeOutput(difference, value, ui=ui.PreviewText(f"PSNR {value:.2f} dB"))
