"""Files that others made: what is refused, by name and at once; and what others' tools write that is read."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcgen.backbones import BACKBONES
from dcgen.convert import main, pack
from dcgen.fields import check_fields, flag, items, optional, real, text, whole, words
from dcgen.files import is_finite
from dcgen.folder import space_of_config, stored_schedule
from dcgen.jsons import MAX_DEPTH, parse_json, read_object
from dcgen.latent import METADATA_KEY, LatentSpace
from dcgen.release import open_model
from dcgen.schedule import Schedule
from dcgen.tensors import Tensors

DEEP = "[" * 100_000
NAN, INF, HUGE = math.nan, math.inf, 10**400


# ---- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (DEEP.encode(), "nested"),
        (("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)).encode(), "nested"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\ud800": 1}', "half a character"),
        (b'{"a": ' + b"9" * 6000 + b"}", "not valid JSON"),
        (b"[1]", "not a JSON object but a list"),
        (b"null", "not a JSON object"),
    ],
)
def test_json_that_is_no_object_names_its_file(tmp_path, data, words):
    path = tmp_path / "strange.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"strange\.json: .*{words}"):
        read_object(path)


def test_json_that_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"name": "ü", "lambda": -Infinity}'.encode())
    assert read_object(path) == {"name": "ü", "lambda": -INF}
    nested = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(nested, "here")) == nested


def test_json_has_a_limit_and_a_pipe_is_no_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    assert read_object(path, limit=200)
    with pytest.raises(ValueError, match=r"a\.json: more than 50 bytes"):
        read_object(path, limit=50)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(FileNotFoundError, match=r"pipe\.json"):
        read_object(tmp_path / "pipe.json")


# ---- fields --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (whole(1, 8), [1, 8], [0, 9, -1, 1.0, True, None, "1", 2**40, HUGE, NAN]),
        (real(0.5, 2), [1, 0.5, 2.0], [0.4, 3, -1, True, None, "1", HUGE, NAN, INF]),
        (flag, [True, False], [0, 1, None, "true"]),
        (words("a", "b"), ["a", "b"], ["c", 1, None, [], {}]),
        (text(3), ["", "abc"], ["abcd", 1, None]),
        (items(whole(1, 8), 1, 3), [[1], (1, 2, 3)], [[], [1] * 4, [0], [[1]], 1, "12", {"a": 1}, None]),
        (optional(whole(1, 8)), [None, 1], [0, "a"]),
    ],
)
def test_a_field_takes_its_type_within_its_bounds(check, good, bad):
    for value in good:
        check_fields({"size": value}, {"size": check})
    for value in bad:
        with pytest.raises(ValueError, match=r"^size(\[0\])? is "):
            check_fields({"size": value}, {"size": check})


def test_a_needed_field_and_a_long_value():
    with pytest.raises(ValueError, match="size is missing"):
        check_fields({}, {}, needed=("size",))
    with pytest.raises(ValueError, match="size is") as caught:
        check_fields({"size": ["x" * 10_000] * 10_000}, {"size": flag})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "schedule",
    [{"rule": "x"}, {"rul": "flx"}, {}, [], 5, {"rule": "static"}, {"rule": "flux", "shift": HUGE}]
    + [{"rule": "flux", "mu": value} for value in (NAN, INF, "1", True, 1e300, [1])]
    + [{"rule": "flux", "shift": value} for value in (0, -1, 1e30, NAN)]
    + [{"rule": "flux", "mu": 1.0, "shift": 2.0}],
)
def test_what_is_no_schedule(schedule):
    with pytest.raises(ValueError, match=r"schedule|shift"):
        Schedule.parse(schedule)


@pytest.mark.parametrize(
    "fields",
    [{name: value} for name in ("channels", "spatial_factor") for value in (0, -1, 32.0, True, 2**31, HUGE, "a", None)]
    + [{name: value} for name in ("scaling_factor", "shift_factor") for value in (HUGE, NAN, 1e300, "a", None, [1])]
    + [{"name": value} for value in (5, None, "x" * 1000)]
    + [
        {"rgb_factors": [[NAN, 0, 0]] * 2},
        {"rgb_factors": 5},
        {"rgb_factors": [[0, 0, "a"]] * 2},
        {"rgb_bias": [HUGE] * 3},
    ],
)
def test_latent_spaces_that_no_file_may_have(fields):
    entry = {"name": "x", "channels": 2, "spatial_factor": 8, "scaling_factor": 1.0}
    assert LatentSpace.from_metadata({METADATA_KEY: json.dumps(entry)}).channels == 2
    with pytest.raises(ValueError, match=next(iter(fields))):
        LatentSpace.from_metadata({METADATA_KEY: json.dumps({**entry, **fields})})


def test_an_autoencoder_kl_config_is_checked():
    config = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [1, 2, 4, 4],
        "latent_channels": 16,
        "scaling_factor": 0.36,
        "shift_factor": None,
    }
    assert (space_of_config(config).spatial_factor, space_of_config(config).shift_factor) == (8, 0.0)
    for name, value in (("block_out_channels", 5), ("block_out_channels", [1] * 99), ("latent_channels", "a")):
        with pytest.raises(ValueError, match=name):
            space_of_config({**config, name: value})
    with pytest.raises(ValueError, match="scaling_factor is missing"):
        space_of_config({key: value for key, value in config.items() if key != "scaling_factor"})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_flow_sigmas": True}, "flow_shift is missing"),
        ({"use_flow_sigmas": True, "flow_shift": [[]]}, "shift"),
        ({"use_flow_sigmas": True, "flow_shift": HUGE}, "shift"),
        ({"use_flow_sigmas": "yes"}, "use_flow_sigmas"),
        ({"_dcgen_schedule": 5}, "schedule"),
    ],
)
def test_a_scheduler_config_is_checked(tmp_path, config, words):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"scheduler_config\.json.*{words}"):
        stored_schedule(tmp_path)


# ---- values --------------------------------------------------------------------------------------------------------


FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_is_finite_agrees_with_torch(dtype):
    whole_range = torch.arange(256, dtype=torch.uint8).repeat(dtype.itemsize)
    for value in whole_range.view(dtype) if dtype.itemsize == 1 else torch.tensor([0, -1, NAN, INF, -INF], dtype=dtype):
        tensor = torch.zeros(7, dtype=dtype)
        tensor[3] = value
        assert is_finite(tensor) == bool(tensor.float().isfinite().all()), value
    assert is_finite(torch.zeros(0, dtype=dtype))
    assert is_finite(torch.tensor(1.0, dtype=dtype))
    assert is_finite(torch.arange(3))


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one(make_flux, tmp_path):
    """A FLUX as one native file with its config in the metadata."""
    make_flux().save_pretrained(tmp_path / "base" / "transformer")
    out = pack(open_model(tmp_path / "base"), tmp_path / "one.safetensors")
    shutil.rmtree(tmp_path / "base")
    return out


def changed(source: Path, target: Path, tensors=None, metadata=None) -> Path:
    with safe_open(source, framework="pt") as file:
        notes = file.metadata()
    state = load_file(source)
    tensors and tensors(state)
    metadata and metadata(notes)
    save_file({key: value.contiguous() for key, value in state.items()}, target, metadata=notes)
    return target


def config_with(**fields):
    def change(notes):
        config = {**json.loads(notes["dcgen.config"]), **fields}
        notes["dcgen.config"] = json.dumps({key: value for key, value in config.items() if value != "drop"})

    return change


@pytest.mark.parametrize(
    "fields",
    [{"num_layers": value} for value in (2**31, -1, 2.0, None, "a", True)]
    + [{"num_attention_heads": 0}, {"attention_head_dim": 2**40}, {"in_channels": [1]}, {"guidance_embeds": 1}]
    + [{"axes_dims_rope": value} for value in ([4, 6], [4, 6, 7], [-4, 10, 10], 5, [4, 6, 6.0], [4, 6, 8])],
)
def test_a_config_that_no_model_has_is_refused_when_it_is_opened(one, tmp_path, fields):
    with pytest.raises(ValueError, match=rf"mine\.safetensors: .*{next(iter(fields))}"):
        open_model(changed(one, tmp_path / "mine.safetensors", metadata=config_with(**fields)))


@pytest.mark.parametrize("fields", [{"num_layers": 3}, {"joint_attention_dim": 21}, {"guidance_embeds": False}])
def test_a_config_of_another_model_is_refused_when_it_is_opened(one, tmp_path, fields):
    with pytest.raises(ValueError, match=r"mine\.safetensors: "):
        open_model(changed(one, tmp_path / "mine.safetensors", metadata=config_with(**fields)))


TENSORS = {
    "a shape": (lambda t: t.update({"txt_in.bias": torch.zeros(3)}), "context_embedder.bias is .*expected"),
    "a norm's shape": (
        lambda t: t.update({"single_blocks.0.norm.key_norm.scale": torch.zeros(3)}),
        "single_transformer_blocks.0.attn.norm_k.weight is",
    ),
    "one tensor short": (lambda t: t.pop("txt_in.bias"), "1 missing"),
    "a scalar": (lambda t: t.update({"img_in.weight": torch.tensor(1.0)}), "img_in.weight has shape"),
    "nothing": (lambda t: t.update({"img_in.weight": torch.zeros(0, 64)}), "img_in.weight has shape"),
    "whole numbers": (lambda t: t.update({"txt_in.bias": torch.zeros(48, dtype=torch.int64)}), "floating point"),
    "a block far off": (lambda t: t.update({"double_blocks.99999999.x": torch.zeros(1)}), "no model has"),
    "digits without end": (lambda t: t.update({f"double_blocks.{'9' * 6000}.x": torch.zeros(1)}), "no model has"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_are_checked_when_a_model_is_opened(one, tmp_path, what):
    change, words = TENSORS[what]
    with pytest.raises(ValueError, match=rf"mine\.safetensors: .*{words}"):
        open_model(changed(one, tmp_path / "mine.safetensors", tensors=change))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("key", ["final_layer.linear.weight", "double_blocks.1.img_attn.qkv.bias", "img_in.bias"])
def test_what_is_not_finite_is_refused_while_it_is_read(one, tmp_path, key, value):
    path = changed(one, tmp_path / "mine.safetensors", tensors=lambda t: t[key].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match=rf"mine\.safetensors: .*{key}.*NaN or infinite"):
        pack(open_model(path), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", list(BACKBONES))
def test_the_shape_table_is_that_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    backbone = BACKBONES[name]
    configs = {
        "flux": {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3}
        | {
            "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True,
            "joint_attention_dim": 20,
            "pooled_projection_dim": 12,
        },
        "flux2": {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3}
        | {"axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": True, "joint_attention_dim": 20, "mlp_ratio": 2.5},
        "zimage": {"dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 20}
        | {"axes_dims": [8, 12, 12], "in_channels": 4},
        "sana": {"num_layers": 2, "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_dim": 64}
        | {"cross_attention_head_dim": 32, "caption_channels": 24, "qk_norm": "rms_norm_across_heads"},
        "dit": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 72, "num_embeds_ada_norm": 10}
        | {"norm_type": "ada_norm_zero", "in_channels": 4, "out_channels": 8, "sample_size": 8},
    }
    with torch.device("meta"):
        model = getattr(diffusers, backbone.diffusers_class)(**configs[name])
    config = dict(model.config)
    backbone.check_config(config)
    table = backbone.shapes(config)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items() if key != "pos_embed.pos_embed"}
    assert {key: table.get(key) for key in found} == found
    assert all(key in found for key in backbone.other_shapes(config))


@pytest.mark.parametrize("name", ["SanaControlNetModel", "FluxControlNetModel"])
def test_a_controlnet_is_refused_by_name(name, tmp_path):
    """It has the blocks of its base, and is no whole model."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8}
    more = {
        "SanaControlNetModel": {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "caption_channels": 24}
        | {"cross_attention_dim": 32, "sample_size": 8},
        "FluxControlNetModel": {"num_single_layers": 1, "joint_attention_dim": 20, "pooled_projection_dim": 12}
        | {"axes_dims_rope": (4, 6, 6)},
    }
    getattr(diffusers, name)(**sizes, **more[name]).save_pretrained(tmp_path / "controlnet")
    with pytest.raises(ValueError, match=r"controlnet.*looks like a ControlNet"):
        open_model(tmp_path / "controlnet")


