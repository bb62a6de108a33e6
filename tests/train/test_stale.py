"""Every kind of stage: with a changed input, killed, on a full disk, and started twice.

One run of all kinds on a few kilobytes is made once; each test works on a copy of it, so that paths differ every time.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train.inputs
import train.run
from train import checkpoint, disk
from train.checkpoint import CheckpointError
from train.config import RecipeError, load_recipe
from train.disk import NoSpace
from train.inputs import Digests, Read, identity
from train.lock import InUse, locked
from train.run import main, run_recipe

RECIPE = """
name: kinds
output: run
defaults:
  base: tiny/release
  autoencoder: tiny/dc-ae
  teacher: tiny/release/vae
  batch: 4
  steps: 4
  checkpoint_every: 2
  log_every: 2
stages:
  tiny: {pictures: 8}
  synthesize: {prompts: prompts.txt, sampling_steps: 1, pixels: 64, multiple: 16, shard_size: 1, steps: 0}
  cache:
    data: &data {type: folder, path: tiny/pictures, pixels: 64, multiple: 16}
    shard_size: 3
    store: float32
    steps: 0
  align: {solver: adamw}
  head: {objective: {w: [0.0, 3.0]}}
  finetune: {rank: 2, alpha: 2, objective: {w: [0.0, 3.0]}}
  full: {kind: finetune, train: full, ema: null, objective: {w: [0.0, 3.0]}}
  gap: {samples: 2, steps: 0}
  export: {forms: [adapter, single, release], steps: 0}
  pretrain: {autocast: false}
  distill: {base: pretrain/release, autocast: false}
  vae:
    kind: autoencoder
    data: toy
    architecture: AutoencoderKL
    batch: 2
    autocast: false
    model:
      down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D, DownEncoderBlock2D]
      up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D]
      block_out_channels: [4, 4, 4]
      layers_per_block: 1
      latent_channels: 4
      norm_num_groups: 4
      mid_block_add_attention: false
  refine: {kind: autoencoder, data: toy, batch: 2, architecture: AutoencoderKL, autocast: false, start: vae/model}
  ae-align: {data: *data}
  evaluator: {data: toy}
  text:
    data: toy
    vae: tiny/release/vae
    width: 32
    layers: 1
    transformer:
      in_channels: 16
      num_layers: 1
      num_single_layers: 1
      attention_head_dim: 8
      num_attention_heads: 2
      axes_dims_rope: [4, 2, 2]
      guidance_embeds: true
  labels:
    data: toy
    vae: tiny/release/vae
    transformer: {num_layers: 1, num_attention_heads: 2, attention_head_dim: 8, patch_size: 2}
    steps: 0
