"""Nodes for the tests only, as a pack of a ComfyUI server."""

import os

import folder_paths
from safetensors.torch import save_file


class Dump:
    """SaveImage cuts to 8 bits, this keeps the floats."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "dump"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "name": ("STRING", {})}}

    def dump(self, images, name):
        path = os.path.join(folder_paths.get_output_directory(), name + ".safetensors")
        save_file({"images": images.float().cpu().contiguous()}, path)
        return {}


class Nothing:
    """A graph of its own that takes no time."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "nothing"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def nothing(self):
        return {}


NODE_CLASS_MAPPINGS = {"TestDump": Dump, "TestNothing": Nothing}
