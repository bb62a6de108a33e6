"""SANA as ComfyUI's MODEL and CLIP, against diffusers, in one ComfyUI process a test."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcgen.adapter import Adapter, LoraPair, save_adapter
from dcgen.backbones import BACKBONES
from dcgen.latent import LatentSpace
from dcgen.spaces import SPACES

DEEP = LatentSpace("tiny-f64", 16, 64, 0.31)
QK = "rms_norm_across_heads"
get_2d_sincos_pos_embed = pytest.importorskip("diffusers.models.embeddings").get_2d_sincos_pos_embed


PROMPTS = [
    ("a red cat on a blue background", None),
    ("  A Red CAT (x:1.3), wérds \n no token covers ", None),
    ("", ""),
    ("ugly red cat", ""),
    ("a red cat " * 60, None),
    ("a red cat", "given a user prompt: "),
]


def case(channels, rows, columns, seed, batch=2, tokens=7):
    """Inputs with a mask that hides the ends of the captions."""
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.arange(tokens)[None] < torch.tensor([[3], [tokens]])[:batch]).long()
    return {
        "x": torch.randn(batch, channels, rows, columns, generator=draw),
        "sigma": torch.tensor([0.9997, 0.4175])[:batch],
        "context": torch.randn(batch, tokens, 24, generator=draw),
        "mask": mask,
    }


def pair(outputs, inputs, seed, alpha, ones=()):
    draw = torch.Generator().manual_seed(seed)
    return LoraPair(
        torch.randn(4, inputs, *ones, generator=draw) * 0.2, torch.randn(outputs, 4, *ones, generator=draw) * 0.2, alpha
    )


def with_lora(state, pairs, strength=1.0):
    """W + strength * alpha/rank * B A, by hand."""
    state = dict(state)
    for name, lora in pairs.items():
        change = strength * lora.alpha / 4 * (lora.B.flatten(1) @ lora.A.flatten(1))
        state[f"{name}.weight"] = state[f"{name}.weight"] + change.reshape(state[f"{name}.weight"].shape)
    return state


LORA = {
    "transformer_blocks.0.attn1.to_q": pair(64, 64, 1, 8.0),
    "transformer_blocks.1.attn2.to_out.0": pair(64, 64, 2, 4.0),
    "transformer_blocks.1.ff.conv_inverted": pair(320, 64, 3, 2.0, (1, 1)),
}
OTHER = {
    "transformer_blocks.1.attn1.to_v": pair(64, 64, 4, 4.0),
    "transformer_blocks.0.ff.conv_point": pair(64, 160, 5, 6.0),
}


def write_files(folder, tiny, sana, sana_release, base_release):
    """Original names in a .pth with the table of positions at half steps (4K's), an adapter, a LoRA, FLUX's adapter."""
    side, scale = 6, 2.0
    native = sana.transformer(tiny, 32, 51, qk_norm=QK, sample_size=side, interpolation_scale=scale)
    original = BACKBONES["sana"].to_original(native.state_dict(), dict(native.config))
    table = get_2d_sincos_pos_embed(64, side, interpolation_scale=scale, base_size=side)
    original["pos_embed"] = torch.as_tensor(table).float()[None]
    torch.save({"state_dict": original}, folder / "original.pth")
    draw = torch.Generator().manual_seed(9)
    own = {
        "patch_embed.proj.weight": torch.randn(64, 16, 1, 1, generator=draw) * 0.2,
        "patch_embed.proj.bias": torch.randn(64, generator=draw) * 0.2,
        "proj_out.weight": torch.randn(16, 64, generator=draw) * 0.2,
        "proj_out.bias": torch.randn(16, generator=draw) * 0.2,
        "scale_shift_table": torch.randn(2, 64, generator=draw) * 0.2,
    }
    base = sana_release[1].transformer
    signature = BACKBONES["sana"].base_signature(dict(base.config))
    adapter = Adapter("sana", own, LORA, DEEP, signature, {"rule": "static", "shift": 6.0})
    save_adapter(folder / "adapter.safetensors", adapter)
    tensors = {}
    for name, lora in OTHER.items():
        tensors[f"transformer.{name}.lora_A.weight"] = lora.A
        tensors[f"transformer.{name}.lora_B.weight"] = lora.B
        tensors[f"transformer.{name}.alpha"] = torch.tensor(lora.alpha)
    save_file(tensors, folder / "lora.safetensors")
    flux = BACKBONES["flux"].base_signature(dict(base_release[1].transformer.config))
    D = base_release[1].transformer.inner_dim
    shapes = {"x_embedder.weight": (D, 16), "x_embedder.bias": (D,), "proj_out.weight": (16, D), "proj_out.bias": (16,)}
    ends = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    save_adapter(folder / "flux.safetensors", Adapter("flux", ends, {}, DEEP, flux, {"rule": "flux"}))
    return native, own


def without_norm(folder, release):
    """A copy of the release whose Gemma has lost its final norm."""
    broken = folder / "no-norm"
    shutil.copytree(release, broken)
    weights = load_file(broken / "text_encoder" / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, broken / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    return broken


@pytest.fixture(scope="module")
def found(comfy, tmp_path_factory, tiny, sana, sana_release, deep_sana_release, base_release):
    folder = tmp_path_factory.mktemp("sana-files")
    native, own = write_files(folder, tiny, sana, sana_release, base_release)
    base = sana_release[1].transformer
    deep = sana.transformer(tiny, 16, 0)
    inputs = {
        "f32": {"square": case(8, 4, 4, 1), "wide": case(8, 2, 7, 2)},
        "f64": {"square": case(16, 4, 4, 3), "larger": case(16, 8, 6, 4)},
        "original": {"square": case(32, 3, 5, 5)},
        "fp8": {"square": case(8, 4, 4, 1)},
        "deep": {"square": case(16, 4, 4, 6), "wide": case(16, 3, 6, 7)},
    }
    params = {
        "models": {
            "f32": (str(sana_release[0]), "default"),
            "f64": (str(deep_sana_release[0]), "default"),
            "original": ("original.pth", "default"),
            "fp8": (str(sana_release[0]), "fp8_e4m3fn"),
        },
        "files": [str(folder)],
        "autoencoder": "dc-ae-f32c32-sana-1.0",
        "adapter": str(folder / "adapter.safetensors"),
        "lora": str(folder / "lora.safetensors"),
        "flux_adapter": str(folder / "flux.safetensors"),
        "flux": str(base_release[0]),
        "text": {
            "release": str(sana_release[0]),
            "file": str(sana_release[2]),
            "sizes": sana.gemma_sizes,
            "prompts": PROMPTS,
            "no_norm": str(without_norm(folder, sana_release[0])),
            "flux": str(base_release[0]),
        },
    }
    tensors = {f"{m}/{c}/{n}": t for m, of in inputs.items() for c, case in of.items() for n, t in case.items()}
    out, facts = comfy.run("sana:everything", tmp_path_factory.mktemp("job"), tensors, params)
    state = base.state_dict()
    adapted = {**state, **own}
    oracle = {
        "f32": (base, None, "f32"),
        "again": (base, None, "f32"),
        "f64": (deep_sana_release[1].transformer, None, "f64"),
        "original": (native, None, "original"),
        "lora": (base, with_lora(state, OTHER, 0.7), "f32"),
        "deep": (deep, with_lora(adapted, LORA), "deep"),
        "aligned": (deep, adapted, "deep"),
        "deep-lora": (deep, with_lora(with_lora(adapted, LORA), OTHER, 0.7), "deep"),
    }
    wanted = {}
    for name, (model, weights, which) in oracle.items():
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(weights or before)
        wanted |= {f"{name}/{key}": sana.velocity(model, of) for key, of in inputs[which].items()}
        model.load_state_dict(before)
    return out, wanted, facts


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_velocity_equals_diffusers(found):
    """f32 without positions, f64 with positions and qk norm, original names in a .pth, LoRA, adapter, base again."""
    out, wanted, _ = found
    errors = {name: relative(out[name], velocity) for name, velocity in wanted.items()}
    assert max(errors.values()) < 1e-4, errors
    changed = [("lora", "f32"), ("deep", "aligned"), ("deep-lora", "deep")]
    assert all(relative(wanted[f"{a}/square"], wanted[f"{b}/square"]) > 0.02 for a, b in changed)


def test_fp8_weights_are_near(found):
    """A few percent, and not nothing: the weights really are 8 bit."""
    out, wanted, _ = found
    assert 0.003 < relative(out["fp8/square"], wanted["f32/square"]) < 0.1


def test_what_the_core_reads_off_the_model(found):
    _, _, facts = found
    assert [facts[name]["channels"] for name in ("f32", "f64", "original", "deep")] == [8, 16, 32, 16]
    assert [facts[name]["factor"] for name in ("f32", "f64", "original", "deep")] == [32, 64, 32, 64]
    assert facts["original"]["scaling"] == SPACES["dc-ae-f32c32-sana-1.0"].scaling_factor
    assert [facts[name]["shift"] for name in ("f32", "f64", "original", "deep")] == [3.0, 6.0, 6.0, 6.0]
    assert facts["f32"]["schedule"] == {"rule": "static", "shift": 3.0}
    assert facts["shared"]


def test_refusals(found):
    said = found[2]["said"]
    wanted = {
        "f32 latent": "16 channels at f64",
        "flux adapter": "an adapter for 'flux' models",
        "sana adapter on flux": "an adapter for 'sana' models",
        "twice": "already runs on tiny-f64",
        "base": "num_layers",
        "not SANA's text": "without Gemma's final norm",
        "other encoder": "Gemma-2-2B-it",
        "joined": "ConditioningConcat",
    }
    assert {name: text in said.get(name, "") for name, text in wanted.items()} == dict.fromkeys(wanted, True), said


def test_text_equals_the_pipeline(found, sana, sana_release):
    """Instruction or none, longer than the window, upper case, both kinds of CLIP; and the mask, exactly."""
    out, pipe, facts = found[0], sana_release[1], found[2]["text"]
    assert facts["instruction"] == "\n".join(sana.instruction())
    for i, (prompt, instruction) in enumerate(PROMPTS):
        lines = sana.instruction() if instruction is None else instruction.split("\n") if instruction else None
        with torch.no_grad():
            wanted, mask, _, _ = pipe.encode_prompt(prompt, False, complex_human_instruction=lines)
        for kind in ("release", "core"):
            assert torch.equal(out[f"{kind}/{i}/mask"].long(), mask), (kind, i)
            seen = mask.bool()
            assert (out[f"{kind}/{i}/context"] - wanted)[seen].abs().max() < 1e-3, (kind, i)
    # Core's own encoding is another: the second-to-last layer, without the norm.
    assert (out["core/plain"] - out["release/plain"]).abs().max() > 0.1
    assert "norm.weight" in facts["said"]["no_norm"]
    assert "Gemma-2-2B-it" in facts["said"]["flux"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tiny, sana, sana_release, base_release):
    """(parameters for inside/sana.py, the adapter's own tensors) of the base, the adapter and a LoRA."""
    folder = tmp_path_factory.mktemp("sana-weights")
    own = write_files(folder, tiny, sana, sana_release, base_release)[1]
    names = {name: str(folder / f"{name}.safetensors") for name in ("adapter", "lora")}
    return {"release": str(sana_release[0]), **names}, own


@pytest.fixture(scope="module")
def constrained(comfy, tmp_path_factory, weights):
    inputs = {"base": {"square": case(8, 4, 4, 1)}, "deep": {"square": case(16, 4, 4, 6), "wide": case(16, 3, 6, 7)}}
    tensors = {f"{m}/{c}/{n}": t for m, of in inputs.items() for c, case in of.items() for n, t in case.items()}
    # aot_eager traces and makes functional what a compiler is then given, which is what can fail; it compiles nothing.
    params = {**weights[0], "backend": "aot_eager"}
    return inputs, *comfy.run("sana:constrained", tmp_path_factory.mktemp("job"), tensors, params)


def test_lowvram(constrained, weights, sana, tiny, sana_release):
    """Every weight stays offloaded and is cast at each call, LoRA and adapter with it, in float32 and in fp8."""
    inputs, out, facts = constrained
    assert facts["partial"] == [True] * 8, "a model was loaded whole, so this was no lowvram run"
    base, deep = sana_release[1].transformer, sana.transformer(tiny, 16, 0)
    state = base.state_dict()
    deep.load_state_dict(with_lora(with_lora({**state, **weights[1]}, LORA), OTHER, 0.7))
    for name, model in (("base", base), ("deep", deep)):
        for key, of in inputs[name].items():
            wanted = sana.velocity(model, of)
            for turn in range(2):
                assert relative(out[f"default/{turn}/{name}/{key}"], wanted) < 1e-4
                assert 0.003 < relative(out[f"fp8_e4m3fn/{turn}/{name}/{key}"], wanted) < 0.15


def test_torch_compile(constrained):
    """Through the wrapper of the core's TorchCompileModel: the same latents, from one graph, at every step."""
    _, out, facts = constrained
    for name in ("base", "deep"):
        assert relative(out[f"compiled/{name}"], out[f"plain/{name}"]) < 1e-5
        assert facts["compiled"][f"plain/{name}"] == {"graphs": 0, "breaks": 0}
        assert facts["compiled"][f"compiled/{name}"] == {"graphs": 1, "breaks": 0}


def test_every_layer_is_on_the_device(comfy, tmp_path, weights):
    """Base and DC-Gen take turns; tables that stand beside the layers move with them."""
    order = ["base", "deep", "base", "deep", "deep", "base"]
    _, facts = comfy.run("sana:placement", tmp_path, params={**weights[0], "order": order})
    assert facts["seen"] == [[facts["device"]]] * len(order)
