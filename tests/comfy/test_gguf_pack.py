"""GGUF files of python -m dcgen.quantize in the real ComfyUI-GGUF, where it is at hand.

DCGEN_GGUF_PACK names a checkout of github.com/city96/ComfyUI-GGUF. Without one these tests are skipped, and
test_foreign_models.py has stand-ins for its classes.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dcgen.convert import pack
from dcgen.merge import merged_model, split
from dcgen.quantize.gguf_file import GGUF_FORMATS, write_gguf
from dcgen.quantize.plan import plan
from dcgen.release import open_model

PACK = os.environ.get("DCGEN_GGUF_PACK", "")


class Rounded:
    """A model with the values that a GGUF file keeps of it."""

    def __init__(self, merged, blocks, fmt):
        self.merged, self.units = merged, {part: unit for unit in plan(blocks, fmt) for part in unit.parts}

    def get(self, key):
        weight, unit = type(self.merged).get(self.merged, key), self.units.get(key)
        if unit is None or unit.stored is None:
            return weight
        fmt = unit.stored.format
        return fmt.dequantize(fmt.quantize(weight.float()), tuple(weight.shape)).to(weight.dtype)


@pytest.mark.skipif(not PACK or find_spec("gguf") is None, reason="DCGEN_GGUF_PACK names no ComfyUI-GGUF")
@pytest.mark.once_per_core
def test_blocks_from_gguf_and_ends_on_top(comfy, helper, tiny, tmp_path, monkeypatch):
    from dcgen.adapter import save_adapter

    wide = {"attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": (16, 56, 56)}
    wide |= {"joint_attention_dim": 64, "pooled_projection_dim": 32}
    base, new = (tiny.transformer(channels, seed, **wide) for channels, seed in ((64, 1), (8, 2)))
    base.save_pretrained(tmp_path / "base")
    adapter = helper.make_adapter(tmp_path / "adapter.safetensors", base, new)
    blocks, ends = split(merged := merged_model(plain := open_model(tmp_path / "base"), adapter))
    save_adapter(tmp_path / "ends.safetensors", ends)
    for name, fmt in GGUF_FORMATS.items():
        write_gguf(blocks, tmp_path / f"blocks-{name}.gguf", fmt)
        write_gguf(plain, tmp_path / f"base-{name}.gguf", fmt)
        monkeypatch.setattr(merged, "get", Rounded(merged, blocks, fmt).get)
        pack(merged, tmp_path / f"whole-{name}.safetensors")
    case = {key: value for key, value in helper.cases().items() if key.startswith("deep")}
    shapes = {"context": (24, 64), "pooled": (32,)}
    for key, value in case.items():
        shape = shapes.get(key.partition("/")[2])
        case[key] = torch.randn(len(value), *shape, generator=torch.Generator().manual_seed(3)) if shape else value
    (tmp_path / "packages").mkdir()  # the one package, without the others beside it, for ComfyUI's interpreter
    (tmp_path / "packages" / "gguf").symlink_to(Path(find_spec("gguf").origin).parent)
    path = [str(tmp_path / "packages")]
    params = {"folder": str(tmp_path), "pack": PACK, "path": path, "formats": list(GGUF_FORMATS)}
    found, said = comfy.run("gguf_pack:split_form", tmp_path, case, params, alone=True)
    for name in GGUF_FORMATS:
        for shape in ("deep4x4", "deep3x5"):
            assert helper.relative(found[f"{name}/split/{shape}"], found[f"{name}/whole/{shape}"]) < 2e-3, name
        assert "the base without DC-Gen's LoRA" in said[name]