"""
TRAINED = ["align", "head", "finetune", "full", "pretrain", "distill", "vae", "refine", "ae-align", "evaluator", "text"]
UNTRAINED = ["tiny", "synthesize", "cache", "gap", "export", "labels"]
BASE, VAE, DCAE = "run/tiny/release/transformer/*.safetensors", "run/tiny/release/vae/*.safetensors", "run/tiny/dc-ae/"
TEXT = "run/tiny/release/text_encoder/*.safetensors"
CHANGES = [
    *[("synthesize", path) for path in ("prompts.txt", BASE, TEXT, VAE)],
    *[("cache", f"run/tiny/pictures/000{suffix}") for suffix in (".png", ".txt")],
    *[("cache", path) for path in (TEXT, VAE, DCAE + "*.safetensors", DCAE + "config.json")],
    *[("align", path) for path in (BASE, "run/cache/index.json")],
    *[("head", path) for path in (BASE, "run/cache/index.json", "run/align/embedder.safetensors")],
    *[("finetune", path) for path in (BASE, "run/cache/index.json", "run/head/adapter.safetensors")],
    *[("full", path) for path in (BASE, "run/head/adapter.safetensors")],
    *[("gap", path) for path in (BASE, "run/cache/index.json", "run/finetune/adapter.safetensors")],
    *[("export", path) for path in (BASE, TEXT, DCAE + "*.safetensors", "run/finetune/adapter.safetensors")],
    *[("pretrain", path) for path in (BASE, "run/cache/index.json")],
    ("distill", "run/pretrain/release/transformer/*.safetensors"),
    *[(stage, path) for stage in ("vae", "evaluator", "text") for path in ("toy/captions.json", "toy/star.png")],
    ("refine", "run/vae/model/*.safetensors"),
    *[("ae-align", path) for path in ("run/tiny/pictures/000.png", VAE, DCAE + "*.safetensors")],
    ("labels", "toy/captions.json"),
    ("labels", VAE),
]
AGAIN = [(stage, path) for stage, path in CHANGES if stage in TRAINED]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run of all kinds, and its inputs."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "prompts.txt").write_text("a red square\na blue square\n")
    toy = folder / "toy"
    toy.mkdir()
    rng = np.random.default_rng(0)
    for name in ("star", "ball"):
        Image.fromarray(rng.integers(0, 255, (16, 16, 4), dtype=np.uint8)).save(toy / f"{name}.png")
    described = {"template": "{subject} on {color}", "held_out": []}
    described["subjects"] = [{"name": name, "file": f"{name}.png"} for name in ("star", "ball")]
    described["colors"] = [{"name": "red", "rgb": [200, 40, 40]}, {"name": "blue", "rgb": [50, 60, 210]}]
    (toy / "captions.json").write_text(json.dumps(described))
    before = Path.cwd()
    os.chdir(folder)
    try:
        run_recipe(recipe())
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def copy(whole, tmp_path, monkeypatch):
    """A copy of it, which is the current folder. No report is written, which would take most of the time."""
    monkeypatch.setattr(train.run, "write_report", lambda folder: None)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(*overrides):
    return load_recipe(Path("recipe.yaml"), overrides)


def change(pattern: str) -> Path:
    """Other content in a file which can still be read."""
    (path,) = Path().glob(pattern)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = {key: value for key, value in (file.metadata() or {}).items() if key != "dcgen.sha256"}
        values = {name: v * 1.25 if v.is_floating_point() else v for name, v in load_file(path).items()}
        save_file(values, path, metadata=metadata)
    elif path.suffix == ".png":
        image = np.asarray(Image.open(path))
        Image.fromarray(255 - image).save(path)
    else:
        path.write_text(path.read_text() + "\n")
    return path


def results(stage: str, folder: Path = Path()) -> dict[str, object]:
    """What a stage wrote and what must not depend on when and how often it was run."""
    left_out = re.compile(r"done\.json|state\.json|digests\.json|curves\.png|events\..*|\.dcgen.*")
    files = sorted(path for path in (folder / "run" / stage).rglob("*") if path.is_file())
    kept = {path.relative_to(folder).as_posix(): path for path in files if not left_out.fullmatch(path.name)}
    return {name: content(path) for name, path in kept.items()}


def content(path: Path) -> object:
    """A file's bytes; of a log without the last column, which is the speed."""
    if path.suffix == ".safetensors":  # the order of its metadata is random
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
            tensors = {name: (str((t := file.get_tensor(name)).dtype), t.shape, t.float().tolist()) for name in names}
            return file.metadata(), tensors
    return re.sub(rb",[^,]*\r\n", b"\r\n", path.read_bytes()) if path.name == "log.csv" else path.read_bytes()


def test_the_same_content_elsewhere_is_no_change(copy, capsys):
    for path in Path().rglob("*.safetensors"):
        os.utime(path)
    shutil.move("toy", "moved")
    shutil.move("prompts.txt", "other.txt")
    places = [f"{stage}.data=moved" for stage in ("vae", "refine", "evaluator", "text", "labels")]
    run_recipe(recipe(*places, "synthesize.prompts=other.txt"))
    assert capsys.readouterr().out.count("done before") == len(TRAINED) + len(UNTRAINED)
    shutil.rmtree("moved")
    run_recipe(recipe(), only="evaluator")
    assert "data is not there any more: not compared" in capsys.readouterr().out


