"""Files of `python -m dcgen.quantize` in ComfyUI: loaded, under DCGenApply, with a LoRA, and in the split form."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dcgen.adapter import LoraPair, load_adapter, save_adapter
from dcgen.convert import pack
from dcgen.merge import merged_model, split
from dcgen.quantize.formats import FORMATS
from dcgen.quantize.read import open_quantized
from dcgen.quantize.write import quantize_model
from dcgen.release import open_model

TOY = Path(__file__).resolve().parents[2] / "toy"
FAMILIES = ("flux", "sana")
# 240 inputs fill no blocks of 32.
KEEP = {("sana", "w6a8"): ["*.ff.conv_point"], ("sana", "mxfp8"): ["*.ff.conv_point"]}
# Relative error of a velocity, by the rounding of weights and, for integers, of inputs.
ERRORS = {"int8": 0.02, "w6a8": 0.04, "w4a8": 0.11, "fp8": 0.04, "mxfp8": 0.04, "nvfp4": 0.15}
# Without a multiplication of their own on a CPU, these are expanded by core: equal up to the order of float32 sums.
EXPANDED = ("fp8", "mxfp8", "nvfp4")


def inputs(family):
    generator = torch.Generator().manual_seed(11)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    of = {"base": noise(2, 16, 16, 16), "deep": noise(2, 32, 4, 4)}
    found = {}
    for kind, x in of.items():
        case = {"x": x, "sigma": torch.tensor([0.4, 0.9]), "context": noise(2, 12, 64)}
        if family == "flux":
            case |= {"pooled": noise(2, 64), "guidance": torch.tensor([3.5, 2.0])}
        else:
            case |= {"mask": torch.tensor([[1.0] * 12, [1.0] * 8 + [0.0] * 4])}
        found |= {f"{family}/{kind}/{name}": value for name, value in case.items()}
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """family -> folder with all files that ComfyUI is to load."""
    folders = {}
    for family in FAMILIES:
        folder = folders[family] = tmp_path_factory.mktemp(family)
        base = open_model(TOY / f"{family}-base")
        adapter = load_adapter(TOY / "adapter" / f"toy-{family}-dcgen.safetensors")
        adapter.tensors = {
            key: tensor.bfloat16() for key, tensor in adapter.tensors.items()
        }  # as the merged file has them
        save_adapter(folder / "adapter.safetensors", adapter)
        merged = merged_model(base, adapter)
        blocks, ends = split(merged)
        save_adapter(folder / "ends.safetensors", ends)
        pack(merged, folder / "merged-whole.safetensors", dtype=torch.float32)
        for name, fmt in FORMATS.items():
            for kind, model in (("merged", merged), ("base", base), ("blocks", blocks)):
                file = folder / f"{kind}-{name}.safetensors"
                quantize_model(model, file, fmt, keep=KEEP.get((family, name), ()))
                if kind != "blocks":
                    pack(open_quantized(file), folder / f"{kind}-{name}-expanded.safetensors")
        save_file(user_lora(base), folder / "lora.safetensors")
    return folders


def user_lora(base):
    """Rank 8 on every layer of the blocks, as large as a strong user LoRA."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for path, shape in base.backbone.linears(base.signature).items():
        if "transformer_blocks" not in path:
            continue
        weight = base.get(f"{path}.weight").float()
        pair = LoraPair(torch.randn(8, shape[1], generator=generator), torch.randn(shape[0], 8, generator=generator), 8)
        pair.B *= 0.8 * weight.norm() / pair.delta().norm()
        pair = pair.shaped(shape)
        tensors |= {f"transformer.{path}.lora_A.weight": pair.A, f"transformer.{path}.lora_B.weight": pair.B}
    return tensors


@pytest.fixture(scope="module")
def ran(comfy, written, tmp_path_factory):
    tensors = {key: value for family in FAMILIES for key, value in inputs(family).items()}
    folders = {family: str(folder) for family, folder in written.items()}
    params = {"families": folders, "formats": list(FORMATS)}
    return comfy.run("quantize:everything", tmp_path_factory.mktemp("ran"), tensors, params)


