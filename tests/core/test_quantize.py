"""python -m dcgen.quantize: what is quantized, what is written, what is refused; tests/comfy runs the files."""

import gc
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcgen.adapter import load_adapter
from dcgen.convert import main as convert
from dcgen.convert import pack
from dcgen.files import opened
from dcgen.merge import merged_model, split
from dcgen.quantize import kitchen, write
from dcgen.quantize.__main__ import main
from dcgen.quantize.formats import FORMATS
from dcgen.quantize.plan import layer_formats, plan
from dcgen.quantize.read import open_quantized
from dcgen.quantize.write import QUANTIZATION_KEY, quantize_model
from dcgen.release import open_model
from train.families import ARCHITECTURES

TOY = Path(__file__).resolve().parents[2] / "toy"
ADAPTERS = {family: TOY / "adapter" / f"toy-{family}-dcgen.safetensors" for family in ("flux", "sana")}


def toy(family="flux"):
    return merged_model(open_model(TOY / f"{family}-base"), load_adapter(ADAPTERS[family]))


def formats(units):
    return {unit.layer: (unit.stored.format.name, unit.stored.exact) for unit in units if unit.stored}


def test_what_is_quantized_how():
    found = formats(plan(toy(), FORMATS["nvfp4"]))
    linears = {"img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2"}
    linears |= {name.replace("img", "txt") for name in linears}
    wanted = {}
    for i, name in enumerate(("fp8", "nvfp4")):  # the first block is careful
        wanted |= {f"double_blocks.{i}.{layer}": (name, False) for layer in linears}
        wanted |= {f"double_blocks.{i}.{side}_mod.lin": ("fp8", True) for side in ("img", "txt")}
    for i, name in enumerate(("nvfp4", "nvfp4", "nvfp4", "fp8")):  # and the last
        wanted |= {f"single_blocks.{i}.linear{n}": (name, False) for n in (1, 2)}
        wanted |= {f"single_blocks.{i}.modulation.lin": ("fp8", True)}
    assert found == wanted


@pytest.mark.parametrize("name", FORMATS)
def test_modulation_has_8_bits_at_least_in_every_family(name):
    from dcgen.backbones import BACKBONES

    bases = {
        "flux": open_model(TOY / "flux-base").signature,
        "sana": open_model(TOY / "sana-base").signature,
        "dit": {"width": 144, "num_layers": 3, "num_attention_heads": 2, "num_embeds_ada_norm": 10},
    }
    published = {family.backbone.name: (family, known) for family, known in ARCHITECTURES.values()}
    for family in ("flux2", "zimage"):
        bases[family] = BACKBONES[family].base_signature(published[family][1].config)
    for family, backbone in BACKBONES.items():
        found = layer_formats(backbone, bases[family], FORMATS[name])
        assert found
        for layer, stored in found.items():
            adaptive = "norm1" in layer or ".norm." in layer or "adaLN" in layer
            assert stored.exact is adaptive, layer
            assert not adaptive or stored.format.bits >= 8, layer
        assert {stored.format.name for stored in found.values()} <= {name, FORMATS[name].careful or name}


def test_names_are_those_of_the_network_that_comfyui_runs():
    assert "single_blocks.0.linear1" in formats(plan(toy(), FORMATS["int8"]))
    assert "transformer_blocks.0.attn1.to_q" in formats(plan(toy("sana"), FORMATS["int8"]))


