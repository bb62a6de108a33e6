"""SANA through the files: .pth to single file to release and back; adapters with 1x1 convolutions; merge, extract."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from dcgen.adapter import Adapter, LoraPair, load_adapter, merge, save_adapter
from dcgen.backbones import BACKBONES
from dcgen.convert import main, merge_file, unpack
from dcgen.extract import extract
from dcgen.release import open_model
from dcgen.schedule import Schedule
from dcgen.spaces import SPACES
from train.families import FAMILIES

diffusers = pytest.importorskip("diffusers")
get_2d_sincos_pos_embed = diffusers.models.embeddings.get_2d_sincos_pos_embed
sana, family = BACKBONES["sana"], FAMILIES["sana"]
TINY = {"num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "num_layers": 2}
TINY |= {"cross_attention_dim": 64, "caption_channels": 24, "qk_norm": "rms_norm_across_heads"}


def make(seed: int = 0, **config):
    torch.manual_seed(seed)
    return diffusers.SanaTransformer2DModel(**{**TINY, **config}).eval()


def adapter_for(config: dict, rank: int = 2) -> Adapter:
    base = sana.base_signature(config)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    lora = {}
    for path, (outputs, inputs, *ones) in sana.linears(base).items():
        if family.is_lora_target(path):
            lora[path] = LoraPair(draw(rank, inputs, *ones), draw(outputs, rank, *ones), 3.0)
    ends = {**sana.latent_shapes(base, 128, 1), **sana.extra_shapes(base)}
    tensors = {key: draw(*shape) for key, shape in ends.items()}
    return Adapter("sana", tensors, lora, SPACES["dc-ae-1.5-f64c128"], base, {"rule": "static", "shift": 3.0})


def test_pth_to_file_to_release(tmp_path):
    """NVlabs' .pth with its wrapper, null caption and positions: what tensors do not tell is set by hand. The null
    caption, which others' converters lose, stays where original names are written."""
    model = make(sample_size=64, interpolation_scale=1.0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    native = sana.to_original(state)
    extra = {"y_embedder.y_embedding": torch.randn(300, 24), "pos_embed": torch.zeros(1, 9, 64)}
    torch.save({"state_dict": {**native, **extra}, "epoch": 3}, tmp_path / "Sana.pth")
    out = tmp_path / "sana.safetensors"
    command = ["pack", str(tmp_path / "Sana.pth"), str(out), "--latent", "dc-ae-f32c32-sana-1.0"]
    assert main([*command, "--set", "sample_size=64", "--set", "interpolation_scale=1.0"]) == 0
    packed = load_file(out)
    native["y_embedder.y_embedding"] = extra["y_embedder.y_embedding"]
    assert set(packed) == set(native)
    assert all(torch.equal(packed[key], native[key]) for key in native)
    back = unpack(open_model(out), tmp_path / "release")
    again = diffusers.SanaTransformer2DModel.from_pretrained(back / "transformer")
    assert again.config.interpolation_scale == 1.0
    assert again.patch_embed.base_size == 64
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert open_model(back).latent == SPACES["dc-ae-f32c32-sana-1.0"]
    assert open_model(back).schedule == Schedule("static", shift=3.0)


@pytest.mark.parametrize(("side", "scale", "shift"), [(3, None, 3.0), (8, 1.0, 3.0), (16, 2.0, 6.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_read_from_an_original_file(tmp_path, side, scale, shift, dtype):
    """As the 1K, 2K and 4K files have them: a table of zeros, one of whole steps, one of half steps."""
    model = make(sample_size=side, interpolation_scale=scale)
    table = torch.zeros(1, side * side, 64)
    if scale is not None:
        table[0] = get_2d_sincos_pos_embed(64, side, interpolation_scale=scale, base_size=side, output_type="pt")
    native = sana.to_original(model.state_dict())
    tensors = {f"model.{key}": value.to(dtype) for key, value in {**native, "pos_embed": table}.items()}
    torch.save({"state_dict": tensors}, tmp_path / "Sana.pth")
    opened = open_model(tmp_path / "Sana.pth")
    assert (opened.config["sample_size"], opened.config["interpolation_scale"]) == (side, scale)
    assert sana.default_schedule(SPACES["dc-ae-f32c32-sana-1.0"], opened.config).shift == shift
    assert set(opened.entries) == set(model.state_dict())
    with pytest.raises(ValueError, match=r"pos_embed has 10 positions"):
        sana.read_values({"pos_embed": None}, lambda key: torch.zeros(1, 10, 64))


def test_set_refuses_what_is_no_field(tmp_path, capsys):
    make().save_pretrained(tmp_path / "transformer")
    for field, told in (("sample=3", "no field 'sample'"), ("sample_size", "FIELD=VALUE"), ("sample_size=x", "JSON")):
        assert main(["pack", str(tmp_path), str(tmp_path / "a.safetensors"), "--set", field]) == 1
        assert told in capsys.readouterr().err


@torch.no_grad()
def test_adapter_on_convolutions_is_pefts(tmp_path):
    """A LoRA on linears and 1x1 convolutions, run unmerged by peft, gives what the merged weights give."""
    peft = pytest.importorskip("peft")
    model, plain = make(in_channels=128, out_channels=128), make(in_channels=128, out_channels=128)
    adapter = adapter_for(dict(model.config))
    adapter.tensors = {key: model.state_dict()[key].clone() for key in adapter.tensors}
    save_adapter(tmp_path / "a.safetensors", adapter)
    adapter = load_adapter(tmp_path / "a.safetensors")
    config = peft.LoraConfig(r=2, lora_alpha=3.0, target_modules="|".join(family.lora_targets))
    injected = peft.inject_adapter_in_model(config, model)
    for path, pair in adapter.lora.items():
        module = injected.get_submodule(path)
        module.lora_A["default"].weight.copy_(pair.A)
        module.lora_B["default"].weight.copy_(pair.B)
    assert sum(hasattr(module, "lora_A") for module in injected.modules()) == len(adapter.lora) == 2 * 10
    call = (torch.randn(1, 128, 3, 4), torch.tensor([0.7]), {"prompt_embeds": torch.randn(1, 5, 24)})
    expected, before = family.velocity(injected, *call), family.velocity(plain, *call)
    plain.load_state_dict(merge(plain.state_dict(), adapter))
    torch.testing.assert_close(family.velocity(plain, *call), expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2


def test_extract_undoes_merge(tmp_path):
    make().save_pretrained(tmp_path / "base" / "transformer")
    base = open_model(tmp_path / "base")
    adapter = adapter_for(base.config, rank=3)
    merged = open_model(merge_file(base, adapter, tmp_path / "merged.safetensors"))
    assert merged.config["in_channels"] == merged.config["out_channels"] == 128
    found, kept = extract(merged, base, rank=8)
    assert {layer.rank for layer in kept} == {3}
    assert set(found.lora) == set(adapter.lora)
    assert set(found.tensors) == set(adapter.tensors)
    save_adapter(tmp_path / "a.safetensors", found)
    again = merge({key: base.get(key) for key in base.entries}, load_adapter(tmp_path / "a.safetensors"))
    for key, tensor in again.items():
        torch.testing.assert_close(tensor, merged.get(key), rtol=1e-5, atol=1e-6)


def test_flux_and_sana_do_not_mix(tmp_path):
    make().save_pretrained(tmp_path / "base" / "transformer")
    base = open_model(tmp_path / "base")
    deeper = adapter_for({**base.config, "num_layers": 4})
    with pytest.raises(ValueError, match=r"base/transformer is not a base for this sana adapter: num_layers: 2"):
        merge_file(base, deeper, tmp_path / "merged.safetensors")
    flux_config = {"num_layers": 1, "num_single_layers": 0, "num_attention_heads": 2, "attention_head_dim": 8}
    flux_config |= {"axes_dims_rope": (4, 2, 2), "joint_attention_dim": 8, "pooled_projection_dim": 8}
    diffusers.FluxTransformer2DModel(**flux_config).save_pretrained(tmp_path / "flux" / "transformer")
    with pytest.raises(ValueError, match=r"flux/transformer is a flux model, the merged one sana"):
        extract(base, open_model(tmp_path / "flux"), latent=SPACES["dc-ae-f32c32-sana-1.0"])
    with pytest.raises(ValueError, match=r"sana adapter.*flux"):
        merge_file(open_model(tmp_path / "flux"), adapter_for(base.config), tmp_path / "merged.safetensors")
