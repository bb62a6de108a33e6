"""The V3 nodes, one topic per file. They hold no maths and no device policy: those are in bridge and dcgen."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import families
from .bridge import lora, routes, toy
from .compare import DCGenCompare
from .dcae import DCAEDecode, DCAEDifference, DCAEEncode, DCAELoader
from .latent import DCGenEmptyLatent, DCGenLatentComposite
from .model import DCGenApply, DCGenModelLoader, DCGenReleaseLoader
from .sampling import DCGen4KSampler, DCGenScheduler

NODES: list[type[io.ComfyNode]] = [
    DCGenReleaseLoader,
    DCGenModelLoader,
    DCGenApply,
    DCAELoader,
    DCAEEncode,
    DCAEDecode,
    DCAEDifference,
    DCGenEmptyLatent,
    DCGenLatentComposite,
    DCGenScheduler,
    DCGen4KSampler,
    *families.NODES,
    DCGenCompare,
]


class DCGenExtension(ComfyExtension):
    """Gives ComfyUI the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        toy.register()  # here and not in on_load, which 0.8.0 never calls
        routes.register()
        lora.register()
        return NODES