def of(ran, family, name):
    found, said = ran
    if f"{family} {name}" in said:
        pytest.skip(f"this ComfyUI lacks the format: {said[f'{family} {name}']}")
    return lambda case: found[f"{family}/{case}"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_model(ran, helper, family, name):
    velocity = of(ran, family, name)
    for kind in ("merged", "base", "applied"):
        error = helper.relative(velocity(f"{name}/{kind}"), velocity(f"{name}=/{kind}"))
        if kind != "applied":  # core rounds the sum of a weight and the adapter's LoRA once more
            assert error < (1e-5 if name in EXPANDED else ERRORS[name]), kind
    error = helper.relative(velocity(f"{name}/merged"), velocity("whole/merged"))
    assert 1e-3 < error < ERRORS[name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_lora_and_adapter_on_top(ran, helper, family, name):
    """All of the change arrives, but for the rounding of the sum, which core does at random: a few times the nearest.

    A LoRA at half its strength would be off by half of the change.
    """
    velocity = of(ran, family, name)
    rounding = helper.relative(velocity(f"{name}/merged"), velocity("whole/merged"))
    for case, plain in (("lora", "merged"), ("applied", "")):
        changed, wanted = velocity(f"{name}/{case}"), velocity(f"{name}=/{case}")
        assert helper.relative(changed, wanted) < 4 * rounding, case
        if plain:
            before = velocity(f"{name}=/{plain}")
            assert helper.relative(before, wanted) > 0.2
            change = wanted - before
            assert abs(((changed - before) * change).sum() / change.square().sum() - 1) < 0.2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_split(ran, helper, family, name):
    """Blocks and ends together are the merged model: the same tensors in another file."""
    velocity = of(ran, family, name)
    assert helper.relative(velocity(f"{name}/split"), velocity(f"{name}/merged")) < 1e-5
    said = ran[1][f"{family} {name} unmerged"]
    assert "the base without DC-Gen's LoRA" in said
    assert "merged blocks" in said


def test_formats_that_this_comfyui_lacks_are_refused_by_name(ran):
    said = {key: text for key, text in ran[1].items() if "unmerged" not in key}
    for key, text in said.items():
        _, name = key.split()
        core = FORMATS[name].core
        assert f"merged-{name}.safetensors" in text
        assert (core in text and "Update ComfyUI" in text) or (name == "w6a8" and "comfy-kitchen" in text), text


def test_cores_own_loader_reads_the_blocks(comfy, helper, tiny, tmp_path):
    """UNETLoader, which knows no DC-Gen; the toy's heads are too narrow for it."""
    wide = {"attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": (16, 56, 56)}
    base, new = (tiny.transformer(channels, seed, **wide) for channels, seed in ((64, 1), (8, 2)))
    base.save_pretrained(tmp_path / "base")
    adapter = helper.make_adapter(tmp_path / "adapter.safetensors", base, new)
    blocks, ends = split(merged := merged_model(open_model(tmp_path / "base"), adapter))
    save_adapter(tmp_path / "ends.safetensors", ends)
    formats = ("int8", "w4a8", "fp8", "nvfp4")
    for name in formats:
        for kind, model in (("merged", merged), ("blocks", blocks)):
            keep = ["*txt*"] if name == "w4a8" else []
            quantize_model(model, tmp_path / f"{kind}-{name}.safetensors", FORMATS[name], keep=keep)
    case = {f"flux/deep/{key}": value for key, value in helper.of(helper.cases(), "deep")["deep3x5"].items()}
    found, _ = comfy.run("quantize:core_blocks", tmp_path, case, {"folder": str(tmp_path), "formats": formats})
    for name in formats:
        if f"flux/{name}/merged" in found:
            assert found[f"flux/{name}/split"].equal(found[f"flux/{name}/merged"]), name
    assert found


@pytest.mark.once_per_core
def test_a_release_with_a_quantized_transformer(comfy, written, tmp_path):
    release = tmp_path / "quantized"
    (release / "transformer").mkdir(parents=True)
    shutil.copytree(TOY / "dc-ae-f32", release / "vae")
    shutil.copy(written["flux"] / "merged-fp8.safetensors", release / "transformer" / "model.safetensors")
    _, facts = comfy.run("quantize:release", tmp_path, {}, {"release": str(release)})
    assert facts == {"kind": "QuantizedTensor", "channels": 32}
