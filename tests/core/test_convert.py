"""Files into files: nothing but names changes, one tensor at a time; base + extracted adapter is the merged model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcgen.adapter import Adapter, LoraPair, load_adapter, merge, save_adapter
from dcgen.backbones import BACKBONES
from dcgen.convert import describe, main, merge_file, pack, unpack
from dcgen.extract import extract, factor, rounding_floor
from dcgen.folder import note_schedule, space_of_config
from dcgen.latent import LatentSpace
from dcgen.release import open_model
from dcgen.schedule import Schedule
from dcgen.spaces import SPACES
from train.families import FAMILIES

flux = BACKBONES["flux"]
SPACE = SPACES["dc-ae-f32c32-in-1.0"]


@pytest.fixture
def release(make_flux, tmp_path):
    """A merged DC-Gen FLUX release as diffusers writes one: three shards, with an autoencoder that carries previews."""
    folder = tmp_path / "release"
    model = make_flux(in_channels=32)
    model.save_pretrained(folder / "transformer", max_shard_size="200KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) >= 3
    rgb = tuple((0.01 * i, 0.02, -0.03) for i in range(32))
    space = LatentSpace(SPACE.name, 32, 32, 0.3189, rgb_factors=rgb, rgb_bias=(0.1, 0.2, 0.3))
    vae = {"_class_name": "AutoencoderDC", "_name_or_path": "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"}
    vae |= {"scaling_factor": 0.3189, "latent_channels": 32, "encoder_layers_per_block": [0, 4, 8, 2, 2, 2]}
    vae |= {"decoder_layers_per_block": [0, 5, 10, 2, 2, 2]}
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    save_file({"x": torch.zeros(1)}, folder / "vae" / "model.safetensors", metadata=space.to_metadata())
    (folder / "model_index.json").write_text("{}")
    return folder, {key: value.clone() for key, value in model.state_dict().items()}, space


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())


@pytest.mark.parametrize("names", ["original", "native", "diffusers"])
def test_release_to_file_and_back(release, tmp_path, names):
    diffusers = pytest.importorskip("diffusers")
    folder, state, space = release
    out = pack(open_model(folder), tmp_path / "one.safetensors", names=names)
    same(load_file(out), state if names == "diffusers" else flux.to_original(state))
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert LatentSpace.from_metadata(metadata) == space
    assert json.loads(metadata["dcgen.schedule"]) == {"rule": "flux2"}
    assert metadata["dcgen.patch_size"] == "1"
    assert metadata["modelspec.architecture"] == "flux-1-dev"
    # what comes back is a release that diffusers loads, with every part but the transformer copied
    back = unpack(open_model(out), tmp_path / "back", parts=folder, shard_bytes=150_000)
    assert (back / "vae" / "config.json").read_text() == (folder / "vae" / "config.json").read_text()
    assert len(list((back / "transformer").glob("*.safetensors"))) >= 3
    same(dict(diffusers.FluxTransformer2DModel.from_pretrained(back / "transformer").state_dict()), state)
    again = open_model(back)
    assert again.latent == space
    assert again.schedule == Schedule("flux2")
    assert sorted(os.listdir(tmp_path)) == ["back", "one.safetensors", "release"]


@pytest.mark.parametrize(
    "schedule", [Schedule("flux"), Schedule("flux2", mu=0.9), Schedule("static", shift=2.5, sigma_max=1.0)]
)
def test_a_release_folder_keeps_its_schedule(release, tmp_path, schedule, caplog):
    """An f32 release on another rule than the published f32 ones; no field of diffusers' config can say it."""
    diffusers = pytest.importorskip("diffusers")
    folder, _, _ = release
    assert open_model(folder).schedule == Schedule("flux2")
    plain = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.4)
    plain.save_pretrained(folder / "scheduler")
    note_schedule(folder, schedule)
    assert open_model(folder).schedule == schedule
    one = pack(open_model(folder), tmp_path / "one.safetensors")
    assert open_model(one).schedule == schedule
    # into a folder around the parts of a base, whose scheduler knows nothing of it
    plain.save_pretrained(folder / "scheduler")
    back = unpack(open_model(one), tmp_path / "back", parts=folder)
    for shard in (back / "transformer").glob("*.safetensors"):
        save_file(load_file(shard), shard)  # as diffusers writes shards: without metadata
    assert open_model(back).schedule == schedule
    logging = diffusers.utils.logging
    log, level = logging.get_logger("diffusers"), logging.get_verbosity()
    log.addHandler(caplog.handler)
    logging.set_verbosity_warning()  # a benchmark that ran before may have silenced it
    again = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(back / "scheduler")
    assert "dcgen" not in caplog.text
    assert {k: again.config[k] for k in plain.config if k[0] != "_"} == {
        k: v for k, v in plain.config.items() if k[0] != "_"
    }
    diffusers.FlowMatchEulerDiscreteScheduler.from_config({**plain.config, "dcgen": 1})
    assert "dcgen" in caplog.text, "a field that is not skipped would have been heard"
    log.removeHandler(caplog.handler)
    logging.set_verbosity(level)


