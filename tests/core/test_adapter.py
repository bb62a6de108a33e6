"""The adapter file: what is written comes back, what does not fit is refused, what is merged is W + BA."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcgen.adapter import Adapter, LoraPair, load_adapter, merge, save_adapter
from dcgen.backbones import BACKBONES
from dcgen.latent import LatentSpace
from dcgen.spaces import SPACES
from train.families import FAMILIES

BASE = {
    "width": 16,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 6,
    "pooled_projection_dim": 5,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 2, 2],
}
FILES = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(seed: int = 0, channels: int = 4, rank: int = 2, alpha: float = 3.0, dtype=torch.float32, **fields) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    flux = BACKBONES["flux"]
    lora = {
        path: LoraPair(draw(rank, inputs), draw(outputs, rank), alpha)
        for path, (outputs, inputs) in flux.linears(BASE).items()
        if FAMILIES["flux"].is_lora_target(path)
    }
    return Adapter(
        **{
            "backbone": "flux",
            "tensors": {key: draw(*shape) for key, shape in flux.latent_shapes(BASE, channels, 1).items()},
            "lora": lora,
            "latent": LatentSpace("toy", channels, 32, 0.5),
            "base": dict(BASE),
            "schedule": {"rule": "flux2"},
            **fields,
        }
    )


def assert_same(found: Adapter, expected: Adapter) -> None:
    for name in ("backbone", "latent", "patch_size", "base", "schedule"):
        assert getattr(found, name) == getattr(expected, name), name
    assert expected.metadata.items() <= found.metadata.items()
    assert set(found.tensors) == set(expected.tensors)
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.tensors.items())
    assert all(found.tensors[key].dtype == tensor.dtype for key, tensor in expected.tensors.items())
    assert set(found.lora) == set(expected.lora)
    for path, pair in expected.lora.items():
        assert torch.equal(found.lora[path].A, pair.A)
        assert torch.equal(found.lora[path].B, pair.B)
        assert found.lora[path].alpha == pytest.approx(pair.alpha, rel=1e-6)


@FILES
@given(
    seed=st.integers(0, 1000),
    channels=st.integers(1, 9),
    rank=st.integers(1, 5),
    alpha=st.floats(0.125, 512, width=32),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    schedule=st.sampled_from([{"rule": "flux"}, {"rule": "flux", "mu": 1.15}, {"rule": "static", "shift": 3.0}]),
    note=st.text(max_size=10),
)
def test_round_trip(tmp_path, seed, channels, rank, alpha, dtype, schedule, note):
    adapter = make(seed, channels, rank, alpha, dtype, schedule=schedule, metadata={"note": note})
    save_adapter(tmp_path / "a.safetensors", adapter)
    assert_same(load_adapter(tmp_path / "a.safetensors"), adapter)
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors"]


def test_file_as_others_read_it(tmp_path):
    """Names and metadata that ComfyUI's LoRA loader and model browsers look for."""
    adapter = make(metadata={"modelspec.title": "Toy", "modelspec.license": "Apache-2.0"})
    save_adapter(tmp_path / "a.safetensors", adapter)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "flux-1-dev/dc-gen"
    assert metadata["modelspec.title"] == "Toy"
    assert json.loads(metadata["dcgen.base"]) == BASE
    assert {"x_embedder.weight", "x_embedder.bias", "proj_out.weight", "proj_out.bias"} <= keys
    for part in ("lora_A.weight", "lora_B.weight", "alpha"):
        assert f"transformer.single_transformer_blocks.0.attn.to_q.{part}" in keys
    assert len(keys) == 4 + 3 * (12 + 5)


def test_head_norm_may_come_along(tmp_path):
    adapter = make()
    adapter.tensors |= {"norm_out.linear.weight": torch.randn(32, 16), "norm_out.linear.bias": torch.randn(32)}
    save_adapter(tmp_path / "a.safetensors", adapter)
    assert_same(load_adapter(tmp_path / "a.safetensors"), adapter)


def test_views_and_parameters_are_saved(tmp_path):
    """What training holds: parameters with a graph, transposes, slices of one storage."""
    adapter = make()
    whole = torch.randn(20, 32)
    adapter.tensors["x_embedder.weight"] = torch.nn.Parameter(whole[:4, :16].T)
    adapter.tensors["proj_out.weight"] = whole[4:8, 16:]
    save_adapter(tmp_path / "a.safetensors", adapter)
    found = load_adapter(tmp_path / "a.safetensors")
    assert torch.equal(found.tensors["x_embedder.weight"], whole[:4, :16].T)
    assert torch.equal(found.tensors["proj_out.weight"], whole[4:8, 16:])


