"""A fourth family is one module in each `families/` folder, one backbone and a recipe: made up here, and nothing else.

It has ends named by patch size, q k v joined in the original files, and text of as many tokens as words. It trains,
exports and loads in ComfyUI in a copy of the repository to which only its four files were added.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
FILES = Path(__file__).resolve().parent / "family"
PARTS = ("dcgen", "train", "nodes", "web", "locales", "__init__.py", "pyproject.toml")
RUN = "runs/debug-pebble"

VELOCITIES = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from train.generate import Pipeline
run, inputs, out = Path(sys.argv[1]), load_file(sys.argv[2]), {}
models = {
    "base": Pipeline(run / "tiny/release"),
    "adapter": Pipeline(
        run / "tiny/release", adapter=run / "export/debug-pebble.safetensors", autoencoder=run / "tiny/dc-ae"
    ),
}
for name, model in models.items():
    cond = {"text": inputs["text"], "mask": inputs["mask"]}
    out[name] = model.velocity(inputs[f"{name}/x"], inputs["sigma"], cond, None).detach().contiguous()
save_file(out, sys.argv[3])
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A copy of the repository with the family's files, none of which takes the place of another."""
    folder = tmp_path_factory.mktemp("pebble") / "pack"
    folder.mkdir()
    for part in PARTS:
        ignore = shutil.ignore_patterns("__pycache__")
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
        copy(ROOT / part, folder / part, **({"ignore": ignore} if copy is shutil.copytree else {}))
    added = [path.relative_to(FILES) for path in FILES.rglob("*") if path.suffix in (".py", ".yaml")]
    assert len(added) == 4
    for path in added:
        assert not (folder / path).exists()
        shutil.copy2(FILES / path, folder / path)
    return folder


def run(pack, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(pack)}
    done = subprocess.run([sys.executable, *arguments], cwd=pack, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(pack):
    """The run of its recipe: tiny release, cache, alignment, head, LoRA, export."""
    run(pack, "-m", "train.run", "debug-pebble")
    return pack / RUN


@pytest.fixture(scope="module")
def inputs(trained):
    torch.manual_seed(3)
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    return {
        "base/x": torch.randn(2, 4, 8, 6),
        "adapter/x": torch.randn(2, 8, 4, 3),
        "sigma": torch.tensor([0.3, 0.8]),
        "text": torch.randn(2, 5, 12),
        "mask": mask,
    }


@pytest.fixture(scope="module")
def velocities(comfy, pack, trained, inputs, tmp_path_factory):
    """(training's velocities, ComfyUI's, what ComfyUI's models say of themselves)."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("velocities")
    save_file(inputs, folder / "in.safetensors")
    run(pack, "-c", VELOCITIES, str(trained), str(folder / "in.safetensors"), str(folder / "out.safetensors"))
    params = {"run": str(trained)}
    out, facts = comfy.run("made_up_family:velocities", folder, inputs, params, alone=True, pack=pack)
    return load_file(folder / "out.safetensors"), out, facts


def test_velocity_in_comfyui_is_trainings(velocities):
    expected, found, _ = velocities
    for name, velocity in found.items():
        wanted = expected["base" if name.startswith("base") else "adapter"]
        assert ((velocity - wanted).norm() / wanted.norm()).item() < 1e-4, name
    assert set(found) == {"base", "adapter", "single", "release", "base again", "hooked"}


def test_the_lora_was_trained(velocities):
    """The adapter at strength 0 is not what training made: 3 steps at a high rate moved the blocks."""
    facts = velocities[2]
    assert facts["aligned"] > 1e-3
    assert facts["lora by transformers' names"] > 1e-3


def test_the_model_says_what_it_is(velocities):
    _, _, facts = velocities
    assert facts["family"] == ["pebble", "pebble"]
    assert facts["channels"] == [4, 8]
    assert facts["ends"] == ["embed.1x1", "final.1x1"], "the base's own ends are not in the model that is saved"
    assert "already runs on" in facts["twice"]


def test_another_base_of_its_shape_is_refused(velocities):
    assert "trained over other weights" in velocities[2]["other base"]


def test_text_is_cached_ragged(trained):
    index = json.loads((trained / "cache" / "index.json").read_text())
    lengths = {len(caption.split()) for caption in index["captions"]}
    assert len(lengths) > 1
    shard = next((trained / "cache" / "shards").glob("text-*.safetensors"))
    rows = load_file(shard)
    assert rows["text"].shape == (sum(len(c.split()) for c in index["captions"][: len(rows["text.lengths"])]), 12)