def test_a_file_keeps_what_tensors_cannot_tell(make_flux, tmp_path):
    """RoPE axes are in no tensor: config.json's travel in the metadata."""
    make_flux(axes_dims_rope=(8, 4, 4)).save_pretrained(tmp_path / "transformer")
    assert open_model(tmp_path).config["axes_dims_rope"] == [8, 4, 4]
    out = pack(open_model(tmp_path / "transformer"), tmp_path / "a.safetensors")
    assert open_model(out).config["axes_dims_rope"] == [8, 4, 4]
    assert flux.detect(load_file(out))["axes_dims_rope"] == (4, 6, 6)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
@pytest.mark.parametrize("native", [True, False])
def test_any_single_file(release, tmp_path, prefix, native):
    _, state, _ = release
    names = flux.to_original(state) if native else state
    save_file({prefix + key: value for key, value in names.items()}, tmp_path / "a.safetensors")
    model = open_model(tmp_path / "a.safetensors")
    same({key: model.get(key) for key in model.entries}, state)
    assert all(model.entries[key].shape == tuple(value.shape) for key, value in state.items())
    assert model.latent is None


def test_pth_is_read_without_running_it(release, tmp_path):
    _, state, _ = release
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    out = pack(open_model(tmp_path / "a.pth"), tmp_path / "b.safetensors", names="diffusers")
    same(load_file(out), state)

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"state_dict": Trap()}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"c.pth: holds more than tensors"):
        open_model(tmp_path / "c.pth")
    assert not (tmp_path / "trapped").exists()


def test_dtype_is_cast_where_asked(release, tmp_path):
    folder, state, _ = release
    out = pack(open_model(folder), tmp_path / "a.safetensors", names="diffusers", dtype=torch.bfloat16)
    same(load_file(out), {key: value.bfloat16() for key, value in state.items()})