# ---- how others write the same files -------------------------------------------------------------------------------


def renamed(one: Path, target: Path, name, extra=None) -> Path:
    state = {name(key): value for key, value in load_file(one).items()}
    save_file({**state, **(extra or {})}, target)
    return target


@pytest.mark.parametrize(
    "name",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"model.diffusion_model._orig_mod.{key}",
        lambda key: key.replace("double_blocks.0.", "double_blocks.0._orig_mod."),
    ],
)
def test_the_prefixes_of_wrappers_are_taken_off(one, tmp_path, name):
    found = open_model(renamed(one, tmp_path / "mine.safetensors", name))
    same = open_model(one)
    assert all(torch.equal(found.get(key), same.get(key)) for key in same.entries)


def test_the_network_of_an_all_in_one_file_is_read(one, tmp_path):
    rest = {"vae.decoder.conv_in.weight": torch.zeros(1), "text_encoders.clip_l.logit_scale": torch.zeros(1)}
    path = renamed(one, tmp_path / "all.safetensors", lambda key: f"model.diffusion_model.{key}", rest)
    found, same = open_model(path), open_model(one)
    assert set(found.entries) == set(same.entries)
    assert torch.equal(found.get("x_embedder.weight"), same.get("x_embedder.weight"))


def test_sft_is_an_ending_of_safetensors(one, tmp_path, capsys):
    shutil.copy(one, tmp_path / "one.sft")
    assert main(["info", str(tmp_path / "one.sft")]) == 0
    assert "flux" in capsys.readouterr().out
    (tmp_path / "folder").mkdir()
    shutil.copy(one, tmp_path / "folder" / "model.sft")
    assert Tensors.open(tmp_path / "folder").entries