@pytest.mark.parametrize(("stage", "pattern"), CHANGES)
def test_a_finished_stage_with_a_changed_input_is_refused(copy, stage, pattern):
    path = change(pattern)
    with pytest.raises(RecipeError) as error:
        run_recipe(recipe(), only=stage)
    name = "the file" if path.name == "prompts.txt" else re.escape(path.name)
    assert re.search(rf"has changed: other content in (\S+/)?{name}", str(error.value))
    assert f"--stage {stage} --redo" in str(error.value)


@pytest.mark.parametrize(("stage", "pattern"), AGAIN)
def test_a_training_does_not_go_on_with_a_changed_input(copy, stage, pattern):
    (copy / "run" / stage / "done.json").unlink()
    path = change(pattern)
    with pytest.raises(CheckpointError, match=rf"was trained on other inputs .*{path.name}.*--stage {stage} --redo"):
        run_recipe(recipe(), only=stage)


def test_what_decides_only_the_files_written_is_written_anew(copy):
    name = "run/full/checkpoints/step-00000004/weights.safetensors"
    weights = results("full")[name]
    (config,) = Path().glob(DCAE + "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.25}))
    run_recipe(recipe(), only="full")
    assert results("full")[name] == weights
    assert json.loads(Path("run/full/release/vae/config.json").read_text())["scaling_factor"] == 0.25


def test_images_drawn_by_another_base_are_not_gone_on_with(copy):
    (copy / "run" / "synthesize" / "done.json").unlink()
    change(TEXT)
    with pytest.raises(RecipeError, match=r"holds images of other inputs \(base .*model.safetensors.*--redo"):
        run_recipe(recipe(), only="synthesize")


def test_a_picture_replaced_before_a_cache_is_done_is_encoded_again(copy):
    (copy / "run" / "cache" / "done.json").unlink()
    path = change("run/tiny/pictures/000.png")
    stale = results("cache")
    run_recipe(recipe(), only="cache")
    went_on = results("cache")
    run_recipe(recipe(), only="cache", redo=True)
    assert went_on == results("cache") != stale
    assert path.exists()


def test_redo_of_a_stage_marks_those_made_of_it(copy, capsys):
    before = json.loads(Path("run/cache/done.json").read_text())["run"]
    assert main(["recipe.yaml", "--stage", "cache", "--redo"]) == 0
    now = json.loads(Path("run/cache/done.json").read_text())["run"]
    capsys.readouterr()
    assert main(["recipe.yaml"]) == 1
    error = capsys.readouterr().err
    assert f"one of its inputs (stage cache) was made anew: it is run {now} now, {before} was read" in error
    commands = [f"with --stage {name} --redo" for name in ("align", "head", "finetune", "full", "gap", "export")]
    assert ", then ".join(commands) + ", or" in error
    assert main(["recipe.yaml", "--stage", "export"]) == 0  # what is finished can be exported, and it is said
    assert "stage finetune, which this is made of, is stale: stage cache was made anew" in capsys.readouterr().out
    assert main(["recipe.yaml", "--stage", "align", "--redo"]) == 0
    assert main(["recipe.yaml"]) == 1
    assert "stage head in run/head was finished with other inputs" in capsys.readouterr().err


def test_nothing_runs_where_a_later_stage_is_stale(copy):
    shutil.rmtree("run/gap")
    change(TEXT)
    with pytest.raises(RecipeError, match="stage synthesize"):
        run_recipe(recipe())
    assert not Path("run/gap").exists()


# ---- killed


def die(folder: str, stage: str, number: int) -> None:
    """Run a stage in a process that is killed before its `number`th rename."""
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    replace, seen = os.replace, []

    def counted(*paths):
        seen.append(paths)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = counted
    run_recipe(recipe(), only=stage)


@pytest.mark.parametrize("stage", [*TRAINED, *UNTRAINED])
def test_killed_and_the_same_command_give_the_same_files(whole, copy, processes, stage):
    """In the second checkpoint, or while the second file of the result is written."""
    shutil.rmtree(copy / "run" / stage)
    process = processes.Process(target=die, args=(str(copy), stage, 7 if stage in TRAINED else 3))
    process.start()
    process.join(timeout=100)
    assert process.exitcode == -signal.SIGKILL
    assert not (copy / "run" / stage / "done.json").exists()
    run_recipe(recipe(), only=stage)
    assert results(stage) == results(stage, whole)


# ---- a full disk


@pytest.mark.parametrize("stage", [*TRAINED, *UNTRAINED])
def test_a_full_disk_is_named_and_leaves_no_half_file(whole, copy, monkeypatch, capsys, stage):
    """The disk takes the first file of the stage, and then none."""
    shutil.rmtree(copy / "run" / stage)
    fsync, seen = os.fsync, []

    def full(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        if f"/run/{stage}/" in name and ".tmp" in name:
            seen.append(name)
            if len(seen) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(["recipe.yaml", "--stage", stage]) == 1
    error = capsys.readouterr().err
    assert re.search(rf"No space left on device.*run/{stage}/\S+", error)
    assert "free disk space and run the same command" in error
    assert not [path for path in Path("run").rglob("*") if path.name.endswith(".tmp")]
    run_recipe(recipe(), only=stage)
    assert results(stage) == results(stage, whole)


@pytest.mark.parametrize("stage", TRAINED)
def test_a_training_whose_files_will_not_fit_is_not_begun(copy, monkeypatch, stage):
    shutil.rmtree(copy / "run" / stage)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 5000)
    with pytest.raises(NoSpace, match=r"5 kB are free on its disk, about \S+ .?B are needed \(.*\); free disk space"):
        run_recipe(recipe(), only=stage)
    assert not list(Path("run", stage).rglob("step-*"))


def test_room_for_the_export_is_asked_for_before_the_training(copy, monkeypatch):
    for stage in ("finetune", "export"):
        shutil.rmtree(copy / "run" / stage)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 10**12)
    run_recipe(recipe(), only="finetune")
    shutil.rmtree("run/finetune")
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 150_000)
    with pytest.raises(NoSpace, match=r"later stages \d+ kB"):
        run_recipe(recipe(), only="finetune")
    assert not list(Path("run").glob("finetune/checkpoints/*"))


