"""The identity of a base's weights: the same base in any type is itself, a merged one is another."""

from __future__ import annotations

import json

import pytest
import torch

from dcgen.adapter import Adapter, LoraPair, check_model, load_adapter, save_adapter
from dcgen.backbones import BACKBONES
from dcgen.convert import merge_file
from dcgen.identity import ROUNDING, BaseIdentity, bits_of, identity_of, sampled
from dcgen.latent import LatentSpace
from dcgen.release import open_model
from dcgen.schedule import Schedule

FLUX = BACKBONES["flux"]
SPACE = LatentSpace("deep-ae", 32, 32, 0.4)


def small_change(base, seed: int, size: float) -> dict[str, LoraPair]:
    """Rank-4 changes of a share `size` of every attention layer's weight."""
    torch.manual_seed(seed)
    lora = {}
    for path, (outputs, inputs) in FLUX.linears(base.signature).items():
        if path.endswith(("to_q", "to_k", "to_v")):
            pair = LoraPair(torch.randn(4, inputs), torch.randn(outputs, 4), 4.0)
            scale = size * base.get(f"{path}.weight").float().norm() / pair.delta().norm()
            lora[path] = LoraPair(pair.A, pair.B * scale, 4.0)
    return lora


@pytest.fixture
def base(make_flux, tmp_path):
    make_flux(in_channels=64).bfloat16().save_pretrained(tmp_path / "base" / "transformer")
    return open_model(tmp_path / "base")


def adapter_for(base, size: float = 0.1) -> Adapter:
    torch.manual_seed(9)
    shapes = FLUX.latent_shapes(base.signature, 32, 1)
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    return Adapter("flux", tensors, small_change(base, 3, size), SPACE, base.signature, Schedule("flux2"))


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """As a file of that type has it."""
    weight = weight.float()
    if kind == "int4":
        groups = weight.reshape(weight.shape[0], -1, 16)
        scale = groups.abs().amax(-1, keepdim=True) / 7
        return ((groups / scale).round() * scale).reshape(weight.shape)
    if kind == "int8":
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return (weight / scale).round() * scale
    return weight.to(getattr(torch, kind)).float()


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("float16", 16), ("bfloat16", 16), ("float8_e4m3fn", 8), ("float8_e5m2", 8), ("int8", 8), ("int4", 4)],
)
def test_rounding_leaves_a_base_what_it_is(base, kind, bits):
    known = base.identity()
    read = identity_of(FLUX, base.signature, lambda name: rounded(base.get(name), kind))
    assert known.is_of(read, bits) is True
    assert 0 <= known.distance(read) < ROUNDING[bits]


def test_a_small_merged_change_is_another_base(base, tmp_path):
    """A LoRA that changes the weights by 2 %: far above what 16 bits round."""
    adapter = adapter_for(base, 0.02)
    merged = open_model(merge_file(base, adapter, tmp_path / "merged.safetensors"))
    assert base.identity().distance(merged.identity()) == pytest.approx(0.02, rel=0.3)
    assert base.identity().is_of(merged.identity(), 16) is False


def test_weights_that_nothing_was_loaded_into_tell_nothing(base):
    """Some of them: the others are compared. All of them: unknown, and not another base."""
    known = base.identity()
    names = list(known.values)
    part = identity_of(FLUX, base.signature, lambda name: base.get(name) * (name != names[0]))
    assert set(part.values) == set(names[1:])
    assert known.is_of(part, 16) is True
    none = identity_of(FLUX, base.signature, lambda name: torch.zeros_like(base.get(name)))
    assert known.is_of(none, 16) is None


def test_through_a_file(base, tmp_path, caplog):
    adapter = adapter_for(base)
    adapter.base_weights, adapter.base_latent = base.identity(), LatentSpace("f8", 16, 8, 0.36)
    save_adapter(tmp_path / "a.safetensors", adapter)
    read = load_adapter(tmp_path / "a.safetensors")
    assert read.base_latent == adapter.base_latent
    assert read.base_weights.distance(base.identity()) < 1e-3
    check_model(read, base)
    assert not caplog.records
    second = open_model(merge_file(base, adapter, tmp_path / "merged.safetensors"))
    # What a second step (1K over 512) was trained on is not the first base, and the other way round.
    with pytest.raises(ValueError, match=r"trained over other weights than those of .*merged\.safetensors.*extract"):
        check_model(read, second.on_latent(read.base_latent) if second.latent is None else _on(second, read))
    with pytest.raises(ValueError, match="already runs on deep-ae"):
        check_model(read, second)


def _on(model, adapter):
    from dataclasses import replace

    return replace(model, latent=adapter.base_latent)


def test_a_file_without_identity_is_taken_with_a_warning(base, tmp_path, caplog):
    adapter = adapter_for(base)
    save_adapter(tmp_path / "a.safetensors", adapter)
    check_model(load_adapter(tmp_path / "a.safetensors"), base)
    assert "does not say which base's weights" in caplog.text


def test_json():
    identity = BaseIdentity({"a.weight": sampled("a.weight", torch.randn(32, 32))})
    again = BaseIdentity.parse(json.loads(json.dumps(identity.to_dict())))
    assert identity.distance(again) < 1e-3
    assert len(json.dumps(identity.to_dict())) < 300
    assert identity.distance(BaseIdentity({})) is None


@pytest.mark.parametrize(
    "entry", [{"a": 5}, {"a": "!!!"}, {"a": "AAA"}, {"a": "AHw="}, {str(i): "" for i in range(99)}]
)
def test_what_is_no_identity(entry):
    with pytest.raises(ValueError, match=r"base_weights|a is 5"):
        BaseIdentity.parse(entry)


def test_bits():
    kinds = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    assert [bits_of(dtype) for dtype in kinds] == [32, 16, 8]