def test_scaled_fp8_is_said_to_be_what_it_is(one, tmp_path, capsys):
    scales = {f"{key[:-6]}scale_weight": torch.ones(1) for key in load_file(one) if key.endswith("mlp.0.weight")}
    path = renamed(one, tmp_path / "scaled.safetensors", lambda key: key, {**scales, "scaled_fp8": torch.zeros(2)})
    assert main(["info", str(path)]) == 1
    said = capsys.readouterr().err
    assert "scaled.safetensors" in said
    assert "quantised" in said


@pytest.mark.parametrize("value", [None, {}, {"a": 1}, {"a": "../secret.safetensors"}, {"a": "/x.safetensors"}])
def test_an_index_names_files_beside_it(one, tmp_path, value):
    folder = tmp_path / "inside"
    folder.mkdir()
    shutil.copy(one, tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        Tensors.open(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    shutil.copy(one, folder / "one.safetensors")
    assert Tensors.open(folder).entries


def test_files_of_a_mac_are_no_weights(one, tmp_path):
    folder = tmp_path / "mac"
    folder.mkdir()
    shutil.copy(one, folder / "model.safetensors")
    for name in ("._model.safetensors", "._model.safetensors.index.json"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")
    assert Tensors.open(folder).entries == Tensors.open(one).entries


PICKLES = {
    "a number for a name": {1: torch.zeros(1)},
    "no tensors": {"a": 1},
    "no mapping": [1],
    "nothing": {},
    "no memory": {"a": torch.zeros(2, device="meta")},
    "sparse": {"a": torch.zeros(3).to_sparse()},
    "complex": {"a": torch.zeros(1, dtype=torch.complex64)},
    "more than is stored": {"a": torch.zeros(1).expand(10**9)},
}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_are_no_state_dict(tmp_path, what, new_format):
    torch.save(PICKLES[what], tmp_path / "mine.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"mine\.pt: "):
        Tensors.open(tmp_path / "mine.pt")


@pytest.mark.parametrize("data", [b"", b"\x80", b"PK\x03\x04", b"\x80\x02}q\x00.", bytes(200)])
def test_damaged_pickles_name_the_file(tmp_path, data):
    (tmp_path / "mine.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"mine\.pt: "):
        Tensors.open(tmp_path / "mine.pt")


def test_the_older_format_of_pickles_is_read(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert Tensors.open(tmp_path / "old.pt").get("a").tolist() == [0, 1, 2]
