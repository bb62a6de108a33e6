"""docs/training.md as a person follows it: its own commands, in order, on narrow models in the published layouts.

What is narrowed: pixels by 8, steps, batch and rank. Types, latents, token geometry, folders, forms and data formats
are those of the recipes.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dcgen.adapter import check_model, load_adapter
from dcgen.release import open_model
from tests.train.published import REPOSITORIES
from train.config import load_recipe
from train.distributed import Ranks
from train.generate import Pipeline
from train.lora import load_lora, scale_lora
from train.run import main, make_stage
from train.to_safetensors import main as to_safetensors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
PIXELS = {"synthetic-flux": 512, "flux-512": 512, "flux-1k": 1024, "flux-2k": 2048, "flux-4k": 4096}
PIXELS |= {"synthetic-sana": 1024, "sana-1.6b": 1024, "sana-4.8b": 1024, "dit-xl-256": 256, "dit-xl-512": 512}
PROMPTS = ["dog face on a white background", "a robot", "strawberry on a blue background", "rocket"]
TRAINING = ["steps=2", "batch=2", "accumulate=1"]
LOUD = ["optimizer={lr: 0.02, clip: 1.0}", "ema=0.5", "rank=2", "alpha=2"]  # so that two steps show


def section(title: str) -> list[list[str]]:
    """The commands in the code blocks of a section, as words."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line]


def recipe_of(words: list[str]) -> list[str]:
    """Arguments of train.run in a command: by python or torchrun."""
    return words[words.index("train.run") + 1 :]


def narrow(arguments: list[str]) -> list[str]:
    """The arguments with what makes them run in seconds."""
    name = arguments[0]
    stated = [int(item.partition("=")[2]) for item in arguments if item.startswith("synthesize.pixels=")]
    pixels = (stated or [PIXELS[name]])[0] // 8
    if name.startswith("synthetic"):
        own = [f"pixels={pixels}", "multiple=32", "sampling_steps=2", "batch=4"]
        return [*arguments, *(f"synthesize.{item}" for item in own)]
    # the deepest DC-AE and a patch of the base both divide what is left
    small = [f"cache.data.pixels={max(pixels, 64)}", "cache.batch=4"]
    for stage, config in load_recipe(name).stages.items():
        if config.kind in ("head", "finetune"):
            small += [f"{stage}.{item}" for item in (*TRAINING, *(LOUD if config.kind == "finetune" else []))]
    return [*arguments, *small]