def test_layers_can_be_kept(tmp_path):
    """By the network's name or by a diffusers name of a part; what is joined is kept as one."""
    keep = ["single_blocks.2.*", "*.ff.net.2", "transformer_blocks.1.attn.to_k"]
    whole, fewer = (formats(plan(toy(), FORMATS["int8"], names)) for names in ((), keep))
    kept = {"single_blocks.2.linear1", "single_blocks.2.linear2", "single_blocks.2.modulation.lin"}
    kept |= {"double_blocks.0.img_mlp.2", "double_blocks.1.img_mlp.2", "double_blocks.1.img_attn.qkv"}
    assert set(whole) - set(fewer) == kept
    quantize_model(toy(), tmp_path / "a.safetensors", FORMATS["int8"], keep=keep)
    assert load_file(tmp_path / "a.safetensors")["single_blocks.2.linear1.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"--keep single_block.*has no such layer.*double_blocks"):
        plan(toy(), FORMATS["int8"], ["single_block.2.*"])


@pytest.mark.parametrize("engine", ["comfy-kitchen", "torch"])
@pytest.mark.parametrize("family", ["flux", "sana"])
def test_a_file(tmp_path, monkeypatch, family, engine):
    """Every weight is there once, quantized from the merged one, with what was done in the metadata."""
    pytest.importorskip("comfy_kitchen")
    if engine == "torch":
        monkeypatch.setattr(kitchen, "version", lambda: "")
    model, out = toy(family), tmp_path / "a.safetensors"
    quantize_model(model, out, FORMATS["w4a8"], keep=["*.1.*"])
    with opened(out) as file:
        metadata = file.metadata()
    done = json.loads(metadata[QUANTIZATION_KEY])
    assert done.pop("engine").startswith(engine)
    assert done == {
        "format": "w4a8",
        "layers": {
            "flux": {"int8_tensorwise": 18 - 3, "asym_w4a8_int8": 14 - 8 - 2},
            "sana": {"int8_tensorwise": 20, "asym_w4a8_int8": 20 - 10},
        }[family],
        "source": "transformer",
        "keep": ["*.1.*"],
        "adapter": f"toy-{family}",
        "strength": 1.0,
    }
    back = open_quantized(out)
    assert (back.latent, back.schedule, back.config) == (model.latent, model.schedule, model.config)
    assert set(back.entries) == set(model.entries)
    for key, entry in model.entries.items():
        weight, found = model.get(key).float(), back.get(key).float()
        error = float((found.flatten() - weight.flatten()).norm() / weight.norm().clamp_min(1e-6))
        quantized = back.entries[key].dtype != entry.dtype
        assert error < 0.085 if quantized else error == 0, key
    assert sum(back.entries[key].dtype != entry.dtype for key, entry in model.entries.items()) > 10


def test_engines_write_the_same_bytes(tmp_path, monkeypatch):
    pytest.importorskip("comfy_kitchen")
    files = {}
    for engine in ("comfy-kitchen", "torch"):
        if engine == "torch":
            monkeypatch.setattr(kitchen, "version", lambda: "")
        for name, fmt in FORMATS.items():
            file = tmp_path / f"{name}.safetensors"
            quantize_model(toy(), file, fmt)
            files[name, engine] = load_file(file)
    for name in FORMATS:
        one, other = files[name, "comfy-kitchen"], files[name, "torch"]
        assert one.keys() == other.keys()
        assert all(bits(one[key]).equal(bits(other[key])) for key in one), name


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def test_merged_first_as_the_merged_file(tmp_path):
    """--adapter gives the file that the merged model gives."""
    model = TOY / "flux-base"
    assert convert(["merge", str(model), str(ADAPTERS["flux"]), str(tmp_path / "merged.safetensors")]) == 0
    both = ["--adapter", str(ADAPTERS["flux"])]
    assert main([str(model), *both, "--format", "int8", "-o", str(tmp_path / "a.safetensors")]) == 0
    assert main([str(tmp_path / "merged.safetensors"), "--format", "int8", "-o", str(tmp_path / "b.safetensors")]) == 0
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(bits(one[key]).equal(bits(other[key])) for key in one)


def living():
    """Bytes of the tensors that are larger than a bias; what several share counts once."""
    found = [o.untyped_storage() for o in gc.get_objects() if type(o) is torch.Tensor and o.layout is torch.strided]
    return sum({store.data_ptr(): store.nbytes() for store in found if store.nbytes() > 1 << 14}.values())


def test_one_tensor_in_memory_at_a_time(tmp_path, monkeypatch):
    """While a large tensor is written, nothing else of the model is in memory but what it was made from."""
    seen, writing = [], write._tensors

    def watched(*arguments):
        for name, tensor in writing(*arguments):
            if name.endswith(".linear1.weight"):
                gc.collect()
                seen.append(living())
            yield name, tensor

    model = open_model(TOY / "flux-base")
    gc.collect()  # of what other tests left
    before = living()
    monkeypatch.setattr(write, "_tensors", watched)
    monkeypatch.setattr(kitchen, "version", lambda: "")  # it takes the whole weight in float32
    monkeypatch.setattr("dcgen.quantize.formats.ROW_VALUES", 192 * 32)
    quantize_model(model, tmp_path / "a.safetensors", FORMATS["int8"])
    largest = max(entry.nbytes for entry in (unit.entry for unit in plan(model, FORMATS["int8"])))
    # The weight in bfloat16, and in the format at half its size; the model has 20 times as much. Rotations are kept.
    rotations = 4 * (256**2 + 64**2)
    assert largest / 2 < min(seen) - before
    assert max(seen) - before <= 1.5 * largest + rotations


def run(*arguments):
    return main([*map(str, arguments)])


def refusal(capsys, *arguments):
    """The message of a command that fails; nothing is written."""
    assert run(*arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("dcgen.quantize: ")
    assert "Traceback" not in said
    return said


def test_split_is_base_and_ends(tmp_path, capsys):
    out, ends = tmp_path / "blocks.safetensors", tmp_path / "ends.safetensors"
    base, adapter = TOY / "flux-base", ADAPTERS["flux"]
    assert run(base, "--adapter", adapter, "--format", "fp8", "-o", out, "--split", ends) == 0
    blocks, wanted = open_quantized(out), open_model(base)
    assert blocks.config["in_channels"] == wanted.config["in_channels"]
    assert not wanted.latent.differences(blocks.latent)
    for key in ("x_embedder.weight", "proj_out.bias"):
        assert blocks.get(key).equal(wanted.get(key))
    found = load_adapter(ends)
    assert not found.lora
    for key, tensor in load_adapter(adapter).tensors.items():
        assert found.tensors[key].equal(tensor)
    found.check_weights(blocks.identity(), 8, "the blocks")
    with pytest.raises(ValueError, match="the base without DC-Gen's LoRA"):
        found.check_weights(wanted.identity(), 16, "the base")
    said = refusal(capsys, adapter.parent.parent / "flux-base", "--format", "fp8", "-o", out, "--split", ends)
    assert "--adapter" in said


def test_ends_tell_merged_blocks_from_the_base_at_4_bits():
    """Also where the LoRA is so small that both are within the rounding of 4 bits."""
    model = toy()
    model.adapter.lora = {path: small(pair) for path, pair in model.adapter.lora.items()}
    blocks, ends = split(model)
    assert ends.base_weights.distance(model.base.identity()) < 0.1
    noisy = {name: value * (1 + 0.05 * torch.randn(value.shape)) for name, value in blocks.identity().values.items()}
    ends.check_weights(type(ends.base_weights)(noisy), 4, "the blocks")
    with pytest.raises(ValueError, match="the base without DC-Gen's LoRA"):
        ends.check_weights(model.base.identity(), 4, "the base")


def small(pair):
    pair.B = pair.B * 0.1
    return pair


def test_convert_merge_writes_the_split_form_unquantized(tmp_path):
    out, ends = tmp_path / "blocks.safetensors", tmp_path / "ends.safetensors"
    assert convert(["merge", str(TOY / "flux-base"), str(ADAPTERS["flux"]), str(out), "--split", str(ends)]) == 0
    blocks = merged_model(open_model(out), load_adapter(ends))
    for key, entry in toy().entries.items():
        assert blocks.get(key).to(entry.dtype).equal(toy().get(key)), key


@pytest.mark.parametrize("what", ["ours", "cast", "scaled"])
def test_quantized_input_is_refused(tmp_path, capsys, what):
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    pack(toy(), file, dtype=torch.float8_e4m3fn if what == "cast" else None)
    if what == "ours":
        quantize_model(toy(), file, FORMATS["nvfp4"])
    if what == "scaled":
        save_file({**load_file(file), "double_blocks.0.img_mlp.0.scale_weight": torch.ones(())}, file)
    said = refusal(capsys, file, "--format", "int8", "-o", out)
    assert str(file) in said
    assert "quantized already" in said
    assert list(tmp_path.iterdir()) == [file]


def test_gguf_input_is_refused(tmp_path, capsys):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert "a.gguf: a GGUF file" in refusal(
        capsys, tmp_path / "a.gguf", "--format", "int8", "-o", tmp_path / "b.safetensors"
    )


def test_adapter_of_another_base_is_refused(tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    said = refusal(capsys, TOY / "flux-base", "--adapter", ADAPTERS["sana"], "--format", "int8", "-o", out)
    assert "sana adapter" in said
    pack(toy(), tmp_path / "merged.safetensors")
    said = refusal(
        capsys, tmp_path / "merged.safetensors", "--adapter", ADAPTERS["flux"], "--format", "int8", "-o", out
    )
    assert "merged.safetensors" in said
    assert not out.exists()


def test_inputs_that_do_not_divide_are_refused_by_layer(tmp_path, capsys):
    base, adapter, out = TOY / "sana-base", ADAPTERS["sana"], tmp_path / "a.safetensors"
    said = refusal(capsys, base, "--adapter", adapter, "--format", "mxfp8", "-o", out)
    assert "transformer_blocks.0.ff.conv_point (its 240 inputs are not a multiple of 32)" in said
    assert "--keep" in said
    assert not out.exists()
    assert run(base, "--adapter", adapter, "--format", "mxfp8", "-o", out, "--keep", "*.conv_point") == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_before_work(tmp_path, capsys, monkeypatch, value):
    """In the last tensor of the file, so that one found on the way would come after work was done."""
    tensors = load_file(TOY / "flux-base" / "transformer" / "diffusion_pytorch_model.safetensors")
    last = max(tensors)
    tensors[last].flatten()[3] = value
    save_file(tensors, tmp_path / "a.safetensors")
    monkeypatch.setattr(write, "quantized", lambda *_: pytest.fail("work had begun"))
    out = tmp_path / "b.safetensors"
    said = refusal(capsys, tmp_path / "a.safetensors", "--latent", "flux-f8c16", "--format", "int8", "-o", out)
    assert last in said
    assert "a.safetensors" in said
    assert not out.exists()


def test_a_merge_that_leaves_float16_is_refused(tmp_path, capsys):
    base = load_file(TOY / "flux-base" / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({key: tensor.half() for key, tensor in base.items()}, tmp_path / "a.safetensors")
    adapter, out = ADAPTERS["flux"], tmp_path / "b.safetensors"
    big = ["--latent", "flux-f8c16", "--adapter", adapter, "--strength", "1e7", "--format", "int8", "-o", out]
    said = refusal(capsys, tmp_path / "a.safetensors", *big)
    assert "toy-vae" in said or "infinite after the merge" in said
    assert not out.exists()


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    seen = []

    def stop(step, _steps, _name):
        seen.append(step)
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(toy(), tmp_path / "a.safetensors", FORMATS["int8"], progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_the_size_and_writes_nothing(tmp_path, capsys):
    arguments = [TOY / "flux-base", "--adapter", ADAPTERS["flux"], "--format", "w4a8", "-o", tmp_path / "a.safetensors"]
    assert run(*arguments, "--dry-run") == 0
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert run(*arguments) == 0
    assert capsys.readouterr().out == said
    with open(tmp_path / "a.safetensors", "rb") as file:
        header = struct.unpack("<Q", file.read(8))[0]
    size = (tmp_path / "a.safetensors").stat().st_size - 8 - header
    assert f"{size / 1e9:.3f} GB" in said


def test_dequantize_writes_an_ordinary_model(tmp_path, capsys):
    quantize_model(toy(), tmp_path / "a.safetensors", FORMATS["int8"])
    assert run(tmp_path / "a.safetensors", "--dequantize", "-o", tmp_path / "b.safetensors") == 0
    model, wanted = open_model(tmp_path / "b.safetensors"), toy()
    for key in wanted.entries:
        error = (model.get(key).float() - wanted.get(key).float()).norm()
        assert error <= 0.011 * wanted.get(key).float().norm(), key
    said = refusal(capsys, tmp_path / "b.safetensors", "--dequantize", "-o", tmp_path / "c.safetensors")
    assert "no layer of this file is quantized" in said
