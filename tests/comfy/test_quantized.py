"""Core's quantized formats in DCGenModelLoader and under DCGenApply, against the same models with expanded weights."""

import json

import pytest
import torch

STYLES = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "metadata", "scaled_fp8", "prefixed", "cast")
CASES = ("deep4x4", "deep3x5")


@pytest.fixture(scope="module")
def ran(comfy, helper, tiny, base_release, deep_release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    base, deep = base_release[1].transformer, deep_release[1].transformer
    helper.make_adapter(folder / "adapter.safetensors", base, tiny.transformer(8, seed=77))
    configs = [
        json.dumps({key: value for key, value in dict(model.config).items() if not key.startswith("_")})
        for model in (deep, base)
    ]
    params = {
        "release": str(base_release[0]),
        "deep": str(deep_release[0]),
        "folder": str(folder),
        "adapter": str(folder / "adapter.safetensors"),
        "lora": helper.make_lora(folder / "user.safetensors", helper.pairs(helper.targets(deep), 4, seed=3)),
        "config": configs[0],
        "base_config": configs[1],
    }
    return comfy.run("quantized:everything", folder, helper.cases(), params)


@pytest.mark.parametrize("style", STYLES)
def test_files_in_every_layout(ran, helper, style):
    """Without a low-precision matmul on the CPU, core expands each weight: equal up to the order of float32 sums."""
    found, facts = ran
    if style not in facts["kinds"]:
        assert style not in facts["known"]
        pytest.skip(f"this ComfyUI has no {style}; that it is refused by name is tested below")
    assert facts["kinds"][style] == ("Parameter" if style == "cast" else "QuantizedTensor")
    for case in CASES:
        assert helper.relative(found[f"{style}-{case}"], found[f"{style}={case}"]) < 1e-5, case
        # The rounding of the weights themselves shows, so this was not the unquantized model.
        assert 5e-3 < helper.relative(found[f"{style}-{case}"], found[f"whole-{case}"]) < 0.1, case


@pytest.mark.parametrize("style", ["float8_e4m3fn", "float8_e5m2", "nvfp4"])
def test_lora_on_top(ran, helper, style):
    """Core merges a LoRA and rounds the sum again; unloading it gives the file's own weights back."""
    found, _ = ran
    for case in CASES:
        plain, wanted = found[f"{style}={case}"], found[f"{style}=lora-{case}"]
        assert_rounded(helper, found, style, case, plain, found[f"{style}-lora-{case}"], wanted)
        assert found[f"{style}-after-{case}"].equal(found[f"{style}-{case}"])


def assert_rounded(helper, found, style, case, plain, changed, wanted):
    """A LoRA's change of a velocity is all there but for rounding.

    Core rounds each sum up or down at random, which is off by 2 to 3.5 times as much as the nearest values that the
    file has, and hardly along the change itself: a LoRA at half its strength would show.
    """
    nearest = helper.relative(found[f"{style}-{case}"], found[f"whole-{case}"])
    assert helper.relative(changed, wanted) < 4 * nearest < 0.2 < helper.relative(wanted, plain)
    share = ((changed - plain) * (wanted - plain)).sum() / (wanted - plain).square().sum()
    assert abs(share - 1) < 0.3


@pytest.mark.parametrize("style", ["float8_e4m3fn", "nvfp4"])
def test_adapter_on_a_quantized_base(ran, helper, style):
    """Exact without LoRA (strength 0); with it, but for core's second rounding."""
    found, facts = ran
    for case in CASES:
        aligned, full = (found[f"{style}=applied{strength}-{case}"] for strength in (0, 1))
        assert helper.relative(found[f"{style}-applied0-{case}"], aligned) < 1e-5
        assert helper.relative(full, aligned) > 0.45
        assert_rounded(helper, found, style, case, aligned, found[f"{style}-applied1-{case}"], full)
    for case in ("base4x4", "base3x5"):
        assert helper.relative(found[f"{style}-base-{case}"], found[f"{style}=base-{case}"]) < 1e-5
    assert facts["kept"][style], "the base's weights were replaced"


def test_files_this_comfyui_cannot_read(ran):
    _, facts = ran
    wanted = {
        "format": ["zfp7", *facts["known"], "Update ComfyUI"],
        "smoothed": ["pre_quant_scale", "do not fit"],
        "diffusers names": ["original key names"],
    }
    if "mxfp8" not in facts["known"]:
        wanted["mxfp8"] = ["mxfp8", *facts["known"], "Update ComfyUI"]
    assert set(facts["refused"]) == set(wanted)
    for name, parts in wanted.items():
        for part in (f"bad-{name}.safetensors", *parts):
            assert part in facts["refused"][name], facts["refused"][name]


# Formats of newer cores, on layers as wide as they need ----------------------------------------------------------

WIDTH = 256
# What rounding weights (and, where a format says so, activations) does to the velocity of these random models, twice
# over; a model loaded wrongly is off by 1.
ROUNDED = {
    "int8_tensorwise": 0.03,
    "int8_tensorwise convrot": 0.03,
    "asym_w4a8_int8": 0.3,
    "convrot_w4a4": 0.5,
    "mxfp8": 0.12,
    "nvfp4": 0.4,
    "float8_e4m3fn": 0.12,
}


@pytest.fixture(scope="module")
def newer(comfy, helper, tiny, tmp_path_factory):
    import diffusers

    folder = tmp_path_factory.mktemp("newer")
    generator = torch.Generator().manual_seed(5)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    wide = {"attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": (16, 56, 56)}
    sana = {
        "num_attention_heads": 8,
        "attention_head_dim": 32,
        "num_layers": 2,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 64,
        "cross_attention_dim": WIDTH,
        "caption_channels": WIDTH,
        "mlp_ratio": 2.0,
        "patch_size": 1,
    }
    families, tensors = {}, {}
    for family, kind, channels in (("flux", "base", 16), ("flux", "deep", 8), ("sana", "base", 4), ("sana", "deep", 8)):
        if family == "flux":
            model = tiny.transformer(channels * (4 if kind == "base" else 1), 1, joint_attention_dim=WIDTH, **wide)
        else:
            model = diffusers.SanaTransformer2DModel(in_channels=channels, out_channels=channels, **sana)
            model = tiny.randomize(model, 2)
        release = folder / f"{family}-{kind}"
        model.save_pretrained(release / "transformer")
        factor = 8 if kind == "base" else 32
        space = {"latent_channels": channels, "scaling_factor": 0.3611, "shift_factor": 0.1159}
        vae = {"_class_name": "AutoencoderKL", "block_out_channels": [32] * (factor.bit_length()), **space}
        (release / "vae").mkdir()
        (release / "vae" / "config.json").write_text(json.dumps(vae))
        config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
        families.setdefault(family, {}).update({kind: str(release), f"{kind}_config": json.dumps(config)})
        of = {"x": noise(1, channels, 8, 8), "sigma": torch.tensor([0.6]), "context": noise(1, 12, WIDTH)}
        of |= (
            {"pooled": noise(1, 20), "guidance": torch.tensor([3.5])}
            if family == "flux"
            else {"mask": torch.ones(1, 12)}
        )
        tensors |= {f"{family}-{kind}/{name}": value for name, value in of.items()}
    params = {"folder": str(folder), "families": families, "core": True}
    return comfy.run("quantized:newer", folder, tensors, params)


@pytest.mark.parametrize("name", ROUNDED)
def test_newer_formats(newer, helper, name):
    """Bit-equal to core's own loader where it can load the model; on deep latents near the expanded weights."""
    found, facts = newer
    if name not in facts["known"]:
        pytest.skip(f"this ComfyUI has no {name}; that it is refused by name is tested above")
    assert found[f"{name}/ours/flux-base"].equal(found[f"{name}/core/flux-base"])
    for case in ("flux-base", "flux-deep", "sana-base", "sana-deep"):
        ours, expanded, whole = (found[f"{kind}/{case}"] for kind in (f"{name}/ours", f"{name}/expanded", "whole"))
        assert helper.relative(ours, expanded) < ROUNDED[name], case
        assert helper.relative(ours, whole) > 1e-3, case
