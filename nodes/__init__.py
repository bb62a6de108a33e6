"""The graph surface: V3 nodes, one topic a file. They hold no maths and no device policy; bridge and dcgen do."""

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
    """What ComfyUI asks for the node list."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        toy.register()  # here and not in on_load, which 0.8.0 never calls
        routes.register()
        lora.register()
        return NODES