# ---- refusals ------------------------------------------------------------------------------------------------------


def _rewrite(path: Path, change) -> None:
    """Load a file's tensors and metadata, let `change(tensors, metadata)` spoil them, write it again."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


QUERY = "transformer.transformer_blocks.0.attn.to_q"
SPOILED = {
    "no format": (lambda t, m: m.pop("dcgen.format"), "looks like an ordinary LoRA"),
    "newer format": (lambda t, m: m.update({"dcgen.format": "3"}), "update DC-Gen"),
    "unknown backbone": (lambda t, m: m.update({"dcgen.backbone": "mochi"}), "'mochi' is unknown"),
    "no latent": (lambda t, m: m.pop("dcgen.latent"), "lacks dcgen.latent"),
    "latent": (lambda t, m: m.update({"dcgen.latent": "{}"}), "not a latent space"),
    "no base": (lambda t, m: m.pop("dcgen.base"), "lacks dcgen.base"),
    "base not JSON": (lambda t, m: m.update({"dcgen.base": "{"}), "dcgen.base.* not valid JSON"),
    "base no object": (lambda t, m: m.update({"dcgen.base": "3"}), "not a JSON object"),
    "base of another model": (lambda t, m: m.update({"dcgen.base": '{"width": 16}'}), "is not one of a flux model"),
    "absurd depth": (lambda t, m: m.update({"dcgen.base": json.dumps({**BASE, "num_layers": 10**9})}), "num_layers"),
    "patch size": (lambda t, m: m.update({"dcgen.patch_size": "1.5"}), "not a whole number"),
    "patch of nothing": (lambda t, m: m.update({"dcgen.patch_size": "0"}), "at least 1"),
    "schedule": (lambda t, m: m.update({"dcgen.schedule": '{"rule": "karras"}'}), "karras"),
    "schedule field": (lambda t, m: m.update({"dcgen.schedule": '{"rule": "flux", "sigma": 1}'}), "schedule must be"),
    "schedule type": (lambda t, m: m.update({"dcgen.schedule": '{"rule": "flux", "mu": "1"}'}), "schedule must be"),
    "schedule shift": (lambda t, m: m.update({"dcgen.schedule": '{"rule": "static"}'}), "needs its shift"),
    "no embedder": (lambda t, m: t.pop("x_embedder.weight"), "1 missing: x_embedder.weight"),
    "stray tensor": (lambda t, m: t.update({"img_in.weight": torch.zeros(1)}), "1 unknown: img_in.weight"),
    "embedder shape": (lambda t, m: t.update({"x_embedder.weight": torch.zeros(16, 5)}), r"expected .*\(16, 4\)"),
    "integers": (lambda t, m: t.update({"x_embedder.bias": torch.zeros(16, dtype=torch.int64)}), "floating point"),
    "half a pair": (lambda t, m: t.pop(f"{QUERY}.lora_B.weight"), r"to_q is incomplete: no .lora_B.weight"),
    "no alpha": (lambda t, m: t.pop(f"{QUERY}.alpha"), r"to_q is incomplete: no .alpha"),
    "alpha of many": (lambda t, m: t.update({f"{QUERY}.alpha": torch.zeros(2)}), "alpha must be one number"),
    "alpha not finite": (lambda t, m: t.update({f"{QUERY}.alpha": torch.tensor(float("nan"))}), "NaN or infinite"),
    "ranks differ": (lambda t, m: t.update({f"{QUERY}.lora_B.weight": torch.zeros(16, 3)}), "lora_B is"),
    "rank 0": (
        lambda t, m: t.update(
            {f"{QUERY}.lora_A.weight": torch.zeros(0, 16), f"{QUERY}.lora_B.weight": torch.zeros(16, 0)}
        ),
        "rank 0",
    ),
    "scalar A": (lambda t, m: t.update({f"{QUERY}.lora_A.weight": torch.tensor(1.0)}), "lora_A is"),
    "module unknown": (
        lambda t, m: t.update({key.replace("blocks.0", "blocks.7"): t[key].clone() for key in list(t) if QUERY in key}),
        r"unknown: transformer.transformer_blocks.7.attn.to_q",
    ),
    "not part of a LoRA": (lambda t, m: t.update({f"{QUERY}.dora_scale": torch.zeros(1)}), "not part of a LoRA"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_files_are_refused(tmp_path, name):
    path = tmp_path / "spoiled.safetensors"
    save_adapter(path, make())
    load_adapter(path)
    change, message = SPOILED[name]
    _rewrite(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["transformer.a.lora_A.weight"], "ordinary LoRA"),
        (["double_blocks.0.img_mod.lin.weight"], "whole model"),
        (["decoder.conv_in.weight"], "autoencoder"),
        (["something"], "that DC-Gen training wrote"),
    ],
)
def test_other_files_are_told_apart(tmp_path, keys, message):
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "a.safetensors")


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.safetensors: there is no such file"):
        load_adapter(tmp_path / "absent.safetensors")
    torch.save({}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match=r"pickle.pt: .*only .safetensors files are read"):
        load_adapter(tmp_path / "pickle.pt")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(ValueError, match=r"empty.safetensors: .*download or copy it again"):
        load_adapter(tmp_path / "empty.safetensors")


@FILES
@given(data=st.data())
def test_truncated_anywhere_is_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    save_adapter(path, make())
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_adapter(path)


@settings(FILES, max_examples=300)
@given(data=st.data())
def test_a_flipped_header_bit_is_refused_or_harmless(tmp_path, data):
    """Any single flipped bit before the tensor data: a ValueError naming the file, or an adapter that checks out."""
    path = tmp_path / "a.safetensors"
    save_adapter(path, make())
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        found = load_adapter(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        found.check()


def test_nothing_is_written_when_it_does_not_fit(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, make(1))
    before = path.read_bytes()
    not_finite = make()
    not_finite.lora["transformer_blocks.0.attn.to_q"].B[0, 0] = float("inf")
    incomplete = make()
    del incomplete.tensors["proj_out.bias"]
    reserved = make(metadata={"dcgen.format": "9"})
    for adapter, message in (
        (not_finite, "not finite in .*to_q"),
        (incomplete, "missing"),
        (reserved, "leave them out"),
    ):
        with pytest.raises(ValueError, match=message):
            save_adapter(path, adapter)
    with pytest.raises(ValueError, match="give it that ending"):
        save_adapter(tmp_path / "a.pt", make())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_adapter(path, make(1))
    before = path.read_bytes()

    def die(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("dcgen.adapter.save_file", die)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(path, make(2))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


# ---- pairing with bases and latents --------------------------------------------------------------------------------


def test_check_base():
    adapter = make()
    adapter.check_base({**BASE, "axes_dims_rope": (4, 2, 2)}, "base")
    with pytest.raises(
        ValueError, match=r"flux-dev is not a base .*num_layers: 19 \(this adapter needs 1\); width: 3072"
    ):
        adapter.check_base({**BASE, "width": 3072, "num_layers": 19}, "flux-dev")
    with pytest.raises(ValueError, match=r"guidance_embeds: absent \(this adapter needs True\)"):
        adapter.check_base({key: value for key, value in BASE.items() if key != "guidance_embeds"}, "x")


def test_check_latent():
    adapter = make(channels=32, latent=SPACES["dc-ae-f32c32-in-1.0"])
    adapter.check_latent(SPACES["dc-ae-f32c32-in-1.0"])
    adapter.check_latent(LatentSpace("", 32, 32, 0.3189))
    with pytest.raises(ValueError, match=r"channels: 16 against 32.*dc-ae-f32c32-in-1.0: 32 channels, f32"):
        adapter.check_latent(SPACES["flux-f8c16"])
    with pytest.raises(ValueError, match=r"^my VAE does not belong.*scaling_factor: 0.4552 against 0.3189"):
        adapter.check_latent(SPACES["dc-ae-f32c32-mix-1.0"], "my VAE")


# ---- merging -------------------------------------------------------------------------------------------------------


def _base(make_flux) -> dict[str, torch.Tensor]:
    config = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (4, 2, 2), "in_channels": 64}
    config |= {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 6, "pooled_projection_dim": 5}
    return make_flux(**config).state_dict()


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
def test_merge_is_w_plus_ba(make_flux, strength):
    base, adapter = _base(make_flux), make(rank=3, alpha=5.0)
    merged = merge(base, adapter, strength)
    assert list(merged) == list(base)
    for key, weight in base.items():
        module = key.removesuffix(".weight")
        if key in adapter.tensors:
            assert torch.equal(merged[key], adapter.tensors[key])
        elif key.endswith(".weight") and module in adapter.lora:
            pair = adapter.lora[module]
            exact = weight.double() + strength * (5.0 / 3.0) * pair.B.double() @ pair.A.double()
            torch.testing.assert_close(merged[key], exact.float(), rtol=1e-5, atol=1e-6)
            assert (merged[key] - weight).abs().max() > 0.1
        else:
            assert merged[key] is weight


def test_merge_equals_peft(make_flux):
    """The same LoRA, run by peft unmerged, gives what the merged weights give."""
    peft = pytest.importorskip("peft")
    config = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (4, 2, 2), "in_channels": 4}
    config |= {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 6, "pooled_projection_dim": 5}
    model, plain = make_flux(**config), make_flux(**config)
    adapter = make(rank=2, alpha=3.0)
    adapter.tensors = {key: model.state_dict()[key] for key in adapter.tensors}
    pattern = "|".join(FAMILIES["flux"].lora_targets)
    injected = peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=3.0, target_modules=pattern), model)
    with torch.no_grad():
        for path, pair in adapter.lora.items():
            module = injected.get_submodule(path)
            module.lora_A["default"].weight.copy_(pair.A)
            module.lora_B["default"].weight.copy_(pair.B)
    call = (torch.randn(1, 4, 2, 2), torch.tensor([0.7]))
    cond = {"prompt_embeds": torch.randn(1, 3, 6), "pooled": torch.randn(1, 5)}
    g = torch.tensor([2.0])
    with torch.no_grad():
        expected = FAMILIES["flux"].velocity(injected, *call, cond, g)
        before = FAMILIES["flux"].velocity(plain, *call, cond, g)
        plain.load_state_dict(merge(plain.state_dict(), adapter))
        found = FAMILIES["flux"].velocity(plain, *call, cond, g)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2


def test_merge_at_zero_is_alignment_only(make_flux):
    base, adapter = _base(make_flux), make()
    merged = merge(base, adapter, 0.0)
    assert all(merged[key] is base[key] for key in base if key not in adapter.tensors)
    assert all(torch.equal(merged[key], tensor) for key, tensor in adapter.tensors.items())


def test_merge_rounds_once(make_flux):
    """bf16 weights: the sum is taken in float32 and rounded once, which beats adding a rounded change."""
    base = {key: value.bfloat16() for key, value in _base(make_flux).items()}
    adapter = make(dtype=torch.bfloat16)
    merged = merge(base, adapter)
    assert all(value.dtype == torch.bfloat16 for value in merged.values())
    key = "transformer_blocks.0.attn.to_q.weight"
    pair = adapter.lora[key.removesuffix(".weight")]
    exact = base[key].double() + 1.5 * pair.B.double() @ pair.A.double()
    assert ((merged[key].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_merge_refuses(make_flux):
    base, adapter = _base(make_flux), make()
    with pytest.raises(ValueError, match=r"1 missing: proj_out.bias"):
        merge({key: value for key, value in base.items() if key != "proj_out.bias"}, adapter)
    with pytest.raises(ValueError, match=r"with diffusers names"):
        merge(BACKBONES["flux"].to_original(base), adapter)
    key = "transformer_blocks.0.attn.to_q.weight"
    with pytest.raises(ValueError, match=r"to_q.weight: the base has \(16, 15\), the adapter's LoRA \(16, 16\)"):
        merge({**base, key: base[key][:, :15]}, adapter)


def test_linears_are_the_models(make_flux):
    """The shape table behind the checks, against the real modules, with and without guidance embedding."""
    flux = BACKBONES["flux"]
    for guidance in (True, False):
        model = make_flux(guidance_embeds=guidance, joint_attention_dim=22)
        base = flux.base_signature(dict(model.config))
        real = {
            name: (module.out_features, module.in_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name not in ("x_embedder", "proj_out")
        }
        assert flux.linears(base) == real
        state = model.state_dict()
        shapes = {**flux.latent_shapes(base, 16, 2), **flux.extra_shapes(base)}
        assert all(tuple(state[key].shape) == shape for key, shape in shapes.items())


def test_check_names_an_unknown_backbone():
    with pytest.raises(ValueError, match=r"backbone 'sd3' is unknown"):
        replace(make(), backbone="sd3").check()