def follow(commands: list[list[str]]) -> None:
    """Run commands here, each in one process."""
    for words in commands:
        if words[:2] == ["hf", "download"]:
            folder = Path(words[words.index("--local-dir") + 1])
            if not folder.exists():
                REPOSITORIES[words[2]](folder)
        elif "train.run" in words:
            assert main(narrow(recipe_of(words))) == 0, words
        elif words[:3] == ["python", "-m", "train.to_safetensors"]:
            assert to_safetensors(words[3:]) == 0
        else:
            subprocess.run(shlex.join(words).replace("'>'", ">"), shell=True, check=True)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the guide says is yours."""
    folder = tmp_path_factory.mktemp("guide")
    photos = folder / "data" / "photos-4k"
    photos.mkdir(parents=True)
    (folder / "data" / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    for number in range(3):
        Image.new("RGB", (540, 520), (60 * number, 90, 200)).save(photos / f"{number}.jpg")
        (photos / f"{number}.txt").write_text(PROMPTS[number])
    before = Path.cwd()
    os.chdir(folder)
    torch.manual_seed(0)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def road(desk):
    """Everything on the way to FLUX at 4K."""
    follow(section("FLUX, from the published weights to 4K"))
    return desk


def _rank(arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    """One rank of a command, in its own process."""
    os.chdir(folder)
    os.environ.update(environment)
    sys.stderr = open(f"errors-{environment['RANK']}.txt", "w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def trained(name: str, folder: Path, dtype: torch.dtype):
    """The fine-tuning stage of a recipe, its network of that type with what it has learnt."""
    recipe = load_recipe(name, [*narrow([name])[1:], f"dtype={str(dtype).removeprefix('torch.')}"])
    stage = make_stage(recipe, "finetune", Ranks(0, 1, torch.device("cpu")))
    stage.setup().eval()
    adapter = load_adapter(folder / "finetune" / "adapter.safetensors")
    stage.load_ends(adapter.tensors)
    load_lora(stage.model, adapter.lora)
    return stage, adapter


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def velocities(name: str, folder: Path, form: Path, base: Path | None, dtype: torch.dtype = torch.float32):
    """(of a form that was exported, of training, of training without its LoRA) at random latents.

    In float32 what was trained is added to the base's bfloat16 weights without rounding; base None: the merged release.
    """
    stage, adapter = trained(name, folder, dtype)
    space, p = adapter.latent, adapter.patch_size
    x = torch.randn(2, space.channels, 4 * p, 4 * p, generator=torch.Generator().manual_seed(1))
    sigma, scale = torch.tensor([0.3, 0.9]), torch.tensor([1.0, 3.5])
    release = folder / "export" / "release"
    parts = {"adapter": form, "autoencoder": release / "vae"} if base else {}
    pipeline = Pipeline(base or release, dtype=dtype, text_tokens=stage.cache.text_tokens, **parts)
    captions = PROMPTS[:2] if stage.family.text_parts else ["class 1", "class 7"]
    cond = pipeline.text(captions)
    with torch.no_grad():
        wanted = stage.velocity(x, sigma, cond, scale if stage.distilled else None)
        scale_lora(stage.model, 0.0)
        without = stage.velocity(x, sigma, cond, scale if stage.distilled else None)
    return pipeline.velocity(x, sigma, cond, scale), wanted, without


def test_the_guide_reads_no_folder_that_nothing_before_it_makes():
    """By what the commands state and the recipes name; data/ is yours but for what is made from it."""
    for title in ("FLUX, from the published weights to 4K", "SANA", "DiT"):
        made = {"data/prompts.txt", "data/photos-4k"}
        for words in section(title):
            if words[:2] == ["hf", "download"]:
                made.add(words[words.index("--local-dir") + 1])
            elif ">" in words:
                made.add(words[-1])
            elif "train.run" in words:
                recipe = load_recipe(recipe_of(words)[0], recipe_of(words)[1:])
                read = {
                    str(value)
                    for config in recipe.stages.values()
                    for value in (*vars(config).values(), getattr(getattr(config, "data", None), "path", ""))
                    if isinstance(value, str | Path) and str(value).startswith(("models/", "data/", "runs/"))
                }
                missing = [path for path in read if not any(path == m or path.startswith(f"{m}/") for m in made)]
                assert not missing, (words, missing)
                made.add(str(recipe.folder))


def test_flux_to_4k(road):
    runs = road / "runs"
    assert {path.name for path in runs.iterdir()} == {
        *("synthetic-flux", "synthetic-flux-1k", "synthetic-flux-2k", "flux-512", "flux-1k", "flux-2k", "flux-4k")
    }
    before = road / "models" / "FLUX.1-Krea-dev"
    for name in ("flux-512", "flux-1k", "flux-2k", "flux-4k"):
        folder = runs / name
        adapter = folder / "export" / f"{name}.safetensors"
        check_model(load_adapter(adapter), open_model(before))
        found, wanted, without = velocities(name, folder, adapter, before)
        assert error(found, wanted) < 1e-4, name
        assert error(without, wanted) > 0.02
        merged, _, _ = velocities(name, folder, adapter, None)
        assert error(merged, wanted) < 0.05, name  # its weights are stored in bfloat16, as the base's
        found, wanted, _ = velocities(name, folder, adapter, before, torch.bfloat16)
        assert error(found, wanted) < 0.1, name
        assert not list((folder / "export" / "release").glob("*.png"))
        assert (folder / "export" / f"{name}-over-original.safetensors").is_file() == (name != "flux-512")
        before = folder / "export" / "release"
    latent = load_adapter(runs / "flux-4k" / "export" / "flux-4k.safetensors").latent
    assert (latent.spatial_factor, latent.channels) == (64, 128)


def test_the_4k_adapter_over_the_published_base_does_all_steps(road):
    folder = road / "runs" / "flux-4k"
    over = folder / "export" / "flux-4k-over-original.safetensors"
    found, wanted, _ = velocities("flux-4k", folder, over, road / "models" / "FLUX.1-Krea-dev")
    assert error(found, wanted) < 0.05  # what was merged was stored in bfloat16 three times on the way


def test_the_same_command_on_two_ranks(road, processes):
    """flux-512 by torchrun, as the guide has it but for the number of cards."""
    (words,) = [w for w in section("FLUX, from the published weights to 4K") if w[-1] == "flux-512"]
    arguments = [*narrow(recipe_of(words)), "output=runs/two-ranks"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = []
    for rank in range(2):
        place = {**where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(processes.Process(target=_rank, args=(arguments, place, road)))
        ranks[-1].start()
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0, 0], (road / "errors-0.txt").read_text()[-3000:]
    one, two = (
        load_file(road / "runs" / run / "finetune" / "adapter.safetensors") for run in ("flux-512", "two-ranks")
    )
    assert one.keys() == two.keys()
    for name, value in one.items():  # bfloat16 products in another order, two AdamW steps
        assert (two[name].float() - value.float()).abs().mean() < 0.01, name


@pytest.mark.parametrize(
    ("title", "names"), [("SANA", ("sana-1.6b", "sana-4.8b")), ("DiT", ("dit-xl-256", "dit-xl-512"))]
)
def test_sana_and_dit(desk, title, names):
    follow(section(title))
    for name in names:
        recipe = load_recipe(name)
        folder = desk / "runs" / name
        base = Path(recipe.stages["finetune"].base)
        found, wanted, without = velocities(name, folder, folder / "export" / f"{name}.safetensors", base)
        assert error(found, wanted) < 1e-4, name
        assert error(without, wanted) > 0.02
