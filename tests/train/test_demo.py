"""The demo's edges: threads, the estimate, how it ends. What it draws is in tests/toy."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train import demo, threads
from train.config import RecipeError, load_recipe
from train.loop import Stopped
from train.run import exit_code

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def _threads_again():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_waiting_threads_are_told_to_sleep_before_torch_is_loaded():
    look = """
import os, sys
from importlib.machinery import ModuleSpec
class Look:
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "torch" else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("KMP_BLOCKTIME"), flush=True)
        os._exit(0)
sys.meta_path.insert(0, Look())
import train.demo
"""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["PASSIVE", "0"], done.stderr


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 1.0, 2: 12.0}, 1),
        ({1: 1.0, 2: 0.97}, 1),
        ({1: 1.0, 2: 0.6}, 2),
        ({1: 1.0, 4: 0.4, 16: 0.39}, 4),
        ({2: 1.0}, 2),
    ],
)
def test_more_threads_only_where_they_clearly_gain(seconds, best):
    assert threads.fastest(seconds) == best


@pytest.mark.usefixtures("_threads_again")
def test_the_faster_number_is_set(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_round", lambda: {1: 3.0, 2: 1.0}[torch.get_num_threads()])
    torch.set_num_threads(2)
    assert threads.choose_threads() == (2, 1.0)
    assert torch.get_num_threads() == 2
    monkeypatch.setattr(threads, "_round", lambda: {1: 3.0, 2: 30.0}[torch.get_num_threads()])
    assert threads.choose_threads() == (1, 3.0)
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("_threads_again")
def test_omp_num_threads_decides(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(threads, "_round", lambda: {1: 1.0, 2: 9.0}[torch.get_num_threads()])
    assert threads.choose_threads() == (2, 9.0)


@pytest.mark.parametrize("name", list(demo.DEMOS))
def test_what_is_done_is_not_estimated_again(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(name, [f"output={tmp_path}"])
    whole = demo.rounds(recipe)
    for stage in recipe.stages:
        (recipe.folder / stage).mkdir(parents=True)
        (recipe.folder / stage / "done.json").touch()
        left = demo.rounds(recipe)
        assert left <= whole
        whole = left
    assert whole == demo.DRAWING


@pytest.mark.parametrize("ran", [True, False])
def test_the_end_says_what_is_where_and_what_to_do_with_it(ran, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("toy-sana", [f"output={tmp_path}"])
    file = recipe.folder / "export" / "toy-sana-dcgen.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    comfyui = {"ran": True, "image": "comfyui.png"} if ran else {"ran": False, "why": demo.NO_COMFYUI}
    text = demo.made(recipe, tmp_path, {"seconds": 3.0, "comfyui": comfyui})
    assert str(file) in text
    assert "put it in ComfyUI/models/model_patches" in text
    assert "dcgen_toy_sana" in text
    assert ("comfyui.png" in text) is ran
    assert (demo.NO_COMFYUI in text) is not ran


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "the same command goes on"),
        (Stopped("stopped by a signal after step 3", signal.SIGINT), 130, "after step 3"),
        (Stopped("stopped by a signal after step 3", signal.SIGTERM), 143, "after step 3"),
        (RecipeError("no such stage"), 1, "error: no such stage"),
    ],
)
def test_the_demo_ends_without_a_traceback(error, code, said, monkeypatch, capsys):
    def stop(_options):
        raise error

    monkeypatch.setattr(demo, "_demo", stop)
    assert demo.main([]) == code
    assert said in capsys.readouterr().err
    assert exit_code(lambda: 0) == 0
