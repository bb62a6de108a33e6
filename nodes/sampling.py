"""Schedules and sampling."""

from __future__ import annotations

from comfy_api.latest import io

from . import inputs
from .bridge import samplers
from .bridge.model_info import empty_latent
from .bridge.sampling import sample, sigmas_for, start
from .checks import numbers
from .model import CATEGORY
from .schema import schema
from .sizes import LARGEST, size_or_default

SEED_MAX = 0xFFFFFFFFFFFFFFFF


class DCGenScheduler(io.ComfyNode):
    """Sigmas by the checkpoint's own rule and the latent's token count."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGenScheduler",
            search_aliases=["sigmas", "shift", "flow schedule"],
            display_name="Scheduler (DC-Gen)",
            category=CATEGORY,
            description="Sigmas with the checkpoint's own shift, for the actual number of tokens of the latent. Do not "
            "use ModelSamplingFlux: it assumes 16-pixel patches, which is wrong for deep latents.",
            inputs=[
                io.Model.Input("model", tooltip="Its checkpoint decides the rule of the shift."),
                io.Latent.Input("latent", tooltip="Only its size is read: the shift depends on it."),
                inputs.steps("Sampling steps."),
                inputs.denoise(
                    "1 = from pure noise. Less keeps more of the latent's image: the last `steps` of a schedule of "
                    "steps / denoise. 0 gives no steps."
                ),
                inputs.shift(),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model, latent, steps: int, denoise: float, shift: float = 0.0) -> io.NodeOutput:
        numbers(denoise=denoise, shift=shift)
        return io.NodeOutput(sigmas_for(model, latent, steps, denoise, shift))


class DCGen4KSampler(io.ComfyNode):
    """Schedule, guidance and sampling in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DCGen4KSampler",
            search_aliases=["ksampler", "4k sampler", "high resolution"],
            display_name="Sampler 4K (DC-Gen)",
            category=CATEGORY,
            description="Guidance, schedule and sampling in one node, for text-to-image and image-to-image up to 4K. "
            "Gives the same image, bit for bit, as core's samplers with the same sigmas.",
            inputs=[
                io.Model.Input("model", tooltip="A DC-Gen model (or a base FLUX or SANA on its own latent)."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="An empty latent for text-to-image, an encoded image for image-to-image or refining. Its "
                    "noise mask is used. If not connected, an empty latent of `size` is made.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEED_MAX,
                    control_after_generate=True,
                    tooltip="Seed of the initial noise.",
                ),
                inputs.steps(
                    "Sampling steps: 20 as published, 4 for FLUX.2 klein, 9 for Z-Image-Turbo, 1 or 2 for SANA-Sprint."
                ),
                io.Float.Input(
                    "guidance",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Distilled guidance scale, as published 3.5 for FLUX and 4.5 for SANA-Sprint. Replaces the "
                    "conditioning's own. Ignored by models without a guidance embedding (schnell, klein, Z-Image, "
                    "SANA).",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=samplers.SAMPLER_NAMES,
                    tooltip="As published: euler for FLUX, flow_dpmpp_2m for SANA, flow_consistency for SANA-Sprint.",
                ),
                inputs.denoise(
                    "1 = from pure noise. Less keeps more of the latent's image; 0.3 to 0.5 refines it. Leave it at 1 "
                    "for an empty latent."
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="For true classifier-free guidance, with two model runs per step. Ignored when cfg is 1.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Strength of true classifier-free guidance. Ignored without a negative.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="An image to start from instead of the latent's content: it is scaled to the latent's size "
                    "(so a 1K image can be refined at 4K) and encoded with `vae`. Set denoise below 1.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The model's autoencoder, to encode `image`. Ignored without an image.",
                ),
                inputs.size(
                    "Size of the image when no `latent` is connected: 1K for f32 models, 2K and 4K for f64. Ignored "
                    "with a latent.",
                    LARGEST,
                ),
                *inputs.pixels("Ignored when `size` names a size, and with a latent.", optional=True),
                inputs.shift(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        seed,
        steps,
        guidance,
        sampler_name,
        denoise,
        latent=None,
        negative=None,
        cfg=1.0,
        image=None,
        vae=None,
        size=None,
        width=None,
        height=None,
        batch_size=1,
        shift=0.0,
    ) -> io.NodeOutput:
        numbers(guidance=guidance, denoise=denoise, cfg=cfg, shift=shift)
        latent = latent or empty_latent(model, *size_or_default(size, width, height), batch_size)
        latent, sigmas = start(model, latent, image, vae, steps, denoise, shift)
        return io.NodeOutput(sample(model, latent, sigmas, seed, sampler_name, positive, negative, cfg, guidance))
