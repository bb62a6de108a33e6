"""ComfyUI-nunchaku's loader by id and inputs; its MODEL is the stand-in of inside/foreign.py, of a tiny base."""

import os
import sys
from pathlib import Path

import folder_paths

sys.path.append(str(Path(__file__).resolve().parents[1] / "inside"))


class Loader:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_model"
    CATEGORY = "Nunchaku"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model_path": (folder_paths.get_filename_list("diffusion_models"), {}),
                "cache_threshold": ("FLOAT", {"default": 0, "min": 0, "max": 1, "step": 0.001}),
                "attention": (["nunchaku-fp16", "flash-attention2"], {}),
                "cpu_offload": (["auto", "enable", "disable"], {}),
                "device_id": ("INT", {"default": 0, "min": 0, "max": 0}),
                "data_type": (["bfloat16", "float16"], {}),
            },
            "optional": {"i2f_mode": (["enabled", "always"], {})},
        }

    def load_model(self, **kwargs):
        import foreign

        pack = next(name for name in sys.modules if name.endswith("ComfyUI-DC-Gen"))
        release = os.path.join(folder_paths.models_dir, "diffusers", "tiny-base")
        return (foreign.nunchaku_model(pack, {"release": release}),)


NODE_CLASS_MAPPINGS = {"NunchakuFluxDiTLoader": Loader}
NODE_DISPLAY_NAME_MAPPINGS = {"NunchakuFluxDiTLoader": "Nunchaku FLUX DiT Loader"}
