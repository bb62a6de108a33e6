"""DC-Gen for ComfyUI. ComfyUI loads this folder; nothing else should import it (train/ and dcgen/ stand alone)."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to get the pack's nodes. The import waits until here, so this file loads without ComfyUI."""
    from .nodes import DCGenExtension

    return DCGenExtension()
