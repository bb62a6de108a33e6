"""Loading and saving: both key formats, wrappers, what stays open, and damaged or mislabelled files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcgen.dcae import DCAE, VARIANTS, DCAEConfig, DCAEError, load_dcae, save_dcae
from dcgen.dcae.identify import candidates, identify, infer_config
from dcgen.dcae.keys import rename_table, stored_shapes, to_original


def meta_state(config: DCAEConfig) -> dict[str, torch.Tensor]:
    return DCAE(dataclasses.replace(config, scaling_factor=1.0), device="meta").state_dict()


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_alone_tell_the_architecture(name: str) -> None:
    state = meta_state(VARIANTS[name])
    table = rename_table(VARIANTS[name], list(state))
    original = stored_shapes(table, {key: tensor.shape for key, tensor in state.items()})
    for shapes, kind in (({k: v.shape for k, v in state.items()}, "diffusers"), (original, "original")):
        found = infer_config(shapes, kind)
        assert found.architecture == VARIANTS[name].architecture
        assert name in [variant.name for variant in candidates(found)]


def test_key_and_parameter_counts_of_the_published_files() -> None:
    # total parameters and diffusers keys, facts about the published checkpoints
    expected = {
        "dc-ae-f32c32-sana-1.0": (312_250_275, 375),
        "dc-ae-lite-f32c32-sana-1.1": (421_181_228, 293),
        "dc-ae-f32c32-in-1.0": (323_356_460, 362),
        "dc-ae-f64c128-in-1.0": (676_896_140, 418),
        "dc-ae-f128c512-in-1.0": (1_120_682_252, 474),
        "dc-ae-1.5-f32c128": (523_609_740, 296),
        "dc-ae-1.5-f64c128": (714_741_644, 340),
    }
    for name, (parameters, keys) in expected.items():
        model = DCAE(dataclasses.replace(VARIANTS[name], scaling_factor=1.0), device="meta")
        assert sum(value.numel() for value in model.parameters()) == parameters, name
        assert len(model.state_dict()) == keys, name


def test_original_keys_convert_as_diffusers_converts_them(tiny: DCAEConfig, pair) -> None:
    _, model = pair(tiny)
    state = model.state_dict()
    table = rename_table(tiny, list(state))
    original = to_original(state, table)
    theirs = convert_autoencoder_dc_checkpoint_to_diffusers(dict(original))
    if tiny.name.startswith("dc-ae-lite"):
        # diffusers decides conv_out by conv_in, which is wrong for this one
        theirs = {
            k.replace("decoder.conv_out.", "decoder.conv_out.conv."): v
            for k, v in theirs.items()
            if not k.startswith("decoder.conv_out.conv.")
        } | {k: v for k, v in theirs.items() if k.startswith("decoder.conv_out.conv.")}
    assert set(theirs) == set(state)
    for key, tensor in state.items():
        assert torch.equal(theirs[key].reshape(tensor.shape), tensor), key


@pytest.mark.parametrize("format", ["diffusers", "original"])
@pytest.mark.parametrize("folder", [True, False])
def test_save_and_load_round_trip_bit_for_bit(
    tiny: DCAEConfig, pair, tmp_path: Path, format: str, folder: bool
) -> None:
    _, model = pair(tiny)
    model.rgb_factors = tuple((float(i), 0.5, -0.25) for i in range(tiny.latent_channels))
    path = tmp_path / ("ae" if folder else "ae.safetensors")
    save_dcae(model, path, format=format)
    loaded = load_dcae(path)
    assert loaded.config.architecture == tiny.architecture
    assert (loaded.config.name, loaded.config.scaling_factor) == (tiny.name, tiny.scaling_factor)
    assert loaded.rgb_factors == model.rgb_factors
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert not list(tmp_path.rglob(".*"))


def test_a_folder_of_diffusers_loads_and_ours_opens_there(tiny: DCAEConfig, pair, tmp_path: Path) -> None:
    oracle, model = pair(tiny)
    oracle.save_pretrained(tmp_path / "theirs")
    latent = torch.randn(1, tiny.latent_channels, 2, 2)
    with torch.no_grad():
        expected = oracle.decode(latent).sample
        assert torch.allclose(load_dcae(tmp_path / "theirs").decode(latent), expected, atol=1e-5)
        save_dcae(model, tmp_path / "ours")
        assert torch.allclose(
            AutoencoderDC.from_pretrained(tmp_path / "ours").decode(latent).sample, expected, atol=1e-5
        )


@pytest.mark.parametrize("prefix", ["", "vae.", "module.model.", "first_stage_model."])
@pytest.mark.parametrize("format", ["diffusers", "original"])
def test_wrapper_prefixes_and_nested_state_dicts(pair, tiny_config, prefix: str, format: str, tmp_path: Path) -> None:
    _, model = pair(tiny_config)
    state = model.state_dict()
    if format == "original":
        state = to_original(state, rename_table(tiny_config, list(state)))
    state = {prefix + key: value for key, value in state.items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "ae.pt")
    for source in (state, tmp_path / "ae.pt"):
        loaded = load_dcae(source, scaling_factor=0.25)
        assert loaded.config.scaling_factor == 0.25
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_in_or_mix_is_an_error_that_names_both(meta_like) -> None:
    state = meta_like("dc-ae-f32c32-in-1.0")
    with pytest.raises(DCAEError, match=r"in-1.0 \(scaling_factor=0.3189\) or dc-ae-f32c32-mix-1.0 \(scaling_factor=0"):
        load_dcae(state)


def test_one_candidate_or_one_common_scale_needs_no_help(meta_like) -> None:
    assert settled(meta_like("dc-ae-1.5-f64c128")) == ("dc-ae-1.5-f64c128", 0.5935)
    assert settled(meta_like("dc-ae-f32c32-sana-1.1")) == ("dc-ae-f32c32-sana-1.0", 0.41407)
    assert settled(meta_like("dc-ae-f32c32-mix-1.0"), scaling_factor=0.4552)[0] == "dc-ae-f32c32-mix-1.0"


@pytest.mark.parametrize("name", ["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-mix-1.0"])
def test_config_json_tells_in_from_mix(meta_like, name: str) -> None:
    state = meta_like(name)
    for config in (
        {"model_name": name},
        VARIANTS[name].to_diffusers(),
        {**VARIANTS[name].to_diffusers(), "_name_or_path": ""},
    ):
        assert settled(state, config) == (name, VARIANTS[name].scaling_factor)


def settled(
    state: dict[str, torch.Tensor], config: dict | None = None, scaling_factor: float | None = None
) -> tuple[str, float | None]:
    found = identify(state, {}, config, "", scaling_factor).config
    return found.name, found.scaling_factor


@pytest.fixture
def meta_like():
    """State dict of a published variant's real shapes without data."""
    return lambda name: meta_state(VARIANTS[name])