def test_info_tells_what_it_is(release, tmp_path):
    folder, _, _ = release
    told = describe(folder)
    assert "FluxTransformer2DModel" in told
    assert "num_single_layers: 3" in told
    assert "dc-ae-f32c32-in-1.0, 32 channels, f32, scaling 0.3189, shift 0, with preview factors" in told
    save_adapter(tmp_path / "a.safetensors", _adapter(open_model(folder).config, rank=3))
    assert "LoRA on 39 layers, rank 3 to 3" in describe(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("config", "name", "numbers"),
    [
        (
            {"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [1, 1, 1, 1]}
            | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
            "flux-f8c16",
            (16, 8, 0.3611, 0.1159),
        ),
        (
            {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}
            | {"scaling_factor": 0.18215, "shift_factor": None},
            "sd-f8c4",
            (4, 8, 0.18215, 0.0),
        ),
        (
            {"_class_name": "AutoencoderKL", "latent_channels": 8, "block_out_channels": [1, 1]}
            | {"scaling_factor": 0.7, "shift_factor": 0.2},
            "",
            (8, 2, 0.7, 0.2),
        ),
        (
            {"_class_name": "AutoencoderDC", "scaling_factor": 0.41407, "_name_or_path": "/some/folder/vae"},
            "dc-ae-f32c32-sana-1.0",
            (32, 32, 0.41407, 0.0),
        ),
        (
            {"_class_name": "AutoencoderDC", "scaling_factor": 0.9, "_name_or_path": "my/toy-dc-ae"},
            "toy-dc-ae",
            (32, 32, 0.9, 0.0),
        ),
    ],
)
def test_latent_of_a_vae_config(config, name, numbers):
    space = space_of_config(config)
    assert space.name == name
    assert (space.channels, space.spatial_factor, space.scaling_factor, space.shift_factor) == numbers


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refusals(release, tmp_path):
    folder, state, _ = release
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name}: .*truncated or damaged"):
        open_model(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"names {shard.name}, not here: download"):
        open_model(folder)
    shard.write_bytes(content)
    config = folder / "transformer" / "config.json"
    written = config.read_text()
    config.write_text(written.replace("FluxTransformer2DModel", "SanaTransformer2DModel"))
    with pytest.raises(ValueError, match=r"not from one model"):
        open_model(folder)
    config.write_text(written)
    with pytest.raises(ValueError, match="give it that ending"):
        pack(open_model(folder), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="original, diffusers"):
        pack(open_model(folder), tmp_path / "a.safetensors", names="bfl")
    with pytest.raises(ValueError, match=r"release exists"):
        unpack(open_model(folder), folder)
    del state["transformer_blocks.1.ff.net.2.bias"]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: transformer_blocks.1.ff.net.2.bias"):
        pack(open_model(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected one .safetensors file"):
        open_model(tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "empty", "release"]


def test_command_line_says_what_is_wrong(release, tmp_path, capsys):
    folder, _, _ = release
    assert main(["pack", str(tmp_path / "absent"), str(tmp_path / "a.safetensors")]) == 1
    assert "there is no such file" in capsys.readouterr().err
    assert main(["pack", str(folder), str(tmp_path / "a.safetensors"), "--latent", "dc-ae-f32c32-mix-1.0"]) == 1
    assert "Leave --latent out" in capsys.readouterr().err
    assert main(["pack", str(folder), str(tmp_path / "a.safetensors"), "--dtype", "bfloat16"]) == 0
    assert main(["info", str(tmp_path / "a.safetensors")]) == 0
    assert "in_channels: 32" in capsys.readouterr().out


# ---- memory --------------------------------------------------------------------------------------------------------

_PEAK = """
import sys, torch
torch.set_num_threads(1)
from dcgen.convert import pack, unpack, open_model
from train.families import FAMILIES
def peak():  # of this process alone: ru_maxrss begins with the parent's
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
source, out, back = sys.argv[1:]
pack(open_model(source), out)
packed = peak()
unpack(open_model(out), back)
print(before, packed, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_far_below_the_weights(tmp_path):
    """A synthetic release of several shards, 340 MB: the bound asked for is 1.2x the weights; streaming needs 0.25x."""
    config = {"num_layers": 3, "num_single_layers": 8, "num_attention_heads": 6, "attention_head_dim": 128}
    config |= {"joint_attention_dim": 64, "pooled_projection_dim": 32, "in_channels": 32, "guidance_embeds": True}
    base = {**config, "axes_dims_rope": [16, 56, 56], "width": 768}
    folder = tmp_path / "transformer"
    folder.mkdir()
    shapes = {key + ".weight": shape for key, shape in flux.linears(base).items()}
    shapes |= {key + ".bias": shape[:1] for key, shape in flux.linears(base).items()}
    shapes |= flux.latent_shapes(base, 32, 1)
    for i in range(3):
        shapes |= {f"transformer_blocks.{i}.attn.norm_{n}.weight": (128,) for n in ("q", "k", "added_q", "added_k")}
    for i in range(8):
        shapes |= {f"single_transformer_blocks.{i}.attn.norm_{n}.weight": (128,) for n in ("q", "k")}
    keys, weight_map = sorted(shapes), {}
    for shard in range(4):
        part = {key: torch.full(shapes[key], float(i % 7)) for i, key in enumerate(keys) if i % 4 == shard}
        save_file(part, folder / f"model-{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    out, back = tmp_path / "one.safetensors", tmp_path / "back"
    command = [sys.executable, "-c", _PEAK, str(tmp_path), str(out), str(back)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    before, packed, unpacked = map(int, done.stdout.split())
    assert weights > 300e6
    assert packed - before < 0.25 * weights
    assert unpacked - before < 0.25 * weights
    assert packed - before > 5e6  # the gauge works: the largest tensor alone is 14 MB
    found = load_file(out)
    for i, key in enumerate(keys):
        if key == "single_transformer_blocks.5.proj_mlp.weight":
            assert (found["single_blocks.5.linear1.weight"][3 * 768 :] == i % 7).all()


# ---- merge and extract ---------------------------------------------------------------------------------------------


def _adapter(config: dict, rank: int, dtype: torch.dtype = torch.float32, size: float = 0.02) -> Adapter:
    base = flux.base_signature(config)
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    lora = {
        path: LoraPair(draw(rank, inputs), draw(outputs, rank), float(rank))
        for path, (outputs, inputs) in flux.linears(base).items()
        if FAMILIES["flux"].is_lora_target(path)
    }
    tensors = {key: draw(*shape) for key, shape in flux.latent_shapes(base, 32, 1).items()}
    return Adapter("flux", tensors, lora, SPACE, base, {"rule": "flux2"})


@pytest.fixture
def pair(make_flux, tmp_path):
    """(base model, adapter of rank 3, merged model) on disk, base at f8 with patch 2."""
    make_flux(in_channels=64).save_pretrained(tmp_path / "base" / "transformer")
    base = open_model(tmp_path / "base")
    adapter = _adapter(base.config, rank=3)
    merge_file(base, adapter, tmp_path / "merged.safetensors")
    return base, adapter, open_model(tmp_path / "merged.safetensors")


def test_merged_file_is_merge(pair):
    base, adapter, merged = pair
    expected = merge({key: base.get(key) for key in base.entries}, adapter)
    same({key: merged.get(key) for key in merged.entries}, expected)
    assert merged.config["in_channels"] == merged.config["out_channels"] == 32
    assert merged.latent == SPACE
    assert merged.schedule == Schedule("flux2")


def test_extract_undoes_merge(pair, tmp_path):
    """A release that is base + LoRA of rank 3: exactly those layers, exactly that rank, the same weights again."""
    base, adapter, merged = pair
    found, kept = extract(merged, base, rank=16)
    assert set(found.lora) == set(adapter.lora)
    assert {layer.rank for layer in kept} == {3}
    # the rest is the rounding of W + BA to float32, against a change of 0.1% to 1% of W
    assert min(layer.energy for layer in kept) > 1 - 1e-6
    assert found.schedule == adapter.schedule
    assert found.latent == adapter.latent
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    save_adapter(tmp_path / "a.safetensors", found)
    again = merge({key: base.get(key) for key in base.entries}, load_adapter(tmp_path / "a.safetensors"))
    for key, tensor in again.items():
        torch.testing.assert_close(tensor, merged.get(key), rtol=1e-5, atol=1e-6)


def test_extract_sees_through_bfloat16(make_flux, tmp_path):
    """A bf16 release: rounding makes every change full rank; the rank of the LoRA is found under it all the same."""
    model = make_flux(in_channels=64).bfloat16()
    model.save_pretrained(tmp_path / "base" / "transformer")
    base = open_model(tmp_path / "base")
    merge_file(base, _adapter(base.config, 2, torch.bfloat16, size=0.3), tmp_path / "merged.safetensors")
    found, kept = extract(open_model(tmp_path / "merged.safetensors"), base, rank=16)
    assert {layer.rank for layer in kept} == {2}
    assert all(pair.A.dtype == torch.bfloat16 for pair in found.lora.values())
    assert min(layer.energy for layer in kept) > 0.999


def test_extract_to_a_smaller_rank_or_energy(pair):
    base, _, merged = pair
    _, kept = extract(merged, base, rank=1)
    assert {layer.rank for layer in kept} == {1}
    for layer in kept:  # against numpy's idea of the best rank-1 approximation
        key = f"{layer.path}.weight"
        S = torch.linalg.svdvals((merged.get(key) - base.get(key)).double())
        assert layer.energy == pytest.approx(float(S[0] ** 2 / S.square().sum()), abs=1e-4)
    _, kept = extract(merged, base, rank=16, energy=0.6)
    assert {layer.rank for layer in kept} <= {1, 2, 3}
    assert all(layer.energy >= 0.6 - 1e-6 for layer in kept)


def test_extract_keeps_a_trained_norm_whole(pair, tmp_path):
    base, _, merged = pair
    state = {key: merged.get(key) for key in merged.entries}
    state["norm_out.linear.weight"] += 0.1
    save_file(state, tmp_path / "c.safetensors", metadata=merged.tensors.metadata)
    found, _ = extract(open_model(tmp_path / "c.safetensors"), base, rank=4)
    assert torch.equal(found.tensors["norm_out.linear.weight"], state["norm_out.linear.weight"])


def test_extract_refuses(pair, make_flux, tmp_path):
    base, _, merged = pair
    state = {key: merged.get(key) for key in merged.entries}
    state["transformer_blocks.0.attn.to_q.bias"] += 0.1
    save_file(state, tmp_path / "bias.safetensors", metadata=merged.tensors.metadata)
    with pytest.raises(ValueError, match=r"cannot carry: 1 unknown: transformer_blocks.0.attn.to_q.bias"):
        extract(open_model(tmp_path / "bias.safetensors"), base)
    make_flux(num_layers=1).save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(ValueError, match=r"other/transformer is not a base .*num_layers: 1"):
        extract(merged, open_model(tmp_path / "other"))
    with pytest.raises(ValueError, match="name it"):
        extract(base, base)
    with pytest.raises(ValueError, match="rank must be"):
        extract(merged, base, rank=0)


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (400, 400)])
def test_factor_by_full_and_by_randomised_svd(shape):
    """Both ways to the SVD give the exact change back when its rank fits."""
    generator = torch.Generator().manual_seed(1)
    B, A = (torch.randn(size, generator=generator) for size in ((shape[0], 5), (5, shape[1])))
    delta = B @ A
    state = torch.random.get_rng_state()
    for rank in (5, 60):
        pair, energy = factor(delta, rank)
        assert pair.rank == 5
        assert energy > 1 - 1e-9
        assert (pair.delta() - delta).norm() < 1e-5 * delta.norm()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (96, 480)])
def test_rounding_floor_is_above_rounding_and_not_far(dtype, shape):
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.linalg.svdvals(weight.to(dtype).double() - weight)[0].item()
    floor = rounding_floor(weight.to(dtype), [dtype])
    assert noise < floor < 2.5 * noise


def test_extract_from_the_command_line(pair, tmp_path, capsys):
    base, _, merged = pair
    out = tmp_path / "a.safetensors"
    command = ["extract", str(merged.tensors.path), str(base.tensors.path), str(out), "--rank", "8"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "rank    3" in told
    assert "energy kept over 39 layers" in told
    assert load_adapter(out).lora["transformer_blocks.0.attn.to_q"].rank == 3
    assert main(["merge", str(base.tensors.path), str(out), str(tmp_path / "again.safetensors")]) == 0
    again = load_file(tmp_path / "again.safetensors")
    for key, tensor in load_file(merged.tensors.path).items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-5, atol=1e-6)
