"""LoRA of every kind on the layers that depend on the latent; damaged releases; the DC-AE in core's VAE nodes."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "toy"


def settings():
    """flux() and sana() of test_core_nodes.py (test files cannot import each other under importlib mode)."""
    spec = importlib.util.spec_from_file_location("core_nodes_settings", Path(__file__).with_name("test_core_nodes.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lora(comfy, tmp_path_factory, tiny, helper):
    folder, made = tmp_path_factory.mktemp("lora-kinds"), settings()
    families, tensors = {}, {}
    for family, (params, inputs) in {"flux": made.flux(folder, tiny, helper), "sana": made.sana(folder)}.items():
        families[family] = params
        tensors |= {f"{family}/{name}": value for name, value in inputs.items()}
    # (rows, columns) of the layer on the deep latent, and on the base's
    families["flux"]["ends"] = {
        "x_embedder": {"fits": (128, 8), "misfit": (128, 64)},
        "proj_out": {"fits": (8, 128), "misfit": (64, 128)},
    }
    base, new = tensors["sana/x"].shape[1], tensors["sana/noise"].shape[1]
    families["sana"]["ends"] = {"proj_out": {"fits": (new, 128), "misfit": (base, 128)}}
    from dcgen.adapter import load_adapter

    width = load_adapter(families["sana"]["adapter"]).base["width"]
    for key, patch in (("fits", new), ("misfit", base)):
        families["sana"]["ends"]["proj_out"][key] = (patch, width)
    families["sana"]["ends"]["patch_embed.proj"] = {"fits": (width, new), "misfit": (width, base)}
    return comfy.run("changes:lora_kinds", folder, tensors, {"families": families})[1]


def test_lora_of_every_kind_on_the_ends(lora):
    """What fits is applied and changes the image; what does not is named, once, and core does not stumble over it."""
    assert len(lora) == 4 * 2 * 5
    for name, (said, errors, change) in lora.items():
        assert errors == [], name
        assert len(said) == 1, (name, said)
        if name.endswith("/fits"):
            assert "1 of 1 changes applied" in said[0], (name, said)
            assert change > 1e-3, name
        else:
            layer = name.split("/")[1]
            assert "0 of 1 changes applied. Left out, made for another latent" in said[0], (name, said)
            assert layer in said[0], (name, said)
            assert change == 0, name


@pytest.fixture(scope="module")
def damaged(comfy, tmp_path_factory):
    work = tmp_path_factory.mktemp("damaged")
    parts = {
        "flux": {
            "transformer": "transformer_blocks.0.ff.net.2.weight",
            "text_encoder": "text_model.encoder.layers.0.mlp.fc1.weight",
            "text_encoder_2": "encoder.block.0.layer.1.DenseReluDense.wo.weight",
            "vae": "decoder.conv_in.weight",
        },
        "sana": {
            "transformer": "transformer_blocks.0.attn1.to_q.weight",
            "text_encoder": "layers.0.mlp.down_proj.weight",
        },
    }
    releases = {"flux": str(TOY / "flux-base"), "sana": str(TOY / "sana-base")}
    params = {"work": str(work), "releases": releases, "parts": parts}
    return parts, comfy.run("changes:damaged", work, params=params)[1]


def test_a_damaged_release_is_refused_by_name(damaged):
    """Also where a core's layers have no weights before they are loaded, and check no shapes then."""
    parts, facts = damaged
    assert facts["loaded"] == 0
    wanted = {f"{f}/{p}/{d}" for f, names in parts.items() for p in names for d in ("missing", "extra", "shape")}
    assert set(facts["said"]) == wanted
    for name, said in facts["said"].items():
        family, part, damage = name.split("/")
        assert said.startswith("ValueError"), (name, said)
        assert f"{family}-{part}-{damage}" in said, (name, said)


@pytest.fixture(scope="module")
def vae(comfy, tmp_path_factory):
    work = tmp_path_factory.mktemp("vae")
    z = torch.randn((1, 32, 3, 2), generator=torch.Generator().manual_seed(0))
    return comfy.run("changes:vae", work, {"z": z}, {"work": str(work)})


def test_the_autoencoder_through_cores_nodes(vae, helper):
    out, facts = vae
    for name, image in out.items():
        assert helper.relative(image, out["plain"]) < 1e-5, name
    small, large = facts.get("rows", (0, 1))
    assert small < large
    assert facts.get("oom", True)
    assert not facts["cancel"]


WITHOUT_SERVER = """
import asyncio, os, sys
sys.path.insert(0, {core!r})
os.chdir({core!r})
sys.argv = ["script", "--cpu", "--base-directory", {base!r}]
import comfy.options
comfy.options.enable_args_parsing()
import nodes
asyncio.run(nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))
print("FOUND", *sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith(("DCGen", "DCAE"))))
"""


def test_a_script_without_a_server_has_the_nodes(comfy, tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "ComfyUI-DC-Gen").symlink_to(ROOT, target_is_directory=True)
    script = WITHOUT_SERVER.format(core=str(comfy.root), base=str(tmp_path))
    done = subprocess.run([comfy.setting.python, "-c", script], capture_output=True, text=True, timeout=300)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), done.stderr[-3000:])
    assert len(line.split()) == 1 + 13, line