@pytest.fixture
def tiny_config(shrunk) -> DCAEConfig:
    return shrunk("dc-ae-f32c32-sana-1.0")


@pytest.fixture
def saved(pair, tiny_config, tmp_path: Path) -> Path:
    """A sound file with a checksum."""
    return save_dcae(pair(tiny_config)[1], tmp_path / "good.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, 5_000, -100])
def test_truncated_files(saved: Path, kept: int) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:kept])
    with pytest.raises(DCAEError, match=r"good\.safetensors.*damaged, truncated or not a safetensors file"):
        load_dcae(saved)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9, 0.999])
def test_flipped_bits_are_found_by_the_checksum(saved: Path, place: float) -> None:
    data = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int((len(data) - header - 1) * place)] ^= 0x10
    saved.write_bytes(data)
    with pytest.raises(DCAEError, match="checksum"):
        load_dcae(saved)


def test_nan_weights_are_damage_even_without_a_checksum(saved: Path) -> None:
    state = load_file(saved)
    state["decoder.conv_out.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, saved)
    with pytest.raises(DCAEError, match=r"NaN or infinite weights in decoder\.conv_out\.weight"):
        load_dcae(saved, scaling_factor=1.0)


def test_mislabelled_files(saved: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(DCAEError, match="not a safetensors file"):
        load_dcae(tmp_path / "pickle.safetensors")
    save_file({"transformer.proj.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(DCAEError, match=r"other\.safetensors: not a DC-AE.*transformer\.proj\.weight"):
        load_dcae(tmp_path / "other.safetensors")
    with pytest.raises(DCAEError, match="no such file"):
        load_dcae(tmp_path / "absent.safetensors")
    state = load_file(saved)
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"][:, :, None]
    with pytest.raises(DCAEError, match="video autoencoder"):
        load_dcae(state)


def test_missing_unexpected_and_misshapen_tensors_are_listed(saved: Path, tiny_config: DCAEConfig) -> None:
    state = load_file(saved)
    state["encoder.extra.weight"] = torch.ones(1)
    del state["decoder.norm_out.bias"]
    state["encoder.conv_out.bias"] = torch.ones(3)
    with pytest.raises(DCAEError) as caught:
        load_dcae(state, scaling_factor=1.0)
    text = str(caught.value)
    assert "missing: decoder.norm_out.bias" in text
    assert "unexpected: encoder.extra.weight" in text
    assert "misshapen: encoder.conv_out.bias (3,) instead of (16,)" in text


def test_a_config_of_another_autoencoder_beside_the_file(saved: Path, tmp_path: Path) -> None:
    save_file(load_file(saved), tmp_path / "plain.safetensors")
    (tmp_path / "plain.json").write_text(json.dumps(VARIANTS["dc-ae-1.5-f64c128"].to_diffusers()))
    with pytest.raises(DCAEError, match=r"do not fit 'dc-ae-1.5-f64c128'.*its config belongs to another"):
        load_dcae(tmp_path / "plain.safetensors")
    (tmp_path / "plain.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(DCAEError, match="AutoencoderKL"):
        load_dcae(tmp_path / "plain.safetensors")
    (tmp_path / "plain.json").write_text("{")
    with pytest.raises(DCAEError, match="not valid JSON"):
        load_dcae(tmp_path / "plain.safetensors")


def test_a_failed_save_leaves_the_old_file(saved: Path, pair, tiny_config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr("dcgen.dcae.files.save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_dcae(pair(tiny_config)[1], saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_plain_config_json_in_models_vae_of_another_model_is_not_ours(saved: Path, tmp_path: Path) -> None:
    save_file(load_file(saved), tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_name": "unheard-of"}))
    with pytest.raises(DCAEError, match="unheard-of"):
        load_dcae(tmp_path / "ae.safetensors")


def in_folder(saved: Path, folder: Path, **fields: object) -> Path:
    """The sound file in a diffusers folder, with fields of its config.json set."""
    folder.mkdir()
    save_file(load_file(saved), folder / "diffusion_pytorch_model.safetensors")
    with safe_open(saved, framework="pt") as file:
        config = json.loads(file.metadata()["dcgen.dcae"])
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    "fields",
    [{"encoder_layers_per_block": value} for value in ([1, 2**31, 1], [1, {}, 1], 7, [], [-1] * 6, [1.0] * 6)]
    + [{"encoder_qkv_multiscales": value} for value in (7, [[], [], list(range(20_000))], [[0]] * 6, ["a"] * 6)]
    + [{"decoder_block_out_channels": value} for value in (5, [-8] * 6, [2**70] * 6, [0] * 6, None)]
    + [{"attention_head_dim": value} for value in (32.0, 0, 2**31, None, "a")]
    + [{"scaling_factor": value} for value in (10**400, "a", float("nan"), -1.0, 0)]
    + [
        {"in_channels": 0},
        {"model_name": [1]},
        {"encoder_out_shortcut": 1},
        {"decoder_act_fns": "x"},
        {"_name_or_path": 5},
    ],
)
def test_a_config_that_no_dcae_has_is_refused_by_field_and_folder(saved: Path, tmp_path: Path, fields: dict) -> None:
    folder = in_folder(saved, tmp_path / "my-dc-ae", **fields)
    name = "name" if "_name_or_path" in fields else next(iter(fields))
    with pytest.raises(DCAEError, match=rf"my-dc-ae.*{name}"):
        load_dcae(folder)


def test_fields_of_a_newer_diffusers_are_logged_and_ignored(saved: Path, tmp_path: Path, caplog) -> None:
    found = load_dcae(in_folder(saved, tmp_path / "newer", brand_new_field=3))
    assert found.config.architecture == load_dcae(saved).config.architecture
    assert "brand_new_field" in caplog.text


@pytest.mark.parametrize(
    "key",
    [
        "decoder.up_blocks.999999.0.conv.weight",
        "decoder.up_blocks.0.99999.conv1.weight",
        f"encoder.down_blocks.{'9' * 6000}.0.x",
    ],
)
def test_stages_far_off_are_refused_at_once(saved: Path, tmp_path: Path, key: str) -> None:
    save_file({**load_file(saved), key: torch.zeros(1)}, tmp_path / "far.safetensors")
    with pytest.raises(DCAEError, match=r"far\.safetensors.*no DC-AE has"):
        load_dcae(tmp_path / "far.safetensors", scaling_factor=1.0)


def test_one_byte_floats_are_computed_in_bfloat16(saved: Path, tmp_path: Path) -> None:
    state = {key: value.to(torch.float8_e4m3fn) for key, value in load_file(saved).items()}
    save_file(state, tmp_path / "small.safetensors")
    model = load_dcae(tmp_path / "small.safetensors", scaling_factor=1.0)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(value.float(), state[key].float()) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert model.decode(torch.zeros(1, model.config.latent_channels, 2, 2, dtype=torch.bfloat16)).isfinite().all()


def test_whole_numbers_are_no_weights(saved: Path, tmp_path: Path) -> None:
    state = load_file(saved)
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"].long()
    save_file(state, tmp_path / "whole.safetensors")
    with pytest.raises(DCAEError, match=r"decoder\.conv_in\.bias torch\.int64 instead of floating point"):
        load_dcae(tmp_path / "whole.safetensors", scaling_factor=1.0)


def test_a_compiled_model_and_a_folder_of_a_mac_are_read(saved: Path, tmp_path: Path) -> None:
    folder = in_folder(saved, tmp_path / "mac")
    weights = folder / "diffusion_pytorch_model.safetensors"
    save_file(
        {f"module._orig_mod.{key}": value for key, value in load_file(weights).items()}, folder / "other.safetensors"
    )
    weights.unlink()
    (folder / "._other.safetensors").write_bytes(b"Mac OS X")
    found, same = load_dcae(folder).state_dict(), load_dcae(saved).state_dict()
    assert all(torch.equal(found[key], value) for key, value in same.items())


@pytest.mark.parametrize("values", [{"channels": None}, {"channels": 3}, {"scaling_factor": "a"}])
def test_a_latent_in_the_metadata_that_is_not_its_own(saved: Path, tmp_path: Path, values: dict) -> None:
    with safe_open(saved, framework="pt") as file:
        notes = file.metadata()
    notes["dcgen.latent"] = json.dumps({**json.loads(notes["dcgen.latent"]), **values})
    save_file(load_file(saved), tmp_path / "mine.safetensors", metadata=notes)
    with pytest.raises(DCAEError, match=r"mine\.safetensors"):
        load_dcae(tmp_path / "mine.safetensors")


def test_a_head_wider_than_its_stage_is_known_from_the_config_alone(saved: Path, tmp_path: Path) -> None:
    """No tensor of a stage without scales tells the head, so what the tensors seem to say may not refuse the config."""
    kinds, none = ("ResBlock", "EfficientViTBlock"), ((), ())
    sides = {
        f"{side}_{field}": value
        for side in ("encoder", "decoder")
        for field, value in (
            ("block_types", kinds),
            ("block_out_channels", (8, 16)),
            ("layers_per_block", (1, 1)),
            ("qkv_multiscales", none),
        )
    }
    config = DCAEConfig(
        name="narrow", latent_channels=8, attention_head_dim=8, scaling_factor=0.5,
        decoder_norm_types=("rms_norm",) * 2, decoder_act_fns=("silu",) * 2, **sides,
    )  # fmt: skip
    folder = tmp_path / "narrow"
    save_dcae(DCAE(config), folder)
    assert load_dcae(folder).config.attention_head_dim == 8
    edited = {**json.loads((folder / "config.json").read_text()), "attention_head_dim": 64}
    save_file(load_file(folder / "diffusion_pytorch_model.safetensors"), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(edited))
    with pytest.raises(DCAEError, match="misshapen"):
        load_dcae(folder)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("format", ["diffusers", "original"])
def test_a_file_without_its_first_convolution(pair, tiny_config, tmp_path: Path, side: str, format: str) -> None:
    path = save_dcae(pair(tiny_config)[1], tmp_path / "mine.safetensors", format=format)
    first = (f"{side}.conv_in.", f"{side}.project_in.")
    save_file({key: value for key, value in load_file(path).items() if not key.startswith(first)}, path)
    with pytest.raises(DCAEError, match=r"mine\.safetensors"):
        load_dcae(path, scaling_factor=1.0)
