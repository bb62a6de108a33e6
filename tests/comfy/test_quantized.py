"""Core's quantized formats in DCGenModelLoader and under DCGenApply, against the same models with expanded weights."""

import json

import pytest

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
