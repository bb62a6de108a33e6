"""Run inside ComfyUI: a user's LoRA on a DC-Gen MODEL through core's loader, and what the log says of it."""

import logging

import comfy.sd
import comfy.utils
from apply import adapters
from flux import bridge, cases, load_model


class _Listening(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append([record.levelname, record.getMessage()])


def everything(pack, tensors, params):
    base = load_model(pack, params["release"])
    models = {
        "adapter": bridge(pack, "flux").apply_adapter(base, adapters(pack).load_adapter(params["adapter"]), 1.0),
        "merged": load_model(pack, params["deep"]),
    }
    size = models["adapter"].model_size(), base.model_size()
    out, said = {}, {}
    for model_name, model in models.items():
        for file_name in ("lora", "blocks", "foreign"):
            ears = _Listening()
            logging.getLogger().addHandler(ears)
            found = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(params[file_name]), 0.7, 0)[
                0
            ]
            out |= cases(tensors, found, f"{model_name}-{file_name}-")
            logging.getLogger().removeHandler(ears)
            said[f"{model_name}-{file_name}"] = [
                line for line in ears.lines if line[1].startswith(("LoRA", "ERROR", "WARNING"))
            ]
        out |= cases(tensors, model, f"{model_name}-none-")
    return out, {"said": said, "size": size}