def test_a_disk_that_fills_up_in_training_keeps_the_last_checkpoint(copy, monkeypatch):
    shutil.rmtree("run/head")
    saved = checkpoint.save

    def fills(*arguments):
        saved(*arguments)
        monkeypatch.setattr(disk, "free_bytes", lambda folder: 100)

    monkeypatch.setattr(checkpoint, "save", fills)
    with pytest.raises(OSError, match=r"checkpoint of step 4 .*100 B are free.*the one before is intact"):
        run_recipe(recipe(), only="head")
    assert [path.name for path in Path("run/head/checkpoints").iterdir()] == ["step-00000002"]


# ---- two processes


@pytest.mark.parametrize("stage", [*TRAINED, *UNTRAINED])
def test_a_second_process_is_refused_by_the_first_ones_name(copy, stage):
    before = results(stage)
    with locked(Path("run")), pytest.raises(InUse, match=rf"run is in use .*process {os.getpid()}, since"):
        run_recipe(recipe(), only=stage, redo=True)
    assert results(stage) == before


# ---- the store of digests


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "base" / "weights.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"one")
    read = []
    digest = train.inputs.sha256
    monkeypatch.setattr(train.inputs, "sha256", lambda path: read.append(path) or digest(path))
    monkeypatch.setattr(train.inputs, "SETTLED", -1.0)

    def take():
        store = Digests(tmp_path)
        record = identity({"base": Read(path.parent, (path, tmp_path / "absent"))}, store)
        store.save()
        return record

    assert take() == take()
    assert len(read) == 1
    state = path.stat()
    path.write_bytes(b"two")  # of the same size, and with the same time of change
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert take()["base"]["files"] == {"weights.safetensors": digest(path)}
    assert len(read) == 2
    (tmp_path / "digests.json").write_text("{")
    assert take()["base"]["count"] == 1
    monkeypatch.setattr(train.inputs, "LISTED", 0)
    assert "files" not in take()["base"]


def test_a_young_file_is_read_every_time(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    store = Digests(tmp_path)
    store.sha256(tmp_path / "a")
    assert not store.known
